"""What every model asks of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(
    tokens: Tensor, vocab_size: int, max_length: int | None = None, *, name: str = "tokens"
) -> None:
    """Raise unless tokens is a (batch, length) tensor of integers in 0 … vocab_size - 1.

    On a GPU the values are not looked at: that would wait for it at every step.

    Raises:
        TypeError: `tokens` are not int32 or int64.
        ValueError: `tokens` is not (batch, length) or empty, is longer than max_length, or a token
            is outside the vocabulary.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int32, torch.int64):
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name} must be int32 or int64, got {kind}")
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"{name} must be (batch, length), not empty, got shape {tuple(tokens.shape)}"
        )
    if max_length is not None and tokens.shape[1] > max_length:
        raise ValueError(
            f"{name} has length {tokens.shape[1]}, longer than max_length={max_length}"
        )
    if tokens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{name} has the value {low if low < 0 else high}; with vocab_size={vocab_size} "
            f"expected 0 … {vocab_size - 1}"
        )
