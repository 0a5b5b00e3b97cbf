"""The LSTM encoder-decoder with additive attention."""

import math

import pytest
import torch

from course_lib.generation import beam_search
from course_lib.models import LSTMEncoderDecoder
from course_lib.models.recurrent_encoder_decoder import AdditiveAttention

VOCAB = 9


def model(**options):
    torch.manual_seed(0)
    return LSTMEncoderDecoder(VOCAB, 8, **options).eval()


def tokens(batch=2, length=6, seed=0, vocab=VOCAB):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_logits_have_one_row_per_target_token_and_weights_one_per_source_token():
    logits, weights = model(source_vocab_size=20)(
        tokens(vocab=20), tokens(length=4), return_weights=True
    )
    assert logits.shape == (2, 4, VOCAB)
    assert weights.shape == (2, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4))


def test_additive_attention_is_the_formula_of_the_paper():
    torch.manual_seed(0)
    layer = AdditiveAttention(3, 4, 5)
    query, context = torch.randn(2, 3), torch.randn(2, 6, 4)
    seen, weights = layer(query, context, layer.key(context), None)
    w, u, v = layer.query.weight, layer.key.weight, layer.score.weight[0]
    for b in range(2):
        scores = torch.stack([v @ torch.tanh(w @ query[b] + u @ k) for k in context[b]])
        torch.testing.assert_close(weights[b], scores.softmax(0))
        torch.testing.assert_close(seen[b], scores.softmax(0) @ context[b])


def test_a_later_target_token_cannot_change_an_earlier_output_but_any_source_token_can():
    one, source, target = model(), tokens(), tokens(seed=1)
    other, last = target.clone(), source.clone()
    other[:, 3] = (other[:, 3] + 1) % VOCAB
    last[:, 5] = (last[:, 5] + 1) % VOCAB
    assert torch.equal(one(source, target)[:, :3], one(source, other)[:, :3])
    assert not torch.allclose(one(source, target)[:, 0], one(last, target)[:, 0])


def test_padded_sources_give_what_they_give_alone():
    one, source, target = model(), tokens(), tokens(seed=1)
    together = one(source, target, [6, 4])
    torch.testing.assert_close(together[1:], one(source[1:, :4], target[1:]))
    assert one(source, target, [0, 6]).isfinite().all()


def test_step_by_step_with_a_cache_is_one_pass():
    one, source, target = model(), tokens(), tokens(seed=1)
    states, cache = one.encode(source, [6, 4]), one.new_cache()
    steps = [one.decode(target[:, i : i + 1], states, [6, 4], cache=cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), one(source, target, [6, 4]))
    assert len(cache[0]) == 6


def test_beam_search_serves_it_too():
    options = {"start": 0, "stop": 1, "max_new_tokens": 5, "source_padding": [6, 4]}
    found = beam_search(model(), tokens(), num_beams=3, **options)
    assert [len(beams) for beams in found] == [3, 3]
    assert all(-math.inf < h.score <= 0 for beams in found for h in beams)


def test_an_impossible_size_is_named():
    with pytest.raises(ValueError, match="d_model must be even and at least 2, got 7"):
        LSTMEncoderDecoder(5, 7)
    with pytest.raises(ValueError, match="source_vocab_size must be at least 1, got 0"):
        LSTMEncoderDecoder(5, 8, source_vocab_size=0)


@pytest.mark.bad_input
def test_tokens_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="source has the value"):
        model()(tokens() + VOCAB, tokens())
    with pytest.raises(TypeError, match="target must be int32 or int64"):
        model()(tokens(), tokens().float())
