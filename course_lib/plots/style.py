"""One look for every figure: Okabe and Ito's colours, readable fonts, light grid, crisp pixels."""

from __future__ import annotations

import sys
from types import MappingProxyType
from typing import Any

from course_lib.plots._extras import need

COLORS = MappingProxyType(
    {
        "blue": "#0072B2",
        "vermillion": "#D55E00",
        "green": "#009E73",
        "purple": "#CC79A7",
        "orange": "#E69F00",
        "sky": "#56B4E9",
        "yellow": "#F0E442",  # for surfaces only: too pale for a line on white
        "black": "#000000",
        "ink": "#262626",
        "grey": "#767676",
        "light": "#E6E6E6",
    }
)
"""Named colours. The first eight are Okabe and Ito's, told apart by every kind of colour vision."""

_CYCLE = ("blue", "vermillion", "green", "purple", "orange", "sky", "black")


def rc_params() -> dict[str, Any]:
    """Matplotlib settings of the course, as a dictionary for ``rcParams`` or ``rc_context``."""
    cycler = need("matplotlib").cycler
    return {
        "axes.prop_cycle": cycler(color=[COLORS[name] for name in _CYCLE]),
        "figure.figsize": (7.0, 4.0),  # inches: the text width of a notebook
        "figure.dpi": 90,  # on screen; retina doubles it in the file
        "figure.constrained_layout.use": True,
        "savefig.dpi": 160,
        "hatch.linewidth": 0.6,
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.labelsize": 11,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": COLORS["grey"],
        "axes.labelcolor": COLORS["ink"],
        "text.color": COLORS["ink"],
        "xtick.color": COLORS["ink"],
        "ytick.color": COLORS["ink"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLORS["light"],
        "grid.linewidth": 0.8,
        "lines.linewidth": 2.0,
        "figure.facecolor": "white",  # a figure keeps its paper under a dark theme
        "savefig.facecolor": "white",
    }


def use_style() -> None:
    """Give every figure drawn from now on the look of the course. Call it once per notebook."""
    need("matplotlib").rcParams.update(rc_params())
    if "ipykernel" in sys.modules:  # twice the pixels on screen, in a notebook only
        need("matplotlib_inline.backend_inline").set_matplotlib_formats("retina")
