"""The residual connection: a sublayer adds to its input, and a norm stands before or after."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from .normalization import LayerNorm, RMSNorm

Sublayer = Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """x + dropout(sublayer(norm(x))), or norm(x + dropout(sublayer(x))) with norm_first=False.

    Sources: He et al. 2016, "Deep Residual Learning", §3.1; post-norm: Vaswani et al. 2017, §3.1;
    pre-norm: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", §3.1.

    Args:
        norm: a module from (batch, n, d_model) to the same shape.
        norm_first: pre-norm (True) or post-norm.
        dropout: of what the sublayer adds, in training mode only.
    """

    def __init__(self, norm: nn.Module, *, norm_first: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.norm_first = norm, norm_first
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch n d_model"], sublayer: Sublayer
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The shape of x: that is why blocks stack. A second result (weights) is handed through."""
        result = sublayer(self.norm(x) if self.norm_first else x)
        added, *weights = result if isinstance(result, tuple) else (result,)
        x = x + self.dropout(added)
        x = x if self.norm_first else self.norm(x)
        return (x, weights[0]) if weights else x

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}"


def make_norm(
    name: str, d_model: int, *, eps: float = 1e-5, affine: bool = True, bias: bool = True
) -> nn.Module:
    """The norm of this name, "layer_norm" or "rms_norm"; bias concerns the first only."""
    if name == "layer_norm":
        return LayerNorm(d_model, eps=eps, affine=affine, bias=bias)
    if name == "rms_norm":
        return RMSNorm(d_model, eps=eps, affine=affine)
    raise ValueError(f"norm must be one of layer_norm, rms_norm; got {name!r}")
