"""`layer_norm` and `rms_norm`: check the arguments, choose a backend, call it."""

from __future__ import annotations

from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from .. import triton_limits
from . import fused, reference

BACKENDS: dict[str, ModuleType] = {"fused": fused, "reference": reference}
"""In plain PyTorch; beside them stands "triton", imported at its first use."""


# A sum comes back with a residual only, and type checkers are told so.
# fmt: off
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
    residual: None = None, eps: float = 1e-5, backend: str = "auto",
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
    residual: Tensor, eps: float = 1e-5, backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
# fmt: on


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalisation over the last dimension: (x - mean) / √(variance + ε) · weight + bias.

    The variance is the biased one: it divides by d. Statistics are in float32 or better.
    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", §3, equation 4.

    Args:
        x: (..., d), floating point.
        weight, bias: (d,), or None for 1 and 0.
        residual: (..., d), added to x before anything else.
        eps: added to the variance, inside the root.
        backend: "reference", "fused" (PyTorch's own), "triton" (our kernel), or "auto": on a GPU
            the kernel where it can serve, else fused where dtypes agree.

    Returns:
        (..., d) in the dtype of x; with a residual two results in the wider dtype of both,
        normalised and x + residual.

    Raises:
        TypeError, ValueError: x or residual is not floating point, weight or bias does not have
            shape (d,), residual does not have the shape of x, or the backend is unknown.
        BackendUnsupportedError: the kernel is asked for by name and cannot serve.
    """
    _check(x, residual, weight=weight, bias=bias)
    return _run("layer_norm", backend, x, residual, weight, bias, eps=eps)


# fmt: off
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *,
    residual: None = None, eps: float | None = 1e-5, backend: str = "auto",
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = None, *,
    residual: Tensor, eps: float | None = 1e-5, backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
# fmt: on


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float | None = 1e-5,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalisation over the last dimension: x / √(mean of squares + ε) · weight.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", §3, equation 4. ε is not
    in the paper; None takes the machine epsilon of float32 or better, as `torch.nn.RMSNorm` does.

    Other arguments, results and errors as in `layer_norm`; there is no mean and no bias.
    """
    _check(x, residual, weight=weight)
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return _run("rms_norm", backend, x, residual, weight, eps=eps)


def _run(
    norm: str, backend: str, x: Tensor, residual: Tensor | None, *parameters: Tensor | None,
    eps: float,
) -> Any:  # fmt: skip
    # Under autocast x may be bfloat16 and the parameters float32, which PyTorch's own cannot fuse.
    wide = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    agree = all(p is None or p.dtype == wide for p in parameters)
    default = "fused" if agree else "reference"
    chosen = triton_limits.choose(
        backend, x.device, default, BACKENDS, lambda: _unsupported(x, residual, *parameters)
    )
    if chosen == "triton":
        from . import triton_norm

        return getattr(triton_norm, norm)(x, *parameters, eps, residual)
    total = x if residual is None else x + residual
    normalised = getattr(BACKENDS[chosen], norm)(total, *parameters, eps)
    return normalised if residual is None else (normalised, total)


WIDEST = 8_192


def _unsupported(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot serve, or None."""
    if x.shape[-1] > WIDEST:
        return f"the Triton kernel holds a row whole, {WIDEST} numbers at most"
    return triton_limits.unsupported(x, *others)


def _check(x: Tensor, residual: Tensor | None, **parameters: Tensor | None) -> None:
    for name, tensor in (("x", x), ("residual", x if residual is None else residual)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., d) with d at least 1, got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of x {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape ({x.shape[-1]},) to fit x {tuple(x.shape)}, got "
                f"{tuple(parameter.shape)}"
            )
