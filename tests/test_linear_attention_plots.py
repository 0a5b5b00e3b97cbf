"""The explorer of random features: it shows what softmax and the Performer's features give."""

import matplotlib as mpl
import numpy as np
import pytest
import torch

from course_lib import attention, layers, plots

mpl.use("agg")


@pytest.fixture
def explorer():
    return plots.FeatureExplorer(8, tokens=6)


def inputs(size, d_head=8, tokens=6):
    """The explorer's queries and keys, as heads (1, 1, tokens, d_head)."""
    drawn = torch.randn(2, tokens, d_head, generator=torch.Generator().manual_seed(0))
    return (size * drawn)[:, None, None].unbind(0)


@pytest.mark.parametrize("size", [0.25, 1.0, 3.0])
def test_the_true_weights_are_those_of_softmax_attention(explorer, size):
    explorer.size.value = size
    q, k = inputs(size)
    _, weights = attention(q, k, k, return_weights=True)
    assert explorer.true == pytest.approx(weights[0, 0].numpy(), abs=1e-5)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_estimate_is_the_performers(explorer, orthogonal):
    explorer.orthogonal.value, explorer.features.value = orthogonal, 16
    layer = layers.PerformerAttention(8, 1, num_features=16, orthogonal=orthogonal, bias=False)
    q, k = inputs(1.0)
    phi_q, phi_k = layer.query_features(q), layer.key_features(k)
    weights = phi_q @ phi_k.mT
    weights = weights / weights.sum(-1, keepdim=True)
    assert explorer.estimate == pytest.approx(weights[0, 0].numpy(), abs=1e-4)


def test_both_weights_are_shares(explorer):
    for size in (0.25, 3.0):
        for count in (1, 1024):
            explorer.size.value, explorer.features.value = size, count
            for weights in (explorer.true, explorer.estimate):
                assert weights.shape == (6, 6)
                assert (weights >= 0).all()
                assert weights.sum(1) == pytest.approx(np.ones(6), abs=1e-5)


def test_one_feature_cannot_tell_queries_apart(explorer):
    explorer.features.value = 1
    assert np.ptp(explorer.estimate, axis=0).max() < 1e-9


def test_more_features_misplace_less_and_larger_inputs_more(explorer):
    explorer.features.value = 4
    few = explorer.misplaced
    explorer.features.value = 1024
    many = explorer.misplaced
    explorer.size.value = 3.0
    assert 0 < many < few / 2
    assert explorer.misplaced > 1.5 * many


def test_misplaced_weight_lies_between_0_and_1(explorer):
    for size in (0.25, 1.5, 3.0):
        explorer.size.value = size
        assert 0 <= explorer.misplaced <= 1


def test_every_control_redraws_the_picture(explorer):
    seen = {explorer.picture()}
    controls = {"features": 128, "size": 2.0, "draw": 3, "orthogonal": False}
    for name, value in controls.items():
        getattr(explorer, name).value = value
        seen.add(explorer.picture())
    assert len(seen) == 5
    assert explorer._image.value == explorer.picture()


def test_the_explorer_is_stored_with_a_picture_for_hosts_without_widgets(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["image/png"].startswith("iVBORw0KGgo")  # base64 of the PNG signature
    assert "run this notebook" in data["text/plain"]
    assert 100 < metadata["image/png"]["width"] < 900
    assert len(explorer.picture()) < 150_000


@pytest.mark.parametrize(
    ("name", "arguments"), [("d_head", {"d_head": 0}), ("tokens", {"tokens": 0})]
)
def test_an_impossible_argument_is_refused_by_name(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        plots.FeatureExplorer(**arguments)
