"""The picture of attention: rows are queries, columns are keys, a dark cell is a strong look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots.style import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ANNOTATE_UP_TO = 12  # rows or columns: beyond that the numbers are too small to read
_LONGEST_LABEL = 16  # characters


def as_weights(weights: Any, rank: int = 2) -> np.ndarray:
    """Turn ``weights`` (a tensor, an array or nested lists) into a float array of ``rank`` axes.

    Leading axes of length 1 are dropped, so that the weights which ``attention`` returns for one
    sequence and one head, (1, 1, n_q, n_k), can be passed as they are.
    """
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().double()
    array = np.asarray(weights, dtype=float)
    while array.ndim > rank and array.shape[0] == 1:
        array = array[0]
    if array.ndim != rank or 0 in array.shape:
        wanted = "(n_q, n_k)" if rank == 2 else "(heads, n_q, n_k)"
        raise ValueError(
            f"weights: expected shape {wanted} with at least one query and one key, "
            f"got {tuple(array.shape)}; pick one sequence (and one head), e.g. weights[0, 0]"
        )
    return array


def label_pair(
    query_labels: Sequence[str] | None, key_labels: Sequence[str] | None, n_q: int, n_k: int
) -> tuple[list[str], list[str]]:
    """Printable labels of rows and columns; a square table names its columns as its rows."""
    if key_labels is None and n_q == n_k:
        key_labels = query_labels
    return _labels(query_labels, n_q, "query_labels"), _labels(key_labels, n_k, "key_labels")


def _labels(labels: Sequence[str] | None, count: int, name: str) -> list[str]:
    if labels is None:
        return [str(index) for index in range(count)]
    if len(labels) != count:
        raise ValueError(f"{name}: expected {count} labels, one per token, got {len(labels)}")
    return [_printable(str(label)) for label in labels]


def _printable(label: str) -> str:
    """Whitespace made visible, long words cut."""
    if not label.strip():
        label = label.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def attention_heatmap(
    weights: Any,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
    mask: Any = None,
    annotate: bool | Literal["auto"] = "auto",
    highlight: int | None = None,
) -> Axes:
    """Draw attention weights as a heat map: one row per query, one column per key.

    Args:
        weights: (n_q, n_k), a tensor, array or nested lists; leading axes of length 1 are dropped.
        query_labels: n_q words for the rows; numbers if None.
        key_labels: n_k words for the columns; if None, the query labels where n_q = n_k.
        ax: axes to draw on; if None, a figure of fitting size is made.
        title: one line above the picture.
        mask: (n_q, n_k) of bool, True = may attend. Cells that may not are hatched grey.
        annotate: write the weights into the cells; "auto" does so up to 12 x 12.
        highlight: a row to frame, to point at one query.

    Returns:
        The axes. A weight that is not a number is drawn in vermillion.

    Raises:
        ValueError: ``weights``, a label list, ``mask`` or ``highlight`` does not fit.
    """
    table = as_weights(weights)
    n_q, n_k = table.shape
    rows, columns = label_pair(query_labels, key_labels, n_q, n_k)
    hidden = _hidden(mask, table.shape)
    if ax is None:
        _, ax = need("matplotlib.pyplot").subplots(figsize=figure_size(rows, columns))
    image = _paint(ax, table, hidden)
    _label(ax, rows, columns, title)
    if annotate is True or (annotate == "auto" and max(n_q, n_k) <= _ANNOTATE_UP_TO):
        _write_numbers(ax, table, hidden, image.norm.vmax)
    if highlight is not None:
        _frame_row(ax, highlight, n_q, n_k)
    return ax


def figure_size(rows: Sequence[str], columns: Sequence[str]) -> tuple[float, float]:
    """Width and height in inches that give each cell room and never exceed the notebook."""
    cell = min(0.46, 5.0 / max(len(rows), len(columns)))
    margin = 0.085 * max(map(len, [*rows, *columns]))  # inches a label of that many letters takes
    width = min(8.0, max(4.2, cell * len(columns) + margin + 1.9))
    return width, min(7.0, max(2.2, cell * len(rows) + margin + 1.0))


def _hidden(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    if mask is None:
        return np.zeros(shape, dtype=bool)
    if hasattr(mask, "dense"):  # a masks.Mask: a rule that is asked for its matrix
        mask = mask.dense(*shape)
    allowed = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)
    while allowed.ndim > 2 and allowed.shape[0] == 1:
        allowed = allowed[0]
    try:
        return ~np.broadcast_to(allowed.astype(bool), shape)
    except ValueError:
        raise ValueError(
            f"mask: expected something that broadcasts to weights {shape}, got {allowed.shape}"
        ) from None


def _paint(ax: Axes, table: np.ndarray, hidden: np.ndarray) -> Any:
    colors = need("matplotlib").colormaps["Blues"].with_extremes(bad=COLORS["vermillion"])
    top = max(float(np.nanmax(np.where(hidden, 0.0, table), initial=0.0)), 1e-9)
    image = ax.imshow(
        table, cmap=colors, vmin=0.0, vmax=top, aspect="equal", interpolation="nearest"
    )
    if hidden.any():
        ax.add_collection(_hatched(hidden))
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.9, pad=0.03, aspect=25)
    bar.set_label("attention weight")
    bar.outline.set_visible(False)
    return image


def _hatched(hidden: np.ndarray) -> Any:
    """Grey hatched boxes over the hidden cells: one box for each unbroken run in a row."""
    boxes = []
    for row, cells in enumerate(hidden):
        # +1 where a run starts, -1 just past its end
        steps = np.diff(np.concatenate([[0], cells.astype(int), [0]]))
        runs = zip(np.flatnonzero(steps == 1), np.flatnonzero(steps == -1), strict=True)
        top, bottom = row - 0.5, row + 0.5
        for first, past in runs:
            left, right = first - 0.5, past - 0.5
            boxes.append([(left, top), (right, top), (right, bottom), (left, bottom)])
    return need("matplotlib.collections").PolyCollection(
        boxes, facecolor=COLORS["light"], edgecolor="#F7F7F7", hatch="////", linewidth=0
    )


def _label(ax: Axes, rows: list[str], columns: list[str], title: str | None) -> None:
    size = (
        10 if max(len(rows), len(columns)) <= 16 else 8 if max(len(rows), len(columns)) <= 40 else 6
    )
    # parse_math=False: a "$" in a sentence is a dollar, not the start of a formula
    plain: dict[str, Any] = {"fontsize": size, "parse_math": False}
    turn = 0 if max(map(len, columns)) <= 2 else 90
    ax.set_xticks(range(len(columns)), columns, rotation=turn, **plain)
    ax.set_yticks(range(len(rows)), rows, **plain)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="key: what is looked at", ylabel="query: who looks")
    if title:
        ax.set_title(title, parse_math=False)


def _write_numbers(ax: Axes, table: np.ndarray, hidden: np.ndarray, top: float) -> None:
    for (row, column), weight in np.ndenumerate(table):
        if hidden[row, column]:
            continue
        ink = "white" if not weight < 0.55 * top else COLORS["ink"]  # NaN too stands on dark
        text = "1.0" if weight >= 0.995 else f"{weight:.2f}".replace("0.", ".", 1)
        ax.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)


def _frame_row(ax: Axes, row: int, n_q: int, n_k: int) -> None:
    if not 0 <= row < n_q:
        raise ValueError(f"highlight: expected a row from 0 to {n_q - 1}, got {row}")
    box = need("matplotlib.patches").Rectangle(
        (-0.5, row - 0.5), n_k, 1, fill=False, edgecolor=COLORS["vermillion"], linewidth=2.2,
        clip_on=False, zorder=5,
    )  # fmt: skip
    ax.add_patch(box)
    ax.get_yticklabels()[row].set(color=COLORS["vermillion"], fontweight="bold")
