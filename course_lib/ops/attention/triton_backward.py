"""The backward kernels of attention: scores are computed again, and nothing is added atomically.

One kernel walks, for each tile of queries, along the keys they see, and sums dQ. The other walks,
for each tile of keys, along the queries that see them, and sums dK and dV. Each sum has one owner
and one order, so that gradients repeat to the last bit.

Source: Dao 2023, "FlashAttention-2", algorithm 2. With P = exp(S - lse) and dP = dO Vᵀ the
gradient of the scores is dS = P ∘ (dP - delta), where delta = Σ_j P_j dP_j = dO · O.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..triton_runtime import on, tl, triton
from .triton_forward import bias_strides, list_strides, shapes
from .triton_settings import Launch
from .triton_tile import LOG2_E, NOTHING, find_list, load_rows, scores_of, split_head, store_rows


@triton.jit
def _query_step(
    entry, queries, d_output, lse, delta, d_queries, i0, n_q, n_k, scale,
    k_base, k_n, k_d, v_base, v_n, v_d, bias_base, bias_i, bias_j, d_bias_base, patterns,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, D_BIAS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dQ / scale."""
    j0 = tl.load(entry).to(tl.int64) * BLOCK_K
    pattern = patterns
    if MASKED:
        pattern += tl.load(entry + 1).to(tl.int64) * (BLOCK_Q * BLOCK_K)
    # The weights again, (BLOCK_Q, BLOCK_K): 2^(-inf) = 0 for who is hidden.
    keys = load_rows(k_base, j0, n_k, k_n, k_d, D_K, BLOCK_K, WIDE_K)
    scores = scores_of(
        queries, keys, scale, n_q - i0, n_k - j0, bias_base + j0 * bias_j, bias_i, bias_j,
        pattern, BLOCK_K, 1, BLOCK_Q, BLOCK_K, BIASED, MASKED,
    )  # fmt: skip
    weights = tl.exp2(scores - lse[:, None])
    # Through the product with V and the softmax.
    values = load_rows(v_base, j0, n_k, v_n, v_d, D_V, BLOCK_K, WIDE_V)
    d_weights = tl.dot(d_output, tl.trans(values), input_precision="ieee")
    d_scores = weights * (d_weights - delta[:, None])
    if MASKED or BIASED:  # 0 · inf is NaN, and what is hidden may hold anything
        d_scores = tl.where(scores == NOTHING, 0.0, d_scores)
    if D_BIAS:  # the gradient of the bias is that of the scores; each tile has one writer
        i, j = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_K)[None, :]
        there = (i < n_q - i0) & (j < n_k - j0)
        tl.store(d_bias_base + j0 + i * n_k + j, d_scores, mask=there)
    # (BLOCK_Q, BLOCK_K) x (BLOCK_K, d_k)
    return tl.dot(d_scores.to(keys.dtype), keys, d_queries, input_precision="ieee")


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "repeats", "rows"])
def backward_query_kernel(
    query, key, value, bias, lists, patterns, output, lse, d_output, d_lse, delta, d_query, d_bias,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    do_b, do_h, do_n, do_d, dq_b, dq_h, dq_n, dq_d, bias_b, bias_h, bias_i, bias_j,
    list_b, list_h, list_r, n_q, n_k, heads, repeats, rows, scale, natural_scale,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr, D_BIAS: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and delta, which the other kernel needs too."""
    # Which queries, of which head?
    program = tl.program_id(0)
    row = (rows - 1 - program % rows).to(tl.int64)
    head = program // rows
    b, h, group = split_head(head, heads, repeats)
    i0 = row * BLOCK_Q
    i = tl.arange(0, BLOCK_Q)
    entry, num_full, num_all = find_list(lists, b, h, row, list_h, list_b, list_r)

    # delta = dO · O, less the gradient that reaches the scores through the log-sum-exp.
    queries = load_rows(query + b * q_b + h * q_h, i0, n_q, q_n, q_d, D_K, BLOCK_Q, WIDE_K)
    d_out = load_rows(
        d_output + b * do_b + h * do_h, i0, n_q, do_n, do_d, D_V, BLOCK_Q, WIDE_V
    )  # fmt: skip
    out = load_rows(output + b * o_b + h * o_h, i0, n_q, o_n, o_d, D_V, BLOCK_Q, WIDE_V)
    head = head.to(tl.int64)
    at, there = head * n_q + i0 + i, i < n_q - i0
    dots = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    dots -= tl.load(d_lse + at, mask=there, other=0.0)
    tl.store(delta + at, dots, mask=there)
    # Who sees nothing, and who is beyond the end, has weights 2^(score - inf) = 0.
    base_2 = tl.load(lse + at, mask=there, other=NOTHING) * LOG2_E
    base_2 = tl.where(base_2 == NOTHING, float("inf"), base_2)

    k_base = key + b * k_b + group * k_h
    v_base = value + b * v_b + group * v_h
    bias_base = bias + b * bias_b + h * bias_h + i0 * bias_i
    d_bias_base = d_bias + (head * n_q + i0) * n_k

    # The walk: full tiles, then partial ones. Nothing is hoisted out: registers are scarce.
    d_queries = tl.zeros([BLOCK_Q, WIDE_K], tl.float32)
    for step in tl.range(0, num_full, disable_licm=True):
        d_queries = _query_step(
            entry + 2 * step, queries, d_out, base_2, dots, d_queries, i0, n_q, n_k, scale,
            k_base, k_n, k_d, v_base, v_n, v_d, bias_base, bias_i, bias_j, d_bias_base, patterns,
            D_K, D_V, WIDE_K, WIDE_V, BLOCK_Q, BLOCK_K, BIASED, D_BIAS, False,
        )  # fmt: skip
    for step in tl.range(num_full, num_all, disable_licm=True):
        d_queries = _query_step(
            entry + 2 * step, queries, d_out, base_2, dots, d_queries, i0, n_q, n_k, scale,
            k_base, k_n, k_d, v_base, v_n, v_d, bias_base, bias_i, bias_j, d_bias_base, patterns,
            D_K, D_V, WIDE_K, WIDE_V, BLOCK_Q, BLOCK_K, BIASED, D_BIAS, True,
        )  # fmt: skip
    store_rows(
        d_queries * natural_scale, d_query + b * dq_b + h * dq_h, i0, n_q, dq_n, dq_d,
        D_K, BLOCK_Q, WIDE_K,
    )  # fmt: skip


@triton.jit
def _key_step(
    entry, keys, values, d_keys, d_values, j0, n_q, n_k, scale,
    q_base, q_n, q_d, do_base, do_n, do_d, lse_base, delta_base,
    bias_base, bias_i, bias_j, patterns,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dK / scale and dV. All is transposed: keys x queries."""
    i0 = tl.load(entry).to(tl.int64) * BLOCK_Q
    pattern = patterns
    if MASKED:
        pattern += tl.load(entry + 1).to(tl.int64) * (BLOCK_Q * BLOCK_K)
    # The weights again, (BLOCK_K, BLOCK_Q).
    queries = load_rows(q_base, i0, n_q, q_n, q_d, D_K, BLOCK_Q, WIDE_K)
    i = tl.arange(0, BLOCK_Q)
    there = i < n_q - i0
    lse = tl.load(lse_base + i0 + i, mask=there, other=NOTHING) * LOG2_E
    lse = tl.where(lse == NOTHING, float("inf"), lse)
    scores = scores_of(
        keys, queries, scale, n_k - j0, n_q - i0, bias_base + i0 * bias_i, bias_j, bias_i,
        pattern, 1, BLOCK_K, BLOCK_K, BLOCK_Q, BIASED, MASKED,
    )  # fmt: skip
    weights = tl.exp2(scores - lse[None, :])
    # dV = Pᵀ dO: (BLOCK_K, BLOCK_Q) x (BLOCK_Q, d_v)
    d_out = load_rows(do_base, i0, n_q, do_n, do_d, D_V, BLOCK_Q, WIDE_V)
    d_values = tl.dot(weights.to(d_out.dtype), d_out, d_values, input_precision="ieee")
    # dK = dSᵀ Q: (BLOCK_K, BLOCK_Q) x (BLOCK_Q, d_k)
    delta = tl.load(delta_base + i0 + i, mask=there, other=0.0)
    d_weights = tl.dot(values, tl.trans(d_out), input_precision="ieee")
    d_scores = weights * (d_weights - delta[None, :])
    if MASKED or BIASED:
        d_scores = tl.where(scores == NOTHING, 0.0, d_scores)
    d_keys = tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision="ieee")
    return d_keys, d_values


@triton.jit(do_not_specialize=["n_q", "n_k", "heads", "repeats", "columns"])
def backward_key_kernel(
    query, key, value, bias, lists, patterns, lse, d_output, delta, d_key, d_value,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_h, do_n, do_d,
    dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d, bias_b, bias_h, bias_i, bias_j,
    list_b, list_h, list_r, n_q, n_k, heads, repeats, columns, scale, natural_scale,
    D_K: tl.constexpr, D_V: tl.constexpr, WIDE_K: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over the query heads that share them."""
    # Which keys, of which group?
    program = tl.program_id(0)
    column = (program % columns).to(tl.int64)
    groups = heads // repeats
    b = (program // columns // groups).to(tl.int64)
    group = (program // columns % groups).to(tl.int64)
    j0 = column * BLOCK_K
    keys = load_rows(key + b * k_b + group * k_h, j0, n_k, k_n, k_d, D_K, BLOCK_K, WIDE_K)
    values = load_rows(value + b * v_b + group * v_h, j0, n_k, v_n, v_d, D_V, BLOCK_K, WIDE_V)
    d_keys = tl.zeros([BLOCK_K, WIDE_K], tl.float32)
    d_values = tl.zeros([BLOCK_K, WIDE_V], tl.float32)

    for h in range(group * repeats, (group + 1) * repeats):
        entry, num_full, num_all = find_list(lists, b, h, column, list_h, list_b, list_r)
        q_base = query + b * q_b + h * q_h
        do_base = d_output + b * do_b + h * do_h
        lse_base, delta_base = lse + (b * heads + h) * n_q, delta + (b * heads + h) * n_q
        bias_base = bias + b * bias_b + h * bias_h + j0 * bias_j
        # The walk: full tiles, then partial ones. Nothing is hoisted out: registers are scarce.
        for step in tl.range(0, num_full, disable_licm=True):
            d_keys, d_values = _key_step(
                entry + 2 * step, keys, values, d_keys, d_values, j0, n_q, n_k, scale,
                q_base, q_n, q_d, do_base, do_n, do_d, lse_base, delta_base,
                bias_base, bias_i, bias_j, patterns,
                D_K, D_V, WIDE_K, WIDE_V, BLOCK_Q, BLOCK_K, BIASED, False,
            )  # fmt: skip
        for step in tl.range(num_full, num_all, disable_licm=True):
            d_keys, d_values = _key_step(
                entry + 2 * step, keys, values, d_keys, d_values, j0, n_q, n_k, scale,
                q_base, q_n, q_d, do_base, do_n, do_d, lse_base, delta_base,
                bias_base, bias_i, bias_j, patterns,
                D_K, D_V, WIDE_K, WIDE_V, BLOCK_Q, BLOCK_K, BIASED, True,
            )  # fmt: skip

    store_rows(
        d_keys * natural_scale, d_key + b * dk_b + group * dk_h, j0, n_k, dk_n, dk_d,
        D_K, BLOCK_K, WIDE_K,
    )  # fmt: skip
    store_rows(
        d_values, d_value + b * dv_b + group * dv_h, j0, n_k, dv_n, dv_d, D_V, BLOCK_K, WIDE_V
    )  # fmt: skip


def launch_query(
    d_output: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    bias: Tensor | None, output: Tensor, lse: Tensor, by_query: Tensor, patterns: Tensor,
    scale: float, wants_bias: bool, launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query and bias, and delta (batch, heads, n_q), which `launch_key` takes.

    That of the bias is empty unless wanted; otherwise (batch, heads, n_q, n_k) in float32, 0 where
    a tile is hidden.
    """
    (b, h, n_q, d_k), (groups, n_k, d_v) = query.shape, value.shape[1:]
    d_query, delta, d_lse = query.new_empty(query.shape), torch.empty_like(lse), d_lse.contiguous()
    d_bias = lse.new_zeros((b, h, n_q, n_k) if wants_bias else 0)
    rows = math.ceil(n_q / launch.block_q)
    if grid := rows * b * h:
        with on(query.device):
            backward_query_kernel[(grid,)](
                query, key, value, query if bias is None else bias, by_query, patterns,
                output, lse, d_output, d_lse, delta, d_query, d_bias,
                *query.stride(), *key.stride(), *value.stride(), *output.stride(),
                *d_output.stride(), *d_query.stride(), *bias_strides(bias),
                *list_strides(by_query), n_q, n_k, h, h // max(1, groups), rows,
                scale * LOG2_E.value, scale,
                **shapes(d_k, d_v), BIASED=bias is not None, D_BIAS=wants_bias,
                **launch.options(),
            )  # fmt: skip
    return d_query, d_bias, delta


def launch_key(
    d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    lse: Tensor, delta: Tensor, by_key: Tensor, patterns: Tensor, scale: float, launch: Launch,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of key and value."""
    (b, h, n_q, d_k), (groups, n_k, d_v) = query.shape, value.shape[1:]
    d_key, d_value = key.new_empty(key.shape), value.new_empty(value.shape)
    columns = math.ceil(n_k / launch.block_k)
    if grid := columns * b * groups:
        with on(query.device):
            backward_key_kernel[(grid,)](
                query, key, value, query if bias is None else bias, by_key, patterns,
                lse, d_output, delta, d_key, d_value,
                *query.stride(), *key.stride(), *value.stride(), *d_output.stride(),
                *d_key.stride(), *d_value.stride(), *bias_strides(bias),
                *list_strides(by_key), n_q, n_k, h, h // groups, columns,
                scale * LOG2_E.value, scale,
                **shapes(d_k, d_v), BIASED=bias is not None, **launch.options(),
            )  # fmt: skip
    return d_key, d_value
