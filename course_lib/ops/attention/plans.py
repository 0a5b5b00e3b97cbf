"""What blockwise backends make of a mask, made once for all masks that say the same."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ... import masks

KEPT = 64
"""So many plans of late are kept, each with its mask, lest another gets the same id."""

EVERYTHING = masks.from_dense(torch.ones(1, 1, dtype=torch.bool))
"""The mask of a call without one."""


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make(mask, *others)`, which keeps what it made until the mask's tensors are written to."""
    plans: OrderedDict[tuple[Any, ...], tuple[Any, masks.Mask]] = OrderedDict()

    @functools.wraps(make)
    def plan(mask: masks.Mask | None, *others: Any) -> Any:
        mask = EVERYTHING if mask is None else mask
        rule = _fingerprint(mask)
        if rule is None:
            return make(mask, *others)
        key = (rule, *others)
        if key not in plans:
            plans[key] = make(mask, *others), mask
            if len(plans) > KEPT:
                plans.popitem(last=False)
        plans.move_to_end(key)
        return plans[key][0]

    return plan


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


def clipped(
    tiles: masks.Tiles,
) -> tuple[Int[Tensor, "batch heads rows columns"], Bool[Tensor, "num_patterns block_q block_k"]]:
    """`tiles.table()` and the patterns, where a full tile lies wholly inside the keys.

    A full tile that reaches beyond the last key is given a pattern that ends there.
    """
    table, patterns, ragged = tiles.table(), tiles.patterns, tiles.n_k % tiles.block_k
    if ragged:
        last = table[..., -1]
        last[last == 0] = len(patterns) + 1
        end = torch.arange(tiles.block_k, device=table.device) < ragged
        patterns = torch.cat([patterns, end.expand(1, tiles.block_q, -1)])
    return table, patterns
