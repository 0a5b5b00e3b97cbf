"""LayerNorm and RMSNorm as GPU kernels: one pass over the memory, the residual sum included.

PyTorch adds the residual, writes the sum, and reads it again to normalise it. Here a program holds
a few rows, whole, while it adds, takes their mean and spread, and writes both results.

The backward pass needs two sums over all rows, for weight and bias. Each program adds up its rows
and writes one partial sum; the partial sums are then added in a fixed order. So the gradients are
the same at every call, which atomic additions would not give.

Sources: Ba, Kiros & Hinton 2016, "Layer Normalization", §3; Zhang & Sennrich 2019, "Root Mean
Square Layer Normalization", §3. With x̂ = (x - μ)·r and g = dy·w the gradient of x is
r·(g - mean(g) - x̂·mean(g·x̂)); RMSNorm has μ = 0 and no mean(g).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..triton_runtime import on, tl, triton


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, residual, weight, bias, y, total, mean, inverse,
    x_row, x_col, residual_row, residual_col, weight_col, bias_col, y_row, total_row, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, CENTRED: tl.constexpr,
    ADDED: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x, added, normalised, scaled and shifted."""
    # Which rows? `there` is False beyond the last one, and beyond the width D of each.
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, WIDE)[None, :]
    there = (i < rows) & (j < D)

    # The sum goes on as it is stored, rounded, so that it is normalised as others will read it.
    row = tl.load(x + i * x_row + j * x_col, mask=there, other=0.0).to(tl.float32)
    if ADDED:
        row += tl.load(
            residual + i * residual_row + j * residual_col, mask=there, other=0.0
        ).to(tl.float32)  # fmt: skip
        rounded = row.to(total.dtype.element_ty)
        tl.store(total + i * total_row + j, rounded, mask=there)
        row = rounded.to(tl.float32)

    # Mean and spread in float32, the spread from the centred row: no large numbers cancel.
    line = tl.arange(0, ROWS)
    at = tl.program_id(0).to(tl.int64) * ROWS + line
    if CENTRED:
        centre = tl.sum(row, 1) / D  # (ROWS, WIDE) -> (ROWS,)
        row = tl.where(there, row - centre[:, None], 0.0)
        tl.store(mean + at, centre, mask=at < rows)
    spread = tl.sum(row * row, 1) / D + eps
    scale = 1.0 / tl.sqrt(tl.where(at < rows, spread, 1.0))
    tl.store(inverse + at, scale, mask=at < rows)

    # Weight and bias.
    row *= scale[:, None]
    if SCALED:
        row *= tl.load(weight + j * weight_col, mask=j < D, other=0.0).to(tl.float32)
    if SHIFTED:
        row += tl.load(bias + j * bias_col, mask=j < D, other=0.0).to(tl.float32)
    tl.store(y + i * y_row + j, row.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    d_y, d_total, total, weight, mean, inverse, d_x, d_weight, d_bias,
    d_y_row, d_y_col, d_total_row, d_total_col, total_row, total_col, weight_col, d_x_row,
    partial_row, rows,
    D: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, CENTRED: tl.constexpr,
    ADDED: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Gradient of every tile of ROWS rows that this program owns, and its partial sums."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    line, j = tl.arange(0, ROWS), tl.arange(0, WIDE)[None, :]
    weight_sum = tl.zeros([WIDE], tl.float32)
    bias_sum = tl.zeros([WIDE], tl.float32)
    factor = tl.full([1, WIDE], 1.0, tl.float32)
    if SCALED:
        factor = tl.load(weight + j * weight_col, mask=j < D, other=0.0).to(tl.float32)

    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        # The normalised rows x̂, once more, from what the forward pass kept.
        at = tile * ROWS + line
        i = at[:, None]
        there = (i < rows) & (j < D)
        row = tl.load(total + i * total_row + j * total_col, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(inverse + at, mask=at < rows, other=0.0)[:, None]
        if CENTRED:
            row -= tl.load(mean + at, mask=at < rows, other=0.0)[:, None]
        row = tl.where(there, row * scale, 0.0)

        # The partial sums of weight and bias, over rows.
        slope = tl.load(d_y + i * d_y_row + j * d_y_col, mask=there, other=0.0).to(tl.float32)
        if SCALED:
            weight_sum += tl.sum(slope * row, 0)  # (ROWS, WIDE) -> (WIDE,)
        if SHIFTED:
            bias_sum += tl.sum(slope, 0)

        # The gradient of the row: what would change its mean or its spread is taken out.
        slope *= factor
        change = slope - row * (tl.sum(slope * row, 1) / D)[:, None]
        if CENTRED:
            change -= (tl.sum(slope, 1) / D)[:, None]
        change *= scale
        if ADDED:  # the sum is a result of its own, with a gradient of its own
            change += tl.load(
                d_total + i * d_total_row + j * d_total_col, mask=there, other=0.0
            ).to(tl.float32)  # fmt: skip
        tl.store(d_x + i * d_x_row + j, change.to(d_x.dtype.element_ty), mask=there)

    # One line of partial sums each.
    column = tl.arange(0, WIDE)
    if SCALED:
        tl.store(d_weight + program * partial_row + column, weight_sum, mask=column < D)
    if SHIFTED:
        tl.store(d_bias + program * partial_row + column, bias_sum, mask=column < D)


# --- starting the kernels -------------------------------------------------------------------------


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual (rows, d) -> y and sum (rows, d), mean and 1/√(variance + ε) (rows,)."""
    (rows, d), options = x.shape, _tile(x.shape[-1])
    y, total, mean, inverse = _results(x, residual, centred)
    if rows:
        with on(x.device):
            forward_kernel[(math.ceil(rows / options["ROWS"]),)](
                x, _or(residual, x), _or(weight, x), _or(bias, x), y, total, mean, inverse,
                *x.stride(), *_or(residual, x).stride(), _step(weight), _step(bias),
                y.stride(0), total.stride(0), rows, eps,
                D=d, CENTRED=centred, ADDED=residual is not None, SCALED=weight is not None,
                SHIFTED=bias is not None, **options,
            )  # fmt: skip
    return y, total, mean, inverse


def launch_backward(
    d_y: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor,
    inverse: Tensor, centred: bool, shifted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the sum (rows, d), of weight and of bias, (d,) each in float32."""
    (rows, d), options = total.shape, _tile(total.shape[-1])
    d_x = total.new_empty(rows, d)
    # Enough programs to fill a GPU, and few enough that the partial sums stay small beside x.
    tiles = math.ceil(rows / options["ROWS"])
    programs = min(math.ceil(tiles / 4), 4096 // options["num_warps"])
    d_weight = inverse.new_empty(programs, d if weight is not None else 0)
    d_bias = inverse.new_empty(programs, d if shifted else 0)
    if rows:
        with on(total.device):
            backward_kernel[(programs,)](
                d_y, _or(d_total, d_y), total, _or(weight, total), mean, inverse,
                d_x, d_weight, d_bias,
                *d_y.stride(), *_or(d_total, d_y).stride(), *total.stride(), _step(weight),
                d_x.stride(0), d, rows,
                D=d, CENTRED=centred, ADDED=d_total is not None, SCALED=weight is not None,
                SHIFTED=shifted, **options,
            )  # fmt: skip
    return d_x, d_weight.sum(0), d_bias.sum(0)  # (programs, d) -> (d,)


def _tile(d: int) -> dict[str, int]:
    """Rows a program holds, and warps: 16 numbers a thread, as narrow rows go several at once."""
    wide = triton.next_power_of_2(d)
    rows = max(1, 2048 // wide)
    return {"ROWS": rows, "WIDE": wide, "num_warps": max(4, wide // 512), "num_stages": 1}


def _results(x: Tensor, residual: Tensor | None, centred: bool) -> tuple[Tensor, ...]:
    """Room for y, sum, mean and 1/√(variance + ε); no sum without a residual."""
    rows, d = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(0 if residual is None else rows, d, dtype=dtype)
    mean = x.new_empty(rows if centred else 0, dtype=torch.float32)
    return x.new_empty(rows, d, dtype=dtype), total, mean, mean.new_empty(rows)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A kernel wants a tensor even where it reads none."""
    return other if tensor is None else tensor


def _step(parameter: Tensor | None) -> int:
    return 0 if parameter is None else parameter.stride(0)


# --- as PyTorch operators: with a gradient, and opaque to torch.compile ---------------------------


@torch.library.custom_op("course_lib::norm", mutates_args=())
def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, sum, mean and 1/√(variance + ε) of rows (rows, d)."""
    return launch_forward(x, residual, weight, bias, eps, centred)


@torch.library.custom_op("course_lib::norm_backward", mutates_args=())
def norm_backward(
    d_y: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor | None, mean: Tensor,
    inverse: Tensor, centred: bool, shifted: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the sum, of weight and of bias."""
    return launch_backward(d_y, d_total, total, weight, mean, inverse, centred, shifted)


@norm_forward.register_fake
def _(x, residual, weight, bias, eps, centred):  # type: ignore
    return _results(x, residual, centred)


@norm_backward.register_fake
def _(d_y, d_total, total, weight, mean, inverse, centred, shifted):  # type: ignore
    d = total.shape[1]
    d_weight = inverse.new_empty(d if weight is not None else 0)
    return total.new_empty(total.shape), d_weight, inverse.new_empty(d if shifted else 0)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.centred = inputs
    _, total, mean, inverse = output
    ctx.added = residual is not None
    ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, weight, bias)]
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(total if ctx.added else x, weight, mean, inverse)


def _differentiate(ctx: Any, d_y: Tensor, d_total: Tensor, *_: Any) -> tuple[Any, ...]:
    shifted = ctx.dtypes[3] is not None
    d_sum, d_weight, d_bias = norm_backward(
        d_y, d_total if ctx.added else None, *ctx.saved_tensors, ctx.centred, shifted
    )
    gradients = (d_sum, d_sum, d_weight, d_bias)  # x and residual share that of their sum
    cast = [None if t is None else g.to(t) for g, t in zip(gradients, ctx.dtypes, strict=True)]
    return *cast, None, None


norm_forward.register_autograd(_differentiate, setup_context=_remember)


# --- as the other backends have them --------------------------------------------------------------


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """(x - mean) / √(variance + ε) · weight + bias; with a residual also x + residual."""
    return _norm(x, residual, weight, bias, eps, centred=True)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """x / √(mean of squares + ε) · weight; with a residual also x + residual."""
    return _norm(x, residual, weight, None, eps, centred=False)


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, centred: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    shape, d = x.shape, x.shape[-1]
    second = None if residual is None else residual.reshape(-1, d)  # (..., d) -> (rows, d)
    y, total, _, _ = norm_forward(x.reshape(-1, d), second, weight, bias, eps, centred)
    y = y.reshape(shape)  # (rows, d) -> (..., d)
    return y if residual is None else (y, total.reshape(shape))
