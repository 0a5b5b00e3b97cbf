"""`course` and `course lab`: found from anywhere in the folder, and clear when it cannot start."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from course_lib import __version__, cli, lab
from course_lib.checkout import CheckoutNotFoundError, find_root

ROOT = Path(__file__).resolve().parent.parent


def course(*arguments, **options) -> subprocess.CompletedProcess:
    """Run the `course` command."""
    command = [sys.executable, "-m", "course_lib.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def taken_port():
    """A port on which something listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


# --- the command ---------------------------------------------------------------------------------


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.strip() == f"course {__version__}"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    commands = ("lab", "doctor", "list", "mutants", "grade", "reset", "status", "build")
    assert [name for name in commands if f"\n    {name}" not in out] == []


def test_an_unknown_command_is_named_beside_the_known_ones(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["lob"])
    assert exit_.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "'lob'" in last
    assert "lab" in last


def test_an_unknown_option_is_an_error_and_not_dropped(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["doctor", "--jsn"])
    assert exit_.value.code == 2
    assert "--jsn" in capsys.readouterr().err


def test_a_missing_package_is_one_line_that_names_the_extra(capsys, monkeypatch):
    def needs_widgets(parsed):
        raise ModuleNotFoundError("No module named 'ipywidgets'", name="ipywidgets.widgets")

    parsed = argparse.Namespace(run=needs_widgets, command="status")
    monkeypatch.setattr(cli, "parse", lambda arguments: parsed)
    assert cli.main([]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'course-lib[learn]'" in error


def test_a_missing_module_of_our_own_is_not_hidden(monkeypatch):
    def broken(parsed):
        raise ModuleNotFoundError("No module named 'course_lib.gone'", name="course_lib.gone")

    parsed = argparse.Namespace(run=broken, command="status")
    monkeypatch.setattr(cli, "parse", lambda arguments: parsed)
    with pytest.raises(ModuleNotFoundError, match=r"course_lib\.gone"):
        cli.main([])


# --- course lab ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["--port={}", "--port {}", "--ServerApp.port={}"])
def test_a_taken_port_is_one_line_that_says_what_to_do(taken_port, form):
    done = course("lab", "--no-browser", *form.format(taken_port).split(), cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"port {taken_port} is taken" in done.stderr
    assert f"--port={taken_port + 1}" in done.stderr


@pytest.mark.parametrize("port", ["http", "70000"])
def test_a_port_that_is_no_port_is_one_line(port, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["lab", f"--port={port}"]) == 1
    assert f"not {port!r}" in capsys.readouterr().err


def test_outside_the_folder_it_says_where_to_go(tmp_path):
    done = course("lab", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "not inside the course's folder" in done.stderr


def test_the_folder_is_found_from_any_place_within(tmp_path):
    assert find_root(ROOT / "course_lib" / "ops") == ROOT
    assert find_root(ROOT) == ROOT
    with pytest.raises(CheckoutNotFoundError):
        find_root(tmp_path)


def test_it_opens_the_first_chapter_unless_another_is_named(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    for name in ("00_start_here", "02_attention"):
        (tmp_path / f"notebooks/{name}.ipynb").touch()
    monkeypatch.chdir(tmp_path / "notebooks")
    url = "--LabApp.default_url=/lab/tree/notebooks/{}.ipynb"
    assert url.format("00_start_here") in lab.command_line(tmp_path, ["--no-browser"])
    named = lab.command_line(tmp_path, ["02_attention.ipynb"])
    assert url.format("02_attention") in named
    assert "02_attention.ipynb" not in named


def test_a_port_that_was_asked_for_is_not_exchanged_for_another(tmp_path):
    assert "--ServerApp.port_retries=0" in lab.command_line(tmp_path, ["--port", "8890"])
    assert "--ServerApp.port_retries=0" not in lab.command_line(tmp_path, [])


def get(url: str, seconds: float = 60) -> str:
    """Fetch a page of a server that may still be starting."""
    until = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def test_it_serves_the_course_and_asks_nobody_for_news(tmp_path):
    """The real server, started from a folder within: first chapter, our kernel, no news."""
    port = free_port()
    command = [sys.executable, "-m", "course_lib.cli", "lab", "--no-browser", f"--port={port}"]
    own = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(
        [*command, "--IdentityProvider.token=test"],
        cwd=ROOT / "tests",
        env=os.environ | own,
        **quiet,
    ) as server:
        try:
            base = f"http://127.0.0.1:{port}"
            page = get(f"{base}/lab?token=test")
            specs = json.loads(get(f"{base}/api/kernelspecs?token=test"))
            start = json.loads(get(f"{base}/api/contents/notebooks?token=test"))
            news = json.loads(get(f"{base}/lab/api/news?token=test"))
            update = json.loads(get(f"{base}/lab/api/update?token=test"))
        finally:
            server.terminate()
    config = json.loads(page.split('id="jupyter-config-data"')[1].split(">", 1)[1].split("<")[0])
    assert config["buildCheck"] is False
    assert "@jupyterlab/apputils-extension:announcements" in str(config["disabledExtensions"])
    assert specs["kernelspecs"]["python3"]["resources"]
    assert start["type"] == "directory"
    assert news == {"news": []}
    assert update == {"notification": None}
