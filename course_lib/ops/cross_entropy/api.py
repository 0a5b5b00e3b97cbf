"""`cross_entropy` and `linear_cross_entropy`: check the arguments, choose a backend, call it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import triton_limits
from ..attention.inputs import no_autocast
from . import chunked, fused, reference

REDUCTIONS = ("none", "mean", "sum")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CHUNK = 1024
"""Tokens whose logits exist at the same time, unless told otherwise."""


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of a softmax over the last dimension: -Σ_j q_j log softmax(logits)_j, in nats.

    q is 1 - ε at the target, and ε / vocab more everywhere (ε = label_smoothing). For two
    dimensions the same as `torch.nn.functional.cross_entropy`.
    Source: label smoothing, Szegedy et al. 2016, "Rethinking the Inception Architecture", §7.

    Args:
        logits: (..., vocab), floating point.
        targets: (...), integers from 0 to vocab - 1, or ignore_index.
        ignore_index: such targets have loss and gradient 0 and do not count in the mean.
        label_smoothing: from 0 to 1.
        reduction: "none", "sum", or "mean" over the targets that count (NaN if none does).
        backend: "reference", "fused" (PyTorch's own), "triton" (our kernels), or "auto": on a GPU
            the kernels where they can serve, else fused.

    Returns:
        (...) for "none", else a scalar, in the dtype of the logits (under autocast float32).
        Exponentials and sums run in float32 or better.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or on a CPU a
            target lies outside the vocabulary (on a GPU, which cannot be asked without waiting,
            its loss is NaN with our kernels and a device-side assert with PyTorch's own).
        BackendUnsupportedError: the kernels are asked for by name and cannot serve.
    """
    _check(logits, targets, ignore_index, label_smoothing, reduction, name="logits")
    targets = targets.long()
    _check_range(targets, logits.shape[-1], ignore_index)
    chosen = triton_limits.choose(
        backend, logits.device, "fused", ("fused", "reference"),
        lambda: triton_limits.unsupported(logits, targets),
    )  # fmt: skip
    rows = logits.reshape(-1, logits.shape[-1])  # (..., vocab) -> (rows, vocab)
    options = targets.reshape(-1), ignore_index, label_smoothing
    if chosen == "fused":
        loss = fused.cross_entropy(rows, *options, reduction)
        return loss.reshape(targets.shape) if reduction == "none" else loss
    if chosen == "triton":
        from . import triton_cross_entropy

        loss = triton_cross_entropy.row_losses(rows, *options)
    else:
        loss = reference.losses(rows, *options)[0]
    return _reduce(loss, targets, ignore_index, reduction).to(_result_dtype(logits))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = CHUNK,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`cross_entropy(hidden @ weightᵀ + bias, targets)`, never holding the logits of all tokens.

    The logits of `chunk` tokens exist at a time, and are computed a second time for the gradients:
    a third more work in the products, and memory that does not grow with tokens · vocab.

    Args:
        hidden: (..., d), what goes into the last layer.
        weight: (vocab, d), as in `torch.nn.Linear`.
        targets: (...), integers from 0 to vocab - 1, or ignore_index.
        bias: (vocab,).
        chunk: how many tokens at a time.
        backend: who works on a chunk's logits: "reference" (PyTorch), "triton" (our kernels), or
            "auto": on a GPU the kernels where they can serve, else reference.

    Other arguments, results and errors as in `cross_entropy`. Gradients that are to be
    differentiated again (create_graph, torch.func) are computed with all logits at once.
    """
    _check(hidden, targets, ignore_index, label_smoothing, reduction, name="hidden")
    _check_linear(hidden, weight, bias, chunk)
    targets = targets.long()
    _check_range(targets, weight.shape[0], ignore_index)
    dtype = _result_dtype(hidden)
    hidden, weight, bias = _cast(hidden, weight, bias)
    chosen = triton_limits.choose(
        backend, hidden.device, "reference", ("reference",),
        lambda: triton_limits.unsupported(hidden, weight, bias, targets),
    )  # fmt: skip
    rows: ModuleType = reference
    if chosen == "triton":
        from . import triton_cross_entropy as rows
    how = chunked.How(rows, chunk, ignore_index, label_smoothing)
    flat = hidden.reshape(-1, hidden.shape[-1])  # (..., d) -> (tokens, d)
    with no_autocast(hidden.device):  # `_cast` has cast already
        loss, _ = chunked.LinearCrossEntropy.apply(flat, weight, bias, targets.reshape(-1), how)
    return _reduce(loss, targets, ignore_index, reduction).to(dtype)


def _reduce(loss: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss.reshape(targets.shape)  # (rows,) -> (...)
    total = loss.sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def _autocast(x: Tensor) -> bool:
    kind, half = x.device.type, x.dtype != torch.float64
    return half and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if _autocast(x) else x.dtype


def _cast(hidden: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under autocast as a linear layer would."""
    dtype = torch.get_autocast_dtype(hidden.device.type) if _autocast(hidden) else hidden.dtype
    return tuple(None if x is None else x.to(dtype) for x in (hidden, *others))


# --- arguments ------------------------------------------------------------------------------------


def _check(
    x: Tensor, targets: Tensor, ignore_index: int, smoothing: float, reduction: str, name: str
) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if not isinstance(targets, Tensor) or targets.dtype not in INTEGERS:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"targets must be a tensor of integers, got {kind}")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[:-1] != targets.shape:
        raise ValueError(
            f"{name} must be (..., n) with n at least 1 and targets (...), got "
            f"{tuple(x.shape)} and {tuple(targets.shape)}"
        )
    if x.device != targets.device:
        raise ValueError(f"targets is on {targets.device} but {name} is on {x.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {smoothing}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> None:
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(
            f"weight must be (vocab, {hidden.shape[-1]}) to fit hidden {tuple(hidden.shape)}, got "
            f"{got}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", weight if bias is None else bias)):
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} but hidden is on {hidden.device}")
        if x.dtype != hidden.dtype and not _autocast(hidden):
            raise TypeError(f"{name} is {x.dtype} but hidden is {hidden.dtype}: they must agree")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")


def _check_range(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Where a look at the numbers costs nothing."""
    if targets.device.type != "cpu" or not triton_limits.concrete(targets):
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        raise ValueError(
            f"targets must be from 0 to {vocab - 1} or ignore_index ({ignore_index}), got "
            f"{targets[wrong][0].item()}"
        )
