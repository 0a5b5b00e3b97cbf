"""The explorer of depth: it shows what `measure` gave for the setting on its controls."""

import matplotlib as mpl
import numpy as np
import pytest

from course_lib import plots

mpl.use("agg")


def powers(depth, residual, norm):
    """Numbers that say which setting they belong to."""
    factor = (1.0 if residual else 0.1) * {"pre": 1.0, "post": 0.5, "none": 2.0}[norm]
    return {"size": [factor**i for i in range(depth + 1)], "gradient": [1.0] * (depth + 1)}


@pytest.fixture
def explorer():
    return plots.DepthExplorer(powers, depths=(2, 5, 40))


@pytest.mark.parametrize("depth", [2, 5, 40])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_the_numbers_are_those_of_the_setting_on_show(explorer, depth, residual, norm):
    explorer.depth.value, explorer.residual.value, explorer.norm.value = depth, residual, norm
    wanted = powers(depth, residual, norm)
    assert list(explorer.numbers) == list(wanted)
    assert explorer.numbers["size"] == pytest.approx(wanted["size"])


def test_it_begins_with_the_deepest_stack_residuals_and_the_first_norm(explorer):
    assert (explorer.depth.value, explorer.residual.value, explorer.norm.value) == (40, True, "pre")


def test_each_control_measures_once_and_redraws():
    calls = []

    def measure(*setting):
        calls.append(setting)
        return powers(*setting)

    explorer = plots.DepthExplorer(measure, depths=(2, 3))
    pictures = {explorer.picture()}
    explorer.depth.value = 2
    pictures.add(explorer.picture())
    explorer.residual.value = False
    pictures.add(explorer.picture())
    explorer.norm.value = "none"
    pictures.add(explorer.picture())
    assert calls == [(3, True, "pre"), (2, True, "pre"), (2, False, "pre"), (2, False, "none")]
    assert len(pictures) == 4
    assert explorer._image.value == explorer.picture()


def test_the_setting_before_stays_in_the_picture():
    there, back = plots.DepthExplorer(powers, (2, 5)), plots.DepthExplorer(powers, (2, 5))
    there.depth.value = 2
    back.residual.value = False
    back.depth.value = 2
    back.residual.value = True
    assert there.numbers["size"] == pytest.approx(back.numbers["size"])
    assert there.picture() != back.picture()  # the same stack, after another one


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e300, np.inf, np.nan, -1.0])
def test_numbers_that_no_logarithmic_axis_can_hold_are_drawn_without_a_warning(value, recwarn):
    explorer = plots.DepthExplorer(lambda depth, *_: {"size": [1.0] + [value] * depth}, (3,))
    assert explorer.picture().startswith(b"\x89PNG")
    assert [str(w.message) for w in recwarn if "matplotlib" in str(w.filename)] == []


def test_one_panel_or_several_can_be_drawn():
    one = plots.DepthExplorer(lambda depth, *_: {"size": [1.0] * (depth + 1)}, (3,))
    assert one.picture().startswith(b"\x89PNG")


def test_the_explorer_is_stored_with_a_picture_for_hosts_without_widgets(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["image/png"].startswith("iVBORw0KGgo")  # base64 of the PNG signature
    assert "run this notebook" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert 100 < metadata["image/png"]["width"] < 900
    assert len(explorer.picture()) < 150_000


@pytest.mark.parametrize("given", [[1.0], [1.0] * 9, [[1.0] * 4]])
def test_another_count_of_numbers_than_blocks_is_refused(given):
    with pytest.raises(ValueError, match=r"'size' must hold 4 numbers for 3 blocks"):
        plots.DepthExplorer(lambda *_: {"size": given}, (3,))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("depths", {"depths": ()}),
        ("depths", {"depths": (0, 2)}),
        ("depths", {"depths": (4, 2)}),
        ("depths", {"depths": (2, 2)}),
        ("norms", {"norms": ()}),
        ("limits", {"limits": (0.0, 1.0)}),
        ("limits", {"limits": (1.0, 0.1)}),
        ("limits", {"limits": (1.0, float("inf"))}),
    ],
)
def test_an_impossible_argument_is_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        plots.DepthExplorer(powers, **arguments)
