"""Calling an answer: on copies, in silence, and never letting its exceptions out."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .exercise import NOT_WRITTEN, Case, Exercise, Function

DENSE = (torch.strided, torch.device("cpu"))


class Broken(Exception):
    """A behaviour that does not hold. `got` and `want` are shown to the learner where given.

    crash: the message is that of an exception in the learner's code.
    """

    def __init__(
        self,
        message: str = "",
        *,
        case: Case | None = None,
        got: Any = None,
        want: Any = None,
        crash: bool = False,
    ):
        super().__init__(message)
        self.message, self.case, self.crash = message, case, crash
        self.got, self.want = got, want


@dataclass
class Observation:
    """What came of one call: a value or an exception, and which inputs were changed."""

    value: Any = None
    error: BaseException | None = None
    changed: list[str] = field(default_factory=list)

    @property
    def blank(self) -> bool:
        """Is it what the blank does? Operations that torch lacks raise NotImplementedError too."""
        return isinstance(self.error, NotImplementedError) and str(self.error) in (NOT_WRITTEN, "")


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """The same surroundings for every answer, whatever the notebook has set; all is put back.

    Prints and warnings go nowhere: an answer is called a hundred times.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    on_cpu = torch.get_default_device().type == "cpu"
    try:
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),
            contextlib.nullcontext() if on_cpu else torch.device("cpu"),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)


def observe(exercise: Exercise, function: Function, case: Case, seed: int = 0) -> Observation:
    """Call the function on copies of the case's inputs, with torch's random numbers from seed."""
    call = {name: _copy(value) for name, value in case.items()}
    seen = _attempt(lambda: exercise.call(function, call), seed)
    seen.changed = [
        n for n, v in call.items() if isinstance(v, Tensor) and not same(v, case[n], 0.0, 0.0)
    ]
    return seen


def gradients(exercise: Exercise, function: Function, case: Case) -> Observation:
    """{input: gradient} of a fixed random sum of the first output by each float input.

    The value is empty where the output has no gradient.
    """
    call = {name: _copy(value) for name, value in case.items()}
    leaves = {n: v for n, v in call.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def pull() -> dict[str, Tensor]:
        value = exercise.call(function, call)
        output = value[0] if isinstance(value, tuple) else value
        if not isinstance(output, Tensor) or not output.requires_grad:
            return {}
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
        total = (output * direction).sum()
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in pairs}

    return _attempt(pull)


def _attempt(call: Callable[[], Any], seed: int = 0) -> Observation:
    torch.default_generator.manual_seed(seed)
    try:
        with torch.enable_grad():  # put back after each call, should the answer switch it off
            value = call()
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and (tensor.layout, tensor.device) != DENSE:
                raise TypeError("the result is not a dense tensor on the CPU")
        return Observation(value=value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: no answer may end the notebook
        return Observation(error=error)


def same(a: Any, b: Any, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Equal as far as an exercise is concerned: shape and values (NaN equals NaN), not dtype."""
    if isinstance(a, list) and isinstance(b, list):
        a, b = tuple(a), tuple(b)
    if isinstance(a, tuple) or isinstance(b, tuple):
        tuples = isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b)
        return tuples and all(same(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        x, y = a.detach().double(), b.detach().double()
        return torch.equal(x, y) or torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


def expect(got: Any, want: Any, message: str = "", *, case: Case | None = None) -> None:
    """Raise `Broken` unless got equals want."""
    if not same(got, want):
        raise Broken(message, case=case, got=got, want=want)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
