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
    if inputs.query.device.type == "cpu" and inputs.needs_grad:
        return "FlexAttention has no backward pass on a CPU"
    if inputs.query.device.type != "cpu" and inputs.query.dtype == torch.float64:
        return "FlexAttention has no float64 kernel"
    return None


def attention(
    inputs: Inputs,
) -> tuple[Float[Tensor, "batch heads n_q d_v"], None, Float[Tensor, "batch heads n_q"]]:
    """softmax(Q Kᵀ · scale + bias) V over the visible keys -> output, log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v, poison = inputs.isolated()
    n_q, n_k = inputs.lengths
    block_mask = None
    if inputs.mask is not None:
        block_mask = inputs.mask.block_mask(n_q, n_k, q.device)
    output, aux = _flex_attention(q.device.type)(
        q, k, v, score_mod=_score_mod(inputs, poison), block_mask=block_mask,
        scale=inputs.scale, enable_gqa=inputs.grouped, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return output, None, aux.lse


def _score_mod(inputs: Inputs, poison: Tensor) -> Callable[..., Tensor] | None:
    """score -> score + bias + poison, looked up at (batch, head, query, key)."""
    target = (*inputs.query.shape[:3], inputs.key.shape[2])
    added = [t.expand(target) for t in (inputs.bias,) if t is not None]
    if inputs.mask is not None:
        added.append(poison.expand(target))
    if not added:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for term in added:
            score = score + term[b, h, i, j]
        return score

    return score_mod


@functools.cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU; on a CPU as it is, since compiling needs a C++ compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cpu":
        return torch.compile(flex_attention)

    def eager(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():  # "called without torch.compile": we know
            warnings.simplefilter("ignore")
            return flex_attention(*args, **kwargs)

    return eager
