"""Attention by FlexAttention: the mask and the bias become functions inside one fused kernel."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .inputs import Inputs


def unsupported(inputs: Inputs) -> str | None:
    """Why FlexAttention cannot serve this call, or None."""
    if inputs.return_weights:
        return "FlexAttention does not return the weights"
    if inputs.dropout_p > 0:
        return "FlexAttention has no dropout"
    if 0 in inputs.query.shape or 0 in inputs.key.shape or 0 in inputs.value.shape:
        return "FlexAttention needs at least one query, one key and one value entry"
    if inputs.query.device.type == "meta":
        return "FlexAttention does not run on the meta device"
    if any(map(torch._C._functorch.is_batchedtensor, (inputs.query, inputs.key, inputs.value))):
        return "FlexAttention does not run under torch.func.vmap"
    if inputs.query.device.type == "cpu" and inputs.needs_grad:
        return "FlexAttention has no backward pass on a CPU"
    if inputs.query.device.type != "cpu" and inputs.query.dtype == torch.float64:
        return "FlexAttention has no float64 kernel"
    return None


def attention(
    inputs: Inputs,
) -> tuple[Float[Tensor, "batch heads n_q d_v"], None, Float[Tensor, "batch heads n_q"] | None]:
    """softmax(Q Kᵀ · scale + bias) V over the visible keys -> output, log-sum-exp if wanted."""
    from torch.nn.attention.flex_attention import AuxRequest

    device, clean = inputs.query.device, inputs.isolated()
    call = functools.partial(
        _flex_attention(device.type),
        block_mask=inputs.mask and inputs.mask.block_mask(*inputs.lengths, device),
        scale=inputs.scale,
        enable_gqa=inputs.grouped,
    )
    # Asked for only where wanted: compiled for a CPU it cannot be had.
    extras = {"return_aux": AuxRequest(lse=True)} if inputs.return_lse else {}
    qkv = clean.query, clean.key, clean.value
    got = call(*qkv, score_mod=_score_mod(inputs, inputs.bias), **extras)
    output, lse = (got[0], got[1].lse) if inputs.return_lse else (got, None)
    if not inputs.all_visible and not inputs.intact:
        spoiled = inputs.spoiled_by(
            lambda i: call(i.query, i.key, i.value, score_mod=_score_mod(i, i.bias))
        )
        output = output.masked_fill(spoiled[..., None], math.nan)
        lse = None if lse is None else lse.masked_fill(spoiled, math.nan)
    return output, None, lse


def _score_mod(inputs: Inputs, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """score -> score + bias, looked up at (batch, head, query, key)."""
    if bias is None:
        return None
    bias = bias.expand(*inputs.query.shape[:3], inputs.key.shape[2])
    return lambda score, b, h, i, j: score + bias[b, h, i, j]


def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU; on a CPU as it is, since compiling needs a C++ compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    return _eager if device_type == "cpu" else _compiled()


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _eager(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    with warnings.catch_warnings():  # "called without torch.compile": we know
        warnings.simplefilter("ignore")
        # Detached, since on a CPU it refuses requires_grad even where no gradient is wanted.
        return flex_attention(query.detach(), key.detach(), value.detach(), **options)
