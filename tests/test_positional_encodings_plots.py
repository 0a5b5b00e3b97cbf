"""The explorer of positions: what it shows is what the library's codes say."""

import math

import matplotlib as mpl
import numpy as np
import pytest
import torch

from course_lib import layers, plots

mpl.use("agg")


def codes(length: int, d_model: int, base: float) -> torch.Tensor:
    encoding = layers.SinusoidalPositionalEncoding(d_model, base=base)
    return encoding(torch.zeros(1, length, d_model, dtype=torch.float64))[0]


@pytest.fixture
def explorer():
    return plots.PositionExplorer(8, length=20, base=100.0)


@pytest.mark.parametrize(("position", "distance"), [(0, 0), (3, 5), (19, 20), (12, -12)])
def test_the_similarity_is_the_dot_product_of_the_librarys_codes(explorer, position, distance):
    table = codes(40, 8, 100.0)
    explorer.position.value, explorer.distance.value = position, distance
    dot = table[position] @ table[position + distance] / 4
    assert explorer.similarity == pytest.approx(dot.item())


def test_the_hands_are_the_librarys_sines_and_cosines(explorer):
    table = codes(40, 8, 100.0).unflatten(-1, (4, 2))
    explorer.position.value, explorer.distance.value = 7, 11
    for hands, code in zip(explorer.hands, (table[7], table[18]), strict=True):
        assert np.sin(hands) == pytest.approx(code[:, 0].numpy())
        assert np.cos(hands) == pytest.approx(code[:, 1].numpy())


def test_the_similarity_is_the_librarys_rotary_score_of_equal_vectors():
    explorer = plots.PositionExplorer(8, length=20)
    explorer.position.value, explorer.distance.value = 4, 9
    ones = torch.ones(1, 1, 20, 8, dtype=torch.float64)
    turned = layers.RotaryPositionalEncoding(8)(ones)[0, 0]
    assert explorer.similarity == pytest.approx((turned[4] @ turned[13]).item() / 8)


def test_the_similarity_depends_on_the_distance_only(explorer):
    explorer.distance.value = 6
    seen = []
    for position in range(20):
        explorer.position.value = position
        seen.append(explorer.similarity)
    assert max(seen) - min(seen) < 1e-12
    assert explorer.similarity < 0.99


def test_turning_a_slider_redraws_the_picture(explorer):
    first = explorer.picture()
    explorer.position.value = 5
    second = explorer.picture()
    explorer.distance.value = -4
    assert len({first, second, explorer.picture()}) == 3
    assert explorer._image.value == explorer.picture()


@pytest.mark.parametrize("d_model", [2, 6, 16])
def test_there_is_a_clock_for_each_pair(d_model):
    explorer = plots.PositionExplorer(d_model)
    assert explorer.hands.shape == (2, d_model // 2)
    assert explorer.picture().startswith(b"\x89PNG")


def test_the_explorer_is_stored_with_a_picture_for_hosts_without_widgets(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["image/png"].startswith("iVBORw0KGgo")  # base64 of the PNG signature
    assert "run this notebook" in data["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert 100 < metadata["image/png"]["width"] < 900
    assert len(explorer.picture()) < 150_000


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("d_model", {"d_model": 7}),
        ("d_model", {"d_model": 0}),
        ("length", {"length": 1}),
        ("base", {"base": 1.0}),
        ("base", {"base": math.nan}),
    ],
)
def test_an_impossible_argument_is_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        plots.PositionExplorer(**arguments)
