"""Layers on top of one another: the body of an encoder, of a decoder, and of both together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..masks import Mask


class Stack(nn.Module):
    """layer_N(… layer_1(x)), then a norm: what pre-norm blocks need at the end.

    Args:
        layers: all `EncoderLayer`s or all `DecoderLayer`s, at least one.
        norm: applied to the last layer's output, or None.

    Raises:
        TypeError, ValueError: layers are of different kinds, or there are none.
    """

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        kinds = sorted({type(layer).__name__ for layer in self.layers})
        if not kinds:
            raise ValueError("layers must hold at least one layer, got none")
        if len(kinds) > 1:
            raise TypeError(f"layers must all be of one kind, got {', '.join(kinds)}")
        self.norm = nn.Identity() if norm is None else norm

    def forward(
        self,
        x: Float[Tensor, "batch n d_model"],
        *args: Any,
        cache: list[Any] | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, list[Any]]:
        """(batch, n, d_model) -> the same shape; every layer gets the same further arguments.

        Args:
            args, options: of the layers (context, mask, context_mask, …).
            cache: one per layer, from `new_cache`.
            return_weights: also return a list of each layer's weights.

        Raises:
            ValueError: cache has another length than layers.
        """
        if cache is not None and len(cache) != len(self.layers):
            raise ValueError(f"cache has {len(cache)} entries for {len(self.layers)} layers")
        weights = []
        for i, layer in enumerate(self.layers):
            own = None if cache is None else cache[i]
            result = layer(x, *args, cache=own, return_weights=return_weights, **options)
            x, *new = result if return_weights else (result,)
            weights += new
        x = self.norm(x)
        return (x, weights) if return_weights else x

    def new_cache(self) -> list[Any]:
        """Empty caches, one per layer."""
        layers: Iterable[Any] = self.layers
        return [layer.new_cache() for layer in layers]


class EncoderDecoderStack(nn.Module):
    """An encoder's output is the context of a decoder. Source: Vaswani et al. 2017, figure 1."""

    def __init__(self, encoder: Stack, decoder: Stack) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self,
        source: Float[Tensor, "batch n_k d_model"],
        target: Float[Tensor, "batch n_q d_model"],
        source_mask: Mask | Tensor | None = None,
        target_mask: Mask | Tensor | None = None,
        context_mask: Mask | Tensor | None = None,
        source_bias: Tensor | None = None,
        target_bias: Tensor | None = None,
        context_bias: Tensor | None = None,
    ) -> Float[Tensor, "batch n_q d_model"]:
        """The shape of the target.

        source_mask, source_bias: of the encoder. target_mask, target_bias: of the decoder's
        self-attention; the mask is often `masks.causal()`. context_mask, context_bias: which source
        tokens the decoder sees; the mask is often the source's padding again.
        """
        context = self.encoder(source, mask=source_mask, bias=source_bias)
        return self.decoder(
            target, context, mask=target_mask, context_mask=context_mask,
            bias=target_bias, context_bias=context_bias,
        )  # fmt: skip
