"""Cross-entropy as its equation says, in float32 or better."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def losses(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    ignore_index: int,
    smoothing: float,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Loss of each row, -Σ_j q_j log p_j, and its log-sum-exp.

    log p_j = x_j - logsumexp(x), and q is 1 - ε at the target with ε / vocab everywhere.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sum = wide.logsumexp(-1)  # (rows, vocab) -> (rows,)
    counts = targets != ignore_index
    right = wide.gather(-1, torch.where(counts, targets, 0)[:, None])[:, 0]  # (rows, 1) -> (rows,)
    loss = log_sum - right
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (log_sum - wide.mean(-1))
    return torch.where(counts, loss, 0), log_sum


def gradient(
    d_loss: Float[Tensor, " rows"],
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    log_sum: Float[Tensor, " rows"],
    ignore_index: int,
    smoothing: float,
) -> Float[Tensor, "rows vocab"]:
    """Of the logits: (p - q) · d_loss, and 0 where a target does not count."""
    counts = (targets != ignore_index)[:, None]
    change = logits.to(log_sum.dtype) - log_sum[:, None]  # log p, from here on in its own memory
    change.exp_().sub_(smoothing / logits.shape[1])
    at = torch.where(counts, targets[:, None], 0)  # (rows, 1)
    change.scatter_add_(1, at, torch.full_like(log_sum, smoothing - 1)[:, None])
    return change.mul_(d_loss[:, None]).masked_fill_(~counts, 0).to(logits.dtype)
