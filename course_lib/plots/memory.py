"""A live widget: what a memory, compressed or not, lets the last token of a text reach."""

from __future__ import annotations

from typing import Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.style import COLORS, rc_params

TOKENS = 256  # simulated: more than any setting reaches
SHOWN = 128  # drawn, so that a token is wide enough to be seen
KINDS = ("not reached", "in the segment", "in the memory", "compressed")
_COLORS = (COLORS["light"], COLORS["green"], COLORS["blue"], COLORS["orange"])


class MemoryExplorer(Panel):
    """Choose a model with memory; see layer by layer what its last token can know of the past.

    Each row is a layer's input, each cell a token. Read it from the top: the last token looks at
    what layer L holds; what it holds was read one layer below, in a segment of its own; and so on
    down to the text. What can be reached need not be used.

    Args:
        segment, memory, layers, compressed, rate: where the controls stand at first.

    Attributes:
        segment: tokens read at once. memory: tokens remembered by each layer. layers: how many.
        compressed: vectors of the compressed memory. rate: tokens in each of them. These are the
            controls; set `.value` from code.
        reached: (layers + 1, 256) of int, the highest layer first, the text last: for each token
            0 = not reached, 1 = as itself in the same segment, 2 = from a memory, 3 = compressed.
        reach: how many tokens before the segment of the last token can matter to it.

    Raises:
        ValueError: a control has no such value.

    In a notebook: `MemoryExplorer().show()`.
    """

    def __init__(
        self,
        *,
        segment: int = 16,
        memory: int = 16,
        layers: int = 2,
        compressed: int = 0,
        rate: int = 4,
    ) -> None:
        w = need("ipywidgets")
        self.segment = _choice("segment", (4, 8, 16, 32), segment)
        self.memory = _choice("memory", (0, 4, 8, 16, 32), memory)
        self.layers = _choice("layers", (1, 2, 3, 4), layers)
        self.compressed = _choice("compressed", (0, 4, 8), compressed)
        self.rate = _choice("rate", (1, 2, 4), rate)
        controls = (self.segment, self.memory, self.layers, self.compressed, self.rate)
        self._image = w.Image(format="png")
        self.widget = w.VBox([w.HBox(controls, layout={"flex_flow": "row wrap"}), self._image])
        self.widget.add_class("memory-explorer")  # a name by which a page can find it
        for control in controls:
            control.observe(lambda _: self._turned(), names="value")
        self._turned()

    def picture(self) -> bytes:
        """The layers, as PNG."""
        return self._png

    def _turned(self) -> None:
        """A control was turned: follow the last token's looks down through the layers, draw."""
        kinds = _looks(
            self.segment.value, self.memory.value, self.compressed.value, self.rate.value
        )
        rows = [np.zeros(TOKENS, int)]
        rows[0][-1] = 1
        for _ in range(self.layers.value):
            rows.append(_one_layer_down(rows[-1], kinds))
        self.reached = np.stack(rows)  # (layers + 1, tokens)
        oldest = int(np.flatnonzero(self.reached[-1])[0])
        self.reach = TOKENS - self.segment.value - oldest
        self._draw()

    def _draw(self) -> None:
        depth = self.layers.value
        with need("matplotlib").rc_context(rc_params()):
            size = (8.6, 1.5 + 0.42 * (depth + 1))
            figure = need("matplotlib.figure").Figure(figsize=size)
            ax = figure.subplots()
            colors = need("matplotlib.colors").ListedColormap(_COLORS)
            edges = np.arange(SHOWN + 1) - SHOWN + 0.5  # token 0 is the last, -1 the one before
            ax.pcolormesh(
                edges, np.arange(depth + 2), self.reached[:, -SHOWN:],
                cmap=colors, vmin=-0.5, vmax=3.5, edgecolors="white", linewidth=0.4,
            )  # fmt: skip
            for seam in range(-self.segment.value, -SHOWN, -self.segment.value):
                ax.axvline(seam + 0.5, color=COLORS["ink"], lw=0.8)
            names = [f"after layer {depth}", *(f"into layer {i}" for i in range(depth, 0, -1))]
            ax.set_yticks(np.arange(depth + 1) + 0.5, names)
            ax.set(
                ylim=(depth + 1, 0),
                xlim=(-SHOWN + 0.5, 0.5),
                xlabel="place, 0 is the last token [tokens]",
            )
            ax.grid(False)
            ax.spines[:].set_visible(False)
            self._explain(ax)
            self._png = to_png(figure)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png

    def _explain(self, ax: Any) -> None:
        """The title with the numbers, and what the colours mean."""
        slots = self.memory.value + self.compressed.value
        beyond = " (beyond the picture)" if self.reach + self.segment.value > SHOWN else ""
        ax.set_title(
            f"reaches {self.reach} tokens before its segment{beyond}, remembers {slots} vectors "
            "per layer",
            fontsize=11,
        )
        patch = need("matplotlib.patches").Patch
        handles = [patch(color=c, label=k) for c, k in zip(_COLORS, KINDS, strict=True)]
        ax.figure.legend(handles=handles, loc="outside lower left", ncols=4)


def _choice(name: str, options: tuple[int, ...], value: int) -> Any:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(str, options))}; got {value!r}")
    return need("ipywidgets").Dropdown(
        options=options, value=value, description=name, layout={"width": "165px"}
    )


def _looks(segment: int, memory: int, compressed: int, rate: int) -> np.ndarray:
    """(tokens, tokens) of int: how the token of a row sees the token of a column, as in KINDS."""
    kinds = np.zeros((TOKENS, TOKENS), int)
    groups: list[np.ndarray] = []  # of each compressed vector: the places it was made of
    recent = np.arange(0)
    for start in range(0, TOKENS, segment):
        now = np.arange(start, start + segment)
        kinds[now, start : start + segment] = np.tri(segment, dtype=int)
        kinds[np.ix_(now, recent)] = 2
        for group in groups:
            kinds[np.ix_(now, group)] = 3
        recent = np.concatenate([recent, now])
        old = max(len(recent) - memory, 0) // rate * rate  # only whole groups leave
        groups += np.split(recent[:old], old // rate) if old else []
        groups = groups[max(len(groups) - compressed, 0) :]
        recent = recent[old:]
    return kinds


def _one_layer_down(above: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """What the tokens reached in one layer look at in the layer below; the plainest look counts."""
    seen = kinds[above > 0]  # (reached, tokens)
    plainest = np.where(seen > 0, seen, len(KINDS)).min(0)
    return np.where(plainest < len(KINDS), plainest, 0)
