"""Attention by our own GPU kernels, written in Triton: linear memory, any mask, every gradient.

This module prepares a call and imports the kernels at its first use. `triton_plan` lists the tiles
that a mask shows, `triton_tile`, `triton_forward` and `triton_backward` hold the kernels,
`triton_settings` their tile sizes, and `triton_op` makes operators of them. On a CPU they run in
Triton's interpreter, to be read, stepped through and tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import triton_runtime
from .inputs import Inputs
from .triton_plan import Plan, make_plan
from .triton_settings import Launch, forward_launch, key_launch, query_launch

WIDEST = 256


def unsupported(inputs: Inputs) -> str | None:
    """Why the Triton kernels cannot serve this call, or None."""
    if inputs.return_weights:
        return "the Triton kernels never hold all weights"
    if inputs.dropout_p:
        return "the Triton kernels have no dropout"
    if inputs.query.dtype == torch.float64:
        return "the Triton kernels have no float64: GPUs multiply in float32 and below"
    if max(inputs.query.shape[-1], inputs.value.shape[-1]) > WIDEST:
        return f"the Triton kernels take heads of up to {WIDEST} numbers"
    if reason := triton_runtime.why_not(inputs.query.device):
        return reason
    if inputs.query.device.type == "cpu" and inputs.query.dtype == torch.bfloat16:
        return "Triton's interpreter computes wrong products in bfloat16"
    return inputs.tiles_out_of_sight("the Triton kernels")


def attention(inputs: Inputs) -> tuple[Tensor, None, Tensor]:
    """softmax(Q Kᵀ · scale + bias) V over the visible keys -> output, log-sum-exp."""
    from .triton_op import attention_forward

    clean = inputs.isolated()
    checked = not (inputs.all_visible or inputs.intact)
    broken = inputs.broken_keys().to(torch.uint8) if checked else None  # (batch, groups, n_k)
    plan, backward = _plan(inputs, forward_launch), []
    if inputs.needs_grad:
        for_query, for_key = _plan(inputs, query_launch), _plan(inputs, key_launch)
        backward = [for_query.by_query, for_query.patterns, for_key.by_key, for_key.patterns]
    output, lse, spoiled = attention_forward(
        clean.query, clean.key, clean.value, _expanded(inputs), broken,
        plan.by_query, plan.patterns, backward, inputs.scale,
    )  # fmt: skip
    if checked:
        shows = spoiled.bool() | (inputs.broken_queries() & (lse > -math.inf))
        output = output.masked_fill(shows[..., None], math.nan)
        lse = lse.masked_fill(shows, math.nan)
    return output, None, lse


def _plan(inputs: Inputs, settings: Callable[[Tensor, Tensor], Launch]) -> Plan:
    launch = settings(inputs.query, inputs.value)
    block = launch.block_q, launch.block_k
    return make_plan(inputs.mask, *inputs.lengths, block, inputs.query.device)


def _expanded(inputs: Inputs) -> Tensor | None:
    """The bias as (batch, heads, n_q, n_k): strides of 0, and a gradient that is summed."""
    if inputs.bias is None:
        return None
    return inputs.bias.expand(*inputs.query.shape[:3], inputs.key.shape[2])
