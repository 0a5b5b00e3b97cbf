"""A mask seen by tiles: which of them are empty, partial or full, and what that saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.style import COLORS, rc_params

if TYPE_CHECKING:  # importing plots need not wait for torch
    from course_lib import masks

TONES = {"empty": "white", "partial": COLORS["sky"], "full": COLORS["blue"]}
"""What each kind of tile looks like."""


def draw_tiles(mask: masks.Mask, n: int, block: int, *, ax: Any = None, legend: bool = True) -> Any:
    """Draw a mask's tiles of block x block pairs: white is empty, pale partial, dark full.

    Rows are queries, columns are keys, both counted in tokens. The rule must be the same for all
    sequences and heads. Returns the axes.
    """
    if ax is None:
        ax = need("matplotlib.pyplot").subplots(figsize=(4.2, 4.2))[1]
    table = mask.tiles(n, n, block, block).table()
    if table.shape[:2] != (1, 1):
        raise ValueError(
            f"mask must be one for all sequences and heads, got {tuple(table.shape[:2])}"
        )
    kinds = (table[0, 0] >= 0).int() + (table[0, 0] == 0).int()  # 0 empty, 1 partial, 2 full
    edges = [min(i * block, n) for i in range(len(kinds) + 1)]
    lines = {"edgecolors": COLORS["light"], "linewidth": 0.5 if len(kinds) <= 40 else 0}
    colors = need("matplotlib.colors").ListedColormap([*TONES.values()])
    ax.pcolormesh(edges, edges, kinds.numpy(), cmap=colors, vmin=0, vmax=2, **lines)
    ax.set(aspect="equal", xlabel="key [tokens]", ylabel="query [tokens]", ylim=(n, 0))
    ticks = [i * n // 4 for i in range(5)]
    ax.set_xticks(ticks, ticks)
    ax.set_yticks(ticks, ticks)
    ax.grid(False)
    ax.spines[:].set_visible(True)
    if legend:
        _legend(ax)
    return ax


def _legend(ax: Any) -> None:
    patch = need("matplotlib.patches").Patch
    handles = [
        patch(facecolor=tone, edgecolor=COLORS["grey"], label=kind) for kind, tone in TONES.items()
    ]
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)


def _rule(name: str, window: int, block: int) -> masks.Mask:
    """The mask of a name on the widget's list."""
    from course_lib import masks

    return {
        "full": lambda: ~masks.padding([0]),
        "causal": masks.causal,
        "sliding window": lambda: masks.sliding_window(window, window),
        "causal window": lambda: masks.sliding_window(window, 0),
        "Longformer": lambda: masks.longformer(window, [0]),
        "BigBird": lambda: masks.bigbird(
            block, window_blocks=1 + 2 * -(-window // block), global_blocks=1, random_blocks=2
        ),
    }[name]()


RULES = ("full", "causal", "sliding window", "causal window", "Longformer", "BigBird")


class TileExplorer(Panel):
    """Choose a rule, its window, the tile and the length; see the tiles and what they cost.

    Longformer has one global token, the first. BigBird counts in blocks: as many as hold the window
    on each side, one global block and two random ones.

    Args:
        rule: the name of the rule on show at first, one of RULES.
        lengths: the numbers of tokens to choose from, rising.
        blocks: the sides of a tile to choose from, in tokens.
        windows: the numbers of keys on each side to choose from.

    Attributes:
        rule, window, block, n: the controls; set `.value` to turn them from code.
        tiles: how many tiles there are of each kind, {"empty": …, "partial": …, "full": …}.
        visible: the share of all pairs that the rule shows.
        computed: the share of all pairs that lie in tiles which are not empty.
        message: the line below the picture.

    Raises:
        ValueError: no such rule, or nothing to choose from.

    In a notebook: `TileExplorer().show()`.
    """

    def __init__(
        self,
        rule: str = "sliding window",
        *,
        lengths: Sequence[int] = (128, 256, 512, 1024, 2048),
        blocks: Sequence[int] = (16, 32, 64, 128),
        windows: Sequence[int] = (8, 16, 32, 64, 128, 256),
    ) -> None:
        _check(rule, lengths=lengths, blocks=blocks, windows=windows)
        w = need("ipywidgets")
        self.rule = w.Dropdown(options=list(RULES), value=rule, description="rule")

        def slider(options: Sequence[int], at: int, name: str) -> Any:
            return w.SelectionSlider(
                options=list(options), value=options[min(at, len(options) - 1)], description=name,
                continuous_update=False, layout={"width": "380px"},
            )  # fmt: skip

        self.window, self.block = slider(windows, 3, "window"), slider(blocks, 1, "tile")
        self.n = slider(lengths, 2, "tokens")
        self._image, self._line = w.Image(format="png"), w.HTML()
        controls = (self.rule, self.window, self.block, self.n)
        self.widget = w.VBox([*controls, self._image, self._line])
        self.widget.add_class("tile-explorer")  # a name by which a page can find it
        for control in controls:
            control.observe(lambda _: self._turned(), names="value")
        self._turned()

    def picture(self) -> bytes:
        """The tiles beside the shares, as PNG."""
        return self._png

    def _turned(self) -> None:
        """A control was turned: cut the mask again, count, draw."""
        n, block = self.n.value, self.block.value
        mask = _rule(self.rule.value, self.window.value, block)
        self.tiles, pairs = _count(mask, n, block)
        self.visible, self.computed = (pairs[kind] / n**2 for kind in ("visible", "computed"))
        kept = n**2 / pairs["computed"]
        counts = ", ".join(f"{count} {kind}" for kind, count in self.tiles.items())
        saved = "all of them" if kept == 1 else f"{kept:.1f} times fewer"
        self.message = f"Tiles: {counts}. Scores computed for each head: {saved}."
        self._draw(mask)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png
        self._line.value = f"<span style='color:{COLORS['ink']}'>{self.message}</span>"

    def _draw(self, mask: masks.Mask) -> None:
        with need("matplotlib").rc_context(rc_params()):
            figure = need("matplotlib.figure").Figure(figsize=(8.2, 4.2))
            left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
            draw_tiles(mask, self.n.value, self.block.value, ax=left)
            shares = {"visible": self.visible, "computed": self.computed}
            right.barh(list(shares), list(shares.values()), color=[COLORS["grey"], COLORS["blue"]])
            for row, share in enumerate(shares.values()):
                inside = share > 0.75
                right.annotate(
                    f"{share:.1%}", (share, row), (-4 if inside else 4, 0),
                    textcoords="offset points", va="center", ha="right" if inside else "left",
                    color="white" if inside else COLORS["ink"],
                )  # fmt: skip
            right.set(xlim=(0, 1), ylim=(1.9, -0.9), xlabel="share of all pairs")
            right.grid(axis="y", visible=False)
            self._png = to_png(figure)


def _count(mask: masks.Mask, n: int, block: int) -> tuple[dict[str, int], dict[str, int]]:
    """How many tiles of each kind; how many pairs are visible, and lie in tiles not empty."""
    tiles = mask.tiles(n, n, block, block)
    table = tiles.table()[0, 0]
    side = [min(block, n - start) for start in range(0, n, block)]  # the last tile may be ragged
    sides = table.new_tensor(side)
    area = sides[:, None] * sides[None, :]  # (rows, columns)
    seen = tiles.patterns.sum((1, 2))[(table - 1).clamp(min=0)] if len(tiles.patterns) else area
    kinds = {
        "empty": int((table < 0).sum()), "partial": int((table > 0).sum()),
        "full": int((table == 0).sum()),
    }  # fmt: skip
    visible = int(area[table == 0].sum() + seen[table > 0].sum())
    return kinds, {"visible": visible, "computed": int(area[table >= 0].sum())}


def _check(rule: str, **choices: Sequence[int]) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
    for name, values in choices.items():
        if not values or min(values) < 1 or list(values) != sorted(set(values)):
            raise ValueError(f"{name} must be rising numbers from 1, got {values!r}")
