"""``course doctor``: what this machine has and lacks, and how long each chapter will take."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from course_lib.checkout import CheckoutNotFoundError, find_root

CHAPTER_SECONDS = "benchmarks/results/chapters.json"
CALIBRATION_SECONDS = 2.0
LEAST_FREE_GB = 1.0
LEAST_MEMORY_GB = 2.0


@dataclass
class Finding:
    """One line of the report: what was looked at, what was found, and what is wrong with it.

    ``problem`` is None when all is well; ``mend`` is the command that mends it, or that adds what
    is optional.
    """

    name: str
    value: str
    problem: str | None = None
    mend: str | None = None


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add ``course doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has, what is missing, and the minutes each chapter takes",
        description="Look at this machine. Exit code 1 if something needs mending.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


# --- what is there -------------------------------------------------------------------------------


def installed(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def look_at_python() -> Finding:
    """This Python, and whether it is one the course runs on."""
    found = Finding("Python", f"{platform.python_version()} ({sys.executable})")
    if sys.version_info < (3, 11):  # noqa: UP036 - a copied folder may be run by any Python
        found.problem, found.mend = "the course needs 3.11", "make setup PYTHON=python3.11"
    return found


def look_at_set_up() -> Finding:
    """Whether .venv holds what constraints.txt pins now."""
    from course_lib import bootstrap

    try:
        root = find_root()
    except CheckoutNotFoundError:
        return Finding("Set-up", "used as a library, outside the course's folder")
    if not (root / "constraints.txt").exists():
        return Finding("Set-up", "no constraints.txt here")
    action, reason = bootstrap.decide(root)
    if action == "nothing":
        return Finding("Set-up", ".venv has what constraints.txt pins")
    if Path(sys.prefix) != root / ".venv":
        return Finding("Set-up", f"your own environment ({sys.prefix})")
    return Finding("Set-up", reason, problem=".venv is not what is pinned", mend="make setup")


def look_at_torch() -> Finding:
    """torch's version, its build and its threads."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return Finding("torch", f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)")


def look_at_gpu() -> Finding:
    """The GPU torch can use, or why it uses none."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Finding("GPU", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    if getattr(torch.backends, "mps", None) and torch.backends.mps.is_available():
        return Finding("GPU", "Apple's, through MPS (the course runs on the CPU all the same)")
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        version = torch.__version__.partition("+")[0]
        mend = f"pip install --force-reinstall --no-deps torch=={version}  # from a CUDA index"
        return Finding("GPU", "there is one, but this torch is a CPU build", mend=mend)
    return Finding("GPU", "none; every chapter runs without one")


def look_at_triton() -> Finding:
    """Which mode Triton's kernels run in: native, interpreter, or not at all."""
    import torch

    version = installed("triton")
    if version is None:
        if platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64"):
            mend = "pip install -c constraints.txt 'course-lib[triton]'"
            return Finding("Triton", "not installed (optional: the GPU kernels)", mend=mend)
        return Finding("Triton", "not installed (there is none for this system)")
    asked = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    mode = "native" if torch.cuda.is_available() and not asked else "interpreter"
    return Finding("Triton", f"{version}, {mode}")


def look_at_compiler() -> Finding:
    """The C++ compiler that torch.compile needs (and nothing else in the course)."""
    names = ("c++", "g++", "clang++", "cl")
    path = next(filter(None, map(shutil.which, names)), None)
    if path:
        return Finding("C++ compiler", path)
    mend = {
        "Linux": "sudo apt install g++",
        "Darwin": "xcode-select --install",
    }.get(platform.system(), "install the Visual Studio Build Tools")
    return Finding("C++ compiler", "none (optional: torch.compile needs one)", mend=mend)


def look_at_memory() -> Finding:
    """Memory in all and free."""
    if importlib.util.find_spec("psutil") is None:
        return Finding("Memory", "unknown without psutil", mend="pip install 'course-lib[learn]'")
    import psutil

    memory = psutil.virtual_memory()
    found = Finding("Memory", f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free")
    if memory.available < LEAST_MEMORY_GB * 1e9:
        found.problem = f"the chapters want {LEAST_MEMORY_GB:.0f} GB free"
        found.mend = "close other programs and idle kernels (JupyterLab: Running > Shut Down All)"
    return found


def look_at_disk() -> Finding:
    """Free space where the course is."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    found = Finding("Free disk", f"{free:.1f} GB")
    if free < LEAST_FREE_GB:
        found.problem, found.mend = f"less than {LEAST_FREE_GB:.0f} GB", "pip cache purge"
    return found


def look_at_cores() -> Finding:
    """The processor cores this process may use."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return Finding("Cores", str(len(usable)))


def look_at_data() -> Finding:
    """The text that the chapters train on."""
    from course_lib import data

    try:
        length = len(data.python_docs())
        return Finding("Data", f"Python's own documentation, {length:,} characters")
    except RuntimeError as error:
        return Finding("Data", "none", problem=str(error), mend="make setup PYTHON=python3.12")


def look_at_extras() -> Finding:
    """Which extras of the package are installed; a learner needs ``learn``."""
    missing: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("course-lib") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        if name and extra:
            lacking = missing.setdefault(extra[1], [])
            lacking += [] if installed(name[0]) else [name[0]]
    complete = [extra for extra, lacking in missing.items() if not lacking]
    found = Finding("Extras", ", ".join(complete) or "none")
    if missing.get("learn"):
        found.problem = f"for the notebooks {', '.join(missing['learn'])} is missing"
        found.mend = "pip install 'course-lib[learn]'"
    return found


LOOKS: tuple[Callable[[], Finding], ...] = (
    look_at_python,
    look_at_set_up,
    look_at_torch,
    look_at_gpu,
    look_at_triton,
    look_at_compiler,
    look_at_cores,
    look_at_memory,
    look_at_disk,
    look_at_data,
    look_at_extras,
)

# --- how long the chapters will take -------------------------------------------------------------


def rate(work: Callable[[], object], seconds: float) -> float:
    """How often per second ``work`` runs: the median over ten slices, so that a stall costs one."""
    work()  # the first call allocates and warms up
    rates = []
    for _ in range(10):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds / 10:
            work()
            count += 1
        rates.append(count / (time.perf_counter() - started))
    return statistics.median(rates)


def calibrate(seconds: float = CALIBRATION_SECONDS) -> dict[str, float]:
    """Measure this machine for about ``seconds``.

    Returns:
        Runs per second of a large product (what attention over long texts costs) and of a small
        training step (what the overhead of each operation costs).
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    large = torch.randn(384, 384, generator=generator)
    weight = torch.randn(64, 64, generator=generator, requires_grad=True)
    tokens = torch.randn(32, 64, generator=generator)

    def small_step() -> None:
        scores = torch.softmax(tokens @ weight, dim=-1)  # (32, 64) x (64, 64) -> (32, 64)
        torch.autograd.grad((scores @ weight.T).square().mean(), weight)  # -> (32, 64) -> scalar

    return {
        "products_per_second": rate(lambda: large @ large, seconds / 2),
        "small_steps_per_second": rate(small_step, seconds / 2),
    }


def slower_by(here: dict[str, float], there: dict[str, float]) -> float:
    """How many times slower than ``there`` this machine is: the mean over what was measured."""
    return statistics.fmean(there[name] / here[name] for name in there)


def minutes_by_chapter(root: Path, here: dict[str, float]) -> dict[str, float]:
    """The minutes each chapter will take here, from the seconds measured elsewhere."""
    path = root / CHAPTER_SECONDS
    if not path.exists():
        return {}
    measured = json.loads(path.read_text(encoding="utf-8"))
    factor = slower_by(here, measured["calibration"])
    return {
        stem: chapter["seconds"] * factor / 60 for stem, chapter in measured["chapters"].items()
    }


def look_at_chapters() -> tuple[dict[str, float], Finding]:
    """The minutes of each chapter, and what can be said about them."""
    try:
        minutes = minutes_by_chapter(find_root(), calibrate())
    except CheckoutNotFoundError:
        return {}, Finding("Chapters", "not here: outside the course's folder")
    if not minutes:
        return {}, Finding("Chapters", "never timed", mend="make bench-chapters")
    return minutes, Finding(
        "Chapters", f"{len(minutes)}, {sum(minutes.values()):.1f} min to run them all"
    )


# --- the report ----------------------------------------------------------------------------------


def as_text(findings: list[Finding], minutes: dict[str, float]) -> str:
    """The report a person reads: problems marked, each with the command that mends it."""
    lines = []
    for found in findings:
        lines.append(f"{'!' if found.problem else ' '} {found.name:<14}{found.value}")
        if found.problem:
            lines.append(f"{'':16}problem: {found.problem}")
        if found.mend:
            lines.append(f"{'':16}{'mend' if found.problem else 'to add it'}: {found.mend}")
    lines += [f"{'':16}{stem:<28}{value:5.1f} min" for stem, value in minutes.items()]
    count = sum(found.problem is not None for found in findings)
    lines.append("No problem found." if not count else f"Problems: {count}")
    return "\n".join(lines)


def look_safely(look: Callable[[], Finding]) -> Finding:
    """One look; what it needs and does not find is itself a finding."""
    try:
        return look()
    except ModuleNotFoundError as error:
        name = look.__name__.removeprefix("look_at_").capitalize()
        return Finding(name, "cannot tell", problem=str(error), mend="make setup")


def run(parsed: argparse.Namespace) -> int:
    """Look at everything and report; 1 if there is a problem."""
    findings = [look_safely(look) for look in LOOKS]
    minutes, chapters = look_at_chapters()
    findings.append(chapters)
    problems = [found for found in findings if found.problem]
    if parsed.json:
        report = {
            "ok": not problems,
            "findings": [asdict(found) for found in findings],
            "minutes": {stem: round(value, 2) for stem, value in minutes.items()},
        }
        print(json.dumps(report, indent=1))
    else:
        print(as_text(findings, minutes))
    return 1 if problems else 0
