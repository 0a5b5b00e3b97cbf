"""A live gap: type a sentence with a hidden word, see what a model guesses and where it looked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import shown_width, to_png
from course_lib.plots.style import COLORS, rc_params
from course_lib.plots.widgets import LiveAttention


class FillIn(LiveAttention):
    """A line with a gap to type in; the likeliest words for the gap, and where it looked for them.

    Args:
        fn: text -> (words, place, guesses, looks): the n words of the text, the place of the gap
            among them, {word: probability} for some words, the likeliest first, and a weight for
            each of the n words. It may raise: the message is shown in place of the picture, as in
            `LiveAttention`.
        text: what stands there at first.
        title: one line above the picture.

    Attributes:
        text, message, error: as in `LiveAttention`.
        guesses: {word: probability} as on show; empty while a message stands in its place.
        looks: the weights on show, shape (n,).
    """

    guesses: Mapping[str, float] = {}
    looks: np.ndarray = np.zeros(0)
    _png = b""

    def picture(self) -> bytes:
        """Guesses and looks as PNG; empty while a message stands in its place."""
        return b"" if self.message else self._png

    def _redraw(self) -> None:
        self.guesses, self.looks = {}, np.zeros(0)
        super()._redraw()

    def _draw(self, answer: tuple[Any, ...]) -> None:
        words, place, guesses, looks = answer
        words, guesses, looks = list(words), dict(guesses), np.asarray(looks, dtype=float)
        if looks.shape != (len(words),):
            raise ValueError(f"looks has shape {looks.shape} for {len(words)} words")
        if not 0 <= place < len(words):
            raise ValueError(f"place must be one of the {len(words)} words, got {place}")
        with need("matplotlib").rc_context(rc_params()):
            height = max(2.4, 0.6 + 0.27 * len(words))
            # a Figure of our own: pyplot would keep it and show it a second time
            figure = need("matplotlib.figure").Figure(figsize=(8.0, height))
            left, right = figure.subplots(1, 2)
            _bars(left, guesses.keys(), guesses.values(), "probability of the guess", "blue")
            shown = [f"{i}  {word}" for i, word in enumerate(words)]  # words may occur twice
            bars = _bars(right, shown, looks, "mean weight on the word", "sky")
            bars[place].set_color(COLORS["grey"])
            right.get_yticklabels()[place].set_fontweight("bold")
            figure.suptitle(self._title)
            self._png = to_png(figure)
        self.guesses, self.looks = guesses, looks
        image = need("ipywidgets").Image(value=self._png, format="png")
        image.layout.width = f"{shown_width(self._png)}px"
        self._stage.children = (image,)


def _bars(ax: Any, names: Any, values: Any, label: str, color: str) -> Any:
    """Horizontal bars in reading order, the first on top."""
    bars = ax.barh(range(len(names)), list(values), color=COLORS[color])
    ax.set_yticks(range(len(names)), list(names))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel(label)
    return bars
