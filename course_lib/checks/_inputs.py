"""Inputs that several chapters' cases and behaviours are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(g: torch.Generator, *shape: int, spread: float = 1.0) -> Tensor:
    """Normal numbers with one decimal, so that a counterexample can be read."""
    return (torch.randn(*shape, generator=g) * 10 * spread).round() / 10 + 0.0


def some(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers of each shape, the same ones for the same seed."""
    g = torch.Generator().manual_seed(seed)
    return [normal(g, *shape) for shape in shapes]
