"""Calling an answer: on copies, in silence, and never letting its exceptions out."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .exercise import Case, Exercise, Function


class Broken(Exception):
    """A behaviour that does not hold. `got` and `want` are shown to the learner where given."""

    def __init__(self, message: str = "", *, case: Case | None = None, got: Any = None, want: Any = None):  # fmt: skip
        super().__init__(message)
        self.message, self.case, self.got, self.want = message, case, got, want


class NotWritten(Exception):
    """The answer is still the blank."""


@dataclass
class Observation:
    """What came of one call: a value or an exception, and which inputs were changed."""

    value: Any = None
    error: BaseException | None = None
    changed: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor] | None:
        """The value as a list of tensors, or None where it is anything else."""
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return list(values) if all(isinstance(v, Tensor) for v in values) else None


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No prints and no warnings from an answer that is called a hundred times."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def observe(exercise: Exercise, function: Function, case: Case) -> Observation:
    """Call the function on copies of the case's inputs."""
    call = {name: _copy(value) for name, value in case.items()}
    try:
        with silence(), torch.random.fork_rng(devices=[]):
            value = exercise.call(function, call)
    except NotImplementedError as error:
        raise NotWritten from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return Observation(error=error)
    changed = [n for n, v in call.items() if isinstance(v, Tensor) and not same(v, case[n], 0, 0)]
    return Observation(value=value, changed=changed)


def gradients(exercise: Exercise, function: Function, case: Case) -> list[Tensor | None] | None:
    """Gradient of a fixed random sum of the first output by each float input; None: no graph."""
    call = {name: _copy(value) for name, value in case.items()}
    leaves = [v for v in call.values() if isinstance(v, Tensor) and v.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.enable_grad():
        value = exercise.call(function, call)
        output = value[0] if isinstance(value, tuple) else value
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        generator = torch.Generator().manual_seed(7)
        direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = (output * direction.to(output.dtype)).sum()
        return list(torch.autograd.grad(total, leaves, allow_unused=True))


def same(a: Any, b: Any, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Equal as far as an exercise is concerned: shape and values (NaN equals NaN), not dtype."""
    if isinstance(a, tuple) or isinstance(b, tuple):
        tuples = isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b)
        return tuples and all(same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        x, y = a.detach().double(), b.detach().double()
        return torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def expect(got: Any, want: Any, message: str = "", *, case: Case | None = None) -> None:
    """Raise `Broken` unless got equals want."""
    if not same(got, want):
        raise Broken(message, case=case, got=got, want=want)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
