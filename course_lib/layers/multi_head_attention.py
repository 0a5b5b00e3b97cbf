"""Multi-head attention: several attentions side by side, each with its own view of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..masks import Mask
from ..ops.attention import attention
from .position import Position


class KVCache:
    """Keys and values of the tokens seen so far, for one attention layer.

    Each call of `MultiHeadAttention` with a cache adds its tokens to it. In cross-attention the
    context's keys and values are computed at the first call and stay.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None  # (batch, kv_heads, length, d_head)
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[2]

    def followed_by(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values: those kept here, then the new ones. Keeps nothing yet.

        Raises ValueError where the batch size is not the one of the tokens before.
        """
        if self.key is None or self.value is None:
            return key, value
        if self.key.shape[0] != key.shape[0]:
            raise ValueError(
                f"cache holds a batch of {self.key.shape[0]}, but x is a batch of {key.shape[0]}"
            )
        return torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these elements of the batch, in this order: what beam search needs."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows], self.value[rows]


class MultiHeadAttention(nn.Module):
    """Concat(head_1, …, head_h) W_O with head_i = Attention(x W_Q_i, x W_K_i, x W_V_i).

    The W_Q_i stand side by side in one matrix, so that one product serves all heads.
    Sources: Vaswani et al. 2017, §3.2.2; fewer key/value heads: Shazeer 2019 (one, multi-query) and
    Ainslie et al. 2023 (grouped-query).

    Args:
        d_model: width of the activations; a multiple of num_heads.
        num_heads: query heads, each of width d_head = d_model / num_heads.
        num_kv_heads: key/value heads, a divisor of num_heads; as many as num_heads unless given.
        d_context: width of the context in cross-attention; d_model unless given.
        bias: whether the four projections have biases.
        dropout: of the weights, in training mode only; drawn from torch's default generator.
        position: a scheme of position (sinusoidal, learned, rotary, T5, ALiBi, …), or None.
        backend: passed on to `course_lib.attention`.

    Raises:
        TypeError: position is no scheme of position.
        ValueError: the sizes do not divide one another, or dropout is not in [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        d_context: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        position: Position | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        d_context = d_model if d_context is None else d_context
        _check_sizes(d_model, num_heads, num_kv_heads, d_context, dropout)
        if position is not None and not isinstance(position, Position):
            raise TypeError(f"position must be a layers.Position, got {type(position).__name__}")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.d_head = d_model // num_heads
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_context, num_kv_heads * self.d_head, bias=bias)
        self.v_proj = nn.Linear(d_context, num_kv_heads * self.d_head, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.position = Position() if position is None else position  # the base does nothing
        self.dropout = dropout
        self.backend = backend

    def forward(
        self,
        x: Float[Tensor, "batch n_q d_model"],
        context: Float[Tensor, "batch n_k d_context"] | None = None,
        mask: Mask | Tensor | None = None,
        bias: Tensor | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Self-attention of x, or cross-attention of x to a context.

        Args:
            x: (batch, n_q, d_model).
            context: where keys and values come from, (batch, n_k, d_context); x unless given. A
                position scheme takes the last token of x to stand at the context's last (the
                context is a memory that ends in x).
            mask, bias: as in `course_lib.attention`.
            cache: keys and values of earlier tokens; x then holds the new tokens only. With a
                context: its keys and values, computed at the first call and kept.
            return_weights: also return the weights (batch, heads, n_q, n_k), before dropout.

        Returns:
            (batch, n_q, d_model), or (output, weights).

        Raises:
            TypeError, ValueError: an argument does not fit; a cache is then left as it was.
        """
        result = self._heads(x, context, mask, bias, cache, return_weights)
        heads, *weights = result if isinstance(result, tuple) else (result,)
        # (batch, heads, n_q, d_head) -> (batch, n_q, heads, d_head) -> (batch, n_q, d_model)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        return (output, weights[0]) if return_weights else output

    def new_cache(self) -> KVCache:
        """An empty cache for this layer."""
        return KVCache()

    def _heads(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        cache: Any,
        return_weights: bool,
    ) -> Any:
        """What each head finds (batch, heads, n_q, d_head), and its weights if wanted."""
        query, key, value = self._project(x, context, cache)
        bias = _sum(bias, self.position.score_bias(query, key, self.d_head**-0.5))
        result = self._attend(query, key, value, mask, bias, return_weights)
        if cache is not None:
            cache.key, cache.value = key, value
        return result

    def _attend(
        self,
        query: Float[Tensor, "batch heads n_q d_head"],
        key: Float[Tensor, "batch kv_heads n_k d_head"],
        value: Float[Tensor, "batch kv_heads n_k d_head"],
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        return_weights: bool,
    ) -> Any:
        """Queries, keys and values to what the heads find: the place where variants differ."""
        return attention(
            query, key, value, mask, bias, dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights, backend=self.backend,
        )  # fmt: skip

    def _project(
        self, x: Tensor, context: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (batch, heads, n_q, d_head); keys and values, those in the cache included."""
        self._check_inputs(x, context, cache)
        position, past = self.position, 0 if cache is None else len(cache)
        # Positions: x follows what is in the cache, or ends where the context ends.
        start = past if context is None else context.shape[1] - x.shape[1]
        x = position.encode_tokens(x, start)
        query = position.encode_heads(self._split(self.q_proj(x)), start)
        if context is not None and cache is not None and cache.key is not None:
            assert cache.value is not None
            return query, cache.key, cache.value
        source = x if context is None else position.encode_tokens(context, 0)
        key = position.encode_heads(self._split(self.k_proj(source)), past)
        value = self._split(self.v_proj(source))
        return query, *((key, value) if cache is None else cache.followed_by(key, value))

    def _split(self, x: Float[Tensor, "batch n width"]) -> Float[Tensor, "batch heads n d_head"]:
        """(batch, n, heads · d_head) -> (batch, n, heads, d_head) -> (batch, heads, n, d_head)."""
        return x.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

    def _check_inputs(self, x: Tensor, context: Tensor | None, cache: KVCache | None) -> None:
        d_model, d_context = self.q_proj.in_features, self.k_proj.in_features
        _check_tokens("x", x, d_model)
        if context is None:
            if d_context != d_model:
                raise ValueError(
                    f"context must be given: keys and values have d_context={d_context}"
                )
            return
        _check_tokens("context", context, d_context)
        if context.shape[0] != x.shape[0]:
            raise ValueError(
                f"x and context must have the same batch size, got {tuple(x.shape)} and "
                f"{tuple(context.shape)}"
            )
        if cache is None:
            return
        if type(self.position) is not Position:
            raise ValueError(
                "cache cannot serve a context together with position: where the new tokens stand "
                "in the context is not known"
            )
        if len(cache) not in (0, context.shape[1]):
            raise ValueError(
                f"cache holds a context of length {len(cache)}, but context has {context.shape[1]}"
            )

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, dropout={self.dropout}"
        )


def _sum(bias: Tensor | None, added: Tensor | None) -> Tensor | None:
    """The caller's bias and the position scheme's."""
    if bias is None or added is None:
        return added if bias is None else bias
    sizes = zip(reversed(bias.shape), reversed(added.shape), strict=False)
    if bias.ndim > 4 or any(1 not in (a, b) and a != b for a, b in sizes):
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, which does not fit that of position, "
            f"{tuple(added.shape)}"
        )
    return bias + added


def _check_sizes(
    d_model: int, num_heads: int, num_kv_heads: int, d_context: int, dropout: float
) -> None:
    if num_heads < 1 or d_model < 1 or d_model % num_heads:
        raise ValueError(
            f"d_model must be a positive multiple of num_heads, got d_model={d_model} and "
            f"num_heads={num_heads}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads must be a multiple of num_kv_heads, got num_heads={num_heads} and "
            f"num_kv_heads={num_kv_heads}"
        )
    if d_context < 1:
        raise ValueError(f"d_context must be at least 1, got {d_context}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def _check_tokens(name: str, tokens: Tensor, width: int) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tokens).__name__}")
    if not tokens.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tokens.dtype}")
    if tokens.ndim != 3 or tokens.shape[-1] != width:
        raise ValueError(f"{name} must be (batch, length, {width}), got {tuple(tokens.shape)}")
