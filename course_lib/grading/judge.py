"""Judging an answer: which behaviours hold, and which known mistake it is where one does not."""

from __future__ import annotations

import functools
import re
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .answered import Answered, answered, cast, lost_gradient
from .exercise import NOT_WRITTEN, Case, Exercise, Function, Mistake, NotAFunctionError
from .observe import Broken, Observation, neutral, observe, same
from .show import counterexample, shapes, shorten, verdict_bundle
from .universal import diagnose

PLAIN = "gives the right numbers"
SIZES = "gives the right numbers for every size"
DTYPE = "has the right dtype"
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
        raise NotAFunctionError(
            f'check("{exercise.id}", {exercise.function}) takes the function itself, got '
            f"{type(function).__name__}: {shorten(function)}"
        )
    with neutral():
        seen = answered(exercise, function)
        if all(observation.blank for observation in seen.got):
            line = f"✗ {exercise.id}: {NOT_WRITTEN}; your answer goes where the `raise` stands."
            return Verdict(exercise.id, False, 0.0, exercise.points, (line,), blank=True)
        failures = _run_behaviours(seen)
        if failures:
            return _failed(seen, failures)
    points = f"{exercise.points} point" + "s" * (exercise.points != 1)
    line = f"✓ {exercise.id}: all {_total(exercise)} behaviours hold ({points})."
    return Verdict(exercise.id, True, float(exercise.points), exercise.points, (line,))


def _total(exercise: Exercise) -> int:
    return len(exercise.behaviours) + len(SHARED)


def _failed(seen: Answered, failures: dict[str, Broken]) -> Verdict:
    exercise, total = seen.exercise, _total(seen.exercise)
    # A right result on plain input earns its share; numbers that are wrong there earn nothing.
    share = 0.0 if PLAIN in failures else (total - len(failures)) / total
    name, lines = _explain(seen, failures)
    return Verdict(
        exercise.id, False, round(exercise.points * share, 2), exercise.points, tuple(lines),
        tuple(failures), name,
    )  # fmt: skip


# --- one call ---------------------------------------------------------------------------------


class Answer:
    """A learner's function as behaviours call it: `answer(scores)`, structure checked each time."""

    def __init__(self, exercise: Exercise, function: Function):
        self.exercise, self.function = exercise, function

    def __call__(self, *args: Any, **options: Any) -> Any:
        named = zip(self.exercise.parameters, args, strict=False)
        return self.on({**dict(named), **options})

    def on(self, case: Case) -> Any:
        """The answer's value on the case; `Broken` where it has not the reference's structure."""
        want = observe(self.exercise, self.exercise.reference, case).value
        value = _structured(self.function, observe(self.exercise, self.function, case), want, case)
        # A wrong dtype breaks one behaviour, `DTYPE`, and not all the others as well.
        if isinstance(want, tuple):
            return tuple(v.to(w.dtype) for v, w in zip(value, want, strict=True))
        return value.to(want.dtype)


def _structured(function: Function, seen: Observation, want: Any, case: Case) -> Any:
    """The observed value, if it has the structure of `want`; otherwise `Broken` says what it is."""
    if seen.error is not None:
        raise Broken(own_line(function, seen.error), case=case, crash=True) from seen.error
    value = seen.value
    values = value if isinstance(value, tuple) and isinstance(want, tuple) else (value,)
    wants = want if isinstance(want, tuple) else (want,)
    if len(values) != len(wants) or not all(isinstance(v, Tensor) for v in values):
        raise Broken(f"got {_kind(value)}, want {_kind(want)}", case=case)
    if [v.shape for v in values] != [w.shape for w in wants]:
        got, right = (", ".join(str(tuple(v.shape)) for v in vs) for vs in (values, wants))
        raise Broken(f"got shape {got}, want {right}", case=case)
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "None (is there a `return` on every path?)"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, Tensor):
        return "a tensor"
    module, name = type(value).__module__, type(value).__name__
    return name if module == "builtins" else f"{module}.{name}"


def own_line(function: Function | None, error: BaseException) -> str:
    """ "ValueError: … (line 3: `return x`)": the last line of the learner's own code."""
    home = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [
        (frame.lineno, frame.line)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == home or not frame.filename.startswith(_not_theirs())
    ]
    text = str(error)
    if isinstance(error, SyntaxError):
        text, frames = error.msg, [(error.lineno, error.text)] if error.text else []
    first = re.sub(r" at 0x[0-9a-f]+", "", text.strip().partition("\n")[0])
    said = _cut(f"{type(error).__name__}: {first}".removesuffix(": "), 160)
    return said + (f" (line {frames[-1][0]}: `{_cut(frames[-1][1] or '', 100)}`)" if frames else "")


def _cut(text: str, most: int) -> str:
    text = text.strip()
    return text if len(text) <= most else text[: most - 1] + "…"


@functools.cache
def _not_theirs() -> tuple[str, ...]:
    """Where code stands that no learner has written."""
    libraries = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    return (*libraries, str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen")


# --- the behaviours every exercise has --------------------------------------------------------


def _run_behaviours(seen: Answered) -> dict[str, Broken]:
    """{sentence: why} of those that fail; the exercise's own sentences come first."""
    failures: dict[str, Broken] = {}
    answer = Answer(seen.exercise, seen.function)
    tests: list[tuple[str, Callable[[Any], None], Any]] = [
        *((b.sentence, b.test, answer) for b in seen.exercise.behaviours),
        *((sentence, test, seen) for sentence, test in SHARED.items()),
    ]
    for sentence, test, subject in tests:
        try:
            test(subject)
        except Broken as broken:
            failures[sentence] = broken
    return failures


def _right_on(seen: Answered, numbers: list[int]) -> None:
    for i in numbers:
        if not seen.right[i]:
            case, want = seen.cases[i], seen.want[i]
            value = _structured(seen.function, seen.got[i], want, case)
            raise Broken(case=case, got=value, want=want)


def _plain(seen: Answered) -> None:
    _right_on(seen, [0, len(seen.cases) // 2])


def _sizes(seen: Answered) -> None:
    _right_on(seen, seen.wrong)


def _dtype(seen: Answered) -> None:
    for dtype in (torch.float32, torch.float64):
        case = cast(seen.cases[0], dtype)
        want = observe(seen.exercise, seen.exercise.reference, case).value
        observation = observe(seen.exercise, seen.function, case)
        value = _structured(seen.function, observation, want, case)
        pairs = zip(value, want, strict=True) if isinstance(want, tuple) else [(value, want)]
        for got, right in pairs:
            if got.dtype != right.dtype:
                kinds = [str(k).removeprefix("torch.") for k in (dtype, right.dtype, got.dtype)]
                raise Broken("{} in should give {} out, got {}".format(*kinds))


def _inputs(seen: Answered) -> None:
    for case, observation in zip(seen.cases, seen.got, strict=True):
        if observation.changed:
            raise Broken(f"`{observation.changed[0]}` is changed in place", case=case)


def _gradient(seen: Answered) -> None:
    lost = lost_gradient(seen)
    if lost is None:
        return
    case, name, error = lost
    if error is not None:
        raise Broken(own_line(seen.function, error), case=case, crash=True) from error
    raise Broken(f"the gradient by `{name}` is not what it should be", case=case)


SHARED = {PLAIN: _plain, SIZES: _sizes, DTYPE: _dtype, INPUTS: _inputs, GRADIENT: _gradient}


# --- saying what is wrong ---------------------------------------------------------------------


def _explain(seen: Answered, failures: dict[str, Broken]) -> tuple[str | None, list[str]]:
    """(name of the mistake or None, one to three lines)."""
    sentence, broken = next(iter(failures.items()))
    head = f"✗ {seen.exercise.id}: “{sentence}” does not hold."
    if broken.case is None and SIZES in failures:  # a case to show
        sentence, broken = (PLAIN if PLAIN in failures else SIZES), failures[SIZES]
    evidence = counterexample(broken)
    if broken.crash:
        head = f"✗ {seen.exercise.id}: your code raised {broken.message}"
        evidence = [f"It was called with {shapes(broken.case)}."] if broken.case else []
    recognised = recognise(seen)
    if recognised is not None:
        mistake, where = recognised
        equals = f"Your result equals {mistake.name}. {mistake.cause}"
        if where is not None:
            equals = f"For {shapes(where)} your result equals {mistake.name}."
        elif broken.crash:
            equals = f"Elsewhere your result equals {mistake.name}. {mistake.cause}"
        return mistake.name, [head, equals, mistake.ask]
    universal = diagnose(seen)
    if universal is not None:
        shown = evidence[:1] if universal.shown else []
        return universal.name, [head, " ".join([*shown, universal.cause]), universal.ask]
    if not broken.crash:  # what is shown must be of what is said
        head = f"✗ {seen.exercise.id}: “{sentence}” does not hold."
    return None, [head, *evidence]


def recognise(seen: Answered) -> tuple[Mistake, Case | None] | None:
    """The exercise's own mistake that the answer is wherever it is wrong.

    It must agree with the answer on every case that the answer gets wrong, with a value at least
    once; of several, the one that agrees on most cases. Beside it None where the two always agree,
    or else a case to show where they do: one that tells, for NaN and 0 come about in many ways.
    If none does, one that agrees on all ordinary cases is named for those: the first of several
    mistakes to mend.
    """
    telling = [i for i in seen.wrong if _tells(seen.got[i].value, seen.want[i])]
    valued = any(seen.got[i].error is None for i in seen.wrong)
    best, most = _closest(seen, seen.wrong)
    if best is not None and valued and most == len(seen.cases):
        return best, None
    if best is not None and valued and telling:
        return best, seen.cases[telling[0]]
    # Two mistakes at once: on ordinary input, without options, one of them may show alone.
    ordinary = [i for i in telling if seen.cases[i].keys() == seen.cases[0].keys()]
    if len(ordinary) < 4 or any(seen.got[i].error is not None for i in seen.wrong):
        return None
    best, _ = _closest(seen, ordinary)
    return None if best is None else (best, seen.cases[ordinary[0]])


def _closest(seen: Answered, cases: list[int]) -> tuple[Mistake | None, int]:
    """The mistake that agrees on all these cases and on most others; on how many it does."""
    best, most = None, 0
    for mistake in seen.exercise.mistakes:
        agrees = functools.partial(_agrees, seen, mistake)
        count = sum(map(agrees, range(len(seen.cases)))) if all(map(agrees, cases)) else 0
        if count > most:
            best, most = mistake, count
    return best, most


def _tells(got: Any, want: Any) -> bool:
    """Is a wrong number neither 0 nor NaN nor infinite?"""
    if isinstance(got, tuple) and isinstance(want, tuple):
        return any(_tells(g, w) for g, w in zip(got, want, strict=False))
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return False
    if got.shape != want.shape:
        return True
    wrong = got.isfinite() & (got != 0) & ~torch.isclose(got.double(), want.double(), 1e-4, 1e-5)
    return bool(wrong.any())


def _agrees(seen: Answered, mistake: Mistake, i: int) -> bool:
    """Does the answer do on case i what the mistake does?"""
    if (mistake, i) not in _OBSERVED:
        _OBSERVED[mistake, i] = observe(seen.exercise, mistake.function, seen.cases[i])
    a, b = seen.got[i], _OBSERVED[mistake, i]
    if a.error is not None or b.error is not None:
        return a.error is not None and b.error is not None
    return same(a.value, b.value)


_OBSERVED: dict[tuple[Mistake, int], Observation] = {}
"""What known mistakes give on the cases; filled as it is needed."""
