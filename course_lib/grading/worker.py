"""Inside the process that grades one submission: confined, silent, one answer after the other."""

from __future__ import annotations

import json
import linecache
import os
import random
import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from .build import IMPORTS
from .exercise import Exercise, chapter_exercises
from .judge import judge, own_line

MEMORY = 4 * 2**30  # bytes an answer may allocate beyond what torch itself takes
FILE = 64 * 2**20  # bytes a file that it writes may have

NOTEBOOK_ONLY = re.compile(r"^(\s*)(?:[%!?].*|[\w.]+\?{1,2}[ \t]*)$", re.MULTILINE)
"""A line that only a notebook understands: %time, !ls, ?softmax, softmax?"""


@dataclass(frozen=True)
class Job:
    """The answers of one notebook; those before number `start` are judged, `solved` were right."""

    stem: str
    answers: dict[str, str]
    start: int
    solved: set[str]


def work(results: Connection, job: Job, folder: str, seconds: float) -> None:
    """Judge the answers from number `start` on; send null to begin, then [points, feedback]."""
    exercises = chapter_exercises(job.stem)
    confine(folder, seconds * len(exercises))
    results.send_bytes(b"null")
    namespace: dict[str, Any] = {"display": lambda *values, **options: None}
    exec(IMPORTS, namespace)
    for number, exercise in enumerate(exercises):
        source = job.answers.get(exercise.id)
        if number >= job.start:
            points, feedback = judge_cell(exercise, source, namespace)
            results.send_bytes(json.dumps([points, feedback]).encode())
            right = points == exercise.points
        else:
            right = exercise.id in job.solved and _define(exercise, source or "", namespace) is None
        if not right:
            namespace[exercise.function] = exercise.reference


def confine(folder: str, seconds: float) -> None:
    """Work in a scratch folder, print nowhere, and use no more than a share of the machine."""
    if hasattr(os, "setsid"):
        os.setsid()  # so that what an answer starts is killed with it
    threading.Thread(target=_end_with_the_grader, daemon=True).start()
    os.chdir(folder)
    os.environ["COURSE_HOME"] = folder
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    random.seed(0)
    torch.set_num_threads(1)
    with suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits = {
            resource.RLIMIT_AS: pages * resource.getpagesize() + MEMORY,
            resource.RLIMIT_CPU: int(seconds) + 60,
            resource.RLIMIT_FSIZE: FILE,
            resource.RLIMIT_CORE: 0,
        }
        for name, limit in limits.items():
            resource.setrlimit(name, (limit, limit))


def _end_with_the_grader() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def judge_cell(
    exercise: Exercise, source: str | None, namespace: dict[str, Any]
) -> tuple[float, str]:
    """(points, feedback) for an answer's cell."""
    if source is None:
        return 0.0, f"✗ {exercise.id}: the answer's cell is missing."
    error = _define(exercise, source, namespace)
    function = namespace.get(exercise.function)
    if function is None and error is not None:
        return 0.0, f"✗ {exercise.id}: the cell raised {own_line(None, error)}."
    if not callable(function):
        return 0.0, f"✗ {exercise.id}: the cell does not define `{exercise.function}`."
    try:
        verdict = judge(exercise, function)
    except BaseException as error:  # KeyboardInterrupt: there is nobody here to interrupt
        return 0.0, f"✗ {exercise.id}: your code raised {own_line(function, error)}."
    lines = list(verdict.lines)
    if "raised NameError" in lines[0]:
        lines.append("Only this cell is graded: keep all that the answer needs inside it.")
    return verdict.points, "\n".join(lines)


def _define(exercise: Exercise, source: str, namespace: dict[str, Any]) -> BaseException | None:
    """Run the answer's cell; what it raised, if it did."""
    name = f"<answer {exercise.id}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace.pop(exercise.function, None)
    try:
        exec(compile(_as_python(source), name, "exec"), namespace)
    except BaseException as error:  # SystemExit and KeyboardInterrupt end no grading
        return error
    return None


def _as_python(source: str) -> str:
    try:
        compile(source, "<cell>", "exec")
    except SyntaxError:
        return NOTEBOOK_ONLY.sub(r"\1pass", source)
    return source
