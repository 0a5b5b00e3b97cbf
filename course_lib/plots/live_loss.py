"""A loss curve that grows while a model trains."""

from __future__ import annotations

import time
from typing import Any

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.curves import loss_curves
from course_lib.plots.style import rc_params


class LiveLoss(Panel):
    """Hand it to `training.fit(watch=LiveLoss())`: one picture, drawn anew at each evaluation.

    Args:
        name: of the run, in the legend.
        every: seconds between two drawings, at the least; the last history is always drawn.
        x: "step" or "seconds".

    Attributes:
        drawn: how often it has been drawn.
    """

    def __init__(self, name: str = "training", *, every: float = 1.0, x: Any = "step") -> None:
        w = need("ipywidgets")
        self.name, self.every, self.x = name, every, x
        self.drawn, self._last, self._png, self._history = 0, 0.0, b"", None
        self._image = w.Image(format="png")
        self.widget = w.VBox([self._image])
        self.widget.add_class("live-loss")

    def __call__(self, history: Any) -> None:
        """Draw this history, unless the last drawing is too fresh; the first one is shown."""
        self._history = history
        if not self.drawn:
            self._draw()
            self.show()
        elif time.monotonic() - self._last >= self.every:
            self._draw()

    def picture(self) -> bytes:
        """The curve as it stands, as PNG."""
        if self._history is not None:
            self._draw()
        return self._png

    def _draw(self) -> None:
        with need("matplotlib").rc_context(rc_params()):
            figure = need("matplotlib.figure").Figure(figsize=(7.0, 3.2))
            loss_curves({self.name: self._history}, x=self.x, ax=figure.subplots())
            self._png = to_png(figure)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png
        self.drawn, self._last = self.drawn + 1, time.monotonic()
