"""What an engineer gets: a small typed package that imports fast, and a house with floors."""

import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOT_FOR_ENGINEERS = {
    *("jupyterlab", "jupyter-core", "notebook", "ipykernel", "ipython", "ipywidgets"),
    *("matplotlib", "tqdm", "nbformat", "nbclient", "pytest", "psutil", "platformdirs"),
}


def run(*command, **options) -> subprocess.CompletedProcess:
    """Run a command in the repository and capture what it prints."""
    options = {"cwd": ROOT, "text": True, "capture_output": True, "timeout": 240} | options
    return subprocess.run([str(part) for part in command], **options)


def tool(name: str) -> Path:
    """A command of this environment."""
    return Path(sys.executable).parent / name


def python(code: str, **options) -> str:
    """What a fresh interpreter prints."""
    done = run(sys.executable, "-c", code, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package, built as it is released."""
    out = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("course_lib-*.whl"))


def needs(distribution: str, seen: set[str]) -> set[str]:
    """The names of all distributions that installing one brings, as installed here."""
    for line in importlib.metadata.requires(distribution) or []:
        required = Requirement(line)
        name = required.name.lower().replace("_", "-")
        if name not in seen and (not required.marker or required.marker.evaluate({"extra": ""})):
            seen |= {name} | needs(required.name, seen | {name})
    return seen


def test_a_plain_install_brings_no_jupyter_and_no_plotting():
    brought = needs("course-lib", set())
    assert {"torch", "numpy", "jaxtyping"} <= brought
    assert not brought & NOT_FOR_ENGINEERS


def test_the_wheel_asks_for_three_packages_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [Requirement(line[15:]) for line in lines if line.startswith("Requires-Dist: ")]
    base = {r.name for r in required if "extra" not in str(r.marker)}
    assert base == {"torch", "numpy", "jaxtyping"}


def test_the_wheel_carries_the_package_and_nothing_of_the_course_folder(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "course_lib/py.typed" in names
    assert "course_lib/lab_settings/labconfig/page_config.json" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"course_lib"}


USES_IT_WITHOUT_EXTRAS = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocked())
import course_lib, torch
from course_lib import attention, masks
query = torch.randn(2, 3, 5, 8)
output = attention(query, query, query, masks.causal())
assert output.shape == query.shape and output.isfinite().all()
print(course_lib.__file__)
"""


def test_the_installed_wheel_computes_attention_without_any_extra(wheel, tmp_path):
    command = ("pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path, wheel)
    assert run(sys.executable, "-m", *command).returncode == 0
    blocked = {"matplotlib", "IPython", "ipywidgets", "tqdm", "jupyter_core", "jupyterlab"}
    blocked |= {"nbformat", "nbclient", "psutil", "platformdirs", "pytest", "beartype"}
    code = USES_IT_WITHOUT_EXTRAS.format(blocked=blocked)
    where = python(code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert Path(where.strip()).is_relative_to(tmp_path)


# --- importing -----------------------------------------------------------------------------------

TIME_THE_IMPORT = """
import time, torch
started = time.perf_counter()
import course_lib
course_lib.attention, course_lib.masks
print(time.perf_counter() - started)
"""


def test_importing_takes_under_300_ms_beyond_torchs_own():
    """The median of five fresh interpreters."""
    assert statistics.median(float(python(TIME_THE_IMPORT)) for _ in range(5)) < 0.3


def test_importing_loads_neither_plots_nor_notebooks_nor_flex_attention():
    code = "import sys, torch; own = set(sys.modules); import course_lib; course_lib.attention; "
    loaded = set(python(code + "print('\\n'.join(set(sys.modules) - own))").split())
    unwanted = {"matplotlib", "IPython", "ipywidgets", "tqdm", "jupyter_core"}
    unwanted |= {"torch.nn.attention.flex_attention", "course_lib.plots", "course_lib.checks"}
    assert "course_lib.masks" in loaded
    assert not loaded & unwanted


def test_asking_for_help_does_not_load_torch():
    code = (
        "import sys; from course_lib import cli; cli.build_parser(); print('torch' in sys.modules)"
    )
    assert python(code).strip() == "False"


# --- the floors of the house ---------------------------------------------------------------------


def test_modules_import_only_from_the_floors_below():
    done = run(tool("lint-imports"), "--no-cache")
    assert done.returncode == 0, done.stdout


def test_an_import_from_a_floor_above_is_reported(tmp_path):
    """The contract can fail: a copy of the package with one wrong import breaks it."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "course_lib", tmp_path / "course_lib", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "course_lib/masks.py").open("a") as file:
        file.write("\n\ndef _up():\n    from course_lib import layers\n    return layers\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run(tool("lint-imports"), "--no-cache", cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "course_lib.masks -> course_lib.layers" in done.stdout


# --- types and style -----------------------------------------------------------------------------


def type_errors(*files: Path, **options) -> list[dict]:
    """What the type checker reports about files, or about all that pyproject.toml names."""
    done = run(tool("pyrefly"), "check", "--output-format", "json", *files, **options)
    return json.loads(done.stdout)["errors"]


def test_the_public_api_and_code_that_uses_it_pass_the_type_checker():
    errors = type_errors()
    assert [f"{e['path']}:{e['line']} {e['description'][:200]}" for e in errors] == []


def test_the_type_checker_sees_a_wrong_call(tmp_path):
    """Types reach the user: a mask that is a string, and a number taken for a tensor."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from torch import Tensor, zeros\n"
        "from course_lib import attention\n"
        "q = zeros(1, 1, 2, 2)\n"
        "right: Tensor = attention(q, q, q)\n"
        "attention(q, q, q, 'causal')\n"
        "attention(q, q, q, scale='large')\n"
    )
    settings = {"python-interpreter-path": sys.executable, "search-path": [str(ROOT)]}
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    (tmp_path / "pyrefly.toml").write_text("\n".join(lines))
    assert sorted(e["line"] for e in type_errors(wrong, cwd=tmp_path)) == [5, 6]


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=["check", "format"])
def test_ruff_finds_nothing(command):
    folders = ("course_lib", "tests", "benchmarks", "notebooks", "solutions", "exercises")
    there = [folder for folder in folders if (ROOT / folder).is_dir()]
    done = run(tool("ruff"), *command, *there)
    assert done.returncode == 0, done.stdout
