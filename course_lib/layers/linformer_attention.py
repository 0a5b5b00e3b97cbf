"""Linformer: keys and values are projected along the sequence, n of them down to k."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..masks import Mask
from .linear_attention import hidden_keys, refuse_score_bias, split_mask, without
from .multi_head_attention import KVCache, MultiHeadAttention

SHARES = ("none", "heads", "kv")


class LinformerAttention(MultiHeadAttention):
    """softmax(Q (E K)ᵀ / √d_head) F V: attention to k learned mixtures of the tokens.

    Costs n · k in place of n². Each mixture holds tokens from everywhere in the sequence, so there
    is no causal Linformer and no cache. Source: Wang et al. 2020, "Linformer", §4, equation 7.

    `forward` is that of `MultiHeadAttention`. mask: None or `masks.padding(…)`, which takes hidden
    keys and values out before they are mixed. return_weights: (batch, heads, n_q, k), one weight
    for each mixture.

    Args:
        d_model, num_heads and the rest: as in `MultiHeadAttention`.
        max_length: most keys. E and F have a column for each; fewer keys use the first ones.
        k: how many mixtures, at most max_length; a quarter of it unless given.
        share: "none" gives each key/value head an E and an F of its own, "heads" one E and one F to
            all heads, "kv" one matrix to be both E and F (§4, "Additional Efficiency Techniques").

    E and F start from N(0, 1 / max_length): mixtures then vary as much as tokens.

    Raises:
        TypeError, ValueError: an argument does not fit; at the call: a mask that is not padding, a
            bias, a cache, or more than max_length keys.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        max_length: int,
        k: int | None = None,
        share: str = "heads",
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        refuse_score_bias(self.position, "mixtures of keys have no distance to a query")
        if share not in SHARES:
            raise ValueError(f"share must be one of {', '.join(SHARES)}; got {share!r}")
        _check_length("max_length", max_length)
        k = math.ceil(max_length / 4) if k is None else k
        _check_length("k", k)
        if k > max_length:
            raise ValueError(
                f"k must be at most max_length, or nothing is saved: got k={k} and "
                f"max_length={max_length}"
            )
        self.max_length, self.k, self.share = max_length, k, share
        heads = (self.num_kv_heads,) if share == "none" else ()
        self.e = nn.Parameter(torch.empty(*heads, k, max_length))
        self.f = self.e if share == "kv" else nn.Parameter(torch.empty(*heads, k, max_length))
        for matrix in (self.e,) if share == "kv" else (self.e, self.f):
            nn.init.normal_(matrix, std=max_length**-0.5)

    def new_cache(self) -> KVCache:
        """There is none: see the class."""
        raise ValueError(
            "Linformer cannot serve a cache: what is mixed along the sequence holds the future; "
            "generate with a causal kind of attention"
        )

    def _heads(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        cache: Any,
        return_weights: bool,
    ) -> Any:
        if cache is not None:
            self.new_cache()  # says why not
        return super()._heads(x, context, mask, bias, None, return_weights)

    def _attend(
        self,
        query: Float[Tensor, "batch heads n_q d_head"],
        key: Float[Tensor, "batch kv_heads n_k d_head"],
        value: Float[Tensor, "batch kv_heads n_k d_head"],
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        return_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention to the mixtures."""
        if bias is not None:
            raise ValueError("bias cannot be served: it has n_k columns, and there are k mixtures")
        n_k = key.shape[2]
        if n_k > self.max_length:
            raise ValueError(f"there are {n_k} keys, but max_length={self.max_length}")
        hidden = hidden_keys(self._paddings(mask), key)
        # (k, n_k) x (batch, kv_heads, n_k, d_head) -> (batch, kv_heads, k, d_head)
        key = self.e[..., :n_k] @ without(key, hidden)
        value = self.f[..., :n_k] @ without(value, hidden)
        return super()._attend(query, key, value, None, None, return_weights)

    def _paddings(self, mask: Mask | Tensor | None) -> list[Any]:
        why = "each mixture holds all positions, and only padding can be taken out beforehand"
        causal, paddings = split_mask(mask, why)
        if causal:
            raise ValueError(f"mask {mask!r} cannot be served: {why}; the future would be in it")
        return paddings

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, max_length={self.max_length}, k={self.k}, "
            f"share={self.share!r}"
        )


def _check_length(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
