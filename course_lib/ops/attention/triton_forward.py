"""The forward kernel of attention: one program computes BLOCK_Q queries of one head.

It walks along the list of key tiles that its queries may see: first those that all of them see
whole, then those with a pattern. The softmax is online: largest score so far, sum, and weighted
values, scaled down whenever a larger score comes.

Source: Dao 2023, "FlashAttention-2", algorithm 1; the walk over lists of tiles as in Dong et al.
2024, "Flex Attention", §4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..triton_runtime import on, tl, triton
from .triton_settings import Launch
from .triton_tile import (
    LN_2,
    LOG2_E,
    NOTHING,
    find_list,
    load_rows,
    scores_of,
    split_head,
    store_rows,
)


@triton.jit
def _step(
    entry, queries, so_far, sums, most, shown, i0, n_q, n_k, scale,
    k_base, k_n, k_d, v_base, v_n, v_d, bias_base, bias_i, bias_j, broken_base, patterns,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, CHECKED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys: what has been summed so far, brought up to date."""
    j0 = tl.load(entry).to(tl.int64) * BLOCK_K
    pattern = patterns
    if MASKED:
        pattern += tl.load(entry + 1).to(tl.int64) * (BLOCK_Q * BLOCK_K)
    # Scores, (BLOCK_Q, BLOCK_K).
    keys = load_rows(k_base, j0, n_k, k_n, k_d, D_K, BLOCK_K, WIDE_K)
    scores = scores_of(
        queries, keys, scale, n_q - i0, n_k - j0, bias_base + j0 * bias_j, bias_i, bias_j,
        pattern, BLOCK_K, 1, BLOCK_Q, BLOCK_K, BIASED, MASKED,
    )  # fmt: skip
    if CHECKED:  # which queries see a key that holds NaN or inf?
        j = tl.arange(0, BLOCK_K)
        broken = tl.load(broken_base + j0 + j, mask=j < n_k - j0, other=0).to(tl.int32)
        shown = tl.maximum(shown, tl.max(tl.where(scores > NOTHING, broken[None, :], 0), 1))
    # Where nothing is visible yet the largest is -inf, and -inf - -inf would be NaN.
    larger = tl.maximum(most, tl.max(scores, 1))
    safe = tl.where(larger == NOTHING, 0.0, larger)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(most - safe)
    sums = sums * shrink + tl.sum(weights, 1)
    values = load_rows(v_base, j0, n_k, v_n, v_d, D_V, BLOCK_K, WIDE_V)
    # (BLOCK_Q, BLOCK_K) x (BLOCK_K, d_v)
    so_far = tl.dot(
        weights.to(values.dtype), values, so_far * shrink[:, None], input_precision="ieee"
    )
    return so_far, sums, larger, shown


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "repeats", "rows"])
def forward_kernel(
    query, key, value, bias, broken, lists, patterns, output, lse, spoiled,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    bias_b, bias_h, bias_i, bias_j, list_b, list_h, list_r,
    n_q, n_k, heads, repeats, rows, scale,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """softmax(Q Kᵀ · scale + bias) V for one tile of queries, and its log-sum-exp."""
    # Which queries, of which head? Under a causal mask the last rows take longest: they go first.
    program = tl.program_id(0)
    row = (rows - 1 - program % rows).to(tl.int64)
    head = program // rows
    b, h, group = split_head(head, heads, repeats)
    i0 = row * BLOCK_Q
    i = tl.arange(0, BLOCK_Q)
    entry, num_full, num_all = find_list(lists, b, h, row, list_h, list_b, list_r)

    queries = load_rows(
        query + b * q_b + h * q_h, i0, n_q, q_n, q_d, D_K, BLOCK_Q, WIDE_K
    )  # fmt: skip
    k_base = key + b * k_b + group * k_h
    v_base = value + b * v_b + group * v_h
    bias_base = bias + b * bias_b + h * bias_h + i0 * bias_i
    broken_base = broken + (b * (heads // repeats) + group) * n_k

    # The walk: full tiles, then partial ones. Nothing is hoisted out: registers are scarce.
    so_far = tl.zeros([BLOCK_Q, WIDE_V], tl.float32)
    sums = tl.zeros([BLOCK_Q], tl.float32)
    most = tl.full([BLOCK_Q], NOTHING, tl.float32)
    shown = tl.zeros([BLOCK_Q], tl.int32)
    for at in tl.range(0, num_full, disable_licm=True):
        so_far, sums, most, shown = _step(
            entry + 2 * at, queries, so_far, sums, most, shown, i0, n_q, n_k, scale,
            k_base, k_n, k_d, v_base, v_n, v_d, bias_base, bias_i, bias_j, broken_base, patterns,
            D_K, D_V, WIDE_K, WIDE_V, BLOCK_Q, BLOCK_K, BIASED, CHECKED, False,
        )  # fmt: skip
    for at in tl.range(num_full, num_all, disable_licm=True):
        so_far, sums, most, shown = _step(
            entry + 2 * at, queries, so_far, sums, most, shown, i0, n_q, n_k, scale,
            k_base, k_n, k_d, v_base, v_n, v_d, bias_base, bias_i, bias_j, broken_base, patterns,
            D_K, D_V, WIDE_K, WIDE_V, BLOCK_Q, BLOCK_K, BIASED, CHECKED, True,
        )  # fmt: skip

    # Who saw nothing gets output 0 and log-sum-exp -inf: there `most` is -inf.
    sums = tl.where(sums == 0, 1.0, sums)
    so_far = so_far / sums[:, None]
    store_rows(
        so_far, output + b * o_b + h * o_h, i0, n_q, o_n, o_d, D_V, BLOCK_Q, WIDE_V
    )  # fmt: skip
    at = head.to(tl.int64) * n_q + i0 + i
    tl.store(lse + at, (most + tl.log2(sums)) * LN_2, mask=i < n_q - i0)
    if CHECKED:
        tl.store(spoiled + at, shown.to(tl.uint8), mask=i < n_q - i0)


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, broken: Tensor | None,
    lists: Tensor, patterns: Tensor, scale: float, launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Query (b, h, n_q, d_k) … -> output (b, h, n_q, d_v), lse and spoiled (b, h, n_q)."""
    (b, h, n_q, d_k), (n_k, d_v) = query.shape, value.shape[2:]
    output = query.new_empty(b, h, n_q, d_v)
    lse = query.new_empty(b, h, n_q, dtype=torch.float32)
    spoiled = lse.new_empty(lse.shape if broken is not None else 0, dtype=torch.uint8)
    rows = math.ceil(n_q / launch.block_q)
    grid = (rows * b * h,)
    if grid[0]:
        with on(query.device):
            forward_kernel[grid](
                query, key, value, query if bias is None else bias,
                query if broken is None else broken, lists, patterns, output, lse, spoiled,
                *query.stride(), *key.stride(), *value.stride(), *output.stride(),
                *bias_strides(bias), *list_strides(lists),
                n_q, n_k, h, h // max(1, key.shape[1]), rows, scale * LOG2_E.value,
                **shapes(d_k, d_v), BIASED=bias is not None, CHECKED=broken is not None,
                **launch.options(),
            )  # fmt: skip
    return output, lse, spoiled


def shapes(d_k: int, d_v: int) -> dict[str, int]:
    """Head sizes, and the powers of 2 (16 at least) that hold them."""
    wide_k, wide_v = (max(16, triton.next_power_of_2(d)) for d in (d_k, d_v))
    return {"D_K": d_k, "D_V": d_v, "WIDE_K": wide_k, "WIDE_V": wide_v}


def bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    """The strides of a bias, or four that are never used."""
    return (0,) * 4 if bias is None else bias.stride()


def list_strides(lists: Tensor) -> tuple[int, ...]:
    """Strides of batch, heads and rows; 0 where one list serves all."""
    return tuple(
        0 if size == 1 else stride
        for size, stride in zip(lists.shape[:3], lists.stride(), strict=False)
    )
