"""The `course` commands about exercises: list, mutants, grade, reset, status, build."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exercise import Exercise


def add_parsers(subparsers: Any) -> None:
    """Add these commands to the parser of `course`."""
    _add(subparsers, "list", _list, "every exercise: id, chapter, signature, minutes", json=True)
    _add(subparsers, "mutants", _mutants, "grade the graders with every known mistake", json=True)
    _add(subparsers, "status", _status, "your progress on the exercises")

    grade = _add(subparsers, "grade", _grade, "grade a folder of submissions into a CSV file")
    grade.add_argument("folder", type=Path, help="holds <student>/<chapter>.ipynb")
    grade.add_argument("--out", type=Path, default=Path("scores.csv"), help="default: scores.csv")
    grade.add_argument("--seconds", type=float, default=20.0, help="limit for an answer (20)")
    grade.add_argument("--workers", type=int, default=None, help="processes (one per core)")

    reset = _add(subparsers, "reset", _reset, "put the blank back and forget an exercise")
    reset.add_argument("exercise", nargs="+", help="ids or chapters, as `course list` shows them")

    build = _add(subparsers, "build", _build, "make exercises/ and solutions/ from their source")
    build.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")


def _add(subparsers: Any, name: str, run: Any, help: str, *, json: bool = False) -> Any:
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=help)
    parser.set_defaults(run=run)
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _list(args: argparse.Namespace) -> int:
    from .exercise import all_exercises

    rows = [
        {
            "id": e.id, "chapter": e.chapter, "function": e.function, "signature": e.signature,
            "minutes": e.minutes, "difficulty": e.difficulty, "points": e.points,
        }
        for e in all_exercises().values()
    ]  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        for r in rows:
            print(f"{r['chapter']:<20} {r['id']:<20} {r['minutes']:>3} min  {r['signature']}")
    return 0


def _mutants(args: argparse.Namespace) -> int:
    from . import mutants

    totals = mutants.examine_all()
    if args.json:
        print(json.dumps(totals, indent=1, ensure_ascii=False))
    else:
        print(f"{'exercise':<20} behaviours  alternatives  mistakes  named")
        for id, row in totals["per_exercise"].items():
            print(
                f"{id:<20} {row['behaviours']:>10}  {row['alternatives']:>12}  "
                f"{row['mistakes']:>8}  {row['named']:>5}"
            )
            for line in row["got_through"]:
                print(f"    {line}")
        good = totals["mistakes"]
        print(f"mistakes: {good['rejected']} of {good['total']} rejected, {good['named']} named")
    return 0 if mutants.passes(totals) else 1


def _grade(args: argparse.Namespace) -> int:
    from . import batch
    from .build import write_whole

    try:
        submissions = batch.collect(args.folder)
        if not args.out.resolve().parent.is_dir():
            raise ValueError(f"there is no folder {args.out.parent} for {args.out.name}")
    except ValueError as error:
        return _complain("grade", error)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends like Ctrl-C, nothing left behind
    try:
        with _bar(sum(bool(s.left) for s in submissions)) as advance:
            scores = batch.grade(
                submissions, seconds=args.seconds, workers=args.workers, done=lambda _: advance()
            )
        write_whole(args.out, batch.to_csv(scores))
    except (batch.CannotStartError, OSError) as error:
        return _complain("grade", error)
    for student, points, most in batch.by_student(scores):
        print(f"{student:<30} {points:g} / {most}")
    print(f"{len(submissions)} submissions, {len(scores)} answers: {args.out}")
    return 0


class _bar:
    """tqdm's bar where tqdm is installed, nothing where it is not."""

    def __init__(self, total: int):
        try:
            from tqdm import tqdm

            self.bar: Any = tqdm(total=total, unit="submission", file=sys.stderr)
        except ImportError:
            self.bar = None

    def __enter__(self) -> Any:
        return self.bar.update if self.bar is not None else lambda: None

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _status(args: argparse.Namespace) -> int:
    from ..checks import status

    print(status())
    return 0


def _reset(args: argparse.Namespace) -> int:
    from ..checkout import find_root
    from . import build, progress

    try:
        for stem, exercises in _by_chapter(args.exercise).items():
            path = find_root() / "exercises" / f"{stem}.ipynb"
            notebook = (
                build.read(path) if path.exists() else build.build_notebook(stem, solved=False)
            )
            for exercise in exercises:
                cell = build.answer_in(notebook, exercise)
                said = "nothing was written"
                if cell is not None:
                    said = f"blank again; your answer is kept in {_keep(exercise.id, cell.source)}"
                    cell.source, cell.outputs, cell.execution_count = exercise.blank(), [], None
                progress.forget(exercise.id)
                print(f"{exercise.id}: {said}")
            build.write(notebook, path)
    except (ValueError, OSError) as error:
        return _complain("reset", error)
    return 0


def _by_chapter(names: list[str]) -> dict[str, list[Exercise]]:
    """The exercises named, by id or by their chapter's stem; ValueError where one is unknown."""
    from .exercise import chapter_exercises, find

    found: dict[str, list[Exercise]] = {}
    for name in names:
        for exercise in chapter_exercises(name) or [find(name)]:
            found.setdefault(exercise.chapter, []).append(exercise)
    return found


def _keep(id: str, answer: str) -> Path:
    """Write an answer where the learner finds it again, before it leaves the notebook."""
    from . import progress

    folder = progress.home() / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{id}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.py"
    path.write_text(answer + "\n", encoding="utf-8")
    return path


def _complain(command: str, error: Exception) -> int:
    print(f"course {command}: {error}", file=sys.stderr)
    return 1


def _build(args: argparse.Namespace) -> int:
    from ..checkout import find_root
    from . import build, progress

    root = find_root()
    try:
        if args.check:
            found = build.stale(root)
            print("\n".join(found) or "exercises/ and solutions/ are what their source says")
            if found:
                print("course build makes them anew")
            return 1 if found else 0
        keep = progress.home() / "answers" / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
        for path in build.build(root, keep):
            print(f"wrote {path.relative_to(root)}")
        if keep.exists():
            print(f"what stood in exercises/ before is kept in {keep}")
    except (ValueError, OSError) as error:
        return _complain("build", error)
    return 0
