"""Writing with a model: the same with and without a cache; who may be drawn; the best beam."""

import itertools
import math

import pytest
import torch

from course_lib.generation import beam_search, generate, sample, shares
from course_lib.models import Decoder, EncoderDecoder, LSTMLanguageModel, TransformerConfig

VOCAB = 11
SCHEMES = ("none", "sinusoidal", "learned", "rotary", "t5", "alibi", "shaw", "transformer_xl")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**options):
    small = {"vocab_size": VOCAB, "d_model": 16, "num_layers": 2, "max_length": 32}
    return TransformerConfig(**small | options)


def decoder(**options):
    torch.manual_seed(0)
    model = Decoder(config(**options))
    for parameter in model.parameters():  # far from the start, so that tokens differ
        torch.nn.init.normal_(parameter, std=0.3, generator=seeded(1))
    return model


def prompt(batch=2, length=5):
    return torch.randint(VOCAB, (batch, length), generator=seeded(2))


@pytest.mark.parametrize("position", SCHEMES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_cache_changes_no_token(position, temperature):
    model = decoder(position=position, num_kv_heads=2)
    options = {"temperature": temperature, "max_new_tokens": 12}
    with_cache = generate(model, prompt(), generator=seeded(), **options)
    without = generate(model, prompt(), generator=seeded(), use_cache=False, **options)
    assert torch.equal(with_cache, without)


def test_the_prompt_stands_first_and_as_many_tokens_follow_as_asked():
    tokens = generate(decoder(), prompt(), 7, generator=seeded())
    assert tokens.shape == (2, 12)
    assert torch.equal(tokens[:, :5], prompt())
    assert torch.equal(generate(decoder(), prompt(), 0), prompt())


def test_a_prompt_without_batch_gives_tokens_without_batch():
    one = generate(decoder(), prompt()[0], 4, temperature=0)
    assert torch.equal(one, generate(decoder(), prompt()[:1], 4, temperature=0)[0])


def test_greedy_takes_the_most_likely_token_each_time():
    model = decoder()
    tokens = generate(model, prompt(), 6, temperature=0)
    best = model.eval()(tokens[:, :-1]).argmax(-1)
    assert torch.equal(best[:, 4:], tokens[:, 5:])


def test_chance_comes_from_the_generator_alone():
    model = decoder()
    first = generate(model, prompt(), 8, generator=seeded(3))
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, prompt(), 8, generator=seeded(3)))
    assert not torch.equal(first, generate(model, prompt(), 8, generator=seeded(4)))


def test_a_recurrent_model_writes_too():
    torch.manual_seed(0)
    tokens = generate(LSTMLanguageModel(VOCAB, 6), prompt(), 3, generator=seeded())
    assert tokens.shape == (2, 8)


def test_the_mode_of_the_model_is_put_back_and_dropout_is_off():
    model = decoder(dropout=0.5).train()
    first = generate(model, prompt(), 5, temperature=0)
    assert model.training
    assert torch.equal(first, generate(model, prompt(), 5, temperature=0))


# -- who is drawn --------------------------------------------------------------------------------


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def test_top_k_leaves_the_k_most_likely_in_their_proportion():
    kept = shares(LOGITS, top_k=2)
    torch.testing.assert_close(kept, torch.tensor([[math.e, 1.0, 0, 0]]) / (math.e + 1))
    assert torch.equal(shares(LOGITS, top_k=9), shares(LOGITS))


def test_top_p_leaves_the_fewest_tokens_that_reach_p():
    full = shares(LOGITS)[0]  # 0.64, 0.24, 0.09, 0.03
    for p, count in ((0.1, 1), (0.64, 1), (0.65, 2), (0.9, 3), (1.0, 4)):
        kept = shares(LOGITS, top_p=p)[0]
        assert int((kept > 0).sum()) == count
        torch.testing.assert_close(kept[:count], full[:count] / full[:count].sum())


def test_top_p_counts_after_top_k():
    assert int((shares(LOGITS, top_k=2, top_p=0.7) > 0).sum()) == 1


def test_a_low_temperature_sharpens_and_a_high_one_flattens():
    assert shares(LOGITS, temperature=0.1)[0, 0] > 0.999
    assert shares(LOGITS, temperature=100.0)[0].std() < 0.01


def test_tokens_are_drawn_as_often_as_their_share_says():
    drawn = sample(LOGITS.expand(20_000, -1), top_k=3, generator=seeded())
    often = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(often, shares(LOGITS, top_k=3)[0], atol=0.015, rtol=0)
    assert often[3] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 29}, "max_length=32"),
    ],
)
def test_an_impossible_argument_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate(decoder(), prompt(), **{"max_new_tokens": 3} | options)


@pytest.mark.bad_input
@pytest.mark.parametrize("bad", [torch.zeros(2, 0, dtype=torch.long), torch.tensor(3), [1, 2]])
def test_an_empty_prompt_is_refused(bad):
    with pytest.raises(ValueError, match="prompt must be"):
        generate(decoder(), bad, 3)


def test_the_last_token_may_fill_max_length():
    assert generate(decoder(), prompt(), 28, generator=seeded()).shape == (2, 33)


# -- beams ---------------------------------------------------------------------------------------

START, STOP = 0, 1


def translator():
    torch.manual_seed(0)
    model = EncoderDecoder(config(vocab_size=5, source_vocab_size=VOCAB))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=seeded(5))
    return model.eval()


def best_by_trying_all(model, source, length):
    """(score, tokens) of the best target of at most `length` tokens, stop included."""
    best = []
    for size in range(1, length + 1):
        for body in itertools.product([t for t in range(5) if t != STOP], repeat=size - 1):
            target = torch.tensor([[START, *body, STOP]])
            scores = model(source, target[:, :-1]).log_softmax(-1)
            best.append((scores[0, range(size), target[0, 1:]].sum().item(), list(body)))
    return max(best)


def test_many_beams_find_what_trying_everything_finds():
    model, source = translator(), prompt(1)
    score, tokens = best_by_trying_all(model, source, 3)
    options = {"start": START, "stop": STOP, "max_new_tokens": 3, "num_beams": 64}
    found = beam_search(model, source, **options)[0]
    stopped = [h for h in found if len(h.tokens) < 3]
    assert stopped[0].tokens == tokens
    assert stopped[0].score == pytest.approx(score, abs=1e-4)


def test_one_beam_is_greedy_decoding():
    model, source = translator(), prompt(3)
    options = {"start": START, "stop": STOP, "max_new_tokens": 8}
    found = beam_search(model, source, num_beams=1, **options)
    for row, beams in zip(source, found, strict=True):
        tokens = [START]
        while len(tokens) < 9 and tokens[-1] != STOP:
            tokens.append(int(model(row[None], torch.tensor([tokens]))[0, -1].argmax()))
        assert beams[0].tokens == [t for t in tokens[1:] if t != STOP]


def test_a_beam_is_the_same_alone_and_in_a_padded_batch():
    model, source = translator(), prompt(3)
    lengths = [5, 3, 4]
    options = {"start": START, "stop": STOP, "max_new_tokens": 6, "num_beams": 3}
    together = beam_search(model, source, source_padding=lengths, **options)
    for row, length, beams in zip(source, lengths, together, strict=True):
        alone = beam_search(model, row[None, :length], **options)[0]
        assert [h.tokens for h in alone] == [h.tokens for h in beams]
        assert [h.score for h in alone] == pytest.approx([h.score for h in beams], abs=1e-4)


def test_more_beams_never_score_worse():
    model, source = translator(), prompt(4)
    options = {"start": START, "stop": STOP, "max_new_tokens": 6}
    one, many = (beam_search(model, source, num_beams=b, **options) for b in (1, 32))
    assert all(m[0].score >= o[0].score - 1e-5 for o, m in zip(one, many, strict=True))


def test_a_length_penalty_favours_longer_targets():
    model, source = translator(), prompt(4)
    options = {"start": START, "stop": STOP, "max_new_tokens": 8, "num_beams": 16}
    short, long = (
        sum(len(b[0].tokens) for b in beam_search(model, source, length_penalty=a, **options))
        for a in (0.0, 3.0)
    )
    assert long > short


def test_impossible_numbers_of_beams_are_refused():
    with pytest.raises(ValueError, match="num_beams must be at least 1, got 0"):
        beam_search(translator(), prompt(), start=0, stop=1, max_new_tokens=3, num_beams=0)
