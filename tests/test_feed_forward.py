"""The feed-forward network."""

import copy
import io
import math

import pytest
import torch

from course_lib.layers import FeedForward

SCALARS = {
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "gelu_tanh": lambda z: z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2,
    "swiglu": lambda z: z / (1 + math.exp(-z)),
    "geglu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
}
every_activation = pytest.mark.parametrize("activation", SCALARS)


def linear(layer, row):
    """W row + b, one product at a time."""
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [
        sum(w * r for w, r in zip(weights, row, strict=True)) + b
        for weights, b in zip(layer.weight.tolist(), bias, strict=True)
    ]


@every_activation
@pytest.mark.parametrize("bias", [True, False])
def test_every_activation_equals_its_equation(activation, bias):
    network = FeedForward(3, 5, activation=activation, bias=bias).double()
    x = 2 * torch.randn(2, 4, 3, dtype=torch.float64)
    want, f = [], SCALARS[activation]
    for row in x.reshape(-1, 3).tolist():
        hidden = linear(network.up, row)
        if network.gate is None:
            hidden = [f(z) for z in hidden]
        else:
            hidden = [f(g) * z for g, z in zip(linear(network.gate, row), hidden, strict=True)]
        want.append(linear(network.down, hidden))
    want = torch.tensor(want, dtype=x.dtype).reshape(x.shape)
    torch.testing.assert_close(network(x), want, atol=1e-12, rtol=1e-12)


@every_activation
def test_every_token_is_computed_by_itself(activation):
    network, x = FeedForward(4, activation=activation), torch.randn(2, 5, 4)
    alone = torch.stack([network(x[:, t]) for t in range(5)], dim=1)
    torch.testing.assert_close(network(x), alone)


def test_only_gated_networks_have_a_third_matrix():
    count = {
        a: sum(p.numel() for p in FeedForward(4, 6, activation=a).parameters()) for a in SCALARS
    }
    two, three = 2 * 4 * 6 + 6 + 4, 3 * 4 * 6 + 2 * 6 + 4
    assert count == {"relu": two, "gelu": two, "gelu_tanh": two, "swiglu": three, "geglu": three}


def test_it_is_four_times_as_wide_inside_unless_told():
    assert FeedForward(6).up.out_features == 24


def test_dropout_acts_in_training_mode_only():
    network, x = FeedForward(4, dropout=0.5), torch.ones(1, 3, 4)
    assert not torch.equal(network(x), network(x))
    torch.manual_seed(3)
    first = network(x)
    torch.manual_seed(3)
    assert torch.equal(network(x), first)
    network.eval()
    assert torch.equal(network(x), network(x))
    plain = FeedForward(4)
    plain.load_state_dict(network.state_dict())
    assert torch.equal(network(x), plain(x))


@every_activation
def test_a_copied_saved_or_restored_network_computes_the_same(activation):
    network, x = FeedForward(4, activation=activation), torch.randn(1, 2, 4)
    twin = FeedForward(4, activation=activation)
    twin.load_state_dict(network.state_dict())
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (twin, copy.deepcopy(network), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), network(x))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeedForward(0), "d_model and d_ff must be at least 1, got 0 and 0"),
        (lambda: FeedForward(4, 0), "d_model and d_ff must be at least 1, got 4 and 0"),
        (lambda: FeedForward(4, activation="tanh"), "activation must be one of relu, .*'tanh'"),
        (
            lambda: FeedForward(4)(torch.zeros(2, 3)),
            r"x must have shape \(\.\.\., 4\), got \(2, 3\)",
        ),
        (lambda: FeedForward(4, dropout=1.5), "dropout"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
