"""What tells attention, which sees a bag of tokens, where each of them stands.

Each scheme is a module to be called by itself, and fits the `position` hook of
`MultiHeadAttention`. Schemes that know distances only are in `relative_position`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..ops.rotary import rotary
from .position import Position


def sinusoids(
    positions: Float[Tensor, " length"] | Int[Tensor, " length"],
    d_model: int,
    base: float = 10_000.0,
) -> Float[Tensor, "length d_model"]:
    """sin and cos of pos / base^(2i / d_model), neighbours, for each position and each i.

    Computed in the dtype of the positions; in float32 for whole numbers.
    Source: Vaswani et al. 2017, "Attention Is All You Need", §3.5.
    """
    dtype = positions.dtype if positions.is_floating_point() else torch.float32
    even = torch.arange(0, d_model, 2, device=positions.device, dtype=dtype)  # 2i
    angle = positions.to(dtype)[:, None] * base ** (-even / d_model)  # (length, d_model / 2)
    # (length, d_model / 2, 2) -> (length, d_model): sine and cosine of a pair are neighbours
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


class SinusoidalPositionalEncoding(Position):
    """Adds fixed sines and cosines of the position; no parameters, no largest position.

        p[pos, 2i]     = sin(pos / base^(2i / d_model))
        p[pos, 2i + 1] = cos(pos / base^(2i / d_model))

    Source: Vaswani et al. 2017, "Attention Is All You Need", §3.5.

    Args:
        d_model: width of the activations; even, because sines and cosines come in pairs.
        base: the longest wavelength is 2π · base positions.

    Raises:
        ValueError: `d_model` is odd or below 2, or `base` is not above 1.
    """

    def __init__(self, d_model: int, base: float = 10_000.0) -> None:
        super().__init__()
        if d_model < 2 or d_model % 2:
            raise ValueError(f"d_model must be even and at least 2, got {d_model}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.d_model = d_model
        self.base = base

    def forward(
        self, x: Float[Tensor, "batch length d_model"], offset: int = 0
    ) -> Float[Tensor, "batch length d_model"]:
        """x + p; `offset` is the position of the first token.

        Raises:
            ValueError: the last axis is not `d_model`, or `offset` is negative.
        """
        _check_input(x, self.d_model, offset)
        # bfloat16 cannot tell position 257 from 256: compute in float32 or better, then round.
        dtype = torch.promote_types(x.dtype, torch.float32)
        positions = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=dtype)
        p = sinusoids(positions, self.d_model, self.base)  # (length, d_model) for every sequence
        return x + p.to(x.dtype)

    def encode_tokens(self, x: Tensor, offset: int) -> Tensor:
        return self(x, offset)

    def extra_repr(self) -> str:
        return f"{self.d_model}, base={self.base}"


class LearnedPositionalEncoding(Position):
    """Adds one learned vector per position, up to a largest length.

    Source: Gehring et al. 2017, "Convolutional Sequence to Sequence Learning", §3.1; Vaswani et
    al. 2017, §3.5, found it as good as sinusoids within the lengths trained on.

    Args:
        max_length: number of positions that have a vector.
        d_model: width of the activations.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        if max_length < 1 or d_model < 1:
            raise ValueError(
                f"max_length and d_model must be at least 1, got {max_length} and {d_model}"
            )
        self.weight = nn.Parameter(torch.empty(max_length, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], offset: int = 0
    ) -> Float[Tensor, "batch length d_model"]:
        """x + p; `offset` is the position of the first token.

        Raises:
            ValueError: the last axis is not `d_model`, `offset` is negative, or a position has no
                vector because it is `max_length` or more.
        """
        max_length, d_model = self.weight.shape
        _check_input(x, d_model, offset)
        if offset + x.shape[1] > max_length:
            raise ValueError(
                f"x has length {x.shape[1]} at offset={offset} and needs {offset + x.shape[1]} "
                f"positions, but max_length={max_length}"
            )
        return x + self.weight[offset : offset + x.shape[1]]  # (length, d_model) for every sequence

    def encode_tokens(self, x: Tensor, offset: int) -> Tensor:
        return self(x, offset)


class RotaryPositionalEncoding(Position):
    """Turns queries and keys by their positions, so that their product depends on distances only.

    Source: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", §3.2.2.

    Args:
        d_head: width of a head; even, because entries turn in pairs.
        base: pair i turns by base^(-2i / d_head) radians per position.
        interleaved: pairs are neighbours, as in the paper; False pairs entry i with entry
            i + d_head / 2.

    Raises:
        ValueError: `d_head` is odd or below 2, or `base` is not above 1.
    """

    def __init__(self, d_head: int, *, base: float = 10_000.0, interleaved: bool = True) -> None:
        super().__init__()
        if d_head < 2 or d_head % 2:
            raise ValueError(f"d_head must be even and at least 2, got {d_head}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.d_head, self.base, self.interleaved = d_head, base, interleaved

    def forward(
        self, x: Float[Tensor, "batch heads length d_head"], offset: int = 0
    ) -> Float[Tensor, "batch heads length d_head"]:
        """Queries or keys, turned; `offset` is the position of the first one.

        Raises:
            ValueError: x is not (batch, heads, length, d_head).
        """
        if x.ndim != 4 or x.shape[-1] != self.d_head:
            raise ValueError(
                f"x must be (batch, heads, length, {self.d_head}), got shape {tuple(x.shape)}"
            )
        return rotary(x, offset=offset, base=self.base, interleaved=self.interleaved)

    def encode_heads(self, x: Tensor, offset: int) -> Tensor:
        return self(x, offset)

    def extra_repr(self) -> str:
        return f"{self.d_head}, base={self.base}, interleaved={self.interleaved}"


def _check_input(x: Tensor, d_model: int, offset: int) -> None:
    if x.ndim != 3 or x.shape[-1] != d_model:
        raise ValueError(f"x must be (batch, length, {d_model}), got shape {tuple(x.shape)}")
    if offset < 0:
        raise ValueError(f"offset must not be negative, got {offset}")
