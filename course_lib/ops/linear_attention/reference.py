"""Linear attention by its formula, with all n x n weights: what the other backends must equal."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def unsupported(causal: bool) -> str | None:
    """Why the reference cannot serve this call: it always can."""
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
    weights = query @ key[:, :, None].mT  # (b, g, r, n_q, f) x (b, g, 1, f, n_k)
    if causal:
        weights = weights.tril(n_k - n_q)  # j <= i + n_k - n_q
    new = weights @ value[:, :, None]  # (b, g, r, n_q, n_k) x (b, g, 1, n_k, columns)
    before = query @ state[:, :, None]  # (b, g, r, n_q, f) x (b, g, 1, f, columns)
    return before + new, state + key.mT @ value  # (b, g, f, n_k) x (b, g, n_k, columns)
