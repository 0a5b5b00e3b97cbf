"""The rules of the house: one stem finds everything, and stored notebooks are what was run."""

import ast
import json
import os
import re
import tempfile
from pathlib import Path

import jaxtyping
import pytest
import torch

from course_lib import attention, models

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("notebooks", "exercises", "solutions")
STORED = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("solutions/*.ipynb")])
BLANKS = sorted(ROOT.glob("exercises/*.ipynb"))
EXERCISES = [path.stem for path in BLANKS]
TOP = {"README.md", "environment.yml", "notebooks", "course_lib", "exercises", "solutions", "tests"}
TOOLS = {"pyproject.toml", "constraints.txt", "Makefile", "benchmarks", "LICENSE"}
TOOLS |= {"CONTRIBUTING.md", "CHANGELOG.md"}
LEFT_BY_TOOLS = {"__pycache__", "build", "dist", "scores.csv"}

every_notebook = pytest.mark.parametrize(
    "path", [*STORED, *BLANKS], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
every_stored = pytest.mark.parametrize(
    "path", STORED, ids=lambda path: f"{path.parent.name}/{path.stem}"
)


def cells(path: Path, kind: str = "code") -> list[dict]:
    """The cells of one kind that have something in them."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [c for c in notebook["cells"] if c["cell_type"] == kind and "".join(c["source"]).strip()]


def sources(path: Path) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(path))


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path) for output in cell["outputs"]]


def without_magics(source: str) -> str:
    """A cell's source as plain Python."""
    return "\n".join("pass" if line[:1] in "%!" else line for line in source.split("\n") if line)


# --- one stem everywhere -------------------------------------------------------------------------


def test_the_first_chapters_are_there():
    chapters = {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    assert {"00_start_here", "01_why_attention", "02_attention"} <= chapters
    assert "02_attention" in EXERCISES


@pytest.mark.parametrize("stem", EXERCISES)
def test_one_stem_finds_notebook_exercises_solutions_checks_and_tests(stem):
    name = re.sub(r"^\d\d_", "", stem)
    assert name != stem, "a chapter's stem begins with its number: 03_multi_head_attention"
    lacking = [f for f in FOLDERS if not (ROOT / f / f"{stem}.ipynb").is_file()]
    assert lacking == []
    assert (ROOT / f"course_lib/checks/{name}.py").is_file()
    assert list((ROOT / "tests").rglob(f"test*{name}*.py")) != []


def test_no_solution_is_without_its_exercise():
    assert [p.stem for p in ROOT.glob("solutions/*.ipynb") if p.stem not in EXERCISES] == []


def test_nothing_else_grows_at_the_top():
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    there = {name for name in there - LEFT_BY_TOOLS if not name.endswith(".egg-info")}
    assert there - TOP - TOOLS == set()


# --- what a notebook may do ----------------------------------------------------------------------

# what would tie a notebook to one machine: a home folder, a drive, a temporary place
MACHINE_PATH = r"(?<![\w.:/])/(?:home|root|Users|tmp|work|usr|opt|var|mnt)/\w|\b[A-Z]:\\\\?\w"
PATH_HACK = r"sys\.path|PYTHONPATH|os\.chdir|importlib\.util\.spec_from_file"
DOWNLOAD = r"urlopen|urlretrieve|requests\.get|httpx\.|\bwget\b|\bcurl\b|[%!]\s*pip\b|\bpip install"
DOWNLOAD += r"|hub\.load|from_pretrained|load_dataset|snapshot_download"


@every_notebook
@pytest.mark.parametrize("what", [MACHINE_PATH, PATH_HACK, DOWNLOAD], ids=["path", "hack", "fetch"])
def test_no_cell_names_a_machine_hacks_the_path_or_downloads(path, what):
    assert re.findall(what, sources(path)) == []


@every_stored
def test_no_output_names_a_machine(path):
    texts = [json.dumps({**output, "data": without_images(output)}) for output in outputs(path)]
    assert [re.findall(MACHINE_PATH, text) for text in texts if re.search(MACHINE_PATH, text)] == []


def without_images(output: dict) -> dict:
    return {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}


@every_notebook
def test_notebooks_import_public_names_only(path):
    private = []
    for cell in cells(path):
        for node in ast.walk(ast.parse(without_magics("".join(cell["source"])))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or ""
                names = [f"{module}.{alias.name}" for alias in node.names]
                private += [n for n in names if "course_lib" in n and re.search(r"\._(?!_)", n)]
    assert private == []


@every_notebook
def test_a_code_cell_fits_on_one_screen(path):
    longest = max(len("".join(cell["source"]).splitlines()) for cell in cells(path))
    assert longest <= 30


# --- what is stored is what was run --------------------------------------------------------------


@every_stored
def test_every_code_cell_was_run(path):
    """nbval compares only cells with an execution count: without one a cell passes unseen."""
    assert [cell["source"] for cell in cells(path) if cell["execution_count"] is None] == []


@every_stored
def test_cells_were_run_from_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path)]
    assert counts == sorted(counts)


@every_stored
def test_no_error_and_nothing_from_stderr_is_stored(path):
    stored = outputs(path)
    assert [output for output in stored if output["output_type"] == "error"] == []
    assert [output["text"] for output in stored if output.get("name") == "stderr"] == []


@pytest.mark.parametrize("path", BLANKS, ids=lambda path: path.stem)
def test_exercises_hold_no_outputs(path):
    assert outputs(path) == []


@every_notebook
def test_metadata_is_the_same_on_every_machine(path):
    metadata = json.loads(path.read_text(encoding="utf-8"))["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert "widgets" not in metadata
    assert "version" not in metadata.get("language_info", {})


# --- the tests themselves ------------------------------------------------------------------------


def test_annotated_shapes_are_checked_in_every_test():
    model = models.LSTMLanguageModel(vocab_size=5, d_model=4, hidden_size=4)
    with pytest.raises(jaxtyping.TypeCheckError):
        model(torch.zeros(1, 2, 3, dtype=torch.long))  # annotated as (batch, length)


@pytest.mark.bad_input
def test_a_test_of_bad_input_sees_our_own_error():
    flat = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="query") as raised:
        attention(flat, flat, flat)
    assert not isinstance(raised.value, jaxtyping.TypeCheckError)


def test_progress_is_kept_apart_from_the_learners():
    assert Path(os.environ["COURSE_HOME"]).is_relative_to(Path(tempfile.gettempdir()))
