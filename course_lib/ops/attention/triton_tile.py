"""What the attention kernels share: loading rows, and the scores of one tile.

Scores are held in base 2: e^x = 2^(x · log2 e), and a GPU computes powers of 2 only. log2 e is
folded into the scale once, so that no exponential costs a product.
"""

from __future__ import annotations

from ..triton_runtime import tl, triton

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST = tl.constexpr(-3.4028234663852886e38)  # of float32
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def load_rows(base, start, end, stride_n, stride_d, D: tl.constexpr, ROWS: tl.constexpr,
              WIDE: tl.constexpr):  # fmt: skip
    """Rows start to start + ROWS of a matrix (end, D) -> (ROWS, WIDE), 0 beyond its edges."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDE)[None, :]
    # Only the start can be far away: within a tile 32 bits are enough.
    there = i < (end - start).to(tl.int32)
    if WIDE > D:
        there = there & (d < D)
    return tl.load(base + start * stride_n + i * stride_n + d * stride_d, mask=there, other=0.0)


@triton.jit
def store_rows(x, base, start, end, stride_n, stride_d, D: tl.constexpr, ROWS: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    """The inverse of `load_rows`; what lies beyond the edges is not written."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDE)[None, :]
    at = base + start * stride_n + i * stride_n + d * stride_d
    there = (i < (end - start).to(tl.int32)) & (d < D)
    tl.store(at, x.to(base.dtype.element_ty), mask=there)


@triton.jit
def split_head(head, heads, repeats):
    """The number of a head in the whole batch -> batch element, head, and the group it belongs to.

    Divided in 32 bits (a GPU has no 64-bit division: it calls a function), multiplied in 64.
    """
    b, h = head // heads, head % heads
    return b.to(tl.int64), h.to(tl.int64), (h // repeats).to(tl.int64)


@triton.jit
def find_list(lists, b, h, row, heads_stride, batch_stride, row_stride):
    """The list of one row of tiles -> where its tiles stand, how many are full, and how many all.

    See `triton_plan.Plan`.
    """
    start = lists + b * batch_stride + h * heads_stride + row * row_stride
    num_full = tl.load(start)
    return start + 2, num_full, num_full + tl.load(start + 1)


@triton.jit
def scores_of(x, y, scale, x_left, y_left, bias, bias_x, bias_y, pattern, pattern_x, pattern_y,
              X: tl.constexpr, Y: tl.constexpr, BIASED: tl.constexpr,
              MASKED: tl.constexpr):  # fmt: skip
    """X Yᵀ · scale + bias in base 2, -inf where the pair is hidden -> (X, Y) in float32.

    x are queries and y keys, or the other way round. x_left and y_left are the rows of each that
    are left from here to the end; bias and pattern point to the tile's corner.
    """
    i, j = tl.arange(0, X)[:, None], tl.arange(0, Y)[None, :]
    # On a GPU float32 would be cut to tf32 unless asked for as it is.
    scores = tl.dot(x, tl.trans(y), input_precision="ieee") * scale  # (X, d) x (d, Y)
    if BIASED:
        there = (i < x_left.to(tl.int32)) & (j < y_left.to(tl.int32))
        added = tl.load(bias + i * bias_x + j * bias_y, mask=there, other=0.0).to(tl.float32)
        # The least finite bias stays finite in base 2: only -inf hides.
        raised = scores + tl.maximum(added * LOG2_E, LEAST)
        scores = tl.where(added == NOTHING, NOTHING, raised)
    if MASKED:
        seen = tl.load(pattern + i * pattern_x + j * pattern_y) != 0
        scores = tl.where(seen, scores, NOTHING)
    return scores
