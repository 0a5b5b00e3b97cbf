"""The count model: probabilities that sum to 1, and the formula of the paper."""

import math

import pytest
import torch

from course_lib import data
from course_lib.models import KneserNey

TEXT = "the cat sat on the mat and the cat ate the rat that sat on the mat. " * 3 + "that was that."
TOKENIZER = data.CharTokenizer(TEXT)
IDS = TOKENIZER.encode(TEXT)
V = TOKENIZER.vocab_size


def p(model, context, target):
    """p(target | context), both text."""
    ids = TOKENIZER.encode(context)[None]
    targets = torch.cat([ids[:, 1:], TOKENIZER.encode(target)[None]], 1)
    return model.probabilities(ids, targets)[0, -1].item()


@pytest.mark.parametrize("context", [0, 1, 2, 5])
@pytest.mark.parametrize("past", ["t", "th", "the c", "zzz".replace("z", "."), "cat sat"])
def test_the_probabilities_of_all_tokens_sum_to_1(context, past):
    model = KneserNey(IDS, V, context)
    assert sum(p(model, past, symbol) for symbol in TOKENIZER.symbols) == pytest.approx(1)


def test_a_bigram_model_is_the_formula_written_out():
    model, pairs = KneserNey(IDS, V, 1), [TEXT[i : i + 2] for i in range(len(TEXT) - 1)]
    count = {pair: pairs.count(pair) for pair in set(pairs)}
    n = [0] + [sum(c == k for c in count.values()) for k in (1, 2, 3, 4)]
    y = n[1] / (n[1] + 2 * n[2])
    d = [0.0] + [min(max(k - (k + 1) * y * n[k + 1] / max(1, n[k]), 0.0), k) for k in (1, 2, 3)]
    after_t = {pair: c for pair, c in count.items() if pair[0] == "t"}
    total = sum(after_t.values())
    freed = sum(d[min(c, 3)] for c in after_t.values())
    shorter = p(KneserNey(IDS, V, 1), "t", "h")
    lower = model.orders[0]
    base, place = 1 / V, int((lower.grams == TOKENIZER.encode("h")[0]).nonzero())
    unigram = (lower.counts[place] - lower.discount[place] + lower.freed[0] * base) / lower.total[0]
    want = (count["th"] - d[min(count["th"], 3)] + freed * unigram) / total
    assert shorter == pytest.approx(float(want))
    # below the longest context, a token counts once for each different token before it
    assert int(lower.counts[place]) == len({pair[0] for pair in count if pair[1] == "h"})


def test_longer_contexts_predict_the_text_better():
    batches = data.consecutive_batches(IDS, length=32, batch_size=4)
    losses = [KneserNey(IDS, V, context).loss(batches) for context in (0, 1, 2, 4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < math.log(V)


def test_a_token_never_seen_after_its_context_is_unlikely_but_possible():
    model = KneserNey(IDS, V)
    assert 0 < p(model, "the ca", "w") < 0.05 < p(model, "the ca", "t")


def test_a_text_that_is_too_short_or_numbers_too_large_are_refused():
    with pytest.raises(ValueError, match="ids has 3 tokens, needs more than context=5"):
        KneserNey(IDS[:3], V)
    with pytest.raises(ValueError, match="too large numbers"):
        KneserNey(IDS, 10_000, 5)
