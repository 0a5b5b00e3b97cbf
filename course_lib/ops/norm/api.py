"""`layer_norm` and `rms_norm`: check the arguments, choose a backend, call it."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import fused, reference

BACKENDS: dict[str, ModuleType] = {"fused": fused, "reference": reference}


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension: (x - mean) / √(variance + ε) · weight + bias.

    The variance is the biased one: it divides by d. Statistics are in float32 or better.
    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", §3, equation 4.

    Args:
        x: (..., d), floating point.
        weight, bias: (d,), or None for 1 and 0.
        eps: added to the variance, inside the root.
        backend: "reference", "fused" (PyTorch's own), or "auto": fused where dtypes agree.

    Raises:
        TypeError, ValueError: x is not floating point, weight or bias does not have shape (d,), or
            the backend is unknown.
    """
    _check(x, weight=weight, bias=bias)
    return _choose(backend, x, weight, bias).layer_norm(x, weight, bias, eps)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float | None = 1e-5, backend: str = "auto"
) -> Tensor:
    """RMS normalisation over the last dimension: x / √(mean of squares + ε) · weight.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", §3, equation 4. ε is not
    in the paper; None takes the machine epsilon of float32 or better, as `torch.nn.RMSNorm` does.

    Other arguments and errors as in `layer_norm`; there is no mean and no bias.
    """
    _check(x, weight=weight)
    if eps is None:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    return _choose(backend, x, weight).rms_norm(x, weight, eps)


def _choose(backend: str, x: Tensor, *parameters: Tensor | None) -> ModuleType:
    if backend == "auto":  # under autocast x may be bfloat16 and the parameters float32
        agree = all(p is None or p.dtype == x.dtype for p in parameters)
        return fused if agree else reference
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    return BACKENDS[backend]


def _check(x: Tensor, **parameters: Tensor | None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor, got {kind}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., d) with d at least 1, got {tuple(x.shape)}")
    for name, parameter in parameters.items():
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape ({x.shape[-1]},) to fit x {tuple(x.shape)}, got "
                f"{tuple(parameter.shape)}"
            )
