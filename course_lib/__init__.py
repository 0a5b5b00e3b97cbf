"""The companion package of the course: every component that a chapter builds, tested and fast.

>>> from course_lib import attention, explain_backends, masks
"""

__version__ = "0.1.0"

from . import layers, masks, models
from .ops.attention import BackendUnsupportedError, attention, explain_backends

__all__ = [
    "BackendUnsupportedError",
    "__version__",
    "attention",
    "explain_backends",
    "layers",
    "masks",
    "models",
]
