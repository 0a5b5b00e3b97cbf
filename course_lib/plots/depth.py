"""A live widget: build a stack of blocks by switches, and see what depth does to its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.style import COLORS, rc_params

Measure = Callable[[int, bool, str], Mapping[str, Sequence[float]]]


class DepthExplorer(Panel):
    """Choose depth, residuals and the place of the norm; see some numbers block by block.

    The numbers come from `measure`, so that any stack can be looked at; the widget draws one panel
    for each of them, on a logarithmic axis that does not move. The setting before stays in grey.

    Args:
        measure: (depth, residual, norm) -> {title of a panel: depth + 1 numbers}, the first of
            them before block 1, the last after block `depth`. Not a number is left out; a number
            beyond `limits` is drawn as a triangle at the border.
        depths: the numbers of blocks on the slider, rising.
        norms: the places of the norm that can be chosen.
        limits: of the vertical axis, both above 0.

    Attributes:
        depth, residual, norm: the controls; set `.value` to turn them from code.
        numbers: what `measure` gave for the setting on show, {title: (depth + 1,) array}.

    Raises:
        ValueError: depths, norms or limits are impossible, or `measure` gave another count of
            numbers.

    In a notebook: `DepthExplorer(measure).show()`.
    """

    def __init__(
        self,
        measure: Measure,
        depths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        *,
        norms: Sequence[str] = ("pre", "post", "none"),
        limits: tuple[float, float] = (1e-8, 1e4),
    ) -> None:
        _check(depths, norms, limits)
        w = need("ipywidgets")
        self._measure, self._limits = measure, limits
        self.depth = w.SelectionSlider(
            options=list(depths), value=depths[-1], description="blocks",
            continuous_update=False, layout={"width": "420px"},
        )  # fmt: skip
        self.residual = w.Checkbox(True, description="residual", indent=False)
        self.norm = w.ToggleButtons(
            options=list(norms), description="norm", style={"button_width": "70px"}
        )
        self._image = w.Image(format="png")
        switches = w.HBox([self.norm, self.residual], layout={"flex_flow": "row wrap"})
        self.widget = w.VBox([self.depth, switches, self._image])
        self.widget.add_class("depth-explorer")  # a name by which a page can find it
        self.numbers: dict[str, np.ndarray] = {}
        self._before: dict[str, np.ndarray] = {}
        for control in (self.depth, self.residual, self.norm):
            control.observe(lambda _: self._turned(), names="value")
        self._turned()

    def picture(self) -> bytes:
        """The panels, as PNG."""
        return self._png

    def _turned(self) -> None:
        """A control was turned: measure the new stack, keep the old one for comparison, draw."""
        depth = self.depth.value
        result = self._measure(depth, self.residual.value, self.norm.value)
        numbers = {title: np.asarray(values, float) for title, values in result.items()}
        for title, values in numbers.items():
            if values.shape != (depth + 1,):
                raise ValueError(
                    f"measure: {title!r} must hold {depth + 1} numbers for {depth} blocks, got "
                    f"shape {values.shape}"
                )
        self._before, self.numbers = self.numbers, numbers
        self._draw()

    def _draw(self) -> None:
        with need("matplotlib").rc_context(rc_params()):
            figure = need("matplotlib.figure").Figure(figsize=(9, 3.2))
            panels = figure.subplots(1, len(self.numbers), sharey=True, squeeze=False)[0]
            for ax, title in zip(panels, self.numbers, strict=True):
                if title in self._before:
                    self._draw_line(ax, self._before[title], COLORS["grey"], 1.2)
                self._draw_line(ax, self.numbers[title], COLORS["blue"], 2.2)
                ax.set(yscale="log", ylim=self._limits, xlabel="after block")
                ax.xaxis.get_major_locator().set_params(integer=True)
                ax.set_title(title, fontsize=10.5)
            self._png = to_png(figure)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png

    def _draw_line(self, ax: Any, values: np.ndarray, color: str, width: float) -> None:
        """A line over the blocks; triangles where it leaves the picture."""
        low, high = self._limits
        block = np.arange(len(values))
        ax.plot(block, np.clip(values, low, high), color=color, lw=width)
        for outside, border, marker in ((values < low, low, "v"), (values > high, high, "^")):
            if outside.any():
                at = np.full(outside.sum(), border)
                ax.plot(block[outside], at, marker, color=color, ms=5, clip_on=False)


def _check(depths: Sequence[int], norms: Sequence[str], limits: tuple[float, float]) -> None:
    if not depths or min(depths) < 1 or list(depths) != sorted(set(depths)):
        raise ValueError(f"depths must be rising numbers from 1, got {depths!r}")
    if not norms:
        raise ValueError("norms must hold at least one place of the norm, got none")
    low, high = limits
    if not 0 < low < high < float("inf"):
        raise ValueError(f"limits must be two rising numbers above 0, got {limits!r}")
