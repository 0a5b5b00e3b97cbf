"""Layers under torch.compile, without a graph break, and torch.func.vmap."""

import functools

import pytest
import torch

from course_lib import layers, masks


@pytest.fixture
def compiled(compiled):
    """Traced and run as it is: what the compiler makes of it is PyTorch's to test."""
    return functools.partial(compiled, backend="eager")


SCHEMES = {
    "none": lambda layers: None,
    "sinusoidal": lambda layers: layers.SinusoidalPositionalEncoding(8),
    "learned": lambda layers: layers.LearnedPositionalEncoding(9, 8),
    "rotary": lambda layers: layers.RotaryPositionalEncoding(4),
    "t5": lambda layers: layers.RelativePositionBias(2),
    "alibi": lambda layers: layers.AlibiBias(2),
    "shaw": lambda layers: layers.ShawRelativePosition(4),
    "transformer_xl": lambda layers: layers.TransformerXLPosition(8, 2),
}


@pytest.mark.parametrize("make", SCHEMES.values(), ids=SCHEMES.keys())
def test_an_encoder_layer_compiles_with_every_scheme(make, plain, compiled):
    layer = plain.layers.EncoderLayer(
        8, 2, norm="rms_norm", activation="swiglu", position=make(plain.layers)
    )
    x, mask = torch.randn(2, 6, 8), plain.masks.causal() & plain.masks.padding([4, 6])
    torch.testing.assert_close(compiled(layer)(x, mask=mask), layer(x, mask=mask))


def test_a_decoder_layer_compiles(plain, compiled):
    layer, x = plain.layers.DecoderLayer(8, 2), torch.randn(2, 6, 8)
    options = {"mask": plain.masks.causal(), "context_mask": plain.masks.padding([2, 3])}
    want = layer(x, x[:, :3], **options)
    torch.testing.assert_close(compiled(layer)(x, x[:, :3], **options), want)


def test_a_step_with_a_cache_compiles(plain, compiled):
    mha, x = plain.layers.MultiHeadAttention(8, 2), torch.randn(1, 3, 8)
    fast, cache = compiled(mha), plain.layers.KVCache()
    parts = [fast(token, cache=cache) for token in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), mha(x, mask=plain.masks.causal()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.no_shape_checks
def test_vmap_over_copies_of_a_layer_equals_a_loop():
    models = [layers.EncoderLayer(8, 2, num_kv_heads=1, norm_first=False) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(3, 2, 5, 8)

    def call(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x, masks.causal()))

    want = torch.stack([m(row, masks.causal()) for m, row in zip(models, x, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(parameters, buffers, x), want)
