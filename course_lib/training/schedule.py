"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Literal, get_args

Schedule = Literal["cosine", "linear", "wsd", "constant"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
DECAY = 0.2  # the last fifth of a "wsd" run


def learning_rate_factor(
    step: int, steps: int, warmup: int, schedule: Schedule = "cosine", final: float = 0.0
) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then the schedule.

    "cosine" falls along half a cosine (Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts),
    "linear" along a line, both to `final` at `steps`. "wsd" (warm-up, stable, decay) stays at the
    peak until the last fifth of the steps, then falls along a line (Hu et al. 2024, "MiniCPM",
    §4.2). "constant" stays.

    Raises:
        ValueError: `schedule` is none of these.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    start = max(warmup, round((1 - DECAY) * steps)) if schedule == "wsd" else warmup
    done = min(1.0, max(0.0, (step - start) / max(1, steps - start)))  # 0 … 1
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return final + (1 - final) * left
