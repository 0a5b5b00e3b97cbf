"""Cross-entropy by PyTorch's own function."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    ignore_index: int,
    smoothing: float,
    reduction: str,
) -> Float[Tensor, ...]:
    """Loss of each row, their sum, or their mean over targets that count."""
    return F.cross_entropy(
        logits,
        targets,
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
    )
