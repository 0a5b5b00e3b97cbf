"""Exercises of chapter 11: attention that leaves most pairs out, and never holds all scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import Broken, expect
from ._inputs import normal, some
from ._watch import watched
from ._wrong_parts import MIXTURES, NORMALISATIONS, SCALES

INF = math.inf


# --- what several exercises use ---------------------------------------------------------------


def _bools(*rows: str) -> Tensor:
    """ "110" is True, True, False."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


SIDES = (
    "How many keys may a query in the middle of the text see in all, for a window of 1 and of 2?"
)
OWN = "How far is a token from itself, and does your comparison let that through?"
ENDS = "Which keys does query 0 see: is there anything before it?"

# Wrong windows of `w` keys on each side: (query (n, 1), key (n,), n, w) -> visible.
WINDOWS = [
    Mistake(
        "with a window one key too wide on each side",
        "A key at distance `window` + 1 is let through.",
        SIDES,
        lambda i, j, n, w: (j - i).abs() <= w + 1,
    ),
    Mistake(
        "with a window one key too narrow on each side",
        "The comparison is < where it should be <=.",
        SIDES,
        lambda i, j, n, w: (j - i).abs() < w,
    ),
    Mistake(
        "with a window one key too narrow on the right",
        "A slice or range ends before its last number.",
        "`range(i - window, i + window)`: which key is the last one?",
        lambda i, j, n, w: (j >= i - w) & (j < i + w),
    ),
    Mistake(
        "with a window one key too narrow on the left",
        "The comparison on the left is > where it should be >=.",
        SIDES,
        lambda i, j, n, w: (j > i - w) & (j <= i + w),
    ),
    Mistake(
        "with a window that looks back only",
        "The keys after the query are hidden, as in a decoder.",
        "On which sides of the query does the window lie?",
        lambda i, j, n, w: (j >= i - w) & (j <= i),
    ),
    Mistake(
        "with a window that looks ahead only",
        "The keys before the query are hidden.",
        "On which sides of the query does the window lie?",
        lambda i, j, n, w: (j >= i) & (j <= i + w),
    ),
    Mistake(
        "with a window that looks back twice as far and not ahead",
        "All 2 · window + 1 keys end at the query instead of lying round it.",
        "At which place of its window does the query itself stand?",
        lambda i, j, n, w: (j >= i - 2 * w) & (j <= i),
    ),
    Mistake(
        "with a window that looks ahead twice as far and not back",
        "All 2 · window + 1 keys begin at the query instead of lying round it.",
        "At which place of its window does the query itself stand?",
        lambda i, j, n, w: (j >= i) & (j <= i + 2 * w),
    ),
    Mistake(
        "with half the window on each side",
        "`window` is taken for the width of both sides together.",
        SIDES,
        lambda i, j, n, w: (j - i).abs() <= w // 2,
    ),
    Mistake(
        "with twice the window on each side",
        "The window is doubled once too often.",
        SIDES,
        lambda i, j, n, w: (j - i).abs() <= 2 * w,
    ),
    Mistake(
        "with each token's own key hidden",
        "A token sees its neighbours and not itself.",
        OWN,
        lambda i, j, n, w: ((j - i).abs() <= w) & (j != i),
    ),
    Mistake(
        "with nothing of the window but each token itself",
        "The neighbours are hidden.",
        SIDES,
        lambda i, j, n, w: i == j,
    ),
    Mistake(
        "with nothing of the window but its two ends",
        "`==` stands where an inequality should.",
        "Which comparison is True for every distance up to the window?",
        lambda i, j, n, w: (j - i).abs() == w,
    ),
    Mistake(
        "with the window hidden and the rest visible",
        "True means may attend, and here the near keys are hidden.",
        "Is your comparison True for the keys that may be seen, or for the others?",
        lambda i, j, n, w: (j - i).abs() > w,
    ),
    Mistake(
        "with a window that wraps around the ends",
        "The first token sees the last ones, as `roll` and negative indices make it.",
        ENDS,
        lambda i, j, n, w: ((j - i) % n <= w) | ((i - j) % n <= w),
    ),
    Mistake(
        "with a window that is moved inwards at the ends",
        "A query near an end makes up on the other side for the keys it lacks.",
        ENDS,
        lambda i, j, n, w: (
            ((s := (i - w).clamp(min=0).clamp(max=max(n - 2 * w - 1, 0))) <= j) & (j <= s + 2 * w)
        ),
    ),
    Mistake(
        "with blocks in place of a sliding window",
        "A token next to a block's border cannot see across it.",
        "Do two neighbours always see each other?",
        lambda i, j, n, w: i // max(w, 1) == j // max(w, 1),
    ),
    Mistake(
        "with whole neighbouring blocks visible",
        "Three blocks are looked at, but the keys in them that are too far away are not hidden.",
        "How far is the furthest key of the block next door?",
        lambda i, j, n, w: (i // max(w, 1) - j // max(w, 1)).abs() <= min(w, 1),
    ),
    Mistake(
        "with only every second key of a window twice as wide",
        "That is a dilated window.",
        "Does a token see its next neighbour?",
        lambda i, j, n, w: ((j - i).abs() <= 2 * w) & ((j - i) % 2 == 0),
    ),
    Mistake(
        "with no limit where the window is 0",
        "`if window:` does not tell 0 from nothing given.",
        "What does a token see in a window of 0?",
        lambda i, j, n, w: ((j - i).abs() <= w) | (w == 0),
    ),
]


# --- 1. a sliding window ----------------------------------------------------------------------

ex = Exercise(
    "sliding_window",
    chapter="11_sparse_attention",
    title="A sliding window",
    minutes=10,
    difficulty=2,
    importance=5,
    batched=True,
    prompt=r"""
Most of what a token needs stands near it. In a **sliding window** query $i$ stands at the key
position $p_i = i + n_k - n_q$, and sees the keys from `left` before it to `right` after it, both
included. All other scores become $-\infty$, so that softmax gives them the weight 0:

$$S'_{ij} = \begin{cases} S_{ij} & p_i - \text{left} \le j \le p_i + \text{right} \\
  -\infty & \text{otherwise} \end{cases}$$

- With n_q = n_k query $i$ stands at key $i$. With fewer queries than keys, as when the earlier keys
  come from a cache, the **last query stands at the last key**; with more queries than keys the
  first ones stand before every key.
- `left` and `right` are at least 0 and may reach beyond the ends of the text. The window does not
  wrap around. A query whose window holds no key sees nothing: its row is all `-inf`.
- Hidden scores are **replaced** by exactly `-inf`, whatever they were, `inf` and NaN included.
- Any dimensions may stand in front of `(n_q, n_k)`.
""",
    hints=(
        "With 2 queries and 5 keys, at which key does query 0 stand, and which keys does it see "
        "for left = 1 and right = 0?",
        "A key is visible where two comparisons hold at once, one for each end of the window. Both "
        "compare its position with the query's position, not with the query's index.",
        "position = torch.arange(n_q)[:, None] + n_k - n_q is (n_q, 1), the keys are (n_k,): which "
        "two comparisons of the two make the (n_q, n_k) mask?",
    ),
)


@ex.solution
def sliding_window(scores: Tensor, left: int, right: int) -> Tensor:
    """Scores (..., n_q, n_k) with -inf outside each query's window (Beltagy et al. 2020, §3.1).

    Query i stands at p = i + n_k - n_q and sees the keys p - left to p + right.
    """
    ### BEGIN SOLUTION
    n_q, n_k = scores.shape[-2:]
    key = torch.arange(n_k, device=scores.device)  # (n_k,)
    query = torch.arange(n_q, device=scores.device)[:, None] + n_k - n_q  # (n_q, 1)
    visible = (key >= query - left) & (key <= query + right)  # -> (n_q, n_k)
    return scores.masked_fill(~visible, -math.inf)  # (n_q, n_k) broadcasts to (..., n_q, n_k)
    ### END SOLUTION


# Shapes of scores, left, right.
SIZES = [
    ((3, 3), 1, 0),
    ((1, 1), 0, 0),
    ((3, 3), 0, 1),
    ((4, 4), 1, 2),
    ((6, 6), 2, 1),
    ((7, 7), 3, 0),
    ((2, 5), 2, 1),
    ((5, 2), 1, 3),
    ((6, 3), 0, 2),
    ((1, 5), 1, 2),
    ((4, 4), 9, 9),
    ((7, 7), 1, 4),
    ((2, 1, 5, 5), 2, 2),
    ((4, 7), 3, 1),
    ((4, 3, 4), 2, 0),
]


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    cases = [{"scores": normal(g, *s), "left": a, "right": b} for s, a, b in SIZES]
    spoiled = normal(g, 3, 4)
    spoiled[0, 0], spoiled[0, 3], spoiled[2, 0] = INF, math.nan, -INF  # hidden, all three
    zeros = normal(g, 4, 4) * torch.eye(4)  # a visible score may be 0
    return [
        *cases,
        {"scores": spoiled, "left": 0, "right": 0},
        {"scores": zeros, "left": 1, "right": 1},
        {"scores": normal(g, 3, 4, 6), "left": 2, "right": 1},
    ]


@ex.behaviour("query i sees the keys from `left` before it to `right` after it, both included")
def _(answer):
    case = {"scores": torch.zeros(5, 5), "left": 1, "right": 2}
    visible = _bools("11100", "11110", "01111", "00111", "00011")
    expect(answer.on(case), torch.zeros(5, 5).masked_fill(~visible, -INF), case=case)


@ex.behaviour("left = right = 0 leaves each query its own key")
def _(answer):
    case = {"scores": torch.ones(3, 3), "left": 0, "right": 0}
    expect(answer.on(case), torch.eye(3).log() + torch.ones(3, 3), case=case)


@ex.behaviour("the last query stands at the last key")
def _(answer):
    case = {"scores": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "left": 1, "right": 0}
    expect(answer.on(case), torch.tensor([[-INF, -INF, 3.0, 4.0]]), case=case)


@ex.behaviour("a query that stands before every key sees only what its window reaches")
def _(answer):
    case = {"scores": torch.ones(4, 2), "left": 0, "right": 1}
    want = torch.tensor([[-INF, -INF], [1.0, -INF], [1.0, 1.0], [-INF, 1.0]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("a window as wide as the text hides nothing")
def _(answer):
    (scores,) = some(1, (2, 4, 4))
    expect(answer(scores, 3, 3), scores)


@ex.behaviour("a hidden score is -inf, whatever it was")
def _(answer):
    scores = torch.zeros(2, 2)
    for hidden in (7.0, INF, math.nan):
        scores[0, 1] = hidden
        case = {"scores": scores.clone(), "left": 1, "right": 0}
        got = answer.on(case)[0, 1].item()
        if got != -INF:
            raise Broken(f"a hidden score came out as {got:.4g}", case=case)


@ex.behaviour("the last rows come out alike whether the earlier queries are there or not")
def _(answer):
    (scores,) = some(2, (5, 5))
    for rows in (1, 2, 4):
        expect(answer(scores[-rows:], 2, 1), answer(scores, 2, 1)[-rows:])


@ex.behaviour("batch elements do not meet")
def _(answer):
    (scores,) = some(3, (3, 4, 4))
    expect(answer(scores, 1, 1)[1], answer(scores[1], 1, 1))


def _distance(scores: Tensor) -> Tensor:
    """How far each key lies after its query, (n_q, n_k)."""
    n_q, n_k = scores.shape[-2:]
    return torch.arange(n_k) - torch.arange(n_q)[:, None] - (n_k - n_q)


def _inside(scores: Tensor, left: int, right: int) -> Tensor:
    """As it should be, (n_q, n_k)."""
    distance = _distance(scores)
    return (distance >= -left) & (distance <= right)


def _showing(rule: Function) -> Function:
    """The scores with -inf where `rule(distance, left, right, n_q, n_k)` does not say visible."""

    def function(scores, left, right):
        visible = rule(_distance(scores), left, right, *scores.shape[-2:])
        return scores.masked_fill(~visible, -INF)

    return function


def _changed(change: Function) -> Function:
    """The right window, another change: `change(scores, hidden)`."""
    return lambda scores, left, right: change(scores, ~_inside(scores, left, right))


def _within(distance: Tensor, left: int, right: int) -> Tensor:
    return (distance >= -left) & (distance <= right)


FIRST = "Which keys does query 2 see for left = 1 and right = 0, and is the outermost one visible?"
WHICH = "Which of the two numbers counts the keys before the query?"
CORNER = "With one query and four keys, as when three are cached, at which key does it stand?"
BEFORE = "What is n_k - n_q with five queries and two keys, and where does query 0 stand then?"
TOP_LEFT = "The last query stands at the last key, not the first query at the first one."
REPLACE = "Which operation puts -inf in place of a hidden score, whatever it was?"

# (distance of the key after the query, left, right, n_q, n_k) -> visible.
PLACES = [
    ("with one key too many on the left", "The window begins at p - left - 1.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x, a + 1, b)),
    ("with one key too few on the left",
     "The window begins at p - left + 1: the comparison is > where it should be >=.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x, a - 1, b)),
    ("with one key too many on the right", "The window ends at p + right + 1.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x, a, b + 1)),
    ("with one key too few on the right",
     "The window ends at p + right - 1, as a slice that stops before its end does.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x, a, b - 1)),
    ("with one key too many on both sides", "Both ends of the window lie one key too far.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x, a + 1, b + 1)),
    ("with one key too few on both sides",
     "Both comparisons are strict, and both ends belong to the window.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x, a - 1, b - 1)),
    ("with the window shifted one key to the left", "Positions count from 0 here.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x + 1, a, b)),
    ("with the window shifted one key to the right", "Positions count from 0 here.", FIRST,
     lambda x, a, b, n_q, n_k: _within(x - 1, a, b)),
    ("with no limit on the left", "Nothing hides the keys far before the query.",
     "Which comparison hides the keys that lie too far back?",
     lambda x, a, b, n_q, n_k: x <= b),
    ("with no limit on the right", "Nothing hides the keys far after the query.",
     "Which comparison hides the keys that lie too far ahead?",
     lambda x, a, b, n_q, n_k: x >= -a),
    ("with nothing visible before the query", "`left` has no effect.", WHICH,
     lambda x, a, b, n_q, n_k: _within(x, 0, b)),
    ("with nothing visible after the query", "`right` has no effect: the window is causal.", WHICH,
     lambda x, a, b, n_q, n_k: _within(x, a, 0)),
    ("with left and right swapped", "`right` keys are visible before the query, `left` after it.",
     WHICH, lambda x, a, b, n_q, n_k: _within(x, b, a)),
    ("with `left` keys on both sides", "`right` has no effect.", WHICH,
     lambda x, a, b, n_q, n_k: x.abs() <= a),
    ("with `right` keys on both sides", "`left` has no effect.", WHICH,
     lambda x, a, b, n_q, n_k: x.abs() <= b),
    ("with left + right keys on both sides", "The two are added.", WHICH,
     lambda x, a, b, n_q, n_k: x.abs() <= a + b),
    ("with (left + right) / 2 keys on both sides",
     "left + right is taken for a width that lies evenly round the query.", WHICH,
     lambda x, a, b, n_q, n_k: x.abs() <= (a + b) // 2),
    ("with left + right keys before the query", "The whole window lies before the query.", WHICH,
     lambda x, a, b, n_q, n_k: _within(x, a + b, 0)),
    ("with the query's own key hidden", "The window has a hole in the middle.", OWN,
     lambda x, a, b, n_q, n_k: _within(x, a, b) & (x != 0)),
    ("with nothing visible but the query's own key", "The window has no effect.",
     "Where do `left` and `right` enter?", lambda x, a, b, n_q, n_k: x == 0),
    ("with the window hidden and the rest visible", "The condition is the wrong way round.",
     "Does `masked_fill` fill where its argument is True or where it is False?",
     lambda x, a, b, n_q, n_k: ~_within(x, a, b)),
    ("aligned at the top left", TOP_LEFT, CORNER,
     lambda x, a, b, n_q, n_k: _within(x + n_k - n_q, a, b)),
    ("aligned at the top left, with one key too few on the right", TOP_LEFT, CORNER,
     lambda x, a, b, n_q, n_k: _within(x + n_k - n_q, a, b - 1)),
    ("aligned at the top left, with one key too few on the left", TOP_LEFT, CORNER,
     lambda x, a, b, n_q, n_k: _within(x + n_k - n_q, a - 1, b)),
    ("aligned at the top left, with left and right swapped", TOP_LEFT, CORNER,
     lambda x, a, b, n_q, n_k: _within(x + n_k - n_q, b, a)),
    ("with the offset n_q - n_k instead of n_k - n_q", "The window is moved to the wrong side.",
     CORNER, lambda x, a, b, n_q, n_k: _within(x + 2 * (n_k - n_q), a, b)),
    ("with an offset that is never below 0",
     "With more queries than keys the first ones should stand before every key.", BEFORE,
     lambda x, a, b, n_q, n_k: _within(x + min(n_k - n_q, 0), a, b)),
    ("with every query at the last key", "All rows are alike.",
     "What moves the window from one row to the next?",
     lambda x, a, b, n_q, n_k: _within(torch.arange(n_k) - (n_k - 1), a, b).expand(n_q, n_k)),
    ("with a window that wraps around the ends",
     "The first queries see the last keys, as negative indices make it.", ENDS,
     lambda x, a, b, n_q, n_k: (x % n_k <= b) | (-x % n_k <= a)),
    ("with a window that begins at a negative index",
     "A slice that begins at -1 begins at the last key.",
     "What is row[-1:2], and where should the window of query 0 begin?",
     lambda x, a, b, n_q, n_k: _slices(n_q, n_k, a, b)),
    ("with blocks in place of a window", "A query next to a block's border cannot see across it.",
     "Which keys does the first query of a block see before it?",
     lambda x, a, b, n_q, n_k: (torch.arange(n_k) // (a + b + 1))
     == ((torch.arange(n_k) - x) // (a + b + 1))),
    ("with no limit on the left where left is 0", "`if left:` does not tell 0 from nothing given.",
     "What does left = 0 leave visible before the query?",
     lambda x, a, b, n_q, n_k: _within(x, a or n_k + n_q, b)),
    ("with no limit on the right where right is 0",
     "`if right:` does not tell 0 from nothing given.",
     "What does right = 0 leave visible after the query?",
     lambda x, a, b, n_q, n_k: _within(x, a, b or n_k + n_q)),
]  # fmt: skip


def _slices(n_q: int, n_k: int, left: int, right: int) -> Tensor:
    """The window as row[p - left : p + right + 1], which is empty or wrong for p < left."""
    visible = torch.zeros(n_q, n_k, dtype=torch.bool)
    for i in range(n_q):
        p = i + n_k - n_q
        visible[i, p - left : p + right + 1] = True
    return visible


for name, cause, ask, function in PLACES:
    ex.mistake(f"the scores {name}", cause, ask)(_showing(function))

# (scores, hidden (n_q, n_k)) -> result.
FILLS = [
    ("the scores with 0 outside the window", "A score of 0 is not hidden: exp(0) = 1.",
     "Which score makes exp exactly 0?", lambda s, h: s.masked_fill(h, 0.0)),
    ("the scores multiplied by the mask",
     "That makes 0 of a hidden score, and NaN of one that was infinite.",
     "Which score makes exp exactly 0?", lambda s, h: s * ~h),
    ("the scores with -1e9 outside the window",
     "That hides them too, as long as no visible score is as low; here -inf is asked.",
     "Is there a number below every other?", lambda s, h: s.masked_fill(h, -1e9)),
    ("the scores with -1e9 added outside the window",
     "A hidden score is lowered, not replaced: what was inf stays inf.", REPLACE,
     lambda s, h: s - 1e9 * h),
    ("the scores with finfo.min outside the window",
     "The lowest finite number hides them too; here -inf is asked.",
     "Which of the two leaves a row in which nothing is visible recognisable?",
     lambda s, h: s.masked_fill(h, torch.finfo(s.dtype).min)),
    ("the scores with +inf outside the window", "exp(inf) is inf: they get all the weight.",
     "Which sign makes exp 0?", lambda s, h: s.masked_fill(h, INF)),
    ("the scores with NaN outside the window", "NaN spreads through softmax over the whole row.",
     "Which score makes exp exactly 0?", lambda s, h: s.masked_fill(h, math.nan)),
    ("the scores with -inf added outside the window",
     "A hidden score that is inf or NaN turns to NaN: inf - inf.", REPLACE,
     lambda s, h: s + torch.zeros(s.shape).masked_fill(h, -INF)),
    ("the scores plus (1 - mask) · (-inf)", "0 · inf is NaN: the visible scores are spoiled.",
     "What is (1 - mask) · (-inf) where the mask is 1?", lambda s, h: s + h.to(s.dtype) * -INF),
    ("the scores with -inf wherever the mask left a 0",
     "A visible score can be 0 too, and then it is hidden.",
     "Can the mask be made from positions alone, without looking at the scores?",
     lambda s, h: (masked := s.masked_fill(h, 0.0)).masked_fill(masked == 0, -INF)),
    ("the mask of 1 and 0 instead of the scores", "The scores have no effect.",
     "What should stand where a key is visible?", lambda s, h: (~h).expand(s.shape).to(s.dtype)),
    ("the mask of 0 and -inf instead of the scores", "The scores have no effect.",
     "What should stand where a key is visible?",
     lambda s, h: torch.zeros_like(s).masked_fill(h, -INF)),
    ("the weights instead of the scores",
     "Softmax is a step too far: the scores themselves are asked.",
     "What comes after the mask, and is it part of this exercise?",
     lambda s, h: s.masked_fill(h, -INF).softmax(-1)),
    ("the scores with 0 in a row that sees nothing",
     "Rows without a visible key have been mended, and a score of 0 is visible.",
     "What should stand in a row of which nothing may be seen?",
     lambda s, h: s.masked_fill(h, -INF).masked_fill(h.all(-1, keepdim=True), 0.0)),
    ("the scores with a row that sees nothing left as it was",
     "Rows without a visible key have been spared, so they see everything.",
     "What should stand in a row of which nothing may be seen?",
     lambda s, h: s.masked_fill(h & ~h.all(-1, keepdim=True), -INF)),
    ("the scores with the window in the first batch element only",
     "The mask reached one matrix of the batch.",
     "Does your indexing count dimensions from the end?",
     lambda s, h: s.masked_fill(h, -INF) if s.ndim == 2
     else torch.cat([s[:1].masked_fill(h, -INF), s[1:]])),
]  # fmt: skip

for name, cause, ask, function in FILLS:
    ex.mistake(name, cause, ask)(_changed(function))


@ex.alternative("tril and triu of ones")
def _(scores, left, right):
    offset = scores.shape[-1] - scores.shape[-2]
    visible = torch.ones_like(scores).tril(offset + right).triu(offset - left).bool()
    return torch.where(visible, scores, -INF)


@ex.alternative("where, on the distance between query and key")
def _(scores, left, right):
    distance = _distance(scores)
    return torch.where((distance > right) | (distance < -left), -INF, scores)


@ex.alternative("a loop over the queries, rows written into a copy")
def _(scores, left, right):
    n_q, n_k = scores.shape[-2:]
    result = torch.full_like(scores, float("-inf"))
    for i in range(n_q):
        p = i + n_k - n_q
        begin, end = max(p - left, 0), max(p + right + 1, 0)
        result[..., i, begin:end] = scores[..., i, begin:end]
    return result


@ex.alternative("in float64, filled twice, and back")
def _(scores, left, right):
    n_q, n_k = scores.size(-2), scores.size(-1)
    offset = torch.arange(n_k).sub(n_k)[None] - torch.arange(n_q).sub(n_q)[:, None]
    wide = scores.double().masked_fill(offset > right, -INF)
    return wide.masked_fill(offset.neg() > left, -INF).to(scores.dtype)


@ex.alternative("pair by pair")
def _(scores, left, right):
    n_q, n_k = scores.shape[-2:]
    shift = n_k - n_q
    mask = [[-left <= j - i - shift <= right for j in range(n_k)] for i in range(n_q)]
    return scores.masked_fill(torch.tensor(mask).logical_not(), -INF)


# --- 2. Longformer ----------------------------------------------------------------------------

ex = Exercise(
    "longformer_mask",
    chapter="11_sparse_attention",
    title="A window and global tokens",
    minutes=10,
    difficulty=2,
    importance=4,
    prompt=r"""
With a window alone, news travels only `window` tokens per layer. Longformer adds a few **global
tokens**: they attend to every token, and every token attends to them. With $g_i$ = token $i$ is
global,

$$M_{b,1,i,j} = \left( |i - j| \le \text{window} \right) \;\lor\; g_{b,i} \;\lor\; g_{b,j}$$

- `is_global` is bool `(batch, n)`: each element of the batch has global tokens of its own.
- `window` counts the keys seen **on each side** of a token, itself not counted; 0 is only itself.
- Give the bool mask `(batch, 1, n, n)`, **True = may attend**; the last two dimensions are queries
  and keys, and the 1 stands for all heads.
""",
    hints=(
        "A global token has a row and a column in the n × n mask. Which of the two says what it "
        "may attend to, and which says who may attend to it?",
        "The same flags enter twice: once along the queries and once along the keys. Each of the "
        "two broadcasts over the other dimension.",
        "is_global[:, None, :, None] is (batch, 1, n, 1), one flag for each query; what is the "
        "other one, and which operator joins the three?",
    ),
)


@ex.solution
def longformer_mask(is_global: Tensor, window: int) -> Tensor:
    """A sliding window and global tokens (Beltagy et al. 2020, section 3.1).

    is_global: bool (batch, n) -> bool (batch, 1, n, n), True = may attend.
    """
    ### BEGIN SOLUTION
    position = torch.arange(is_global.shape[1], device=is_global.device)  # (n,)
    near = (position[:, None] - position).abs() <= window  # (n, 1) against (n,) -> (n, n)
    attends_to_all = is_global[:, None, :, None]  # (batch, 1, n, 1): along the queries
    seen_by_all = is_global[:, None, None, :]  # (batch, 1, 1, n): along the keys
    return near | attends_to_all | seen_by_all  # -> (batch, 1, n, n)
    ### END SOLUTION


def _flags(g: torch.Generator, batch: int, n: int) -> Tensor:
    """About a fifth of the tokens, and in the first element one, never the first token."""
    flags = torch.rand(batch, n, generator=g) < 0.2
    flags[0] = torch.arange(n) == torch.randint(1, max(n, 2), (), generator=g)
    return flags


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    first = torch.tensor([[False, False, False, True]])
    fixed = [
        (_bools("000000"), 2),
        (_bools("111"), 0),
        (_bools("0"), 0),
        (_bools("10000", "00000"), 1),
    ]
    sizes = [
        (1, 7, 2),
        (2, 7, 3),
        (3, 5, 0),
        (2, 3, 5),
        (4, 4, 1),
        (1, 9, 3),
        (3, 8, 1),
        (2, 10, 2),
    ]
    drawn = [(_flags(g, batch, n), window) for batch, n, window in sizes]
    return [{"is_global": m, "window": w} for m, w in [(first, 1), *fixed, *drawn]]


@ex.behaviour("without global tokens it is a window of `window` keys on each side")
def _(answer):
    case = {"is_global": torch.zeros(1, 5, dtype=torch.bool), "window": 1}
    expect(answer.on(case)[0, 0], _bools("11000", "11100", "01110", "00111", "00011"), case=case)


@ex.behaviour("a global token attends to every token")
def _(answer):
    case = {"is_global": _bools("0001"), "window": 1}
    expect(answer.on(case)[0, 0, 3], _bools("1111")[0], case=case)


@ex.behaviour("every token attends to a global token")
def _(answer):
    case = {"is_global": _bools("0001"), "window": 1}
    expect(answer.on(case)[0, 0, :, 3], _bools("1111")[0], case=case)


@ex.behaviour("two ordinary tokens see each other only inside the window")
def _(answer):
    case = {"is_global": _bools("100000"), "window": 2}
    expect(
        answer.on(case)[0, 0, 1:, 1:],
        _bools("11100", "11110", "11111", "01111", "00111"),
        case=case,
    )


@ex.behaviour("who sees is seen: the mask equals its transpose")
def _(answer):
    got = answer(_flags(torch.Generator().manual_seed(1), 3, 7), 2)
    expect(got, got.mT)


@ex.behaviour("a window of 0 without global tokens leaves each token itself")
def _(answer):
    case = {"is_global": torch.zeros(2, 3, dtype=torch.bool), "window": 0}
    expect(answer.on(case), torch.eye(3).bool().expand(2, 1, 3, 3), case=case)


@ex.behaviour("each element of the batch has its own global tokens")
def _(answer):
    flags = _flags(torch.Generator().manual_seed(2), 3, 6)
    expect(answer(flags, 1)[1:2], answer(flags[1:2], 1))


def _grid(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n)[:, None], torch.arange(n)


def _joined(rule: Function) -> Function:
    """A mask made of `rule(near (n, n), rows (batch, 1, n, 1), columns (batch, 1, 1, n))`."""

    def function(is_global, window):
        i, j = _grid(is_global.shape[1])
        near = (i - j).abs() <= window
        mask = rule(near, is_global[:, None, :, None], is_global[:, None, None, :])
        return mask.expand(len(is_global), 1, *near.shape)

    return function


def _with_flags(change: Function) -> Function:
    """The right mask of changed flags."""
    return lambda is_global, window: longformer_mask(change(is_global), window)


def _with_window(rule: Function) -> Function:
    """The right mask but for its window."""

    def function(is_global, window):
        i, j = _grid(n := is_global.shape[1])
        return rule(i, j, n, window) | is_global[:, None, :, None] | is_global[:, None, None, :]

    return function


BOTH = "A global token has a row and a column in the mask; which of the two have you filled?"
OPERATOR = "Should a pair satisfy all three conditions, or is one of them enough?"
WHOSE = "What shape must the flags have so that each element of the batch meets its own?"
SHAPE = "Which four dimensions does the exercise ask for, and in which order?"
POLARITY = "Is your mask True where a token may attend, or where it may not?"

ex.mistakes_from(WINDOWS, "the mask", _with_window)

JOINED = [
    ("the mask in which global tokens attend to all, but are not attended to by all",
     "The rows of the global tokens are filled, their columns are not.", BOTH,
     lambda near, row, column: near | row),
    ("the mask in which global tokens are attended to by all, but do not attend to all",
     "The columns of the global tokens are filled, their rows are not.", BOTH,
     lambda near, row, column: near | column),
    ("the mask in which global tokens see only one another",
     "`&` joins the flags of query and key: both have to be global.",
     "May an ordinary token attend to a global one?",
     lambda near, row, column: near | row & column),
    ("the mask in which two global tokens do not see each other",
     "`^` is True where exactly one of the two is global.",
     "May one global token attend to another?", lambda near, row, column: near | row ^ column),
    ("the mask of the window alone", "The flags have no effect.", "Where does `is_global` enter?",
     lambda near, row, column: near),
    ("the mask of the global tokens alone", "The window has no effect.",
     "Where does `window` enter?", lambda near, row, column: row | column),
    ("the mask in which global tokens attend to all, and nobody else to anything",
     "Neither the window nor the columns of the global tokens are filled.", OPERATOR,
     lambda near, row, column: row),
    ("the mask in which global tokens are seen by all, and nobody else by anyone",
     "Neither the window nor the rows of the global tokens are filled.", OPERATOR,
     lambda near, row, column: column),
    ("the mask with & in place of |: near and global at once",
     "A pair must lie in the window and have a global token.", OPERATOR,
     lambda near, row, column: near & (row | column)),
    ("the mask with all three conditions at once", "`&` stands where `|` should.", OPERATOR,
     lambda near, row, column: near & row & column),
    ("the mask with the window for pairs of ordinary tokens switched off by `^`",
     "A near pair with a global token cancels out.", OPERATOR,
     lambda near, row, column: near ^ (row | column)),
    ("the mask with near keys hidden from global tokens' rows by `^`",
     "`^` is False where both sides are True.", OPERATOR,
     lambda near, row, column: (near ^ row) | column),
    ("the mask in which global tokens do not see themselves",
     "The diagonal of the global tokens is emptied.", OWN,
     lambda near, row, column: (near | row | column) & ~(_eye(near) & row)),
    ("the mask with the diagonal emptied", "No token sees itself.", OWN,
     lambda near, row, column: (near | row | column) & ~_eye(near)),
    ("the mask with True and False swapped", "True means may attend.", POLARITY,
     lambda near, row, column: ~(near | row | column)),
    ("the mask with later keys hidden", "That is Longformer in a decoder.",
     "Does the formula compare which of i and j is larger?",
     lambda near, row, column: (near | row | column).tril()),
    ("the mask with earlier keys hidden", "Half of the mask is cut off.",
     "Does the formula compare which of i and j is larger?",
     lambda near, row, column: (near | row | column).triu()),
    ("the mask with ordinary tokens taken for global ones", "The flags are negated.",
     "For which tokens is `is_global` True?", lambda near, row, column: near | ~row | ~column),
    ("the mask with global tokens cut off from their window",
     "Ordinary tokens see their window; global ones see only one another.",
     "What may a global token attend to?",
     lambda near, row, column: near & ~row & ~column | row & column),
    ("the mask in numbers to be added, 0 and -inf", "Here the mask is bool.",
     "What stands for may attend: True, or 0?",
     lambda near, row, column: torch.zeros(()).masked_fill(~(near | row | column), -INF)),
]  # fmt: skip


def _eye(near: Tensor) -> Tensor:
    return torch.eye(len(near)).bool()


for name, cause, ask, function in JOINED:
    ex.mistake(name, cause, ask)(_joined(function))

FLAGGED = [
    ("the mask with the first element's global tokens for the whole batch",
     "The flags of the other elements have no effect.", lambda m: m[:1].expand_as(m)),
    ("the mask with the last element's global tokens for the whole batch",
     "The flags of the other elements have no effect.", lambda m: m[-1:].expand_as(m)),
    ("the mask with the global tokens of all elements in each",
     "`any` over the batch makes one set of global tokens.",
     lambda m: m.any(0, keepdim=True).expand_as(m)),
    ("the mask with the global tokens that all elements share",
     "`all` over the batch keeps only what is global everywhere.",
     lambda m: m.all(0, keepdim=True).expand_as(m)),
    ("the mask with the flags from the end of the text", "The positions run backwards.",
     lambda m: m.flip(1)),
    ("the mask with as many global tokens as are flagged, but the first ones",
     "The flags are counted, and their places are lost.",
     lambda m: torch.arange(m.shape[1]) < m.sum(1, keepdim=True)),
    ("the mask with the first global token alone", "The other global tokens have no effect.",
     lambda m: m & (m.cumsum(1) == 1)),
    ("the mask with everything up to the last global token global",
     "A position is compared with that of a flag, where the flag itself is asked.",
     lambda m: m.flip(1).cumsum(1).flip(1) > 0),
]  # fmt: skip

for name, cause, function in FLAGGED:
    ex.mistake(name, cause, WHOSE if "element" in name else "Which tokens are flagged?")(
        _with_flags(function)
    )

SHAPED = [
    ("the mask without the dimension for the heads",
     "(batch, n, n) is taken for (heads, n_q, n_k) when it meets the scores.",
     lambda m, w: longformer_mask(m, w)[:, 0]),
    ("the mask with the batch in the place of the heads",
     "(1, batch, n, n) gives each head its own global tokens, not each element of the batch.",
     lambda m, w: longformer_mask(m, w).transpose(0, 1)),
    ("the mask of the whole batch in one", "The dimension of the batch is gone.",
     lambda m, w: longformer_mask(m, w).any(0, keepdim=True)),
    ("the mask of the first element alone", "The other elements have no mask.",
     lambda m, w: longformer_mask(m[:1], w)),
]  # fmt: skip

for name, cause, function in SHAPED:
    ex.mistake(name, cause, SHAPE)(function)


@ex.alternative("a loop over the batch, rows and columns written in")
def _(is_global, window):
    batch, n = is_global.shape
    mask = torch.ones(batch, 1, n, n, dtype=torch.bool).tril(window).triu(-window)
    for b in range(batch):
        mask[b, :, is_global[b]] = True
        mask[b, :, :, is_global[b]] = True
    return mask


@ex.alternative("what is hidden, negated")
def _(is_global, window):
    i = torch.arange(is_global.size(1))
    far = (i.unsqueeze(0) - i.unsqueeze(1)).abs() > window
    ordinary = ~is_global
    pair = ordinary.unsqueeze(2) & ordinary.unsqueeze(1)  # (batch, n, n)
    return ~(far & pair).unsqueeze(1)


@ex.alternative("a sum of numbers above 0")
def _(is_global, window):
    flags = is_global.double()
    n = flags.shape[1]
    count = flags[:, :, None] + flags[:, None, :] + torch.ones(n, n).tril(window).triu(-window)
    return (count > 0)[:, None]


@ex.alternative("pair by pair")
def _(is_global, window):
    n = is_global.shape[1]
    rows = [
        [[[bool(flags[i] or flags[j]) or abs(i - j) <= window for j in range(n)] for i in range(n)]]
        for flags in is_global
    ]
    return torch.tensor(rows)


@ex.alternative("logical_or, the window by max pooling of the identity")
def _(is_global, window):
    eye = torch.eye(is_global.shape[1])[None]
    near = F.max_pool1d(eye, 2 * window + 1, stride=1, padding=window)[0].bool()
    rows = torch.logical_or(near, is_global[:, :, None])
    return torch.logical_or(rows, is_global[:, None, :]).unsqueeze(1)


# --- 3. BigBird -------------------------------------------------------------------------------

ex = Exercise(
    "bigbird_blocks",
    chapter="11_sparse_attention",
    title="BigBird's blocks",
    minutes=15,
    difficulty=3,
    importance=3,
    points=2,
    prompt=r"""
BigBird cuts the text into blocks and says which block of queries sees which block of keys. Give
that table, bool `(num_blocks, num_blocks)`, **True = may attend**. Block $i$ of queries sees

1. a **window** of `window_blocks` blocks (odd), itself in the middle: $|i - j| \le
   \lfloor \text{window\_blocks} / 2 \rfloor$; the window ends where the text ends;
2. the first `global_blocks` blocks; and these see every block themselves;
3. `random_blocks` **more**, chosen among the blocks that it does not see yet: those with the least
   `order` in row $i$. If fewer are left, it sees them all.

`order` is `(num_blocks, num_blocks)`, all of its numbers different and finite. It takes the place
of a random draw, so that the table is the same at every call.
""",
    hints=(
        "Block 2 sees the blocks 0 to 3 already, and row 2 of `order` is least at block 1. Which "
        "block should it get, and why not block 1?",
        "Make the table without random blocks first. Blocks that are visible must come last in the "
        "order, whatever number they have there.",
        "`argsort` of a row tells which block comes first, second, …; what does `argsort` of that "
        "tell of each block?",
    ),
)


@ex.solution
def bigbird_blocks(
    order: Tensor, window_blocks: int, global_blocks: int, random_blocks: int
) -> Tensor:
    """Which block of queries sees which block of keys (Zaheer et al. 2020, section 2).

    order: (num_blocks, num_blocks), different numbers; the least come first among the random
    blocks of a row. Returns bool (num_blocks, num_blocks), True = may attend.
    """
    ### BEGIN SOLUTION
    block = torch.arange(len(order), device=order.device)  # (num_blocks,)
    query, key = block[:, None], block[None, :]  # (num_blocks, 1), (1, num_blocks)
    table = (query - key).abs() <= window_blocks // 2  # -> (num_blocks, num_blocks)
    table = table | (query < global_blocks) | (key < global_blocks)
    unseen_first = order.masked_fill(table, math.inf)  # what is visible comes last
    rank = unseen_first.argsort(dim=1).argsort(dim=1)  # the place of each block in its row
    return table | (rank < random_blocks)
    ### END SOLUTION


def _ordered(g: torch.Generator, size: int) -> Tensor:
    """Tenths in random places, below 0 and above."""
    places = torch.randperm(size * size, generator=g).view(size, size)
    return (places - size * size // 2) / 10


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (3, 1, 0, 1),
        (1, 1, 0, 0),
        (2, 3, 1, 4),
        (5, 3, 1, 1),
        (6, 1, 2, 2),
        (6, 5, 0, 1),
        (5, 1, 0, 0),
        (5, 3, 0, 4),
        (6, 1, 0, 3),
        (4, 1, 7, 1),
        (8, 3, 1, 2),
        (9, 5, 2, 2),
        (9, 3, 0, 3),
    ]
    names = ("window_blocks", "global_blocks", "random_blocks")
    return [
        {"order": _ordered(g, size)} | dict(zip(names, counts, strict=True))
        for size, *counts in sizes
    ]


def _order(seed: int, size: int) -> Tensor:
    return _ordered(torch.Generator().manual_seed(seed), size)


@ex.behaviour("a window of 3 blocks is a block and its two neighbours")
def _(answer):
    want = _bools("11000", "11100", "01110", "00111", "00011")
    expect(answer(_order(1, 5), 3, 0, 0), want)


@ex.behaviour("the first global blocks see all blocks and are seen by all")
def _(answer):
    want = _bools("11111", "11111", "11100", "11010", "11001")
    expect(answer(_order(2, 5), 1, 2, 0), want)


@ex.behaviour("a row's random blocks are those of least order")
def _(answer):
    order = torch.tensor([[0.3, 0.1, 0.2], [0.6, 0.4, 0.5], [0.7, 0.9, 0.8]])
    case = {"order": order, "window_blocks": 1, "global_blocks": 0, "random_blocks": 1}
    expect(answer.on(case), _bools("110", "011", "101"), case=case)


@ex.behaviour("each row sees `random_blocks` blocks more than without them, or all")
def _(answer):
    for size, window, first, more in ((8, 3, 1, 2), (7, 1, 0, 3), (6, 5, 0, 4)):
        order = _order(3, size)
        without = answer(order, window, first, 0).sum(1)
        got = answer(order, window, first, more).sum(1)
        if not torch.equal(got, (without + more).clamp(max=size)):
            row = (got != (without + more).clamp(max=size)).nonzero()[0].item()
            raise Broken(
                f"With {size} blocks, window_blocks = {window} and global_blocks = {first}, row "
                f"{row} sees {without[row]} blocks for random_blocks = 0 and {got[row]} for "
                f"random_blocks = {more}"
            )


@ex.behaviour("the order of what a row sees anyway has no effect")
def _(answer):
    order = _order(4, 7)
    seen = answer(order, 3, 1, 0)
    expect(answer(order - 100.0 * seen, 3, 1, 2), answer(order, 3, 1, 2))


@ex.behaviour("only the order within a row counts")
def _(answer):
    order = _order(5, 6)
    expect(answer(order + 100.0 * torch.arange(6)[:, None], 1, 1, 2), answer(order, 1, 1, 2))


@ex.behaviour("more random blocks take none away")
def _(answer):
    order = _order(6, 7)
    fewer, more = (answer(order, 1, 1, count) for count in (2, 3))
    expect(fewer & more, fewer)


class _Blocks(NamedTuple):
    """What the parts of a wrong answer see: row (n, 1) and column (1, n) of blocks, counts."""

    order: Tensor
    row: Tensor
    column: Tensor
    window: int
    first: int
    more: int

    @property
    def near(self) -> Tensor:
        return (self.row - self.column).abs() <= self.window // 2

    @property
    def wide(self) -> Tensor:
        """Rows and columns of the global blocks."""
        return (self.row < self.first) | (self.column < self.first)


def _least(order: Tensor, count: int) -> Tensor:
    """The `count` least of each row."""
    return order.argsort(1).argsort(1) < count


def _unseen(b: _Blocks, seen: Tensor) -> Tensor:
    return _least(b.order.masked_fill(seen, INF), b.more)


def _blocked(near: Function | None = None, wide: Function | None = None,
             choose: Function = _unseen, finish: Function | None = None) -> Function:  # fmt: skip
    """BigBird's table with some parts replaced."""

    def function(order, window_blocks, global_blocks, random_blocks):
        block = torch.arange(len(order))
        b = _Blocks(order, block[:, None], block[None], window_blocks, global_blocks, random_blocks)
        seen = (near(b) if near else b.near) | (wide(b) if wide else b.wide)
        chosen = choose(b, seen)
        return finish(b, seen, chosen) if finish else seen | chosen

    return function


def _descending(order: Tensor, count: int) -> Tensor:
    return _least(-order, count)


def _both_ends(b: _Blocks) -> Tensor:
    """The first and the last global blocks."""
    last = len(b.order) - b.first
    return b.wide | (b.row >= last) | (b.column >= last)


MIDDLE = "With window_blocks = 3, how many neighbours does a block see on each side?"
FIRSTS = "With global_blocks = 1, which row and which column of the table are full?"
AMONG = "Among which blocks are the random ones chosen?"
ROWS = "Along which dimension do the keys' blocks of one row lie?"
LEAST = "Does the block with the least order of its row come first or last?"

NEAR_BLOCKS = [
    ("with `window_blocks` on each side", "The window is taken for what lies on one side.", MIDDLE,
     lambda b: (b.row - b.column).abs() <= b.window),
    ("with `window_blocks` - 1 on each side", "That is the width without the block itself.", MIDDLE,
     lambda b: (b.row - b.column).abs() <= b.window - 1),
    ("with one block too many on each side of the window", "The half is rounded up.", MIDDLE,
     lambda b: (b.row - b.column).abs() <= b.window // 2 + 1),
    ("with one block too few on each side of the window",
     "The comparison is < where it should be <=.", MIDDLE,
     lambda b: (b.row - b.column).abs() < b.window // 2),
    ("with a window that ends at the block itself", "All `window_blocks` look back.", MIDDLE,
     lambda b: (b.column <= b.row) & (b.column > b.row - b.window)),
    ("with a window that begins at the block itself", "All `window_blocks` look ahead.", MIDDLE,
     lambda b: (b.column >= b.row) & (b.column < b.row + b.window)),
    ("with the half of the window that looks back", "Later neighbours are missing.", MIDDLE,
     lambda b: b.near & (b.column <= b.row)),
    ("with the half of the window that looks ahead", "Earlier neighbours are missing.", MIDDLE,
     lambda b: b.near & (b.column >= b.row)),
    ("with the last block of the window missing", "A range ends before its last number.", MIDDLE,
     lambda b: b.near & (b.column - b.row < max(b.window // 2, 1))),
    ("with a window that wraps around the ends",
     "The first block sees the last one, as `roll` makes it.",
     "What lies before block 0?",
     lambda b: ((b.row - b.column) % len(b.order) <= b.window // 2)
     | ((b.column - b.row) % len(b.order) <= b.window // 2)),
    ("without the block itself", "The middle of the window is missing.",
     "May a block see itself?", lambda b: b.near & (b.row != b.column)),
    ("with the block itself as the whole window", "`window_blocks` has no effect.", MIDDLE,
     lambda b: b.row == b.column),
    ("without the window", "`window_blocks` has no effect, and a block need not see itself.",
     "Which of the three parts is missing?", lambda b: torch.zeros_like(b.near)),
]  # fmt: skip

WIDE_BLOCKS = [
    ("with global blocks that see all, but are not seen by all",
     "Their rows are full, their columns are not.", FIRSTS, lambda b: b.row < b.first),
    ("with global blocks that are seen by all, but do not see all",
     "Their columns are full, their rows are not.", FIRSTS, lambda b: b.column < b.first),
    ("with global blocks that see one another alone", "`&` stands where `|` should.", FIRSTS,
     lambda b: (b.row < b.first) & (b.column < b.first)),
    ("with two global blocks that do not see each other",
     "`^` is True where exactly one of the two is global.", FIRSTS,
     lambda b: (b.row < b.first) ^ (b.column < b.first)),
    ("with one global block too many", "The comparison is <= where it should be <.", FIRSTS,
     lambda b: (b.row <= b.first) | (b.column <= b.first)),
    ("with one global block too few", "Blocks count from 0.", FIRSTS,
     lambda b: (b.row < b.first - 1) | (b.column < b.first - 1)),
    ("with the last blocks as global ones", "They stand at the wrong end.", FIRSTS,
     lambda b: (b.row >= len(b.order) - b.first) | (b.column >= len(b.order) - b.first)),
    ("with global blocks at both ends", "The last ones are global as well.", FIRSTS, _both_ends),
    ("with global blocks counted from 1", "Block 0 is not global, and one further on is.",
     "Which number has the first block?",
     lambda b: ((b.row > 0) & (b.row <= b.first)) | ((b.column > 0) & (b.column <= b.first))),
    ("with a single global block", "`==` stands where an inequality should.", FIRSTS,
     lambda b: (b.row == b.first - 1) | (b.column == b.first - 1)),
    ("without the global blocks", "`global_blocks` has no effect.",
     "Which of the three parts is missing?", lambda b: torch.zeros_like(b.near)),
]  # fmt: skip

CHOSEN = [
    ("with random blocks chosen among all blocks",
     "Some of them were visible already, so a row gains fewer than it should.", AMONG,
     lambda b, seen: _least(b.order, b.more)),
    ("with random blocks chosen among all but the window",
     "Some of them are global blocks, which are visible already.", AMONG,
     lambda b, seen: _least(b.order.masked_fill(b.near, INF), b.more)),
    ("with random blocks chosen among all but the global ones",
     "Some of them lie in the window, which is visible already.", AMONG,
     lambda b, seen: _least(b.order.masked_fill(b.wide, INF), b.more)),
    ("with random blocks chosen among all but the block itself",
     "Some of them were visible already.", AMONG,
     lambda b, seen: _least(b.order.masked_fill(b.row == b.column, INF), b.more)),
    ("with random blocks of the largest order", "The order is read from its end.", LEAST,
     lambda b, seen: _descending(b.order.masked_fill(seen, -INF), b.more)),
    ("with random blocks of the largest order among all blocks",
     "The order is read from its end, and some of the blocks were visible already.", LEAST,
     lambda b, seen: _descending(b.order, b.more)),
    ("without random blocks", "`random_blocks` has no effect, or only visible blocks are chosen.",
     "Which blocks does a row gain by part 3?", lambda b, seen: torch.zeros_like(seen)),
    ("with what is visible counted among the random blocks",
     "Visible blocks were moved to the front of the order instead of the back.",
     "Which number must a visible block get so that it is chosen last?",
     lambda b, seen: _least(b.order.masked_fill(seen, -INF), b.more)),
    ("with 0 as the order of what is visible",
     "0 is not larger than every order, so visible blocks can be chosen again.",
     "Which number must a visible block get so that it is chosen last?",
     lambda b, seen: _least((b.order * ~seen).argsort(dim=1, stable=True).argsort(1), b.more)),
    ("with `argsort` taken for the rank",
     "`argsort` lists which block comes first; it does not say at which place a block comes.",
     "A row of order is [0.3, 0.1, 0.2]: what is its argsort, and at which place comes each block?",
     lambda b, seen: b.order.masked_fill(seen, INF).argsort(1) < b.more),
    ("with `argsort` along the columns", "The queries' blocks of a column compete.", ROWS,
     lambda b, seen: (b.order.masked_fill(seen, INF).mT.argsort(1).argsort(1) < b.more).mT),
    ("with `order` transposed", "Row i is chosen by column i of the order.", ROWS,
     lambda b, seen: _least(b.order.mT.masked_fill(seen, INF), b.more)),
    ("with the random blocks of row 0 in all rows", "Only the first row of the order is used.",
     "Which row of `order` belongs to block i?",
     lambda b, seen: _least(b.order[:1].expand_as(seen).masked_fill(seen, INF), b.more)),
    ("with one random block too many", "The comparison is <= where it should be <.",
     "Ranks count from 0: how many are below `random_blocks`?",
     lambda b, seen: _least(b.order.masked_fill(seen, INF), b.more + 1)),
    ("with one random block too few", "Ranks count from 0.",
     "Ranks count from 0: how many are below `random_blocks`?",
     lambda b, seen: _least(b.order.masked_fill(seen, INF), b.more - 1)),
    ("with one random block, whatever `random_blocks`", "`argmin` finds a single block.",
     "How many blocks should a row gain?",
     lambda b, seen: _least(b.order.masked_fill(seen, INF), 1) & (b.more > 0)),
    ("with the block of rank `random_blocks` - 1 alone", "`==` stands where an inequality should.",
     "Which ranks have the blocks that a row should gain?",
     lambda b, seen: (b.order.masked_fill(seen, INF).argsort(1).argsort(1) == b.more - 1) & ~seen),
    ("with the least orders of the whole table",
     "`random_blocks` per row were taken from all rows at once.",
     "How many blocks must each row gain?",
     lambda b, seen: _least(b.order.masked_fill(seen, INF).view(1, -1), b.more * len(seen))
     .view_as(seen)),
    ("with random blocks chosen among earlier ones alone",
     "Only earlier blocks can be chosen, as in a decoder.", AMONG,
     lambda b, seen: _least(b.order.masked_fill(seen | (b.column > b.row), INF), b.more)
     & (b.column < b.row)),
    ("with every unseen block of an order below 0 chosen",
     "A number of the order is compared with 0 instead of with the others of its row.",
     "How many blocks must each row gain?", lambda b, seen: (b.order < 0) & (b.more > 0)),
]  # fmt: skip

FINISHED = [
    ("of the random blocks alone", "Window and global blocks have been lost at the end.",
     "What does the last line join the random blocks with?",
     lambda b, seen, chosen: chosen & ~seen),
    ("with True and False swapped", "True means may attend.", POLARITY,
     lambda b, seen, chosen: ~(seen | chosen)),
    ("with random blocks that see back", "A random pair is visible both ways.",
     "If block 2 sees block 7 by chance, must block 7 see block 2?",
     lambda b, seen, chosen: seen | chosen | chosen.mT),
    ("with random blocks seen the wrong way", "The random part is transposed.",
     "Are the rows of the table queries or keys?", lambda b, seen, chosen: seen | chosen.mT),
    ("with later blocks hidden", "That is BigBird in a decoder.",
     "Does any of the three rules compare which of i and j is larger?",
     lambda b, seen, chosen: (seen | chosen).tril()),
]  # fmt: skip

for part, table in (
    ("near", NEAR_BLOCKS),
    ("wide", WIDE_BLOCKS),
    ("choose", CHOSEN),
    ("finish", FINISHED),
):
    for name, cause, ask, function in table:
        ex.mistake(f"the table {name}", cause, ask)(_blocked(**{part: function}))


@ex.alternative("the least of each row by topk, scattered into the table")
def _(order, window_blocks, global_blocks, random_blocks):
    size = len(order)
    half = window_blocks // 2
    table = torch.ones(size, size, dtype=torch.bool).tril(half).triu(-half)
    table[:global_blocks] = True
    table[:, :global_blocks] = True
    count = min(random_blocks, size)
    least = order.masked_fill(table, INF).topk(count, dim=1, largest=False).indices
    return table.scatter(1, least, True)


@ex.alternative("row by row, with Python's sorted")
def _(order, window_blocks, global_blocks, random_blocks):
    size, half = order.shape[0], (window_blocks - 1) // 2
    table = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        seen = {j for j in range(size) if abs(i - j) <= half or min(i, j) < global_blocks}
        rest = sorted(set(range(size)) - seen, key=lambda j: order[i, j].item())
        table[i, list(seen) + rest[:random_blocks]] = True
    return table


@ex.alternative("a threshold: the last order that is still chosen")
def _(order, window_blocks, global_blocks, random_blocks):
    at = torch.arange(len(order))
    outside = (at[:, None] - at).abs() > window_blocks // 2
    outside &= torch.minimum(at[:, None], at[None]) >= global_blocks
    if random_blocks == 0:
        return ~outside
    wide = order.double().masked_fill(~outside, INF)
    threshold = wide.sort(dim=1).values[:, min(random_blocks, len(order)) - 1 :][:, :1]
    return ~outside | (wide <= threshold)


@ex.alternative("one random block after another")
def _(order, window_blocks, global_blocks, random_blocks):
    row, column = torch.meshgrid(*2 * [torch.arange(len(order))], indexing="ij")
    table = ((row - column).abs() * 2 < window_blocks) | (row < global_blocks)
    table = table.logical_or(column < global_blocks)
    for _ in range(random_blocks):
        least = order.masked_fill(table, INF).argmin(dim=1, keepdim=True)
        table = table | (column == least)
    return table


@ex.alternative("a count of the unseen blocks that come before")
def _(order, window_blocks, global_blocks, random_blocks):
    at = torch.arange(len(order))
    unseen = ~longformer_mask((at < global_blocks)[None], window_blocks // 2)[0, 0]
    earlier = (order[:, None, :] < order[:, :, None]) & unseen[:, None, :]  # (rows, block, other)
    return ~unseen | (earlier.sum(-1) < random_blocks)


# --- 4. attention in a window -----------------------------------------------------------------

ex = Exercise(
    "windowed_attention",
    chapter="11_sparse_attention",
    title="Attention in a window, without the n × n scores",
    minutes=25,
    difficulty=4,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
A mask hides scores, but it saves nothing: all n² of them are computed first. To save time and
memory, compute only those in the window. Query $i$ sees `window` keys on each side, itself in the
middle:

$$\text{output}_i = \sum_{|i - j| \le w} a_{ij} v_j, \qquad
  a_{ij} = \frac{\exp(q_i \cdot k_j / \sqrt{d})}
                {\sum_{|i - l| \le w} \exp(q_i \cdot k_l / \sqrt{d})}, \qquad 0 \le j, l < n$$

- `q` and `k` are `(batch, heads, n, d)`, `v` is `(batch, heads, n, d_v)`; the result is
  `(batch, heads, n, d_v)`, equal to masked attention.
- Near the ends of the text there are fewer keys: what you pad with must get **no weight**.
- n need not be a multiple of anything. `window` may be 0, and it may be n or more.
- **Make no tensor of n × n entries**, not even a mask, and none of that work: twice as many tokens
  may cost twice as much, not four times.
""",
    hints=(
        "How many keys does a query see at most? Which shape have all the scores that are needed?",
        "Pad the keys with `window` rows on both sides: then the window of query i begins at row "
        "i, and all windows have the same size. Which of their places lie outside the text?",
        "F.pad(k, (0, 0, window, window)).unfold(-2, 2 * window + 1, 1) is (batch, heads, n, d, "
        "2 · window + 1), a view that copies nothing; what is multiplied with it?",
    ),
)


@ex.solution
def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of each query to `window` keys on each side (Beltagy et al. 2020, section 3.1).

    q, k: (batch, heads, n, d), v: (batch, heads, n, d_v) -> (batch, heads, n, d_v), with
    n · (2 · window + 1) scores.
    """
    ### BEGIN SOLUTION
    n, d = q.shape[-2:]
    width = 2 * window + 1
    # (batch, heads, n, d) -> (batch, heads, n + 2 · window, d) -> (batch, heads, n, d, width)
    padded = (F.pad(t, (0, 0, window, window)) for t in (k, v))
    key, value = (t.unfold(-2, width, 1) for t in padded)
    # (batch, heads, n, 1, d) x (batch, heads, n, d, width) -> (batch, heads, n, width)
    scores = (q.unsqueeze(-2) @ key).squeeze(-2) / math.sqrt(d)
    place = torch.arange(n, device=q.device)[:, None] + torch.arange(width, device=q.device)
    place = place - window  # (n, width): where the keys stand in the text
    scores = scores.masked_fill((place < 0) | (place >= n), -math.inf)
    weights = torch.softmax(scores, dim=-1)
    # (batch, heads, n, 1, width) x (batch, heads, n, width, d_v) -> (batch, heads, n, d_v)
    return (weights.unsqueeze(-2) @ value.mT).squeeze(-2)
    ### END SOLUTION


def _text(g: torch.Generator, batch: int, heads: int, n: int, d: int, d_v: int) -> Case:
    return {
        "q": normal(g, batch, heads, n, d, spread=1.5),
        "k": normal(g, batch, heads, n, d, spread=1.5),
        "v": normal(g, batch, heads, n, d_v),
    }


def _tokens(seed: int, *sizes: int) -> tuple[Tensor, ...]:
    """q, k and v for a behaviour; sizes: batch, heads, n, d, d_v."""
    return tuple(_text(torch.Generator().manual_seed(seed), *sizes).values())


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 3, 1, 1, 1),
        (1, 1, 1, 2, 2, 1),
        (1, 2, 5, 2, 3, 1),
        (2, 1, 4, 3, 1, 0),
        (1, 1, 7, 2, 2, 2),
        (2, 3, 3, 3, 3, 5),
        (1, 1, 9, 4, 2, 3),
        (4, 4, 4, 4, 4, 2),
    ]
    low = _text(g, 1, 1, 3, 1, 2) | {"q": torch.full((1, 1, 3, 1), 20.0)}
    low["k"] = low["k"].clamp(-2, 2) / 10 - 6  # scores from -124 to -116
    towering = _text(g, 1, 1, 5, 1, 2)
    towering["k"][..., 4, :], towering["q"] = 60.0, towering["q"].abs() + 2  # hidden from most
    cases = [_text(g, *rest) | {"window": window} for *rest, window in sizes]
    return [
        *cases,
        low | {"window": 1},
        towering | {"window": 1},
        _text(g, 3, 2, 6, 2, 3) | {"window": 2},
    ]


def _dense(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """As it should be, by all n × n scores."""
    i, j = _grid(q.shape[-2])
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill((i - j).abs() > window, -INF)
    return scores.softmax(-1) @ v


@ex.behaviour("a window of 0 gives every token its own value")
def _(answer):
    q, k, v = _tokens(1, 1, 2, 3, 2, 2)
    expect(answer(q, k, v, 0), v)


@ex.behaviour("a window of n or more is full attention")
def _(answer):
    q, k, v = _tokens(2, 1, 1, 4, 2, 3)
    want = F.scaled_dot_product_attention(q, k, v)
    for window in (3, 4, 7):
        expect(answer(q, k, v, window), want)


@ex.behaviour("values that are all alike come back, at the ends of the text too")
def _(answer):
    q, k, _ = _tokens(3, 1, 1, 5, 2, 1)
    expect(answer(q, k, torch.full((1, 1, 5, 2), 3.0), 2), torch.full((1, 1, 5, 2), 3.0))


@ex.behaviour("with q = 0 each output is the mean of the values in its window")
def _(answer):
    q, k, _ = _tokens(4, 1, 1, 4, 2, 1)
    v = torch.tensor([2.0, 4.0, 0.0, 8.0]).view(1, 1, 4, 1)
    got = answer(torch.zeros_like(q), k, v, 1)
    expect(got, torch.tensor([3.0, 2.0, 4.0, 4.0]).view(1, 1, 4, 1))


@ex.behaviour("a key outside the window cannot change an output")
def _(answer):
    q, k, v = _tokens(5, 1, 2, 7, 2, 2)
    key, value = k.clone(), v.clone()
    key[:, :, 5:] += 50
    value[:, :, 5:] += 50
    expect(answer(q, key, value, 2)[:, :, :3], answer(q, k, v, 2)[:, :, :3])


@ex.behaviour("the same result as masked attention, for a long text")
def _(answer):
    q, k, v = _tokens(6, 1, 2, 37, 3, 2)
    expect(answer(q, k, v, 4), _dense(q, k, v, 4))


@ex.behaviour("a text read backwards gives the outputs backwards")
def _(answer):
    q, k, v = _tokens(7, 1, 1, 6, 2, 2)
    expect(answer(*(t.flip(2) for t in (q, k, v)), 2), answer(q, k, v, 2).flip(2))


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    q, k, v = _tokens(8, 3, 3, 4, 2, 2)
    expect(answer(*(t[1:, 2:] for t in (q, k, v)), 1), answer(q, k, v, 1)[1:, 2:])


@ex.behaviour("no tensor is as large as n × n")
def _(answer):
    largest = watched(answer, *_tokens(9, 1, 1, 256, 2, 2), 2).largest
    if largest >= 256 * 256:
        raise Broken(f"For 256 tokens a tensor of {largest} entries was made")


@ex.behaviour("twice as many tokens take twice the numbers, not four times as many")
def _(answer):
    few, many = (watched(answer, *_tokens(9, 1, 1, n, 2, 2), 2).made for n in (128, 256))
    if many > 3 * few:
        raise Broken(f"For 128 tokens {few} numbers were made, for 256 tokens {many}")


def _masked(rule: Function) -> Function:
    """Attention by all scores, visible where `rule(i, j, n, window)` says so."""

    def function(q, k, v, window):
        visible = rule(*_grid(n := q.shape[-2]), n, window)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        return scores.masked_fill(~visible, -INF).softmax(-1) @ v

    return function


def _places(n: int, window: int) -> Tensor:
    """Where the keys of each query's window stand in the text: (n, 2 · window + 1)."""
    return torch.arange(n)[:, None] + torch.arange(-window, window + 1)


def _zeros(t: Tensor, place: Tensor) -> Tensor:
    """(batch, heads, n, d) -> (batch, heads, n, width, d), with zeros outside the text."""
    return _copies(t, place) * _in_text(t, place)


def _copies(t: Tensor, place: Tensor) -> Tensor:
    """With copies of the first and the last row outside the text."""
    return t[..., place.clamp(0, t.shape[-2] - 1), :]


def _round(t: Tensor, place: Tensor) -> Tensor:
    """With the other end of the text outside it."""
    return t[..., place % t.shape[-2], :]


def _in_text(t: Tensor, place: Tensor) -> Tensor:
    return ((place >= 0) & (place < t.shape[-2]))[..., None]


def _local(*, keys=_zeros, values=_zeros, scale=None, hide=None, normalise=None,
           mix=None, finish=None) -> Function:  # fmt: skip
    """Attention by the scores of the windows, with some parts replaced.

    keys, values: (tensor, places) -> windows; hide: (scores, outside) -> scores; mix: (weights,
    keys, values, q) -> output.
    """

    def function(q, k, v, window):
        place = _places(q.shape[-2], window)
        key, value = keys(k, place), values(v, place)
        scores = (key @ q[..., None])[..., 0] * (
            scale(q, k, window) if scale else q.shape[-1] ** -0.5
        )
        outside = ~_in_text(q, place)[..., 0]
        scores = hide(scores, outside) if hide else scores.masked_fill(outside, -INF)
        weights = (normalise or _softmax)(scores)
        output = mix(weights, key, value, q) if mix else (weights[..., None] * value).sum(-2)
        return finish(output) if finish else output

    return function


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def _unhidden(scores: Tensor, outside: Tensor) -> Tensor:
    return scores


def _mixing_all(part: Function) -> Function:
    """Softmax over all keys first; then `part(weights, near)` makes the weights."""

    def function(q, k, v, window):
        i, j = _grid(q.shape[-2])
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return part(weights, (i - j).abs() <= window) @ v

    return function


def _zero_scores(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    i, j = _grid(q.shape[-2])
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return (scores * ((i - j).abs() <= window)).softmax(-1) @ v


def _first_half(scores: Tensor) -> Tensor:
    """The places of a window before the query: (width,)."""
    return torch.arange(scores.shape[-1]) < scores.shape[-1] // 2


def _whole(n: int, window: int) -> int:
    """How many tokens lie in whole blocks of `window`."""
    return n - n % max(window, 1)


PADDED = "What weight do the places outside the text get?"
SAME_KEYS = "Does weight j of a window meet value j of the same window?"
VALUES = "What is averaged with the weights?"
WINDOW_SCALE = "Which entry of `q.shape` is d?"
RAGGED = "What becomes of the last tokens where n is no multiple of the window?"
AWAY = "At which place of its window does the query's own key stand?"

ex.mistakes_from(WINDOWS, "attention", _masked)
ex.mistakes_from(
    [part for part in SCALES if "queries" not in part.name],  # as many as keys, here
    "attention in the window",
    lambda part: _local(scale=lambda q, k, window: part(q, k)),
)
ex.mistakes_from(NORMALISATIONS, "attention in the window", lambda part: _local(normalise=part))


def _mixing(part: Function) -> Function:
    """A mixture of n × n weights: `part(weights, q, k, v)`."""

    def function(q, k, v, window):
        i, j = _grid(q.shape[-2])
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill((i - j).abs() > window, -INF)
        return part(scores.softmax(-1), q, k, v)

    return function


ex.mistakes_from(MIXTURES, "attention in the window", _mixing)

LOCAL = [
    ("with padding that takes its share of the weights",
     "A padded key of zeros has the score 0, and exp(0) = 1.", PADDED, _local(hide=_unhidden)),
    ("padded with copies of the first and the last token",
     "The tokens at the ends are counted several times.", PADDED,
     _local(keys=_copies, values=_copies, hide=_unhidden)),
    ("with keys padded by copies and values by zeros, unmasked",
     "The copies of the outermost keys take weight to values of 0.", PADDED,
     _local(keys=_copies, hide=_unhidden)),
    ("with keys padded by zeros and values by copies, unmasked",
     "A padded key of zeros has the score 0, and exp(0) = 1.", PADDED,
     _local(values=_copies, hide=_unhidden)),
    ("padded with the other end of the text", "The first tokens see the last ones, as `roll` makes "
     "it; a wide window sees some keys twice.", PADDED,
     _local(keys=_round, values=_round, hide=_unhidden)),
    ("with the keys padded with -inf",
     "A product with -inf is inf, -inf or NaN, by the query's sign.",
     "Should the padded key be -inf, or its score?",
     _local(keys=lambda t, place: _copies(t, place).masked_fill(~_in_text(t, place), -INF),
            hide=_unhidden)),
    ("with -10 as the score of the padding", "A visible score can be lower than that.",
     "Is there a number below every other?",
     _local(hide=lambda s, outside: s.masked_fill(outside, -10.0))),
    ("with -100 as the score of the padding", "A visible score can be lower than that.",
     "Is there a number below every other?",
     _local(hide=lambda s, outside: s.masked_fill(outside, -100.0))),
    ("with -inf on the inside of the text", "The mask is the wrong way round.",
     "Does `masked_fill` fill where its argument is True or where it is False?",
     _local(hide=lambda s, outside: s.masked_fill(~outside, -INF))),
    ("with the places before the text hidden, but not those after it",
     "Only one of the two ends is masked.", "Which places lie outside the text at its end?",
     _local(hide=lambda s, outside: s.masked_fill(outside & _first_half(s), -INF))),
    ("with the places after the text hidden, but not those before it",
     "Only one of the two ends is masked.", "Which places lie outside the text at its beginning?",
     _local(hide=lambda s, outside: s.masked_fill(outside & ~_first_half(s), -INF))),
    ("with the keys of each window backwards", "The key after the query meets the value before it.",
     SAME_KEYS, _local(keys=lambda t, place: _zeros(t, place.flip(-1)))),
    ("with the values of each window one token late",
     "Keys and values are cut from other places.", SAME_KEYS,
     _local(values=lambda t, place: _zeros(t, place - 1))),
    ("with the values of each window one token early",
     "Keys and values are cut from other places.", SAME_KEYS,
     _local(values=lambda t, place: _zeros(t, place + 1))),
    ("with windows that begin at the query, in keys and values",
     "The keys were not padded in front; the scores are masked as if they were.", AWAY,
     _local(keys=lambda t, place: _zeros(t, place + place.shape[1] // 2),
            values=lambda t, place: _zeros(t, place + place.shape[1] // 2))),
    ("with windows that end at the query, in keys and values",
     "The keys were padded in front alone; the scores are masked as if on both sides.", AWAY,
     _local(keys=lambda t, place: _zeros(t, place - place.shape[1] // 2),
            values=lambda t, place: _zeros(t, place - place.shape[1] // 2))),
    ("with queries and keys swapped", "The window is cut from the queries.", "Who asks?",
     lambda q, k, v, window: _local()(k, q, v, window)),
    ("with the queries in the place of the keys", "The keys have no effect.",
     "What are the queries compared with?",
     lambda q, k, v, window: _local()(q, q, v, window)),
    ("with the plain mean of the window", "All keys of a window get the same weight.",
     "Where do the scores enter?",
     _local(hide=lambda s, outside: (s * 0).masked_fill(outside, -INF))),
    ("with the plain mean of the window, padding included", "All places get the same weight.",
     "Where do the scores enter?", _local(hide=lambda s, outside: s * 0)),
    ("with the values summed, not averaged", "Every weight is 1.",
     "What turns scores into weights?", _local(normalise=torch.ones_like)),
    ("with the best key of the window alone", "`argmax` takes one value instead of averaging all.",
     "What turns scores into weights?",
     _local(normalise=lambda s: (s == s.amax(-1, keepdim=True)).to(s.dtype))),
    ("scaled by the width of the window", "√(2 · window + 1) stands where √d should.",
     WINDOW_SCALE, _local(scale=lambda q, k, window: (2 * window + 1) ** -0.5)),
    ("scaled by the window", "√window stands where √d should.", WINDOW_SCALE,
     _local(scale=lambda q, k, window: max(window, 1) ** -0.5)),
    ("with cosine similarity as scores", "Queries and keys are scaled to length 1.",
     "What is divided by √d in the formula?",
     lambda q, k, v, window: _local(scale=lambda *args: 1.0)(
         F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, window)),
    ("with the softmax over all scores of a head", "One sum is taken over all queries.",
     "Along which dimension do the keys of one query lie?",
     _local(normalise=lambda s: s.flatten(-2).softmax(-1).view_as(s))),
    ("that keeps the windows' dimension", "The weighted values were not summed.",
     "What shape has the result?",
     _local(mix=lambda w, key, value, q: w[..., None] * value)),
    ("that returns the weights of the windows", "The values have no effect.", VALUES,
     _local(mix=lambda w, key, value, q: w)),
    ("with heads and tokens swapped in the result", "(batch, n, heads, d_v) is returned.",
     "Which shape is asked for?", _local(finish=lambda y: y.transpose(1, 2))),
    ("that sees the whole text, the window without effect", "Nothing hides the far keys.",
     "Where does `window` enter?",
     lambda q, k, v, window: F.scaled_dot_product_attention(q, k, v)),
    ("with far keys masked after the softmax", "They have already taken their share.",
     "Over which keys does the sum under the fraction run?",
     _mixing_all(lambda w, near: w * near)),
    ("with far keys masked after the softmax, divided by what is left",
     "Where a hidden score towers above, the visible weights have underflowed to 0.",
     "What should the largest score be taken over: all keys, or the visible ones?",
     _mixing_all(lambda w, near: (w * near) / (w * near).sum(-1, keepdim=True))),
    ("with 0 as the score of far keys", "A score of 0 is not hidden: exp(0) = 1.",
     "Which score makes exp exactly 0?",
     _zero_scores),
    ("with the last tokens left at 0 where the window does not divide n",
     "n // window whole blocks leave some tokens over.", RAGGED,
     lambda q, k, v, window: _dense(q, k, v, window)
     * (torch.arange(n := q.shape[-2]) < _whole(n, window))[:, None]),
    ("with the last keys missing where the window does not divide n",
     "n // window whole blocks leave some tokens over.", RAGGED,
     _masked(lambda i, j, n, w: ((i - j).abs() <= w) & (j < _whole(n, w)))),
    ("that comes out too long: the padding is still there",
     "n + 2 · window queries were answered.", "How many rows has the result?",
     lambda q, k, v, window: F.pad(_dense(q, k, v, window), (0, 0, window, window))),
    ("that comes out too short: only whole windows are answered",
     "Without padding only n - 2 · window queries have a whole window.",
     "How many rows has the result?",
     lambda q, k, v, window: _dense(q, k, v, window)[
         ..., window : max(q.shape[-2] - window, 0), :]),
]  # fmt: skip

for name, cause, ask, function in LOCAL:
    ex.mistake(f"attention in the window {name}", cause, ask)(function)


@ex.alternative("windows gathered by index")
def _(q, k, v, window):
    n = q.shape[2]
    index = torch.arange(n).unsqueeze(1) + torch.arange(-window, window + 1)  # (n, width)
    inside = (index >= 0) & (index < n)
    key, value = (t[:, :, index.clamp(0, n - 1)] for t in (k, v))
    scores = torch.einsum("bhid,bhiwd->bhiw", q, key) * q.shape[-1] ** -0.5
    weights = torch.where(inside, scores, torch.finfo(scores.dtype).min).softmax(dim=3)
    return torch.einsum("bhiw,bhiwe->bhie", weights, value)


@ex.alternative("query by query, each with its slice of the keys")
def _(q, k, v, window):
    rows = []
    for i in range(q.shape[2]):
        near = slice(max(0, i - window), i + window + 1)
        scores = q[:, :, i : i + 1] @ k[:, :, near].transpose(2, 3) / math.sqrt(q.shape[3])
        rows.append(scores.softmax(-1) @ v[:, :, near])
    return torch.cat(rows, dim=2)


@ex.alternative("blocks of queries, each with PyTorch's attention to its stretch of keys")
def _(q, k, v, window):
    n, size, blocks = q.shape[2], max(window, 16), []
    for begin in range(0, n, size):
        end = min(begin + size, n)
        first, last = max(begin - window, 0), min(end + window, n)
        distance = torch.arange(begin, end)[:, None] - torch.arange(first, last)
        block = F.scaled_dot_product_attention(
            q[:, :, begin:end], k[:, :, first:last], v[:, :, first:last], distance.abs() <= window
        )
        blocks.append(block)
    return torch.cat(blocks, dim=2)


@ex.alternative("one diagonal of the scores beside the other")
def _(q, k, v, window):
    n = q.shape[2]
    shifts = range(-min(window, n - 1), min(window, n - 1) + 1)
    # F.pad by -t and t moves row i + t to row i, and puts zeros where there is none.
    key, value = (torch.stack([F.pad(x, (0, 0, -t, t)) for t in shifts]) for x in (k, v))
    real = torch.stack([F.pad(torch.ones(n), (-t, t)) for t in shifts])[:, None, None] > 0
    scores = (q * key).sum(-1) / math.sqrt(q.shape[-1])  # (width, batch, heads, n)
    weights = scores.masked_fill(~real, -INF).softmax(0)
    return (weights[..., None] * value).sum(0)


@ex.alternative("each query an element of the batch, in float64, and back")
def _(q, k, v, window):
    batch, n = len(q), q.shape[-2]
    place = _places(n, window)
    key, value = (_zeros(t.double(), place).transpose(1, 2).flatten(0, 1) for t in (k, v))
    mask = ((place >= 0) & (place < n)).repeat(batch, 1)[:, None, None]  # (batch · n, 1, 1, width)
    query = q.double().transpose(1, 2).flatten(0, 1)[:, :, None]  # (batch · n, heads, 1, d)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output[:, :, 0].unflatten(0, (batch, n)).transpose(1, 2).to(q.dtype)


# --- 5. online softmax ------------------------------------------------------------------------

ex = Exercise(
    "online_attention",
    chapter="11_sparse_attention",
    title="Full attention in one walk over the keys",
    minutes=25,
    difficulty=4,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
Full attention needs all n² scores, but never all **at once**. Walk over the keys in blocks and keep
three things for each query: the largest score so far $m$, the sum of the weights so far $\ell$, and
the weighted sum of values so far $o$, both relative to $m$. A block $B$ with the scores
$s_j = q \cdot k_j / \sqrt{d}$ brings a new maximum, and what was summed under the old one is
rescaled:

$$m' = \max\left(m, \max_{j \in B} s_j\right), \qquad
  \ell' = e^{m - m'} \ell + \sum_{j \in B} e^{s_j - m'}, \qquad
  o' = e^{m - m'} o + \sum_{j \in B} e^{s_j - m'} v_j$$

At the end $o / \ell$ is the output, equal to softmax attention. This is how FlashAttention works.

- `q` is `(…, n_q, d)`, `k` is `(…, n_k, d)`, `v` is `(…, n_k, d_v)`; the result is
  `(…, n_q, d_v)`. Any dimensions may stand in front, the same ones in all three.
- `block` keys at a time. `block` need not divide n_k, and may be larger than n_k.
- Read every key once. Never hold a whole row of scores, in one tensor or in pieces.
- Scores of ±10000 and beyond must do no harm.
""",
    hints=(
        "The first block summed e^(s - 3). The second one brings a score of 5. By what must the "
        "old sums be multiplied so that they are sums of e^(s - 5)?",
        "The same factor, e^(m - m'), mends both old sums, one number for each query. Before the "
        "first block m is -inf, and the factor is e^(-inf) = 0.",
        "`k.split(block, dim=-2)` cuts the keys, the last block as short as it needs to be. In the "
        "loop: top_new = torch.maximum(top, scores.amax(-1, keepdim=True)); what follows from it?",
    ),
)


@ex.solution
def online_attention(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """Softmax attention with a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022, §3.1).

    q: (..., n_q, d), k: (..., n_k, d), v: (..., n_k, d_v) -> (..., n_q, d_v), with n_q · block
    scores at a time.
    """
    ### BEGIN SOLUTION
    top = q.new_full((*q.shape[:-1], 1), -math.inf)  # (..., n_q, 1): the largest score so far
    total = torch.zeros_like(top)  # (..., n_q, 1): the sum of exp(score - top)
    output = q.new_zeros(*q.shape[:-1], v.shape[-1])  # (..., n_q, d_v): the same, times the values
    for key, value in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
        # (..., n_q, d) x (..., d, block) -> (..., n_q, block)
        scores = q @ key.mT / math.sqrt(q.shape[-1])
        new_top = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights = torch.exp(scores - new_top)
        rescale = torch.exp(top - new_top)  # (..., n_q, 1): 0 for the first block
        total = total * rescale + weights.sum(dim=-1, keepdim=True)
        output = output * rescale + weights @ value  # (..., n_q, block) x (..., block, d_v)
        top = new_top
    return output / total
    ### END SOLUTION


def _queries_and_keys(
    g: torch.Generator, front: tuple[int, ...], n_q: int, n_k: int, d: int, d_v: int
) -> Case:
    return {
        "q": normal(g, *front, n_q, d, spread=1.5),
        "k": normal(g, *front, n_k, d, spread=1.5),
        "v": normal(g, *front, n_k, d_v),
    }


def _asked(seed: int, *sizes: Any) -> tuple[Tensor, ...]:
    """q, k and v for a behaviour; sizes: the dimensions in front, n_q, n_k, d, d_v."""
    return tuple(_queries_and_keys(torch.Generator().manual_seed(seed), *sizes).values())


def _high(q: list[float], k: list[float], v: Tensor, block: int) -> Case:
    """Scores q · k that float32 holds exactly."""
    return {"q": torch.tensor([q]).mT, "k": torch.tensor([k]).mT, "v": v, "block": block}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        ((), 2, 3, 1, 2, 2),
        ((1,), 1, 4, 2, 1, 1),
        ((), 3, 4, 2, 2, 9),
        ((2,), 2, 5, 3, 2, 2),
        ((), 4, 4, 4, 4, 2),
        ((1,), 5, 1, 2, 3, 1),
        ((1, 2), 3, 6, 2, 3, 4),
        ((2, 2), 2, 7, 3, 3, 3),
    ]
    cases = [_queries_and_keys(g, *rest) | {"block": block} for *rest, block in sizes]
    return [
        *cases,
        _high([100.0, -100.0], [1.0, 100.0, -100.0, 0.0], normal(g, 4, 2), 1),
        _high([1.0, -1.0], [-20000.0, -20100.0, -20050.0], normal(g, 3, 2), 2),
        _high([1.0, 1.0], [0.0, 200.0, 400.0], normal(g, 3, 2), 1),  # blocks that climb
        _high([1.0, 1.0], [0.0, 0.0, 0.0, 400.0], normal(g, 4, 2), 4),  # far apart in a block
        _high([1.0, 1.0], [500.0, 501.0, 503.0], normal(g, 3, 2), 2),  # all high
        _high([1.0, 1.0], [-20000.0, -20100.0, -20050.0], normal(g, 3, 2), 2),  # all low
        _queries_and_keys(g, (3, 2), 3, 5, 2, 4) | {"block": 2},
    ]


@ex.behaviour("values that are all alike come back: the weights of a query sum to 1")
def _(answer):
    q, k, _ = _asked(1, (2,), 3, 5, 2, 1)
    expect(answer(q, k, torch.full((2, 5, 2), 3.0), 2), torch.full((2, 3, 2), 3.0))


@ex.behaviour("one block as long as the keys is softmax attention")
def _(answer):
    q, k, v = _asked(2, (1, 2), 3, 4, 2, 3)
    expect(answer(q, k, v, 4), F.scaled_dot_product_attention(q, k, v))


@ex.behaviour("the length of the block does not change the result")
def _(answer):
    q, k, v = _asked(3, (), 3, 7, 2, 2)
    want = answer(q, k, v, 7)
    for block in (1, 2, 3, 5, 20):
        expect(answer(q, k, v, block), want)


@ex.behaviour("keys and values in another order give the same output")
def _(answer):
    q, k, v = _asked(4, (2,), 2, 5, 2, 2)
    order = torch.tensor([3, 1, 4, 0, 2])
    expect(answer(q, k[:, order], v[:, order], 2), answer(q, k, v, 2))


@ex.behaviour("scores of ±10000 stay finite, wherever they stand")
def _(answer):
    v = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    high, low = torch.tensor([10000.0]), torch.tensor([-10000.0])
    for at in range(4):
        k = torch.cat([low] * at + [high] + [low] * (3 - at))[:, None]
        for sign, want in ((1.0, v[at]), (-1.0, (v.sum(0) - v[at]) / 3)):
            expect(answer(torch.tensor([[sign]]), k, v, 1)[0], want)


@ex.behaviour("a query's output does not depend on the other queries")
def _(answer):
    q, k, v = _asked(5, (2,), 3, 5, 2, 2)
    q[:, 0] *= 20
    expect(answer(q[:, 1:], k, v, 2), answer(q, k, v, 2)[:, 1:])


@ex.behaviour("the elements of the dimensions in front do not meet")
def _(answer):
    q, k, v = _asked(6, (3, 2), 2, 3, 2, 2)
    expect(answer(*(t[1, 1] for t in (q, k, v)), 2), answer(q, k, v, 2)[1, 1])


@ex.behaviour("all scores are never held at once")
def _(answer):
    held = watched(answer, *_asked(7, (1, 1), 32, 192, 2, 2), 16).held
    if held >= 32 * 192:
        raise Broken(
            f"For 32 queries, 192 keys and block = 16, {held} numbers were held at once; all "
            f"scores are {32 * 192}"
        )


@ex.behaviour("every key is read once")
def _(answer):
    q, k, v = _asked(8, (), 1, 32, 2, 2)
    times = watched(answer, q, k, v, 8).read / k.numel()
    if times > 1.5:
        raise Broken(f"The keys were read {times:.3g} times")


@ex.behaviour("a smaller block takes more steps")
def _(answer):
    q, k, v = _asked(9, (1, 1), 2, 32, 2, 2)
    one, many = (watched(answer, q, k, v, block).operations for block in (32, 4))
    if many < one + 14:
        raise Broken(f"One block of 32 keys took {one} operations, and 8 blocks of 4 keys {many}")


class _Seen(NamedTuple):
    """What a step finds: the three running values, and the scores and values of a block."""

    top: Tensor
    total: Tensor
    output: Tensor
    scores: Tensor
    value: Tensor

    @property
    def best(self) -> Tensor:
        """The largest score of the block."""
        return self.scores.amax(-1, keepdim=True)

    @property
    def new(self) -> Tensor:
        """The largest score of all so far."""
        return torch.maximum(self.top, self.best)

    @property
    def rescale(self) -> Tensor:
        return (self.top - self.new).exp()

    @property
    def weights(self) -> Tensor:
        return (self.scores - self.new).exp()

    @property
    def first(self) -> bool:
        return not bool(self.total.any())


def _summed(s: _Seen, rescale: Any = 1.0, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The old sums rescaled, plus those of the block: total and output."""
    weights = s.weights if weights is None else weights
    return (
        s.total * rescale + weights.sum(-1, keepdim=True),
        s.output * rescale + weights @ s.value,
    )


def _right_step(s: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    return s.new, *_summed(s, s.rescale)


def _cut(k: Tensor, v: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(k.split(block, -2), v.split(block, -2), strict=True))


def _online(step: Function = _right_step, *, start: float = -INF, scale: Function | None = None,
            cut: Function = _cut, finish: Function | None = None) -> Function:  # fmt: skip
    """The walk with some parts replaced.

    step: what becomes of the three running values; cut: (k, v, block) -> blocks; finish:
    (top, total, output) -> result.
    """

    def function(q, k, v, block):
        top = q.new_full((*q.shape[:-1], 1), start)
        total, output = torch.zeros_like(top), q.new_zeros(*q.shape[:-1], v.shape[-1])
        factor = scale(q, k) if scale else q.shape[-1] ** -0.5
        for key, value in cut(k, v, block):
            top, total, output = step(_Seen(top, total, output, q @ key.mT * factor, value))
        return finish(top, total, output) if finish else output / total

    return function


def _per_block(combine: Function, scale: Function | None = None) -> Function:
    """Softmax attention to each block alone, (blocks, …, n_q, d_v), then `combine(outputs,
    sizes)`."""

    def function(q, k, v, block):
        blocks = _cut(k, v, block)
        outputs = [(q @ a.mT / math.sqrt(q.shape[-1])).softmax(-1) @ b for a, b in blocks]
        sizes = torch.tensor([a.shape[-2] for a, _ in blocks], dtype=q.dtype)
        return combine(torch.stack(outputs), sizes.view(-1, *[1] * q.ndim))

    return function


def _whole_blocks(k: Tensor, v: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    return _cut(k, v, block)[: k.shape[-2] // block]


def _padded_blocks(k: Tensor, v: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    lacking = -k.shape[-2] % block
    return _cut(*(F.pad(t, (0, 0, 0, lacking)) for t in (k, v)), block)


def _last_block_full(k: Tensor, v: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    return [*_whole_blocks(k, v, block), (k[..., -block:, :], v[..., -block:, :])]


OLD = "Relative to which maximum are the old sums, and relative to which one the new weights?"
BOTH_OLD = "Which of the two running sums must be rescaled when the maximum grows?"
OVERFLOW = "What is exp(10000), and what may be subtracted from all scores of a query?"
EACH_QUERY = "How many maxima are there: one, or one for each query?"
STARTS = "Below which number lies every score of the first block?"
WALK = "Which keys does the output average over?"
SHARE_SUM = "What must the output be divided by so that the weights of a query sum to 1?"
WHEN = "When is the sum of the weights complete?"
LAST = "How many keys has the last block where `block` does not divide n_k?"
BLOCKS_MEET = "Does a block with large scores get more of the weight than one with small scores?"

STEPS = [
    ("with the output not rescaled",
     "The total is brought to the new maximum, the output keeps the old one.", BOTH_OLD,
     lambda s: (s.new, _summed(s, s.rescale)[0], _summed(s)[1])),
    ("with the total not rescaled",
     "The output is brought to the new maximum, the total keeps the old one.", BOTH_OLD,
     lambda s: (s.new, _summed(s)[0], _summed(s, s.rescale)[1])),
    ("with nothing rescaled", "Blocks are summed that were measured by different maxima.", OLD,
     lambda s: (s.new, *_summed(s))),
    ("with NaN everywhere",
     "inf - inf, 0 · inf or 0 / 0 stands somewhere, as when exp(new - old) is taken for the first "
     "block, where old is -inf.",
     "What are exp(m - m') and exp(s - m') in the first block, where m is -inf and m' is not?",
     lambda s: (s.new, *_summed(s, (s.new - s.top).exp()))),
    ("rescaled by the inverse from the second block on",
     "exp(new - old) stands where exp(old - new) should.",
     "Are the old sums too large or too small now?",
     lambda s: (s.new, *_summed(s, 0.0 if s.first else (s.new - s.top).exp()))),
    ("rescaled by the difference of the maxima, without exp",
     "A shift of the scores is a factor only after exp.",
     "By which factor does e^(s - 3) become e^(s - 5)?",
     lambda s: (s.new, *_summed(s, 0.0 if s.first else s.top - s.new))),
    ("rescaled by the ratio of the maxima", "A shift of the scores is a factor only after exp.",
     "By which factor does e^(s - 3) become e^(s - 5)?",
     lambda s: (s.new, *_summed(s, 0.0 if s.first else s.top / s.new))),
    ("rescaled by the ratio of the totals", "What has changed is the maximum.",
     "By which factor does e^(s - 3) become e^(s - 5)?",
     lambda s: (s.new, *_summed(s, s.total / (s.total + s.weights.sum(-1, keepdim=True))))),
    ("with the new block rescaled as well", "Its weights are relative to the new maximum already.",
     OLD, lambda s: (s.new, *_summed(s, s.rescale, s.weights * (1.0 if s.first else s.rescale)))),
    ("rescaled twice", "The factor is applied to the old sums two times.",
     "How often does the maximum grow in one step?",
     lambda s: (s.new, *_summed(s, s.rescale**2))),
    ("with the output rescaled twice", "The factor is applied to the output two times.",
     "How often does the maximum grow in one step?",
     lambda s: (s.new, _summed(s, s.rescale)[0], _summed(s, s.rescale**2)[1])),
    ("with the maximum subtracted in the rescaling alone",
     "The old sums are rescaled, but the new weights are exp of the raw scores.", OLD,
     lambda s: (s.new, *_summed(s, s.rescale, s.scores.exp()))),
    ("with each block's weights relative to its own maximum",
     "The old sums are relative to the largest score of all, the new weights to that of the block.",
     OLD, lambda s: (s.new, *_summed(s, s.rescale, (s.scores - s.best).exp()))),
    ("with each block relative to its own maximum, nothing rescaled",
     "Every block has a weight of 1 at its best key, however low its score.", BLOCKS_MEET,
     lambda s: (s.best, *_summed(s, 1.0, (s.scores - s.best).exp()))),
    ("with the maximum of the last block only",
     "Right as long as no block is far below an earlier one; then exp(old - new) is inf.",
     "Can the running maximum ever become smaller?",
     lambda s: (s.best, *_summed(s, (s.top - s.best).exp(), (s.scores - s.best).exp()))),
    ("with the maximum of the first block kept",
     "Right as long as no later score is far above it; then exp is inf.",
     "What must be done when a later block brings a larger score?",
     lambda s: _keep_first(s)),
    ("without a maximum", "exp of a high score is inf, and of a low one 0.", OVERFLOW,
     lambda s: (s.top, *_summed(s, 1.0, s.scores.exp()))),
    ("with the weights relative to the old maximum",
     "The new maximum is found, but subtracted only from the next block.", OLD,
     lambda s: (s.new, *_summed(s, s.rescale, (s.scores - (s.new if s.first else s.top)).exp()))),
    ("with one maximum for all queries",
     "Where one query's scores tower above another's, the other's weights underflow to 0.",
     EACH_QUERY, lambda s: _shared(s)),
    ("with the mean of the scores in place of the maximum",
     "Right as long as no score is far above the mean.", OVERFLOW,
     lambda s: _relative_to(s, s.scores.mean(-1, keepdim=True))),
    ("with the smallest score in place of the largest",
     "exp(s - min) overflows where scores differ much.", OVERFLOW,
     lambda s: _relative_to(s, s.scores.amin(-1, keepdim=True))),
    ("with the total of the last block only", "The old part of the total is lost.",
     "What does the total sum over at the end?",
     lambda s: (s.new, s.weights.sum(-1, keepdim=True), _summed(s, s.rescale)[1])),
    ("with the output of the last block over the total of all", "The old part of the output is "
     "lost.", WALK, lambda s: (s.new, _summed(s, s.rescale)[0], s.weights @ s.value)),
    ("with the old sums forgotten at every block",
     "The output and the total of the last block are all that is left.", WALK,
     lambda s: (s.new, *_summed(s, 0.0))),
    ("over the first block only", "The walk ends too early, as with a `return` in the loop.", WALK,
     lambda s: _right_step(s) if s.first else (s.top, s.total, s.output)),
    ("divided by the total at every block",
     "What has been divided is summed with what has not.", WHEN,
     lambda s: (s.new, (t := _summed(s, s.rescale))[0], t[1] / t[0])),
    ("with the total counted as a mean over the block",
     "A mean loses how many keys the block has.", "Sum or mean: what stands in the formula for ℓ?",
     lambda s: (s.new, s.total * s.rescale + s.weights.mean(-1, keepdim=True),
                _summed(s, s.rescale)[1])),
    ("with one total for all queries", "The sum runs over the queries too.",
     "Along which dimension do the keys of one query lie?",
     lambda s: (s.new, s.total * s.rescale + s.weights.sum((-2, -1), keepdim=True),
                _summed(s, s.rescale)[1])),
    ("with powers of 2 in place of e", "exp2 fits only scores multiplied by log2(e).",
     "Which base has softmax?",
     lambda s: (s.new, *_summed(s, torch.exp2(s.top - s.new), torch.exp2(s.scores - s.new)))),
    ("with powers of 2 in the rescaling alone", "exp2 and exp are mixed.",
     "Which base has softmax?", lambda s: (s.new, *_summed(s, torch.exp2(s.top - s.new)))),
    ("with the softmax of each block as its weights",
     "Each block's weights sum to 1 before they meet the others.", BLOCKS_MEET,
     lambda s: (s.new, *_summed(s, s.rescale, s.scores.softmax(-1)))),
    ("with the values summed without their weights", "The weights go into the total alone.",
     "What is v multiplied by in the formula for o?",
     lambda s: (s.new, _summed(s, s.rescale)[0],
                s.output * s.rescale + s.value.sum(-2, keepdim=True))),
    ("with the old output counted twice", "`+=` adds to a sum that holds the old part already.",
     "How often does the old output stand in the formula?",
     lambda s: (s.new, _summed(s, s.rescale)[0], _summed(s, 2 * s.rescale)[1])),
    ("with the old total counted twice", "`+=` adds to a sum that holds the old part already.",
     "How often does the old total stand in the formula?",
     lambda s: (s.new, _summed(s, 2 * s.rescale)[0], _summed(s, s.rescale)[1])),
]  # fmt: skip


def _keep_first(s: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    top = s.best if s.first else s.top
    return top, *_summed(s, 1.0, (s.scores - top).exp())


def _shared(s: _Seen) -> tuple[Tensor, Tensor, Tensor]:
    top = s.new.amax(-2, keepdim=True).expand_as(s.new)
    return top, *_summed(s, (s.top - top).exp(), (s.scores - top).exp())


def _relative_to(s: _Seen, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rescale = 0.0 if s.first else (s.top - top).exp()
    return top, *_summed(s, rescale, (s.scores - top).exp())


for name, cause, ask, function in STEPS:
    ex.mistake(f"attention {name}", cause, ask)(_online(function))

WALKS = [
    ("without the division by the total", "The weights of a query do not sum to 1.", SHARE_SUM,
     _online(finish=lambda top, total, output: output)),
    ("divided by the number of keys", "The weights are not all 1, so n_k is not their sum.",
     SHARE_SUM, lambda q, k, v, block: _online(
         finish=lambda top, total, output: output / k.shape[-2])(q, k, v, block)),
    ("divided by the number of keys as well", "The total has done that already.", SHARE_SUM,
     lambda q, k, v, block: _online()(q, k, v, block) / k.shape[-2]),
    ("divided by the number of blocks as well", "The total has done that already.", SHARE_SUM,
     lambda q, k, v, block: _online()(q, k, v, block) / len(k.split(block, -2))),
    ("multiplied by the total", "The total stands in the numerator.", SHARE_SUM,
     _online(finish=lambda top, total, output: output * total)),
    ("with e^m brought back", "The factor e^m is in the output and in the total, and cancels.",
     "What is left of e^m in o / ℓ?",
     _online(finish=lambda top, total, output: output / total * top.exp())),
    ("with a maximum that starts at 0",
     "Where all scores are far below 0, all weights underflow: 0 / 0.", STARTS, _online(start=0.0)),
    ("with the last block dropped where it is short", "n_k // block counts whole blocks only.",
     LAST, _online(cut=_whole_blocks)),
    ("with the last block filled up with zeros", "A padded key has the score 0, and exp(0) = 1.",
     LAST, _online(cut=_padded_blocks)),
    ("with the last block filled up from the one before",
     "Some keys are counted twice.", LAST, _online(cut=_last_block_full)),
    ("with the values in another order than the keys",
     "The values run backwards: weights meet other keys' values.",
     "Does weight j of a block meet value j of the same block?",
     _online(cut=lambda k, v, block: _cut(k, v.flip(-2), block))),
    ("with every other block left out", "The walk takes steps of two blocks.", WALK,
     _online(cut=lambda k, v, block: _cut(k, v, block)[::2])),
    ("without the first block", "The first block only set the maximum.", WALK,
     _online(cut=lambda k, v, block: _cut(k, v, block)[1:] or _cut(k, v, block))),
    ("with every block walked over twice, but for the last one",
     "Windows of two blocks overlap.", "How often is each key counted?",
     _online(cut=lambda k, v, block: [b for b in _cut(k, v, block)[:-1] for _ in (0, 1)]
             + _cut(k, v, block)[-1:])),
    ("as the mean of the blocks' own softmax attention",
     "Every block gets an equal share, whatever its scores.", BLOCKS_MEET,
     _per_block(lambda outputs, sizes: outputs.mean(0))),
    ("over the last block only", "Each block overwrites what came before.", WALK,
     _per_block(lambda outputs, sizes: outputs[-1])),
    ("as the sum of the blocks' own softmax attention",
     "The weights of each block sum to 1, and those of the query to the number of blocks.",
     SHARE_SUM, _per_block(lambda outputs, sizes: outputs.sum(0))),
    ("as the mean of the blocks' own softmax attention, by their lengths",
     "A block's share depends on its scores, not on its length.", BLOCKS_MEET,
     _per_block(lambda outputs, sizes: (outputs * sizes).sum(0) / sizes.sum())),
    ("scaled twice", "The queries are divided by √d, and then the scores are.",
     "How often does √d stand in the formula?", _online(scale=lambda q, k: 1 / q.shape[-1] + 0.0)),
    ("under a causal mask", "Nothing in this exercise hides a key.", WALK,
     lambda q, k, v, block: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
    ("that mixes the keys", "The values have no effect.", VALUES,
     lambda q, k, v, block: _online()(q, k, k, block)),
    ("with keys and values swapped in the scores", "The queries are compared with the values.",
     "Which of k and v is compared with the queries?",
     lambda q, k, v, block: _online()(q, v, k, block)),
    ("with the output transposed", "Queries and features have changed places.",
     "Is there one transpose too many?", lambda q, k, v, block: _online()(q, k, v, block).mT),
    ("that returns the total as well", "Two things come back where one was asked for.",
     "What does the docstring say about the result?",
     _online(finish=lambda top, total, output: (output / total, total))),
    ("that returns log-sum-exp as well", "Two things come back where one was asked for.",
     "What does the docstring say about the result?",
     _online(finish=lambda top, total, output: (output / total, top + total.log()))),
]  # fmt: skip


for name, cause, ask, function in WALKS:
    ex.mistake(f"attention {name}", cause, ask)(function)
# Scaled by 1/d_k, without the root, is scaled twice.
ex.mistakes_from(
    [part for part in SCALES if "without the root" not in part.name],
    "attention",
    lambda part: _online(scale=part),
)


@ex.alternative("the first block on its own, indices by range")
def _(q, k, v, block):
    root = math.sqrt(q.shape[-1])
    scores = torch.einsum("...id,...jd->...ij", q, k[..., :block, :]) / root
    m = scores.max(dim=-1).values
    p = (scores - m.unsqueeze(-1)).exp()
    total, output = p.sum(-1), torch.einsum("...ij,...je->...ie", p, v[..., :block, :])
    for begin in range(block, k.shape[-2], block):
        part = slice(begin, begin + block)
        scores = torch.einsum("...id,...jd->...ij", q, k[..., part, :]) / root
        old, m = m, torch.maximum(m, scores.max(dim=-1).values)
        p, shrink = (scores - m[..., None]).exp(), (old - m).exp()
        total = total * shrink + p.sum(-1)
        output = output * shrink[..., None] + torch.einsum("...ij,...je->...ie", p, v[..., part, :])
    return output / total[..., None]


@ex.alternative("log-sum-exp, and an output that is always normalised")
def _(q, k, v, block):
    q = q / q.shape[-1] ** 0.5
    output, lse = 0.0, torch.full_like(q[..., :1], -INF)
    for key, value in zip(k.split(block, -2), v.split(block, -2), strict=True):
        scores = q @ key.transpose(-2, -1)
        block_lse = scores.logsumexp(-1, keepdim=True)
        new = torch.logaddexp(lse, block_lse)
        output = output * (lse - new).exp() + (block_lse - new).exp() * (scores.softmax(-1) @ value)
        lse = new
    return output


@ex.alternative("a column of ones beside the values, from a very low maximum")
def _(q, k, v, block):
    v = F.pad(v, (0, 1), value=1.0)
    m = torch.full(q.shape[:-1], torch.finfo(q.dtype).min, dtype=q.dtype)[..., None]
    both = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for i in range(math.ceil(k.shape[-2] / block)):
        near = slice(i * block, (i + 1) * block)
        scores = q @ k[..., near, :].mT * q.shape[-1] ** -0.5
        new = torch.max(m, scores.amax(-1, True))
        both = (m - new).exp() * both + (scores - new).exp() @ v[..., near, :]
        m = new
    return both[..., :-1] / both[..., -1:]


@ex.alternative("in float64, blocks from the last to the first, and back")
def _(q, k, v, block):
    state = q.double().new_full((*q.shape[:-1], 1), -INF), 0.0, 0.0
    blocks = reversed(list(zip(k.split(block, -2), v.split(block, -2), strict=True)))
    for key, value in blocks:
        m, total, output = state
        scores = q.double() @ key.double().mT / math.sqrt(q.shape[-1])
        new = torch.cat([m, scores], -1).amax(-1, keepdim=True)
        p = (scores - new).exp()
        total = total * (m - new).exp() + p.sum(-1, keepdim=True)
        state = new, total, output * (m - new).exp() + p @ value.double()
    return (state[2] / state[1]).to(q.dtype)


@ex.alternative("query by query, and in each of them the blocks")
def _(q, k, v, block):
    rows = []
    for query in q.unbind(-2):
        m, total, output = query.new_full((*query.shape[:-1], 1), -INF), 0.0, 0.0
        for key, value in zip(k.split(block, -2), v.split(block, -2), strict=True):
            scores = (query.unsqueeze(-2) * key).sum(-1) / math.sqrt(query.shape[-1])
            new = torch.maximum(m, scores.amax(-1, keepdim=True))
            p, shrink = torch.exp(scores - new), torch.exp(m - new)
            total = total * shrink + p.sum(-1, keepdim=True)
            output = output * shrink + (p.unsqueeze(-1) * value).sum(-2)
            m = new
        rows.append(output / total)
    return torch.stack(rows, -2)
