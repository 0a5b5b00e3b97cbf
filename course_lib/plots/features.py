"""A live widget: softmax attention beside its estimate by random features."""

from __future__ import annotations

from typing import Any

import numpy as np

from course_lib.plots._extras import need
from course_lib.plots._panel import Panel, shown_width, to_png
from course_lib.plots.style import COLORS, rc_params

_COUNTS = tuple(2**i for i in range(11))  # numbers of features on the slider: 1 … 1024
_DRAWS = 5  # of random directions, for the band of the curve


class FeatureExplorer(Panel):
    """Choose how many features and how large the inputs; see true and estimated weights.

    Queries and keys are drawn from N(0, size²). The true weights are those of softmax attention,
    the estimate is the Performer's: φ(q)·φ(k) with positive random features, each row divided by
    its sum. Misplaced weight is half the sum of |true - estimate| over a row, the mean over rows:
    0 if they are equal, 1 if all weight lies on wrong keys.

    Args:
        d_head: width of queries and keys.
        tokens: how many of them.
        seed: of queries and keys.

    Attributes:
        features, size, draw, orthogonal: the controls; set their `.value`.
        true, estimate: weights, (tokens, tokens); each row sums to 1.
        misplaced: the share of the weight that the estimate puts on wrong keys.

    Raises:
        ValueError: d_head or tokens is below 1.

    In a notebook: `FeatureExplorer().show()`.
    """

    def __init__(self, d_head: int = 16, *, tokens: int = 12, seed: int = 0) -> None:
        for name, number in (("d_head", d_head), ("tokens", tokens)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        import torch  # importing plots need not wait for it

        g = torch.Generator().manual_seed(seed)
        self._inputs = torch.randn(2, tokens, d_head, generator=g)
        w = need("ipywidgets")
        wide = {"layout": w.Layout(width="420px"), "continuous_update": False}
        self.features = w.SelectionSlider(
            options=_COUNTS, value=32, description="features m", **wide
        )
        self.size = w.FloatSlider(1.0, min=0.25, max=3.0, step=0.25, description="size", **wide)
        self.draw = w.IntSlider(0, min=0, max=_DRAWS - 1, description="draw", **wide)
        self.orthogonal = w.Checkbox(True, description="directions at right angles")
        self._image = w.Image(format="png")
        controls = [self.features, self.size, self.draw, self.orthogonal]
        self.widget = w.VBox([*controls, self._image])
        self.widget.add_class("feature-explorer")
        for control in controls:
            control.observe(lambda _: self._show(), names="value")
        self._show()

    @property
    def misplaced(self) -> float:
        """Share of the weight on wrong keys, the mean over queries."""
        return _misplaced(self.true, self.estimate)

    def picture(self) -> bytes:
        """Both weights and the curve, as PNG."""
        return self._png

    def _show(self) -> None:
        """Compute and draw for the controls as they stand."""
        q, k = self._inputs * self.size.value * self._inputs.shape[-1] ** -0.25
        self.true = (q @ k.mT).softmax(-1).numpy()  # (n, d) x (d, n) -> (n, n)
        self.estimate = self._estimate(q, k, self.features.value, self.draw.value)
        with need("matplotlib").rc_context(rc_params()):
            figure = need("matplotlib.figure").Figure(figsize=(9, 3.3))
            axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
            self._draw_weights(axes[0], self.true, "softmax")
            self._draw_weights(axes[1], self.estimate, f"{self.features.value} features")
            self._draw_curve(axes[2], q, k)
            self._png = to_png(figure)
        self._image.layout.width = f"{shown_width(self._png)}px"
        self._image.value = self._png

    def _estimate(self, q: Any, k: Any, count: int, draw: int) -> np.ndarray:
        """The Performer's weights (n, n), in float64: no feature may vanish."""
        import torch

        from course_lib import layers

        g, d = torch.Generator().manual_seed(draw), q.shape[-1]
        directions = (
            layers.orthogonal_gaussian(count, d, g)
            if self.orthogonal.value
            else torch.randn(count, d, generator=g)
        ).double()  # (m, d)
        # largest feature of each query 1: the row's sum takes the factor out again
        phi_q = layers.positive_features(q.double(), directions, stabilise=True)
        phi_k = layers.positive_features(k.double(), directions)
        weights = phi_q @ phi_k.mT  # (n, m) x (m, n) -> (n, n)
        return (weights / weights.sum(-1, keepdim=True)).numpy()

    def _draw_weights(self, ax: Any, weights: np.ndarray, title: str) -> None:
        ax.imshow(weights, cmap="Blues", vmin=0, vmax=max(self.true.max(), 1e-9))
        ax.set(xlabel="key", ylabel="query", title=title, xticks=[], yticks=[])
        ax.grid(False)

    def _draw_curve(self, ax: Any, q: Any, k: Any) -> None:
        """Misplaced weight against the number of features, over all draws."""
        found = np.array(
            [
                [_misplaced(self.true, self._estimate(q, k, m, draw)) for draw in range(_DRAWS)]
                for m in _COUNTS
            ]
        )  # (counts, draws)
        ax.fill_between(_COUNTS, found.min(1), found.max(1), color=COLORS["sky"], alpha=0.35, lw=0)
        ax.plot(_COUNTS, found.mean(1), color=COLORS["blue"])
        ax.plot([self.features.value], [self.misplaced], "o", color=COLORS["vermillion"], ms=9)
        ax.set(xscale="log", ylim=(0, 1), xlabel="features m", ylabel="share of weight misplaced")
        ax.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
        ax.set_title(f"size {self.size.value:g}: {self.misplaced:.2f} misplaced", fontsize=11)


def _misplaced(true: np.ndarray, estimate: np.ndarray) -> float:
    """Half the sum of |true - estimate| over the keys, the mean over queries."""
    return float(np.abs(true - estimate).sum(1).mean() / 2)
