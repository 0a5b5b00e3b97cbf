"""One source, two notebooks: exercises/ with blanks and solutions/ with answers.

Both are made from the chapter's module in `course_lib/checks`, so that they cannot drift apart.
The solutions are valid nbgrader sources: cells carry its metadata and solution markers.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from .exercise import Exercise, chapter_exercises, chapters

IMPORTS = """import math

import torch
from torch import Tensor

from course_lib.checks import check, hint, status"""

HOW = """Write each function in its cell, run it, then run the check below it. A wrong answer is told what
broke and, where we know it, which mistake it is. Stuck? `hint("{id}")` gives a question, then a
property, then a line. The chapter is `notebooks/{stem}.ipynb`, our answers are in
`solutions/{stem}.ipynb`.

Every answer works for **any size**, keeps the **dtype** of its input, leaves its **inputs unchanged** and
lets **gradients** through. Keep all that an answer needs inside its cell."""

FOLDERS = ("exercises", "solutions")


def build_notebook(stem: str, *, solved: bool) -> NotebookNode:
    """The exercises of a chapter as a notebook, with blanks or with our answers."""
    exercises = chapter_exercises(stem)
    if not exercises:
        raise ValueError(
            f"stem: no chapter {stem!r} has exercises; got those of {list(chapters())}"
        )
    notebook = new_notebook(cells=[*_head(stem, exercises, solved)])
    for number, exercise in enumerate(exercises, 1):
        notebook.cells += _exercise_cells(number, exercise, solved)
    notebook.cells.append(_code("status", "# NBVAL_IGNORE_OUTPUT\nstatus()"))
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _head(stem: str, exercises: list[Exercise], solved: bool) -> list[NotebookNode]:
    module = importlib.import_module(exercises[0].reference.__module__)
    title = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
    minutes, points = sum(e.minutes for e in exercises), sum(e.points for e in exercises)
    text = (
        f"# {'Solutions' if solved else 'Exercises'}: {title.removeprefix('Exercises of ')}\n\n"
        f"{len(exercises)} exercises · about {minutes} minutes · {points} points\n\n"
        + HOW.format(id=exercises[0].id, stem=stem)
    )
    return [_markdown("head", text), _code("imports", IMPORTS)]


def _exercise_cells(number: int, exercise: Exercise, solved: bool) -> list[NotebookNode]:
    dots = {n: "●" * n + "○" * (5 - n) for n in range(6)}
    text = (
        f"## {number}. {exercise.title}\n\n"
        f"difficulty {dots[exercise.difficulty]} · importance {dots[exercise.importance]} · "
        f"{exercise.minutes} min · {exercise.points} point{'s' * (exercise.points != 1)}\n\n"
        + exercise.prompt.strip()
    )
    answer = _code(exercise.id, exercise.source() if solved else exercise.blank())
    answer.metadata["nbgrader"] = _nbgrader(exercise.id, solution=True)
    test = _code(f"{exercise.id}-check", f'check("{exercise.id}", {exercise.function})')
    test.metadata["nbgrader"] = _nbgrader(f"{exercise.id}-check", points=exercise.points)
    return [_markdown(f"{exercise.id}-text", text), answer, test]


def _nbgrader(id: str, *, solution: bool = False, points: int | None = None) -> dict[str, object]:
    grade = points is not None
    metadata: dict[str, object] = {
        "cell_type": "code", "grade": grade, "grade_id": id, "locked": grade,
        "schema_version": 3, "solution": solution, "task": False,
    }  # fmt: skip
    return metadata | ({"points": points} if grade else {})


def _markdown(id: str, text: str) -> NotebookNode:
    return new_markdown_cell(text, id=id)


def _code(id: str, source: str) -> NotebookNode:
    return new_code_cell(source, id=id)


# --- on disk ----------------------------------------------------------------------------------


def stale(root: Path) -> list[str]:
    """What in exercises/ and solutions/ differs from the source; a learner's answers may differ."""
    found = []
    for stem in chapters():
        for folder in FOLDERS:
            path = root / folder / f"{stem}.ipynb"
            fresh = build_notebook(stem, solved=folder == "solutions")
            if not path.exists():
                found.append(f"{folder}/{stem}.ipynb is missing")
            elif _sources(read(path), folder) != _sources(fresh, folder):
                found.append(f"{folder}/{stem}.ipynb differs from its source")
    return found


def _sources(notebook: NotebookNode, folder: str) -> list[tuple[str, str, str]]:
    strict = folder == "solutions" or "CI" in os.environ
    return [
        (c.cell_type, c.id, c.source if strict or not is_answer(c) else "") for c in notebook.cells
    ]


def is_answer(cell: NotebookNode) -> bool:
    """A cell in which the learner writes."""
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def read(path: Path) -> NotebookNode:
    """A notebook from disk, in the current format."""
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Write the notebook whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    os.replace(part, path)


def build(root: Path, keep: Path) -> list[Path]:
    """Write exercises/ and solutions/. Notebooks with a learner's answers are kept in `keep` first.

    Outputs of solutions are not run here; `python -m course_lib.render` does that.
    """
    written = []
    for stem in chapters():
        for folder in FOLDERS:
            path = root / folder / f"{stem}.ipynb"
            fresh = build_notebook(stem, solved=folder == "solutions")
            if path.exists():
                if _sources(read(path), "solutions") == _sources(fresh, "solutions"):
                    continue
                if folder == "exercises":
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, keep / path.name)
            write(fresh, path)
            written.append(path)
    return written


def reset_answer(exercise: Exercise, root: Path) -> str | None:
    """Put the blank back into the exercise's cell; returns what stood there, None if nothing did."""
    path = root / "exercises" / f"{exercise.chapter}.ipynb"
    if not path.exists():
        return None
    notebook = read(path)
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        if grade_id == exercise.id and cell.source != exercise.blank():
            before, cell.source, cell.outputs = cell.source, exercise.blank(), []
            write(notebook, path)
            return before
    return None
