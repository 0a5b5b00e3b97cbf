"""Optimisers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .muon import Muon

Make = Callable[..., Optimizer | list[Optimizer]]


def make_optimizers(optimizer: str | Make, model: nn.Module, lr: float) -> list[Optimizer]:
    """The optimisers of this name, or those that `optimizer(parameters, lr=lr)` makes.

    "adamw" and "sgd" are PyTorch's; "muon" steps matrices inside the network by Muon (Jordan et
    al. 2024) and embeddings, head and vectors by AdamW.

    Raises:
        ValueError: the name is unknown.
    """
    by_name: dict[str, Callable[[], Any]] = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=lr),
        "muon": lambda: _muon(model, lr),
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=lr),
    }
    if not isinstance(optimizer, str):
        made = optimizer(model.parameters(), lr=lr)
    elif optimizer in by_name:
        made = by_name[optimizer]()
    else:
        raise ValueError(
            f"optimizer must be one of {sorted(by_name)} or callable, got {optimizer!r}"
        )
    several = made if isinstance(made, list) else [made]
    for each in several:
        for group in each.param_groups:
            group.setdefault("initial_lr", group["lr"])
    return several


def _muon(model: nn.Module, lr: float) -> list[Optimizer]:
    matrices, rest = split_parameters(model)
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, weight_decay=0.0)]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between hidden states, and the rest: embeddings, head, vectors."""
    outside = {
        id(p)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.split(".")[-1] == "head"
        for p in module.parameters()
    }
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in outside]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def set_rate(optimizers: list[Optimizer], factor: float) -> None:
    """Every group at this share of its peak learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
