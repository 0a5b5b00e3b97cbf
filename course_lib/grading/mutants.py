"""The graders graded: feed each check every blank, solution, alternative and mistake we know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .build import IMPORTS
from .exercise import Exercise, Function, all_exercises
from .judge import Verdict, judge
from .universal import UNIVERSAL

NAMED = 0.95
"""The share of mistakes that must be recognised by name."""

KINDS: dict[str, tuple[str, Callable[[Verdict], bool]]] = {
    "blanks": ("rejected", lambda verdict: verdict.blank),
    "solutions": ("accepted", lambda verdict: verdict.passed),
    "alternatives": ("accepted", lambda verdict: verdict.passed),
    "mistakes": ("rejected", lambda verdict: not verdict.passed),
}
"""What should become of each kind of answer, and when it has."""


@dataclass
class Count:
    """How many of a kind were tried, how many came out as they should, and what did not."""

    total: int = 0
    good: int = 0
    named: int = 0
    through: list[str] = field(default_factory=list)


def examine(exercise: Exercise) -> dict[str, Count]:
    """Judge everything we know about one exercise: a count for each kind."""
    counts = {kind: Count() for kind in KINDS}
    for kind, name, function in _known(exercise):
        verdict, count = judge(exercise, function), counts[kind]
        good, named = KINDS[kind][1](verdict), verdict.mistake == name
        count.total += 1
        count.good += good
        count.named += named
        if not good:
            count.through.append(f"{name}: {verdict.lines[0]}")
        elif kind == "mistakes" and not named:
            count.through.append(f"{name}: rejected, but recognised as {verdict.mistake}")
    return counts


def _known(exercise: Exercise) -> Iterator[tuple[str, str, Function]]:
    """(kind, name, function)"""
    yield "blanks", "the blank", _blank(exercise)
    yield "solutions", "the reference", exercise.reference
    for alternative in exercise.alternatives:
        yield "alternatives", alternative.name, alternative.function
    for mistake in exercise.mistakes:
        yield "mistakes", mistake.name, mistake.function
    for universal in UNIVERSAL:
        function = universal.make(exercise)
        if function is not None:
            yield "mistakes", universal.name, function


def _blank(exercise: Exercise) -> Function:
    """The learner's cell before anything is written, run."""
    namespace: dict[str, Any] = {}
    exec(IMPORTS, namespace)
    exec(compile(exercise.blank(), f"<{exercise.id}>", "exec"), namespace)
    return namespace[exercise.function]


def summary(exercises: list[Exercise]) -> dict[str, Any]:
    """The totals over the exercises and, per exercise, its counts and what got through."""
    reports = {exercise.id: examine(exercise) for exercise in exercises}
    totals: dict[str, Any] = {"exercises": len(reports)}
    for kind, (word, _) in KINDS.items():
        counts = [report[kind] for report in reports.values()]
        totals[kind] = {"total": sum(c.total for c in counts), word: sum(c.good for c in counts)}
    totals["mistakes"]["named"] = sum(report["mistakes"].named for report in reports.values())
    totals["per_exercise"] = {
        exercise.id: {
            "behaviours": len(exercise.behaviours),
            "alternatives": reports[exercise.id]["alternatives"].total,
            "mistakes": reports[exercise.id]["mistakes"].total,
            "named": reports[exercise.id]["mistakes"].named,
            "got_through": [line for c in reports[exercise.id].values() for line in c.through],
        }
        for exercise in exercises
    }
    return totals


def passes(totals: dict[str, Any]) -> bool:
    """The gate: all blanks and mistakes rejected, all right answers accepted, 95 % named."""
    mistakes = totals["mistakes"]
    missed = [k for k, (word, _) in KINDS.items() if totals[k][word] != totals[k]["total"]]
    return not missed and mistakes["named"] >= NAMED * mistakes["total"]


def examine_all() -> dict[str, Any]:
    """`summary` over every exercise of the course."""
    torch.set_num_threads(1)  # thousands of tiny products: threads would only wait for one another
    return summary(list(all_exercises().values()))
