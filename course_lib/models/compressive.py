"""The Compressive Transformer: what falls out of the memory is compressed, not forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import layers, masks
from .config import TransformerConfig
from .transformer_xl import TransformerXL, check_counts, check_memory


class CompressiveMemory(NamedTuple):
    """What one layer remembers, the oldest first; attention sees both, then the segment."""

    compressed: Float[Tensor, "batch m_compressed d_model"]
    recent: Float[Tensor, "batch m d_model"]


class CompressiveTransformer(TransformerXL):
    """A Transformer-XL with a second memory for what falls out of the first.

    Each `rate` neighbours that leave the memory become one vector of the compressed memory. So a
    layer reaches memory_length + rate · compressed_length tokens back by looking at
    memory_length + compressed_length vectors. To positions, a compressed vector is one place.
    Source: Rae et al. 2020, "Compressive Transformers for Long-Range Sequence Modelling", §3.

    Args:
        config: as in `TransformerXL`.
        memory_length: tokens remembered as they were; up to rate - 1 more wait there for their
            group.
        compressed_length: most compressed vectors kept.
        rate: how many become one.
        compression: "mean", "max", or "conv", which learns from `layers.reconstruction_loss` alone:
            add it to the loss. The loss of the task does not reach the compression, and the
            reconstruction does not reach the rest.

    Raises:
        ValueError: a size is impossible, there is no such compression, or as in `TransformerXL`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        memory_length: int,
        compressed_length: int,
        rate: int,
        compression: str = "mean",
    ) -> None:
        super().__init__(config, memory_length=memory_length)
        check_counts(compressed_length=compressed_length)
        check_counts(1, rate=rate)
        self.compressed_length, self.rate = compressed_length, rate
        self.compressions = nn.ModuleList(
            layers.Compression(config.d_model, rate, compression) for _ in self.stack.layers
        )

    def forward(
        self,
        tokens: Int[Tensor, "batch n"],
        memory: Sequence[Any] | None = None,
        *,
        return_weights: bool = False,
        return_reconstruction: bool = False,
    ) -> Any:
        """(logits, memory), then the loss and the weights of each layer where they are asked for.

        Args:
            tokens, memory, return_weights: as in `TransformerXL`; memory is a `CompressiveMemory`
                for each layer, weights are (batch, heads, n, m_compressed + m + n).
            return_reconstruction: also return the sum over the layers of
                `layers.reconstruction_loss`, for what was compressed in this call; 0 if nothing.
        """
        x = self.embedding(tokens)  # (batch, n, d_model)
        before = self._nothing(x) if memory is None else list(memory)
        check_memory(before, x, len(self.stack.layers), tuple)
        after, losses, weights = [], [], []
        for i, (layer, old) in enumerate(zip(self.stack.layers, before, strict=True)):
            kept, loss = self._remember(i, x, old, return_reconstruction)
            after.append(kept)
            losses += loss
            seen = torch.cat(tuple(old), dim=1)  # (batch, m_compressed + m, d_model)
            result = layer(x, masks.causal(), memory=seen, return_weights=return_weights)
            x, *found = result if return_weights else (result,)
            weights += found
        logits = self.head(self.stack.norm(x))  # (batch, n, d_model) -> (batch, n, vocab_size)
        extra = [sum(losses, x.new_zeros(()))] if return_reconstruction else []
        return (logits, after, *extra, *([weights] if return_weights else []))

    def _remember(
        self, i: int, x: Tensor, old: tuple[Tensor, Tensor], return_loss: bool
    ) -> tuple[CompressiveMemory, list[Tensor]]:
        """What layer i remembers after reading x, and the loss of compressing what fell out."""
        compressed, recent = old
        everything = layers.extend_memory(x, recent, recent.shape[1] + x.shape[1])
        leaving, recent = layers.split_memory(everything, self.memory_length, self.rate)
        if not leaving.shape[1]:
            return CompressiveMemory(compressed, recent), []
        new = self.compressions[i](leaving)  # (batch, leaving / rate, d_model)
        compressed = layers.extend_memory(new, compressed, self.compressed_length)
        layer: Any = self.stack.layers[i]
        loss = [layers.reconstruction_loss(layer, x, leaving, new)] if return_loss else []
        return CompressiveMemory(compressed, recent), loss

    def _back(self, length: int) -> int:
        """Source: Rae et al. 2020, §3.3. A bound where groups are ragged: few or many may wait."""
        waiting = self.rate - 1 if length % self.rate else -self.memory_length % self.rate
        return self.memory_length + waiting + self.rate * self.compressed_length

    def _nothing(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [CompressiveMemory(nothing, nothing) for nothing in self._empty(x)]
