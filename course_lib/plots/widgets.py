"""Two live widgets: explore weights query by query; type a sentence and see its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.heatmap import as_weights, attention_heatmap, figure_size, label_pair
from course_lib.plots.style import COLORS, rc_params

_WARNING = "#A03C00"  # vermillion, darkened until small letters are easy to read
_NARROW, _SLIDER = {"width": "150px"}, {"width": "420px"}


class AttentionExplorer(Panel):
    """Pick a query and see which keys it looks at, as shaded words and as a row of the heat map.

    Args:
        weights: (n_q, n_k), (heads, n_q, n_k) or (layers, heads, n_q, n_k); leading axes of length
            1 are dropped. Or a list with (heads, n_q, n_k) for each layer, which may differ in
            their heads: what `layers.Stack` returns for one sequence.
        query_labels: n_q words; numbers if None.
        key_labels: n_k words; if None, the query labels where n_q = n_k.
        mask: (n_q, n_k) of bool or a `masks.Mask`, True = may attend.
        title: one line above the heat map.

    Attributes:
        query, layer, head: the controls; set `.value` (a number from 0) to turn them from code.
            Layer and head are on show where there are several.
        row: weights of the chosen query on all keys, shape (n_k,).

    Raises:
        ValueError: the number of labels does not fit `weights`, `weights` has another rank, or its
            layers differ in their queries or keys.

    In a notebook: `AttentionExplorer(weights, words).show()`.
    """

    def __init__(
        self,
        weights: Any,
        query_labels: Sequence[str] | None = None,
        key_labels: Sequence[str] | None = None,
        *,
        mask: Any = None,
        title: str | None = None,
    ) -> None:
        w = need("ipywidgets")
        self.title = title
        self.query = w.SelectionSlider(options=[("", 0)], description="query", layout=_SLIDER)
        self.layer = w.Dropdown(options=[0], description="layer", layout=_NARROW)
        self.head = w.Dropdown(options=[0], description="head", layout=_NARROW)
        self._strip, self._image = w.HTML(), w.Image(format="png")
        controls = [self.query, self.layer, self.head]
        row = w.HBox(controls, layout={"flex_flow": "row wrap"})
        self.widget = w.VBox([row, self._strip, self._image])
        self.widget.add_class("attention-explorer")  # a name by which a page can find it
        self.update(weights, query_labels, key_labels, mask=mask)
        for control in controls:
            control.observe(lambda _: self._updating or self._turned(), names="value")

    def update(
        self,
        weights: Any,
        query_labels: Sequence[str] | None = None,
        key_labels: Sequence[str] | None = None,
        *,
        mask: Any = None,
    ) -> None:
        """Show other weights, of any size; the controls stay where they were if they still can."""
        tables = _by_layer(weights)
        _, n_q, n_k = tables[0].shape
        rows, columns = label_pair(query_labels, key_labels, n_q, n_k)
        self._tables, self._rows, self._columns, self._mask = tables, rows, columns, mask
        self._updating = True  # new options turn the controls: draw once, when all is in place
        _offer(self.query, [(f"{i} · {label}", i) for i, label in enumerate(rows)])
        _offer(self.layer, _numbered(len(tables)), hide_one=True)
        self._turned()

    @property
    def row(self) -> np.ndarray:
        """Weights of the chosen query on all keys, shape (n_k,)."""
        return self._tables[self.layer.value][self.head.value, self.query.value]

    def picture(self) -> bytes:
        """The heat map with the chosen row framed, as PNG."""
        return self._png

    def _heading(self) -> str | None:
        """The title; with several layers also which one, so that a stored picture says it."""
        if len(self._tables) == 1:
            return self.title
        where = f"layer {self.layer.value}, head {self.head.value}"
        return where if self.title is None else f"{self.title}: {where}"

    def _turned(self) -> None:
        """A control was turned: offer the heads of the chosen layer, and draw."""
        self._updating = True
        _offer(self.head, _numbered(len(self._tables[self.layer.value])), hide_one=True)
        self._updating = False
        self._draw()

    def _draw(self) -> None:
        """Paint strip and heat map for the chosen query, layer and head."""
        self._strip.value = _strip(self._rows[self.query.value], self._columns, self.row)
        with need("matplotlib").rc_context(rc_params()):
            # a Figure of our own: pyplot would keep it and show it a second time
            size = figure_size(self._rows, self._columns)
            figure = need("matplotlib.figure").Figure(figsize=size)
            attention_heatmap(
                self._tables[self.layer.value][self.head.value],
                self._rows,
                self._columns,
                ax=figure.subplots(),
                title=self._heading(),
                mask=self._mask,
                highlight=self.query.value,
            )
            self._png = to_png(figure)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png


def _by_layer(weights: Any) -> list[np.ndarray]:
    """Weights in any form that `AttentionExplorer` takes, as one (heads, n_q, n_k) a layer."""
    listed = isinstance(weights, list | tuple) and len(weights) > 0
    if np.ndim(weights[0]) > 2 if listed else np.ndim(weights) > 3 and len(weights) > 1:
        tables = [as_weights(layer, rank=3) for layer in weights]
    else:
        table = as_weights(weights, rank=3 if np.ndim(weights) > 2 else 2)
        tables = [table.reshape(-1, *table.shape[-2:])]  # (n_q, n_k) -> (1, n_q, n_k): one head
    sizes = [table.shape[1:] for table in tables]
    if len(set(sizes)) > 1:
        raise ValueError(f"weights: layers must agree in (n_q, n_k), got {sizes}")
    return tables


def _numbered(count: int) -> list[tuple[str, int]]:
    return [(str(i), i) for i in range(count)]


def _offer(control: Any, options: list[tuple[str, int]], hide_one: bool = False) -> None:
    """Give a control new options and keep its choice, or the nearest that there is."""
    keep = min(control.value, len(options) - 1)
    control.options = options
    control.value = keep
    if hide_one:
        control.layout.display = None if len(options) > 1 else "none"


def _strip(query: str, keys: list[str], row: np.ndarray) -> str:
    """The keys as words, the darker the more the query looks at them, each with its per cent."""
    top = max(float(np.nanmax(row, initial=0.0)), 1e-9)
    words = "".join(_word(key, weight, weight / top) for key, weight in zip(keys, row, strict=True))
    return (
        f"<div style='background:white;color:{COLORS['ink']};padding:6px 8px;line-height:1.25'>"
        f"<b style='color:{_WARNING}'>{escape(query)}</b> looks at"
        f"<div style='display:flex;flex-wrap:wrap;gap:3px;margin-top:4px'>{words}</div></div>"
    )


def _word(key: str, weight: float, strength: float) -> str:
    ink = "white" if strength > 0.6 else COLORS["ink"]
    return (
        f"<span style='background:rgba(0,114,178,{strength:.3f});color:{ink};text-align:center;"
        "border-radius:4px;padding:2px 5px;min-width:1em;white-space:pre'>"
        f"{escape(key)}<br><small>{100 * weight:.0f}%</small></span>"
    )


def _paper(message: str, color: str) -> str:
    """A message on white, legible under any theme; nothing for nothing."""
    style = f"color:{color};background:white;padding:2px 8px"
    return f"<span style='{style}'>{escape(message)}</span>" if message else ""


def _said(error: Exception) -> str:
    """One line for an exception: never empty, never a stack."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError) and message:
        return message
    return f"{type(error).__name__}: {message or 'no message'}"


class LiveAttention(Panel):
    """A line to type in, and the attention of what stands there, redrawn at every letter.

    Args:
        fn: text -> (labels, weights) or (labels, weights, mask); the weights in any form that
            `AttentionExplorer` takes, for n queries and n keys. It may raise: the message is shown
            in place of the picture. A ValueError is taken as a word to the reader, anything else
            is shown with its type.
        text: what stands there at first.
        title: one line above the heat map.

    Attributes:
        text: the line; set `.value` to type from code.
        message: what the widget says below the line, "" if all is well.
        error: the exception that `fn` raised for this text, or None. `raise live.error` shows all.
        explorer: the `AttentionExplorer` on show, None until a text could be drawn.
    """

    def __init__(
        self, fn: Callable[[str], tuple[Any, ...]], text: str = "", *, title: str | None = None
    ) -> None:
        w = need("ipywidgets")
        self._fn, self._title = fn, title
        self.error: Exception | None = None
        self.message = ""
        self.explorer: AttentionExplorer | None = None
        self.text = w.Text(
            value=text, placeholder="type a sentence", description="sentence",
            layout={"width": "95%", "max_width": "640px"},
        )  # fmt: skip
        self._line = w.HTML()
        self._stage = w.VBox()
        self.widget = w.VBox([self.text, self._line, self._stage])
        self.text.observe(lambda _: self._redraw(), names="value")
        self._redraw()

    def picture(self) -> bytes:
        """The heat map on show, as PNG; empty while a message stands in its place."""
        return self.explorer.picture() if self.explorer and not self.message else b""

    def _redraw(self) -> None:
        self.error, self.message = None, ""
        if not self.text.value.strip():
            self.message = "Type a few words, and see who looks at whom."
        else:
            try:
                self._draw(self._fn(self.text.value))
            except Exception as error:  # a learner's function may raise anything: say it, keep it
                self.error = error
                self.message = _said(error)
        # an old picture beside a new sentence would be a lie
        self._stage.layout.display = "none" if self.message else None
        self._line.value = _paper(self.message, _WARNING if self.error else COLORS["grey"])

    def _draw(self, answer: tuple[Any, ...]) -> None:
        """Draw what `fn` answered."""
        if not 2 <= len(answer) <= 3:
            raise TypeError(f"fn must return labels, weights and perhaps a mask, got {len(answer)}")
        labels, weights, *mask = answer
        self._explore(weights, labels, mask=mask[0] if mask else None)

    def _explore(self, weights: Any, *labels: Sequence[str], mask: Any = None) -> None:
        if self.explorer is None:
            self.explorer = AttentionExplorer(weights, *labels, mask=mask, title=self._title)
            self._stage.children = (self.explorer.widget,)
        else:
            self.explorer.update(weights, *labels, mask=mask)
