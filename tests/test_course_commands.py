"""`course list`, `mutants`, `reset`, `build`, `status`, and the notebooks made from one source."""

import json
from pathlib import Path

import nbformat
import pytest

from course_lib import cli
from course_lib.grading import build, mutants, progress
from course_lib.grading.exercise import all_exercises, chapters, find
from course_lib.grading.judge import judge

pytestmark = pytest.mark.exercises

ROOT = Path(__file__).resolve().parent.parent
STEM = "02_attention"


@pytest.fixture
def checkout(tmp_path, monkeypatch, course_home):
    """A course's folder of its own, with freshly built exercises."""
    root = tmp_path / "course"
    for name in ("course_lib", "notebooks"):
        (root / name).mkdir(parents=True)
    monkeypatch.chdir(root)
    monkeypatch.delenv("CI", raising=False)
    build.build(root, tmp_path / "kept")
    return root


def cell(path, id):
    return next(c for c in build.read(path).cells if c.id == id)


def answer(root, id, source):
    """Write an answer into the learner's notebook."""
    path = root / "exercises" / f"{STEM}.ipynb"
    notebook = build.read(path)
    for c in notebook.cells:
        if c.id == id:
            c.source = source
    build.write(notebook, path)
    return path


# --- list and mutants ----------------------------------------------------------------------------


def test_list_describes_every_exercise_as_json(capsys):
    assert cli.main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == list(all_exercises())
    expected = {"id", "chapter", "function", "signature", "minutes", "difficulty"}
    assert all(expected <= row.keys() for row in rows)
    softmax = next(row for row in rows if row["id"] == "softmax")
    assert softmax["signature"] == "softmax(scores: Tensor) -> Tensor"
    assert softmax["chapter"] == STEM


def test_list_is_a_table_for_people(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(all_exercises())
    assert all("min" in line for line in lines)


def test_mutants_prints_one_json_object_and_fails_where_something_gets_through(
    capsys, monkeypatch, course_home
):
    softmax = find("softmax")
    monkeypatch.setattr(mutants, "all_exercises", lambda: {"softmax": softmax})
    assert cli.main(["mutants", "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)
    named = totals["mistakes"]["total"]
    assert totals["exercises"] == 1
    assert totals["blanks"] == {"total": 1, "rejected": 1}
    assert totals["mistakes"] == {"total": named, "rejected": named, "named": named}
    assert totals["per_exercise"]["softmax"]["got_through"] == []
    monkeypatch.setattr(softmax, "behaviours", [])
    monkeypatch.setattr(softmax, "alternatives", [*softmax.alternatives, softmax.mistakes[0]])
    assert cli.main(["mutants"]) == 1
    assert "    softmax without subtracting the maximum: ✗ softmax" in capsys.readouterr().out


# --- one source ----------------------------------------------------------------------------------


def test_the_notebooks_in_the_repository_equal_their_source(monkeypatch):
    monkeypatch.setenv("CI", "1")
    assert build.stale(ROOT) == []


@pytest.mark.parametrize("stem", list(chapters()))
def test_every_blank_compiles_and_every_solution_passes(stem):
    for solved in (False, True):
        namespace = {}
        for c in build.build_notebook(stem, solved=solved).cells:
            if c.cell_type == "code" and (c.id == "imports" or build.is_answer(c)):
                exec(c.source, namespace)
            if build.is_answer(c):
                exercise = find(c.id)
                verdict = judge(exercise, namespace[exercise.function])
                assert (verdict.passed, verdict.blank) == (solved, not solved)


@pytest.mark.parametrize("stem", list(chapters()))
def test_the_cells_are_valid_for_nbgrader(stem):
    notebook = build.build_notebook(stem, solved=True)
    nbformat.validate(notebook)
    marked = [c for c in notebook.cells if "nbgrader" in c.metadata]
    assert [c.metadata.nbgrader.grade_id for c in marked] == [c.id for c in marked]
    for written, tested in zip(marked[::2], marked[1::2], strict=True):
        assert (written.metadata.nbgrader.solution, written.metadata.nbgrader.grade) == (
            True,
            False,
        )
        assert written.source.count("### BEGIN SOLUTION") == 1
        assert written.source.count("### END SOLUTION") == 1
        assert (tested.metadata.nbgrader.grade, tested.metadata.nbgrader.locked) == (True, True)
        assert tested.metadata.nbgrader.points == find(written.id).points


def test_building_again_changes_nothing(checkout, tmp_path):
    before = (checkout / "exercises" / f"{STEM}.ipynb").read_bytes()
    assert build.build(checkout, tmp_path / "kept") == []
    assert (checkout / "exercises" / f"{STEM}.ipynb").read_bytes() == before
    assert not (tmp_path / "kept").exists()


def test_a_learners_answer_is_not_stale_but_a_changed_text_is(checkout, capsys):
    path = answer(checkout, "softmax", "def softmax(scores):\n    return scores")
    assert cli.main(["build", "--check"]) == 0
    answer(checkout, "softmax-text", "## Something else")
    assert cli.main(["build", "--check"]) == 1
    assert f"exercises/{STEM}.ipynb differs from its source" in capsys.readouterr().out
    path.unlink()
    assert cli.main(["build", "--check"]) == 1
    assert f"exercises/{STEM}.ipynb is missing" in capsys.readouterr().out


def test_in_ci_a_stray_answer_is_stale(checkout, monkeypatch):
    answer(checkout, "softmax", "def softmax(scores):\n    return scores")
    monkeypatch.setenv("CI", "true")
    assert cli.main(["build", "--check"]) == 1


def test_changed_points_are_stale(checkout):
    path = checkout / "solutions" / f"{STEM}.ipynb"
    notebook = build.read(path)
    next(c for c in notebook.cells if c.id == "softmax-check").metadata.nbgrader.points = 9
    build.write(notebook, path)
    assert cli.main(["build", "--check"]) == 1


@pytest.mark.parametrize("torn", [False, True])
def test_building_keeps_what_a_learner_wrote(checkout, course_home, capsys, torn):
    path = answer(checkout, "softmax", "def softmax(scores):\n    return scores  # mine")
    answer(checkout, "softmax-text", "## My notes")
    if torn:
        path.write_bytes(path.read_bytes()[:-100])
    assert cli.main(["build"]) == 0
    assert "what stood in exercises/ before is kept in" in capsys.readouterr().out
    (kept,) = course_home.glob(f"answers/*/{STEM}.ipynb")
    assert "return scores  # mine" in kept.read_text(encoding="utf-8")
    assert "not written yet" in cell(path, "softmax").source


# --- reset ---------------------------------------------------------------------------------------

MINE = "def softmax(scores):\n    return scores.softmax(-1)  # größer als α"


def test_reset_puts_the_blank_back_keeps_the_answer_and_forgets_the_points(
    checkout, course_home, capsys
):
    path = answer(checkout, "softmax", MINE)
    progress.note_check(judge(find("softmax"), lambda s: s.softmax(-1)))
    progress.note_check(judge(find("soft_lookup"), lambda q, k, v, t=1.0: v.sum(0)))
    assert cli.main(["reset", "softmax"]) == 0
    assert cell(path, "softmax").source == find("softmax").blank()
    (kept,) = course_home.glob("answers/softmax-*.py")
    assert kept.read_text(encoding="utf-8") == MINE + "\n"
    assert str(kept) in capsys.readouterr().out
    assert set(progress.load()) == {"soft_lookup"}


def test_reset_twice_keeps_both_answers(checkout, course_home, capsys):
    for source in (MINE, MINE + "  # again"):
        answer(checkout, "softmax", source)
        assert cli.main(["reset", "softmax"]) == 0
    assert len(list(course_home.glob("answers/softmax-*.py"))) == 2
    assert cli.main(["reset", "softmax"]) == 0
    assert "softmax: nothing was written" in capsys.readouterr().out


def test_reset_takes_a_whole_chapter(checkout, course_home):
    path = answer(checkout, "softmax", MINE)
    answer(checkout, "attention", "attention = None")
    assert cli.main(["reset", STEM]) == 0
    assert {kept.name.split("-")[0] for kept in course_home.glob("answers/*.py")} == {
        "softmax", "attention",
    }  # fmt: skip
    assert build.stale(checkout) == []
    assert cell(path, "attention").source == find("attention").blank()


def test_reset_makes_a_deleted_notebook_anew(checkout):
    (checkout / "exercises" / f"{STEM}.ipynb").unlink()
    assert cli.main(["reset", "softmax"]) == 0
    assert build.stale(checkout) == []


def test_an_answer_is_kept_before_it_leaves_the_notebook(
    checkout, course_home, monkeypatch, capsys
):
    path = answer(checkout, "softmax", MINE)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(build, "write", full)
    assert cli.main(["reset", "softmax"]) == 1
    assert "course reset: No space left on device" in capsys.readouterr().err
    assert cell(path, "softmax").source == MINE
    assert len(list(course_home.glob("answers/softmax-*.py"))) == 1


@pytest.mark.parametrize("names", [["sofmax"], ["softmax", "sofmax"]])
def test_reset_of_an_unknown_exercise_touches_nothing(checkout, capsys, names):
    path = answer(checkout, "softmax", MINE)
    assert cli.main(["reset", *names]) == 1
    assert capsys.readouterr().err.startswith(
        "course reset: there is no exercise 'sofmax'; did you"
    )
    assert cell(path, "softmax").source == MINE


def test_reset_of_a_torn_notebook_says_so_and_leaves_it(checkout, capsys):
    path = checkout / "exercises" / f"{STEM}.ipynb"
    path.write_bytes(path.read_bytes()[:-100])
    before = path.read_bytes()
    assert cli.main(["reset", "softmax"]) == 1
    assert "is not a readable notebook" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_outside_the_course_reset_says_where_to_go(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reset", "softmax"]) == 1
    assert "is not inside the course's folder" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    build.write_whole(path, "old")
    monkeypatch.setattr(build.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build.write_whole(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


# --- status --------------------------------------------------------------------------------------


def test_status_lists_every_exercise_and_what_comes_next(course_home, capsys):
    progress.note_check(judge(find("softmax"), lambda s: s.softmax(-1)))
    progress.note_check(judge(find("soft_lookup"), lambda q, k, v, t=1.0: v.sum(0)))
    assert cli.main(["status"]) == 0
    *rows, summary = capsys.readouterr().out.splitlines()
    assert [row[0] for row in rows[:3]] == ["✓", "…", "·"]
    assert len(rows) == len(all_exercises())
    assert summary.startswith(f"1 of {len(rows)} exercises solved, 1 of ")
    assert "next: soft_lookup (about 10 min)" in summary
