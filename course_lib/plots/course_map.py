"""The map of the course: the Transformer, each part labelled with the chapter that builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from course_lib.plots._extras import need
from course_lib.plots.chapters import CHAPTERS
from course_lib.plots.style import COLORS, rc_params

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 9.0, 7.0  # inches, and the units of every coordinate below
_ENCODER, _DECODER, _LIST = 1.75, 4.75, 6.85  # x: middles of the two columns, left of the list
_BOX = 2.1  # width of a part
_BLOCK = "#EFF4F8"
# Chapters that build no part of the picture stand beside it: what they are for, and their numbers.
_BESIDE = (
    ("first", (0, 1)),
    ("longer", (11, 12, 13)),
    ("faster", (14,)),
    ("deeper", (15, 16, 17, 18)),
)


def course_map() -> Figure:
    """Draw the encoder-decoder Transformer (Vaswani et al. 2017, figure 1) as a map of the course.

    A badge on each part is the chapter that builds it; filled parts are there to be built today,
    outlined ones are to come. Which is which comes from `CHAPTERS`.
    """
    with need("matplotlib").rc_context(rc_params()):
        figure = need("matplotlib.pyplot").figure(figsize=(_WIDTH, _HEIGHT), dpi=80)
        figure.get_layout_engine().set(w_pad=0, h_pad=0)  # the axes are the whole sheet
        ax = figure.subplots()
        ax.set(xlim=(0, _WIDTH), ylim=(0, _HEIGHT))
        ax.axis("off")
        _encoder(ax)
        _decoder(ax)
        _beside(ax)
    return figure


def _encoder(ax: Any) -> None:
    x = _ENCODER
    _frame(ax, x, 1.72, 4.28, "Encoder", 8)
    _ports(ax, x, "source text")
    _attention(ax, x, 2.0, "Multi-head attention", 3)
    _part(ax, x, 2.82, "Add & normalise", 5)
    _part(ax, x, 3.38, "Feed-forward", 5)
    _part(ax, x, 3.82, "Add & normalise", 5)
    _residual(ax, x, 1.86, 2.97)
    _residual(ax, x, 3.27, 3.97)
    _arrow(ax, (x, 1.5), (x, 2.0))
    _arrow(ax, (x, 3.12), (x, 3.38))
    _joints(ax, x, 2.68, 3.68)


def _decoder(ax: Any) -> None:
    x = _DECODER
    _frame(ax, x, 1.72, 5.66, "Decoder", 9)
    _ports(ax, x, "target text so far")
    _attention(ax, x, 2.0, "Masked attention", 6)
    _part(ax, x, 2.82, "Add & normalise", 5)
    _attention(ax, x, 3.38, "Cross-attention", 7)
    _part(ax, x, 4.2, "Add & normalise", 5)
    _part(ax, x, 4.76, "Feed-forward", 5)
    _part(ax, x, 5.2, "Add & normalise", 5)
    _residual(ax, x, 1.86, 2.97)
    _residual(ax, x, 3.25, 4.35)
    _residual(ax, x, 4.63, 5.35)
    _arrow(ax, (x, 1.5), (x, 2.0))
    _arrow(ax, (x, 3.12), (x, 3.38))
    _arrow(ax, (x, 4.5), (x, 4.76))
    _joints(ax, x, 2.68, 4.06, 5.06)
    _arrow(ax, (x, 5.5), (x, 6.0))
    _part(ax, x, 6.0, "Next-token probabilities", 9)
    _arrow(ax, (x, 6.3), (x, 6.6))
    ax.text(x, 6.66, "next token", ha="center", va="bottom", fontsize=10.5)
    _bridge(ax)


def _bridge(ax: Any) -> None:
    """Keys and values from the encoder's top to the decoder's cross-attention."""
    middle = (_ENCODER + _DECODER) / 2
    ax.plot(
        [_ENCODER, _ENCODER, middle, middle], [4.12, 4.85, 4.85, 3.72], color=COLORS["ink"], lw=1.3
    )
    _arrow(ax, (middle, 3.72), (_DECODER - _BOX / 2, 3.72))
    ax.text(middle - 0.12, 4.93, "keys, values", ha="right", va="bottom", fontsize=9.5)
    _badge(ax, middle, 4.85, 10)


def _ports(ax: Any, x: float, text: str) -> None:
    """What enters a column: text, its embedding, its positions."""
    ax.text(x, 0.12, text, ha="center", va="bottom", fontsize=10.5)
    _arrow(ax, (x, 0.36), (x, 0.62))
    _part(ax, x, 0.62, "Token embedding", 9 if x == _DECODER else 8)
    _part(ax, x, 1.2, "+ positions", 4)
    _arrow(ax, (x, 0.92), (x, 1.2))


def _beside(ax: Any) -> None:
    """The list of chapters that are no part of the picture, and the legend."""
    y = 6.75
    for group, numbers in _BESIDE:
        ax.text(_LIST, y, group, fontsize=10.5, fontweight="bold", va="center")
        for number in numbers:
            y -= 0.36
            _badge(ax, _LIST + 0.16, y, number)
            style = {"color": COLORS["ink"] if CHAPTERS[number].ready else COLORS["grey"]}
            ax.text(_LIST + 0.42, y, _short(number), va="center", fontsize=10, **style)
        y -= 0.46
    for y, number, meaning in ((0.82, 2, "ready to build"), (0.45, 3, "to come")):
        _rounded(ax, _LIST, y - 0.11, 0.4, 0.22, CHAPTERS[number].ready)
        ax.text(_LIST + 0.52, y, meaning, va="center", fontsize=10)


def _short(number: int) -> str:
    title = CHAPTERS[number].title
    return title if len(title) < 22 else title.partition(",")[0]


def _frame(ax: Any, x: float, bottom: float, top: float, name: str, chapter: int) -> None:
    patch = need("matplotlib.patches").FancyBboxPatch(
        (x - 1.36, bottom), 2.72, top - bottom, boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=_BLOCK, edgecolor="none", zorder=0,
    )  # fmt: skip
    ax.add_patch(patch)
    ax.text(x - 1.36, top + 0.1, name, fontsize=11, fontweight="bold")
    ax.text(x + 0.98, top + 0.1, "N times", fontsize=10, ha="right")
    _badge(ax, x + 1.2, top + 0.16, chapter)


def _part(ax: Any, x: float, y: float, name: str, chapter: int) -> None:
    ready = CHAPTERS[chapter].ready
    _rounded(ax, x - _BOX / 2, y, _BOX, 0.3, ready)
    color = "white" if ready else COLORS["ink"]
    ax.text(x - _BOX / 2 + 0.1, y + 0.145, name, va="center", fontsize=10, color=color, zorder=4)
    _badge(ax, x + _BOX / 2 - 0.17, y + 0.15, chapter)


def _attention(ax: Any, x: float, y: float, name: str, chapter: int) -> None:
    """A part that has the attention of chapter 02 at its heart."""
    _rounded(ax, x - _BOX / 2, y, _BOX, 0.68, CHAPTERS[chapter].ready)
    ax.text(x - _BOX / 2 + 0.1, y + 0.52, name, va="center", fontsize=10, zorder=4)
    _badge(ax, x + _BOX / 2 - 0.17, y + 0.52, chapter)
    _rounded(ax, x - _BOX / 2 + 0.12, y + 0.07, _BOX - 0.24, 0.28, CHAPTERS[2].ready)
    ax.text(
        x - _BOX / 2 + 0.22,
        y + 0.205,
        "attention",
        color="white",
        va="center",
        fontsize=10,
        zorder=4,
    )
    _badge(ax, x + _BOX / 2 - 0.29, y + 0.21, 2)


def _rounded(ax: Any, x: float, y: float, width: float, height: float, ready: bool) -> None:
    patch = need("matplotlib.patches").FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06", zorder=3, linewidth=1.2,
        facecolor=COLORS["blue"] if ready else "white",
        edgecolor=COLORS["blue"] if ready else COLORS["grey"],
    )  # fmt: skip
    ax.add_patch(patch)


def _badge(ax: Any, x: float, y: float, chapter: int) -> None:
    color = COLORS["vermillion"] if CHAPTERS[chapter].ready else COLORS["grey"]
    circle = need("matplotlib.patches").Circle(
        (x, y), 0.13, facecolor=color, edgecolor="white", zorder=5
    )
    ax.add_patch(circle)
    ax.text(
        x, y - 0.005, f"{chapter:02d}", ha="center", va="center", color="white", fontsize=8,
        fontweight="bold", zorder=6,
    )  # fmt: skip


def _arrow(
    ax: Any, start: tuple[float, float], end: tuple[float, float], color: str = COLORS["ink"]
) -> None:
    look = {"arrowstyle": "-|>", "lw": 1.2, "mutation_scale": 10, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops={**look, "color": color})


def _joints(ax: Any, x: float, *bottoms: float) -> None:
    """The short ways from a sub-layer into the addition just above it."""
    for y in bottoms:
        ax.plot([x, x], [y, y + 0.14], color=COLORS["ink"], lw=1.3, zorder=1)


def _residual(ax: Any, x: float, start: float, end: float) -> None:
    """The path around a sub-layer, on the left of its column."""
    left = x - _BOX / 2 - 0.18
    ax.plot([x, left, left], [start, start, end], color=COLORS["grey"], lw=1.1, zorder=1)
    _arrow(ax, (left, end), (x - _BOX / 2, end), COLORS["grey"])
