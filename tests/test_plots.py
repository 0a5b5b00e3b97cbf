"""Figures and widgets: what a reader sees is what the weights are."""

import subprocess
import sys

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from course_lib import masks, plots
from course_lib.plots._extras import need
from course_lib.plots.readme import PICTURE, summary, write
from course_lib.training import History

mpl.use("agg")
WORDS = ["the", "cat", "sat", "down"]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, generator=generator).mul(2).softmax(-1)


def labels(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def numbers(ax):
    return [text.get_text() for text in ax.texts]


# -- heat map ------------------------------------------------------------------------------------


def test_rows_are_queries_and_columns_are_keys():
    ax = plots.attention_heatmap([[0.0, 0.2, 0.8], [1.0, 0.0, 0.0]], ["who", "what"], list("abc"))
    assert labels(ax.yaxis) == ["who", "what"]
    assert labels(ax.xaxis) == ["a", "b", "c"]
    assert ax.images[0].get_array().tolist() == [[0.0, 0.2, 0.8], [1.0, 0.0, 0.0]]


def test_a_square_table_labels_its_columns_as_its_rows(weights):
    assert labels(plots.attention_heatmap(weights, WORDS).xaxis) == WORDS


def test_the_colour_bar_says_what_a_colour_means(weights):
    ax = plots.attention_heatmap(weights)
    assert "attention weight" in [other.get_ylabel() for other in ax.figure.axes]


@pytest.mark.parametrize("name", ["query_labels", "key_labels"])
@pytest.mark.parametrize("count", [3, 5])
def test_a_wrong_number_of_labels_is_refused_by_name(weights, name, count):
    given = {"query_labels": WORDS, "key_labels": WORDS} | {name: ["x"] * count}
    with pytest.raises(ValueError, match=rf"{name}: expected 4 labels.*got {count}"):
        plots.attention_heatmap(weights, **given)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 4), (2, 1, 4, 4), (0, 4), (4, 0)])
def test_weights_of_another_rank_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=r"weights: expected shape \(n_q, n_k\)") as caught:
        plots.attention_heatmap(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_weights_as_attention_returns_them_for_one_sequence_and_head_are_taken(weights):
    ax = plots.attention_heatmap(weights[None, None].requires_grad_())
    assert ax.images[0].get_array().shape == (4, 4)


@pytest.mark.parametrize("mask", [masks.causal(), torch.ones(4, 4).tril().bool()])
def test_cells_that_may_not_be_looked_at_carry_no_number(weights, mask):
    shown = numbers(plots.attention_heatmap(weights, mask=mask))
    assert len(shown) == 1 + 2 + 3 + 4


def test_hidden_cells_are_hatched_and_only_they(weights):
    ax = plots.attention_heatmap(weights, mask=masks.causal())
    (boxes,) = (c for c in ax.collections if c.get_hatch())
    cells = sum(np.ptp(path.vertices[:, 0]) for path in boxes.get_paths())
    assert cells == 3 + 2 + 1


def test_a_hidden_weight_does_not_stretch_the_colours():
    ax = plots.attention_heatmap([[0.3, 9.0]], mask=torch.tensor([[True, False]]))
    assert ax.images[0].norm.vmax == pytest.approx(0.3)


def test_a_mask_of_another_shape_is_refused(weights):
    with pytest.raises(ValueError, match=r"mask: .*\(4, 4\), got \(3, 3\)"):
        plots.attention_heatmap(weights, mask=torch.ones(3, 3, dtype=torch.bool))


def test_a_large_table_carries_no_numbers():
    assert numbers(plots.attention_heatmap(torch.full((13, 13), 1 / 13))) == []


def test_numbers_can_be_asked_for_and_refused(weights):
    assert len(numbers(plots.attention_heatmap(torch.full((13, 2), 0.5), annotate=True))) == 26
    assert numbers(plots.attention_heatmap(weights, annotate=False)) == []


def test_whitespace_tokens_can_be_seen_and_long_words_are_cut():
    ax = plots.attention_heatmap(torch.eye(3), [" ", "\n", "x" * 40])
    space, newline, long = labels(ax.yaxis)
    assert (space, newline) == ("␣", "↵")
    assert len(long) == 16


def test_a_dollar_in_a_sentence_is_a_dollar():
    ax = plots.attention_heatmap(torch.eye(2), ["$x^", "2$"], title="$")
    ax.figure.canvas.draw()  # a formula that does not parse would raise here
    assert labels(ax.xaxis) == ["$x^", "2$"]


def test_a_weight_that_is_not_a_number_is_drawn_and_said():
    ax = plots.attention_heatmap([[float("nan"), 1.0]])
    ax.figure.canvas.draw()
    assert "nan" in numbers(ax)


@pytest.mark.parametrize("row", [-1, 4])
def test_a_highlight_outside_the_table_is_refused(weights, row):
    with pytest.raises(ValueError, match=f"highlight: expected a row from 0 to 3, got {row}"):
        plots.attention_heatmap(weights, highlight=row)


def test_a_picture_can_be_drawn_into_given_axes(weights):
    _, ax = plt.subplots()
    assert plots.attention_heatmap(weights, ax=ax) is ax


# -- loss curves ---------------------------------------------------------------------------------


@pytest.fixture
def history():
    return History(
        step=[1, 2, 3], seconds=[0.1, 0.2, 0.3], loss=[3.0, 2.0, 1.0], eval_loss=[None, None, 1.5]
    )


@pytest.mark.parametrize(("x", "at", "unit"), [("step", 3, "step"), ("seconds", 0.3, "[s]")])
def test_held_out_loss_stands_where_it_was_measured(history, x, at, unit):
    ax = plots.loss_curves({"LSTM": history}, x=x)
    assert unit in ax.get_xlabel()
    assert "nats" in ax.get_ylabel()
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["LSTM, held out"] == [[at, 1.5]]
    assert len(drawn["LSTM"]) == 3


def test_each_run_has_a_colour_of_its_own(history):
    ax = plots.loss_curves({"a": history, "b": history})
    color = {line.get_label(): line.get_color() for line in ax.lines}
    assert color["a"] == color["a, held out"]
    assert color["a"] != color["b"]


def test_the_smooth_line_never_looks_ahead():
    loss = [1.0] * 50 + [0.0] * 50
    steps = list(range(100))
    run = History(step=steps, seconds=[0.1 * i for i in steps], loss=loss, eval_loss=[None] * 100)
    ax = plots.loss_curves({"run": run})
    smooth = next(line for line in ax.lines if line.get_label() == "run").get_ydata()
    assert smooth[:50].tolist() == loss[:50]
    assert smooth[60] == 0


def test_a_history_that_was_never_evaluated_is_drawn(history):
    history.eval_loss[-1] = None
    assert len(plots.loss_curves({"run": history}).lines) == 2


def test_lists_of_unequal_length_are_refused_with_the_name_of_the_run(history):
    history.loss.pop()
    with pytest.raises(ValueError, match=r"histories\['LSTM'\]: step has 3 entries, loss has 2"):
        plots.loss_curves({"LSTM": history})


def test_no_run_and_an_unknown_axis_are_refused(history):
    with pytest.raises(ValueError, match="histories: expected at least one run"):
        plots.loss_curves({})


@pytest.mark.bad_input
def test_an_unknown_axis_is_refused(history):
    with pytest.raises(ValueError, match="x: expected 'step' or 'seconds', got 'hours'"):
        plots.loss_curves({"run": history}, x="hours")


# -- explorer ------------------------------------------------------------------------------------


def test_turning_the_query_shows_the_weights_of_that_query(weights):
    explorer = plots.AttentionExplorer(weights, WORDS)
    before, strip = explorer.picture(), explorer._strip.value
    explorer.query.value = 2
    assert explorer.row == pytest.approx(weights[2].double().numpy())
    assert explorer.picture() != before
    assert explorer._strip.value != strip
    for weight in weights[2]:
        assert f"{100 * weight:.0f}%" in explorer._strip.value


def test_turning_the_head_shows_the_weights_of_that_head(weights):
    explorer = plots.AttentionExplorer(torch.stack([weights, weights.flip(-1)]), WORDS)
    explorer.query.value, explorer.head.value = 1, 1
    assert explorer.row == pytest.approx(weights[1].flip(-1).double().numpy())


def test_one_head_needs_no_control_for_heads(weights):
    assert plots.AttentionExplorer(weights).head.layout.display == "none"
    assert plots.AttentionExplorer(torch.stack([weights] * 2)).head.layout.display != "none"


def test_words_that_occur_twice_can_each_be_picked():
    explorer = plots.AttentionExplorer(torch.eye(3), ["the", "cat", "the"])
    explorer.query.value = 2
    assert explorer.row.tolist() == [0, 0, 1]


def test_the_explorer_refuses_a_wrong_number_of_labels(weights):
    with pytest.raises(ValueError, match="query_labels: expected 4 labels, one per token, got 2"):
        plots.AttentionExplorer(weights, ["a", "b"])


def layers_of(weights):
    """Two layers with two heads each: (layers, heads, n_q, n_k), no two alike."""
    heads = torch.stack([weights, weights.flip(-1)])
    return torch.stack([heads, heads.flip(-2)])


@pytest.mark.parametrize("form", [torch.Tensor.clone, list, lambda w: [x[None] for x in w]])
def test_turning_the_layer_shows_the_weights_of_that_layer(weights, form):
    stacked = layers_of(weights)
    explorer = plots.AttentionExplorer(form(stacked), WORDS)
    before = explorer.picture()
    explorer.layer.value, explorer.head.value, explorer.query.value = 1, 1, 2
    assert explorer.row == pytest.approx(stacked[1, 1, 2].double().numpy())
    assert explorer.picture() != before


@pytest.mark.parametrize(("title", "said"), [(None, ""), ("the cat", "the cat: ")])
def test_the_picture_says_which_layer_and_head_it_shows(weights, title, said, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "course_lib.plots.widgets.attention_heatmap", lambda *_, **given: drawn.append(given)
    )
    explorer = plots.AttentionExplorer(layers_of(weights), WORDS, title=title)
    explorer.layer.value = 1
    assert [given["title"] for given in drawn] == [
        f"{said}layer 0, head 0",
        f"{said}layer 1, head 0",
    ]
    plots.AttentionExplorer(weights, WORDS, title=title)
    assert drawn[-1]["title"] == title


def test_one_layer_needs_no_control_for_layers(weights):
    assert plots.AttentionExplorer(layers_of(weights)[:1]).layer.layout.display == "none"
    assert plots.AttentionExplorer([layers_of(weights)[0]]).layer.layout.display == "none"
    assert plots.AttentionExplorer(layers_of(weights)).layer.layout.display != "none"


def test_layers_may_differ_in_their_heads(weights):
    stacked = layers_of(weights)
    explorer = plots.AttentionExplorer([stacked[0], stacked[1, :1]], WORDS)
    explorer.head.value = 1
    explorer.layer.value = 1
    assert [value for _, value in explorer.head.options] == [0]
    assert explorer.row == pytest.approx(stacked[1, 0, 0].double().numpy())
    explorer.layer.value = 0
    assert [value for _, value in explorer.head.options] == [0, 1]


def test_layers_of_different_size_are_refused(weights):
    with pytest.raises(ValueError, match=r"layers must agree in \(n_q, n_k\).*\(4, 4\), \(3, 3\)"):
        plots.AttentionExplorer([weights[None], torch.eye(3)[None]])


def test_other_weights_keep_the_layer_where_it_was(weights):
    explorer = plots.AttentionExplorer(layers_of(weights), WORDS)
    explorer.layer.value = explorer.head.value = 1
    explorer.update(layers_of(weights).flip(-1), WORDS)
    assert (explorer.layer.value, explorer.head.value) == (1, 1)
    explorer.update(weights, WORDS)
    assert (explorer.layer.value, explorer.head.value) == (0, 0)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2, 4, 4)])
def test_the_explorer_refuses_weights_of_another_rank(shape):
    with pytest.raises(ValueError, match="weights: expected shape"):
        plots.AttentionExplorer(torch.zeros(shape))


def test_keys_may_be_other_words_than_queries():
    explorer = plots.AttentionExplorer([[0.25, 0.75, 0.0]], ["le"], ["the", "a", "<b>"])
    assert "&lt;b&gt;" in explorer._strip.value
    assert "75%" in explorer._strip.value


def test_other_weights_keep_the_query_where_it_was(weights):
    explorer = plots.AttentionExplorer(weights, WORDS)
    explorer.query.value = 3
    explorer.update(torch.eye(5), list("abcde"))
    assert explorer.query.value == 3
    explorer.update(torch.eye(2), ["x", "y"])
    assert explorer.query.value == 1
    assert explorer.row.tolist() == [0, 1]


def test_a_widget_is_stored_with_a_picture_for_hosts_without_widgets(weights):
    data, metadata = plots.AttentionExplorer(weights, WORDS)._repr_mimebundle_()
    assert data["image/png"].startswith("iVBORw0KGgo")  # base64 of the PNG signature
    assert "run this notebook" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert 100 < metadata["image/png"]["width"] < 900


def test_pictures_of_widgets_stay_small():
    n = 64
    explorer = plots.AttentionExplorer(torch.rand(n, n).softmax(-1), mask=masks.causal())
    assert len(explorer.picture()) < 150_000


# -- live attention ------------------------------------------------------------------------------


def uniform(text):
    words = text.split()
    return words, torch.full((len(words), len(words)), 1 / len(words))


def test_typing_redraws_the_picture():
    live = plots.LiveAttention(uniform, "a cat")
    before = live.picture()
    live.text.value = "a cat sat"
    assert live.error is None
    assert live.picture() != before
    assert live.explorer.row == pytest.approx([1 / 3] * 3)


def test_typing_keeps_layer_and_head():
    def look(text):
        words, weights = uniform(text)
        return words, [weights[None].expand(3, -1, -1), weights[None].expand(2, -1, -1)]

    live = plots.LiveAttention(look, "a cat")
    live.explorer.layer.value = live.explorer.head.value = 1
    live.text.value = "a cat sat"
    assert live.error is None
    assert (live.explorer.layer.value, live.explorer.head.value) == (1, 1)


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_line_gets_a_friendly_word_and_no_stale_picture(text):
    live = plots.LiveAttention(uniform, "a cat")
    live.text.value = text
    assert live.error is None
    assert "Type a few words" in live._line.value
    assert live._stage.layout.display == "none"
    assert live.picture() == b""


def test_an_exception_in_the_callback_is_shown_and_kept():
    def broken(text):
        raise KeyError("<cat>")

    live = plots.LiveAttention(broken, "a cat")
    assert "KeyError" in live._line.value
    assert "&lt;cat&gt;" in live._line.value
    assert isinstance(live.error, KeyError)
    assert live._stage.layout.display == "none"


def test_a_value_error_is_a_word_to_the_reader():
    def picky(text):
        raise ValueError("no such word\n  here")

    live = plots.LiveAttention(picky, "a cat")
    assert live.message == "no such word here"


@pytest.mark.parametrize("error", [ValueError(), RuntimeError("")])
def test_an_exception_without_a_message_still_says_something(error):
    def silent(text):
        raise error

    assert type(error).__name__ in plots.LiveAttention(silent, "a cat").message


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((["a"], torch.eye(2)), "query_labels: expected 2 labels"),
        ((["a"], torch.ones(1)), "weights: expected shape"),
        ((["a"],), "TypeError"),
        (None, "TypeError"),
    ],
)
@pytest.mark.bad_input
def test_a_callback_that_returns_nonsense_is_told_so(answer, said):
    live = plots.LiveAttention(lambda text: answer, "a cat")
    assert said in live._line.value


def test_the_picture_comes_back_after_an_error():
    def picky(text):
        if "!" in text:
            raise ValueError("no shouting")
        return uniform(text)

    live = plots.LiveAttention(picky, "a cat!")
    live.text.value = "a cat"
    assert live.message == ""
    assert live._line.value == ""
    assert live.error is None
    assert live._stage.layout.display is None
    assert live.picture()


def test_an_interrupt_is_not_swallowed():
    def interrupted(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plots.LiveAttention(interrupted, "a cat")


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_make_no_noise():
    live = plots.LiveAttention(uniform, "猫 😀")
    assert live.error is None


def test_a_callback_may_return_a_mask():
    def hide_oneself(text):
        words, weights = uniform(text)
        return words, weights, ~torch.eye(len(words), dtype=torch.bool)

    plain, masked = (
        plots.LiveAttention(uniform, "a cat"),
        plots.LiveAttention(hide_oneself, "a cat"),
    )
    assert masked.error is None
    assert masked.picture() != plain.picture()


# -- style, map, imports -------------------------------------------------------------------------


def test_every_colour_of_a_line_stands_out_from_white_paper():
    plots.use_style()
    for entry in mpl.rcParams["axes.prop_cycle"]:
        channels = mpl.colors.to_rgb(entry["color"])
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = np.dot([0.2126, 0.7152, 0.0722], linear)
        assert 1.05 / (luminance + 0.05) > 2.1  # contrast as WCAG 2 defines it


def test_the_map_names_every_chapter():
    figure = plots.course_map()
    shown = {text.get_text() for text in figure.axes[0].texts}
    assert {f"{chapter.number:02d}" for chapter in plots.CHAPTERS} <= shown


def test_chapters_are_numbered_in_order():
    assert [chapter.number for chapter in plots.CHAPTERS] == list(range(19))


def test_chapters_marked_ready_are_the_notebooks_that_exist(pytestconfig):
    existing = {path.stem for path in (pytestconfig.rootpath / "notebooks").glob("[0-9]*.ipynb")}
    assert {f"{c.number:02d}_{c.stem}" for c in plots.CHAPTERS if c.ready} == existing


def test_the_readme_picture_is_written_and_small(tmp_path):
    path = write(tmp_path / "course.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


def test_the_readme_picture_is_the_course_as_it_is(pytestconfig):
    from PIL import Image

    with Image.open(pytestconfig.rootpath / PICTURE) as picture:
        assert picture.info["Description"] == summary(), "run  python -m course_lib.plots.readme"


def test_importing_plots_needs_neither_matplotlib_nor_ipywidgets():
    code = (
        "import sys; from course_lib import plots;"
        "assert not {'matplotlib', 'ipywidgets', 'IPython'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_is_missing_is_said_in_one_line_with_the_command():
    with pytest.raises(ImportError) as caught:
        need("a_package_that_is_not_there.submodule")
    assert str(caught.value) == (
        "course_lib.plots needs a_package_that_is_not_there: run  pip install 'course-lib[learn]'"
    )
