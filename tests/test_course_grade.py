"""`course grade`: a class of submissions, some of them hostile, none of them harms another."""

import copy
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import nbformat
import psutil
import pytest
import torch

from course_lib import cli
from course_lib.grading import batch
from course_lib.grading.build import build_notebook

pytestmark = pytest.mark.exercises

STEM = "02_attention"
RIGHT = build_notebook(STEM, solved=True)
ORDER = [
    "softmax",
    "soft_lookup",
    "attention_scores",
    "self_attention",
    "masked_softmax",
    "attention",
]
SECONDS = 6.0  # what a hanging answer may take here


def source(id):
    return next(cell.source for cell in RIGHT.cells if cell.id == id)


def changed(**answers):
    """Our own solutions with some answers replaced."""
    notebook = copy.deepcopy(RIGHT)
    for cell in notebook.cells:
        cell.source = answers.get(cell.id, cell.source)
    return notebook


def body(text, name="softmax", parameters="scores"):
    """A function of that name with this body."""
    return f"def {name}({parameters}):\n    " + text.replace("\n", "\n    ")


def with_cell(cell, position):
    notebook = copy.deepcopy(RIGHT)
    notebook.cells.insert(position, cell)
    return notebook


def copied(text, position):
    """The answer's cell once more, as copy and paste makes it, with another source."""
    cell = copy.deepcopy(next(cell for cell in RIGHT.cells if cell.id == "softmax"))
    return with_cell(nbformat.from_dict({**cell, "id": "copy", "source": text}), position)


def without(id):
    notebook = copy.deepcopy(RIGHT)
    notebook.cells = [cell for cell in notebook.cells if cell.id != id]
    return notebook


def without_metadata():
    notebook = copy.deepcopy(RIGHT)
    for cell in notebook.cells:
        cell.metadata = {}
    return notebook


def old_format():
    """As an older Jupyter writes it: cells have no ids."""
    notebook = copy.deepcopy(RIGHT)
    notebook.nbformat_minor = 2
    for cell in notebook.cells:
        del cell["id"]
    return nbformat.writes(notebook)


MAGICS = "%%time\n%matplotlib inline\n!ls\nsoftmax?\n" + source("softmax") + "\n%timeit softmax(1)"
HELPER = nbformat.v4.new_code_cell("def helper(q, k):\n    return q @ k.mT / q.shape[-1] ** 0.5")
LOOKUP = {"name": "soft_lookup", "parameters": "query, keys, values, temperature=1.0"}
SWALLOW = "import time\nwhile True:\n    try: time.sleep(1)\n    except BaseException: pass"

SUBMISSIONS = {
    "right": RIGHT,
    "blank": build_notebook(STEM, solved=False),
    "wrong": changed(softmax=body("return torch.exp(scores) / torch.exp(scores).sum(-1, True)")),
    "os_exit": changed(softmax=body("import os; os._exit(0)"), attention="import os\nos._exit(1)"),
    "sys_exit": changed(softmax=body("raise SystemExit"), soft_lookup="import sys\nsys.exit()"),
    "interrupt": changed(softmax=body("raise KeyboardInterrupt")),
    "crash": changed(softmax=body("import ctypes\nctypes.string_at(0)")),
    "huge": changed(softmax=body("return torch.empty(10**11)"), soft_lookup="bytearray(2**40)"),
    "disk": changed(softmax=body("f = open('x', 'wb')\nwhile True: f.write(b'0' * 2**20)")),
    "syntax": changed(softmax="def softmax(scores):\n    return torch.exp(scores"),
    "nul": changed(softmax=body("return scores\0")),
    "missing": without("softmax"),
    "copy_after": copied(body("return scores"), len(RIGHT.cells)),
    "copy_before": copied(body("return scores"), 1),
    "blank_copy_after": copied(body('raise NotImplementedError("not written yet")'), 9),
    "magics": changed(softmax=MAGICS),
    "shell_only": changed(softmax="!cat solution.py"),
    "helper": changed(attention_scores=body("return helper(q, k)", "attention_scores", "q, k")),
    "playground": changed(softmax=source("softmax") + "\ncheck('softmax', softmax)\nundefined"),
    "no_metadata": without_metadata(),
    "renamed": changed(softmax=body("return scores", name="soft_max")),
    "fork": changed(softmax=body("import os, time\nos.fork() or time.sleep(999)\nreturn scores")),
    "builds_on_a_wrong_one": changed(
        masked_softmax=body("return scores", "masked_softmax", "scores, mask"),
        attention=body(
            "scores = attention_scores(query, key)\n"
            "weights = softmax(scores) if mask is None else masked_softmax(scores, mask)\n"
            "return (weights @ value, weights) if return_weights else weights @ value",
            "attention", "query, key, value, mask=None, return_weights=False",
        ),
    ),
}  # fmt: skip
SUBMISSIONS["helper"].cells.insert(2, HELPER)
RAW = {
    "text": b"hello",
    "empty": b"",
    "latin": '{"cells": [], "x": "\u00e9"}'.encode("latin-1"),
    "list": b"[1, 2]",
    "other_json": b'{"cells": 3}',
    "utf16": nbformat.writes(RIGHT).encode("utf-16"),
    "with_a_mark": nbformat.writes(RIGHT).encode("utf-8-sig"),
    "old_format": old_format().encode(),
}
DRESSED = ["utf16", "with_a_mark", "old_format"]
HANGING = {
    "loop": changed(soft_lookup=body("while True: pass", **LOOKUP)),
    "in_the_cell": changed(soft_lookup="while True: pass"),
    "swallow": changed(soft_lookup=body(SWALLOW, **LOOKUP)),
    "printing": changed(soft_lookup=body("while True: print('x' * 1000)", **LOOKUP)),
}


def hand_in(folder, submissions):
    for student, content in submissions.items():
        path = folder / student / f"{STEM}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_bytes(
            content if isinstance(content, bytes) else nbformat.writes(content).encode()
        )
    return folder


def grade(folder, **options):
    """{student: {exercise: score}}"""
    scores = batch.grade(batch.collect(folder), **options)
    students = dict.fromkeys(s.student for s in scores)
    return {n: {s.exercise: s for s in scores if s.student == n} for n in students}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """Where scratch folders are made."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def graded(tmp_path_factory, scratch):
    torch.ones(300, 300, requires_grad=True).matmul(torch.ones(300, 300)).sum().backward()
    folder = hand_in(tmp_path_factory.mktemp("class"), {**SUBMISSIONS, **RAW})
    (folder / "nothing").mkdir()
    (folder / "nothing" / "notes.txt").write_text("x")
    (folder / ".hidden").mkdir()
    (folder / "stray.txt").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        return grade(folder, seconds=60.0, workers=2)


def points(scores):
    return [scores[id].points for id in ORDER]


FULL = [1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    "student",
    ["right", "magics", "playground", "no_metadata", "blank_copy_after", "copy_before", *DRESSED],
)
def test_a_right_notebook_in_any_dress_has_full_points(graded, student):
    assert points(graded[student]) == FULL


def test_a_blank_earns_nothing_and_is_told_so(graded):
    assert points(graded["blank"]) == [0] * 6
    assert all("not written yet" in score.feedback for score in graded["blank"].values())


def test_a_wrong_answer_costs_its_share_and_names_the_mistake(graded):
    score = graded["wrong"]["softmax"]
    assert 0 < score.points < 1
    assert "softmax without subtracting the maximum" in score.feedback
    assert points(graded["wrong"])[1:] == FULL[1:]


@pytest.mark.parametrize(
    ("student", "exercise", "feedback"),
    [
        ("os_exit", "softmax", "ended its process"),
        ("os_exit", "attention", "ended its process"),
        ("sys_exit", "softmax", "raised SystemExit (line 2: `raise SystemExit`)"),
        ("sys_exit", "soft_lookup", "the cell raised SystemExit"),
        ("interrupt", "softmax", "raised KeyboardInterrupt (line 2"),
        ("crash", "softmax", "ended its process"),
        ("huge", "softmax", "(line 2: `return torch.empty(10**11)`)"),
        ("huge", "soft_lookup", "the cell raised MemoryError"),
        ("disk", "softmax", "File too large"),
        (
            "syntax",
            "softmax",
            "SyntaxError: '(' was never closed (line 2: `return torch.exp(scores`)",
        ),
        ("nul", "softmax", "SyntaxError"),
        ("missing", "softmax", "the answer's cell is missing"),
        ("copy_after", "softmax", "You return an input as it came in"),
        ("shell_only", "softmax", "does not define `softmax`"),
        ("helper", "attention_scores", "(line 2: `return helper(q, k)`)"),
        ("helper", "attention_scores", "Only this cell is graded"),
        ("renamed", "softmax", "does not define `softmax`"),
        ("builds_on_a_wrong_one", "masked_softmax", "You return an input as it came in"),
        ("fork", "softmax", "softmax"),
    ],
)
def test_one_mistake_costs_one_question_and_says_what_it_was(graded, student, exercise, feedback):
    score = graded[student][exercise]
    assert score.points == 0
    assert feedback in score.feedback
    others = [s for s in graded[student].values() if s.points == s.max_points]
    assert len(others) == 6 - (2 if student in ("os_exit", "sys_exit", "huge") else 1)


@pytest.mark.parametrize("student", ["text", "empty", "latin", "list", "other_json"])
def test_what_is_no_notebook_is_said_to_be_none(graded, student):
    assert points(graded[student]) == [0] * 6
    assert {s.feedback.partition(" (")[0] for s in graded[student].values()} == {
        "not a readable notebook"
    }


def test_a_student_without_a_notebook_is_listed_and_strays_are_not(graded):
    assert {s.feedback for s in graded["nothing"].values()} == {"not handed in"}
    assert set(graded) == {*SUBMISSIONS, *RAW, "nothing"}


def test_nothing_is_left_behind(graded, scratch):
    assert list(scratch.glob("course-grade-*")) == []
    asleep = [p for p in psutil.Process().children(recursive=True) if p.status() == "sleeping"]
    servers = [p for p in asleep if "multiprocessing" in " ".join(p.cmdline())]
    assert len(asleep) - len(servers) == 0
    assert len(servers) <= 2  # the server that is forked, and its resource tracker


def test_an_answer_that_hangs_is_stopped_and_the_rest_is_graded(tmp_path):
    graded = grade(hand_in(tmp_path, HANGING), seconds=SECONDS, workers=4)
    for scores in graded.values():
        assert scores["soft_lookup"].points == 0
        assert "longer than 6 s" in scores["soft_lookup"].feedback
        assert [scores[id].points for id in ORDER if id != "soft_lookup"] == [1, 1, 2, 2, 3]


def test_where_forking_is_impossible_processes_are_spawned(tmp_path):
    folder = hand_in(tmp_path, {"a": changed(softmax=body("import os; os._exit(0)"))})
    graded = grade(folder, seconds=60.0, workers=1, method="spawn")
    assert points(graded["a"]) == [0, *FULL[1:]]


def test_no_student_pays_for_a_process_that_cannot_start(tmp_path, monkeypatch):
    monkeypatch.setattr(batch.worker, "work", os.abort)
    with pytest.raises(batch.CannotStartError):
        grade(hand_in(tmp_path, {"a": RIGHT}))


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_the_same_file_again(tmp_path, capsys):
    folder = hand_in(tmp_path / "class", {n: SUBMISSIONS[n] for n in ("right", "wrong", "crash")})
    texts = []
    for name in ("a.csv", "b.csv"):
        assert cli.main(["grade", str(folder), "--out", str(tmp_path / name)]) == 0
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(io.StringIO(texts[0].decode(), newline="")))
    columns = ["student", "notebook", "exercise", "points", "max_points", "feedback"]
    assert list(rows[0]) == columns
    assert [row["exercise"] for row in rows] == ORDER * 3
    assert "3 submissions, 18 answers" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "b.csv", "class"]


@pytest.mark.parametrize(
    ("folder", "out", "message"),
    [
        ("nowhere", "scores.csv", "is not a folder"),
        ("empty", "scores.csv", "expected <student>/02_attention.ipynb"),
        ("class", "nowhere/scores.csv", "there is no folder"),
    ],
)
def test_a_wrong_path_is_one_line(tmp_path, capsys, folder, out, message):
    (tmp_path / "empty").mkdir()
    hand_in(tmp_path / "class", {"a": b""})
    assert cli.main(["grade", str(tmp_path / folder), "--out", str(tmp_path / out)]) == 1
    complaint = capsys.readouterr().err
    assert message in complaint
    assert complaint.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals differ")
def test_an_interrupt_leaves_no_process_no_file_and_no_scratch_folder(tmp_path):
    folder = hand_in(tmp_path / "class", HANGING)
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    command = [sys.executable, "-m", "course_lib.cli", "grade", str(folder)]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "scores.csv"), "--seconds", "300"],
        env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline, children = time.monotonic() + 120, []
    while time.monotonic() < deadline and len(children) < 3:  # server, tracker, a submission
        time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert not (tmp_path / "scores.csv").exists()
    assert list(scratch.iterdir()) == []
    shutil.rmtree(folder)
