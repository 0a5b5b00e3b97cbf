"""How much an answer makes and reads: for exercises whose point is what is never written down."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..grading.observe import observe


class Watch(TorchDispatchMode):
    """Watches what operations make and read; views count for nothing.

    largest: numbers of the largest tensor made. made: numbers made in all. held: most numbers in
    existence at once. read: numbers read of the tensor that is watched. The inputs do not count.
    """

    def __init__(self, given: tuple[Any, ...], watched: Tensor) -> None:
        super().__init__()
        tensors = [value for value in given if isinstance(value, Tensor)]
        self.given = {StorageWeakRef(t.untyped_storage()).cdata for t in tensors}
        self.watched = StorageWeakRef(watched.untyped_storage()).cdata
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.largest = self.made = self.held = self.read = self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations += 1
        for key in [key for key, (storage, _) in self.alive.items() if storage.expired()]:
            del self.alive[key]
        for tensor in _tensors(result):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self.given and storage.cdata not in self.alive:
                numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.alive[storage.cdata] = storage, numbers
                self.made += numbers
                self.largest = max(self.largest, numbers)
        self.held = max(self.held, sum(numbers for _, numbers in self.alive.values()))
        if not any(part.alias_info for part in operation._schema.returns):
            self.read += sum(t.numel() for t in _tensors(args) if self._is_watched(t))
        return result

    def _is_watched(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata == self.watched


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def watched(answer: Any, *args: Any) -> Watch:
    """One call of the answer, watched; the second argument's reads are counted."""
    watches = []

    def function(*given: Any) -> Any:
        watches.append(Watch(given, given[1]))
        with watches[0]:
            return answer.function(*given)

    case = dict(zip(answer.exercise.parameters, args, strict=True))
    if observe(answer.exercise, function, case).error is not None:
        answer.on(case)  # what went wrong is told as it is for any other call
    return watches[0]
