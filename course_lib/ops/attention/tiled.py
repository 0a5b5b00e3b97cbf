"""Attention tile by tile, in plain PyTorch: only the tiles that the mask shows, never n_q · n_k.

The mask says which tiles of block x block pairs hold anything (`Mask.tiles`). Rows of tiles that
look alike (the same number of key tiles in the same pattern, as all rows of a sliding window do)
are folded into the batch: one product serves them all. Scores live only as long as their chunk, and
the backward pass computes them again from the log-sum-exp. So memory is linear in the length, for
training too. `online_softmax` is the same computation one tile after the other, as GPU kernels
and papers have it.

Sources: Rabe & Staats 2021, "Self-attention Does Not Need O(n²) Memory"; Dao et al. 2022,
"FlashAttention", §3.1, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import masks
from .inputs import Inputs
from .plans import clipped, kept

CHUNK = 2**19
"""Scores held at once; 2 MiB of float32 stay in a processor's cache."""


def unsupported(inputs: Inputs) -> str | None:
    """Why the blockwise backend cannot serve this call, or None."""
    if inputs.return_weights:
        return "the blockwise backend never holds all weights at once"
    if inputs.query.device.type == "meta":
        return "the blockwise backend needs numbers, and the meta device has none"
    return inputs.tiles_out_of_sight("the blockwise backend")


def worth_it(inputs: Inputs) -> bool:
    """Whether "auto" should take this backend before SDPA: long, and mostly hidden."""
    n_q, n_k = inputs.lengths
    if inputs.mask is None or n_q * n_k < 2**20 or unsupported(inputs) is not None:
        return False
    return make_plan(inputs.mask, n_q, n_k, inputs.query.device).share(n_q, n_k) < 1 / 3


def attention(
    inputs: Inputs,
) -> tuple[Float[Tensor, "batch heads n_q d_v"], None, Float[Tensor, "batch heads n_q"]]:
    """softmax(Q Kᵀ · scale + bias) V over the visible keys -> output, log-sum-exp."""
    output, lse = _attend(inputs.isolated())
    if not inputs.all_visible and not inputs.intact:
        spoiled = inputs.spoiled_by(lambda i: _attend(i)[0])
        output = output.masked_fill(spoiled[..., None], math.nan)
        lse = lse.masked_fill(spoiled, math.nan)
    return output, None, lse


def _attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
    plan = make_plan(inputs.mask, *inputs.lengths, inputs.query.device)
    return _Tiled.apply(
        inputs.query, inputs.key, inputs.value, inputs.bias, plan, inputs.scale, _Noise.of(inputs)
    )


# --- what looks at what ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Rows of tiles that see equally many key tiles in the same pattern.

    batch, head and row say which rows, `columns` which key tiles each of them sees, `hidden` which
    pairs of some of these tiles are not seen: (where its keys stand among those seen, pairs).
    """

    batch: Int[Tensor, " rows"]
    head: Int[Tensor, " rows"]
    row: Int[Tensor, " rows"]
    columns: Int[Tensor, "rows seen"]
    hidden: list[tuple[slice, Bool[Tensor, "block_q block_k"]]]


@dataclass(frozen=True)
class Plan:
    """All groups of a mask. Where it does not depend on batch or head, it names only the first."""

    block: int
    groups: list[Group]
    batch_size: int | None
    num_heads: int | None

    def share(self, n_q: int, n_k: int) -> float:
        """Which part of all pairs lies in tiles that are visited."""
        seen = sum(group.columns.numel() for group in self.groups) * self.block**2
        return seen / max(1, n_q * n_k * (self.batch_size or 1) * (self.num_heads or 1))


@kept
def make_plan(mask: masks.Mask, n_q: int, n_k: int, device: torch.device) -> Plan:
    """The cheapest plan: large tiles for fast products, small ones where they leave more out."""
    longest = max(n_q, n_k, 1)
    if longest <= 256:
        block = max(16, 2 ** math.ceil(math.log2(longest) - 1))
        return _plan_of(mask, n_q, n_k, block, device)
    plans = [_plan_of(mask, n_q, n_k, block, device) for block in (128, 64)]
    # Small tiles make slower products: a pair in a tile of 64 is taken to cost 1.3 in one of 128.
    return min(plans, key=lambda plan: plan.share(n_q, n_k) * (1 + 48 / plan.block))


def _plan_of(mask: masks.Mask, n_q: int, n_k: int, block: int, device: torch.device) -> Plan:
    table, patterns = clipped(mask.tiles(n_q, n_k, block, block, device))
    kinds = table.cpu().numpy()  # -1 empty, 0 full, k for pattern k - 1
    rows = kinds.reshape(math.prod(kinds.shape[:3]), -1) if kinds.size else ()
    alike: dict[bytes, list[tuple[int, Any]]] = {}
    for place, row in enumerate(rows):
        columns = np.flatnonzero(row >= 0)
        if len(columns):
            alike.setdefault(row[columns].tobytes(), []).append((place, columns))
    groups = []
    for key, members in alike.items():
        places = np.unravel_index([place for place, _ in members], kinds.shape[:3])
        columns = np.stack([columns for _, columns in members])
        names = np.frombuffer(key, dtype=kinds.dtype)
        hidden = [
            (slice(i * block, (i + 1) * block), ~patterns[k - 1])
            for i, k in enumerate(names.tolist()) if k
        ]  # fmt: skip
        batch, head, row, seen = (torch.from_numpy(x.copy()).to(device) for x in (*places, columns))
        groups.append(Group(batch, head, row, seen, hidden))
    return Plan(block, groups, mask.batch_size, mask.num_heads)


# --- the computation ------------------------------------------------------------------------------


class _Tiled(torch.autograd.Function):
    """Forward and backward pass, a chunk of rows at a time."""

    @staticmethod
    def forward(ctx: Any, query, key, value, bias, plan, scale, noise):  # type: ignore
        cut = _Cut(query, key, value, bias, plan, scale, noise)
        output = cut.query.new_zeros(*cut.query.shape[:2], value.shape[-1])
        lse = cut.query.new_full(cut.query.shape[:2], -math.inf)
        for chunk in cut.chunks():
            weights, lse[chunk.query] = _softmax(cut.scores(chunk))
            output[chunk.query] = cut.dropped(weights, chunk) @ cut.values(chunk)
        lse = cut.join(lse, query.shape)
        output = cut.join(output, query.shape)
        ctx.save_for_backward(query, key, value, bias, output, lse)
        ctx.options = plan, scale, noise
        return output.to(query.dtype), lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output, d_lse):  # type: ignore
        query, key, value, bias, output, lse = ctx.saved_tensors
        cut = _Cut(query, key, value, bias, *ctx.options)
        d_output = d_output.to(cut.dtype)
        # Through the softmax: dS = P ∘ (dP - delta), where delta = Σ_j P_j dP_j = dO · O.
        delta = cut.cut(((d_output * output).sum(-1) - d_lse)[..., None])
        # A row that sees nothing has lse -inf; with +inf its weights are exp(-inf) = 0.
        lse = cut.cut(lse.masked_fill(lse == -math.inf, math.inf)[..., None])
        d_output = cut.cut(d_output)
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (cut.query, cut.key, cut.value))
        d_bias = None if bias is None else torch.zeros_like(cut.bias.tiles)
        for chunk in cut.chunks():
            q, d_o = cut.query[chunk.query], d_output[chunk.query]  # (rows, block, d)
            weights = cut.scores(chunk).sub_(lse[chunk.query]).exp_()  # (rows, block, keys)
            d_weights = cut.dropped(d_o @ cut.values(chunk).mT, chunk)
            d_scores = d_weights.sub_(delta[chunk.query]).mul_(weights)
            cut.add(d_value, chunk, cut.dropped(weights, chunk).mT @ d_o)
            if d_bias is not None:
                cut.bias.add(d_bias, chunk, d_scores)
            d_query[chunk.query] = d_scores @ cut.keys(chunk) * cut.scale
            cut.add(d_key, chunk, d_scores.mT @ q)  # q is scaled already
        d_query, d_key, d_value = (
            cut.join(d, x.shape).to(x.dtype)
            for d, x in ((d_query, query), (d_key, key), (d_value, value))
        )
        d_bias = None if d_bias is None else cut.bias.join(d_bias).to(bias.dtype)
        return d_query, d_key, d_value, d_bias, None, None, None


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (in the memory of the scores) and log-sum-exp; a row of -inf: 0 and -inf."""
    most = scores.amax(-1, keepdim=True)
    most = most.masked_fill(most == -math.inf, 0)  # -inf - -inf would be NaN
    weights = scores.sub_(most).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (most + total.log()).squeeze(-1)
    return weights.div_(total.masked_fill(total == 0, 1)), lse


@dataclass(frozen=True)
class _Chunk:
    """Some rows of one group: indices of tiles in tensors whose first dimensions are flattened."""

    number: int
    query: Int[Tensor, " rows"]  # in batch · heads · row tiles
    key: Int[Tensor, " pairs"]  # in batch · groups · key tiles
    place: tuple[Tensor, ...]  # batch, head, row (rows,) and columns (rows, seen)
    hidden: list[tuple[slice, Bool[Tensor, "block_q block_k"]]]


class _Cut:
    """Query, key and value of one call, cut into tiles, and the chunks to work through."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, plan: Plan,
        scale: float, noise: _Noise | None,
    ) -> None:  # fmt: skip
        self.plan, self.scale, self.noise = plan, scale, noise
        self.batch, self.heads, n_q, _ = query.shape
        self.groups, n_k = key.shape[1:3]
        self.rows, self.columns = math.ceil(n_q / plan.block), math.ceil(n_k / plan.block)
        self.dtype = torch.promote_types(query.dtype, torch.float32)  # float16 would lose digits
        self.query, self.key, self.value = (self.cut(x) for x in (query, key, value))
        self.query = self.query * scale
        if bias is not None:
            self.bias = _Bias(bias.to(self.dtype), n_q, n_k, plan.block)
        self.biased = bias is not None

    def cut(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "tiles block d"]:
        """(b, h, n, d) -> (b · h · tiles, block, d), with 0 beyond the end."""
        x = F.pad(x.to(self.dtype), (0, 0, 0, -x.shape[2] % self.plan.block))
        b, h, n, d = x.shape
        return x.reshape(b * h * n // self.plan.block, self.plan.block, d)

    def join(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `cut`: (b · h · tiles, block, …) -> (b, h, n, …), b, h, n as in shape."""
        b, h, n = shape[:3]
        tiles = math.ceil(n / self.plan.block)
        return x.view(b, h, tiles * self.plan.block, *x.shape[2:])[:, :, :n]

    def chunks(self) -> Iterator[_Chunk]:
        """Rows of a group, as many at once as CHUNK scores allow."""
        number = 0
        for group in self.plan.groups:
            place = self._everywhere(group)
            if not len(place[0]):  # a batch of nobody
                continue
            at_once = max(1, CHUNK // (group.columns.shape[1] * self.plan.block**2))
            for b, h, r, c in zip(*(x.split(at_once) for x in place), strict=True):
                query = (b * self.heads + h) * self.rows + r
                shared = h // (self.heads // self.groups)  # by the query heads of a group
                key = ((b * self.groups + shared) * self.columns)[:, None] + c
                yield _Chunk(number, query, key.flatten(), (b, h, r, c), group.hidden)
                number += 1

    def _everywhere(self, group: Group) -> list[Tensor]:
        """batch, head, row and columns of the group's rows, for all that its mask speaks for."""
        device = group.row.device
        batch, head = group.batch.view(1, 1, -1), group.head.view(1, 1, -1)
        if self.plan.batch_size is None:
            batch = torch.arange(self.batch, device=device).view(-1, 1, 1)
        if self.plan.num_heads is None:
            head = torch.arange(self.heads, device=device).view(1, -1, 1)
        batch, head, row = torch.broadcast_tensors(batch, head, group.row)
        columns = group.columns.expand(*row.shape, -1)  # (b, h, rows, seen)
        return [batch.flatten(), head.flatten(), row.flatten(), columns.flatten(0, 2)]

    def keys(self, chunk: _Chunk) -> Float[Tensor, "rows keys d_k"]:
        """The keys that these rows see."""
        return self._side_by_side(self.key, chunk)

    def values(self, chunk: _Chunk) -> Float[Tensor, "rows keys d_v"]:
        """The values that these rows see."""
        return self._side_by_side(self.value, chunk)

    def _side_by_side(self, tiles: Tensor, chunk: _Chunk) -> Tensor:
        # (rows · seen, block, d) -> (rows, seen · block, d)
        seen = len(chunk.key) // len(chunk.query)
        return tiles[chunk.key].view(len(chunk.query), seen * tiles.shape[1], tiles.shape[2])

    def add(self, tiles: Tensor, chunk: _Chunk, x: Float[Tensor, "rows keys d"]) -> None:
        """The inverse of `keys` and `values`: what several rows give to one tile adds up."""
        tiles.index_add_(0, chunk.key, x.reshape(-1, *tiles.shape[1:]))

    def scores(self, chunk: _Chunk) -> Float[Tensor, "rows block_q keys"]:
        """Q Kᵀ · scale + bias, -inf where the mask hides the pair."""
        q, k = self.query[chunk.query], self.keys(chunk)
        scores = q @ k.mT  # (rows, block, d) x (rows, d, keys)
        if self.biased:
            scores += self.bias.of(chunk)
        for columns, hidden in chunk.hidden:  # after the product: what is hidden may be huge
            scores[:, :, columns].masked_fill_(hidden, -math.inf)
        return scores

    def dropped(self, weights: Tensor, chunk: _Chunk) -> Tensor:
        """Some weights replaced by 0, the same ones whenever asked."""
        return weights if self.noise is None else weights * self.noise.keep(chunk.number, weights)


class _Bias:
    """A bias cut into tiles; a dimension of size 1 stays one."""

    def __init__(self, bias: Tensor, n_q: int, n_k: int, block: int) -> None:
        self.shape = bias.shape
        bias = bias.view((1,) * (4 - bias.ndim) + tuple(bias.shape))
        q, k = bias.shape[2:]
        self.wide_q, self.wide_k = q > 1 or n_q == 1, k > 1 or n_k == 1
        pad_q, pad_k = (-q % block if self.wide_q else 0), (-k % block if self.wide_k else 0)
        bias = F.pad(bias, (0, pad_k, 0, pad_q))
        block_q, block_k = block if self.wide_q else 1, block if self.wide_k else 1
        # (b, h, rows · block_q, columns · block_k) -> (b, h, rows, columns, block_q, block_k)
        cut = bias.unflatten(3, (-1, block_k)).unflatten(2, (-1, block_q))
        self.tiles = cut.transpose(3, 4)
        self.block, self.lengths = block, (q, k)

    def _index(self, chunk: _Chunk) -> tuple[Tensor, ...]:
        b, h, r, c = chunk.place
        index = (b[:, None], h[:, None], r[:, None], c)  # (rows, seen) together
        return tuple(
            i if size > 1 else torch.zeros_like(i)
            for i, size in zip(index, self.tiles.shape, strict=False)
        )

    def of(self, chunk: _Chunk) -> Float[Tensor, "rows block_q_or_1 keys"]:
        """The bias of a chunk."""
        found = self.tiles[self._index(chunk)].expand(-1, -1, -1, self.block)
        # (rows, seen, block_q or 1, block_k) -> (rows, block_q or 1, seen · block_k)
        return found.transpose(1, 2).flatten(2)

    def add(self, tiles: Tensor, chunk: _Chunk, d_scores: Tensor) -> None:
        """Adds a chunk's gradient to that of the tiles."""
        # (rows, block_q, seen · block_k) -> (rows, seen, block_q, block_k)
        d = d_scores.unflatten(2, (-1, self.block)).transpose(1, 2)
        d = d if self.wide_q else d.sum(2, keepdim=True)
        d = d if self.wide_k else d.sum(3, keepdim=True)
        index = torch.broadcast_tensors(*self._index(chunk))
        tiles.index_put_(index, d, accumulate=True)

    def join(self, tiles: Tensor) -> Tensor:
        """The inverse of cutting."""
        q, k = self.lengths
        return tiles.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :q, :k].reshape(self.shape)


@dataclass(frozen=True)
class _Noise:
    """Dropout that the backward pass can draw again."""

    p: float
    seed: int

    @classmethod
    def of(cls, inputs: Inputs) -> _Noise | None:
        """None without dropout; otherwise one number from the source of randomness is the seed."""
        if inputs.dropout_p == 0:
            return None
        generator = inputs.generator
        device = "cpu" if generator is None else generator.device
        drawn = torch.randint(2**31, (1,), generator=generator, device=device)
        return cls(inputs.dropout_p, int(drawn))

    def keep(self, number: int, like: Tensor) -> Tensor:
        """Factors 0 or 1 / (1 - p) of chunk `number`."""
        generator = torch.Generator(like.device).manual_seed(self.seed + number)
        drawn = torch.empty_like(like).uniform_(generator=generator)
        return (drawn >= self.p).to(like.dtype) / (1 - self.p)


# --- the loop that teaches it ---------------------------------------------------------------------


def online_softmax(
    query: Float[Tensor, "*batch n_q d_k"],
    key: Float[Tensor, "*batch n_k d_k"],
    value: Float[Tensor, "*batch n_k d_v"],
    mask: Bool[Tensor, "*#batch n_q n_k"] | None = None,
    *,
    block: int = 64,
) -> Float[Tensor, "*batch n_q d_v"]:
    """Attention in one walk over the keys, `block` at a time, with no row of weights ever whole.

    For each query it keeps the largest score so far, the sum of exp(score - largest) and the sum of
    values weighted so. A larger score found later scales down what is there: exp(old - new).
    Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3;
    Dao et al. 2022, "FlashAttention", algorithm 1.
    """
    n_k, scale = key.shape[-2], query.shape[-1] ** -0.5
    largest = query.new_full((*query.shape[:-1], 1), -math.inf)
    total = torch.zeros_like(largest)
    output = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for start in range(0, n_k, block):
        some = slice(start, start + block)
        scores = query @ key[..., some, :].mT * scale  # (…, n_q, d_k) x (…, d_k, block)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., some], -math.inf)
        new = largest.maximum(scores.amax(-1, keepdim=True))
        safe = new.masked_fill(new == -math.inf, 0)  # nothing visible yet
        weights, shrink = (scores - safe).exp(), (largest - safe).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        # (…, n_q, block) x (…, block, d_v)
        output = output * shrink + weights @ value[..., some, :]
        largest = new
    return output / total.masked_fill(total == 0, 1)
