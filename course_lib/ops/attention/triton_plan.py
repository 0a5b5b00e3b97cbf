"""What the Triton kernels walk along: for each row of tiles, the tiles that hold visible pairs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ... import masks


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


_EVERYTHING = masks.from_dense(torch.ones(1, 1, dtype=torch.bool))
_PLANS: OrderedDict[tuple[Any, ...], tuple[Plan, masks.Mask]] = OrderedDict()
KEPT = 64
"""So many plans of late are kept, each with its mask, lest another gets the same id."""


def make_plan(
    mask: masks.Mask | None, n_q: int, n_k: int, block: tuple[int, int], device: torch.device
) -> Plan:
    """The plan of a mask: made once for all masks that say the same."""
    mask = _EVERYTHING if mask is None else mask
    rule = _fingerprint(mask)
    if rule is None:
        return _make_plan(mask, n_q, n_k, block, device)
    key = (n_q, n_k, block, device, rule)
    if key not in _PLANS:
        _PLANS[key] = _make_plan(mask, n_q, n_k, block, device), mask
        if len(_PLANS) > KEPT:
            _PLANS.popitem(last=False)
    _PLANS.move_to_end(key)
    return _PLANS[key][0]


def _fingerprint(value: Any) -> Any:
    """What tells a rule from others: its numbers, and which tensors, written to how often.

    None where a tensor does not count how often it is written to.
    """
    if isinstance(value, Tensor):
        return None if value.is_inference() else (id(value), value._version)
    if not is_dataclass(value):
        return value
    parts = [_fingerprint(getattr(value, field.name)) for field in fields(value)]
    return None if None in parts else (type(value), *parts)


def _make_plan(
    mask: masks.Mask, n_q: int, n_k: int, block: tuple[int, int], device: torch.device
) -> Plan:
    tiles = mask.tiles(n_q, n_k, *block, device)
    table, patterns = tiles.table(), tiles.patterns
    if ragged := n_k % block[1]:
        last = table[..., -1]
        last[last == 0] = len(patterns) + 1  # full, up to where the keys end
        end = (torch.arange(block[1], device=device) < ragged).expand(1, *block)
        patterns = torch.cat([patterns, end])
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
