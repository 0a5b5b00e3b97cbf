"""Cross-entropy as GPU kernels: the logits are read once forward and once backward.

PyTorch's own writes the log-probabilities, as large as the logits, and keeps them for the backward
pass. Here one program walks along a row and keeps two numbers, the largest logit so far and the sum
of exponentials beneath it; what is stored for a row is its log-sum-exp.

The gradient goes into memory of its own. Overwriting the logits would save that, but a kernel's
writes are not counted by autograd: whoever uses the logits again would get wrong numbers unwarned.

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; label
smoothing: Szegedy et al. 2016, "Rethinking the Inception Architecture", §7.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..triton_runtime import on, tl, triton

NOTHING = tl.constexpr(float("-inf"))
NO_NUMBER = tl.constexpr(float("nan"))


@triton.jit(do_not_specialize=["ignore_index"])
def forward_kernel(
    logits, targets, loss, log_sum, logits_row, logits_col, targets_step,
    vocab, ignore_index, smoothing, BLOCK: tl.constexpr, SMOOTHED: tl.constexpr,
):  # fmt: skip
    """Loss and log-sum-exp of one row."""
    # Which row? One that does not count is not read: its walk ends where it begins.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row * targets_step)
    counts = target != ignore_index
    base = logits + row * logits_row

    # The walk. A larger logit scales down the sum so far; no exponent is above 0.
    most = tl.full([], NOTHING, tl.float32)
    sums = tl.full([], 0.0, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, tl.where(counts, vocab, 0), BLOCK):
        j = start + tl.arange(0, BLOCK)
        part = tl.load(base + j * logits_col, mask=j < vocab, other=NOTHING).to(tl.float32)
        larger = tl.maximum(most, tl.max(part, 0))
        safe = tl.where(larger == NOTHING, 0.0, larger)  # -inf - -inf would be NaN
        sums = sums * tl.exp(most - safe) + tl.sum(tl.exp(part - safe), 0)
        most = larger
        if SMOOTHED:
            total += tl.sum(tl.where(j < vocab, part, 0.0), 0)

    # (1 - ε) · (logsumexp - x_target) + ε · (logsumexp - mean(x)), differences first: near ones
    # are exact. A target outside the vocabulary gives NaN.
    inside = (target >= 0) & (target < vocab)
    right = tl.load(base + target * logits_col, mask=counts & inside, other=NO_NUMBER)
    whole = most + tl.log(tl.where(counts, sums, 1.0))
    lost = whole - right.to(tl.float32)
    if SMOOTHED:
        lost = (1 - smoothing) * lost + smoothing * (whole - total / vocab)
    tl.store(loss + row, tl.where(counts, lost, 0.0))
    tl.store(log_sum + row, tl.where(counts, whole, 0.0))


@triton.jit(do_not_specialize=["ignore_index"])
def backward_kernel(
    d_loss, logits, targets, log_sum, d_logits, d_loss_step, logits_row, logits_col, targets_step,
    d_logits_row, vocab, ignore_index, smoothing, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK logits of one row: (p - q) · d_loss."""
    # Which logits, of which row?
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row * targets_step)
    counts = target != ignore_index

    # Probabilities, from the log-sum-exp that the forward pass kept.
    there = (j < vocab) & counts
    part = tl.load(logits + row * logits_row + j * logits_col, mask=there, other=NOTHING)
    change = tl.exp(part.to(tl.float32) - tl.load(log_sum + row))

    # Minus the target's: 1 - ε on it, ε / vocab on all.
    change -= tl.where(j == target, 1 - smoothing, 0.0) + smoothing / vocab
    change *= tl.where(counts, tl.load(d_loss + row * d_loss_step), 0.0)
    change = tl.where((target >= 0) & (target < vocab), change, NO_NUMBER)
    change = tl.where(counts, change, 0.0)
    tl.store(
        d_logits + row * d_logits_row + j, change.to(d_logits.dtype.element_ty), mask=j < vocab
    )


# --- starting the kernels -------------------------------------------------------------------------


def losses(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Logits (rows, vocab), targets (rows,) -> loss and log-sum-exp of each row, in float32."""
    rows, vocab = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    log_sum = loss.new_empty(rows)
    if rows:
        with on(logits.device):
            forward_kernel[(rows,)](
                logits, targets, loss, log_sum, *logits.stride(), targets.stride(0),
                vocab, ignore_index, float(smoothing), SMOOTHED=smoothing > 0, **_block(vocab),
            )  # fmt: skip
    return loss, log_sum


def gradient(
    d_loss: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor, ignore_index: int,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """Of the logits (rows, vocab), in their dtype."""
    (rows, vocab), options = logits.shape, _block(logits.shape[1])
    d_logits = logits.new_empty(rows, vocab)
    if rows:
        with on(logits.device):
            backward_kernel[(rows, math.ceil(vocab / options["BLOCK"]))](
                d_loss, logits, targets, log_sum, d_logits,
                d_loss.stride(0), *logits.stride(), targets.stride(0), d_logits.stride(0),
                vocab, ignore_index, float(smoothing), **options,
            )  # fmt: skip
    return d_logits


def _block(vocab: int) -> dict[str, int]:
    """Logits at a time, and warps: 16 numbers a thread."""
    block = min(4096, triton.next_power_of_2(vocab))
    return {"BLOCK": block, "num_warps": max(1, block // 512), "num_stages": 2}


# --- as PyTorch operators: with a gradient, and opaque to torch.compile ---------------------------


@torch.library.custom_op("course_lib::cross_entropy", mutates_args=())
def _losses(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    return losses(logits, targets, ignore_index, smoothing)


@torch.library.custom_op("course_lib::cross_entropy_backward", mutates_args=())
def _gradient(
    d_loss: Tensor, logits: Tensor, targets: Tensor, log_sum: Tensor, ignore_index: int,
    smoothing: float,
) -> Tensor:  # fmt: skip
    return gradient(d_loss, logits, targets, log_sum, ignore_index, smoothing)


@_losses.register_fake
def _(logits, targets, ignore_index, smoothing):  # type: ignore
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, loss.new_empty(loss.shape)


@_gradient.register_fake
def _(d_loss, logits, targets, log_sum, ignore_index, smoothing):  # type: ignore
    return logits.new_empty(logits.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _differentiate(ctx: Any, d_loss: Tensor, _: Any) -> tuple[Any, ...]:
    return _gradient(d_loss, *ctx.saved_tensors, *ctx.options), None, None, None


_losses.register_autograd(_differentiate, setup_context=_remember)


def row_losses(logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float) -> Tensor:
    """Loss of each row, (rows,) in float32, with a gradient."""
    return _losses(logits, targets, ignore_index, float(smoothing))[0]
