"""Schemes of position that know distances only, and add to the scores.

Where the term stands against the scale 1/√d_k differs, and matters when it is learned: outside the
scale it speaks √d_k times louder at the start.

    Shaw             qᵀ(k + a_{j-i}) · scale                 inside
    Transformer-XL   ((q + u)ᵀ k + (q + v)ᵀ r_{i-j}) · scale   inside
    T5, ALiBi        qᵀk · scale + b_{j-i}                   outside (T5 itself has no scale)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .position import Position, distances
from .positional_encoding import sinusoids


class RelativePositionBias(Position):
    """T5's bias: one learned number per head and bucket of distance, the same for all queries.

    Near distances have a bucket each; far ones share buckets that widen logarithmically, up to
    max_distance; all beyond share the last. T5 uses one such module in all layers of a stack.
    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", §2.1.

    Args:
        num_heads: of the attention it serves.
        num_buckets: even; half of them for later keys if bidirectional.
        max_distance: from here on all distances are one.
        bidirectional: False for causal models, in which no key is later.

    Raises:
        ValueError: the sizes leave no room for both kinds of bucket.
    """

    edges: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(num_heads=num_heads)
        directions = 2 if bidirectional else 1
        if num_buckets < 2 * directions or num_buckets % 2:
            raise ValueError(
                f"num_buckets must be even and at least {2 * directions}, got {num_buckets}"
            )
        each = num_buckets // directions
        if max_distance <= each // 2:
            raise ValueError(
                f"max_distance must be above {each // 2}, the number of near distances that have "
                f"a bucket each; got {max_distance}"
            )
        self.num_buckets, self.bidirectional = num_buckets, bidirectional
        self.weight = nn.Parameter(torch.zeros(num_buckets, num_heads))
        edges = torch.tensor(_bucket_edges(each, max_distance))
        self.register_buffer("edges", edges, persistent=False)

    def forward(self, n_q: int, n_k: int) -> Float[Tensor, "1 heads n_q n_k"]:
        """The bias for n_q queries and n_k keys, the last query at the last key."""
        buckets = self.bucket(distances(n_q, n_k, self.weight.device))
        return self.weight[buckets].permute(2, 0, 1)[None]  # (n_q, n_k, h) -> (1, h, n_q, n_k)

    def score_bias(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        _check_heads(self, self.weight.shape[1], query)
        return self(query.shape[2], key.shape[2])

    def bucket(self, distance: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """The bucket of each distance (key position minus query position)."""
        if not self.bidirectional:
            return torch.bucketize((-distance).clamp(min=0), self.edges, right=True)
        later = (distance > 0) * (self.num_buckets // 2)
        return later + torch.bucketize(distance.abs(), self.edges, right=True)


def _bucket_edges(num_buckets: int, max_distance: int) -> list[int]:
    """The least distance of bucket 1, 2, …: whole numbers, so that no device rounds another way.

    With e = num_buckets / 2, the first e buckets hold one distance each, and bucket e + k begins
    where log(distance / e) / log(max_distance / e) reaches k / (num_buckets - e).
    """
    exact = num_buckets // 2
    shared = num_buckets - exact
    edges = list(range(1, exact + 1))
    for k in range(1, shared):
        least = max_distance**k * exact ** (shared - k)  # least distance, to the power of `shared`
        distance = edges[-1]
        while distance**shared < least:
            distance += 1
        edges.append(distance)
    return edges


class AlibiBias(Position):
    """A penalty that grows linearly with the distance, with one fixed slope per head.

    Source: Press, Smith & Lewis 2022, "Train Short, Test Long", §3. No parameters. The paper is
    causal; here later keys are penalised alike.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        _check_sizes(num_heads=num_heads)
        self.num_heads = num_heads

    def slopes(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Float[Tensor, " heads"]:
        """2^(-8/h), 2^(-16/h), … ; if h is no power of 2, of the last power, then those between."""
        power = 2 ** (self.num_heads.bit_length() - 1)  # the last power of 2 up to num_heads
        head = torch.arange(1, self.num_heads + 1, dtype=dtype, device=device)
        between = 2 * (head - power) - 1  # 1, 3, 5, … halves of a step
        return torch.exp2(-8 / power * torch.where(head <= power, head, between / 2))

    def forward(
        self,
        n_q: int,
        n_k: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Float[Tensor, "1 heads n_q n_k"]:
        """The bias for n_q queries and n_k keys, the last query at the last key."""
        away = distances(n_q, n_k, device).abs()
        return (-self.slopes(dtype, device)[:, None, None] * away)[None]

    def score_bias(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        _check_heads(self, self.num_heads, query)
        # bfloat16 cannot tell distance 257 from 256.
        dtype = torch.promote_types(query.dtype, torch.float32)
        return self(query.shape[2], key.shape[2], dtype, query.device)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class ShawRelativePosition(Position):
    """A learned vector per clipped distance, added to the keys: qᵀ(k + a_{j-i}) · scale.

    Source: Shaw, Uszkoreit & Vaswani 2018, "Self-Attention with Relative Position
    Representations", §3.2, equation 4; one table for all heads, as there. Their second table, for
    the values, is left out: their §4.3 finds that the one for the keys is enough.

    Args:
        d_head: width of a head.
        max_distance: distances beyond it count as this one.
    """

    def __init__(self, d_head: int, *, max_distance: int = 16) -> None:
        super().__init__()
        _check_sizes(d_head=d_head, max_distance=max_distance)
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(2 * max_distance + 1, d_head))
        nn.init.normal_(self.weight, std=d_head**-0.5)

    def score_bias(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        if query.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"position was made for d_head={self.weight.shape[1]}, got {query.shape[-1]}"
            )
        clip = self.max_distance
        index = distances(query.shape[2], key.shape[2], query.device).clamp(-clip, clip) + clip
        by_distance = query @ self.weight.to(query.dtype).mT * scale  # (b, h, n_q, 2·clip + 1)
        return by_distance.gather(-1, index.expand(*query.shape[:2], -1, -1))  # (b, h, n_q, n_k)


class TransformerXLPosition(Position):
    """Content and place apart: ((q + u)ᵀ k + (q + v)ᵀ W r_{i-j}) · scale, r the sinusoids of i - j.

    u and v, one per head, are what every query asks of contents and of places.
    Source: Dai et al. 2019, "Transformer-XL", §3.3.

    Args:
        d_model: width of the activations and of the sinusoids; even, a multiple of num_heads.
        num_heads: of the attention it serves.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        _check_sizes(d_model=d_model, num_heads=num_heads)
        if d_model % num_heads or d_model % 2:
            raise ValueError(
                f"d_model must be even and a multiple of num_heads, got {d_model} and {num_heads}"
            )
        self.u = nn.Parameter(torch.zeros(num_heads, d_model // num_heads))
        self.v = nn.Parameter(torch.zeros(num_heads, d_model // num_heads))
        self.r_proj = nn.Linear(d_model, d_model, bias=False)

    def score_bias(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        heads, d_head = self.u.shape
        _check_heads(self, heads, query)
        n_q, n_k = query.shape[2], key.shape[2]
        # (q + v)ᵀ W r once per distance i - j = 1 - n_q … n_k - 1, then looked up for each pair.
        place = torch.arange(1 - n_q, n_k, device=query.device)
        weight = self.r_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        r = self.r_proj(sinusoids(place.to(dtype), heads * d_head).to(weight.dtype))  # (m, d_model)
        r = r.unflatten(-1, (heads, d_head)).transpose(0, 1)  # (m, h, d_head) -> (h, m, d_head)
        by_distance = (query + self.v[:, None]) @ r.mT  # (b, h, n_q, d_head) x (h, d_head, m)
        index = n_q - 1 - distances(n_q, n_k, query.device)  # of i - j in `place`
        bias = by_distance.gather(-1, index.expand(*query.shape[:2], -1, -1))  # (b, h, n_q, n_k)
        # uᵀk: the heads of a group share its keys, which are not repeated for them.
        u = self.u.unflatten(0, (key.shape[1], -1))  # (groups, heads / groups, d_head)
        return (bias + (u @ key.mT).flatten(1, 2)[:, :, None]) * scale  # + (b, h, 1, n_k)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_heads(position: Position, num_heads: int, query: Tensor) -> None:
    if query.shape[1] != num_heads:
        raise ValueError(
            f"position {type(position).__name__} was made for num_heads={num_heads}, but attention "
            f"has {query.shape[1]}"
        )
