"""One block of an encoder-decoder's decoder: an encoder block with cross-attention in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..masks import Mask
from .feed_forward import FeedForward
from .multi_head_attention import KVCache, MultiHeadAttention
from .position import Position
from .residual import Residual, make_norm


class DecoderLayer(nn.Module):
    """Masked self-attention, cross-attention to a context, feed-forward; each with a residual.

    The causal mask is the caller's to give. Source: Vaswani et al. 2017, §3.1 and figure 1, right.

    Args and errors as in `EncoderLayer`; d_context is the width of the context, d_model unless
    given. The position scheme and a variant of attention serve self-attention only: context and x
    have no common positions.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        num_kv_heads: int | None = None,
        d_context: int | None = None,
        norm: str = "layer_norm",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        norm_first: bool = True,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        position: Position | None = None,
        backend: str = "auto",
        attention: Callable[..., MultiHeadAttention] = MultiHeadAttention,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "num_kv_heads": num_kv_heads, "bias": bias, "dropout": dropout, "backend": backend,
        }  # fmt: skip
        self.self_attention = attention(d_model, num_heads, position=position, **options)
        self.cross_attention = MultiHeadAttention(
            d_model, num_heads, d_context=d_context, **options
        )
        self.feed_forward = FeedForward(
            d_model, d_ff, activation=activation, bias=bias, dropout=dropout
        )
        new_norm = partial(make_norm, norm, d_model, eps=norm_eps, affine=norm_affine, bias=bias)
        residual = partial(Residual, norm_first=norm_first, dropout=dropout)
        self.self_attention_residual = residual(new_norm())
        self.cross_attention_residual = residual(new_norm())
        self.feed_forward_residual = residual(new_norm())

    def forward(
        self,
        x: Float[Tensor, "batch n_q d_model"],
        context: Float[Tensor, "batch n_k d_context"],
        mask: Mask | Tensor | None = None,
        context_mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        context_bias: Tensor | None = None,
        cache: tuple[Any, KVCache] | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """(batch, n_q, d_model) -> the same shape.

        Args:
            x, context: as in `MultiHeadAttention`.
            mask, bias: of self-attention; the mask is often `masks.causal()`.
            context_mask, context_bias: of cross-attention; often `masks.padding(lengths)`.
            cache: one for self-attention and one for cross-attention, from `new_cache`.
            return_weights: also return the weights of both, (batch, heads, n_q, …).
        """
        own, across = (None, None) if cache is None else cache
        attend = partial(
            self.self_attention, mask=mask, bias=bias, cache=own, return_weights=return_weights
        )
        attend_across = partial(
            self.cross_attention, context=context, mask=context_mask, bias=context_bias,
            cache=across, return_weights=return_weights,
        )  # fmt: skip
        result = self.self_attention_residual(x, attend)
        x, *own_weights = result if return_weights else (result,)
        result = self.cross_attention_residual(x, attend_across)
        x, *across_weights = result if return_weights else (result,)
        x = self.feed_forward_residual(x, self.feed_forward)
        return (x, (own_weights[0], across_weights[0])) if return_weights else x

    def new_cache(self) -> tuple[Any, KVCache]:
        """Empty caches for this layer's self-attention and cross-attention."""
        return self.self_attention.new_cache(), KVCache()
