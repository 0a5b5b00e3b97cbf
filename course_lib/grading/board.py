"""The learner's board: chapters, exercises, points, and what comes next."""

from __future__ import annotations

import html
from dataclasses import dataclass

from .exercise import Exercise, all_exercises
from .progress import Record


class Text(str):
    """A message that a notebook shows as text and not as a quoted string."""

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Board:
    """Progress on every exercise, shown as a table in a notebook and as lines elsewhere."""

    records: dict[str, Record]

    @property
    def rows(self) -> list[tuple[Exercise, str, float]]:
        """(exercise, "solved" | "tried" | "open", points)"""
        rows = []
        for id, exercise in all_exercises().items():
            record = self.records.get(id, Record())
            state = "solved" if record.solved else "tried" if record.attempts else "open"
            rows.append((exercise, state, record.points))
        return rows

    @property
    def next(self) -> Exercise | None:
        """The first exercise that is not solved."""
        return next((exercise for exercise, state, _ in self.rows if state != "solved"), None)

    @property
    def summary(self) -> str:
        rows = self.rows
        solved = sum(state == "solved" for _, state, _ in rows)
        points = f"{sum(p for *_, p in rows):g} of {sum(e.points for e, *_ in rows)} points"
        after = f"next: {self.next.id} (about {self.next.minutes} min)" if self.next else "all done"
        return f"{solved} of {len(rows)} exercises solved, {points}; {after}"

    def __repr__(self) -> str:
        marks = {"solved": "✓", "tried": "…", "open": "·"}
        lines = [
            f"{marks[state]} {e.chapter:<24} {e.id:<20} {points:g}/{e.points}  {e.minutes:>3} min"
            for e, state, points in self.rows
        ]
        return "\n".join([*lines, self.summary])

    def _repr_html_(self) -> str:
        marks = {"solved": "✓ solved", "tried": "tried", "open": "open"}
        body = "".join(
            f"<tr><td>{e.chapter}</td><td>{html.escape(e.title)} (<code>{e.id}</code>)</td>"
            f"<td>{marks[state]}</td><td>{points:g} / {e.points}</td><td>{e.minutes} min</td></tr>"
            for e, state, points in self.rows
        )
        head = "".join(f"<th>{h}</th>" for h in ("chapter", "exercise", "state", "points", "time"))
        return f"<table><tr>{head}</tr>{body}</table><p>{html.escape(self.summary)}</p>"
