"""Measure how long each chapter takes, for ``course doctor`` to scale to other machines.

Runs every notebook in notebooks/ in a fresh kernel (the files are not changed) and writes
benchmarks/results/chapters.json: seconds per chapter, how fast this machine is, date, versions.
"""

import datetime
import json
import platform
import statistics
import sys
from pathlib import Path

import torch

from course_lib import checkout, doctor, render


def main(repeats: int = 1) -> int:
    """Time all chapters ``repeats`` times; the median is stored."""
    root = checkout.find_root(Path(__file__).parent)
    before = doctor.calibrate()
    chapters = {}
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        seconds = statistics.median(render.execute(path)[1] for _ in range(repeats))
        chapters[path.stem] = {"seconds": round(seconds, 1)}
        print(f"{path.stem}: {seconds:.1f} s", flush=True)
    after = doctor.calibrate()
    result = {
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "repeats": repeats,
        "calibration": {name: round((before[name] + after[name]) / 2, 1) for name in before},
        "chapters": chapters,
    }
    target = root / doctor.CHAPTER_SECONDS
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
