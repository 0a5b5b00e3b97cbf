"""Attention in linear time: weights that are products of features, chosen or drawn at random."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..masks import Mask
from ..masks.rules import Causal, Combined, Padding
from ..ops.attention.inputs import no_autocast
from ..ops.linear_attention import linear_attention
from .multi_head_attention import KVCache, MultiHeadAttention
from .position import Position


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1: x + 1 above 0, exp(x) below."""
    return F.elu(x) + 1


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "exp": torch.exp,
}
KERNELS = ("softmax", "relu")
LARGEST = 60.0
"""Random features stay below exp(60); float32 ends at exp(88), and sums need room."""


class LinearCache(KVCache):
    """What is kept of the tokens seen so far: two sums, of one size however many there were.

    state: S = Σ φ(k_j) v_jᵀ (batch, kv_heads, features, d_head), z = Σ φ(k_j) (batch, kv_heads,
    features). count: how many tokens.
    """

    def __init__(self) -> None:
        super().__init__()  # key and value: of length 0 once a context is read, so that none follow
        self.state: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def followed_by(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The new keys and values alone: the old ones are in the sums.

        Raises ValueError where the batch size is not the one of the tokens before.
        """
        if self.state is not None and len(self.state[1]) != len(key):
            raise ValueError(
                f"cache holds a batch of {len(self.state[1])}, but x is a batch of {len(key)}"
            )
        return key, value

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keep these elements of the batch, in this order: what beam search needs."""
        super().select(rows)
        if self.state is not None:
            self.state = self.state[0][rows], self.state[1][rows]


class _FeatureAttention(MultiHeadAttention):
    """Multi-head attention whose weights are φ(q)·φ(k); a subclass says what φ is."""

    def __init__(self, d_model: int, num_heads: int, **options: Any) -> None:
        super().__init__(d_model, num_heads, **options)
        refuse_score_bias(self.position, "there is no score matrix to add it to")

    def query_features(
        self, query: Float[Tensor, "batch heads n d_head"]
    ) -> Float[Tensor, "batch heads n features"]:
        """φ(q), up to a factor for each query: the normaliser has it too."""
        raise NotImplementedError

    def key_features(
        self, key: Float[Tensor, "batch heads n d_head"]
    ) -> Float[Tensor, "batch heads n features"]:
        """φ(k), of each key by itself: what stands beside it may be its future."""
        raise NotImplementedError

    def new_cache(self) -> LinearCache:
        """An empty cache for this layer: as large after a million tokens as after one."""
        return LinearCache()

    def _heads(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | Tensor | None,
        bias: Tensor | None,
        cache: Any,
        return_weights: bool,
    ) -> Any:
        self._check_call(bias, cache, return_weights)
        causal, paddings = split_mask(
            mask, "no score matrix to mask: masks.causal(), masks.padding(…) and both together work"
        )
        query, key, value = self._project(x, context, cache)
        past = len(cache) if cache is not None and context is None else 0
        hidden = hidden_keys(paddings, key, past)  # (batch, 1, n_k, 1)
        before = None if cache is None else cache.state
        result, state = self._read(query, key, value, hidden, causal, before, return_weights)
        if cache is not None:
            cache.state = state
            cache.count = past + (x if context is None else context).shape[1]
            if context is not None:  # it is in the sums: nothing is to be added next time
                cache.key, cache.value = key[:, :, :0], value[:, :, :0]
        return result

    def _read(
        self,
        query: Float[Tensor, "batch heads n_q d_head"],
        key: Float[Tensor, "batch kv_heads n_k d_head"],
        value: Float[Tensor, "batch kv_heads n_k d_head"],
        hidden: Bool[Tensor, "batch 1 n_k 1"] | None,
        causal: bool,
        before: tuple[Tensor, Tensor] | None,
        return_weights: bool,
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        """What the heads find (and the weights), and the sums over all keys."""
        dtype = torch.promote_types(query.dtype, torch.float32)  # float16 is too narrow for exp
        with no_autocast(query.device):
            q = self.query_features(query.to(dtype))
            k, v = self.key_features(without(key, hidden).to(dtype)), without(value, hidden)
            k = without(k, hidden)  # a hidden key's features are 0: φ(0) need not be
            heads, state = linear_attention(
                q, k, v.to(dtype), causal=causal, state=before, return_state=True,
                backend=self.backend,
            )  # fmt: skip
            heads = F.dropout(heads.to(query.dtype), self.dropout, self.training)
            if not return_weights:
                return heads, state
            # Where values are the unit vectors, the output is the weights.
            unit = torch.eye(k.shape[2], dtype=dtype, device=k.device).expand(*k.shape[:2], -1, -1)
            weights = linear_attention(q, k, unit, causal=causal, backend=self.backend)
            return (heads, weights.to(query.dtype)), state

    def _check_call(self, bias: Tensor | None, cache: Any, return_weights: bool) -> None:
        if bias is not None:
            raise ValueError("bias cannot be served: there is no score matrix to add it to")
        if cache is None:
            return
        if not isinstance(cache, LinearCache):
            raise TypeError(
                f"cache must be a LinearCache, from new_cache(); got {type(cache).__name__}"
            )
        if return_weights and len(cache):
            raise ValueError("return_weights needs all keys, but cache keeps only their sums")


class LinearAttention(_FeatureAttention):
    """Attention with weights φ(q)·φ(k) in place of exp(q·k / √d_head): linear in the length.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", §3.2; φ(x) = elu(x) + 1.

    `forward` is that of `MultiHeadAttention`, with what has no place without a score matrix refused
    by name. mask: None, `masks.causal()`, `masks.padding(…)` or both together (`&`). cache: a
    `LinearCache`, two sums of fixed size. return_weights: the weights that the features imply,
    written out: n² memory, for pictures.

    Args:
        d_model, num_heads, num_kv_heads, d_context, bias: as in `MultiHeadAttention`.
        dropout: of what the heads find, in training mode: there are no weights to drop.
        position: a scheme that acts on tokens or heads (sinusoidal, learned, rotary). Rotary turns
            before φ, so that weights stay positive; they then depend on both places, not on their
            distance alone.
        feature_map: "elu", "relu", "exp", or a function (…, d_head) -> (…, features) that is
            nowhere negative.
        backend: of `ops.linear_attention`.

    Raises:
        TypeError, ValueError: an argument does not fit, or a scheme of position adds to scores.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        feature_map: str | Callable[[Tensor], Tensor] = "elu",
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        if isinstance(feature_map, str) and feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map must be one of {', '.join(FEATURE_MAPS)} or a function; got "
                f"{feature_map!r}"
            )
        if not isinstance(feature_map, str) and not callable(feature_map):
            raise TypeError(
                f"feature_map must be a name or a function, got {type(feature_map).__name__}"
            )
        self.feature_map = feature_map
        self._map = FEATURE_MAPS[feature_map] if isinstance(feature_map, str) else feature_map

    def query_features(self, query: Tensor) -> Tensor:
        return self._map(query)

    def key_features(self, key: Tensor) -> Tensor:
        return self._map(key)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, feature_map={self.feature_map!r}"


class PerformerAttention(_FeatureAttention):
    """Softmax attention estimated by random features: φ(q)·φ(k) is exp(q·k / √d_head) on average.

    Source: Choromanski et al. 2021, "Rethinking Attention with Performers", §2.3 (positive random
    features, lemma 1) and §2.4 (orthogonal ones).

    Each query's features are divided by their largest, which the normaliser takes out again. Keys
    have no such factor: it would have to be the same for all of them, the future ones included. So
    a key's features depend on that key alone, nothing leaks, and a cache gives the same numbers.
    The price: a key so long that all its features fall below float32's range has weight 0.

    How many features it takes grows exponentially with the lengths of queries and keys: large
    scores, which attend sharply, are estimated badly.

    Args and `forward`: as in `LinearAttention`, but for
        num_features: m, how many random directions; round(d_head · ln d_head) unless given, the
            order of the paper's bound (theorem 4).
        orthogonal: directions at right angles to one another, in blocks of d_head.
        seed: of the directions ω (the buffer `projection`), which all heads share.
        kernel: "softmax", or "relu" for φ(x) = relu(ωᵀx) / √m, the paper's Performer-ReLU.

    Raises:
        TypeError, ValueError: an argument does not fit, or a scheme of position adds to scores.
    """

    projection: Tensor

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_features: int | None = None,
        orthogonal: bool = True,
        seed: int = 0,
        kernel: str = "softmax",
        **options: Any,
    ) -> None:
        super().__init__(d_model, num_heads, **options)
        if num_features is None:
            num_features = max(1, round(self.d_head * math.log(self.d_head)))
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
        self.num_features, self.orthogonal, self.kernel = num_features, orthogonal, kernel
        self.register_buffer("projection", torch.empty(num_features, self.d_head))
        self.redraw(seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """Other random directions (§2.4: now and then while training)."""
        size, generator = (self.num_features, self.d_head), torch.Generator().manual_seed(seed)
        draw = orthogonal_gaussian if self.orthogonal else _gaussian
        self.projection.copy_(draw(*size, generator))

    def query_features(self, query: Tensor) -> Tensor:
        x, projection = query * self.d_head**-0.25, self.projection.to(query.dtype)
        if self.kernel == "relu":
            return relu_features(x, projection)
        return positive_features(x, projection, stabilise=True)

    def key_features(self, key: Tensor) -> Tensor:
        x, projection = key * self.d_head**-0.25, self.projection.to(key.dtype)
        features = relu_features if self.kernel == "relu" else positive_features
        return features(x, projection)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_features={self.num_features}, "
            f"orthogonal={self.orthogonal}, kernel={self.kernel!r}"
        )


# --- random features ------------------------------------------------------------------------------


def positive_features(
    x: Float[Tensor, "*batch d"], projection: Float[Tensor, "m d"], *, stabilise: bool = False
) -> Float[Tensor, "*batch m"]:
    """φ(x) = exp(ωᵀx − ‖x‖²/2) / √m, so that E φ(x)·φ(y) = exp(x·y) for ω from N(0, 1).

    Source: Choromanski et al. 2021, lemma 1. Exponents above 60 count as 60: they are at most
    ‖ω‖²/2, so that this happens to very wide heads only.

    Args:
        x: (…, d). projection: (m, d), the ω one below the other.
        stabilise: divide each vector's features by the largest of them (and by √m).
    """
    exponent = x @ projection.mT - x.square().sum(-1, keepdim=True) / 2  # (…, d) x (d, m)
    if stabilise:
        exponent = exponent - exponent.detach().amax(-1, keepdim=True)
    return exponent.clamp(max=LARGEST).exp() / math.sqrt(len(projection))


def relu_features(
    x: Float[Tensor, "*batch d"], projection: Float[Tensor, "m d"]
) -> Float[Tensor, "*batch m"]:
    """φ(x) = relu(ωᵀx) / √m. Source: Choromanski et al. 2021, §2.2 and §4 (Performer-ReLU)."""
    return (x @ projection.mT).relu() / math.sqrt(len(projection))  # (…, d) x (d, m)


def orthogonal_gaussian(
    num_features: int, d: int, generator: torch.Generator | None = None
) -> Float[Tensor, "num_features d"]:
    """Rows from N(0, 1), d at a time at right angles to one another.

    Each row by itself is as if drawn alone: its direction is uniform, its length that of a
    Gaussian vector. Source: Choromanski et al. 2021, §2.4; Yu et al. 2016, "Orthogonal Random
    Features".
    """
    blocks = math.ceil(num_features / d)
    gaussian = torch.randn(blocks, d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # else directions are not uniform
    lengths = torch.randn(blocks, d, d, generator=generator, dtype=torch.float64).norm(dim=-1)
    rows = q.mT * lengths[..., None]  # (blocks, d, d): the columns of q are orthonormal
    return rows.flatten(0, 1)[:num_features].float()  # (blocks · d, d) -> (num_features, d)


def _gaussian(num_features: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num_features, d, generator=generator)


# --- masks that need no score matrix --------------------------------------------------------------


def split_mask(mask: Mask | Tensor | None, why: str) -> tuple[bool, list[Padding]]:
    """Whether the mask is causal, and its paddings; any other is refused, and `why` ends it."""
    if mask is None:
        return False, []
    if isinstance(mask, Causal):
        return True, []
    if isinstance(mask, Padding):
        return False, [mask]
    if isinstance(mask, Combined) and mask.operator == "&":
        first, second = split_mask(mask.first, why), split_mask(mask.second, why)
        return first[0] or second[0], first[1] + second[1]
    if isinstance(mask, Tensor):
        raise ValueError(f"mask of shape {tuple(mask.shape)} cannot be served: {why}")
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a masks.Mask or None, got {type(mask).__name__}")
    raise ValueError(f"mask {mask!r} cannot be served: {why}")


def hidden_keys(
    paddings: list[Padding], key: Float[Tensor, "batch groups n_k d"], past: int = 0
) -> Bool[Tensor, "batch 1 n_k 1"] | None:
    """Keys at or beyond their sequence's length, the first key being number `past`."""
    hidden = None
    for padding in paddings:
        if len(padding.lengths) != len(key):
            raise ValueError(
                f"mask {padding} is made for batch size {len(padding.lengths)}, but x has batch "
                f"size {len(key)}"
            )
        place = torch.arange(past, past + key.shape[2], device=key.device)
        beyond = place >= padding.lengths.to(key.device)[:, None]  # (batch, n_k)
        hidden = beyond if hidden is None else hidden | beyond
    return None if hidden is None else hidden[:, None, :, None]


def without(
    x: Float[Tensor, "batch groups n_k d"], hidden: Bool[Tensor, "batch 1 n_k 1"] | None
) -> Float[Tensor, "batch groups n_k d"]:
    """0 in place of what is hidden, be it NaN."""
    return x if hidden is None else x.masked_fill(hidden, 0)


def refuse_score_bias(position: Position, why: str) -> None:
    """ValueError for schemes of position that act on scores."""
    if type(position).score_bias is not Position.score_bias:
        raise ValueError(
            f"position {type(position).__name__} adds to the scores, but {why}: sinusoidal, "
            "learned and rotary work"
        )
