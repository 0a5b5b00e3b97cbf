"""Exercises of chapter 05: norms, the feed-forward network, and a block that stacks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import expect
from ._inputs import normal, some


def _weights(g: torch.Generator, *shape: int) -> Tensor:
    """Numbers far from 0 and from 1 in absolute value: 1.2 to 2.1 or -2.1 to -1.2."""
    size = 1.2 + torch.randint(0, 10, shape, generator=g) / 10
    return ((size * (torch.rand(shape, generator=g) - 0.4).sign()) * 10).round() / 10


SHAPES = [(2, 3), (4,), (3, 3), (3, 4), (2, 2, 3, 4), (3, 3, 3), (3, 4, 5)]
"""Of x for both norms: the smallest first, a batch last."""

# --- wrong parts that both norms share --------------------------------------------------------

WIDTH = "The width d is the last dimension: how do you name it, however many stand before it?"
ALONE = "Should the numbers of one token depend on another token?"

# The dimensions that the statistics run over: x -> dimensions.
AXES = [
    Mistake(
        "over the tokens",
        "Each feature is normalised along the sequence.",
        ALONE,
        lambda x: -2,
    ),
    Mistake(
        "over the first dimension",
        "Each number is normalised against its place in the other batch elements.",
        ALONE,
        lambda x: 0,
    ),
    Mistake(
        "over dimension 1, counted from the front",
        "It is right for a matrix and wrong once a batch dimension stands before it.",
        WIDTH,
        lambda x: 1,
    ),
    Mistake(
        "over all entries at once",
        "The statistics are those of the whole tensor, so every token depends on every other.",
        "Over which dimension should the mean run, and does it keep that dimension?",
        lambda x: tuple(range(x.ndim)),
    ),
    Mistake(
        "over tokens and features together",
        "The statistics run over the last two dimensions, so the tokens of a sequence are tied.",
        ALONE,
        lambda x: (-2, -1),
    ),
    Mistake(
        "over everything but the first dimension",
        "It is right for a matrix; in a batch of sequences it ties the tokens together.",
        WIDTH,
        lambda x: tuple(range(1, x.ndim)),
    ),
    Mistake(
        "over everything but the last dimension (that is batch norm)",
        "Each feature is normalised over all tokens of the batch, instead of each token over its "
        "features.",
        ALONE,
        lambda x: tuple(range(x.ndim - 1)) or -1,
    ),
]

ROOT = "What exactly stands under the root?"


def _mean_square(z: Tensor) -> Tensor:
    return z.square().mean(-1, keepdim=True)


# What is divided by: (numbers about their centre, ε) -> divisor.
DIVISORS = [
    Mistake(
        "without ε",
        "A token without any spread is 0 / 0, which is NaN.",
        "Where does `eps` enter?",
        lambda z, eps: _mean_square(z).sqrt(),
    ),
    Mistake(
        "with ε outside the root",
        "√v + ε and √(v + ε) differ where ε is not small beside v.",
        "Is ε added before the root is taken, or after?",
        lambda z, eps: _mean_square(z).sqrt() + eps,
    ),
    Mistake(
        "with a fixed ε of 1e-5",
        "The argument eps has no effect.",
        "Where does `eps` enter?",
        lambda z, eps: (_mean_square(z) + 1e-5).sqrt(),
    ),
    Mistake(
        "with a fixed ε of 1e-6",
        "The argument eps has no effect.",
        "Where does `eps` enter?",
        lambda z, eps: (_mean_square(z) + 1e-6).sqrt(),
    ),
    Mistake(
        "with ε squared",
        "ε² stands under the root where ε should.",
        ROOT,
        lambda z, eps: (_mean_square(z) + eps**2).sqrt(),
    ),
    Mistake(
        "with ε subtracted",
        "A token whose spread is below ε has a negative number under the root.",
        "Which sign does ε have?",
        lambda z, eps: (_mean_square(z) - eps).sqrt(),
    ),
    Mistake(
        "with ε as a lower bound under the root",
        "The larger of the two stands under the root instead of their sum.",
        "Is ε added, or does it replace what is below it?",
        lambda z, eps: _mean_square(z).clamp(min=eps).sqrt(),
    ),
    Mistake(
        "with ε as a lower bound of the root",
        "The larger of the two is the divisor, and ε stands outside the root.",
        "Is ε added, or does it replace what is below it?",
        lambda z, eps: _mean_square(z).sqrt().clamp(min=eps),
    ),
    Mistake(
        "with ε both inside and outside the root",
        "ε is added twice.",
        "How often does ε stand in the formula?",
        lambda z, eps: (_mean_square(z) + eps).sqrt() + eps,
    ),
    Mistake(
        "with the sum of squares instead of their mean",
        "The divisor grows with the width: the result is too small by √d.",
        "Sum, or mean?",
        lambda z, eps: (z.square().sum(-1, keepdim=True) + eps).sqrt(),
    ),
    Mistake(
        "with the sum of squares divided by the first dimension",
        "`shape[0]` is the number of rows or batch elements, not the width.",
        WIDTH,
        lambda z, eps: (z.square().sum(-1, keepdim=True) / z.shape[0] + eps).sqrt(),
    ),
    Mistake(
        "with the sum of squares divided by dimension 1, counted from the front",
        "It is right for a matrix and wrong once a batch dimension stands before it.",
        WIDTH,
        lambda z, eps: (z.square().sum(-1, keepdim=True) / z.shape[1] + eps).sqrt(),
    ),
    Mistake(
        "with the Euclidean length as divisor (F.normalize)",
        "The squares of the result sum to 1, but their mean should be 1.",
        "What is the mean of the squares of your result, for a weight of 1?",
        lambda z, eps: z.norm(dim=-1, keepdim=True).clamp(min=1e-12),
    ),
    Mistake(
        "with the Euclidean length over d as divisor",
        "The mean is taken after the root: √(Σ z²) / d instead of √(Σ z² / d).",
        "Is the mean taken before the root, or after?",
        lambda z, eps: (z.square().sum(-1, keepdim=True) + eps).sqrt() / z.shape[-1],
    ),
    Mistake(
        "without the root",
        "A token ten times as large comes out ten times as small.",
        "Which function turns a mean of squares into a size?",
        lambda z, eps: _mean_square(z) + eps,
    ),
    Mistake(
        "with the root taken twice",
        "The fourth root stands where the square root should.",
        "How often is the root taken?",
        lambda z, eps: (_mean_square(z) + eps).sqrt().sqrt(),
    ),
    Mistake(
        "with the mean of the absolute values as divisor",
        "Absolute values stand where squares and a root should.",
        ROOT,
        lambda z, eps: z.abs().mean(-1, keepdim=True) + eps,
    ),
    Mistake(
        "with the largest absolute value as divisor",
        "Only one feature decides how large the token is.",
        "How does every feature count towards the size?",
        lambda z, eps: z.abs().amax(-1, keepdim=True) + eps,
    ),
    Mistake(
        "multiplied instead of divided",
        "A large token becomes still larger.",
        "`sqrt` or `rsqrt`: should a large token come out larger or smaller than it was?",
        lambda z, eps: (_mean_square(z) + eps).rsqrt(),
    ),
    Mistake(
        "without any division",
        "A large token stays large.",
        "What brings every token to the same size?",
        lambda z, eps: 1.0,
    ),
    Mistake(
        "with the root without keepdim",
        "The mean lost its dimension and is broadcast along the wrong one, or not at all.",
        "What shape does `square.mean(dim=-1)` have, and what shape must it have?",
        lambda z, eps: (z.square().mean(-1) + eps).sqrt(),
    ),
]

# What weight and bias do in the end: (normalised, weight, bias) -> result.
AFFINES = [
    Mistake(
        "without the weight",
        "The argument weight has no effect.",
        "Where does `weight` enter?",
        lambda z, w, b: z + b,
    ),
    Mistake(
        "with 1 + weight",
        "A weight of 1 doubles the result.",
        "With which weight should a normalised token stay as it is: 0 or 1?",
        lambda z, w, b: z * (1 + w) + b,
    ),
    Mistake(
        "divided by the weight",
        "The weight is upside down.",
        "Should a larger weight give a larger result or a smaller one?",
        lambda z, w, b: z / w + b,
    ),
    Mistake(
        "with the weight added instead of multiplied",
        "The weight shifts the features instead of scaling them.",
        "Which of `+` and `*` stands before the weight?",
        lambda z, w, b: z + w + b,
    ),
]


# --- 1. layer norm ----------------------------------------------------------------------------

ex = Exercise(
    "layer_norm",
    chapter="05_residual_and_layer_norm",
    title="Layer norm",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
Layer norm gives every token the mean 0 and the variance 1, then lets the model choose another scale
and another shift for each feature:

$$\mathrm{LayerNorm}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} \cdot w + b, \qquad
  \mu = \frac{1}{d} \sum_i x_i, \qquad \sigma^2 = \frac{1}{d} \sum_i (x_i - \mu)^2$$

- `x` has shape `(..., d)`: mean and variance run over the **last** dimension, for each token by
  itself. `weight` and `bias` have shape `(d,)`.
- The variance divides by $d$, not by $d - 1$.
- $\varepsilon$ stands **inside** the root. It matters where a token has hardly any variance: one
  whose features are all equal comes out as `bias`, never as NaN.

Write it without `F.layer_norm` to learn something.
""",
    hints=(
        "Which numbers share one mean: a row of x, a column, or all of them?",
        "Subtract the mean first; the variance is then the mean of the squares of what is left. "
        "With keepdim=True a statistic has shape (..., 1) and fits to x again.",
        "centred = x - x.mean(dim=-1, keepdim=True); what must be done to `centred` to get the "
        "variance, and where does eps go?",
    ),
)


@ex.solution
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension (Ba, Kiros & Hinton 2016, §3).

    x: (..., d), weight and bias: (d,), eps > 0 -> (..., d).
    """
    ### BEGIN SOLUTION
    centred = x - x.mean(dim=-1, keepdim=True)  # (..., d) - (..., 1)
    variance = centred.square().mean(dim=-1, keepdim=True)  # (..., 1): divides by d
    normalised = centred / torch.sqrt(variance + eps)  # (..., d) / (..., 1)
    return normalised * weight + bias  # (..., d) * (d,) + (d,)
    ### END SOLUTION


def _flat_first_row(x: Tensor, value: float) -> Tensor:
    """x with its first row the same number everywhere."""
    x = x.clone()
    x[0] = value
    return x


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(x: Tensor, **options: float) -> Case:
        d = x.shape[-1]
        return {"x": x, "weight": _weights(g, d), "bias": normal(g, d), **options}

    smallest, *others = [case(1 + 2 * normal(g, *shape)) for shape in SHAPES]
    far = 300 + torch.randint(-128, 129, (3, 4), generator=g) / 64  # float32 holds its mean exactly
    return [
        smallest,
        case(1 + normal(g, 2, 3), eps=0.5),
        case(1 + normal(g, 2, 4), eps=3.0),
        case(_flat_first_row(normal(g, 2, 4), 0.5)),
        case(normal(g, 3, 4) / 256),  # the variance is about ε
        case(normal(g, 3, 4) / 256, eps=1e-9),
        case(far),
        case(normal(g, 3, 1), eps=0.5),
        *others,
    ]


def _unit(d: int) -> tuple[Tensor, Tensor]:
    """Weight and bias that change nothing."""
    return torch.ones(d), torch.zeros(d)


def _spread(seed: int, *shape: int) -> Tensor:
    """Tokens with a mean and a spread far from 0 and 1."""
    return 3 + 5 * some(seed, shape)[0]


@ex.behaviour("with weight 1 and bias 0 each token has the mean 0")
def _(answer):
    got = answer(_spread(1, 2, 3, 8), *_unit(8))
    expect(got.mean(-1), torch.zeros(2, 3))


@ex.behaviour("with weight 1 and bias 0 each token has the variance 1, divided by d")
def _(answer):
    got = answer(_spread(2, 2, 3, 8), *_unit(8))
    expect(got.var(-1, correction=0), torch.ones(2, 3))


@ex.behaviour("a token whose features are all equal comes out as the bias")
def _(answer):
    bias = torch.tensor([0.5, -1.0])
    case = {"x": torch.full((1, 2), 0.5), "weight": torch.ones(2), "bias": bias}
    expect(answer.on(case), bias[None], case=case)


@ex.behaviour("with a variance of 1, eps = 3 makes the result half as large")
def _(answer):
    case = {"x": torch.tensor([[1.0, 3.0]]), "weight": torch.ones(2), "bias": torch.zeros(2)}
    case["eps"] = 3.0
    expect(answer.on(case), torch.tensor([[-0.5, 0.5]]), case=case)


@ex.behaviour("the same number added to all features of a token changes nothing")
def _(answer):
    x, weight, bias = some(3, (2, 4), (4,), (4,))
    expect(answer(x + torch.tensor([[2.0], [-3.0]]), weight, bias), answer(x, weight, bias))


@ex.behaviour("one token cannot change another")
def _(answer):
    x, weight, bias = some(4, (2, 3, 4), (4,), (4,))
    other = x.clone()
    other[:, 1] = 2 * x[:, 1] + 1
    expect(answer(other, weight, bias)[:, ::2], answer(x, weight, bias)[:, ::2])


@ex.behaviour("weight and bias act last: twice both gives twice the result")
def _(answer):
    x, weight, bias = some(5, (3, 4), (4,), (4,))
    expect(answer(x, 2 * weight, 2 * bias), 2 * answer(x, weight, bias))


def _variance(x: Tensor, dims: object = -1) -> Tensor:
    return x.var(dims, correction=0, keepdim=True)


def _centred(x: Tensor, dims: object = -1) -> Tensor:
    return x - x.mean(dims, keepdim=True)


def _standard(x: Tensor, eps: float, dims: object = -1) -> Tensor:
    """Mean 0 and variance 1 over the dimensions, as it should be over the last."""
    return _centred(x, dims) / (_variance(x, dims) + eps).sqrt()


def _over(dims: Function) -> Function:
    return lambda x, w, b, eps=1e-5: _standard(x, eps, dims(x)) * w + b


def _divided_by(divisor: Function) -> Function:
    return lambda x, w, b, eps=1e-5: _centred(x) / divisor(_centred(x), eps) * w + b


def _ending(affine: Function) -> Function:
    return lambda x, w, b, eps=1e-5: affine(_standard(x, eps), w, b)


ex.mistakes_from(AXES, "layer norm", _over)
ex.mistakes_from(DIVISORS, "layer norm", _divided_by)
ex.mistakes_from(AFFINES, "layer norm", _ending)
UNBIASED = "The variance divides by d - 1, as `var` and `std` do unless told otherwise."
CORRECTION = "Which argument of `var` and `std` makes them divide by d?"
ex.mistake("layer norm with the unbiased variance", UNBIASED, CORRECTION)(
    lambda x, w, b, eps=1e-5: _centred(x) / (x.var(-1, keepdim=True) + eps).sqrt() * w + b
)
ex.mistake("layer norm with the unbiased standard deviation plus ε", UNBIASED, CORRECTION)(
    lambda x, w, b, eps=1e-5: _centred(x) / (x.std(-1, keepdim=True) + eps) * w + b
)
ex.mistake("layer norm with the unbiased standard deviation and no ε", UNBIASED, CORRECTION)(
    lambda x, w, b, eps=1e-5: _centred(x) / x.std(-1, keepdim=True) * w + b
)
ex.mistake("layer norm with the unbiased variance, without the root", UNBIASED, ROOT)(
    lambda x, w, b, eps=1e-5: _centred(x) / (x.var(-1, keepdim=True) + eps) * w + b
)
ex.mistake(
    "layer norm with mean and standard deviation without keepdim",
    "Both lost their dimension and are broadcast along the wrong one, or not at all.",
    "What shape does `x.mean(dim=-1)` have, and what shape must it have?",
)(lambda x, w, b, eps=1e-5: (x - x.mean(-1)) / (x.std(-1) + eps) * w + b)
ex.mistake(
    "layer norm that does not subtract the mean",
    "The mean is missing in the numerator.",
    "What is the mean of your result, for a weight of 1 and a bias of 0?",
)(lambda x, w, b, eps=1e-5: x / (_variance(x) + eps).sqrt() * w + b)
ex.mistake(
    "RMS norm, plus the bias",
    "No mean is subtracted anywhere.",
    "What is the mean of your result, for a weight of 1 and a bias of 0?",
)(lambda x, w, b, eps=1e-5: x / (_mean_square(x) + eps).sqrt() * w + b)
ex.mistake(
    "layer norm with the variance taken about 0",
    "The squares under the root are those of x, not of its distance from the mean.",
    "Is the mean subtracted before you square?",
)(lambda x, w, b, eps=1e-5: _centred(x) / (_mean_square(x) + eps).sqrt() * w + b)
ex.mistake(
    "layer norm with the mean added",
    "The mean is doubled instead of removed.",
    "Which sign does the mean have?",
)(lambda x, w, b, eps=1e-5: (2 * x - _centred(x)) / (_variance(x) + eps).sqrt() * w + b)
ex.mistake(
    "layer norm with the median in place of the mean",
    "The median is not the mean unless the features lie evenly around it.",
    "What is the mean of your result, for a weight of 1 and a bias of 0?",
)(
    lambda x, w, b, eps=1e-5: (
        (x - x.median(-1, keepdim=True).values) / (_variance(x) + eps).sqrt() * w + b
    )
)
ex.mistake(
    "layer norm with the square of the mean distance as variance",
    "The distances from the mean add up to 0: they must be squared before the mean is taken.",
    "Which comes first: the square, or the mean?",
)(
    lambda x, w, b, eps=1e-5: (
        _centred(x) / (_centred(x).mean(-1, keepdim=True).square() + eps).sqrt() * w + b
    )
)
ex.mistake(
    "x minus the quotient of mean and root: brackets are missing",
    "`/` and `*` bind more strongly than `-`, so only the mean is divided and scaled.",
    "What should stand in brackets: `x - mean`, or all that follows x?",
)(lambda x, w, b, eps=1e-5: x - x.mean(-1, keepdim=True) / (_variance(x) + eps).sqrt() * w + b)
ex.mistake(
    "layer norm with the variance as a difference of squares, E[x²] - E[x]²",
    "For a token far from 0 that subtracts two large numbers that agree in nearly all digits.",
    "What could you subtract from x before you square it?",
)(
    lambda x, w, b, eps=1e-5: (
        _centred(x) / (_mean_square(x) - x.mean(-1, keepdim=True).square() + eps).sqrt() * w + b
    )
)
ex.mistake(
    "layer norm with the mean without keepdim",
    "The mean lost its dimension and is broadcast along the wrong one, or not at all.",
    "What shape does `x.mean(dim=-1)` have, and what shape must it have?",
)(lambda x, w, b, eps=1e-5: (x - x.mean(-1)) / (_variance(x) + eps).sqrt() * w + b)
ex.mistake(
    "layer norm with mean and variance without keepdim",
    "Both lost their dimension and are broadcast along the wrong one, or not at all.",
    "What shape does `x.mean(dim=-1)` have, and what shape must it have?",
)(lambda x, w, b, eps=1e-5: (x - x.mean(-1)) / (x.var(-1, correction=0) + eps).sqrt() * w + b)
ex.mistake(
    "features stretched from 0 to 1 by their smallest and largest",
    "That is min-max scaling: two features decide, and mean and variance vary.",
    "Which two statistics stand in the formula?",
)(
    lambda x, w, b, eps=1e-5: (
        (x - x.amin(-1, keepdim=True))
        / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + eps)
        * w
        + b
    )
)
ex.mistake(
    "layer norm with the weight before the normalisation",
    "The normalisation undoes most of what the weight did.",
    "Is the weight applied to x or to what has been normalised?",
)(lambda x, w, b, eps=1e-5: _standard(x * w, eps) + b)
ex.mistake(
    "layer norm with weight and bias before the normalisation",
    "The normalisation undoes most of what they did.",
    "Are weight and bias applied to x or to what has been normalised?",
)(lambda x, w, b, eps=1e-5: _standard(x * w + b, eps))
ex.mistake(
    "layer norm with the bias added before the weight",
    "The weight scales the bias as well.",
    "Which comes first: times weight, or plus bias?",
)(lambda x, w, b, eps=1e-5: (_standard(x, eps) + b) * w)
ex.mistake(
    "layer norm without the bias",
    "The argument bias has no effect.",
    "Where does `bias` enter?",
)(lambda x, w, b, eps=1e-5: _standard(x, eps) * w)
ex.mistake(
    "layer norm without weight and bias",
    "The two arguments have no effect.",
    "What follows after the normalisation?",
)(lambda x, w, b, eps=1e-5: _standard(x, eps))
ex.mistake(
    "layer norm with weight and bias swapped",
    "The bias scales and the weight shifts.",
    "Which of the two is multiplied?",
)(lambda x, w, b, eps=1e-5: _standard(x, eps) * b + w)
ex.mistake(
    "layer norm with the bias subtracted",
    "The bias has the wrong sign.",
    "Which sign does the bias have?",
)(lambda x, w, b, eps=1e-5: _standard(x, eps) * w - b)
ex.mistake(
    "layer norm with its input added",
    "That is a residual connection, which comes in exercise 5.",
    "Does the formula add x to the result?",
)(lambda x, w, b, eps=1e-5: x + _standard(x, eps) * w + b)

ex.alternative("F.layer_norm")(lambda x, w, b, eps=1e-5: F.layer_norm(x, w.shape, w, b, eps))
ex.alternative("var with correction=0 and rsqrt")(
    lambda x, w, b, eps=1e-5: torch.addcmul(
        b, x - x.mean(-1, keepdim=True), w * (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    )
)


@ex.alternative("var_mean with unbiased=False")
def _(x, weight, bias, eps=1e-5):
    variance, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
    return weight * ((x - mean) / (variance + eps) ** 0.5) + bias


@ex.alternative("a loop over the tokens")
def _(x, weight, bias, eps=1e-5):
    d = x.shape[-1]
    rows = []
    for token in x.reshape(-1, d):
        mean = sum(token) / d
        variance = sum((feature - mean) ** 2 for feature in token) / d
        rows.append((token - mean) / torch.sqrt(variance + eps) * weight + bias)
    return torch.stack(rows).reshape(x.shape)


@ex.alternative("a centring matrix, einsum for the squares")
def _(x, weight, bias, eps=1e-5):
    d = x.shape[-1]
    centring = torch.eye(d, dtype=x.dtype) - 1 / d  # (d, d): takes the mean away
    centred = x @ centring
    variance = torch.einsum("...i,...i->...", centred, centred)[..., None] / d
    return centred * torch.rsqrt(variance + eps) * weight + bias


@ex.alternative("in float64, and back")
def _(x, weight, bias, eps=1e-5):
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True)
    scale = (wide.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5)
    return (wide * scale * weight + bias).to(x.dtype)


# --- 2. RMS norm ------------------------------------------------------------------------------

ex = Exercise(
    "rms_norm",
    chapter="05_residual_and_layer_norm",
    title="RMS norm",
    minutes=10,
    difficulty=1,
    importance=4,
    batched=True,
    prompt=r"""
RMS norm is layer norm without the mean and without the bias. It divides every token by the root of
the mean of its squares:

$$\mathrm{RMSNorm}(x) = \frac{x}{\sqrt{\frac{1}{d} \sum_i x_i^2 + \varepsilon}} \cdot w$$

- `x` has shape `(..., d)`: the mean runs over the **last** dimension, for each token by itself.
  `weight` has shape `(d,)`.
- $\varepsilon$ stands **inside** the root, so that a token of zeros stays 0 and is never NaN.

Write it without `F.rms_norm` to learn something.
""",
    hints=(
        "In which order do root, mean and square stand in RMS, read from the inside out?",
        "x.square().mean(dim=-1) has shape (...); to divide x it must be (..., 1). Nothing is "
        "subtracted.",
        "mean_square = x.square().mean(dim=-1, keepdim=True); what is x divided by, and where does "
        "eps go?",
    ),
)


@ex.solution
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, §3).

    x: (..., d), weight: (d,), eps > 0 -> (..., d).
    """
    ### BEGIN SOLUTION
    mean_square = x.square().mean(dim=-1, keepdim=True)  # (..., 1)
    return x / torch.sqrt(mean_square + eps) * weight  # (..., d) / (..., 1) * (d,)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(x: Tensor, **options: float) -> Case:
        return {"x": x, "weight": _weights(g, x.shape[-1]), **options}

    smallest, *others = [case(1 + 2 * normal(g, *shape)) for shape in SHAPES]
    return [
        smallest,
        case(1 + normal(g, 2, 3), eps=0.5),
        case(1 + normal(g, 2, 4), eps=3.0),
        case(_flat_first_row(normal(g, 2, 4), 0.0)),
        case(normal(g, 3, 4) / 256),  # the mean of the squares is about ε
        case(normal(g, 3, 4) / 256, eps=1e-9),
        case(normal(g, 3, 1), eps=0.5),
        *others,
    ]


@ex.behaviour("with weight 1 the mean of the squares of each token is 1")
def _(answer):
    got = answer(_spread(1, 2, 3, 8), torch.ones(8))
    expect(got.square().mean(-1), torch.ones(2, 3))


@ex.behaviour("a token whose features are all 3 comes out as the weight")
def _(answer):
    weight = torch.tensor([0.5, -1.0, 2.0])
    case = {"x": torch.full((1, 3), 3.0), "weight": weight}
    expect(answer.on(case), weight[None], case=case)


@ex.behaviour("a token of zeros stays 0")
def _(answer):
    case = {"x": torch.tensor([[0.0, 0.0], [3.0, 4.0]]), "weight": torch.ones(2)}
    expect(answer.on(case)[:1], torch.zeros(1, 2), case=case)


@ex.behaviour("with a mean square of 1, eps = 3 makes the result half as large")
def _(answer):
    case = {"x": torch.tensor([[1.0, -1.0]]), "weight": torch.ones(2), "eps": 3.0}
    expect(answer.on(case), torch.tensor([[0.5, -0.5]]), case=case)


@ex.behaviour("a token ten times as large comes out the same")
def _(answer):
    x, weight = _spread(2, 3, 4), some(2, (4,))[0]
    expect(answer(10 * x, weight), answer(x, weight))


@ex.behaviour("one token cannot change another")
def _(answer):
    x, weight = some(3, (2, 3, 4), (4,))
    other = x.clone()
    other[:, 1] = 2 * x[:, 1] + 1
    expect(answer(other, weight)[:, ::2], answer(x, weight)[:, ::2])


def _rms_over(dims: Function) -> Function:
    return lambda x, w, eps=1e-5: x / (x.square().mean(dims(x), keepdim=True) + eps).sqrt() * w


def _rms(x: Tensor, eps: float) -> Tensor:
    """x with a mean square of 1, as it should be."""
    return x / (_mean_square(x) + eps).sqrt()


ex.mistakes_from(AXES, "RMS norm", _rms_over)
ex.mistakes_from(DIVISORS, "RMS norm", lambda part: lambda x, w, eps=1e-5: x / part(x, eps) * w)
ex.mistakes_from(
    AFFINES, "RMS norm", lambda part: lambda x, w, eps=1e-5: part(_rms(x, eps), w, 0.0)
)
ex.mistake(
    "layer norm without the bias",
    "The mean is subtracted first.",
    "Does the formula of this exercise subtract anything?",
)(lambda x, w, eps=1e-5: _standard(x, eps) * w)
ex.mistake(
    "x divided by its standard deviation",
    "The mean is subtracted under the root.",
    "Are the squares those of x, or of its distance from the mean?",
)(lambda x, w, eps=1e-5: x / (_variance(x) + eps).sqrt() * w)
ex.mistake(
    "x divided by its unbiased standard deviation",
    "The mean is subtracted under the root, and d - 1 stands for d.",
    "Are the squares those of x, or of its distance from the mean?",
)(lambda x, w, eps=1e-5: x / (x.var(-1, keepdim=True) + eps).sqrt() * w)
ex.mistake(
    "RMS norm of x with its mean subtracted above the root only",
    "The numerator is x minus its mean, which belongs to layer norm.",
    "Does the formula of this exercise subtract anything?",
)(lambda x, w, eps=1e-5: _centred(x) / (_mean_square(x) + eps).sqrt() * w)
ex.mistake(
    "RMS norm with the square of the mean instead of the mean of the squares",
    "Positive and negative features cancel before they are squared.",
    "Which comes first: the square, or the mean?",
)(lambda x, w, eps=1e-5: x / (x.mean(-1, keepdim=True).square() + eps).sqrt() * w)
ex.mistake(
    "RMS norm without the square",
    "The mean of x itself stands under the root, and it may be negative.",
    "What does the S in RMS stand for?",
)(lambda x, w, eps=1e-5: x / (x.mean(-1, keepdim=True) + eps).sqrt() * w)
ex.mistake(
    "RMS norm with d - 1 in place of d",
    "The sum of the squares is divided by d - 1.",
    "By how many numbers is the sum of d squares divided to give their mean?",
)(
    lambda x, w, eps=1e-5: (
        x / (x.square().sum(-1, keepdim=True) / (x.shape[-1] - 1) + eps).sqrt() * w
    )
)
ex.mistake(
    "RMS norm with the median of the squares",
    "The median stands where the mean should.",
    "What does the M in RMS stand for?",
)(lambda x, w, eps=1e-5: x / (x.square().median(-1, keepdim=True).values + eps).sqrt() * w)
ex.mistake(
    "RMS norm with the ε that F.rms_norm takes where it is given none",
    "The argument eps has no effect.",
    "Where does `eps` enter?",
)(lambda x, w, eps=1e-5: _rms(x, torch.finfo(x.dtype).eps) * w)
ex.mistake(
    "RMS norm with the weight before the normalisation",
    "The normalisation undoes most of what the weight did.",
    "Is the weight applied to x or to what has been normalised?",
)(lambda x, w, eps=1e-5: _rms(x * w, eps))
ex.mistake(
    "RMS norm with the root of the mean square, without x",
    "The divisor, or its inverse, comes back instead of the token.",
    "What is divided by the root?",
)(lambda x, w, eps=1e-5: (_mean_square(x) + eps).rsqrt().expand(x.shape) * w)
ex.mistake(
    "RMS norm of the absolute values",
    "The signs of the features are lost.",
    "What should happen to the sign of a feature?",
)(lambda x, w, eps=1e-5: _rms(x.abs(), eps) * w)
ex.mistake(
    "RMS norm with its input added",
    "That is a residual connection, which comes in exercise 5.",
    "Does the formula add x to the result?",
)(lambda x, w, eps=1e-5: x + _rms(x, eps) * w)

ex.alternative("F.rms_norm")(lambda x, w, eps=1e-5: F.rms_norm(x, w.shape, w, eps))
ex.alternative("rsqrt of the mean of powers")(
    lambda x, w, eps=1e-5: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
)
ex.alternative("the Euclidean norm over √d")(
    lambda x, w, eps=1e-5: (
        x
        * w
        / torch.hypot(x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5, x.new_tensor(eps**0.5))
    )
)
ex.alternative("einsum for the squares")(
    lambda x, w, eps=1e-5: torch.einsum(
        "...i,...,i->...i", x, (torch.einsum("...i,...i->...", x, x) / len(w) + eps) ** -0.5, w
    )
)


@ex.alternative("a loop over the tokens")
def _(x, weight, eps=1e-5):
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        mean_square = sum(feature**2 for feature in token) / len(token)
        rows.append(token / torch.sqrt(mean_square + eps) * weight)
    return torch.stack(rows).reshape(x.shape)


@ex.alternative("in float64, and back")
def _(x, weight, eps=1e-5):
    wide = x.double()
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


# --- 3. SwiGLU --------------------------------------------------------------------------------

ex = Exercise(
    "swiglu",
    chapter="05_residual_and_layer_norm",
    title="A gated feed-forward network: SwiGLU",
    minutes=10,
    difficulty=2,
    importance=4,
    batched=True,
    prompt=r"""
The feed-forward network works on each token by itself. In many of today's models it has three
matrices. One branch makes $d_{ff}$ new features, the other decides how far each of them opens (the
gate), and the third matrix brings the product back to $d_{model}$:

$$\mathrm{SwiGLU}(x) = \big(\mathrm{silu}(x W_{gate}) \odot (x W_{up})\big)\, W_{down}, \qquad
  \mathrm{silu}(z) = z \cdot \sigma(z) = \frac{z}{1 + e^{-z}}$$

$\odot$ multiplies entry by entry. The shapes are `x: (..., d_model)`, `w_gate` and `w_up:
(d_model, d_ff)`, `w_down: (d_ff, d_model)`, so no matrix needs a transpose. There is no bias.
`F.silu` is allowed. (Swish is an older name of silu.)
""",
    hints=(
        "There are two branches of width d_ff: which of them goes through silu?",
        "Two branches of the same shape (..., d_ff) are multiplied with `*`, and `@` with w_down "
        "brings the width back. A gate of 0 closes its feature, whatever the other branch says.",
        "gate = F.silu(x @ w_gate); what is it multiplied by, and what follows?",
    ),
)


@ex.solution
def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """A gated feed-forward network (Shazeer 2020, §2).

    x: (..., d_model), w_gate and w_up: (d_model, d_ff), w_down: (d_ff, d_model) -> (..., d_model).
    """
    ### BEGIN SOLUTION
    gate = F.silu(x @ w_gate)  # (..., d_model) x (d_model, d_ff) -> (..., d_ff)
    up = x @ w_up  # (..., d_model) x (d_model, d_ff) -> (..., d_ff)
    return (gate * up) @ w_down  # (..., d_ff) x (d_ff, d_model) -> (..., d_model)
    ### END SOLUTION


def _network(g: torch.Generator, *sizes: int) -> Case:
    """Inputs of `swiglu`: the last size is d_ff, the last but one d_model."""
    *_, d_model, d_ff = sizes
    shapes = {"w_gate": (d_model, d_ff), "w_up": (d_model, d_ff), "w_down": (d_ff, d_model)}
    return {"x": normal(g, *sizes[:-1])} | {k: normal(g, *s) for k, s in shapes.items()}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    smallest = _network(g, 2, 1, 2)
    smallest["x"] = smallest["x"].abs() * torch.tensor([[1.0], [-1.0]]) + torch.tensor(
        [[1.0], [-1]]
    )
    wide = _network(g, 2, 1, 2)  # gates around 200 and -200: exp of them is inf
    wide["x"] = torch.tensor([[20.0], [-20.0]]) + normal(g, 2, 1)
    wide["w_gate"] = torch.tensor([[10.0, -8.0]]) + normal(g, 1, 2)
    sizes = [(2, 2, 3), (3, 4), (3, 3, 3), (4, 5, 2), (1, 3, 1), (1, 2, 4, 4), (2, 2, 3, 2, 5)]
    others = [_network(g, *s) for s in [*sizes, (3, 3, 3, 3), (3, 4, 2, 6)]]
    return [smallest, wide, *others]


def _small_network(seed: int) -> list[Tensor]:
    return some(seed, (2, 3, 4), (4, 5), (4, 5), (5, 4))


@ex.behaviour("a gate of 0 closes every feature: with w_gate = 0 the result is 0")
def _(answer):
    x, gate, up, down = _small_network(1)
    expect(answer(x, 0 * gate, up, down), torch.zeros(2, 3, 4))


@ex.behaviour("a gate far above 0 multiplies its feature, one far below 0 closes it")
def _(answer):
    case = {"x": torch.tensor([[1.0], [-1.0]]), "w_gate": torch.tensor([[50.0]])}
    case |= {"w_up": torch.tensor([[3.0]]), "w_down": torch.tensor([[1.0]])}
    expect(answer.on(case), torch.tensor([[150.0], [0.0]]), case=case)


@ex.behaviour("a gate of 1 multiplies its feature by silu(1) = 0.7311")
def _(answer):
    one = torch.ones(1, 1)
    case = {"x": one, "w_gate": one, "w_up": 2 * one, "w_down": one}
    expect(answer.on(case), torch.full((1, 1), 2 * 0.7310586), case=case)


@ex.behaviour("twice w_up gives twice the result")
def _(answer):
    x, gate, up, down = _small_network(2)
    expect(answer(x, gate, 2 * up, down), 2 * answer(x, gate, up, down))


@ex.behaviour("twice w_down gives twice the result")
def _(answer):
    x, gate, up, down = _small_network(3)
    expect(answer(x, gate, up, 2 * down), 2 * answer(x, gate, up, down))


@ex.behaviour("one token cannot change another")
def _(answer):
    x, *matrices = _small_network(4)
    other = x.clone()
    other[:, 1] += 1
    expect(answer(other, *matrices)[:, ::2], answer(x, *matrices)[:, ::2])


def _gated(mix: Function) -> Function:
    """A network whose hidden features are `mix(x @ w_gate, x @ w_up)`."""
    return lambda x, w_gate, w_up, w_down: mix(x @ w_gate, x @ w_up) @ w_down


WHICH = "Which function does the gate go through?"

# Wrong gates: z -> how far it opens.
GATES = [
    Mistake("with sigmoid", "That is GLU, the first of the family.", WHICH, torch.sigmoid),
    Mistake("with gelu", "That is GEGLU, a sister of SwiGLU.", WHICH, F.gelu),
    Mistake(
        "with the tanh approximation of gelu",
        "That is GEGLU, a sister of SwiGLU.",
        WHICH,
        lambda z: F.gelu(z, approximate="tanh"),
    ),
    Mistake("with relu", "That is ReGLU, a sister of SwiGLU.", WHICH, F.relu),
    Mistake("with tanh", "tanh flattens a large gate to 1, silu lets it grow.", WHICH, torch.tanh),
    Mistake("with softplus", "Softplus is never negative and not 0 at 0.", WHICH, F.softplus),
    Mistake("with hardswish", "That is silu made of straight pieces.", WHICH, F.hardswish),
    Mistake("with elu", "elu goes down to -1, silu hardly below 0.", WHICH, F.elu),
    Mistake("with mish", "Mish puts softplus and tanh where silu has sigmoid.", WHICH, F.mish),
    Mistake(
        "with softmax",
        "The features compete for the gate, and each should open by itself.",
        WHICH,
        lambda z: z.softmax(-1),
    ),
    Mistake(
        "with z·σ(1.702 z)",
        "A factor in the sigmoid turns silu into an approximation of gelu.",
        "What is the argument of σ in the formula?",
        lambda z: z * torch.sigmoid(1.702 * z),
    ),
    Mistake(
        "with silu applied twice",
        "silu of silu is not silu.",
        "How often does the formula apply silu?",
        lambda z: F.silu(F.silu(z)),
    ),
    Mistake(
        "with silu of the negated gate",
        "The gate opens where it should close.",
        "Which sign does the gate have?",
        lambda z: F.silu(-z),
    ),
    Mistake(
        "with z·σ(-z)",
        "The sigmoid is turned round: 1 + exp(z) stands under the fraction.",
        "Which sign does the exponent have in 1 / (1 + exp(...))?",
        lambda z: z * torch.sigmoid(-z),
    ),
    Mistake(
        "with z + σ(z)",
        "silu is a product of z and σ(z).",
        "Which of `+` and `*` stands between z and σ(z)?",
        lambda z: z + torch.sigmoid(z),
    ),
    Mistake(
        "with silu as z·exp(z) / (1 + exp(z))",
        "For a large z that is inf / inf, which is NaN.",
        "Which sign of the exponent never divides inf by inf?",
        lambda z: z * z.exp() / (1 + z.exp()),
    ),
]
ex.mistakes_from(GATES, "SwiGLU", lambda part: _gated(lambda gate, up: part(gate) * up))

ex.mistake(
    "SwiGLU with silu on the other branch",
    "silu acts on x W_up and leaves the gate as it is.",
    "Which of the two branches goes through silu?",
)(_gated(lambda gate, up: gate * F.silu(up)))
ex.mistake(
    "SwiGLU with silu on both branches",
    "The branch of w_up should stay linear.",
    "How often does the formula apply silu?",
)(_gated(lambda gate, up: F.silu(gate) * F.silu(up)))
ex.mistake(
    "SwiGLU without silu",
    "Both branches are linear; their product is a bilinear network.",
    "Which function makes a gate of x W_gate?",
)(_gated(lambda gate, up: gate * up))
ex.mistake(
    "SwiGLU with silu after the product",
    "silu acts on the product of the branches.",
    "Does silu act on one branch or on the product?",
)(_gated(lambda gate, up: F.silu(gate * up)))
ex.mistake(
    "SwiGLU with silu at the very end",
    "silu acts on the result of the last matrix.",
    "Which of the three products is silu applied to?",
)(lambda x, w_gate, w_up, w_down: F.silu(((x @ w_gate) * (x @ w_up)) @ w_down))
ex.mistake(
    "SwiGLU with silu on x, before w_gate",
    "silu acts on the token instead of on the gate.",
    "Which comes first: the product with w_gate, or silu?",
)(lambda x, w_gate, w_up, w_down: ((F.silu(x) @ w_gate) * (x @ w_up)) @ w_down)
ex.mistake(
    "SwiGLU with the branches added",
    "A sum has no gate: a closed branch lets the other one through.",
    "Which of `+` and `*` stands between the branches?",
)(_gated(lambda gate, up: F.silu(gate) + up))
ex.mistake(
    "SwiGLU without the gate",
    "w_gate has no effect, and two matrices in a row are one.",
    "Where does `w_gate` enter?",
)(_gated(lambda gate, up: up))
ex.mistake(
    "a plain network with silu on x W_up",
    "w_gate has no effect.",
    "Where does `w_gate` enter?",
)(_gated(lambda gate, up: F.silu(up)))
ex.mistake(
    "a plain network with silu on x W_gate",
    "w_up has no effect.",
    "Where does `w_up` enter?",
)(_gated(lambda gate, up: F.silu(gate)))
ex.mistake(
    "SwiGLU with w_gate on both branches",
    "w_up has no effect.",
    "Does each of the three matrices appear once?",
)(_gated(lambda gate, up: F.silu(gate) * gate))
ex.mistake(
    "SwiGLU with w_up on both branches",
    "w_gate has no effect.",
    "Does each of the three matrices appear once?",
)(_gated(lambda gate, up: F.silu(up) * up))
ex.mistake(
    "SwiGLU with the sigmoid of one branch times both",
    "The gate is missing once: σ acts on the other branch.",
    "Which branch does σ belong to?",
)(_gated(lambda gate, up: gate * torch.sigmoid(up)))
ex.mistake(
    "SwiGLU without w_down",
    "The hidden features of width d_ff come back.",
    "What is the last dimension of your result?",
)(lambda x, w_gate, w_up, w_down: F.silu(x @ w_gate) * (x @ w_up))
ex.mistake(
    "SwiGLU with w_down on each branch before the product",
    "The product is taken at width d_model instead of d_ff.",
    "Which comes first: the product of the branches, or w_down?",
)(lambda x, w_gate, w_up, w_down: (F.silu(x @ w_gate) @ w_down) * (x @ w_up @ w_down))
ex.mistake(
    "SwiGLU with transposed weight matrices",
    "The weights have shape (d_in, d_out): no transpose is needed. torch.nn.Linear stores them the "
    "other way round.",
    "What shape does `x @ w_gate` have?",
)(lambda x, w_gate, w_up, w_down: (F.silu(x @ w_gate.mT) * (x @ w_up.mT)) @ w_down.mT)
ex.mistake(
    "SwiGLU with w_down transposed",
    "w_down has shape (d_ff, d_model): no transpose is needed.",
    "What shape does your product with w_down have when d_ff and d_model differ?",
)(lambda x, w_gate, w_up, w_down: swiglu(x, w_gate, w_up, w_down.mT))
ex.mistake(
    "SwiGLU with its input added",
    "That is a residual connection, which comes in exercise 5.",
    "Does the formula add x to the result?",
)(lambda x, *matrices: x + swiglu(x, *matrices))
ex.mistake(
    "SwiGLU with the token as the second branch",
    "w_up has no effect, or the widths do not fit.",
    "What is the gate multiplied by?",
)(lambda x, w_gate, w_up, w_down: (F.silu(x @ w_gate) * x) @ w_down)
ex.mistake(
    "SwiGLU divided by √d_ff",
    "That scale belongs to the scores of attention.",
    "Does the formula divide by anything but 1 + exp(-z)?",
)(lambda x, w_gate, w_up, w_down: swiglu(x, w_gate, w_up, w_down) / w_up.shape[-1] ** 0.5)

ex.alternative("silu written out")(
    _gated(lambda gate, up: gate / (1 + torch.exp(-gate.clamp(min=-80))) * up)
)
ex.alternative("einsum")(
    lambda x, w_gate, w_up, w_down: torch.einsum(
        "...f,...f,fd->...d",
        F.silu(torch.einsum("...d,df->...f", x, w_gate)),
        torch.einsum("...d,df->...f", x, w_up),
        w_down,
    )
)


@ex.alternative("one wide product, split in two")
def _(x, w_gate, w_up, w_down):
    gate, up = (x @ torch.cat([w_gate, w_up], dim=1)).chunk(2, dim=-1)
    return torch.sigmoid(gate) * gate * up @ w_down


@ex.alternative("F.linear with transposed weights")
def _(x, w_gate, w_up, w_down):
    hidden = F.silu(F.linear(x, w_gate.T)).mul(F.linear(x, w_up.T))
    return F.linear(hidden, w_down.T)


@ex.alternative("a loop over the hidden features")
def _(x, w_gate, w_up, w_down):
    result = 0
    for gate, up, down in zip(w_gate.T, w_up.T, w_down, strict=True):
        opened = F.silu((x * gate).sum(-1, keepdim=True))  # (..., 1)
        result = result + opened * (x * up).sum(-1, keepdim=True) * down
    return result


@ex.alternative("in float64, and back")
def _(x, w_gate, w_up, w_down):
    wide = x.double()
    hidden = F.silu(wide @ w_gate.double()) * (wide @ w_up.double())
    return (hidden @ w_down.double()).to(x.dtype)


# --- 4. dropout -------------------------------------------------------------------------------

ex = Exercise(
    "dropout",
    chapter="05_residual_and_layer_norm",
    title="Dropout, with its noise given",
    minutes=10,
    difficulty=1,
    importance=3,
    batched=True,
    prompt=r"""
While a model trains, dropout sets a share $p$ of the numbers to 0 and makes the others larger, so
that the expected value stays what it was:

$$\mathrm{dropout}(x)_i = \begin{cases} \dfrac{x_i}{1 - p} & \text{where } u_i \ge p \\[1ex]
  0 & \text{where } u_i < p \end{cases}$$

- `noise` is $u$: numbers drawn evenly from $[0, 1)$, one for each number of `x`, in the same shape.
  It is given, so that the same call gives the same result; draw nothing yourself.
- A number is **kept** where `noise >= p`.
- `p` is the share that is **dropped**, from 0 up to but not including 1.
- With `training=False` (evaluation) `x` comes back unchanged.
""",
    hints=(
        "If a share p of the numbers becomes 0, by which factor does the mean of all shrink?",
        "A bool tensor times a float tensor is the float where True and 0 where False. The factor "
        "1 / (1 - p) belongs to training only.",
        "keep = noise >= p; what do you multiply and divide by, and what comes before that for "
        "evaluation?",
    ),
)


@ex.solution
def dropout(x: Tensor, noise: Tensor, p: float = 0.1, training: bool = True) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014, §4 and §10).

    x: (...), noise: uniform in [0, 1), like x, 0 <= p < 1: the share dropped -> like x.
    """
    ### BEGIN SOLUTION
    if not training:
        return x
    keep = noise >= p  # (...), bool
    return x * keep / (1 - p)  # the mean over many draws of the noise is x
    ### END SOLUTION


def _uniform(g: torch.Generator, *shape: int) -> Tensor:
    """Numbers evenly from [0, 1) with one decimal."""
    return torch.randint(0, 10, shape, generator=g) / 10


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(*shape: int, noise: Tensor | None = None, **options: object) -> Case:
        x = _weights(g, *shape)
        if noise is None:
            return {"x": x, "noise": torch.rand(shape, generator=g), **options}
        return {"x": x.abs(), "noise": noise.reshape(shape), **options}  # a dropped one reads 0

    some = torch.cat([torch.tensor([0.0, 0.5]), _uniform(g, 4)])  # the first is dropped
    at_half = torch.tensor([0.5, 0.2, 0.7, 0.4, 0.5, 0.9])  # 0.5 is exact in binary
    return [
        case(2, 3, noise=at_half, p=0.5),
        case(2, 3, noise=some),
        case(2, 3, noise=at_half, p=0.25, training=False),
        case(4, noise=torch.tensor([0.0, 0.3, 0.9, 0.0]), p=0.0),
        case(4, 1, noise=torch.tensor([0.995, 0.2, 0.5, 0.985]), p=0.98),
        case(5, p=0.25),
        case(3, 3, p=0.6, training=True),
        case(2, 3, training=False),
        case(2, 2, 3, 4, p=0.3),
        case(3, 3, 3, p=0.4),
        case(3, 4, 5, p=0.7),
    ]


def _draw(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """x without a 0, and noise."""
    g = torch.Generator().manual_seed(seed)
    return _weights(g, *shape), torch.rand(shape, generator=g)


@ex.behaviour("in evaluation x comes back unchanged")
def _(answer):
    x, noise = _draw(1, 2, 3)
    case = {"x": x, "noise": noise, "p": 0.6, "training": False}
    expect(answer.on(case), x, case=case)


@ex.behaviour("where the noise is below p the result is 0, elsewhere it is not")
def _(answer):
    x, noise = _draw(2, 3, 4)
    expect(answer(x, noise, p=0.4) == 0, noise < 0.4)


@ex.behaviour("where the noise equals p the number is kept")
def _(answer):
    case = {"x": torch.tensor([[3.0, 1.0]]), "noise": torch.tensor([[0.25, 0.125]]), "p": 0.25}
    expect(answer.on(case) == 0, torch.tensor([[False, True]]), case=case)


@ex.behaviour("what is kept is 1 / (1 - p) times as large")
def _(answer):
    x, _ = _draw(3, 2, 3)
    expect(answer(x, torch.full((2, 3), 0.9375), p=0.75), 4 * x)


@ex.behaviour("the mean over evenly spread noise is x")
def _(answer):
    x = torch.tensor([2.0, -3.0]).expand(256, 2)
    noise = (torch.arange(256) / 256)[:, None].expand(256, 2)
    expect(answer(x, noise, p=0.375).mean(0), x[0])


@ex.behaviour("with p = 0 nothing changes")
def _(answer):
    x, noise = _draw(4, 2, 3)
    expect(answer(x, noise, p=0.0), x)


def _dropped(*, keep: Function | None = None, scale: Function | None = None) -> Function:
    """Dropout with another rule for what is kept, or another factor; evaluation as it should be."""

    def function(x, noise, p=0.1, training=True):
        if not training:
            return x
        kept = keep(x, noise, p) if keep else noise >= p
        return x * kept * (scale(p) if scale else 1 / (1 - p))

    return function


def _in_evaluation(change: Function) -> Function:
    """Right in training; `change(x, noise, p)` in evaluation."""

    def function(x, noise, p=0.1, training=True):
        return dropout(x, noise, p) if training else change(x, noise, p)

    return function


def _in_training(change: Function) -> Function:
    """Right in evaluation; `change(x, noise, p)` in training."""
    return lambda x, noise, p=0.1, training=True: change(x, noise, p) if training else x


FACTOR = "By which factor does the mean of all numbers shrink when a share p becomes 0?"
KEPT = "Where is a number kept: where the noise is below p, or from p upwards?"
EACH = "How many numbers does `noise` hold, and how many does your mask?"
EVALUATION = "What should happen to x when training is False?"

ex.mistake(
    "the identity",
    "Nothing is dropped, in training either.",
    "What should happen while `training` is True?",
)(_in_training(lambda x, noise, p: x.clone()))
ex.mistake(
    "dropout that is left on in evaluation",
    "The argument training has no effect.",
    EVALUATION,
)(_in_evaluation(dropout))
ex.mistake(
    "dropout with training and evaluation swapped",
    "It drops in evaluation and does nothing in training.",
    "Is it `if training` or `if not training`?",
)(lambda x, noise, p=0.1, training=True: x.clone() if training else dropout(x, noise, p))
ex.mistake(
    "dropout that does not rescale what is kept",
    "The expected value shrinks by the factor 1 - p.",
    FACTOR,
)(_dropped(scale=lambda p: 1.0))
ex.mistake(
    "dropout multiplied by 1 - p",
    "The factor is upside down: what is kept becomes smaller still.",
    FACTOR,
)(_dropped(scale=lambda p: 1 - p))
ex.mistake(
    "dropout divided by p",
    "p is the share dropped; the share kept is 1 - p.",
    FACTOR,
)(_in_training(lambda x, noise, p: x * (noise >= p) / p))
ex.mistake(
    "dropout multiplied by p",
    "p is the share dropped; the share kept is 1 - p.",
    FACTOR,
)(_dropped(scale=lambda p: p))
ex.mistake(
    "dropout multiplied by 1 + p",
    "1 + p is near 1 / (1 - p) only where p is small.",
    FACTOR,
)(_dropped(scale=lambda p: 1 + p))
ex.mistake(
    "dropout divided by 1 + p",
    "What is kept becomes smaller instead of larger.",
    FACTOR,
)(_dropped(scale=lambda p: 1 / (1 + p)))
ex.mistake(
    "dropout divided by √(1 - p)",
    "That keeps the expected square, and the expected value shrinks.",
    FACTOR,
)(_dropped(scale=lambda p: (1 - p) ** -0.5))
ex.mistake(
    "dropout rescaled twice",
    "1 / (1 - p) is applied once too often.",
    "Where does your code divide, and how often?",
)(_dropped(scale=lambda p: (1 - p) ** -2))
ex.mistake(
    "dropout divided by the share that this noise keeps",
    "The share kept varies from draw to draw; the formula has the expected one, 1 - p.",
    "Does the factor depend on the noise or on p alone?",
)(_in_training(lambda x, noise, p: x * (noise >= p) / (noise >= p).to(x.dtype).mean()))
ex.mistake(
    "dropout that keeps where the noise is below p",
    "Kept and dropped are swapped.",
    KEPT,
)(_dropped(keep=lambda x, noise, p: noise < p))
ex.mistake(
    "dropout with p as the share kept",
    "It keeps where the noise is below p and divides by p: p counts as the share that stays.",
    "Is p the share that is dropped or the share that is kept?",
)(_in_training(lambda x, noise, p: x * (noise < p) / p))
ex.mistake(
    "dropout with 1 - p in place of p",
    "p counts as the share that stays: the share 1 - p is dropped.",
    "Is p the share that is dropped or the share that is kept?",
)(_in_training(lambda x, noise, p: x * (noise >= 1 - p) / p))
ex.mistake(
    "dropout that keeps where the noise is below 1 - p",
    "The right share is kept, but not the right numbers.",
    KEPT,
)(_dropped(keep=lambda x, noise, p: noise < 1 - p))
ex.mistake(
    "dropout that keeps where the noise is at least 1 - p",
    "The share p is kept instead of dropped.",
    KEPT,
)(_dropped(keep=lambda x, noise, p: noise >= 1 - p))
ex.mistake(
    "dropout that drops where the noise equals p",
    "`>` stands where `>=` should; with p = 0 it drops where the noise is 0.",
    "Should anything be dropped when p is 0?",
)(_dropped(keep=lambda x, noise, p: noise > p))
ex.mistake(
    "dropout that compares x with p",
    "Small numbers are dropped instead of random ones.",
    "Which tensor decides what is kept?",
)(_dropped(keep=lambda x, noise, p: x >= p))
ex.mistake(
    "dropout of whole rows",
    "One number of the noise decides for a whole row.",
    EACH,
)(_dropped(keep=lambda x, noise, p: noise[..., :1] >= p))
ex.mistake(
    "dropout of whole features",
    "All tokens use the noise of the first one.",
    EACH,
)(_dropped(keep=lambda x, noise, p: (noise[..., :1, :] if x.ndim > 1 else noise) >= p))
ex.mistake(
    "dropout with the noise of the first batch element for all",
    "All batch elements lose the same numbers.",
    EACH,
)(_dropped(keep=lambda x, noise, p: (noise[:1] if x.ndim > 2 else noise) >= p))
ex.mistake(
    "dropout with a fixed p of 0.1",
    "The argument p has no effect.",
    "Where does `p` enter?",
)(_in_training(lambda x, noise, p: dropout(x, noise, 0.1)))
ex.mistake(
    "dropout with a fixed p of 0.5",
    "The argument p has no effect.",
    "Where does `p` enter?",
)(_in_training(lambda x, noise, p: dropout(x, noise, 0.5)))
ex.mistake(
    "dropout that scales and drops nothing",
    "Every number is divided by 1 - p.",
    "Where does `noise` enter?",
)(_in_training(lambda x, noise, p: x / (1 - p)))
ex.mistake(
    "dropout that lets the dropped ones through unscaled",
    "The numbers to be dropped stay as they are instead of becoming 0.",
    "What stands where the noise is below p?",
)(_in_training(lambda x, noise, p: torch.where(noise >= p, x / (1 - p), x)))
ex.mistake(
    "dropout with -inf where a number is dropped",
    "-inf hides a score before a softmax; here a dropped number is 0.",
    "What stands where the noise is below p?",
)(_in_training(lambda x, noise, p: (x / (1 - p)).masked_fill(noise < p, -math.inf)))
ex.mistake(
    "dropout with 1 where a number is dropped",
    "A dropped number should be 0.",
    "What stands where the noise is below p?",
)(_in_training(lambda x, noise, p: (x / (1 - p)).masked_fill(noise < p, 1.0)))
ex.mistake(
    "x multiplied by the noise",
    "The noise should decide what is kept, not by how much.",
    "Which values can the mask take?",
)(_in_training(lambda x, noise, p: x * noise / (1 - p)))
ex.mistake(
    "the mask, without x",
    "The mask comes back instead of the numbers that it keeps.",
    "What is multiplied by the mask?",
)(_in_training(lambda x, noise, p: (noise >= p).to(x.dtype) / (1 - p)))
ex.mistake(
    "dropout that keeps its scale in evaluation",
    "In evaluation every number is divided by 1 - p.",
    EVALUATION,
)(_in_evaluation(lambda x, noise, p: x / (1 - p)))
ex.mistake(
    "dropout that multiplies by 1 - p in evaluation as well",
    "The expected value has already been mended in training.",
    EVALUATION,
)(_in_evaluation(lambda x, noise, p: x * (1 - p)))
ex.mistake(
    "dropout as first published: no scale in training, 1 - p in evaluation",
    "That is right in its way, but here the scale belongs to training, so that evaluation does "
    "nothing.",
    "When should the factor be applied?",
)(lambda x, noise, p=0.1, training=True: x * (noise >= p) if training else x * (1 - p))
ex.mistake(
    "dropout with its scale in evaluation instead of in training",
    "What is kept stays as it is, and in evaluation every number is divided by 1 - p.",
    "When should the factor be applied?",
)(lambda x, noise, p=0.1, training=True: x * (noise >= p) if training else x / (1 - p))
ex.mistake(
    "the kept numbers in a row",
    "Indexing with a mask picks the kept numbers out, and the places of the dropped ones are lost.",
    "What shape does `x[keep]` have, and which operation leaves a 0 in place?",
)(_in_training(lambda x, noise, p: x[noise >= p] / (1 - p)))
ex.mistake(
    "dropout that gives 0 in evaluation",
    "Everything is dropped when the model is not training.",
    EVALUATION,
)(_in_evaluation(lambda x, noise, p: torch.zeros_like(x)))
ex.mistake(
    "dropout that still drops in evaluation, without the scale",
    "Numbers become 0 though the model is not training.",
    EVALUATION,
)(_in_evaluation(lambda x, noise, p: x * (noise >= p)))

ex.alternative("torch.where")(
    _in_training(lambda x, noise, p: torch.where(noise < p, 0.0, x / (1 - p)))
)
ex.alternative("masked_fill")(
    _in_training(lambda x, noise, p: x.masked_fill(noise < p, 0.0) * (1 / (1 - p)))
)


@ex.alternative("a float mask that holds the scale; p counts as 0 in evaluation")
def _(x, noise, p=0.1, training=True):
    p = p if training else 0.0
    mask = (noise >= p).to(x.dtype) / (1.0 - p)
    return x * mask


@ex.alternative("a loop over the numbers")
def _(x, noise, p=0.1, training=True):
    if training is False:
        return x.clone()
    pairs = zip(x.flatten(), noise.flatten(), strict=True)
    kept = [number * 0 if bool(u < p) else number / (1 - p) for number, u in pairs]
    return torch.stack(kept).view(x.shape)


@ex.alternative("in float64, and back")
def _(x, noise, p=0.1, training=True):
    keep = torch.ge(noise, p).double() if training else torch.ones_like(x).double()
    return (x.double() * keep / (1 - p if training else 1)).to(x.dtype)


# --- 5. block ---------------------------------------------------------------------------------

ex = Exercise(
    "block",
    chapter="05_residual_and_layer_norm",
    title="A block that stacks",
    minutes=15,
    difficulty=3,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
A Transformer is a stack of blocks of one kind. A block lets its tokens look at one another
(attention), then works on each by itself (feed-forward). Each of these two **sublayers** adds to
its input, and each has a norm of its own.

**Pre-norm** (`norm_first=True`) normalises what a sublayer reads:

$$x \leftarrow x + \mathrm{attention}(\mathrm{norm}_1(x)), \qquad
  x \leftarrow x + \mathrm{feed\_forward}(\mathrm{norm}_2(x))$$

**Post-norm** (`norm_first=False`, as in the first Transformer) normalises the sum:

$$x \leftarrow \mathrm{norm}_1(x + \mathrm{attention}(x)), \qquad
  x \leftarrow \mathrm{norm}_2(x + \mathrm{feed\_forward}(x))$$

`attention`, `feed_forward`, `norm_1` and `norm_2` are functions that come as arguments: each takes
a tensor `(batch, n, d_model)` and gives one of the same shape. You only wire them. The check passes
in small functions whose names say what they do: `square`, or `causal_mean`, in which each token
becomes the mean of itself and those before it.
""",
    hints=(
        "In pre-norm, does anything normalise x itself on its way from the block's input to its "
        "output?",
        "The second sublayer reads what the first has already added to. If both sublayers give 0, "
        "a pre-norm block gives x back; a post-norm block gives norm_2(norm_1(x)).",
        "x = x + attention(norm_1(x)) is the first half of pre-norm; what is the second, and what "
        "moves in post-norm?",
    ),
)


@ex.solution
def block(
    x: Tensor,
    attention: Callable[[Tensor], Tensor],
    feed_forward: Callable[[Tensor], Tensor],
    norm_1: Callable[[Tensor], Tensor],
    norm_2: Callable[[Tensor], Tensor],
    norm_first: bool = True,
) -> Tensor:
    """One block: pre-norm (Xiong et al. 2020, §3.1) or post-norm (Vaswani et al. 2017, §3.1).

    x: (batch, n, d_model) -> the same shape; so does each of the four functions.
    """
    ### BEGIN SOLUTION
    if norm_first:  # a sublayer reads a normalised copy; x itself is only added to
        x = x + attention(norm_1(x))  # (batch, n, d_model), as on every line
        return x + feed_forward(norm_2(x))
    x = norm_1(x + attention(x))
    return norm_2(x + feed_forward(x))
    ### END SOLUTION


# The smallest case can be followed by hand with these four.
def causal_mean(x: Tensor) -> Tensor:
    """Each token becomes the mean of itself and those before it. (..., n, d) -> (..., n, d)."""
    count = torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None]  # (n, 1)
    return x.cumsum(-2) / count


def square(x: Tensor) -> Tensor:
    return x * x


def minus_mean(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def half(x: Tensor) -> Tensor:
    return x / 2


# These are nearer to what stands in a model.
def look_back(x: Tensor) -> Tensor:
    """Causal attention with queries, keys and values all x."""
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def gated(x: Tensor) -> Tensor:
    """A network that mixes the features of each token."""
    return F.silu(x + 1) * x.roll(1, -1)


def layer_normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * 1.5 + 0.2


def rms_normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=0.1)


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    by_hand = (causal_mean, square, minus_mean, half)
    model = (look_back, gated, layer_normed, rms_normed)
    swapped = (look_back, gated, rms_normed, layer_normed)

    def case(functions: tuple[Function, ...], *shape: int, **options: bool) -> Case:
        names = ("attention", "feed_forward", "norm_1", "norm_2")
        return {"x": normal(g, *shape), **dict(zip(names, functions, strict=True)), **options}

    return [
        case(by_hand, 1, 2, 2),
        case(by_hand, 1, 2, 2, norm_first=False),
        case(model, 1, 3, 3),
        case(model, 1, 3, 3, norm_first=False),
        case(swapped, 2, 1, 4),
        case(swapped, 2, 1, 4, norm_first=False),
        case(swapped, 2, 3, 4, norm_first=True),
        case(model, 2, 3, 1),
        case(by_hand, 3, 3, 3),
        case(model, 3, 4, 5, norm_first=False),
        case(model, 3, 4, 5),
    ]


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def ones(x: Tensor) -> Tensor:
    return torch.ones_like(x)


@ex.behaviour("pre-norm: sublayers that give 0 leave x as it is")
def _(answer):
    (x,) = some(1, (2, 3, 4))
    expect(answer(x, nothing, nothing, layer_normed, rms_normed), x)


@ex.behaviour("pre-norm: attention reads norm_1(x), and its result is added to x")
def _(answer):
    (x,) = some(2, (2, 3, 4))
    got = answer(x, look_back, nothing, layer_normed, rms_normed)
    expect(got, x + look_back(layer_normed(x)))


@ex.behaviour("pre-norm: feed_forward reads norm_2 of what attention has added to")
def _(answer):
    (x,) = some(3, (2, 3, 4))
    got = answer(x, ones, gated, layer_normed, rms_normed)
    expect(got, x + 1 + gated(rms_normed(x + 1)))


@ex.behaviour("post-norm: with sublayers that give 0 the result is norm_2(norm_1(x))")
def _(answer):
    (x,) = some(4, (2, 3, 4))
    got = answer(x, nothing, nothing, layer_normed, rms_normed, norm_first=False)
    expect(got, rms_normed(layer_normed(x)))


@ex.behaviour("post-norm: attention reads x, and the sum of both is normalised")
def _(answer):
    (x,) = some(5, (2, 3, 4))
    got = answer(x, look_back, nothing, layer_normed, rms_normed, norm_first=False)
    expect(got, rms_normed(layer_normed(x + look_back(x))))


@ex.behaviour("post-norm: the last thing that happens is norm_2")
def _(answer):
    (x,) = some(6, (2, 3, 4))
    got = answer(x, look_back, gated, layer_normed, ones, norm_first=False)
    expect(got, torch.ones(2, 3, 4))


@ex.behaviour("if attention looks back only, a later token cannot change an earlier output")
def _(answer):
    (x,) = some(7, (2, 4, 3))
    functions = (look_back, gated, layer_normed, rms_normed)
    later = x.clone()
    later[:, 3] += 2
    expect(answer(later, *functions)[:, :3], answer(x, *functions)[:, :3])


def _step(x: Tensor, sublayer: Function, norm: Function, first: bool) -> Tensor:
    """One sublayer with its norm and its residual, as it should be."""
    return x + sublayer(norm(x)) if first else norm(x + sublayer(x))


def _wired(*, one: Function = _step, two: Function = _step) -> Function:
    """A block of two steps, one of them or both wrong."""

    def function(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
        x = one(x, attention, norm_1, norm_first)
        return two(x, feed_forward, norm_2, norm_first)

    return function


RESIDUAL = "What is each sublayer's result added to?"
NORMED = "Where does each norm stand: before the sublayer, or around the sum?"

# Wrong steps: (x, sublayer, norm, norm_first) -> x. The name has a gap for where it was made.
STEPS = [
    Mistake(
        "a block without the residual around {}",
        "The result replaces x instead of being added to it.",
        RESIDUAL,
        lambda x, s, norm, first: s(norm(x)) if first else norm(s(x)),
    ),
    Mistake(
        "a block without the norm of {}",
        "x is neither normalised before nor after.",
        NORMED,
        lambda x, s, norm, first: x + s(x),
    ),
    Mistake(
        "a block with the norm on the result of {}, inside the residual",
        "The norm stands after the sublayer and before the sum.",
        NORMED,
        lambda x, s, norm, first: x + norm(s(x)),
    ),
    Mistake(
        "a block with the residual of {} taken from the normalised x",
        "x itself is lost: the norm's result is carried on in its place.",
        RESIDUAL,
        lambda x, s, norm, first: norm(x) + s(norm(x)) if first else norm(x + s(x)),
    ),
]
for _wrong in STEPS:
    for _where, _places in (
        ("attention", {"one": _wrong.function}),
        ("feed_forward", {"two": _wrong.function}),
        ("both sublayers", {"one": _wrong.function, "two": _wrong.function}),
    ):
        ex.mistake(_wrong.name.format(_where), _wrong.cause, _wrong.ask)(_wired(**_places))

# Wrong steps that are made in both places.
BOTH = [
    Mistake(
        "with the norm on the residual only",
        "The sublayer reads x as it is, and the norm sits on the other branch.",
        NORMED,
        lambda x, s, norm, first: norm(x) + s(x),
    ),
    Mistake(
        "normalised before and after",
        "Pre-norm and post-norm are both there at once.",
        NORMED,
        lambda x, s, norm, first: norm(x + s(norm(x))),
    ),
    Mistake(
        "with a norm on both sides of the sublayer",
        "The sublayer's result is normalised once more before it is added.",
        NORMED,
        lambda x, s, norm, first: x + norm(s(norm(x))),
    ),
    Mistake(
        "with x added twice",
        "The residual counts double.",
        "How often is x added in each line of the formula?",
        lambda x, s, norm, first: x + _step(x, s, norm, first) if first else norm(2 * x + s(x)),
    ),
    Mistake(
        "with the mean of x and the sublayer's result",
        "The sum is halved.",
        "Does the formula divide by 2?",
        lambda x, s, norm, first: (x + s(norm(x))) / 2 if first else norm((x + s(x)) / 2),
    ),
    Mistake(
        "with the sublayer's result subtracted",
        "The sign of what is added is wrong.",
        "Which sign stands between x and the sublayer?",
        lambda x, s, norm, first: x - s(norm(x)) if first else norm(x - s(x)),
    ),
    Mistake(
        "with products instead of sums",
        "A sublayer that gives 0 wipes x out.",
        "Which of `+` and `*` stands between x and the sublayer?",
        lambda x, s, norm, first: x * s(norm(x)) if first else norm(x * s(x)),
    ),
]
ex.mistakes_from(BOTH, "a block", lambda part: _wired(one=part, two=part))


def _never(x: Tensor, sublayer: Function, norm: Function, first: bool) -> Tensor:
    """A step that is left out."""
    return x


def _pre(x: Tensor, sublayer: Function, norm: Function, first: bool = True) -> Tensor:
    return _step(x, sublayer, norm, True)


def _post(x: Tensor, sublayer: Function, norm: Function, first: bool = False) -> Tensor:
    return _step(x, sublayer, norm, False)


ex.mistake(
    "a pre-norm block, whatever norm_first says",
    "The argument norm_first has no effect.",
    "What should happen when norm_first is False?",
)(_wired(one=_pre, two=_pre))
ex.mistake(
    "a post-norm block, whatever norm_first says",
    "The argument norm_first has no effect.",
    "What should happen when norm_first is True?",
)(_wired(one=_post, two=_post))
ex.mistake(
    "a block with pre-norm and post-norm swapped",
    "norm_first is read the wrong way round.",
    "Is it `if norm_first` or `if not norm_first`?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, a, f, n1, n2, not norm_first))
ex.mistake(
    "a block with pre-norm for attention and post-norm for feed_forward",
    "The two sublayers are wired differently.",
    NORMED,
)(_wired(one=_pre, two=_post))
ex.mistake(
    "a block with post-norm for attention and pre-norm for feed_forward",
    "The two sublayers are wired differently.",
    NORMED,
)(_wired(one=_post, two=_pre))
ex.mistake(
    "a block without attention",
    "The tokens never look at one another.",
    "Is each of the two sublayers called?",
)(_wired(one=_never))
ex.mistake(
    "a block without feed_forward",
    "The second sublayer is missing.",
    "Is each of the two sublayers called?",
)(_wired(two=_never))
ex.mistake(
    "a block with attention in both places",
    "feed_forward is never called.",
    "Is each of the two sublayers called once?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, a, a, n1, n2, norm_first))
ex.mistake(
    "a block with feed_forward in both places",
    "attention is never called.",
    "Is each of the two sublayers called once?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, f, f, n1, n2, norm_first))
ex.mistake(
    "a block with norm_1 in both places",
    "norm_2 is never used.",
    "Which norm belongs to which sublayer?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, a, f, n1, n1, norm_first))
ex.mistake(
    "a block with norm_2 in both places",
    "norm_1 is never used.",
    "Which norm belongs to which sublayer?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, a, f, n2, n2, norm_first))
ex.mistake(
    "a block with the norms swapped",
    "norm_2 goes with attention and norm_1 with feed_forward.",
    "Which norm belongs to which sublayer?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, a, f, n2, n1, norm_first))
ex.mistake(
    "a block with feed_forward before attention",
    "The sublayers, each with its norm, have changed places.",
    "Which sublayer comes first?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, f, a, n2, n1, norm_first))
ex.mistake(
    "a block with the sublayers swapped and the norms left in place",
    "feed_forward comes first and takes the norm of attention.",
    "Which sublayer comes first?",
)(lambda x, a, f, n1, n2, norm_first=True: block(x, f, a, n1, n2, norm_first))


ex.mistake(
    "a block that runs post-norm after pre-norm",
    "After the lines for pre-norm the lines for post-norm run as well.",
    "Where does your function end when norm_first is True?",
)(
    lambda x, a, f, n1, n2, norm_first=True: block(
        block(x, a, f, n1, n2) if norm_first else x, a, f, n1, n2, norm_first=False
    )
)


SECOND = "What does the second sublayer read: the block's input, or what the first made of it?"


@ex.mistake(
    "a parallel block: both sublayers read the block's input",
    "feed_forward never sees what attention found.",
    SECOND,
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    if norm_first:
        return x + attention(norm_1(x)) + feed_forward(norm_2(x))
    return norm_2(norm_1(x + attention(x)) + feed_forward(x))


@ex.mistake(
    "a parallel block with one norm",
    "Both sublayers read norm_1 of the block's input; norm_2 has no place.",
    SECOND,
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    if norm_first:
        return x + attention(norm_1(x)) + feed_forward(norm_1(x))
    return norm_1(x + attention(x) + feed_forward(x))


@ex.mistake(
    "a block whose second residual starts from the block's input",
    "What attention added is read by feed_forward and then lost.",
    "In the second line of the formula, is x the old one or the new one?",
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    if norm_first:
        return x + feed_forward(norm_2(x + attention(norm_1(x))))
    return norm_2(x + feed_forward(norm_1(x + attention(x))))


@ex.mistake(
    "a block with one residual around both sublayers",
    "feed_forward reads attention's result alone, and only the end is added to x.",
    RESIDUAL,
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    if norm_first:
        return x + feed_forward(norm_2(attention(norm_1(x))))
    return norm_2(x + feed_forward(norm_1(attention(x))))


@ex.mistake(
    "a block whose feed_forward reads attention's result alone",
    "The sum is carried on, but feed_forward reads only what attention gave.",
    SECOND,
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    added = attention(norm_1(x)) if norm_first else attention(x)
    if norm_first:
        return x + added + feed_forward(norm_2(added))
    return norm_2(norm_1(x + added) + feed_forward(added))


@ex.mistake(
    "a block with norm_2 once more at the end",
    "A stack of pre-norm blocks has one last norm, but that is not the block's.",
    "How often does norm_2 stand in the formula?",
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    return norm_2(block(x, attention, feed_forward, norm_1, norm_2, norm_first))


@ex.mistake(
    "a block with norm_1 once more at the beginning",
    "The block's input is normalised before anything else, its residual too.",
    "How often does norm_1 stand in the formula?",
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    return block(norm_1(x), attention, feed_forward, norm_1, norm_2, norm_first)


@ex.mistake(
    "a block with its input added once more at the end",
    "There is a third residual, around the whole block.",
    "How many sums does the formula have?",
)
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    return x + block(x, attention, feed_forward, norm_1, norm_2, norm_first)


@ex.alternative("a loop over the sublayers")
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    for sublayer, norm in ((attention, norm_1), (feed_forward, norm_2)):
        x = x + sublayer(norm(x)) if norm_first else norm(x + sublayer(x))
    return x


@ex.alternative("a name for every step")
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    if not norm_first:
        middle = norm_1(attention(x).add(x))
        return norm_2(feed_forward(middle).add(middle))
    seen = attention(norm_1(x))
    thought = feed_forward(norm_2(x + seen))
    return x + seen + thought


@ex.alternative("a residual as a function, the norms switched to the identity")
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    def residual(x, sublayer, norm):
        before, after = (norm, lambda y: y) if norm_first else (lambda y: y, norm)
        return after(x + sublayer(before(x)))

    return residual(residual(x, attention, norm_1), feed_forward, norm_2)


@ex.alternative("one batch element at a time")
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    functions = (attention, feed_forward, norm_1, norm_2)
    return torch.cat([block(one, *functions, norm_first=norm_first) for one in x.split(1)])


@ex.alternative("in float64, and back")
def _(x, attention, feed_forward, norm_1, norm_2, norm_first=True):
    functions = (attention, feed_forward, norm_1, norm_2)
    return block(x.double(), *functions, norm_first).to(x.dtype)
