"""EncoderLayer, the residual around its parts, and stacks of it."""

import copy

import pytest
import torch
from torch import nn

from course_lib import layers, masks
from course_lib.layers import EncoderLayer, Residual, Stack


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(*args, seed=0, **options) -> EncoderLayer:
    """In float64, with every parameter random: norms too."""
    torch.manual_seed(seed)
    layer = EncoderLayer(*args, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.double()


OPTIONS = {
    "plain": {},
    "post_norm": {"norm_first": False},
    "rms_swiglu": {"norm": "rms_norm", "activation": "swiglu", "bias": False},
    "grouped_rotary": {"num_kv_heads": 1, "position": layers.RotaryPositionalEncoding(4)},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def test_pre_norm_adds_to_the_untouched_input():
    layer, x, mask = make(8, 2), randn(2, 5, 8), masks.causal()
    middle = x + layer.attention(layer.attention_residual.norm(x), mask=mask)
    want = middle + layer.feed_forward(layer.feed_forward_residual.norm(middle))
    assert torch.equal(layer(x, mask), want)


def test_post_norm_normalises_the_sum():
    layer, x, mask = make(8, 2, norm_first=False), randn(2, 5, 8), masks.causal()
    middle = layer.attention_residual.norm(x + layer.attention(x, mask=mask))
    want = layer.feed_forward_residual.norm(middle + layer.feed_forward(middle))
    assert torch.equal(layer(x, mask), want)


@every_option
def test_blocks_stack_because_the_shape_stays(options):
    stack = Stack([make(8, 2, seed=i, **options) for i in range(3)], layers.LayerNorm(8).double())
    x, mask = randn(2, 5, 8), masks.padding([3, 5])
    want = x
    for layer in stack.layers:
        want = layer(want, mask)
    got = stack(x, mask)
    assert torch.equal(got, stack.norm(want))
    assert got.shape == x.shape


@every_option
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 2, 1]], ids=["tokens", "chunks"])
def test_decoding_with_a_cache_equals_the_full_pass(options, chunks):
    stack, x = Stack([make(8, 2, seed=i, **options) for i in range(2)]), randn(2, 7, 8)
    cache = stack.new_cache()
    parts = [stack(part, masks.causal(), cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), stack(x, masks.causal()))


@every_option
def test_a_later_token_cannot_change_an_earlier_output(options):
    stack, x = Stack([make(8, 2, seed=i, **options) for i in range(2)]), randn(1, 6, 8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(stack(x, masks.causal())[:, 2].sum(), x)
    assert gradient[:, :3].abs().sum(-1).all()
    assert not gradient[:, 3:].any()


def test_weights_of_every_layer_come_with_the_same_output():
    stack, x = Stack([make(8, 2, seed=i) for i in range(3)]), randn(2, 5, 8)
    output, weights = stack(x, masks.causal(), return_weights=True)
    torch.testing.assert_close(output, stack(x, masks.causal()))
    assert [w.shape for w in weights] == [(2, 2, 5, 5)] * 3
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 2, 5).double())


def test_a_bias_reaches_the_scores():
    layer, x = make(8, 2), randn(1, 4, 8)
    hide = torch.zeros(4, 4).masked_fill(~masks.causal().dense(4, 4)[0, 0], -torch.inf)
    torch.testing.assert_close(layer(x, bias=hide), layer(x, masks.causal()))


def test_dropout_acts_in_training_mode_only_and_repeats_with_the_seed():
    layer, x = make(8, 2, dropout=0.3), randn(1, 5, 8)
    torch.manual_seed(2)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(layer(x), first)
    torch.testing.assert_close(layer.eval()(x), make(8, 2)(x))


def test_dropout_reaches_weights_hidden_layer_and_both_residuals():
    layer = make(8, 2, dropout=0.3)
    assert layer.attention.dropout == 0.3
    assert [m.p for m in layer.modules() if isinstance(m, nn.Dropout)] == [0.3, 0.3, 0.3]


def test_without_bias_no_parameter_is_called_bias():
    names = [name for name, _ in EncoderLayer(8, 2, bias=False).named_parameters()]
    assert names != []
    assert not any("bias" in name for name in names)


def test_options_reach_the_parts():
    layer = EncoderLayer(8, 2, 5, norm="rms_norm", norm_eps=0.25, activation="relu")
    assert layer.feed_forward.up.out_features == 5
    assert layer.feed_forward.activation == "relu"
    for residual in (layer.attention_residual, layer.feed_forward_residual):
        assert isinstance(residual.norm, layers.RMSNorm)
        assert residual.norm.eps == 0.25
        assert residual.norm_first


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_sublayer_that_adds_nothing_leaves_the_input(norm_first):
    residual, x = Residual(nn.Identity(), norm_first=norm_first), randn(1, 3, 4)
    assert torch.equal(residual(x, torch.zeros_like), x)


def test_a_copy_and_a_restored_state_compute_the_same():
    stack, x = Stack([make(8, 2, seed=i) for i in range(2)]), randn(1, 4, 8)
    twin = Stack([make(8, 2, seed=i + 5) for i in range(2)])
    twin.load_state_dict(stack.state_dict())
    for other in (twin, copy.deepcopy(stack)):
        assert torch.equal(other(x), stack(x))


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_autocast_stays_near_float32(norm):
    layer, x = make(8, 2, norm=norm).float(), randn(2, 5, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
    torch.testing.assert_close(got.float(), layer(x), atol=0.1, rtol=0.05)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: EncoderLayer(8, 3),
            ValueError,
            "d_model must be a positive multiple of num_heads",
        ),
        (
            lambda: EncoderLayer(8, 2, norm="batch"),
            ValueError,
            "norm must be one of layer_norm, rm",
        ),
        (lambda: EncoderLayer(8, 2, activation="tanh"), ValueError, "activation must be one of"),
        (lambda: EncoderLayer(8, 2, norm_eps=-1), ValueError, "eps must not be negative"),
        (lambda: EncoderLayer(8, 2)(torch.zeros(3, 8)), ValueError, r"got \(3, 8\)"),
        (lambda: EncoderLayer(8, 2)(torch.zeros(1, 3, 6)), ValueError, r"got \(1, 3, 6\)"),
        (lambda: Stack([]), ValueError, "layers must hold at least one layer"),
        (lambda: Stack([EncoderLayer(8, 2), nn.Identity()]), TypeError, "EncoderLayer, Identity"),
        (
            lambda: Stack([EncoderLayer(8, 2)])(torch.zeros(1, 3, 8), cache=[]),
            ValueError,
            "cache has 0 entries for 1 layers",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
