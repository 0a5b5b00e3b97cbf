"""Rotary position encoding as a GPU kernel: every number is read once and written once.

The cosines and sines come from PyTorch, one table for all heads. They could be computed here, from
positions; but the fast cosine of a GPU loses its digits where angles are large, and position 10 000
is an angle of 10 000 radians.

The gradient of a rotation is the rotation back: the same kernel, with the sign of the sine turned.

Source: Su et al. 2021, "RoFormer", §3.4.2, equation 34.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..triton_runtime import on, tl, triton


@triton.jit(do_not_specialize=["heads", "length", "tiles"])
def rotary_kernel(
    x, cosine, sine, turned,
    x_b, x_h, x_n, x_d, turned_b, turned_h, turned_n, turned_d, table_n,
    heads, length, tiles, D: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    NEXT: tl.constexpr, APART: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """ROWS positions of one head."""
    # Which positions, of which head?
    program = tl.program_id(0).to(tl.int64)
    head = program // tiles
    sequence, h = head // heads, head % heads
    n = program % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    there = (n < length) & (pair < D // 2)

    # Where do the two entries of a pair stand? Side by side, or half a width apart.
    entry = NEXT * pair[:, :, None] + APART * tl.arange(0, 2)[None, None, :]
    rows, seen = n[:, :, None], there[:, :, None]

    # (ROWS, HALF, 2), read at once: memory is read in order, whichever way pairs are laid out.
    at = x + sequence * x_b + h * x_h + rows * x_n + entry * x_d
    a, b = tl.split(tl.load(at, mask=seen, other=0.0).to(tl.float32))

    # Turn them: (a cos θ - b sin θ, a sin θ + b cos θ), or by -θ.
    cos = tl.load(cosine + n * table_n + pair, mask=there, other=0.0)
    sin = tl.load(sine + n * table_n + pair, mask=there, other=0.0)
    if BACK:
        sin = -sin
    both = tl.join(a * cos - b * sin, a * sin + b * cos)
    at = turned + sequence * turned_b + h * turned_h + rows * turned_n + entry * turned_d
    tl.store(at, both.to(turned.dtype.element_ty), mask=seen)


def launch(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool, back: bool) -> Tensor:
    """x (batch, heads, length, d), tables (length, d / 2) in float32 -> as x, turned or back."""
    batch, heads, length, d = x.shape
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    half = max(1, triton.next_power_of_2(d // 2))
    rows = max(1, 1024 // half)  # eight pairs a thread
    tiles = math.ceil(length / rows)
    if x.numel():
        with on(x.device):
            rotary_kernel[(batch * heads * tiles,)](
                x, cosine, sine, turned, *x.stride(), *turned.stride(), cosine.stride(0),
                heads, length, tiles, D=d, ROWS=rows, HALF=half, NEXT=2 if interleaved else 1,
                APART=1 if interleaved else d // 2, BACK=back, num_warps=4, num_stages=1,
            )  # fmt: skip
    return turned


def _tables(x: Tensor, offset: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position · base^(-2i/d), (length, d / 2), as the other ways have them."""
    d = x.shape[-1]
    pair = torch.arange(0, d, 2, device=x.device, dtype=torch.float32)  # 2i
    positions = torch.arange(offset, offset + x.shape[2], device=x.device)
    angle = positions.to(torch.float32)[:, None] * base ** (-pair / d)  # (length, d / 2)
    return angle.cos(), angle.sin()


# --- as a PyTorch operator: with a gradient, and opaque to torch.compile --------------------------


@torch.library.custom_op("course_lib::rotary", mutates_args=())
def turn(x: Tensor, offset: int, base: float, interleaved: bool, back: bool) -> Tensor:
    """x (batch, heads, length, d), turned by its positions, or back."""
    return launch(x, *_tables(x, offset, base), interleaved, back)


@turn.register_fake
def _(x, offset, base, interleaved, back):  # type: ignore
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.how, ctx.back = inputs


def _differentiate(ctx: Any, d_turned: Tensor) -> tuple[Any, ...]:
    return turn(d_turned, *ctx.how, not ctx.back), None, None, None, None


turn.register_autograd(_differentiate, setup_context=_remember)


def rotary(x: Tensor, offset: int, base: float, interleaved: bool) -> Tensor:
    """Pair i, (a, b), at position p: (a cos θ - b sin θ, a sin θ + b cos θ), θ = p·base^(-2i/d)."""
    return turn(x, offset, float(base), interleaved, False)
