"""The three architectures: one configuration, shared layers, and who may look at whom."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import masks
from course_lib.interop import from_torch
from course_lib.models import Decoder, Encoder, EncoderDecoder, TransformerConfig

VOCAB = 11
SCHEMES = ("none", "sinusoidal", "learned", "rotary", "t5", "alibi", "shaw", "transformer_xl")
each_scheme = pytest.mark.parametrize("position", SCHEMES)


def config(**options):
    small = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "max_length": 24}
    return TransformerConfig(**small | options)


def made(kind, **options):
    """A model with weights large enough that everything matters."""
    torch.manual_seed(0)
    model = kind(config(**options))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


def tokens(batch=2, length=7, seed=2):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def changed(x, at):
    y = x.clone()
    y[:, at] = (y[:, at] + 1) % VOCAB
    return y


# -- shapes and who sees whom ----------------------------------------------------------------------


@each_scheme
def test_every_scheme_builds_all_three(position):
    x = tokens()
    assert made(Encoder, position=position)(x).shape == (2, 7, 16)
    assert made(Decoder, position=position)(x).shape == (2, 7, VOCAB)
    both = made(EncoderDecoder, position=position, source_vocab_size=20)
    assert both(torch.full((2, 4), 19), x).shape == (2, 7, VOCAB)


@each_scheme
def test_a_decoder_never_sees_the_future_and_an_encoder_does(position):
    x, y = tokens(), changed(tokens(), 4)
    decoder, encoder = made(Decoder, position=position), made(Encoder, position=position)
    assert torch.equal(decoder(x)[:, :4], decoder(y)[:, :4])
    assert not torch.allclose(decoder(x)[:, 4:], decoder(y)[:, 4:])
    assert not torch.allclose(encoder(x)[:, :4], encoder(y)[:, :4])


@each_scheme
def test_an_encoder_decoder_reads_the_whole_source_but_not_the_targets_future(position):
    model, source, x = made(EncoderDecoder, position=position), tokens(seed=3), tokens()
    assert torch.equal(model(source, x)[:, :4], model(source, changed(x, 4))[:, :4])
    assert not torch.allclose(model(source, x)[:, 0], model(changed(source, 6), x)[:, 0])


@pytest.mark.parametrize("kind", [Encoder, Decoder])
@each_scheme
def test_padding_changes_nothing(kind, position):
    model, x = made(kind, position=position), tokens(length=9)
    together = model(x, [9, 6])
    torch.testing.assert_close(together[1:, :6], model(x[1:, :6]))
    assert torch.equal(together[1, :6], model(changed(x, 7), [9, 6])[1, :6])


@each_scheme
def test_padded_sources_and_targets_give_what_they_give_alone(position):
    model, source, x = made(EncoderDecoder, position=position), tokens(length=6, seed=3), tokens()
    together = model(source, x, [6, 4], [7, 5])
    torch.testing.assert_close(together[1:, :5], model(source[1:, :4], x[1:, :5]))


def test_a_row_of_nothing_but_padding_gives_no_nan():
    for kind in (Encoder, Decoder):
        assert made(kind)(tokens(), [7, 0]).isfinite().all()
    assert made(EncoderDecoder)(tokens(), tokens(), [0, 7], [0, 7]).isfinite().all()


@each_scheme
def test_a_cache_changes_nothing(position):
    model, x = made(Decoder, position=position, num_kv_heads=2), tokens()
    cache = model.new_cache()
    steps = [model(x[:, :3], cache=cache)] + [model(x[:, i : i + 1], cache=cache) for i in (3, 4)]
    torch.testing.assert_close(torch.cat(steps, 1), model(x[:, :5]))


def test_the_cache_of_grouped_queries_is_as_much_smaller_as_there_are_fewer_heads():
    sizes = []
    for num_kv_heads in (4, 2, 1):
        model = made(Decoder, num_kv_heads=num_kv_heads)
        cache = model.new_cache()
        model(tokens(), cache=cache)
        sizes.append(sum(c.key.numel() + c.value.numel() for c in cache))
    assert sizes == [sizes[0], sizes[0] // 2, sizes[0] // 4]


def test_an_extra_mask_is_added_to_the_causal_one():
    model, x = made(Decoder, position="rotary"), tokens(length=9)
    window = model(x, mask=masks.sliding_window(1, 0))
    assert torch.equal(window[:, 8], model(changed(x, 0), mask=masks.sliding_window(1, 0))[:, 8])
    assert not torch.allclose(model(x)[:, 8], model(changed(x, 0))[:, 8])


def test_weights_come_out_of_every_layer():
    _, weights = made(Decoder)(tokens(), return_weights=True)
    assert [tuple(w.shape) for w in weights] == [(2, 4, 7, 7)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 7))
    _, pairs = made(EncoderDecoder)(tokens(length=5), tokens(), return_weights=True)
    assert [tuple(w.shape) for w in pairs[1]] == [(2, 4, 7, 7), (2, 4, 7, 5)]


# -- what it is equal to ---------------------------------------------------------------------------


def test_an_encoder_is_pytorchs_encoder_between_embedding_and_states():
    model = made(Encoder, position="learned", activation="relu", norm_first=False, bias=True)
    theirs = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 64, 0.0, "relu", batch_first=True), 2
    )
    ours = from_torch(theirs).eval()
    model.stack.layers = ours.layers
    x = model.embedding(tokens())
    torch.testing.assert_close(model(tokens()), theirs.eval()(x), atol=1e-5, rtol=1e-5)


def test_tied_embeddings_are_one_matrix_and_get_both_gradients():
    model = made(Decoder)
    assert model.head.weight is model.embedding.tokens.weight
    count = sum(p.numel() for p in model.parameters())
    untied = sum(p.numel() for p in made(Decoder, tie_embeddings=False).parameters())
    assert untied == count + VOCAB * 16


def test_a_new_model_is_as_unsure_as_chance():
    torch.manual_seed(0)
    for position in ("learned", "sinusoidal", "rotary"):
        model = Decoder(config(position=position, d_model=64, num_heads=4))
        loss = F.cross_entropy(model(tokens(8, 20)).flatten(0, 1), tokens(8, 20, 5).flatten())
        assert abs(loss.item() - torch.tensor(float(VOCAB)).log().item()) < 0.5


def test_with_zero_residuals_every_block_starts_as_the_identity():
    model = Decoder(config(zero_residuals=True))
    x = torch.randn(2, 5, 16)
    for block in model.stack.layers:
        assert torch.equal(block(x), x)


def test_the_number_of_parameters_is_that_of_the_recipe():
    """nanoGPT's character model on a CPU: 4 layers of width 128, no biases, tied embeddings."""
    model = Decoder(TransformerConfig(vocab_size=65, max_length=64, bias=False))
    block = 4 * 128**2 + 2 * 4 * 128**2 + 2 * 128
    assert sum(p.numel() for p in model.parameters()) == 4 * block + 65 * 128 + 64 * 128 + 128


# -- configuration -------------------------------------------------------------------------------


def test_a_configuration_survives_json():
    one = config(position="rotary", num_kv_heads=2, dropout=0.1, norm="rms_norm")
    assert TransformerConfig.from_json(one.to_json()) == one
    assert json.loads(one.to_json())["position"] == "rotary"


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        config().d_model = 32
    assert replace(config(), d_model=32).d_model == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 10}, "d_model=10 and num_heads=4"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"norm": "batch"}, "norm must be one of layer_norm, rms_norm; got 'batch'"),
        ({"activation": "tanh"}, "activation must be one of relu"),
        ({"position": "absolute"}, "position must be one of none"),
        ({"attention": "sparse"}, "attention must be one of full"),
        ({"dropout": 1.0}, "dropout"),
        ({"max_length": None}, "needs a max_length"),
        ({"position": "rotary", "d_model": 12}, "even d_head, got 3"),
        ({"position": "sinusoidal", "d_model": 9, "num_heads": 3}, "even d_model"),
    ],
)
def test_an_impossible_or_contradictory_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_an_unknown_option_is_refused_by_name_and_a_near_one_proposed():
    with pytest.raises(TypeError, match="unknown option 'num_head'; did you mean num_heads"):
        TransformerConfig.from_dict({"vocab_size": 5, "num_head": 2})
    with pytest.raises(TypeError, match="vocab_size is missing"):
        TransformerConfig.from_dict({})


@pytest.mark.bad_input
def test_a_size_that_is_no_whole_number_is_refused():
    with pytest.raises(TypeError, match=r"num_layers must be an int, got 2\.5"):
        TransformerConfig.from_dict({"vocab_size": 5, "num_layers": 2.5})


# -- bad tokens ----------------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.full((1, 3), VOCAB), ValueError, f"value {VOCAB}; with vocab_size={VOCAB}"),
        (torch.full((1, 3), -1), ValueError, "value -1"),
        (torch.zeros(1, 25, dtype=torch.long), ValueError, "length 25, longer than max_length=24"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, "not empty"),
        (torch.zeros(3, dtype=torch.long), ValueError, "must be"),
        (torch.zeros(1, 3), TypeError, "int32 or int64, got torch.float32"),
    ],
)
def test_tokens_that_do_not_fit_are_named(bad, error, message):
    with pytest.raises(error, match=message):
        made(Decoder)(bad)
    with pytest.raises(error, match="source"):
        made(EncoderDecoder)(bad, tokens(1))
    with pytest.raises(error, match="target"):
        made(EncoderDecoder)(tokens(1), bad)


def test_a_cache_counts_towards_max_length():
    model = made(Decoder)
    cache = model.new_cache()
    model(tokens(length=24), cache=cache)
    with pytest.raises(ValueError, match="max_length"):
        model(tokens(length=1), cache=cache)


# --- kinds of attention -------------------------------------------------------------------------

KINDS = {
    "longformer": {"window": 3},
    "bigbird": {"block_size": 4, "random_blocks": 1},
    "linformer": {"k": 3},
    "performer": {"num_features": 5},
    "linear": {"feature_map": "relu"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [False, True])
def test_every_kind_of_attention_is_a_word_in_the_configuration(kind, options):
    config = TransformerConfig(
        vocab_size=11, d_model=16, num_layers=2, num_heads=2, max_length=12, position="learned",
        attention=kind, attention_options=KINDS[kind] if options else {},
    )  # fmt: skip
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    states = Encoder(config)(tokens, padding=[9, 4])
    assert states.shape == (2, 9, 16)
    assert states.isfinite().all()
    if kind == "linformer":
        with pytest.raises(ValueError, match="the future would be in it"):
            Decoder(config)(tokens)
    else:
        assert Decoder(config)(tokens, padding=[9, 4]).shape == (2, 9, 11)
        model = EncoderDecoder(config)
        assert model(tokens, tokens[:, :5], source_padding=[9, 4]).shape == (2, 5, 11)
