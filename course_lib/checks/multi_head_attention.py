"""Exercises of chapter 03: several heads, from splitting to grouped queries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import expect
from ._inputs import normal, some
from ._wrong_parts import MASKINGS, MIXTURES, NORMALISATIONS, SCALES, visible_softmax

INF = math.inf


def _labelled(g: torch.Generator, *shape: int) -> Tensor:
    """Feature 3 of token 2 is the number 2.3; tokens are counted on through the batch."""
    first = int(torch.randint(0, 7, (), generator=g))
    tokens = first + torch.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)
    return tokens + torch.arange(shape[-1]) / 10


def _cut(x: Tensor, num_heads: int) -> Tensor:
    """(..., n, d_model) -> (..., n, num_heads, d_head)."""
    return x.unflatten(-1, (num_heads, -1))


def _reshaped(x: Tensor, *last: int) -> Tensor:
    """The last two dimensions read off in the order of memory into other ones."""
    return x.reshape(*x.shape[:-2], *last)


def _straight(x: Tensor, h: int) -> Tensor:
    """The famous wrong split: (..., n, d_model) read as (..., num_heads, n, d_head)."""
    return _reshaped(x, h, x.shape[-2], -1)


def _unmoved(heads: Tensor) -> Tensor:
    """The famous wrong merge: (..., num_heads, n, d_head) read as (..., n, d_model)."""
    return _reshaped(heads.flatten(-3, -2), heads.shape[-2], -1)


def _dealt(x: Tensor, h: int) -> Tensor:
    """Every num_heads-th feature to the same head."""
    return x.unflatten(-1, (-1, h)).movedim(-1, -3)


# --- 1. splitting -----------------------------------------------------------------------------

ex = Exercise(
    "split_heads",
    chapter="03_multi_head_attention",
    title="Cut the features into heads",
    minutes=10,
    difficulty=2,
    importance=5,
    batched=True,
    prompt=r"""
Several heads look at the same tokens, each at its own features. With $h$ heads a token of width
$d_{model}$ falls into $h$ pieces of width $d_{head} = d_{model} / h$, side by side:

$$\text{head } i \text{ owns the features } i \cdot d_{head} \;\ldots\; (i + 1) \cdot d_{head} - 1$$

Turn `(..., n, d_model)` into `(..., num_heads, n, d_head)`: the heads stand **in front of** the
tokens, as a batch does, so that attention treats each head alone. The dots are any number of
dimensions, also none.

In the small examples that the check shows you, 2.3 is feature 3 of token 2.
""",
    hints=(
        "Take two tokens with four features and two heads. Write down both heads by hand: which "
        "numbers stand in head 0?",
        "`reshape` only moves the borders between numbers that follow one another; to bring the "
        "heads in front of the tokens, two dimensions must change places.",
        "x.unflatten(-1, (num_heads, -1)) has shape (..., n, num_heads, d_head). Which two "
        "dimensions, counted from the end, are in the wrong order?",
    ),
)


@ex.solution
def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Give each head its features of every token.

    x: (..., n, d_model) -> (..., num_heads, n, d_head), where d_head = d_model / num_heads.
    """
    ### BEGIN SOLUTION
    heads = x.unflatten(-1, (num_heads, -1))  # (..., n, d_model) -> (..., n, num_heads, d_head)
    return heads.transpose(-3, -2)  # -> (..., num_heads, n, d_head)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    cases = [
        ((2, 4), 2),
        ((1, 2, 4), 2),
        ((3, 4), 2),
        ((2, 3, 6), 3),
        ((2, 4, 6), 2),
        ((3, 2, 4), 4),  # one feature a head
        ((2, 2, 3), 1),
        ((3, 2), 1),
        ((4, 8), 4),
        ((1, 2, 1, 6), 2),
        ((2, 3, 2, 4), 2),
        ((3, 4, 6), 2),
    ]
    return [{"x": _labelled(g, *shape), "num_heads": heads} for shape, heads in cases]


@ex.behaviour("head i holds the features from i·d_head on, of every token")
def _(answer):
    case = {"x": torch.arange(6.0).repeat(3, 1), "num_heads": 2}  # each number says its feature
    want = torch.arange(6.0).reshape(2, 1, 3).repeat(1, 3, 1)  # (heads, n, d_head)
    expect(answer.on(case), want)


@ex.behaviour("each head holds all tokens, in their order")
def _(answer):
    case = {"x": torch.arange(3.0)[:, None].repeat(1, 4), "num_heads": 2}  # says its token
    expect(answer.on(case), torch.arange(3.0)[:, None].repeat(2, 1, 2))


@ex.behaviour("one head holds everything")
def _(answer):
    (x,) = some(1, (2, 3, 4))
    expect(answer(x, 1), x[:, None])


@ex.behaviour("the heads laid side by side are x again")
def _(answer):
    (x,) = some(2, (2, 3, 6))
    expect(torch.cat(answer(x, 3).unbind(1), -1), x)


@ex.behaviour("it takes any number of dimensions in front")
def _(answer):
    (x,) = some(3, (2, 3, 4, 6))
    expect(answer(x, 2)[1, 2], answer(x[1, 2], 2))


@ex.behaviour("it takes an x that is a transposed view of other memory")
def _(answer):
    (x,) = some(4, (4, 3, 2, 2))
    view = x.permute(3, 2, 1, 0)
    expect(answer.on({"x": view, "num_heads": 2}), answer(view.contiguous(), 2))


ex.mistake(
    "x reshaped straight to (num_heads, n, d_head)",
    "`view` and `reshape` read the numbers in their order: head 0 gets whole tokens, the first "
    "ones, instead of its features of every token.",
    "Which dimension can be cut in two without moving a number, and which two must then change "
    "places?",
)(_straight)
ex.mistake(
    "heads made of every num_heads-th feature",
    "The last dimension was cut into (d_head, num_heads): features are dealt out like cards.",
    "Which of the two numbers comes first, so that the features of a head stay side by side?",
)(_dealt)
ex.mistake(
    "the heads left behind the tokens",
    "The shape is (..., n, num_heads, d_head), so attention would run over the heads of one token.",
    "Which two dimensions must still change places?",
)(_cut)
ex.mistake(
    "the heads with tokens and features swapped",
    "The shape is (..., num_heads, d_head, n): two dimensions have changed places once too often.",
    "What should the last dimension hold: tokens, or the features of a head?",
)(lambda x, h: split_heads(x, h).mT)
ex.mistake(
    "the heads in the last dimension",
    "The shape is (..., n, d_head, num_heads).",
    "In which place, counted from the end, should the heads stand?",
)(lambda x, h: _cut(x, h).mT)
ex.mistake(
    "the features in front and the tokens last",
    "The shape is (..., d_head, num_heads, n): tokens and features have changed places, the heads "
    "stayed in the middle.",
    "Which two dimensions of (..., n, num_heads, d_head) must change places?",
)(lambda x, h: _cut(x, h).transpose(-3, -1))
ex.mistake(
    "the heads transposed at dimensions 1 and 2, counted from the front",
    "It is right for exactly one batch dimension.",
    "How do you name these two dimensions, however many stand before them?",
)(lambda x, h: _cut(x, h).transpose(1, 2))
ex.mistake(
    "the heads transposed at dimensions 0 and 1, counted from the front",
    "It is right only where there is no batch.",
    "How do you name these two dimensions, however many stand before them?",
)(lambda x, h: _cut(x, h).transpose(0, 1))
ex.mistake(
    "the heads of an x that is taken to be (batch, n, d_model)",
    "Everything between the first dimension and the last was read as one length.",
    "How do you cut the last dimension, however many stand before it?",
)(lambda x, h: x.reshape(len(x), -1, h, x.shape[-1] // h).transpose(1, 2))
ex.mistake(
    "the heads folded into the batch",
    "Batch and heads have become one dimension.",
    "How many dimensions more than x should the result have?",
)(lambda x, h: split_heads(x, h).flatten(0, -3))
ex.mistake(
    "the tokens shared out among the heads",
    "The length was cut instead of the features: each head sees some tokens whole.",
    "Which dimension of x holds the features?",
)(lambda x, h: torch.stack(x.chunk(h, -2), -3))
ex.mistake(
    "all features in every head",
    "The heads are copies of x: nothing was shared out.",
    "How many features does one head own?",
)(lambda x, h: torch.stack([x] * h, -3))
ex.mistake(
    "the first head in every place",
    "Every head got the features from 0 on.",
    "Where do the features of head i begin?",
)(lambda x, h: torch.stack([x[..., : x.shape[-1] // h]] * h, -3))
ex.mistake(
    "the heads in reverse order",
    "Head 0 got the last features.",
    "Which features does head 0 own?",
)(lambda x, h: split_heads(x, h).flip(-3))
ex.mistake(
    "heads of num_heads features each",
    "num_heads was taken for d_head.",
    "How many heads, and of how many features, does the shape have that you cut into?",
)(lambda x, h: x.unflatten(-1, (-1, h)).transpose(-3, -2))
ex.mistake(
    "the first head alone",
    "The features of the other heads are lost.",
    "How many numbers does x have, and how many your result?",
)(lambda x, h: x[..., : x.shape[-1] // h])
ex.mistake(
    "the first head alone, in a dimension of its own",
    "There are as many heads in the result as if num_heads were 1.",
    "Is there a `return` inside the loop over the heads?",
)(lambda x, h: x[..., None, :, : x.shape[-1] // h])
ex.mistake(
    "the heads in front of the batch",
    "`torch.stack` puts the new dimension first unless it is told where.",
    "Before which dimension, counted from the end, should the heads stand?",
)(lambda x, h: torch.stack(x.chunk(h, -1)))
ex.mistake(
    "the heads as a tuple of tensors",
    "`chunk` and `split` give pieces; attention wants them in one tensor.",
    "Which function makes one tensor, with a new dimension, of several?",
)(lambda x, h: x.chunk(h, -1))
ex.mistake(
    "the heads one below the other",
    "The tokens of all heads follow one another in one long sequence.",
    "`cat` or `stack`: which of the two makes a dimension for the heads?",
)(lambda x, h: torch.cat(x.chunk(h, -1), -2))
ex.mistake(
    "x transposed and then reshaped to (num_heads, n, d_head)",
    "After the transpose the numbers are read token by token within a feature, and cut as if they "
    "were not.",
    "Which shape has the transposed x, and which of its dimensions holds the heads?",
)(lambda x, h: _reshaped(x.mT, h, x.shape[-2], -1))
ex.mistake(
    "x reshaped to (num_heads, d_head, n) and then transposed",
    "The reshape has torn the tokens up before anything was transposed.",
    "Which dimension can be cut in two without moving a number?",
)(lambda x, h: _reshaped(x, h, -1, x.shape[-2]).mT)
ex.mistake(
    "heads that overlap",
    "Head i begins at feature i instead of i·d_head.",
    "Where does head 1 begin if a head owns 4 features?",
)(lambda x, h: x.unfold(-1, x.shape[-1] // h, 1)[..., :h, :].transpose(-3, -2))
ex.mistake(
    "two heads, whatever num_heads is",
    "num_heads has no effect.",
    "Where does `num_heads` enter?",
)(lambda x, h: split_heads(x, 2))
ex.mistake(
    "the heads summed",
    "The heads were added up and can no longer be told apart.",
    "Is there a `sum` too many?",
)(lambda x, h: _cut(x, h).sum(-2))
ex.mistake(
    "heads of full width, 0 where other heads' features stood",
    "A head keeps only its own d_head features.",
    "How wide is a head?",
)(lambda x, h: x.unsqueeze(-3) * _cut(torch.eye(x.shape[-1], dtype=x.dtype), h).sum(-1).T[:, None])
ex.mistake(
    "the heads with their tokens in reverse order",
    "The last token comes first in each head.",
    "Is there a `flip` too many?",
)(lambda x, h: split_heads(x, h).flip(-2))

ex.alternative("view and transpose")(
    lambda x, h: x.view(*x.shape[:-1], h, x.shape[-1] // h).transpose(-2, -3)
)
ex.alternative("chunk and stack")(lambda x, h: torch.stack(x.chunk(h, dim=-1), dim=-3))
ex.alternative("transposed, cut, transposed back")(lambda x, h: x.mT.unflatten(-2, (h, -1)).mT)
ex.alternative("a product with slices of the unit matrix")(
    lambda x, h: torch.einsum("...nf,fhk->...hnk", x, _cut(torch.eye(x.shape[-1]).to(x), h))
)


@ex.alternative("a loop over slices")
def _(x, num_heads):
    d_head = x.shape[-1] // num_heads
    heads = [x[..., i * d_head : (i + 1) * d_head] for i in range(num_heads)]
    return torch.cat([head[..., None, :, :] for head in heads], dim=-3)


# --- 2. merging -------------------------------------------------------------------------------

ex = Exercise(
    "merge_heads",
    chapter="03_multi_head_attention",
    title="Lay the heads side by side",
    minutes=5,
    difficulty=1,
    importance=4,
    batched=True,
    prompt=r"""
The way back. Each head has made `d_head` numbers for every token; laid side by side they are one
vector of width $d_{model} = h \cdot d_{head}$ again:

$$\mathrm{Concat}(\text{head}_0, \ldots, \text{head}_{h-1})$$

Turn `(..., num_heads, n, d_head)` into `(..., n, d_model)`, so that `merge_heads` undoes
`split_heads`. The dots are any number of dimensions, also none.

In the small examples that the check shows you, 2.3 is a number of token 2, and should become its
feature 3.
""",
    hints=(
        "Which numbers must stand next to one another in the result: those of one head, or those "
        "of one token?",
        "Only neighbouring dimensions can be made one, and the second of the two runs faster.",
        "heads.transpose(-3, -2) has shape (..., n, num_heads, d_head). How do you make one "
        "dimension of the last two?",
    ),
)


@ex.solution
def merge_heads(heads: Tensor) -> Tensor:
    """Lay the heads of each token side by side: the inverse of split_heads.

    heads: (..., num_heads, n, d_head) -> (..., n, num_heads * d_head).
    """
    ### BEGIN SOLUTION
    tokens = heads.transpose(-3, -2)  # -> (..., n, num_heads, d_head): a token's heads together
    return tokens.flatten(-2)  # -> (..., n, num_heads * d_head)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    # Heads and tokens are two or more, or `view` would sometimes do where it should not.
    shapes = [
        (2, 2, 2),
        (1, 2, 2, 2),
        (2, 3, 2),
        (3, 2, 2),
        (2, 3, 4, 2),
        (2, 3, 3, 3),
        (3, 2, 2, 4),
        (2, 2, 3, 2, 2),
        (2, 1, 2, 2, 2),
        (3, 2, 4, 3),
    ]
    merged = [(_labelled(g, *lead, n, h * d), h) for *lead, h, n, d in shapes]
    cases = [split_heads(x, h).contiguous() for x, h in merged]
    return [{"heads": heads} for heads in [*cases, normal(g, 3, 2, 4, 3)]]


@ex.behaviour("it undoes split_heads")
def _(answer):
    (x,) = some(1, (2, 3, 6))
    expect(answer(split_heads(x, 3).contiguous()), x)


@ex.behaviour("the numbers of head i stand at the features from i·d_head on")
def _(answer):
    case = {"heads": torch.arange(2.0)[:, None, None].repeat(1, 3, 2)}  # each says its head
    expect(answer.on(case), torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(3, 1), case=case)


@ex.behaviour("each token keeps its own numbers")
def _(answer):
    case = {"heads": torch.arange(3.0)[:, None].repeat(2, 1, 2)}  # each says its token
    expect(answer.on(case), torch.arange(3.0)[:, None].repeat(1, 4), case=case)


@ex.behaviour("one head comes back as it is")
def _(answer):
    (heads,) = some(2, (2, 1, 3, 4))
    expect(answer(heads), heads[:, 0])


@ex.behaviour("heads of one feature, and a single token, come back right")
def _(answer):
    narrow, short = some(3, (2, 3, 4, 1), (2, 3, 1, 4))
    expect(answer(narrow), narrow[..., 0].mT)
    expect(answer(short), short.flatten(1)[:, None])


@ex.behaviour("it takes any number of dimensions in front")
def _(answer):
    (heads,) = some(4, (2, 3, 2, 4, 3))
    expect(answer(heads)[1, 2], answer(heads[1, 2]))


@ex.behaviour("it takes heads that are a transposed view of other memory")
def _(answer):
    (heads,) = some(5, (3, 4, 2, 2))
    view = heads.permute(3, 2, 1, 0)
    expect(answer.on({"heads": view}), answer(view.contiguous()))


ex.mistake(
    "the heads reshaped without being transposed back",
    "`view` and `reshape` read the numbers in their order: a token gets numbers of other tokens.",
    "Which two dimensions must change places, before the last two are made one?",
)(_unmoved)
ex.mistake(
    "the heads interleaved",
    "The features run through the heads first: feature 0 of every head, then feature 1.",
    "In which order must num_heads and d_head stand, so that a head's features stay side by side?",
)(lambda heads: heads.movedim(-3, -1).flatten(-2))
ex.mistake(
    "the sum of the heads",
    "The heads were added up instead of laid side by side.",
    "How wide should the result be: d_head, or num_heads times that?",
)(lambda heads: heads.sum(-3))
ex.mistake(
    "the mean of the heads",
    "The heads were averaged instead of laid side by side.",
    "How wide should the result be: d_head, or num_heads times that?",
)(lambda heads: heads.mean(-3))
ex.mistake(
    "the largest of the heads",
    "Only one head's number survives for each feature.",
    "How wide should the result be: d_head, or num_heads times that?",
)(lambda heads: heads.amax(-3))
ex.mistake(
    "the first head alone",
    "The other heads are lost.",
    "How many numbers went in, and how many come out?",
)(lambda heads: heads[..., 0, :, :])
ex.mistake(
    "the last head alone",
    "The other heads are lost; perhaps a loop overwrites its result.",
    "How many numbers went in, and how many come out?",
)(lambda heads: heads[..., -1, :, :])
ex.mistake(
    "the heads one below the other",
    "The heads follow one another along the length instead of the width.",
    "Along which dimension should they be laid side by side?",
)(lambda heads: heads.flatten(-3, -2))
ex.mistake(
    "the heads transposed but not merged",
    "The shape is (..., n, num_heads, d_head): one step is missing.",
    "Which two dimensions should become one?",
)(lambda heads: heads.transpose(-3, -2))
ex.mistake(
    "the heads side by side in reverse order",
    "The last head comes first.",
    "Which features belong to head 0?",
)(lambda heads: merge_heads(heads.flip(-3)))
ex.mistake(
    "the heads transposed at dimensions 1 and 2, counted from the front",
    "It is right for exactly one batch dimension.",
    "How do you name these two dimensions, however many stand before them?",
)(lambda heads: heads.transpose(1, 2).flatten(-2))
ex.mistake(
    "the heads flattened from dimension 2 on, counted from the front",
    "It is right for exactly one batch dimension.",
    "How do you name the last two dimensions, however many stand before them?",
)(lambda heads: heads.transpose(-3, -2).flatten(2))
ex.mistake(
    "the heads transposed at dimensions 0 and 1, counted from the front",
    "It is right only where there is no batch.",
    "How do you name these two dimensions, however many stand before them?",
)(lambda heads: heads.transpose(0, 1).flatten(-2))
ex.mistake(
    "the heads side by side, with tokens and features swapped",
    "The shape is (..., d_model, n).",
    "Is a transpose missing at the end?",
)(lambda heads: merge_heads(heads).mT)
ex.mistake(
    "the heads with tokens and features swapped, then reshaped",
    "The wrong pair of dimensions has changed places.",
    "What should stand between n and d_head before the last two are made one?",
)(lambda heads: _reshaped(heads.mT.flatten(-3, -2), heads.shape[-2], -1))
ex.mistake(
    "the heads with heads and features swapped, then reshaped",
    "The wrong pair of dimensions has changed places.",
    "What should stand in front, so that a token's numbers come together?",
)(lambda heads: _reshaped(heads.transpose(-3, -1).flatten(-3, -2), heads.shape[-2], -1))
ex.mistake(
    "the tokens of each head side by side",
    "The length has become part of the width: n and d_head were made one.",
    "Which dimension should stand beside d_head?",
)(lambda heads: heads.flatten(-2))
ex.mistake(
    "the tokens of the whole batch in one row",
    "The batch has become part of the length.",
    "How many dimensions should the result have?",
)(lambda heads: merge_heads(heads).flatten(0, -2))
ex.mistake(
    "the heads folded into the batch",
    "Batch and heads have become one dimension; the heads belong beside one another.",
    "Which dimension should the heads end up in: the batch, or the features?",
)(lambda heads: heads.flatten(0, -3))
ex.mistake(
    "the heads concatenated along the first dimension",
    "`torch.cat` works along dimension 0 unless it is told otherwise.",
    "Along which dimension do the features lie?",
)(lambda heads: torch.cat(heads.unbind(-3)))
ex.mistake(
    "the heads stacked in a new last dimension",
    "`stack` makes a new dimension; the features should be one.",
    "`cat` or `stack`: which of the two lengthens a dimension that is there?",
)(lambda heads: torch.stack(heads.unbind(-3), -1))
ex.mistake(
    "the first head, as often as there are heads",
    "Every place was filled with head 0.",
    "Which head fills the features from d_head on?",
)(lambda heads: torch.cat([heads[..., 0, :, :]] * heads.shape[-3], -1))
ex.mistake(
    "the last head, as often as there are heads",
    "Every place was filled with the last head.",
    "Which head fills the first features?",
)(lambda heads: torch.cat([heads[..., -1, :, :]] * heads.shape[-3], -1))
ex.mistake(
    "the heads side by side, divided by their number",
    "Concatenation does not average: the numbers stay as they are.",
    "What happens to the size of a number on the way?",
)(lambda heads: merge_heads(heads) / heads.shape[-3])
ex.mistake(
    "the heads as a tuple of tensors",
    "`unbind` gives pieces; what is wanted is one tensor.",
    "Which function lays several tensors side by side?",
)(lambda heads: heads.unbind(-3))
ex.mistake(
    "the first two heads side by side",
    "Further heads are lost.",
    "Where can num_heads be read off the input?",
)(lambda heads: merge_heads(heads[..., :2, :, :]))

ex.alternative("unbind and cat")(lambda heads: torch.cat(heads.unbind(-3), dim=-1))
ex.alternative("movedim, contiguous and view")(
    lambda heads: (tokens := heads.movedim(-3, -2).contiguous()).view(*tokens.shape[:-2], -1)
)
ex.alternative("features first, merged, and transposed back")(
    lambda heads: heads.mT.flatten(-3, -2).mT
)
ex.alternative("a product with slices of the unit matrix")(
    lambda heads: torch.einsum(
        "...hnk,hkf->...nf",
        heads,
        torch.eye(heads.shape[-3] * heads.shape[-1]).to(heads).unflatten(0, (heads.shape[-3], -1)),
    )
)


@ex.alternative("a loop that fills an empty tensor")
def _(heads):
    *lead, num_heads, n, d_head = heads.shape
    merged = torch.empty(*lead, n, num_heads * d_head, dtype=heads.dtype)
    for i in range(num_heads):
        merged[..., i * d_head : (i + 1) * d_head] = heads[..., i, :, :]
    return merged


# --- attention with replaceable parts, for the mistakes of exercises 3 and 4 --------------------


def _attend(
    query, key, value, mask=None, *, scale=None, normalise=None, weigh=None, mix=None
) -> Tensor:
    """Attention in each head: (..., n_q, d_head), (..., n_k, d_head) twice -> (..., n_q, d_head).

    scale, normalise, weigh and mix are parts as in `_wrong_parts`.
    """
    scores = query @ key.mT * (scale(query, key) if scale else query.shape[-1] ** -0.5)
    if mask is None:
        weights = normalise(scores) if normalise else scores.softmax(-1)
    elif normalise:
        weights = normalise(scores.masked_fill(~mask, -INF)).nan_to_num(0.0)
    else:
        weights = (weigh or visible_softmax)(scores, mask)
    return mix(weights, query, key, value) if mix else weights @ value


def _within(num_heads: int, d_head: int) -> Tensor:
    """1 from a head's features to its own, 0 to those of another: (d_model, d_model)."""
    return torch.kron(torch.eye(num_heads), torch.ones(d_head, d_head))


def _causal(query: Tensor, key: Tensor, mask: Tensor | None, shift: int = 0) -> Tensor:
    """The mask, and keys up to i + shift for query i."""
    causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(shift)
    return causal if mask is None else causal & mask


OVER_HEADS = (
    "The heads compete with one another, though each should share out its own 1.",
    "Along which dimension do the keys lie?",
)
SCALED_LATE = (
    "1/√d_k is applied to the weights, which no longer sum to 1.",
    "Does the scale act on the scores or on the weights?",
)
SCALED_LATE_PARTS = {
    "scale": lambda q, k: 1.0,
    "mix": lambda w, q, k, v: w @ v * q.shape[-1] ** -0.5,
}


# --- 3. multi-head attention --------------------------------------------------------------------

ex = Exercise(
    "multi_head_attention",
    chapter="03_multi_head_attention",
    title="Multi-head attention",
    minutes=25,
    difficulty=3,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
Project, split, attend in each head, merge, project once more:

$$\mathrm{MultiHead}(X) = \mathrm{Concat}(\text{head}_0, \ldots, \text{head}_{h-1}) \, W_O$$

$$\text{head}_i = \mathrm{softmax}\left(\frac{Q_i K_i^\top}{\sqrt{d_{head}}}\right) V_i$$

$Q_i$ is head $i$'s piece of $Q = X W_Q$: its features from $i \cdot d_{head}$ on, $d_{head}$ of
them; the same for $K = X W_K$ and $V = X W_V$. The four weights are `(d_model, d_model)` and stand
on the right, as in `x @ w_q`.

`mask`, if given, is bool and broadcasts to `(batch, heads, n, n)`; **True = may attend**. In a head
where a token may see nothing, the head's output for it is 0.
""",
    hints=(
        "Follow the shapes from (batch, n, d_model) to (batch, n, d_model): where do the heads "
        "appear, and where do they go?",
        "With the heads in front of the tokens, (batch, heads, n, d_head), attention is the same "
        "code as with one head. √d_head is read off a head's queries, not off x.",
        "query, key, value = (split_heads(x @ w, num_heads) for w in (w_q, w_k, w_v)), with "
        "split_heads in the same cell; after attention comes merge_heads, and last w_o.",
    ),
)


@ex.solution
def multi_head_attention(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention of x in several heads (Vaswani et al. 2017, section 3.2.2).

    x: (batch, n, d_model), weights: (d_model, d_model), used as x @ w_q,
    mask: bool, broadcasts to (batch, heads, n, n), True = may attend -> (batch, n, d_model).
    """
    ### BEGIN SOLUTION
    heads = (num_heads, x.shape[-1] // num_heads)
    # (batch, n, d_model) -> (batch, n, heads, d_head) -> (batch, heads, n, d_head)
    query, key, value = ((x @ w).unflatten(-1, heads).transpose(1, 2) for w in (w_q, w_k, w_v))
    # (batch, heads, n, d_head) x (batch, heads, d_head, n) -> (batch, heads, n, n)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # 0 / 0 -> 0
    output = weights @ value  # (batch, heads, n, n) x (batch, heads, n, d_head)
    return output.transpose(1, 2).flatten(2) @ w_o  # merged: (batch, n, d_model) x W_O
    ### END SOLUTION


def _mha_case(
    g: torch.Generator, batch: int, n: int, d_model: int, heads: int, **options: object
) -> Case:
    weights = {w: normal(g, d_model, d_model) for w in ("w_q", "w_k", "w_v", "w_o")}
    return {"x": normal(g, batch, n, d_model), **weights, "num_heads": heads, **options}


def _mha_towering(g: torch.Generator) -> Case:
    """Visible scores around -100, the hidden token's around 400."""
    case = _mha_case(g, 1, 3, 4, 2, mask=torch.tensor([[True, True, False]]))
    x, w_q, w_k, w_v = (case[name].clone() for name in ("x", "w_q", "w_k", "w_v"))
    x[..., :2] = torch.tensor([[70.0, -1.0], [70.0, -1.0], [70.0, 4.0]])
    w_q[:2] = torch.tensor([[1.0], [0.0]])  # all queries are near 70
    w_k[:2] = torch.tensor([[0.0], [1.0]])  # visible keys are near -1, the hidden one near 4
    w_k[2:] /= 10
    w_v[0] = 0.0
    return case | {"x": x, "w_q": w_q, "w_k": w_k, "w_v": w_v}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    second = torch.tensor([[True, False], [False, False]])  # nothing is visible to token 1
    ragged = torch.arange(4) < torch.tensor([3, 0])[:, None]  # (batch, n)
    each = torch.rand(2, 2, 3, 3, generator=g) < 0.6
    each[..., 0] = True
    each[1, 0, 2] = False  # head 0 sees nothing there, head 1 does
    whole = torch.rand(2, 1, 3, 3, generator=g) < 0.6
    whole[..., 1] = True
    return [
        _mha_case(g, 1, 2, 4, 2),
        _mha_case(g, 1, 2, 4, 2, mask=second),
        _mha_case(g, 2, 3, 6, 2),
        _mha_case(g, 2, 4, 4, 2, mask=ragged[:, None, None, :]),
        _mha_towering(g),
        _mha_case(g, 2, 3, 6, 3),
        _mha_case(g, 2, 3, 4, 2, mask=each),
        _mha_case(g, 2, 3, 6, 2, mask=whole),
        _mha_case(g, 3, 4, 6, 2, mask=torch.ones(4, 4, dtype=torch.bool).tril()),
        _mha_case(g, 3, 4, 6, 2),
    ]


def _mha_inputs(seed: int) -> list[Tensor]:
    """x (2, 3, 4) and four weights (4, 4)."""
    return some(seed, (2, 3, 4), (4, 4), (4, 4), (4, 4), (4, 4))


@ex.behaviour("with one head it is attention as in chapter 02")
def _(answer):
    x, w_q, w_k, w_v, w_o = _mha_inputs(1)
    want = F.scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v) @ w_o
    expect(answer(x, w_q, w_k, w_v, w_o, 1), want)


@ex.behaviour("with unit matrices each head is attention among its own features of x")
def _(answer):
    (x,) = some(2, (3, 2, 4))
    x, eye = x.transpose(0, 1), torch.eye(4)  # a transposed view: not contiguous
    for num_heads in (2, 4):
        own = x.chunk(num_heads, -1)
        want = torch.cat([F.scaled_dot_product_attention(s, s, s) for s in own], -1)
        expect(answer(x, eye, eye, eye, eye, num_heads), want)


@ex.behaviour("tokens that are all alike come out as x W_V W_O")
def _(answer):
    x, w_q, w_k, w_v, w_o = _mha_inputs(3)
    alike = x[:, :1].expand(2, 3, 4)
    expect(answer(alike, w_q, w_k, w_v, w_o, 2), alike @ w_v @ w_o)


@ex.behaviour("tokens in another order give the same outputs in that order")
def _(answer):
    x, *weights = _mha_inputs(4)
    order = torch.tensor([2, 0, 1])
    expect(answer(x[:, order], *weights, 2), answer(x, *weights, 2)[:, order])


@ex.behaviour("numbering the heads otherwise, in all four weights, changes nothing")
def _(answer):
    x, w_q, w_k, w_v, w_o = _mha_inputs(5)
    other = torch.tensor([2, 3, 0, 1])  # the two heads change places
    renamed = (w_q[:, other], w_k[:, other], w_v[:, other], w_o[other])
    expect(answer(x, *renamed, 2), answer(x, w_q, w_k, w_v, w_o, 2))


@ex.behaviour("with a causal mask a later token cannot change an earlier output")
def _(answer):
    x, *weights = _mha_inputs(6)
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    later = x.clone()
    later[:, 2] += 3
    before = answer(x, *weights, 2, mask=causal)[:, :2]
    expect(answer(later, *weights, 2, mask=causal)[:, :2], before)


@ex.behaviour("a token that may see nothing comes out as 0")
def _(answer):
    x, *weights = _mha_inputs(7)
    mask = torch.tensor([True, False, True])[:, None].expand(3, 3)
    expect(answer(x, *weights, 2, mask=mask)[:, 1], torch.zeros(2, 4))


@ex.behaviour("a head that may see nothing adds nothing")
def _(answer):
    x, w_q, w_k, w_v, w_o = _mha_inputs(8)
    second = torch.tensor([False, True]).reshape(1, 2, 1, 1).expand(2, 2, 3, 3)
    without = w_o.clone()
    without[:2] = 0.0  # the rows of head 0
    expect(answer(x, w_q, w_k, w_v, w_o, 2, mask=second), answer(x, w_q, w_k, w_v, without, 2))


@ex.behaviour("batch elements do not meet")
def _(answer):
    x, *weights = _mha_inputs(9)
    expect(answer(x, *weights, 2)[1:], answer(x[1:], *weights, 2))


def _mha(*, split=split_heads, merge=merge_heads, project=None, last=None, **parts) -> Function:
    """Multi-head attention with one part replaced.

    project(x, w_q, w_k, w_v, w_o) -> query, key, value; last(merged, x, w_o) -> output.
    """

    def function(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
        made = project(x, w_q, w_k, w_v, w_o) if project else (x @ w_q, x @ w_k, x @ w_v)
        query, key, value = (split(y, num_heads) for y in made)
        merged = merge(_attend(query, key, value, mask, **parts))
        return last(merged, x, w_o) if last else merged @ w_o

    return function


NAME = "multi-head attention"
# In self-attention there are as many keys as queries: one of two wrong scales is enough.
SELF_SCALES = [part for part in SCALES if part.name != "scaled by the number of queries"]
ex.mistakes_from(SELF_SCALES, NAME, lambda part: _mha(scale=part))
ex.mistakes_from(NORMALISATIONS, NAME, lambda part: _mha(normalise=part))
ex.mistakes_from(MIXTURES[:3], NAME, lambda part: _mha(mix=part))
ex.mistakes_from(MASKINGS, NAME, lambda part: _mha(weigh=part))
ex.mistake(f"{NAME} with softmax over the heads", *OVER_HEADS)(
    _mha(normalise=lambda scores: scores.softmax(1))
)
ex.mistake(
    f"{NAME} scaled by √d_model",
    "Each head's dot products are sums over d_head features, not over d_model.",
    "Is the root read off `x`, or off the queries of one head?",
)(_mha(scale=lambda q, k: (q.shape[-1] * q.shape[1]) ** -0.5))
ex.mistake(
    f"{NAME} scaled by the number of heads",
    "√num_heads stands where √d_head should.",
    "Which dimension do the dot products sum over?",
)(_mha(scale=lambda q, k: q.shape[1] ** -0.5))

# What goes wrong in splitting and merging.
ex.mistake(
    f"{NAME} split by a reshape straight to (heads, n, d_head)",
    "Head 0 gets the first tokens whole, instead of its features of every token.",
    "Which two dimensions must change places after the last one has been cut?",
)(_mha(split=_straight))
ex.mistake(
    f"{NAME} merged by a reshape without transposing back",
    "A token gets numbers of other tokens, and a later one can reach an earlier one.",
    "In which order must n and heads stand before the last two dimensions are made one?",
)(_mha(merge=_unmoved))
ex.mistake(
    f"{NAME} split and merged by reshapes alone",
    "The shapes fit, but heads are made of pieces of different tokens.",
    "Where do n and heads change places, on the way in and on the way out?",
)(_mha(split=_straight, merge=_unmoved))
ex.mistake(
    f"{NAME} with every num_heads-th feature in the same head",
    "Heads should own features that stand side by side.",
    "(num_heads, d_head) or (d_head, num_heads): into which is the last dimension cut?",
)(_mha(split=_dealt, merge=lambda heads: heads.movedim(-3, -1).flatten(-2)))
ex.mistake(
    f"{NAME} split into every num_heads-th feature, merged side by side",
    "Splitting and merging do not fit together: the split deals the features out like cards.",
    "(num_heads, d_head) or (d_head, num_heads): into which is the last dimension cut?",
)(_mha(split=_dealt))
ex.mistake(
    f"{NAME} merged with the features of the heads interleaved",
    "The output has feature 0 of every head, then feature 1, and so on.",
    "Which dimension must stand last before two are made one: heads, or d_head?",
)(_mha(merge=lambda heads: heads.movedim(-3, -1).flatten(-2)))
ex.mistake(
    f"{NAME} in which the heads of each token attend to one another",
    "The heads were left behind the tokens, so the scores are (heads, heads) in each token.",
    "What shape should the scores have, and where must the heads stand for that?",
)(_mha(split=_cut, merge=lambda tokens: tokens.flatten(-2)))
ex.mistake(
    f"{NAME} merged with the heads in reverse order",
    "Each head's output meets the rows of W_O that belong to another head.",
    "Which head comes first?",
)(_mha(merge=lambda heads: merge_heads(heads.flip(1))))
ex.mistake(
    f"{NAME} with a single head, whatever num_heads is",
    "num_heads has no effect: one wide head sets one pattern for all features.",
    "Where does `num_heads` enter?",
)(_mha(split=lambda x, h: x[:, None]))
ex.mistake(
    f"{NAME} with a single head, scaled by √d_head",
    "num_heads acts on the scale alone.",
    "Where are the features cut into heads?",
)(
    lambda x, a, b, c, o, h, mask=None: _mha(scale=lambda q, k: (q.shape[-1] / h) ** -0.5)(
        x, a, b, c, o, 1, mask
    )
)
ex.mistake(
    f"{NAME} with d_head heads of num_heads features each",
    "num_heads was taken for d_head.",
    "How many heads, and of how many features, does the shape have that you cut into?",
)(_mha(split=lambda x, h: split_heads(x, x.shape[-1] // h)))
ex.mistake(f"{NAME} with the scale after the softmax", *SCALED_LATE)(_mha(**SCALED_LATE_PARTS))
ex.mistake(
    f"{NAME} in which nobody looks at anybody: x W_V W_O",
    "Every token keeps its own value.",
    "Where do queries and keys enter?",
)(lambda x, a, b, c, o, h, mask=None: x @ c @ o)
ex.mistake(
    f"{NAME} with the weights averaged over the heads",
    "All heads look at the same tokens, so they might as well be one.",
    "Does each head look where it wants to, or all where they want to on average?",
)(_mha(mix=lambda w, q, k, v: w.mean(1, keepdim=True) @ v))
ex.mistake(
    f"{NAME} with the first head's weights in every head",
    "The queries and keys of the other heads have no effect.",
    "Does each head mix its values with weights of its own?",
)(_mha(mix=lambda w, q, k, v: w[:, :1] @ v))
ex.mistake(
    f"{NAME} with every head replaced by the mean of the heads",
    "The heads were averaged before they met W_O.",
    "Are heads averaged, or laid side by side?",
)(_mha(mix=lambda w, q, k, v: (w @ v).mean(1, keepdim=True).expand(v.shape)))
ex.mistake(
    f"{NAME} divided by the number of heads",
    "Concatenation does not average: the numbers stay as they are.",
    "Is there a mean too many?",
)(_mha(mix=lambda w, q, k, v: w @ v / v.shape[1]))

# What goes wrong with the four weights: (x, w_q, w_k, w_v, w_o) -> query, key, value.
ONCE = "Does each of the four matrices appear once?"
PROJECTIONS = [
    Mistake(
        "with query and key swapped",
        "The score of i for j is read as that of j for i.",
        "Which of the two owns the rows of the score matrix?",
        lambda x, q, k, v, o: (x @ k, x @ q, x @ v),
    ),
    Mistake(
        "with key and value swapped",
        "W_K makes what is averaged, W_V what is compared.",
        "Which projection is compared, and which comes back?",
        lambda x, q, k, v, o: (x @ q, x @ v, x @ k),
    ),
    Mistake(
        "with query and value swapped",
        "W_Q makes what is averaged, W_V what is compared.",
        "Which projection is compared, and which comes back?",
        lambda x, q, k, v, o: (x @ v, x @ k, x @ q),
    ),
    Mistake(
        "with W_Q for query and key",
        "W_K has no effect: i looks at j exactly as j looks at i.",
        ONCE,
        lambda x, q, k, v, o: (x @ q, x @ q, x @ v),
    ),
    Mistake(
        "with W_K for query and key",
        "W_Q has no effect: i looks at j exactly as j looks at i.",
        ONCE,
        lambda x, q, k, v, o: (x @ k, x @ k, x @ v),
    ),
    Mistake(
        "with W_Q for query, key and value",
        "W_K and W_V have no effect.",
        ONCE,
        lambda x, q, k, v, o: (x @ q, x @ q, x @ q),
    ),
    Mistake(
        "with W_V for key and value",
        "W_K has no effect.",
        ONCE,
        lambda x, q, k, v, o: (x @ q, x @ v, x @ v),
    ),
    Mistake(
        "with the tokens as queries",
        "W_Q has no effect.",
        ONCE,
        lambda x, q, k, v, o: (x, x @ k, x @ v),
    ),
    Mistake(
        "with the tokens as keys",
        "W_K has no effect.",
        ONCE,
        lambda x, q, k, v, o: (x @ q, x, x @ v),
    ),
    Mistake(
        "with the tokens as values",
        "W_V has no effect.",
        ONCE,
        lambda x, q, k, v, o: (x @ q, x @ k, x),
    ),
    Mistake(
        "without W_Q, W_K and W_V",
        "The heads are cut from x itself.",
        ONCE,
        lambda x, q, k, v, o: (x, x, x),
    ),
    Mistake(
        "with W_Q, W_K and W_V transposed",
        "torch.nn.Linear stores its weights the other way round.",
        "Is it `x @ w_q` or `x @ w_q.T` here?",
        lambda x, q, k, v, o: (x @ q.T, x @ k.T, x @ v.T),
    ),
    Mistake(
        "with W_O on the values too",
        "W_O acts twice, once before the heads are split.",
        "At which point are the heads mixed by W_O, and how often?",
        lambda x, q, k, v, o: (x @ q, x @ k, x @ v @ o),
    ),
]
ex.mistakes_from(PROJECTIONS, NAME, lambda part: _mha(project=part))

ENDINGS = [
    Mistake(
        "without W_O",
        "The heads lie side by side and are not mixed.",
        "What happens after the heads have been merged?",
        lambda merged, x, o: merged,
    ),
    Mistake(
        "with W_O transposed",
        "torch.nn.Linear stores its weights the other way round.",
        "Is it `@ w_o` or `@ w_o.T` here?",
        lambda merged, x, o: merged @ o.T,
    ),
    Mistake(
        "with its input added",
        "That is a residual connection, which comes in chapter 05.",
        "Does the formula add x to the result?",
        lambda merged, x, o: merged @ o + x,
    ),
    Mistake(
        "with its input added before W_O",
        "Nothing in the formula adds x to the heads.",
        "Does the formula add x to anything?",
        lambda merged, x, o: (merged + x) @ o,
    ),
    Mistake(
        "averaged over the tokens",
        "All tokens are given the same output.",
        "Does each token get an output of its own?",
        lambda merged, x, o: (merged @ o).mean(1, keepdim=True).expand(x.shape),
    ),
]
ex.mistakes_from(ENDINGS, NAME, lambda part: _mha(last=part))

ex.mistake(
    f"{NAME} with all four weights transposed",
    "torch.nn.Linear stores its weights the other way round; here they stand as in `x @ w_q`.",
    "Is it `x @ w_q` or `x @ w_q.T` here?",
)(lambda x, a, b, c, o, h, mask=None: multi_head_attention(x, a.T, b.T, c.T, o.T, h, mask))
ex.mistake(
    f"{NAME} with W_O on the values, before the heads are split",
    "Each output feature belongs to one head alone; W_O should mix the heads.",
    "In which order do Concat and W_O stand in the formula?",
)(_mha(project=lambda x, a, b, c, o: (x @ a, x @ b, x @ c @ o), last=lambda merged, x, o: merged))
ex.mistake(
    f"{NAME} with W_V and W_O swapped",
    "W_O makes the values and W_V the output.",
    "Which of the two acts before the attention, and which after?",
)(lambda x, a, b, c, o, h, mask=None: multi_head_attention(x, a, b, o, c, h, mask))
ex.mistake(
    f"{NAME} with W_V in the place of W_O",
    "W_O has no effect.",
    "Does each of the four matrices appear once?",
)(lambda x, a, b, c, o, h, mask=None: multi_head_attention(x, a, b, c, c, h, mask))
ex.mistake(
    f"{NAME} under a causal mask",
    "Later tokens are hidden, with a mask and without.",
    "May token 0 look at token 1 where mask is None?",
)(lambda x, a, b, c, o, h, mask=None: multi_head_attention(x, a, b, c, o, h, _causal(x, x, mask)))


@ex.mistake(
    f"{NAME} in which each head sees only its own features of x",
    "x was split before it was projected: the parts of W_Q, W_K and W_V between heads are lost.",
    "Which comes first, the projection of the whole token or the cut into heads?",
)
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    own = _within(num_heads, x.shape[-1] // num_heads).to(x)
    return multi_head_attention(x, w_q * own, w_k * own, w_v * own, w_o, num_heads, mask)


@ex.mistake(
    f"{NAME} in which every head obeys the mask of the first",
    "The mask may have heads of its own, (batch, heads, n, n).",
    "Does the mask broadcast over the heads, or is one of its heads picked out?",
)
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    mask = mask[:, :1] if mask is not None and mask.ndim == 4 else mask
    return multi_head_attention(x, w_q, w_k, w_v, w_o, num_heads, mask)


@ex.mistake(
    f"{NAME} in a loop that gives each head the masks of all heads",
    "A mask (batch, heads, n, n) meets scores (batch, n, n), and a dimension too many comes out.",
    "Which part of the mask belongs to head i, where the mask has heads of its own?",
)
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    query, key, value = (split_heads(x @ w, num_heads) for w in (w_q, w_k, w_v))
    heads = [_attend(query[:, i], key[:, i], value[:, i], mask) for i in range(num_heads)]
    return torch.cat(heads, -1) @ w_o


@ex.alternative("scaled_dot_product_attention")
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    parts = [split_heads(x @ w, num_heads) for w in (w_q, w_k, w_v)]
    return merge_heads(F.scaled_dot_product_attention(*parts, attn_mask=mask)) @ w_o


@ex.alternative("einsum on weights with a dimension for the heads")
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    w_q, w_k, w_v = (w.unflatten(1, (num_heads, -1)) for w in (w_q, w_k, w_v))
    query, key, value = (torch.einsum("bnf,fhk->bhnk", x, w) for w in (w_q, w_k, w_v))
    scores = torch.einsum("bhik,bhjk->bhij", query, key) * key.shape[-1] ** -0.5
    weights = scores.softmax(-1) if mask is None else visible_softmax(scores, mask)
    heads = torch.einsum("bhij,bhjk->bihk", weights, value)
    return torch.einsum("bihk,hkf->bif", heads, w_o.unflatten(0, (num_heads, -1)))


@ex.alternative("a loop over the heads that adds up what each contributes")
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    d_head = x.shape[-1] // num_heads
    visible = torch.ones(len(x), num_heads, x.shape[1], x.shape[1], dtype=torch.bool)
    visible = visible if mask is None else visible & mask
    output = torch.zeros_like(x)
    for i in range(num_heads):
        own = slice(i * d_head, (i + 1) * d_head)
        query, key, value = x @ w_q[:, own], x @ w_k[:, own], x @ w_v[:, own]
        weights = visible_softmax(query @ key.mT / math.sqrt(d_head), visible[:, i])
        output = output + weights @ value @ w_o[own]
    return output


@ex.alternative("in float64, with an additive mask, and back")
def _(x, w_q, w_k, w_v, w_o, num_heads, mask=None):
    wide = [t.double() for t in (x, w_q, w_k, w_v, w_o)]
    query, key, value = (split_heads(wide[0] @ w, num_heads) for w in wide[1:4])
    scores = query / math.sqrt(query.shape[-1]) @ key.mT
    if mask is not None:
        scores = scores + torch.zeros(mask.shape).masked_fill(~mask, -INF)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (merge_heads(weights @ value) @ wide[4]).to(x.dtype)


# --- 4. grouped queries -------------------------------------------------------------------------

ex = Exercise(
    "grouped_query_attention",
    chapter="03_multi_head_attention",
    title="Several query heads share one key/value head",
    minutes=20,
    difficulty=3,
    importance=4,
    points=2,
    batched=True,
    prompt=r"""
While a model writes text, the keys and values of all earlier tokens wait in memory. Fewer
key/value heads make that memory smaller. With $h$ query heads and $h_{kv}$ key/value heads, each
key/value head serves a group of $g = h / h_{kv}$ query heads that stand side by side:

$$\text{head}_i = \mathrm{softmax}\left(\frac{Q_i K_j^\top}{\sqrt{d}}\right) V_j, \qquad
  j = \lfloor i / g \rfloor$$

With $h_{kv} = h$ it is multi-head attention, with $h_{kv} = 1$ multi-query attention. `query` is
`(batch, h, n_q, d)`, `key` and `value` are `(batch, h_kv, n_k, d)`, and the result is
`(batch, h, n_q, d)`.

`mask`, if given, is bool and broadcasts to `(batch, h, n_q, n_k)`; **True = may attend**. Where a
query may see nothing its output is 0.
""",
    hints=(
        "6 query heads and 3 key/value heads: which key/value head does query head 3 use?",
        "The groups stand side by side: heads 0 and 1 use the first, 2 and 3 the second. So each "
        "key/value head is needed several times in a row, not all of them one after the other "
        "again.",
        "group = query.shape[1] // key.shape[1]; torch's `repeat_interleave` makes 0 0 1 1 of 0 1. "
        "Along which dimension, and what must happen to the values?",
    ),
)


@ex.solution
def grouped_query_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attention with fewer key/value heads than query heads (Ainslie et al. 2023).

    query: (batch, h, n_q, d), key and value: (batch, h_kv, n_k, d), h a multiple of h_kv,
    mask: bool, broadcasts to (batch, h, n_q, n_k), True = may attend -> (batch, h, n_q, d).
    """
    ### BEGIN SOLUTION
    group = query.shape[1] // key.shape[1]  # so many query heads share a key/value head
    key = key.repeat_interleave(group, dim=1)  # (batch, h_kv, n_k, d) -> (batch, h, n_k, d)
    value = value.repeat_interleave(group, dim=1)
    # (batch, h, n_q, d) x (batch, h, d, n_k) -> (batch, h, n_q, n_k)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # 0 / 0 -> 0
    return weights @ value  # (batch, h, n_q, n_k) x (batch, h, n_k, d) -> (batch, h, n_q, d)
    ### END SOLUTION


def _gqa_case(g: torch.Generator, *sizes: int, **options: object) -> Case:
    """sizes: batch, h, h_kv, n_q, n_k, d."""
    batch, h, h_kv, n_q, n_k, d = sizes
    shapes = {"query": (batch, h, n_q, d), "key": (batch, h_kv, n_k, d)}
    case = {name: normal(g, *shape) for name, shape in shapes.items()}
    return case | {"value": normal(g, batch, h_kv, n_k, d)} | options


def _gqa_towering(g: torch.Generator) -> Case:
    """Visible scores around -100, those of the hidden key around 300."""
    case = _gqa_case(g, 1, 4, 2, 2, 3, 4, mask=torch.tensor([[True, True, False]]))
    key = case["key"] / 10 - 1
    key[:, :, 2] += 4
    return case | {"query": torch.full((1, 4, 2, 4), 50.0) + case["query"] / 10, "key": key}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    second = torch.tensor([[True, False], [False, False]])  # nothing is visible to query 1
    ragged = torch.arange(5) < torch.tensor([5, 2, 0])[:, None]  # (batch, n_k)
    each = torch.rand(2, 4, 3, 4, generator=g) < 0.6
    each[..., 0] = True
    each[1, 1, 2] = False  # head 1 sees nothing there, its neighbours do
    return [
        _gqa_case(g, 1, 4, 2, 1, 2, 1),
        _gqa_case(g, 1, 4, 2, 2, 3, 2),
        _gqa_case(g, 1, 4, 2, 2, 2, 1, mask=second),
        _gqa_case(g, 2, 4, 2, 3, 3, 2),
        _gqa_case(g, 1, 6, 2, 2, 4, 3),
        _gqa_towering(g),
        _gqa_case(g, 2, 6, 3, 3, 4, 2, mask=torch.ones(3, 4, dtype=torch.bool).tril(1)),
        _gqa_case(g, 3, 4, 2, 2, 5, 4, mask=ragged[:, None, None, :]),
        _gqa_case(g, 2, 4, 2, 3, 4, 2, mask=each),
        _gqa_case(g, 2, 4, 2, 4, 4, 4),
        _gqa_case(g, 3, 8, 4, 3, 5, 6),
    ]


def _gqa_inputs(seed: int, h: int = 6, h_kv: int = 2) -> list[Tensor]:
    """query (2, h, 3, 4), key and value (2, h_kv, 5, 4)."""
    return some(seed, (2, h, 3, 4), (2, h_kv, 5, 4), (2, h_kv, 5, 4))


@ex.behaviour("query head i gets its values from key/value head i // (h / h_kv)")
def _(answer):
    case = {
        "query": torch.zeros(1, 6, 1, 1),
        "key": torch.zeros(1, 3, 1, 1),
        "value": torch.arange(3.0).reshape(1, 3, 1, 1),  # each says its head
    }
    expect(answer.on(case), torch.arange(6.0).div(2, rounding_mode="floor").reshape(1, 6, 1, 1))


@ex.behaviour("query head i looks at the keys of key/value head i // (h / h_kv)")
def _(answer):
    key = torch.zeros(1, 2, 2, 1)
    key[:, 0, 0] = key[:, 1, 1] = 50.0  # head 0 points at token 0, head 1 at token 1
    value = torch.tensor([[0.0], [1.0]]).expand(1, 2, 2, 1)  # each says its token
    want = torch.tensor([0.0, 0.0, 1.0, 1.0]).reshape(1, 4, 1, 1)
    expect(answer(torch.ones(1, 4, 1, 1), key, value), want)


@ex.behaviour("with as many key/value heads as query heads it is ordinary attention")
def _(answer):
    tokens = some(1, (2, 3, 12), (2, 5, 12), (2, 5, 12))
    query, key, value = (split_heads(x, 3) for x in tokens)  # not contiguous, as in a model
    expect(answer(query, key, value), F.scaled_dot_product_attention(query, key, value))


@ex.behaviour("with one key/value head every query head looks at the same keys")
def _(answer):
    query, key, value = _gqa_inputs(2, h=3, h_kv=1)
    want = F.scaled_dot_product_attention(query, key.expand(2, 3, 5, 4), value.expand(2, 3, 5, 4))
    expect(answer(query, key, value), want)


@ex.behaviour("another key/value head changes its own group and no other")
def _(answer):
    query, key, value = _gqa_inputs(3)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, 1] += 1
    other_value[:, 1] -= 2
    group_0 = slice(0, 3)
    expect(answer(query, other_key, other_value)[:, group_0], answer(query, key, value)[:, group_0])


@ex.behaviour("query heads of one group do not meet")
def _(answer):
    query, key, value = _gqa_inputs(4)
    other = query.clone()
    other[:, 0] += 3
    expect(answer(other, key, value)[:, 1:], answer(query, key, value)[:, 1:])


@ex.behaviour("a hidden key and its value cannot change the output")
def _(answer):
    query, key, value = _gqa_inputs(5)
    mask = torch.tensor([True, True, False, True, True]).expand(3, 5)
    other_key, other_value = key.clone(), value.clone()
    other_key[:, :, 2] += 5
    other_value[:, :, 2] -= 7
    expect(answer(query, other_key, other_value, mask=mask), answer(query, key, value, mask=mask))


@ex.behaviour("each query head obeys its own mask, also within a group")
def _(answer):
    query, key, value = _gqa_inputs(6)
    mask = torch.ones(2, 6, 3, 5, dtype=torch.bool)
    mask[:, 1] = False
    got = answer(query, key, value, mask=mask)
    expect(got[:, 1], torch.zeros(2, 3, 4))
    expect(got[:, 2], answer(query, key, value)[:, 2])


@ex.behaviour("batch elements do not meet")
def _(answer):
    query, key, value = _gqa_inputs(7)
    expect(answer(query, key, value)[1:], answer(query[1:], key[1:], value[1:]))


def _shared(heads: Tensor, h: int) -> Tensor:
    """Each key/value head several times in a row, once for each query head."""
    return heads.repeat_interleave(h // heads.shape[1], 1)


def _gqa(*, keys=_shared, values=_shared, finish=None, **parts) -> Function:
    """Grouped-query attention with one part replaced.

    keys, values: (key or value, h) -> one for each query head; finish(heads, h_kv) -> output.
    """

    def function(query, key, value, mask=None):
        h, h_kv = query.shape[1], key.shape[1]
        heads = _attend(query, keys(key, h), values(value, h), mask, **parts)
        return finish(heads, h_kv) if finish else heads

    return function


def _grouped(heads: Tensor, h_kv: int) -> Tensor:
    """(batch, h, n_q, d) -> (batch, h_kv, group, n_q, d)."""
    return heads.unflatten(1, (h_kv, -1))


NAME = "grouped-query attention"
ex.mistakes_from(SCALES, NAME, lambda part: _gqa(scale=part))
ex.mistakes_from(NORMALISATIONS, NAME, lambda part: _gqa(normalise=part))
ex.mistakes_from(MIXTURES, NAME, lambda part: _gqa(mix=part))
ex.mistakes_from(MASKINGS, NAME, lambda part: _gqa(weigh=part))
ex.mistake(f"{NAME} with softmax over the heads", *OVER_HEADS)(
    _gqa(normalise=lambda scores: scores.softmax(1))
)
ex.mistake(
    f"{NAME} scaled by the width of all heads together",
    "√(h·d) stands where √d should: each dot product is a sum over one head's d features.",
    "Which dimension do the dot products sum over?",
)(_gqa(scale=lambda q, k: (q.shape[1] * q.shape[-1]) ** -0.5))
ex.mistake(
    f"{NAME} scaled by the number of heads",
    "√h stands where √d should.",
    "Which entry of `query.shape` is d?",
)(_gqa(scale=lambda q, k: q.shape[1] ** -0.5))


@ex.mistake(
    f"{NAME} scaled by the width of a group",
    "√(g·d) stands where √d should: the heads of a group share keys, not queries.",
    "Which dimension do the dot products sum over?",
)
def _(query, key, value, mask=None):
    width = query.shape[1] // key.shape[1] * query.shape[-1]
    return _gqa(scale=lambda q, k: width**-0.5)(query, key, value, mask)


INTERLEAVED = "`repeat` gives the heads 0 1 0 1; the groups stand side by side, 0 0 1 1."
WHICH = "Of 4 query heads and 2 key/value heads, which one should query head 1 use?"
SHARINGS = [
    Mistake(
        "with key/value head i % h_kv for query head i",
        INTERLEAVED,
        WHICH,
        lambda t, h: t.repeat(1, h // t.shape[1], 1, 1),
    ),
    Mistake(
        "with the first key/value head for all",
        "The other key/value heads have no effect.",
        WHICH,
        lambda t, h: t[:, :1],
    ),
    Mistake(
        "with the last key/value head for all",
        "The other key/value heads have no effect.",
        WHICH,
        lambda t, h: t[:, -1:],
    ),
    Mistake(
        "with the mean of the key/value heads",
        "All query heads look at one averaged head.",
        WHICH,
        lambda t, h: t.mean(1, keepdim=True),
    ),
    Mistake(
        "with the sum of the key/value heads",
        "All query heads look at one summed head.",
        WHICH,
        lambda t, h: t.sum(1, keepdim=True),
    ),
    Mistake(
        "with the groups in reverse order",
        "The first query heads use the last key/value head.",
        WHICH,
        lambda t, h: _shared(t.flip(1), h),
    ),
    Mistake(
        "with the next group's key/value head",
        "The groups are shifted by one.",
        WHICH,
        lambda t, h: _shared(t.roll(-1, 1), h),
    ),
    Mistake(
        "with key/value head i // h_kv for query head i",
        "The head's number is divided by h_kv instead of by the size of a group, h / h_kv.",
        "Of 6 query heads and 2 key/value heads, how many query heads are in a group?",
        lambda t, h: t[:, torch.arange(h) // t.shape[1]],
    ),
    Mistake(
        "with key/value head i for query head i, and the last one for the rest",
        "The first query heads have a key/value head each, and the rest share the last.",
        WHICH,
        lambda t, h: t[:, torch.arange(h).clamp(max=t.shape[1] - 1)],
    ),
    Mistake(
        "in which each query sees the keys of all key/value heads",
        "The heads' keys follow one another as if they were one long sequence.",
        "How many keys should one query see?",
        lambda t, h: t.flatten(1, 2)[:, None],
    ),
]
ex.mistakes_from(SHARINGS, NAME, lambda part: _gqa(keys=part, values=part))
for part in SHARINGS[:4]:  # and the same done to the keys alone, or to the values alone
    for word in ("key", "value"):
        ex.mistake(
            f"{NAME} {part.name.replace('key/value', word)}",
            f"Keys and values do not fit together. {part.cause}".replace("key/value", word),
            part.ask,
        )(_gqa(**{f"{word}s": part.function}))

FINISHES = [
    Mistake(
        "averaged over each group",
        "The result has h_kv heads instead of h.",
        "How many heads should come out?",
        lambda heads, h_kv: _grouped(heads, h_kv).mean(2),
    ),
    Mistake(
        "summed over each group",
        "The result has h_kv heads instead of h.",
        "How many heads should come out?",
        lambda heads, h_kv: _grouped(heads, h_kv).sum(2),
    ),
    Mistake(
        "that keeps the first head of each group",
        "The result has h_kv heads instead of h.",
        "How many heads should come out?",
        lambda heads, h_kv: _grouped(heads, h_kv)[:, :, 0],
    ),
    Mistake(
        "with a dimension for the groups left in",
        "The shape is (batch, h_kv, g, n_q, d).",
        "Which two dimensions must become one again?",
        _grouped,
    ),
    Mistake(
        "with its heads in another order",
        "Groups and members have changed places on the way back.",
        "In which order were the query heads cut into groups, and are they put back so?",
        lambda heads, h_kv: _grouped(heads, h_kv).transpose(1, 2).flatten(1, 2),
    ),
    Mistake(
        "divided by the number of query heads in a group",
        "Sharing keys does not average outputs.",
        "Is there a mean too many?",
        lambda heads, h_kv: heads * h_kv / heads.shape[1],
    ),
    Mistake(
        "with its heads merged",
        "The shape is (batch, n_q, h·d): the heads were laid side by side.",
        "What shape does the docstring promise?",
        lambda heads, h_kv: merge_heads(heads),
    ),
]
ex.mistakes_from(FINISHES, NAME, lambda part: _gqa(finish=part))

ex.mistake(f"{NAME} with the scale after the softmax", *SCALED_LATE)(_gqa(**SCALED_LATE_PARTS))
ex.mistake(
    f"{NAME} with the queries of a group averaged",
    "There is one query for each key/value head instead of one for each query head.",
    "How many heads should come out?",
)(lambda q, k, v, mask=None: _attend(_grouped(q, k.shape[1]).mean(2), k, v, mask))
ex.mistake(
    f"{NAME} with one averaged query for the whole group",
    "All heads of a group do the same.",
    "What do the heads of a group share: keys and values, or queries as well?",
)(
    lambda q, k, v, mask=None: _shared(
        _attend(_grouped(q, k.shape[1]).mean(2), k, v, mask), q.shape[1]
    )
)
ex.mistake(
    f"{NAME} with the first query heads alone",
    "Only as many query heads are left as there are key/value heads.",
    "How many heads should come out?",
)(lambda q, k, v, mask=None: _attend(q[:, : k.shape[1]], k, v, mask))
ex.mistake(
    f"{NAME} with query and key swapped",
    "The scores are transposed: row i should belong to query i.",
    "Which of the two stands on the left of the product?",
)(lambda q, k, v, mask=None: _attend(_shared(k, q.shape[1]), q, _shared(v, q.shape[1]), mask))
ex.mistake(
    f"{NAME} with key and value swapped",
    "The values are compared, and the keys are averaged.",
    "Which of the two is compared, and which comes back?",
)(lambda q, k, v, mask=None: grouped_query_attention(q, v, k, mask))
ex.mistake(
    f"{NAME} under a causal mask",
    "Later keys are hidden, with a mask and without.",
    "What does the function do when mask is None?",
)(
    lambda q, k, v, mask=None: grouped_query_attention(
        q, k, v, _causal(q, k, mask, k.shape[2] - q.shape[2])
    )
)
ex.mistake(
    f"{NAME} under a causal mask that is aligned at the top left",
    "Later keys are hidden, with a mask and without.",
    "What does the function do when mask is None?",
)(lambda q, k, v, mask=None: grouped_query_attention(q, k, v, _causal(q, k, mask)))


@ex.mistake(
    f"{NAME} in which every query head obeys the mask of the first",
    "The mask may have heads of its own, (batch, h, n_q, n_k).",
    "Does the mask broadcast over the heads, or is one of its heads picked out?",
)
def _(query, key, value, mask=None):
    mask = mask[:, :1] if mask is not None and mask.ndim == 4 else mask
    return grouped_query_attention(query, key, value, mask)


@ex.alternative("scaled_dot_product_attention with enable_gqa")
def _(query, key, value, mask=None):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


@ex.alternative("query heads cut into groups, nothing repeated")
def _(query, key, value, mask=None):
    batch, h, n_q, _ = query.shape
    scores = _grouped(query, key.shape[1]) @ key.mT[:, :, None] / math.sqrt(query.shape[-1])
    if mask is not None:
        mask = mask.expand(batch, h, n_q, key.shape[2]).unflatten(1, (key.shape[1], -1))
    weights = scores.softmax(-1) if mask is None else visible_softmax(scores, mask)
    return (weights @ value[:, :, None]).flatten(1, 2)


@ex.alternative("einsum over groups")
def _(query, key, value, mask=None):
    shape = (len(query), query.shape[1], query.shape[2], key.shape[2])
    query = _grouped(query, key.shape[1])
    scores = torch.einsum("bjgqd,bjkd->bjgqk", query, key).flatten(1, 2) / query.shape[-1] ** 0.5
    visible = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
    weights = visible_softmax(scores, visible)
    return torch.einsum("bjgqk,bjkd->bjgqd", _grouped(weights, key.shape[1]), value).flatten(1, 2)


@ex.alternative("a loop over the query heads")
def _(query, key, value, mask=None):
    h, group = query.shape[1], query.shape[1] // key.shape[1]
    visible = torch.ones(len(query), h, query.shape[2], key.shape[2], dtype=torch.bool)
    visible = visible if mask is None else visible & mask
    heads = [
        _attend(query[:, i], key[:, i // group], value[:, i // group], visible[:, i])
        for i in range(h)
    ]
    return torch.stack(heads, 1)


@ex.alternative("in float64, and back")
def _(query, key, value, mask=None):
    wide = [_shared(t.double(), query.shape[1]) for t in (query, key, value)]
    return _attend(*wide, mask).to(query.dtype)


# --- 5. what each head adds ---------------------------------------------------------------------

ex = Exercise(
    "head_contributions",
    chapter="03_multi_head_attention",
    title="What each head adds to the output",
    minutes=15,
    difficulty=2,
    importance=3,
    batched=True,
    prompt=r"""
Concat followed by $W_O$ hides a simple thing: the output is a **sum over heads**. $W_O$ falls into
blocks of $d_{head}$ rows, one block for each head, and

$$\mathrm{Concat}(\text{head}_0, \ldots, \text{head}_{h-1}) \, W_O =
  \sum_i \text{head}_i \, W_O^{(i)}, \qquad
  W_O^{(i)} = \text{rows } i \cdot d_{head} \ldots (i + 1) \cdot d_{head} - 1 \text{ of } W_O$$

Return the terms of that sum, before it is taken: from `heads` `(batch, h, n, d_head)` and `w_o`
`(h * d_head, d_model)` make `(batch, h, n, d_model)`. Summed over the heads it is
`merge_heads(heads) @ w_o`. To see what a head is good for, look at its term, or leave it out.
""",
    hints=(
        "In `merge_heads(heads) @ w_o`, which rows of w_o does head 0 meet, and which does head 1?",
        "Row r of w_o meets feature r of the merged heads, and head i owns the features from "
        "i·d_head on. So head i meets d_head rows in a row.",
        "w_o.unflatten(0, (h, -1)) has shape (h, d_head, d_model), one block for each head. Which "
        "product pairs each head with its block and leaves the heads apart?",
    ),
)


@ex.solution
def head_contributions(heads: Tensor, w_o: Tensor) -> Tensor:
    """What each head adds to the output of multi-head attention.

    heads: (batch, h, n, d_head), w_o: (h * d_head, d_model) -> (batch, h, n, d_model).
    """
    ### BEGIN SOLUTION
    blocks = w_o.unflatten(0, (heads.shape[1], -1))  # (h * d_head, d_model) -> (h, d_head, d_model)
    return heads @ blocks  # (batch, h, n, d_head) x (h, d_head, d_model) -> (batch, h, n, d_model)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, h: int, n: int, d_head: int, d_model: int) -> Case:
        return {"heads": normal(g, batch, h, n, d_head), "w_o": normal(g, h * d_head, d_model)}

    return [
        case(1, 2, 1, 2, 2),
        case(1, 2, 2, 1, 2),
        case(1, 2, 2, 2, 4),
        case(2, 3, 2, 2, 6),
        case(2, 2, 3, 3, 6),
        case(2, 4, 3, 1, 4),
        case(2, 3, 3, 3, 9),
        case(2, 3, 4, 2, 5),
        case(3, 2, 4, 3, 6),
        case(3, 4, 2, 2, 3),
    ]


def _contributions_inputs(seed: int) -> list[Tensor]:
    """heads (2, 3, 4, 2), w_o (6, 5)."""
    return some(seed, (2, 3, 4, 2), (6, 5))


@ex.behaviour("the contributions add up to the merged heads times W_O")
def _(answer):
    merged, w_o = some(1, (2, 4, 6), (6, 5))
    heads = split_heads(merged, 3)  # a transposed view: not contiguous
    expect(answer(heads, w_o).sum(1), merged @ w_o)


@ex.behaviour("without the other heads a head adds the same")
def _(answer):
    heads, w_o = _contributions_inputs(2)
    alone = torch.zeros_like(heads)
    alone[:, 1] = heads[:, 1]
    expect(answer(alone, w_o)[:, 1], answer(heads, w_o)[:, 1])


@ex.behaviour("a single head adds the whole output")
def _(answer):
    heads, w_o = some(6, (2, 1, 3, 2), (2, 4))
    expect(answer(heads, w_o), heads @ w_o)


@ex.behaviour("a head of zeros adds nothing")
def _(answer):
    heads, w_o = _contributions_inputs(3)
    silent = heads.clone()
    silent[:, 2] = 0.0
    expect(answer(silent, w_o)[:, 2], torch.zeros(2, 4, 5))


@ex.behaviour("with the unit matrix for W_O each head writes to its own features")
def _(answer):
    case = {"heads": torch.ones(1, 2, 1, 2), "w_o": torch.eye(4)}
    want = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]).reshape(1, 2, 1, 4)
    expect(answer.on(case), want)


@ex.behaviour("the rows of W_O from i·d_head on belong to head i alone")
def _(answer):
    heads, w_o = _contributions_inputs(4)
    other = w_o.clone()
    other[2:4] = 0.0  # the rows of head 1
    want = answer(heads, w_o)
    want = torch.stack([want[:, 0], torch.zeros(2, 4, 5), want[:, 2]], 1)
    expect(answer(heads, other), want)


@ex.behaviour("doubling a head doubles its contribution")
def _(answer):
    heads, w_o = _contributions_inputs(5)
    expect(answer(2 * heads, w_o), 2 * answer(heads, w_o))


def _blocks(heads: Tensor, w_o: Tensor) -> Tensor:
    """(h * d_head, d_model) -> (h, d_head, d_model), as it should be."""
    return w_o.unflatten(0, (heads.shape[1], -1))


def _from_blocks(change: Function) -> Function:
    """`change(blocks, w_o)` makes other blocks, (h, d_head, d_model)."""
    return lambda heads, w_o: heads @ change(_blocks(heads, w_o), w_o)


def _from_terms(change: Function) -> Function:
    """`change(contributions)` makes something else of the right ones."""
    return lambda heads, w_o: change(head_contributions(heads, w_o))


ROWS = "Which rows of w_o does head 1 meet in `merge_heads(heads) @ w_o`?"
BLOCKS = [
    Mistake(
        "with W_O transposed",
        "Blocks of columns stand where blocks of rows should; torch.nn.Linear stores its weights "
        "so, but here it is `merged @ w_o`.",
        "Which dimension of w_o meets the features of the heads?",
        lambda blocks, w_o: w_o.T.unflatten(0, (len(blocks), -1)),
    ),
    Mistake(
        "with every h-th row of W_O",
        "The rows were cut into (d_head, h) and dealt out like cards.",
        ROWS,
        lambda blocks, w_o: w_o.unflatten(0, (-1, len(blocks))).transpose(0, 1),
    ),
    Mistake(
        "with the first block of W_O for every head",
        "All heads meet the rows of head 0.",
        ROWS,
        lambda blocks, w_o: blocks[:1],
    ),
    Mistake(
        "with the last block of W_O for every head",
        "All heads meet the rows of the last head.",
        ROWS,
        lambda blocks, w_o: blocks[-1:],
    ),
    Mistake(
        "with the sum of the blocks of W_O",
        "The sum over heads runs over W_O too early.",
        "How many letters for heads does your product have, and should they be the same one?",
        lambda blocks, w_o: blocks.sum(0),
    ),
    Mistake(
        "with the mean of the blocks of W_O",
        "All heads meet the same averaged block.",
        ROWS,
        lambda blocks, w_o: blocks.mean(0),
    ),
    Mistake(
        "with the blocks of W_O in reverse order",
        "Head 0 meets the last rows.",
        ROWS,
        lambda blocks, w_o: blocks.flip(0),
    ),
    Mistake(
        "with the next head's block of W_O",
        "The blocks are shifted by one.",
        ROWS,
        lambda blocks, w_o: blocks.roll(-1, 0),
    ),
    Mistake(
        "with the block of W_O before its own",
        "The blocks are shifted by one.",
        ROWS,
        lambda blocks, w_o: blocks.roll(1, 0),
    ),
    Mistake(
        "with blocks of W_O that overlap",
        "The block of head i begins at row i instead of i·d_head.",
        "Where does the block of head 1 begin if a head is 4 wide?",
        lambda blocks, w_o: w_o.unfold(0, blocks.shape[1], 1)[: len(blocks)].mT,
    ),
    Mistake(
        "with blocks of W_O reshaped to (h, d_model, d_head) and transposed",
        "`reshape` reads the numbers row by row: the rows of W_O are torn up.",
        "Which dimension of w_o can be cut in two without moving a number?",
        lambda blocks, w_o: blocks.reshape(*blocks.mT.shape).mT,
    ),
    Mistake(
        "with the rows of each block of W_O in reverse order",
        "Feature 0 of a head meets the last row of its block.",
        ROWS,
        lambda blocks, w_o: blocks.flip(1),
    ),
    Mistake(
        "in which each head writes to its own features only",
        "The parts of W_O from one head to the features of another are lost: W_O mixes heads.",
        "How many columns of w_o may a head write to?",
        lambda blocks, w_o: (w_o * _within(*blocks.shape[:2]).to(w_o)).reshape(blocks.shape),
    ),
    Mistake(
        "with the unit matrix for W_O",
        "W_O has no effect.",
        "Where does `w_o` enter?",
        lambda blocks, w_o: torch.eye(len(w_o)).to(w_o).unflatten(0, (len(blocks), -1)),
    ),
]
ex.mistakes_from(BLOCKS, "the contributions", _from_blocks)

SUM = "Is the sum over heads already taken?"
TERMS = [
    Mistake(
        "summed over the heads",
        "That is the output itself; asked for are its terms.",
        SUM,
        lambda terms: terms.sum(1),
    ),
    Mistake(
        "averaged over the heads",
        "The heads were averaged; asked for are the terms of the sum.",
        SUM,
        lambda terms: terms.mean(1),
    ),
    Mistake(
        "with the whole output in the place of each",
        "The sum over heads stands in the place of each term.",
        SUM,
        lambda terms: terms.sum(1, keepdim=True).expand(terms.shape),
    ),
    Mistake(
        "with a piece of the output in the place of each",
        "The output was cut into heads; but each head writes to all features of the output.",
        "How wide is what one head adds: d_head, or d_model?",
        lambda terms: split_heads(terms.sum(1), terms.shape[1]),
    ),
    Mistake(
        "with an equal share of the output in the place of each",
        "The heads differ, and so do their terms.",
        "Does your result still depend on which head made what?",
        lambda terms: terms.mean(1, keepdim=True).expand(terms.shape),
    ),
    Mistake(
        "taken away from the output",
        "That is what is left when a head is taken out, not what it adds.",
        "What do you get for a head of zeros, and what should it be?",
        lambda terms: terms.sum(1, keepdim=True) - terms,
    ),
    Mistake(
        "added up head after head",
        "Head i's term holds those of the heads before it.",
        "Does a loop keep adding to the same tensor?",
        lambda terms: terms.cumsum(1),
    ),
    Mistake(
        "divided by the number of heads",
        "The terms add up to the output as they are.",
        "What should the contributions add up to?",
        lambda terms: terms / terms.shape[1],
    ),
    Mistake(
        "times the number of heads",
        "The terms add up to the output as they are.",
        "What should the contributions add up to?",
        lambda terms: terms * terms.shape[1],
    ),
    Mistake(
        "as shares of the output",
        "Each term was divided by the sum of all.",
        "What should the contributions add up to: 1, or the output?",
        lambda terms: terms / terms.sum(1, keepdim=True),
    ),
    Mistake(
        "without their signs",
        "A head may also take away.",
        "What should the contributions add up to?",
        lambda terms: terms.abs(),
    ),
    Mistake(
        "reduced to their lengths",
        "Each vector was reduced to one number.",
        "What shape does the docstring promise?",
        lambda terms: terms.norm(dim=-1),
    ),
    Mistake(
        "with the heads behind the tokens",
        "The shape is (batch, n, h, d_model).",
        "Which two dimensions must change places?",
        lambda terms: terms.transpose(1, 2),
    ),
    Mistake(
        "with tokens and features swapped",
        "The shape is (batch, h, d_model, n).",
        "Is there a transpose too many?",
        lambda terms: terms.mT,
    ),
    Mistake(
        "in reverse order",
        "The last head's comes first.",
        "Whose contribution is at index 0?",
        lambda terms: terms.flip(1),
    ),
    Mistake(
        "summed over the tokens",
        "Each token should keep its own.",
        "Which dimension does your sum run over?",
        lambda terms: terms.sum(2),
    ),
    Mistake(
        "averaged over the tokens",
        "Each token should keep its own.",
        "Which dimension does your mean run over?",
        lambda terms: terms.mean(2),
    ),
    Mistake(
        "of the first head, and 0 for the others",
        "A loop ended after the first head.",
        "Is there a `return` or a `break` inside the loop?",
        lambda terms: torch.cat([terms[:, :1], 0 * terms[:, 1:]], 1),
    ),
    Mistake(
        "of the last head, for every head",
        "A loop overwrites what it has made before.",
        "Does each head write to its own place?",
        lambda terms: terms[:, -1:].expand(terms.shape),
    ),
    Mistake(
        "as a tuple of tensors",
        "One tensor with a dimension for the heads is wanted.",
        "Which function makes one tensor, with a new dimension, of several?",
        lambda terms: terms.unbind(1),
    ),
    Mistake(
        "stacked in front of the batch",
        "`torch.stack` puts the new dimension first unless it is told where.",
        "Behind which dimension should the heads stand?",
        lambda terms: terms.transpose(0, 1),
    ),
    Mistake(
        "side by side",
        "The shape is (batch, n, h·d_model).",
        "What shape does the docstring promise?",
        merge_heads,
    ),
]
ex.mistakes_from(TERMS, "the contributions", _from_terms)

ex.mistake(
    "the contributions of heads whose tokens were mixed up by a reshape",
    "Heads and tokens were put in another order by `reshape`, which moves no number.",
    "Which call swaps two dimensions: `transpose` or `reshape`?",
)(lambda heads, w_o: head_contributions(heads.transpose(1, 2).reshape(heads.shape), w_o))

ex.alternative("einsum")(
    lambda heads, w_o: torch.einsum("bhnk,hkm->bhnm", heads, _blocks(heads, w_o))
)
ex.alternative("a loop over slices of rows")(
    lambda heads, w_o: torch.stack(
        [heads[:, i] @ rows for i, rows in enumerate(w_o.chunk(heads.shape[1]))], dim=1
    )
)
ex.alternative("products without a sum, then the sum over d_head")(
    lambda heads, w_o: (heads[..., None] * _blocks(heads, w_o)[:, None]).sum(-2)
)


@ex.alternative("all heads but one set to 0, merged and projected")
def _(heads, w_o):
    terms = []
    for i in range(heads.shape[1]):
        only = torch.zeros(heads.shape[1], 1, 1, dtype=heads.dtype)
        only[i] = 1.0
        terms.append(merge_heads(heads * only) @ w_o)
    return torch.stack(terms, dim=1)


@ex.alternative("in float64, and back")
def _(heads, w_o):
    rows = w_o.double().reshape(1, heads.shape[1], heads.shape[3], w_o.shape[1])
    return torch.matmul(heads.double(), rows).to(heads.dtype)
