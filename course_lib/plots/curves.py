"""Loss curves of several training runs on one pair of axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from course_lib.plots._extras import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = {"step": "training step", "seconds": "training time [s]"}


def loss_curves(
    histories: Mapping[str, Any],
    x: Literal["step", "seconds"] = "step",
    ax: Axes | None = None,
) -> Axes:
    """Draw the loss of each run against steps or seconds.

    The training loss is pale, its running mean (over a twentieth of the run) is the line to read,
    and the held-out loss, where it was measured, stands on it as dots joined by dashes.

    Args:
        histories: name of the run -> its `training.History`, or anything with the lists `step`,
            `seconds`, `loss` and `eval_loss` of one length; None in `eval_loss` where the held-out
            loss was not measured.
        x: "step" for equal numbers of updates, "seconds" for equal time on this machine.
        ax: axes to draw on; if None, a new figure is made.

    Raises:
        ValueError: `histories` is empty, `x` is neither word, or two lists differ in length.
    """
    if x not in _UNITS:
        raise ValueError(f"x: expected 'step' or 'seconds', got {x!r}")
    if not histories:
        raise ValueError("histories: expected at least one run, got none")
    if ax is None:
        _, ax = need("matplotlib.pyplot").subplots()
    for name, history in histories.items():
        _draw(ax, name, history, x)
    ax.set(xlabel=_UNITS[x], ylabel="loss [nats per token]")
    ax.legend()
    return ax


def _draw(ax: Axes, name: str, history: Any, x: str) -> None:
    at, loss = _pair(name, history, x, "loss")
    (pale,) = ax.plot(at, loss, alpha=0.25, linewidth=0.8)
    ax.plot(at, _running_mean(loss), color=pale.get_color(), label=name)
    at, held_out = _pair(name, history, x, "eval_loss")
    measured = ~np.isnan(held_out)
    if measured.any():
        dots: dict[str, Any] = {"marker": "o", "markersize": 5, "linestyle": "--", "linewidth": 1.2}
        style = {"color": pale.get_color(), "label": f"{name}, held out"}
        ax.plot(at[measured], held_out[measured], **dots, **style)


def _pair(name: str, history: Any, at: str, loss: str) -> tuple[np.ndarray, np.ndarray]:
    positions, losses = (np.asarray(getattr(history, part), float) for part in (at, loss))
    if positions.shape != losses.shape:
        raise ValueError(
            f"histories[{name!r}]: {at} has {positions.size} entries, {loss} has {losses.size}"
        )
    return positions, losses


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the twentieth of the run that ends at each step; shorter at the start."""
    window = max(1, len(values) // 20)
    total = np.concatenate([[0.0], values.cumsum()])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)
