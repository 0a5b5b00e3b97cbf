"""Exercises of chapter 06: who may look at whom."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import Broken, expect
from ._inputs import normal, some
from ._wrong_parts import (
    CROSS_ENTROPIES,
    MASKINGS,
    MIXTURES,
    NORMALISATIONS,
    SCALES,
    filled,
    per_token,
    visible_softmax,
)

INF, NAN = math.inf, math.nan


def _bools(*rows: str) -> Tensor:
    """ "110" is True, True, False."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


# Wrong triangles: (query i, key j, offset n_k - n_q) -> visible.
TRIANGLES = [
    Mistake(
        "with each query's own key hidden",
        "The triangle stops one key too early: the comparison is < where it should be <=.",
        "May a token see itself, and does your comparison let it?",
        lambda i, j, offset: j < i + offset,
    ),
    Mistake(
        "with one later key visible",
        "The triangle reaches one key too far, so the next token is seen.",
        "At which key does query 0 stand, and which is the last key that it may see?",
        lambda i, j, offset: j <= i + offset + 1,
    ),
    Mistake(
        "with the past hidden instead of the future",
        "The triangle lies on the other side of the diagonal.",
        "`tril` or `triu`: which one keeps the keys before the query?",
        lambda i, j, offset: j >= i + offset,
    ),
    Mistake(
        "with the future visible, and it alone",
        "True means may attend, and here the keys that may be seen are hidden.",
        "Is your triangle the visible part or the hidden one, and which of the two do you need?",
        lambda i, j, offset: j > i + offset,
    ),
    Mistake(
        "with nothing visible but each query's own key",
        "Only the diagonal is left of the triangle.",
        "Which keys lie before the query, and are they visible?",
        lambda i, j, offset: j == i + offset,
    ),
    Mistake(
        "with only the last two keys of each query visible",
        "That is a sliding window: keys further back are hidden.",
        "How far back may a query look?",
        lambda i, j, offset: (j <= i + offset) & (j >= i + offset - 1),
    ),
]

# Wrong real tokens: (position, counted from where the padding is furthest, lengths (batch, 1), n).
REALS = [
    Mistake(
        "with real tokens and padding swapped",
        "The comparison is the wrong way round.",
        "For which positions is your comparison True: for real tokens or for padding?",
        lambda at, lengths, n: at >= lengths,
    ),
    Mistake(
        "with one padded position taken for real",
        "The border lies one position too far.",
        "Positions count from 0: how many of them satisfy your comparison?",
        lambda at, lengths, n: at <= lengths,
    ),
    Mistake(
        "with the real token next to the padding left out",
        "The border lies one position too near.",
        "Positions count from 0: how many of them satisfy your comparison?",
        lambda at, lengths, n: at < lengths - 1,
    ),
    Mistake(
        "with the padding looked for at the wrong end",
        "The real tokens are taken to stand at the other end of the row.",
        "At which end of a row do its real tokens stand here?",
        lambda at, lengths, n: at >= n - lengths,
    ),
    Mistake(
        "with the lengths taken for the number of padded positions",
        "As many positions are left out as there are real tokens.",
        "Does a length count real tokens or padding?",
        lambda at, lengths, n: at < n - lengths,
    ),
    Mistake(
        "with the first length for the whole batch",
        "Every row is cut as the first one is.",
        "What shape must `lengths` have so that each row meets its own length?",
        lambda at, lengths, n: (at < lengths[:1]).expand(len(lengths), n),
    ),
    Mistake(
        "with the largest length for the whole batch",
        "Shorter rows keep some of their padding.",
        "What shape must `lengths` have so that each row meets its own length?",
        lambda at, lengths, n: (at < lengths.max()).expand(len(lengths), n),
    ),
    Mistake(
        "with the smallest length for the whole batch",
        "Longer rows lose some of their real tokens.",
        "What shape must `lengths` have so that each row meets its own length?",
        lambda at, lengths, n: (at < lengths.min()).expand(len(lengths), n),
    ),
    Mistake(
        "with length 0 taken for no padding",
        "A row without a real token is treated like a full one.",
        "Is a length of 0 a special case, or does the comparison handle it?",
        lambda at, lengths, n: (at < lengths) | (lengths == 0),
    ),
    Mistake(
        "with at least one real token in every row",
        "A row of length 0 keeps a token.",
        "What should be left of a row of length 0?",
        lambda at, lengths, n: at < lengths.clamp(min=1),
    ),
    Mistake(
        "with only the real token next to the padding",
        "`==` stands where an inequality should.",
        "Which comparison is True for all positions before the border?",
        lambda at, lengths, n: at == lengths - 1,
    ),
    Mistake(
        "with nothing left out but one padded position",
        "`!=` stands where an inequality should.",
        "Which comparison is False for all positions behind the border?",
        lambda at, lengths, n: at != lengths,
    ),
]


# --- 1. hide the future -----------------------------------------------------------------------

ex = Exercise(
    "hide_future",
    chapter="06_masking",
    title="Hide the future",
    minutes=10,
    difficulty=2,
    importance=5,
    batched=True,
    prompt=r"""
A model that learns to predict the next token must not see it. So the score of every key that is
**later** than the query becomes $-\infty$; softmax then makes the weight exactly 0.

$$S'_{ij} = \begin{cases} S_{ij} & j \le i + n_k - n_q \\ -\infty & \text{otherwise}\end{cases}$$

With n_q = n_k that is the familiar triangle. With n_q < n_k, as when earlier keys come from a
cache, the **last query stands at the last key**: the triangle is aligned at the bottom right. With
n_q > n_k the first queries stand before every key and see nothing: their rows are all `-inf`.

- The hidden scores are exactly `-inf` here, not `-1e9` and not `torch.finfo(...).min`.
- They are **replaced**, whatever they were: a hidden score of `inf` or NaN must be gone too.
- Any dimensions may stand in front of `(n_q, n_k)`.
""",
    hints=(
        "With 2 queries and 5 keys, at which key does query 0 stand, and which keys may it see?",
        "`tril(diagonal)` keeps the entries with j <= i + diagonal. The diagonal is the number of "
        "keys that came before the first query.",
        "visible = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q); which entries must be "
        "filled now?",
    ),
)


@ex.solution
def hide_future(scores: Tensor) -> Tensor:
    """Scores (..., n_q, n_k) with -inf where the key is later than the query.

    Aligned at the bottom right: query i sees the keys j <= i + n_k - n_q.
    """
    ### BEGIN SOLUTION
    n_q, n_k = scores.shape[-2:]
    everything = torch.ones(n_q, n_k, dtype=torch.bool, device=scores.device)
    visible = everything.tril(n_k - n_q)  # the last query stands at the last key
    return scores.masked_fill(~visible, -math.inf)  # (n_q, n_k) broadcasts to (..., n_q, n_k)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    shapes = [(2, 2), (1, 1), (3, 3), (1, 3), (2, 4), (3, 2), (4, 3), (4, 4), (3, 3, 3)]
    ordinary = [normal(g, *shape) for shape in [*shapes, (2, 1, 3, 5), (1, 2, 4, 2)]]
    zeros = normal(g, 3, 3) * torch.eye(3)  # a visible score may be 0
    spoiled = normal(g, 2, 3)
    spoiled[0, 2] = INF  # hidden
    worse = normal(g, 3, 4)
    worse[0, 2:] = torch.tensor([NAN, INF])  # hidden
    high = 1e5 * normal(g, 2, 2)
    return [{"scores": s} for s in [*ordinary, zeros, spoiled, worse, high, normal(g, 3, 3, 4)]]


@ex.behaviour("with as many queries as keys, query i sees the keys 0 to i")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    expect(answer.on(case), torch.tensor([[1.0, -INF], [3.0, 4.0]]), case=case)


@ex.behaviour("the last query stands at the last key and sees them all")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    expect(answer.on(case)[-1], torch.tensor([4.0, 5.0, 6.0]), case=case)


@ex.behaviour("a hidden score is -inf, exactly")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    hidden = answer.on(case)[0, 1].item()
    if hidden != -INF:
        raise Broken(f"it is {hidden:.4g}", case=case)


@ex.behaviour("a query that stands before every key sees nothing")
def _(answer):
    case = {"scores": torch.tensor([[1.0], [2.0]])}
    expect(answer.on(case), torch.tensor([[-INF], [2.0]]), case=case)


@ex.behaviour("the last rows come out alike whether the earlier queries are there or not")
def _(answer):
    (scores,) = some(1, (5, 5))
    for rows in (1, 2, 4):
        expect(answer(scores[-rows:]), answer(scores)[-rows:])


@ex.behaviour("changing a later key's score changes nothing")
def _(answer):
    (scores,) = some(2, (2, 4, 4))
    for later in (7.0, INF, NAN):
        other = scores.clone()
        other[:, 1, 2] = later
        expect(answer(other), answer(scores))


@ex.behaviour("batch elements do not meet")
def _(answer):
    (scores,) = some(3, (3, 3, 3))
    expect(answer(scores)[1], answer(scores[1]))


def _place(scores: Tensor) -> tuple[Tensor, Tensor, int]:
    """Query index (n_q, 1), key index (n_k,) and offset."""
    n_q, n_k = scores.shape[-2:]
    return torch.arange(n_q)[:, None], torch.arange(n_k), n_k - n_q


def _future(scores: Tensor) -> Tensor:
    i, j, offset = _place(scores)
    return j > i + offset


def _showing(rule: Function) -> Function:
    """The scores with -inf wherever the rule does not say visible."""
    return lambda s: s.masked_fill(~rule(*_place(s)), -INF)


TOP_LEFT = "The last query stands at the last key, not the first query at the first one."

ALIGNMENTS = [
    Mistake(
        "aligned at the top left",
        TOP_LEFT,
        "With one query and three keys, as when the earlier ones are cached, what may it see?",
        lambda i, j, offset: j <= i,
    ),
    Mistake(
        "aligned at the top left, with each query's own key hidden",
        TOP_LEFT,
        "With one query and three keys, what may it see?",
        lambda i, j, offset: j < i,
    ),
    Mistake(
        "aligned at the top left, with one later key visible",
        TOP_LEFT,
        "With one query and three keys, what may it see?",
        lambda i, j, offset: j <= i + 1,
    ),
    Mistake(
        "aligned at the top left, with the past hidden instead of the future",
        "The triangle lies on the other side of the diagonal, and it starts at the wrong corner.",
        "`tril` or `triu`, and with which `diagonal`?",
        lambda i, j, offset: j >= i,
    ),
    Mistake(
        "aligned at the top left, with the future visible, and it alone",
        "True means may attend, and here the keys that may be seen are hidden.",
        "Is your triangle the visible part or the hidden one?",
        lambda i, j, offset: j > i,
    ),
    Mistake(
        "with the offset n_q - n_k instead of n_k - n_q",
        "The triangle is shifted to the wrong side.",
        "With more keys than queries, does the first query see more than one key, or none?",
        lambda i, j, offset: j <= i - offset,
    ),
    Mistake(
        "with an offset that is never below 0",
        "With more queries than keys the first ones should stand before every key.",
        "What is n_k - n_q with three queries and two keys, and what does it mean?",
        lambda i, j, offset: j <= i + max(offset, 0),
    ),
    Mistake(
        "with the absolute difference of the lengths as offset",
        "With more queries than keys the triangle is shifted to the wrong side.",
        "What is n_k - n_q with three queries and two keys, and what does it mean?",
        lambda i, j, offset: j <= i + abs(offset),
    ),
    Mistake(
        "with all cached keys visible, but no new one",
        "Of the keys that are as new as the queries, each query may see those up to its own.",
        "At which key does the first query stand?",
        lambda i, j, offset: (j < offset) | (offset == 0) & (j <= i),
    ),
    Mistake(
        "with a triangle that leans to the other side",
        "The rows are in the wrong order: the first query sees the most.",
        "Which query may see the most keys, the first or the last?",
        lambda i, j, offset: j <= (i.max() - i) + offset,
    ),
]

ex.mistakes_from(ALIGNMENTS, "the scores", _showing)
ex.mistakes_from(TRIANGLES, "the scores", _showing)
ex.mistake(
    "the scores with 0 for the future instead of -inf",
    "`tril` sets the rest to 0, and a score of 0 is not hidden: exp(0) = 1.",
    "Which score makes exp exactly 0?",
)(lambda s: s.masked_fill(_future(s), 0.0))
ex.mistake(
    "the scores with 0 for the future, aligned at the top left",
    "`tril` sets the rest to 0, and a score of 0 is not hidden: exp(0) = 1.",
    "Which score makes exp exactly 0, and at which key does the last query stand?",
)(lambda s: s.tril())
ex.mistake(
    "the scores with -inf wherever `tril` left a 0",
    "A visible score can be 0 too, and then it is hidden.",
    "Can the mask be made from positions alone, without looking at the scores?",
)(lambda s: s.masked_fill(s.masked_fill(_future(s), 0.0) == 0, -INF))
ex.mistake(
    "the scores with -1e9 for the future",
    "That hides it too, as long as no visible score is as low; here -inf is asked.",
    "Is there a number below every other?",
)(lambda s: s.masked_fill(_future(s), -1e9))
ex.mistake(
    "the scores with -1e9 added to the future",
    "A hidden score is lowered, not replaced: what was inf stays inf.",
    "Which operation puts a fixed number in place of the hidden scores?",
)(lambda s: s - 1e9 * _future(s))
ex.mistake(
    "the scores with -1e9 for the future, aligned at the top left",
    "Two things at once: the triangle starts at the wrong corner, and -1e9 is not -inf.",
    "At which key does the last query stand, and which number is below every other?",
)(lambda s: s.masked_fill(torch.ones(s.shape[-2:]).triu(1).bool(), -1e9))
ex.mistake(
    "the scores with -1e9 added to the future, aligned at the top left",
    "Two things at once: the triangle starts at the wrong corner, and -1e9 is not -inf.",
    "At which key does the last query stand, and which number is below every other?",
)(lambda s: s + torch.ones(s.shape[-2:]).triu(1) * -1e9)
ex.mistake(
    "the scores multiplied by the mask, with -1e9 added to the future",
    "0 times inf is NaN, so a hidden score can come back; and -1e9 is not -inf.",
    "Which operation puts -inf in place of the hidden scores, whatever they were?",
)(lambda s: s * ~_future(s) - 1e9 * _future(s))
ex.mistake(
    "the scores with finfo.min for the future",
    "The lowest finite number hides too; here -inf is asked.",
    "Which of the two leaves a row in which nothing is visible recognisable?",
)(lambda s: s.masked_fill(_future(s), torch.finfo(s.dtype).min))
ex.mistake(
    "the scores with +inf for the future",
    "exp(inf) is inf: the future gets all the weight.",
    "Which sign makes exp 0?",
)(lambda s: s.masked_fill(_future(s), INF))
ex.mistake(
    "the scores with NaN for the future",
    "NaN spreads through softmax over the whole row.",
    "Which score makes exp exactly 0?",
)(lambda s: s.masked_fill(_future(s), NAN))
ex.mistake(
    "the scores with -inf added to the future",
    "A hidden score that is inf or NaN turns to NaN: inf - inf.",
    "Which operation puts -inf in place of the hidden scores, whatever they were?",
)(lambda s: s + torch.zeros(s.shape).masked_fill(_future(s), -INF))
ex.mistake(
    "the scores plus (1 - mask) · (-inf)",
    "0 · inf is NaN: the visible scores are spoiled.",
    "What is (1 - mask) · (-inf) where the mask is 1?",
)(lambda s: s + _future(s).to(s.dtype) * -INF)
ex.mistake(
    "the scores with the future multiplied by -inf",
    "A negative score times -inf is +inf.",
    "Should a hidden score keep its sign?",
)(lambda s: torch.where(_future(s), s * -INF, s))
ex.mistake(
    "the scores multiplied by the mask",
    "That makes 0 of a hidden score, and NaN of one that was infinite.",
    "Which score makes exp exactly 0?",
)(lambda s: s * ~_future(s))
ex.mistake(
    "the scores with the mask added",
    "True adds 1 to a visible score; the others are not hidden.",
    "Which number, added to a score, hides it?",
)(lambda s: s + ~_future(s))
ex.mistake(
    "the mask instead of the scores",
    "The scores have no effect.",
    "What should stand where a key is visible?",
)(lambda s: (~_future(s)).expand(s.shape).to(s.dtype))
ex.mistake(
    "the mask of 0 and -inf instead of the scores",
    "The scores have no effect.",
    "What should stand where a key is visible?",
)(lambda s: torch.zeros_like(s).masked_fill(_future(s), -INF))
ex.mistake(
    "the weights instead of the scores",
    "Softmax is a step too far: the scores themselves are asked.",
    "What comes after the mask, and is it part of this exercise?",
)(lambda s: s.masked_fill(_future(s), -INF).softmax(-1))
ex.mistake(
    "the scores with 0 in a row that sees nothing",
    "Rows without a visible key have been mended before the softmax, where a 0 is visible.",
    "What should stand in a row of which nothing may be seen?",
)(lambda s: s.masked_fill(_future(s), -INF).masked_fill(_future(s).all(-1, keepdim=True), 0.0))
ex.mistake(
    "the scores with a row that sees nothing left as it was",
    "Rows without a visible key have been spared, so they see everything.",
    "What should stand in a row of which nothing may be seen?",
)(lambda s: s.masked_fill(_future(s) & ~_future(s).all(-1, keepdim=True), -INF))


@ex.mistake(
    "the scores with the future hidden in the first batch element only",
    "The mask reached one matrix of the batch.",
    "Does your indexing count dimensions from the end?",
)
def _(scores):
    if scores.ndim == 2:
        return hide_future(scores)
    return torch.cat([hide_future(scores[:1]), scores[1:]])


ex.alternative("torch.where on positions")(
    lambda s: torch.where(
        torch.arange(s.shape[-1]) - s.shape[-1] <= torch.arange(s.shape[-2])[:, None] - s.shape[-2],
        s,
        -INF,
    )
)
ex.alternative("triu of ones, as bool")(
    lambda s: s.masked_fill(torch.ones_like(s).triu(s.shape[-1] - s.shape[-2] + 1).bool(), -INF)
)
ex.alternative("in float64, and back")(
    lambda s: torch.where(_future(s), torch.tensor(-INF).double(), s.double()).to(s.dtype)
)


@ex.alternative("a loop over the queries")
def _(scores):
    n_q, n_k = scores.shape[-2:]
    rows = []
    for i in range(n_q):
        seen = max(0, i + n_k - n_q + 1)
        hidden = torch.full_like(scores[..., i, seen:], -INF)
        rows.append(torch.cat([scores[..., i, :seen], hidden], dim=-1))
    return torch.stack(rows, dim=-2)


@ex.alternative("rows written into a copy")
def _(scores):
    result = scores.clone()
    for query in range(scores.size(-2)):
        position = query + scores.size(-1) - scores.size(-2)
        result[..., query, max(position + 1, 0) :] = float("-inf")
    return result


# --- 2. padding -------------------------------------------------------------------------------

ex = Exercise(
    "padding_mask",
    chapter="06_masking",
    title="A mask from lengths",
    minutes=10,
    difficulty=1,
    importance=5,
    prompt=r"""
Texts of different lengths become one batch by **padding** the shorter ones at the end. Nobody may
look at the padding:

$$M_{b,1,1,j} = (j < \text{length}_b)$$

Give the bool mask of shape `(batch, 1, 1, n)`, **True = may attend**: the key is a real token. The
two dimensions of size 1 are for heads and queries: the mask is the same for all of them, and it
broadcasts against scores of shape `(batch, heads, n_q, n)`.

A length may be 0 (nothing is real), n (nothing is padded), or more than n where the row has been
cut: then everything is real.
""",
    hints=(
        "Which positions of a row of length 2 are real: 0 and 1, or 1 and 2?",
        "Compare all positions with all lengths at once: (n,) against (batch, 1) gives (batch, n).",
        "real = torch.arange(n) < lengths[:, None]; which index puts two dimensions of size 1 in "
        "the middle?",
    ),
)


@ex.solution
def padding_mask(lengths: Tensor, n: int) -> Tensor:
    """Which keys are real tokens. lengths: (batch,) -> bool (batch, 1, 1, n), True = may attend."""
    ### BEGIN SOLUTION
    positions = torch.arange(n, device=lengths.device)  # (n,)
    real = positions < lengths[:, None]  # (n,) against (batch, 1) -> (batch, n)
    return real[:, None, None, :]  # (batch, n) -> (batch, 1, 1, n)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    fixed = [([2], 3), ([1, 3], 3), ([1], 1), ([0, 2], 4), ([5, 1], 3), ([2, 4, 1], 4)]
    drawn = [
        (torch.randint(high, (batch,), generator=g).tolist(), n)
        for batch, high, n in [(1, 5, 4), (2, 4, 5), (3, 4, 3), (4, 9, 7), (5, 3, 2)]
    ]
    cases = [{"lengths": torch.tensor(lengths), "n": n} for lengths, n in [*fixed, *drawn]]
    return [*cases, {"lengths": torch.tensor([3, 1, 2], dtype=torch.int32), "n": 4}]


@ex.behaviour("a key is visible where its position is below the length")
def _(answer):
    case = {"lengths": torch.tensor([2]), "n": 4}
    expect(answer.on(case), _bools("1100")[:, None, None], case=case)


@ex.behaviour("a row shows as many keys as it has real tokens")
def _(answer):
    lengths = torch.tensor([3, 0, 5, 1])
    expect(answer(lengths, 5).sum(-1).flatten(), lengths)


@ex.behaviour("a length of n hides nothing, a length of 0 everything")
def _(answer):
    case = {"lengths": torch.tensor([3, 0]), "n": 3}
    expect(answer.on(case), _bools("111", "000")[:, None, None], case=case)


@ex.behaviour("a row that has been cut, longer than n, hides nothing")
def _(answer):
    case = {"lengths": torch.tensor([7, 3]), "n": 2}
    expect(answer.on(case), _bools("11", "11")[:, None, None], case=case)


@ex.behaviour("it broadcasts against scores of shape (batch, heads, n_q, n)")
def _(answer):
    visible = answer(torch.tensor([1, 2]), 2) & torch.ones(2, 3, 4, 2, dtype=torch.bool)
    expect(visible, _bools("10", "11")[:, None, None].expand(2, 3, 4, 2))


@ex.behaviour("each row has its own length")
def _(answer):
    lengths = torch.tensor([2, 4, 1])
    expect(answer(lengths, 5)[1:2], answer(lengths[1:2], 5))


def _real(rule: Function) -> Function:
    """The mask whose real tokens a rule picks: (position, lengths (batch, 1), n) -> (batch, n)."""
    return lambda lengths, n: rule(torch.arange(n), lengths[:, None], n)[:, None, None, :]


def _is_real(lengths: Tensor, n: int) -> Tensor:
    """As it should be, (batch, n)."""
    return torch.arange(n) < lengths[:, None]


ex.mistakes_from(REALS, "the mask", _real)
ex.mistake(
    "the mask with position 0 left out",
    "Positions count from 0 here, and token 0 is real.",
    "Which position has the first token?",
)(_real(lambda at, lengths, n: (at > 0) & (at < lengths)))
ex.mistake(
    "the mask shifted by one: positions 1 to length",
    "Positions count from 0, so the last real token stands at length - 1.",
    "Which position has the first token, and which the last?",
)(_real(lambda at, lengths, n: (at > 0) & (at <= lengths)))
ex.mistake(
    "the mask without the dimensions for heads and queries",
    "(batch, n) is taken for (n_q, n_k) when it meets the scores.",
    "Which shape does the exercise ask for, and how many dimensions have the scores?",
)(_is_real)
ex.mistake(
    "the mask with one dimension of size 1 instead of two",
    "(batch, 1, n) is taken for (heads, n_q, n_k): the batch ends up among the heads.",
    "How many dimensions have the scores?",
)(lambda lengths, n: _is_real(lengths, n)[:, None, :])
ex.mistake(
    "the mask along the queries instead of the keys",
    "(batch, 1, n, 1) says which queries are real; every key stays visible to those.",
    "Which dimension of the scores is that of the keys?",
)(lambda lengths, n: _is_real(lengths, n)[:, None, :, None])
ex.mistake(
    "the mask with the batch in the place of the heads",
    "(1, batch, 1, n) gives each head a length, not each row of the batch.",
    "Which dimension of the scores is the batch?",
)(lambda lengths, n: _is_real(lengths, n)[None, :, None, :])
ex.mistake(
    "the mask with the batch in the place of the queries",
    "(1, 1, batch, n) gives each query a length, not each row of the batch.",
    "Which dimension of the scores is the batch?",
)(lambda lengths, n: _is_real(lengths, n)[None, None])
ex.mistake(
    "the mask with batch and positions swapped",
    "The positions ran along the first dimension when they met the lengths.",
    "Which of the two gets `[:, None]`?",
)(lambda lengths, n: _is_real(lengths, n).T[:, None, None, :])
ex.mistake(
    "the mask written out for every query",
    "The size 1 broadcasts by itself; n_q need not be n.",
    "What is the third dimension of the shape that is asked for?",
)(lambda lengths, n: _is_real(lengths, n)[:, None, None, :].expand(-1, 1, n, n))
ex.mistake(
    "the mask of real queries and real keys together",
    "A padded query has been made blind; only keys are asked for here.",
    "What does the mask say about queries?",
)(lambda lengths, n: (_is_real(lengths, n)[:, :, None] & _is_real(lengths, n)[:, None])[:, None])
ex.mistake(
    "the mask with the future hidden as well",
    "That is the combination with a causal mask, which comes later.",
    "Which of the two rules does this exercise ask for?",
)(lambda lengths, n: (_is_real(lengths, n)[:, None] & torch.ones(n, n).tril().bool())[:, None])
ex.mistake(
    "the mask as wide as the longest text instead of n",
    "The width was taken from the lengths.",
    "How wide are the scores that the mask must fit?",
)(lambda lengths, n: _is_real(lengths, int(lengths.max()))[:, None, None, :])
ex.mistake(
    "the mask as numbers to be added, 0 and -inf",
    "That is what the next exercise makes of a mask; here it is bool.",
    "What stands for may attend: True, or 0?",
)(
    lambda lengths, n: torch.zeros(len(lengths), 1, 1, n).masked_fill(
        ~padding_mask(lengths, n), -INF
    )
)


@ex.mistake(
    "the mask with a full row hidden, as the slice [-0:] does",
    "With no padding, `[-(n - length):]` is `[-0:]`, and that is the whole row.",
    "What does `row[-0:]` give?",
)
def _(lengths, n):
    mask = torch.ones(len(lengths), 1, 1, n, dtype=torch.bool)
    for row, length in zip(mask, lengths.tolist(), strict=True):
        row[..., -(n - length) :] = False
    return mask


ex.alternative("positions counted from 1")(
    lambda lengths, n: (torch.arange(1, n + 1) <= lengths.unsqueeze(1)).view(-1, 1, 1, n)
)
ex.alternative("the lengths viewed in four dimensions")(
    lambda lengths, n: lengths.view(-1, 1, 1, 1) > torch.arange(n)
)


@ex.alternative("a loop over the rows")
def _(lengths, n):
    mask = torch.zeros(len(lengths), 1, 1, n, dtype=torch.bool)
    for b, length in enumerate(lengths):
        mask[b, :, :, :length] = True
    return mask


@ex.alternative("a list of lists")
def _(lengths, n):
    rows = [[[[j < length for j in range(n)]]] for length in lengths.tolist()]
    return torch.tensor(rows, dtype=torch.bool)


@ex.alternative("a running sum of ones")
def _(lengths, n):
    count = torch.ones(len(lengths), n, dtype=torch.long).cumsum(dim=1)  # 1 … n
    return count.le(lengths[:, None])[:, None, None]


# --- 3. the additive mask ---------------------------------------------------------------------

ex = Exercise(
    "additive_mask",
    chapter="06_masking",
    title="From bool to a mask that is added",
    minutes=10,
    difficulty=1,
    importance=4,
    prompt=r"""
Much code hides keys by **adding** a float mask to the scores:

$$\mathrm{softmax}(S + A), \qquad A = \begin{cases} 0 & \text{may attend} \\ -\infty &
  \text{hidden}\end{cases}$$

Turn a bool mask (**True = may attend**) of any shape into such a float32 mask of the same shape.
`F.scaled_dot_product_attention` takes both kinds, and its bool masks mean what ours do. Beware of
`nn.MultiheadAttention`, where True means *hidden*: the float mask is the form on which all agree.

The hidden entries are exactly `-inf` here, not `-1e9` and not `torch.finfo(...).min`.
""",
    hints=(
        "What may be added to a score without changing it, and what makes its exp 0?",
        "0 · inf is NaN, so multiplying the mask by -inf does not work. Choose between two "
        "numbers, or think of a function that maps 1 to 0 and 0 to -inf.",
        "torch.zeros(mask.shape) is right wherever everything is visible; which entries must be "
        "filled with -math.inf?",
    ),
)


@ex.solution
def additive_mask(mask: Tensor) -> Tensor:
    """bool, True = may attend -> float32 of the same shape: 0 where True, -inf where False."""
    ### BEGIN SOLUTION
    added = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return added.masked_fill(~mask, -math.inf)  # filled, since 0 * inf would be NaN
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    shapes = [(4,), (3, 3), (2, 1, 1, 3), (2, 1, 3, 4), (5, 2), (3, 2, 4)]
    drawn = [torch.rand(shape, generator=g) < 0.6 for shape in shapes]
    fixed = [_bools("110"), _bools("10", "11"), _bools("000", "111"), torch.tensor(True)]
    one = torch.tensor([[False]])
    return [{"mask": mask} for mask in [*fixed, one, *drawn]]


@ex.behaviour("a visible key gets 0")
def _(answer):
    case = {"mask": _bools("11")}
    expect(answer.on(case), torch.zeros(1, 2), case=case)


@ex.behaviour("a hidden key gets -inf, exactly")
def _(answer):
    case = {"mask": _bools("10")}
    hidden = answer.on(case)[0, 1].item()
    if hidden != -INF:
        raise Broken(f"it gets {hidden:.4g}", case=case)


@ex.behaviour("there is no NaN in it")
def _(answer):
    case = {"mask": _bools("101", "010")}
    added = answer.on(case)
    if added.isnan().any():
        raise Broken(f"got {added.tolist()}", case=case)


@ex.behaviour("softmax of scores + mask gives a hidden key the weight 0, and the others the rest")
def _(answer):
    mask, scores = _bools("101"), torch.tensor([[1.0, 9.0, 2.0]])
    weights = (scores + answer(mask)).softmax(-1)
    expect(weights, torch.tensor([[0.2689414, 0.0, 0.7310586]]))


@ex.behaviour("exp of it is the mask again, as 1 and 0")
def _(answer):
    mask = _bools("1011", "0001")
    expect(answer(mask).exp(), mask.float())


@ex.behaviour("what it says of one key does not depend on the others")
def _(answer):
    expect(answer(_bools("000", "101"))[:, :1], answer(_bools("0", "1")))


def _two(visible: float, hidden: float) -> Function:
    """One number where the mask is True, another where it is False."""
    return lambda mask: torch.where(mask, visible, hidden)


LOWER = "Which number is below every other?"
ADDED = "What may be added to a score without changing it?"

NUMBERS = [
    Mistake(
        "with 0 for the hidden keys and -inf for the visible ones",
        "True means may attend, and here the visible keys are hidden.",
        "Which entries does `masked_fill` fill: those where its argument is True or False?",
        _two(-INF, 0.0),
    ),
    Mistake(
        "made by (1 - mask) · (-inf)",
        "0 · inf is NaN: the visible keys are spoiled.",
        "What is (1 - mask) · (-inf) where the mask is 1?",
        _two(NAN, -INF),
    ),
    Mistake(
        "made by mask · (-inf)",
        "0 · inf is NaN, and -inf falls on the visible keys.",
        "What is mask · (-inf) where the mask is 0, and where it is 1?",
        _two(-INF, NAN),
    ),
    Mistake(
        "made by mask · inf",
        "inf falls on the visible keys, and 0 · inf is NaN.",
        "What should stand at a visible key?",
        _two(INF, NAN),
    ),
    Mistake(
        "with -1e9 for the hidden keys",
        "That hides a key as long as no visible score is as low; here -inf is asked.",
        LOWER,
        _two(0.0, -1e9),
    ),
    Mistake(
        "with -1e9 for the visible keys",
        "True means may attend, and here the visible keys are lowered.",
        "Which keys does `(1 - mask) · (-1e9)` lower, and which `mask · (-1e9)`?",
        _two(-1e9, 0.0),
    ),
    Mistake(
        "with finfo.min for the hidden keys",
        "It hides a key, but a row of nothing else comes out as equal shares; here -inf is asked.",
        LOWER,
        _two(0.0, torch.finfo(torch.float32).min),
    ),
    Mistake(
        "with finfo.min for the visible keys",
        "True means may attend, and here the visible keys are lowered.",
        "Which entries does `masked_fill` fill: those where its argument is True or False?",
        _two(torch.finfo(torch.float32).min, 0.0),
    ),
    Mistake(
        "with the lowest float16 for the hidden keys",
        "-65504 is low, but a visible score can be lower.",
        LOWER,
        _two(0.0, -65504.0),
    ),
    Mistake(
        "with -10000 for the hidden keys", "A visible score can be as low as that.", LOWER,
        _two(0.0, -1e4),
    ),
    Mistake(
        "with -100 for the hidden keys", "A visible score can be as low as that.", LOWER,
        _two(0.0, -100.0),
    ),
    Mistake(
        "with -1 for the hidden keys",
        "mask - 1 lowers a score by 1; it does not hide it.",
        LOWER,
        _two(0.0, -1.0),
    ),
    Mistake(
        "with 1 for the hidden keys",
        "The mask was turned round; or -inf was filled into a bool tensor, where it became True.",
        "What is the dtype of what you fill, and what should a hidden key get?",
        _two(0.0, 1.0),
    ),
    Mistake(
        "with 1 for the visible keys and -inf for the hidden ones",
        "A constant added to all visible scores changes no weight, but 0 is asked.",
        ADDED,
        _two(1.0, -INF),
    ),
    Mistake(
        "with 1 for the visible keys and -1 for the hidden ones",
        "2 · mask - 1 hides nothing.",
        ADDED,
        _two(1.0, -1.0),
    ),
    Mistake(
        "with -inf for the visible keys and 1 for the hidden ones",
        "The mask's own 1 and 0 were filled the wrong way round.",
        "Which entries does `masked_fill` fill, and what is left in the others?",
        _two(-INF, 1.0),
    ),
    Mistake(
        "with inf for the hidden keys",
        "exp(inf) is inf: the hidden keys get all the weight.",
        "Which sign makes exp 0?",
        _two(0.0, INF),
    ),
    Mistake(
        "with inf for the visible keys",
        "exp(inf) is inf, and inf / inf is NaN.",
        ADDED,
        _two(INF, 0.0),
    ),
    Mistake(
        "with NaN for the hidden keys",
        "NaN spreads through softmax over the whole row.",
        LOWER,
        _two(0.0, NAN),
    ),
    Mistake(
        "with -inf everywhere",
        "Nothing is left to see.",
        "Which entries should be 0?",
        _two(-INF, -INF),
    ),
    Mistake(
        "made by log(mask + 1e-9)",
        "A small number was added to avoid log 0, but log 0 = -inf is just what is wanted.",
        "What is log 0 in PyTorch?",
        lambda mask: (mask.float() + 1e-9).log(),
    ),
    Mistake(
        "with the logarithm of equal shares",
        "The visible keys of a row were made to sum to 1 before the logarithm.",
        ADDED,
        lambda mask: (mask / mask.sum(-1, keepdim=True).clamp(min=1)).log(),
    ),
    Mistake(
        "made by log-softmax of the mask",
        "Softmax of 1 and 0 gives every key a share.",
        "Which function maps 1 to 0 and 0 to -inf, entry by entry?",
        lambda mask: mask.float().log_softmax(-1),
    ),
    Mistake(
        "with 0 in a row in which nothing is visible",
        "Rows without a visible key have been opened, so they see everything.",
        "What should stand at a hidden key, whatever the others are?",
        lambda mask: additive_mask(mask | ~mask.any(-1, keepdim=True)),
    ),
    Mistake(
        "with a whole row hidden if one of its keys is",
        "`all` along the row stands where each entry should decide for itself.",
        "What should stand at a visible key, whatever the others are?",
        lambda mask: additive_mask(mask.all(-1, keepdim=True).expand(mask.shape)),
    ),
]  # fmt: skip

ex.mistakes_from(NUMBERS, "the mask", lambda part: part)

ex.alternative("torch.where")(lambda mask: torch.where(mask, 0.0, -INF))
ex.alternative("the logarithm of 1 and 0")(lambda mask: mask.float().log())
ex.alternative("float64, and back")(lambda mask: torch.log(mask.double()).to(torch.float32))
ex.alternative("(1 - mask) · (-inf), NaN to 0")(
    lambda mask: ((1 - mask.float()) * -INF).nan_to_num(nan=0.0, neginf=-INF)
)


@ex.alternative("a loop over the entries")
def _(mask):
    numbers = [0.0 if visible else float("-inf") for visible in mask.flatten().tolist()]
    return torch.tensor(numbers).view(mask.shape)


@ex.alternative("written by index")
def _(mask):
    added = torch.zeros_like(mask, dtype=torch.float)
    added[mask.logical_not()] = -torch.inf
    return added


# --- 4. packed documents ----------------------------------------------------------------------

ex = Exercise(
    "packed_mask",
    chapter="06_masking",
    title="Several texts in one row",
    minutes=15,
    difficulty=3,
    importance=4,
    points=2,
    prompt=r"""
Padding wastes work. Packing does not: several short texts stand one behind the other in one row,
and the mask keeps them apart. `documents[b, i]` is the id of the text that token i belongs to.

$$M_{b,1,i,j} = (\text{document}_{b,j} = \text{document}_{b,i}) \wedge (j \le i)$$

Give the bool mask of shape `(batch, 1, n, n)`, **True = may attend**: the key is in the same
document as the query and not later.

The ids are any whole numbers, 0 included, in any order. Same id means same document, even where
other tokens stand in between.
""",
    hints=(
        "How do you compare every id of a row with every other one, without a loop?",
        "(batch, n, 1) against (batch, 1, n) gives (batch, n, n). Which of the two dimensions is "
        "the query's? Same document and not later are two rules: which operator joins them?",
        "same = documents[:, :, None] == documents[:, None, :]; what does `same.tril()` keep?",
    ),
)


@ex.solution
def packed_mask(documents: Tensor) -> Tensor:
    """Causal within each document. documents: ids (batch, n) -> bool (batch, 1, n, n)."""
    ### BEGIN SOLUTION
    # (batch, n_q, 1) against (batch, 1, n_k) -> (batch, n_q, n_k)
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]  # not later: the lower triangle; -> (batch, 1, n, n)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    fixed = [
        [[1, 1, 2]],
        [[0, 0, 1, 1]],
        [[4]],
        [[3, 5, 3, 3]],  # a document that comes again
        [[7, 2, 2, 0]],
        [[2, 2, 2], [2, 3, 4]],
        [[0, 1, 1], [5, 5, 0], [1, 0, 1]],
        [[300, 301, 301, 300, 44]],
    ]
    drawn = [(1, 4, 3), (2, 5, 2), (3, 4, 3), (4, 3, 2), (2, 6, 4)]
    ids = [torch.randint(high, (batch, n), generator=g) for batch, n, high in drawn]
    return [{"documents": d} for d in [*map(torch.tensor, fixed), *ids]]


@ex.behaviour("two documents of two tokens: two small triangles")
def _(answer):
    case = {"documents": torch.tensor([[1, 1, 2, 2]])}
    expect(answer.on(case), _bools("1000", "1100", "0010", "0011")[None, None], case=case)


@ex.behaviour("one document alone is the causal triangle")
def _(answer):
    triangle = torch.ones(3, 3).tril().bool()[None, None]
    expect(answer(torch.tensor([[6, 6, 6]])), triangle)


@ex.behaviour("every token sees itself, and no later one")
def _(answer):
    mask = answer(torch.tensor([[1, 0, 0, 1, 2]]))[0, 0]
    expect(mask.diagonal(), torch.ones(5, dtype=torch.bool))
    expect(mask.triu(1), torch.zeros(5, 5, dtype=torch.bool))


@ex.behaviour("a document that comes again sees its earlier part")
def _(answer):
    case = {"documents": torch.tensor([[3, 5, 3]])}
    expect(answer.on(case), _bools("100", "010", "101")[None, None], case=case)


@ex.behaviour("other ids for the same documents change nothing")
def _(answer):
    expect(answer(torch.tensor([[0, 0, 1, 1]])), answer(torch.tensor([[9, 9, 4, 4]])))


@ex.behaviour("packing a text behind another changes nothing within it")
def _(answer):
    packed = answer(torch.tensor([[1, 1, 1, 2, 2]]))
    expect(packed[..., 3:, 3:], answer(torch.tensor([[2, 2]])))


@ex.behaviour("batch elements do not meet")
def _(answer):
    documents = torch.tensor([[1, 1, 2], [2, 2, 2], [1, 2, 1]])
    expect(answer(documents)[1:2], answer(documents[1:2]))


def _packed(rule: Function) -> Function:
    """The mask of a rule: (the query's id, the key's id, query i, key j) -> visible."""

    def function(documents):
        at = torch.arange(documents.shape[1])
        ids = documents[:, :, None], documents[:, None, :]
        batch, n = documents.shape
        return rule(*ids, at[:, None], at).expand(batch, n, n)[:, None]

    return function


def _runs(documents: Tensor) -> Tensor:
    """Ids that change wherever the document does, so that one that comes again is a new one."""
    return F.pad(documents.diff(dim=1) != 0, (1, 0)).cumsum(1)


ex.mistakes_from(
    TRIANGLES,
    "the mask",
    lambda rule: _packed(lambda query, key, i, j: (query == key) & rule(i, j, 0)),
)
ex.mistake(
    "the mask of the documents alone",
    "The future of the same document is visible.",
    "Which of the two rules is missing, and where does it enter?",
)(_packed(lambda query, key, i, j: query == key))
ex.mistake(
    "the causal mask alone",
    "A token sees the documents that stand before its own.",
    "Where do the ids enter?",
)(_packed(lambda query, key, i, j: (j <= i)[None]))
ex.mistake(
    "the mask with or instead of and",
    "A key is visible if one of the two rules allows it.",
    "Must both rules allow a key, or is one enough?",
)(_packed(lambda query, key, i, j: (query == key) | (j <= i)))
ex.mistake(
    "the mask with exactly one of the two rules, not both",
    "`^` is True where one rule holds and the other does not.",
    "Which operator is True where both hold?",
)(_packed(lambda query, key, i, j: (query == key) ^ (j <= i)))
ex.mistake(
    "the mask of the other documents",
    "`!=` stands where `==` should: a token sees all earlier documents but its own.",
    "Which ids may the query see: the same or different ones?",
)(_packed(lambda query, key, i, j: (query != key) & (j <= i)))
ex.mistake(
    "the mask with True for hidden",
    "True means may attend, and here it says hidden.",
    "What does True mean in this course?",
)(_packed(lambda query, key, i, j: (query != key) | (j > i)))
ex.mistake(
    "the mask with earlier ids visible as well",
    "<= stands where == should: documents with smaller ids are seen.",
    "Which comparison is True for the same document only?",
)(_packed(lambda query, key, i, j: (key <= query) & (j <= i)))
ex.mistake(
    "the mask with larger ids visible as well",
    ">= stands where == should: documents with larger ids are seen.",
    "Which comparison is True for the same document only?",
)(_packed(lambda query, key, i, j: (key >= query) & (j <= i)))
ex.mistake(
    "the mask of ids alone, compared with <=",
    "The order of the ids is taken for the order of the tokens.",
    "What says which token is later: its id or its position?",
)(_packed(lambda query, key, i, j: key <= query))
ex.mistake(
    "the mask with neighbouring ids visible as well",
    "Ids that differ by one are taken for the same document.",
    "Which comparison is True for the same document only?",
)(_packed(lambda query, key, i, j: ((query - key).abs() <= 1) & (j <= i)))
ex.mistake(
    "the mask with keys of document 0 hidden",
    "0 is an id like any other here, not padding.",
    "What does the exercise say about the id 0?",
)(_packed(lambda query, key, i, j: (query == key) & (j <= i) & (key != 0)))
ex.mistake(
    "the mask with ids taken for a padding mask",
    "Every id but 0 is taken for a real token of one and the same text.",
    "What are the ids compared with?",
)(_packed(lambda query, key, i, j: (query != 0) & (key != 0) & (j <= i)))
ex.mistake(
    "the mask with ids used as key padding",
    "A key counts as visible because its id is not 0.",
    "What are the ids compared with?",
)(_packed(lambda query, key, i, j: (key != 0) & (j <= i)))
ex.mistake(
    "the mask with a document that comes again taken for a new one",
    "Borders are looked for between neighbours; same id means same document here.",
    "Does your rule look at the ids of query and key, or at what stands between them?",
)(lambda d: packed_mask(_runs(d)))
ex.mistake(
    "the mask of stretches of tokens alone, without the causal rule",
    "Borders are looked for between neighbours, and the future of a stretch is visible.",
    "Which of the two rules is missing?",
)(lambda d: _packed(lambda query, key, i, j: query == key)(_runs(d)))
ex.mistake(
    "the mask with the documents of the first row for the whole batch",
    "Every row is cut where the first one is.",
    "Which index of `documents` is the batch?",
)(lambda d: packed_mask(d[:1].expand(d.shape)))
ex.mistake(
    "the mask of the last token's document",
    "All keys are compared with one and the same query.",
    "Which id stands on the query's side of the comparison?",
)(lambda d: _packed(lambda query, key, i, j: (key == key[..., -1:]) & (j <= i))(d))
ex.mistake(
    "the mask of the first token's document",
    "All keys are compared with one and the same query.",
    "Which id stands on the query's side of the comparison?",
)(lambda d: _packed(lambda query, key, i, j: (key == key[..., :1]) & (j <= i))(d))
ex.mistake(
    "the mask with the first token of the row visible to all",
    "Key 0 has been made visible, whatever its document.",
    "May a token see the start of another document?",
)(_packed(lambda query, key, i, j: ((query == key) & (j <= i)) | (j == 0)))
ex.mistake(
    "the mask with ids compared with positions",
    "A key's position stands where its id should.",
    "What are the two sides of the comparison?",
)(_packed(lambda query, key, i, j: (query == j) & (j <= i)))
ex.mistake(
    "the mask without the dimension for heads",
    "(batch, n, n) is taken for (heads, n_q, n_k) when it meets the scores.",
    "Which shape does the exercise ask for?",
)(lambda d: packed_mask(d)[:, 0])
ex.mistake(
    "the mask with the batch in the place of the heads",
    "(1, batch, n, n) gives each head its documents, not each row of the batch.",
    "Which dimension of the scores is the batch?",
)(lambda d: packed_mask(d).transpose(0, 1))
ex.mistake(
    "the mask as numbers to be added, 0 and -inf",
    "That is what the exercise before makes of a mask; here it is bool.",
    "What stands for may attend: True, or 0?",
)(lambda d: additive_mask(packed_mask(d)))

ex.alternative("positions compared")(
    lambda d: (
        d.unsqueeze(-1).eq(d.unsqueeze(-2))
        & (torch.arange(d.shape[1])[:, None] >= torch.arange(d.shape[1]))
    ).unsqueeze(1)
)
ex.alternative("what is later or elsewhere, turned round")(
    lambda d: (
        ~(d[:, None, :, None] != d[:, None, None, :]).logical_or(
            torch.ones(d.shape[1], d.shape[1]).triu(1).bool()
        )
    )
)
ex.alternative("the difference of ids, in float64")(
    lambda d: (d.double()[:, None, :, None] - d.double()[:, None, None, :]).eq(0).tril()
)


@ex.alternative("a loop over the queries")
def _(documents):
    batch, n = documents.shape
    mask = torch.zeros(batch, 1, n, n, dtype=torch.bool)
    for i in range(n):
        mask[:, 0, i, : i + 1] = documents[:, : i + 1] == documents[:, i : i + 1]
    return mask


@ex.alternative("a loop over the documents")
def _(documents):
    blocks = torch.zeros(len(documents), documents.shape[1], documents.shape[1])
    for id in documents.unique():
        member = (documents == id).float()
        blocks += torch.einsum("bi,bj->bij", member, member)
    return blocks.tril().bool()[:, None]


# --- 5. left padding --------------------------------------------------------------------------

ex = Exercise(
    "left_padded_attention",
    chapter="06_masking",
    title="Causal attention with left padding",
    minutes=20,
    difficulty=4,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
A batch that *generates* text is padded on the **left**: then the newest token of every row stands
in the last column. The real tokens of row b are its **last** `lengths[b]` ones.

$$\text{visible}_{b,i,j} = (j \ge n - \text{length}_b) \wedge (j \le i), \qquad
  \text{output} = \mathrm{softmax}\left(\frac{Q K^\top}{\sqrt{d}}\right) V
  \text{ over the visible keys}$$

- A padded query sees nothing, since only padding stands before it. Its output is 0, never NaN.
- What stands at a padded position may be **anything, even NaN or inf**, in query, key and value. It
  must not reach the output: a weight of 0 is not enough, for 0 · NaN is NaN.
- Write it with a softmax of your own masked scores, or with `F.scaled_dot_product_attention`.
""",
    hints=(
        "Which keys does a padded query see, if a key must be real and not later than the query?",
        "Three steps: a mask from two rules joined by &, a softmax that gives 0 in an empty row, "
        "and values in which the padding has been replaced.",
        "real = torch.arange(n) >= n - lengths[:, None] has shape (batch, n); which of its forms "
        "meets the scores, and which one the values?",
    ),
)


@ex.solution
def left_padded_attention(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor) -> Tensor:
    """Causal attention in which the last lengths[b] tokens of row b are real, the others padding.

    query, key, value: (batch, heads, n, d), lengths: (batch,) -> (batch, heads, n, d).
    """
    ### BEGIN SOLUTION
    n, d = query.shape[-2:]
    position = torch.arange(n, device=query.device)
    real = position >= n - lengths[:, None]  # (n,) against (batch, 1) -> (batch, n)
    causal = position <= position[:, None]  # key <= query: (n_q, n_k)
    visible = real[:, None, None, :] & causal  # (batch, 1, n_q, n_k)

    # (batch, heads, n_q, d) x (batch, heads, d, n_k) -> (batch, heads, n_q, n_k)
    scores = query @ key.transpose(-2, -1) / math.sqrt(d)
    weights = torch.softmax(scores.masked_fill(~visible, -math.inf), dim=-1)
    weights = weights.masked_fill(~visible, 0.0)  # a padded query's row came out as 0 / 0
    value = value.masked_fill(~real[:, None, :, None], 0.0)  # the weight 0 times NaN would be NaN
    return weights @ value  # (batch, heads, n_q, n_k) x (batch, heads, n_k, d)
    ### END SOLUTION


def _left_case(g: torch.Generator, *shape: int, lengths: list[int]) -> Case:
    tensors = {name: normal(g, *shape) for name in ("query", "key", "value")}
    return tensors | {"lengths": torch.tensor(lengths)}


def _spoil(case: Case, names: tuple[str, ...], number: float) -> Case:
    """Put a number into all padded positions of some inputs."""
    n = case["query"].shape[-2]
    padded = torch.arange(n) < n - case["lengths"][:, None]  # (batch, n)
    return case | {name: case[name].masked_fill(padded[:, None, :, None], number) for name in names}


def _towering(g: torch.Generator) -> Case:
    """Visible scores around -100, and around 300 that of the last key, which is later."""
    case = _left_case(g, 1, 1, 4, 4, lengths=[3])
    key = case["key"] / 10 - 1
    key[:, :, 3] += 4
    return case | {"query": torch.full((1, 1, 4, 4), 50.0), "key": key}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    return [
        _left_case(g, 1, 1, 2, 1, lengths=[2]),
        _left_case(g, 1, 1, 3, 1, lengths=[2]),
        _left_case(g, 1, 1, 3, 2, lengths=[3]),
        _left_case(g, 2, 1, 3, 3, lengths=[3, 1]),
        _left_case(g, 2, 2, 4, 3, lengths=[1, 4]),
        _left_case(g, 2, 3, 3, 4, lengths=[0, 2]),
        _left_case(g, 3, 1, 1, 2, lengths=[1, 0, 1]),
        _towering(g),
        _spoil(_left_case(g, 1, 1, 3, 2, lengths=[2]), ("value",), NAN),
        _left_case(g, 3, 3, 4, 2, lengths=[2, 4, 3]),
        _left_case(g, 3, 2, 5, 6, lengths=[5, 2, 3]),
    ]


def _qkv(seed: int, *, batch: int = 2, n: int = 4) -> list[Tensor]:
    return some(seed, *[(batch, 2, n, 3)] * 3)


@ex.behaviour("the first real token sees itself alone and gets its own value")
def _(answer):
    query, key, value = _qkv(1)
    output = answer(query, key, value, torch.tensor([4, 2]))
    expect(output[0, :, 0], value[0, :, 0])
    expect(output[1, :, 2], value[1, :, 2])


@ex.behaviour("a padded query gets the output 0")
def _(answer):
    output = answer(*_qkv(2), torch.tensor([3, 0]))
    expect(output[0, :, :1], torch.zeros(2, 1, 3))
    expect(output[1], torch.zeros(2, 4, 3))


@ex.behaviour("the real tokens come out as if the padding were not there")
def _(answer):
    query, key, value = _qkv(3, batch=1)
    alone = answer(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], torch.tensor([3]))
    expect(answer(query, key, value, torch.tensor([3]))[:, :, 1:], alone)


@ex.behaviour("a later token cannot change an earlier output")
def _(answer):
    lengths = torch.tensor([4, 3])
    before = _qkv(4)
    after = [x.clone() for x in before]
    for x in after:
        x[:, :, 3] += 3
    expect(answer(*after, lengths)[:, :, :3], answer(*before, lengths)[:, :, :3])


@ex.behaviour("what stands at a padded position cannot change the output, not even NaN")
def _(answer):
    lengths = torch.tensor([2, 3])
    before = dict(zip(("query", "key", "value"), _qkv(5), strict=True)) | {"lengths": lengths}
    for number in (7.0, INF, NAN):
        spoiled = _spoil(before, ("query", "key", "value"), number)
        expect(answer.on(spoiled), answer.on(before), case=spoiled)


@ex.behaviour("a query that matches all keys alike gets the mean of the values it sees")
def _(answer):
    query, key, value = _qkv(6)
    output = answer(torch.zeros_like(query), key, value, torch.tensor([4, 3]))
    expect(output[0, :, 3], value[0].mean(1))
    expect(output[1, :, 2], value[1, :, 1:3].mean(1))


@ex.behaviour("batch elements do not meet")
def _(answer):
    query, key, value = _qkv(7)
    lengths = torch.tensor([4, 2])
    alone = answer(query[1:], key[1:], value[1:], lengths[1:])
    expect(answer(query, key, value, lengths)[1:], alone)


def _left_real(lengths: Tensor, n: int) -> Tensor:
    """Which positions are real, as it should be: (batch, n)."""
    return torch.arange(n) >= n - lengths[:, None]


def _triangle(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _left(*, real=None, see=None, scale=None, weigh=None, normalise=None, mix=None, clear=True):
    """Left-padded attention with one part replaced.

    real: (lengths, n) -> (batch, n); see: (real, n) -> visible (batch, 1 or heads, n, n).
    """

    def function(query, key, value, lengths):
        n = query.shape[-2]
        tokens = (real or _left_real)(lengths, n)
        visible = see(tokens, n) if see else tokens[:, None, None, :] & _triangle(n)
        scores = query @ key.mT * (scale(query, key) if scale else query.shape[-1] ** -0.5)
        if normalise:
            hidden = scores.masked_fill(~visible, -INF)
            weights = normalise(hidden).masked_fill(~visible, 0.0)
        else:
            weights = (weigh or visible_softmax)(scores, visible)
        if clear:
            value = value.masked_fill(~tokens[:, None, :, None], 0.0)
        return mix(weights, query, key, value) if mix else weights @ value

    return function


def _from_the_right(rule: Function) -> Function:
    """A rule on positions counted from the last token backwards."""
    return _left(real=lambda lengths, n: rule(n - 1 - torch.arange(n), lengths[:, None], n))


ex.mistakes_from(REALS, "attention", _from_the_right)
ex.mistakes_from(
    TRIANGLES,
    "attention",
    lambda rule: _left(
        see=lambda real, n: (
            real[:, None, None, :] & rule(torch.arange(n)[:, None], torch.arange(n), 0)
        )
    ),
)
# Of the shared parts those that can be told apart where n_q = n_k and the mask is always there.
ex.mistakes_from(
    [part for part in SCALES if "queries" not in part.name],
    "attention",
    lambda part: _left(scale=part),
)
ex.mistakes_from(NORMALISATIONS, "attention", lambda part: _left(normalise=part))
ex.mistakes_from(MIXTURES, "attention", lambda part: _left(mix=part))
ex.mistakes_from(MASKINGS[:-2], "attention", lambda part: _left(weigh=part))

ex.mistake(
    "attention with the padding visible",
    "The causal rule stands alone: real queries see the padding before them.",
    "Where do the lengths enter?",
)(_left(see=lambda real, n: _triangle(n).expand(len(real), 1, n, n), clear=False))
ex.mistake(
    "attention with the future visible",
    "The padding is hidden, but later tokens are not.",
    "Which of the two rules is missing?",
)(_left(see=lambda real, n: real[:, None, None, :].expand(-1, 1, n, n)))
ex.mistake(
    "attention with the future visible to real queries",
    "Real queries see real keys, also later ones.",
    "Which of the two rules is missing?",
)(_left(see=lambda real, n: real[:, None, None, :] & real[:, None, :, None]))
ex.mistake(
    "attention with or instead of and",
    "A key is visible if one of the two rules allows it.",
    "Must both rules allow a key, or is one enough?",
)(_left(see=lambda real, n: real[:, None, None, :] | _triangle(n), clear=False))
ex.mistake(
    "attention with the padding hidden along the queries instead of the keys",
    "A padded query is blind, but a real one sees the padding.",
    "Which dimension of the scores is that of the keys?",
)(_left(see=lambda real, n: real[:, None, :, None] & _triangle(n)))
ex.mistake(
    "attention with the padding hidden along the queries, and its values left as they are",
    "A padded query is blind, but a real one sees the padding.",
    "Which dimension of the scores is that of the keys?",
)(_left(see=lambda real, n: real[:, None, :, None] & _triangle(n), clear=False))
ex.mistake(
    "attention with a length for each head instead of each row of the batch",
    "The mask lines up with the heads: its first dimension is missing.",
    "Which shape must the mask have so that its batch meets the batch of the scores?",
)(_left(see=lambda real, n: real[None, :, None, :] & _triangle(n)))
ex.mistake(
    "attention with NaN from a padded value",
    "The weight is 0, but 0 · NaN is NaN.",
    "What must be done to the values before they are multiplied by weights of 0?",
)(_left(clear=False))
ex.mistake(
    "attention with NaN made 0 at the very end",
    "A padded value that is NaN has spoiled the sums of the real tokens before.",
    "Where does the NaN arise, and what is lost when it is replaced only in the output?",
)(lambda q, k, v, lengths: _left(clear=False)(q, k, v, lengths).nan_to_num(0.0, 0.0, 0.0))
ex.mistake(
    "attention with NaN at padded queries, and from padded values",
    "A row of nothing but -inf is 0 / 0, and 0 · NaN is NaN.",
    "Which rows have no visible key, and what should stand there?",
)(_left(weigh=filled, clear=False))
ex.mistake(
    "attention with equal shares at padded queries, and NaN from padded values",
    "A softmax of equal numbers (finfo.min, -1e9) is 1/n everywhere.",
    "Which rows have no visible key, and what should stand there?",
)(_left(weigh=lambda s, m: filled(s, m, torch.finfo(s.dtype).min), clear=False))
ex.mistake(
    "attention in which a padded query sees itself",
    "The diagonal was opened to avoid NaN, so a padded query gives its own value instead of 0.",
    "What is the output of a query that may see nothing?",
)(_left(see=lambda real, n: real[:, None, None, :] & _triangle(n) | _eye(n), clear=False))
ex.mistake(
    "attention in which a padded query sees everything before it",
    "Rows without a visible key were opened to avoid NaN.",
    "What is the output of a query that may see nothing?",
)(_left(see=lambda real, n: (real[:, None, None, :] | ~real[:, None, :, None]) & _triangle(n),
        clear=False))  # fmt: skip
ex.mistake(
    "attention scaled by heads times d",
    "√(heads · d) stands where the width of one head should.",
    "Over how many products does one score sum?",
)(_left(scale=lambda q, k: (q.shape[1] * q.shape[-1]) ** -0.5))


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.bool)


@ex.alternative("PyTorch's scaled_dot_product_attention on cleared inputs")
def _(query, key, value, lengths):
    n = query.shape[2]
    real = _left_real(lengths, n)
    query, key, value = (x.masked_fill(~real[:, None, :, None], 0.0) for x in (query, key, value))
    mask = real[:, None, None, :] & _triangle(n)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.masked_fill(~real[:, None, :, None], 0.0)


@ex.alternative("each row without its padding, then zeros in front")
def _(query, key, value, lengths):
    rows = []
    for q, k, v, length in zip(query, key, value, lengths.tolist(), strict=True):
        start = q.shape[1] - length
        q, k, v = q[:, start:], k[:, start:], v[:, start:]
        output = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        rows.append(F.pad(output, (0, 0, start, 0)))
    return torch.stack(rows)


@ex.alternative("a loop over the queries")
def _(query, key, value, lengths):
    batch, _, n, d = query.shape
    output = torch.zeros_like(query)
    for b in range(batch):
        start = n - int(lengths[b])
        for i in range(start, n):
            scores = torch.einsum("hd,hjd->hj", query[b, :, i], key[b, :, start : i + 1])
            weights = (scores / d**0.5).softmax(-1)
            output[b, :, i] = torch.einsum("hj,hjd->hd", weights, value[b, :, start : i + 1])
    return output


@ex.alternative("einsum in float64, NaN to 0 in inputs and weights")
def _(query, key, value, lengths):
    q, k, v = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (query, key, value))
    n = q.shape[-2]
    hidden = (torch.arange(n) < n - lengths[:, None])[:, None, None] | ~_triangle(n)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
    weights = torch.where(hidden, -INF, scores).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, v).to(query.dtype)


@ex.alternative("finfo.min, and the mask again")
def _(query, key, value, lengths):
    n = query.size(2)
    real = torch.arange(n) + lengths[:, None] >= n
    visible = (real[:, :, None] & real[:, None, :]).tril()[:, None]
    scores = (query / query.size(-1) ** 0.5) @ key.mT
    scores = torch.where(visible, scores, torch.finfo(scores.dtype).min)
    value = torch.where(real[:, None, :, None], value, 0.0)
    return torch.where(visible, scores.softmax(-1), 0.0) @ value


# --- 6. the loss ------------------------------------------------------------------------------

ex = Exercise(
    "masked_loss",
    chapter="06_masking",
    title="A loss that padding cannot touch",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    prompt=r"""
Padding is hidden from attention, but the model still gives logits there. They must not count:

$$\text{loss} = -\frac{1}{\sum_b \text{length}_b} \sum_b \sum_{i < \text{length}_b}
  \log \mathrm{softmax}(\text{logits}_{b,i})_{\text{target}_{b,i}}$$

That is the mean cross-entropy, in nats, over all real tokens of the batch. Every real token counts
alike, in a long text or a short one.

- The real tokens of row b are its first `lengths[b]` ones. A length may be 0, but not all of them.
- `targets[b, i]` is the right answer to `logits[b, i]`: nothing needs to be shifted. Class 0 is a
  class like any other. At padded positions there is some class too; it means nothing.
- Logits may be as large as 1000. `F.cross_entropy` is allowed.
""",
    hints=(
        "How many terms are in the sum, and by what is it divided?",
        "With a bool mask of shape (batch, n), `x[mask]` picks the real tokens of all rows.",
        "real = torch.arange(n) < lengths[:, None]; what are the shapes of logits[real] and of "
        "targets[real]?",
    ),
)


@ex.solution
def masked_loss(logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross-entropy [nats] over the real tokens: those at positions below their row's length.

    logits: (batch, n, V), targets: ints (batch, n), lengths: (batch,) -> a number, shape ().
    """
    ### BEGIN SOLUTION
    n = targets.shape[1]
    real = torch.arange(n, device=targets.device) < lengths[:, None]  # (batch, n)
    # (batch, n, V) -> (tokens, V) and (batch, n) -> (tokens,): the padding is gone.
    return F.cross_entropy(logits[real], targets[real])
    ### END SOLUTION


def _loss_case(g: torch.Generator, batch: int, n: int, V: int, lengths: list[int]) -> Case:
    return {
        "logits": normal(g, batch, n, V),
        "targets": torch.randint(V, (batch, n), generator=g),
        "lengths": torch.tensor(lengths),
    }


def _scaled_case(g: torch.Generator, least: float, most: float) -> Case:
    """Logits that are far apart; the right answers get the lowest one in turn with the highest."""
    case = _loss_case(g, 1, 4, 3, [4])
    logits = torch.full((1, 4, 3), least)
    logits[..., 0] = most
    return case | {"logits": logits + case["logits"], "targets": torch.tensor([[0, 1, 0, 2]])}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    high = _scaled_case(g, 100.0, 200.0)
    return [
        _loss_case(g, 1, 2, 2, [1]),
        _loss_case(g, 1, 2, 3, [2]),
        _loss_case(g, 2, 3, 4, [3, 1]),
        _loss_case(g, 2, 3, 3, [0, 2]),
        _loss_case(g, 3, 3, 3, [2, 3, 1]),
        _loss_case(g, 2, 4, 2, [4, 4]),
        _loss_case(g, 3, 4, 5, [1, 2, 4]),
        _loss_case(g, 4, 5, 3, [5, 0, 2, 1]),
        _scaled_case(g, -60.0, 60.0),
        high | {"targets": torch.zeros(1, 4, dtype=torch.long)},
    ]


LOGITS = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 3.0], [5.0, 0.0, 0.0]]])
TARGETS = torch.tensor([[0, 2], [1, 1]])


@ex.behaviour("with equal logits it is log V")
def _(answer):
    loss = answer(torch.zeros(2, 2, 3), TARGETS, torch.tensor([2, 1]))
    expect(loss, torch.tensor(math.log(3)))


@ex.behaviour("what stands at a padded position changes nothing")
def _(answer):
    lengths = torch.tensor([2, 1])
    other, others = LOGITS.clone(), TARGETS.clone()
    other[1, 1], others[1, 1] = torch.tensor([0.0, 9.0, -3.0]), 0
    expect(answer(other, others, lengths), answer(LOGITS, TARGETS, lengths))


@ex.behaviour("padding the rows further changes nothing")
def _(answer):
    lengths = torch.tensor([2, 1])
    wider = answer(F.pad(LOGITS, (0, 0, 0, 3), value=1.0), F.pad(TARGETS, (0, 3)), lengths)
    expect(wider, answer(LOGITS, TARGETS, lengths))


@ex.behaviour("every real token counts alike, in a long text or a short one")
def _(answer):
    one = torch.tensor([1])
    tokens = [(LOGITS[:1, :1], TARGETS[:1, :1]), (LOGITS[:1, 1:], TARGETS[:1, 1:])]
    tokens.append((LOGITS[1:, :1], TARGETS[1:, :1]))
    mean = sum(answer(logits, targets, one) for logits, targets in tokens) / 3
    expect(answer(LOGITS, TARGETS, torch.tensor([2, 1])), mean)


@ex.behaviour("a row of length 0 changes nothing")
def _(answer):
    with_empty = answer(LOGITS, TARGETS, torch.tensor([2, 0]))
    expect(with_empty, answer(LOGITS[:1], TARGETS[:1], torch.tensor([2])))


@ex.behaviour("adding a number to all logits of a token changes nothing")
def _(answer):
    lengths = torch.tensor([2, 2])
    shift = torch.tensor([[[1.0], [-2.0]], [[0.5], [3.0]]])
    expect(answer(LOGITS + shift, TARGETS, lengths), answer(LOGITS, TARGETS, lengths))


@ex.behaviour("logits of ±1000 give a loss of 2000, not inf")
def _(answer):
    case = {
        "logits": torch.tensor([[[1000.0, -1000.0]]]),
        "targets": torch.tensor([[1]]),
        "lengths": torch.tensor([1]),
    }
    expect(answer.on(case), torch.tensor(2000.0), case=case)


def _loss(*, real=None, reduce=None, token=None) -> Function:
    """The loss with one part replaced.

    real: (position, lengths (batch, 1), n) -> (batch, n); token: (logits, targets) -> (batch, n);
    reduce: (losses (batch, n), real (batch, n)) -> ().
    """

    def function(logits, targets, lengths):
        n = targets.shape[1]
        chosen = real or (lambda at, lengths, n: at < lengths)
        where = chosen(torch.arange(n), lengths[:, None], n)
        losses = (token or per_token)(logits, targets)
        return reduce(losses, where) if reduce else losses[where].mean()

    return function


DIVIDE = "By how many tokens is the sum divided?"

REDUCTIONS = [
    Mistake(
        "with the padding counted",
        "The lengths have no effect: padded positions are averaged too.",
        "Where do the lengths enter?",
        lambda losses, real: losses.mean(),
    ),
    Mistake(
        "divided by batch · n instead of the number of real tokens",
        "Padded positions add nothing to the sum, but they are counted.",
        DIVIDE,
        lambda losses, real: (losses * real).mean(),
    ),
    Mistake(
        "averaged within each row first, 0 / 0 for an empty one",
        "A token of a short row counts more than one of a long row, and length 0 gives NaN.",
        "Is it the mean of means, or one mean over all real tokens?",
        lambda losses, real: ((losses * real).sum(1) / real.sum(1)).mean(),
    ),
    Mistake(
        "averaged within each row first, 0 for an empty one",
        "A token of a short row counts more than one of a long row.",
        "Is it the mean of means, or one mean over all real tokens?",
        lambda losses, real: ((losses * real).sum(1) / real.sum(1).clamp(min=1)).mean(),
    ),
    Mistake(
        "averaged within each row first, empty rows left out",
        "A token of a short row counts more than one of a long row.",
        "Is it the mean of means, or one mean over all real tokens?",
        lambda losses, real: ((losses * real).sum(1) / real.sum(1)).nanmean(),
    ),
    Mistake(
        "summed instead of averaged",
        "The sum grows with the number of tokens.",
        DIVIDE,
        lambda losses, real: losses[real].sum(),
    ),
    Mistake(
        "divided by the number of rows",
        "The sum over a row grows with its length.",
        DIVIDE,
        lambda losses, real: losses[real].sum() / len(losses),
    ),
    Mistake(
        "divided by n",
        "The sum over the batch grows with its size.",
        DIVIDE,
        lambda losses, real: losses[real].sum() / losses.shape[1],
    ),
    Mistake(
        "divided by the number of real tokens plus one",
        "Something was added so as not to divide by 0.",
        DIVIDE,
        lambda losses, real: losses[real].sum() / (real.sum() + 1),
    ),
    Mistake(
        "summed over all positions and divided by the number of real tokens",
        "The padding has left the count, but not the sum.",
        "Which terms are in the sum?",
        lambda losses, real: losses.sum() / real.sum(),
    ),
    Mistake(
        "with the sign turned round",
        "That is the mean log-probability, which is never above 0.",
        "Should a good model have a low loss or a high one?",
        lambda losses, real: -losses[real].mean(),
    ),
    Mistake(
        "in bits instead of nats",
        "The logarithm is to the base 2.",
        "What is the loss of two equal logits: log 2, or 1?",
        lambda losses, real: losses[real].mean() / math.log(2),
    ),
    Mistake(
        "as perplexity",
        "exp of the mean loss is the perplexity.",
        "Does the formula take exp at the end?",
        lambda losses, real: losses[real].mean().exp(),
    ),
    Mistake(
        "as the logarithm of the mean probability",
        "Mean and logarithm are in the wrong order.",
        "Is it the mean of logarithms, or the logarithm of a mean?",
        lambda losses, real: -(-losses[real]).exp().mean().log(),
    ),
]

TOKENS = [
    *CROSS_ENTROPIES,
    Mistake(
        "averaged over the classes too",
        "A product with a one-hot target is V numbers, of which one counts: they are to be summed.",
        "Over which dimension do you take the mean, and over which the sum?",
        lambda logits, targets: per_token(logits, targets) / logits.shape[-1],
    ),
    Mistake(
        "with a yes or no for every class",
        "Binary cross-entropy looks at each class alone: they do not compete.",
        "Which classes share the probability 1?",
        lambda logits, targets: F.binary_cross_entropy_with_logits(
            logits, F.one_hot(targets, logits.shape[-1]).to(logits.dtype), reduction="none"
        ).mean(-1),
    ),
    Mistake(
        "as the share of wrong answers",
        "argmax has no useful gradient, and it does not see how sure the model is.",
        "Which quantity of the formula says how sure the model is?",
        lambda logits, targets: (logits.argmax(-1) != targets).to(logits.dtype),
    ),
]

ex.mistakes_from(REALS, "the loss", lambda rule: _loss(real=rule))
ex.mistakes_from(REDUCTIONS, "the loss", lambda part: _loss(reduce=part))
ex.mistakes_from(TOKENS, "the loss", lambda part: _loss(token=part))
ex.mistake(
    "the loss with class 0 left out",
    "0 is a class like any other here, not padding.",
    "What decides whether a position is real: its target or its length?",
)(lambda x, t, lengths: _loss(real=lambda at, L, n: (at < L) & (t != 0))(x, t, lengths))
ex.mistake(
    "the loss over the positions whose target is not 0",
    "The padding is guessed from the targets; the lengths have no effect.",
    "What decides whether a position is real: its target or its length?",
)(lambda x, t, lengths: _loss(real=lambda at, L, n: t != 0)(x, t, lengths))
ex.mistake(
    "the loss with the targets shifted by one",
    "targets[b, i] belongs to logits[b, i]; the shift to the next token has been done already.",
    "Which target is the answer to the logits at position 0?",
)(
    lambda x, t, lengths: per_token(x[:, :-1], t[:, 1:])[
        torch.arange(1, t.shape[1]) < lengths[:, None]
    ].mean()
)
ex.mistake(
    "the loss with the logits of the padding set to 0, and counted",
    "Equal logits cost log V each.",
    "Is a padded position left out, or is it a position with other logits?",
)(lambda x, t, lengths: per_token(x * _is_real(lengths, t.shape[1])[..., None], t).mean())
ex.mistake(
    "the loss with the targets of the padding set to 0, and counted",
    "0 is a class like any other: the model is asked to predict it at every padded position.",
    "Is a padded position left out, or is it a position with another target?",
)(lambda x, t, lengths: per_token(x, t * _is_real(lengths, t.shape[1])).mean())
ex.mistake(
    "the loss with the logits of the padding set to -inf",
    "Softmax of nothing but -inf is 0 / 0.",
    "Is a padded position left out, or is it a position with other logits?",
)(
    lambda x, t, lengths: per_token(
        x.masked_fill(~_is_real(lengths, t.shape[1])[..., None], -INF), t
    ).mean()
)

ex.alternative("a sum over real tokens, divided by their number")(
    lambda x, t, lengths: (
        (F.cross_entropy(x.mT, t, reduction="none") * _is_real(lengths, t.shape[1])).sum()
        / lengths.sum()
    )
)
ex.alternative("ignore_index")(
    lambda x, t, lengths: F.cross_entropy(
        x.flatten(0, 1), t.masked_fill(~_is_real(lengths, t.shape[1]), -100).flatten()
    )
)
ex.alternative("nll_loss of log_softmax in float64")(
    lambda x, t, lengths: F.nll_loss(
        x.double().log_softmax(-1)[_is_real(lengths, t.shape[1])],
        t[_is_real(lengths, t.shape[1])],
    ).to(x.dtype)
)


@ex.alternative("a loop over rows and tokens")
def _(logits, targets, lengths):
    losses = []
    for b, length in enumerate(lengths.tolist()):
        for i in range(length):
            losses.append(logits[b, i].logsumexp(0) - logits[b, i, targets[b, i]])
    return torch.stack(losses).mean()


@ex.alternative("rows cut and joined")
def _(logits, targets, lengths):
    kept = [int(length) for length in lengths]
    x = torch.cat([row[:length] for row, length in zip(logits, kept, strict=True)])
    t = torch.cat([row[:length] for row, length in zip(targets, kept, strict=True)])
    return -(F.one_hot(t, x.shape[-1]) * F.log_softmax(x, dim=-1)).sum(-1).mean()
