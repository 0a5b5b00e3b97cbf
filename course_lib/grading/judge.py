"""Judging an answer: which behaviours hold, and which known mistake it is where one does not."""

from __future__ import annotations

import functools
import inspect
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .exercise import Case, Exercise, Function, Mistake
from .observe import Broken, NotWritten, Observation, expect, gradients, observe, same, silence
from .show import counterexample, shapes, shorten, verdict_bundle
from .universal import Answered, answered, diagnose

PLAIN = "gives the right numbers"
SIZES = "gives the right numbers for every size"
DTYPE = "keeps the dtype of its input"
INPUTS = "leaves its inputs as they were"
GRADIENT = "lets the gradient through to its inputs"


@dataclass(frozen=True)
class Verdict:
    """What `check` says: `lines` is the message; `broken` are the behaviours that do not hold.

    mistake: the name of the recognised mistake, or None. blank: nothing was written yet.
    """

    exercise: str
    passed: bool
    points: float
    max_points: int
    lines: tuple[str, ...]
    broken: tuple[str, ...] = ()
    mistake: str | None = None
    blank: bool = False

    def __str__(self) -> str:
        return "\n".join(self.lines)

    __repr__ = __str__

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return verdict_bundle(self)


def judge(exercise: Exercise, function: Function) -> Verdict:
    """Run every behaviour; on failure say which broke and, where it is a known one, the mistake."""
    if not callable(function):
        raise TypeError(
            f'check("{exercise.id}", {exercise.function}) takes the function itself, got '
            f"{type(function).__name__}: {shorten(function)}"
        )
    blank = functools.partial(Verdict, exercise.id, False, 0.0, exercise.points)
    try:
        failures = _run_behaviours(Answer(exercise, function))
    except NotWritten:
        return blank((f"✗ {exercise.id}: not written yet.",), blank=True)
    total = len(exercise.behaviours) + len(SHARED)
    if not failures:
        points = f"{exercise.points} point" + "s" * (exercise.points != 1)
        line = f"✓ {exercise.id}: all {total} behaviours hold ({points})."
        return Verdict(exercise.id, True, float(exercise.points), exercise.points, (line,))
    # A right result on plain input earns its share; numbers that are wrong there earn nothing.
    share = 0.0 if PLAIN in failures else (total - len(failures)) / total
    name, lines = _explain(exercise, function, failures)
    return Verdict(
        exercise.id, False, round(exercise.points * share, 2), exercise.points, tuple(lines),
        tuple(failures), name,
    )  # fmt: skip


class Answer:
    """A learner's function as behaviours call it: `answer(scores)`, structure checked each time."""

    def __init__(self, exercise: Exercise, function: Function):
        self.exercise, self.function = exercise, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        bound = inspect.signature(self.exercise.reference).bind(*args, **options)
        return self.on(dict(bound.arguments))

    def on(self, case: Case) -> Any:
        """The answer's value on the case; `Broken` where its structure is not the reference's."""
        seen = observe(self.exercise, self.function, case)
        if seen.error is not None:
            raise Broken(own_line(self.function, seen.error), case=case) from seen.error
        want = observe(self.exercise, self.exercise.reference, case).value
        _check_structure(seen.value, want, case)
        # A wrong dtype breaks one behaviour, `DTYPE`, and not all the others as well.
        if isinstance(want, tuple):
            return tuple(v.to(w.dtype) for v, w in zip(seen.value, want, strict=True))
        return seen.value.to(want.dtype)


def _check_structure(value: Any, want: Any, case: Case) -> None:
    if value is None:
        raise Broken("your function returned None: is there a `return`?", case=case)
    wants = want if isinstance(want, tuple) else (want,)
    values = value if isinstance(value, tuple) and isinstance(want, tuple) else (value,)
    wanted = "a tensor" if len(wants) == 1 else f"a tuple of {len(wants)} tensors"
    if len(values) != len(wants) or not all(isinstance(v, Tensor) for v in values):
        raise Broken(f"it should return {wanted}, got {_kind(value)}", case=case)
    for got, right in zip(values, wants, strict=True):
        if got.shape != right.shape:
            sizes = f"shape {tuple(right.shape)}, got {tuple(got.shape)}"
            raise Broken(f"{shapes(case)} should give {sizes}", case=case)


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"


# --- the behaviours every exercise has --------------------------------------------------------


def _run_behaviours(answer: Answer) -> dict[str, Broken]:
    """{sentence: why} of those that fail; the exercise's own sentences come first."""
    failures: dict[str, Broken] = {}
    own = [(b.sentence, b.test) for b in answer.exercise.behaviours]
    for sentence, test in [*own, *SHARED.items()]:
        try:
            test(answer)
        except Broken as broken:
            failures[sentence] = broken
    return failures


def _plain(answer: Answer) -> None:
    _compare(answer, answer.exercise.cases_for()[0])


def _sizes(answer: Answer) -> None:
    for seed in (0, 1):
        for case in answer.exercise.cases_for(seed):
            _compare(answer, case)


def _compare(answer: Answer, case: Case) -> None:
    want = observe(answer.exercise, answer.exercise.reference, case).value
    expect(answer.on(case), want, case=case)


def _dtype(answer: Answer) -> None:
    for dtype in (torch.float32, torch.float64):
        case = {n: _cast(v, dtype) for n, v in answer.exercise.cases_for()[0].items()}
        answer.on(case)  # for its structure
        got = observe(answer.exercise, answer.function, case).value
        for tensor in got if isinstance(got, tuple) else (got,):
            if tensor.dtype != dtype:
                raise Broken(f"{dtype} in should give {dtype} out, got {tensor.dtype}", case=case)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _inputs(answer: Answer) -> None:
    for case in answer.exercise.cases_for():
        seen = observe(answer.exercise, answer.function, case)
        if seen.changed:
            raise Broken(f"it changes its input `{seen.changed[0]}` in place", case=case)


def _gradient(answer: Answer) -> None:
    case = answer.exercise.cases_for()[0]
    want = gradients(answer.exercise, answer.exercise.reference, case)
    try:
        with silence():
            got = gradients(answer.exercise, answer.function, case)
    except NotImplementedError:
        raise NotWritten from None
    except Exception as error:
        raise Broken(own_line(answer.function, error), case=case) from error
    if got is None:
        raise Broken("the result is cut off from its inputs: no gradient flows back", case=case)
    names = [n for n, v in case.items() if isinstance(v, Tensor) and v.is_floating_point()]
    for name, a, b in zip(names, got, want or [], strict=True):
        zero = torch.zeros_like(case[name])
        if not same(zero if a is None else a, zero if b is None else b, rtol=1e-3):
            raise Broken(f"the gradient by `{name}` is not what it should be", case=case)


SHARED = {PLAIN: _plain, SIZES: _sizes, DTYPE: _dtype, INPUTS: _inputs, GRADIENT: _gradient}


# --- saying what is wrong ---------------------------------------------------------------------


def _explain(
    exercise: Exercise, function: Function, failures: dict[str, Broken]
) -> tuple[str | None, list[str]]:
    """(name of the mistake or None, one to three lines)."""
    sentence, broken = next(iter(failures.items()))
    head = f"✗ {exercise.id}: “{sentence}” does not hold."
    seen = answered(exercise, function)
    crash = next((b for b in failures.values() if b.__cause__ is not None), None)
    if crash is not None and not any(seen.right):
        head = f"✗ {exercise.id}: your code raised {crash.message}"
    mistake = recognise(seen)
    if mistake is not None:
        return mistake.name, [head, f"Your result equals {mistake.name}. {mistake.cause}", mistake.ask]  # fmt: skip
    shared = diagnose(seen)
    if shared is not None:
        return shared.name, [head, shared.cause, shared.ask]
    if crash is not None:
        lines = [f"✗ {exercise.id}: your code raised {crash.message}"]
        return None, [*lines, f"It was called with {shapes(crash.case or {})}."]
    return None, [head, *counterexample(_smallest(seen) or broken)]


def recognise(seen: Answered) -> Mistake | None:
    """The exercise's own mistake that the answer is, wherever it is wrong.

    It must agree with the answer on every case that the answer gets wrong, with a value at least
    once; of several, the one that agrees on most cases.
    """
    wrong = [i for i, right in enumerate(seen.right) if not right]
    best, most = None, 0
    for mistake, observed in _mistakes_observed(seen.exercise.id):
        agree = [_agree(a, b) for a, b in zip(seen.got, observed, strict=True)]
        valued = any(seen.got[i].error is None for i in wrong)
        if valued and all(agree[i] for i in wrong) and sum(agree) > most:
            best, most = mistake, sum(agree)
    return best


def _agree(a: Observation, b: Observation) -> bool:
    if a.error is not None or b.error is not None:
        return a.error is not None and b.error is not None
    return same(a.value, b.value)


@functools.cache
def _mistakes_observed(id: str) -> list[tuple[Mistake, list[Observation]]]:
    from .exercise import find

    return [(m, answered(find(id), m.function).got) for m in find(id).mistakes]


def _smallest(seen: Answered) -> Broken | None:
    """The smallest case that the answer gets wrong, with got and want."""
    wrong = [
        Broken(case=c, got=g.value, want=w)
        for c, g, w, right in zip(seen.cases, seen.got, seen.want, seen.right, strict=True)
        if not right and g.error is None
    ]
    return min(wrong, key=lambda b: _numbers(b.case), default=None)


def _numbers(case: Case | None) -> int:
    return sum(v.numel() for v in (case or {}).values() if isinstance(v, Tensor))


def own_line(function: Function, error: BaseException) -> str:
    """ "ValueError: … (line 3: `return x`)": the last line of the learner's own code."""
    libraries = (sysconfig.get_paths()["stdlib"], str(Path(torch.__file__).parent), str(Path(__file__).parent))  # fmt: skip
    home = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == home or not frame.filename.startswith(libraries)
    ]
    message = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {message[0]}" if message else type(error).__name__
    return said + (f" (line {frames[-1].lineno}: `{frames[-1].line}`)" if frames else "")
