"""A live widget for two sequences: type one, and see how the other that comes out reads it."""

from __future__ import annotations

from typing import Any

from course_lib.plots.widgets import LiveAttention


class LiveAlignment(LiveAttention):
    """A line to type in, and the cross-attention of what comes out of it, redrawn at every letter.

    Args:
        fn: text -> (query_labels, key_labels, weights) with weights (n_q, n_k) or
            (heads, n_q, n_k); the queries are what comes out, the keys what stands in the line. It
            may raise: the message is shown in place of the picture, as in `LiveAttention`.
        text: what stands there at first.
        title: one line above the heat map.

    Attributes: text, message, error and explorer, as in `LiveAttention`.
    """

    def _draw(self, answer: tuple[Any, ...]) -> None:
        query_labels, key_labels, weights = answer
        self._explore(weights, query_labels, key_labels)
