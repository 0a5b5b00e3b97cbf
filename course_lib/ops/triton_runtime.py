"""Triton, the language of the GPU kernels: the only module that imports it, and only when asked.

Kernels are written once. Where there is CUDA they are compiled for the GPU; where there is none
they run in Triton's interpreter, on a CPU, slowly. One process has one mode, fixed when Triton is
first imported, so the choice is made here before anybody else imports it.

    from ..triton_runtime import tl, triton  # in a module of kernels, itself imported at first use
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # type checkers need no Triton, and take its language for anything
    triton: Any
    tl: Any
    INTERPRETED: bool

__all__ = ["INTERPRETED", "capability", "on", "tl", "triton", "why_not"]

VARIABLE = "TRITON_INTERPRET"

if not (torch.version.cuda or torch.version.hip):  # this torch cannot have a GPU: known at no cost
    os.environ.setdefault(VARIABLE, "1")


def why_not(device: torch.device | str) -> str | None:
    """Why kernels cannot run on tensors of this device, or None."""
    device = torch.device(device)
    if "triton" not in sys.modules and find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"there are no kernels for the device {device.type}"
    if _interpreted():
        return None
    if os.environ[VARIABLE] in ("", "0"):
        return f"tensors on a CPU need Triton's interpreter, which is off ({VARIABLE})"
    return (
        "tensors on a CPU need Triton's interpreter, but Triton was imported without it before "
        f"course_lib was: start Python with {VARIABLE}=1"
    )


# torch.compile asks once and takes the answer for a constant. This is all that
# torch.compiler.assume_constant_result does, but that imports the whole compiler, and Triton.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels start on the current device: this makes it the one where the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100, 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def __getattr__(name: str) -> Any:
    """`triton`, `tl` and `INTERPRETED`: the first one asked for imports Triton."""
    if name not in ("triton", "tl", "INTERPRETED"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    interpreted = _interpreted()
    module = importlib.import_module("triton")
    language = importlib.import_module("triton.language")
    globals().update(triton=module, tl=language, INTERPRETED=interpreted)
    return globals()[name]


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, or will once it is imported."""
    os.environ.setdefault(VARIABLE, "0" if torch.cuda.is_available() else "1")
    loaded = sys.modules.get("triton.language")
    if loaded is None:
        return os.environ[VARIABLE] not in ("", "0")
    # Triton's own functions are decorated at import, and tell how.
    return type(loaded.sum).__name__ == "InterpretedFunction"
