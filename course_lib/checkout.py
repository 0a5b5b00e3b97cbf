"""Where the course's own folder is: the checkout with notebooks, exercises and solutions."""

from __future__ import annotations

from pathlib import Path


class CheckoutNotFoundError(Exception):
    """The command needs the course's folder and was called outside it; the message is one line."""


def find_root(start: Path | str | None = None) -> Path:
    """The course's folder that holds ``start``.

    Args:
        start: where to look from, upwards; the current directory when None.

    Raises:
        CheckoutNotFoundError: neither ``start`` nor any folder above it is the course's.
    """
    start = Path(start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "course_lib").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise CheckoutNotFoundError(
        f"{start} is not inside the course's folder. Go to the folder you cloned, and try again."
    )
