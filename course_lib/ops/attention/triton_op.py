"""The kernels as PyTorch operators: with a gradient, and opaque to torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .triton_backward import launch_key, launch_query
from .triton_forward import launch_forward
from .triton_settings import forward_launch, key_launch, query_launch


@torch.library.custom_op("course_lib::attention", mutates_args=())
def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, broken: Tensor | None,
    by_query: Tensor, patterns: Tensor, backward: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp, and which queries see a broken key.

    `backward` holds what the two backward kernels walk along, [by_query, patterns, by_key,
    patterns], or nothing where no gradient is wanted.
    """
    launch = forward_launch(query, value)
    return launch_forward(query, key, value, bias, broken, by_query, patterns, scale, launch)


@torch.library.custom_op("course_lib::attention_backward", mutates_args=())
def attention_backward(
    d_output: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    bias: Tensor | None, output: Tensor, lse: Tensor,
    by_query: Tensor, query_patterns: Tensor, by_key: Tensor, key_patterns: Tensor,
    scale: float, wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias."""
    d_query, d_bias, delta = launch_query(
        d_output, d_lse, query, key, value, bias, output, lse, by_query, query_patterns, scale,
        wants_bias, query_launch(query, value),
    )  # fmt: skip
    d_key, d_value = launch_key(
        d_output, query, key, value, bias, lse, delta, by_key, key_patterns, scale,
        key_launch(query, value),
    )  # fmt: skip
    return d_query, d_key, d_value, d_bias


@attention_forward.register_fake
def _(query, key, value, bias, broken, by_query, patterns, backward, scale):  # type: ignore
    b, h, n_q, _ = query.shape
    lse = query.new_empty(b, h, n_q, dtype=torch.float32)
    spoiled = lse.new_empty(lse.shape if broken is not None else 0, dtype=torch.uint8)
    return query.new_empty(b, h, n_q, value.shape[-1]), lse, spoiled


@attention_backward.register_fake
def _(  # type: ignore
    d_output, d_lse, query, key, value, bias, output, lse, by_query, query_patterns, by_key,
    key_patterns, scale, wants_bias,
):  # fmt: skip
    shape = (*query.shape[:3], key.shape[2]) if wants_bias else (0,)
    gradients = (x.new_empty(x.shape) for x in (query, key, value))
    return *gradients, lse.new_empty(shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, bias, _, _, _, backward, ctx.scale = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(query, key, value, bias, *output[:2], *backward)


def _differentiate(ctx: Any, d_output: Tensor, d_lse: Tensor, _: Any) -> tuple[Any, ...]:
    wants_bias = ctx.needs_input_grad[3]
    *gradients, d_bias = attention_backward(
        d_output, d_lse, *ctx.saved_tensors, ctx.scale, wants_bias
    )
    if wants_bias:
        d_bias = d_bias.to(ctx.saved_tensors[3].dtype)
    # Nothing for broken, the plans (as many as came in) and the scale.
    backward = [None] * (len(ctx.saved_tensors) - 6)
    return *gradients, d_bias if wants_bias else None, None, None, None, backward, None


attention_forward.register_autograd(_differentiate, setup_context=_remember)
