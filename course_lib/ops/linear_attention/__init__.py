"""Linear attention: weights that are products of features, so that keys can be summed up first.

`api` checks the arguments and chooses a backend; `reference` is the formula with its n x n weights,
`recurrent` the same thing as an RNN, `tiled` the fast one. Backends never import one another.
"""

from .api import linear_attention

__all__ = ["linear_attention"]
