"""Attention by `torch.nn.functional.scaled_dot_product_attention`, PyTorch's fused kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ... import masks
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
    if inputs.mask is None and inputs.bias is None:
        return _sdpa(inputs), None, None
    if isinstance(inputs.mask, masks.Causal) and inputs.bias is None and n_q == n_k:
        # SDPA's own causal mask is aligned at the top left: the same thing where n_q = n_k.
        output = _sdpa(inputs, is_causal=True)
        sees_broken = inputs.per_head(inputs.broken_keys().cummax(-1).values)
        return output.masked_fill(sees_broken[..., None], math.nan), None, None
    visible = inputs.visible()
    mask, empty = _sdpa_mask(inputs, visible)
    output = _sdpa(inputs, empty, attn_mask=mask).masked_fill(empty, 0)
    if inputs.mask is not None:
        output = output.masked_fill(_sees_broken(inputs, visible)[..., None], math.nan)
    return output, None, None


def _sdpa(inputs: Inputs, empty: Tensor | None = None, **options: Tensor | bool) -> Tensor:
    q, k, v, _ = inputs.isolated()
    if empty is not None:  # whatever an unseeing query holds must not reach the keys' gradient
        q = q.masked_fill(empty, 0)
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=inputs.dropout_p, scale=inputs.scale, enable_gqa=inputs.grouped, **options
    )  # fmt: skip


def _sdpa_mask(
    inputs: Inputs, visible: Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]
) -> tuple[Tensor, Bool[Tensor, "b h n_q 1"]]:
    """SDPA's attn_mask, and which rows see nothing (those compute something harmless)."""
    if inputs.bias is None:
        empty = ~visible.any(-1, keepdim=True)
        return visible | empty, empty
    bias = inputs.bias[(None,) * (4 - inputs.bias.ndim)].to(inputs.query.dtype)
    bias = bias.masked_fill(~visible, -math.inf)  # broadcasts to (b or 1, h or 1, n_q, n_k)
    empty = (bias == -math.inf).all(-1, keepdim=True)
    return bias.masked_fill(empty, 0), empty


def _sees_broken(
    inputs: Inputs, visible: Bool[Tensor, "batch_or_1 heads_or_1 n_q n_k"]
) -> Bool[Tensor, "batch heads n_q"]:
    """Queries that may see a key that holds NaN or inf: their output is NaN, as it would be."""
    dtype = torch.float32
    broken = inputs.per_head(inputs.broken_keys()).to(dtype)
    return torch.einsum("bhij,bhj->bhi", visible.to(dtype), broken) > 0
