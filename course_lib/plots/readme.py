"""Make what the README shows again: ``python -m course_lib.plots.readme``.

Draws its picture, asks the grader for its message, counts what the graders were tested with, and
takes the verdicts from the ledger of claims.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from course_lib.plots import results
from course_lib.plots._extras import need
from course_lib.plots.chapters import CHAPTERS
from course_lib.plots.course_map import course_map
from course_lib.plots.style import rc_params

PICTURE = Path("notebooks/images/course.png")  # from the course's folder
RACE_PICTURE = Path("notebooks/images/race.png")
README = Path("README.md")

WRONG = """\
def attention(query, key, value, mask=None, return_weights=False):
    scores = query @ key.transpose(-2, -1)  # something is missing here
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    output = weights @ value
    return (output, weights) if return_weights else output


check("attention", attention)
"""


def write(path: Path = PICTURE) -> Path:
    """Draw the map of the course into a PNG file, without a screen; return its path."""
    need("matplotlib").use("agg")
    path.parent.mkdir(parents=True, exist_ok=True)
    course_map().savefig(path, dpi=130, metadata={"Software": None, "Description": summary()})
    return path


def write_race(race: dict[str, Any], path: Path = RACE_PICTURE) -> Path:
    """Draw the race into a PNG file that says which result it shows; return its path."""
    pyplot = need("matplotlib.pyplot")
    with pyplot.rc_context(rc_params()):
        figure: Any = results.race_figure(race).figure
        figure.savefig(path, dpi=130, metadata={"Software": None, "Description": fingerprint(race)})
    return path


def fingerprint(race: dict[str, Any]) -> str:
    """What tells one result of the race from another."""
    return json.dumps([[r["name"], r["seconds"], r["validation"]] for r in race["runners"]])


def summary() -> str:
    """What the picture says, in words: stored in the file, so that a stale picture is found out."""
    return "; ".join(
        f"{chapter.number:02d} {chapter.title}{' (ready)' if chapter.ready else ''}"
        for chapter in CHAPTERS
    )


def message() -> str:
    """A wrong answer, and what the grader really says to it."""
    import math

    import torch

    from course_lib.grading.exercise import find
    from course_lib.grading.judge import judge

    namespace: dict[str, Any] = {"math": math, "torch": torch, "check": lambda *_: None}
    exec(WRONG, namespace)
    verdict = judge(find("attention"), namespace["attention"])
    return f"```python\n{WRONG}```\n\n```\n{verdict}\n```"


def counts() -> str:
    """How the graders did on every answer they were tested with."""
    from course_lib.grading.mutants import examine_all

    totals = examine_all()
    right, wrong = totals["alternatives"], totals["mistakes"]
    return (
        f"{totals['exercises']} exercises: {wrong['rejected']} of {wrong['total']} wrong answers "
        f"are rejected, {wrong['named']} of them by name; {right['accepted']} of "
        f"{right['total']} right answers that look different are accepted."
    )


def verdicts(root: Path = Path()) -> str:
    """The ledger of claims as a table: what is said, what was found, and where."""
    from course_lib.claims import LEDGER

    ledger = json.loads((root / LEDGER).read_text(encoding="utf-8"))
    rows = ["| claim | verdict | chapter |", "|---|---|---|"]
    for findings in ledger.values():
        for found in findings:
            link = f"[{found['chapter'][:2]}](notebooks/{found['chapter']}.ipynb)"
            rows.append(f"| {found['text']} | {found['verdict']} | {link} |")
    return "\n".join(rows)


def fill(text: str, **parts: Callable[[], str]) -> str:
    """The README with generated parts made anew, each between its two comments."""
    for name, make in parts.items():
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end of {name} -->)"
        text = re.sub(pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.DOTALL)
    return text


def parts(root: Path = Path()) -> dict[str, Callable[[], str]]:
    """The parts that are made from measured data alone, by name."""
    return {
        "verdicts": lambda: verdicts(root),
        "race": lambda: results.race_table(results.load("race", root)),
        "efficient": lambda: results.efficiency_table(results.load("efficient", root)),
    }


if __name__ == "__main__":
    print(f"wrote {write()}")
    measured = results.load("race")
    if measured is not None:
        print(f"wrote {write_race(measured)}")
    text = README.read_text(encoding="utf-8")
    README.write_text(fill(text, message=message, counts=counts, **parts()), encoding="utf-8")
    print(f"wrote {README}")
