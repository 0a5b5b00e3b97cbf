"""Checks of the exercises: `check` an answer, ask for a `hint`, see your `status`.

    >>> from course_lib.checks import check, hint, status
    >>> check("softmax", softmax)   # your function
    >>> hint("softmax", 1)          # 1: a question, 2: a property, 3: a line

Each chapter's exercises stand in the module of its name, `course_lib/checks/attention.py` and so
on; the machinery is in `course_lib.grading`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..grading import progress
from ..grading.board import Board, Text
from ..grading.exercise import HintLevelError, find
from ..grading.judge import Verdict, judge

__all__ = ["check", "hint", "status"]


def check(id: str, function: Callable[..., Any]) -> Verdict:
    """Judge your answer to an exercise: what holds, what broke, and which mistake it looks like.

    id: the exercise, as in its notebook. function: what you wrote, not its result.
    Raises ValueError for an unknown id and TypeError where function is not callable.
    """
    verdict = judge(find(id), function)
    progress.note_check(verdict)
    return verdict


def hint(id: str, level: int | None = None) -> Text:
    """The hint of level 1 (a question), 2 (a property) or 3 (a line); by default the next one."""
    exercise = find(id)
    if level is None:
        seen = progress.load().get(id, progress.Record()).hints
        level = min(seen + 1, len(exercise.hints))
    if level not in (1, 2, 3):
        raise HintLevelError(f"level must be 1, 2 or 3, got {level!r}")
    progress.note_hint(id, level)
    return Text(f"Hint {level} of 3: {exercise.hints[level - 1]}")


def status() -> Board:
    """Your progress: every exercise with its points, attempts, and what to do next."""
    return Board(progress.load())
