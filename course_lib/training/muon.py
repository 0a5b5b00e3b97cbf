"""Muon: momentum whose every matrix is made orthogonal before it is added."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a X + b (XXᵀ) X + c (XXᵀ)² X drives every singular value of X to about 1."""


class Muon(Optimizer):
    """Steps matrices in the direction U Vᵀ, where U S Vᵀ is their momentum.

    All singular values become about 1, so that rare directions learn as fast as common ones.
    `torch.optim.Muon` is the same with one matrix at a time; here those of a shape go together,
    which matters where matrices are small. Steps are √max(1, rows / columns) · lr long.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".

    Args:
        params: matrices inside a network; embeddings, head and vectors are for AdamW.
        lr: learning rate, about 0.02 to 0.05.
        momentum: share of the past in the (Nesterov) momentum.
        ns_steps: iterations of Newton-Schulz.

    Raises:
        ValueError: a parameter is no matrix, or a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.03,
        *,
        momentum: float = 0.9,
        ns_steps: int = 3,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        if ns_steps < 1 or not lr > 0:
            raise ValueError(
                f"ns_steps and lr must be positive, got ns_steps={ns_steps} and lr={lr}"
            )
        super().__init__(params, {"lr": lr, "momentum": momentum, "ns_steps": ns_steps})
        for shape in (tuple(p.shape) for g in self.param_groups for p in g["params"]):
            if len(shape) != 2:
                raise ValueError(f"params must be matrices, got one of shape {shape}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step for every matrix that has a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            updates = self._nesterov(matrices, group["momentum"])
            for together in _by_shape(matrices):
                batch = torch.stack([updates[i] for i in together])  # (how many, rows, columns)
                for i, update in zip(together, orthogonal(batch, group["ns_steps"]), strict=True):
                    matrices[i].add_(update, alpha=-group["lr"] * _length(matrices[i]))
        return loss

    def _nesterov(self, matrices: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """The gradients, looked ahead along their running mean."""
        gradients = [p.grad for p in matrices if p.grad is not None]
        means = []
        for p in matrices:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            means.append(state["momentum"])
        if not matrices:
            return []
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, means, momentum))


def orthogonal(
    matrices: Float[Tensor, "many rows columns"], steps: int = 5
) -> Float[Tensor, "many rows columns"]:
    """Nearly U Vᵀ of each matrix U S Vᵀ, by Newton-Schulz iterations in bfloat16.

    The iteration works on the smaller Gram matrix, so a tall matrix is laid on its side.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16().mT if tall else matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (many, r, c) x (many, c, r) -> (many, r, r)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _by_shape(matrices: list[nn.Parameter]) -> list[list[int]]:
    """Indices of the matrices, those of one shape and device together."""
    groups: dict[Any, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault((matrix.shape, matrix.device, matrix.dtype), []).append(i)
    return list(groups.values())


def _length(matrix: Tensor) -> float:
    return math.sqrt(max(1, matrix.shape[0] / matrix.shape[1]))
