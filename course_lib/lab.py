"""``course lab``: JupyterLab on the course's first chapter, with nothing that calls home."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from course_lib.checkout import find_root

START = "notebooks/00_start_here.ipynb"
SETTINGS = Path(__file__).parent / "lab_settings"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``course lab``."""
    parser = subparsers.add_parser(
        "lab",
        help="open the course in JupyterLab",
        usage="course lab [NOTEBOOK] [ARGUMENTS OF jupyter lab]",
        description=f"Open JupyterLab on {START}, or on the notebook named.",
        epilog="All arguments go to JupyterLab, e.g. --no-browser --port=8890.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, passed_on=[])


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``, the last one given, or None."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, inline = argument.partition("=")
        if name in names:
            value = inline if equals else following
    return value


def is_taken(port: int, address: str = "127.0.0.1") -> bool:
    """Whether something already listens on the port (a program of another user, too)."""
    with socket.socket() as probe:
        if os.name == "posix":  # a port that was closed a moment ago is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return True
    return False


def port_problem(arguments: Sequence[str]) -> str | None:
    """One line if a port was asked for and cannot be had; None if all is well."""
    port = option(arguments, "--port", "--ServerApp.port")
    if port is None:
        return None  # JupyterLab looks for a free one by itself
    if not port.isdecimal() or not 0 <= int(port) < 65536:
        return f"--port must be a number from 0 to 65535, not {port!r}."
    if int(port) and is_taken(int(port)):
        return (
            f"port {port} is taken by another program (perhaps a JupyterLab still running: "
            f"jupyter lab list). Name another, e.g. --port={min(int(port) + 1, 65535)}, or none."
        )
    return None


def command_line(root: Path, arguments: Sequence[str]) -> list[str]:
    """The command that opens JupyterLab in ``root`` on the notebook named, or on the first."""
    notebooks = [a for a in arguments if not a.startswith("-") and a.endswith(".ipynb")]
    shown = Path(notebooks[-1]).resolve() if notebooks else root / START
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    if shown.is_relative_to(root) and shown.is_file():
        command.append(f"--LabApp.default_url=/lab/tree/{shown.relative_to(root).as_posix()}")
    if option(arguments, "--port", "--ServerApp.port"):
        command.append("--ServerApp.port_retries=0")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return command + [a for a in arguments if a not in notebooks]


def environment() -> dict[str, str]:
    """The environment JupyterLab runs in: our settings, and the kernel of this very Python."""
    paths = [str(SETTINGS), *filter(None, [os.environ.get("JUPYTER_CONFIG_PATH")])]
    own = {"JUPYTER_CONFIG_PATH": os.pathsep.join(paths), "JUPYTER_PREFER_ENV_PATH": "1"}
    return {**os.environ, **own}


def run(parsed: argparse.Namespace) -> int:
    """Open JupyterLab; return only if that failed (on Windows: when it ended)."""
    root = find_root()
    if importlib.util.find_spec("jupyterlab") is None:
        raise ModuleNotFoundError("No module named 'jupyterlab'", name="jupyterlab")
    problem = port_problem(parsed.passed_on)
    if problem:
        print(f"course lab: {problem}", file=sys.stderr)
        return 1
    command = command_line(root, parsed.passed_on)
    os.chdir(root)
    if os.name == "nt":
        return subprocess.call(command, env=environment())
    sys.stdout.flush()
    os.execve(command[0], command, environment())  # so that Ctrl-C reaches JupyterLab itself
