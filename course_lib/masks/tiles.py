"""A mask cut into tiles: what blockwise code reads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from .rules import Mask

LOOK_AT_ONCE = 2**24  # pairs


@dataclass(frozen=True)
class Tiles:
    """A mask cut into tiles of block_q x block_k; empty tiles are in no list.

    For batch element b, head h and row r of query tiles, the keys' tiles to visit are
    `full[b, h, r, :num_full[b, h, r]]`, which need no masking, and
    `partial[b, h, r, :num_partial[b, h, r]]`, where `patterns[pattern[b, h, r, k]]` says which
    pairs of the k-th of them are visible. Most partial tiles of a real mask repeat (a causal mask
    has one), so `patterns` is small. batch and heads are 1 where the rule does not depend on them.
    Entries beyond the counts are 0.
    """

    n_q: int
    n_k: int
    block_q: int
    block_k: int
    num_full: Int[Tensor, "batch heads rows"]
    full: Int[Tensor, "batch heads rows max_full"]
    num_partial: Int[Tensor, "batch heads rows"]
    partial: Int[Tensor, "batch heads rows max_partial"]
    pattern: Int[Tensor, "batch heads rows max_partial"]
    patterns: Bool[Tensor, "num_patterns block_q block_k"]

    def dense(self) -> Bool[Tensor, "batch heads n_q n_k"]:
        """The mask put together again: the inverse of `Mask.tiles`, for tests and pictures."""
        batch, heads, rows = self.num_full.shape
        columns = math.ceil(self.n_k / self.block_k)
        device = self.full.device
        whole = torch.zeros(
            batch, heads, rows, columns, self.block_q, self.block_k, dtype=torch.bool, device=device
        )
        b, h, r, k = _listed(self.num_full, self.full.shape[-1])
        whole[b, h, r, self.full[b, h, r, k].long()] = True
        b, h, r, k = _listed(self.num_partial, self.partial.shape[-1])
        seen = self.patterns[self.pattern[b, h, r, k].long()]
        whole[b, h, r, self.partial[b, h, r, k].long()] = seen
        # (b, h, rows, columns, block_q, block_k) -> (b, h, rows * block_q, columns * block_k)
        whole = whole.transpose(3, 4).flatten(4).flatten(2, 3)
        return whole[:, :, : self.n_q, : self.n_k]

    def table(self) -> Int[Tensor, "batch heads rows columns"]:
        """Every tile in its place: -1 empty, 0 full, k > 0 the pairs of `patterns[k - 1]`."""
        shape = (*self.num_full.shape, math.ceil(self.n_k / self.block_k))
        table = torch.full(shape, -1, device=self.full.device)
        b, h, r, k = _listed(self.num_full, self.full.shape[-1])
        table[b, h, r, self.full[b, h, r, k].long()] = 0
        b, h, r, k = _listed(self.num_partial, self.partial.shape[-1])
        table[b, h, r, self.partial[b, h, r, k].long()] = self.pattern[b, h, r, k].long() + 1
        return table


def _listed(count: Tensor, width: int) -> tuple[Tensor, ...]:
    """The indices (batch, head, row, k) of the entries that the counts declare valid."""
    valid = torch.arange(width, device=count.device) < count[..., None]
    return valid.nonzero(as_tuple=True)


def build_tiles(
    mask: Mask, n_q: int, n_k: int, block_q: int, block_k: int, device: torch.device | str | None
) -> Tiles:
    """The tiles of a mask: see `Mask.tiles`."""
    rule = mask.mask_mod(n_q, n_k, device)  # raises where it cannot serve these lengths
    rows, columns = _spans(n_q, block_q, device), _spans(n_k, block_k, device)
    shape = (*mask._sizes(), len(rows), len(columns))
    full = torch.zeros(shape, dtype=torch.bool, device=device)
    names, known = full.long(), {}  # the number of each partial tile, -1 for others
    names -= 1
    if full.numel():
        maybe, surely = mask.rectangles(n_q, n_k, rows, columns)
        full |= surely
        places = (maybe & ~surely).expand(shape).flatten(0, 1).any(0).nonzero()  # (pairs, 2)
        at_once = max(1, LOOK_AT_ONCE // (shape[0] * shape[1] * block_q * block_k))
        for some in places.split(at_once):
            _look(rule, some, rows, columns, full, names, known, block_q, block_k)
    patterns = np.frombuffer(b"".join(known), dtype=bool).reshape(-1, block_q, block_k)
    full_index, num_full = _compress(full)
    partial_index, num_partial = _compress(names >= 0)
    pattern = names.gather(3, partial_index.long()).clamp(min=0).int()
    return Tiles(
        n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k,
        num_full=num_full, full=full_index,
        num_partial=num_partial, partial=partial_index, pattern=pattern,
        patterns=torch.from_numpy(patterns.copy()).to(device),
    )  # fmt: skip


def _look(rule, places, rows, columns, full, names, known, block_q, block_k) -> None:  # type: ignore
    """Evaluate these tiles pair by pair; note which are full, and name the partial ones."""
    batch, heads = full.shape[:2]
    r, c = places.unbind(1)
    i = rows[r, :1] + torch.arange(block_q, device=rows.device)  # (tiles, block_q)
    j = columns[c, :1] + torch.arange(block_k, device=rows.device)  # (tiles, block_k)
    inside = (i <= rows[r, 1:])[:, :, None] & (j <= columns[c, 1:])[:, None, :]
    b = torch.arange(batch, device=rows.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(heads, device=rows.device).view(1, -1, 1, 1, 1)
    i, j = i.minimum(rows[r, 1:])[:, :, None], j.minimum(columns[c, 1:])[:, None, :]
    # (batch, heads, tiles, block_q, block_k)
    seen = (rule(b, h, i, j) & inside).expand(batch, heads, *inside.shape)
    count = seen.sum((3, 4))
    whole = count == inside.sum((1, 2))
    full[:, :, r, c] = whole
    partial = (count > 0) & ~whole
    tiles = seen[partial].cpu().numpy()  # (how many, block_q, block_k)
    numbers = [known.setdefault(tile.tobytes(), len(known)) for tile in tiles]
    there = torch.full_like(count, -1)
    there[partial] = torch.tensor(numbers, dtype=torch.long, device=count.device)
    names[:, :, r, c] = there


def _spans(n: int, block: int, device: torch.device | str | None) -> Int[Tensor, "blocks 2"]:
    """First and last position of each block."""
    first = torch.arange(0, n, block, device=device)
    return torch.stack([first, (first + block).clamp(max=n) - 1], 1)


def _compress(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Bool (..., columns) -> (the True columns in order, padded with 0; how many there are)."""
    count = flags.sum(-1)
    width = int(count.max()) if count.numel() else 0
    columns = torch.arange(flags.shape[-1], device=flags.device).expand(flags.shape)
    # Sorting with the unset columns pushed to the end keeps the set ones in order.
    order = torch.where(flags, columns, flags.shape[-1]).sort(-1).values[..., :width]
    return order.where(order < flags.shape[-1], 0).int(), count.int()
