"""Wrong parts that several exercises share: scales, normalisations, masks, mixtures, losses.

`ex.mistakes_from(SCALES, "attention", build)` makes a mistake of each; `build(part)` is a whole
answer with that part in it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Mistake

INF = math.inf


def top(scores: Tensor) -> Tensor:
    """The largest score of each row."""
    return scores.amax(-1, keepdim=True)


def empty(mask: Tensor) -> Tensor:
    """Rows without a visible key."""
    return ~mask.any(-1, keepdim=True)


def filled(scores: Tensor, mask: Tensor, fill: float = -INF) -> Tensor:
    """Softmax with hidden scores replaced; an empty row comes out as NaN or 1/n."""
    return scores.masked_fill(~mask, fill).softmax(-1)


def visible_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the visible keys, as it should be."""
    return filled(scores, mask).masked_fill(empty(mask), 0.0)


def share(weights: Tensor, at_least: float) -> Tensor:
    """Weights divided by their sum, or by `at_least` where that is more."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=at_least)


# Factors that the scores are multiplied by: (query, key) -> number.
SCALES = [
    Mistake(
        "without the 1/√d_k scale",
        "The scores spread with √d_k, and softmax of them is nearly a hard choice.",
        "What are the scores divided by?",
        lambda q, k: 1.0,
    ),
    Mistake(
        "scaled by 1/d_k, without the root",
        "Wide keys make all scores nearly equal.",
        "The variance of a sum of d_k products is d_k; what is its standard deviation?",
        lambda q, k: 1 / q.shape[-1],
    ),
    Mistake(
        "multiplied by √d_k",
        "The factor is upside down.",
        "Should wider keys make the scores larger, or keep them as they are?",
        lambda q, k: q.shape[-1] ** 0.5,
    ),
    Mistake(
        "scaled by the fourth root of d_k",
        "Only one of query and key was scaled by d_k^(1/4), or the root was taken twice.",
        "Which power of d_k stands under the fraction?",
        lambda q, k: q.shape[-1] ** -0.25,
    ),
    Mistake(
        "scaled by the number of keys",
        "√n_k stands where √d_k should.",
        "Which entry of `key.shape` is d_k?",
        lambda q, k: k.shape[-2] ** -0.5,
    ),
    Mistake(
        "scaled by the number of queries",
        "√n_q stands where √d_k should.",
        "Which entry of `query.shape` is d_k?",
        lambda q, k: q.shape[-2] ** -0.5,
    ),
    Mistake(
        "scaled by the first dimension",
        "`shape[0]` is the batch or the length, not the width.",
        "Which entry of `query.shape`, counted from the end, is d_k?",
        lambda q, k: q.shape[0] ** -0.5,
    ),
    Mistake(
        "scaled by a fixed √64",
        "The width of the paper is written into the code.",
        "Where can d_k be read off the inputs?",
        lambda q, k: 1 / 8,
    ),
]

# What is done to the scores where no mask is in play: scores -> weights.
NORMALISATIONS = [
    Mistake(
        "with softmax over the queries",
        "Columns of weights sum to 1 instead of rows.",
        "Along which dimension do the keys lie?",
        lambda s: s.softmax(-2),
    ),
    Mistake(
        "with softmax over the batch",
        "The elements of the batch compete with one another.",
        "Along which dimension do the keys lie?",
        lambda s: s.softmax(0),
    ),
    Mistake(
        "without softmax",
        "The scores themselves are used as weights.",
        "What turns scores into weights that sum to 1?",
        lambda s: s,
    ),
    Mistake(
        "with softmax applied twice",
        "The weights are taken for scores once more and come out nearly equal.",
        "How often does the formula apply softmax?",
        lambda s: s.softmax(-1).softmax(-1),
    ),
    Mistake(
        "with sigmoid instead of softmax",
        "Each score is squashed alone, so the weights of a row do not sum to 1.",
        "How do the keys compete?",
        lambda s: s.sigmoid(),
    ),
    Mistake(
        "with exp, not normalised",
        "The weights of a row do not sum to 1.",
        "What does softmax do after exp?",
        lambda s: s.exp(),
    ),
]

# What is made of the weights: (weights, query, key, value) -> output.
MIXTURES = [
    Mistake(
        "that mixes the keys",
        "The values have no effect.",
        "What is averaged with the weights?",
        lambda w, q, k, v: w @ k,
    ),
    Mistake(
        "that mixes the queries",
        "The values have no effect.",
        "What is averaged with the weights?",
        lambda w, q, k, v: w @ q,
    ),
    Mistake(
        "with the weights transposed",
        "Row i of the output is made of column i of the weights, which does not sum to 1.",
        "Which index of the weights belongs to the query?",
        lambda w, q, k, v: w.mT @ v,
    ),
    Mistake(
        "that returns the weights instead of the output",
        "The values have no effect.",
        "What is averaged with the weights?",
        lambda w, q, k, v: w,
    ),
    Mistake(
        "with the output transposed",
        "Queries and features have changed places.",
        "Is there one transpose too many?",
        lambda w, q, k, v: (w @ v).mT,
    ),
]


POLARITY = (
    "True means may attend, and here the visible keys are hidden.",
    "Which keys does `masked_fill` fill: those where its argument is True or False?",
)
LEAKS = "A score of 0 is not hidden: exp(0) = 1."
EXACTLY = "Which score makes exp exactly 0?"

# Ways to weigh under a mask: (scores, mask) -> weights.
MASKINGS = [
    Mistake(
        "without the mask",
        "The mask has no effect.",
        "Where does `mask` enter, and is the result of `masked_fill` kept?",
        lambda s, m: s.softmax(-1),
    ),
    Mistake(
        "with the mask's polarity swapped",
        *POLARITY,
        lambda s, m: visible_softmax(s, ~m.expand(s.shape)),
    ),
    Mistake(
        "with the mask's polarity swapped, NaN where nothing is left",
        *POLARITY,
        lambda s, m: s.masked_fill(m, -INF).softmax(-1),
    ),
    Mistake(
        "with the mask's polarity swapped, but for the rows in which nothing is visible",
        *POLARITY,
        lambda s, m: s.masked_fill(m, -INF).softmax(-1).masked_fill(empty(m), 0.0),
    ),
    Mistake(
        "with the mask's polarity swapped, equal shares where nothing is left",
        *POLARITY,
        lambda s, m: s.masked_fill(m, -1e9).softmax(-1),
    ),
    Mistake(
        "masked after the softmax",
        "The hidden keys have already taken their share, so the rest does not sum to 1.",
        "Should the mask act before or after the softmax?",
        lambda s, m: s.softmax(-1) * m,
    ),
    Mistake(
        "masked after the softmax and divided by what is left",
        "Where a hidden score towers above, the visible weights have underflowed to 0.",
        "What should the largest score be taken over: all keys, or the visible ones?",
        lambda s, m: share(s.softmax(-1) * m, 1e-9),
    ),
    Mistake(
        "masked after the softmax and divided by what is left, be it 0",
        "Where nothing is visible that is 0 / 0, and the same where a hidden score towers above.",
        "Which rows can sum to 0 before you divide, and what should stand there?",
        lambda s, m: share(s.softmax(-1) * m, 0.0),
    ),
    Mistake(
        "with exp and the mask, but no maximum subtracted",
        "exp of very high scores is inf, of very low ones 0.",
        "What may be subtracted from every score of a row without changing the result?",
        lambda s, m: share(s.exp() * m, 1e-30),
    ),
    Mistake(
        "with the scores multiplied by the mask", LEAKS, EXACTLY, lambda s, m: (s * m).softmax(-1)
    ),
    Mistake(
        "with the scores multiplied by the mask, empty rows 0",
        LEAKS,
        EXACTLY,
        lambda s, m: (s * m).softmax(-1).masked_fill(empty(m), 0.0),
    ),
    Mistake(
        "with the mask added to the scores",
        "True adds 1 to a visible score; the others are not hidden.",
        EXACTLY,
        lambda s, m: (s + m.to(s.dtype)).softmax(-1),
    ),
    Mistake(
        "with NaN where nothing is visible",
        "A row of nothing but -inf is 0 / 0.",
        "Which rows have no visible key, and what should stand there?",
        lambda s, m: filled(s, m),
    ),
    Mistake(
        "with equal shares where nothing is visible",
        "Softmax of a row that is the same number everywhere (-1e9, finfo.min) is 1/n everywhere.",
        "Which rows have no visible key, and what should stand there?",
        lambda s, m: filled(s, m, torch.finfo(s.dtype).min),
    ),
    Mistake(
        "with 0 wherever any key is hidden",
        "A row is emptied if one key is hidden, not only if all are.",
        "`any` or `all`: when is a row empty?",
        lambda s, m: filled(s, m).masked_fill(~m.all(-1, keepdim=True), 0.0),
    ),
    Mistake(
        "with empty rows looked for along the queries",
        "`any` finds the keys that nobody sees, not the queries that see nobody.",
        "Along which dimension do the keys of one query lie?",
        lambda s, m: filled(s, m).masked_fill(~m.any(-2, keepdim=True), 0.0),
    ),
    Mistake(
        "with empty rows found without keepdim",
        "`any` lost the dimension and is broadcast along the keys, or not at all.",
        "What shape does `mask.any(dim=-1)` have, and what shape must it have to clear rows?",
        lambda s, m: filled(s, m).masked_fill(~m.any(-1), 0.0),
    ),
    Mistake(
        "with -10 instead of -inf",
        "exp(-10) is small but not 0: the hidden keys leak.",
        EXACTLY,
        lambda s, m: filled(s, m, -10.0).masked_fill(empty(m), 0.0),
    ),
    Mistake(
        "with -100 instead of -inf",
        "A visible score can be as low as that, and then the hidden key counts.",
        "Is there a number below every other?",
        lambda s, m: filled(s, m, -100.0).masked_fill(empty(m), 0.0),
    ),
    Mistake(
        "with -10 instead of -inf, and the mask again",
        "The hidden keys have taken their share before they are cut off.",
        EXACTLY,
        lambda s, m: filled(s, m, -10.0) * m,
    ),
    Mistake(
        "with -100 instead of -inf, and the mask again",
        "A visible score can be as low as that, and then the hidden key takes its share.",
        "Is there a number below every other?",
        lambda s, m: filled(s, m, -100.0) * m,
    ),
    Mistake(
        "with a fixed number subtracted from the hidden scores",
        "A hidden score that is large enough comes back.",
        "Is the hidden score replaced, or only lowered?",
        lambda s, m: (s - 100.0 * ~m).softmax(-1).masked_fill(empty(m), 0.0),
    ),
    Mistake(
        "times -inf",
        "0 · inf is NaN: the visible scores are spoiled too.",
        "What is (1 - mask) · (-inf) where the mask is 1?",
        lambda s, m: (s + (1 - m.to(s.dtype)) * -INF).softmax(-1),
    ),
    Mistake(
        "with the mask, then softmax over the queries",
        "Columns of weights sum to 1 instead of rows.",
        "Along which dimension do the keys lie?",
        lambda s, m: s.masked_fill(~m, -INF).softmax(-2).nan_to_num(0.0),
    ),
    Mistake(
        "under a causal mask, whatever the mask",
        "Later keys are hidden and the mask you were given has no effect.",
        "Where does `mask` enter?",
        lambda s, m: filled(s, torch.ones(s.shape[-2:], dtype=torch.bool).tril()),
    ),
]


def chosen(scores: Tensor, targets: Tensor) -> Tensor:
    """The score of each target: (batch, n, V) at (batch, n) -> (batch, n)."""
    return scores.gather(-1, targets[..., None])[..., 0]


def per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, as it should be: (batch, n)."""
    return -chosen(logits.log_softmax(-1), targets)


# What a token costs: (logits (batch, n, V), targets (batch, n)) -> losses (batch, n).
CROSS_ENTROPIES = [
    Mistake(
        "without softmax",
        "The logits are taken for log-probabilities.",
        "What turns logits into log-probabilities?",
        lambda x, t: -chosen(x, t),
    ),
    Mistake(
        "with softmax applied twice",
        "`F.cross_entropy` and `log_softmax` take logits, not probabilities.",
        "How often is softmax applied from the logits to the loss?",
        lambda x, t: per_token(x.softmax(-1), t),
    ),
    Mistake(
        "with the probability instead of its logarithm",
        "The logarithm is missing; `F.nll_loss` does not take it either.",
        "What stands between the minus sign and softmax in the formula?",
        lambda x, t: -chosen(x.softmax(-1), t),
    ),
    Mistake(
        "as one minus the probability",
        "The logarithm is missing.",
        "What stands between the minus sign and softmax in the formula?",
        lambda x, t: 1 - chosen(x.softmax(-1), t),
    ),
    Mistake(
        "with softmax over the positions",
        "The positions of a row compete with one another instead of the tokens.",
        "Along which dimension of (batch, n, V) do the tokens of the vocabulary lie?",
        lambda x, t: -chosen(x.log_softmax(1), t),
    ),
    Mistake(
        "with softmax over the batch",
        "The rows compete with one another instead of the tokens.",
        "Along which dimension of (batch, n, V) do the tokens of the vocabulary lie?",
        lambda x, t: -chosen(x.log_softmax(0), t),
    ),
    Mistake(
        "with the logits reshaped to (batch, V, n) instead of transposed",
        "`view` and `reshape` read the same numbers into other rows: positions are torn up.",
        "Which call swaps two dimensions?",
        lambda x, t: F.cross_entropy(x.reshape(x.mT.shape), t, reduction="none"),
    ),
    Mistake(
        "with exp of the raw logits",
        "exp of a large logit is inf.",
        "Which function gives log Σ exp in one step, without overflow?",
        lambda x, t: x.exp().sum(-1).log() - chosen(x, t),
    ),
    Mistake(
        "with the logarithm of a softmax that has underflowed",
        "Softmax of an unlikely token is 0 in float32, and log 0 is -inf.",
        "Which function computes the logarithm of softmax in one step?",
        lambda x, t: -chosen(x.softmax(-1).log(), t),
    ),
    Mistake(
        "with a small number added before the logarithm",
        "An unlikely token costs no more than -log of that number.",
        "Which function computes the logarithm of softmax in one step?",
        lambda x, t: -chosen((x.softmax(-1) + 1e-9).log(), t),
    ),
    Mistake(
        "as squared distance from the one-hot target",
        "That is the Brier score, not the cross-entropy.",
        "Where is the logarithm?",
        lambda x, t: (x.softmax(-1) - F.one_hot(t, x.shape[-1])).square().sum(-1),
    ),
]
