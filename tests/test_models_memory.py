"""Transformer-XL and Compressive Transformer: what a memory gives, and how far it reaches."""

from contextlib import nullcontext as training_goes_on
from itertools import pairwise, product

import pytest
import torch
from torch import nn

from course_lib import layers, leaks, models, training
from course_lib.generation import generate
from course_lib.models import (
    CompressiveTransformer,
    Decoder,
    InSegments,
    Remembering,
    TransformerConfig,
    TransformerXL,
)

VOCAB = 11
RELATIVE = ("none", "rotary", "t5", "alibi", "shaw", "transformer_xl")
EXACT = {"rtol": 0, "atol": 1e-10}
SIZES = {"memory_length": 4, "compressed_length": 3, "rate": 2}


def config(**options):
    small = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "max_length": 24}
    return TransformerConfig(**small | {"position": "transformer_xl"} | options)


def weighty(model):
    """Weights large enough that everything matters."""
    generator = torch.Generator().manual_seed(1)  # one for all: layers must differ
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.double().eval()


def xl(memory_length=4, **options):
    return weighty(TransformerXL(config(**options), memory_length=memory_length))


def compressive(compression="mean", *, sizes=None, **options):
    sizes = SIZES | (sizes or {})
    model = CompressiveTransformer(config(**options), compression=compression, **sizes)
    starts = [p.detach().clone() for p in model.compressions.parameters()]
    weighty(model)
    with torch.no_grad():  # the convolutions stay means, or nearly
        for p, start in zip(model.compressions.parameters(), starts, strict=True):
            p.mul_(0.1).add_(start)
    return model


def tokens(batch=2, length=12, seed=2):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def changed(x, at):
    y = x.clone()
    y[:, at] = (y[:, at] + 1) % VOCAB
    return y


def read(model, *segments):
    """Logits of the last of these segments, read one after another, and the memory after it."""
    memory = None
    for segment in segments:
        logits, memory, *_ = model(segment, memory)
    return logits, memory


both = pytest.mark.parametrize("made", [xl, compressive])


# -- one long pass -------------------------------------------------------------------------------


@pytest.mark.parametrize("position", RELATIVE)
def test_segments_give_one_long_pass_wherever_the_text_is_cut(position):
    model, x = xl(5, position=position), tokens(length=5)
    whole, _ = model(x)
    for cuts in product([False, True], repeat=4):
        ends = [0, *(i for i, cut in enumerate(cuts, 1) if cut), 5]
        memory = None
        for start, end in pairwise(ends):
            logits, memory = model(x[:, start:end], memory)
            torch.testing.assert_close(logits, whole[:, start:end], **EXACT)


@pytest.mark.parametrize(
    "options", [{"norm_first": False}, {"norm": "rms_norm"}, {"num_kv_heads": 2}, {"bias": False}]
)
def test_it_holds_for_every_kind_of_block(options):
    model, x = xl(12, **options), tokens()
    torch.testing.assert_close(InSegments(model, 5)(x), model(x)[0], **EXACT)


def test_with_a_memory_that_is_too_short_segments_give_something_else():
    model, x = xl(3), tokens()
    assert (InSegments(model, 4)(x) - model(x)[0])[:, 4:].abs().max() > 1e-3


@pytest.mark.parametrize("position", RELATIVE)
def test_without_a_memory_it_is_a_decoder_of_each_segment_by_itself(position):
    decoder, x = weighty(Decoder(config(position=position))), tokens()
    model = xl(0, position=position)
    model.load_state_dict(decoder.state_dict())  # the same names: the memory has no weights
    want = torch.cat([decoder(segment) for segment in x.split(4, 1)], 1)
    torch.testing.assert_close(InSegments(model, 4)(x), want, **EXACT)
    torch.testing.assert_close(xl(4, position=position)(x)[0], decoder(x), **EXACT)


def test_a_longer_memory_than_in_training_can_be_taken():
    model, x = xl(2), tokens()
    model.memory_length = 12
    torch.testing.assert_close(InSegments(model, 3)(x), model(x)[0], **EXACT)


# -- what is remembered ----------------------------------------------------------------------------


def test_the_memory_is_what_each_layer_read_last():
    model, x = xl(5), tokens(length=8)
    inputs = []
    for layer in model.stack.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    _, memory = model(x)
    for kept, given in zip(memory, inputs, strict=True):
        assert torch.equal(kept, given[:, 3:])
    assert torch.equal(inputs[0], model.embedding(x))


@both
def test_the_memory_never_grows_beyond_its_length(made):
    model, memory = made(), None
    for segment in tokens(length=24).split(3, 1):
        _, memory = model(segment, memory)
        for layer in memory:
            parts = layer if isinstance(layer, tuple) else (layer,)
            assert all(
                m.shape[1] <= limit for m, limit in zip(reversed(parts), (5, 3), strict=False)
            )


@both
def test_the_gradient_stops_at_the_seam(made):
    model, embedded = made(), []
    model.embedding.register_forward_hook(lambda *args: embedded.append(args[2]))
    logits, memory = read(model, tokens(), tokens(seed=3))
    logits.sum().backward(inputs=embedded[1:], retain_graph=True)  # the segment itself does learn
    earlier, now = torch.autograd.grad(logits.sum(), embedded, allow_unused=True)
    assert earlier is None
    assert now.abs().sum() > 0
    assert not any(part.requires_grad for layer in memory for part in layer)


@both
def test_the_memory_given_is_not_changed(made):
    model = made()
    _, memory = model(tokens())
    before = [[part.clone() for part in layer] for layer in memory]
    model(tokens(seed=3), memory)
    for layer, old in zip(memory, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer, old, strict=True))


@both
def test_a_later_token_cannot_change_an_earlier_output(made):
    model = made()
    _, memory = model(tokens())
    x = tokens(1, 5, seed=3)
    own = [m[:1] if torch.is_tensor(m) else tuple(part[:1] for part in m) for m in memory]
    assert leaks.find_leaks(lambda t: model(t, own)[0], x) == []
    text = tokens()
    a, b = InSegments(model, 3)(text), InSegments(model, 3)(changed(text, 7))
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@both
def test_sequences_of_a_batch_do_not_see_one_another(made):
    model, x = InSegments(made(), 3), tokens(batch=3)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@both
def test_weights_show_the_memory_and_the_segment(made):
    model = made()
    _, memory = read(model, *tokens(length=24).split(6, 1))
    _, after, *_, weights = model(tokens(length=6), memory, return_weights=True)
    seen = 4 if made is xl else 3 + 4
    assert [tuple(w.shape) for w in weights] == [(2, 4, 6, seen + 6)] * 2
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 4, 6).double())
    assert (weights[1][..., :seen] > 0).all()
    assert len(after) == 2


# -- how far it reaches ----------------------------------------------------------------------------


def matters(model, length, total):
    """Whether a change of each token before the last segment changes that segment's logits."""
    x, before = tokens(1, total, seed=4), total - length
    rows = x.repeat(before + 1, 1)  # row t has another token at t, the last row has none
    rows[range(before), range(before)] = (x[0, :before] + 1) % VOCAB
    logits = InSegments(model, length)(rows)[:, before:]  # (before + 1, length, vocab)
    return (logits[:-1] - logits[-1]).abs().amax((1, 2)) > 1e-14


@pytest.mark.parametrize(
    ("memory_length", "length"), [(3, 1), (4, 4), (6, 3), (2, 4), (5, 2), (0, 3)]
)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_every_token_within_reach_matters_and_none_beyond(memory_length, length, num_layers):
    model = xl(memory_length, num_layers=num_layers, max_length=None)
    reach = model.reach(length)
    seen = matters(model, length, 24)
    assert seen.tolist() == [False] * (24 - length - reach) + [True] * reach
    if memory_length % length == 0:
        assert reach == num_layers * memory_length


@pytest.mark.parametrize("compression", ["mean", "conv"])
def test_a_compressive_memory_reaches_further_with_as_many_vectors(compression):
    model = compressive(compression, sizes={"memory_length": 4, "compressed_length": 2, "rate": 4})
    assert model.reach(4) == 2 * (4 + 4 * 2)
    assert matters(model, 4, 36).tolist() == [False] * 8 + [True] * 24
    assert matters(xl(4 + 2), 4, 36).sum() == xl(4 + 2).reach(4) < 24
    model.memory_length = 5  # now 3 more wait for the fourth of their group
    assert matters(model, 4, 40).sum() == model.reach(4) == 2 * (5 + 3 + 4 * 2)


def test_where_groups_are_waiting_it_reaches_less_far_at_times_and_never_further():
    model = compressive(sizes={"memory_length": 4, "compressed_length": 2, "rate": 4})
    seen = matters(model, 2, 36)
    assert 2 * (4 + 4 * 2) <= seen.sum() <= model.reach(2)
    assert seen[-seen.sum() :].all()


# -- the compressive memory ------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["mean", "max"])
@pytest.mark.parametrize("length", [1, 3, 5, 12])
def test_at_rate_one_it_is_a_transformer_xl_with_a_memory_as_long_as_both(compression, length):
    model = compressive(compression, sizes={"rate": 1})
    torch.testing.assert_close(
        InSegments(model, length)(tokens()), InSegments(xl(7), length)(tokens()), **EXACT
    )


def test_a_convolution_at_rate_one_starts_as_that_too():
    model = CompressiveTransformer(config(), **SIZES | {"rate": 1}, compression="conv").double()
    same = TransformerXL(config(), memory_length=7).double()
    same.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(
        InSegments(model, 3)(tokens()), InSegments(same, 3)(tokens()), **EXACT
    )


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_nothing_is_lost_on_the_way_into_the_compressed_memory(length):
    model = compressive(sizes={"compressed_length": 20, "rate": 3})
    x, memory = tokens(length=21), None
    for segment in x.split(length, 1):
        _, memory = model(segment, memory)
    compressed, recent = memory[0]  # the first layer reads embeddings, whatever came before
    read_before, groups = model.embedding(x), compressed.shape[1]
    assert 3 * groups + recent.shape[1] == 21
    assert 4 <= recent.shape[1] < 4 + 3
    torch.testing.assert_close(recent, read_before[:, 3 * groups :])
    torch.testing.assert_close(
        compressed, read_before[:, : 3 * groups].unflatten(1, (-1, 3)).mean(2)
    )


def test_the_oldest_compressed_memories_are_forgotten_first():
    short, long = compressive(), compressive(sizes={"compressed_length": 20})
    x = tokens(length=24)
    _, few = read(short, *x.split(4, 1))
    _, many = read(long, *x.split(4, 1))
    assert torch.equal(few[0].compressed, many[0].compressed[:, -3:])


def test_the_task_does_not_reach_the_compression_nor_the_reconstruction_the_rest():
    model = compressive("conv")
    own = {id(p) for p in model.compressions.parameters()}
    _, memory = model(tokens())
    logits, _, loss = model(tokens(seed=3), memory, return_reconstruction=True)
    for value, mine in ((logits.sum(), False), (loss, True)):
        model.zero_grad(set_to_none=True)
        value.backward(retain_graph=True)
        reached = {id(p) for p in model.parameters() if p.grad is not None}
        assert reached == own if mine else not reached & own
    assert loss > 0


def test_the_reconstruction_is_summed_over_layers_and_asks_what_the_segment_asks():
    model, inputs = compressive("conv"), []
    for layer in model.stack.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    _, memory = model(tokens(length=4))
    *_, loss = model(tokens(length=6, seed=3), memory, return_reconstruction=True)
    want = 0
    for layer, compression, before, now in zip(
        model.stack.layers, model.compressions, inputs[:2], inputs[2:], strict=True
    ):
        leaving = torch.cat([before, now], 1)[:, :6]
        want += layers.reconstruction_loss(layer, now, leaving, compression(leaving))
    torch.testing.assert_close(loss, want)


def test_the_reconstruction_is_nothing_while_nothing_is_compressed():
    model = compressive("conv")
    logits, memory, loss = model(tokens(length=4), return_reconstruction=True)
    assert loss == 0
    (logits.sum() + loss).backward()
    assert model(tokens(length=2), memory, return_reconstruction=True)[2] > 0


# -- a stream ------------------------------------------------------------------------------------


@both
def test_each_call_goes_on_where_the_last_one_ended(made):
    model, x = Remembering(made()), tokens()
    found = torch.cat([model(segment) for segment in x.split(3, 1)], 1)
    assert torch.equal(found, InSegments(model.model, 3)(x))
    assert not torch.equal(model(x[:, :3]), found[:, :3])
    model.forget()
    assert torch.equal(model(x[:, :3]), found[:, :3])


def test_an_evaluation_neither_sees_nor_disturbs_what_training_remembers():
    model, x, y = Remembering(xl()), tokens(), tokens(seed=3)
    want = InSegments(model.model, 6)(x)
    model.train()
    first = model(x[:, :6])
    batches = [(y[:, :6], y[:, :6]), (y[:, 6:], y[:, 6:])]
    losses = [training.mean_loss(model, batches) for _ in range(2)]
    assert losses[0] == losses[1]  # each evaluation begins a new text
    torch.testing.assert_close(torch.cat([first, model(x[:, 6:])], 1), want)


@both
def test_writing_token_by_token_is_one_pass_while_the_memory_suffices(made):
    model = made() if made is xl else made(sizes={"rate": 1})
    model.memory_length = 20
    written = generate(Remembering(model), tokens(length=5), 9, temperature=0)
    logits, *_ = model(written)
    assert torch.equal(logits[:, 4:-1].argmax(-1), written[:, 5:])


@both
def test_writing_on_and_on_keeps_the_memory_as_short_as_ever_and_the_streams_apart(made):
    model = Remembering(made())
    model.train()
    before = model(tokens())
    model.forget()
    model(tokens(length=6))
    assert generate(model, tokens(length=5), 40, temperature=0).shape == (2, 45)  # > max_length
    assert model.training
    model.forget()
    assert torch.equal(model(tokens()), before)


@pytest.mark.parametrize("kind", [TransformerXL, CompressiveTransformer])
def test_a_training_that_was_interrupted_ends_with_the_same_weights(kind, tmp_path):
    sizes = {"memory_length": 4} if kind is TransformerXL else SIZES
    batches = [(x, x) for x in (tokens(length=4, seed=seed) for seed in range(6))]

    def trained(path, steps_at_once):
        for last in steps_at_once:
            torch.manual_seed(0)
            model = Remembering(kind(config(), **sizes))

            def stop(history, last=last):
                if len(history.step) == last < 6:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt) if last < 6 else training_goes_on():
                training.fit(
                    model, batches, steps=6, lr=1e-2, progress=False, eval_every=1,
                    evaluate=lambda _: 0.0, watch=stop, checkpoint=path, checkpoint_every=1,
                )  # fmt: skip
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(trained(tmp_path / "a", [6]), trained(tmp_path / "b", [4, 6]))


def test_the_convolution_is_trained_along_by_fit():
    torch.manual_seed(0)
    model = Remembering(
        CompressiveTransformer(config(), compression="conv", **SIZES), return_reconstruction=True
    )
    before = model.model.compressions[0].mix.weight.detach().clone()
    x = tokens(length=8)
    training.fit(
        model, [(x, x)] * 6, steps=6, lr=1e-2, progress=False,
        loss=lambda out, targets: training.next_token_loss(out[0], targets) + out[1],
    )  # fmt: skip
    assert not torch.equal(model.model.compressions[0].mix.weight, before)
    assert generate(model, x, 3).shape == (2, 11)


def test_the_loss_of_a_text_in_segments_is_the_mean_of_theirs():
    model, x = compressive("conv"), tokens()
    logits, loss = InSegments(model, 6, return_reconstruction=True)(x)
    _, memory, first = model(x[:, :6], return_reconstruction=True)
    *_, second = model(x[:, 6:], memory, return_reconstruction=True)
    torch.testing.assert_close(loss, (first + second) / 2)
    assert torch.equal(logits, InSegments(model, 6)(x))


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
def test_positions_that_begin_anew_in_each_segment_are_refused(position):
    with pytest.raises(ValueError, match=f'"{position}" counts from the beginning of each segment'):
        TransformerXL(config(position=position), memory_length=4)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda memory: memory[:1], "memory is of 1 layers, but the model has 2"),
        (
            lambda memory: [m[:1] for m in memory],
            r"batch=2, length, d_model=16\).*got \(1, 4, 16\)",
        ),
        (lambda memory: [m[..., :8] for m in memory], r"got \(2, 4, 8\)"),
        (lambda memory: [m[0] for m in memory], r"got \(4, 16\); a new text begins"),
    ],
)
def test_a_memory_that_does_not_fit_is_named(change, message):
    model = xl()
    _, memory = model(tokens())
    with pytest.raises(ValueError, match=message):
        model(tokens(), change(memory))
    model = compressive(sizes={"memory_length": 4, "compressed_length": 4, "rate": 2})
    _, memory = read(model, tokens(), tokens())
    pairs = zip(
        change([m.compressed for m in memory]), change([m.recent for m in memory]), strict=True
    )
    with pytest.raises(ValueError, match=message):
        model(tokens(), [models.CompressiveMemory(*pair) for pair in pairs])


@pytest.mark.bad_input
def test_a_memory_of_another_model_is_refused():
    (_, tensors), (_, pairs) = xl()(tokens()), compressive()(tokens())
    with pytest.raises(ValueError, match="hold a Tensor for each layer, got CompressiveMemory"):
        xl()(tokens(), pairs)
    with pytest.raises(ValueError, match="hold a tuple for each layer, got Tensor"):
        compressive()(tokens(), tensors)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_length": -1}, "memory_length must be a whole number, at least 0, got -1"),
        ({"compressed_length": 2.5}, r"compressed_length must be a whole number.*got 2\.5"),
        ({"rate": 0}, "rate must be a whole number, at least 1, got 0"),
        ({"compression": "sum"}, "compression must be one of mean, max, conv"),
    ],
)
def test_an_impossible_size_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        CompressiveTransformer(config(), **SIZES | change)


def test_a_segment_longer_than_max_length_is_refused_and_a_text_is_not():
    with pytest.raises(ValueError, match="longer than max_length=24"):
        xl()(tokens(length=25))
    assert InSegments(xl(), 20)(tokens(length=60)).shape == (2, 60, VOCAB)
    with pytest.raises(ValueError, match="length must be a whole number, at least 1, got 0"):
        InSegments(xl(), 0)


def test_attention_that_leaves_out_keys_is_refused():
    with pytest.raises(ValueError, match='attention must be "full" to look at a memory'):
        TransformerXL(config(attention="longformer"), memory_length=4)
