"""Grading a folder of submissions: one process each, so that none can harm another.

From a submission only the answer cells are taken, by their grade_id; everything else is ours. An
answer that hangs, crashes or kills its process scores 0, our answer takes its place for what
follows, and grading goes on: one mistake costs one question.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from . import worker
from .build import answer_id, parse
from .exercise import BLANK, Exercise, chapter_exercises, chapters

START = 120.0  # seconds a process may take to begin: it may have to import torch


class CannotStartError(RuntimeError):
    """Processes cannot be started here, so nobody can be graded."""


@dataclass(frozen=True)
class Score:
    """One line of scores.csv."""

    student: str
    notebook: str
    exercise: str
    points: float
    max_points: int
    feedback: str


@dataclass
class Submission:
    """One notebook of one student, and how far its grading has come."""

    student: str
    stem: str
    answers: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)

    @property
    def left(self) -> list[Exercise]:
        return chapter_exercises(self.stem)[len(self.scores) :]

    def add(self, points: float, feedback: str) -> None:
        """Score the next exercise."""
        exercise = self.left[0]
        self.scores.append(
            Score(self.student, self.stem, exercise.id, points, exercise.points, feedback)
        )


# --- reading ----------------------------------------------------------------------------------


def collect(folder: Path) -> list[Submission]:
    """Every student's notebook for every chapter that somebody handed in.

    folder holds `<student>/<stem>.ipynb`. Raises ValueError where there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    stems = [stem for stem in chapters() if any(folder.glob(f"*/{stem}.ipynb"))]
    if not stems:
        expected = ", ".join(f"<student>/{stem}.ipynb" for stem in chapters())
        raise ValueError(f"there are no submissions in {folder}: expected {expected}")
    students = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [_open(folder, student, stem) for student in students for stem in stems]


def _open(folder: Path, student: str, stem: str) -> Submission:
    path = folder / student / f"{stem}.ipynb"
    submission = Submission(student, stem)
    problem = "" if path.is_file() else "not handed in"
    try:
        submission.answers = {} if problem else _answers(_read(path))
    except Exception as error:  # whatever it is, it is no notebook
        problem = f"not a readable notebook ({type(error).__name__})"
    while problem and submission.left:
        submission.add(0.0, problem)
    return submission


def _read(path: Path) -> NotebookNode:
    data = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old formats lack cell ids
        return parse(data.decode(json.detect_encoding(data)))


def _answers(notebook: NotebookNode) -> dict[str, str]:
    """{exercise: source}; of several cells with one id the last that is not the blank counts."""
    answers: dict[str, str] = {}
    for cell in notebook.cells:
        id = answer_id(cell) if cell.cell_type == "code" else None
        if id is not None and (id not in answers or BLANK not in cell.source):
            answers[id] = cell.source
    return answers


# --- grading ----------------------------------------------------------------------------------


def grade(
    submissions: list[Submission],
    *,
    seconds: float = 20.0,
    workers: int | None = None,
    method: str | None = None,
    done: Callable[[Submission], None] = lambda submission: None,
) -> list[Score]:
    """Grade in parallel processes, and return the scores in the order of the submissions.

    seconds: how long one answer may take. method: how processes start (for tests). done: called
    with each submission that needed grading. Raises CannotStartError where no process starts.
    """
    workers = workers or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="course-grade-", ignore_cleanup_errors=True) as scratch:
        _run(submissions, lambda s: _Process(s, seconds, scratch, method), workers, done)
    return [score for submission in submissions for score in submission.scores]


def _run(
    submissions: list[Submission],
    start: Callable[[Submission], _Process],
    workers: int,
    done: Callable[[Submission], None],
) -> None:
    """Grade what is left of each submission, `workers` at a time."""
    waiting = deque(submission for submission in submissions if submission.left)
    running: list[_Process] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(start(waiting.popleft()))
            wait([process.results for process in running], timeout=0.2)
            for process in [p for p in running if p.is_over()]:
                running.remove(process)
                if process.submission.left:  # it died on one answer: go on with the next
                    waiting.appendleft(process.submission)
                else:
                    done(process.submission)
    finally:
        for process in running:
            process.stop()


class _Process:
    """A process that grades what is left of one submission, an answer at a time."""

    def __init__(self, submission: Submission, seconds: float, scratch: str, method: str | None):
        self.submission, self.seconds = submission, seconds
        context = _context(method)
        self.results, theirs = context.Pipe(duplex=False)
        solved = {s.exercise for s in submission.scores if s.points == s.max_points}
        job = worker.Job(submission.stem, submission.answers, len(submission.scores), solved)
        folder = tempfile.mkdtemp(dir=scratch)
        self.process = context.Process(
            target=worker.work, args=(theirs, job, folder, seconds), daemon=True
        )
        self.process.start()
        theirs.close()
        self.has_begun, self.deadline = False, time.monotonic() + START

    def is_over(self) -> bool:
        """Take what has come; True when this process has nothing more to give."""
        try:
            while self.submission.left and self.results.poll():
                self._take(json.loads(self.results.recv_bytes()))
        except Exception:  # closed, or something unreadable was written into the pipe
            return self._fail("the answer ended its process")
        if self.submission.left and time.monotonic() > self.deadline:
            return self._fail(f"the answer took longer than {self.seconds:g} s")
        if not self.submission.left:
            self.stop()
        return not self.submission.left

    def _take(self, result: list[Any] | None) -> None:
        if result is not None:  # None says that it has begun
            self.submission.add(float(result[0]), str(result[1]))
        self.has_begun = True
        self.deadline = time.monotonic() + self.seconds

    def _fail(self, feedback: str) -> bool:
        self.stop()
        if not self.has_begun:  # no student's fault
            raise CannotStartError("a process for grading ended before it began")
        self.submission.add(0.0, f"✗ {self.submission.left[0].id}: {feedback}.")
        return True

    def stop(self) -> None:
        """End the process and what it has started."""
        if hasattr(os, "killpg") and self.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.results.close()


def _context(method: str | None) -> Any:
    """A server that has imported torch once and is forked for each submission, where there is one.

    Forking this process instead would copy torch's thread pools in a state that can hang.
    """
    methods = multiprocessing.get_all_start_methods()
    method = method or ("forkserver" if "forkserver" in methods else "spawn")
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([worker.__name__])
    return context


# --- out --------------------------------------------------------------------------------------


def to_csv(scores: list[Score]) -> str:
    """scores.csv: student, notebook, exercise, points, max_points, feedback."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=list(Score.__dataclass_fields__))
    writer.writeheader()
    writer.writerows(asdict(score) for score in scores)
    return out.getvalue()


def by_student(scores: list[Score]) -> Iterator[tuple[str, float, int]]:
    """(student, points, of how many), in the order of the scores."""
    for student in dict.fromkeys(s.student for s in scores):
        own = [s for s in scores if s.student == student]
        yield student, sum(s.points for s in own), sum(s.max_points for s in own)
