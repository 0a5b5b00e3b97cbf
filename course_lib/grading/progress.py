"""What the learner has done so far: one file, a line of JSON for each step.

Lines are only ever added, so two notebooks can write at once and an interrupted write loses no more
than its own line. Deleting the file forgets everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .judge import Verdict


@dataclass
class Record:
    """What is known about one exercise; points are the best so far."""

    attempts: int = 0
    points: float = 0.0
    solved: bool = False
    hints: int = 0


def home() -> Path:
    """The folder where progress is kept: $COURSE_HOME, or the system's place for user data."""
    if os.environ.get("COURSE_HOME"):
        return Path(os.environ["COURSE_HOME"]).expanduser()
    try:
        from platformdirs import user_data_path
    except ImportError:
        return Path.home() / ".course_lib"
    return user_data_path("course_lib")


def load() -> dict[str, Record]:
    """{exercise: record}"""
    records: dict[str, Record] = {}
    for step in _steps():
        id = step["exercise"]
        if step.get("forget"):
            records.pop(id, None)
            continue
        record = records.setdefault(id, Record())
        record.attempts += bool(step.get("attempt"))
        record.points = max(record.points, step.get("points", 0.0))
        record.solved |= bool(step.get("solved"))
        record.hints = max(record.hints, step.get("hint", 0))
    return records


def note_check(verdict: Verdict) -> None:
    """Count an attempt, unless nothing was written yet."""
    if not verdict.blank:
        _add(verdict.exercise, attempt=True, points=verdict.points, solved=verdict.passed)


def note_hint(id: str, level: int) -> None:
    """Remember that a hint was seen."""
    _add(id, hint=level)


def forget(id: str) -> None:
    """Forget all about an exercise."""
    _add(id, forget=True)


def _file() -> Path:
    return home() / "progress.jsonl"


def _add(id: str, **step: Any) -> None:
    """Add a line. A folder that cannot be written is no reason to stop the learner."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        with _file().open("a", encoding="utf-8") as file:  # begins a line: the last may be torn
            file.write("\n" + json.dumps({"exercise": id, **step}))
    except OSError as error:
        print(f"Your progress could not be saved: {error}")


def _steps() -> Iterator[dict[str, Any]]:
    """The lines that can be read; others are passed over."""
    try:
        lines = _file().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            step = json.loads(line)
        except ValueError:
            continue
        if isinstance(step, dict) and isinstance(step.get("exercise"), str):
            yield step
