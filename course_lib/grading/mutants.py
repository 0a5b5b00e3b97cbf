"""The graders graded: feed each check every blank, solution, alternative and mistake we know."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .exercise import Exercise, Function, all_exercises
from .judge import judge
from .universal import UNIVERSAL

NAMED = 0.95
"""The share of mistakes that must be recognised by name."""


@dataclass
class Count:
    """How many of a kind were tried, and how many came out as they should."""

    total: int = 0
    good: int = 0
    named: int = 0
    through: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The gate for one exercise: blanks, solutions, alternatives and mistakes."""

    exercise: str
    behaviours: int
    blanks: Count = field(default_factory=Count)
    solutions: Count = field(default_factory=Count)
    alternatives: Count = field(default_factory=Count)
    mistakes: Count = field(default_factory=Count)


def examine(exercise: Exercise) -> Report:
    """Judge everything we know about one exercise."""
    report = Report(exercise.id, len(exercise.behaviours))
    _try(report.blanks, exercise, "the blank", _blank(exercise), expect_blank=True)
    _try(report.solutions, exercise, "the reference", exercise.reference, right=True)
    for alternative in exercise.alternatives:
        _try(report.alternatives, exercise, alternative.name, alternative.function, right=True)
    for mistake in exercise.mistakes:
        _try(report.mistakes, exercise, mistake.name, mistake.function)
    for universal in UNIVERSAL:
        function = universal.make(exercise)
        if function is not None:
            _try(report.mistakes, exercise, universal.name, function)
    return report


def _try(
    count: Count,
    exercise: Exercise,
    name: str,
    function: Function,
    *,
    right: bool = False,
    expect_blank: bool = False,
) -> None:
    verdict = judge(exercise, function)
    count.total += 1
    good = verdict.passed if right else verdict.blank if expect_blank else not verdict.passed
    count.good += good
    count.named += verdict.mistake == name
    if not good:
        count.through.append(f"{name}: {verdict.lines[0]}")
    elif not right and not expect_blank and verdict.mistake != name:
        count.through.append(f"{name}: rejected, but recognised as {verdict.mistake}")


def _blank(exercise: Exercise) -> Function:
    """The learner's cell before anything is written, run."""
    namespace: dict[str, Any] = {"Tensor": Tensor, "math": math, "torch": torch}
    exec(compile(exercise.blank(), f"<{exercise.id}>", "exec"), namespace)
    return namespace[exercise.function]


def summary(reports: list[Report]) -> dict[str, Any]:
    """The totals over all exercises and, per exercise, what got through."""

    def total(kind: str, *names: tuple[str, str]) -> dict[str, int]:
        counts = [getattr(r, kind) for r in reports]
        return {key: sum(getattr(c, attribute) for c in counts) for key, attribute in names}

    return {
        "exercises": len(reports),
        "blanks": total("blanks", ("total", "total"), ("rejected", "good")),
        "solutions": total("solutions", ("total", "total"), ("accepted", "good")),
        "alternatives": total("alternatives", ("total", "total"), ("accepted", "good")),
        "mistakes": total("mistakes", ("total", "total"), ("rejected", "good"), ("named", "named")),
        "per_exercise": {
            r.exercise: {
                "behaviours": r.behaviours,
                "alternatives": r.alternatives.total,
                "mistakes": r.mistakes.total,
                "named": r.mistakes.named,
                "got_through": [
                    *r.blanks.through, *r.solutions.through,
                    *r.alternatives.through, *r.mistakes.through,
                ],
            }
            for r in reports
        },
    }  # fmt: skip


def passes(totals: dict[str, Any]) -> bool:
    """The gate: all blanks and mistakes rejected, all right answers accepted, 95 % named."""
    mistakes = totals["mistakes"]
    return (
        totals["blanks"]["rejected"] == totals["blanks"]["total"]
        and totals["solutions"]["accepted"] == totals["solutions"]["total"]
        and totals["alternatives"]["accepted"] == totals["alternatives"]["total"]
        and mistakes["rejected"] == mistakes["total"]
        and mistakes["named"] >= NAMED * mistakes["total"]
    )


def examine_all() -> dict[str, Any]:
    """`summary` over every exercise of the course."""
    torch.set_num_threads(1)  # thousands of tiny products: threads would only wait for one another
    return summary([examine(exercise) for exercise in all_exercises().values()])
