"""A run on disk: written whole or not at all, and only taken up by the run that wrote it."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .history import History, write_whole

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be gone on from; says why. The file stays as it is."""


def save(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    history: History,
    run: dict[str, Any],
) -> None:
    """Everything that the next step depends on, but the batches."""
    content = {
        "format": FORMAT,
        "run": run,
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "history": history.to_dict(),
        "random": torch.get_rng_state(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    body = buffer.getvalue()
    write_whole(path, body + hashlib.sha256(body).digest())


def load(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    run: dict[str, Any],
) -> History:
    """Put the state of a checkpoint into model, optimisers and torch's generator.

    Raises:
        CheckpointError: the file is torn or is no checkpoint, or another run wrote it; names what
            differs. Nothing has been changed then.
    """
    content = _read(path)
    differs = [
        f"{name} was {content['run'].get(name)!r} and is {value!r}"
        for name, value in run.items()
        if content["run"].get(name) != value
    ]
    if differs:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(differs)}. Give it another path, or remove it."
        )
    model.load_state_dict(content["model"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(content["random"])
    return History(**content["history"])


def _read(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    body, digest = raw[:-32], raw[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path} is torn or is no checkpoint of this course; remove it")
    try:
        content = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}); remove it"
        ) from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of another version of this course; remove it")
    return content


def describe(model: nn.Module) -> str:
    """A model by the names and shapes of its parameters, short."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    count = sum(p.numel() for p in model.parameters())
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:8]
    return f"{type(model).__name__} with {count} parameters ({digest})"
