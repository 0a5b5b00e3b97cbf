"""Scaled dot-product attention: one function, several backends.

`api` checks the arguments and chooses a backend; `reference` is the maths and nothing else; `sdpa`
and `flex` call PyTorch's own. Backends never import one another.
"""

from .api import BackendUnsupportedError, attention, explain_backends

__all__ = ["BackendUnsupportedError", "attention", "explain_backends"]
