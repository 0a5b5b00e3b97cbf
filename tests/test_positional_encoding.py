"""Sinusoidal and learned positions."""

import math

import pytest
import torch

from course_lib.layers import LearnedPositionalEncoding, SinusoidalPositionalEncoding

LAYERS = {
    "sinusoidal": lambda: SinusoidalPositionalEncoding(8),
    "learned": lambda: LearnedPositionalEncoding(64, 8),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def test_sinusoids_follow_the_formula_of_the_paper():
    p = SinusoidalPositionalEncoding(6)(torch.zeros(1, 20, 6, dtype=torch.float64))[0]
    for pos in (0, 1, 19):
        for i in range(3):
            angle = pos / 10_000 ** (2 * i / 6)
            assert p[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert p[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_sinusoids_have_no_parameters_and_no_largest_position():
    layer = SinusoidalPositionalEncoding(8)
    assert list(layer.parameters()) == []
    assert layer(torch.zeros(1, 2, 8), offset=1_000_000).isfinite().all()


def test_bfloat16_keeps_neighbouring_positions_apart():
    layer, x = SinusoidalPositionalEncoding(8), torch.zeros(1, 600, 8)
    p = layer(x.bfloat16())
    assert p.dtype == torch.bfloat16
    torch.testing.assert_close(p.float(), layer(x), atol=4e-3, rtol=0)


@each_layer
def test_the_position_is_added_to_every_sequence_of_the_batch(make):
    layer, x = make(), torch.randn(3, 5, 8)
    p = layer(torch.zeros(1, 5, 8))
    torch.testing.assert_close(layer(x), x + p)


@each_layer
def test_an_offset_continues_a_sequence_where_it_stopped(make):
    layer, x = make(), torch.randn(2, 10, 8)
    whole = layer(x)
    torch.testing.assert_close(torch.cat((layer(x[:, :4]), layer(x[:, 4:], offset=4)), 1), whole)


@each_layer
def test_the_input_is_not_changed_in_place(make):
    x = torch.randn(2, 5, 8)
    before = x.clone()
    make()(x)
    assert torch.equal(x, before)


@each_layer
def test_every_position_has_its_own_code(make):
    p = make()(torch.zeros(1, 64, 8))[0]
    assert torch.cdist(p, p).fill_diagonal_(1).min() > 1e-3


@each_layer
def test_a_width_that_does_not_fit_is_refused(make):
    with pytest.raises(ValueError, match=r"x must be \(batch, length, 8\), got shape \(1, 5, 6\)"):
        make()(torch.zeros(1, 5, 6))


@each_layer
def test_a_negative_offset_is_refused(make):
    with pytest.raises(ValueError, match="offset must not be negative, got -1"):
        make()(torch.zeros(1, 5, 8), offset=-1)


def test_learned_positions_are_trained():
    layer = LearnedPositionalEncoding(10, 4)
    layer(torch.zeros(2, 3, 4), offset=1).sum().backward()
    want = torch.zeros(10, 4)
    want[1:4] = 2.0  # two sequences
    assert torch.equal(layer.weight.grad, want)


def test_learned_positions_end_at_the_largest_length():
    layer = LearnedPositionalEncoding(10, 4)
    assert layer(torch.zeros(1, 10, 4)).shape == (1, 10, 4)
    with pytest.raises(ValueError, match="needs 11 positions, but max_length=10"):
        layer(torch.zeros(1, 8, 4), offset=3)


@pytest.mark.parametrize("d_model", [7, 1, 0, -2])
def test_sinusoids_refuse_a_width_that_is_not_even(d_model):
    with pytest.raises(ValueError, match=f"d_model must be even and at least 2, got {d_model}"):
        SinusoidalPositionalEncoding(d_model)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="base must be above 1, got 1"):
        SinusoidalPositionalEncoding(8, base=1.0)
    with pytest.raises(ValueError, match="at least 1, got 0 and 8"):
        LearnedPositionalEncoding(0, 8)
