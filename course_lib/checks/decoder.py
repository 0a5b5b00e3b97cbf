"""Exercises of chapter 09: predict the next token, and write."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import Broken, expect
from ._inputs import normal
from ._wrong_parts import (
    CROSS_ENTROPIES,
    MASKINGS,
    NORMALISATIONS,
    SCALES,
    chosen,
    per_token,
    visible_softmax,
)

INF = math.inf


def _distinct(g: torch.Generator, *shape: int) -> Tensor:
    """Numbers from -2 to 2 with one decimal, no two alike."""
    tenths = torch.randperm(41, generator=g)[: math.prod(shape)].view(shape) - 20
    return tenths / 10


# --- 1. inputs and targets --------------------------------------------------------------------

ex = Exercise(
    "next_token_pairs",
    chapter="09_decoder",
    title="Inputs and targets",
    minutes=5,
    difficulty=1,
    importance=5,
    prompt=r"""
A text is its own teacher: at every position the right answer is the token that comes next. So one
row of $n$ tokens gives $n - 1$ questions with their answers:

$$\text{input}_i = x_i, \qquad \text{target}_i = x_{i+1} \qquad (0 \le i < n - 1)$$

`tokens` is `(batch, n)` integers with $n \geq 2$. Return `(inputs, targets)`, both
`(batch, n - 1)`. There is no start token and no padding: the last token has no successor, so it is
nobody's input, and the first one is nobody's target.
""",
    hints=(
        "Which token is never an input, and which one never a target?",
        "Both results are the tokens with one column left out: for one of them the first, for the "
        "other the last.",
        "`tokens[:, 1:]` leaves out the first column. Which of the two results is that?",
    ),
)


@ex.solution
def next_token_pairs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What a decoder reads and what it must predict. tokens: (batch, n) -> 2 x (batch, n - 1)."""
    ### BEGIN SOLUTION
    inputs = tokens[:, :-1]  # (batch, n) -> (batch, n - 1): nothing follows the last token
    targets = tokens[:, 1:]  # (batch, n) -> (batch, n - 1): nothing precedes the first
    return inputs, targets
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, n: int) -> Case:
        ids = 10 + torch.randperm(90, generator=g)[: batch * n]
        return {"tokens": ids.reshape(batch, n)}  # (batch · n,) -> (batch, n)

    repeated = case(2, 5)
    repeated["tokens"][:, 1:3] = 0  # a token may follow itself, and 0 is a token like any other
    repeated["tokens"][0, 4] = repeated["tokens"][0, 0]
    sizes = [(1, 3), (2, 3), (1, 2), (3, 3), (2, 4), (3, 2)]
    return [*(case(*size) for size in sizes), repeated, case(1, 6), case(4, 5)]


THREE = torch.tensor([[11, 12, 13], [21, 22, 23]])


@ex.behaviour("the targets are the tokens that follow the inputs")
def _(answer):
    case = {"tokens": torch.tensor([[11, 12, 13]])}
    expect(answer.on(case), (torch.tensor([[11, 12]]), torch.tensor([[12, 13]])), case=case)


@ex.behaviour("the last token is never an input")
def _(answer):
    other = THREE.clone()
    other[:, -1] += 50
    expect(answer(other)[0], answer(THREE)[0])


@ex.behaviour("the first token is never a target")
def _(answer):
    other = THREE.clone()
    other[:, 0] += 50
    expect(answer(other)[1], answer(THREE)[1])


@ex.behaviour("input i + 1 is target i")
def _(answer):
    inputs, targets = answer(torch.arange(30, 40).view(2, 5))
    expect(inputs[:, 1:], targets[:, :-1])


@ex.behaviour("rows do not meet")
def _(answer):
    expect(tuple(part[1:] for part in answer(THREE)), answer(THREE[1:]))


DIRECTION = "After token 0 has been read, which token should be predicted?"
LENGTH = "A row of n tokens has how many neighbours?"
ROWS = "Along which dimension do the tokens of one text lie?"
TWO = "Which two tensors does the docstring promise?"


def _behind(tokens: Tensor, last: int) -> Tensor:
    """The tokens after the first, and one more."""
    return F.pad(tokens[:, 1:], (0, 1), value=last)


ex.mistake(
    "the pair with inputs and targets swapped",
    "The model reads token i + 1 and is asked for token i: it learns to write backwards.",
    DIRECTION,
)(lambda t: (t[:, 1:], t[:, :-1]))
ex.mistake(
    "the inputs twice",
    "The model is asked for the token that it has just read.",
    DIRECTION,
)(lambda t: (t[:, :-1], t[:, :-1]))
ex.mistake(
    "the targets twice",
    "The model is asked for the token that it has just read.",
    DIRECTION,
)(lambda t: (t[:, 1:], t[:, 1:]))
ex.mistake(
    "all tokens twice, without a shift",
    "The model is asked for the token that it has just read.",
    DIRECTION,
)(lambda t: (t, t.clone()))
ex.mistake(
    "the pair with the last token still among the inputs",
    "Inputs and targets have different lengths: nothing follows the last token.",
    LENGTH,
)(lambda t: (t, t[:, 1:]))
ex.mistake(
    "the pair with the first token still among the targets",
    "Inputs and targets have different lengths, and the targets are not shifted.",
    LENGTH,
)(lambda t: (t[:, :-1], t))
ex.mistake(
    "n inputs, and the tokens rolled to the left",
    "`roll` brings round what falls off: the last token is asked for the first one.",
    LENGTH,
)(lambda t: (t, t.roll(-1, 1)))
ex.mistake(
    "n inputs, and the tokens rolled to the right",
    "The model is asked for the token before, and the first one for the last.",
    DIRECTION,
)(lambda t: (t, t.roll(1, 1)))
ex.mistake(
    "n inputs, and all tokens rolled to the left as one row",
    "Without `dims`, `roll` flattens: a row ends with the first token of the next.",
    ROWS,
)(lambda t: (t, t.roll(-1)))
ex.mistake(
    "the inputs, with the tokens before them as targets",
    "The targets are shifted the wrong way.",
    DIRECTION,
)(lambda t: (t[:, :-1], t.roll(1, 1)[:, :-1]))
ex.mistake(
    "n inputs, and the targets with 0 behind",
    "0 is a token like any other: the last position is taught that it comes next.",
    LENGTH,
)(lambda t: (t, _behind(t, 0)))
ex.mistake(
    "n inputs, and the targets with -100 behind",
    "The loss would leave that position out, but here both results have n - 1 columns.",
    LENGTH,
)(lambda t: (t, _behind(t, -100)))
ex.mistake(
    "n inputs that begin with a start token 0, and all tokens as targets",
    "That is how the decoder of a translator is fed; here there is no start token.",
    "Which token is nobody's target?",
)(lambda t: (F.pad(t[:, :-1], (1, 0)), t))
ex.mistake(
    "the pair shifted along the batch",
    "Each text is asked for the next text.",
    ROWS,
)(lambda t: (t[:-1], t[1:]))
ex.mistake(
    "the pair with the last row left out of the inputs instead of the last column",
    "`tokens[:-1]` cuts the first dimension, which is the batch.",
    ROWS,
)(lambda t: (t[:-1], t[:, 1:]))
ex.mistake(
    "the pair with the first row left out of the targets instead of the first column",
    "`tokens[1:]` cuts the first dimension, which is the batch.",
    ROWS,
)(lambda t: (t[:, :-1], t[1:]))
ex.mistake(
    "the pairs of all rows as one long text",
    "The last token of a row is asked for the first token of the next row.",
    ROWS,
)(lambda t: (t.flatten()[:-1], t.flatten()[1:]))
ex.mistake(
    "the pair shifted by two",
    "The token in between is neither read nor asked for.",
    DIRECTION,
)(lambda t: (t[:, :-2], t[:, 2:]))
ex.mistake(
    "the pair without its last column",
    "The last token is never asked for.",
    LENGTH,
)(lambda t: (t[:, :-2], t[:, 1:-1]))
ex.mistake(
    "the pair without its first column",
    "The first token is never read.",
    LENGTH,
)(lambda t: (t[:, 1:-1], t[:, 2:]))
ex.mistake(
    "the inputs, and the last token alone",
    "Only the last position has a target; the decoder learns at every position.",
    "How many targets are there for the inputs?",
)(lambda t: (t[:, :-1], t[:, -1:]))
ex.mistake(
    "the inputs, and the last token of each row without its dimension",
    "Only the last position has a target; the decoder learns at every position.",
    "How many targets are there for the inputs?",
)(lambda t: (t[:, :-1], t[:, -1]))
ex.mistake(
    "the inputs, and the second token of each row",
    "`tokens[:, 1]` is one column; a slice has a colon.",
    "How do you write all columns from the second on?",
)(lambda t: (t[:, :-1], t[:, 1]))
ex.mistake(
    "the rows cut in the middle, into a prompt and its continuation",
    "No input stands beside its successor.",
    DIRECTION,
)(lambda t: t.tensor_split(2, 1))
ex.mistake(
    "every second pair",
    "Each token is either an input or a target; inside a row it is both.",
    "Is the target of one position the input of the next?",
)(lambda t: (t[:, :-1:2], t[:, 1::2]))
ex.mistake(
    "the pair of the text backwards",
    "The rows were turned round.",
    "In which order does the model read?",
)(lambda t: (t.flip(1)[:, :-1], t.flip(1)[:, 1:]))
ex.mistake(
    "the pair of the first row alone",
    "The other texts of the batch are lost.",
    ROWS,
)(lambda t: (t[:1, :-1], t[:1, 1:]))
ex.mistake(
    "the inputs alone",
    "The targets are missing.",
    TWO,
)(lambda t: t[:, :-1])
ex.mistake(
    "the targets alone",
    "The inputs are missing.",
    TWO,
)(lambda t: t[:, 1:])
ex.mistake(
    "the pair as lists of numbers",
    "The numbers are right, but they are not tensors.",
    TWO,
)(lambda t: (t[:, :-1].tolist(), t[:, 1:].tolist()))
ex.mistake(
    "inputs and targets stacked in one tensor",
    "The numbers are right, but one tensor came back.",
    TWO,
)(lambda t: torch.stack([t[:, :-1], t[:, 1:]]))
ex.mistake(
    "one tensor of neighbours, (batch, n - 1, 2)",
    "The numbers are right, but one tensor came back.",
    TWO,
)(lambda t: torch.stack([t[:, :-1], t[:, 1:]], -1))


@ex.alternative("narrow")
def _(tokens):
    n = tokens.shape[1]
    return tokens.narrow(1, 0, n - 1), tokens.narrow(1, 1, n - 1)


ex.alternative("windows of two")(lambda tokens: tokens.unfold(1, 2, 1).unbind(-1))
ex.alternative("roll, without the last column")(
    lambda tokens: (tokens[:, :-1], tokens.roll(-1, 1)[:, :-1])
)
ex.alternative("index_select")(
    lambda tokens: tuple(
        tokens.index_select(1, torch.arange(tokens.shape[1] - 1) + shift) for shift in (0, 1)
    )
)
ex.alternative("a list for each row")(
    lambda tokens: (
        torch.tensor([row[:-1] for row in tokens.tolist()]),
        torch.tensor([row[1:] for row in tokens.tolist()]),
    )
)


# --- 2. the loss ------------------------------------------------------------------------------

ex = Exercise(
    "next_token_loss",
    chapter="09_decoder",
    title="The loss of a language model",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    prompt=r"""
At each position the model gives a score, a **logit**, to each of $V$ tokens. Its loss is how
surprised it is by the token that really came, averaged over all of them:

$$\text{loss} = -\frac{1}{N} \sum_{b,i} \log
  \frac{e^{\text{logits}_{b,i,\text{target}_{b,i}}}}{\sum_v e^{\text{logits}_{b,i,v}}}$$

- `logits` is `(batch, n, V)`, `targets` `(batch, n)`; the result is one number, in nats.
- `targets[b, i]` answers `logits[b, i]`: nothing needs to be shifted.
- A target of **-100** is left out of the sum, and $N$ counts the others. There is at least one. All
  that count, count alike, whatever row they stand in. Token 0 is a token like any other.
- Logits may be as large as 1000, and an unlikely token may well come: $e^{1000}$ is `inf` in
  float32, and $\log e^{-1000}$ is `-inf` if the exponential is taken first.

`F.cross_entropy` is allowed; you learn more without it.
""",
    hints=(
        "A model gives every token the same logit. What is its loss, and does the target matter?",
        "log softmax(x)_v = x_v - log Σ exp(x), and `logsumexp` computes the second term without "
        "overflow.",
        "counted = targets != -100 is (batch, n). What are the shapes of logits[counted] and "
        "targets[counted]?",
    ),
)


@ex.solution
def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean nats per token; targets of -100 are left out.

    logits: (batch, n, V), targets: ints (batch, n) -> a number, shape ().
    """
    ### BEGIN SOLUTION
    counted = targets != -100  # (batch, n)
    logits, targets = logits[counted], targets[counted]  # (N, V) and (N,)
    chosen = logits.gather(-1, targets[:, None])[:, 0]  # (N, V) at (N, 1) -> (N,)
    # -log softmax, written so that no exponential is taken alone.
    return (logits.logsumexp(dim=-1) - chosen).mean()  # (N,) -> ()
    ### END SOLUTION


def _loss_case(g: torch.Generator, batch: int, n: int, V: int, *ignored: tuple[int, int]) -> Case:
    """ignored: places (row, position) of targets that do not count."""
    targets = torch.randint(V, (batch, n), generator=g)
    for place in ignored:
        targets[place] = -100
    return {"logits": normal(g, batch, n, V), "targets": targets}


def _far_apart(g: torch.Generator, least: float, most: float) -> Case:
    """One logit far above the others; the target is that one in turn with another."""
    case = _loss_case(g, 1, 4, 3)
    logits = torch.full((1, 4, 3), least)
    logits[..., 0] = most
    return case | {"logits": logits + case["logits"], "targets": torch.tensor([[0, 1, 0, 2]])}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    high = _far_apart(g, 100.0, 200.0)
    uneven = _loss_case(g, 2, 3, 4)
    uneven["logits"][1] += 300.0  # the rows are far from one another
    return [
        _loss_case(g, 1, 2, 2),
        _loss_case(g, 1, 2, 2, (0, 1)),
        _loss_case(g, 2, 3, 4),
        _loss_case(g, 3, 3, 3),
        _loss_case(g, 2, 3, 4, (1, 0), (1, 2)),
        _loss_case(g, 3, 1, 5),
        _loss_case(g, 3, 2, 4, (1, 0), (1, 1), (2, 0)),  # nothing counts in row 1
        uneven,
        _far_apart(g, -60.0, 60.0),
        _far_apart(g, -600.0, 400.0),
        high | {"targets": torch.zeros(1, 4, dtype=torch.long)},
        _loss_case(g, 3, 4, 6, (0, 0), (0, 1), (2, 3)),
    ]


LOGITS = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [[1.0, 1.0, 3.0], [5.0, 0.0, 0.0]]])
TARGETS = torch.tensor([[0, 2], [1, 1]])


@ex.behaviour("with equal logits it is log V, whatever the target")
def _(answer):
    case = {"logits": torch.zeros(1, 2, 3), "targets": torch.tensor([[0, 2]])}
    expect(answer.on(case), torch.tensor(math.log(3)), case=case)


@ex.behaviour("halving the probability of the target adds log 2")
def _(answer):
    shares = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    more, less = (answer(row[None], torch.tensor([[0]])) for row in shares)
    expect(less - more, torch.tensor(math.log(2)))


@ex.behaviour("adding the same number to all logits of a position changes nothing")
def _(answer):
    shift = torch.tensor([[[1.0], [-3.0]], [[0.0], [7.0]]])
    expect(answer(LOGITS + shift, TARGETS), answer(LOGITS, TARGETS))


@ex.behaviour("each token counts alike: two equal rows cost what one costs")
def _(answer):
    twice = answer(LOGITS[:1].repeat(2, 1, 1), TARGETS[:1].repeat(2, 1))
    expect(twice, answer(LOGITS[:1], TARGETS[:1]))


@ex.behaviour("a position with the target -100 changes nothing")
def _(answer):
    wider = F.pad(LOGITS, (0, 0, 0, 1), value=4.0), F.pad(TARGETS, (0, 1), value=-100)
    expect(answer(*wider), answer(LOGITS, TARGETS))


@ex.behaviour("logits of 1000 give the right loss")
def _(answer):
    case = {"logits": torch.tensor([[[1000.0, 0.0]]]), "targets": torch.tensor([[1]])}
    expect(answer.on(case), torch.tensor(1000.0), case=case)


@ex.behaviour("a model that is sure and right has the loss 0")
def _(answer):
    case = {"logits": torch.tensor([[[0.0, 50.0]]]), "targets": torch.tensor([[1]])}
    expect(answer.on(case), torch.tensor(0.0), case=case)


def _loss(token: Function = per_token, reduce: Function | None = None) -> Function:
    """The loss with another cost of a token, or another mean."""

    def function(logits, targets):
        counted = targets != -100
        losses = token(logits, targets.clamp(min=0))  # (batch, n)
        return reduce(losses, counted) if reduce else losses[counted].mean()

    return function


SOFTMAX = "What turns logits into log-probabilities?"
DIMENSION = "Along which dimension of (batch, n, V) do the tokens of the vocabulary lie?"
DIVIDE = "By how many tokens is the sum divided?"
STABLE = "Which function gives log Σ exp in one step, without overflow?"
LEFT_OUT = "Is a target of -100 left out of the sum, and of N?"

# (logits, targets without -100) -> losses (batch, n)
TOKENS = [
    *CROSS_ENTROPIES,
    Mistake(
        "with one maximum for the whole tensor",
        "A position far below another one's maximum underflows to log 0.",
        "Does each position subtract its own maximum?",
        lambda x, t: (x - x.max()).exp().sum(-1).log() - chosen(x - x.max(), t),
    ),
    Mistake(
        "with the maximum subtracted in the sum alone",
        "What is taken out of the exponent must be put back, or be taken off the target's logit.",
        "Is the maximum subtracted from both terms?",
        lambda x, t: (x - x.amax(-1, keepdim=True)).logsumexp(-1) - chosen(x, t),
    ),
    Mistake(
        "averaged over the vocabulary too",
        "A product with a one-hot target is V numbers, of which one counts: they are to be summed.",
        "Over which dimension do you take the mean, and over which the sum?",
        lambda x, t: per_token(x, t) / x.shape[-1],
    ),
    Mistake(
        "of all tokens of the vocabulary instead of the target",
        "The targets have no effect.",
        "Which of the V log-probabilities of a position counts?",
        lambda x, t: -x.log_softmax(-1).mean(-1),
    ),
    Mistake(
        "of the likeliest token instead of the target",
        "The model is not asked for the right answer, only how sure it is.",
        "Which of the V log-probabilities of a position counts?",
        lambda x, t: -x.log_softmax(-1).amax(-1),
    ),
    Mistake(
        "as the entropy of the prediction",
        "The log-probabilities are weighted by the model's own probabilities, not by the target.",
        "Where do the targets enter?",
        lambda x, t: -(x.softmax(-1) * x.log_softmax(-1)).nan_to_num(0.0).sum(-1),
    ),
    Mistake(
        "as the share of wrong guesses",
        "argmax has no useful gradient, and it does not see how sure the model is.",
        "Which quantity of the formula says how sure the model is?",
        lambda x, t: (x.argmax(-1) != t).to(x.dtype),
    ),
]

# (losses, counted), both (batch, n) -> a number
REDUCTIONS = [
    Mistake(
        "summed instead of averaged",
        "The sum grows with the number of tokens.",
        DIVIDE,
        lambda losses, counted: losses[counted].sum(),
    ),
    Mistake(
        "summed over each row and averaged over the batch",
        "The sum grows with the length of the rows.",
        DIVIDE,
        lambda losses, counted: losses[counted].sum() / len(losses),
    ),
    Mistake(
        "summed over the batch and averaged over the positions",
        "The sum grows with the number of rows.",
        DIVIDE,
        lambda losses, counted: losses[counted].sum() / losses.shape[1],
    ),
    Mistake(
        "divided by all positions, those with -100 too",
        "The targets of -100 have left the sum, but not the count.",
        DIVIDE,
        lambda losses, counted: losses[counted].sum() / losses.numel(),
    ),
    Mistake(
        "with targets of -100 taken for token 0",
        "The model is asked to predict token 0 wherever nothing should count.",
        LEFT_OUT,
        lambda losses, counted: losses.mean(),
    ),
    Mistake(
        "with targets of -100 taken for token 0 in the sum, but not in N",
        "They have left the count, but not the sum.",
        LEFT_OUT,
        lambda losses, counted: losses.sum() / counted.sum(),
    ),
    Mistake(
        "averaged within each row first",
        "A token of a row in which few count weighs more than others, and an empty row gives NaN.",
        "Is it the mean of means, or one mean over all tokens that count?",
        lambda losses, counted: ((losses * counted).sum(1) / counted.sum(1)).mean(),
    ),
    Mistake(
        "averaged within each row first, with 0 for an empty row",
        "A token of a row in which few count weighs more than others.",
        "Is it the mean of means, or one mean over all tokens that count?",
        lambda losses, counted: ((losses * counted).sum(1) / counted.sum(1).clamp(min=1)).mean(),
    ),
    Mistake(
        "averaged within each row first, without empty rows",
        "A token of a row in which few count weighs more than others.",
        "Is it the mean of means, or one mean over all tokens that count?",
        lambda losses, counted: ((losses * counted).sum(1) / counted.sum(1)).nanmean(),
    ),
    Mistake(
        "in bits instead of nats",
        "The logarithm is to the base 2.",
        "What is the loss of two equal logits: log 2, or 1?",
        lambda losses, counted: losses[counted].mean() / math.log(2),
    ),
    Mistake(
        "with the sign turned round",
        "That is the mean log-probability, which is never above 0.",
        "Should a good model have a low loss or a high one?",
        lambda losses, counted: -losses[counted].mean(),
    ),
    Mistake(
        "as perplexity",
        "exp of the mean loss is the perplexity.",
        "Does the formula take exp at the end?",
        lambda losses, counted: losses[counted].mean().exp(),
    ),
    Mistake(
        "as the logarithm of the mean probability",
        "Mean and logarithm are in the wrong order.",
        "Is it the mean of logarithms, or the logarithm of a mean?",
        lambda losses, counted: -(-losses[counted]).exp().mean().log(),
    ),
    Mistake(
        "of each token, not averaged",
        "One number was asked for.",
        "Which reduction does the formula end in?",
        lambda losses, counted: losses * counted,
    ),
]

ex.mistakes_from(TOKENS, "the loss", lambda part: _loss(token=part))
ex.mistakes_from(REDUCTIONS, "the loss", lambda part: _loss(reduce=part))
ex.mistake(
    "the loss with the logits shifted against the targets",
    "`logits[:, :-1]` and `targets[:, 1:]`: the targets had been shifted already.",
    "Which target answers the logits at position 0?",
)(lambda x, t: F.cross_entropy(x[:, :-1].flatten(0, 1), t[:, 1:].flatten()))
ex.mistake(
    "the loss with the logits shifted against the targets, the other way",
    "The logits at position i + 1 are held against the target at position i, which they have read.",
    "Which target answers the logits at position 0?",
)(lambda x, t: F.cross_entropy(x[:, 1:].flatten(0, 1), t[:, :-1].flatten()))
ex.mistake(
    "the loss with token 0 left out too",
    "0 is a token like any other here, not padding.",
    "Which targets are left out?",
)(lambda x, t: per_token(x, t.clamp(min=0))[t > 0].mean())
ex.mistake(
    "the loss with every position held against all targets",
    "`x[:, targets]` picks those columns in every row: an N by N table.",
    "How do you pick one column in each row, another one in each?",
)(lambda x, t: -x[t != -100].log_softmax(-1)[:, t[t != -100]].mean())

ex.alternative("F.cross_entropy, classes second")(lambda x, t: F.cross_entropy(x.mT, t))
ex.alternative("F.cross_entropy of log-probabilities")(
    lambda x, t: F.cross_entropy(x.log_softmax(-1).flatten(0, 1), t.flatten())
)
ex.alternative("a one-hot product, in float64 and back")(
    lambda x, t: (
        -(
            (x.double().log_softmax(-1) * F.one_hot(t.clamp(min=0), x.shape[-1])).sum(-1)
            * (t != -100)
            / (t != -100).sum()
        )
        .sum()
        .to(x.dtype)
    )
)


@ex.alternative("the maximum of each position, by hand")
def _(logits, targets):
    shifted = logits - logits.amax(-1, keepdim=True)  # (batch, n, V)
    log_p = shifted - shifted.exp().sum(-1, keepdim=True).log()
    flat, wanted = log_p.flatten(0, 1), targets.flatten()  # (batch · n, V), (batch · n,)
    losses = -flat[torch.arange(len(flat)), wanted.clamp(min=0)]
    return torch.where(wanted == -100, 0.0, losses).sum() / (wanted != -100).sum()


@ex.alternative("a loop: log(1 + exp(all others against the target))")
def _(logits, targets):
    losses = []
    for x, target in zip(logits.flatten(0, 1), targets.flatten().tolist(), strict=True):
        if target != -100:
            others = torch.cat([x[:target], x[target + 1 :]]).logsumexp(0)
            losses.append(F.softplus(others - x[target]))
    return sum(losses) / len(losses)


# --- 3. temperature and top-k -----------------------------------------------------------------

ex = Exercise(
    "temperature_top_k",
    chapter="09_decoder",
    title="Temperature and top-k",
    minutes=15,
    difficulty=2,
    importance=4,
    points=2,
    prompt=r"""
To write, the next token is drawn by chance. Two knobs say how much chance. The **temperature** $T$
divides the logits: below 1 the likely tokens become likelier still, above 1 all become more alike.
**Top-k** lets only the $k$ largest logits compete:

$$p_v = \frac{e^{\text{logit}_v / T}}{\sum_{u \in \text{top } k} e^{\text{logit}_u / T}}
  \quad (v \in \text{top } k), \qquad p_v = 0 \quad \text{otherwise}$$

`logits` is `(batch, V)`, and so are the probabilities that you return, each at its own token. Each
row has a top $k$ of its own. `temperature` is above 0, `top_k` from 1 to $V$; `top_k=None` lets
all tokens compete. At $T = 0.01$ a logit of 2 becomes 200, and $e^{200}$ is `inf` in float32.
""",
    hints=(
        "What do the probabilities of the kept tokens sum to, before and after the others are "
        "removed?",
        "A logit of -inf gets the probability 0, and softmax shares out the rest by itself.",
        "`logits.topk(top_k).values[:, -1:]` is the k-th largest logit of each row, (batch, 1). "
        "Which logits are hidden then?",
    ),
)


@ex.solution
def temperature_top_k(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """Probabilities of the next token. logits: (batch, V) -> (batch, V), rows sum to 1."""
    ### BEGIN SOLUTION
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(top_k, dim=-1).values[:, -1:]  # (batch, V) -> (batch, k) -> (batch, 1)
        logits = logits.masked_fill(logits < least, -math.inf)  # exp(-inf) is exactly 0
    return torch.softmax(logits, dim=-1)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, vocab: int, **options: float) -> Case:
        return {"logits": _distinct(g, batch, vocab), **options}

    cold = case(3, 4, temperature=0.01)
    return [
        case(1, 3),
        case(2, 3, temperature=2.0),
        case(1, 4, temperature=0.5),
        case(1, 3, top_k=2),
        case(2, 4, top_k=1),
        case(2, 5, top_k=3),
        case(3, 3, top_k=2),
        case(3, 4, top_k=4),
        case(1, 1, top_k=1),
        cold,
        case(3, 5, temperature=0.5, top_k=2),
        case(2, 6, temperature=3.0, top_k=4),
        cold | {"top_k": 2},
        {"logits": _distinct(g, 2, 5) - 20.0, "top_k": 2},  # all logits are negative
    ]


ROW = torch.tensor([[1.0, 3.0, 0.0, 2.0]])


@ex.behaviour("each row sums to 1")
def _(answer):
    logits = torch.cat([ROW, ROW.flip(1) / 2])
    for options in ({}, {"temperature": 3.0}, {"top_k": 2}, {"temperature": 0.5, "top_k": 3}):
        expect(answer(logits, **options).sum(-1), torch.ones(2))


@ex.behaviour("without options it is softmax")
def _(answer):
    expect(answer(ROW), ROW.softmax(-1))


@ex.behaviour("at temperature 2 a logit that is 2 higher means e times the probability")
def _(answer):
    case = {"logits": torch.tensor([[0.0, 2.0, 4.0]]), "temperature": 2.0}
    got = answer.on(case)
    expect(got[:, 1:] / got[:, :-1], torch.full((1, 2), math.e))


@ex.behaviour("exactly top_k tokens of each row have a probability above 0")
def _(answer):
    for k in (1, 2, 4):
        case = {"logits": torch.cat([ROW, -ROW]), "top_k": k}
        expect((answer.on(case) > 0).sum(-1), torch.tensor([k, k]), case=case)


@ex.behaviour("the tokens that stay are the likeliest ones")
def _(answer):
    case = {"logits": ROW, "top_k": 2}
    expect(answer.on(case) > 0, torch.tensor([[False, True, False, True]]), case=case)


@ex.behaviour("the kept tokens have the same ratios as before")
def _(answer):
    kept, whole = answer(ROW, top_k=2), answer(ROW)
    expect(kept[:, 1] / kept[:, 3], whole[:, 1] / whole[:, 3])


@ex.behaviour("temperature and top-k act together")
def _(answer):
    case = {"logits": ROW, "temperature": 0.5, "top_k": 2}
    expect(answer.on(case), torch.tensor([[0.0, 0.8807971, 0.0, 0.1192029]]), case=case)


@ex.behaviour("a temperature of 0.01 gives no NaN")
def _(answer):
    case = {"logits": torch.tensor([[2.0, 1.0]]), "temperature": 0.01}
    expect(answer.on(case), torch.tensor([[1.0, 0.0]]), case=case)


@ex.behaviour("rows do not meet")
def _(answer):
    logits = torch.cat([ROW, ROW.flip(1) - 5])
    expect(answer(logits, top_k=2)[1:], answer(logits[1:], top_k=2))


def _rank(logits: Tensor) -> Tensor:
    """0 for the largest of its row, 1 for the next."""
    return logits.argsort(-1, descending=True).argsort(-1)


def _top(logits: Tensor, k: int) -> Tensor:
    return _rank(logits) < k


def _hide(logits: Tensor, keep: Tensor) -> Tensor:
    return logits.masked_fill(~keep, -INF).softmax(-1)


def _sampler(scale: Function | None = None, keep=_top, share=_hide) -> Function:
    """Temperature and top-k, with some parts replaced."""

    def function(logits, temperature=1.0, top_k=None):
        logits = scale(logits, temperature) if scale else logits / temperature
        return logits.softmax(-1) if top_k is None else share(logits, keep(logits, top_k))

    return function


HOT = "At a high temperature, should the probabilities become more alike or less?"
EACH_ROW = "Does each row have a k-th largest logit of its own?"
KEPT = "How many tokens have a probability above 0 when top_k is 1?"
HIDDEN = "Which logit makes exp exactly 0?"
RENORMALISED = "What do the probabilities that are left sum to?"
PLACES = "At which place of the result does the probability of token v stand?"

SCALINGS = [
    Mistake(
        "with the logits multiplied by the temperature",
        "The factor is upside down.",
        HOT,
        lambda x, T: x * T,
    ),
    Mistake(
        "without the temperature",
        "It has no effect, or it cancels: softmax divides a factor out again.",
        "Where does the temperature enter, before softmax or after it?",
        lambda x, T: x,
    ),
    Mistake(
        "with the temperature applied twice",
        "The logits are divided by T².",
        "In how many places do you divide?",
        lambda x, T: x / T / T,
    ),
    Mistake(
        "with the root of the temperature",
        "The logits are divided by √T.",
        "Which power of T stands under the fraction?",
        lambda x, T: x / T**0.5,
    ),
    Mistake(
        "with softmax, the temperature, and softmax again",
        "Probabilities are taken for logits.",
        "What does the temperature divide: logits or probabilities?",
        lambda x, T: x.softmax(-1) / T,
    ),
]

KEEPS = [
    Mistake(
        "with the k smallest logits kept",
        "The least likely tokens are the ones that stay.",
        "Which end of the sorted logits do you keep?",
        lambda x, k: _rank(x) >= x.shape[-1] - k,
    ),
    Mistake(
        "with k + 1 tokens kept", "One token too many stays.", KEPT, lambda x, k: _rank(x) <= k
    ),
    Mistake(
        "with k - 1 tokens kept",
        "The k-th largest logit is hidden too: the comparison is strict, or counts from 1.",
        KEPT,
        lambda x, k: _rank(x) < k - 1,
    ),
    Mistake(
        "with the k largest logits hidden",
        "What should stay is removed.",
        "What does your mask say: keep, or hide?",
        lambda x, k: _rank(x) >= k,
    ),
    Mistake(
        "with the first k tokens of the vocabulary kept",
        "The logits are not sorted: `[:, :k]` are the first k, not the largest.",
        "Which function finds the largest k?",
        lambda x, k: (torch.arange(x.shape[-1]) < k).expand_as(x),
    ),
    Mistake(
        "with the k-th smallest logit as threshold",
        "Sorting ascends by default: entry k - 1 is counted from the wrong end.",
        "Which entry of an ascending row is the k-th largest?",
        lambda x, k: x >= x.sort(-1).values[:, k - 1 : k],
    ),
    Mistake(
        "with the top k of each column",
        "The rows of the batch compete for each token.",
        EACH_ROW,
        lambda x, k: x >= x.topk(k, dim=0).values[-1:],
    ),
    Mistake(
        "with the top k of the whole batch",
        "All rows together keep k tokens; a row may be left with none.",
        EACH_ROW,
        lambda x, k: x >= x.flatten().topk(k).values[-1],
    ),
    Mistake(
        "with the top k of all rows in every row",
        "`x[:, places]` picks the places of every row in each of them.",
        EACH_ROW,
        lambda x, k: _top(x, k).any(0).expand_as(x),
    ),
    Mistake(
        "with the threshold of the first row for all rows",
        "The k-th largest logit of row 0 is held against every row.",
        EACH_ROW,
        lambda x, k: x >= x.topk(k).values[0, -1],
    ),
    Mistake(
        "with the thresholds laid along the vocabulary",
        "`values[:, -1]` is (batch,), and broadcasting lays it along the last dimension.",
        "What shape must the threshold have so that each row meets its own?",
        lambda x, k: x >= x.topk(k).values[:, -1],
    ),
    Mistake(
        "without top-k", "It has no effect.", "Where does `top_k` enter?",
        lambda x, k: torch.ones_like(x, dtype=torch.bool),
    ),
]  # fmt: skip

SHARES = [
    Mistake(
        "with hidden logits set to 0",
        "A logit of 0 is not hidden: exp(0) = 1.",
        HIDDEN,
        lambda x, keep: (x * keep).softmax(-1),
    ),
    Mistake(
        "with hidden logits set to -10",
        "exp(-10) is small but not 0, and other logits may be lower.",
        HIDDEN,
        lambda x, keep: x.masked_fill(~keep, -10.0).softmax(-1),
    ),
    Mistake(
        "with the others removed after softmax, not shared out again",
        "They take their share of the probability with them.",
        RENORMALISED,
        lambda x, keep: x.softmax(-1) * keep,
    ),
    Mistake(
        "with the others removed after softmax, and softmax again",
        "Probabilities are taken for logits, and a removed one counts as exp(0) = 1.",
        RENORMALISED,
        lambda x, keep: (x.softmax(-1) * keep).softmax(-1),
    ),
    Mistake(
        "with -inf put into the probabilities, and softmax again",
        "Probabilities are taken for logits.",
        "How often is softmax applied?",
        lambda x, keep: _hide(x.softmax(-1), keep),
    ),
    Mistake(
        "with -inf put into the probabilities",
        "-inf hides a logit; a probability is removed by 0.",
        "Is it logits or probabilities that you fill?",
        lambda x, keep: x.softmax(-1).masked_fill(~keep, -INF),
    ),
    Mistake(
        "with the others removed and the whole batch divided by one sum",
        "The rows sum to 1 together instead of each.",
        RENORMALISED,
        lambda x, keep: x.softmax(-1) * keep / (x.softmax(-1) * keep).sum(),
    ),
    Mistake(
        "with equal shares for the k tokens",
        "Among those that stay, the likelier token should still be the likelier one.",
        "Where do the logits enter, after the k have been chosen?",
        lambda x, keep: keep / keep.sum(-1, keepdim=True).to(x.dtype),
    ),
    Mistake(
        "of the k tokens alone, (batch, k)",
        "The other tokens are missing, so nobody knows which tokens these are.",
        PLACES,
        lambda x, keep: x.topk(int(keep[0].sum())).values.softmax(-1),
    ),
    Mistake(
        "sorted by rank",
        "The likeliest token stands first, whichever it is.",
        PLACES,
        lambda x, keep: _hide(x, keep).sort(-1, descending=True).values,
    ),
]


def _exp_by_hand(shift: Function) -> Function:
    """exp of the shifted logits, the k largest of them, over their sum."""

    def function(logits, temperature=1.0, top_k=None):
        exp = shift(logits / temperature).exp()
        exp = exp * (exp >= exp.topk(top_k or exp.shape[-1]).values[:, -1:])
        return exp / exp.sum(-1, keepdim=True)

    return function


ex.mistakes_from(SCALINGS, "the probabilities", lambda part: _sampler(scale=part))
ex.mistakes_from(KEEPS, "the probabilities", lambda part: _sampler(keep=part))
ex.mistakes_from(SHARES, "the probabilities", lambda part: _sampler(share=part))
ex.mistake(
    "the probabilities divided by the temperature",
    "After softmax it is too late: the rows no longer sum to 1.",
    "What does the temperature divide: logits or probabilities?",
)(lambda x, temperature=1.0, top_k=None: temperature_top_k(x, 1.0, top_k) / temperature)
ex.mistake(
    "the probabilities raised to the power 1/T, not shared out again",
    "The ratios are right, but the rows no longer sum to 1.",
    RENORMALISED,
)(lambda x, temperature=1.0, top_k=None: temperature_top_k(x, 1.0, top_k) ** (1 / temperature))
ex.mistake(
    "the probabilities without the temperature where top_k is given",
    "The two knobs exclude one another: one branch forgets the other.",
    "Does the temperature act in both branches of your `if`?",
)(lambda x, temperature=1.0, top_k=None: temperature_top_k(x, 1 if top_k else temperature, top_k))
ex.mistake(
    "the probabilities without top-k where the temperature is not 1",
    "The two knobs exclude one another: one branch returns too early.",
    "Does top-k act whatever the temperature?",
)(
    lambda x, temperature=1.0, top_k=None: temperature_top_k(
        x, temperature, top_k if temperature == 1 else None
    )
)
ex.mistake(
    "exp of the logits over its sum, without subtracting the maximum",
    "exp of a large logit is inf, and inf / inf is NaN.",
    "What may be subtracted from all logits of a row without changing the result?",
)(_exp_by_hand(lambda x: x))
ex.mistake(
    "exp of the logits over its sum, with one maximum for the whole batch",
    "A row far below another row's maximum underflows to 0 / 0.",
    "Does each row subtract its own maximum?",
)(_exp_by_hand(lambda x: x - x.max()))


def _finished(change: Function) -> Function:
    """A right answer, spoiled: change(logits that compete, divided by the temperature)."""

    def function(logits, temperature=1.0, top_k=None):
        scaled = logits / temperature
        keep = _top(scaled, top_k or logits.shape[-1])
        return change(scaled.masked_fill(~keep, -INF))

    return function


ex.mistake(
    "the probabilities with softmax over the batch",
    "Columns sum to 1 instead of rows.",
    "In `(batch, V)`, which dimension holds the tokens that compete?",
)(_finished(lambda x: x.softmax(0)))
ex.mistake(
    "the probabilities with softmax over everything",
    "The whole batch sums to 1 instead of each row.",
    "In `(batch, V)`, which dimension holds the tokens that compete?",
)(_finished(lambda x: x.flatten().softmax(0).view_as(x)))
ex.mistake(
    "logits instead of probabilities",
    "Softmax is missing.",
    "What do the entries of a row sum to?",
)(_finished(lambda x: x))
ex.mistake(
    "log-probabilities",
    "A logarithm of a probability is never above 0.",
    "Should `log_softmax` be `softmax`?",
)(_finished(lambda x: x.log_softmax(-1)))
ex.mistake(
    "1 for the likeliest token and 0 for the others",
    "That is greedy: nothing is left to chance.",
    "Which probability has the second token?",
)(_finished(lambda x: (_rank(x) == 0).to(x.dtype)))


@ex.alternative("softmax first, then a power, then shared out again, in float64")
def _(logits, temperature=1.0, top_k=None):
    powers = logits.double().softmax(-1) ** (1 / temperature)  # (batch, V)
    if top_k is not None:
        powers = powers.where(_rank(logits) < top_k, 0.0)
    return (powers / powers.sum(-1, keepdim=True)).to(logits.dtype)


@ex.alternative("softmax of the k largest, scattered to their places")
def _(logits, temperature=1.0, top_k=None):
    values, places = logits.topk(top_k or logits.shape[-1])  # (batch, k)
    shares = (values / temperature).softmax(-1)
    return torch.zeros_like(logits).scatter(-1, places, shares)


@ex.alternative("a loop over the rows, with exp by hand")
def _(logits, temperature=1.0, top_k=None):
    rows = []
    for row in logits:
        least = row.sort(descending=True).values[(top_k or len(row)) - 1]
        exp = torch.exp((row - row.max()) / temperature) * (row >= least)
        rows.append(exp / exp.sum())
    return torch.stack(rows)


@ex.alternative("kthvalue, and the lowest number for -inf")
def _(logits, temperature=1.0, top_k=None):
    vocab = logits.shape[-1]
    least = logits.kthvalue(vocab - (top_k or vocab) + 1, keepdim=True).values
    lowest = torch.finfo(logits.dtype).min
    return torch.where(logits >= least, logits / temperature, lowest).softmax(-1)


# --- 4. top-p ---------------------------------------------------------------------------------

ex = Exercise(
    "top_p",
    chapter="09_decoder",
    title="Top-p",
    minutes=20,
    difficulty=3,
    importance=4,
    points=2,
    prompt=r"""
How many tokens are worth a chance? After "the capital of France is" one; after "I like" hundreds.
Top-k cannot know. **Top-p**, nucleus sampling, keeps the **fewest tokens, likeliest first, whose
probabilities sum to p or more**, and shares their sum out again:

$$p'_v = \frac{p_v}{\sum_{u \in \text{kept}} p_u} \quad (v \in \text{kept}),
  \qquad p'_v = 0 \quad \text{otherwise}$$

With probabilities 0.5, 0.3, 0.2 and $p = 0.7$ the first two are kept: the second is the one that
**crosses** p. The likeliest token always stays, even if it exceeds p alone. If the tokens so far
sum to exactly p, no further one is kept.

`probabilities` is `(batch, V)` in the order of the vocabulary, not sorted, and each row sums to 1;
so is the result. $0 < p \le 1$, and each row keeps as many tokens as it needs.
""",
    hints=(
        "Sort a row by hand: 0.5, 0.3, 0.2. For each token, what do the likelier ones sum to?",
        "A token is kept exactly if the likelier ones together have not reached p yet. For the "
        "likeliest one that sum is 0.",
        "`ordered, order = probabilities.sort(dim=-1, descending=True)`, and "
        "`mask.scatter(-1, order, ...)` brings what you found for the sorted tokens back to their "
        "own places.",
    ),
)


@ex.solution
def top_p(probabilities: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities sum to p or more, shared out. (batch, V), as given."""
    ### BEGIN SOLUTION
    ordered, order = probabilities.sort(dim=-1, descending=True)  # (batch, V), likeliest first
    before = ordered.cumsum(dim=-1) - ordered  # what the likelier tokens sum to
    needed = before < p  # always true for the first one, whose sum is 0
    keep = torch.zeros_like(needed).scatter(-1, order, needed)  # from rank back to token
    kept = probabilities * keep
    return kept / kept.sum(dim=-1, keepdim=True)  # (batch, V) / (batch, 1)
    ### END SOLUTION


def _shuffled(g: torch.Generator, *rows: tuple[float, ...]) -> Tensor:
    """Rows of probabilities, each in an order of its own."""
    return torch.stack([torch.tensor(r)[torch.randperm(len(r), generator=g)] for r in rows])


FOUR, FIVE = (0.4, 0.3, 0.2, 0.1), (0.35, 0.25, 0.2, 0.15, 0.05)
EXACT = (0.5, 0.25, 0.1875, 0.0625)  # sums without rounding


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(p: float, *rows: tuple[float, ...]) -> Case:
        return {"probabilities": _shuffled(g, *rows), "p": p}

    cycle = torch.tensor([FOUR, FOUR[::-1]])[:, [1, 2, 3, 0]]  # undoing this order is another one
    return [
        case(0.7, (0.5, 0.3, 0.2)),
        case(0.4, (0.5, 0.3, 0.2)),  # the likeliest exceeds p alone
        case(0.6, FOUR, FOUR),
        case(0.65, (0.6, 0.3, 0.1), (0.5, 0.3, 0.2), (0.4, 0.35, 0.25)),
        {"probabilities": cycle, "p": 0.85},
        case(0.75, EXACT, EXACT),
        case(1.0, EXACT, (0.5, 0.375, 0.09375, 0.03125)),
        case(0.85, (0.9, 0.06, 0.03, 0.01), (0.3, 0.27, 0.23, 0.2)),
        case(0.9, (0.625, 0.375, 0.0, 0.0)),  # what top-k has removed stays removed
        case(0.5, (1.0,), (1.0,)),
        case(0.02, FIVE, FIVE, FIVE),
        case(0.77, FIVE, (0.92, 0.04, 0.02, 0.015, 0.005), (0.23, 0.22, 0.2, 0.19, 0.16)),
        {"probabilities": torch.randn(4, 7, generator=g).softmax(-1), "p": 0.55},
    ]


@ex.behaviour("the token that crosses p is kept")
def _(answer):
    case = {"probabilities": torch.tensor([[0.3, 0.5, 0.2]]), "p": 0.7}
    expect(answer.on(case), torch.tensor([[0.375, 0.625, 0.0]]), case=case)


@ex.behaviour("the likeliest token stays, even if it exceeds p alone")
def _(answer):
    case = {"probabilities": torch.tensor([[0.1, 0.3, 0.6]]), "p": 0.2}
    expect(answer.on(case), torch.tensor([[0.0, 0.0, 1.0]]), case=case)


@ex.behaviour("where a sum is exactly p, no further token is kept")
def _(answer):
    case = {"probabilities": torch.tensor([[0.25, 0.125, 0.5, 0.125]]), "p": 0.75}
    expect(answer.on(case) > 0, torch.tensor([[True, False, True, False]]), case=case)


@ex.behaviour("each row sums to 1")
def _(answer):
    rows = torch.tensor([FOUR, (0.1, 0.2, 0.4, 0.3)])
    for p in (0.3, 0.6, 0.95):
        expect(answer(rows, p).sum(-1), torch.ones(2))


@ex.behaviour("each token keeps its place: another order of the vocabulary, the same order after")
def _(answer):
    row, order = torch.tensor([FOUR]), [2, 0, 3, 1]
    expect(answer(row[:, order], 0.6), answer(row, 0.6)[:, order])


@ex.behaviour("the kept tokens have the same ratios as before")
def _(answer):
    got = answer(torch.tensor([FOUR]), 0.8)
    expect(got[:, :2] / got[:, 1:3], torch.tensor([[4 / 3, 3 / 2]]))


@ex.behaviour("p = 1 changes nothing")
def _(answer):
    case = {"probabilities": torch.tensor([[0.25, 0.5, 0.25]]), "p": 1.0}
    expect(answer.on(case), case["probabilities"], case=case)


@ex.behaviour("each row keeps as many tokens as it needs")
def _(answer):
    case = {"probabilities": torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.4, 0.3]]), "p": 0.75}
    expect((answer.on(case) > 0).sum(-1), torch.tensor([1, 3]), case=case)


@ex.behaviour("rows do not meet")
def _(answer):
    rows = torch.tensor([FOUR, (0.05, 0.05, 0.85, 0.05)])
    expect(answer(rows, 0.65)[1:], answer(rows[1:], 0.65))


def _placed(order: Tensor, found: Tensor) -> Tensor:
    """What was found for the sorted tokens, at the places of the tokens."""
    return torch.zeros_like(found).scatter(-1, order, found)


def _share_out(probabilities: Tensor, keep: Tensor) -> Tensor:
    kept = probabilities * keep
    return kept / kept.sum(-1, keepdim=True)


def _nucleus(needed: Function | None = None, place=_placed, share=_share_out) -> Function:
    """Top-p with some parts replaced. needed: (ordered, running sums, p) -> who is kept."""

    def function(probabilities, p):
        ordered, order = probabilities.sort(-1, descending=True)
        total = ordered.cumsum(-1)
        found = needed(ordered, total, p) if needed else total - ordered < p
        return share(probabilities, place(order, found))

    return function


def _with_first(keep: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(keep[:, :1]), keep[:, 1:]], -1)


def _fewest(ordered: Tensor, p: float) -> Tensor:
    """How many tokens each row keeps, (batch, 1)."""
    return (ordered.cumsum(-1) - ordered < p).sum(-1, keepdim=True)


CROSSES = "With 0.5, 0.3, 0.2 and p = 0.7, is the second token kept?"
EXACTLY = "When the tokens so far sum to exactly p, is one more needed?"
END = "Which tokens are kept first, the likeliest or the least likely?"
ALONE = "Whose probabilities are summed up to decide about a token?"
BACK = "The sorted row has lost the order of the vocabulary: how do you get back?"
EACH = "Does each row keep as many tokens as it needs?"

NEEDED = [
    Mistake(
        "without the token that crosses p",
        "Tokens are kept while the sum with themselves stays within p: the rest may sum to less, "
        "or be nothing at all.",
        CROSSES,
        lambda o, total, p: total <= p,
    ),
    Mistake(
        "without the token that crosses p, but always with the likeliest",
        "Tokens are kept while the sum with themselves stays within p.",
        CROSSES,
        lambda o, total, p: _with_first(total <= p),
    ),
    Mistake(
        "without the token that reaches p",
        "Tokens are kept while the sum with themselves stays below p.",
        CROSSES,
        lambda o, total, p: total < p,
    ),
    Mistake(
        "without the token that reaches p, but always with the likeliest",
        "Tokens are kept while the sum with themselves stays below p.",
        CROSSES,
        lambda o, total, p: _with_first(total < p),
    ),
    Mistake(
        "with one token too many where the sum is exactly p",
        "The comparison is <= where it should be <, or > where it should be >=.",
        EXACTLY,
        lambda o, total, p: total - o <= p,
    ),
    Mistake(
        "with one token too many",
        "The shift by one token has been made twice.",
        CROSSES,
        lambda o, total, p: F.pad(total - o, (1, -1)) < p,
    ),
    Mistake(
        "without the likeliest token where it reaches p alone",
        "After the shift by one, the first place still says what it said before: nothing is left.",
        "What do the tokens before the likeliest one sum to?",
        lambda o, total, p: (total - o < p) & (total[:, :1] < p),
    ),
    Mistake(
        "with the least likely tokens first",
        "Sorting ascends by default.",
        END,
        lambda o, total, p: (1 - total < p) & (o >= 0),
    ),
    Mistake(
        "with the tail kept instead of the nucleus",
        "What should stay is removed.",
        "What does your mask say: keep, or remove?",
        lambda o, total, p: total - o >= p,
    ),
    Mistake(
        "with 1 - p instead of p",
        "The sum runs over the likeliest tokens, which should reach p.",
        "With p near 1, are nearly all tokens kept or nearly none?",
        lambda o, total, p: total - o < 1 - p,
    ),
    Mistake(
        "with each token compared with p by itself",
        "A probability is held against p, not a sum.",
        ALONE,
        lambda o, total, p: o >= p,
    ),
    Mistake(
        "with each token compared with 1 - p by itself",
        "A probability is held against 1 - p, not a sum against p.",
        ALONE,
        lambda o, total, p: o >= 1 - p,
    ),
    Mistake(
        "with the tokens at least p times as likely as the likeliest",
        "That is min-p sampling.",
        ALONE,
        lambda o, total, p: o >= p * o[:, :1],
    ),
    Mistake(
        "with the likeliest token alone",
        "That is greedy: `==` or `argmax` stands where a comparison of sums should.",
        CROSSES,
        lambda o, total, p: (torch.arange(o.shape[1]) == 0).expand_as(o),
    ),
    Mistake(
        "with the fraction p of the vocabulary",
        "p is a share of the probability, not of the number of tokens.",
        "Does a sure row keep as many tokens as an unsure one?",
        lambda o, total, p: (torch.arange(o.shape[1]) < math.ceil(p * o.shape[1])).expand_as(o),
    ),
    Mistake(
        "with sums that run along the batch",
        "`cumsum` and the tokens of a row lie along different dimensions.",
        "Along which dimension are the tokens of one row summed?",
        lambda o, total, p: o.cumsum(0) - o < p,
    ),
    Mistake(
        "with sums that run on from row to row",
        "The second row starts with a sum of 1.",
        "Along which dimension are the tokens of one row summed?",
        lambda o, total, p: o.flatten().cumsum(0).view_as(o) - o < p,
    ),
    Mistake(
        "with the shift by one made from row to row",
        "`x[1:] = x[:-1]` moves rows; the tokens of a row lie along the last dimension.",
        "Along which dimension is the token before?",
        lambda o, total, p: F.pad(total < p, (0, 0, 1, -1), value=True),
    ),
    Mistake(
        "with as many tokens as the first row needs",
        "The other rows are cut as the first one is.",
        EACH,
        lambda o, total, p: torch.arange(o.shape[1]) < _fewest(o, p)[:1].expand(len(o), 1),
    ),
    Mistake(
        "with as many tokens as the row that needs most",
        "Rows that need fewer keep too many.",
        EACH,
        lambda o, total, p: torch.arange(o.shape[1]) < _fewest(o, p).amax().expand(len(o), 1),
    ),
    Mistake(
        "with as many tokens as the row that needs fewest",
        "Rows that need more are cut short.",
        EACH,
        lambda o, total, p: torch.arange(o.shape[1]) < _fewest(o, p).amin().expand(len(o), 1),
    ),
]

PLACINGS = [
    Mistake(
        "with the places of the sorted tokens taken for those of the vocabulary",
        "The mask belongs to the sorted row, and it was laid on the unsorted one.",
        BACK,
        lambda order, found: found,
    ),
    Mistake(
        "with the sorting done once more instead of undone",
        "`gather(-1, order)` sorts; the way back is `scatter`, or `gather` with `order.argsort()`.",
        BACK,
        lambda order, found: found.gather(-1, order),
    ),
]

PORTIONS = [
    Mistake(
        "not shared out again",
        "The removed tokens take their share of the probability with them.",
        RENORMALISED,
        lambda q, keep: q * keep,
    ),
    Mistake(
        "with softmax of what is left",
        "Softmax takes logits; here a removed probability counts as exp(0) = 1.",
        "By what must the kept probabilities be divided?",
        lambda q, keep: (q * keep).softmax(-1),
    ),
    Mistake(
        "with softmax of the kept probabilities",
        "Softmax takes logits; probabilities are shared out by their sum.",
        "By what must the kept probabilities be divided?",
        lambda q, keep: _hide(q, keep),
    ),
    Mistake(
        "with the whole batch divided by one sum",
        "The rows sum to 1 together instead of each.",
        RENORMALISED,
        lambda q, keep: q * keep / (q * keep).sum(),
    ),
    Mistake(
        "with equal shares for the kept tokens",
        "Among those that stay, the likelier token should still be the likelier one.",
        "Where do the probabilities enter, after the tokens have been chosen?",
        lambda q, keep: keep / keep.sum(-1, keepdim=True).to(q.dtype),
    ),
    Mistake(
        "sorted by rank",
        "The likeliest token stands first, whichever it is.",
        BACK,
        lambda q, keep: _share_out(q, keep).sort(-1, descending=True).values,
    ),
    Mistake(
        "with -inf for the removed tokens",
        "-inf hides a logit; a probability is removed by 0.",
        "Is it logits or probabilities that you fill?",
        lambda q, keep: _share_out(q, keep).masked_fill(~keep, -INF),
    ),
]

ex.mistakes_from(NEEDED, "top-p", lambda part: _nucleus(needed=part))
ex.mistakes_from(PLACINGS, "top-p", lambda part: _nucleus(place=part))
ex.mistakes_from(PORTIONS, "top-p", lambda part: _nucleus(share=part))
ex.mistake(
    "top-p divided by p",
    "The kept probabilities sum to p or more, not to p.",
    RENORMALISED,
)(lambda q, p: _nucleus(share=lambda q, keep: q * keep)(q, p) / p)
ex.mistake(
    "top-p of each column",
    "The rows of the batch compete for each token.",
    "Along which dimension are the tokens of one row sorted and summed?",
)(lambda q, p: top_p(q.T, p).T)
ex.mistake(
    "top-p with the sorted shares sorted once more instead of put back",
    "`gather(-1, order)` sorts; the way back is `scatter`, or `gather` with `order.argsort()`.",
    BACK,
)(
    lambda q, p: (
        top_p(q, p).sort(-1, descending=True).values.gather(-1, q.argsort(-1, descending=True))
    )
)
ex.mistake(
    "top-p in the order of the vocabulary",
    "The running sum starts with token 0, whether it is likely or not.",
    END,
)(lambda q, p: _share_out(q, q.cumsum(-1) - q < p))
ex.mistake(
    "top-p of a softmax of the probabilities",
    "They are taken for logits and come out nearly equal.",
    "What is it that comes in: logits or probabilities?",
)(lambda q, p: top_p(q.softmax(-1), p))
ex.mistake(
    "the mask of the kept tokens",
    "It says who stays, not how likely each is.",
    "What is done with the mask?",
)(lambda q, p: (top_p(q, p) > 0).to(q.dtype))


@ex.alternative("ascending: removed while the sum is at most 1 - p")
def _(probabilities, p):
    ordered, order = probabilities.sort(-1)  # least likely first
    remove = ordered.double().cumsum(-1) <= 1 - p + 1e-7
    remove[:, -1] = False
    kept = probabilities.masked_fill(remove.gather(-1, order.argsort(-1)), 0.0)
    return kept / kept.sum(-1, keepdim=True)


@ex.alternative("a mask shifted by one, back by argsort")
def _(probabilities, p):
    ordered, order = torch.sort(probabilities, descending=True)
    reached = torch.roll(ordered.cumsum(-1) >= p, 1, -1)
    reached[:, 0] = False
    shares = ordered.masked_fill(reached, 0.0)
    return F.normalize(shares, p=1, dim=-1).gather(-1, order.argsort(-1))


@ex.alternative("every pair of tokens compared, nothing sorted")
def _(probabilities, p):
    likelier = probabilities[:, None, :] > probabilities[:, :, None]  # (batch, V, V)
    before = torch.einsum("bu,bvu->bv", probabilities, likelier.to(probabilities.dtype))
    return (probabilities.log() + torch.where(before < p, 0.0, -INF)).softmax(-1)


@ex.alternative("a loop that adds tokens until p is reached")
def _(probabilities, p):
    rows = []
    for row in probabilities:
        kept, total = torch.zeros_like(row), 0.0
        for token in row.argsort(descending=True).tolist():
            if total < p:
                kept[token] = 1.0
                total += row[token].item()
        rows.append(row * kept / (row * kept).sum())
    return torch.stack(rows)


# --- 5. attention with a cache ----------------------------------------------------------------

ex = Exercise(
    "cached_attention",
    chapter="09_decoder",
    title="Attention with a key/value cache",
    minutes=25,
    difficulty=4,
    importance=5,
    points=3,
    prompt=r"""
A decoder that writes never has to look at its text twice: keys and values of the tokens so far stay
what they are, so they are kept in a **cache**. Only the new tokens are projected. There may be one
of them, as in writing, or several, as when a prompt is read in:

$$\text{head}_i = \mathrm{softmax}\left(\frac{Q_i K_i^\top}{\sqrt{d_\text{head}}}\right) V_i,
  \qquad \text{output} = \mathrm{Concat}(\text{head}_1, \dots, \text{head}_h)$$

with queries of the new tokens, keys and values of the cached **and** the new ones.

- `x` is `(batch, new, d_model)`. `cache` is one tensor `(2, batch, heads, t, d_head)`:
  `cache[0]` holds keys, `cache[1]` values, already projected and split into heads. $t$ may be 0.
- The weights are `(d_model, d_model)`, used as `x @ w`. Head $i$ takes columns
  $i\,d_\text{head}$ to $(i+1)\,d_\text{head} - 1$, with $d_\text{head}$ = d_model / num_heads.
- A new token sees all cached tokens, itself, and the new ones before it, but none after it:
  new token $i$ stands at position $t + i$.

Return `(output, cache)`: the output `(batch, new, d_model)`, its heads side by side, and a cache
`(2, batch, heads, t + new, d_head)` with the new tokens last. The cache passed in stays as it is.
""",
    hints=(
        "With 3 cached tokens and 2 new ones, how many keys may the first new token see, and how "
        "many the second?",
        "The keys that query i may see are j <= t + i: the causal triangle is aligned at the "
        "bottom right of a (new, t + new) table.",
        "`torch.stack([key, value])` of the new tokens, split into heads, has the cache's shape "
        "but for its length; along which dimension are the two joined?",
    ),
)


@ex.solution
def cached_attention(
    x: Tensor, cache: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """Causal multi-head attention of new tokens to the cached ones and to one another.

    x: (batch, new, d_model), cache: (2, batch, heads, t, d_head), weights: (d_model, d_model).
    Returns output (batch, new, d_model) and cache (2, batch, heads, t + new, d_head).
    """
    ### BEGIN SOLUTION
    new, t = x.shape[1], cache.shape[-2]
    # (batch, new, d_model) -> (batch, new, heads, d_head) -> (batch, heads, new, d_head)
    query, key, value = (
        (x @ w).unflatten(-1, (num_heads, -1)).transpose(1, 2) for w in (w_q, w_k, w_v)
    )
    cache = torch.cat([cache, torch.stack([key, value])], dim=-2)  # t and new -> t + new
    key, value = cache  # (batch, heads, t + new, d_head) each
    # (batch, heads, new, d_head) x (batch, heads, d_head, t + new) -> (batch, heads, new, t + new)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    visible = torch.ones(new, t + new, dtype=torch.bool, device=x.device).tril(t)
    weights = scores.masked_fill(~visible, -math.inf).softmax(dim=-1)
    heads = weights @ value  # (…, new, t + new) x (…, t + new, d_head) -> (…, new, d_head)
    return heads.transpose(1, 2).flatten(2), cache  # (batch, new, heads, d_head) -> (…, d_model)
    ### END SOLUTION


def _cache_case(g: torch.Generator, batch: int, new: int, t: int, d_model: int, heads: int) -> Case:
    case: Case = {
        "x": normal(g, batch, new, d_model),
        "cache": normal(g, 2, batch, heads, t, d_model // heads),
    }
    case |= {name: normal(g, d_model, d_model, spread=0.7) for name in ("w_q", "w_k", "w_v")}
    return case | {"num_heads": heads}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 1, 2, 1),
        (1, 2, 0, 2, 1),
        (1, 1, 2, 4, 2),
        (2, 3, 2, 6, 2),
        (2, 2, 2, 4, 2),
        (3, 3, 1, 6, 3),
        (1, 3, 4, 3, 3),
        (2, 1, 0, 4, 2),
        (3, 2, 3, 8, 2),
    ]
    return [_cache_case(g, *size) for size in sizes]


def _reading(seed: int, new: int = 3, t: int = 2) -> list[Tensor | int]:
    """Arguments for a batch of 2, d_model = 4, two heads."""
    g = torch.Generator().manual_seed(seed)
    return list(_cache_case(g, 2, new, t, 4, 2).values())


@ex.behaviour("the cache comes back longer by the new tokens, the old ones first")
def _(answer):
    x, cache, *others = _reading(1)
    expect(answer(x, cache, *others)[1][..., :2, :], cache)


@ex.behaviour("the new tokens' keys and values stand at the end of the cache, head by head")
def _(answer):
    x, cache, w_q, w_k, w_v, num_heads = _reading(2)
    new = answer(x, cache, w_q, w_k, w_v, num_heads)[1][..., 2:, :]
    for i in range(2):  # each head has its own columns
        own = slice(2 * i, 2 * i + 2)
        expect(new[:, :, i], torch.stack([x @ w_k, x @ w_v])[..., own])


@ex.behaviour("with w_q = 0 a new token gets the mean of all values up to its own")
def _(answer):
    x, cache, w_q, w_k, w_v, num_heads = _reading(3)
    output = answer(x, cache, torch.zeros_like(w_q), w_k, w_v, num_heads)[0]
    old = cache[1].transpose(1, 2).flatten(2)  # (batch, heads, t, d_head) -> (batch, t, d_model)
    values = torch.cat([old, x @ w_v], 1)
    want = torch.stack([values[:, : 3 + i].mean(1) for i in range(3)], 1)
    expect(output, want)


@ex.behaviour("a later new token cannot change an earlier output")
def _(answer):
    x, *others = _reading(4)
    other = torch.cat([x[:, :2], x[:, 2:] + 3], 1)
    expect(answer(other, *others)[0][:, :2], answer(x, *others)[0][:, :2])


@ex.behaviour("a cached token can change every output")
def _(answer):
    x, cache, *others = _reading(5)
    other = cache.clone()
    other[1, :, :, 0] += 3
    change = answer(x, other, *others)[0] - answer(x, cache, *others)[0]
    if change.abs().amax(-1).min() < 1e-5:
        raise Broken("a new token does not see the first cached one")


@ex.behaviour("token by token it gives what all tokens at once give")
def _(answer):
    x, cache, *others = _reading(6)
    want, whole = answer(x, cache, *others)
    for i in range(3):
        output, cache = answer(x[:, i : i + 1], cache, *others)
        expect(output, want[:, i : i + 1])
    expect(cache, whole)


@ex.behaviour("with an empty cache it is causal self-attention")
def _(answer):
    x, cache, w_q, w_k, w_v, num_heads = _reading(7, t=0)
    query, key, value = (_split(x @ w, num_heads) for w in (w_q, w_k, w_v))
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    expect(answer(x, cache, w_q, w_k, w_v, num_heads)[0], _merge(want))


@ex.behaviour("batch elements do not meet")
def _(answer):
    x, cache, *others = _reading(8)
    got, one = answer(x, cache, *others), answer(x[1:], cache[:, 1:], *others)
    expect((got[0][1:], got[1][:, 1:]), one)


def _split(t: Tensor, num_heads: int) -> Tensor:
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (batch, heads, n, d_head)


def _merge(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)  # (batch, n, d_model)


def _project(x, w_q, w_k, w_v):
    return x @ w_q, x @ w_k, x @ w_v


def _append(cache: Tensor, new: Tensor) -> Tensor:
    return torch.cat([cache, new], -2)


def _bottom_right(i: Tensor, j: Tensor, t: int) -> Tensor:
    return j <= t + i


def _cached(
    *, project=_project, split=_split, append=_append, visible=_bottom_right, scale=None,
    normalise=None, weigh=None, mix=None, merge=_merge, finish=None,
) -> Function:  # fmt: skip
    """Attention with a cache, some parts of it replaced.

    visible(query, key, t) says who sees whom; finish(output, new cache, old cache, x) returns.
    """

    def function(x, cache, w_q, w_k, w_v, num_heads):
        query, key, value = (split(y, num_heads) for y in project(x, w_q, w_k, w_v))
        longer = append(cache, torch.stack([key, value]))
        k, v = longer
        scores = query @ k.mT * (scale(query, k) if scale else query.shape[-1] ** -0.5)
        i, j = torch.arange(query.shape[-2])[:, None], torch.arange(k.shape[-2])
        mask = visible(i, j, cache.shape[-2])
        hidden = scores.masked_fill(~mask, -INF)
        weights = normalise(hidden).nan_to_num(0.0) if normalise else hidden.softmax(-1)
        weights = weigh(scores, mask) if weigh else weights
        output = merge(mix(weights, query, k, v) if mix else weights @ v)
        return finish(output, longer, cache, x) if finish else (output, longer)

    return function


STANDS = "New token i stands at position t + i: which keys may it see?"
COLUMNS = "Which columns of `x @ w_q` belong to head 0?"
RETURNS = "Which two things should come back, and what is their shape?"
ONCE = "Does each of the three matrices appear once?"
PLACE = "At which end of the cache do the newest tokens belong?"
WHICH = "Which of `cache[0]` and `cache[1]` holds the keys?"

OWN, ITSELF = "The triangle stops one key too early.", "May a token see itself?"


def _before_own(i: Tensor, j: Tensor, t: int) -> Tensor:
    return j < t + i


# (query i, key j, cached tokens t) -> visible
VISIBLE = [
    Mistake(
        "under a mask aligned at the top left",
        "The first new token is taken for position 0, so it sees the oldest key alone.",
        STANDS,
        lambda i, j, t: j <= i,
    ),
    Mistake(
        "without a mask among the new tokens",
        "Each new token sees those after it, which it is to predict.",
        STANDS,
        lambda i, j, t: (i >= 0) & (j >= 0),
    ),
    Mistake(
        "with a mask only where the cache is empty",
        "Several new tokens need a mask whatever is cached.",
        STANDS,
        lambda i, j, t: (j <= i) | (t > 0),
    ),
    Mistake(
        "with each new token's own key hidden",
        OWN,
        ITSELF,
        _before_own,
    ),
    Mistake(
        "with one later key visible",
        "The triangle reaches one key too far.",
        STANDS,
        lambda i, j, t: j <= t + i + 1,
    ),
    Mistake(
        "in which a new token sees itself and the cache, but no other new token",
        "The new tokens before it are hidden.",
        STANDS,
        lambda i, j, t: (j < t) | (j == t + i),
    ),
    Mistake(
        "of the new tokens among themselves",
        "The cached keys are not looked at.",
        "Where do the cached keys and values enter?",
        lambda i, j, t: (j >= t) & (j <= t + i),
    ),
    Mistake(
        "of the new tokens to the cache alone",
        "The new keys are not looked at, and with an empty cache nothing is left.",
        STANDS,
        lambda i, j, t: (j < t) & (i >= 0),
    ),
    Mistake(
        "in which each new token sees itself alone",
        "Only the diagonal is left of the mask.",
        STANDS,
        lambda i, j, t: j == t + i,
    ),
    Mistake(
        "with the past hidden instead of the future",
        "The triangle lies on the other side of the diagonal.",
        "`tril` or `triu`: which one keeps the keys before the query?",
        lambda i, j, t: j >= t + i,
    ),
]

WIRINGS = [
    Mistake(
        "with w_k and w_v swapped",
        "New values are appended to the cached keys, and new keys to the cached values.",
        "Which of the two makes what is compared, and in which order are they stacked?",
        lambda x, q, k, v: (x @ q, x @ v, x @ k),
    ),
    Mistake(
        "with w_q and w_k swapped",
        "The queries are made by w_k and the new keys by w_q.",
        "Which of the two makes what is kept for later?",
        lambda x, q, k, v: (x @ k, x @ q, x @ v),
    ),
    Mistake(
        "with w_k for keys and values",
        "w_v has no effect.",
        ONCE,
        lambda x, q, k, v: (x @ q, x @ k, x @ k),
    ),
    Mistake(
        "with w_q for queries and keys",
        "w_k has no effect.",
        ONCE,
        lambda x, q, k, v: (x @ q, x @ q, x @ v),
    ),
    Mistake(
        "with the weights transposed",
        "`F.linear` and `nn.Linear` keep their weights as (out, in); here they are used as x @ w.",
        "Is it x @ w or x @ w.T?",
        lambda x, q, k, v: (x @ q.T, x @ k.T, x @ v.T),
    ),
    Mistake(
        "with x itself as keys and values",
        "The new tokens are cached as they came in, not projected.",
        "What is in the cache: tokens, or keys and values?",
        lambda x, q, k, v: (x @ q, x, x),
    ),
]

HIDDEN_WRONGLY = {
    "with the mask's polarity swapped",
    "with the mask's polarity swapped, NaN where nothing is left",
    "masked after the softmax",
    "with the scores multiplied by the mask",
    "with the mask added to the scores",
    "with -10 instead of -inf",
}

NAME = "cached attention"
ex.mistakes_from(VISIBLE, NAME, lambda part: _cached(visible=part))
ex.mistakes_from(WIRINGS, NAME, lambda part: _cached(project=part))
ex.mistakes_from(SCALES[:5], NAME, lambda part: _cached(scale=part))
LEAKING = [part for part in MASKINGS if part.name in HIDDEN_WRONGLY]
ex.mistakes_from(LEAKING, NAME, lambda part: _cached(weigh=part))
ex.mistakes_from(NORMALISATIONS[:1], NAME, lambda part: _cached(normalise=part))
ex.mistake(f"{NAME} with each new token's own key hidden, 0 where nothing is left", OWN, ITSELF)(
    _cached(visible=_before_own, weigh=visible_softmax)
)
ex.mistake(
    f"{NAME} scaled by 1/√d_model",
    "The width of all heads together stands where the width of one should.",
    "Over how many products does one score sum?",
)(_cached(scale=lambda q, k: (q.shape[1] * q.shape[-1]) ** -0.5))
ex.mistake(
    f"{NAME} split by a reshape straight to (heads, new, d_head)",
    "It is right for a single new token; with several, tokens are torn up.",
    COLUMNS,
)(_cached(split=lambda y, h: y.reshape(len(y), h, y.shape[1], -1)))
ex.mistake(
    f"{NAME} merged by a reshape without transposing back",
    "It is right for a single new token; with several, the features of one head follow those of "
    "another token.",
    "In which order must (batch, heads, new, d_head) be before its last two dimensions are merged?",
)(_cached(merge=lambda heads: heads.reshape(len(heads), heads.shape[2], -1)))
ex.mistake(
    f"{NAME} split and merged by reshapes alone",
    "It is right for a single new token; with several, tokens are torn up on the way in and out.",
    COLUMNS,
)(
    _cached(
        split=lambda y, h: y.reshape(len(y), h, y.shape[1], -1),
        merge=lambda heads: heads.reshape(len(heads), heads.shape[2], -1),
    )
)
ex.mistake(
    f"{NAME} split into every num_heads-th feature",
    "The width was split into (d_head, heads) instead of (heads, d_head).",
    COLUMNS,
)(_cached(split=lambda y, h: y.unflatten(-1, (-1, h)).movedim(-1, 1)))
ex.mistake(
    f"{NAME} split into every num_heads-th feature, and merged so again",
    "The heads are dealt out and collected like cards; each should have columns side by side.",
    COLUMNS,
)(
    _cached(
        split=lambda y, h: y.unflatten(-1, (-1, h)).movedim(-1, 1),
        merge=lambda heads: heads.movedim(1, -1).flatten(2),
    )
)
ex.mistake(
    f"{NAME} merged with the features of the heads interleaved",
    "The heads should stand side by side, not mixed like cards.",
    "Which features of the output belong to head 0?",
)(_cached(merge=lambda heads: heads.movedim(1, -1).flatten(2)))
ex.mistake(
    f"{NAME} with the heads not merged",
    "The output is still (batch, heads, new, d_head).",
    RETURNS,
)(_cached(merge=lambda heads: heads))
ex.mistake(
    f"{NAME} that mixes the keys",
    "The values have no effect on the output.",
    "What is averaged with the weights?",
)(_cached(mix=lambda w, q, k, v: w @ k))
ex.mistake(
    f"{NAME} with the cache read as (values, keys)",
    "Cached values are compared with the queries, and cached keys averaged.",
    WHICH,
)(lambda x, cache, *others: cached_attention(x, cache.flip(0), *others))
ex.mistake(
    f"{NAME} with the cache read and returned as (values, keys)",
    "It agrees with itself, but not with the cache that comes in.",
    WHICH,
)(
    lambda x, cache, *others: tuple(
        part.flip(0) if part.ndim == 5 else part
        for part in cached_attention(x, cache.flip(0), *others)
    )
)
ex.mistake(
    f"{NAME} with keys and values exchanged in the attention",
    "Queries are compared with the values, and the keys are averaged.",
    "What are queries compared with, and what comes back?",
)(
    lambda x, cache, q, k, v, heads: tuple(
        part.flip(0) if part.ndim == 5 else part
        for part in cached_attention(x, cache.flip(0), q, v, k, heads)
    )
)
ex.mistake(
    f"{NAME} as if nothing were cached",
    "The earlier tokens are neither looked at nor returned.",
    "Where does `cache` enter?",
)(lambda x, cache, *others: cached_attention(x, cache[..., :0, :], *others))
ex.mistake(
    f"{NAME} that returns values before keys",
    "The next step would take keys for values.",
    WHICH,
)(_cached(finish=lambda output, longer, cache, x: (output, longer.flip(0))))
ex.mistake(
    f"{NAME} with the new tokens in front of the cached ones",
    "The oldest token should stand first: positions and mask depend on it.",
    PLACE,
)(_cached(append=lambda cache, new: torch.cat([new, cache], -2)))
ex.mistake(
    f"{NAME} that returns the new tokens in front of the cached ones",
    "The output is right, but at the next step the order would be wrong.",
    PLACE,
)(
    _cached(
        finish=lambda output, longer, cache, x: (output, longer.roll(x.shape[1], -2)),
    )
)
ex.mistake(
    f"{NAME} that returns the old cache",
    "The next step would not know of these tokens.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (output, cache)))
ex.mistake(
    f"{NAME} that returns the new tokens' keys and values alone",
    "The earlier tokens are lost.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (output, longer[..., cache.shape[-2] :, :])))
ex.mistake(
    f"{NAME} that caches the last new token alone",
    "The other new tokens are forgotten.",
    "How many tokens longer is the new cache?",
)(
    _cached(
        finish=lambda output, longer, cache, x: (
            output,
            torch.cat([cache, longer[..., -1:, :]], -2),
        )
    )
)
ex.mistake(
    f"{NAME} that drops as many old tokens as there are new ones",
    "That is a sliding window; the cache here only grows.",
    "How many tokens longer is the new cache?",
)(_cached(finish=lambda output, longer, cache, x: (output, longer[..., x.shape[1] :, :])))
ex.mistake(
    f"{NAME} that returns the keys twice",
    "The values are lost.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (output, longer[[0, 0]])))
ex.mistake(
    f"{NAME} that returns keys and values apart",
    "Three things come back; the cache is one tensor here.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (output, *longer)))
ex.mistake(
    f"{NAME} that returns a cache that is a tuple",
    "Keys and values should be stacked in one tensor.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (output, tuple(longer))))
ex.mistake(
    f"{NAME} that returns the cache first",
    "The output should come first.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (longer, output)))
ex.mistake(
    f"{NAME} that returns the output alone",
    "The cache is lost.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: output))
ex.mistake(
    f"{NAME} that returns the output of the last new token alone",
    "Writing needs no more, but each new token has an output here.",
    RETURNS,
)(_cached(finish=lambda output, longer, cache, x: (output[:, -1:], longer)))
ex.mistake(
    f"{NAME} of the last new token alone, the others forgotten",
    "`x[:, -1:]` is the last token: the others are neither answered nor cached.",
    "How many tokens longer is the new cache?",
)(lambda x, *others: cached_attention(x[:, -1:], *others))
ex.mistake(
    f"{NAME} with x added to the output",
    "That is the residual connection; it belongs to the layer around.",
    "Does the formula add x to the result?",
)(_cached(finish=lambda output, longer, cache, x: (x + output, longer)))
ex.mistake(
    f"{NAME} with all keys stored scaled",
    "At the next step the old ones would be scaled once more.",
    "Which keys does the cache hold, with 1/√d_head or without?",
)(
    _cached(
        finish=lambda output, longer, cache, x: (
            output,
            torch.stack([longer[0] * longer.shape[-1] ** -0.5, longer[1]]),
        )
    )
)
ex.mistake(
    f"{NAME} with the scale on the new keys alone",
    "The cached keys are compared without it.",
    "Do all t + new scores get the same factor?",
)(
    _cached(
        append=lambda cache, new: _append(
            cache, torch.stack([new[0] * new.shape[-1] ** -0.5, new[1]])
        ),
        scale=lambda q, k: 1.0,
    )
)


@ex.alternative("scaled_dot_product_attention with a bool mask")
def _(x, cache, w_q, w_k, w_v, num_heads):
    query, key, value = (_split(x @ w, num_heads) for w in (w_q, w_k, w_v))
    keys, values = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
    at = torch.arange(keys.shape[2])
    mask = at <= at[-x.shape[1] :, None]  # (new, t + new)
    heads = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return _merge(heads), torch.stack([keys, values])


@ex.alternative("token by token")
def _(x, cache, w_q, w_k, w_v, num_heads):
    outputs = []
    for token in x.split(1, dim=1):  # (batch, 1, d_model)
        query, key, value = (_split(token @ w, num_heads) for w in (w_q, w_k, w_v))
        cache = torch.cat([cache, torch.stack([key, value])], 3)
        weights = (query @ cache[0].mT / query.shape[-1] ** 0.5).softmax(-1)
        outputs.append(_merge(weights @ cache[1]))
    return torch.cat(outputs, 1), cache


@ex.alternative("a loop over the heads")
def _(x, cache, w_q, w_k, w_v, num_heads):
    new, width, outputs, caches = x.shape[1], x.shape[2] // num_heads, [], []
    for i in range(num_heads):
        query, key, value = ((x @ w)[..., i * width : (i + 1) * width] for w in (w_q, w_k, w_v))
        keys, values = (torch.cat([cache[n, :, i], y], 1) for n, y in enumerate((key, value)))
        scores = query @ keys.mT / math.sqrt(width)
        hidden = torch.full_like(scores, -INF).triu(keys.shape[1] - new + 1)
        outputs.append((scores + hidden).softmax(-1) @ values)
        caches.append(torch.stack([keys, values]))
    return torch.cat(outputs, -1), torch.stack(caches, 2)


@ex.alternative("einsum, in float64 and back")
def _(x, cache, w_q, w_k, w_v, num_heads):
    heads = torch.stack([w_q, w_k, w_v]).unflatten(-1, (num_heads, -1)).double()
    query, key, value = torch.einsum("bnm,cmhd->cbhnd", x.double(), heads)
    longer = torch.cat([cache.double(), torch.stack([key, value])], -2)
    scores = torch.einsum("bhid,bhjd->bhij", query, longer[0]) / query.shape[-1] ** 0.5
    visible = torch.ones_like(scores, dtype=torch.bool).tril(cache.shape[-2])
    weights = scores.masked_fill(~visible, torch.finfo(torch.float64).min).softmax(-1)
    output = torch.einsum("bhij,bhjd->bihd", weights, longer[1]).flatten(2)
    return output.to(x.dtype), longer.to(x.dtype)
