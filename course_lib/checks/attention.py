"""Exercises of chapter 02: from softmax to batched attention with a mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function
from ..grading.observe import Broken, expect
from ._inputs import normal, some
from ._wrong_parts import (
    MASKINGS,
    MIXTURES,
    NORMALISATIONS,
    SCALES,
    empty,
    filled,
    share,
    top,
    visible_softmax,
)

INF = math.inf


# --- 1. softmax -------------------------------------------------------------------------------

ex = Exercise(
    "softmax",
    chapter="02_attention",
    title="Softmax",
    minutes=10,
    difficulty=1,
    importance=4,
    prompt=r"""
Scores can be any numbers; weights must be positive and sum to 1. Softmax makes one from the other:

$$\mathrm{softmax}(s)_j = \frac{e^{s_j}}{\sum_k e^{s_k}}$$

It works along the **last** dimension, whatever stands before it. Mind large scores: $e^{1000}$ is
`inf` in float32, and `inf / inf` is NaN, though the softmax of $(1000, 999)$ is a perfectly good
$(0.73, 0.27)$. Write it without `torch.softmax` to learn something.
""",
    hints=(
        "What happens to softmax when you add the same number to all scores of a row?",
        "softmax(s) = softmax(s - c) for every c. With c the largest score of the row, no exponent "
        "is above 0 and nothing overflows.",
        "weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True)); what is left to divide "
        "by?",
    ),
)


@ex.solution
def softmax(scores: Tensor) -> Tensor:
    """Softmax along the last dimension. scores: (..., n) -> weights: (..., n)."""
    ### BEGIN SOLUTION
    # Shifting a row by its maximum changes nothing but keeps exp from overflowing.
    exp = torch.exp(scores - scores.amax(dim=-1, keepdim=True))  # (..., n)
    return exp / exp.sum(dim=-1, keepdim=True)  # (..., n) / (..., 1)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    ordinary = [(2, 3), (5,), (3, 4), (3, 3), (4, 1), (2, 3, 4), (2, 2, 3, 4)]
    extreme = [
        torch.tensor([[0.0], [-300.0], [60.0]]) + normal(g, 3, 4),  # each row is far from the next
        torch.tensor([-60.0, 60.0, 60.0]) + normal(g, 3),
        torch.tensor([0.0, 0.0, 0.0, 300.0]) + normal(g, 4),
        torch.tensor([[1000.0, 999.0], [-1000.0, -1000.0]]) + normal(g, 2, 2),
        torch.tensor([0.0, 0.0, -INF]) + normal(g, 2, 3),
    ]
    return [{"scores": s} for s in [*(2 * normal(g, *shape) for shape in ordinary), *extreme]]


@ex.behaviour("each row of weights sums to 1")
def _(answer):
    weights = answer(torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]))
    expect(weights.sum(-1), torch.ones(2))


@ex.behaviour("all weights are positive")
def _(answer):
    weights = answer(torch.tensor([[-3.0, -1.0, 2.0]]))
    expect(weights > 0, torch.ones(1, 3, dtype=torch.bool))


@ex.behaviour("a higher score gets a higher weight")
def _(answer):
    weights = answer(torch.tensor([[0.5, -1.0, 3.0, 2.0]]))
    expect(weights.argsort(), torch.tensor([[1, 0, 3, 2]]))


@ex.behaviour("adding 1 to a score multiplies its weight, against the others, by e")
def _(answer):
    weights = answer(torch.tensor([[1.0, 2.0, 4.0]]))
    expect(weights[:, 1:] / weights[:, :-1], torch.tensor([[math.e, math.e**2]]))


@ex.behaviour("scores of 1000 give no NaN")
def _(answer):
    case = {"scores": torch.tensor([[1000.0, 999.0]])}
    expect(answer.on(case), torch.tensor([[0.7310586, 0.2689414]]), case=case)


@ex.behaviour("a score of -inf gets the weight 0")
def _(answer):
    case = {"scores": torch.tensor([[0.0, 0.0, -INF]])}
    expect(answer.on(case), torch.tensor([[0.5, 0.5, 0.0]]), case=case)


def _shifted(s: Tensor, shift: Tensor) -> Tensor:
    return (s - shift).exp() / (s - shift).exp().sum(-1, keepdim=True)


ex.mistake(
    "softmax without subtracting the maximum",
    "exp of a large score is inf, and inf / inf is NaN.",
    "What may you subtract from every score of a row without changing the result?",
)(lambda s: s.exp() / s.exp().sum(-1, keepdim=True))
ex.mistake(
    "softmax along the first dimension instead of the last",
    "Columns sum to 1 instead of rows.",
    "In `(..., n)`, which dimension holds the scores that compete with one another?",
)(lambda s: s.softmax(0))
ex.mistake(
    "softmax along dimension 1, counted from the front",
    "It is right for a matrix and wrong once a batch dimension stands before it.",
    "How do you name the last dimension, however many there are?",
)(lambda s: s.softmax(1 if s.ndim > 1 else 0))
ex.mistake(
    "softmax along the last dimension but one",
    "Columns sum to 1 instead of rows.",
    "In `(..., n)`, which dimension holds the scores that compete with one another?",
)(lambda s: s.softmax(-2 if s.ndim > 1 else 0))
ex.mistake(
    "softmax over all entries at once",
    "The whole tensor sums to 1 instead of each row.",
    "Over which dimension should the sum run, and does it keep that dimension?",
)(lambda s: s.flatten().softmax(0).view_as(s))
ex.mistake(
    "the scores divided by their sum, without exp",
    "Negative scores become negative weights.",
    "Which function makes any number positive and keeps the order?",
)(lambda s: s / s.sum(-1, keepdim=True))
ex.mistake(
    "exp of the scores, not normalised",
    "The weights are positive but do not sum to 1.",
    "By what must each row be divided so that it sums to 1?",
)(lambda s: s.exp())
ex.mistake(
    "exp of the shifted scores, not normalised",
    "The largest weight of each row is 1; the row does not sum to 1.",
    "By what must each row be divided so that it sums to 1?",
)(lambda s: (s - top(s)).exp())
ex.mistake(
    "exp divided by the sum of everything",
    "The whole tensor sums to 1 instead of each row.",
    "Over which dimension should the sum run, and does it keep that dimension?",
)(lambda s: (s - top(s)).exp() / (s - top(s)).exp().sum())
ex.mistake(
    "exp divided by the sum of its column",
    "The sum runs over the first dimension, so rows do not sum to 1.",
    "Over which dimension should the sum run?",
)(lambda s: (s - top(s)).exp() / (s - top(s)).exp().sum(0, keepdim=True))
ex.mistake(
    "exp divided by one plus its sum",
    "The rows sum to less than 1.",
    "By what must each row be divided so that it sums to exactly 1?",
)(lambda s: (s - top(s)).exp() / (1 + (s - top(s)).exp().sum(-1, keepdim=True)))
ex.mistake(
    "exp divided by its mean",
    "The rows sum to n instead of 1.",
    "Sum, or mean?",
)(lambda s: (s - top(s)).exp() / (s - top(s)).exp().mean(-1, keepdim=True))
ex.mistake(
    "the logarithm of softmax",
    "Weights are probabilities, and a logarithm is never positive here.",
    "Should `log_softmax` be `softmax`, or is an exp missing at the end?",
)(lambda s: s.log_softmax(-1))
ex.mistake(
    "softmax applied twice",
    "The weights are taken for scores once more and come out nearly equal.",
    "How often does the formula take exp?",
)(lambda s: s.softmax(-1).softmax(-1))
ex.mistake(
    "sigmoid of each score",
    "Sigmoid squashes each score alone: the scores do not compete.",
    "Where does the weight of one key depend on the scores of the others?",
)(lambda s: s.sigmoid())
ex.mistake(
    "softmax with one maximum for the whole tensor",
    "A row far below another row's maximum underflows to 0 / 0.",
    "Does each row subtract its own maximum (`dim=-1, keepdim=True`)?",
)(lambda s: _shifted(s, s.max()))
ex.mistake(
    "softmax with the maximum of each column",
    "The maximum runs over the first dimension, so a row can still overflow.",
    "Does each row subtract its own maximum (`dim=-1, keepdim=True`)?",
)(lambda s: _shifted(s, s.amax(0, keepdim=True)))
ex.mistake(
    "softmax with the mean subtracted instead of the maximum",
    "One score far above the mean still overflows, and a score of -inf spoils its row.",
    "Which number of the row leaves no exponent above 0?",
)(lambda s: _shifted(s, s.mean(-1, keepdim=True)))
ex.mistake(
    "softmax with the minimum subtracted instead of the maximum",
    "Every exponent is at or above 0, so a wide row still overflows.",
    "Which number of the row leaves no exponent above 0?",
)(lambda s: _shifted(s, s.amin(-1, keepdim=True)))
ex.mistake(
    "softmax with the maximum added instead of subtracted",
    "The largest exponent is doubled and overflows all the sooner.",
    "Which sign must the shift have so that no exponent is above 0?",
)(lambda s: _shifted(s, -top(s)))
ex.mistake(
    "softmax of the scores divided by their maximum",
    "Dividing changes the differences between scores, and softmax lives on differences.",
    "Does softmax stay the same when all scores are shifted, or when they are scaled?",
)(lambda s: (s / top(s)).softmax(-1))
ex.mistake(
    "softmax with the scores clamped to a maximum",
    "Scores above the clamp all look alike.",
    "Is there a way to keep exp in range that changes nothing about the result?",
)(lambda s: s.clamp(max=50).softmax(-1))
ex.mistake(
    "softmax of the negated scores",
    "The lowest score gets the highest weight.",
    "Which sign stands in the exponent?",
)(lambda s: (-s).softmax(-1))
ex.mistake(
    "softmax to the base 2",
    "Powers of 2 stand where powers of e should.",
    "Is it `exp` or `exp2`?",
)(lambda s: (s * math.log(2)).softmax(-1))
ex.mistake(
    "a one at the largest score, zeros elsewhere",
    "That is argmax, a hard choice; it has no useful gradient.",
    "How do the runners-up get a share?",
)(lambda s: F.one_hot(s.argmax(-1), s.shape[-1]).to(s.dtype))
ex.mistake(
    "exp of the shifted scores divided by the sum of the unshifted ones",
    "Numerator and denominator are shifted differently.",
    "Do both sides of the fraction use the same exp?",
)(lambda s: (s - top(s)).exp() / s.exp().sum(-1, keepdim=True))
ex.mistake(
    "exp divided by its Euclidean length",
    "The squares of the weights sum to 1, not the weights.",
    "Sum, or root of the sum of squares?",
)(lambda s: F.normalize((s - top(s)).exp(), dim=-1))
ex.mistake(
    "softmax of the absolute scores",
    "A strongly negative score is taken for a strong one.",
    "What should happen to the sign of a score?",
)(lambda s: s.abs().softmax(-1))
ex.mistake(
    "the softmax sum without keepdim",
    "The sum lost its dimension and is broadcast along the wrong one, or not at all.",
    "What shape does `exp.sum(dim=-1)` have, and what shape must it have to divide the rows?",
)(lambda s: (s - top(s)).exp() / (s - top(s)).exp().sum(-1))
ex.mistake(
    "the maximum without keepdim",
    "The maximum lost its dimension and is subtracted from the wrong rows, or not at all.",
    "What shape does `scores.amax(dim=-1)` have, and what shape must it have?",
)(lambda s: _shifted(s, s.amax(-1)))

ex.alternative("torch.softmax")(lambda scores: torch.softmax(scores, dim=-1))
ex.alternative("exp(s - logsumexp(s))")(lambda s: (s - s.logsumexp(-1, keepdim=True)).exp())
ex.alternative("exp of log_softmax")(lambda s: F.log_softmax(s, -1).exp())


@ex.alternative("a loop over rows")
def _(scores):
    rows = []
    for row in scores.reshape(-1, scores.shape[-1]):
        exp = torch.exp(row - row.max())
        rows.append(exp / exp.sum())
    return torch.stack(rows).reshape(scores.shape)


@ex.alternative("in float64, and back")
def _(scores):
    wide = scores.double()
    exp = torch.exp(wide - wide.max(-1, keepdim=True).values)
    return exp.div(exp.sum(-1, keepdim=True)).to(scores.dtype)


# --- 2. soft look-up --------------------------------------------------------------------------

ex = Exercise(
    "soft_lookup",
    chapter="02_attention",
    title="A soft dictionary",
    minutes=10,
    difficulty=1,
    importance=4,
    prompt=r"""
A dictionary gives the value whose key *equals* the query. A soft dictionary gives a mixture of all
values, each by how well its key *matches*: the match is a dot product, and softmax of the matches
over a temperature $T$ says how much each value counts.

$$\text{result} = \sum_j w_j v_j, \qquad w = \mathrm{softmax}\left(\frac{K q}{T}\right)$$

As $T \to 0$ it becomes the hard dictionary; as $T \to \infty$ the plain mean of the values.
`torch.softmax` is allowed from here on.
""",
    hints=(
        "One query, n keys: how many matches are there, and which product gives all of them at "
        "once?",
        "keys @ query has shape (n,). Dividing by a small temperature pushes the matches apart.",
        "weights = torch.softmax(keys @ query / temperature, dim=-1); now mix the rows of values.",
    ),
)


@ex.solution
def soft_lookup(query: Tensor, keys: Tensor, values: Tensor, temperature: float = 1.0) -> Tensor:
    """Mix the values by how well their keys match the query.

    query: (d_k,), keys: (n, d_k), values: (n, d_v), temperature > 0 -> (d_v,).
    """
    ### BEGIN SOLUTION
    matches = keys @ query  # (n, d_k) x (d_k,) -> (n,)
    weights = torch.softmax(matches / temperature, dim=-1)  # (n,)
    return weights @ values  # (n,) x (n, d_v) -> (d_v,)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(n: int, d_k: int, d_v: int, **options: float) -> Case:
        query, keys, values = normal(g, d_k), normal(g, n, d_k), normal(g, n, d_v)
        return {"query": query, "keys": keys, "values": values, **options}

    near = case(4, 2, 2, temperature=0.002)  # matches so close that only a low temperature tells
    return [
        case(2, 2, 1),
        case(3, 2, 2, temperature=0.5),
        case(3, 3, 3),
        case(3, 2, 2),
        case(4, 4, 4, temperature=2.0),
        case(1, 3, 2),
        case(5, 3, 4, temperature=0.1),
        case(6, 2, 3, temperature=10.0),
        case(4, 3, 2, temperature=1e-3),
        near | {"query": near["query"] / 256},
        case(7, 9, 5, temperature=3.0),
    ]


@ex.behaviour("if all keys match alike, the result is the mean of the values")
def _(answer):
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    expect(answer(torch.ones(2), torch.ones(3, 2), values), torch.tensor([3.0, 3.0]))


@ex.behaviour("a very low temperature gives the value of the best key")
def _(answer):
    values = torch.tensor([[1.0], [2.0], [3.0]])
    got = answer(torch.tensor([0.1, 0.9, 0.3]), torch.eye(3), values, temperature=1e-3)
    expect(got, torch.tensor([2.0]))


@ex.behaviour("a very high temperature gives the mean of the values")
def _(answer):
    values = torch.tensor([[1.0], [2.0], [6.0]])
    got = answer(torch.tensor([0.1, 0.9, 0.3]), torch.eye(3), values, temperature=1e6)
    expect(got, torch.tensor([3.0]))


@ex.behaviour("the result lies between the smallest and the largest value")
def _(answer):
    keys, values = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[-1.0], [2.0]])
    expect(bool(-1 <= answer(torch.tensor([2.0, -1.0]), keys, values).item() <= 2), True)


@ex.behaviour("a longer query makes the choice sharper")
def _(answer):
    keys, values = torch.eye(2), torch.tensor([[0.0], [1.0]])
    soft, sharp = (answer(torch.tensor([0.0, s]), keys, values).item() for s in (1.0, 3.0))
    expect(bool(sharp > soft > 0.5), True)


@ex.behaviour("keys and values that change places together change nothing")
def _(answer):
    query, keys, values = some(3, (3,), (4, 3), (4, 2))
    order = torch.tensor([2, 0, 3, 1])
    expect(answer(query, keys[order], values[order]), answer(query, keys, values))


ex.mistake(
    "a look-up that multiplies by the temperature",
    "A low temperature makes it softer instead of sharper.",
    "As T goes to 0, should the differences between the matches grow or shrink?",
)(lambda q, k, v, T=1.0: (k @ q * T).softmax(-1) @ v)
ex.mistake(
    "a look-up without the temperature",
    "The temperature has no effect.",
    "Where does `temperature` stand in the formula?",
)(lambda q, k, v, T=1.0: (k @ q).softmax(-1) @ v)
ex.mistake(
    "a look-up with the temperature applied after the softmax",
    "The weights no longer sum to 1.",
    "Does the temperature act on the matches or on the weights?",
)(lambda q, k, v, T=1.0: (k @ q).softmax(-1) / T @ v)
ex.mistake(
    "a look-up with the root of the temperature",
    "√T stands where T should.",
    "Which power of T divides the matches?",
)(lambda q, k, v, T=1.0: (k @ q / math.sqrt(T)).softmax(-1) @ v)
ex.mistake(
    "a look-up with the temperature squared",
    "T² stands where T should.",
    "Is the temperature applied twice?",
)(lambda q, k, v, T=1.0: (k @ q / T**2).softmax(-1) @ v)
ex.mistake(
    "a hard look-up: the value of the best key",
    "That is an ordinary dictionary; the other values do not count.",
    "How does every value get its share?",
)(lambda q, k, v, T=1.0: v[(k @ q).argmax()])
ex.mistake(
    "a look-up without softmax",
    "The matches themselves are used as weights: they may be negative and do not sum to 1.",
    "What turns the matches into weights?",
)(lambda q, k, v, T=1.0: k @ q / T @ v)
ex.mistake(
    "a look-up with exp but without dividing by its sum",
    "The weights do not sum to 1.",
    "What does softmax do after exp?",
)(lambda q, k, v, T=1.0: (k @ q / T).exp() @ v)
ex.mistake(
    "a look-up with exp of the raw matches divided by its sum",
    "At a low temperature exp overflows, and inf / inf is NaN.",
    "How did your softmax of exercise 1 keep exp in range?",
)(lambda q, k, v, T=1.0: (k @ q / T).exp() / (k @ q / T).exp().sum() @ v)
ex.mistake(
    "a look-up with sigmoid instead of softmax",
    "Each match is squashed alone, so the weights do not sum to 1.",
    "How do the keys compete?",
)(lambda q, k, v, T=1.0: (k @ q / T).sigmoid() @ v)
ex.mistake(
    "the weights, not the mixture of the values",
    "The values have no effect.",
    "What is averaged with the weights?",
)(lambda q, k, v, T=1.0: (k @ q / T).softmax(-1))
ex.mistake(
    "the weighted values, not summed",
    "Each value stands alone, multiplied by its weight.",
    "Over which dimension does the formula sum?",
)(lambda q, k, v, T=1.0: (k @ q / T).softmax(-1)[:, None] * v)
ex.mistake(
    "the weighted values, averaged instead of summed",
    "The weights already sum to 1, so the mean divides by n once too often.",
    "Sum, or mean?",
)(lambda q, k, v, T=1.0: ((k @ q / T).softmax(-1)[:, None] * v).mean(0))
ex.mistake(
    "a mixture of the keys",
    "Keys are what the query is compared with; values are what comes back.",
    "Which of the two tensors should be averaged?",
)(lambda q, k, v, T=1.0: (k @ q / T).softmax(-1) @ k)
ex.mistake(
    "the mean of the values",
    "Every value counts alike, whatever the query asks.",
    "Where do query and keys enter?",
)(lambda q, k, v, T=1.0: v.mean(0))
ex.mistake(
    "the sum of the values",
    "Every value counts 1: the weights sum to n.",
    "Where do query and keys enter?",
)(lambda q, k, v, T=1.0: v.sum(0))
ex.mistake(
    "a look-up by cosine similarity",
    "Keys and query are brought to length 1 first, so a longer key matches no better.",
    "Is the match a dot product or an angle?",
)(lambda q, k, v, T=1.0: (F.cosine_similarity(k, q[None], dim=-1) / T).softmax(-1) @ v)
ex.mistake(
    "a look-up by distance",
    "The nearest key wins instead of the one with the largest dot product.",
    "Is the match a dot product or a distance?",
)(lambda q, k, v, T=1.0: (-(k - q).square().sum(-1) / T).softmax(-1) @ v)
ex.mistake(
    "a look-up that also divides by √d_k",
    "The temperature alone scales the matches here; √d_k comes in the next exercise.",
    "What stands under the fraction in the formula of this exercise?",
)(lambda q, k, v, T=1.0: (k @ q / T / math.sqrt(k.shape[-1])).softmax(-1) @ v)
ex.mistake(
    "a look-up of the worst match",
    "The sign of the matches is turned round.",
    "Which sign stands before the matches?",
)(lambda q, k, v, T=1.0: (-k @ q / T).softmax(-1) @ v)
ex.mistake(
    "a look-up that compares the query with the values",
    "The values are both what is asked and what comes back; the keys have no effect.",
    "What is the query compared with?",
)(lambda q, k, v, T=1.0: (v @ q / T).softmax(-1) @ v)
ex.alternative("einsum")(
    lambda q, k, v, T=1.0: torch.einsum(
        "j,jv->v", torch.softmax(torch.einsum("d,jd->j", q, k) / T, 0), v
    )
)
ex.alternative("scaled_dot_product_attention with its own scale")(
    lambda q, k, v, T=1.0: F.scaled_dot_product_attention(q[None], k, v, scale=1 / T)[0]
)


@ex.alternative("a loop over the keys")
def _(query, keys, values, temperature=1.0):
    matches = torch.stack([(key * query).sum() for key in keys]) / temperature
    result = 0
    for weight, value in zip(matches.softmax(0), values, strict=True):
        result = result + weight * value
    return result


@ex.alternative("broadcast and sum")
def _(query, keys, values, temperature=1.0):
    matches = (query * keys).sum(-1, keepdim=True)  # (n, 1)
    return (torch.softmax(matches / temperature, dim=0) * values).sum(0)


# --- 3. scores --------------------------------------------------------------------------------

ex = Exercise(
    "attention_scores",
    chapter="02_attention",
    title="Scores of all queries against all keys",
    minutes=10,
    difficulty=2,
    importance=5,
    batched=True,
    prompt=r"""
With n_q queries in a matrix $Q$ and n_k keys in a matrix $K$, one product gives every match:

$$S = \frac{Q K^\top}{\sqrt{d_k}}$$

Row i holds the scores of query i against all keys. The factor $1/\sqrt{d_k}$ keeps the scores'
spread the same for every width d_k. Queries and keys may have batch dimensions in front.
""",
    hints=(
        "Which two dimensions does the product sum over, and which remain?",
        "`@` multiplies the last two dimensions and carries the others along; `.T` turns round all "
        "of them, so it is not what you want for a batch.",
        "query @ key.transpose(-2, -1) has shape (..., n_q, n_k); what is d_k in terms of "
        "query.shape?",
    ),
)


@ex.solution
def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scaled scores. query: (..., n_q, d_k), key: (..., n_k, d_k) -> (..., n_q, n_k)."""
    ### BEGIN SOLUTION
    d_k = query.shape[-1]
    # (..., n_q, d_k) x (..., d_k, n_k) -> (..., n_q, n_k)
    return query @ key.transpose(-2, -1) / math.sqrt(d_k)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        ((2, 3), (2, 3)),
        ((2, 5), (3, 5)),
        ((1, 4), (4, 4)),
        ((3, 3), (3, 3)),
        ((4, 1), (2, 1)),
        ((3, 2, 4), (3, 5, 4)),
        ((2, 3, 4, 6), (2, 3, 5, 6)),
        ((3, 64), (4, 64)),
        ((3, 3, 3), (3, 3, 3)),
        ((3, 4, 5), (3, 4, 5)),
    ]
    return [{"query": normal(g, *q), "key": normal(g, *k)} for q, k in sizes]


@ex.behaviour("row i holds query i against every key")
def _(answer):
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key = torch.tensor([[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    case = {"query": query, "key": key}
    expect(answer.on(case), key.T / math.sqrt(2), case=case)


@ex.behaviour("the scores' spread is 1 at every width d_k")
def _(answer):
    for d_k in (4, 64, 256):
        g = torch.Generator().manual_seed(d_k)
        query, key = torch.randn(50, d_k, generator=g), torch.randn(50, d_k, generator=g)
        spread = answer(query, key).std().item()
        if not 0.9 < spread < 1.1:
            raise Broken(f"with d_k = {d_k} it is {spread:.3g}")


@ex.behaviour("changing one key changes one column")
def _(answer):
    query, key = some(5, (3, 4), (3, 4))
    other = key.clone()
    other[1] += 1
    changed = (answer(query, other) - answer(query, key)).abs() > 1e-6
    expect(changed, torch.tensor([[False, True, False]] * 3))


@ex.behaviour("doubling a query doubles its scores")
def _(answer):
    query, key = some(6, (3, 4), (2, 4))
    expect(answer(2 * query, key), 2 * answer(query, key))


@ex.behaviour("batch elements do not meet")
def _(answer):
    query, key = some(7, (3, 3, 3), (3, 3, 3))
    expect(answer(query, key)[1], answer(query[1], key[1]))


def _scaled(factor: Function) -> Function:
    return lambda q, k: q @ k.mT * factor(q, k)


def _root(x: Tensor) -> float:
    return math.sqrt(x.shape[-1])


ex.mistakes_from(SCALES, "the scores", _scaled)
ex.mistake(
    "the scores scaled by dimension 1, counted from the front",
    "It is right for a matrix and wrong once a batch dimension stands before it.",
    "Which entry of `query.shape`, counted from the end, is d_k?",
)(lambda q, k: q @ k.mT / math.sqrt(q.shape[1]))
ex.mistake(
    "the scores transposed, K Qᵀ",
    "Row i holds key i against all queries.",
    "Which of the two stands on the left of the product?",
)(lambda q, k: k @ q.mT / _root(q))
ex.mistake(
    "the scores with all dimensions turned round (`.T`)",
    "`.T` reverses every dimension, so the batch ends up inside the matrix.",
    "Which call swaps only the last two dimensions?",
)(lambda q, k: q @ k.permute(*reversed(range(k.ndim))) / _root(q))
ex.mistake(
    "the scores with the first two dimensions swapped",
    "It is right for a matrix; in a batch, dimensions 0 and 1 are batch and length.",
    "Which call swaps only the last two dimensions?",
)(lambda q, k: q @ k.transpose(0, 1) / _root(q))
ex.mistake(
    "the scores with the key reshaped instead of transposed",
    "`view` and `reshape` read the same numbers row by row into another shape: keys are torn up.",
    "Which call swaps two dimensions?",
)(lambda q, k: q @ k.reshape(*k.shape[:-2], k.shape[-1], k.shape[-2]) / _root(q))
ex.mistake(
    "cosine similarities",
    "Queries and keys are brought to length 1, which loses how strongly they match.",
    "Does the formula normalise the rows?",
)(lambda q, k: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT)
ex.mistake(
    "the softmax of the scores",
    "Softmax is a step too far: scores come first.",
    "Does the formula of this exercise contain a softmax?",
)(lambda q, k: (q @ k.mT / _root(q)).softmax(-1))
ex.mistake(
    "distances instead of dot products",
    "The nearest key scores highest, instead of the most aligned one.",
    "Which product compares a query with a key?",
)(lambda q, k: -torch.cdist(q, k) / _root(q))
ex.mistake(
    "the scores' absolute values",
    "A key that points away from the query is taken for a match.",
    "What does a negative score say?",
)(lambda q, k: (q @ k.mT).abs() / _root(q))
ex.mistake(
    "the queries compared with one another, Q Qᵀ",
    "The keys have no effect.",
    "What stands on the right of the product?",
)(lambda q, k: q @ q.mT / _root(q))
ex.mistake(
    "query and key multiplied entry by entry",
    "A dot product sums over d_k and pairs every query with every key.",
    "Is it `*` or `@`?",
)(lambda q, k: q * k / _root(q))
ex.mistake(
    "the negated scores",
    "The best match gets the lowest score.",
    "Which sign does the formula have?",
)(lambda q, k: -q @ k.mT / _root(q))
ex.mistake(
    "the scores under a causal mask",
    "Scores of later keys are gone; nothing in this exercise asks for that.",
    "May query 0 be compared with key 1 here?",
)(lambda q, k: (q @ k.mT / _root(q)).tril())

ex.alternative("einsum")(lambda q, k: torch.einsum("...id,...jd->...ij", q, k) / _root(k))
ex.alternative("query and key scaled by d_k^(1/4) each")(
    lambda q, k: (q * q.shape[-1] ** -0.25) @ (k * k.shape[-1] ** -0.25).mT
)
ex.alternative("broadcast and sum")(
    lambda q, k: (q[..., :, None, :] * k[..., None, :, :]).sum(-1) * q.shape[-1] ** -0.5
)


@ex.alternative("a loop over queries and keys")
def _(query, key):
    rows = []
    for i in range(query.shape[-2]):
        columns = []
        for j in range(key.shape[-2]):
            columns.append((query[..., i, :] * key[..., j, :]).sum(-1) / query.shape[-1] ** 0.5)
        rows.append(torch.stack(columns, dim=-1))
    return torch.stack(rows, dim=-2)


# --- 4. self-attention ------------------------------------------------------------------------

ex = Exercise(
    "self_attention",
    chapter="02_attention",
    title="Self-attention with learned projections",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
In self-attention the queries, keys and values are three views of the same tokens $X$, made by three
learned matrices:

$$Q = X W_Q, \quad K = X W_K, \quad V = X W_V, \qquad
  \text{output} = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d_k}}\right) V$$

Row i of the output is token i's mixture of what all tokens have to say. No loop is needed.
""",
    hints=(
        "Three projections, a product, a softmax, a product: what are the shapes on the way?",
        "Q and K have width d_k (it may differ from d_model), V has width d_v; the softmax runs "
        "over the keys, so every row of weights sums to 1.",
        "query, key, value = x @ w_q, x @ w_k, x @ w_v; weights come from the two exercises "
        "before.",
    ),
)


@ex.solution
def self_attention(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """Self-attention of one head.

    x: (batch, n, d_model), w_q and w_k: (d_model, d_k), w_v: (d_model, d_v) -> (batch, n, d_v).
    """
    ### BEGIN SOLUTION
    query, key, value = x @ w_q, x @ w_k, x @ w_v  # (batch, n, d_k) twice, (batch, n, d_v)
    # (batch, n, d_k) x (batch, d_k, n) -> (batch, n, n)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return torch.softmax(scores, dim=-1) @ value  # (batch, n, n) x (batch, n, d_v)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, n: int, d_model: int, d_k: int, d_v: int) -> Case:
        return {
            "x": normal(g, batch, n, d_model),
            "w_q": normal(g, d_model, d_k),
            "w_k": normal(g, d_model, d_k),
            "w_v": normal(g, d_model, d_v),
        }

    return [
        case(1, 2, 1, 3, 1),  # a width that is no length: the scale shows at once
        case(1, 2, 3, 2, 2),
        case(1, 3, 3, 3, 3),
        case(2, 4, 4, 4, 4),
        case(2, 1, 3, 2, 4),
        case(1, 5, 6, 2, 3),
        case(3, 3, 4, 8, 2),
        case(2, 3, 2, 5, 5),
        case(3, 4, 5, 3, 6),
    ]


def _example(seed: int) -> list[Tensor]:
    return some(seed, (2, 4, 3), (3, 2), (3, 2), (3, 5))


@ex.behaviour("tokens that are all alike come out as their own value")
def _(answer):
    x, w_q, w_k, w_v = _example(1)
    alike = x[:, :1].expand(2, 4, 3)
    expect(answer(alike, w_q, w_k, w_v), alike @ w_v)


@ex.behaviour("with w_q = 0 every output is the mean of the values")
def _(answer):
    x, w_q, w_k, w_v = _example(2)
    mean = (x @ w_v).mean(1, keepdim=True).expand(2, 4, 5)
    expect(answer(x, torch.zeros_like(w_q), w_k, w_v), mean)


@ex.behaviour("doubling w_v doubles the output")
def _(answer):
    x, w_q, w_k, w_v = _example(3)
    expect(answer(x, w_q, w_k, 2 * w_v), 2 * answer(x, w_q, w_k, w_v))


@ex.behaviour("tokens in another order give the same outputs in that order")
def _(answer):
    x, w_q, w_k, w_v = _example(4)
    order = torch.tensor([2, 0, 3, 1])
    expect(answer(x[:, order], w_q, w_k, w_v), answer(x, w_q, w_k, w_v)[:, order])


@ex.behaviour("each output lies within the range of the values")
def _(answer):
    x, w_q, w_k, w_v = _example(5)
    value, output = x @ w_v, answer(x, w_q, w_k, w_v)
    low, high = value.amin(1, keepdim=True) - 1e-5, value.amax(1, keepdim=True) + 1e-5
    expect(bool(((output >= low) & (output <= high)).all()), True)


@ex.behaviour("batch elements do not meet")
def _(answer):
    x, w_q, w_k, w_v = _example(6)
    expect(answer(x, w_q, w_k, w_v)[1:], answer(x[1:], w_q, w_k, w_v))


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / _root(query)).softmax(-1) @ value


def _self_with(*, scale=None, weigh=None, mix=None) -> Function:
    """Self-attention with one part replaced."""

    def function(x, w_q, w_k, w_v):
        query, key, value = x @ w_q, x @ w_k, x @ w_v
        scores = query @ key.mT * (scale(query, key) if scale else 1 / _root(query))
        weights = weigh(scores) if weigh else scores.softmax(-1)
        return mix(weights, query, key, value) if mix else weights @ value

    return function


ex.mistakes_from(SCALES[:-3], "self-attention", lambda part: _self_with(scale=part))
ex.mistakes_from(NORMALISATIONS, "self-attention", lambda part: _self_with(weigh=part))
ex.mistakes_from(MIXTURES, "self-attention", lambda part: _self_with(mix=part))
ex.mistake(
    "self-attention scaled by d_model",
    "The width of a token stands where the width of a key should.",
    "Is √d_k read off `x` or off the query?",
)(lambda x, w_q, w_k, w_v: _self_with(scale=lambda q, k: 1 / _root(x))(x, w_q, w_k, w_v))
ex.mistake(
    "self-attention scaled by the width of the values",
    "d_v stands where d_k should.",
    "Whose width are the dot products a sum over?",
)(lambda x, w_q, w_k, w_v: _self_with(scale=lambda q, k: 1 / _root(w_v))(x, w_q, w_k, w_v))
ex.mistake(
    "self-attention with query and key swapped",
    "The score of i for j is read as that of j for i.",
    "Which of the two owns the rows of the score matrix?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_k, x @ w_q, x @ w_v))
ex.mistake(
    "self-attention with query and value swapped",
    "W_Q makes what is averaged, and W_V what is compared with the keys.",
    "Which projection is compared, and which comes back?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_v, x @ w_k, x @ w_q))
ex.mistake(
    "self-attention with key and value swapped",
    "W_K makes what is averaged, and W_V what the queries are compared with.",
    "Which projection is compared, and which comes back?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_v, x @ w_k))
ex.mistake(
    "self-attention with the tokens as values",
    "W_V has no effect.",
    "What is averaged: the tokens, or their projection by w_v?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_k, x))
ex.mistake(
    "self-attention with the tokens as keys and queries",
    "W_Q and W_K have no effect.",
    "What are Q and K made of?",
)(lambda x, w_q, w_k, w_v: _attend(x, x, x @ w_v))
ex.mistake(
    "self-attention without any projection",
    "The three matrices have no effect.",
    "What are Q, K and V made of?",
)(lambda x, w_q, w_k, w_v: _attend(x, x, x))
ex.mistake(
    "self-attention with W_Q for query and key",
    "W_K has no effect: i looks at j exactly as j looks at i.",
    "Does each of the three matrices appear once?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_q, x @ w_v))
ex.mistake(
    "self-attention with W_K for query and key",
    "W_Q has no effect: i looks at j exactly as j looks at i.",
    "Does each of the three matrices appear once?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_k, x @ w_k, x @ w_v))
ex.mistake(
    "self-attention with transposed weight matrices",
    "The weights have shape (d_model, d_k): no transpose is needed. torch.nn.Linear stores them "
    "the other way round.",
    "What shape does `x @ w_q` have?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q.mT, x @ w_k.mT, x @ w_v.mT))
ex.mistake(
    "self-attention with the keys reshaped instead of transposed",
    "`view` and `reshape` read the same numbers row by row into another shape: keys are torn up.",
    "Which call swaps two dimensions?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, (x @ w_k).reshape((x @ w_k).mT.shape).mT, x @ w_v))
ex.mistake(
    "self-attention under a causal mask",
    "Later tokens are hidden; nothing in this exercise asks for that.",
    "May token 0 look at token 1 here?",
)(lambda x, a, b, c: F.scaled_dot_product_attention(x @ a, x @ b, x @ c, is_causal=True))
ex.mistake(
    "the values alone",
    "Every token keeps its own value: nobody has looked at anybody.",
    "Where do query and key enter?",
)(lambda x, w_q, w_k, w_v: x @ w_v)
ex.mistake(
    "self-attention averaged over the tokens",
    "All tokens get the same output, or one is left.",
    "Does the last step sum over the keys or over the queries?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_k, x @ w_v).mean(1))
ex.mistake(
    "self-attention with the softmax before the scale",
    "1/√d_k is applied to the weights, which no longer sum to 1.",
    "Does the scale act on the scores or on the weights?",
)(lambda x, a, b, c: ((x @ a) @ (x @ b).mT).softmax(-1) / _root(a) @ (x @ c))


@ex.mistake(
    "self-attention with its input added",
    "That is a residual connection, which comes in chapter 05.",
    "Does the formula add x to the result?",
)
def _(x, w_q, w_k, w_v):
    output = _attend(x @ w_q, x @ w_k, x @ w_v)
    return output + x if output.shape == x.shape else output


ex.alternative("scaled_dot_product_attention")(
    lambda x, w_q, w_k, w_v: F.scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v)
)
ex.alternative("the two matrices of the scores multiplied first")(
    lambda x, a, b, c: torch.softmax(x @ (a @ b.mT) @ x.mT / math.sqrt(b.shape[1]), -1) @ x @ c
)
ex.alternative("the values projected last")(
    lambda x, a, b, c: (torch.softmax((x @ a) @ (x @ b).mT / math.sqrt(b.shape[1]), -1) @ x) @ c
)


@ex.alternative("F.linear and bmm")
def _(x, w_q, w_k, w_v):
    query, key, value = F.linear(x, w_q.T), F.linear(x, w_k.T), F.linear(x, w_v.T)
    return torch.bmm(F.softmax(torch.bmm(query, key.mT) / w_q.shape[1] ** 0.5, -1), value)


@ex.alternative("a loop over the batch and the queries")
def _(x, w_q, w_k, w_v):
    batch = []
    for tokens in x:
        keys, values = tokens @ w_k, tokens @ w_v
        rows = []
        for token in tokens:
            scores = keys @ (token @ w_q) / math.sqrt(keys.shape[1])
            rows.append(scores.softmax(0) @ values)
        batch.append(torch.stack(rows))
    return torch.stack(batch)


# --- 5. masked softmax ------------------------------------------------------------------------

ex = Exercise(
    "masked_softmax",
    chapter="02_attention",
    title="Softmax over the visible keys",
    minutes=15,
    difficulty=3,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
Some keys must not be seen: padding, or the future. A mask says which ones may: **True = may
attend**. A hidden key gets the weight 0 and the others share the 1 among themselves, exactly as if
it were not there. A row in which nothing is visible gets weights 0 everywhere, never NaN.

The mask broadcasts against the scores: `(n_q, n_k)`, `(batch, 1, n_k)` and so on.
""",
    hints=(
        "Which score makes exp exactly 0?",
        "-inf for the hidden scores, before the softmax. A row of nothing but -inf gives NaN: "
        "find those rows and set them to 0.",
        "weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1); which rows are NaN "
        "now?",
    ),
)


@ex.solution
def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the visible keys. scores: (..., n_q, n_k), mask: bool, True = may attend.

    Returns weights (..., n_q, n_k); a row without a visible key is 0.
    """
    ### BEGIN SOLUTION
    weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
    empty = ~mask.any(dim=-1, keepdim=True)  # a row of -inf everywhere came out as 0 / 0
    return weights.masked_fill(empty, 0.0)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(*shape: int, mask_shape: tuple[int, ...] = ()) -> Case:
        visible = torch.rand(mask_shape or shape, generator=g) < 0.6
        visible[..., 0] |= ~visible.any(-1)  # at least one visible key a row
        return {"scores": normal(g, *shape), "mask": visible}

    two = torch.tensor([[True, True, False], [False, True, True]])
    one_empty = torch.tensor([[True, False, True], [False, False, False]])
    low = 100 * normal(g, 2, 3).round() - 2e4
    return [
        {"scores": normal(g, 2, 3), "mask": two},
        {"scores": normal(g, 2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)},
        {"scores": normal(g, 2, 3), "mask": one_empty},
        {"scores": normal(g, 3, 3), "mask": torch.ones(3, 3, dtype=torch.bool).tril()},
        {"scores": normal(g, 2, 3).masked_fill(~two, 2e4), "mask": two},
        {"scores": normal(g, 2, 3) - 50.0, "mask": two},
        {"scores": normal(g, 2, 3) - 200.0, "mask": two},
        {"scores": low, "mask": two},
        case(4, 4),
        case(3, 1),
        case(2, 3, 4, mask_shape=(3, 4)),
        case(3, 3, 5, mask_shape=(3, 1, 5)),
        case(2, 2, 3, 3, mask_shape=(2, 1, 3, 3)),
        case(3, 2, 5),
    ]


TWO_OF_THREE = torch.tensor([[True, True, False], [False, True, True]])


@ex.behaviour("a hidden key gets the weight 0, exactly")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 2.0, 30.0], [30.0, 1.0, 0.0]]), "mask": TWO_OF_THREE}
    leaked = answer.on(case)[~TWO_OF_THREE]
    if (leaked != 0).any():
        raise Broken(f"a hidden key got the weight {leaked.max().item():.3g}", case=case)


@ex.behaviour("the visible weights of each row sum to 1")
def _(answer):
    weights = answer(torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]]), TWO_OF_THREE)
    expect(weights.sum(-1), torch.ones(2))


@ex.behaviour("it is softmax of the row without its hidden keys")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 9.0, 2.0]]), "mask": torch.tensor([[True, False, True]])}
    expect(answer.on(case), torch.tensor([[0.2689414, 0.0, 0.7310586]]), case=case)


@ex.behaviour("with everything visible it is plain softmax")
def _(answer):
    scores = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    expect(answer(scores, torch.ones(2, 2, dtype=torch.bool)), scores.softmax(-1))


@ex.behaviour("a row without a visible key is 0, not NaN")
def _(answer):
    mask = torch.tensor([[False, False], [True, True]])
    case = {"scores": torch.tensor([[1.0, 2.0], [0.0, 3.0]]), "mask": mask}
    want = torch.tensor([[0.0, 0.0], [0.0474259, 0.9525741]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("a hidden score changes nothing, however large")
def _(answer):
    mask = torch.tensor([[True, True, False]])
    case = {"scores": torch.tensor([[0.3, -0.2, 1e4]]), "mask": mask}
    expect(answer.on(case), answer(torch.tensor([[0.3, -0.2, 0.0]]), mask), case=case)


@ex.behaviour("very low visible scores still share the 1")
def _(answer):
    mask = torch.tensor([[True, True, False]])
    case = {"scores": torch.tensor([[-2e4, -2e4, 0.0]]), "mask": mask}
    expect(answer.on(case), torch.tensor([[0.5, 0.5, 0.0]]), case=case)


ex.mistakes_from(MASKINGS, "the weights", lambda part: part)
ex.mistake(
    "the weights with softmax along dimension 1, counted from the front",
    "It is right for a matrix and wrong once a batch dimension stands before it.",
    "How do you name the last dimension, however many there are?",
)(lambda s, m: s.masked_fill(~m, -INF).softmax(1).nan_to_num(0.0))
ex.mistake(
    "the weights with 0 for the hidden scores, masked again and divided by what is left",
    "Visible scores far below 0 have underflowed before they are divided.",
    "Which score makes exp exactly 0, so that no second mask is needed?",
)(lambda s, m: share(filled(s, m, 0.0) * m, 1e-9))
ex.mistake(
    "the weights with -1e4 instead of -inf",
    "A visible score can be as low as that, and then the hidden key counts.",
    "Is there a number below every other?",
)(lambda s, m: filled(s, m, -1e4).masked_fill(empty(m), 0.0))
ex.mistake(
    "the weights with 1e4 subtracted from the hidden scores",
    "A hidden score that is large enough comes back.",
    "Is the hidden score replaced, or only lowered?",
)(lambda s, m: (s - 1e4 * ~m).softmax(-1).masked_fill(empty(m), 0.0))

ex.alternative("-inf, then nan_to_num")(
    lambda s, m: torch.where(m, s, -INF).softmax(-1).nan_to_num(0.0)
)
ex.alternative("finfo.min, then the mask again")(
    lambda s, m: filled(s, m, torch.finfo(s.dtype).min).masked_fill(~m, 0.0)
)


@ex.alternative("exp of the visible scores, divided by their sum")
def _(scores, mask):
    top = scores.masked_fill(~mask, -INF).amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    exp = torch.where(mask, scores - top, -INF).exp()
    return exp / exp.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


@ex.alternative("a loop over rows")
def _(scores, mask):
    mask = mask.expand(scores.shape).reshape(-1, scores.shape[-1])
    rows = []
    for row, visible in zip(scores.reshape(mask.shape), mask, strict=True):
        weights = row * 0.0
        if visible.any():
            weights = weights.masked_scatter(visible, row[visible].softmax(0))
        rows.append(weights)
    return torch.stack(rows).reshape(scores.shape)


@ex.alternative("an additive mask of 0 and -inf")
def _(scores, mask):
    bias = torch.zeros(mask.shape, dtype=scores.dtype).masked_fill(~mask, -INF)
    return torch.where(mask, torch.softmax(scores + bias, dim=-1), 0.0)


# --- 6. attention -----------------------------------------------------------------------------

ex = Exercise(
    "attention",
    chapter="02_attention",
    title="Attention, batched, with a mask and its weights",
    minutes=20,
    difficulty=3,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
Now put it together: the function that every Transformer is made of.

$$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d_k}}\right) V$$

- `mask`, if given, is bool and broadcasts to `(batch, n_q, n_k)`; **True = may attend**. A query
  that may see nothing gets the output 0 and weights 0.
- With `return_weights=True` it returns `(output, weights)`, otherwise the output alone.
- n_q and n_k may differ, and so may d_k and d_v.

This is `course_lib.attention` for one head; after it you may use the real one.
""",
    hints=(
        "You have written all the parts: which of your functions gives the scores, which the "
        "weights?",
        "The mask acts between scores and softmax. The output is weights @ value, so an empty row "
        "of weights gives an output of 0 by itself.",
        "weights = masked_softmax(attention_scores(query, key), mask); output = weights @ value.",
    ),
)


@ex.solution
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

    query: (batch, n_q, d_k), key: (batch, n_k, d_k), value: (batch, n_k, d_v),
    mask: bool, broadcasts to (batch, n_q, n_k), True = may attend.
    Returns output (batch, n_q, d_v), or (output, weights (batch, n_q, n_k)).
    """
    ### BEGIN SOLUTION
    # (batch, n_q, d_k) x (batch, d_k, n_k) -> (batch, n_q, n_k)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # 0 / 0 -> 0
    output = weights @ value  # (batch, n_q, n_k) x (batch, n_k, d_v) -> (batch, n_q, d_v)
    return (output, weights) if return_weights else output
    ### END SOLUTION


def _case(g: torch.Generator, sizes: tuple[int, int, int, int, int], **options: object) -> Case:
    batch, n_q, n_k, d_k, d_v = sizes
    shapes = {"query": (batch, n_q, d_k), "key": (batch, n_k, d_k), "value": (batch, n_k, d_v)}
    return {name: normal(g, *shape) for name, shape in shapes.items()} | options


def _towering(g: torch.Generator) -> Case:
    """Visible scores around -100, hidden ones around 300."""
    case = _case(g, (1, 2, 3, 4, 2), mask=torch.tensor([[True, True, False]]))
    key = case["key"] / 10 - 1
    key[:, 2] += 4
    return case | {"query": torch.full((1, 2, 4), 50.0), "key": key}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    second = torch.tensor([[True, False], [False, False]])  # nothing is visible to query 1
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    ragged = torch.arange(4) < torch.tensor([4, 2])[:, None]  # (batch, n_k)
    holes = torch.rand(3, 4, 5, generator=g) < 0.6
    holes[..., 0] = True
    empty = holes.clone()
    empty[1, 2] = False
    return [
        _case(g, (1, 1, 2, 3, 1)),  # a width that is no length: the scale shows at once
        _case(g, (1, 2, 2, 2, 1)),
        _case(g, (1, 2, 2, 2, 1), mask=second),
        _case(g, (1, 2, 2, 2, 1), mask=second, return_weights=True),
        _case(g, (1, 2, 3, 2, 2)),
        _case(g, (2, 3, 3, 3, 3)),
        _case(g, (1, 3, 3, 4, 2), return_weights=True),
        _case(g, (2, 4, 4, 4, 4), mask=causal),
        _case(g, (2, 3, 4, 5, 2), mask=ragged[:, None, :]),
        _towering(g),
        _case(g, (2, 1, 5, 2, 3)),
        _case(g, (3, 4, 5, 3, 3), mask=empty),
        _case(g, (3, 4, 5, 6, 2), mask=empty, return_weights=True),
        _case(g, (3, 4, 5, 16, 2), mask=holes),
        _case(g, (3, 4, 4, 5, 6)),
    ]


def _qkv(seed: int, *, n_q: int = 3, n_k: int = 4) -> list[Tensor]:
    return some(seed, (2, n_q, 5), (2, n_k, 5), (2, n_k, 3))


@ex.behaviour("a query that matches no key better than another gets the mean of the values")
def _(answer):
    query, key, value = _qkv(1)
    want = value.mean(1, keepdim=True).expand(2, 3, 3)
    expect(answer(torch.zeros_like(query), key, value), want)


@ex.behaviour("each row of weights sums to 1")
def _(answer):
    _, weights = answer(*_qkv(2), return_weights=True)
    expect(weights.sum(-1), torch.ones(2, 3))


@ex.behaviour("the output is the weights' mixture of the values")
def _(answer):
    query, key, value = _qkv(3)
    output, weights = answer(query, key, value, return_weights=True)
    expect(output, weights @ value)


@ex.behaviour("a hidden key and its value cannot change the output")
def _(answer):
    query, key, value = _qkv(4)
    mask = torch.tensor([True, True, False, True]).expand(3, 4)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, 2] += 5
    other_value[:, 2] -= 7
    expect(answer(query, other_key, other_value, mask=mask), answer(query, key, value, mask=mask))


@ex.behaviour("with a causal mask a later token cannot change an earlier output")
def _(answer):
    query, key, value = _qkv(5, n_q=4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    later_key, later_value = key.clone(), value.clone()
    later_key[:, 3] += 3
    later_value[:, 3] += 3
    before = answer(query, key, value, mask=mask)[:, :3]
    expect(answer(query, later_key, later_value, mask=mask)[:, :3], before)


@ex.behaviour("a query that may see nothing gets the output 0")
def _(answer):
    query, key, value = _qkv(6)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    expect(answer(query, key, value, mask=mask)[:, 1], torch.zeros(2, 3))


@ex.behaviour("without return_weights it gives the same output alone")
def _(answer):
    inputs = _qkv(7)
    expect(answer(*inputs), answer(*inputs, return_weights=True)[0])


@ex.behaviour("batch elements do not meet")
def _(answer):
    query, key, value = _qkv(8)
    expect(answer(query, key, value)[1:], answer(query[1:], key[1:], value[1:]))


def _give(output: Tensor, weights: Tensor, return_weights: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (output, weights) if return_weights else output


def _with(*, scale=None, normalise=None, weigh=None, mix=None, give=_give) -> Function:
    """Attention with one part replaced."""

    def function(query, key, value, mask=None, return_weights=False):
        scores = query @ key.mT * (scale(query, key) if scale else 1 / _root(query))
        if mask is None:
            weights = normalise(scores) if normalise else scores.softmax(-1)
        elif normalise:
            weights = normalise(scores.masked_fill(~mask, -INF)).nan_to_num(0.0)
        else:
            weights = (weigh or visible_softmax)(scores, mask)
        output = mix(weights, query, key, value) if mix else weights @ value
        return give(output, weights, return_weights)

    return function


ex.mistakes_from(SCALES, "attention", lambda part: _with(scale=part))
ex.mistakes_from(NORMALISATIONS, "attention", lambda part: _with(normalise=part))
ex.mistakes_from(MIXTURES, "attention", lambda part: _with(mix=part))
ex.mistakes_from(MASKINGS, "attention", lambda part: _with(weigh=part))
ex.mistake(
    "attention that returns (weights, output)",
    "The two results are in the wrong order.",
    "Which comes first in the docstring?",
)(_with(give=lambda output, weights, both: (weights, output) if both else output))
ex.mistake(
    "attention that never returns the weights",
    "return_weights has no effect.",
    "What should come back when return_weights is True?",
)(_with(give=lambda output, weights, both: output))
ex.mistake(
    "attention that always returns the weights",
    "return_weights has no effect.",
    "What should come back when return_weights is False?",
)(_with(give=lambda output, weights, both: (output, weights)))
ex.mistake(
    "attention that returns the weights alone where both are asked for",
    "With return_weights=True two things should come back, the output first.",
    "What does the docstring say about the result?",
)(_with(give=lambda output, weights, both: weights if both else output))
ex.mistake(
    "attention that returns the weights transposed",
    "Row i of the weights should belong to query i.",
    "Which weights is the output made with?",
)(_with(give=lambda output, weights, both: _give(output, weights.mT, both)))


@ex.mistake(
    "attention scaled by the width of the values",
    "d_v stands where d_k should.",
    "Whose width are the dot products a sum over?",
)
def _(query, key, value, mask=None, return_weights=False):
    return _with(scale=lambda q, k: 1 / _root(value))(query, key, value, mask, return_weights)


@ex.mistake(
    "attention that returns the scores as weights",
    "The second result is what stood before the softmax.",
    "Do the rows of what you return sum to 1?",
)
def _(query, key, value, mask=None, return_weights=False):
    output = attention(query, key, value, mask)
    return _give(output, query @ key.mT / _root(query), return_weights)


@ex.mistake(
    "attention that returns the weights before the mask",
    "The output heeds the mask, the weights you return do not.",
    "Which weights is the output made with?",
)
def _(query, key, value, mask=None, return_weights=False):
    output = attention(query, key, value, mask)
    return _give(output, (query @ key.mT / _root(query)).softmax(-1), return_weights)


@ex.mistake(
    "attention with NaN in the weights where a query may see nothing",
    "The output has been mended, the weights have not.",
    "Where does the NaN arise, and what is made of it afterwards?",
)
def _(query, key, value, mask=None, return_weights=False):
    output = attention(query, key, value, mask)
    _, weights = _with(weigh=filled)(query, key, value, mask, True)
    return _give(output, weights, return_weights)


@ex.mistake(
    "attention with NaN in the output where a query may see nothing",
    "The weights you return have been mended, those that the output is made with have not.",
    "Where does the NaN arise, and what is made of it afterwards?",
)
def _(query, key, value, mask=None, return_weights=False):
    output = _with(weigh=filled)(query, key, value, mask)
    return _give(output, attention(query, key, value, mask, True)[1], return_weights)


@ex.mistake(
    "attention with query and key swapped",
    "The scores are transposed: row i should belong to query i.",
    "Which of the two stands on the left of the product?",
)
def _(query, key, value, mask=None, return_weights=False):
    scores = key @ query.mT / _root(query)
    weights = scores.softmax(-1) if mask is None else visible_softmax(scores, mask)
    return _give(weights @ value, weights, return_weights)


@ex.mistake(
    "causal attention where nobody asked for it",
    "Later keys are hidden, with a mask and without.",
    "What does the function do when mask is None?",
)
def _(query, key, value, mask=None, return_weights=False):
    causal = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril()
    return attention(query, key, value, causal if mask is None else causal & mask, return_weights)


@ex.alternative("einsum, with finfo.min and zeroed rows")
def _(query, key, value, mask=None, return_weights=False):
    scores = torch.einsum("bid,bjd->bij", query, key) / key.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    if mask is not None:
        weights = weights * mask.any(-1, keepdim=True)
    output = torch.einsum("bij,bjv->biv", weights, value)
    return (output, weights) if return_weights else output


@ex.alternative("PyTorch's scaled_dot_product_attention")
def _(query, key, value, mask=None, return_weights=False):
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if not return_weights:
        return output
    eye = torch.eye(key.shape[1], dtype=key.dtype).expand(key.shape[0], -1, -1)
    return output, F.scaled_dot_product_attention(query, key, eye, attn_mask=mask)


@ex.alternative("a loop over the batch and the queries")
def _(query, key, value, mask=None, return_weights=False):
    batch, n_q, n_k = query.shape[0], query.shape[1], key.shape[1]
    visible = torch.ones(batch, n_q, n_k, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask
    rows = []
    for b in range(batch):
        for i in range(n_q):
            scores = (key[b] * query[b, i]).sum(-1) / math.sqrt(query.shape[-1])
            weights = torch.zeros_like(scores)
            if visible[b, i].any():
                weights = torch.where(visible[b, i], scores, -INF).softmax(0)
            rows.append(weights)
    weights = torch.stack(rows).reshape(batch, n_q, n_k)
    return _give(weights @ value, weights, return_weights)


@ex.alternative("log-space: exp(s - logsumexp(s)), NaN to 0")
def _(query, key, value, mask=None, return_weights=False):
    scores = torch.matmul(query / math.sqrt(query.size(-1)), key.permute(0, 2, 1))
    if mask is not None:
        scores = torch.where(mask, scores, torch.tensor(-INF, dtype=scores.dtype))
    weights = torch.nan_to_num(torch.exp(scores - scores.logsumexp(-1, keepdim=True)), nan=0.0)
    return _give(torch.bmm(weights, value), weights, return_weights)
