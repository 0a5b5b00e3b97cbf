"""What the learner has done so far: one JSON file, written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .judge import Verdict


def home() -> Path:
    """The folder where progress is kept: $COURSE_HOME, or the system's place for user data."""
    if "COURSE_HOME" in os.environ:
        return Path(os.environ["COURSE_HOME"])
    try:
        from platformdirs import user_data_path
    except ImportError:
        return Path.home() / ".course_lib"
    return user_data_path("course_lib")


def load() -> dict[str, dict[str, Any]]:
    """{exercise: {"attempts", "points", "solved", "hints"}}; a torn file is set aside, not lost."""
    path = home() / "progress.json"
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("not an object")
        return record
    except FileNotFoundError:
        return {}
    except ValueError:
        aside = path.with_suffix(f".unreadable-{datetime.now(UTC):%Y%m%d%H%M%S}.json")
        path.rename(aside)
        print(f"Your progress file was not readable; it is kept as {aside}.", file=sys.stdout)
        return {}


def save(record: dict[str, dict[str, Any]]) -> None:
    """Write the file beside its place and move it there, so that it is never half written."""
    path = home() / "progress.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(record, indent=1, sort_keys=True))
    os.replace(part, path)


def update(id: str, **changes: Any) -> None:
    """Merge the changes into the exercise's record. A folder that cannot be written is no error."""
    try:
        record = load()
        record.setdefault(id, {}).update(changes)
        save(record)
    except OSError as error:
        print(f"Your progress could not be saved: {error}")


def note_check(verdict: Verdict) -> None:
    """Count an attempt; keep the best points."""
    before = load().get(verdict.exercise, {})
    update(
        verdict.exercise,
        attempts=before.get("attempts", 0) + (not verdict.blank),
        points=max(before.get("points", 0), verdict.points),
        solved=before.get("solved", False) or verdict.passed,
    )


def forget(id: str) -> None:
    """Remove the exercise's record."""
    record = load()
    if record.pop(id, None) is not None:
        save(record)
