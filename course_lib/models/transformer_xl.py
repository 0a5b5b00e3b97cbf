"""Transformer-XL: a decoder that reads a text in segments and remembers the last ones.

TransformerXL   one segment and the memory before it -> logits and the memory after it
InSegments      a whole sequence, read in segments from an empty memory
Remembering     a stream: each call goes on where the last one ended
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import layers, masks
from .config import TransformerConfig
from .transformer import Embedding, initialise, make_head, make_stack

ABSOLUTE = ("learned", "sinusoidal")


class TransformerXL(nn.Module):
    """A decoder whose layers also look at what they read in the segments before.

    What a layer remembers are its inputs, not its keys: the weights of now make keys of them. The
    gradient stops at the seam. Positions are relative and count on over the seam.
    Source: Dai et al. 2019, "Transformer-XL", §3.2 (recurrence), §3.3 (position="transformer_xl").

    Args:
        config: with a position that knows distances only; max_length limits one segment.
        memory_length: most tokens that each layer remembers; 0 for a plain decoder. It may be set
            anew at any time, as `model.memory_length = 256`: evaluation often takes more than
            training did.

    Raises:
        ValueError: memory_length is negative, positions are absolute, or attention is not full.
    """

    def __init__(self, config: TransformerConfig, *, memory_length: int) -> None:
        super().__init__()
        _check_config(config)
        check_counts(memory_length=memory_length)
        self.config, self.memory_length = config, memory_length
        self.embedding = Embedding(config, config.vocab_size)
        self.stack = make_stack(config, layers.MemoryLayer, causal=True)
        initialise(self.stack, config)
        self.head = make_head(config, self.embedding)

    def forward(
        self,
        tokens: Int[Tensor, "batch n"],
        memory: Sequence[Tensor] | None = None,
        *,
        return_weights: bool = False,
    ) -> Any:
        """(logits, memory), or (logits, memory, [weights of each layer]).

        Args:
            tokens: the segment, (batch, n) of integers.
            memory: what the segment before gave: for each layer (batch, m, d_model) with m up to
                memory_length. None at the beginning of a text.
            return_weights: also return the weights, a list of (batch, heads, n, m + n).

        Returns:
            Logits (batch, n, vocab_size), and the memory for the next segment, without gradient.

        Raises:
            TypeError, ValueError: tokens are outside the vocabulary or too many, or the memory is
                of another batch, width or number of layers.
        """
        x = self.embedding(tokens)  # (batch, n, d_model)
        before = self._empty(x) if memory is None else list(memory)
        check_memory(before, x, len(self.stack.layers), Tensor)
        after, weights = [], []
        for layer, old in zip(self.stack.layers, before, strict=True):
            after.append(layers.extend_memory(x, old, self.memory_length))
            result = layer(x, masks.causal(), memory=old, return_weights=return_weights)
            x, *seen = result if return_weights else (result,)
            weights += seen
        logits = self.head(self.stack.norm(x))  # (batch, n, d_model) -> (batch, n, vocab_size)
        return (logits, after, weights) if return_weights else (logits, after)

    def reach(self, length: int) -> int:
        """How many tokens before a segment can matter to it, if all segments have this length.

        A layer sees memory_length back from the first token of its segment. What it sees there was
        read in a segment that saw, one layer below, memory_length back from its own first token,
        and so on: layers · memory_length where the memory holds whole segments. So far a token can
        matter; but no gradient goes through a memory, and what must pass through two of them is
        not learned by itself. Source: Dai et al. 2019, §3.2.
        """
        check_counts(1, length=length)
        each = self._back(length)
        return each + (len(self.stack.layers) - 1) * length * math.ceil(each / length)

    def _back(self, length: int) -> int:
        """How far back one layer sees from the first token of a segment."""
        return self.memory_length

    def _empty(self, x: Tensor) -> list[Tensor]:
        return [x.new_zeros(len(x), 0, x.shape[2]) for _ in self.stack.layers]


class InSegments(nn.Module):
    """A model with memory that reads each sequence in segments, from an empty memory.

    Nothing stays between calls, so that it trains and is measured as any model is; but the gradient
    stops at every seam.

    Args:
        model: (tokens, memory) -> (logits, memory), as `TransformerXL`.
        length: of a segment; the last one may be shorter.
        return_reconstruction: forward returns (logits, loss) with the mean loss of a
            `CompressiveTransformer` over the segments.
    """

    def __init__(
        self, model: nn.Module, length: int, *, return_reconstruction: bool = False
    ) -> None:
        super().__init__()
        check_counts(1, length=length)
        self.model, self.length = model, length
        self.options = {"return_reconstruction": True} if return_reconstruction else {}

    def forward(self, tokens: Int[Tensor, "batch n"]) -> Any:
        """Logits (batch, n, vocab_size), the same as in one pass where the memory suffices."""
        memory, logits, losses = None, [], []
        for segment in tokens.split(self.length, dim=1):
            found, memory, *loss = self.model(segment, memory, **self.options)
            logits.append(found)
            losses += loss
        joined = torch.cat(logits, dim=1)  # (batch, n, vocab_size)
        return (joined, torch.stack(losses).mean()) if losses else joined


class Remembering(nn.Module):
    """A model with memory that goes on where it stopped: each call is the next segment of a stream.

    With `data.stream_batches`, `training.fit` and `training.mean_loss` need to know nothing of it.
    Training and evaluation have a memory each, and `eval()` begins a new text: measuring twice
    gives the same number, and does not disturb training. `generation.generate` writes with a memory
    of its own (as long as use_cache is True), a step costing the same however long the text is.

    Args:
        model: (tokens, memory) -> (logits, memory), as `TransformerXL`.
        return_reconstruction: forward returns (logits, loss) with the loss of a
            `CompressiveTransformer`.
    """

    def __init__(self, model: nn.Module, *, return_reconstruction: bool = False) -> None:
        super().__init__()
        self.model = model
        self.options = {"return_reconstruction": True} if return_reconstruction else {}
        self.forget()

    def forward(self, tokens: Int[Tensor, "batch n"], cache: list[Memory] | None = None) -> Any:
        """Logits (batch, n, vocab_size) of the next segment; cache: a memory to use instead."""
        kept = self._memories[self.training] if cache is None else cache[0]
        options = self.options if cache is None else {}
        logits, kept.content, *loss = self.model(tokens, kept.content, **options)
        return (logits, *loss) if loss else logits

    def forget(self) -> None:
        """Begin a new text, in training and in evaluation."""
        self._memories = {True: Memory(), False: Memory()}

    def new_cache(self) -> list[Memory]:
        """An empty memory, for `generation.generate`."""
        return [Memory()]

    def train(self, mode: bool = True) -> Remembering:
        """As in any module; evaluation begins with an empty memory each time."""
        if not mode:
            self._memories[False] = Memory()
        return super().train(mode)

    def get_extra_state(self) -> Any:
        """What training remembers is a part of its state, as the weights are: for checkpoints."""
        content = self._memories[True].content
        return content and [tuple(m) if isinstance(m, tuple) else m for m in content]

    def set_extra_state(self, state: Any) -> None:
        self._memories[True].content = state


class Memory:
    """What a model with memory remembers, between two calls; None at the beginning of a text."""

    content: Any = None


def check_counts(least: int = 0, **counts: int) -> None:
    """Raise ValueError unless each is a whole number from `least` on; names the one that is not."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be a whole number, at least {least}, got {count!r}")


def check_memory(
    memory: Sequence[Any], x: Float[Tensor, "batch n d_model"], num_layers: int, kind: type
) -> None:
    """Raise ValueError unless memory fits the layers and the segment x."""
    if len(memory) != num_layers:
        raise ValueError(f"memory is of {len(memory)} layers, but the model has {num_layers}")
    for layer in memory:
        if not isinstance(layer, kind):
            raise ValueError(
                f"memory must hold a {kind.__name__} for each layer, got {type(layer).__name__}: "
                "is it of another model?"
            )
        for part in layer if isinstance(layer, tuple) else (layer,):
            if part.ndim != 3 or (part.shape[0], part.shape[2]) != (x.shape[0], x.shape[2]):
                raise ValueError(
                    f"memory must be (batch={x.shape[0]}, length, d_model={x.shape[2]}) for each "
                    f"layer, got {tuple(part.shape)}; a new text begins with memory=None"
                )


def _check_config(config: TransformerConfig) -> None:
    if config.position in ABSOLUTE:
        raise ValueError(
            f'position="{config.position}" counts from the beginning of each segment, so that '
            "tokens of the memory would stand where those of the segment stand: take a relative "
            'one, such as "transformer_xl" or "rotary"'
        )
    if config.attention != "full":
        raise ValueError(f'attention must be "full" to look at a memory, got "{config.attention}"')
