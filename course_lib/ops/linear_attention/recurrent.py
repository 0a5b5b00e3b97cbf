"""Causal linear attention as a recurrent network: one token at a time, and a state of fixed size.

Source: Katharopoulos et al. 2020, "Transformers are RNNs", §3.4, equations 16 to 20.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def unsupported(causal: bool) -> str | None:
    """Why a recurrent network cannot serve this call, or None."""
    return None if causal else "a recurrent network has read the past only: it needs causal=True"


def attend(
    query: Float[Tensor, "batch groups repeat n_q features"],
    key: Float[Tensor, "batch groups n_k features"],
    value: Float[Tensor, "batch groups n_k columns"],
    state: Float[Tensor, "batch groups features columns"],
    causal: bool,
    chunk: int,
) -> tuple[
    Float[Tensor, "batch groups repeat n_q columns"],
    Float[Tensor, "batch groups features columns"],
]:
    """S_j = S_{j-1} + k_j v_jᵀ; the query that stands at key j reads q S_j."""
    n_q, n_k = query.shape[3], key.shape[2]
    first = n_k - n_q  # the key at which query 0 stands; below 0, some stand before all keys
    outputs = [query.new_zeros(*query.shape[:3], max(0, -first), value.shape[-1])]
    queries = query.unbind(3)
    for j, (k, v) in enumerate(zip(key.unbind(2), value.unbind(2), strict=True)):
        state = state + k[..., None] * v[:, :, None]  # (b, g, f, 1) x (b, g, 1, columns)
        if j >= first:
            read = queries[j - first] @ state  # (b, g, r, f) x (b, g, f, columns)
            outputs.append(read[:, :, :, None])
    return torch.cat(outputs, dim=3), state
