"""`rotary`: arguments checked, then one of two ways to say the same."""

from __future__ import annotations

import torch
from torch import Tensor

from . import as_complex, reference


def rotary(
    x: Tensor, *, offset: int = 0, base: float = 10_000.0, interleaved: bool = True
) -> Tensor:
    """Rotary position encoding: turn each pair of entries by an angle proportional to its position.

    The product of a turned query and a turned key depends on the distance of their positions only.
    Source: "RoFormer", Su et al. 2021, section 3.2.2, equation 15.

    Args:
        x: queries or keys (batch, heads, length, d_head), d_head even.
        offset: position of the first one.
        base: pair i turns by base^(-2i / d_head) radians per position.
        interleaved: pairs are neighbours (as in the paper); False pairs entry i with entry
            i + d_head / 2 (as in Llama's released weights).

    Raises:
        TypeError, ValueError: x is not floating point, not 4-D, or its d_head is odd.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"x must have shape (batch, heads, length, d_head) with d_head even, got "
            f"{tuple(x.shape)}"
        )
    positions = torch.arange(offset, offset + x.shape[2], device=x.device)
    if interleaved and not torch.compiler.is_compiling():  # compilers know no complex numbers
        return as_complex.rotary(x, positions, base)
    return reference.rotary(x, positions, base, interleaved)
