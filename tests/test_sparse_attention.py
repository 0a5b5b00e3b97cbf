"""Longformer and BigBird layers: full attention where they leave nothing out, cheaper elsewhere."""

import pytest
import torch
from attention_cases import randn

from course_lib import layers, leaks, masks, models

N = 40


def longformer(**options):
    torch.manual_seed(0)
    return layers.LongformerAttention(16, 4, **options)


def same_weights(layer):
    """Multi-head attention with the weights of a variant of it."""
    full = layers.MultiHeadAttention(16, 4)
    full.load_state_dict(layer.state_dict(), strict=False)
    return full


def test_a_window_as_long_as_the_sequence_is_full_attention():
    layer, x = longformer(window=N), randn(2, N, 16)
    torch.testing.assert_close(layer(x), same_weights(layer)(x))


def test_bigbird_that_keeps_every_block_is_full_attention():
    torch.manual_seed(0)
    layer = layers.BigBirdAttention(16, 4, block_size=8, random_blocks=5)
    x = randn(2, N, 16)
    torch.testing.assert_close(layer(x), same_weights(layer)(x))


@pytest.mark.parametrize("mask", [None, masks.causal(), masks.padding([N, 7])], ids=repr)
def test_a_layer_is_multi_head_attention_with_its_rule_and_the_mask(mask):
    x = randn(2, N, 16)
    torch.manual_seed(0)
    for layer in (
        layers.LongformerAttention(16, 4, window=3, global_tokens=[0, 9], global_projections=False),
        layers.BigBirdAttention(16, 4, block_size=8, random_blocks=1),
    ):
        rule = layer.rule if mask is None else layer.rule & mask
        want, weights = same_weights(layer)(x, mask=rule, return_weights=True)
        torch.testing.assert_close(layer(x, mask=mask), want)
        got = layer(x, mask=mask, return_weights=True)[1]
        torch.testing.assert_close(got, weights)


def test_global_tokens_ask_with_projections_of_their_own():
    layer, x = longformer(window=2, global_tokens=[0, 5]), randn(2, N, 16)
    output = layer(x)
    local = same_weights(layer)(x, mask=layer.rule)
    others = [i for i in range(N) if i not in (0, 5)]
    torch.testing.assert_close(output[:, others], local[:, others])
    wide = layers.MultiHeadAttention(16, 4)  # full attention with the global projections
    for name in "qkv":
        getattr(wide, f"{name}_proj").load_state_dict(getattr(layer, f"{name}_global").state_dict())
    wide.out_proj.load_state_dict(layer.out_proj.state_dict())
    torch.testing.assert_close(output[:, [0, 5]], wide(x)[:, [0, 5]])


def test_weights_of_global_tokens_are_those_of_their_own_projections():
    layer, x = longformer(window=2, global_tokens=[5]), randn(1, N, 16)
    output, weights = layer(x, return_weights=True)
    torch.testing.assert_close(output, layer(x))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, N))
    assert (weights[0, :, 5] > 0).all()
    assert (weights[0, :, 20] > 0).sum(-1).tolist() == [6] * 4  # window and one global token


def test_padding_hides_from_global_tokens_too():
    layer, x = longformer(window=2, global_tokens=[0]), randn(2, N, 16)
    x[1, 7:] = float("nan")
    output = layer(x, mask=masks.padding([N, 7]))
    assert output[1, :7].isfinite().all()


@pytest.mark.parametrize("position", ["none", "rotary"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("longformer", {"window": 3}),
        ("longformer", {"window": 2, "global_tokens": [0, 4]}),
        ("longformer", {"window": 2, "global_tokens": [1], "global_projections": False}),
        ("bigbird", {"block_size": 4, "random_blocks": 1}),
    ],
    ids=str,
)
def test_no_causal_variant_looks_ahead(kind, options, position):
    config = models.TransformerConfig(
        vocab_size=11, d_model=8, num_layers=2, num_heads=2, position=position, attention=kind,
        attention_options=options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.Decoder(config)
    tokens = torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(1))
    assert leaks.find_leaks(model, tokens) == []


def test_a_longformer_decoder_writes_the_same_with_and_without_its_cache():
    from course_lib.generation import generate

    config = models.TransformerConfig(
        vocab_size=11, d_model=8, num_layers=2, num_heads=2, position="rotary",
        attention="longformer", attention_options={"window": 3},
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.Decoder(config)
    prompt = torch.tensor([[1, 2, 3]])
    texts = [generate(model, prompt, 20, temperature=0, use_cache=c) for c in (True, False)]
    assert torch.equal(*texts)


def test_rotary_heads_of_global_tokens_stand_at_their_own_places():
    position = layers.RotaryPositionalEncoding(4)
    layer, x = longformer(window=N, global_tokens=[9], position=position), randn(1, N, 16)
    for name in "qkv":  # the same projections for both: full attention everywhere
        getattr(layer, f"{name}_global").load_state_dict(
            getattr(layer, f"{name}_proj").state_dict()
        )
    full = layers.MultiHeadAttention(16, 4, position=position)
    full.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), full(x))


def test_a_window_of_zero_sees_only_itself():
    layer, x = longformer(window=0), randn(1, 5, 16)
    torch.testing.assert_close(layer(x), layer.out_proj(layer.v_proj(x)))


def test_blocks_need_not_divide_the_length():
    torch.manual_seed(0)
    layer = layers.BigBirdAttention(16, 4, block_size=16, random_blocks=1)
    for n in (1, 15, 17, 33):
        assert layer(randn(1, n, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: longformer(window=-1), "window must be at least 0, got -1"),
        (lambda: longformer(window=1, global_tokens=[N])(randn(1, N, 16)), "global_tokens"),
        (lambda: longformer(window=1, global_tokens=[0])(randn(1, 5, 16), randn(1, 5, 16)),
         "context cannot serve global tokens"),
        (lambda: longformer(window=1, global_tokens=[0], position=layers.AlibiBias(4)),
         "AlibiBias adds to the scores"),
        (lambda: layers.BigBirdAttention(16, 4).new_cache(), "BigBird cannot serve a cache"),
        (lambda: layers.BigBirdAttention(16, 4, window_blocks=2), "window_blocks must be odd"),
        (lambda: layers.BigBirdAttention(16, 4, block_size=0), "block_size"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_option_that_a_kind_of_attention_does_not_know_is_refused():
    with pytest.raises(TypeError, match=r"attention option of longformer 'windw'.*window"):
        models.TransformerConfig(
            vocab_size=5, attention="longformer", attention_options={"windw": 3}
        )
    with pytest.raises(TypeError, match="attention option of full 'window'"):
        models.TransformerConfig(vocab_size=5, attention_options={"window": 3})
    with pytest.raises(ValueError, match="attention must be one of full, longformer"):
        models.TransformerConfig(vocab_size=5, attention="lonformer")


def test_a_configuration_with_a_kind_of_attention_survives_json():
    config = models.TransformerConfig(
        vocab_size=5, attention="longformer",
        attention_options={"window": 3, "global_tokens": [0, 2]},
    )  # fmt: skip
    again = models.TransformerConfig.from_json(config.to_json())
    assert again == config
    layer = models.Encoder(again).stack.layers[0].attention
    assert layer.window == 3
    assert layer.global_tokens == [0, 2]
