"""Cross-entropy of a linear layer's logits, a few tokens at a time: all logits never exist.

The logits of 8 192 tokens over 128 000 words fill 4 GB in float32, their gradient as much again.
But each token's loss needs its own logits only. So the forward pass makes the logits of a chunk,
keeps loss and log-sum-exp, and throws the logits away; the backward pass makes them once more.
That is one product of three done twice, for memory that no longer grows with tokens · vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


@dataclass(frozen=True)
class How:
    """Who computes, how many tokens at a time, and the options of the loss.

    `rows` is a module with `losses` and `gradient` of rows of logits, as in `reference`.
    """

    rows: ModuleType
    chunk: int
    ignore_index: int
    smoothing: float

    @property
    def options(self) -> tuple[int, float]:
        return self.ignore_index, self.smoothing


class LinearCrossEntropy(torch.autograd.Function):
    """hidden (tokens, d), weight (vocab, d) … -> loss and log-sum-exp of each token, (tokens,)."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        done = [
            how.rows.losses(F.linear(part, weight, bias), right, *how.options)  # (chunk, vocab)
            for part, right in zip(hidden.split(how.chunk), targets.split(how.chunk), strict=True)
        ]
        loss, log_sum = (torch.cat(parts) for parts in zip(*done, strict=True))
        return loss, log_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        hidden, weight, bias, targets, ctx.how = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(hidden, weight, bias, targets, output[1])

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        d_loss = above[0]  # the log-sum-exp has no gradient
        hidden, weight, bias, targets, log_sum = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients may be differentiated in their turn
            return *_differentiable(hidden, weight, bias, targets, d_loss, ctx.how), None, None
        wants = ctx.needs_input_grad
        # Sums over chunks grow in float32 or better.
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wants[2] else None
        columns = (x.split(ctx.how.chunk) for x in (d_loss, hidden, targets, log_sum))
        for at, (d_part, part, right, sums) in enumerate(zip(*columns, strict=True)):
            logits = F.linear(part, weight, bias)  # (chunk, d) x (d, vocab)
            d_logits = ctx.how.rows.gradient(d_part, logits, right, sums, *ctx.how.options)
            if d_hidden is not None:  # (chunk, vocab) x (vocab, d)
                d_hidden[at * ctx.how.chunk :][: len(part)] = d_logits @ weight
            if d_weight is not None:  # (vocab, chunk) x (chunk, d)
                d_weight += d_logits.mT @ part
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=wide)
        down = [None if x is None else x.to(weight.dtype) for x in (d_weight, d_bias)]
        return d_hidden, *down, None, None


def _differentiable(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, d_loss: Tensor, how: How
) -> tuple[Tensor | None, ...]:
    """The gradients in plain PyTorch and at once, so that all logits do exist."""

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return reference.losses(F.linear(hidden, weight, *bias), targets, *how.options)[0]

    biases = () if bias is None else (bias,)
    pull_back = torch.func.vjp(loss, hidden, weight, *biases)[1]
    gradients = pull_back(d_loss)
    return gradients if biases else (*gradients, None)
