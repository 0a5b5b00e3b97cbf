"""`linear_attention`: check the arguments, choose a backend, call it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Literal, overload

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ..attention import BackendUnsupportedError
from ..attention.inputs import FLOATS, autocast, broken_rows, known_intact, no_autocast
from . import recurrent, reference, tiled

BACKENDS: dict[str, ModuleType] = {
    "tiled": tiled, "reference": reference, "recurrent": recurrent,
}  # fmt: skip
"""Each has `unsupported(causal)` and `attend(query, key, value, state, causal, chunk)`."""

State = tuple[Tensor, Tensor]


# fmt: off
@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, normalize: bool = True,
    state: State | None = None, return_state: Literal[False] = False, eps: float = 0.0,
    chunk: int = 64, backend: str = "auto",
) -> Tensor: ...
@overload
def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, normalize: bool = True,
    state: State | None = None, return_state: Literal[True], eps: float = 0.0,
    chunk: int = 64, backend: str = "auto",
) -> tuple[Tensor, State]: ...
# fmt: on


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    normalize: bool = True,
    state: State | None = None,
    return_state: bool = False,
    eps: float = 0.0,
    chunk: int = 64,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, State]:
    r"""Attention whose weights are products of features: Σ_j (q_i·k_j) v_j / Σ_j (q_i·k_j).

    The sums run over the keys that query i sees. Because the weights are plain products, keys and
    values can be added up before any query asks: S = Σ_j k_j v_jᵀ and z = Σ_j k_j give the output
    as q_iᵀS / q_i·z. Costs n · features · d_v, not n².

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", §3.2 to §3.4.

    Args:
        query: (batch, heads, n_q, features), mapped already, φ(q); not negative if normalised.
        key: (batch, kv_heads, n_k, features), φ(k). Fewer key/value heads than query heads are
            grouped queries, as in `course_lib.attention`.
        value: (batch, kv_heads, n_k, d_v).
        causal: query i sees keys up to i + n_k - n_q, as in `masks.causal`; otherwise all.
        normalize: divide by the sum of the weights.
        state: (S, z) of keys that stand before these and are seen by every query, shapes
            (batch, kv_heads, features, d_v) and (batch, kv_heads, features).
        return_state: also return (S, z) after the last key. Handed on, it continues the sequence:
            in pieces the result is the same as at once.
        eps: added to the sum of the weights.
        chunk: tokens that "tiled" compares with one another directly.
        backend: "auto" ("tiled"), "tiled", "reference" (n x n weights) or "recurrent" (an RNN).

    Returns:
        output (batch, heads, n_q, d_v) in the query's dtype (under torch.autocast in autocast's);
        then, if asked for, (S, z) in float32 or better, in which all sums run.

        A query that sees nothing, or whose weights add up to 0, gets output 0 and gradient 0. NaN
        or inf in a key or value reaches the outputs of those that see it, and no others.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, rank, shape or device.
        BackendUnsupportedError: the backend asked for cannot serve this call.
    """
    query, key, value = autocast(query, key, value)
    _check(query, key, value, state, causal, eps, chunk)
    attend, asked = _choose(backend, causal).attend, query.dtype
    dtype = torch.promote_types(asked, torch.float32)  # float16 would lose digits
    query, key, value = (x.to(dtype) for x in (query, key, value))
    spoiled = None
    if causal and not known_intact(query, key, value):  # else all see what is broken, if any is
        query, key, value, *spoiled = _isolate(query, key, value)
    with no_autocast(query.device):
        # (batch, heads, n_q, f) -> (batch, groups, heads / groups, n_q, f)
        grouped = query.unflatten(1, (key.shape[1], -1))
        # The sum of the weights is what a value of 1 gives: it rides along as one more column.
        before, value = _join(state, key, value), F.pad(value, (0, 1), value=1.0)
        sums, after = attend(grouped, key, value, before, causal, chunk)
        output = _divide(sums.flatten(1, 2), eps) if normalize else sums.flatten(1, 2)[..., :-1]
    if spoiled is not None:
        output = output.masked_fill(spoiled[0][..., None], math.nan)
        after = after.masked_fill(spoiled[1][..., None, None], math.nan)
    output = output.to(asked)
    return (output, (after[..., :-1], after[..., -1])) if return_state else output


def _divide(
    sums: Float[Tensor, "batch heads n_q columns"], eps: float
) -> Float[Tensor, "batch heads n_q d_v"]:
    """All columns but the last, divided by the last; 0 where that is 0."""
    total = sums[..., -1:]
    # x / inf is 0 and has gradient 0
    return sums[..., :-1] / (total + eps).masked_fill(total == 0, math.inf)


def _join(
    state: State | None,
    key: Float[Tensor, "batch groups n_k features"],
    value: Float[Tensor, "batch groups n_k d_v"],
) -> Float[Tensor, "batch groups features columns"]:
    """S and z side by side, z as the last column; zeros where there is no state."""
    if state is None:
        return key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3] + 1)
    # (b, g, f, d_v) and (b, g, f, 1)
    return torch.cat([state[0], state[1][..., None]], dim=-1).to(key.dtype)


def _isolate(
    query: Float[Tensor, "batch heads n_q features"],
    key: Float[Tensor, "batch groups n_k features"],
    value: Float[Tensor, "batch groups n_k d_v"],
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, "batch heads n_q"], Bool[Tensor, "batch groups"]]:
    """0 in place of vectors that hold a NaN or inf; which outputs and which states must show it.

    0 · NaN is NaN: left in, it would reach the queries of its chunk that may not see it.
    """
    broken_query, broken = broken_rows(query), broken_rows(key) | broken_rows(value)
    n_q, n_k = query.shape[2], key.shape[2]
    seen = broken.int().cumsum(-1) > 0  # (b, g, n_k): up to this key there is one
    # Query i stands at key i + n_k - n_q; a negative pad cuts off.
    at_query = F.pad(seen, (n_q - n_k, 0)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    sees = torch.arange(n_q, device=query.device) >= n_q - n_k
    query = query.masked_fill(broken_query[..., None], 0)
    key, value = (x.masked_fill(broken[..., None], 0) for x in (key, value))
    return query, key, value, at_query | (broken_query & sees), broken.any(-1)


def _choose(backend: str, causal: bool) -> ModuleType:
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}; got {backend!r}")
    module = BACKENDS["tiled" if backend == "auto" else backend]
    reason = module.unsupported(causal)
    if reason is not None:
        raise BackendUnsupportedError(f'backend "{backend}" cannot serve this call: {reason}')
    return module


# --- checks of arguments --------------------------------------------------------------------------


def _check(
    query: Tensor, key: Tensor, value: Tensor, state: State | None, causal: bool, eps: float,
    chunk: int,
) -> None:  # fmt: skip
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query)
    _check_shapes(query, key, value)
    if state is not None:
        _check_state(state, query, key, value)
        if causal and query.shape[2] > key.shape[2]:
            raise ValueError(
                "state needs every query to stand at a key, but with causal=True and more queries "
                f"than keys the first ones stand before: query {tuple(query.shape)}, key "
                f"{tuple(key.shape)}"
            )
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"chunk must be an int, got {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def _check_tensor(name: str, tensor: Tensor, query: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if tensor.ndim != 4:
        raise ValueError(
            f"{name} must have shape (batch, heads, length, features or d_v), got "
            f"{tuple(tensor.shape)}"
        )
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} is {tensor.dtype} but query is {query.dtype}: they must agree")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}")


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in (batch, heads, length): {shapes}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have the same batch size: {shapes}")
    if query.shape[3] != key.shape[3] or query.shape[3] == 0:
        raise ValueError(
            f"query and key must have the same number of features, at least 1: {shapes}"
        )
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "the number of query heads must be a multiple of the number of key/value heads: "
            f"{shapes}"
        )


def _check_state(state: State, query: Tensor, key: Tensor, value: Tensor) -> None:
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"state must be a pair (S, z), got {type(state).__name__}")
    wanted = (*key.shape[:2], key.shape[3], value.shape[3]), (*key.shape[:2], key.shape[3])
    for name, tensor, shape in zip("Sz", state, wanted, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"state must be a pair of floating-point tensors, but {name} is {kind}")
        if tensor.shape != shape:
            raise ValueError(
                f"state has {name} of shape {tuple(tensor.shape)}, but key {tuple(key.shape)} and "
                f"value {tuple(value.shape)} need {shape}"
            )
        if tensor.device != query.device:
            raise ValueError(f"state is on {tensor.device} but query is on {query.device}")
