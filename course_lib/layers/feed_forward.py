"""The feed-forward network: the same two matrices for every token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu}


class FeedForward(nn.Module):
    """W₂ · activation(W₁ x + b₁) + b₂, or gated: W₂ · (activation(W₃ x + b₃) ⊙ (W₁ x + b₁)) + b₂.

    Sources: Vaswani et al. 2017, §3.3 (relu); Hendrycks & Gimpel 2016, "Gaussian Error Linear
    Units", §2 (gelu, and its tanh approximation); So et al. 2021, "Primer", §4 (relu2: its square);
    Shazeer 2020, "GLU Variants Improve Transformer", §2 (swiglu, geglu).

    Args:
        d_model: width of the activations.
        d_ff: width between the matrices; 4·d_model unless given. A gated network has three
            matrices, so that d_ff = 8/3·d_model gives it as many parameters.
        activation: "relu", "gelu", "gelu_tanh", "relu2" (squared), "swiglu" or "geglu".
        bias: whether the matrices have biases.
        dropout: of what stands between the matrices, in training mode only.

    Raises:
        ValueError: an unknown activation or an impossible size.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        if d_model < 1 or d_ff < 1:
            raise ValueError(f"d_model and d_ff must be at least 1, got {d_model} and {d_ff}")
        known = ACTIVATIONS | GATED
        if activation not in known:
            raise ValueError(f"activation must be one of {', '.join(known)}; got {activation!r}")
        self.activation = activation
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.gate = nn.Linear(d_model, d_ff, bias=bias) if activation in GATED else None
        self.down = nn.Linear(d_ff, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """The same shape; every token by itself. ValueError where the last axis is not d_model."""
        if x.ndim == 0 or x.shape[-1] != self.up.in_features:
            raise ValueError(
                f"x must have shape (..., {self.up.in_features}), got {tuple(x.shape)}"
            )
        hidden = self.up(x)  # (..., d_model) -> (..., d_ff)
        if self.gate is None:
            hidden = ACTIVATIONS[self.activation](hidden)
        else:
            hidden = GATED[self.activation](self.gate(x)) * hidden
        return self.down(self.dropout(hidden))  # (..., d_ff) -> (..., d_model)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
