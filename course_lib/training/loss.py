"""The loss of language models, and its mean over many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Batch = tuple[Any, Tensor]
"""(inputs, targets); inputs is a tensor, or a tuple of the model's arguments."""
Loss = Callable[[Any, Tensor], Tensor]
IGNORED = -100  # a target that does not count, as in torch.nn.CrossEntropyLoss


def next_token_loss(
    logits: Float[Tensor, "batch length vocab"], targets: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Cross-entropy, mean nats per token. Targets of -100 are left out of the mean."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B·n, vocab) against (B·n,)


def mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss = next_token_loss) -> float:
    """Loss of a model over `batches`, in evaluation mode; each batch weighs as its targets' count.

    Raises:
        ValueError: `batches` is empty.
    """
    device, was_training = device_of(model), model.training
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in batches:
            targets = targets.to(device)
            weight = counted(targets)
            if weight:
                total += loss(call(model, inputs, device), targets).item() * weight
                count += weight
    model.train(was_training)
    if count == 0:
        raise ValueError("batches is empty: there is nothing to take a mean over")
    return total / count


def counted(targets: Tensor) -> int:
    """How many targets count."""
    return int((targets != IGNORED).sum())


def call(model: nn.Module, inputs: Any, device: torch.device) -> Any:
    """model(inputs), or model(*inputs) for several, on the device."""
    several = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return model(*(x.to(device) if isinstance(x, Tensor) else x for x in several))


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
