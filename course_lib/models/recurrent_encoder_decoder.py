"""The recurrent baseline of translation: two LSTMs, and additive attention between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import masks
from .tokens import check_tokens

Lengths = Sequence[int] | Tensor
State = tuple[Tensor, Tensor]


class StateCache:
    """The decoder's state so far: h and c (1, batch, hidden), and the last look (batch, hidden)."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.look: Tensor | None = None  # (batch, hidden)
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these elements of the batch, in this order: what beam search needs."""
        if self.state is not None and self.look is not None:
            h, c = self.state
            self.state, self.look = (h[:, rows], c[:, rows]), self.look[rows]


class AdditiveAttention(nn.Module):
    """score(q, k) = vᵀ tanh(W q + U k): a small network compares query and key.

    Source: Bahdanau, Cho & Bengio 2015, §3.1 and appendix A.1.2.
    """

    def __init__(self, d_query: int, d_key: int, d_hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(d_query, d_hidden, bias=False)
        self.key = nn.Linear(d_key, d_hidden, bias=False)
        self.score = nn.Linear(d_hidden, 1, bias=False)

    def forward(
        self,
        query: Float[Tensor, "batch d_query"],
        context: Float[Tensor, "batch n_k d_key"],
        keys: Float[Tensor, "batch n_k d_hidden"],
        mask: Tensor | None,
    ) -> tuple[Float[Tensor, "batch d_key"], Float[Tensor, "batch n_k"]]:
        """What the query sees of the context, and its weights; keys is `self.key(context)`."""
        hidden = torch.tanh(self.query(query)[:, None] + keys)  # (batch, n_k, d_hidden)
        scores = self.score(hidden)[..., 0]  # (batch, n_k)
        if mask is not None:
            # finfo.min and not -inf: a source of nothing but padding gives no NaN
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1)
        return (weights[:, None] @ context)[:, 0], weights  # (b, 1, n_k) x (b, n_k, d) -> (b, d)


class LSTMEncoderDecoder(nn.Module):
    """A bidirectional LSTM reads the source; an LSTM writes the target, looking back at each step.

    The decoder's step reads the last token and what it saw last, then looks at the source with its
    new state. Source: Bahdanau, Cho & Bengio 2015, §3 (there with gated recurrent units; feeding
    the look to the next step: Luong, Pham & Manning 2015, §3.3).

    Args:
        vocab_size: of the target. source_vocab_size: of the source; vocab_size unless given.
        d_model: width of embeddings and of the decoder's state; even.

    Raises:
        ValueError: a size is below 1, or d_model is odd.
    """

    def __init__(
        self, vocab_size: int, d_model: int, *, source_vocab_size: int | None = None
    ) -> None:
        super().__init__()
        source_vocab_size = vocab_size if source_vocab_size is None else source_vocab_size
        for name, size in (("vocab_size", vocab_size), ("source_vocab_size", source_vocab_size)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if d_model < 2 or d_model % 2:
            raise ValueError(f"d_model must be even and at least 2, got {d_model}")
        self.vocab_size, self.source_vocab_size = vocab_size, source_vocab_size
        self.source_embedding = nn.Embedding(source_vocab_size, d_model)
        self.target_embedding = nn.Embedding(vocab_size, d_model)
        self.reader = nn.LSTM(d_model, d_model // 2, batch_first=True, bidirectional=True)
        self.writer = nn.LSTM(2 * d_model, d_model, batch_first=True)
        self.attention = AdditiveAttention(d_model, d_model, d_model)
        self.mix = nn.Linear(2 * d_model, d_model)
        self.head = nn.Linear(d_model, vocab_size)

    def forward(
        self,
        source: Int[Tensor, "batch n_k"],
        target: Int[Tensor, "batch n_q"],
        source_padding: Lengths | None = None,
        target_padding: Lengths | None = None,
        *,
        return_weights: bool = False,
    ) -> Any:
        """Logits (batch, n_q, vocab_size), or (logits, weights (batch, n_q, n_k)).

        Arguments as in `EncoderDecoder`; the target's padding needs no mask, for it comes last.
        """
        states = self.encode(source, source_padding)
        return self.decode(target, states, source_padding, return_weights=return_weights)

    def encode(
        self, source: Int[Tensor, "batch n_k"], source_padding: Lengths | None = None
    ) -> Float[Tensor, "batch n_k d_model"]:
        """One state per source token, from both directions; padding is not read."""
        check_tokens(source, self.source_vocab_size, name="source")
        x = self.source_embedding(source)  # (batch, n_k, d_model)
        if source_padding is None:
            return self.reader(x)[0]
        lengths = torch.as_tensor(source_padding).cpu().clamp(1, source.shape[1])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, _ = self.reader(packed)
        return pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])[0]

    def decode(
        self,
        target: Int[Tensor, "batch n_q"],
        states: Float[Tensor, "batch n_k d_model"],
        source_padding: Lengths | None = None,
        target_padding: Lengths | None = None,
        *,
        cache: list[StateCache] | None = None,
        return_weights: bool = False,
    ) -> Any:
        """Logits, one step after the other; with a cache, target holds the new tokens only."""
        check_tokens(target, self.vocab_size, name="target")
        kept = StateCache() if cache is None else cache[0]
        keys = self.attention.key(states)  # (batch, n_k, d_model), once for all steps
        mask = None
        if source_padding is not None:
            mask = masks.padding(source_padding).dense(1, states.shape[1], states.device)[:, 0, 0]
        look = states.new_zeros(len(target), states.shape[2]) if kept.look is None else kept.look
        looks, all_weights, state = [], [], kept.state
        for token in self.target_embedding(target).unbind(1):  # n_q times (batch, d_model)
            out, state = self.writer(torch.cat([token, look], -1)[:, None], state)
            seen, weights = self.attention(out[:, 0], states, keys, mask)
            look = torch.tanh(self.mix(torch.cat([out[:, 0], seen], -1)))  # (batch, d_model)
            looks.append(look)
            all_weights.append(weights)
        kept.state, kept.look, kept.length = state, look, kept.length + target.shape[1]
        logits = self.head(torch.stack(looks, 1))  # (batch, n_q, d_model) -> (…, vocab_size)
        return (logits, torch.stack(all_weights, 1)) if return_weights else logits

    def new_cache(self) -> list[StateCache]:
        """An empty cache."""
        return [StateCache()]
