"""Attention as the paper writes it: the definition that every other backend is tested against."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .inputs import Inputs


def unsupported(inputs: Inputs) -> str | None:
    """Why the reference cannot serve this call: it always can."""
    return None


def attention(
    inputs: Inputs,
) -> tuple[
    Float[Tensor, "batch heads n_q d_v"],
    Float[Tensor, "batch heads n_q n_k"],
    Float[Tensor, "batch heads n_q"],
]:
    """softmax(Q Kᵀ · scale + bias) V over the visible keys -> output, weights, log-sum-exp."""
    clean = inputs.isolated()
    dtype = torch.promote_types(clean.query.dtype, torch.float32)  # float16 would lose digits
    q, k, v = clean.query.to(dtype), clean.key.to(dtype), clean.value.to(dtype)

    scores = _by_group(q, k.mT) * inputs.scale  # (b, h, n_q, d_k) x (b, h, d_k, n_k)
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(dtype)
    visible = inputs.visible()
    weights, lse = masked_softmax(scores, visible)
    output = _by_group(inputs.dropout(weights), v)  # (b, h, n_q, n_k) x (b, h, n_k, d_v)
    if not inputs.all_visible:
        spoiled = inputs.spoiled(visible)  # (b, h, n_q, 1)
        output = output.masked_fill(spoiled, math.nan)
        weights = weights.masked_fill(spoiled, math.nan)
        lse = lse.masked_fill(spoiled.squeeze(-1), math.nan)
    return output.to(inputs.query.dtype), weights.to(inputs.query.dtype), lse


def masked_softmax(
    scores: Float[Tensor, "batch heads n_q n_k"],
    visible: Bool[Tensor, "#batch #heads n_q n_k"],
) -> tuple[Float[Tensor, "batch heads n_q n_k"], Float[Tensor, "batch heads n_q"]]:
    """softmax over the visible keys and its log-sum-exp; a row that sees nothing: 0 and -inf."""
    # -inf, not a large number: exp(-inf) is exactly 0.
    scores = scores.masked_fill(~visible, -math.inf)
    # An empty row would be 0 / 0: it computes something harmless, and is overwritten.
    empty = ~visible.any(-1, keepdim=True)  # (b or 1, h or 1, n_q, 1)
    scores = scores.masked_fill(empty, 0)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), -math.inf)
    return weights, lse


def _by_group(
    per_head: Float[Tensor, "batch heads n_q inner"],
    per_group: Float[Tensor, "batch groups inner last"],
) -> Float[Tensor, "batch heads n_q last"]:
    """Matrix product in which heads / groups neighbouring query heads share one key/value head."""
    heads, groups = per_head.shape[1], per_group.shape[1]
    split = per_head.unflatten(1, (groups, heads // groups))  # (b, h, n, i) -> (b, g, r, n, i)
    product = torch.einsum("bgrni,bgio->bgrno", split, per_group)
    return product.flatten(1, 2)  # (b, g, r, n, o) -> (b, h, n, o)
