"""The mask painter: what is painted is what attention gets, and who sees nothing is said."""

import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

from course_lib import attention, masks, plots
from course_lib.plots.mask_painter import PAINTED, presets

mpl.use("agg")
WORDS = ["the", "cat", "sat", "on", "the", "mat", ".", "\n"]


def weigh(mask):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, len(mask), 4, generator=generator)
    return attention(q, k, v, mask, return_weights=True)[1]


@pytest.fixture
def painter():
    return plots.MaskPainter(weigh, WORDS)


def cells(painter, row, column):
    return painter._cells[row, column]


def test_it_starts_with_the_causal_mask(painter):
    assert painter.preset.value == "causal"
    assert torch.equal(painter.mask, torch.ones(8, 8).tril().bool())
    assert painter.message == ""


@pytest.mark.parametrize("name", presets(8))
def test_every_preset_is_the_mask_of_its_name(painter, name):
    painter.preset.value = name
    assert torch.equal(painter.mask, presets(8)[name].dense(8, 8)[0, 0])
    assert painter.preset.value == name
    assert painter.weights == pytest.approx(weigh(painter.mask)[0, 0].numpy())
    assert painter.message == ""


def test_the_presets_differ():
    painted = {tuple(mask.dense(8, 8).flatten().tolist()) for mask in presets(8).values()}
    assert len(painted) == len(presets(8))


@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_presets_fit_any_size(n):
    painter = plots.MaskPainter(weigh, ["x"] * n)
    for name in presets(n):
        painter.preset.value = name
        assert painter.error is None


def test_a_click_changes_one_cell_and_the_weights(painter):
    before, picture = painter.weights, painter.picture()
    cells(painter, 0, 1).value = True
    assert painter.mask.sum() == 8 * 9 / 2 + 1
    assert painter.mask[0, 1]
    assert before[0, 1] == 0 < painter.weights[0, 1]
    assert (before[1:] == painter.weights[1:]).all()
    assert painter.preset.value == PAINTED
    assert painter.picture() != picture
    assert cells(painter, 0, 1).icon == "check"


def test_clicking_back_to_a_known_mask_says_its_name(painter):
    cells(painter, 3, 1).value = False
    assert painter.preset.value == PAINTED
    cells(painter, 3, 1).value = True
    assert painter.preset.value == "causal"


def test_choosing_painted_by_hand_changes_nothing(painter):
    painter.preset.value = PAINTED
    assert torch.equal(painter.mask, torch.ones(8, 8).tril().bool())


@pytest.mark.parametrize(
    "mask",
    [
        masks.sliding_window(2, 0),
        masks.prefix([3]),
        torch.eye(8).bool(),
        torch.eye(8).bool()[None, None],
        torch.ones(1, 8).bool(),
    ],
)
def test_a_mask_can_be_set_from_code(painter, mask):
    painter.mask = mask
    rule = mask if isinstance(mask, masks.Mask) else masks.from_dense(mask)
    assert torch.equal(painter.mask, rule.dense(8, 8)[0, 0])


def test_the_weights_are_asked_for_once_however_many_cells_turn():
    calls = []
    painter = plots.MaskPainter(lambda mask: calls.append(0) or weigh(mask), WORDS)
    painter.mask = ~painter.mask
    painter.preset.value = "BigBird"
    assert len(calls) == 3


def test_a_row_that_sees_nothing_shows_0_and_is_said(painter):
    mask = painter.mask
    mask[1] = mask[7] = False
    painter.mask = mask
    assert painter.weights[[1, 7]].tolist() == [[0.0] * 8] * 2
    assert painter.message == "Nothing to see for: cat, ↵ (the weights are 0)."
    assert painter.message in painter._line.value


def test_a_row_that_sees_nothing_and_still_looks_is_said():
    painter = plots.MaskPainter(lambda mask: torch.full((2, 2), 0.5), ["a", "b"])
    painter.mask = torch.tensor([[False, False], [True, True]])
    assert painter.message == "Nothing to see for: a (and yet the weights are not 0)."


def test_weight_on_a_hidden_cell_is_said():
    painter = plots.MaskPainter(lambda mask: mask.float().softmax(-1), ["a", "b"])
    assert painter.message == "Weight falls on a cell that is off!"


def test_an_exception_is_shown_and_kept_and_leaves_no_stale_picture(painter):
    def fail(mask):
        raise KeyError("<cat>")

    painter._weigh = fail
    cells(painter, 0, 1).value = True
    assert isinstance(painter.error, KeyError)
    assert painter.weights is None
    assert painter.picture() == b""
    assert "&lt;cat&gt;" in painter._line.value
    assert painter._image.layout.display == "none"
    painter._weigh = weigh
    cells(painter, 0, 1).value = False
    assert painter.error is None
    assert painter._image.layout.display is None
    assert painter.picture()


@pytest.mark.parametrize("weights", [torch.ones(3, 3), torch.ones(8), None])
def test_weights_of_another_shape_are_told_so(weights):
    painter = plots.MaskPainter(lambda mask: weights, WORDS)
    assert painter.error is not None
    assert painter.message


@pytest.mark.parametrize("count", [0, 17])
def test_too_few_or_many_tokens_are_refused(count):
    with pytest.raises(ValueError, match=f"labels: expected 1 to 16 tokens, got {count}"):
        plots.MaskPainter(weigh, ["x"] * count)


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of none, causal, .*got 'diagonal'"):
        plots.MaskPainter(weigh, WORDS, preset="diagonal")


@pytest.mark.parametrize("mask", [masks.padding([1, 2]), torch.ones(1, 2, 8, 8).bool()])
def test_a_mask_of_several_sequences_or_heads_is_refused(painter, mask):
    with pytest.raises(ValueError, match=r"mask must be one for all sequences and heads, got \("):
        painter.mask = mask


def test_a_mask_of_another_size_is_refused(painter):
    with pytest.raises(ValueError, match="n_q = 8"):
        painter.mask = torch.ones(3, 3).bool()


def test_it_is_stored_with_a_picture_for_hosts_without_widgets(painter):
    data, metadata = painter._repr_mimebundle_()
    assert data["image/png"].startswith("iVBORw0KGgo")  # base64 of the PNG signature
    assert "application/vnd.jupyter.widget-view+json" in data
    assert 100 < metadata["image/png"]["width"] < 900
    assert len(painter.picture()) < 150_000


def test_all_buttons_share_one_layout(painter):
    assert len({cell.layout.model_id for cell in painter._cells.flat}) == 1


def test_a_drawn_mask_shows_rows_from_the_top():
    _, ax = plt.subplots()
    plots.draw_mask(ax, torch.tensor([[True, False, False], [True, True, False]]), title="two")
    assert ax.collections[0].get_array().tolist() == [[1, 0, 0], [1, 1, 0]]
    assert ax.yaxis_inverted()
    assert [len(ax.get_yticks()), len(ax.get_xticks())] == [2, 3]
    plt.close("all")


def test_importing_plots_does_not_wait_for_torch():
    code = "import sys; from course_lib import plots; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
