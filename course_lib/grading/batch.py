"""Grading a folder of submissions: one process each, so that none can harm another.

From a submission only the answer cells are taken, by their grade_id; everything else is ours. An
answer that hangs, crashes or kills its process scores 0, our answer takes its place for what
follows, and grading goes on: one mistake costs one question.
"""

from __future__ import annotations

import csv
import io
import linecache
import math
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import torch
from torch import Tensor

from .exercise import Exercise, chapter_exercises, chapters
from .judge import judge, own_line

MEMORY = 4 * 2**30  # bytes a submission may allocate beyond what torch itself takes


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
    problem: str = ""
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


def collect(folder: Path) -> list[Submission]:
    """Every student's notebook for every chapter that somebody handed in.

    folder holds `<student>/<stem>.ipynb`. Raises ValueError where there is none.
    """
    stems = [stem for stem in chapters() if any(folder.glob(f"*/{stem}.ipynb"))]
    if not stems:
        expected = ", ".join(f"<student>/{stem}.ipynb" for stem in chapters())
        raise ValueError(f"there are no submissions in {folder}: expected {expected}")
    students = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [_open(folder, student, stem) for student in students for stem in stems]


def _open(folder: Path, student: str, stem: str) -> Submission:
    path = folder / student / f"{stem}.ipynb"
    submission = Submission(student, stem)
    if not path.is_file():
        submission.problem = "not handed in"
        return submission
    try:
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
            if cell.cell_type == "code" and grade_id is not None:
                submission.answers.setdefault(grade_id, cell.source)
    except Exception as error:  # whatever it is, it is no notebook
        submission.problem = f"not a readable notebook ({type(error).__name__})"
    return submission


def grade(
    submissions: list[Submission],
    *,
    seconds: float = 20.0,
    workers: int | None = None,
    done: Callable[[Submission], None] = lambda submission: None,
) -> list[Score]:
    """Grade in parallel processes; seconds: how long one answer may take. Ordered as given."""
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    waiting = list(submissions)
    running: list[_Process] = []
    workers = workers or os.cpu_count() or 1
    while waiting or running:
        while waiting and len(running) < workers:
            submission = waiting.pop(0)
            if submission.problem:
                while submission.left:
                    submission.add(0.0, submission.problem)
            if submission.left:
                running.append(_Process(submission, seconds))
            else:
                done(submission)
        multiprocessing.connection.wait([p.results for p in running], timeout=0.2)
        for process in list(running):
            if process.advance():
                running.remove(process)
                if process.submission.left:  # it died on one answer: go on with the next
                    waiting.insert(0, process.submission)
                else:
                    done(process.submission)
    return [score for submission in submissions for score in submission.scores]


class _Process:
    """A process that grades what is left of one submission, an answer at a time."""

    def __init__(self, submission: Submission, seconds: float):
        self.submission, self.seconds = submission, seconds
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        self.results, theirs = context.Pipe(duplex=False)
        solved = {s.exercise for s in submission.scores if s.points == s.max_points}
        self.process = context.Process(
            target=_work, args=(theirs, submission.stem, submission.answers, len(submission.scores), solved)
        )  # fmt: skip
        self.process.start()
        theirs.close()
        self.deadline = time.monotonic() + seconds

    def advance(self) -> bool:
        """Take what has come; True when this process is over."""
        try:
            while self.submission.left and self.results.poll():
                points, feedback = self.results.recv()
                self.submission.add(points, feedback)
                self.deadline = time.monotonic() + self.seconds
        except Exception:  # closed, or something unreadable was written into the pipe
            return self._over("the answer ended its process")
        if self.submission.left and time.monotonic() > self.deadline:
            return self._over(f"the answer took longer than {self.seconds:g} s")
        return False if self.submission.left else self._over("")

    def _over(self, feedback: str) -> bool:
        self.process.kill()
        self.process.join()
        self.results.close()
        if self.submission.left and feedback:
            self.submission.add(0.0, f"✗ {self.submission.left[0].id}: {feedback}")
        return True


# --- inside the process -----------------------------------------------------------------------


def _work(results: Any, stem: str, answers: dict[str, str], start: int, solved: set[str]) -> None:
    """Judge the answers from number `start` on; send (points, feedback) for each."""
    _confine()
    namespace: dict[str, Any] = {"math": math, "torch": torch, "Tensor": Tensor}
    for number, exercise in enumerate(chapter_exercises(stem)):
        if number < start:
            if exercise.id in solved:
                _define(exercise, answers[exercise.id], namespace)
            else:
                namespace[exercise.function] = exercise.reference
            continue
        points, feedback = _judge_answer(exercise, answers.get(exercise.id), namespace)
        if points < exercise.points:
            namespace[exercise.function] = exercise.reference
        results.send((points, feedback))
    results.close()


def _confine() -> None:
    """Work in a scratch folder, print nowhere, and allocate no more than `MEMORY`."""
    os.chdir(tempfile.mkdtemp(prefix="course-grade-"))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    torch.set_num_threads(1)
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):  # not on this system
        pass


def _judge_answer(
    exercise: Exercise, source: str | None, namespace: dict[str, Any]
) -> tuple[float, str]:
    if source is None:
        return 0.0, f"✗ {exercise.id}: the answer's cell is missing."
    try:
        function = _define(exercise, source, namespace)
    except Exception as error:
        return 0.0, f"✗ {exercise.id}: the cell raised {own_line(_nothing, error)}"
    if not callable(function):
        return 0.0, f"✗ {exercise.id}: the cell does not define `{exercise.function}`."
    verdict = judge(exercise, function)
    return verdict.points, str(verdict)


def _define(exercise: Exercise, source: str, namespace: dict[str, Any]) -> Any:
    """Run the answer's cell and return the function that it defines."""
    name = f"<answer {exercise.id}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace.pop(exercise.function, None)
    exec(compile(source, name, "exec"), namespace)
    return namespace.get(exercise.function)


def _nothing() -> None:
    """Stands for an answer that could not be defined."""


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
