"""Exercises of chapter 04: five ways to tell attention where a token stands."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import Broken, expect
from ..layers import AlibiBias
from ._inputs import normal, some
from ._wrong_parts import SCALES

INF = math.inf


def _whole(g: torch.Generator, n: int, least: int = 1) -> Tensor:
    """n different whole numbers from `least` on, in any order."""
    return (torch.randperm(n + 3, generator=g)[:n] + least).float()


# --- parts, right and wrong, that the first three exercises share -----------------------------


def _frequencies(i: Tensor, d: int, base: float) -> Tensor:
    """What pair i turns by per position."""
    return base ** (-2 * i / d)


def _angles(positions: Tensor, d: int, base: float, frequencies: Function = _frequencies) -> Tensor:
    """(n,) -> (n, d / 2)"""
    i = torch.arange(d // 2).to(positions)
    return positions[:, None] * frequencies(i, d, base)


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    """Two tensors (..., d / 2) -> (..., d): a0, b0, a1, b1, …"""
    return torch.stack((a, b), dim=-1).flatten(-2)


def _count(x: Tensor, dim: int) -> Tensor:
    """0, 1, 2, … along a dimension of x."""
    return torch.arange(x.shape[dim]).to(x)


def _sinusoids(positions: Tensor, d: int, base: float = 1e4) -> Tensor:
    angle = _angles(positions, d, base)
    return _interleave(angle.sin(), angle.cos())


EXPONENT = "Pair i owns the columns 2i and 2i + 1: what stands in its exponent?"
UNIT = "Which unit do `torch.sin` and `torch.cos` take, and which one does the formula speak of?"

# Frequencies: (i, d, base) -> one for each pair.
FREQUENCIES = [
    Mistake(
        "with the exponent i/d instead of 2i/d",
        "The number of the pair is not doubled, so all pairs but the first turn too fast.",
        EXPONENT,
        lambda i, d, base: base ** (-i / d),
    ),
    Mistake(
        "with the exponent 4i/d",
        "A range in steps of 2 is 2i already, and it was doubled once more (or d was halved).",
        EXPONENT,
        lambda i, d, base: base ** (-4 * i / d),
    ),
    Mistake(
        "with the exponent 2i/(d - 2)",
        "The exponents run from 0 to 1 with both ends included, as in the authors' first code.",
        "Is 1/base itself among the frequencies of the formula?",
        lambda i, d, base: base ** (-2 * i / max(d - 2, 1)),
    ),
    Mistake(
        "with i counted from 1",
        "The first pair should turn by one radian per position.",
        "Which exponent does the first pair have?",
        lambda i, d, base: base ** (-2 * (i + 1) / d),
    ),
    Mistake(
        "with frequencies that grow",
        "The sign of the exponent is turned round: late pairs turn faster instead of slower.",
        "Does the power of the base multiply the position or divide it?",
        lambda i, d, base: base ** (2 * i / d),
    ),
    Mistake(
        "with frequencies in equal steps from 1 to 1/base",
        "The frequencies form a geometric series: each is the same fraction of the one before.",
        "By what is each frequency multiplied to get the next one?",
        lambda i, d, base: torch.linspace(1, 1 / base, len(i)).to(i),
    ),
    Mistake(
        "with one frequency for all pairs",
        "The number of the pair has no effect.",
        "What makes the second pair slower than the first?",
        lambda i, d, base: torch.ones_like(i),
    ),
    Mistake(
        "with the frequencies in reverse order",
        "The slowest pair comes first.",
        "What is the frequency of the pair i = 0?",
        lambda i, d, base: base ** (-2 * i / d).flip(0),
    ),
    Mistake(
        "with 10000 for the base, whatever the base",
        "The argument `base` has no effect.",
        "Where does `base` enter your answer?",
        lambda i, d, base: 1e4 ** (-2 * i / d),
    ),
    Mistake(
        "with e for the base",
        "exp of the exponent alone is a power of e.",
        "By what must the exponent be multiplied for exp(exponent · …) to be a power of the base?",
        lambda i, d, base: (-2 * i / d).exp(),
    ),
    Mistake(
        "with the exponent 2i, not divided by d",
        "The second pair hardly turns at all.",
        EXPONENT,
        lambda i, d, base: base ** (-2 * i),
    ),
    Mistake(
        "with the power divided by d, not its exponent",
        "Python takes the power first: `base ** two_i / d` is (base to the 2i) / d.",
        "What does Python make of `2 ** 6 / 3`?",
        lambda i, d, base: d * base ** (-2 * i),
    ),
    Mistake(
        "with degrees for radians",
        "The angles are multiplied by π/180.",
        UNIT,
        lambda i, d, base: base ** (-2 * i / d) * (math.pi / 180),
    ),
    Mistake(
        "with whole turns for radians",
        "The angles are multiplied by 2π.",
        UNIT,
        lambda i, d, base: base ** (-2 * i / d) * (2 * math.pi),
    ),
]

ONLY = "Does every pair turn, each at its own pace?"

# Frequencies where some pairs stand still.
STILL = [
    Mistake(
        "of the first pair alone",
        "All other entries stay as they were.",
        ONLY,
        lambda i, d, base: base ** (-2 * i / d) * (i < 1),
    ),
    Mistake(
        "of the first half of the entries alone",
        "The second half stays as it was.",
        ONLY,
        lambda i, d, base: base ** (-2 * i / d) * (i < d / 4),
    ),
]

WHERE = "Where does `positions` enter your answer?"
ASIS = "What is done to `positions` before it meets the frequencies, and why?"

# What is made of the positions: positions -> positions.
PLACES = [
    Mistake(
        "with 0, 1, 2, … for the positions",
        "The tokens are counted, whatever positions they were given.",
        WHERE,
        lambda p: torch.arange(len(p)).to(p),
    ),
    Mistake(
        "with 1, 2, 3, … for the positions",
        "The tokens are counted, whatever positions they were given.",
        WHERE,
        lambda p: torch.arange(1, len(p) + 1).to(p),
    ),
    Mistake(
        "with 1 added to the positions",
        "Position 0 is treated as position 1.",
        ASIS,
        lambda p: p + 1,
    ),
    Mistake(
        "with the positions cut to whole numbers",
        "The fraction of a position is lost.",
        "Where does an integer dtype, `.long()` or `int(...)` enter?",
        lambda p: p.trunc(),
    ),
    Mistake(
        "with the positions counted from the first one",
        "The same tokens further on come out as if they stood at the front.",
        ASIS,
        lambda p: p - p[0],
    ),
    Mistake(
        "with the positions divided by the length",
        "The result of a position depends on how many others there are.",
        ASIS,
        lambda p: p / len(p),
    ),
    Mistake(
        "with the positions in reverse order",
        "The first token gets the last position.",
        ASIS,
        lambda p: p.flip(0),
    ),
    Mistake(
        "with the sign of the positions lost",
        "Position -2 is treated as position 2.",
        ASIS,
        lambda p: p.abs(),
    ),
    Mistake(
        "with the first position for all",
        "The other positions have no effect.",
        "Which dimension of the angles belongs to the positions?",
        lambda p: p[:1].expand(len(p)),
    ),
]


# --- 1. sinusoidal encoding -------------------------------------------------------------------

ex = Exercise(
    "sinusoidal_encoding",
    chapter="04_positional_encodings",
    title="Sinusoidal codes",
    minutes=15,
    difficulty=2,
    importance=4,
    prompt=r"""
Each position $p$ gets a code of width $d$ = `d_model`: the sine and the cosine of the same angle
side by side, for $d/2$ angles, each slower than the one before (Vaswani et al. 2017, §3.5).

$$\text{code}[p, 2i] = \sin\frac{p}{b^{2i/d}}, \qquad
  \text{code}[p, 2i + 1] = \cos\frac{p}{b^{2i/d}}, \qquad i = 0, \dots, \tfrac{d}{2} - 1$$

$b$ is the `base`, and `d_model` is even. `positions` is a tensor of shape `(n,)` that may hold any
numbers: fractions, negative ones, in any order. A gradient may flow through it. Row j of the result
`(n, d_model)` is the code of `positions[j]`, in the dtype of `positions`.
""",
    hints=(
        "How many different angles does one position have, and which columns share one?",
        "The angles of all positions are a table (n, d_model / 2): positions down, frequencies "
        "across. Stacking sines and cosines in a new last dimension and flattening the last two "
        "puts partners side by side.",
        "frequency = base ** (-two_i / d_model), where two_i holds 0, 2, 4, …; which shapes make "
        "positions times frequency a table?",
    ),
)


@ex.solution
def sinusoidal_encoding(positions: Tensor, d_model: int, base: float = 10000.0) -> Tensor:
    """Sines and cosines that tell positions apart.

    positions: (n,), floating point, d_model even -> (n, d_model).
    """
    ### BEGIN SOLUTION
    two_i = torch.arange(0, d_model, 2).to(positions)  # (d_model / 2,), dtype as the positions
    frequency = base ** (-two_i / d_model)  # (d_model / 2,)
    angle = positions[:, None] * frequency  # (n, 1) * (d_model / 2,) -> (n, d_model / 2)
    pairs = torch.stack((angle.sin(), angle.cos()), dim=-1)  # (n, d_model / 2, 2)
    return pairs.flatten(-2)  # (n, d_model): the sine and the cosine of an angle are neighbours
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(positions: Tensor, d_model: int, **options: float) -> Case:
        return {"positions": positions, "d_model": d_model, **options}

    return [
        case(_whole(g, 2), 4),
        case(2 * normal(g, 3), 2),
        case(2 * normal(g, 3), 4),
        case(_whole(g, 1), 6, base=64.0),
        case(2 * normal(g, 4), 4, base=100.0),  # n = d_model
        case(3 * normal(g, 5), 6, base=8.0),
        case(3 * normal(g, 3), 8, base=16.0),
        case(_whole(g, 3, least=20), 4),  # far from the front
    ]


@ex.behaviour("position 0 is coded by 0, 1, 0, 1, …")
def _(answer):
    case = {"positions": torch.tensor([0.0]), "d_model": 4}
    expect(answer.on(case), torch.tensor([[0.0, 1.0, 0.0, 1.0]]), case=case)


@ex.behaviour("the first two columns are the sine and the cosine of the position itself")
def _(answer):
    positions = torch.tensor([0.5, 2.0, -3.0])
    want = torch.stack((positions.sin(), positions.cos()), dim=1)
    expect(answer(positions, 6)[:, :2], want)


@ex.behaviour("with base 100 and d_model 4 the second pair turns 10 times slower than the first")
def _(answer):
    slow = answer(torch.tensor([10.0, 20.0]), 4, base=100.0)[:, 2:]
    expect(slow, answer(torch.tensor([1.0, 2.0]), 4, base=100.0)[:, :2])


@ex.behaviour("the squares of the sine and the cosine of a pair sum to 1")
def _(answer):
    code = answer(torch.tensor([1.0, 4.5]), 6)
    expect(code[:, 0::2].square() + code[:, 1::2].square(), torch.ones(2, 3))


@ex.behaviour("a position has the same code whoever stands beside it")
def _(answer):
    positions = torch.tensor([3.0, 0.5, -2.0, 7.0])
    together = answer(positions, 4)
    expect(together[2:3], answer(positions[2:3], 4))


@ex.behaviour("the product of two codes depends only on how far apart their positions are")
def _(answer):
    near = answer(torch.tensor([1.0, 3.5]), 8)
    far = answer(torch.tensor([11.0, 13.5]), 8)
    expect(near[0] @ near[1], far[0] @ far[1])


@ex.behaviour("two positions less than one apart have different codes")
def _(answer):
    code = answer(torch.tensor([2.0, 2.5]), 4)
    if torch.allclose(code[0], code[1]):
        raise Broken("positions 2 and 2.5 have the same code")


def _with_code(*, frequencies=_frequencies, place=None, join=None) -> Function:
    """Sinusoidal codes with one part replaced."""

    def function(positions, d_model, base=1e4):
        positions = place(positions) if place else positions
        angle = _angles(positions, d_model, base, frequencies)
        return join(angle) if join else _interleave(angle.sin(), angle.cos())

    return function


def _columns(exponent: Function) -> Function:
    """Codes whose exponent is taken from the column j, not from the pair: exponent(j)."""

    def function(positions, d_model, base=1e4):
        j = torch.arange(d_model).to(positions)
        angle = positions[:, None] * base ** (-exponent(j) / d_model)  # (n, d_model)
        return torch.where(j % 2 == 0, angle.sin(), angle.cos())

    return function


ex.mistakes_from(FREQUENCIES, "the codes", lambda part: _with_code(frequencies=part))
ex.mistakes_from(PLACES, "the codes", lambda part: _with_code(place=part))
ex.mistake(
    "the codes with the sign of the positions turned round",
    "The sines have the wrong sign; the cosines do not notice.",
    "Is the sine of a small positive angle positive?",
)(_with_code(place=lambda p: -p))
ex.mistake(
    "the codes with all sines first, then all cosines",
    "The columns are right but stand elsewhere: `cat` puts blocks one after the other.",
    "Which column follows the sine of the first angle?",
)(_with_code(join=lambda a: torch.cat((a.sin(), a.cos()), -1)))
ex.mistake(
    "the codes with all cosines first, then all sines",
    "`cat` puts blocks one after the other, and the first block should not be cosines.",
    "What stands in column 0, and what in column 1?",
)(_with_code(join=lambda a: torch.cat((a.cos(), a.sin()), -1)))
ex.mistake(
    "the codes with sine and cosine swapped",
    "Even columns hold cosines.",
    "What is the code of position 0, and what does yours start with?",
)(_with_code(join=lambda a: _interleave(a.cos(), a.sin())))
ex.mistake(
    "the codes with sines in every column",
    "The two columns of a pair are equal.",
    "What stands in the odd columns?",
)(_with_code(join=lambda a: _interleave(a.sin(), a.sin())))
ex.mistake(
    "the codes with cosines in every column",
    "The two columns of a pair are equal, and positions p and -p cannot be told apart.",
    "What stands in the even columns?",
)(_with_code(join=lambda a: _interleave(a.cos(), a.cos())))
ex.mistake(
    "the angles themselves",
    "Nothing keeps a large position from drowning the token it is added to.",
    "Which two functions does the formula take of each angle?",
)(_with_code(join=lambda a: _interleave(a, a)))
ex.mistake(
    "the codes with sines and cosines stacked in front and reshaped",
    "`reshape` reads the numbers row by row, so the rows of different positions are mixed.",
    "Along which dimension should the partners be stacked so that they end up side by side?",
)(_with_code(join=lambda a: torch.stack((a.sin(), a.cos())).reshape(len(a), -1)))
ex.mistake(
    "the codes multiplied by √d_model",
    "That factor belongs to the token embeddings, not to the codes.",
    "What do the squares of a sine and the cosine of the same angle sum to?",
)(_with_code(join=lambda a: _interleave(a.sin(), a.cos()) * (2 * a.shape[-1]) ** 0.5))
ex.mistake(
    "the codes brought to length 1",
    "Each code is divided by its length, which is √(d_model / 2).",
    "Does the formula divide by anything after the sine?",
)(_with_code(join=lambda a: F.normalize(_interleave(a.sin(), a.cos()), dim=-1)))
ex.mistake(
    "the codes transposed",
    "Row j should belong to position j.",
    "Which of positions and frequencies gets the new dimension, and on which side?",
)(_with_code(join=lambda a: _interleave(a.sin(), a.cos()).mT))
ex.mistake(
    "the sines alone, half as wide",
    "The cosines are missing.",
    "How wide must the result be, and how many angles are there?",
)(_with_code(join=lambda a: a.sin()))
ex.mistake(
    "the cosines alone, half as wide",
    "The sines are missing, or have been overwritten.",
    "How wide must the result be, and how many angles are there?",
)(_with_code(join=lambda a: a.cos()))
ex.mistake(
    "the codes with sine and cosine added up",
    "Each pair has become one column.",
    "How wide must the result be, and how many angles are there?",
)(_with_code(join=lambda a: a.sin() + a.cos()))
ex.mistake(
    "the codes with the exponent (2i + 1)/d for the cosines",
    "The exponent follows the column, so sine and cosine of a pair have different angles.",
    "Do the two columns of a pair share their exponent?",
)(_columns(lambda j: j))
ex.mistake(
    "the codes with twice the column in the exponent",
    "2i counts pairs; here i counts columns, so every column has an angle of its own.",
    "How many different angles has one position: d_model, or half as many?",
)(_columns(lambda j: 2 * j))


@ex.mistake(
    "the codes with each position at one frequency only",
    "(n,) times (d_model / 2,) is no table: position j meets frequency j and no other.",
    "Which shape must positions have so that each of them meets every frequency?",
)
def _(positions, d_model, base=1e4):
    i = torch.arange(d_model // 2).to(positions)
    angle = positions * base ** (-2 * i / d_model)  # one by one, where the sizes happen to fit
    return _interleave(angle.sin(), angle.cos()).expand(len(positions), d_model)


@ex.mistake(
    "codes twice as wide, from d_model angles",
    "Every angle gives two columns, so half as many angles are needed.",
    "How many columns come of d_model angles?",
)
def _(positions, d_model, base=1e4):
    i = torch.arange(d_model).to(positions)
    angle = positions[:, None] * base ** (-2 * i / d_model)
    return _interleave(angle.sin(), angle.cos())


@ex.alternative("exp(-log(base) · 2i/d), written into even and odd columns")
def _(positions, d_model, base=10000.0):
    code = torch.zeros(len(positions), d_model, dtype=positions.dtype)
    rate = torch.exp(torch.arange(0, d_model, 2).to(positions) * (-math.log(base) / d_model))
    code[:, 0::2] = torch.sin(positions.unsqueeze(1) * rate)
    code[:, 1::2] = torch.cos(positions.unsqueeze(1) * rate)
    return code


@ex.alternative("a loop over positions and pairs")
def _(positions, d_model, base=10000.0):
    rows = []
    for p in positions:
        row = []
        for i in range(d_model // 2):
            angle = p / base ** (2 * i / d_model)
            row += [torch.sin(angle), torch.cos(angle)]
        rows.append(torch.stack(row))
    return torch.stack(rows)


@ex.alternative("a cosine is a sine a quarter turn ahead")
def _(positions, d_model, base=10000.0):
    column = torch.arange(d_model)
    frequency = (1.0 / base) ** (2 * (column // 2).to(positions) / d_model)
    return torch.sin(torch.outer(positions, frequency) + (column % 2) * (math.pi / 2))


@ex.alternative("complex numbers")
def _(positions, d_model, base=10000.0):
    angle = torch.einsum("p,i->pi", positions, base ** (-torch.arange(0, d_model, 2) / d_model))
    turned = torch.view_as_real(torch.exp(1j * angle))  # (n, d_model / 2, 2): cosine, sine
    return turned.flip(-1).reshape(len(positions), d_model).to(positions.dtype)


@ex.alternative("in float64, and back")
def _(positions, d_model, base=10000.0):
    return _sinusoids(positions.double(), d_model, base).to(positions.dtype)


# --- what the next two exercises share: turning pairs -----------------------------------------


def _forward(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return a * cos - b * sin, a * sin + b * cos


def _back(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return a * cos + b * sin, b * cos - a * sin


def _neighbours(x: Tensor, turn: Function) -> Tensor:
    """Turn (x0, x1), (x2, x3), … and put each back where it was."""
    return _interleave(*turn(x[..., 0::2], x[..., 1::2]))


PARTNER = "Which numbers does each line of the rotation take, and with which sign?"


def _second_from_new_first(turn, a, b, cos, sin):
    first = turn(a, b, cos, sin)[0]
    return first, turn(first, b, cos, sin)[1]


# Wrong ways to turn a pair: (the right one, a, b, cos, sin) -> (new a, new b).
TURNS = [
    Mistake(
        "in the wrong direction",
        "The sines have the wrong sign, or the two numbers of a pair have changed roles.",
        "Which of the two lines has the minus?",
        lambda turn, a, b, cos, sin: turn(a, b, cos, -sin),
    ),
    Mistake(
        "with a plus in both lines",
        "That is no rotation: it stretches the pair.",
        "Which of the two lines has a minus?",
        lambda turn, a, b, cos, sin: (a * cos + b * sin, b * cos + a * sin),
    ),
    Mistake(
        "with a minus in both lines",
        "That is no rotation: it stretches the pair.",
        "Which of the two lines has a plus?",
        lambda turn, a, b, cos, sin: (a * cos - b * sin, b * cos - a * sin),
    ),
    Mistake(
        "with each number multiplied by cos + sin",
        "The sine should meet the partner, not the same number again.",
        PARTNER,
        lambda turn, a, b, cos, sin: (a * (cos + sin), b * (cos + sin)),
    ),
    Mistake(
        "with the cosines alone",
        "The pair is shrunk, not turned.",
        PARTNER,
        lambda turn, a, b, cos, sin: (a * cos, b * cos),
    ),
    Mistake(
        "with the sines alone",
        "Each number is replaced by its partner times the sine.",
        PARTNER,
        lambda turn, a, b, cos, sin: turn(a, b, 0 * cos, sin),
    ),
    Mistake(
        "with the sine and the cosine of the angle swapped",
        "An angle of 0 should change nothing, and here it does.",
        "What is left of the formula where the sine is 0 and the cosine 1?",
        lambda turn, a, b, cos, sin: turn(a, b, sin, cos),
    ),
    Mistake(
        "with the two numbers of each pair swapped",
        "They are right, but they come back in the wrong order.",
        "Which of the two goes into the even columns?",
        lambda turn, a, b, cos, sin: turn(a, b, cos, sin)[::-1],
    ),
    Mistake(
        "whose second line uses the new first number",
        "The first number is overwritten before the second one is computed.",
        "Do both lines of the rotation take the old numbers?",
        _second_from_new_first,
    ),
    Mistake(
        "of the first number of each pair alone",
        "The second number stays as it was.",
        "How many lines has the rotation of a pair?",
        lambda turn, a, b, cos, sin: (turn(a, b, cos, sin)[0], b),
    ),
    Mistake(
        "of the second number of each pair alone",
        "The first number stays as it was.",
        "How many lines has the rotation of a pair?",
        lambda turn, a, b, cos, sin: (a, turn(a, b, cos, sin)[1]),
    ),
    Mistake(
        "with sine and cosine added instead",
        "Adding a code to a vector does not turn it.",
        "Which four products make a rotation?",
        lambda turn, a, b, cos, sin: (a + sin, b + cos),
    ),
    Mistake(
        "with sine and cosine multiplied entry by entry",
        "Every number must meet both the sine and the cosine.",
        "Which four products make a rotation?",
        lambda turn, a, b, cos, sin: (a * sin, b * cos),
    ),
    Mistake(
        "twice over",
        "Every pair is turned by twice its angle.",
        "How often is the angle applied?",
        lambda turn, a, b, cos, sin: turn(*turn(a, b, cos, sin), cos, sin),
    ),
]

WITH = "Which column is the partner of column 0: the next one, or one half a width away?"

# Wrong ways to take the pairs out and put them back: (x, turn) -> x.
LAYOUTS = [
    Mistake(
        "with partners half a width apart",
        "The first half is paired with the second, as in Llama's code; here neighbours are a pair.",
        WITH,
        lambda x, turn: torch.cat(turn(*x.chunk(2, -1)), -1),
    ),
    Mistake(
        "with neighbours taken out, and put back as two halves",
        "`cat` puts one block after the other, so the pairs are torn apart.",
        "Which call puts the partners side by side again?",
        lambda x, turn: torch.cat(turn(x[..., 0::2], x[..., 1::2]), -1),
    ),
    Mistake(
        "with the two halves taken out, and put back as neighbours",
        "The partners are half a width apart going in and side by side coming out.",
        WITH,
        lambda x, turn: _interleave(*turn(*x.chunk(2, -1))),
    ),
    Mistake(
        "with the pairs stacked in front and reshaped",
        "`reshape` reads the numbers row by row, so different rows are mixed.",
        "Along which dimension should the partners be stacked so that they end up side by side?",
        lambda x, turn: torch.stack(turn(x[..., 0::2], x[..., 1::2])).reshape(x.shape),
    ),
]


# --- 2. shift encoding ------------------------------------------------------------------------

ex = Exercise(
    "shift_encoding",
    chapter="04_positional_encodings",
    title="A shift is a linear map",
    minutes=15,
    difficulty=3,
    importance=3,
    batched=True,
    prompt=r"""
You get sinusoidal codes as exercise 1 makes them, but not the positions $p$ they were made of. Give
the codes of $p + s$, where $s$ is the `offset`, any number. With $\theta_i = s / b^{2i/d}$,

$$\sin(\alpha + \theta) = \sin\alpha \cos\theta + \cos\alpha \sin\theta, \qquad
  \cos(\alpha + \theta) = \cos\alpha \cos\theta - \sin\alpha \sin\theta$$

say how pair i, the columns 2i (sine) and 2i + 1 (cosine), must change. The positions drop out: one
map for all rows, a rotation of each pair. It is **linear**, so it must also do with sums and
multiples of codes, which are no codes themselves.

`encoding` is `(..., n, d_model)`, with any dimensions in front; the result has its shape.
""",
    hints=(
        "You know the sine and the cosine of an angle. Which two further numbers do you need for "
        "those of the angle plus θ?",
        "θ differs from pair to pair but not from row to row: it has shape (d_model / 2,) and "
        "broadcasts against encoding[..., 0::2].",
        "new_sin = sin * theta.cos() + cos * theta.sin(); the other line is similar, and both go "
        "back side by side.",
    ),
)


@ex.solution
def shift_encoding(encoding: Tensor, offset: float, base: float = 10000.0) -> Tensor:
    """The codes of positions `offset` further on, made from the codes alone.

    encoding: (..., n, d_model), sinusoidal codes with this base -> the same shape.
    """
    ### BEGIN SOLUTION
    d_model = encoding.shape[-1]
    two_i = torch.arange(0, d_model, 2).to(encoding)  # (d_model / 2,)
    theta = offset * base ** (-two_i / d_model)  # (d_model / 2,): the same for all rows
    sin, cos = encoding[..., 0::2], encoding[..., 1::2]  # (..., n, d_model / 2) each
    new_sin = sin * theta.cos() + cos * theta.sin()
    new_cos = cos * theta.cos() - sin * theta.sin()
    return torch.stack((new_sin, new_cos), dim=-1).flatten(-2)  # (..., n, d_model)
    ### END SOLUTION


UNIT_PAIRS = torch.tensor([[0.6, 0.8], [0.8, -0.6], [-0.6, 0.8], [0.0, 1.0], [-0.8, -0.6]])


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(encoding: Tensor, **options: float) -> Case:
        size = 0.5 + torch.randint(0, 20, (), generator=g).item() / 10 + 0.1
        sign = 1 if torch.rand((), generator=g) < 0.6 else -1
        return {"encoding": encoding, "offset": round(sign * size, 1), **options}

    pairs = UNIT_PAIRS[torch.randperm(5, generator=g)[:4]].reshape(2, 4)
    far = 12 + 10 * torch.rand(4, generator=g)  # several turns of the first pair
    return [
        {"encoding": pairs, "offset": float(_whole(g, 1).item())},
        case(normal(g, 3, 2)),
        case(_sinusoids(far, 4)),
        case(normal(g, 4, 4), base=100.0),
        case(normal(g, 1, 6), base=64.0),
        case(normal(g, 2, 3, 8), base=16.0),
        case(normal(g, 2, 2, 3, 6), base=8.0),
        {"encoding": _sinusoids(far[:3], 4), "offset": float(_whole(g, 1, least=30).item())},
        case(normal(g, 3, 2, 4)),
    ]


@ex.behaviour("a shift by 0 changes nothing")
def _(answer):
    case = {"encoding": torch.tensor([[0.6, 0.8, 0.0, 1.0]]), "offset": 0.0}
    expect(answer.on(case), case["encoding"], case=case)


@ex.behaviour("the code of position 3, shifted by 4, is the code of position 7")
def _(answer):
    case = {"encoding": _sinusoids(torch.tensor([3.0]), 4), "offset": 4.0}
    expect(answer.on(case), _sinusoids(torch.tensor([7.0]), 4), case=case)


@ex.behaviour("a shift by 2 and then one by 3 is a shift by 5")
def _(answer):
    (code,) = some(1, (3, 6))
    expect(answer(answer(code, 2.0), 3.0), answer(code, 5.0))


@ex.behaviour("a shift forwards and the same one back change nothing")
def _(answer):
    (code,) = some(2, (3, 6))
    expect(answer(answer(code, 2.5), -2.5), code)


@ex.behaviour("it is linear: the sum of two codes goes to the sum of the shifted ones")
def _(answer):
    one, two = some(3, (2, 4), (2, 4))
    expect(answer(one + 2 * two, 3.0), answer(one, 3.0) + 2 * answer(two, 3.0))


@ex.behaviour("every row is shifted alike, wherever it stands")
def _(answer):
    (code,) = some(4, (1, 4))
    expect(answer(code.expand(3, 4), 2.0), answer(code, 2.0).expand(3, 4))


@ex.behaviour("the length of each pair stays as it is")
def _(answer):
    (code,) = some(5, (2, 6))
    pairs = answer(code, 4.0).unflatten(-1, (3, 2))
    expect(pairs.norm(dim=-1), code.unflatten(-1, (3, 2)).norm(dim=-1))


def _with_shift(*, frequencies=_frequencies, turn=_back, layout=_neighbours, by=None) -> Function:
    """The shift with one part replaced; by(offset, encoding) gives each row's own offset."""

    def function(encoding, offset, base=1e4):
        rows = by(offset, encoding) if by else encoding.new_full((1,), offset)
        theta = _angles(rows, encoding.shape[-1], base, frequencies)  # (1 or n, d_model / 2)
        return layout(encoding, lambda a, b: turn(a, b, theta.cos(), theta.sin()))

    return function


SHIFT = _with_shift()

ex.mistakes_from(FREQUENCIES + STILL, "a turn", lambda part: _with_shift(frequencies=part))
ex.mistakes_from(TURNS, "a turn", lambda part: _with_shift(turn=functools.partial(part, _back)))
ex.mistakes_from(LAYOUTS, "a turn", lambda part: _with_shift(layout=part))
ex.mistake(
    "a shift that grows from row to row",
    "Row j is shifted by j times the offset.",
    "Is the offset the same for all rows?",
)(_with_shift(by=lambda s, e: s * _count(e, -2)))
ex.mistake(
    "a shift by the offset and the number of the row",
    "Row j is shifted by j more than asked.",
    "The codes hold their positions already: what is left to add?",
)(_with_shift(by=lambda s, e: s + _count(e, -2)))
ex.mistake(
    "a shift by one too many",
    "1 is added to the offset.",
    "What should a shift by 0 do?",
)(_with_shift(by=lambda s, e: e.new_full((1,), s + 1)))
ex.mistake(
    "a shift by the offset cut to a whole number",
    "The fraction of the offset is lost.",
    "Does the formula need a whole number anywhere?",
)(_with_shift(by=lambda s, e: e.new_full((1,), float(int(s)))))
ex.mistake(
    "a shift by the size of the offset, without its sign",
    "A negative offset moves forwards.",
    "What should a shift by -1 do?",
)(_with_shift(by=lambda s, e: e.new_full((1,), abs(s))))
ex.mistake(
    "a shift with the offset multiplied by the length",
    "n does not occur in the formula.",
    "What is θ made of?",
)(_with_shift(by=lambda s, e: e.new_full((1,), s * e.shape[-2])))
ex.mistake(
    "the codes of 0, 1, 2, … plus the offset",
    "The codes that were given have no effect.",
    "What says which positions the codes stand for?",
)(lambda e, s, base=1e4: _sinusoids(_count(e, -2) + s, e.shape[-1], base).expand(e.shape))
ex.mistake(
    "the code of the offset in every row",
    "The codes that were given have no effect.",
    "Where does `encoding` enter your answer?",
)(lambda e, s, base=1e4: _sinusoids(e.new_full((1,), s), e.shape[-1], base).expand(e.shape))
ex.mistake(
    "the rows moved along by the offset",
    "Row j holds another row's code, and the rows at the end start again from the other side.",
    "How do you get the code of a position that none of the rows has?",
)(lambda e, s, base=1e4: e.roll(round(s), -2))
ex.mistake(
    "the offset added to the codes",
    "The offset is a shift of positions; codes are sines and cosines of them.",
    "Which formula gives the sine of a sum?",
)(lambda e, s, base=1e4: e + s)
ex.mistake(
    "the codes minus the code of the offset",
    "A shift turns each pair; taking numbers off it is something else.",
    "Which formula gives the sine of a sum?",
)(lambda e, s, base=1e4: e - _sinusoids(e.new_full((1,), s), e.shape[-1], base))


@ex.mistake(
    "codes of a position read from the first pair",
    "The first pair repeats after 2π positions, so it does not give the position away.",
    "Can you do without the positions?",
)
def _(encoding, offset, base=1e4):
    p = torch.atan2(encoding[..., 0], encoding[..., 1]) + offset
    return _sinusoids(p.flatten(), encoding.shape[-1], base).reshape(encoding.shape)


@ex.mistake(
    "the sine and the cosine of each pair's angle plus θ",
    "That is right for codes, but not linear: a code times 2 comes back with length 1.",
    "Which formula takes sines and cosines and never asks for the angle?",
)
def _(encoding, offset, base=1e4):
    theta = _angles(encoding.new_full((1,), offset), encoding.shape[-1], base)
    angle = torch.atan2(encoding[..., 0::2], encoding[..., 1::2]) + theta
    return _interleave(angle.sin(), angle.cos())


@ex.alternative("one matrix for all rows")
def _(encoding, offset, base=10000.0):
    d = encoding.shape[-1]
    matrix = torch.zeros(d, d, dtype=encoding.dtype)
    for i in range(0, d, 2):
        theta = offset / base ** (i / d)
        sin, cos = math.sin(theta), math.cos(theta)
        matrix[i, i] = matrix[i + 1, i + 1] = cos
        matrix[i + 1, i], matrix[i, i + 1] = sin, -sin
    return encoding @ matrix  # (..., n, d) x (d, d) -> (..., n, d)


@ex.alternative("complex numbers, the cosine as the real part")
def _(encoding, offset, base=10000.0):
    pairs = encoding.unflatten(-1, (-1, 2))  # (..., n, d_model / 2, 2)
    number = torch.complex(pairs[..., 1], pairs[..., 0])
    i = torch.arange(number.shape[-1]).to(encoding)
    turned = number * torch.exp(1j * offset * base ** (-2 * i / encoding.shape[-1]))
    return torch.stack((turned.imag, turned.real), -1).flatten(-2)


@ex.alternative("a loop over the pairs")
def _(encoding, offset, base=10000.0):
    columns = []
    for i in range(encoding.shape[-1] // 2):
        theta = offset * base ** (-2 * i / encoding.shape[-1])
        sin, cos = encoding[..., 2 * i], encoding[..., 2 * i + 1]
        columns.append(sin * math.cos(theta) + cos * math.sin(theta))
        columns.append(cos * math.cos(theta) - sin * math.sin(theta))
    return torch.stack(columns, -1)


@ex.alternative("each number times cos θ, plus its partner times ± sin θ")
def _(encoding, offset, base=10000.0):
    even = torch.arange(0, encoding.shape[-1], 2).to(encoding).repeat_interleave(2)
    theta = offset / base ** (even / encoding.shape[-1])
    partner = encoding.unflatten(-1, (-1, 2)).flip(-1) * torch.tensor([1, -1])
    return encoding * theta.cos() + partner.flatten(-2) * theta.sin()


@ex.alternative("in float64, and back")
def _(encoding, offset, base=10000.0):
    return SHIFT(encoding.double(), offset, base).to(encoding.dtype)


# --- 3. rotary --------------------------------------------------------------------------------

ex = Exercise(
    "rotary",
    chapter="04_positional_encodings",
    title="Rotary encoding",
    minutes=20,
    difficulty=3,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
Rotary encoding (Su et al. 2021, §3.2.2) adds nothing to the tokens. It turns each query and each
key by its position, pair by pair: $(x_0, x_1)$, $(x_2, x_3)$, … Pair i at position $p$ turns by
$\theta = p \cdot b^{-2i/d}$, with $d$ = d_head and $b$ the `base`:

$$x'_{2i} = x_{2i} \cos\theta - x_{2i+1} \sin\theta, \qquad
  x'_{2i+1} = x_{2i} \sin\theta + x_{2i+1} \cos\theta$$

A turned query times a turned key then depends on the **distance** of their positions only.

`x` is `(batch, heads, n, d_head)`, d_head even; `positions` is `(n,)`, and token j of every
sequence and head stands at `positions[j]`. Positions may be any numbers (decoding with a cache does
not start at 0), and a gradient may flow through them.
""",
    hints=(
        "How many angles are there for n tokens and d_head numbers each, and do they depend on the "
        "head?",
        "A table of angles (n, d_head / 2) broadcasts against x[..., 0::2], which is "
        "(batch, heads, n, d_head / 2).",
        "a, b = x[..., 0::2], x[..., 1::2]; the new a is a * cos - b * sin. What puts new pairs "
        "back as neighbours?",
    ),
)


@ex.solution
def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Turn neighbouring pairs of x by their positions.

    x: (batch, heads, n, d_head), d_head even, positions: (n,) -> the shape of x.
    """
    ### BEGIN SOLUTION
    two_i = torch.arange(0, x.shape[-1], 2).to(x)  # (d_head / 2,)
    theta = positions[:, None] * base ** (-two_i / x.shape[-1])  # (n, d_head / 2)
    cos, sin = theta.cos(), theta.sin()
    a, b = x[..., 0::2], x[..., 1::2]  # (batch, heads, n, d_head / 2) each
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)  # (..., d_head / 2, 2)
    return turned.flatten(-2)  # (batch, heads, n, d_head): pairs are neighbours again
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(*shape: int, positions: Tensor | None = None, **options: float) -> Case:
        positions = 2 * normal(g, shape[2]) if positions is None else positions
        return {"x": normal(g, *shape), "positions": positions, **options}

    as_split = case(3, 5, 2, 6, positions=2 * normal(g, 5), base=8.0)
    as_split["x"] = as_split["x"].transpose(1, 2)  # a view, as heads come out of a projection
    return [
        case(1, 1, 2, 4, positions=_whole(g, 2)),
        case(1, 1, 3, 2),
        case(1, 2, 1, 6, base=64.0),
        case(2, 3, 3, 4),  # heads = n
        case(2, 1, 4, 8, base=16.0),
        case(2, 4, 4, 4, base=100.0),  # heads = n = d_head
        case(1, 2, 2, 4, positions=_whole(g, 2, least=20)),  # far from the front
        as_split,
        case(3, 2, 3, 4),
    ]


def _place(*positions: float) -> Tensor:
    return torch.tensor(positions)


@ex.behaviour("position 0 changes nothing")
def _(answer):
    case = {"x": torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), "positions": _place(0.0)}
    expect(answer.on(case), case["x"], case=case)


@ex.behaviour("at position π/2 the first pair (1, 0) turns to (0, 1)")
def _(answer):
    case = {"x": torch.tensor([[[[1.0, 0.0]]]]), "positions": _place(math.pi / 2)}
    expect(answer.on(case), torch.tensor([[[[0.0, 1.0]]]]), case=case)


@ex.behaviour("with base 100 and d_head 4 the second pair turns 10 times slower than the first")
def _(answer):
    x = torch.tensor([[[[1.0, 2.0, 1.0, 2.0]]]])
    slow = answer(x, _place(20.0), base=100.0)[..., 2:]
    expect(slow, answer(x, _place(2.0), base=100.0)[..., :2])


@ex.behaviour("a turned query times a turned key depends on their distance only")
def _(answer):
    query, key = some(1, (1, 2, 1, 8), (1, 2, 1, 8))
    near = (answer(query, _place(5.0)) * answer(key, _place(2.0))).sum(-1)
    far = (answer(query, _place(16.0)) * answer(key, _place(13.0))).sum(-1)
    expect(near, far)


@ex.behaviour("the length of each pair stays as it is")
def _(answer):
    (x,) = some(2, (1, 2, 3, 6))
    pairs = answer(x, _place(1.0, 2.0, 7.0)).unflatten(-1, (3, 2))
    expect(pairs.norm(dim=-1), x.unflatten(-1, (3, 2)).norm(dim=-1))


@ex.behaviour("all heads and sequences are turned alike")
def _(answer):
    (x,) = some(3, (1, 1, 3, 4))
    positions = _place(4.0, 0.5, 2.0)
    alike = answer(x.expand(2, 3, 3, 4), positions)
    expect(alike, answer(x, positions).expand(2, 3, 3, 4))


@ex.behaviour("tokens that change places with their positions change nothing but places")
def _(answer):
    (x,) = some(4, (1, 2, 4, 4))
    positions, order = _place(3.0, 7.0, 0.0, 1.0), torch.tensor([2, 0, 3, 1])
    expect(answer(x[:, :, order], positions[order]), answer(x, positions)[:, :, order])


def _rotate(x: Tensor, theta: Tensor) -> Tensor:
    """Turn neighbours by the angles, which broadcast against (batch, heads, n, d_head / 2)."""
    return _neighbours(x, lambda a, b: _forward(a, b, theta.cos(), theta.sin()))


def _with_rotary(
    *, frequencies=_frequencies, turn=_forward, layout=_neighbours, place=None
) -> Function:
    """Rotary encoding with one part replaced."""

    def function(x, positions, base=1e4):
        positions = place(positions) if place else positions
        theta = _angles(positions, x.shape[-1], base, frequencies)  # (n, d_head / 2)
        return layout(x, lambda a, b: turn(a, b, theta.cos(), theta.sin()))

    return function


ROTARY = _with_rotary()


def _halves(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Angles θ0, θ1, …, θ0, θ1, …: (n, d_head)."""
    return _angles(positions, x.shape[-1], base).repeat(1, 2)


def _twice(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Angles θ0, θ0, θ1, θ1, …: (n, d_head)."""
    return _angles(positions, x.shape[-1], base).repeat_interleave(2, dim=-1)


def _partner(x: Tensor) -> Tensor:
    """-x1, x0, -x3, x2, …"""
    return _interleave(-x[..., 1::2], x[..., 0::2])


def _half_away(x: Tensor) -> Tensor:
    """The second half, negated, then the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


ex.mistakes_from(FREQUENCIES + STILL, "a turn", lambda part: _with_rotary(frequencies=part))
ex.mistakes_from(TURNS, "a turn", lambda part: _with_rotary(turn=functools.partial(part, _forward)))
ex.mistakes_from(LAYOUTS, "a turn", lambda part: _with_rotary(layout=part))
ex.mistakes_from(PLACES, "a turn", lambda part: _with_rotary(place=part))
ex.mistake(
    "a turn of neighbours, with the angles laid out for two halves",
    "Column j takes the angle of pair j mod d/2: two layouts are mixed.",
    "Which angle do columns 0 and 1 take, and is it the same one?",
)(lambda x, p, base=1e4: x * _halves(x, p, base).cos() + _partner(x) * _halves(x, p, base).sin())
ex.mistake(
    "a turn of two halves, with the angles laid out for neighbours",
    "Partners are half a width apart, but neighbours share an angle: two layouts are mixed.",
    WITH,
)(lambda x, p, base=1e4: x * _twice(x, p, base).cos() + _half_away(x) * _twice(x, p, base).sin())
ex.mistake(
    "a turn with the positions along the heads",
    "The angles (n, 1, d_head / 2) line up with the heads, as they would in (batch, n, heads, …).",
    "Which dimension of x, counted from the end, holds the tokens?",
)(lambda x, p, base=1e4: _rotate(x, _angles(p, x.shape[-1], base)[:, None]))
ex.mistake(
    "a turn by the number of the head",
    "Head j turns by j, and the positions have no effect.",
    "Which entry of `x.shape` is n, and should the head matter?",
)(lambda x, p, base=1e4: _rotate(x, _angles(_count(x, 1), x.shape[-1], base)[:, None]))
ex.mistake(
    "a turn by the number of the sequence in the batch",
    "Sequence j turns by j, and the positions have no effect.",
    "Which entry of `x.shape` is n, and should the batch matter?",
)(lambda x, p, base=1e4: _rotate(x, _angles(_count(x, 0), x.shape[-1], base)[:, None, None]))
ex.mistake(
    "a turn with d_model in the exponent",
    "The width of all heads together stands where that of one head should.",
    "Which entry of `x.shape` is d?",
)(
    lambda x, p, base=1e4: _rotate(
        x, _angles(p, x.shape[-1], base, lambda i, d, base: base ** (-2 * i / (d * x.shape[1])))
    )
)
ex.mistake(
    "a turn with the number of tokens in the exponent",
    "n stands where d_head should.",
    "Which entry of `x.shape` is d?",
)(
    lambda x, p, base=1e4: _rotate(
        x, _angles(p, x.shape[-1], base, lambda i, d, base: base ** (-2 * i / x.shape[2]))
    )
)
ex.mistake(
    "a turn of the first head alone",
    "The other heads stay as they were.",
    "Does each head need its positions?",
)(lambda x, p, base=1e4: torch.cat((ROTARY(x[:, :1], p, base), x[:, 1:]), 1))
ex.mistake(
    "a turn of every other head",
    "Heads 1, 3, 5, … stay as they were.",
    "In `x[:, 0::2]`, which dimension is cut: the heads, or the numbers of a head?",
)(
    lambda x, p, base=1e4: torch.where(
        torch.arange(x.shape[1])[:, None, None] % 2 == 0, ROTARY(x, p, base), x
    )
)
ex.mistake(
    "the turned vectors added to the old ones",
    "Rotary encoding replaces x; a residual connection is another matter.",
    "What should position 0 do?",
)(lambda x, p, base=1e4: x + ROTARY(x, p, base))
ex.mistake(
    "the turned vectors brought to length 1",
    "A rotation keeps every length as it was.",
    "Does the formula divide by anything?",
)(lambda x, p, base=1e4: F.normalize(ROTARY(x, p, base), dim=-1))
ex.mistake(
    "the turned vectors divided by √d_head",
    "That scale belongs to the scores.",
    "What should position 0 do?",
)(lambda x, p, base=1e4: ROTARY(x, p, base) / math.sqrt(x.shape[-1]))
ex.mistake(
    "the cosines and sines without x",
    "x has no effect.",
    "What is turned?",
)(lambda x, p, base=1e4: _sinusoids(p, x.shape[-1], base).expand(x.shape))


@ex.alternative("complex numbers")
def _(x, positions, base=10000.0):
    d_head = x.shape[-1]
    number = torch.view_as_complex(x.reshape(*x.shape[:-1], d_head // 2, 2))
    angle = torch.outer(positions, 1 / base ** (torch.arange(0, d_head, 2).to(x) / d_head))
    turned = number * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(3)


@ex.alternative("x · cos + partners · sin")
def _(x, positions, base=10000.0):
    pair = torch.arange(x.shape[-1], device=x.device).div(2, rounding_mode="floor")
    angle = positions[:, None] * base ** (-2 * pair.to(x) / x.shape[-1])  # (n, d_head)
    partner = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).reshape(x.shape)
    return x * angle.cos() + partner * angle.sin()


@ex.alternative("a matrix for each position")
def _(x, positions, base=10000.0):
    d_head, matrices = x.shape[-1], []
    for p in positions:
        blocks = []
        for i in range(0, d_head, 2):
            c, s = torch.cos(p * base ** (-i / d_head)), torch.sin(p * base ** (-i / d_head))
            blocks.append(torch.stack((torch.stack((c, -s)), torch.stack((s, c)))))
        matrices.append(torch.block_diag(*blocks))
    return torch.einsum("nij,bhnj->bhni", torch.stack(matrices), x)


@ex.alternative("neighbours moved to two halves, turned there, and moved back")
def _(x, positions, base=10000.0):
    d_head = x.shape[-1]
    order = torch.cat((torch.arange(0, d_head, 2), torch.arange(1, d_head, 2)))
    first, second = x[..., order].chunk(2, dim=-1)
    angle = positions.unsqueeze(-1) / base ** (order[: d_head // 2].to(x) / d_head)
    turned = torch.cat(_forward(first, second, angle.cos(), angle.sin()), dim=-1)
    return turned[..., order.argsort()]


@ex.alternative("a loop over tokens and pairs, in place on a copy")
def _(x, positions, base=10000.0):
    turned = x.clone()
    for j in range(x.shape[2]):
        for i in range(x.shape[3] // 2):
            theta = positions[j] * base ** (-2 * i / x.shape[3])
            a, b = x[:, :, j, 2 * i], x[:, :, j, 2 * i + 1]
            turned[:, :, j, 2 * i] = a * torch.cos(theta) - b * torch.sin(theta)
            turned[:, :, j, 2 * i + 1] = a * torch.sin(theta) + b * torch.cos(theta)
    return turned


@ex.alternative("in float64, and back")
def _(x, positions, base=10000.0):
    return ROTARY(x.double(), positions.double(), base).to(x.dtype)


# --- 4. ALiBi ---------------------------------------------------------------------------------

ex = Exercise(
    "alibi",
    chapter="04_positional_encodings",
    title="ALiBi: the further, the fainter",
    minutes=15,
    difficulty=2,
    importance=3,
    batched=True,
    prompt=r"""
ALiBi (Press, Smith & Lewis 2022, §3) leaves tokens, queries and keys alone. It lowers each score by
the distance between query and key, with a slope of its own for each of the $h$ heads:

$$s'_{ij} = s_{ij} - m \cdot |\,p_j - p_i\,|, \qquad
  m = 2^{-8 \cdot \text{head} / h}, \quad \text{head} = 1, \dots, h$$

`scores` is `(batch, h, n_q, n_k)`, h a power of two. Keys stand at positions $0, \dots, n_k - 1$,
and the **last query stands at the last key**, also where n_q and n_k differ: so it is when new
queries meet the keys of a cache. Later keys are lowered by their distance just as earlier ones are
(the paper's model is causal and never sees them).
""",
    hints=(
        "If the last of n_q queries stands at position n_k - 1, where does the first one stand?",
        "The slopes are (h,) and the distances (n_q, n_k). Which shape must the slopes have to "
        "broadcast against (batch, h, n_q, n_k)?",
        "query = torch.arange(n_k - n_q, n_k); distance = (torch.arange(n_k) - query[:, None])"
        ".abs(); what is left are the slopes.",
    ),
)


@ex.solution
def alibi(scores: Tensor) -> Tensor:
    """Scores lowered by distance. scores: (batch, h, n_q, n_k), h a power of two -> same shape."""
    ### BEGIN SOLUTION
    _, h, n_q, n_k = scores.shape
    slope = 2.0 ** (-8 * torch.arange(1, h + 1).to(scores) / h)  # (h,)
    query = torch.arange(n_k - n_q, n_k).to(scores)  # (n_q,): the last one is at the last key
    key = torch.arange(n_k).to(scores)  # (n_k,)
    distance = (key - query[:, None]).abs()  # (n_k,) - (n_q, 1) -> (n_q, n_k)
    return scores - slope[:, None, None] * distance  # (h, 1, 1) * (n_q, n_k) -> (h, n_q, n_k)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    shapes = [
        (1, 2, 2, 3),
        (1, 1, 3, 3),
        (2, 4, 4, 4),  # h = n
        (2, 2, 3, 2),  # more queries than keys: the first one stands before all keys
        (1, 4, 1, 5),
        (1, 8, 2, 2),
        (1, 16, 2, 3),
        (3, 2, 3, 5),
    ]
    return [{"scores": normal(g, *shape)} for shape in shapes]


@ex.behaviour("a key at the query's own position keeps its score")
def _(answer):
    (scores,) = some(1, (1, 2, 3, 3))
    expect(answer(scores).diagonal(dim1=-2, dim2=-1), scores.diagonal(dim1=-2, dim2=-1))


@ex.behaviour("with 8 heads, one step away costs 1/2, 1/4, … 1/256")
def _(answer):
    case = {"scores": torch.zeros(1, 8, 2, 2)}
    expect(-answer.on(case)[0, :, 1, 0], 0.5 ** torch.arange(1, 9))


@ex.behaviour("with 2 heads the slopes are 1/16 and 1/256")
def _(answer):
    case = {"scores": torch.zeros(1, 2, 2, 2)}
    expect(-answer.on(case)[0, :, 1, 0], torch.tensor([1 / 16, 1 / 256]))


@ex.behaviour("each further step away costs the same")
def _(answer):
    steps = answer(torch.zeros(1, 4, 1, 300)).diff(dim=-1)
    expect(steps, steps[..., -1:].expand(1, 4, 1, 299))


@ex.behaviour("the last query, alone against all keys, gets what it got among the others")
def _(answer):
    (scores,) = some(2, (1, 2, 4, 4))
    expect(answer(scores[:, :, -1:]), answer(scores)[:, :, -1:])


@ex.behaviour("a key one step later is lowered as much as one a step earlier")
def _(answer):
    lowered = answer(torch.zeros(1, 2, 3, 3))
    expect(lowered, lowered.mT)


@ex.behaviour("what is taken off does not depend on the scores")
def _(answer):
    one, two = some(3, (2, 2, 2, 3), (2, 2, 2, 3))
    expect(answer(one) - one, answer(two) - two)


def _slopes(i: Tensor, h: int) -> Tensor:
    return 2.0 ** (-8 * i / h)


def _with_alibi(*, slopes=_slopes, away=None, combine=None, axis=(1, 1)) -> Function:
    """ALiBi with one part replaced; away(query (n_q, 1), key (n_k,), scores) is the distance."""

    def function(scores):
        h, n_q, n_k = scores.shape[1:]
        query = torch.arange(n_k - n_q, n_k).to(scores)[:, None]
        key = torch.arange(n_k).to(scores)
        distance = away(query, key, scores) if away else (key - query).abs()
        slope = slopes(torch.arange(1, h + 1).to(scores), h)
        penalty = slope.reshape(h, *axis) * distance
        return combine(scores, penalty) if combine else scores - penalty

    return function


POWER = "What are the slopes of 2 heads, by the formula, and what are yours?"
DISTANCE = "What is the distance from a query to the key at its own position, and to the next two?"

SLOPES = [
    Mistake(
        "with heads counted from 0",
        "The first head gets the slope 1, and the last slope of the formula is missing.",
        "From where to where does `head` run in the formula?",
        lambda i, h: 2.0 ** (-8 * (i - 1) / h),
    ),
    Mistake(
        "with the same slope for all heads",
        "Every head has the slope of the first one.",
        "What tells the heads apart?",
        lambda i, h: 2.0 ** (-8 * torch.ones_like(i) / h),
    ),
    Mistake(
        "with the slope 1 for all heads",
        "The slopes are missing: the distance itself is taken off.",
        "What is the distance multiplied by?",
        lambda i, h: torch.ones_like(i),
    ),
    Mistake(
        "with the slopes in reverse order",
        "The last head is the steepest instead of the first.",
        "Which head has the largest slope?",
        lambda i, h: _slopes(i, h).flip(0),
    ),
    Mistake(
        "with the slopes 1/2, 1/4, 1/8, … for any number of heads",
        "That is right for 8 heads only.",
        POWER,
        lambda i, h: 2.0**-i,
    ),
    Mistake(
        "with slopes that start at 2^(-8/h) and halve from head to head",
        "The first slope is right; the ratio of two neighbours is 1/2 for 8 heads only.",
        "By what is each slope multiplied to get the next one?",
        lambda i, h: 2.0 ** (-8 / h - (i - 1)),
    ),
    Mistake(
        "with the exponent -head/h",
        "The 8 is missing, so the slopes of all heads lie between 1/2 and 1.",
        POWER,
        lambda i, h: 2.0 ** (-i / h),
    ),
    Mistake(
        "with the exponent -8·head",
        "The number of heads is missing, so the later heads hardly have a slope.",
        POWER,
        lambda i, h: 2.0 ** (-8 * i),
    ),
    Mistake(
        "with the exponent -head·h/8",
        "The fraction is upside down.",
        POWER,
        lambda i, h: 2.0 ** (-i * h / 8),
    ),
    Mistake(
        "with slopes that grow",
        "The sign of the exponent is turned round.",
        "Is a slope of the formula above 1 or below?",
        lambda i, h: 2.0 ** (8 * i / h),
    ),
    Mistake(
        "with e instead of 2",
        "exp is a power of e.",
        "Is it `exp` or `exp2`?",
        lambda i, h: (-8 * i / h).exp(),
    ),
    Mistake(
        "with parentheses missing round the exponent",
        "Python takes the power first: `2 ** -8 * i / h` is 2^(-8) · i / h.",
        "What does Python make of `2 ** 2 * 3`?",
        lambda i, h: 2.0**-8 * i / h,
    ),
    Mistake(
        "with the exponent for the slope",
        "8 · head / h should be a power of 1/2, not a factor.",
        "What stands under the exponent?",
        lambda i, h: 8 * i / h,
    ),
    Mistake(
        "with the slope 1/head",
        "The slopes form a geometric series, not 1, 1/2, 1/3, ….",
        POWER,
        lambda i, h: 1 / i,
    ),
]

PLACED = "At which position does the last query stand, and where does that put query 0?"

AWAY = [
    Mistake(
        "with query i at position i",
        "Queries and keys are aligned at the first one; the last query should be at the last key.",
        PLACED,
        lambda q, k, s: (k - q + q[0]).abs(),
    ),
    Mistake(
        "with query 0 at position n_q - n_k",
        "The difference of the lengths has the wrong sign.",
        PLACED,
        lambda q, k, s: (k - q + 2 * q[0]).abs(),
    ),
    Mistake(
        "with the last query one position behind the last key",
        "Each query is put a position too far on, as if its own key were missing.",
        PLACED,
        lambda q, k, s: (k - q - 1).abs(),
    ),
    Mistake(
        "with the squares of the distances",
        "The penalty grows ever faster instead of linearly.",
        DISTANCE,
        lambda q, k, s: (k - q).square(),
    ),
    Mistake(
        "with the roots of the distances",
        "The penalty grows ever slower instead of linearly.",
        DISTANCE,
        lambda q, k, s: (k - q).abs().sqrt(),
    ),
    Mistake(
        "with the logarithms of the distances",
        "The penalty grows ever slower instead of linearly.",
        DISTANCE,
        lambda q, k, s: (k - q).abs().log1p(),
    ),
    Mistake(
        "with distances that are negative for later keys",
        "That is right for earlier keys, but later ones are raised instead of lowered.",
        "What is the distance to a key that stands after the query?",
        lambda q, k, s: q - k,
    ),
    Mistake(
        "with distances that are negative for earlier keys",
        "Earlier keys are raised instead of lowered.",
        "What is the distance to a key that stands before the query?",
        lambda q, k, s: k - q,
    ),
    Mistake(
        "with no penalty for later keys",
        "Their distance is cut off at 0, which only a causal mask would hide.",
        "What is the distance to a key that stands after the query?",
        lambda q, k, s: (q - k).clamp(min=0),
    ),
    Mistake(
        "with no penalty for earlier keys",
        "Their distance is cut off at 0.",
        "What is the distance to a key that stands before the query?",
        lambda q, k, s: (k - q).clamp(min=0),
    ),
    Mistake(
        "with 1 added to every distance",
        "A key at the query's own position is at distance 0.",
        DISTANCE,
        lambda q, k, s: (k - q).abs() + 1,
    ),
    Mistake(
        "with the first step free",
        "The distance is one too small wherever it is above 0.",
        DISTANCE,
        lambda q, k, s: ((k - q).abs() - 1).clamp(min=0),
    ),
    Mistake(
        "with every other position at distance 1",
        "How far away a key stands has no effect.",
        DISTANCE,
        lambda q, k, s: (k != q).to(s),
    ),
    Mistake(
        "with the distances divided by the number of keys",
        "The same distance costs less in a longer text.",
        "Does the penalty of a key depend on how many others there are?",
        lambda q, k, s: (k - q).abs() / len(k),
    ),
    Mistake(
        "with distances from the last key, whatever the query",
        "Every query gets the penalties of the last one; softmax forgives that for earlier keys "
        "only.",
        "Do the distances differ from query to query?",
        lambda q, k, s: (len(k) - 1 - k).expand(s.shape[-2:]),
    ),
    Mistake(
        "with the position of the key for the distance",
        "Where the query stands has no effect.",
        "Do the distances differ from query to query?",
        lambda q, k, s: k.expand(s.shape[-2:]),
    ),
    Mistake(
        "with the position of the query for the distance",
        "Where the key stands has no effect.",
        "Do the distances differ from key to key?",
        lambda q, k, s: q.expand(s.shape[-2:]),
    ),
]

ALIBI = _with_alibi()

ex.mistakes_from(SLOPES, "ALiBi", lambda part: _with_alibi(slopes=part))
ex.mistakes_from(AWAY, "ALiBi", lambda part: _with_alibi(away=part))
ex.mistake(
    "ALiBi with the penalty added",
    "Far keys are raised instead of lowered.",
    "Should a far key score higher or lower?",
)(_with_alibi(combine=lambda s, p: s + p))
ex.mistake(
    "ALiBi with the position of the key added (as in BLOOM)",
    "That differs from the penalty by one number per row, which softmax forgives only where no "
    "later key is seen.",
    "What is taken off the score of a key at the query's own position?",
)(_with_alibi(away=lambda q, k, s: -k.expand(s.shape[-2:])))
ex.mistake(
    "ALiBi with the scores multiplied by the penalty",
    "A penalty of 0 then wipes out the score of the nearest key.",
    "Is the penalty a factor or a term?",
)(_with_alibi(combine=lambda s, p: s * p))
ex.mistake(
    "ALiBi with the scores multiplied by 1 minus the penalty",
    "A negative score is raised by that.",
    "Is the penalty a factor or a term?",
)(_with_alibi(combine=lambda s, p: s * (1 - p)))
ex.mistake(
    "the penalties without the scores",
    "The scores have no effect.",
    "What is the penalty taken off?",
)(_with_alibi(combine=lambda s, p: -p.expand(s.shape)))
ex.mistake(
    "the softmax of the lowered scores",
    "Softmax is a step too far: it comes after the mask.",
    "Does the formula of this exercise contain a softmax?",
)(_with_alibi(combine=lambda s, p: (s - p).softmax(-1)))
ex.mistake(
    "ALiBi under a causal mask",
    "Later keys are hidden; nothing in this exercise asks for that.",
    "What does the formula do to a later key?",
)(_with_alibi(combine=lambda s, p: (s - p).masked_fill(_later(s), -INF)))
ex.mistake(
    "ALiBi with a slope for each query",
    "The slopes lie along the queries instead of the heads.",
    "Counted from the end, which dimension of the scores holds the heads?",
)(_with_alibi(axis=(1,)))
ex.mistake(
    "ALiBi with a slope for each key",
    "The slopes lie along the keys instead of the heads.",
    "Counted from the end, which dimension of the scores holds the heads?",
)(_with_alibi(axis=()))
ex.mistake(
    "ALiBi on the first head alone",
    "The scores of the other heads stay as they were.",
    "Has each head a slope?",
)(_with_alibi(slopes=lambda i, h: _slopes(i, h) * (i == 1)))


def _later(scores: Tensor) -> Tensor:
    n_q, n_k = scores.shape[-2:]
    return torch.ones(n_q, n_k, dtype=torch.bool).triu(n_k - n_q + 1)


@ex.alternative("course_lib's AlibiBias")
def _(scores):
    bias = AlibiBias(scores.shape[1])
    return scores + bias(*scores.shape[-2:], dtype=scores.dtype, device=scores.device)


@ex.alternative("a loop over heads, queries and keys")
def _(scores):
    _, h, n_q, n_k = scores.shape
    result = scores.clone()
    for head in range(h):
        for i in range(n_q):
            for j in range(n_k):
                away = abs(j - (i + n_k - n_q))
                result[:, head, i, j] -= 2 ** (-8 * (head + 1) / h) * away
    return result


@ex.alternative("a geometric series of slopes, distances counted back from the end")
def _(scores):
    _, h, n_q, n_k = scores.shape
    ratio = 2 ** (-8 / h)
    slopes = torch.tensor([ratio ** (k + 1) for k in range(h)], dtype=scores.dtype)
    before = torch.arange(-n_k + 1, 1)[None] - torch.arange(-n_q + 1, 1)[:, None]
    return scores - torch.einsum("h,qk->hqk", slopes, before.abs().to(scores.dtype))


@ex.alternative("a cumulative product of slopes, earlier and later keys one by one")
def _(scores):
    h, n_q, n_k = scores.shape[1:]
    slope = torch.full((h,), 0.5 ** (8 / h), dtype=scores.dtype).cumprod(0).view(1, h, 1, 1)
    q, k = torch.meshgrid(torch.arange(n_q), torch.arange(n_k), indexing="ij")
    ahead = (k - q - (n_k - n_q)).to(scores.dtype)
    return torch.where(ahead > 0, scores - slope * ahead, scores + slope * ahead)


@ex.alternative("in float64, and back")
def _(scores):
    return ALIBI(scores.double()).to(scores.dtype)


# --- 5. Shaw's relative scores ----------------------------------------------------------------

ex = Exercise(
    "shaw_scores",
    chapter="04_positional_encodings",
    title="A learned vector for each distance",
    minutes=20,
    difficulty=3,
    importance=3,
    points=2,
    batched=True,
    prompt=r"""
Shaw, Uszkoreit & Vaswani (2018, §3.2) add to every key a learned vector that depends on how far it
stands from the query. Far distances share one: everything beyond $k$ counts as $k$.

$$s_{ij} = \frac{q_i \cdot \left(k_j + a_{\text{clip}(j - i)}\right)}{\sqrt{d_k}}, \qquad
  \text{clip}(r) = \max(-k, \min(k, r))$$

`query` and `key` are `(batch, n, d_k)`. `table` is `(2k + 1, d_k)` and holds
$a_{-k}, \dots, a_0, \dots, a_k$ in this order: $a_0$ is its middle row, and k is to be read off
its shape (it may be 0). The result is `(batch, n, n)`. Note what the root divides.
""",
    hints=(
        "Which row of the table belongs to distance -k, which to 0, and which to k?",
        "The product splits: q·k is the score you know, and q·a needs one vector for each pair "
        "(i, j), a tensor (n, n, d_k) that you get by indexing the table with a matrix.",
        "place = torch.einsum('bid,ijd->bij', query, table[index]); the index is the clipped "
        "distance, moved so that it starts at 0.",
    ),
)


@ex.solution
def shaw_scores(query: Tensor, key: Tensor, table: Tensor) -> Tensor:
    """Scaled scores with a learned vector for each clipped distance.

    query and key: (batch, n, d_k), table: (2k + 1, d_k), a_-k first -> (batch, n, n).
    """
    ### BEGIN SOLUTION
    n, d_k = query.shape[-2:]
    k = len(table) // 2
    position = torch.arange(n, device=query.device)
    distance = position - position[:, None]  # j - i: (n,) - (n, 1) -> (n, n)
    a = table[distance.clamp(-k, k) + k]  # (n, n, d_k): row 0 of the table is distance -k
    content = query @ key.mT  # (batch, n, d_k) x (batch, d_k, n) -> (batch, n, n)
    place = torch.einsum("bid,ijd->bij", query, a)  # (batch, n, d_k) x (n, n, d_k)
    return (content + place) / math.sqrt(d_k)  # (batch, n, n)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, n: int, d_k: int, k: int) -> Case:
        query, key = normal(g, batch, n, d_k), normal(g, batch, n, d_k)
        return {"query": query, "key": key, "table": normal(g, 2 * k + 1, d_k)}

    return [
        case(1, 2, 2, 1),
        case(2, 3, 4, 1),
        case(1, 4, 1, 1),
        case(2, 1, 3, 2),
        case(2, 3, 4, 0),  # one vector for all distances
        case(1, 5, 5, 2),
        case(3, 3, 3, 3),  # nothing to clip
        case(2, 5, 2, 1),
        case(3, 4, 2, 2),
    ]


def _only_place(table: Tensor, n: int) -> Case:
    """Queries of ones, no content: the scores are the table's entries."""
    ones = torch.ones(1, n, table.shape[-1])
    return {"query": ones, "key": torch.zeros_like(ones), "table": table}


@ex.behaviour("with a table of zeros they are the scaled scores of chapter 02")
def _(answer):
    query, key = some(1, (1, 3, 4), (1, 3, 4))
    expect(answer(query, key, torch.zeros(3, 4)), query @ key.mT / 2)


@ex.behaviour("a later key reads a later row of the table")
def _(answer):
    case = _only_place(torch.tensor([[-1.0], [0.0], [1.0]]), 2)
    expect(answer.on(case), torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]), case=case)


@ex.behaviour("all distances beyond k share the vector of k")
def _(answer):
    case = _only_place(torch.tensor([[5.0], [0.0], [7.0]]), 4)
    want = torch.tensor([[[0, 7, 7, 7], [5, 0, 7, 7], [5, 5, 0, 7], [5, 5, 5, 0.0]]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("the root divides the products with keys and with the table alike")
def _(answer):
    case = _only_place(torch.ones(3, 4), 2)
    expect(answer.on(case), torch.full((1, 2, 2), 2.0), case=case)


@ex.behaviour("a vector added to all rows of the table acts as if added to all keys")
def _(answer):
    query, key, table, more = some(2, (2, 3, 4), (2, 3, 4), (3, 4), (4,))
    expect(answer(query, key, table + more), answer(query, key + more, table))


@ex.behaviour("tokens that are all alike score by distance only")
def _(answer):
    token, table = some(3, (1, 1, 2), (5, 2))
    scores = answer(token.expand(1, 4, 2), token.expand(1, 4, 2), table)
    expect(scores[:, 1:, 1:], scores[:, :-1, :-1])


@ex.behaviour("doubling a query doubles its scores")
def _(answer):
    query, key, table = some(4, (1, 3, 2), (1, 3, 2), (3, 2))
    expect(answer(2 * query, key, table), 2 * answer(query, key, table))


@ex.behaviour("batch elements do not meet")
def _(answer):
    query, key, table = some(5, (3, 3, 2), (3, 3, 2), (3, 2))
    expect(answer(query, key, table)[1:], answer(query[1:], key[1:], table))


def _root(x: Tensor) -> float:
    return math.sqrt(x.shape[-1])


def _row(distance: Tensor, k: int) -> Tensor:
    return distance.clamp(-k, k) + k


def _with_shaw(*, row=_row, combine=None) -> Function:
    """Relative scores with one part replaced: row(j - i, k), combine(content, place, q, k, a)."""

    def function(query, key, table):
        i = torch.arange(query.shape[1])
        a = table[row(i - i[:, None], len(table) // 2)]  # (n, n, d_k)
        content, place = query @ key.mT, torch.einsum("bid,ijd->bij", query, a)
        if combine:
            return combine(content, place, query, key, a)
        return (content + place) / _root(query)

    return function


def _scaled(factor: Function) -> Function:
    return _with_shaw(combine=lambda content, place, q, k, a: (content + place) * factor(q, k))


LOOKUP = "Which row of the table belongs to distance -k, which to 0, and which to k?"
DIRECTION = "For a key that stands after the query, is j - i positive or negative?"

ROWS = [
    Mistake(
        "with i - j for j - i",
        "Later keys read the vectors of earlier ones, or the table is read backwards.",
        DIRECTION,
        lambda r, k: (-r).clamp(-k, k) + k,
    ),
    Mistake(
        "with the direction of the distance lost",
        "Keys before and after the query share the vectors of the later ones.",
        DIRECTION,
        lambda r, k: r.abs().clamp(max=k) + k,
    ),
    Mistake(
        "with the direction of the distance lost, from row 0 on",
        "The size of the distance picks the row, as if the table began at a_0.",
        LOOKUP,
        lambda r, k: r.abs().clamp(max=k),
    ),
    Mistake(
        "with the table indexed without + k",
        "A negative index counts from the end of the table, so no error tells you.",
        LOOKUP,
        lambda r, k: r.clamp(-k, k),
    ),
    Mistake(
        "with the distance wrapped round instead of clipped",
        "Beyond k, modulo starts again at the other end of the table.",
        "What should happen to a distance of k + 1?",
        lambda r, k: (r + k) % (2 * k + 1),
    ),
    Mistake(
        "with the distance clipped on one side only",
        "A distance below -k gives a negative index, which counts from the end of the table.",
        "Which two ends has the clip?",
        lambda r, k: r.clamp(max=k) + k,
    ),
    Mistake(
        "with the distance clipped at k - 1",
        "The outermost vectors of the table are never read.",
        "Which distance does the last row of the table belong to?",
        lambda r, k: r.clamp(-max(k - 1, 0), max(k - 1, 0)) + k,
    ),
    Mistake(
        "with the distance clipped from -k to k - 1",
        "The last vector of the table is never read; `range` leaves its end out, `clamp` does not.",
        "Which distance does the last row of the table belong to?",
        lambda r, k: r.clamp(-k, max(k - 1, -k)) + k,
    ),
    Mistake(
        "with the distance clipped before it is moved: from 0 to 2k",
        "Every earlier key counts as distance 0, before k is added.",
        "Is the distance clipped to -k … k, or the row to 0 … 2k?",
        lambda r, k: (r.clamp(0, 2 * k) + k).clamp(max=2 * k),
    ),
    Mistake(
        "with the row clipped to 0 … 2k, but without + k",
        "Row 0 of the table belongs to distance -k, not to 0.",
        LOOKUP,
        lambda r, k: r.clamp(0, 2 * k),
    ),
    Mistake(
        "with the middle row of the table for all distances",
        "The distance has no effect.",
        LOOKUP,
        lambda r, k: torch.full_like(r, k),
    ),
    Mistake(
        "with the position of the key for the distance",
        "Where the query stands has no effect.",
        "What is subtracted from j?",
        lambda r, k: r[:1].expand_as(r).clamp(-k, k) + k,
    ),
    Mistake(
        "with the position of the query for the distance",
        "Where the key stands has no effect.",
        "What is i subtracted from?",
        lambda r, k: (-r[:, :1]).expand_as(r).clamp(-k, k) + k,
    ),
]

ROOT = "What does the root divide: one product, or the sum of both?"
WHO = "Which vector does a_(j-i) meet in the formula: q_i or k_j?"

# Ways to put the parts together: (content, place, query, key, a) -> scores.
SUMS = [
    Mistake(
        "with the distances added after the scale",
        "q · a is not divided by √d_k, so it speaks √d_k times as loud.",
        ROOT,
        lambda content, place, q, k, a: content / _root(q) + place,
    ),
    Mistake(
        "with the distances alone scaled",
        "q · k is not divided by √d_k.",
        ROOT,
        lambda content, place, q, k, a: content + place / _root(q),
    ),
    Mistake(
        "with the distances scaled twice",
        "q · a is divided by d_k, q · k by its root.",
        ROOT,
        lambda content, place, q, k, a: content / _root(q) + place / q.shape[-1],
    ),
    Mistake(
        "scaled by 1/√(2 d_k)",
        "The number of terms has entered the root, as it does in DeBERTa.",
        "What stands under the root in the formula?",
        lambda content, place, q, k, a: (content + place) / math.sqrt(2 * q.shape[-1]),
    ),
    Mistake(
        "without the distances",
        "The table has no effect.",
        "Where does `table` enter your answer?",
        lambda content, place, q, k, a: content / _root(q),
    ),
    Mistake(
        "without the content",
        "The keys have no effect.",
        "Where does `key` enter your answer?",
        lambda content, place, q, k, a: place / _root(q),
    ),
    Mistake(
        "with the distances subtracted",
        "The vectors of the table have the wrong sign.",
        "Is a added to the key or taken from it?",
        lambda content, place, q, k, a: (content - place) / _root(q),
    ),
    Mistake(
        "with the key times the table",
        "a was added to the query (or multiplied by the key) instead of to the key.",
        WHO,
        lambda content, place, q, k, a: (content + _by_key(k, a)) / _root(q),
    ),
    Mistake(
        "with the table added to query and key",
        "Then (q + a)·(k + a) has two terms too many.",
        WHO,
        lambda content, place, q, k, a: (
            (content + place + _by_key(k, a) + a.square().sum(-1)) / _root(q)
        ),
    ),
    Mistake(
        "with query and key both times the table",
        "There is a term too many: k · a.",
        WHO,
        lambda content, place, q, k, a: (content + place + _by_key(k, a)) / _root(q),
    ),
    Mistake(
        "with query j times the table",
        "The score of query i must not depend on query j.",
        "Which index does the query have in q · a: that of the row, or that of the column?",
        lambda content, place, q, k, a: (content + torch.einsum("bjd,ijd->bij", q, a)) / _root(q),
    ),
    Mistake(
        "with the sum of a's entries added, without the query",
        "That is a number for each distance, as in T5; here the query decides what a is worth.",
        WHO,
        lambda content, place, q, k, a: (content + a.sum(-1)) / _root(q),
    ),
    Mistake(
        "with keys multiplied by the table",
        "k and a are multiplied entry by entry instead of added.",
        "Is a a term or a factor?",
        lambda content, place, q, k, a: torch.einsum("bid,bjd,ijd->bij", q, k, a) / _root(q),
    ),
    Mistake(
        "with the content transposed",
        "Row i of the content holds key i against all queries.",
        "Which of the two stands on the left of the product?",
        lambda content, place, q, k, a: (content.mT + place) / _root(q),
    ),
    Mistake(
        "with the distances transposed",
        "Row i of the place term belongs to query j.",
        "Which index of a is the query's?",
        lambda content, place, q, k, a: (content + place.mT) / _root(q),
    ),
    Mistake(
        "transposed",
        "Row i holds key i against all queries.",
        "Which index of the result is the query's?",
        lambda content, place, q, k, a: (content + place).mT / _root(q),
    ),
    Mistake(
        "after a softmax",
        "Softmax is a step too far: scores come first.",
        "Does the formula of this exercise contain a softmax?",
        lambda content, place, q, k, a: ((content + place) / _root(q)).softmax(-1),
    ),
    Mistake(
        "under a causal mask",
        "Later keys are hidden; nothing in this exercise asks for that.",
        "May query 0 be compared with key 1 here?",
        lambda content, place, q, k, a: ((content + place) / _root(q)).masked_fill(
            _later(content), -INF
        ),
    ),
    Mistake(
        "with the distances of all queries summed up",
        "q · a is summed over a dimension that should stay.",
        "Which indices of `bid,ijd->bij` are summed, and which are kept?",
        lambda content, place, q, k, a: (content + place.sum(1, keepdim=True)) / _root(q),
    ),
]


def _by_key(key: Tensor, a: Tensor) -> Tensor:
    return torch.einsum("bjd,ijd->bij", key, a)


SHAW = _with_shaw()
SAME_HERE = "scaled by the number of queries"  # there are as many queries as keys

ex.mistakes_from([m for m in SCALES if m.name != SAME_HERE], "the relative scores", _scaled)
ex.mistakes_from(ROWS, "the relative scores", lambda part: _with_shaw(row=part))
ex.mistakes_from(SUMS, "the relative scores", lambda part: _with_shaw(combine=part))
ex.mistake(
    "the relative scores scaled by the size of the table",
    "√(2k + 1) stands where √d_k should.",
    "Which entry of `table.shape` is d_k?",
)(lambda q, k, t: SHAW(q, k, t) * _root(q) / math.sqrt(len(t)))


@ex.alternative("query times table, then gathered")
def _(query, key, table):
    n, k = query.shape[1], table.shape[0] // 2
    by_distance = query @ table.T  # (batch, n, 2k + 1)
    index = (torch.arange(n)[None, :] - torch.arange(n)[:, None] + k).clamp(0, 2 * k)
    place = by_distance.gather(2, index.expand(len(query), n, n))
    return (query.bmm(key.transpose(1, 2)) + place) * query.shape[-1] ** -0.5


@ex.alternative("a loop over queries and keys")
def _(query, key, table):
    n, k = query.shape[1], (table.shape[0] - 1) // 2
    rows = []
    for i in range(n):
        row = []
        for j in range(n):
            a = table[max(-k, min(k, j - i)) + k]
            row.append((query[:, i] * (key[:, j] + a)).sum(-1))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, 1) / math.sqrt(query.shape[-1])


@ex.alternative("the formula as it stands: a key for each pair")
def _(query, key, table):
    k = len(table) // 2
    i = torch.arange(query.shape[1])
    keys = key[:, None] + table[(i[None] - i[:, None]).clamp(-k, k) + k]  # (batch, n, n, d_k)
    return (query[:, :, None] / math.sqrt(query.shape[-1]) * keys).sum(-1)


@ex.alternative("the table continued at both ends, and a window of it for each query")
def _(query, key, table):
    n, k = query.shape[1], len(table) // 2
    more = max(n - 1 - k, 0)
    longer = torch.cat((table[:1].expand(more, -1), table, table[-1:].expand(more, -1)))
    centre = k + more
    a = torch.stack([longer[centre - i : centre - i + n] for i in range(n)])  # (n, n, d_k)
    return (query @ key.mT + (a @ query[..., None]).squeeze(-1)) / math.sqrt(query.shape[-1])


@ex.alternative("one-hot distances")
def _(query, key, table):
    n, k = query.shape[1], len(table) // 2
    index = torch.ones(n, n).cumsum(1).sub(torch.ones(n, n).cumsum(0)).clamp(-k, k).long() + k
    a = torch.einsum("ijr,rd->ijd", F.one_hot(index, 2 * k + 1).to(table.dtype), table)
    place = torch.einsum("bid,ijd->bij", query, a)
    return (torch.einsum("bid,bjd->bij", query, key) + place).div(query.shape[-1] ** 0.5)


@ex.alternative("in float64, and back")
def _(query, key, table):
    return SHAW(query.double(), key.double(), table.double()).to(query.dtype)
