"""Exercises of chapter 02: from softmax to batched attention with a mask."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise
from ..grading.observe import expect

INF = math.inf


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


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
        "weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True)); what is left to divide by?",
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
    near = _normal(g, 2, 3)
    far = _normal(g, 3, 4) * 3
    wide = torch.stack([_normal(g, 4), _normal(g, 4) - 300, _normal(g, 4) + 60])
    return [
        {"scores": near},
        {"scores": _normal(g, 5)},
        {"scores": far},
        {"scores": _normal(g, 3, 3)},
        {"scores": _normal(g, 4, 1)},
        {"scores": _normal(g, 2, 3, 4)},
        {"scores": _normal(g, 2, 2, 3, 4)},
        {"scores": wide},
        {"scores": torch.tensor([[1000.0, 999.0], [-1000.0, -1000.0]]) + _normal(g, 2, 2)},
        {"scores": torch.cat([_normal(g, 2, 3), torch.full((2, 1), -INF)], dim=1)},
        {"scores": torch.cat([_normal(g, 2, 2), torch.full((2, 1), 300.0)], dim=1)},
    ]


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
    weights = answer(torch.tensor([0.5, -1.0, 3.0, 2.0]))
    expect(weights.argsort(), torch.tensor([1, 0, 3, 2]))


@ex.behaviour("adding 1 to a score multiplies its weight, against the others, by e")
def _(answer):
    weights = answer(torch.tensor([1.0, 2.0, 4.0]))
    expect(weights[1:] / weights[:-1], torch.tensor([math.e, math.e**2]))


@ex.behaviour("scores of 1000 give no NaN")
def _(answer):
    case = {"scores": torch.tensor([[1000.0, 999.0]])}
    expect(answer.on(case), torch.tensor([[0.7310586, 0.2689414]]), case=case)


@ex.behaviour("a score of -inf gets the weight 0")
def _(answer):
    case = {"scores": torch.tensor([0.0, 0.0, -INF])}
    expect(answer.on(case), torch.tensor([0.5, 0.5, 0.0]), case=case)


ex.mistake(
    "softmax without subtracting the maximum",
    "exp of a large score is inf, and inf / inf is NaN.",
    "What may you subtract from every score of a row without changing the result?",
)(lambda scores: scores.exp() / scores.exp().sum(-1, keepdim=True))
ex.mistake(
    "softmax along the first dimension instead of the last",
    "Columns sum to 1 instead of rows.",
    "In `(..., n)`, which dimension holds the scores that compete with one another?",
)(lambda scores: scores.softmax(0))
ex.mistake(
    "softmax along dimension 1, counted from the front",
    "It is right for a matrix and wrong once a batch dimension stands before it.",
    "How do you name the last dimension, however many there are?",
)(lambda scores: scores.softmax(1 if scores.ndim > 1 else 0))
ex.mistake(
    "softmax over all entries at once",
    "The whole tensor sums to 1 instead of each row.",
    "Over which dimension should the sum run, and does it keep that dimension?",
)(lambda scores: scores.flatten().softmax(0).view_as(scores))
ex.mistake(
    "the scores divided by their sum, without exp",
    "Negative scores become negative weights.",
    "Which function makes any number positive and keeps the order?",
)(lambda scores: scores / scores.sum(-1, keepdim=True))
ex.mistake(
    "exp of the scores, not normalised",
    "The weights are positive but do not sum to 1.",
    "By what must each row be divided so that it sums to 1?",
)(lambda scores: scores.exp())
ex.mistake(
    "exp of the shifted scores, not normalised",
    "The largest weight of each row is 1; the row does not sum to 1.",
    "By what must each row be divided so that it sums to 1?",
)(lambda scores: (scores - scores.amax(-1, keepdim=True)).exp())
ex.mistake(
    "the logarithm of softmax",
    "Weights are probabilities, and a logarithm is never positive here.",
    "Should `log_softmax` be `softmax`, or is an exp missing at the end?",
)(lambda scores: scores.log_softmax(-1))
ex.mistake(
    "sigmoid of each score",
    "Sigmoid squashes each score alone: the scores do not compete.",
    "Where does the weight of one key depend on the scores of the others?",
)(lambda scores: scores.sigmoid())
ex.mistake(
    "softmax with one maximum for the whole tensor",
    "A row far below another row's maximum underflows to 0 / 0.",
    "Does each row subtract its own maximum (`dim=-1, keepdim=True`)?",
)(lambda scores: (e := (scores - scores.max()).exp()) / e.sum(-1, keepdim=True))
ex.mistake(
    "softmax of the negated scores",
    "The lowest score gets the highest weight.",
    "Which sign stands in the exponent?",
)(lambda scores: (-scores).softmax(-1))
ex.mistake(
    "softmax to the base 2",
    "Powers of 2 stand where powers of e should.",
    "Is it `exp` or `exp2`?",
)(lambda scores: (scores * math.log(2)).softmax(-1))
ex.mistake(
    "a one at the largest score, zeros elsewhere",
    "That is argmax, a hard choice; it has no useful gradient.",
    "How do the runners-up get a share?",
)(lambda scores: F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype) + 0 * scores.nan_to_num())  # fmt: skip  # noqa: E501
ex.mistake(
    "softmax with the scores clamped to a maximum",
    "Scores above the clamp all look alike.",
    "Is there a way to keep exp in range that changes nothing about the result?",
)(lambda scores: (e := scores.clamp(max=50).exp()) / e.sum(-1, keepdim=True))
ex.mistake(
    "softmax with the mean subtracted instead of the maximum",
    "One score far above the mean still overflows, and a score of -inf spoils its row.",
    "Which number of the row leaves no exponent above 0?",
)(lambda scores: (e := (scores - scores.mean(-1, keepdim=True)).exp()) / e.sum(-1, keepdim=True))
ex.mistake(
    "exp of the shifted scores divided by the sum of the unshifted ones",
    "Numerator and denominator are shifted differently.",
    "Do both sides of the fraction use the same exp?",
)(lambda scores: (scores - scores.amax(-1, keepdim=True)).exp() / scores.exp().sum(-1, keepdim=True))  # fmt: skip  # noqa: E501
ex.mistake(
    "exp divided by its Euclidean length",
    "The squares of the weights sum to 1, not the weights.",
    "Sum, or root of the sum of squares?",
)(lambda scores: F.normalize((scores - scores.amax(-1, keepdim=True)).exp(), dim=-1))
ex.mistake(
    "softmax of the absolute scores",
    "A strongly negative score is taken for a strong one.",
    "What should happen to the sign of a score?",
)(lambda scores: scores.abs().softmax(-1))
ex.mistake(
    "the softmax sum without keepdim",
    "The sum lost its dimension and is broadcast along the wrong one, or not at all.",
    "What shape does `exp.sum(dim=-1)` have, and what shape must it have to divide the rows?",
)(lambda scores: (e := (scores - scores.amax(-1, keepdim=True)).exp()) / e.sum(-1))
ex.mistake(
    "the maximum without keepdim",
    "The maximum lost its dimension and is subtracted from the wrong rows, or not at all.",
    "What shape does `scores.amax(dim=-1)` have, and what shape must it have?",
)(lambda scores: (e := (scores - scores.amax(-1)).exp()) / e.sum(-1, keepdim=True))

ex.alternative("torch.softmax")(lambda scores: torch.softmax(scores, dim=-1))
ex.alternative("exp(s - logsumexp(s))")(
    lambda scores: (scores - scores.logsumexp(-1, keepdim=True)).exp()
)
ex.alternative("exp of log_softmax")(lambda scores: F.log_softmax(scores, -1).exp())


@ex.alternative("a loop over rows")
def _(scores):
    flat = scores.reshape(-1, scores.shape[-1])
    rows = []
    for row in flat:
        exp = torch.exp(row - row.max())
        rows.append(exp / exp.sum())
    return torch.stack(rows).reshape(scores.shape)


@ex.alternative("in float64, and back")
def _(scores):
    wide = scores.double()
    return (
        torch.exp(wide - wide.max(-1, keepdim=True).values)
        .div(torch.exp(wide - wide.max(-1, keepdim=True).values).sum(-1, keepdim=True))
        .to(scores.dtype)
    )


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
        "One query, n keys: how many matches are there, and which product gives all of them at once?",
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
        return {
            "query": _normal(g, d_k),
            "keys": _normal(g, n, d_k),
            "values": _normal(g, n, d_v),
            **options,
        }

    return [
        case(2, 3, 1),
        case(3, 2, 2, temperature=0.5),
        case(3, 3, 3),
        case(4, 4, 4, temperature=2.0),
        case(1, 3, 2),
        case(5, 3, 4, temperature=0.1),
        case(6, 2, 3, temperature=10.0),
        case(4, 3, 2, temperature=1e-3),
        case(7, 9, 5, temperature=3.0),
    ]


@ex.behaviour("if all keys match alike, the result is the mean of the values")
def _(answer):
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    expect(answer(torch.ones(2), torch.ones(3, 2), values), torch.tensor([3.0, 3.0]))


@ex.behaviour("a very low temperature gives the value of the best key")
def _(answer):
    keys = torch.eye(3)
    values = torch.tensor([[1.0], [2.0], [3.0]])
    got = answer(torch.tensor([0.1, 0.9, 0.3]), keys, values, temperature=1e-3)
    expect(got, torch.tensor([2.0]))


@ex.behaviour("a very high temperature gives the mean of the values")
def _(answer):
    values = torch.tensor([[1.0], [2.0], [6.0]])
    got = answer(torch.tensor([0.1, 0.9, 0.3]), torch.eye(3), values, temperature=1e6)
    expect(got, torch.tensor([3.0]))


@ex.behaviour("the result lies between the smallest and the largest value")
def _(answer):
    values = torch.tensor([[-1.0], [0.5], [2.0]])
    got = answer(torch.tensor([2.0, -1.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]]), values)  # fmt: skip  # noqa: E501
    expect(bool(-1 <= got.item() <= 2), True)


@ex.behaviour("a longer query makes the choice sharper")
def _(answer):
    keys, values = torch.eye(2), torch.tensor([[0.0], [1.0]])
    soft, sharp = (answer(torch.tensor([0.0, s]), keys, values).item() for s in (1.0, 3.0))
    expect(bool(sharp > soft > 0.5), True)


@ex.behaviour("keys and values that change places together change nothing")
def _(answer):
    g = torch.Generator().manual_seed(3)
    query, keys, values = _normal(g, 3), _normal(g, 4, 3), _normal(g, 4, 2)
    order = torch.tensor([2, 0, 3, 1])
    expect(answer(query, keys[order], values[order]), answer(query, keys, values))


ex.mistake(
    "a look-up that multiplies by the temperature",
    "A low temperature makes it softer instead of sharper.",
    "As T goes to 0, should the differences between the matches grow or shrink?",
)(lambda query, keys, values, temperature=1.0: (keys @ query * temperature).softmax(-1) @ values)
ex.mistake(
    "a look-up without the temperature",
    "The argument is never used.",
    "Where does `temperature` stand in the formula?",
)(lambda query, keys, values, temperature=1.0: (keys @ query).softmax(-1) @ values)
ex.mistake(
    "a look-up with the temperature applied after the softmax",
    "The weights no longer sum to 1.",
    "Does the temperature act on the matches or on the weights?",
)(lambda query, keys, values, temperature=1.0: (keys @ query).softmax(-1) / temperature @ values)
ex.mistake(
    "a hard look-up: the value of the best key",
    "That is an ordinary dictionary; the other values never count.",
    "How does every value get its share?",
)(lambda query, keys, values, temperature=1.0: values[(keys @ query).argmax()])
ex.mistake(
    "a look-up without softmax",
    "The matches themselves are used as weights: they may be negative and do not sum to 1.",
    "What turns the matches into weights?",
)(lambda query, keys, values, temperature=1.0: keys @ query / temperature @ values)
ex.mistake(
    "a look-up with exp but without dividing by its sum",
    "The weights do not sum to 1.",
    "What does softmax do after exp?",
)(lambda query, keys, values, temperature=1.0: (keys @ query / temperature).exp() @ values)
ex.mistake(
    "the weights, not the mixture of the values",
    "The values are never used.",
    "What is averaged with the weights?",
)(lambda query, keys, values, temperature=1.0: (keys @ query / temperature).softmax(-1))
ex.mistake(
    "a mixture of the keys",
    "Keys are what the query is compared with; values are what comes back.",
    "Which of the two tensors should be averaged?",
)(lambda query, keys, values, temperature=1.0: (keys @ query / temperature).softmax(-1) @ keys)
ex.mistake(
    "the mean of the values",
    "Every value counts alike, whatever the query asks.",
    "Where do query and keys enter?",
)(lambda query, keys, values, temperature=1.0: values.mean(0))
ex.mistake(
    "the sum of the values",
    "Every value counts 1: the weights sum to n.",
    "Where do query and keys enter?",
)(lambda query, keys, values, temperature=1.0: values.sum(0))
ex.mistake(
    "a look-up by cosine similarity",
    "Keys and query are brought to length 1 first, so a longer key matches no better.",
    "Is the match a dot product or an angle?",
)(
    lambda query, keys, values, temperature=1.0: (
        (F.cosine_similarity(keys, query[None], dim=-1) / temperature).softmax(-1) @ values
    )
)
ex.mistake(
    "a look-up by distance",
    "The nearest key wins instead of the one with the largest dot product.",
    "Is the match a dot product or a distance?",
)(
    lambda query, keys, values, temperature=1.0: (
        (-(keys - query).square().sum(-1) / temperature).softmax(-1) @ values
    )
)
ex.mistake(
    "a look-up that also divides by √d_k",
    "The temperature alone scales the matches here; √d_k comes in the next exercise.",
    "What stands under the fraction in the formula of this exercise?",
)(
    lambda query, keys, values, temperature=1.0: (
        (keys @ query / temperature / math.sqrt(keys.shape[-1])).softmax(-1) @ values
    )
)
ex.mistake(
    "a look-up with the root of the temperature",
    "√T stands where T should.",
    "Which power of T divides the matches?",
)(
    lambda query, keys, values, temperature=1.0: (
        (keys @ query / math.sqrt(temperature)).softmax(-1) @ values
    )
)
ex.mistake(
    "a look-up with the temperature squared",
    "T² stands where T should.",
    "Is the temperature applied twice?",
)(lambda query, keys, values, temperature=1.0: (keys @ query / temperature**2).softmax(-1) @ values)
ex.mistake(
    "a look-up of the worst match",
    "The sign of the matches is turned round.",
    "Which sign stands before the matches?",
)(lambda query, keys, values, temperature=1.0: (-keys @ query / temperature).softmax(-1) @ values)
ex.mistake(
    "a look-up that compares the query with the values",
    "The values are both what is asked and what comes back; the keys are never used.",
    "What is the query compared with?",
)(lambda query, keys, values, temperature=1.0: (values @ query / temperature).softmax(-1) @ values)

ex.alternative("einsum")(
    lambda query, keys, values, temperature=1.0: torch.einsum(
        "j,jv->v", torch.softmax(torch.einsum("d,jd->j", query, keys) / temperature, 0), values
    )
)
ex.alternative("scaled_dot_product_attention with its own scale")(
    lambda query, keys, values, temperature=1.0: F.scaled_dot_product_attention(
        query[None], keys, values, scale=1 / temperature
    )[0]
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

Row i holds the scores of query i against all keys. The factor $1/\sqrt{d_k}$ keeps the scores' spread
the same for every width d_k. Queries and keys may have batch dimensions in front.
""",
    hints=(
        "Which two dimensions does the product sum over, and which remain?",
        "`@` multiplies the last two dimensions and carries the others along; `.T` turns round all "
        "of them, so it is not what you want for a batch.",
        "query @ key.transpose(-2, -1) has shape (..., n_q, n_k); what is d_k in terms of query.shape?",
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
    return [{"query": _normal(g, *q), "key": _normal(g, *k)} for q, k in sizes]


@ex.behaviour("row i holds query i against every key")
def _(answer):
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    key = torch.tensor([[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    want = torch.tensor([[2.0, 4.0, 6.0], [3.0, 5.0, 7.0]]) / math.sqrt(2)
    case = {"query": query, "key": key}
    expect(answer.on(case), want, case=case)


@ex.behaviour("the scores' spread is 1 at every width d_k")
def _(answer):
    for d_k in (4, 64, 256):
        g = torch.Generator().manual_seed(d_k)
        spread = answer(_normal(g, 200, d_k), _normal(g, 200, d_k)).std()
        if not 0.9 < spread < 1.1:
            expect(spread, torch.tensor(1.0))


@ex.behaviour("changing one key changes one column")
def _(answer):
    g = torch.Generator().manual_seed(5)
    query, key = _normal(g, 3, 4), _normal(g, 3, 4)
    other = key.clone()
    other[1] += 1
    changed = (answer(query, other) - answer(query, key)).abs() > 1e-6
    expect(changed, torch.tensor([[False, True, False]] * 3))


@ex.behaviour("doubling a query doubles its scores")
def _(answer):
    g = torch.Generator().manual_seed(6)
    query, key = _normal(g, 3, 4), _normal(g, 2, 4)
    expect(answer(2 * query, key), 2 * answer(query, key))


@ex.behaviour("batch elements do not meet")
def _(answer):
    g = torch.Generator().manual_seed(7)
    query, key = _normal(g, 3, 3, 3), _normal(g, 3, 3, 3)
    expect(answer(query, key)[1], answer(query[1], key[1]))


ex.mistake(
    "the scores without 1/√d_k",
    "Their variance grows as d_k, and softmax of large scores is nearly a hard choice.",
    "What should the scores be divided by?",
)(lambda query, key: query @ key.mT)
ex.mistake(
    "the scores divided by d_k",
    "The root is missing: wide keys make all scores nearly equal.",
    "The variance of a sum of d_k products is d_k; what is its standard deviation?",
)(lambda query, key: query @ key.mT / query.shape[-1])
ex.mistake(
    "the scores multiplied by √d_k",
    "The factor is upside down.",
    "Should wider keys make the scores larger or keep them as they are?",
)(lambda query, key: query @ key.mT * math.sqrt(query.shape[-1]))
ex.mistake(
    "the scores transposed, K Qᵀ",
    "Row i holds key i against all queries.",
    "Which of the two stands on the left of the product?",
)(lambda query, key: key @ query.mT / math.sqrt(query.shape[-1]))
ex.mistake(
    "the scores divided by √n_k",
    "The number of keys stands where the width of a key should.",
    "Which entry of `key.shape` is d_k?",
)(lambda query, key: query @ key.mT / math.sqrt(key.shape[-2]))
ex.mistake(
    "the scores divided by √n_q",
    "The number of queries stands where the width should.",
    "Which entry of `query.shape` is d_k?",
)(lambda query, key: query @ key.mT / math.sqrt(query.shape[-2]))
ex.mistake(
    "the scores divided by the root of the first dimension",
    "`shape[0]` is the batch or the length, not the width.",
    "Which entry of `query.shape`, counted from the end, is d_k?",
)(lambda query, key: query @ key.mT / math.sqrt(query.shape[0]))
ex.mistake(
    "the scores with all dimensions turned round (`.T`)",
    "`.T` reverses every dimension, so the batch ends up inside the matrix.",
    "Which call swaps only the last two dimensions?",
)(lambda query, key: query @ key.permute(*reversed(range(key.ndim))) / math.sqrt(query.shape[-1]))
ex.mistake(
    "the scores with a fixed √64",
    "The width of the paper is written into the code.",
    "Where can d_k be read off the inputs?",
)(lambda query, key: query @ key.mT / 8)
ex.mistake(
    "cosine similarities",
    "Queries and keys are brought to length 1, which loses how strongly they match.",
    "Does the formula normalise the rows?",
)(lambda query, key: F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT)
ex.mistake(
    "the softmax of the scores",
    "Softmax is a step too far: scores come first.",
    "Does the formula of this exercise contain a softmax?",
)(lambda query, key: (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1))
ex.mistake(
    "distances instead of dot products",
    "The nearest key scores highest, instead of the most aligned one.",
    "Which product compares a query with a key?",
)(lambda query, key: -torch.cdist(query, key) / math.sqrt(query.shape[-1]))
ex.mistake(
    "the scores' absolute values",
    "A key that points away from the query is taken for a match.",
    "What does a negative score say?",
)(lambda query, key: (query @ key.mT).abs() / math.sqrt(query.shape[-1]))
ex.mistake(
    "the scores divided by the fourth root of d_k",
    "Only one of query and key was scaled by d_k^(1/4), or the root was taken twice.",
    "Which power of d_k stands under the fraction?",
)(lambda query, key: query @ key.mT / query.shape[-1] ** 0.25)
ex.mistake(
    "the queries compared with one another, Q Qᵀ",
    "The keys are never used.",
    "What stands on the right of the product?",
)(lambda query, key: query @ query.mT / math.sqrt(query.shape[-1]))
ex.mistake(
    "query and key multiplied entry by entry",
    "A dot product sums over d_k and pairs every query with every key.",
    "Is it `*` or `@`?",
)(lambda query, key: query * key / math.sqrt(query.shape[-1]))
ex.mistake(
    "the negated scores",
    "The best match gets the lowest score.",
    "Which sign does the formula have?",
)(lambda query, key: -query @ key.mT / math.sqrt(query.shape[-1]))

ex.alternative("einsum")(
    lambda query, key: torch.einsum("...id,...jd->...ij", query, key) / math.sqrt(key.shape[-1])
)
ex.alternative("query and key scaled by d_k^(1/4) each")(
    lambda query, key: (query * query.shape[-1] ** -0.25) @ (key * key.shape[-1] ** -0.25).mT
)
ex.alternative("broadcast and sum")(
    lambda query, key: (
        (query[..., :, None, :] * key[..., None, :, :]).sum(-1) * query.shape[-1] ** -0.5
    )
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
        "query, key, value = x @ w_q, x @ w_k, x @ w_v; weights come from the two exercises before.",
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
            "x": _normal(g, batch, n, d_model),
            "w_q": _normal(g, d_model, d_k),
            "w_k": _normal(g, d_model, d_k),
            "w_v": _normal(g, d_model, d_v),
        }

    return [
        case(1, 2, 3, 2, 2),
        case(1, 3, 3, 3, 3),
        case(2, 4, 4, 4, 4),
        case(2, 1, 3, 2, 4),
        case(1, 5, 6, 2, 3),
        case(3, 3, 4, 8, 2),
        case(2, 3, 2, 5, 5),
        case(3, 4, 5, 3, 6),
    ]


def _project(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x @ w_q, x @ w_k, x @ w_v


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.mT * scale).softmax(-1) @ v


def _example(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return _normal(g, 2, 4, 3), _normal(g, 3, 2), _normal(g, 3, 2), _normal(g, 3, 5)


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


ex.mistake(
    "self-attention without 1/√d_k",
    "The scores are too spread out, and softmax is nearly a hard choice.",
    "What are the scores divided by?",
)(lambda x, w_q, w_k, w_v: _attend(*_project(x, w_q, w_k, w_v), scale=1))
ex.mistake(
    "self-attention scaled by d_model",
    "The width of a token stands where the width of a key should.",
    "Is √d_k read off `x` or off the query?",
)(lambda x, w_q, w_k, w_v: _attend(*_project(x, w_q, w_k, w_v), scale=x.shape[-1] ** -0.5))
ex.mistake(
    "self-attention scaled by the length",
    "The number of tokens stands where the width of a key should.",
    "Which entry of `query.shape` is d_k?",
)(lambda x, w_q, w_k, w_v: _attend(*_project(x, w_q, w_k, w_v), scale=x.shape[1] ** -0.5))
ex.mistake(
    "self-attention divided by d_k, without the root",
    "The root is missing, so the weights are too flat.",
    "The variance of the scores is d_k; what is their standard deviation?",
)(lambda x, w_q, w_k, w_v: _attend(*_project(x, w_q, w_k, w_v), scale=1 / w_q.shape[-1]))
ex.mistake(
    "self-attention with query and key swapped",
    "The score of i for j is read as that of j for i.",
    "Which of the two owns the rows of the score matrix?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_k, x @ w_q, x @ w_v))
ex.mistake(
    "self-attention with the tokens as values",
    "W_V is never used.",
    "What is averaged: the tokens, or their projection by w_v?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_k, x))
ex.mistake(
    "self-attention with the keys as values",
    "W_V is never used.",
    "Which of the three projections comes back?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_k, x @ w_k))
ex.mistake(
    "self-attention with the tokens as keys and queries",
    "W_Q and W_K are never used.",
    "What are Q and K made of?",
)(lambda x, w_q, w_k, w_v: _attend(x, x, x @ w_v))
ex.mistake(
    "self-attention with one projection for query and key",
    "W_Q serves for both, or W_K does: i looks at j exactly as j looks at i.",
    "Does each of the three matrices appear once?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q, x @ w_q, x @ w_v))
ex.mistake(
    "self-attention with W_K for query and key",
    "W_Q is never used: i looks at j exactly as j looks at i.",
    "Does each of the three matrices appear once?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_k, x @ w_k, x @ w_v))
ex.mistake(
    "self-attention with transposed weight matrices",
    "The weights have shape (d_model, d_k): no transpose is needed. torch.nn.Linear stores them "
    "the other way round.",
    "What shape does `x @ w_q` have?",
)(lambda x, w_q, w_k, w_v: _attend(x @ w_q.mT, x @ w_k.mT, x @ w_v.mT))
ex.mistake(
    "self-attention with softmax over the queries",
    "Columns of weights sum to 1 instead of rows.",
    "Along which dimension do the keys lie?",
)(
    lambda x, w_q, w_k, w_v: (
        ((x @ w_q) @ (x @ w_k).mT / math.sqrt(w_q.shape[-1])).softmax(-2) @ (x @ w_v)
    )
)
ex.mistake(
    "self-attention with softmax over the batch",
    "The elements of the batch compete with one another.",
    "Along which dimension do the keys lie?",
)(
    lambda x, w_q, w_k, w_v: (
        ((x @ w_q) @ (x @ w_k).mT / math.sqrt(w_q.shape[-1])).softmax(0) @ (x @ w_v)
    )
)
ex.mistake(
    "self-attention without softmax",
    "The scores themselves are used as weights.",
    "What turns scores into weights that sum to 1?",
)(lambda x, w_q, w_k, w_v: (x @ w_q) @ (x @ w_k).mT / math.sqrt(w_q.shape[-1]) @ (x @ w_v))
ex.mistake(
    "self-attention under a causal mask",
    "Later tokens are hidden; nothing in this exercise asks for that.",
    "May token 0 look at token 1 here?",
)(
    lambda x, w_q, w_k, w_v: F.scaled_dot_product_attention(
        x @ w_q, x @ w_k, x @ w_v, is_causal=True
    )
)
ex.mistake(
    "the attention weights, not the output",
    "The values are never used.",
    "What is averaged with the weights?",
)(lambda x, w_q, w_k, w_v: ((x @ w_q) @ (x @ w_k).mT / math.sqrt(w_q.shape[-1])).softmax(-1))
ex.mistake(
    "the values alone",
    "Every token keeps its own value: nobody has looked at anybody.",
    "Where do query and key enter?",
)(lambda x, w_q, w_k, w_v: x @ w_v)
ex.mistake(
    "self-attention with the softmax before the scale",
    "1/√d_k is applied to the weights, which no longer sum to 1.",
    "Does the scale act on the scores or on the weights?",
)(lambda x, w_q, w_k, w_v: ((x @ w_q) @ (x @ w_k).mT).softmax(-1) / math.sqrt(w_q.shape[-1]) @ (x @ w_v))  # fmt: skip  # noqa: E501
ex.mistake(
    "self-attention with its input added",
    "That is a residual connection, which comes in chapter 05.",
    "Does the formula add x to the result?",
)(lambda x, w_q, w_k, w_v: (o := _attend(*_project(x, w_q, w_k, w_v))) + (x if x.shape == o.shape else x @ w_v))  # fmt: skip  # noqa: E501

ex.alternative("scaled_dot_product_attention")(
    lambda x, w_q, w_k, w_v: F.scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v)
)
ex.alternative("the two matrices of the scores multiplied first")(
    lambda x, w_q, w_k, w_v: (
        torch.softmax(x @ (w_q @ w_k.mT) @ x.mT / math.sqrt(w_k.shape[1]), -1) @ x @ w_v
    )
)
ex.alternative("the values projected last")(
    lambda x, w_q, w_k, w_v: (
        (torch.softmax((x @ w_q) @ (x @ w_k).mT / math.sqrt(w_k.shape[1]), -1) @ x) @ w_v
    )
)
ex.alternative("F.linear and bmm")(
    lambda x, w_q, w_k, w_v: torch.bmm(
        F.softmax(torch.bmm(F.linear(x, w_q.T), F.linear(x, w_k.T).mT) / w_q.shape[1] ** 0.5, -1),
        F.linear(x, w_v.T),
    )
)


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
Some keys must not be seen: padding, or the future. A mask says which ones may: **True = may attend**.
An invisible key gets the weight 0 and the others share the 1 among themselves, exactly as if it were
not there. A row in which nothing is visible gets weights 0 everywhere, never NaN.

The mask broadcasts against the scores: `(n_q, n_k)`, `(batch, 1, n_k)` and so on.
""",
    hints=(
        "Which score makes exp exactly 0?",
        "-inf for the invisible scores, before the softmax. A row of nothing but -inf gives NaN: "
        "find those rows and set them to 0.",
        "weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1); which rows are NaN now?",
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
    def mask(*shape: int, share: float = 0.6) -> Tensor:
        visible = torch.rand(*shape, generator=g) < share
        visible[..., 0] |= ~visible.any(-1)  # at least one visible key a row
        return visible

    full = torch.ones(2, 3, dtype=torch.bool)
    first = full.clone()
    first[0, 2] = first[1, 0] = False
    with_empty = mask(3, 4)
    with_empty[1] = False
    huge = _normal(g, 2, 3).masked_fill(~first, 500.0)
    low = _normal(g, 2, 3) - 200.0
    return [
        {"scores": _normal(g, 2, 3), "mask": first},
        {"scores": _normal(g, 2, 3), "mask": full},
        {"scores": _normal(g, 3, 3), "mask": torch.ones(3, 3, dtype=torch.bool).tril()},
        {"scores": _normal(g, 3, 4), "mask": with_empty},
        {"scores": huge, "mask": first},
        {"scores": low, "mask": first},
        {"scores": 100 * _normal(g, 2, 3).round() - 2e4, "mask": first},
        {"scores": _normal(g, 4, 4) * 3, "mask": mask(4, 4)},
        {"scores": _normal(g, 2, 3, 4), "mask": mask(3, 4)},
        {"scores": _normal(g, 3, 3, 5), "mask": mask(3, 1, 5)},
        {"scores": _normal(g, 2, 2, 3, 3), "mask": mask(2, 1, 3, 3)},
        {"scores": _normal(g, 3, 2, 5), "mask": mask(3, 2, 5)},
    ]


@ex.behaviour("an invisible key gets the weight 0, exactly")
def _(answer):
    mask = torch.tensor([[True, True, False], [False, True, True]])
    weights = answer(torch.tensor([[1.0, 2.0, 30.0], [30.0, 1.0, 0.0]]), mask)
    if (weights[~mask] != 0).any():
        expect(weights[~mask], torch.zeros(2))
        expect(bool((weights[~mask] == 0).all()), True)


@ex.behaviour("the visible weights of each row sum to 1")
def _(answer):
    mask = torch.tensor([[True, True, False], [False, True, True]])
    weights = answer(torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0]]), mask)
    expect(weights.sum(-1), torch.ones(2))


@ex.behaviour("it is softmax of the row without its invisible keys")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 9.0, 2.0]]), "mask": torch.tensor([[True, False, True]])}
    expect(answer.on(case), torch.tensor([[0.2689414, 0.0, 0.7310586]]), case=case)


@ex.behaviour("with everything visible it is plain softmax")
def _(answer):
    scores = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    expect(answer(scores, torch.ones(2, 2, dtype=torch.bool)), scores.softmax(-1))


@ex.behaviour("a row without a visible key is 0, not NaN")
def _(answer):
    case = {
        "scores": torch.tensor([[1.0, 2.0], [0.0, 3.0]]),
        "mask": torch.tensor([[False, False], [True, True]]),
    }
    want = torch.tensor([[0.0, 0.0], [0.0474259, 0.9525741]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("an invisible score changes nothing, however large")
def _(answer):
    mask = torch.tensor([[True, True, False]])
    scores = torch.tensor([[0.3, -0.2, 0.0]])
    large = torch.tensor([[0.3, -0.2, 1e4]])
    case = {"scores": large, "mask": mask}
    expect(answer.on(case), answer(scores, mask), case=case)


@ex.behaviour("very low visible scores still share the 1")
def _(answer):
    case = {
        "scores": torch.tensor([[-2e4, -2e4, 0.0]]),
        "mask": torch.tensor([[True, True, False]]),
    }
    expect(answer.on(case), torch.tensor([[0.5, 0.5, 0.0]]), case=case)


def _empty(mask: Tensor) -> Tensor:
    return ~mask.any(-1, keepdim=True)


def _right(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -INF).softmax(-1).masked_fill(_empty(mask), 0.0)


ex.mistake(
    "softmax with the mask's polarity swapped",
    "True means may attend, and here the visible keys are hidden.",
    "Which keys does `masked_fill` fill: those where its argument is True or False?",
)(lambda scores, mask: _right(scores, ~mask.expand(scores.shape)))
ex.mistake(
    "softmax with the mask's polarity swapped, NaN where nothing is left",
    "True means may attend, and here the visible keys are hidden.",
    "Which keys does `masked_fill` fill: those where its argument is True or False?",
)(lambda scores, mask: scores.masked_fill(mask, -INF).softmax(-1))
ex.mistake(
    "softmax, masked afterwards",
    "The invisible keys have already taken their share, so the rest does not sum to 1.",
    "Should the mask act before or after the softmax?",
)(lambda scores, mask: scores.softmax(-1) * mask)
ex.mistake(
    "softmax of the scores multiplied by the mask",
    "A score of 0 is not invisible: exp(0) = 1.",
    "Which score makes exp exactly 0?",
)(lambda scores, mask: (scores * mask).softmax(-1))
ex.mistake(
    "softmax of the scores multiplied by the mask, empty rows 0",
    "A score of 0 is not invisible: exp(0) = 1.",
    "Which score makes exp exactly 0?",
)(lambda scores, mask: (scores * mask).softmax(-1).masked_fill(_empty(mask), 0.0))
ex.mistake(
    "masked softmax with NaN where nothing is visible",
    "A row of nothing but -inf is 0 / 0.",
    "Which rows have no visible key, and what should stand there?",
)(lambda scores, mask: scores.masked_fill(~mask, -INF).softmax(-1))
ex.mistake(
    "masked softmax with equal weights where nothing is visible",
    "A large negative number (-1e9, finfo.min) in every place of a row is the same number everywhere.",
    "What are the weights of a row in which all scores are equal?",
)(lambda scores, mask: scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1))
ex.mistake(
    "masked softmax with -1e4 instead of -inf",
    "A visible score can be as low as that, and then the invisible key counts.",
    "Is there a number below every other?",
)(lambda scores, mask: scores.masked_fill(~mask, -1e4).softmax(-1).masked_fill(_empty(mask), 0.0))
ex.mistake(
    "masked softmax with -10 instead of -inf",
    "exp(-10) is small but not 0: the invisible keys leak.",
    "Which score makes exp exactly 0?",
)(lambda scores, mask: scores.masked_fill(~mask, -10.0).softmax(-1).masked_fill(_empty(mask), 0.0))
ex.mistake(
    "masked softmax that subtracts a fixed number from the invisible scores",
    "An invisible score that is large enough comes back.",
    "Is the invisible score replaced, or only lowered?",
)(lambda scores, mask: (scores - 100.0 * ~mask).softmax(-1).masked_fill(_empty(mask), 0.0))
ex.mistake(
    "softmax, masked afterwards and divided by what is left",
    "It is right on ordinary numbers; where an invisible score towers above, the visible weights "
    "have underflowed to 0 before they are divided.",
    "What should the largest score be taken over: all keys, or the visible ones?",
)(
    lambda scores, mask: (
        (w := scores.softmax(-1) * mask)
        / w.sum(-1, keepdim=True).masked_fill(_empty(mask), 1.0)
    )
)  # fmt: skip
ex.mistake(
    "softmax, masked afterwards and divided by what is left plus a small number",
    "Where an invisible score towers above, the visible weights have underflowed to 0.",
    "What should the largest score be taken over: all keys, or the visible ones?",
)(lambda scores, mask: (w := scores.softmax(-1) * mask) / w.sum(-1, keepdim=True).clamp(min=1e-9))
ex.mistake(
    "softmax without the mask",
    "The mask is never used.",
    "Where does `mask` enter?",
)(lambda scores, mask: scores.softmax(-1))
ex.mistake(
    "masked softmax over the queries",
    "Columns sum to 1 instead of rows.",
    "Along which dimension do the keys lie?",
)(lambda scores, mask: scores.masked_fill(~mask, -INF).softmax(-2).nan_to_num(0.0))
ex.mistake(
    "masked softmax without the maximum subtracted",
    "exp of very low or very high scores leaves float32.",
    "What may be subtracted from every score of a row without changing the result?",
)(
    lambda scores, mask: (
        (e := scores.exp() * mask) / e.sum(-1, keepdim=True).masked_fill(_empty(mask), 1.0)
    )
)
ex.mistake(
    "masked softmax times -inf",
    "0 · inf is NaN: the visible scores are spoiled too.",
    "What is (1 - mask) · (-inf) where the mask is 1?",
)(lambda scores, mask: (scores + (1 - mask.to(scores.dtype)) * -INF).softmax(-1))
ex.alternative("-inf, then nan_to_num")(
    lambda scores, mask: torch.where(mask, scores, -INF).softmax(-1).nan_to_num(0.0)
)
ex.alternative("finfo.min, then the mask again")(
    lambda scores, mask: (
        scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    )
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

- `mask`, if given, is bool and broadcasts to `(batch, n_q, n_k)`; **True = may attend**. A query that
  may see nothing gets the output 0 and weights 0.
- With `return_weights=True` it returns `(output, weights)`, otherwise the output alone.
- n_q and n_k may differ, and so may d_k and d_v.

This is `course_lib.attention` for one head; after it you may use the real one.
""",
    hints=(
        "You have written all the parts: which of your functions gives the scores, which the weights?",
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


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, n_q: int, n_k: int, d_k: int, d_v: int, **options: object) -> Case:
        return {
            "query": _normal(g, batch, n_q, d_k),
            "key": _normal(g, batch, n_k, d_k),
            "value": _normal(g, batch, n_k, d_v),
            **options,
        }

    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    ragged = torch.arange(4) < torch.tensor([4, 2])[:, None]  # (batch, n_k)
    holes = torch.rand(3, 4, 5, generator=g) < 0.6
    holes[..., 0] = True
    empty = holes.clone()
    empty[1, 2] = False
    return [
        case(1, 2, 2, 2, 1),
        case(1, 2, 3, 2, 2),
        case(2, 3, 3, 3, 3),
        case(1, 3, 3, 4, 2, return_weights=True),
        case(2, 4, 4, 4, 4, mask=causal),
        case(2, 3, 4, 5, 2, mask=ragged[:, None, :]),
        case(2, 1, 5, 2, 3),
        case(3, 4, 5, 3, 3, mask=empty),
        case(3, 4, 5, 6, 2, mask=empty, return_weights=True),
        case(3, 4, 5, 16, 2, mask=holes),
        case(3, 3, 3, 3, 3),
    ]


def _qkv(seed: int, *, n_q: int = 3, n_k: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return _normal(g, 2, n_q, 5), _normal(g, 2, n_k, 5), _normal(g, 2, n_k, 3)


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


def _wrong(*, scale=None, weigh=None, mix=None):
    """Attention with one step replaced."""

    def function(query, key, value, mask=None, return_weights=False):
        by = query.shape[-1] ** -0.5 if scale is None else scale(query, key, value)
        scores = query @ key.mT * by
        if weigh is not None:
            weights = weigh(scores, mask)
        else:
            weights = scores.softmax(-1) if mask is None else _right(scores, mask)
        output = weights @ value if mix is None else mix(weights, query, key, value)
        return _give(output, weights, return_weights)

    return function


def _or_plain(masked):
    """A way to weigh that is plain softmax where there is no mask."""
    return lambda scores, mask: scores.softmax(-1) if mask is None else masked(scores, mask)


ex.mistake(
    "attention without the 1/√d_k scale",
    "The scores are too spread out, and softmax is nearly a hard choice.",
    "What are the scores divided by?",
)(_wrong(scale=lambda q, k, v: 1.0))
ex.mistake(
    "attention divided by d_k, without the root",
    "The weights are too flat.",
    "The variance of the scores is d_k; what is their standard deviation?",
)(_wrong(scale=lambda q, k, v: 1 / q.shape[-1]))
ex.mistake(
    "attention scaled by the width of the values",
    "d_v stands where d_k should.",
    "Whose width are the dot products a sum over?",
)(_wrong(scale=lambda q, k, v: v.shape[-1] ** -0.5))
ex.mistake(
    "attention scaled by the number of keys",
    "√n_k stands where √d_k should.",
    "Which entry of `key.shape` is d_k?",
)(_wrong(scale=lambda q, k, v: k.shape[-2] ** -0.5))
ex.mistake(
    "attention scaled by the number of queries",
    "√n_q stands where √d_k should.",
    "Which entry of `query.shape` is d_k?",
)(_wrong(scale=lambda q, k, v: q.shape[-2] ** -0.5))
ex.mistake(
    "attention multiplied by √d_k",
    "The scale is upside down.",
    "Should wider keys make the scores larger?",
)(_wrong(scale=lambda q, k, v: q.shape[-1] ** 0.5))
ex.mistake(
    "attention without the mask",
    "The mask is never used.",
    "Where does `mask` enter, and is it passed on?",
)(_wrong(weigh=lambda scores, mask: scores.softmax(-1)))
ex.mistake(
    "attention with the mask's polarity swapped",
    "True means may attend, and here the visible keys are hidden.",
    "Which keys does `masked_fill` fill: those where its argument is True or False?",
)(_wrong(weigh=_or_plain(lambda scores, mask: _right(scores, ~mask.expand(scores.shape)))))
ex.mistake(
    "attention with the mask's polarity swapped, NaN where nothing is left",
    "True means may attend, and here the visible keys are hidden.",
    "Which keys does `masked_fill` fill: those where its argument is True or False?",
)(_wrong(weigh=_or_plain(lambda scores, mask: scores.masked_fill(mask, -INF).softmax(-1))))
ex.mistake(
    "attention masked after the softmax",
    "The hidden keys have already taken their share, so the rest does not sum to 1.",
    "Should the mask act before or after the softmax?",
)(_wrong(weigh=_or_plain(lambda scores, mask: scores.softmax(-1) * mask)))
ex.mistake(
    "attention with the scores multiplied by the mask",
    "A score of 0 is not hidden: exp(0) = 1.",
    "Which score makes exp exactly 0?",
)(_wrong(weigh=_or_plain(lambda scores, mask: (scores * mask).softmax(-1))))
ex.mistake(
    "attention with softmax over the queries",
    "Columns of weights sum to 1 instead of rows.",
    "Along which dimension do the keys lie?",
)(_wrong(weigh=lambda s, m: (s if m is None else s.masked_fill(~m, -INF)).softmax(-2).nan_to_num(0.0)))  # fmt: skip  # noqa: E501
ex.mistake(
    "attention with softmax over the batch",
    "The elements of the batch compete with one another.",
    "Along which dimension do the keys lie?",
)(_wrong(weigh=lambda s, m: (s if m is None else s.masked_fill(~m, -INF)).softmax(0).nan_to_num(0.0)))  # fmt: skip  # noqa: E501
ex.mistake(
    "attention with NaN where a query may see nothing",
    "A row of nothing but -inf is 0 / 0.",
    "Which rows have no visible key, and what should stand there?",
)(_wrong(weigh=_or_plain(lambda scores, mask: scores.masked_fill(~mask, -INF).softmax(-1))))
ex.mistake(
    "attention with the mean of the values where a query may see nothing",
    "A large negative number in every place of a row is the same number everywhere.",
    "What are the weights of a row in which all scores are equal?",
)(_wrong(weigh=_or_plain(lambda scores, mask: scores.masked_fill(~mask, -1e9).softmax(-1))))
ex.mistake(
    "attention without softmax",
    "The scores themselves are used as weights.",
    "What turns scores into weights that sum to 1?",
)(_wrong(weigh=lambda scores, mask: scores if mask is None else scores * mask))
ex.mistake(
    "attention that mixes the keys",
    "The values are never used.",
    "What is averaged with the weights?",
)(_wrong(mix=lambda weights, query, key, value: weights @ key))
ex.mistake(
    "attention with the hidden scores set to -10",
    "exp(-10) is small but not 0: the hidden keys leak.",
    "Which score makes exp exactly 0?",
)(_wrong(weigh=_or_plain(lambda s, m: s.masked_fill(~m, -10.0).softmax(-1).masked_fill(_empty(m), 0.0))))  # fmt: skip  # noqa: E501


@ex.mistake(
    "attention that returns (weights, output)",
    "The two results are in the wrong order.",
    "Which comes first in the docstring?",
)
def _(query, key, value, mask=None, return_weights=False):
    result = attention(query, key, value, mask, return_weights)
    return result[::-1] if return_weights else result


@ex.mistake(
    "attention that returns the scores as weights",
    "The second result is what stood before the softmax.",
    "Do the rows of what you return sum to 1?",
)
def _(query, key, value, mask=None, return_weights=False):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return _give(attention(query, key, value, mask), scores, return_weights)


@ex.mistake(
    "attention that never returns the weights",
    "return_weights is ignored.",
    "What should come back when return_weights is True?",
)
def _(query, key, value, mask=None, return_weights=False):
    return attention(query, key, value, mask)


@ex.mistake(
    "attention that always returns the weights",
    "return_weights is ignored.",
    "What should come back when return_weights is False?",
)
def _(query, key, value, mask=None, return_weights=False):
    return attention(query, key, value, mask, True)


@ex.mistake(
    "attention with query and key swapped",
    "The scores are transposed: row i should belong to query i.",
    "Which of the two stands on the left of the product?",
)
def _(query, key, value, mask=None, return_weights=False):
    scores = key @ query.mT * query.shape[-1] ** -0.5
    weights = scores.softmax(-1) if mask is None else _right(scores, mask)
    return _give(weights @ value, weights, return_weights)


@ex.mistake(
    "causal attention, whatever the mask",
    "Later keys are hidden though nobody asked for it.",
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
