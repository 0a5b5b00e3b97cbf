"""The same run in several processes: each takes its rows of every batch. Started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .loss import Batch, counted


@dataclass(frozen=True)
class World:
    """How many processes train together, and which of them this is."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The process that shows progress and writes files."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the processes where there are several."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows of a batch, and the factor that its mean loss is to be weighed with.

        The mean of all processes' weighed losses is the loss of the whole batch.

        Raises:
            ValueError: the batch has fewer rows than there are processes.
        """
        inputs, targets = batch
        if self.size == 1:
            return batch, 1.0
        if len(targets) < self.size:
            raise ValueError(
                f"a batch of {len(targets)} rows is too small for {self.size} processes"
            )
        mine = targets[self.rank :: self.size]
        weight = self.size * counted(mine) / max(1, counted(targets))
        return (self._rows(inputs, len(targets)), mine), weight

    def _rows(self, inputs: Any, count: int) -> Any:
        if isinstance(inputs, tuple | list):
            return tuple(self._rows(x, count) for x in inputs)
        is_batch = isinstance(inputs, Tensor) and inputs.ndim > 0 and len(inputs) == count
        return inputs[self.rank :: self.size] if is_batch else inputs

    def mean(self, value: Tensor | float) -> float:
        """The mean of a number over the processes, the same in all of them."""
        if self.size > 1:
            total = torch.as_tensor(value).detach().clone()
            dist.all_reduce(total)
            return total.item() / self.size
        return value.item() if isinstance(value, Tensor) else value

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world() -> Iterator[World]:
    """The processes that torchrun started, connected; one alone without it."""
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield World(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
    else:
        yield World()
