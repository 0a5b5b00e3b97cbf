"""The recurrent baseline that attention is compared with."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .tokens import check_tokens


class LSTMLanguageModel(nn.Module):
    """Next-token model: embedding, LSTM, linear head.

    Each step computes, from the token x_t and the previous state (h, c),
        i, f, o = σ(W x_t + U h + b)      g = tanh(W x_t + U h + b)
        c' = f ⊙ c + i ⊙ g                h' = o ⊙ tanh(c')
    so n tokens take n steps, one after the other.

    Source: Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; the forget gate f is from
    Gers, Schmidhuber & Cummins 2000, its bias of 1 at the start (remember by default) from
    Jozefowicz, Zaremba & Sutskever 2015, §2.2.

    Args:
        vocab_size: number of distinct tokens.
        d_model: width of the embedding.
        hidden_size: width of the state; None takes `d_model`.
        num_layers: LSTM layers on top of one another.
        dropout: between LSTM layers, in training mode only; needs num_layers > 1.
        forget_bias: bias of every forget gate at the start.

    Raises:
        ValueError: a size is below 1 or `dropout` is not in [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        hidden_size: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        *,
        forget_bias: float = 1.0,
    ) -> None:
        super().__init__()
        hidden_size = d_model if hidden_size is None else hidden_size
        _check_sizes(vocab_size, d_model, hidden_size, num_layers, dropout)
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.lstm = nn.LSTM(d_model, hidden_size, num_layers, dropout=dropout, batch_first=True)
        self.head = nn.Linear(hidden_size, vocab_size)
        _set_forget_bias(self.lstm, forget_bias)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        """Logits of the token after each position; position t has seen tokens 0 … t.

        Raises:
            TypeError: `tokens` are not int32 or int64.
            ValueError: `tokens` is not (batch, length), or a token is outside the vocabulary.
        """
        check_tokens(tokens, self.vocab_size)
        x = self.embedding(tokens)  # (batch, length) -> (batch, length, d_model)
        states, _ = self.lstm(x)  # (batch, length, hidden): one state per position, from a zero one
        return self.head(states)  # (batch, length, vocab)


def _set_forget_bias(lstm: nn.LSTM, value: float) -> None:
    """PyTorch adds two biases per gate (order i, f, g, o): `value` goes in one, 0 in the other."""
    forget = slice(lstm.hidden_size, 2 * lstm.hidden_size)
    with torch.no_grad():
        for name, bias in lstm.named_parameters():
            if name.startswith("bias_ih"):
                bias[forget] = value
            elif name.startswith("bias_hh"):
                bias[forget] = 0.0


def _check_sizes(
    vocab_size: int, d_model: int, hidden_size: int, num_layers: int, dropout: float
) -> None:
    sizes = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if dropout and num_layers == 1:
        raise ValueError(f"dropout={dropout} acts between layers and needs num_layers of 2 or more")
