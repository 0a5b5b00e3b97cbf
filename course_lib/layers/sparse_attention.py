"""Attention that leaves most pairs out: Longformer and BigBird."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import masks
from ..masks import Mask
from ..ops.attention import attention
from .multi_head_attention import KVCache, MultiHeadAttention
from .position import Position


class LongformerAttention(MultiHeadAttention):
    """Every token sees its neighbours; a few global tokens see all and are seen by all.

    Costs n · window in place of n². A causal mask makes it a decoder's sliding window.
    Source: Beltagy et al. 2020, "Longformer", §3.1; their global tokens have projections of their
    own, here q_global, k_global and v_global.

    Args:
        d_model, num_heads and the rest: as in `MultiHeadAttention`.
        window: keys seen on each side, at least 0. (Half of what Hugging Face's `attention_window`
            counts.)
        global_tokens: positions, counted from the first key.
        global_projections: whether what global tokens ask has projections of its own, as in the
            paper. False: one set for all, so that the layer is multi-head attention with
            `masks.longformer`.

    Raises:
        ValueError: a size does not fit. At the call: a global token lies beyond the sequence; or a
            cache, a context or a score bias is to serve global projections.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        window: int = 64,
        global_tokens: Sequence[int] = (),
        global_projections: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        self.rule = masks.longformer(window, global_tokens)
        self.window, self.global_tokens = window, sorted(set(global_tokens))
        self.global_projections = bool(self.global_tokens) and global_projections
        self._local: tuple[int, Mask] = 0, self.rule  # for the length of the last call
        if self.global_projections:
            if type(self.position).score_bias is not Position.score_bias:
                raise ValueError(
                    f"position {type(self.position).__name__} adds to the scores, which cannot "
                    "serve global tokens with projections of their own: give "
                    "global_projections=False"
                )
            self.q_global, self.k_global, self.v_global = (
                nn.Linear(like.in_features, like.out_features, bias=like.bias is not None)
                for like in (self.q_proj, self.k_proj, self.v_proj)
            )

    def _heads(
        self,
        x: Float[Tensor, "batch n d_model"],
        context: Tensor | None,
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        cache: Any,
        return_weights: bool,
    ) -> Any:
        if not self.global_projections:
            rule = _both(self.rule, mask)
            return super()._heads(x, context, rule, bias, cache, return_weights)
        self._check_global(context, bias, cache)
        local = _both(self._local_rule(x.shape[1]), mask)
        result = super()._heads(x, None, local, None, None, return_weights)
        rows = torch.tensor(self.global_tokens, device=x.device)
        found = self._global(x, rows, _both(self.rule, mask), return_weights)
        if not return_weights:
            return result.index_copy(2, rows, found)
        return tuple(a.index_copy(2, rows, b) for a, b in zip(result, found, strict=True))

    def _local_rule(self, n: int) -> Mask:
        """The window and the global keys; what global queries find is put in afterwards."""
        if self._local[0] != n:
            self.rule.mask_mod(n, n)  # says so if a global token lies beyond the end
            is_global = torch.zeros(n, dtype=torch.bool)
            is_global[self.global_tokens] = True
            near = masks.sliding_window(self.window, self.window)
            self._local = n, near | masks.from_dense(is_global[None])
        return self._local[1]

    def _check_global(self, context: object, bias: object, cache: object) -> None:
        for name, given in (("context", context), ("bias", bias), ("cache", cache)):
            if given is not None:
                raise ValueError(
                    f"{name} cannot serve global tokens with projections of their own: give "
                    "global_projections=False"
                )

    def _global(self, x: Tensor, rows: Tensor, rule: Mask, return_weights: bool) -> Any:
        """What the global tokens find in the whole sequence."""
        x = self.position.encode_tokens(x, 0)
        if type(self.position).encode_heads is Position.encode_heads:
            query = self._split(self.q_global(x[:, rows]))
        else:  # heads are turned at their places first, and chosen then
            query = self.position.encode_heads(self._split(self.q_global(x)), 0)[:, :, rows]
        key = self.position.encode_heads(self._split(self.k_global(x)), 0)
        n = x.shape[1]
        return attention(
            query, key, self._split(self.v_global(x)), rule.rows(rows, n, n, x.device),
            dropout_p=self.dropout if self.training else 0.0, return_weights=return_weights,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}, global_tokens={self.global_tokens}"


class BigBirdAttention(MultiHeadAttention):
    """Blocks of tokens see a window, a few global blocks and a few random ones.

    Costs n · block_size · (window_blocks + global_blocks + random_blocks) in place of n².
    Source: Zaheer et al. 2020, "Big Bird", §2.

    Args:
        d_model, num_heads and the rest: as in `MultiHeadAttention`.
        block_size, window_blocks, global_blocks, random_blocks, seed: as in `masks.bigbird`. The
            random blocks are the same at every call with as many tokens, and in every head.

    Raises:
        ValueError: a size does not fit; at the call, a cache is given: which blocks are random
            depends on how many there are.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        block_size: int = 64,
        window_blocks: int = 3,
        global_blocks: int = 2,
        random_blocks: int = 3,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        self.rule = masks.bigbird(
            block_size, window_blocks=window_blocks, global_blocks=global_blocks,
            random_blocks=random_blocks, seed=seed,
        )  # fmt: skip

    def _heads(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        cache: Any,
        return_weights: bool,
    ) -> Any:
        return super()._heads(x, context, _both(self.rule, mask), bias, cache, return_weights)

    def new_cache(self) -> KVCache:
        """There is none: see the class."""
        raise ValueError(
            "BigBird cannot serve a cache: which blocks are random depends on how many there are; "
            "generate with use_cache=False"
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.rule}"


def _both(rule: Mask, mask: Mask | Tensor | None) -> Mask:
    return rule if mask is None else rule & mask
