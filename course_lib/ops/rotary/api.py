"""`rotary`: arguments checked, then one of three ways to say the same."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton_limits
from ..attention import BackendUnsupportedError
from . import as_complex, reference


def rotary(
    x: Tensor,
    *,
    offset: int = 0,
    base: float = 10_000.0,
    interleaved: bool = True,
    backend: str = "auto",
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
        backend: "reference", "complex" (one product of complex numbers, for interleaved pairs),
            "triton" (our kernel), or "auto": on a GPU the kernel where it can serve, else
            "complex" for interleaved pairs outside a compiler, else "reference".

    Raises:
        TypeError, ValueError: x is not floating point, not 4-D, its d_head is odd, or the backend
            is unknown.
        BackendUnsupportedError: the backend asked for by name cannot serve.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"x must have shape (batch, heads, length, d_head) with d_head even, got "
            f"{tuple(x.shape)}"
        )
    # Compilers know no complex numbers.
    default = "complex" if interleaved and not torch.compiler.is_compiling() else "reference"
    chosen = triton_limits.choose(
        backend, x.device, default, ("reference", "complex"), lambda: triton_limits.unsupported(x)
    )
    if chosen == "triton":
        from . import triton_rotary

        return triton_rotary.rotary(x, offset, base, interleaved)
    positions = torch.arange(offset, offset + x.shape[2], device=x.device)
    if chosen == "reference":
        return reference.rotary(x, positions, base, interleaved)
    if not interleaved:
        raise BackendUnsupportedError('backend "complex" needs pairs that are neighbours')
    return as_complex.rotary(x, positions, base)
