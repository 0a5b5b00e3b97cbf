"""Exercises of chapter 12: attention without the n × n matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

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


def _phi(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def _uneven(g: torch.Generator, *shape: int) -> Tensor:
    """Numbers from -2 to 2 without 0: there relu, clamp and `where` differ in their slope."""
    x = normal(g, *shape).clamp(-2, 2)
    return torch.where(x == 0, 0.1, x)


def _tokens(g: torch.Generator, *sizes: int) -> Case:
    """sizes: batch, heads, n_q, n_k, d, d_v."""
    batch, heads, n_q, n_k, d, d_v = sizes
    return {
        "q": _uneven(g, batch, heads, n_q, d),
        "k": _uneven(g, batch, heads, n_k, d),
        "v": normal(g, batch, heads, n_k, d_v),
    }


def _drawn(seed: int, *sizes: int) -> tuple[Tensor, ...]:
    """q, k and v for a behaviour."""
    return tuple(_tokens(torch.Generator().manual_seed(seed), *sizes).values())


def _divided(weights: Tensor, v: Tensor) -> Tensor:
    """Rows of weights divided by their sums, times the values."""
    return weights @ v / weights.sum(-1, keepdim=True)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal linear attention by its n × n weights."""
    return _divided((_phi(q) @ _phi(k).mT).tril(), v)


# How queries, keys and values enter: (q, k, v) -> what the products are made of.
MAPS = [
    Mistake(
        "with φ on the queries alone",
        "The keys enter as they are, so a weight can be negative and a normaliser near 0.",
        "To which two inputs is φ applied?",
        lambda q, k, v: (_phi(q), k, v),
    ),
    Mistake(
        "with φ on the keys alone",
        "The queries enter as they are, so a weight can be negative and a normaliser near 0.",
        "To which two inputs is φ applied?",
        lambda q, k, v: (q, _phi(k), v),
    ),
    Mistake(
        "without φ",
        "Plain dot products can be negative, and so can their sum that you divide by.",
        "What keeps every weight positive?",
        lambda q, k, v: (q, k, v),
    ),
    Mistake(
        "with φ on the values as well",
        "φ makes weights; the values are what is averaged.",
        "To which two inputs is φ applied?",
        lambda q, k, v: (_phi(q), _phi(k), _phi(v)),
    ),
    Mistake(
        "with relu as φ",
        "relu gives 0 for every negative number: a query can lose all its weights, and 0 / 0 is "
        "NaN.",
        "What is φ of a negative number?",
        lambda q, k, v: (q.relu(), k.relu(), v),
    ),
    Mistake(
        "with elu as φ, without the 1",
        "elu goes down to -1, so weights can be negative.",
        "What is added to elu(x) to make it positive?",
        lambda q, k, v: (F.elu(q), F.elu(k), v),
    ),
    Mistake(
        "with exp as φ",
        "exp is positive too, but it is another map.",
        "Which φ does the exercise ask for?",
        lambda q, k, v: (q.exp(), k.exp(), v),
    ),
    Mistake(
        "with softmax over the features as φ",
        "The features of a token are made to sum to 1.",
        "Does φ look at one number or at a whole row?",
        lambda q, k, v: (q.softmax(-1), k.softmax(-1), v),
    ),
    Mistake(
        "with φ applied twice",
        "elu of a positive number is that number, so every feature is 1 too large.",
        "How often is φ applied on the way?",
        lambda q, k, v: (_phi(_phi(q)), _phi(_phi(k)), v),
    ),
    Mistake(
        "with q divided by √d before φ",
        "That scale belongs to softmax attention; φ of a smaller number is another weight.",
        "Where does √d stand in the formula?",
        lambda q, k, v: (_phi(q / math.sqrt(q.shape[-1])), _phi(k), v),
    ),
    Mistake(
        "with queries and keys swapped",
        "The keys ask, and the queries are asked.",
        "Which of the two is summed over?",
        lambda q, k, v: (_phi(k), _phi(q), v),
    ),
    Mistake(
        "with the keys in place of the values",
        "The values have no effect.",
        "What is averaged with the weights?",
        lambda q, k, v: (_phi(q), _phi(k), k),
    ),
]


# --- 1. the feature map -----------------------------------------------------------------------

ex = Exercise(
    "feature_map",
    chapter="12_linear_attention",
    title="A feature map that is never negative",
    minutes=5,
    difficulty=1,
    importance=4,
    batched=True,
    prompt=r"""
Softmax attention weighs key $j$ with $\exp(q_i \cdot k_j / \sqrt{d})$. **Linear attention** takes
$\varphi(q_i) \cdot \varphi(k_j)$ instead: map query and key first, multiply then. Weights must not
be negative, so each feature should be positive. The usual map is

$$\varphi(x) = \mathrm{elu}(x) + 1 = \begin{cases} x + 1 & x > 0 \\ e^{x} & x \le 0 \end{cases}$$

It is applied to every number of `x` alone; shape and dtype stay.
""",
    hints=(
        "What is φ(0), and what does φ become far to the left of 0?",
        "On the right φ is a line of slope 1; on the left it is exp, which never reaches 0. The "
        "two meet at 0 with the same value and the same slope.",
        "`F.elu(x)` is x on the right and eˣ - 1 on the left. What is missing?",
    ),
)


@ex.solution
def feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1 of each number, positive everywhere (Katharopoulos et al. 2020, section 3.2.1).

    x: any shape -> the same shape.
    """
    ### BEGIN SOLUTION
    return F.elu(x) + 1  # elu is above -1 everywhere
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    shapes = [(1, 2), (3,), (2, 1, 3), (2, 2), (1, 1), (3, 2, 4)]
    *first, last = [{"x": _uneven(g, *shape)} for shape in shapes]
    at_zero = {"x": torch.tensor([[0.0, 12.0, -12.0]])}
    far = {"x": torch.tensor([[100.0, -100.0], [-1000.0, 1000.0]])}
    near = {"x": torch.tensor([[0.001, -0.001], [-0.2, -5.0]])}
    return [*first, at_zero, far, near, last]


@ex.behaviour("0 becomes 1")
def _(answer):
    case = {"x": torch.zeros(2)}
    expect(answer.on(case), torch.ones(2), case=case)


@ex.behaviour("a positive number grows by 1")
def _(answer):
    case = {"x": torch.tensor([0.5, 1.0, 3.0])}
    expect(answer.on(case), torch.tensor([1.5, 2.0, 4.0]), case=case)


@ex.behaviour("a negative number x becomes eˣ")
def _(answer):
    case = {"x": torch.tensor([-0.5, -1.0, -3.0])}
    expect(answer.on(case), torch.tensor([-0.5, -1.0, -3.0]).exp(), case=case)


@ex.behaviour("every feature is positive")
def _(answer):
    case = {"x": torch.linspace(-10, 10, 9)}
    got = answer.on(case)
    if not (got > 0).all():
        at = case["x"][~(got > 0)][0].item()
        raise Broken(f"φ({at}) came out as {got[~(got > 0)][0].item():.4g}")


@ex.behaviour("a larger number gets a larger feature")
def _(answer):
    got = answer(torch.linspace(-6, 6, 25))
    expect(got[1:] > got[:-1], torch.ones(24, dtype=torch.bool))


@ex.behaviour("every number is mapped alone")
def _(answer):
    (x,) = some(1, (2, 3, 4))
    expect(answer(x)[1:, :2, 3:], answer(x[1:, :2, 3:]))


POSITIVE = "Which two properties has φ: what is φ(0), and can φ be 0 or negative?"
BRANCHES = "What are x + 1 and eˣ at 0, and what must the two branches give there?"
OTHER = "Which function stands in the formula?"
ALONE = "Does φ look at one number or at a whole row?"

FEATURE_MAPS = [
    ("relu(x)", "Every negative number becomes 0, and with it perhaps every weight.", POSITIVE,
     torch.relu),
    ("elu(x) without the 1", "elu goes down to -1, so weights can be negative.", POSITIVE, F.elu),
    ("elu(x) - 1", "The 1 was taken away instead of added.", POSITIVE, lambda x: F.elu(x) - 1),
    ("elu(x) + 2, as φ applied twice gives", "elu of a positive number is that number.",
     "How often is 1 added?", lambda x: F.elu(x) + 2),
    ("elu(x + 1)", "The 1 was added before elu, so the result goes down to -1.",
     "Is 1 added to x or to elu(x)?", lambda x: F.elu(x + 1)),
    ("elu(-x) + 1", "The sign of x was turned.", "Should a larger x get a larger feature?",
     lambda x: F.elu(-x) + 1),
    ("1 - elu(x)", "elu is subtracted instead of added.",
     "Should a larger x get a larger feature?", lambda x: 1 - F.elu(x)),
    ("elu(x) + 1 with α = 2", "On the left it goes down to -1.", "Which α makes φ end at 0?",
     lambda x: F.elu(x, alpha=2.0) + 1),
    ("elu(x) + 1 with α = 0.5", "On the left it ends at 0.5 instead of 0.",
     "Which α makes φ end at 0?", lambda x: F.elu(x, alpha=0.5) + 1),
    ("relu(x) + 1", "All negative numbers become 1: φ cannot tell them apart.",
     "What is φ(-3)?", lambda x: x.relu() + 1),
    ("leaky_relu(x)", "It is negative on the left.", POSITIVE, F.leaky_relu),
    ("leaky_relu(x) + 1", "It is a line on the left, and negative far enough out.", POSITIVE,
     lambda x: F.leaky_relu(x) + 1),
    ("gelu(x) + 1", "gelu turns back on the left, so a smaller x can get a larger feature.", OTHER,
     lambda x: F.gelu(x) + 1),
    ("silu(x) + 1", "silu turns back on the left, so a smaller x can get a larger feature.", OTHER,
     lambda x: F.silu(x) + 1),
    ("selu(x) + 1", "selu is elu with two other factors, and goes below -1.", OTHER,
     lambda x: F.selu(x) + 1),
    ("exp(x)", "Right on the left, but on the right it should be a line.", BRANCHES, torch.exp),
    ("exp(x - max)", "Right for a softmax, whose shift cancels; here it changes the features.",
     ALONE, lambda x: (x - x.amax(-1, keepdim=True)).exp()),
    ("exp(-|x|)", "It falls to both sides.", "Should a larger x get a larger feature?",
     lambda x: x.abs().neg().exp()),
    ("softplus(x)", "log(1 + eˣ) is positive too, but φ(0) would be log 2.", POSITIVE, F.softplus),
    ("softplus(x) + 1", "log(1 + eˣ) is not elu.", OTHER, lambda x: F.softplus(x) + 1),
    ("sigmoid(x)", "It never grows beyond 1.", OTHER, torch.sigmoid),
    ("tanh(x) + 1", "It is positive, but never grows beyond 2.", OTHER, lambda x: x.tanh() + 1),
    ("softmax over the last dimension", "The numbers of a row compete with one another.", ALONE,
     lambda x: x.softmax(-1)),
    ("elu(x) + 1, divided by its sum over the features",
     "Each row of features is made to sum to 1.", ALONE,
     lambda x: _phi(x) / _phi(x).sum(-1, keepdim=True)),
    ("|x|", "The sign of x is lost.", "Should a larger x get a larger feature?", torch.abs),
    ("|x| + 1", "The sign of x is lost.", "Should a larger x get a larger feature?",
     lambda x: x.abs() + 1),
    ("x²", "The sign of x is lost.", "Should a larger x get a larger feature?", torch.square),
    ("x + 1", "Right on the right, but on the left it goes below 0.", BRANCHES, lambda x: x + 1),
    ("x on the right and eˣ on the left", "The right branch lacks its 1: φ jumps at 0.", BRANCHES,
     lambda x: torch.where(x > 0, x, x.exp())),
    ("x + 1 on the right and eˣ - 1 on the left", "The left branch is elu still, without the 1.",
     BRANCHES, lambda x: torch.where(x > 0, x + 1, x.expm1())),
    ("x + 1 on the right and eˣ + 1 on the left",
     "elu is eˣ - 1 on the left, so the 1 that is added cancels.", BRANCHES,
     lambda x: torch.where(x > 0, x + 1, x.exp() + 1)),
    ("the two branches swapped", "The line stands on the left and exp on the right.", BRANCHES,
     lambda x: torch.where(x > 0, x.exp(), x + 1)),
    ("a sum of the two branches with 0 · inf in it",
     "Both branches are computed everywhere: exp of a large number is inf, and 0 · inf is NaN.",
     "How do you choose between two branches without multiplying by 0?",
     lambda x: (x > 0) * (x + 1) + (x <= 0) * x.exp()),
    ("elu(x) + 1 with 0 at x = 0", "Neither `x > 0` nor `x < 0` holds for 0.", BRANCHES,
     lambda x: _phi(x) * (x != 0)),
    ("the features of x and of -x side by side", "There are twice as many features as asked for.",
     "How wide should the result be?", lambda x: torch.cat([_phi(x), _phi(-x)], -1)),
]  # fmt: skip

for name, cause, ask, function in FEATURE_MAPS:
    ex.mistake(name, cause, ask)(function)


@ex.alternative("where, with a line on the right and exp on the left")
def _(x):
    return torch.where(x > 0, x + 1, torch.exp(x))


@ex.alternative("relu plus exp of what is negative")
def _(x):
    return torch.relu(x) + torch.exp(x.clamp(max=0))


@ex.alternative("PyTorch's CELU module")
def _(x):
    return 1.0 + torch.nn.CELU()(x)


@ex.alternative("one number at a time")
def _(x):
    return torch.stack([n + 1 if n > 0 else n.exp() for n in x.flatten()]).view_as(x)


@ex.alternative("the negative numbers written over, in a copy")
def _(x):
    features = x + 1
    features[x < 0] = x[x < 0].exp()
    return features


@ex.alternative("in float64, and back")
def _(x):
    wide = x.double()
    return (wide.clamp(min=0) + wide.clamp(max=0).expm1() + 1).to(x.dtype)


# --- 2. linear attention ----------------------------------------------------------------------

ex = Exercise(
    "linear_attention",
    chapter="12_linear_attention",
    title="Linear attention",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
With $\varphi(x) = \mathrm{elu}(x) + 1$ on each number, key $j$ has the weight
$\varphi(q_i) \cdot \varphi(k_j)$ for query $i$, divided by the sum of that query's weights. Every
query sees every key. Because the weight is a plain product, the query can leave the sum:

$$\text{output}_i
  = \frac{\sum_j \left(\varphi(q_i) \cdot \varphi(k_j)\right) v_j}
         {\sum_j \varphi(q_i) \cdot \varphi(k_j)}
  = \frac{\varphi(q_i)^\top \left( \sum_j \varphi(k_j)\, v_j^\top \right)}
         {\varphi(q_i)^\top \left( \sum_j \varphi(k_j) \right)}$$

Both brackets are the same for all queries: the upper one is a matrix of $d \times d_v$, the lower
one a vector of $d$ numbers.

- `q` is `(batch, heads, n_q, d)`, `k` is `(batch, heads, n_k, d)`, `v` is
  `(batch, heads, n_k, d_v)`; the result is `(batch, heads, n_q, d_v)`.
- There is no $1/\sqrt{d}$ and no softmax.
- **Never make a matrix of n_q × n_k**, and do not build it row by row either: twice as many tokens
  may cost twice as much, not four times.
""",
    hints=(
        "In (φ(q) φ(k)ᵀ) v, where may the brackets be moved to, and how large is what stands "
        "between them then?",
        "φ(k)ᵀ v is (d, d_v), however many keys there are. The normaliser is the same formula "
        "with every value replaced by 1.",
        "total = k.sum(dim=-2) is (batch, heads, d), one number for each feature; "
        "`q @ total[..., None]` is (batch, heads, n_q, 1): what is divided by it?",
    ),
)


@ex.solution
def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """φ(q) (φ(k)ᵀ v) / (φ(q) Σ φ(k)), φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, section 3.2).

    q: (batch, heads, n_q, d), k: (batch, heads, n_k, d), v: (batch, heads, n_k, d_v)
    -> (batch, heads, n_q, d_v), without a matrix of n_q x n_k.
    """
    ### BEGIN SOLUTION
    q, k = F.elu(q) + 1, F.elu(k) + 1
    state = k.mT @ v  # (batch, heads, d, n_k) x (…, n_k, d_v) -> (batch, heads, d, d_v)
    total = k.sum(dim=-2).unsqueeze(-1)  # (batch, heads, d, 1)
    # (batch, heads, n_q, d) x (…, d, d_v) and x (…, d, 1): each query reads the two sums
    return (q @ state) / (q @ total)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 2, 2, 1, 2),
        (1, 1, 1, 3, 2, 2),
        (2, 1, 2, 2, 2, 1),
        (1, 3, 3, 3, 3, 3),
        (1, 1, 2, 1, 3, 1),
        (2, 3, 3, 2, 2, 4),
        (3, 2, 4, 3, 2, 3),
    ]
    return [_tokens(g, *size) for size in sizes]


@ex.behaviour("values that are all alike come back: the weights of a query sum to 1")
def _(answer):
    q, k, _ = _drawn(1, 2, 1, 3, 4, 2, 2)
    expect(answer(q, k, torch.full((2, 1, 4, 2), 3.0)), torch.full((2, 1, 3, 2), 3.0))


@ex.behaviour("with a single key every query gets its value")
def _(answer):
    q, k, v = _drawn(2, 1, 2, 3, 1, 2, 4)
    expect(answer(q, k, v), v.expand(1, 2, 3, 4))


@ex.behaviour("keys that are all alike give the mean of the values")
def _(answer):
    q, k, v = _drawn(3, 1, 2, 2, 3, 2, 3)
    got = answer(q, k[..., :1, :].expand_as(k), v)
    expect(got, v.mean(-2, keepdim=True).expand(1, 2, 2, 3))


@ex.behaviour("the n_q × n_k weights φ(q) · φ(k), each row divided by its sum, give the same")
def _(answer):
    q, k, v = _drawn(4, 2, 2, 3, 40, 2, 3)
    expect(answer(q, k, v), _divided(_phi(q) @ _phi(k).mT, v))


@ex.behaviour("a query's output does not depend on the other queries")
def _(answer):
    q, k, v = _drawn(5, 2, 2, 3, 3, 2, 2)
    expect(answer(q[:, :, 1:2], k, v), answer(q, k, v)[:, :, 1:2])


@ex.behaviour("keys and values in another order give the same output")
def _(answer):
    q, k, v = _drawn(6, 2, 1, 3, 4, 2, 3)
    order = torch.tensor([2, 0, 3, 1])
    expect(answer(q, k[:, :, order], v[:, :, order]), answer(q, k, v))


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    q, k, v = _drawn(7, 3, 3, 2, 3, 2, 2)
    expect(answer(q[1:, 2:], k[1:, 2:], v[1:, 2:]), answer(q, k, v)[1:, 2:])


@ex.behaviour("no matrix of n_q × n_k is made")
def _(answer):
    largest = watched(answer, *_drawn(8, 1, 1, 64, 64, 2, 2)).largest
    if largest >= 64 * 64:
        raise Broken(f"For 64 queries and 64 keys a tensor of {largest} numbers was made")


@ex.behaviour("twice as many tokens take twice the numbers, not four times as many")
def _(answer):
    few, many = (watched(answer, *_drawn(9, 1, 1, n, n, 2, 2)).made for n in (64, 128))
    if many > 3 * few:
        raise Broken(f"For 64 tokens {few} numbers were made, for 128 tokens {many}")


def _mapped(part: Function) -> Function:
    """An answer that maps queries and keys as it should: `part(φ(q), φ(k), v)`."""
    return lambda q, k, v: part(_phi(q), _phi(k), v)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention of features."""
    return q @ (k.mT @ v) / (q @ k.sum(-2)[..., None])


SUM = "What must a query's output be divided by so that its weights sum to 1?"
SAME_WEIGHTS = "Are the weights in the normaliser those of the numerator?"
ONE_QUERY = "Over which index does the sum in the normaliser run?"
BRACKETS = "Where does a softmax stand in the formula?"

ex.mistakes_from(MAPS, "linear attention", lambda part: lambda *args: _linear(*part(*args)))

LINEAR = [
    ("without the normaliser", "The weights of a query do not sum to 1: more keys, larger output.",
     SUM, _mapped(lambda q, k, v: q @ (k.mT @ v))),
    ("divided by the number of keys", "The weights are not all 1, so n_k is not their sum.", SUM,
     _mapped(lambda q, k, v: q @ (k.mT @ v) / k.shape[-2])),
    ("divided by the number of keys as well", "The normaliser has done that already.", SUM,
     _mapped(lambda q, k, v: _linear(q, k, v) / k.shape[-2])),
    ("with the mean of the keys in the normaliser", "The numerator is a sum over the keys still.",
     "Sum or mean: are numerator and normaliser made alike?",
     _mapped(lambda q, k, v: q @ (k.mT @ v) / (q @ k.mean(-2)[..., None]))),
    ("with the largest keys in the normaliser", "`max` over the keys stands where a sum should.",
     SUM, _mapped(lambda q, k, v: q @ (k.mT @ v) / (q @ k.amax(-2)[..., None]))),
    ("with the queries unmapped in the normaliser", "Numerator and normaliser use other weights.",
     SAME_WEIGHTS,
     lambda q, k, v: _phi(q) @ (_phi(k).mT @ v) / (q @ _phi(k).sum(-2)[..., None])),
    ("with the keys unmapped in the normaliser", "Numerator and normaliser use other weights.",
     SAME_WEIGHTS,
     lambda q, k, v: _phi(q) @ (_phi(k).mT @ v) / (_phi(q) @ k.sum(-2)[..., None])),
    ("with φ of the summed keys in the normaliser", "φ is not linear: φ of a sum is no sum of φ.",
     "Map, then sum, or sum, then map?",
     lambda q, k, v: _phi(q) @ (_phi(k).mT @ v) / (_phi(q) @ _phi(k.sum(-2))[..., None])),
    ("with the features of the query summed in the normaliser", "The keys are not in it.",
     ONE_QUERY, _mapped(lambda q, k, v: q @ (k.mT @ v) / q.sum(-1, keepdim=True))),
    ("with all features of all keys summed in the normaliser", "The query is not in it.",
     "Do all queries have the same normaliser?",
     _mapped(lambda q, k, v: q @ (k.mT @ v) / k.sum((-2, -1), keepdim=True))),
    ("with each feature divided by its own sum", "A ratio of sums is no sum of ratios.",
     "How many numbers divide the output of one query: d, or one?",
     _mapped(lambda q, k, v: q @ (k.mT @ v / k.sum(-2)[..., None]))),
    ("normalised over the queries", "The weights of a key sum to 1, not those of a query.",
     ONE_QUERY, _mapped(lambda q, k, v: q @ k.mT / (q @ k.mT).sum(-2, keepdim=True) @ v)),
    ("normalised over queries and keys together", "All weights of a head sum to 1.", ONE_QUERY,
     _mapped(lambda q, k, v: q @ (k.mT @ v) / (q @ k.mT).sum((-2, -1), keepdim=True))),
    ("with a normaliser that lacks its last dimension",
     "(batch, heads, n_q) meets (batch, heads, n_q, d_v) the wrong way: queries against features.",
     "Which shape must the normaliser have so that each query has its own?",
     _mapped(lambda q, k, v: q @ (k.mT @ v) / (q * k.sum(-2, keepdim=True)).sum(-1))),
    ("with a normaliser that is not summed over the features",
     "φ(q) · Σ φ(k) by `*` leaves d numbers; it fits only if d = d_v.",
     "How many numbers divide the output of one query: d, or one?",
     _mapped(lambda q, k, v: q @ (k.mT @ v) / (q * k.sum(-2, keepdim=True)))),
    ("with the summed keys not made a column",
     "φ(q) of (batch, heads, n_q, d) times (batch, heads, d) takes the heads for rows.",
     "Which shape must Σ φ(k) have so that each query gets one number?",
     _mapped(lambda q, k, v: q @ (k.mT @ v) / (q @ k.sum(-2)))),
    ("with 1 added to the normaliser", "A guard against 0 must be far smaller than the sum.",
     "How large may a number be that must not change the result?",
     _mapped(lambda q, k, v: q @ (k.mT @ v) / (1 + q @ k.sum(-2)[..., None]))),
    ("divided twice by the normaliser", "The weights sum to 1 after the first time.",
     "How often is the output divided?",
     _mapped(lambda q, k, v: _linear(q, k, v) / (q @ k.sum(-2)[..., None]))),
    ("with each output scaled to length 1", "That is not what makes the weights sum to 1.", SUM,
     _mapped(lambda q, k, v: F.normalize(q @ (k.mT @ v), dim=-1))),
    ("scaled by 1/√d", "Whatever multiplies all weights of a query cancels; this was left over.",
     "Where does √d stand in the formula?",
     _mapped(lambda q, k, v: _linear(q, k, v) / math.sqrt(q.shape[-1]))),
    ("with the state transposed", "vᵀ φ(k) is (d_v, d); it fits only if d = d_v.",
     "Which dimension of the state must meet the query's features?",
     _mapped(lambda q, k, v: q @ (v.mT @ k) / (q @ k.sum(-2)[..., None]))),
    ("with keys and values summed before their product",
     "Σ φ(k) times Σ v is not Σ φ(k) vᵀ: no key belongs to its value any more.",
     "Which comes first: the product of a key and its value, or the sum?",
     _mapped(lambda q, k, v: q @ (k.sum(-2)[..., None] * v.sum(-2, keepdim=True))
             / (q @ k.sum(-2)[..., None]))),
    ("with one state for all heads", "The keys of all heads were summed into one.",
     "Which dimension may the sum remove: the keys, or the heads too?",
     _mapped(lambda q, k, v: q @ (k.mT @ v).sum(1, keepdim=True)
             / (q @ k.sum((1, -2))[:, None, :, None]))),
    ("under a causal mask", "Later keys are hidden; nothing in this exercise asks for that.",
     "Which keys may query 0 see?", _mapped(lambda q, k, v: _divided((q @ k.mT).tril(), v))),
    ("with φ applied to the scores", "φ(q · k) is not φ(q) · φ(k), and it needs the whole matrix.",
     "Is φ applied before the product or after it?",
     lambda q, k, v: _divided(_phi(q @ k.mT), v)),
    ("with softmax over the weights", "The weights are exponentiated once more.", BRACKETS,
     _mapped(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)),
    ("with softmax instead of φ: softmax attention", "This is what linear attention replaces.",
     BRACKETS, lambda q, k, v: F.scaled_dot_product_attention(q, k, v)),
    ("with softmax instead of φ and no scale: softmax attention",
     "This is what linear attention replaces.", BRACKETS,
     lambda q, k, v: (q @ k.mT).softmax(-1) @ v),
    ("with softmax of the keys over their positions", "That is another linear attention, whose "
     "queries get a softmax over their features.", BRACKETS,
     lambda q, k, v: q.softmax(-1) @ (k.softmax(-2).mT @ v)),
    ("that returns the normaliser as well", "Two things come back where one was asked for.",
     "What does the docstring say about the result?",
     _mapped(lambda q, k, v: (_linear(q, k, v), q @ k.sum(-2)[..., None]))),
]  # fmt: skip

for name, cause, ask, function in LINEAR:
    ex.mistake(f"linear attention {name}", cause, ask)(function)


@ex.alternative("einsum, two factors at a time")
def _(q, k, v):
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    state = torch.einsum("bhjd,bhje->bhde", k, v)
    normaliser = torch.einsum("bhid,bhd->bhi", q, k.sum(2))
    return torch.einsum("bhid,bhde,bhi->bhie", q, state, 1 / normaliser)


@ex.alternative("a column of ones beside the values")
def _(q, k, v):
    ones = torch.ones_like(v[..., :1])
    both = _phi(q) @ (_phi(k).transpose(-2, -1) @ torch.cat([v, ones], dim=-1))
    return both[..., :-1] / both[..., -1:]


@ex.alternative("a loop over the keys")
def _(q, k, v):
    q, k = _phi(q), _phi(k)
    state, total = torch.zeros_like(k[..., 0, :, None] * v[..., 0, None, :]), 0.0
    for j in range(k.shape[2]):
        state = state + k[:, :, j, :, None] * v[:, :, j, None, :]
        total = total + k[:, :, j]
    return q @ state / (q * total.unsqueeze(-2)).sum(-1, keepdim=True)


@ex.alternative("the values divided first, with a small number against 0")
def _(q, k, v):
    q, k = torch.where(q > 0, q + 1, q.exp()), torch.where(k > 0, k + 1, k.exp())
    share = 1 / (q @ k.sum(2, keepdim=True).mT + 1e-6)
    return (q * share) @ (k.mT @ v)


@ex.alternative("in float64, heads folded into the batch, and back")
def _(q, k, v):
    query, key, value = (t.double().flatten(0, 1) for t in (_phi(q), _phi(k), v))
    output = torch.bmm(query, torch.bmm(key.mT, value)) / torch.bmm(
        query, key.sum(1, keepdim=True).mT
    )
    return output.unflatten(0, q.shape[:2]).to(v.dtype)


# --- 3. causal linear attention ---------------------------------------------------------------

ex = Exercise(
    "causal_linear_attention",
    chapter="12_linear_attention",
    title="Causal linear attention",
    minutes=15,
    difficulty=3,
    importance=4,
    points=2,
    batched=True,
    prompt=r"""
A decoder's token must not see later ones. With $\varphi(x) = \mathrm{elu}(x) + 1$, query $i$ sees
the keys $j \le i$, **itself included**:

$$\text{output}_i
  = \frac{\sum_{j \le i} \left(\varphi(q_i) \cdot \varphi(k_j)\right) v_j}
         {\sum_{j \le i} \varphi(q_i) \cdot \varphi(k_j)}
  = \frac{\varphi(q_i)^\top S_i}{\varphi(q_i)^\top z_i},
  \qquad S_i = \sum_{j \le i} \varphi(k_j)\, v_j^\top, \quad z_i = \sum_{j \le i} \varphi(k_j)$$

$S_i$ and $z_i$ are running sums. `q` and `k` are `(batch, heads, n, d)`, `v` is
`(batch, heads, n, d_v)`; the result is `(batch, heads, n, d_v)`. Here any way that gives the right
numbers will do: running sums, a loop, or the masked n × n matrix.
""",
    hints=(
        "What may the first token see, and what must its output be?",
        "Numerator and normaliser both stop at i. Whatever hides a key must hide it in both.",
        "`torch.cumsum` makes running sums: of k along the length it gives all zᵢ at once. Of "
        "which tensor, (batch, heads, n, d, d_v), does it give all Sᵢ?",
    ),
)


@ex.solution
def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention to the keys up to one's own (Katharopoulos et al. 2020, section 3.3).

    q, k: (batch, heads, n, d), v: (batch, heads, n, d_v) -> (batch, heads, n, d_v).
    """
    ### BEGIN SOLUTION
    q, k = F.elu(q) + 1, F.elu(k) + 1
    # (batch, heads, n, d, 1) x (batch, heads, n, 1, d_v) -> (batch, heads, n, d, d_v)
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(dim=2)
    totals = k.cumsum(dim=2)  # (batch, heads, n, d)
    # (batch, heads, n, 1, d) x (batch, heads, n, d, d_v) -> (batch, heads, n, d_v)
    numerator = (q.unsqueeze(-2) @ states).squeeze(-2)
    return numerator / (q * totals).sum(dim=-1, keepdim=True)
    ### END SOLUTION


def _text(g: torch.Generator, *sizes: int) -> Case:
    """sizes: batch, heads, n, d, d_v."""
    batch, heads, n, d, d_v = sizes
    return _tokens(g, batch, heads, n, n, d, d_v)


def _written(seed: int, *sizes: int) -> tuple[Tensor, ...]:
    """q, k and v of one text, for a behaviour."""
    return tuple(_text(torch.Generator().manual_seed(seed), *sizes).values())


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 2, 1, 2),
        (1, 1, 1, 2, 3),
        (1, 2, 3, 2, 2),
        (2, 1, 3, 2, 1),
        (1, 1, 3, 1, 3),
        (2, 3, 3, 3, 3),
        (3, 2, 5, 3, 2),
    ]
    return [_text(g, *size) for size in sizes]


@ex.behaviour("a later token cannot change an earlier output")
def _(answer):
    q, k, v = _written(1, 2, 1, 4, 2, 3)
    later = [torch.cat([t[:, :, :2], t[:, :, 2:] + 1], dim=2) for t in (q, k, v)]
    expect(answer(*later)[:, :, :2], answer(q, k, v)[:, :, :2])


@ex.behaviour("the first token gets its own value")
def _(answer):
    q, k, v = _written(2, 2, 2, 3, 2, 2)
    expect(answer(q, k, v)[:, :, :1], v[:, :, :1])


@ex.behaviour("the last token sees all keys, itself included")
def _(answer):
    q, k, v = _written(3, 1, 2, 40, 2, 3)
    expect(answer(q, k, v)[:, :, -1:], _linear(_phi(q[:, :, -1:]), _phi(k), v))


@ex.behaviour("values that are all alike come back: the weights of a query sum to 1")
def _(answer):
    q, k, _ = _written(4, 1, 1, 4, 2, 2)
    expect(answer(q, k, torch.full((1, 1, 4, 2), 3.0)), torch.full((1, 1, 4, 2), 3.0))


@ex.behaviour("keys that are all alike give the running mean of the values")
def _(answer):
    q, k, _ = _written(5, 1, 1, 4, 2, 1)
    v = torch.tensor([4.0, 2.0, 0.0, 6.0]).view(1, 1, 4, 1)
    got = answer(q, k[:, :, :1].expand_as(k), v)
    expect(got, torch.tensor([4.0, 3.0, 2.0, 3.0]).view(1, 1, 4, 1))


@ex.behaviour("a text cut short gives the beginning of the output")
def _(answer):
    q, k, v = _written(6, 1, 2, 5, 2, 3)
    expect(answer(*(t[:, :, :3] for t in (q, k, v))), answer(q, k, v)[:, :, :3])


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    q, k, v = _written(7, 3, 3, 3, 2, 2)
    expect(answer(*(t[1:, 2:] for t in (q, k, v))), answer(q, k, v)[1:, 2:])


def _weighted(part: Function) -> Function:
    """An answer made of the n × n weights: `part(φ(q) φ(k)ᵀ, v)`."""
    return lambda q, k, v, *chunk: part(_phi(q) @ _phi(k).mT, v)


def _visible(weights: Tensor) -> Tensor:
    """How many keys each query sees: (n, 1)."""
    return torch.arange(1, weights.shape[-1] + 1, dtype=weights.dtype)[:, None]


STOP = "Where do the sums over the keys stop for query i: in the numerator, in the normaliser?"
ITSELF = "Does j ≤ i hold for j = i?"

# What is made of the weights φ(q) · φ(k): ((…, n, n), values) -> output.
UNMASKED = [
    Mistake(
        "that sees later keys",
        "Nothing hides them.",
        STOP,
        lambda w, v: _divided(w, v),
    ),
    Mistake(
        "with a normaliser over all keys",
        "Later keys are hidden in the numerator alone.",
        STOP,
        lambda w, v: w.tril() @ v / w.sum(-1, keepdim=True),
    ),
    Mistake(
        "with a numerator over all keys",
        "Later keys are hidden in the normaliser alone.",
        STOP,
        lambda w, v: w @ v / w.tril().sum(-1, keepdim=True),
    ),
    Mistake(
        "that leaves out the token itself",
        "Query i sees the keys j < i, so the first one sees nothing: 0 / 0.",
        ITSELF,
        lambda w, v: _divided(w.tril(-1), v),
    ),
    Mistake(
        "that leaves out the token itself, 0 for the first",
        "Query i sees the keys j < i.",
        ITSELF,
        lambda w, v: _divided(w.tril(-1), v).nan_to_num(0.0),
    ),
    Mistake(
        "that sees nothing but the token itself",
        "The past is forgotten, so every output is the token's own value.",
        "What must be kept of the tokens that came before?",
        lambda w, v: v.clone(),
    ),
    Mistake(
        "that looks one key ahead",
        "Query i sees the keys j ≤ i + 1.",
        "Which keys may query 0 see?",
        lambda w, v: _divided(w.tril(1), v),
    ),
    Mistake(
        "to the later keys instead of the earlier ones",
        "The sums run from the end.",
        "Which token sees only itself: the first or the last?",
        lambda w, v: _divided(w.triu(), v),
    ),
    Mistake(
        "without the normaliser",
        "The weights of a query do not sum to 1: later outputs grow.",
        SUM,
        lambda w, v: w.tril() @ v,
    ),
    Mistake(
        "divided by the number of visible keys",
        "The weights are not all 1, so their number is not their sum.",
        SUM,
        lambda w, v: w.tril() @ v / _visible(w),
    ),
    Mistake(
        "divided by the number of all keys",
        "The weights are not all 1, and not all keys are visible.",
        SUM,
        lambda w, v: w.tril() @ v / w.shape[-1],
    ),
]

# More of them, for those who write the matrix or the running sums.
MASKED = [
    Mistake(
        "with the numerator one token behind",
        "The numerator leaves out the token itself, the normaliser does not.",
        ITSELF,
        lambda w, v: w.tril(-1) @ v / w.tril().sum(-1, keepdim=True),
    ),
    Mistake(
        "with the normaliser one token behind",
        "The normaliser leaves out the token itself, so the first token divides by 0.",
        ITSELF,
        lambda w, v: w.tril() @ v / w.tril(-1).sum(-1, keepdim=True),
    ),
    Mistake(
        "with the normaliser of the last token for all",
        "One sum divides all outputs.",
        "Do all queries have the same normaliser?",
        lambda w, v: w.tril() @ v / w.sum(-1)[..., -1:, None],
    ),
    Mistake(
        "normalised over the queries",
        "The weights of a key sum to 1, not those of a query.",
        ONE_QUERY,
        lambda w, v: w.tril() / w.tril().sum(-2, keepdim=True) @ v,
    ),
    Mistake(
        "with -inf where 0 belongs",
        "-inf hides a score from a softmax; here the weights are summed as they are.",
        "Which number adds nothing to a sum?",
        lambda w, v: _divided(w.masked_fill(torch.ones_like(w).triu(1).bool(), -INF), v),
    ),
    Mistake(
        "with softmax over the weights",
        "The weights are exponentiated once more.",
        BRACKETS,
        lambda w, v: w.masked_fill(torch.ones_like(w).triu(1).bool(), -INF).softmax(-1) @ v,
    ),
    Mistake(
        "with softmax over the weights, hidden ones 0",
        "The weights are exponentiated once more, and a hidden one counts as e⁰ = 1.",
        BRACKETS,
        lambda w, v: w.tril().softmax(-1) @ v,
    ),
    Mistake(
        "with 1 added to the normaliser",
        "A guard against 0 must be far smaller than the sum.",
        "How large may a number be that must not change the result?",
        lambda w, v: w.tril() @ v / (1 + w.tril().sum(-1, keepdim=True)),
    ),
    Mistake(
        "with a normaliser that lacks its last dimension",
        "(batch, heads, n) meets (batch, heads, n, d_v) the wrong way: tokens against features.",
        "Which shape must the normaliser have so that each query has its own?",
        lambda w, v: w.tril() @ v / w.tril().sum(-1),
    ),
    Mistake(
        "with running sums of keys and values apart",
        "Σ φ(k) times Σ v is not Σ φ(k) vᵀ; after the division only the summed values are left.",
        "Which comes first: the product of a key and its value, or the sum?",
        lambda w, v: v.cumsum(-2),
    ),
]


def _summed(q: Tensor, k: Tensor, v: Tensor, along: int = 2, totals_along: int = 2) -> Tensor:
    """Causal linear attention of features by running sums, perhaps along a wrong dimension."""
    states = (k[..., None] * v[..., None, :]).cumsum(along)
    output = (q[..., None, :] @ states)[..., 0, :]
    return output / (q * k.cumsum(totals_along)).sum(-1, keepdim=True)


ex.mistakes_from(MAPS, "causal linear attention", lambda part: lambda *args: _summed(*part(*args)))
ex.mistakes_from(UNMASKED, "causal linear attention", _weighted)
ex.mistakes_from(MASKED, "causal linear attention", _weighted)


ALONG = "Along which dimension do the tokens of a text lie?"

SUMMED = [
    ("with running sums along the heads", "Dimension 1 is the heads, not the length.", ALONG,
     _mapped(lambda q, k, v: _summed(q, k, v, 1, 1))),
    ("with running sums along the batch", "Dimension 0 is the batch, not the length.", ALONG,
     _mapped(lambda q, k, v: _summed(q, k, v, 0, 0))),
    ("with running sums along the features", "Dimension -1 is the features, not the length.", ALONG,
     _mapped(lambda q, k, v: _summed(q, k, v, -1, -1))),
    ("with the states summed along their last dimension but one",
     "In (batch, heads, n, d, d_v) dimension -2 is no longer the length.", ALONG,
     _mapped(lambda q, k, v: _summed(q, k, v, -2, -2))),
    ("with the normaliser's keys summed along the features",
     "The states are summed along the length, the keys along the features.", ALONG,
     _mapped(lambda q, k, v: _summed(q, k, v, 2, -1))),
    ("with a normaliser that is not summed over the features",
     "φ(q) · z by `*` leaves d numbers; it fits only if d = d_v.",
     "How many numbers divide the output of one query: d, or one?",
     _mapped(lambda q, k, v: (q @ k.mT).tril() @ v / (q * k.cumsum(2)))),
    ("with running sums of the queries as well", "A query reads the sums; it is not summed.",
     "Which of q, k and v are summed over?",
     _mapped(lambda q, k, v: _summed(q.cumsum(2), k, v))),
    ("with the states transposed", "v φ(k)ᵀ is (d_v, d); it fits only if d = d_v.",
     "Which dimension of the state must meet the query's features?",
     _mapped(lambda q, k, v: (q[..., None, :] @ (v[..., None] * k[..., None, :]).cumsum(2))[
         ..., 0, :] / (q * k.cumsum(2)).sum(-1, keepdim=True))),
    ("with φ applied to the scores", "φ(q · k) is not φ(q) · φ(k).",
     "Is φ applied before the product or after it?",
     lambda q, k, v: _divided(_phi(q @ k.mT).tril(), v)),
    ("with softmax instead of φ: causal softmax attention",
     "This is what linear attention replaces.", BRACKETS,
     lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
]  # fmt: skip

for name, cause, ask, function in SUMMED:
    ex.mistake(f"causal linear attention {name}", cause, ask)(function)


@ex.alternative("the n × n weights with zeros above the diagonal")
def _(q, k, v):
    weights = torch.tril(_phi(q) @ _phi(k).transpose(-2, -1))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@ex.alternative("einsum, and a mask that multiplies")
def _(q, k, v):
    mask = torch.ones(q.shape[2], q.shape[2], dtype=q.dtype).tril()
    weights = torch.einsum("bhid,bhjd->bhij", _phi(q), _phi(k)) * mask
    return torch.einsum("bhij,bhje->bhie", weights, v) / weights.sum(-1)[..., None]


@ex.alternative("one token at a time, as a recurrent net")
def _(q, k, v):
    q, k = _phi(q), _phi(k)
    state, total, outputs = 0.0, 0.0, []
    for i in range(q.size(2)):
        state = state + k[:, :, i, :, None] * v[:, :, i, None]
        total = total + k[:, :, i]
        output = torch.einsum("bhd,bhde->bhe", q[:, :, i], state)
        outputs.append(output / torch.einsum("bhd,bhd->bh", q[:, :, i], total)[..., None])
    return torch.stack(outputs, dim=2)


@ex.alternative("every prefix anew")
def _(q, k, v):
    prefixes = range(1, q.shape[2] + 1)
    rows = [linear_attention(q[:, :, i - 1 : i], k[:, :, :i], v[:, :, :i]) for i in prefixes]
    return torch.cat(rows, dim=2)


@ex.alternative("in float64, with a column of ones beside the values, and back")
def _(q, k, v):
    value = F.pad(v.double(), (0, 1), value=1.0)
    states = torch.cumsum(torch.einsum("bhid,bhie->bhide", _phi(k).double(), value), dim=2)
    both = torch.einsum("bhid,bhide->bhie", _phi(q).double(), states)
    return (both[..., :-1] / both[..., -1:]).to(v.dtype)


# --- 4. one step of the recurrent net ---------------------------------------------------------

ex = Exercise(
    "rnn_step",
    chapter="12_linear_attention",
    title="Attention as a recurrent net: one token",
    minutes=10,
    difficulty=2,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
Causal linear attention can write a text with constant memory: all that it must keep of the past is
one matrix $S$ and one vector $z$. With $\varphi(x) = \mathrm{elu}(x) + 1$, a new token does

$$S \leftarrow S + \varphi(k)\, v^\top, \qquad z \leftarrow z + \varphi(k), \qquad
  \text{output} = \frac{\varphi(q)^\top S}{\varphi(q)^\top z}$$

in this order: **the token sees itself**. `q` and `k` are `(batch, heads, d)`, `v` is
`(batch, heads, d_v)`, `state` ($S$) is `(batch, heads, d, d_v)` and `total` ($z$) is
`(batch, heads, d)`; before the first token both are 0. Return `(output, new state, new total)`
with `output` of `(batch, heads, d_v)`. Make new tensors: whoever passed in the old state may still
need it.
""",
    hints=(
        "From an empty state, what must the output of the first token be?",
        "φ(k) vᵀ is an outer product: a column of d times a row of d_v. Update both sums first, "
        "then read them with the query.",
        "`k[..., :, None] * v[..., None, :]` is (batch, heads, d, d_v). Which shape must the query "
        "get for a matrix product with the state?",
    ),
)


@ex.solution
def rnn_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of causal linear attention (Katharopoulos et al. 2020, section 3.4).

    q, k: (batch, heads, d), v: (batch, heads, d_v), state: (batch, heads, d, d_v),
    total: (batch, heads, d) -> output (batch, heads, d_v), new state, new total.
    """
    ### BEGIN SOLUTION
    q, k = F.elu(q) + 1, F.elu(k) + 1
    # (batch, heads, d, 1) x (batch, heads, 1, d_v) -> (batch, heads, d, d_v)
    state = state + k.unsqueeze(-1) * v.unsqueeze(-2)
    total = total + k  # (batch, heads, d)
    # (batch, heads, 1, d) x (batch, heads, d, d_v) -> (batch, heads, d_v)
    numerator = (q.unsqueeze(-2) @ state).squeeze(-2)
    return numerator / (q * total).sum(dim=-1, keepdim=True), state, total
    ### END SOLUTION


def _past(g: torch.Generator, *sizes: int, empty: bool = False) -> Case:
    """A token and what came before it. sizes: batch, heads, d, d_v."""
    batch, heads, d, d_v = sizes
    past = {
        "state": normal(g, batch, heads, d, d_v),
        "total": normal(g, batch, heads, d).abs() + 0.5,
    }
    if empty:
        past = {name: torch.zeros_like(value) for name, value in past.items()}
    return {
        "q": _uneven(g, batch, heads, d),
        "k": _uneven(g, batch, heads, d),
        "v": normal(g, batch, heads, d_v),
    } | past


def _step_of(seed: int, *sizes: int) -> list[Tensor]:
    """Arguments for a behaviour."""
    return list(_past(torch.Generator().manual_seed(seed), *sizes).values())


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    return [
        _past(g, 1, 1, 2, 1),
        _past(g, 1, 1, 1, 3),
        _past(g, 1, 2, 2, 2, empty=True),
        _past(g, 1, 2, 2, 2),
        _past(g, 2, 2, 3, 2),
        _past(g, 2, 1, 3, 3),
        _past(g, 3, 2, 2, 4),
    ]


@ex.behaviour("from an empty state the output is the token's own value")
def _(answer):
    q, k, v, state, total = _step_of(1, 2, 1, 2, 3)
    expect(answer(q, k, v, torch.zeros_like(state), torch.zeros_like(total))[0], v)


@ex.behaviour("the new state is the old one plus φ(k) vᵀ")
def _(answer):
    case = {
        "q": torch.tensor([[[1.0, 1.0]]]),
        "k": torch.tensor([[[1.0, 3.0]]]),
        "v": torch.tensor([[[10.0]]]),
        "state": torch.tensor([[[[1.0], [2.0]]]]),
        "total": torch.tensor([[[1.0, 1.0]]]),
    }
    expect(answer.on(case)[1], torch.tensor([[[[21.0], [42.0]]]]), case=case)


@ex.behaviour("the new total is the old one plus φ(k)")
def _(answer):
    q, k, v, state, total = _step_of(2, 1, 2, 2, 2)
    expect(answer(q, k, v, state, total)[2], total + _phi(k))


@ex.behaviour("the query reads the state and does not change it")
def _(answer):
    q, *others = _step_of(3, 2, 2, 2, 3)
    expect(answer(q + 1, *others)[1:], answer(q, *others)[1:])


@ex.behaviour("token by token it gives what causal linear attention gives at once")
def _(answer):
    q, k, v = _written(4, 2, 2, 4, 2, 3)
    state, total, outputs = torch.zeros(2, 2, 2, 3), torch.zeros(2, 2, 2), []
    for i in range(4):
        output, state, total = answer(q[:, :, i], k[:, :, i], v[:, :, i], state, total)
        outputs.append(output)
    expect(torch.stack(outputs, dim=2), _causal(q, k, v))


@ex.behaviour("two tokens leave the same state and total in either order")
def _(answer):
    q, k, v, *past = _step_of(5, 1, 2, 2, 3)
    forth = answer(q, k + 1, v - 1, *answer(q, k, v, *past)[1:])[1:]
    back = answer(q, k, v, *answer(q, k + 1, v - 1, *past)[1:])[1:]
    expect(back, forth)


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    args = _step_of(6, 3, 3, 2, 2)
    parts = tuple(part[1:, 2:] for part in answer(*args))
    expect(answer(*(t[1:, 2:] for t in args)), parts)


class _Token(NamedTuple):
    """All that an answer can be made of: q and k are mapped, raw_q and raw_k are not."""

    q: Tensor
    k: Tensor
    v: Tensor
    raw_q: Tensor
    raw_k: Tensor
    old: Tensor
    old_total: Tensor
    new: Tensor
    new_total: Tensor


def _outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., None] * v[..., None, :]  # (batch, heads, d, d_v)


def _numerator(q: Tensor, state: Tensor) -> Tensor:
    return (q[..., None, :] @ state)[..., 0, :]  # (batch, heads, d_v)


def _read(q: Tensor, state: Tensor, total: Tensor) -> Tensor:
    return _numerator(q, state) / (q * total).sum(-1, keepdim=True)


def _stepping(part: Function, maps: Function | None = None) -> Function:
    """An answer `part(token)`, the inputs mapped by `maps`."""

    def function(raw_q, raw_k, v, state, total):
        q, k, v = maps(raw_q, raw_k, v) if maps else (_phi(raw_q), _phi(raw_k), v)
        new, new_total = state + _outer(k, v), total + k
        return part(_Token(q, k, v, raw_q, raw_k, state, total, new, new_total))

    return function


def _all(t: _Token) -> tuple[Tensor, ...]:
    return _read(t.q, t.new, t.new_total), t.new, t.new_total


def _read_and_kept(state: Tensor, total: Tensor, t: _Token) -> tuple[Tensor, ...]:
    """The step with this state and this total."""
    return _read(t.q, state, total), state, total


FIRST = "Update, then read, or read, then update: what does the formula say?"
KEEP = "What must the next token find in the state?"
BOTH_SUMS = "Which two sums grow with every token?"

ex.mistakes_from(MAPS, "the step", lambda part: _stepping(_all, part))

STEPS = [
    ("the step that reads the old state and the old total",
     "The token does not see itself; at the start that is 0 / 0.", FIRST,
     lambda t: (_read(t.q, t.old, t.old_total), t.new, t.new_total)),
    ("the step that reads the old state", "The numerator leaves out the token itself.", FIRST,
     lambda t: (_read(t.q, t.old, t.new_total), t.new, t.new_total)),
    ("the step that reads the old total", "The normaliser leaves out the token itself.", FIRST,
     lambda t: (_read(t.q, t.new, t.old_total), t.new, t.new_total)),
    ("the step with state and total overwritten", "All that came before is forgotten.",
     "Is φ(k) vᵀ the new state, or what is added to the old one?",
     lambda t: _read_and_kept(_outer(t.k, t.v), t.k, t)),
    ("the step with the state overwritten", "The total grows, but the state forgets.",
     "Is φ(k) vᵀ the new state, or what is added to the old one?",
     lambda t: _read_and_kept(_outer(t.k, t.v), t.new_total, t)),
    ("the step with the total overwritten", "The state grows, but the total forgets.",
     "Is φ(k) the new total, or what is added to the old one?",
     lambda t: _read_and_kept(t.new, t.k, t)),
    ("the step with the state never updated", "The value of the token goes nowhere.", BOTH_SUMS,
     lambda t: _read_and_kept(t.old, t.new_total, t)),
    ("the step with the total never updated", "The normaliser lacks this token and all later ones.",
     BOTH_SUMS, lambda t: _read_and_kept(t.new, t.old_total, t)),
    ("the step that updates nothing", "Neither state nor total has seen the token.", BOTH_SUMS,
     lambda t: _read_and_kept(t.old, t.old_total, t)),
    ("the step that returns the old state", "The output is right, but the next token forgets.",
     KEEP, lambda t: (_all(t)[0], t.old, t.new_total)),
    ("the step that returns the old total", "The output is right, but the next token forgets.",
     KEEP, lambda t: (_all(t)[0], t.new, t.old_total)),
    ("the step that returns the old state and the old total",
     "The output is right, but the next token forgets.", KEEP,
     lambda t: (_all(t)[0], t.old, t.old_total)),
    ("the step with a state that fades by 0.9", "Nothing in the formula fades.",
     "What is the old state multiplied by?",
     lambda t: _read_and_kept(0.9 * t.old + _outer(t.k, t.v), t.new_total, t)),
    ("the step with a state and a total that fade by 0.9", "Nothing in the formula fades.",
     "What is the old state multiplied by?",
     lambda t: _read_and_kept(0.9 * t.old + _outer(t.k, t.v), 0.9 * t.old_total + t.k, t)),
    ("the step with the mean of old and new", "The sums became means that fade by half.",
     "What is the old state multiplied by?",
     lambda t: _read_and_kept((t.old + _outer(t.k, t.v)) / 2, (t.old_total + t.k) / 2, t)),
    ("the step with the outer product transposed", "v φ(k)ᵀ is (d_v, d); it fits only if d = d_v.",
     "Which of the two is the column: the key or the value?",
     lambda t: _read_and_kept(t.old + _outer(t.v, t.k), t.new_total, t)),
    ("the step with the product number by number", "φ(k) · v by `*` fills only a vector, which is "
     "then laid on every row.", "Which shape has φ(k) vᵀ?",
     lambda t: _read_and_kept(t.old + (t.k * t.v)[..., None, :], t.new_total, t)),
    ("the step with the heads summed in the outer product",
     "`k.mT @ v` of (batch, heads, d) and (batch, heads, d_v) sums over the heads.",
     "Which dimension disappears in your matrix product?",
     lambda t: _read_and_kept(t.old + t.k.mT @ t.v, t.new_total, t)),
    ("the step with the key unmapped in the state", "Numerator and normaliser use other weights.",
     SAME_WEIGHTS,
     lambda t: _read_and_kept(t.old + _outer(t.raw_k, t.v), t.new_total, t)),
    ("the step with the key unmapped in the total", "Numerator and normaliser use other weights.",
     SAME_WEIGHTS, lambda t: _read_and_kept(t.new, t.old_total + t.raw_k, t)),
    ("the step with the query unmapped in the normaliser",
     "Numerator and normaliser use other weights.", SAME_WEIGHTS,
     lambda t: (_numerator(t.q, t.new) / (t.raw_q * t.new_total).sum(-1, keepdim=True), *t[-2:])),
    ("the step with φ of the total", "The total is a sum of features already.",
     "How often is φ applied to a key?",
     lambda t: (_read(t.q, t.new, _phi(t.new_total)), *t[-2:])),
    ("the step without the normaliser", "The weights do not sum to 1: the outputs grow.", SUM,
     lambda t: (_numerator(t.q, t.new), *t[-2:])),
    ("the step with the total summed as normaliser", "The query is not in it.", SUM,
     lambda t: (_numerator(t.q, t.new) / t.new_total.sum(-1, keepdim=True), *t[-2:])),
    ("the step with the features of the query summed as normaliser", "The keys are not in it.",
     SUM, lambda t: (_numerator(t.q, t.new) / t.q.sum(-1, keepdim=True), *t[-2:])),
    ("the step with the weight of its own key as normaliser", "The earlier keys are not in it.",
     SUM, lambda t: (_numerator(t.q, t.new) / (t.q * t.k).sum(-1, keepdim=True), *t[-2:])),
    ("the step with each feature divided by its own total", "A ratio of sums is no sum of ratios.",
     "How many numbers divide the output of one query: d, or one?",
     lambda t: (_numerator(t.q, t.new / t.new_total[..., None]), *t[-2:])),
    ("the step with a normaliser that lacks its last dimension",
     "(batch, heads) meets (batch, heads, d_v) the wrong way: heads against features.",
     "Which shape must the normaliser have so that each head has its own?",
     lambda t: (_numerator(t.q, t.new) / (t.q * t.new_total).sum(-1), *t[-2:])),
    ("the step with a normaliser that is not summed over the features",
     "φ(q) · z by `*` leaves d numbers; it fits only if d = d_v.",
     "How many numbers divide the output of one query: d, or one?",
     lambda t: (_numerator(t.q, t.new) / (t.q * t.new_total), *t[-2:])),
    ("the step that hands on the divided state", "The division belongs to the output alone.", KEEP,
     lambda t: (_all(t)[0], t.new / (t.q * t.new_total).sum(-1)[..., None, None], t.new_total)),
    ("the step that reads with the key", "The query has no effect.", "Who asks?",
     lambda t: (_read(t.k, t.new, t.new_total), *t[-2:])),
    ("the step with a total that counts tokens", "The sum of the features is not their number.",
     "What is added to z?", lambda t: _read_and_kept(t.new, t.old_total + 1, t)),
    ("the step with the query added to the total", "The total is a sum of keys.",
     "What is added to z?", lambda t: _read_and_kept(t.new, t.old_total + t.q, t)),
    ("the step with state and total in the wrong order", "The last two results are swapped.",
     "In which order does the docstring promise the three?",
     lambda t: (_all(t)[0], t.new_total, t.new)),
    ("the step with the output last", "State and total come first.",
     "In which order does the docstring promise the three?", lambda t: (*t[-2:], _all(t)[0])),
    ("the step that returns the output alone", "The next token has no state to start from.", KEEP,
     lambda t: _all(t)[0]),
]  # fmt: skip

for name, cause, ask, function in STEPS:
    ex.mistake(name, cause, ask)(_stepping(function))


@ex.alternative("einsum")
def _(q, k, v, state, total):
    q, k = torch.nn.functional.elu(q) + 1.0, torch.nn.functional.elu(k) + 1.0
    state = state + torch.einsum("bhd,bhe->bhde", k, v)
    total = total + k
    normaliser = torch.einsum("bhd,bhd->bh", q, total)
    return torch.einsum("bhd,bhde->bhe", q, state) / normaliser[..., None], state, total


@ex.alternative("a sum over the features, without a matrix product")
def _(q, k, v, state, total):
    query, key = (torch.where(t > 0, t + 1, t.exp()) for t in (q, k))
    new = state + key[..., None] * v[..., None, :]
    seen = total + key
    output = (query[..., None] * new).sum(-2) / (query * seen).sum(-1)[..., None]
    return output, new, seen


@ex.alternative("what was there before and the token, apart")
def _(q, k, v, state, total):
    q, k = _phi(q), _phi(k)
    own = (q * k).sum(-1, keepdim=True)
    numerator = torch.matmul(q.unsqueeze(2), state).squeeze(2) + own * v
    normaliser = torch.matmul(q.unsqueeze(2), total.unsqueeze(3)).squeeze(3) + own
    return numerator / normaliser, state + k.unsqueeze(3) @ v.unsqueeze(2), total + k


@ex.alternative("total as one more column of the state, in float64, and back")
def _(q, k, v, state, total):
    wide = torch.cat([state, total[..., None]], dim=-1).double()
    wide = wide + _outer(_phi(k).double(), F.pad(v.double(), (0, 1), value=1.0))
    both = (_phi(q).double()[..., None, :] @ wide)[..., 0, :]
    output = both[..., :-1] / both[..., -1:]
    return output.to(v.dtype), wide[..., :-1].to(v.dtype), wide[..., -1].to(v.dtype)


# --- 5. in chunks -----------------------------------------------------------------------------

ex = Exercise(
    "chunked",
    chapter="12_linear_attention",
    title="Causal linear attention in chunks",
    minutes=25,
    difficulty=4,
    importance=4,
    points=3,
    batched=True,
    prompt=r"""
Token by token, causal linear attention is slow; with running sums it makes a matrix for every
token; with masked weights it is n × n again. Between these lies the way that is used in practice:
cut the text into **chunks** of `chunk` tokens. For a chunk $C$ let $S$ and $z$ be the sums over all
chunks **before** it. Then each query $i$ of the chunk, with $\varphi(x) = \mathrm{elu}(x) + 1$, is

$$\text{output}_i
  = \frac{\varphi(q_i)^\top S + \sum_{j \in C,\, j \le i} (\varphi(q_i) \cdot \varphi(k_j))\, v_j}
         {\varphi(q_i)^\top z + \sum_{j \in C,\, j \le i} \varphi(q_i) \cdot \varphi(k_j)},
  \qquad S \leftarrow S + \sum_{j \in C} \varphi(k_j)\, v_j^\top,
  \quad z \leftarrow z + \sum_{j \in C} \varphi(k_j)$$

- `q` and `k` are `(batch, heads, n, d)`, `v` is `(batch, heads, n, d_v)`; the result is
  `(batch, heads, n, d_v)` and equals causal linear attention, whatever the chunk.
- `chunk` need not divide n, and may be larger than n.
- Inside a chunk the masked matrix of chunk × chunk is fine. Make no matrix of n × n, and no state
  for every single token; do not handle the tokens of a chunk one by one.
""",
    hints=(
        "Which keys does a query see inside its own chunk, and where does it find all the others?",
        "A chunk reads the state as it was before the chunk, and adds its own keys only "
        "afterwards. The normaliser is the numerator with every value replaced by 1.",
        "`t.split(chunk, dim=2)` cuts q, k and v into chunks, the last one as short as it needs to "
        "be. In the loop, `(query @ key.mT).tril()` is the part inside; what is the other part?",
    ),
)


@ex.solution
def chunked_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Causal linear attention, chunk by chunk (the form of Hua et al. 2022 and later work).

    q, k: (batch, heads, n, d), v: (batch, heads, n, d_v) -> (batch, heads, n, d_v), with
    matrices of chunk x chunk and one state of d x d_v between chunks.
    """
    ### BEGIN SOLUTION
    q, k = F.elu(q) + 1, F.elu(k) + 1
    v = F.pad(v, (0, 1), value=1.0)  # a column of ones: what becomes of it is the normaliser
    state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])  # (batch, heads, d, d_v + 1)
    outputs = []
    for query, key, value in zip(*(t.split(chunk, dim=2) for t in (q, k, v)), strict=True):
        weights = (query @ key.mT).tril()  # (batch, heads, chunk, chunk): inside the chunk
        # (…, chunk, d) x (…, d, d_v + 1) + (…, chunk, chunk) x (…, chunk, d_v + 1)
        outputs.append(query @ state + weights @ value)
        state = state + key.mT @ value  # (…, d, chunk) x (…, chunk, d_v + 1)
    output = torch.cat(outputs, dim=2)  # (batch, heads, n, d_v + 1)
    return output[..., :-1] / output[..., -1:]
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 3, 1, 1, 2),
        (1, 1, 2, 2, 2, 1),
        (1, 2, 4, 2, 2, 2),
        (2, 1, 2, 1, 2, 5),
        (1, 1, 7, 2, 1, 2),
        (1, 3, 3, 2, 3, 3),
        (3, 2, 6, 3, 2, 2),
    ]
    return [_text(g, *size) | {"chunk": chunk} for *size, chunk in sizes]


@ex.behaviour("a later token cannot change an earlier output, in the same chunk or in another")
def _(answer):
    q, k, v = _written(1, 2, 1, 5, 2, 3)
    later = [torch.cat([t[:, :, :3], t[:, :, 3:] + 1], dim=2) for t in (q, k, v)]
    expect(answer(*later, 2)[:, :, :3], answer(q, k, v, 2)[:, :, :3])


@ex.behaviour("a token sees the chunks before its own")
def _(answer):
    q, k, v = _written(2, 1, 2, 40, 2, 2)
    got = answer(q, k, v, 4)[:, :, 4:]
    expect(got, _causal(q, k, v)[:, :, 4:])


@ex.behaviour("one chunk as long as the text gives causal linear attention")
def _(answer):
    q, k, v = _written(3, 1, 1, 4, 2, 2)
    expect(answer(q, k, v, 4), _causal(q, k, v))


@ex.behaviour("the length of the chunk does not change the result")
def _(answer):
    q, k, v = _written(4, 1, 2, 5, 2, 2)
    want = answer(q, k, v, 5)
    for chunk in (1, 2, 3, 4, 9):
        expect(answer(q, k, v, chunk), want)


@ex.behaviour("values that are all alike come back: the weights of a query sum to 1")
def _(answer):
    q, k, _ = _written(5, 1, 1, 5, 2, 2)
    expect(answer(q, k, torch.full((1, 1, 5, 2), 3.0), 2), torch.full((1, 1, 5, 2), 3.0))


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    q, k, v = _written(6, 3, 3, 4, 2, 2)
    expect(answer(*(t[1:, 2:] for t in (q, k, v)), 3), answer(q, k, v, 3)[1:, 2:])


@ex.behaviour("no matrix of n × n is made, and no state for every token")
def _(answer):
    largest = watched(answer, *_written(7, 1, 1, 64, 16, 16), 16).largest
    if largest >= 64 * 64:
        raise Broken(f"For 64 tokens in chunks of 16 a tensor of {largest} numbers was made")


@ex.behaviour("the tokens of a chunk are not handled one by one")
def _(answer):
    operations = watched(answer, *_written(8, 1, 1, 128, 2, 2), 128).operations
    if operations >= 8 * 128:
        raise Broken(f"One chunk of 128 tokens took {operations} operations")


def _in_chunks(
    *,
    inside: Function = torch.tril,
    before: Function = lambda states, c: states[:c].sum(0),
    join: Function = torch.add,
    collect: Function = lambda key, value: key.mT @ value,
) -> Function:
    """Causal linear attention in chunks with some parts replaced.

    inside: what is left of the weights in a chunk; before: the state that chunk c reads, from
    those of all chunks; join: of the parts inside and before; collect: the state of a chunk.
    """

    def function(q, k, v, chunk):
        value = F.pad(v, (0, 1), value=1.0)
        chunks = list(zip(*(t.split(chunk, 2) for t in (_phi(q), _phi(k), value)), strict=True))
        states = torch.stack([collect(key, value) for _, key, value in chunks])
        parts = [
            join(inside(query @ key.mT) @ value, query @ before(states, c))
            for c, (query, key, value) in enumerate(chunks)
        ]
        output = torch.cat(parts, 2)
        return output[..., :-1] / output[..., -1:]

    return function


def _with_normaliser_of(numerator: Tensor, normaliser: Tensor) -> Tensor:
    return torch.cat([numerator[..., :-1], normaliser[..., -1:]], -1)


def _own_sums(inner: Tensor, outer: Tensor) -> Tensor:
    """Each part divided by its own sum."""
    shares = [t[..., :-1] / t[..., -1:].clamp(min=1e-9) for t in (inner, outer)]
    return F.pad(shares[0] + shares[1], (0, 1), value=1.0)


def _mean_of_shares(inner: Tensor, outer: Tensor) -> Tensor:
    """The mean of the two where there are two."""
    count = 1.0 + (outer[..., -1:] > 0)
    return F.pad(_own_sums(inner, outer)[..., :-1] / count, (0, 1), value=1.0)


def _apart(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values summed before their product; the total is right."""
    total = key.sum(-2)[..., None]
    return torch.cat([total * value[..., :-1].sum(-2, keepdim=True), total], -1)


def _sliced(stop: Function, length: Function) -> Function:
    """One slice at a time, from `range(0, stop(n, chunk), chunk)`, each `length(chunk)` long."""

    def function(q, k, v, chunk):
        starts, state, parts = range(0, stop(q.shape[2], chunk), chunk), 0.0, []
        for a in starts:
            query, key, value = (t[:, :, a : a + length(chunk)] for t in (_phi(q), _phi(k), v))
            value = F.pad(value, (0, 1), value=1.0)
            part = (query @ key.mT).tril() @ value
            parts.append(part + query @ state if a else part)
            state = state + key.mT @ value
        output = torch.cat(parts, 2)
        return output[..., :-1] / output[..., -1:]

    return function


def _ragged_as_zeros(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    n = q.shape[2] // chunk * chunk
    whole = _causal(*(t[:, :, :n] for t in (q, k, v)))
    return F.pad(whole, (0, 0, 0, q.shape[2] - n))


def _ragged_without_state(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    n = q.shape[2] // chunk * chunk
    parts = [[t[:, :, cut] for t in (q, k, v)] for cut in (slice(n), slice(n, None))]
    return torch.cat([_causal(*part) for part in parts], 2)


AFTER = "When is the chunk's own part added to the state: before it is read, or after?"
ALL_BEFORE = "What has the state seen when the third chunk reads it?"
BOTH_PARTS = "Of which two parts is the numerator made, and the normaliser?"
IN_CHUNK = "Which keys of its own chunk does a query see?"
LAST = "How many tokens has the last chunk if `chunk` does not divide n?"

ex.mistakes_from(
    MAPS, "chunked attention", lambda part: lambda q, k, v, chunk: _summed(*part(q, k, v))
)
# The first of them sees later keys everywhere.
ex.mistakes_from(UNMASKED, "chunked attention", _weighted)

CHUNKS = [
    ("with the state forgotten between chunks", "Every chunk starts anew.", BOTH_PARTS,
     _in_chunks(before=lambda s, c: s[:0].sum(0))),
    ("without a mask inside the chunk",
     "A query sees the later keys of its chunk: the weights are not cut off, or the state has "
     "taken in the chunk before it is read.", IN_CHUNK, _in_chunks(inside=lambda w: w)),
    ("without the part inside the chunk", "A query sees the earlier chunks alone.", BOTH_PARTS,
     _in_chunks(inside=lambda w: 0 * w)),
    ("without the part inside the chunk, 0 for the first chunk",
     "A query sees the earlier chunks alone.", BOTH_PARTS,
     lambda *args: _in_chunks(inside=lambda w: 0 * w)(*args).nan_to_num(0.0)),
    ("with the chunk's own keys counted twice", "The state holds the chunk when it is read.",
     AFTER, _in_chunks(before=lambda s, c: s[: c + 1].sum(0))),
    ("with the mask inside the chunk turned round", "A query sees the later keys of its chunk.",
     IN_CHUNK, _in_chunks(inside=torch.triu)),
    ("that looks one key ahead inside the chunk", "A query sees j ≤ i + 1.", IN_CHUNK,
     _in_chunks(inside=lambda w: w.tril(1))),
    ("with the last chunk alone as the state", "The state is overwritten instead of added to.",
     ALL_BEFORE, _in_chunks(before=lambda s, c: s[max(c - 1, 0) : c].sum(0))),
    ("with the first chunk alone as the state", "The state is not added to any more.", ALL_BEFORE,
     _in_chunks(before=lambda s, c: s[: min(c, 1)].sum(0))),
    ("with the state one chunk late", "The chunk just before is missing.", ALL_BEFORE,
     _in_chunks(before=lambda s, c: s[: max(c - 1, 0)].sum(0))),
    ("with the state one chunk early", "The state holds this chunk and the next one.", AFTER,
     _in_chunks(before=lambda s, c: s[: c + 2].sum(0))),
    ("with the later chunks as the state", "The sums run from the end.",
     "Which chunk must read an empty state: the first or the last?",
     _in_chunks(before=lambda s, c: s[c + 1 :].sum(0))),
    ("with all other chunks as the state", "Later chunks are in it.", ALL_BEFORE,
     _in_chunks(before=lambda s, c: s.sum(0) - s[c])),
    ("with all chunks as the state", "Later chunks are in it, and the chunk's own.", ALL_BEFORE,
     _in_chunks(before=lambda s, c: s.sum(0))),
    ("with the mean of the earlier chunks as the state", "A mean does not grow with the text.",
     "Is the state a sum or a mean?", _in_chunks(before=lambda s, c: s[:c].sum(0) / max(c, 1))),
    ("with the normaliser of the chunk alone", "The normaliser lacks the earlier chunks.",
     BOTH_PARTS, _in_chunks(join=lambda i, o: _with_normaliser_of(i + o, i))),
    ("with the numerator of the chunk alone", "The numerator lacks the earlier chunks.",
     BOTH_PARTS, _in_chunks(join=lambda i, o: _with_normaliser_of(i, i + o))),
    ("with each part divided by its own sum", "Then the weights of a query sum to 2.",
     "How often is an output divided, and by which sum?", _in_chunks(join=_own_sums)),
    ("with the mean of the two parts, each divided by its own sum",
     "A part counts by the sum of its weights, not by half.",
     "How often is an output divided, and by which sum?", _in_chunks(join=_mean_of_shares)),
    ("with the mean over the chunk in the state", "The part inside the chunk is a sum still.",
     "Is the state a sum or a mean?",
     _in_chunks(collect=lambda key, value: key.mT @ value / key.shape[-2])),
    ("with keys and values summed before their product",
     "Σ φ(k) times Σ v is not Σ φ(k) vᵀ: no key belongs to its value any more.",
     "Which comes first: the product of a key and its value, or the sum?",
     _in_chunks(collect=_apart)),
    ("with one state for all heads", "The keys of all heads were summed into one.",
     "Which dimension may the sum remove: the keys, or the heads too?",
     _in_chunks(collect=lambda key, value: (key.mT @ value).sum(1, keepdim=True)
                .expand(-1, key.shape[1], -1, -1))),
    ("without the last, shorter chunk", "Only whole chunks come back.", LAST,
     _sliced(lambda n, chunk: n - chunk + 1, lambda chunk: chunk)),
    ("with chunks that are one token too long",
     "Every chunk holds the first token of the next one as well.",
     "Which token is the last one of the slice `[a:b]`?",
     _sliced(lambda n, chunk: n, lambda chunk: chunk + 1)),
    ("with 0 in the last, shorter chunk", "Only whole chunks are computed.", LAST,
     _ragged_as_zeros),
    ("with the state forgotten in the last, shorter chunk",
     "What is left over starts from an empty state.", ALL_BEFORE, _ragged_without_state),
    ("with softmax instead of φ: causal softmax attention",
     "This is what linear attention replaces.", BRACKETS,
     lambda q, k, v, chunk: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
]  # fmt: skip

for name, cause, ask, function in CHUNKS:
    ex.mistake(f"chunked attention {name}", cause, ask)(function)


@ex.alternative("slices, with state and total apart")
def _(q, k, v, chunk):
    q, k, output = _phi(q), _phi(k), []
    state, total = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None]), 0 * k[:, :, 0]
    for start in range(0, q.shape[2], chunk):
        a, b, c = (t[:, :, start : start + chunk] for t in (q, k, v))
        weights = torch.tril(torch.einsum("bhid,bhjd->bhij", a, b))
        normaliser = weights.sum(-1) + torch.einsum("bhid,bhd->bhi", a, total)
        output.append((weights @ c + a @ state) / normaliser.unsqueeze(-1))
        state, total = state + b.transpose(-2, -1) @ c, total + b.sum(2)
    return torch.cat(output, dim=2)


@ex.alternative("all chunks at once: padded, with an exclusive running sum of their states")
def _(q, k, v, chunk):
    n, pad = q.shape[2], -q.shape[2] % chunk
    q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (_phi(q), _phi(k), F.pad(v, (0, 1), value=1.0)))
    q, k, v = (t.unflatten(2, (-1, chunk)) for t in (q, k, v))
    states = k.mT @ v  # (batch, heads, chunks, d, d_v + 1)
    output = (q @ k.mT).tril() @ v + q @ (states.cumsum(2) - states)
    output = output.flatten(2, 3)[:, :, :n]
    return output[..., :-1] / output[..., -1:]


@ex.alternative("each chunk reads the sums over all that stands before it")
def _(q, k, v, chunk):
    q, k, rows = _phi(q), _phi(k), []
    for start in range(0, q.shape[2], chunk):
        past, own = slice(0, start), slice(start, start + chunk)
        mask = torch.ones(q[:, :, own].shape[2:3] * 2, dtype=torch.bool).tril()
        weights = (q[:, :, own] @ k[:, :, own].mT).masked_fill(~mask, 0.0)
        read = q[:, :, own] @ (k[:, :, past].mT @ v[:, :, past])
        norm = q[:, :, own] @ k[:, :, past].sum(2)[..., None] + weights.sum(-1, keepdim=True)
        rows.append((read + weights @ v[:, :, own]) / norm)
    return torch.cat(rows, 2)


@ex.alternative("in float64, and back")
def _(q, k, v, chunk):
    return chunked_linear_attention(q.double(), k.double(), v.double(), chunk).to(v.dtype)


# --- 6. random features -----------------------------------------------------------------------

ex = Exercise(
    "positive_features",
    chapter="12_linear_attention",
    title="Random features for softmax's kernel",
    minutes=10,
    difficulty=3,
    importance=3,
    points=2,
    batched=True,
    prompt=r"""
The weights of softmax attention are made of the **kernel** $\exp(x \cdot y)$. Is there a map φ
with $\varphi(x) \cdot \varphi(y) = \exp(x \cdot y)$, so that linear attention would give the same?
Not with finitely many features; but random ones give it **on average**. With $m$ random directions
$\omega_1, \dots, \omega_m$, drawn from the standard normal distribution, the Performer takes

$$\varphi(x)_r = \frac{1}{\sqrt{m}}
  \exp\left( \omega_r \cdot x - \frac{\lVert x \rVert^2}{2} \right), \qquad
  \mathbb{E}\left[\varphi(x) \cdot \varphi(y)\right] = \exp(x \cdot y)$$

Every feature is positive, so every weight is, and no normaliser comes near 0.

- `x` is `(…, n, d)` with any number of dimensions in front, already scaled by $d^{-1/4}$: do not
  scale it again. `projection` is `(m, d)` and holds one direction in each row.
- The result is `(…, n, m)`.
- The exponent can be moderate where both of its parts are large: do not take exp of each part
  alone.
""",
    hints=(
        "What are the features of x = 0, and what is the product of two of them?",
        "One matrix product gives ω · x for all tokens and directions, (…, n, m). The norm is one "
        "number for each token, and has to meet all its m features.",
        "`x.square().sum(-1, keepdim=True) / 2` is (…, n, 1). What is it subtracted from, and "
        "before or after exp?",
    ),
)


@ex.solution
def positive_features(x: Tensor, projection: Tensor) -> Tensor:
    """exp(x ωᵀ - |x|²/2) / √m (Choromanski et al. 2021, Lemma 1).

    x: (…, n, d), projection ω: (m, d) -> (…, n, m), all positive; the product of two tokens'
    features is exp(x · y) on average over standard normal ω.
    """
    ### BEGIN SOLUTION
    exponent = x @ projection.mT  # (…, n, d) x (d, m) -> (…, n, m)
    half_square = x.square().sum(dim=-1, keepdim=True) / 2  # (…, n, 1)
    return torch.exp(exponent - half_square) / math.sqrt(projection.shape[0])
    ### END SOLUTION


def _directions(g: torch.Generator, shape: tuple[int, ...], m: int) -> Case:
    """Tokens of this shape, and m directions."""
    return {"x": normal(g, *shape, spread=0.8), "projection": normal(g, m, shape[-1])}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    long = {
        "x": torch.tensor([[3.0, -2.0]]),
        "projection": torch.tensor([[0.1, 0.5], [-1.0, -11.0]]),
    }
    tall = {"x": torch.tensor([[15.0], [0.5]]), "projection": torch.tensor([[7.5], [-1.0], [7.4]])}
    return [
        _directions(g, (2, 2), 2),
        _directions(g, (1, 1), 3),
        _directions(g, (3, 2), 4),
        _directions(g, (2, 1, 3, 3), 3),
        long,
        tall,  # exp(112.5 - 112.5) is 1, but exp(112.5) is inf
        _directions(g, (1, 2, 3), 1),
        _directions(g, (3, 2, 4), 5),
    ]


@ex.behaviour("every feature is positive")
def _(answer):
    x, projection = some(1, (4, 3), (6, 3))
    expect(answer(x, projection) > 0, torch.ones(4, 6, dtype=torch.bool))


@ex.behaviour("x = 0 has the features 1/√m")
def _(answer):
    (projection,) = some(2, (4, 3))
    case = {"x": torch.zeros(1, 3), "projection": projection}
    expect(answer.on(case), torch.full((1, 4), 0.5), case=case)


@ex.behaviour("along a direction of 0 the feature is exp(-‖x‖²/2) / √m")
def _(answer):
    case = {"x": torch.tensor([[1.0, 2.0]]), "projection": torch.zeros(1, 2)}
    expect(answer.on(case), torch.tensor([[math.exp(-2.5)]]), case=case)


@ex.behaviour("every direction taken twice leaves φ(x) · φ(y) as it is")
def _(answer):
    x, projection = some(3, (3, 2), (4, 2))
    once, twice = (answer(x, p) for p in (projection, projection.repeat(2, 1)))
    expect(twice @ twice.mT, once @ once.mT)


@ex.behaviour("over many random directions φ(x) · φ(y) comes near exp(x · y)")
def _(answer):
    projection = torch.randn(4096, 2, generator=torch.Generator().manual_seed(4))
    x = torch.tensor([[0.4, 0.2], [-0.3, 0.5], [0.6, -0.1]])
    features = answer(x, projection)
    got, want = features @ features.mT, (x @ x.mT).exp()
    if not torch.allclose(got, want, rtol=0.1):
        raise Broken(
            f"For x = [0.4, 0.2] and y = [-0.3, 0.5] φ(x) · φ(y) is {got[0, 1]:.3g}, and "
            f"exp(x · y) is {want[0, 1]:.3g}"
        )


@ex.behaviour("directions in another order give the same features in that order")
def _(answer):
    x, projection = some(5, (2, 3, 2), (4, 2))
    order = torch.tensor([2, 0, 3, 1])
    expect(answer(x, projection[order]), answer(x, projection)[..., order])


@ex.behaviour("every token is mapped alone")
def _(answer):
    x, projection = some(6, (3, 2, 4, 2), (3, 2))
    expect(answer(x[1:, :1, 2:], projection), answer(x, projection)[1:, :1, 2:])


def _features(*, norm: Function | None = None, finish: Function = torch.exp,
              scale: Function = lambda x, w: len(w) ** -0.5, map_x: Function = lambda x: x,
              map_w: Function = lambda w: w) -> Function:  # fmt: skip
    """exp(x ωᵀ - norm) · scale with some parts replaced; norm is made of (x, ω, x ωᵀ)."""

    def function(x, projection):
        x, projection = map_x(x), map_w(projection)
        exponent = x @ projection.mT
        less = norm(x, projection, exponent) if norm else _half_square(x)
        return finish(exponent - less) * scale(x, projection)

    return function


def _half_square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / 2


def _root_of(m: int) -> float:
    return math.sqrt(m)


def _waves(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([(x @ w.mT).sin(), (x @ w.mT).cos()], -1) / _root_of(len(w))


NORM = "Which number is subtracted from ω · x: of which vector, squared or not, halved or not?"
AVERAGE = "The average over m directions needs 1/m; how much of it belongs to each of the factors?"
WHICH_AXIS = "Over which dimension of (…, n, d) does the norm of one token run?"
KERNEL = "What is φ(0) · φ(0), and what should it be?"
INSIDE = "What stands inside exp, and what outside?"

RANDOM_FEATURES = [
    ("without the norm", "‖x‖²/2 is missing, so long vectors get too large a kernel.", NORM,
     _features(norm=lambda x, w, e: 0.0)),
    ("with the norm added", "The sign of ‖x‖²/2 is turned.", NORM,
     _features(norm=lambda x, w, e: -_half_square(x))),
    ("with the whole square of the norm", "The half is missing.", NORM,
     _features(norm=lambda x, w, e: 2 * _half_square(x))),
    ("with the norm not squared", "‖x‖/2 stands where ‖x‖²/2 should.", NORM,
     _features(norm=lambda x, w, e: x.norm(dim=-1, keepdim=True) / 2)),
    ("with the norm neither squared nor halved", "‖x‖ stands where ‖x‖²/2 should.", NORM,
     _features(norm=lambda x, w, e: x.norm(dim=-1, keepdim=True))),
    ("with the sum of x in place of its norm", "The numbers were added without being squared.",
     NORM, _features(norm=lambda x, w, e: x.sum(-1, keepdim=True) / 2)),
    ("with the mean of the squares", "`mean` stands where a sum should: the norm lost a factor d.",
     "Sum or mean: how does ‖x‖² come about?",
     _features(norm=lambda x, w, e: x.square().mean(-1, keepdim=True) / 2)),
    ("with the norm over the tokens", "The squares are summed along the length.", WHICH_AXIS,
     _features(norm=lambda x, w, e: x.square().sum(-2, keepdim=True)[..., :1] / 2)),
    ("with the norm of all tokens together", "`sum()` without a dimension adds everything up.",
     WHICH_AXIS, _features(norm=lambda x, w, e: x.square().sum() / 2)),
    ("with a norm that lacks its last dimension",
     "(…, n) meets (…, n, m) the wrong way: tokens against features.",
     "Which shape must the norm have so that each token has its own?",
     _features(norm=lambda x, w, e: x.square().sum(-1) / 2)),
    ("with the norms of the directions", "‖ω‖²/2 stands where ‖x‖²/2 should.", NORM,
     _features(norm=lambda x, w, e: _half_square(w)[:, 0])),
    ("with both norms: a Gaussian of the distance to ω", "‖ω‖²/2 is subtracted as well.", NORM,
     _features(norm=lambda x, w, e: _half_square(x) + _half_square(w)[:, 0])),
    ("with the norm of the projected x", "The square is taken after the projection.",
     "Is the norm that of x or that of ω · x?", _features(norm=lambda x, w, e: _half_square(e))),
    ("with the largest exponent of each token subtracted",
     "A softmax does not see such a shift, but φ(x) · φ(y) does; and ‖x‖²/2 goes with it.", KERNEL,
     _features(finish=lambda e: (e - e.amax(-1, keepdim=True)).exp())),
    ("with the largest exponent of all subtracted",
     "A softmax does not see such a shift; the kernel does.", KERNEL,
     _features(finish=lambda e: (e - e.max()).exp())),
    ("without 1/√m", "φ(x) · φ(y) is a sum over the directions, not their average.", AVERAGE,
     _features(scale=lambda x, w: 1.0)),
    ("with 1/m", "φ(x) · φ(y) has the factor twice, once from each side.", AVERAGE,
     _features(scale=lambda x, w: 1 / len(w))),
    ("with √m", "The factor is upside down.", AVERAGE, _features(scale=lambda x, w: len(w) ** 0.5)),
    ("with 1/√d", "d is the width of x, m the number of directions.",
     "Which entry of `projection.shape` is m?", _features(scale=lambda x, w: x.shape[-1] ** -0.5)),
    ("with 1/√n", "n is the number of tokens, m the number of directions.",
     "Which entry of `projection.shape` is m?", _features(scale=lambda x, w: x.shape[-2] ** -0.5)),
    ("with 1/√m inside exp", "The factor divides the exponent.", INSIDE,
     lambda x, w: ((x @ w.mT - _half_square(x)) / _root_of(len(w))).exp()),
    ("with exp of ω · x alone", "The norm is subtracted after exp.", INSIDE,
     lambda x, w: ((x @ w.mT).exp() - _half_square(x)) / _root_of(len(w))),
    ("without exp", "The exponent itself is given back.", "What makes every feature positive?",
     _features(finish=lambda e: e)),
    ("with relu instead of exp", "relu has another kernel, and can be 0.",
     "What makes every feature positive?",
     lambda x, w: (x @ w.mT).relu() / _root_of(len(w))),
    ("with elu + 1 instead of exp", "It is positive, but has another kernel.",
     "What is the kernel of φ meant to be?", lambda x, w: _phi(x @ w.mT) / _root_of(len(w))),
    ("with softmax instead of exp", "The features of a token are made to sum to 1.", KERNEL,
     _features(finish=lambda e: e.softmax(-1))),
    ("with exp of the two parts apart", "exp of a large ω · x is inf, and inf · 0 is NaN.",
     "In which order: subtract, then exp, or exp, then multiply?",
     lambda x, w: (x @ w.mT).exp() * (-_half_square(x)).exp() / _root_of(len(w))),
    ("with 0.0001 added to every feature",
     "Some programs do so to keep away from 0; the formula does not.",
     "Does the formula add anything outside exp?",
     lambda x, w: (positive_features(x, w) + 1e-4 / _root_of(len(w)))),
    ("with 0.001 added to every feature", "The formula adds nothing outside exp.",
     "Does the formula add anything outside exp?",
     lambda x, w: (positive_features(x, w) + 1e-3 / _root_of(len(w)))),
    ("with sine and cosine, for the Gaussian kernel",
     "These are random Fourier features: 2 m of them, of both signs.",
     "What makes every feature positive?", _waves),
    ("with sine and cosine, for the softmax kernel",
     "Right on average, but there are 2 m of them, and they have both signs.",
     "What makes every feature positive?",
     lambda x, w: _half_square(x).exp() * _waves(x, w)),
    ("with ω and -ω", "Right on average, but there are 2 m of them.",
     "How many features does the exercise ask for?",
     lambda x, w: positive_features(x, torch.cat([w, -w]))),
    ("with the projection not transposed", "The directions are read from its columns.",
     "Does a row or a column of `projection` hold one direction?",
     _features(map_w=lambda w: w.mT, scale=lambda x, w: w.shape[1] ** -0.5)),
    ("with x scaled by 1/d^¼ again", "x comes in scaled.", "Who has scaled x already?",
     _features(map_x=lambda x: x / x.shape[-1] ** 0.25)),
    ("with x scaled by 1/√d", "x comes in scaled.", "Who has scaled x already?",
     _features(map_x=lambda x: x / x.shape[-1] ** 0.5)),
    ("with x scaled to length 1", "The length of x is lost.", "Does exp(x · y) depend on ‖x‖?",
     _features(map_x=lambda x: F.normalize(x, dim=-1))),
    ("with the directions scaled to length 1", "Standard normal directions have lengths near √d.",
     "Does the formula divide by ‖ω‖?", _features(map_w=lambda w: F.normalize(w, dim=-1))),
]  # fmt: skip

for name, cause, ask, function in RANDOM_FEATURES:
    ex.mistake(f"the features {name}", cause, ask)(function)


@ex.alternative("einsum, with log √m inside the exponent")
def _(x, projection):
    exponent = torch.einsum("...nd,md->...nm", x, projection)
    norm = torch.einsum("...nd,...nd->...n", x, x)[..., None] / 2
    return torch.exp(exponent - norm - math.log(projection.size(0)) / 2)


@ex.alternative("one direction at a time")
def _(x, projection):
    m = projection.shape[0]
    columns = [(x * w).sum(-1) - x.pow(2).sum(-1) / 2 for w in projection]
    return torch.stack(columns, dim=-1).exp() / m**0.5


@ex.alternative("F.linear and a norm that is squared")
def _(x, projection):
    half = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / 2
    return torch.exp(torch.nn.functional.linear(x, projection) - half) * len(projection) ** -0.5


@ex.alternative("the square completed: a distance to ω, and ω's own norm back")
def _(x, projection):
    distance = (x.unsqueeze(-2) - projection).square().sum(-1) / 2
    own = projection.square().sum(-1) / 2
    return torch.exp(own - distance) / math.sqrt(projection.shape[0])


@ex.alternative("in float64, and back")
def _(x, projection):
    wide, w = x.double(), projection.double()
    features = torch.exp(wide @ w.T - (wide * wide).sum(-1, keepdim=True) * 0.5)
    return (features / w.shape[0] ** 0.5).to(x.dtype)


# --- 7. Linformer -----------------------------------------------------------------------------

ex = Exercise(
    "linformer",
    chapter="12_linear_attention",
    title="Linformer: fewer keys and values",
    minutes=10,
    difficulty=2,
    importance=3,
    points=2,
    batched=True,
    prompt=r"""
Another way to be linear in the length keeps the softmax and makes the keys fewer. Two learned
matrices $E$ and $F$ of $r \times n_k$ mix the $n_k$ keys into $r$ and the $n_k$ values into $r$,
**along the length**:

$$\mathrm{output} = \mathrm{softmax}\left( \frac{Q\,(E K)^\top}{\sqrt{d}} \right) (F\, V)$$

- `q` is `(batch, heads, n_q, d)`, `k` is `(batch, heads, n_k, d)`, `v` is
  `(batch, heads, n_k, d_v)`; `e` ($E$) and `f` ($F$) are `(r, n_k)`, the same for all heads.
- The softmax is over the $r$ mixed keys; the result is `(batch, heads, n_q, d_v)`.
- There is no mask: once keys are mixed, none can be hidden any more.
- Make no matrix of n_q × n_k.
""",
    hints=(
        "How many scores does one query have?",
        "`e @ k` is a matrix product of (r, n_k) with (…, n_k, d): it works along the length, and "
        "the width stays.",
        "With `key = e @ k` and `value = f @ v` the rest is ordinary attention; which of the "
        "shapes is the d under the root?",
    ),
)


@ex.solution
def linformer(q: Tensor, k: Tensor, v: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """softmax(q (e k)ᵀ / √d) (f v) (Wang et al. 2020, section 4).

    q: (batch, heads, n_q, d), k: (batch, heads, n_k, d), v: (batch, heads, n_k, d_v),
    e, f: (r, n_k) -> (batch, heads, n_q, d_v).
    """
    ### BEGIN SOLUTION
    key = e @ k  # (r, n_k) x (batch, heads, n_k, d) -> (batch, heads, r, d)
    value = f @ v  # (r, n_k) x (batch, heads, n_k, d_v) -> (batch, heads, r, d_v)
    # (batch, heads, n_q, d) x (batch, heads, d, r) -> (batch, heads, n_q, r)
    scores = q @ key.mT / math.sqrt(q.shape[-1])
    return torch.softmax(scores, dim=-1) @ value  # (…, n_q, r) x (…, r, d_v)
    ### END SOLUTION


def _mixing(g: torch.Generator, *sizes: int) -> Case:
    """sizes: batch, heads, n_q, n_k, d, d_v, r."""
    *sizes, r = sizes
    case = _tokens(g, *sizes)
    n_k = case["k"].shape[-2]
    return case | {"e": normal(g, r, n_k), "f": normal(g, r, n_k)}


def _mixed(seed: int, *sizes: int) -> list[Tensor]:
    """Arguments for a behaviour."""
    return list(_mixing(torch.Generator().manual_seed(seed), *sizes).values())


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 2, 2, 1, 1, 2),
        (1, 1, 2, 3, 2, 3, 2),
        (2, 3, 3, 3, 3, 3, 3),
        (1, 2, 1, 4, 3, 1, 2),
        (1, 1, 3, 2, 2, 2, 1),
        (2, 2, 3, 2, 3, 1, 4),
        (3, 2, 4, 5, 3, 2, 3),
    ]
    return [_mixing(g, *size) for size in sizes]


@ex.behaviour("with e = f = 1, the identity, it is softmax attention")
def _(answer):
    q, k, v, _, _ = _mixed(1, 1, 2, 2, 3, 2, 2, 3)
    want = F.scaled_dot_product_attention(q, k, v)
    expect(answer(q, k, v, torch.eye(3), torch.eye(3)), want)


@ex.behaviour("with one mixed key every query gets f v")
def _(answer):
    q, k, v, e, f = _mixed(2, 2, 1, 3, 4, 2, 2, 1)
    expect(answer(q, k, v, e, f), (f @ v).expand(2, 1, 3, 2))


@ex.behaviour("with e = 0 every query gets the mean of the rows of f v")
def _(answer):
    q, k, v, e, f = _mixed(3, 1, 2, 2, 4, 2, 3, 2)
    want = (f @ v).mean(-2, keepdim=True).expand(1, 2, 2, 3)
    expect(answer(q, k, v, torch.zeros_like(e), f), want)


@ex.behaviour("the weights of a query sum to 1: alike rows of f v come back")
def _(answer):
    q, k, v, e, f = _mixed(4, 2, 2, 2, 3, 2, 2, 3)
    f = f[:1].expand(3, 3)
    expect(answer(q, k, v, e, f), (f[:1] @ v).expand(2, 2, 2, 2))


@ex.behaviour("a query's output does not depend on the other queries")
def _(answer):
    q, *others = _mixed(5, 2, 1, 3, 3, 2, 2, 2)
    expect(answer(q[:, :, 1:2], *others), answer(q, *others)[:, :, 1:2])


@ex.behaviour("tokens in another order, and the columns of e and f with them, change nothing")
def _(answer):
    q, k, v, e, f = _mixed(6, 1, 2, 2, 4, 2, 2, 3)
    order = torch.tensor([2, 0, 3, 1])
    moved = answer(q, k[:, :, order], v[:, :, order], e[:, order], f[:, order])
    expect(moved, answer(q, k, v, e, f))


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    *tokens, e, f = _mixed(7, 3, 3, 2, 3, 2, 2, 2)
    expect(answer(*(t[1:, 2:] for t in tokens), e, f), answer(*tokens, e, f)[1:, 2:])


@ex.behaviour("no matrix of n_q × n_k is made")
def _(answer):
    largest = watched(answer, *_mixed(8, 1, 1, 64, 64, 2, 2, 4)).largest
    if largest >= 64 * 64:
        raise Broken(f"For 64 queries and 64 keys a tensor of {largest} numbers was made")


def _mix(*, project: Function = lambda q, k, v, e, f: (q, e @ k, f @ v),
         scale: Function = lambda q, k: q.shape[-1] ** -0.5,
         normalise: Function = lambda s: s.softmax(-1),
         mix: Function = lambda w, q, k, v: w @ v) -> Function:  # fmt: skip
    """Linformer's attention with some parts replaced; the scale is made of q and the k given."""

    def function(q, k, v, e, f):
        query, key, value = project(q, k, v, e, f)
        weights = normalise(query @ key.mT * scale(q, k))
        return mix(weights, query, key, value)

    return function


MIXES = "Which matrix mixes the keys, and which the values?"
LENGTH = "Which dimension of k has the size n_k, and which side must e stand on?"

ex.mistakes_from(SCALES, "Linformer", lambda part: _mix(scale=part))
ex.mistakes_from(NORMALISATIONS, "Linformer", lambda part: _mix(normalise=part))
ex.mistakes_from(MIXTURES, "Linformer", lambda part: _mix(mix=part))

PROJECTIONS = [
    ("with e and f swapped", "f mixes the keys and e the values.", MIXES,
     lambda q, k, v, e, f: (q, f @ k, e @ v)),
    ("with e for keys and values", "f has no effect.", MIXES,
     lambda q, k, v, e, f: (q, e @ k, e @ v)),
    ("with f for keys and values", "e has no effect.", MIXES,
     lambda q, k, v, e, f: (q, f @ k, f @ v)),
    ("with the values as they are", "f has no effect; it fits only if r = n_k.",
     "How many values must there be for r weights?", lambda q, k, v, e, f: (q, e @ k, v)),
    ("with the keys as they are", "e has no effect; it fits only if r = n_k.",
     "How many keys must there be for r values?", lambda q, k, v, e, f: (q, k, f @ v)),
    ("without e and f: softmax attention", "All n_k keys are looked at.", "Where do e and f enter?",
     lambda q, k, v, e, f: (q, k, v)),
    ("with the queries mixed as well", "There is one row for each of r mixed queries.",
     "How many rows must the result have?", lambda q, k, v, e, f: (e @ q, e @ k, f @ v)),
    ("with e transposed", "It fits only if r = n_k.", LENGTH,
     lambda q, k, v, e, f: (q, e.mT @ k, f @ v)),
    ("with f transposed", "It fits only if r = n_k.", LENGTH,
     lambda q, k, v, e, f: (q, e @ k, f.mT @ v)),
    ("with e and f transposed", "They fit only if r = n_k.", LENGTH,
     lambda q, k, v, e, f: (q, e.mT @ k, f.mT @ v)),
    ("with e and f applied to the width", "k @ eᵀ mixes the features of a key; it fits only if "
     "d = n_k.", LENGTH, lambda q, k, v, e, f: (q, k @ e.mT, v @ f.mT)),
    ("with the first r keys and values", "e and f have no effect.", "Where do e and f enter?",
     lambda q, k, v, e, f: (q, k[:, :, : len(e)], v[:, :, : len(e)])),
    ("with the means of r stretches of the text", "e and f have no effect.",
     "Where do e and f enter?", lambda q, k, v, e, f: (q, *(F.adaptive_avg_pool1d(
         t.flatten(0, 1).mT, len(e)).mT.unflatten(0, t.shape[:2]) for t in (k, v)))),
    ("with the rows of e and f put through softmax",
     "The only softmax of the formula is that of the scores.",
     "How often does a softmax stand in the formula?",
     lambda q, k, v, e, f: (q, e.softmax(-1) @ k, f.softmax(-1) @ v)),
    ("with the rows of e and f made to sum to 1", "The formula takes them as they are.",
     "Does the formula divide e or f by anything?",
     lambda q, k, v, e, f: (q, *(m / m.sum(-1, keepdim=True) @ t for m, t in ((e, k), (f, v))))),
    ("with e and f divided by √n_k", "The formula takes them as they are.",
     "Does the formula divide e or f by anything?",
     lambda q, k, v, e, f: (q, *(m @ t / _root_of(t.shape[-2]) for m, t in ((e, k), (f, v))))),
    ("with keys and values swapped", "The values are compared and the keys come back.",
     "What is the query compared with?", lambda q, k, v, e, f: (q, f @ v, e @ k)),
    ("with queries and keys swapped", "The keys ask, and the mixed queries are asked.",
     "Who asks, and who is asked?", lambda q, k, v, e, f: (k, e @ q, f @ v)),
]  # fmt: skip

ex.mistakes_from(
    [Mistake(*row) for row in PROJECTIONS], "Linformer", lambda part: _mix(project=part)
)
ex.mistake(
    "Linformer scaled by √r",
    "r is the number of mixed keys; each score is a sum over d products.",
    "Which entry of `query.shape` is d?",
)(lambda q, k, v, e, f: _mix(scale=lambda q, k: len(e) ** -0.5)(q, k, v, e, f))
ex.mistake(
    "Linformer with the weights mixed instead of the keys",
    "softmax is taken over all n_k keys first, and the weights are multiplied by e afterwards.",
    "Is the softmax over n_k scores or over r?",
)(lambda q, k, v, e, f: (q @ k.mT / _root_of(q.shape[-1])).softmax(-1) @ e.mT @ (f @ v))
ex.mistake(
    "Linformer with softmax over the heads",
    "Dimension 1 is the heads, so the heads compete instead of the keys.",
    "Which dimension of the scores has the size r?",
)(_mix(normalise=lambda s: s.softmax(1)))
ex.mistake(
    "Linformer with the scale after the softmax",
    "1/√d is applied to the weights, which no longer sum to 1.",
    "Does the scale act on the scores or on the weights?",
)(_mix(scale=lambda q, k: 1.0, mix=lambda w, q, k, v: w @ v / _root_of(q.shape[-1])))
ex.mistake(
    "Linformer under a causal mask",
    "A mixed key is made of all tokens, so cutting off some of the r columns hides no future.",
    "Which tokens is mixed key 0 made of?",
)(_mix(normalise=lambda s: s.masked_fill(torch.ones_like(s).triu(1).bool(), -INF).softmax(-1)))
ex.mistake(
    "Linformer with φ instead of softmax",
    "elu + 1 belongs to linear attention; Linformer keeps the softmax.",
    "What turns scores into weights here?",
)(lambda q, k, v, e, f: _linear(_phi(q), _phi(e @ k), f @ v))


@ex.alternative("einsum")
def _(q, k, v, e, f):
    key = torch.einsum("rj,bhjd->bhrd", e, k)
    value = torch.einsum("rj,bhjd->bhrd", f, v)
    scores = torch.einsum("bhid,bhrd->bhir", q, key) * q.size(-1) ** -0.5
    return torch.einsum("bhir,bhrd->bhid", scores.softmax(dim=3), value)


@ex.alternative("PyTorch's scaled_dot_product_attention")
def _(q, k, v, e, f):
    return F.scaled_dot_product_attention(q, torch.matmul(e, k), torch.matmul(f, v))


@ex.alternative("F.linear on the transposed keys, and softmax by hand")
def _(q, k, v, e, f):
    key, value = F.linear(k.mT, e), F.linear(v.mT, f).mT  # (…, d, r), (…, r, d_v)
    scores = (q / math.sqrt(k.shape[-1])) @ key
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights @ value / weights.sum(-1, keepdim=True)


@ex.alternative("a loop over batch and heads")
def _(q, k, v, e, f):
    rows = []
    for query, key, value in zip(*(t.flatten(0, 1) for t in (q, k, v)), strict=True):
        scores = query @ (e @ key).T / key.shape[1] ** 0.5
        rows.append(torch.softmax(scores, dim=1) @ (f @ value))
    return torch.stack(rows).unflatten(0, q.shape[:2])


@ex.alternative("in float64, and back")
def _(q, k, v, e, f):
    return linformer(*(t.double() for t in (q, k, v, e, f))).to(v.dtype)
