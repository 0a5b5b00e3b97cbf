"""What the small kernels (norms, rotary, cross-entropy) share: when one can serve, and "auto"."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .attention import BackendUnsupportedError
from .triton_runtime import why_not


def choose(
    backend: str,
    device: torch.device,
    default: str,
    others: Iterable[str],
    unsupported: Callable[[], str | None],
) -> str:
    """The backend that serves: what is asked for by name, or for "auto" the kernel on a GPU.

    `unsupported` says why the kernel cannot serve, if it cannot; "auto" then takes `default`. So it
    does on a CPU, where the kernel is interpreted, and in a compiler, which fuses plain PyTorch.
    """
    if backend == "auto":
        fast = device.type == "cuda" and not torch.compiler.is_compiling()
        return "triton" if fast and unsupported() is None else default
    if backend not in ("triton", *others):
        known = ", ".join(("auto", *others, "triton"))
        raise ValueError(f"backend must be one of {known}; got {backend!r}")
    if backend == "triton" and (reason := unsupported()) is not None:
        raise BackendUnsupportedError(f'backend "triton" cannot serve this call: {reason}')
    return backend


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no kernel can read these tensors, or None."""
    given = [x for x in tensors if x is not None]
    if any(x.dtype == torch.float64 for x in given):
        return "the Triton kernels compute in float32, and float64 is finer"
    if reason := why_not(given[0].device):
        return reason
    if any(x.device != given[0].device for x in given):
        return "the tensors are on different devices"
    if given[0].device.type == "cpu" and any(x.dtype == torch.bfloat16 for x in given):
        return "Triton's interpreter does not round bfloat16 as a GPU does"
    if any(map(transformed, given)):
        return "the Triton kernels do not run under torch.func"
    return None


def transformed(x: Tensor) -> bool:
    """Whether torch.func wraps this tensor; a compiler cannot ask, and sees through it."""
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._functorch.is_functorch_wrapped_tensor(x)


def concrete(x: Tensor) -> bool:
    """Whether there are numbers to look at, rather than a compiler's or a transform's stand-in."""
    return not (torch.compiler.is_compiling() or isinstance(x, FakeTensor) or transformed(x))
