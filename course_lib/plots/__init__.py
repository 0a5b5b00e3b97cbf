"""Figures and widgets of the course: one style, colour-blind safe, legible at notebook width.

Importing this package needs neither matplotlib nor ipywidgets; calling what draws does, and says in
one line which extra brings them where they are missing.
"""

from course_lib.plots import results
from course_lib.plots.alignment import LiveAlignment
from course_lib.plots.chapters import CHAPTERS, Chapter
from course_lib.plots.course_map import course_map
from course_lib.plots.curves import loss_curves
from course_lib.plots.depth import DepthExplorer
from course_lib.plots.features import FeatureExplorer
from course_lib.plots.fill_in import FillIn
from course_lib.plots.heatmap import attention_heatmap
from course_lib.plots.live_loss import LiveLoss
from course_lib.plots.mask_painter import MaskPainter, draw_mask
from course_lib.plots.memory import MemoryExplorer
from course_lib.plots.next_token import NextToken, draw_shares
from course_lib.plots.positions import PositionExplorer
from course_lib.plots.style import COLORS, use_style
from course_lib.plots.tiles import TileExplorer, draw_tiles
from course_lib.plots.widgets import AttentionExplorer, LiveAttention

__all__ = [
    "CHAPTERS",
    "COLORS",
    "AttentionExplorer",
    "Chapter",
    "DepthExplorer",
    "FeatureExplorer",
    "FillIn",
    "LiveAlignment",
    "LiveAttention",
    "LiveLoss",
    "MaskPainter",
    "MemoryExplorer",
    "NextToken",
    "PositionExplorer",
    "TileExplorer",
    "attention_heatmap",
    "course_map",
    "draw_mask",
    "draw_shares",
    "draw_tiles",
    "loss_curves",
    "results",
    "use_style",
]
