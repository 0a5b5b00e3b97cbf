"""Mistakes that can be made in any exercise, each found by a rule and not by comparison.

`make` builds one from the reference, to test the graders with; `found` recognises it, and its
unseen cousins, in an answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .answered import Answered, cast, lost_gradient
from .exercise import Case, Exercise, Function
from .observe import Observation, gradients, observe, same
from .show import shapes


@dataclass(frozen=True)
class Universal:
    """A mistake of any exercise. `make` gives None where it makes no sense for that one.

    shown: whether the first case that went wrong is worth showing beside the cause.
    """

    name: str
    cause: str
    ask: str
    make: Callable[[Exercise], Function | None]
    found: Callable[[Answered], bool]
    shown: bool = False


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
    return bool(answer.values) and all(rule(*value) for value in answer.values)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _same_shape(a: Any, b: Any) -> bool:
    a, b = _first(a), _first(b)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape


def _is_none(answer: Answered) -> bool:
    wrong = [answer.got[i] for i in answer.wrong]
    return bool(wrong) and all(g.error is None and g.value is None for g in wrong)


def _returns_input(answer: Answered, names: tuple[str, ...] = ()) -> bool:
    def is_input(got: Any, want: Any, case: Case, name: str) -> bool:
        got, given = _first(got), case.get(name)
        return isinstance(given, Tensor) and isinstance(got, Tensor) and same(got, given)

    names = names or tuple(answer.cases[0])
    return bool(answer.wrong) and any(
        _all(answer, functools.partial(is_input, name=name)) for name in names
    )


def _is_zero(answer: Answered) -> bool:
    """0 in every case, though the right result is not."""
    zero = _all(answer, lambda got, *_: isinstance(_first(got), Tensor) and not _first(got).any())
    return zero and any(bool(_first(want).any()) for want in answer.want)


def _is_constant(answer: Answered) -> bool:
    """Two draws of numbers, same shapes: the results agree though the right ones differ."""
    half = len(answer.cases) // 2
    told = [
        same(a.value, b.value)
        for a, b, i in zip(answer.got, answer.got[half:], range(half), strict=False)
        if isinstance(_first(a.value), Tensor)
        and isinstance(_first(b.value), Tensor)
        and not same(answer.want[i], answer.want[i + half])
    ]
    return bool(told) and all(told)


def _varies(answer: Answered) -> bool:
    """The same inputs again, with other random numbers, give something else."""
    again = observe(answer.exercise, answer.function, answer.cases[0], seed=1)
    first = answer.got[0]
    if first.error is not None or again.error is not None:
        return (first.error is None) != (again.error is None)
    return isinstance(_first(first.value), Tensor) and not same(first.value, again.value)


def _is_squeezed(answer: Answered) -> bool:
    """Right but for dimensions of size 1 that have been dropped or added."""

    def flat(got: Any, want: Any) -> bool:
        got, want = _first(got), _first(want)
        return isinstance(got, Tensor) and same(got.squeeze(), want.squeeze())

    wrong = [(answer.got[i].value, answer.want[i]) for i in answer.wrong]
    return bool(wrong) and all(flat(*pair) and not _same_shape(*pair) for pair in wrong)


def _is_hard_coded(answer: Answered) -> bool:
    """Right for some sizes; for others, given the same arguments, an error or a wrong shape.

    Where it is right and wrong for the same sizes, the values are to blame.
    """
    wrong, given = answer.wrong, [frozenset(case) for case in answer.cases]
    right = [i for i, right in enumerate(answer.right) if right]
    if {shapes(answer.cases[i]) for i in right} & {shapes(answer.cases[i]) for i in wrong}:
        return False
    return any(given[i] in {given[j] for j in right} for i in wrong) and all(
        _fails_by_shape(answer.got[i], answer.want[i]) for i in wrong
    )


def _fails_by_shape(got: Observation, want: Any) -> bool:
    if got.error is not None:
        return isinstance(got.error, RuntimeError | IndexError | ValueError | AssertionError)
    return isinstance(_first(got.value), Tensor) and not _same_shape(got.value, want)


def _mixes_batch(answer: Answered) -> bool:
    """Other numbers in one batch element change the result of another, or results are moved.

    Only where an answer is right for a single element is its batch to blame.
    """
    if not answer.exercise.batched or any(_is_single(answer.cases[i]) for i in answer.wrong):
        return False
    last = len(answer.cases) // 2 - 1
    case, other = answer.cases[last], answer.cases[-1]
    got, want = _first(answer.got[last].value), _first(answer.want[last])
    if not _same_shape(got, want):
        return False
    for changed, kept in ((-1, 0), (0, -1)):
        mixed = {name: _with_element(case[name], other[name], changed) for name in case}
        now = _first(observe(answer.exercise, answer.function, mixed).value)
        if not _same_shape(now, want) or not same(now[kept], got[kept]):
            return True
    return any(same(got, order) for order in _moved(want) if not same(order, want))


def _is_single(case: Case) -> bool:
    """Has the case no batch, or one of a single element?"""
    first = next(value for value in case.values() if isinstance(value, Tensor))
    return first.ndim < 3 or first.shape[0] == 1


def _with_element(value: Any, other: Any, index: int) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 3:
        return value
    mixed = value.clone()
    mixed[index] = other[index]
    return mixed


def _moved(value: Tensor) -> list[Tensor]:
    return [value.roll(shift, 0) for shift in range(1, len(value))] + [value.flip(0)]


def _changes_dtype(answer: Answered) -> bool:
    """Numbers about right, but not in the dtype they should have, for float32 or for float64."""
    if not all(same(got, want, 1e-2, 1e-2) for got, want, _ in answer.values):
        return False
    if len(answer.values) < len(answer.cases):
        return False
    for dtype in (torch.float32, torch.float64):
        case = cast(answer.cases[0], dtype)
        functions = (answer.function, answer.exercise.reference)
        got, want = (_first(observe(answer.exercise, f, case).value) for f in functions)
        if isinstance(got, Tensor) and got.dtype != want.dtype:
            return True
    return False


def _overwrites_saved(answer: Answered) -> bool:
    """The gradient needs a tensor that has been changed in place since."""
    cases = answer.cases if all(answer.right) else []
    seen = (gradients(answer.exercise, answer.function, case) for case in cases)
    return any("inplace operation" in str(s.error) for s in seen)


def _loses_gradient(answer: Answered) -> bool:
    if not all(answer.right):
        return False
    lost = lost_gradient(answer)
    if lost is None or lost[1] is None:
        return False
    case, name, _ = lost
    functions = (answer.function, answer.exercise.reference)
    got, want = (gradients(answer.exercise, f, case).value for f in functions)
    return name not in got or bool(want[name].any())  # else there is one too many, not too few


# --- how to make them -------------------------------------------------------------------------


def _value_input(exercise: Exercise) -> Function | None:
    names = list(exercise.cases_for()[0])
    index = next((i for i, name in enumerate(names) if name in VALUES), None)
    return None if index is None else lambda *args, **options: args[index].clone()


def _in_place(exercise: Exercise) -> Function:
    def spoiled(*args: Any, **options: Any) -> Any:
        value = exercise.reference(*args, **options)
        given = args[0]
        given.copy_(given * 0.5 if given.is_floating_point() else given == 0)
        return value

    return spoiled


def _hard_coded(exercise: Exercise) -> Function:
    """Works for one size only, as `view(2, 3)` does."""
    shape = _first(exercise.reference(**exercise.cases_for()[0])).shape

    def spoiled(*args: Any, **options: Any) -> Any:
        value = exercise.reference(*args, **options)
        first = _first(value).reshape(shape)
        return (first, *value[1:]) if isinstance(value, tuple) else first

    return spoiled


def _rolled(exercise: Exercise) -> Function | None:
    if not exercise.batched:
        return None
    rank = _first(exercise.reference(**exercise.cases_for()[-1])).ndim
    return _then(lambda value, *args: value.roll(1, 0) if value.ndim >= rank else value)(exercise)


def _if_differentiable(make: Callable[[Exercise], Function]) -> Callable[[Exercise], Any]:
    """A mistake with the gradient: none where a right result has no gradient, as a mask has."""

    def make_or_not(exercise: Exercise) -> Function | None:
        found = gradients(exercise, exercise.reference, exercise.cases_for()[0])
        return make(exercise) if found.value else None

    return make_or_not


def _if_shaped(make: Callable[[Exercise], Function]) -> Callable[[Exercise], Any]:
    """A mistake with the shape: none where inputs of any size give one shape, as a loss does."""

    def make_or_not(exercise: Exercise) -> Function | None:
        cases = exercise.cases_for()
        given = {next(iter(case.values())).shape for case in cases}
        results = {_first(exercise.reference(**case)).shape for case in cases}
        return make(exercise) if len(results) > 1 or len(given) == 1 else None

    return make_or_not


def _saved_then_changed(value: Tensor, *args: Any) -> Tensor:
    one = torch.ones_like(value)
    value = value * one
    one.add_(0)  # the product saved it for its gradient
    return value


VALUES = ("value", "values")
WHERE = "Where do the inputs enter the result?"

UNIVERSAL = [
    Universal(
        "None", "Your function returned None.", "Is there a `return` on every path?",
        lambda exercise: lambda *args, **options: None, _is_none,
    ),
    Universal(
        "input changed in place",
        "Your function overwrites one of its inputs: whoever passed it in loses their numbers.",
        "Which operation with a trailing underscore, `+=` or `x[...] =` writes into an argument?",
        _in_place,
        lambda answer: any(g.changed for g in answer.got),
    ),
    Universal(
        "another result each time",
        "Called again with the same inputs, your function gives something else.",
        "Is there something random (dropout, rand), or something kept from one call to the next?",
        _then(lambda value, *args: value + 0.1 * torch.rand(())),
        _varies,
    ),
    Universal(
        "wrong dtype", "The numbers come back in another dtype than they went in.",
        "Where does a `.float()`, `.double()` or a freshly made tensor set the dtype?",
        _then(lambda v, *args: v.double() if v.dtype == torch.float32 else v.float()),
        _changes_dtype,
    ),
    Universal(
        "zeros", "Your result is 0 everywhere.", WHERE,
        _then(lambda value, *args: torch.zeros_like(value)),
        _is_zero,
    ),
    Universal(
        "the value input", "You return the values as they came in: no query has looked at them.",
        "Which weights should the values be averaged with?",
        _value_input, lambda answer: _returns_input(answer, VALUES),
    ),
    Universal(
        "the identity", "You return an input as it came in.", "What should happen to it?",
        lambda exercise: lambda *args, **options: args[0].clone(), _returns_input,
    ),
    Universal(
        "a constant", "Your result is the same for different inputs.", WHERE,
        _then(lambda v, *args: torch.full_like(v, 0.25 if v.is_floating_point() else 1)),
        _is_constant,
    ),
    Universal(
        "dimensions of size 1 dropped or added", "The numbers are right, the shape is not.",
        "Is there a `squeeze`, an `unsqueeze` or a `keepdim` too many?",
        _if_shaped(_then(lambda value, *args: value.squeeze())), _is_squeezed, shown=True,
    ),
    Universal(
        "shape hard-coded", "It is right for other sizes.",
        "Is a length or width written as a number, or a dimension not counted from the end?",
        _if_shaped(_hard_coded), _is_hard_coded, shown=True,
    ),
    Universal(
        "batch mixed up", "The result of one batch element depends on another one.",
        "Along which dimension does each operation work, counted from the end?",
        _rolled, _mixes_batch,
    ),
    Universal(
        "a tensor that the gradient needs, overwritten",
        "The numbers are right, but PyTorch cannot compute the gradient: a tensor that it needs "
        "for that has been overwritten.",
        "Which `x[...] =`, `+=` or operation with a trailing underscore could make a new tensor?",
        _if_differentiable(_then(_saved_then_changed)), _overwrites_saved,
    ),
    Universal(
        "detached gradient", "Something on the way cuts it off.",
        "Is there a `.detach()`, `.data`, `.item()`, `float(...)` or numpy on the way?",
        _if_differentiable(_then(lambda value, *args: value.detach())), _loses_gradient, shown=True,
    ),
]  # fmt: skip
