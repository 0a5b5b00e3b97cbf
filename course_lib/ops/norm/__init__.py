"""Layer normalisation and RMS normalisation as functions.

`api` checks the arguments and chooses a backend; `reference` is the maths and nothing else;
`fused` calls PyTorch's own.
"""

from .api import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
