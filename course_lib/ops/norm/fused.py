"""Normalisation by PyTorch's own functions: one pass over the memory instead of several."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def layer_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
) -> Float[Tensor, "... d"]:
    """(x - mean) / √(variance + ε) · weight + bias."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def rms_norm(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """x / √(mean of squares + ε) · weight."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)
