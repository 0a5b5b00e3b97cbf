"""What the benchmarks measured, as tables for the README and as figures for it and the chapters.

They take what stands in benchmarks/results/*.json; nothing is typed in by hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.plots._extras import need
from course_lib.plots.style import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path("benchmarks/results")  # from the course's folder
GROUPS = {"recipe": "black", "plain": "blue", "open": "vermillion", "long": "green"}
"""The classes of the race, and their colours."""


def load(name: str, root: Path = Path()) -> dict[str, Any] | None:
    """benchmarks/results/<name>.json, or None where it was not measured."""
    path = root / RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def race_table(race: Mapping[str, Any] | None) -> str:
    """One row per runner of the race, and the table of counts, in Markdown."""
    if race is None:
        return "not measured"
    rows = [
        "| what changed, row by row | training | faster | loss | *King Lear* |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in race["runners"]:
        rows.append(
            f"| {r['change']} | {r['seconds']:.1f} s | {r['times_faster']:.1f}× | "
            f"{r['validation']:.3f} | {r['unseen']:.3f} |"
        )
    counts = race["kneser_ney"]
    rows.append(
        f"| counting, no network: Kneser-Ney, 5 characters | {counts['seconds']:.1f} s | | "
        f"{counts['validation']:.3f} | {counts['unseen']:.3f} |"
    )
    seeds = len(race["runners"][0]["runs"])
    return "\n".join([*rows, "", f"{_where(race)}; medians of {seeds} seeds, runners in turns."])


def race_figure(race: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Loss against training time: each run a dot, the recipe's loss and that of counts as lines."""
    ax = need("matplotlib.pyplot").subplots(figsize=(7.0, 3.6))[1] if ax is None else ax
    for r in race["runners"]:
        x, y = ([run[key] for run in r["runs"]] for key in ("seconds", "validation"))
        ax.scatter(x, y, s=36, color=COLORS[GROUPS[r["group"]]], zorder=3)
        ax.annotate(r["name"], (r["seconds"], min(y)), (0, -18), textcoords="offset points",
                    ha="center", fontsize=10)  # fmt: skip
    goal, counts = race["runners"][0]["validation"], race["kneser_ney"]["validation"]
    for loss, what in ((goal, "the recipe's loss"), (counts, "counting five characters")):
        ax.axhline(loss, color=COLORS["grey"], linestyle="--", linewidth=1)
        ax.annotate(what, (0.01, loss), (0, 4), xycoords=("axes fraction", "data"),
                    textcoords="offset points", color=COLORS["grey"])  # fmt: skip
    ax.set(xscale="log", xlabel="training time [s]", ylabel="held-out loss [nats per character]")
    ax.set_xticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    ax.margins(y=0.15)
    return ax


def efficiency_table(result: Mapping[str, Any] | None) -> str:
    """Each kind of attention at the longest length, against dense causal attention, in Markdown."""
    if result is None:
        return "not measured"
    forward, training = (_last(result["seconds"][way]) for way in ("forward", "training"))
    n = max(map(int, result["seconds"]["forward"]))
    rows = [
        f"| at {n:,} tokens | forward | against dense | with backward | against dense | "
        "faster from | memory |".replace(",", " "),
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, seconds in forward.items():
        both, grown = training.get(name), result["memory_mib"].get(name)
        start = result["faster_from"]["training"].get(name)
        rows.append(
            f"| {name} | {1e3 * seconds:.0f} ms | {forward['dense'] / seconds:.1f}× | "
            + ("| | | |" if both is None or grown is None else
               f"{1e3 * both:.0f} ms | {training['dense'] / both:.1f}× | "
               f"{'' if start is None else f'{start} tokens'} | {_last(grown):.0f} MiB |")
        )  # fmt: skip
    shape = f"{result['heads']} heads of {result['d_head']}, window {result['window']}, float32"
    return "\n".join([*rows, "", f"{_where(result)}; {shape}; medians, methods in turns."])


def efficiency_figure(
    result: Mapping[str, Any], way: str = "training", ax: Axes | None = None
) -> Axes:
    """Seconds against length on log axes; way: "forward" or "training" (with backward pass)."""
    ax = need("matplotlib.pyplot").subplots(figsize=(7.0, 3.8))[1] if ax is None else ax
    rows = {int(n): row for n, row in result["seconds"][way].items()}
    for name in rows[max(rows)]:
        style: dict[str, Any] = (
            {"color": COLORS["black"], "linewidth": 2.6} if name == "dense" else {}
        )
        ax.plot(list(rows), [row[name] for row in rows.values()], "o-", label=name, **style)
    ax.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
    ax.set_xticks(list(rows), [str(n) for n in rows])
    ax.minorticks_off()
    ax.legend()
    return ax


def _last(by_length: Mapping[str, Any]) -> Any:
    """The value at the largest of the lengths, which JSON keeps as strings."""
    return by_length[max(by_length, key=int)]


def _where(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"{machine['threads']} threads ({machine['processor']}), torch {versions['torch']}, "
        f"{result['date']}"
    )
