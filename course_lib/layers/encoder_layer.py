"""One block of an encoder: attention, then a feed-forward network, each beside a residual."""

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


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual and a norm.

    With a causal mask and a cache it is the block of a decoder-only model: the same code.
    Source: Vaswani et al. 2017, §3.1 and figure 1, left.

    Args:
        d_model, num_heads, num_kv_heads, position, backend: as in `MultiHeadAttention`.
        d_ff, activation: as in `FeedForward`.
        norm: "layer_norm" or "rms_norm"; norm_eps: its ε; norm_affine: whether it has weights.
        norm_first: pre-norm (True) or post-norm, as in the paper.
        dropout: of weights, of the hidden layer and of what each residual adds.
        bias: whether matrices and layer norms have biases.
        attention: what makes the attention, `MultiHeadAttention` or a variant of it with the same
            arguments; `functools.partial(LongformerAttention, window=64)` gives one its own.

    Raises:
        ValueError: a size or a name does not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int | None = None,
        *,
        num_kv_heads: int | None = None,
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
        self.attention = attention(
            d_model, num_heads, num_kv_heads=num_kv_heads, bias=bias, dropout=dropout,
            position=position, backend=backend,
        )  # fmt: skip
        self.feed_forward = FeedForward(
            d_model, d_ff, activation=activation, bias=bias, dropout=dropout
        )
        new_norm = partial(make_norm, norm, d_model, eps=norm_eps, affine=norm_affine, bias=bias)
        residual = partial(Residual, norm_first=norm_first, dropout=dropout)
        self.attention_residual = residual(new_norm())
        self.feed_forward_residual = residual(new_norm())

    def forward(
        self,
        x: Float[Tensor, "batch n d_model"],
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(batch, n, d_model) -> the same shape; all arguments as in `MultiHeadAttention`.

        With return_weights also the weights (batch, heads, n, n_k).
        """
        attend = partial(
            self.attention, mask=mask, bias=bias, cache=cache, return_weights=return_weights
        )
        result = self.attention_residual(x, attend)
        x, *weights = result if return_weights else (result,)
        x = self.feed_forward_residual(x, self.feed_forward)
        return (x, weights[0]) if return_weights else x

    def new_cache(self) -> Any:
        """An empty cache for this layer."""
        return self.attention.new_cache()
