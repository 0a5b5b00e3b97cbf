"""What the Triton kernels walk along: for each row of tiles, the tiles that hold visible pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import masks
from .plans import clipped, kept


@dataclass(frozen=True)
class Plan:
    """A mask cut into tiles of block_q x block_k, listed for kernels.

    `by_query[b, h, r]` is one row of tiles, pairs of int32. The first pair says how many tiles are
    full and how many partial. Then, full ones first, a pair for each tile: which column of tiles,
    and for a partial one which of `patterns` (uint8, number x block_q x block_k) says who sees
    whom. `by_key[b, h, c]` is the same read from above: the rows that see column c. Sizes of batch
    and heads are 1 where the mask does not depend on them.

    A full tile lies wholly inside the keys: the last tile of a ragged length counts as partial.
    """

    by_query: Tensor
    by_key: Tensor
    patterns: Tensor


@kept
def make_plan(
    mask: masks.Mask, n_q: int, n_k: int, block: tuple[int, int], device: torch.device
) -> Plan:
    """The plan of a mask for tiles of this size."""
    table, patterns = clipped(mask.tiles(n_q, n_k, *block, device))
    return Plan(_listed(table), _listed(table.mT), patterns.to(torch.uint8))


def _listed(table: Tensor) -> Tensor:
    """(batch, heads, rows, columns), -1 empty, 0 full, k for pattern k - 1 -> a list for each row.

    The result has shape (batch, heads, rows, 1 + the most tiles of a row, 2): see `Plan`.
    """
    full, partial = table == 0, table > 0
    order = torch.where(full, 0, torch.where(partial, 1, 2)).argsort(dim=-1, stable=True)
    counts = torch.stack([full.sum(-1), partial.sum(-1)], -1)  # (batch, heads, rows, 2)
    most = int(counts.sum(-1).max()) if counts.numel() else 0
    order = order[..., :most]
    pattern = (table.gather(-1, order) - 1).clamp(min=0)
    entries = torch.stack([order, pattern], -1)  # (batch, heads, rows, most, 2)
    return torch.cat([counts[..., None, :], entries], -2).int().contiguous()
