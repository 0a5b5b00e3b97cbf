"""Normalisation as its equations say, statistics in float32 or better."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def layer_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"] | None,
    bias: Float[Tensor, " d"] | None,
    eps: float,
) -> Float[Tensor, "... d"]:
    """(x - mean) / √(variance + ε) · weight + bias; the variance divides by d, not by d - 1."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return _affine(centred * torch.rsqrt(variance + eps), weight, bias).to(x.dtype)


def rms_norm(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"] | None, eps: float
) -> Float[Tensor, "... d"]:
    """x / √(mean of squares + ε) · weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return _affine(wide * scale, weight, None).to(x.dtype)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)
