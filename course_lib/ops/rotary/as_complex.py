"""The same rotation as one product, faster on a CPU: neighbours (a, b) are the number a + ib."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary(
    x: Float[Tensor, "batch heads length d_head"], positions: Int[Tensor, " length"], base: float
) -> Float[Tensor, "batch heads length d_head"]:
    """Pair i at position p, times exp(iθ) with θ = p·base^(-2i/d)."""
    d_head = x.shape[-1]
    dtype = torch.promote_types(x.dtype, torch.float32)  # angles lose their turns in float16
    pair = torch.arange(0, d_head, 2, device=x.device, dtype=dtype)  # 2i
    angle = positions.to(dtype)[:, None] * base ** (-pair / d_head)  # (length, d_head / 2)
    turn = torch.complex(angle.cos(), angle.sin())
    pairs = torch.view_as_complex(x.to(dtype).contiguous().unflatten(-1, (-1, 2)))  # (…, d/2)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)  # (…, d/2, 2) -> (…, d)
