"""What every benchmark writes beside its numbers, and where it writes."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from course_lib import checkout


def stamp() -> dict[str, Any]:
    """Date, machine and versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def write(name: str, result: Mapping[str, Any]) -> None:
    """Write benchmarks/results/<name>.json, stamped."""
    root = checkout.find_root(Path(__file__).parent)
    target = root / "benchmarks" / "results" / f"{name}.json"
    text = json.dumps({**stamp(), **result}, indent=1, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")
    print(f"wrote benchmarks/results/{name}.json")


def medians(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that a slow minute hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # the first call is slow
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
