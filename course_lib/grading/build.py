"""One source, two notebooks: exercises/ with blanks and solutions/ with answers.

Both are made from the chapter's module in `course_lib/checks`, so that they cannot drift apart.
The solutions are valid nbgrader sources: cells carry its metadata and solution markers.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from pathlib import Path
from typing import cast

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from .exercise import Exercise, chapter_exercises, chapters

IMPORTS = """import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from course_lib.checks import check, hint, status"""


HOW = """Write each function in its cell, run it, then run the check below it. A wrong answer is
told what broke and, where we know it, which mistake it is. Stuck? `hint("{id}")` gives a question,
then a property, then a line. The chapter is `notebooks/{stem}.ipynb`, our answers are in
`solutions/{stem}.ipynb`.

Every answer works for **any size**, keeps the **dtype** of its input, leaves its **inputs
unchanged** and lets **gradients** through. Keep all that an answer needs inside its cell, also
imports and helper functions: only this cell is graded."""

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
    return [_markdown("head", text), _code("imports", _used(exercises) if solved else IMPORTS)]


def _used(exercises: list[Exercise]) -> str:
    """The imports that our answers need: a solution imports only what it uses."""
    sources = "\n".join(exercise.source() for exercise in exercises)
    words = {*re.findall(r"\w+", sources), "status"}
    lines = IMPORTS.replace("hint, ", "").splitlines()
    return "\n".join(line for line in lines if not line or line.split()[-1] in words).strip()


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
    for stem, folder, path in _paths(root):
        fresh = build_notebook(stem, solved=folder == "solutions")
        if not path.exists():
            found.append(f"{folder}/{path.name} is missing")
        elif _parts(read(path), folder) != _parts(fresh, folder):
            found.append(f"{folder}/{path.name} differs from its source")
    return found


def _paths(root: Path) -> list[tuple[str, str, Path]]:
    """(stem, folder, path) of every notebook that is made here."""
    return [(s, f, root / f / f"{s}.ipynb") for s in chapters() for f in FOLDERS]


def _parts(notebook: NotebookNode, folder: str) -> list[tuple[object, ...]]:
    """What must be as the source says, cell by cell."""
    strict = folder == "solutions" or "CI" in os.environ
    return [
        (
            c.cell_type,
            c.id,
            c.metadata.get("nbgrader"),
            c.source if strict or not is_answer(c) else "",
        )
        for c in notebook.cells
    ]


def is_answer(cell: NotebookNode) -> bool:
    """A cell in which the learner writes."""
    return bool(cell.metadata.get("nbgrader", {}).get("solution"))


def answer_id(cell: NotebookNode) -> str | None:
    """The exercise that a cell answers: its grade_id, or its own id where that has been lost."""
    return cell.metadata.get("nbgrader", {}).get("grade_id") or cell.get("id")


def parse(text: str) -> NotebookNode:
    """A notebook from its text, in the current format."""
    return cast(NotebookNode, nbformat.reads(text, as_version=4))


def read(path: Path) -> NotebookNode:
    """A notebook from disk; ValueError where it is none."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise ValueError(f"{path} is not a readable notebook ({type(error).__name__})") from error


def write(notebook: NotebookNode, path: Path) -> None:
    """Write the notebook whole or not at all."""
    write_whole(path, nbformat.writes(notebook) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write the text beside its place and move it there, so that no file is ever half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def build(root: Path, keep: Path) -> list[Path]:
    """Write exercises/ and solutions/ where they differ from their source.

    A notebook in exercises/ that is replaced is copied into `keep` first, with all that a learner
    wrote in it. Solutions are not run here; `python -m course_lib.render` does that.
    """
    written = []
    for stem, folder, path in _paths(root):
        fresh = build_notebook(stem, solved=folder == "solutions")
        if path.exists():
            if _is_fresh(path, fresh):
                continue
            if folder == "exercises":
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, keep / path.name)
        write(fresh, path)
        written.append(path)
    return written


def _is_fresh(path: Path, fresh: NotebookNode) -> bool:
    try:
        return _parts(read(path), "solutions") == _parts(fresh, "solutions")
    except ValueError:
        return False


def answer_in(notebook: NotebookNode, exercise: Exercise) -> NotebookNode | None:
    """The cell with the learner's answer, if something is written in it."""
    for cell in notebook.cells:
        if answer_id(cell) == exercise.id and cell.source != exercise.blank():
            return cell
    return None
