"""DecoderLayer, and an encoder and a decoder put together."""

import math

import pytest
import torch
from torch import nn

from course_lib import layers, masks
from course_lib.layers import DecoderLayer, EncoderDecoderStack, EncoderLayer, Stack


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make(*args, kind=DecoderLayer, seed=0, **options):
    """In float64, with every parameter random: norms too."""
    torch.manual_seed(seed)
    layer = kind(*args, **options)
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
SEEN = masks.padding([3, 5])


@pytest.mark.parametrize("norm_first", [True, False])
def test_self_attention_then_cross_attention_then_feed_forward(norm_first):
    layer = make(8, 2, norm_first=norm_first)
    x, context = randn(2, 4, 8), randn(2, 5, 8, seed=1)
    want = x
    for residual, sublayer in (
        (layer.self_attention_residual, lambda x: layer.self_attention(x, mask=masks.causal())),
        (layer.cross_attention_residual, lambda x: layer.cross_attention(x, context, mask=SEEN)),
        (layer.feed_forward_residual, layer.feed_forward),
    ):
        norm = residual.norm
        want = want + sublayer(norm(want)) if norm_first else norm(want + sublayer(want))
    assert torch.equal(layer(x, context, masks.causal(), SEEN), want)


@every_option
@pytest.mark.parametrize("chunks", [[1] * 6, [3, 1, 2]], ids=["tokens", "chunks"])
def test_decoding_with_a_cache_equals_the_full_pass(options, chunks):
    stack = Stack([make(8, 2, seed=i, d_context=6, **options) for i in range(2)])
    x, context, cache = randn(2, 6, 8), randn(2, 5, 6, seed=1), stack.new_cache()
    masked = {"mask": masks.causal(), "context_mask": SEEN}
    parts = [stack(part, context, cache=cache, **masked) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), stack(x, context, **masked))


@every_option
def test_neither_later_tokens_nor_padded_context_reach_an_output(options):
    layer = make(8, 2, **options)
    x, context = randn(2, 4, 8).requires_grad_(), randn(2, 5, 8, seed=1).requires_grad_()
    output = layer(x, context, masks.causal(), SEEN)
    to_x, to_context = torch.autograd.grad(output[:, 1].sum(), (x, context))
    assert to_x[:, :2].abs().sum(-1).all()
    assert not to_x[:, 2:].any()
    assert to_context[0, :3].abs().sum(-1).all()
    assert not to_context[0, 3:].any()


def test_broken_padding_of_the_context_reaches_no_output():
    layer, x, context = make(8, 2), randn(2, 4, 8), randn(2, 5, 8, seed=1)
    want = layer(x, context, context_mask=SEEN)
    context[0, 3:] = math.nan
    assert torch.equal(layer(x, context, context_mask=SEEN), want)


def test_weights_of_both_attentions_come_with_the_same_output():
    stack = Stack([make(8, 2, seed=i) for i in range(2)])
    x, context = randn(2, 4, 8), randn(2, 5, 8, seed=1)
    output, weights = stack(x, context, context_mask=SEEN, return_weights=True)
    torch.testing.assert_close(output, stack(x, context, context_mask=SEEN))
    assert [(own.shape, across.shape) for own, across in weights] == [
        ((2, 2, 4, 4), (2, 2, 4, 5)),
        ((2, 2, 4, 4), (2, 2, 4, 5)),
    ]
    assert not weights[0][1][0, ..., 3:].any()


def test_biases_reach_their_own_scores():
    layer, x, context = make(8, 2), randn(2, 4, 8), randn(2, 5, 8, seed=1)
    own, across = (
        torch.zeros(m.shape).masked_fill(~m, -math.inf)
        for m in (masks.causal().dense(4, 4), SEEN.dense(4, 5))
    )
    got = layer(x, context, bias=own, context_bias=across)
    torch.testing.assert_close(got, layer(x, context, masks.causal(), SEEN))


def test_the_position_scheme_serves_self_attention_only():
    layer = DecoderLayer(8, 2, position=layers.AlibiBias(2))
    assert isinstance(layer.self_attention.position, layers.AlibiBias)
    assert type(layer.cross_attention.position) is layers.Position


def test_the_encoders_output_is_the_decoders_context():
    encoder = Stack([make(8, 2, kind=EncoderLayer)], layers.LayerNorm(8).double())
    decoder = Stack([make(8, 2)], layers.LayerNorm(8).double())
    both, source, target = EncoderDecoderStack(encoder, decoder), randn(2, 5, 8), randn(2, 4, 8)
    context = encoder(source, SEEN)
    want = decoder(target, context, mask=masks.causal(), context_mask=SEEN)
    assert torch.equal(both(source, target, SEEN, masks.causal(), SEEN), want)


def test_without_bias_no_parameter_is_called_bias():
    names = [name for name, _ in DecoderLayer(8, 2, bias=False).named_parameters()]
    assert names != []
    assert not any("bias" in name for name in names)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DecoderLayer(8, 3), "d_model must be a positive multiple of num_heads"),
        (lambda: DecoderLayer(8, 2, d_context=0), "d_context must be at least 1"),
        (lambda: DecoderLayer(8, 2, norm="batch"), "norm must be one of"),
        (
            lambda: DecoderLayer(8, 2, d_context=6)(torch.zeros(1, 3, 8), torch.zeros(1, 5, 8)),
            r"context must be \(batch, length, 6\), got \(1, 5, 8\)",
        ),
        (
            lambda: DecoderLayer(8, 2)(torch.zeros(1, 3, 8), torch.zeros(2, 5, 8)),
            "x and context must have the same batch size",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
