"""The picture of a mask's tiles, and the explorer: what they show is what the mask says."""

import matplotlib as mpl
import pytest
import torch

from course_lib import masks, plots
from course_lib.plots.tiles import RULES, TONES

mpl.use("agg")

SIZES = {"lengths": (30, 64), "blocks": (8, 16, 100), "windows": (1, 5, 9)}


def kinds(ax):
    """What was drawn: 0 empty, 1 partial, 2 full, (rows, columns)."""
    return torch.as_tensor(ax.collections[0].get_array().data).int()


@pytest.fixture
def explorer():
    return plots.TileExplorer(**SIZES)


@pytest.mark.parametrize(
    ("mask", "wanted"),
    [
        (masks.causal(), [[1, 0, 0], [2, 1, 0], [2, 2, 1]]),
        (masks.sliding_window(0, 0), [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (masks.longformer(0, [0]), [[1, 1, 1], [1, 1, 0], [1, 0, 1]]),
        (masks.padding([0]), [[0, 0, 0]] * 3),
        (~masks.padding([0]), [[2, 2, 2]] * 3),
    ],
    ids=str,
)
def test_each_tile_has_the_tone_of_its_kind(mask, wanted):
    ax = plots.draw_tiles(mask, 12, 4)
    assert kinds(ax).tolist() == wanted
    mpl.pyplot.close(ax.figure)


def test_a_ragged_last_tile_ends_where_the_text_ends():
    ax = plots.draw_tiles(~masks.padding([0]), 10, 4)
    assert kinds(ax).tolist() == [[2, 2, 2]] * 3  # full: what lies beyond the end does not count
    assert ax.get_ylim() == (10, 0)
    mpl.pyplot.close(ax.figure)


def test_tiles_of_one_pair_are_the_mask_itself():
    mask = masks.bigbird(4, window_blocks=1, global_blocks=1, random_blocks=1)
    ax = plots.draw_tiles(mask, 20, 1, legend=False)
    assert torch.equal(kinds(ax) == 2, mask.dense(20, 20)[0, 0])
    assert ax.get_legend() is None
    mpl.pyplot.close(ax.figure)


def test_the_legend_names_all_kinds_and_they_can_be_told_apart():
    ax = plots.draw_tiles(masks.causal(), 8, 4)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(TONES)
    assert len(set(TONES.values())) == 3
    mpl.pyplot.close(ax.figure)


def test_a_mask_that_differs_between_sequences_is_refused():
    with pytest.raises(ValueError, match="one for all sequences and heads"):
        plots.draw_tiles(masks.padding([1, 2]), 8, 4)


def rule_of(name, block, window=9):
    """The same rules, written down a second time."""
    return {
        "full": ~masks.padding([0]),
        "causal": masks.causal(),
        "sliding window": masks.sliding_window(window, window),
        "causal window": masks.sliding_window(window, 0),
        "Longformer": masks.longformer(window, [0]),
        "BigBird": masks.bigbird(
            block, window_blocks=1 + 2 * -(-window // block), global_blocks=1, random_blocks=2
        ),
    }[name]


@pytest.mark.parametrize("rule", RULES)
def test_the_shares_are_those_of_the_pairs(rule):
    explorer = plots.TileExplorer(rule, lengths=(30, 64), blocks=(8, 100), windows=(1, 5, 9))
    for n, block in ((64, 100), (64, 8), (30, 8)):
        explorer.block.value, explorer.n.value = block, n
        dense = rule_of(rule, block).dense(n, n)[0, 0]
        tiles = [part for row in dense.split(block) for part in row.split(block, dim=1)]
        full, empty = (
            sum(map(bool, kind)) for kind in zip(*((t.all(), ~t.any()) for t in tiles), strict=True)
        )
        wanted = {"empty": empty, "partial": len(tiles) - full - empty, "full": full}
        assert explorer.tiles == wanted
        computed = sum(tile.numel() for tile in tiles if tile.any())
        assert explorer.visible == pytest.approx(dense.sum().item() / n**2)
        assert explorer.computed == pytest.approx(computed / n**2)


def test_each_control_changes_the_picture(explorer):
    pictures = {explorer.picture()}
    for control, value in (
        (explorer.window, 1), (explorer.block, 8), (explorer.n, 30), (explorer.rule, "causal"),
    ):  # fmt: skip
        control.value = value
        pictures.add(explorer.picture())
    assert len(pictures) == 5
    assert explorer._image.value == explorer.picture()


def test_the_line_below_says_what_is_saved(explorer):
    explorer.rule.value = "full"
    assert "all of them" in explorer.message
    explorer.rule.value, explorer.block.value = "sliding window", 8
    assert "times fewer" in explorer.message
    assert explorer.message in explorer._line.value


def test_it_is_stored_with_a_picture_for_hosts_without_widgets(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["image/png"].startswith("iVBORw0KGgo")  # base64 of the PNG signature
    assert "run this notebook" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert 100 < metadata["image/png"]["width"] < 900
    assert len(explorer.picture()) < 150_000


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rule", {"rule": "no such"}),
        ("lengths", {"lengths": ()}),
        ("blocks", {"blocks": (0, 2)}),
        ("windows", {"windows": (4, 2)}),
        ("windows", {"windows": (2, 2)}),
    ],
)
def test_an_impossible_argument_is_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        plots.TileExplorer(**arguments)
