"""Rotation of pairs of entries by an angle that grows with the position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary(
    x: Float[Tensor, "batch heads length d_head"],
    positions: Int[Tensor, " length"],
    base: float,
    interleaved: bool,
) -> Float[Tensor, "batch heads length d_head"]:
    """Pair i, (a, b), at position p: (a cos θ - b sin θ, a sin θ + b cos θ), θ = p·base^(-2i/d)."""
    d_head = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)  # angles lose their turns in float16
    pair = torch.arange(0, d_head, 2, device=x.device, dtype=dtype)  # 2i
    angle = positions.to(dtype)[:, None] * base ** (-pair / d_head)  # (length, d_head / 2)
    cos, sin = angle.cos(), angle.sin()
    wide = x.to(dtype)
    if interleaved:  # pairs are neighbours: (x0, x1), (x2, x3), …
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:  # pairs are half a width apart: (x0, x_{d/2}), …
        a, b = wide.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.to(x.dtype)
