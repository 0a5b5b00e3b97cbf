"""The companion package of the course: every component that a chapter builds, tested and fast.

>>> from course_lib import attention, explain_backends, masks
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what editors and type checkers see
    from . import layers, leaks, masks, models
    from .ops.attention import BackendUnsupportedError, attention, explain_backends

__version__ = "0.3.0"

__all__ = [
    "BackendUnsupportedError",
    "__version__",
    "attention",
    "explain_backends",
    "layers",
    "leaks",
    "masks",
    "models",
]

_FROM = dict.fromkeys(
    ("BackendUnsupportedError", "attention", "explain_backends"), "course_lib.ops.attention"
)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `course --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _FROM:
        value = getattr(import_module(_FROM[name]), name)
    else:
        value = import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
