"""Set-up: one clear line for what goes wrong, nothing done twice, nothing left half done."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from course_lib import bootstrap

ROOT = Path(__file__).resolve().parent.parent
PINS = {
    (pin := Requirement(line)).name.lower().replace("_", "-"): pin
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
needs_posix = pytest.mark.skipif(os.name == "nt", reason="uses shell scripts as interpreters")


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path):
    """A folder with all that the set-up reads, and nothing installed."""
    root = tmp_path / "a course"  # with a blank: folders of real people have them
    (root / "course_lib").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "Makefile", "course_lib/bootstrap.py"):
        shutil.copy(ROOT / name, root / name)
    return root


def fake_pip(root: Path, what_pip_does: str, arguments: str = "install") -> Path:
    """Give ``root`` a .venv whose Python is real but whose pip is the shell code given."""
    text = f'case "$*" in *"-m pip {arguments}"*) {what_pip_does} ;; *"-m pip"*) ;; '
    text += f'*) exec "{sys.executable}" "$@" ;; esac'
    return script(root / ".venv/bin/python", text)


def python_that_believes(path: Path, code: str) -> Path:
    """An interpreter that runs a file after ``code``, as if the machine were different."""
    runner = (
        f"import sys, runpy; {code}; sys.argv = sys.argv[1:]; "
        "sys.executable = 'python3'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    text = f"""case "$1" in -I) shift; exec "{sys.executable}" -I -c "{runner}" "$@" ;;
    *) exec "{sys.executable}" "$@" ;; esac"""
    return script(path, text)


def run(command, **options) -> subprocess.CompletedProcess:
    """Run a command without the settings of the make or pytest that runs us."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PYTEST"))}
    env |= options.pop("env", {})
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **options)


def set_up(root: Path, **options) -> subprocess.CompletedProcess:
    return run([sys.executable, "-I", root / "course_lib/bootstrap.py"], **options)


def the_one_line(done: subprocess.CompletedProcess) -> str:
    """The message of a failed set-up; asserts that it is one line, and no traceback."""
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert lines[0].startswith("Set-up stopped: ")
    return lines[0]


# --- what goes wrong is said in one line ---------------------------------------------------------


def test_an_old_python_can_read_the_file_that_tells_it_so():
    ast.parse((ROOT / "course_lib/bootstrap.py").read_text(), feature_version=(3, 6))


@needs_posix
def test_an_old_python_is_told_which_one_is_needed(checkout, tmp_path):
    old = python_that_believes(
        tmp_path / "old/python3", "sys.version_info = (3, 8, 10, 'final', 0)"
    )
    path = "/usr/bin:/bin" if not shutil.which("python3.11", path="/usr/bin:/bin") else "/nowhere"
    line = the_one_line(
        run([old, "-I", checkout / "course_lib/bootstrap.py"], env={"PATH": f"{path}:{old.parent}"})
    )
    assert "needs Python 3.11 or newer" in line
    assert "3.8.10" in line
    assert "make setup PYTHON=" in line


@needs_posix
def test_an_old_python_hands_over_to_a_newer_one_that_runs(checkout, tmp_path):
    old = python_that_believes(
        tmp_path / "bin/python3", "sys.version_info = (3, 8, 10, 'final', 0)"
    )
    script(tmp_path / "bin/python3.14", "echo 'shim: no such version' >&2; exit 127")
    script(tmp_path / "bin/python3.13", f'exec "{sys.executable}" "$@"')
    command = [old, "-I", checkout / "course_lib/bootstrap.py", "--help"]
    done = run(command, env={"PATH": f"{tmp_path / 'bin'}:/nowhere"})
    assert done.returncode == 0, done.stderr
    assert "--this-python" in done.stdout
    assert "shim" not in done.stderr


@needs_posix
def test_make_passes_the_line_on_and_fails(checkout, tmp_path):
    lacking = "import importlib.util as u; find = u.find_spec; "
    lacking += "u.find_spec = lambda name, *a: None if name == 'ensurepip' else find(name, *a)"
    python = python_that_believes(tmp_path / "python3", lacking)
    done = run(["make", "-C", checkout, "setup", f"PYTHON={python}"])
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    assert "lacks the venv module" in lines[0]
    assert "apt install python3." in lines[0]


def test_a_disk_with_too_little_room_is_found_before_the_download(checkout, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**11, 10**11, 4 * 10**8))
    with pytest.raises(bootstrap.SetUpError, match=r"0\.4 GB free .* needs about 3 GB"):
        bootstrap.set_up(checkout)
    assert not (checkout / ".venv").exists()


@needs_posix
def test_a_disk_that_fills_during_the_download_is_one_line(checkout):
    fake_pip(
        checkout,
        "echo 'ERROR: Could not install packages due to an OSError: [Errno 28] "
        "No space left on device'; exit 1",
    )
    assert "the disk is full" in the_one_line(set_up(checkout))


def test_an_index_that_cannot_be_reached_is_one_line(checkout):
    """The real pip against a closed port of this machine."""
    unreachable = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "1",  # pip tells of the network only when it tries again
    }
    assert "the package index cannot be reached" in the_one_line(set_up(checkout, env=unreachable))
    assert bootstrap.decide(checkout) == ("create", "the last set-up was not finished")


ONLY_A_PIN = """
The conflict is caused by:
    The user requested hatchling
    The user requested (constraint) hatchling==1.33.0

ERROR: ResolutionImpossible: for help visit"""


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "ERROR: No matching distribution found for torch==2.13.0",
            "no package index offers torch",
        ),
        ("ERROR: ResolutionImpossible: for help visit", "no set of versions that fits"),
        (ONLY_A_PIN, "no package index offers hatchling==1.33.0"),
        ("noise\nERROR: something new\nmore noise", "pip failed: ERROR: something new"),
        (
            "WARNING: Retrying: NewConnectionError\nERROR: No matching distribution found for x",
            "reach",
        ),
        ("", "pip failed: no message"),
    ],
)
def test_what_pip_says_becomes_one_line(output, said):
    line = bootstrap.explain(output, "pip")
    assert said in line
    assert "\n" not in line


# --- nothing is done twice, nothing is left half done --------------------------------------------


@pytest.fixture
def finished(checkout):
    """A checkout whose set-up is complete (its pip would fail if it were asked)."""
    if os.name == "nt":
        pytest.skip("uses shell scripts as interpreters")
    fake_pip(checkout, "echo pip was called; exit 1")
    bootstrap.write_stamp(checkout, complete=True)
    return checkout


def test_a_second_set_up_does_nothing_and_takes_under_two_seconds(finished):
    started = time.perf_counter()
    done = run(["make", "-C", finished, "setup"])
    assert time.perf_counter() - started < 2
    assert done.returncode == 0, done.stderr
    assert "Set-up is current" in done.stdout


def test_changed_pins_are_installed(finished):
    with (finished / "constraints.txt").open("a") as file:
        file.write("one-more==1.0\n")
    assert bootstrap.decide(finished) == ("install", "the pinned versions changed")
    assert "pip was called" in set_up(finished).stderr


def test_a_changed_requirement_is_installed(finished):
    text = (finished / "pyproject.toml").read_text()
    (finished / "pyproject.toml").write_text(text.replace('"numpy>=1.26"', '"numpy>=1.27"'))
    assert bootstrap.decide(finished)[0] == "install"


def test_a_changed_comment_or_tool_setting_installs_nothing(finished):
    with (finished / "constraints.txt").open("a") as file:
        file.write("# a remark\n\n")
    with (finished / "pyproject.toml").open("a") as file:
        file.write("\n[tool.something]\nnew = true\n")
    assert bootstrap.decide(finished)[0] == "nothing"


def test_a_moved_folder_is_set_up_anew(finished):
    moved = finished.rename(finished.parent / "moved")
    action, reason = bootstrap.decide(moved)
    assert action == "create"
    assert "moved" in reason


def test_a_python_that_is_gone_is_replaced(finished):
    (finished / ".venv/bin/python").unlink()
    (finished / ".venv/bin/python").symlink_to("/nowhere/python3.11")
    assert bootstrap.decide(finished)[0] == "create"


def test_a_python_that_was_replaced_underneath_is_noticed(finished):
    stamp = json.loads(bootstrap.stamp_path(finished).read_text())
    bootstrap.stamp_path(finished).write_text(json.dumps(stamp | {"python": [3, 99]}))
    assert bootstrap.decide(finished) == ("create", "the Python under .venv has changed")


def test_an_environment_made_by_hand_is_kept_and_completed(checkout):
    if os.name == "nt":
        pytest.skip("uses shell scripts as interpreters")
    fake_pip(checkout, "exit 0")
    mark = checkout / ".venv/mine"
    mark.touch()
    assert set_up(checkout).returncode == 0
    assert mark.exists()
    assert bootstrap.decide(checkout)[0] == "nothing"


def test_an_environment_without_pip_is_made_anew(checkout):
    if os.name == "nt":
        pytest.skip("uses shell scripts as interpreters")
    fake_pip(checkout, "echo No module named pip >&2; exit 1", arguments="--version")
    assert bootstrap.decide(checkout) == ("create", "there is no pip in .venv")


def test_an_environment_is_never_half_removed_in_its_place(finished, monkeypatch):
    """Interrupted while the old one is removed, .venv says that it is not finished."""

    def interrupted(path, **options):
        if Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bootstrap.create_venv(finished)
    assert bootstrap.decide(finished) == ("create", "the last set-up was not finished")


@needs_posix
def test_an_interrupted_set_up_is_begun_anew(checkout):
    fake_pip(checkout, "exec sleep 60")
    command = [sys.executable, "-I", checkout / "course_lib/bootstrap.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        while "installing" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert error.strip() == "Set-up interrupted; the next call starts over cleanly."
    assert bootstrap.decide(checkout) == ("create", "the last set-up was not finished")


# --- the lists agree -----------------------------------------------------------------------------


def requirements() -> list[str]:
    extras = PYPROJECT["project"]["optional-dependencies"].values()
    listed = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["build-system"]["requires"]]
    return sorted({*listed, *(requirement for extra in extras for requirement in extra)})


@pytest.mark.parametrize("requirement", requirements())
def test_every_requirement_has_a_floor_and_a_pin_that_satisfies_it(requirement):
    required = Requirement(requirement)
    assert [s.operator for s in required.specifier] == [">="], "pyproject.toml holds floors only"
    pin = PINS[required.name.lower().replace("_", "-")]
    assert [s.operator for s in pin.specifier] == ["=="]
    assert required.specifier.contains(next(iter(pin.specifier)).version)


def test_no_pin_names_a_local_build():
    """torch==2.13.0 takes a CPU and a CUDA build alike, torch==2.13.0+cpu only one of them."""
    local = [str(pin) for pin in PINS.values() if "+" in str(pin.specifier)]
    assert local == []


def test_everything_installed_here_is_the_pinned_version():
    if bootstrap.decide(ROOT)[0] != "nothing" or Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("this environment was not made by make setup")
    from importlib.metadata import distributions

    have = {d.name.lower().replace("_", "-"): d.version.partition("+")[0] for d in distributions()}
    wrong = {name: v for name, v in have.items() if name in PINS and v not in str(PINS[name])}
    assert wrong == {}


def test_conda_users_get_the_same_thing():
    """conda brings Python and pip; the packages come from the same two files."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (by_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert [re.match(r"\w+", entry)[0] for entry in by_conda] == ["python", "pip"]
    floor = PYPROJECT["project"]["requires-python"]
    assert by_conda[0].startswith(f"python{floor}")
    assert by_pip == ["-c constraints.txt", f"-e .[{bootstrap.EXTRAS}]"]
    assert set(bootstrap.EXTRAS.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])


def test_the_ci_script_is_sound_and_runs_make_test():
    assert run(["bash", "-n", ROOT / ".ci/run"]).returncode == 0
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "make test" in (ROOT / ".ci/run").read_text()
