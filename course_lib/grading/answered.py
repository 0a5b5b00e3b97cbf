"""An answer beside the reference: both observed on the exercise's cases."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exercise import Case, Exercise, Function
from .observe import Observation, gradients, observe, same


@dataclass(frozen=True)
class Answered:
    """An answer and the reference, observed on the same cases."""

    exercise: Exercise
    function: Function
    cases: list[Case]
    got: list[Observation]
    want: list[Any]

    @functools.cached_property
    def right(self) -> list[bool]:
        """For each case: is the value the reference's?"""
        pairs = zip(self.got, self.want, strict=True)
        return [g.error is None and same(g.value, w) for g, w in pairs]

    @property
    def wrong(self) -> list[int]:
        """The numbers of the cases that are not right."""
        return [i for i, right in enumerate(self.right) if not right]

    @property
    def values(self) -> list[tuple[Any, Any, Case]]:
        """(got, want, case) where the answer gave a value."""
        triples = zip(self.got, self.want, self.cases, strict=True)
        return [(g.value, w, c) for g, w, c in triples if g.error is None]


def answered(exercise: Exercise, function: Function) -> Answered:
    """Observe the answer on every case, for two draws of their numbers."""
    cases, want = _expected(exercise)
    got = [observe(exercise, function, case) for case in cases]
    return Answered(exercise, function, cases, got, want)


@functools.cache
def _expected(exercise: Exercise) -> tuple[list[Case], list[Any]]:
    cases = [case for seed in (0, 1) for case in exercise.cases_for(seed)]
    return cases, [observe(exercise, exercise.reference, case).value for case in cases]


def lost_gradient(answer: Answered) -> tuple[Case, str | None, BaseException | None] | None:
    """(case, input, error) of the first gradient that is not the reference's."""
    for number, (case, want) in enumerate(_expected_gradients(answer.exercise)):
        if not want:
            continue  # a right result without a gradient has none to lose: numpy may be used
        got = gradients(answer.exercise, answer.function, case)
        if got.error is not None:
            return case, None, got.error
        if number and not all(g.isfinite().all() for g in got.value.values()):
            continue  # NaN where nothing is visible or nothing fits is not what is taught here
        for name, right in want.items():
            if name not in got.value or not same(got.value[name], right, rtol=1e-3):
                return case, name, None
    return None


@functools.cache
def _expected_gradients(exercise: Exercise) -> list[tuple[Case, dict[str, Tensor]]]:
    """(case, the reference's gradients) for those cases whose numbers are of ordinary size.

    Where numbers are extreme, two right ways to compute a gradient may differ by rounding.
    """
    tame = [case for case in exercise.cases_for(0) if _largest(case) <= 10]
    return [(case, gradients(exercise, exercise.reference, case).value) for case in tame]


def _largest(case: Case) -> float:
    numbers = [v.abs().max().item() for v in case.values() if _is_float(v) and v.numel()]
    return max(numbers, default=0.0)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The case with its floating-point inputs in another dtype."""
    return {n: v.to(dtype) if _is_float(v) else v for n, v in case.items()}
