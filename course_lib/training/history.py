"""What a run saw, step by step."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class History:
    """What `fit` saw: a table whose columns are lists with one entry per step.

    Attributes:
        step: 1, 2, …
        seconds: time in forward, backward and update since the start; drawing batches and
            evaluating are not counted.
        loss: training loss of the batch of that step, before its update.
        eval_loss: what the evaluation after that step returned; None where there was none.
    """

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    eval_loss: list[float | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists by name, ready for JSON or a table."""
        return asdict(self)

    def add(self, step: int, seconds: float, loss: float, eval_loss: float | None) -> None:
        """One more step."""
        self.step.append(step)
        self.seconds.append(seconds)
        self.loss.append(loss)
        self.eval_loss.append(eval_loss)

    def save(self, path: str | Path) -> None:
        """Write all of it as .csv or .json, by the path's ending; whole or not at all.

        Raises:
            ValueError: the path has another ending.
        """
        path = Path(path)
        table = self.to_dict()
        if path.suffix == ".json":
            write_whole(path, (json.dumps(table, indent=1) + "\n").encode())
        elif path.suffix == ".csv":
            text = io.StringIO()
            rows = csv.writer(text, lineterminator="\n")
            rows.writerow(table)
            rows.writerows(zip(*table.values(), strict=True))
            write_whole(path, text.getvalue().encode())
        else:
            raise ValueError(f"log must end in .csv or .json, got {path.name!r}")


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the place and move there, so that no file is ever half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
