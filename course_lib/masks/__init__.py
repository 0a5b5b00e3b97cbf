"""Who may look at whom: one `Mask` type that every attention backend reads.

A mask is a *rule*, not a matrix. It answers one question, "may this query look at this key?",
for any batch element, head, query position and key position. Backends ask it for the form they
need: `dense` for the reference and SDPA, `mask_mod` and `block_mask` for FlexAttention, `tiles`
for blockwise code. Rules combine with `&`, `|` and `~`.

**True = may attend**, everywhere.

Positions are aligned at the **bottom right**: with n_q queries and n_k keys, query i stands at
position i + n_k - n_q of the keys' sequence. The last query sits on the last key, which is what
decoding with a key/value cache needs.

    >>> (causal() & padding([2, 3])).dense(3, 3)[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 0]], dtype=torch.int32)
"""

from .rules import (
    Mask,
    bigbird,
    causal,
    documents,
    from_dense,
    longformer,
    padding,
    prefix,
    sliding_window,
)
from .tiles import Tiles

__all__ = [
    "Mask",
    "Tiles",
    "bigbird",
    "causal",
    "documents",
    "from_dense",
    "longformer",
    "padding",
    "prefix",
    "sliding_window",
]
