"""Linear attention in chunks: within a chunk each with each, between chunks by the state.

All chunks of a piece are computed at once, as matrix products. A piece is a few chunks, so that
what it needs stays in a processor's cache; the state goes on from piece to piece. Memory is linear
in the length, for training too.

Sources: Hua et al. 2022, "Transformer Quality in Linear Time" (causal sums over chunks, not
tokens); Yang et al. 2023, "Gated Linear Attention", §2.2 (chunkwise parallel form).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PIECE = 8
"""Chunks computed at once."""


def unsupported(causal: bool) -> str | None:
    """Why the chunked backend cannot serve this call: it always can."""
    return None


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
    """Σ_j (q_i·k_j) v_j over the keys that query i sees, and the state after the last key."""
    n_q, n_k = query.shape[3], key.shape[2]
    common = max(0, n_k - n_q) if causal else n_k  # the first keys, seen by every query
    # (b, g, f, common) x (b, g, common, columns)
    state = state + key[:, :, :common].mT @ value[:, :, :common]
    if not causal:
        return query @ state[:, :, None], state  # (b, g, r, n_q, f) x (b, g, 1, f, columns)
    blind = max(0, n_q - n_k)  # the first queries, which see nothing
    outputs = [query.new_zeros(*query.shape[:3], blind, value.shape[-1])]
    query, key, value = query[:, :, :, blind:], key[:, :, common:], value[:, :, common:]
    sizes = _sizes(n_k - common, chunk)
    # Split, not sliced one by one: the gradient of a slice is as long as the whole sequence.
    parts = zip(query.split(sizes, 3), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    for (q, k, v), size in zip(parts, sizes, strict=True):
        output, state = _piece(q, k, v, state, min(chunk, size))
        outputs.append(output)
    return torch.cat(outputs, dim=3), state


def _sizes(n: int, chunk: int) -> list[int]:
    """Lengths of the pieces: whole chunks, PIECE of them or fewer; a shorter chunk at the end."""
    piece, tail = PIECE * chunk, n % chunk
    return [piece] * (n // piece) + [size for size in (n % piece - tail, tail) if size]


def _piece(
    query: Float[Tensor, "batch groups repeat n features"],
    key: Float[Tensor, "batch groups n features"],
    value: Float[Tensor, "batch groups n columns"],
    state: Float[Tensor, "batch groups features columns"],
    size: int,
) -> tuple[
    Float[Tensor, "batch groups repeat n columns"], Float[Tensor, "batch groups features columns"]
]:
    """Whole chunks of `size` tokens, and the state after them."""
    # (b, g, r, n, f) -> (b, g, chunks, r, size, f) -> (b, g, chunks, r · size, f)
    query = query.unflatten(3, (-1, size)).transpose(2, 3).flatten(3, 4)
    # (b, g, n, …) -> (b, g, chunks, size, …)
    key, value = key.unflatten(2, (-1, size)), value.unflatten(2, (-1, size))
    weights = query @ key.mT  # (…, r · size, f) x (…, f, size)
    weights = weights.unflatten(3, (-1, size)).tril().flatten(3, 4)
    added = key.mT @ value  # (…, f, size) x (…, size, columns)
    # (b, g, 1 + chunks, f, columns): before each chunk, and after the last
    states = torch.cat([state[:, :, None], added], dim=2).cumsum(2)
    # (…, r · size, size) x (…, size, columns) and (…, r · size, f) x (…, f, columns)
    output = weights @ value + query @ states[:, :, :-1]
    # (b, g, chunks, r · size, columns) -> (b, g, r, chunks, size, columns) -> (b, g, r, n, columns)
    output = output.unflatten(3, (-1, size)).transpose(2, 3).flatten(3, 4)
    return output, states[:, :, -1]
