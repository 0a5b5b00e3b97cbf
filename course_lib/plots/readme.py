"""Draw the picture of the README again: ``python -m course_lib.plots.readme``."""

from __future__ import annotations

import sys
from pathlib import Path

from course_lib.plots._extras import need
from course_lib.plots.chapters import CHAPTERS
from course_lib.plots.course_map import course_map

PICTURE = Path("notebooks/images/course.png")  # from the course's folder


def write(path: Path = PICTURE) -> Path:
    """Draw the map of the course into a PNG file, without a screen; return its path."""
    need("matplotlib").use("agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    course_map().savefig(path, dpi=130, metadata={"Software": None, "Description": summary()})
    return path


def summary() -> str:
    """What the picture says, in words: stored in the file, so that a stale picture is found out."""
    return "; ".join(
        f"{chapter.number:02d} {chapter.title}{' (ready)' if chapter.ready else ''}"
        for chapter in CHAPTERS
    )


if __name__ == "__main__":
    print(f"wrote {write(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)}")
