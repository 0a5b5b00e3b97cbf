"""A live widget: two positions as the hands of many clocks, and how alike their codes are."""

from __future__ import annotations

from typing import Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.style import COLORS, rc_params

_ROWS = 2  # of clocks
_SLIDER = {"width": "420px"}


class PositionExplorer(Panel):
    """Turn a position and a distance; see both codes as clock hands, and their similarity.

    Pair i of a sinusoidal code, (sin, cos) of position / base^(2i / d_model), is the hand of a
    clock. Rotary turns pair i of queries and keys by the same angle. The similarity, the mean over
    the pairs of the cosine between two hands, is the dot product of two sinusoidal codes divided by
    d_model / 2, and the rotary score of a query and a key that were equal before they were turned.

    Args:
        d_model: width of the codes: d_model / 2 clocks; even.
        length: number of positions on the first slider, and the largest distance on the second.
        base: as in `layers.SinusoidalPositionalEncoding`.

    Attributes:
        position: the slider of one token's position; set `.value` to turn it from code.
        distance: the slider of how many positions further on the other token stands.
        hands: angles of the hands [radians], (2, d_model / 2): one row for each token.
        similarity: of the two codes, from -1 to 1.

    Raises:
        ValueError: `d_model` is odd or below 2, `length` is below 2, or `base` is not above 1.

    In a notebook: `PositionExplorer().show()`.
    """

    def __init__(self, d_model: int = 16, *, length: int = 64, base: float = 10_000.0) -> None:
        if d_model < 2 or d_model % 2:
            raise ValueError(f"d_model must be even and at least 2, got {d_model}")
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        w = need("ipywidgets")
        self._length = length
        self._speed = base ** (-np.arange(0, d_model, 2) / d_model)  # radians per position
        slider = {"layout": _SLIDER, "continuous_update": False}
        self.position = w.IntSlider(0, 0, length - 1, description="position", **slider)
        self.distance = w.IntSlider(3, -length, length, description="distance", **slider)
        self._image = w.Image(format="png")
        self.widget = w.VBox([self.position, self.distance, self._image])
        self.widget.add_class("position-explorer")
        for control in (self.position, self.distance):
            control.observe(lambda _: self._draw(), names="value")
        self._draw()

    @property
    def hands(self) -> np.ndarray:
        """Angles [radians] of both codes, (2, d_model / 2), clockwise from twelve o'clock."""
        first = self.position.value
        return np.array([[first], [first + self.distance.value]]) * self._speed

    @property
    def similarity(self) -> float:
        """Mean cosine between the two hands of a clock."""
        one, other = self.hands
        return float(np.cos(one - other).mean())

    def picture(self) -> bytes:
        """Clocks and curve, as PNG."""
        return self._png

    def _draw(self) -> None:
        with need("matplotlib").rc_context(rc_params()):
            figure = need("matplotlib.figure").Figure(figsize=(9, 3.6))
            columns = -(-len(self._speed) // _ROWS)
            clocks, curve = figure.subfigures(1, 2, width_ratios=(1.25, 1))
            faces = clocks.subplots(_ROWS, columns, squeeze=False).flatten()
            for i, ax in enumerate(faces):
                ax.axis("off")
                if i < len(self._speed):
                    self._draw_clock(ax, i)
            self._draw_curve(curve.subplots())
            self._png = to_png(figure)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png

    def _draw_clock(self, ax: Any, pair: int) -> None:
        """One pair of entries: a hand for each token."""
        ax.add_patch(need("matplotlib.patches").Circle((0, 0), 1, fill=False, ec=COLORS["grey"]))
        shapes = (("blue", 2.6, 1.0), ("vermillion", 1.8, 0.78))  # unequal: both show if they meet
        for angle, (color, width, length) in zip(self.hands[:, pair], shapes, strict=True):
            tip = length * np.sin(angle), length * np.cos(angle)
            ax.plot([0, tip[0]], [0, tip[1]], color=COLORS[color], lw=width)
        turn = 2 * np.pi / self._speed[pair]
        ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
        ax.set_title(f"pair {pair}\none turn in {turn:,.0f}", fontsize=9, loc="center")

    def _draw_curve(self, ax: Any) -> None:
        """Similarity against distance: the same curve wherever the first token stands."""
        distance = np.arange(-self._length, self._length + 1)
        ax.plot(distance, np.cos(distance[:, None] * self._speed).mean(1), color=COLORS["grey"])
        ax.plot([self.distance.value], [self.similarity], "o", color=COLORS["vermillion"], ms=9)
        first = self.position.value
        both = f"positions {first} and {first + self.distance.value}"
        ax.set_title(f"{both}: similarity {self.similarity:.2f}", fontsize=11)
        ax.set(xlabel="distance [positions]", ylabel="similarity of the codes")
