"""Layer normalisation and RMS normalisation as modules."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..ops.norm import layer_norm, rms_norm


class LayerNorm(nn.Module):
    """(x - mean) / √(variance + ε) · weight + bias, for each token by itself.

    Source: Ba, Kiros & Hinton 2016, "Layer Normalization", §3.

    Args:
        d_model: width of the activations.
        eps: added to the variance, inside the root.
        affine: False leaves weight and bias out.
        bias: False leaves only the bias out.

    Raises:
        ValueError: d_model is below 1 or eps is negative.
    """

    def __init__(
        self, d_model: int, *, eps: float = 1e-5, affine: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        _check(d_model, eps)
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.ones(d_model)) if affine else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if affine and bias else None

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The same shape; raises ValueError where the last axis is not d_model."""
        _check_width(x, self.d_model)
        return layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        affine, bias = self.weight is not None, self.bias is not None
        return f"{self.d_model}, eps={self.eps}, affine={affine}, bias={bias}"


class RMSNorm(nn.Module):
    """x / √(mean of squares + ε) · weight: layer norm without the mean and the bias.

    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", §3.

    Args:
        d_model: width of the activations.
        eps: added to the mean of squares, inside the root; None takes the machine epsilon of the
            input's dtype (of float32 for half precision).
        affine: False leaves the weight out.

    Raises:
        ValueError: d_model is below 1 or eps is negative.
    """

    def __init__(self, d_model: int, *, eps: float | None = 1e-5, affine: bool = True) -> None:
        super().__init__()
        _check(d_model, eps)
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.ones(d_model)) if affine else None

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The same shape; raises ValueError where the last axis is not d_model."""
        _check_width(x, self.d_model)
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.d_model}, eps={self.eps}, affine={self.weight is not None}"


def _check(d_model: int, eps: float | None) -> None:
    if d_model < 1:
        raise ValueError(f"d_model must be at least 1, got {d_model}")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def _check_width(x: Tensor, d_model: int) -> None:
    if x.ndim == 0 or x.shape[-1] != d_model:
        raise ValueError(f"x must have shape (..., {d_model}), got {tuple(x.shape)}")
