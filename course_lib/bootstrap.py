"""Set the course up: create ``.venv`` and install the pinned packages into it.

Run by ``make setup`` with whatever Python the machine has, before anything is installed:
``python3 course_lib/bootstrap.py``. So this file needs the standard library only, and its syntax
is kept to what Python 3.6 can read: a Python that is too old gets one clear line.
"""

import argparse
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

OLDEST = (3, 11)
NEWER_PYTHONS = ("python3.14", "python3.13", "python3.12", "python3.11")
ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "learn,test"
NEEDED_GB = 3.0  # measured: 1.6 GB installed with a CPU build of torch, and pip unpacks beside it

_IS_NEW_ENOUGH = f"import sys; sys.exit(sys.version_info < {OLDEST})"


def leave_an_old_python():
    """Go on with a newer Python if this machine has one; otherwise say so in one line."""
    for name in NEWER_PYTHONS:
        path = shutil.which(name)
        # a version manager's shim may stand on the PATH and yet not run, so try it
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if path and subprocess.call([path, "-c", _IS_NEW_ENOUGH], **silent) == 0:
            os.execv(path, [path, "-I", str(Path(__file__).resolve()), *sys.argv[1:]])
    have, need = ".".join(map(str, sys.version_info[:3])), ".".join(map(str, OLDEST))
    sys.exit(
        f"Set-up stopped: the course needs Python {need} or newer, and {sys.executable} is {have}. "
        "Install a newer one, or name one you have: make setup PYTHON=/path/to/python3.12"
    )


if sys.version_info < OLDEST:
    leave_an_old_python()


class SetUpError(Exception):
    """Set-up cannot go on; the message is one line that says why and what to do."""


# --- what is wanted, and what is there -----------------------------------------------------------


def venv_python(root: Path) -> Path:
    """The path of the virtual environment's interpreter."""
    return root / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def stamp_path(root: Path) -> Path:
    """The file that says what was installed, and whether it was finished."""
    return root / ".venv" / "course-setup.json"


def pins_hash(root: Path) -> str:
    """A hash that changes when what would be installed changes, and only then."""
    import tomllib  # here, because a Python before 3.11 has none

    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject.get("project", {})
    sections = ("dependencies", "optional-dependencies", "requires-python", "scripts")
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = {
        "pins": sorted(line.strip() for line in lines if line.strip() and line[0] != "#"),
        "build": pyproject.get("build-system"),
        "project": {name: project.get(name) for name in sections},
        "extras": EXTRAS,
    }
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def read_stamp(root: Path) -> dict:
    """The stamp of the last set-up, or an empty one."""
    try:
        return json.loads(stamp_path(root).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def version_of(python: Path) -> "tuple[int, int] | None":
    """The version an interpreter reports when it is run, or None if it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        out = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60)
        major, minor = out.stdout.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def has_pip(python: Path) -> bool:
    """Whether an interpreter can run pip."""
    command = [python, "-I", "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True).returncode == 0


def decide(root: Path, only_this_python: bool = False) -> "tuple[str, str]":
    """What to do: ("nothing" | "install" | "create", the reason in a few words)."""
    if not (root / ".venv").exists():
        return "create", "first set-up"
    stamp = read_stamp(root)
    if stamp.get("complete") is False:
        return "create", "the last set-up was not finished"
    if stamp.get("root", str(root)) != str(root):
        return "create", "the folder was moved, and a virtual environment cannot move with it"
    version = version_of(venv_python(root))
    if version is None:
        return "create", "the Python in .venv does not run any more"
    if version < OLDEST:
        return "create", "the Python in .venv is too old"
    if list(version) != stamp.get("python", list(version)):
        return "create", "the Python under .venv has changed"
    if only_this_python and version != sys.version_info[:2]:
        return "create", "another Python was asked for"
    if not stamp and not has_pip(venv_python(root)):
        return "create", "there is no pip in .venv"
    if stamp.get("pins") != pins_hash(root):
        return "install", "the pinned versions changed" if stamp else ".venv was not set up by us"
    return "nothing", "nothing changed"


# --- doing it ------------------------------------------------------------------------------------


def check_this_machine(root: Path) -> None:
    """Raise SetUpError for what is known to fail before minutes of download are spent on it."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        major, minor = sys.version_info[:2]
        raise SetUpError(
            f"{sys.executable} lacks the venv module. On Debian and Ubuntu: "
            f"sudo apt install python{major}.{minor}-venv"
        )
    free = shutil.disk_usage(root).free / 1e9
    if free < NEEDED_GB:
        raise SetUpError(
            f"the disk has {free:.1f} GB free under {root}, and the course needs about "
            f"{NEEDED_GB:.0f} GB. Free some space, then run it again"
        )


def write_stamp(root: Path, complete: bool) -> None:
    """Record what is in .venv. Written before the work as well: an interruption leaves a trace."""
    stamp: dict = {"complete": complete, "root": str(root)}
    if complete:
        stamp |= {"python": version_of(venv_python(root)), "pins": pins_hash(root)}
    stamp_path(root).write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")


def create_venv(root: Path) -> None:
    """Make .venv from nothing with the Python that runs this file."""
    check_this_machine(root)
    venv = root / ".venv"
    # an interpreter inside the folder we are about to remove cannot make its own successor
    base = getattr(sys, "_base_executable", None) or sys.executable
    old = root / ".venv.old"  # renamed at once and removed later: never half removed in its place
    shutil.rmtree(old, ignore_errors=True)
    if venv.exists() or venv.is_symlink():
        venv.rename(old)
    venv.mkdir()
    write_stamp(root, complete=False)
    old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)
    command = [base, "-I", "-m", "venv", str(venv)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SetUpError(explain(done.stdout, "python -m venv"))


def pip_install(root: Path, *arguments: str) -> None:
    """Run pip in .venv and show what it does; the user's own pip settings stay in force."""
    command = [str(venv_python(root)), "-I", "-m", "pip", "install", "-c", "constraints.txt"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    lines = []
    pip = subprocess.Popen(command, cwd=root, text=True, errors="replace", **pipes)
    with pip, Progress() as progress:
        for line in pip.stdout or ():
            lines.append(line)
            progress.saw(line.strip())
    with (root / ".venv" / "setup.log").open("a", encoding="utf-8") as log:
        log.writelines(lines)
    if pip.returncode:
        raise SetUpError(explain("".join(lines), "pip"))


def explain(output: str, tool: str) -> str:
    """One line for why pip or venv failed, from what it printed."""
    for pattern, meaning in FAILURES:
        found = re.search(pattern, output)
        if found:
            return meaning.format(*found.groups())
    last = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in last if line.startswith("ERROR")] or last
    return f"{tool} failed: {errors[-1][:300]} (all of it: .venv/setup.log)"


NOT_OFFERED = (
    "no package index offers {0} for this Python and system. Offline, or PIP_NO_INDEX set? "
    "(pip config list)"
)
# Tried in this order: a full disk and a dead network also make pip print the later messages.
FAILURES = (
    (
        r"No space left on device|Errno 28\b|[Dd]isk quota exceeded|not enough space on the disk",
        "the disk is full. Free about 3 GB (also where TMPDIR and pip's cache are), "
        "then run it again",
    ),
    (
        r"ensurepip is not available|No module named '?ensurepip",
        "this Python lacks the venv module. On Debian and Ubuntu: sudo apt install python3-venv",
    ),
    (
        r"NewConnectionError|Connect(?:ion|Timeout)Error|ReadTimeoutError|Read timed out|ProxyError"
        r"|SSLError|name resolution|Max retries exceeded|Failed to establish|Connection broken"
        r"|Connection refused|Connection reset|Network is unreachable|Could not fetch URL",
        "the package index cannot be reached. Check the network (or the proxy), then run it again: "
        "what was downloaded is kept",
    ),
    (r"No matching distribution found for (\S+)", NOT_OFFERED),
    (
        # pip calls it a conflict when the one pinned version is not on offer
        r"caused by:\n +The user requested .*\n +The user requested \(constraint\) (\S+)\n\n",
        NOT_OFFERED,
    ),
    (
        r"conflicting dependencies|ResolutionImpossible",
        "pip finds no set of versions that fits together; .venv/setup.log says which. "
        "Is a constraint of your own in force? (pip config list)",
    ),
)


class Progress:
    """Says what pip is doing: one line rewritten on a terminal, a line every 15 s in a log."""

    def __init__(self) -> None:
        self.doing, self.started, self.seen = "asking the package index", time.monotonic(), 0
        self.live = sys.stdout.isatty()
        self.stop = threading.Event()
        self.ticker = threading.Thread(target=self.tick, daemon=True)

    def __enter__(self) -> "Progress":
        self.ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.ticker.join()
        if self.live:
            print("\r\x1b[K", end="", flush=True)

    def saw(self, line: str) -> None:
        """Turn a line of pip's into what it means for the one who waits."""
        name = re.match(r"(?:Collecting|Requirement already satisfied:) ([\w.-]+)", line)
        size = re.match(r"Downloading (\S+?)-\d\S* \((.+?)\)", line)
        if name:
            self.seen += 1
            self.doing = f"package {self.seen}: {name[1]}"
        elif size:
            self.doing = f"package {self.seen}: downloading {size[1]} ({size[2]})"
        elif line.startswith("Installing collected packages"):
            self.doing = f"unpacking {line.count(',') + 1} packages"
        elif "Retrying" in line:
            self.doing = "no answer from the package index, trying again"

    def tick(self) -> None:
        """Show the state until told to stop."""
        while not self.stop.wait(1 if self.live else 15):
            state = f"  {time.monotonic() - self.started:4.0f} s  {self.doing}"
            print(f"\r{state[:78]}\x1b[K" if self.live else state, end="", flush=True)
            if not self.live:
                print(flush=True)


def set_up(root: Path, only_this_python: bool = False) -> str:
    """Bring .venv to what pyproject.toml and constraints.txt ask for; return the closing line."""
    action, reason = decide(root, only_this_python)
    if action == "nothing":
        return "Set-up is current: .venv has what constraints.txt pins."
    started = time.monotonic()
    print(f"Setting up .venv ({reason}): this needs the network and a few minutes.", flush=True)
    if action == "create":
        create_venv(root)
    write_stamp(root, complete=False)
    print("  installing the packages that constraints.txt pins", flush=True)
    pip_install(root, "hatchling")  # builds this package without an environment of its own
    pip_install(root, "--no-build-isolation", "-e", f".[{EXTRAS}]")
    write_stamp(root, complete=True)
    return f"Set-up is done, in {time.monotonic() - started:.0f} s."


def main() -> int:
    """Set up, and turn every foreseeable failure into one line and exit code 1."""
    parser = argparse.ArgumentParser(description="Create .venv and install the pinned packages.")
    parser.add_argument(
        "--this-python", action="store_true", help="remake .venv if it was made by another Python"
    )
    only_this_python = parser.parse_args().this_python
    try:
        print(set_up(ROOT, only_this_python), flush=True)
    except SetUpError as error:
        print(f"Set-up stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up interrupted; the next call starts over cleanly.", file=sys.stderr)
        return 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        print(f"Set-up stopped: {FAILURES[0][1] if full else error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
