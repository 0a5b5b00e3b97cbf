"""Cross-entropy over a vocabulary, from logits or straight from the hidden states before them.

`api` checks the arguments and chooses a backend; `reference` is the maths and nothing else, `fused`
calls PyTorch's own, `triton_cross_entropy` holds our kernels. `chunked` computes the logits of a
few tokens at a time, by any of them.
"""

from .api import cross_entropy, linear_cross_entropy

__all__ = ["cross_entropy", "linear_cross_entropy"]
