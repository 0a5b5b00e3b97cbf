"""`attention`: check the arguments, choose a backend, call it."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, overload

import torch
from torch import Tensor

from ...masks import Mask
from . import flex, reference, sdpa, tiled, triton_backend
from .inputs import Inputs, check, no_autocast

BACKENDS: dict[str, ModuleType] = {
    "sdpa": sdpa, "reference": reference, "tiled": tiled, "flex": flex, "triton": triton_backend,
}  # fmt: skip
"""By preference of "auto" on a CPU; each module has `unsupported(inputs)`, `attention(inputs)`."""


class BackendUnsupportedError(RuntimeError):
    """The backend asked for by name cannot serve this call; the message says why."""


AnyMask = Mask | Tensor | None
AnyBias = Tensor | None


# What comes back depends on what is asked for, and type checkers are told so.
# fmt: off
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AnyMask = None, bias: AnyBias = None, *,
    scale: float | None = None, dropout_p: float = 0.0,
    return_weights: Literal[False] = False, return_lse: Literal[False] = False,
    backend: str = "auto", generator: torch.Generator | None = None,
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AnyMask = None, bias: AnyBias = None, *,
    scale: float | None = None, dropout_p: float = 0.0,
    return_weights: Literal[True], return_lse: Literal[False] = False,
    backend: str = "auto", generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AnyMask = None, bias: AnyBias = None, *,
    scale: float | None = None, dropout_p: float = 0.0,
    return_weights: Literal[False] = False, return_lse: Literal[True],
    backend: str = "auto", generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AnyMask = None, bias: AnyBias = None, *,
    scale: float | None = None, dropout_p: float = 0.0,
    return_weights: Literal[True], return_lse: Literal[True],
    backend: str = "auto", generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: AnyMask = None, bias: AnyBias = None, *,
    scale: float | None = None, dropout_p: float = 0.0,
    return_weights: bool = False, return_lse: bool = False,
    backend: str = "auto", generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, ...]: ...
# fmt: on


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    generator: torch.Generator | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Scaled dot-product attention: softmax(Q Kᵀ · scale + bias) V over the keys the mask shows.

    Source: "Attention Is All You Need", Vaswani et al. 2017, section 3.2.1, equation 1.

    Args:
        query: (batch, heads, n_q, d_k).
        key: (batch, kv_heads, n_k, d_k). Fewer key/value heads than query heads are grouped
            queries: heads / kv_heads neighbouring query heads share one (Ainslie et al. 2023).
        value: (batch, kv_heads, n_k, d_v).
        mask: who may look at whom, a `masks.Mask` or a bool tensor (n_q, n_k) or
            (batch, heads, n_q, n_k); **True = may attend**.
        bias: added to the scaled scores, broadcasts to (batch, heads, n_q, n_k), gets a gradient.
        scale: factor on Q Kᵀ; 1/√d_k unless given.
        dropout_p: probability of dropping a weight. Applied at every call: pass 0 when evaluating.
        return_weights: also return the weights (before dropout).
        return_lse: also return the log of the sum of exp(scores), natural logarithm.
        backend: "auto", "reference", "sdpa", "tiled", "flex" or "triton". One asked for by name
            never falls back.
        generator: source of the dropout's randomness; torch's default generator unless given.

    Returns:
        output (batch, heads, n_q, d_v) in the query's dtype (under torch.autocast in autocast's);
        then, if asked for, weights (batch, heads, n_q, n_k) and lse (batch, heads, n_q).

        Softmax and sums run in float32 or better. A query that may see no key gets output 0,
        weights 0, lse -inf and gradient 0, never NaN. NaN or inf in a key or value that a query
        may not see never reaches its output or its gradients; in one that it may see, its output is
        NaN (without mask and bias nothing is looked for, and inf follows the arithmetic). A bias of
        -inf hides a pair as the mask does.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, rank, shape or device.
        BackendUnsupportedError: the backend asked for cannot serve this call.
    """
    inputs = check(
        query, key, value, mask, bias, scale, dropout_p, return_weights, return_lse, generator
    )
    module = BACKENDS[_choose(inputs, backend)]
    with no_autocast(inputs.query.device):  # `check` has cast already
        output, weights, lse = module.attention(inputs)
    extras = [x for x, wanted in ((weights, return_weights), (lse, return_lse)) if wanted]
    return (output, *extras) if extras else output


def explain_backends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, str]:
    """For each backend "ok", or the reason why it cannot serve this call of `attention`.

    In the order of preference: "auto" takes the first that is "ok". Takes the arguments of
    `attention` and raises the same errors for bad ones.
    """
    inputs = check(
        query, key, value, mask, bias, scale, dropout_p, return_weights, return_lse, generator
    )
    return {name: _reason(inputs, name) or "ok" for name in _preference(inputs)}


def _preference(inputs: Inputs) -> list[str]:
    # On a GPU FlexAttention is fused and skips empty blocks; on a CPU it is a slow emulation, and
    # what skips them is "tiled".
    # Our own kernels serve by name: "auto" may prefer them once they have been timed on a GPU.
    if inputs.query.device.type != "cpu":
        return ["sdpa", "flex", "reference", "tiled", "triton"]
    if tiled.worth_it(inputs):
        return ["tiled", "sdpa", "reference", "flex", "triton"]
    return list(BACKENDS)


def _reason(inputs: Inputs, name: str) -> str | None:
    return BACKENDS[name].unsupported(inputs)


def _choose(inputs: Inputs, backend: str) -> str:
    if backend == "auto":
        return next(name for name in _preference(inputs) if _reason(inputs, name) is None)
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, got {type(backend).__name__}")
    if backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"backend must be one of {known}; got {backend!r}")
    reason = _reason(inputs, backend)
    if reason is not None:
        raise BackendUnsupportedError(f'backend "{backend}" cannot serve this call: {reason}')
    return backend
