"""Mistakes that can be made in any exercise, each found by a rule and not by comparison.

`make` builds one from the reference, to test the graders with; `found` recognises it, and its
unseen cousins, in an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exercise import Case, Exercise, Function
from .observe import NotWritten, Observation, gradients, observe, same


@dataclass(frozen=True)
class Answered:
    """An answer and the reference, observed on the same cases."""

    exercise: Exercise
    function: Function
    cases: list[Case]
    got: list[Observation]
    want: list[Any]

    @property
    def right(self) -> list[bool]:
        """For each case: is the value the reference's?"""
        pairs = zip(self.got, self.want, strict=True)
        return [g.error is None and same(g.value, w) for g, w in pairs]

    def values(self) -> Iterable[tuple[Any, Any, Case]]:
        """(got, want, case) where the answer gave a value."""
        return [
            (g.value, w, c)
            for g, w, c in zip(self.got, self.want, self.cases, strict=True)
            if g.error is None
        ]


def answered(exercise: Exercise, function: Function) -> Answered:
    """Observe the answer on every case, for two draws of their numbers."""
    cases = [case for seed in (0, 1) for case in exercise.cases_for(seed)]
    return Answered(
        exercise, function, cases,
        [observe(exercise, function, case) for case in cases],
        [observe(exercise, exercise.reference, case).value for case in cases],
    )  # fmt: skip


@dataclass(frozen=True)
class Universal:
    """A mistake of any exercise. `make` gives None where it makes no sense for that one."""

    name: str
    cause: str
    ask: str
    make: Callable[[Exercise], Function | None]
    found: Callable[[Answered], bool]


def diagnose(answer: Answered) -> Universal | None:
    """The first universal mistake whose rule finds it in the answer."""
    return next((u for u in UNIVERSAL if u.found(answer)), None)


def _then(change: Callable[..., Any]) -> Callable[[Exercise], Function]:
    """A mistake that spoils the reference's result: `change(value, *args)`."""

    def make(exercise: Exercise) -> Function:
        def spoiled(*args: Any, **options: Any) -> Any:
            value = exercise.reference(*args, **options)
            if isinstance(value, tuple):
                return tuple(change(v, *args) for v in value)
            return change(value, *args)

        return spoiled

    return make


# --- the rules --------------------------------------------------------------------------------


def _all(answer: Answered, rule: Callable[[Any, Any, Case], bool]) -> bool:
    values = list(answer.values())
    return bool(values) and all(rule(*value) for value in values)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _returns_input(answer: Answered, name: str | None = None) -> bool:
    names = [name] if name else list(answer.cases[0])
    return any(
        _all(answer, lambda got, want, case, n=n: _is(got, case.get(n)) and not same(got, want))
        for n in names
    )


def _is(got: Any, given: Any) -> bool:
    got = _first(got)
    return isinstance(given, Tensor) and isinstance(got, Tensor) and same(got, given)


def _is_zero(got: Any, want: Any, case: Case) -> bool:
    return isinstance(_first(got), Tensor) and not _first(got).any() and bool(_first(want).any())


def _is_constant(answer: Answered) -> bool:
    """Two draws of numbers, same shapes: the results agree though the right ones differ."""
    half = len(answer.cases) // 2
    told = [
        same(answer.got[i].value, answer.got[i + half].value)
        for i in range(half)
        if answer.got[i].error is None
        and answer.got[i + half].error is None
        and isinstance(_first(answer.got[i].value), Tensor)
        and not same(answer.want[i], answer.want[i + half])
    ]
    return bool(told) and all(told)


def _is_hard_coded(answer: Answered) -> bool:
    """Right for some sizes; for the others an error or a wrong shape."""
    wrong = [
        g.error is not None or not _same_shape(g.value, w)
        for g, w, right in zip(answer.got, answer.want, answer.right, strict=True)
        if not right
    ]
    return any(answer.right) and bool(wrong) and all(wrong)


def _same_shape(a: Any, b: Any) -> bool:
    a, b = _first(a), _first(b)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape


def _mixes_batch(answer: Answered) -> bool:
    """Other numbers in the last batch element change the result of the first, or it is moved."""
    exercise = answer.exercise
    if not exercise.batched:
        return False
    case, other = exercise.cases_for(0)[-1], exercise.cases_for(1)[-1]
    mixed = {name: _with_last_from(case[name], other[name]) for name in case}
    before, after = (observe(exercise, answer.function, c) for c in (case, mixed))
    want = observe(exercise, exercise.reference, case).value
    if before.error or after.error or not _same_shape(before.value, want):
        return False
    a, b, right = _first(before.value), _first(after.value), _first(want)
    orders = [right.roll(s, 0) for s in range(1, len(right))] + [right.flip(0)]
    return not same(a[0], b[0]) or any(same(a, order) for order in orders if not same(order, right))


def _with_last_from(value: Any, other: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 3:
        return value
    return torch.cat([value[:-1], other[-1:]])


def _wrong_dtype(got: Any, want: Any, case: Case) -> bool:
    return _same_shape(got, want) and _first(got).dtype != _first(want).dtype


def _is_detached(answer: Answered) -> bool:
    if not all(answer.right):
        return False
    try:
        return gradients(answer.exercise, answer.function, answer.cases[0]) is None
    except NotWritten:
        raise
    except Exception:
        return False


# --- how to make them -------------------------------------------------------------------------


def _value_input(exercise: Exercise) -> Function | None:
    names = list(exercise.cases_for()[0])
    index = next((i for i, name in enumerate(names) if name in ("value", "values")), None)
    return None if index is None else lambda *args, **options: args[index].clone()


def _in_place(exercise: Exercise) -> Function:
    def spoiled(*args: Any, **options: Any) -> Any:
        value = exercise.reference(*args, **options)
        args[0].mul_(0.5)
        return value

    return spoiled


def _hard_coded(exercise: Exercise) -> Function:
    """Works for one size only, as `view(2, 3)` does."""
    size = exercise.reference(**exercise.cases_for()[0])
    shape = _first(size).shape
    return _then(lambda value, *args: value.reshape(shape) if value.ndim >= 0 else value)(exercise)


def _rolled(exercise: Exercise) -> Function | None:
    if not exercise.batched:
        return None
    rank = _first(exercise.reference(**exercise.cases_for()[-1])).ndim
    return _then(lambda value, *args: value.roll(1, 0) if value.ndim >= rank else value)(exercise)


UNIVERSAL = [
    Universal(
        "None", "Your function returned None.", "Is there a `return` on every path?",
        lambda exercise: lambda *args, **options: None,
        lambda answer: _all(answer, lambda got, want, case: got is None),
    ),
    Universal(
        "input changed in place",
        "Your function overwrites one of its inputs: whoever passed it in loses their numbers.",
        "Which operation with a trailing underscore, `+=` or `x[...] =` writes into an argument?",
        _in_place,
        lambda answer: any(g.changed for g in answer.got),
    ),
    Universal(
        "wrong dtype", "The numbers come back in another dtype than they went in.",
        "Where does a `.float()`, `.double()` or a freshly made tensor set the dtype?",
        _then(lambda v, *args: v.double() if v.dtype == torch.float32 else v.float()),
        lambda answer: _all(answer, _wrong_dtype),
    ),
    Universal(
        "zeros", "Your result is 0 everywhere.", "Where do the inputs enter the result?",
        _then(lambda value, *args: torch.zeros_like(value)),
        lambda answer: _all(answer, _is_zero),
    ),
    Universal(
        "the value input", "You return the values as they came in: no query has looked at them.",
        "Which weights should the values be averaged with?",
        _value_input,
        lambda answer: any(n in answer.cases[0] for n in ("value", "values"))
        and any(_returns_input(answer, n) for n in ("value", "values")),
    ),
    Universal(
        "the identity", "You return an input as it came in.", "What should happen to it?",
        lambda exercise: lambda *args, **options: args[0].clone(),
        _returns_input,
    ),
    Universal(
        "a constant", "Your result is the same for different inputs.",
        "Where do the inputs enter the result?",
        _then(lambda value, *args: torch.full_like(value, 0.25)),
        _is_constant,
    ),
    Universal(
        "shape hard-coded", "It is right for one size and fails for others.",
        "Is a length or width written as a number, or a dimension counted from the wrong end?",
        _hard_coded,
        _is_hard_coded,
    ),
    Universal(
        "batch mixed up", "The result of one batch element depends on another one.",
        "Along which dimension does each operation work, counted from the end?",
        _rolled,
        _mixes_batch,
    ),
    Universal(
        "detached gradient", "The numbers are right, but no gradient flows back to the inputs.",
        "Is there a `.detach()`, `.data`, `.item()` or `torch.tensor(...)` on the way?",
        _then(lambda value, *args: value.detach()),
        _is_detached,
    ),
]  # fmt: skip
