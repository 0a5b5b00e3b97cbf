"""Attention by `torch.nn.functional.scaled_dot_product_attention`, PyTorch's fused kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ...masks.rules import Causal
from .inputs import Inputs


def unsupported(inputs: Inputs) -> str | None:
    """Why SDPA cannot serve this call, or None."""
    if inputs.return_weights:
        return "SDPA does not return the weights"
    if inputs.return_lse:
        return "SDPA does not return the log-sum-exp"
    if inputs.generator is not None:
        return "SDPA draws its dropout from torch's global generator only"
    return None


def attention(inputs: Inputs) -> tuple[Float[Tensor, "batch heads n_q d_v"], None, None]:
    """softmax(Q Kᵀ · scale + bias) V over the visible keys -> output."""
    n_q, n_k = inputs.lengths
    if inputs.all_visible:
        return _sdpa(inputs), None, None
    is_causal = isinstance(inputs.mask, Causal) and inputs.bias is None and n_q == n_k
    if is_causal and inputs.scale > 0:  # its hidden scores are -inf · scale
        # SDPA's own causal mask is aligned at the top left: the same thing where n_q = n_k.
        output = _sdpa(inputs.isolated(), is_causal=True)
        if inputs.intact:
            return output, None, None
        sees_broken = inputs.per_head(inputs.broken_keys().cummax(-1).values)  # (b, h, n)
        spoiled = (sees_broken | inputs.broken_queries())[..., None]
        return output.masked_fill(spoiled, math.nan), None, None
    visible = inputs.visible()
    empty = ~visible.any(-1, keepdim=True)  # (b or 1, h or 1, n_q, 1)
    clean = inputs.isolated()
    # SDPA hides a pair by adding -inf to its score: NaN for a row that sees nothing, and where
    # leftovers in memory made the score overflow. So such rows and keys compute with 0.
    unseen = ~inputs.per_group(visible.any(-2))[..., None]  # (b or 1, groups or 1, n_k, 1)
    clean = replace(
        clean, query=clean.query.masked_fill(empty, 0), key=clean.key.masked_fill(unseen, 0)
    )
    output = _sdpa(clean, attn_mask=_sdpa_mask(inputs, visible, empty)).masked_fill(empty, 0)
    if inputs.intact:
        return output, None, None
    return output.masked_fill(inputs.spoiled(visible), math.nan), None, None


def _sdpa(inputs: Inputs, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = inputs.query, inputs.key, inputs.value
    dtype = q.dtype
    if attn_mask is not None and attn_mask.is_floating_point():
        # SDPA wants one dtype, and rounding the bias to float16 would turn -1e9 into -inf.
        dtype = attn_mask.dtype
    elif inputs.needs_grad and q.device.type == "cpu":
        # A CPU's backward pass is slower in half precision than in float32.
        dtype = torch.promote_types(dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    # A constant: where torch.compile leaves the sizes open, a comparison of them is no plain bool.
    grouped = {"enable_gqa": True} if inputs.grouped else {}
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask, inputs.dropout_p, is_causal, scale=inputs.scale, **grouped
    )
    return output.to(inputs.query.dtype)


def _sdpa_mask(
    inputs: Inputs,
    visible: Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"],
    empty: Bool[Tensor, "batch_or_1 heads_or_1 n_q 1"],
) -> Tensor:
    """What SDPA adds to the scores, or a bool mask where there is no bias."""
    if inputs.bias is None:
        return visible | empty
    return inputs.bias.masked_fill(~visible, -math.inf).masked_fill(empty, 0)
