"""A mask to paint with the mouse, and what attention makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.heatmap import as_weights, attention_heatmap, label_pair
from course_lib.plots.style import COLORS, rc_params
from course_lib.plots.widgets import _WARNING, _paper, _said

if TYPE_CHECKING:  # importing plots need not wait for torch
    from torch import Tensor

    from course_lib import masks

PAINTED = "painted by hand"
_CELL = "30px"


def presets(n: int) -> dict[str, masks.Mask]:
    """The masks that a painter of n tokens offers, by name."""
    from course_lib import masks

    half = n // 2
    return {
        "none": masks.padding([n]),
        "causal": masks.causal(),
        "padding": masks.padding([max(1, n - 3)]),
        "sliding window": masks.sliding_window(1, 1),
        "prefix": masks.prefix([half]),
        "packed documents": masks.documents([[0] * half + [1] * (n - half)]) & masks.causal(),
        "Longformer": masks.longformer(1, [0]),
        "BigBird": masks.bigbird(1, window_blocks=3, global_blocks=1, random_blocks=1),
    }


class MaskPainter(Panel):
    """Click cells on and off; the weights beside the grid follow.

    Rows are queries, columns are keys; a cell that is on means "may attend".

    Args:
        weigh: mask (n, n) of bool, True = may attend -> weights (n, n). It may raise: the message
            is shown in place of the picture.
        labels: the n tokens; about 8 fit, 16 at most.
        preset: what is painted at first, one of the names in `preset`.

    Attributes:
        mask: (n, n) of bool; set it from code, to a tensor or a `masks.Mask`.
        preset: the control with the ready-made masks; set `.value` to a name.
        weights: (n, n), what `weigh` returned for the mask on show; None if it raised.
        message: the line below, which says who sees nothing; "" if there is nothing to say.
        error: what `weigh` raised for this mask, or None.

    Raises:
        ValueError: there are no labels or more than 16, or no such preset.
    """

    def __init__(
        self, weigh: Callable[[Tensor], Any], labels: Sequence[str], *, preset: str = "causal"
    ) -> None:
        w, n = need("ipywidgets"), len(labels)
        if not 1 <= n <= 16:
            raise ValueError(f"labels: expected 1 to 16 tokens, got {n}")
        self._weigh, self._labels = weigh, label_pair(labels, None, n, n)[0]
        self._presets = presets(n)
        if preset not in self._presets:
            raise ValueError(f"preset must be one of {', '.join(self._presets)}; got {preset!r}")
        self.weights: np.ndarray | None = None
        self.error: Exception | None = None
        self.message = ""
        self.preset = w.Dropdown(options=[*self._presets, PAINTED], description="mask")
        self._cells = _toggles(self._labels)
        self._line, self._image = w.HTML(), w.Image(format="png")
        grid = _grid(self._labels, self._cells)
        self.widget = w.VBox([self.preset, w.HBox([grid, self._image]), self._line])
        self.widget.add_class("mask-painter")  # a name by which a page can find it
        self._updating = False
        self.preset.value = preset
        self.mask = self._presets[preset]
        self.preset.observe(lambda change: self._choose(change["new"]), names="value")
        for cell in self._cells.flat:
            cell.observe(lambda _: self._updating or self._repaint(), names="value")

    @property
    def mask(self) -> Tensor:
        """(n, n) of bool, True = may attend: what is painted now."""
        import torch

        return torch.tensor([[cell.value for cell in row] for row in self._cells])

    @mask.setter
    def mask(self, mask: masks.Mask | Tensor) -> None:
        from course_lib import masks

        n = len(self._labels)
        rule = mask if isinstance(mask, masks.Mask) else masks.from_dense(mask)
        dense = rule.dense(n, n)
        if dense.shape[:2] != (1, 1):
            raise ValueError(
                f"mask must be one for all sequences and heads, got {tuple(dense.shape)}"
            )
        self._updating = True  # many cells turn: draw once, when all are in place
        for cell, visible in zip(self._cells.flat, dense.flatten().tolist(), strict=True):
            cell.value = visible
        self._updating = False
        self._repaint()

    def picture(self) -> bytes:
        """Mask and weights side by side, as PNG; empty while a message stands for the weights."""
        return b"" if self.weights is None else self._draw(with_mask=True)

    def _choose(self, name: str) -> None:
        if name != PAINTED and not self._updating:
            self.mask = self._presets[name]

    def _repaint(self) -> None:
        """Ask for the weights of the mask on show, and show them."""
        mask = self.mask
        for cell in self._cells.flat:
            cell.icon = "check" if cell.value else ""
        self._name(mask)
        self.error, self.weights = None, None
        try:
            self.weights = as_weights(self._weigh(mask))
            png = self._draw()
            self._image.value, self._image.layout.width = png, f"{shown_width(png)}px"
            self.message = _about(mask.numpy(), self.weights, self._labels)
        except Exception as error:  # a learner's function may raise anything: say it, keep it
            self.error, self.weights, self.message = error, None, _said(error)
        # an old picture beside a new mask would be a lie
        self._image.layout.display = "none" if self.error else None
        self._line.value = _paper(self.message, _WARNING)

    def _name(self, mask: Tensor) -> None:
        """Let the control say which ready-made mask this is, if it is one."""
        n = len(self._labels)
        names = [self.preset.value, *self._presets]  # the one on show first: two may look alike
        shown = (name for name in names if name != PAINTED)
        same = (k for k in shown if (self._presets[k].dense(n, n)[0, 0] == mask).all())
        self._updating = True
        self.preset.value = next(same, PAINTED)
        self._updating = False

    def _draw(self, with_mask: bool = False) -> bytes:
        with need("matplotlib").rc_context(rc_params()):
            size = (8.6, 4.0) if with_mask else (4.7, 4.0)
            figure = need("matplotlib.figure").Figure(figsize=size)
            *left, right = np.atleast_1d(figure.subplots(1, 2 if with_mask else 1))
            mask = self.mask
            blind = ~mask.any(1, keepdim=True)  # such a row shows what its weights are
            attention_heatmap(
                self.weights, self._labels, ax=right, title="weights", mask=mask | blind,
                annotate=len(mask) <= 8,
            )  # fmt: skip
            for ax in left:
                draw_mask(ax, mask, self._labels, title=f"mask: {self.preset.value}")
            return to_png(figure)


def draw_mask(
    ax: Any, mask: Any, labels: Sequence[str] | None = None, *, title: str | None = None
) -> None:
    """Draw a mask: a filled cell may be looked at; rows are queries, columns are keys.

    mask: (n_q, n_k) of bool. labels: for a square mask; positions from 0 if None.
    """
    table = np.asarray(mask, dtype=float)
    colors = need("matplotlib.colors").ListedColormap(["white", COLORS["blue"]])
    ax.pcolormesh(table, cmap=colors, vmin=0, vmax=1, edgecolors=COLORS["light"], linewidth=0.8)
    rows, columns = label_pair(labels, labels, *table.shape)
    turn = 0 if max(map(len, columns)) <= 2 else 90
    ax.set_xticks([j + 0.5 for j in range(len(columns))], columns, rotation=turn)
    ax.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    ax.tick_params(length=0, labelsize=9)
    ax.set(aspect="equal", xlabel="key", ylabel="query", ylim=(len(rows), 0))
    ax.grid(False)
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)


def _toggles(labels: Sequence[str]) -> np.ndarray:
    """One button for each pair, (n, n); all share one layout, so that they are light."""
    w = need("ipywidgets")
    layout = w.Layout(width=_CELL, height=_CELL, margin="1px", padding="0")
    return np.array(
        [
            [w.ToggleButton(layout=layout, tooltip=f"{q} may look at {k}") for k in labels]
            for q in labels
        ]
    )


def _grid(labels: Sequence[str], cells: np.ndarray) -> Any:
    """The buttons between the keys' names above and the queries' names at the left."""
    w = need("ipywidgets")
    style = "writing-mode:vertical-rl;transform:rotate(180deg);line-height:30px"
    names = [w.HTML(_paper(label, COLORS["ink"])) for label in labels]
    above = [
        w.HTML(f"<div style='{style}'>{_paper(label, COLORS['ink'])}</div>") for label in labels
    ]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    children = [w.HTML("query ↓ key →"), *above, *(cell for row in rows for cell in row)]
    columns = f"max-content repeat({len(labels)}, 34px)"
    return w.GridBox(
        children, layout=w.Layout(grid_template_columns=columns, align_items="flex-end")
    )


def _about(mask: np.ndarray, weights: np.ndarray, labels: Sequence[str]) -> str:
    """Who sees nothing, and what its weights are then; who looks where it may not."""
    blind: np.ndarray = np.equal(mask.sum(1, keepdims=True), 0)  # (n, 1)
    said = []
    if blind.any():
        names = ", ".join(label for label, row in zip(labels, blind, strict=True) if row.any())
        zero = (weights[blind[:, 0]] == 0).all()
        rest = "the weights are 0" if zero else "and yet the weights are not 0"
        said.append(f"Nothing to see for: {names} ({rest}).")
    if (weights[~mask & ~blind] != 0).any():
        said.append("Weight falls on a cell that is off!")
    return " ".join(said)
