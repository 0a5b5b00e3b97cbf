"""Exercises of chapter 07: one sequence reads another."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import Broken, expect
from ._inputs import normal
from ._wrong_parts import MASKINGS, MIXTURES, NORMALISATIONS, SCALES, visible_softmax

INF = math.inf


def _root(x: Tensor) -> float:
    return math.sqrt(x.shape[-1])


# --- 1. cross-attention -----------------------------------------------------------------------

ex = Exercise(
    "cross_attention",
    chapter="07_cross_attention",
    title="Cross-attention with several heads",
    minutes=20,
    difficulty=3,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
A decoder that writes a translation must read the source. In **cross-attention** the queries come
from one sequence, `x`, and the keys and values from another, `context`:

$$Q = X W_Q, \quad K = C W_K, \quad V = C W_V, \qquad
  \text{output} = \mathrm{Concat}(\text{head}_1, \dots, \text{head}_h)\, W_O, \qquad
  \text{head}_i = \mathrm{softmax}\left(\frac{Q_i K_i^\top}{\sqrt{d_k}}\right) V_i$$

- `x` is `(batch, n_q, d_model)`, `context` is `(batch, n_k, d_context)`: other length, other width.
- Head $i$ takes columns $i\,d_k$ to $(i+1)\,d_k - 1$ of $Q$, $K$ and $V$, with
  $d_k$ = d_model / num_heads.
- `mask`, if given, is bool and broadcasts to `(batch, heads, n_q, n_k)`; **True = may attend**. A
  query that may see nothing gets the output 0.

The output has one row for each query. There is no residual connection in here.
""",
    hints=(
        "Who asks, and who is asked? Which of the two lengths must the output have?",
        "Only the two lines that make keys and values differ from multi-head self-attention. Split "
        "the width into (heads, d_k) first; then bring the heads before the length.",
        "split = lambda t: t.unflatten(-1, (num_heads, -1)).transpose(1, 2) gives (batch, heads, "
        "n, d_k); what undoes it after the attention, before w_o?",
    ),
)


@ex.solution
def cross_attention(
    x: Tensor,
    context: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    num_heads: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head attention of x to a context (Vaswani et al. 2017, sections 3.2.2 and 3.2.3).

    x: (batch, n_q, d_model), context: (batch, n_k, d_context), w_q and w_o: (d_model, d_model),
    w_k and w_v: (d_context, d_model), used as x @ w; mask: bool, True = may attend, broadcasts to
    (batch, heads, n_q, n_k). Returns (batch, n_q, d_model).
    """
    ### BEGIN SOLUTION
    projections = x @ w_q, context @ w_k, context @ w_v  # (batch, n_q or n_k, d_model) each
    # (batch, n, d_model) -> (batch, n, heads, d_k) -> (batch, heads, n, d_k)
    query, key, value = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in projections)
    # (batch, heads, n_q, d_k) x (batch, heads, d_k, n_k) -> (batch, heads, n_q, n_k)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.softmax(scores, dim=-1)  # over the context's tokens
    if mask is not None:
        weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)  # 0 / 0 -> 0
    heads = weights @ value  # (…, n_q, n_k) x (…, n_k, d_k) -> (batch, heads, n_q, d_k)
    return heads.transpose(1, 2).flatten(2) @ w_o  # -> (batch, n_q, heads, d_k) -> d_model
    ### END SOLUTION


def _cross_case(g: torch.Generator, sizes: tuple[int, ...], **options: Tensor) -> Case:
    """sizes: batch, n_q, n_k, d_model, d_context, heads."""
    batch, n_q, n_k, d_model, d_context, num_heads = sizes
    tokens = {"x": (batch, n_q, d_model), "context": (batch, n_k, d_context)}
    rows = {"w_q": d_model, "w_k": d_context, "w_v": d_context, "w_o": d_model}
    case: Case = {name: normal(g, *shape) for name, shape in tokens.items()}
    case |= {name: normal(g, d, d_model, spread=0.7) for name, d in rows.items()}
    return case | {"num_heads": num_heads} | options


def _holes(g: torch.Generator, *shape: int) -> Tensor:
    """A mask in which about two thirds are visible, and the first key always."""
    mask = torch.rand(shape, generator=g) < 0.65
    mask[..., 0] = True
    return mask


def _towering(g: torch.Generator) -> Case:
    """Visible scores around -105, hidden ones around 300."""
    case = _cross_case(g, (1, 2, 3, 4, 4, 1), mask=torch.tensor([[True, True, False]]))
    context = case["context"] / 20 - 1
    context[:, 2] += 4
    return (
        case
        | {"x": torch.full((1, 2, 4), 52.5), "context": context}
        | {name: torch.eye(4) for name in ("w_q", "w_k")}
    )


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    second = torch.tensor([[True, False], [False, False]])  # nothing is visible to query 1
    empty = _holes(g, 3, 1, 4, 5)
    empty[1, :, 2] = False
    nobody = torch.arange(3) < torch.tensor([2, 0])[:, None, None, None]  # (batch, 1, 1, n_k)
    return [
        _cross_case(g, (1, 1, 2, 2, 1, 1)),
        _cross_case(g, (1, 2, 2, 2, 2, 1), mask=second),
        _cross_case(g, (2, 3, 3, 4, 4, 2)),
        _cross_case(g, (1, 3, 2, 8, 3, 2)),
        _cross_case(g, (2, 3, 3, 6, 6, 3), mask=_holes(g, 1, 3, 3, 3)),
        _cross_case(g, (2, 1, 3, 4, 2, 2), mask=nobody),
        _towering(g),
        _cross_case(g, (2, 4, 3, 3, 7, 3)),
        _cross_case(g, (3, 4, 4, 6, 6, 2), mask=_holes(g, 4, 4)),
        _cross_case(g, (3, 4, 5, 6, 4, 2), mask=empty),
    ]


def _reading(seed: int, n_q: int = 3, n_k: int = 4, d_context: int = 4) -> list[Tensor | int]:
    """Arguments for a batch of 2, d_model = 4, two heads."""
    g = torch.Generator().manual_seed(seed)
    return list(_cross_case(g, (2, n_q, n_k, 4, d_context, 2)).values())


@ex.behaviour("a query's output does not depend on the other queries")
def _(answer):
    x, *others = _reading(1)
    expect(answer(x[:, :1], *others), answer(x, *others)[:, :1])


@ex.behaviour("a context of one token gives every query that token's value")
def _(answer):
    x, context, w_q, w_k, w_v, w_o, num_heads = _reading(2, n_k=1, d_context=3)
    want = (context @ w_v @ w_o).expand(2, 3, 4)  # (2, 1, 4) -> (2, 3, 4)
    expect(answer(x, context, w_q, w_k, w_v, w_o, num_heads), want)


@ex.behaviour("with w_q = 0 every output is the mean of the context's values")
def _(answer):
    x, context, w_q, w_k, w_v, w_o, num_heads = _reading(3)
    want = (context @ w_v @ w_o).mean(1, keepdim=True).expand(2, 3, 4)
    expect(answer(x, context, torch.zeros_like(w_q), w_k, w_v, w_o, num_heads), want)


@ex.behaviour("the tokens of the context in another order give the same output")
def _(answer):
    x, context, *others = _reading(4)
    order = torch.tensor([2, 0, 3, 1])
    expect(answer(x, context[:, order], *others), answer(x, context, *others))


@ex.behaviour("queries in another order give the same outputs in that order")
def _(answer):
    x, *others = _reading(5, n_k=3)
    order = torch.tensor([2, 0, 1])
    expect(answer(x[:, order], *others), answer(x, *others)[:, order])


@ex.behaviour("w_q of one head changes the result of that head alone")
def _(answer):
    x, context, w_q, w_k, w_v, _, num_heads = _reading(6)
    other = torch.cat([w_q[:, :2] + 1, w_q[:, 2:]], dim=1)  # columns 0 and 1 belong to head 0
    eye = torch.eye(4)
    got, want = (answer(x, context, w, w_k, w_v, eye, num_heads) for w in (other, w_q))
    expect(got[..., 2:], want[..., 2:])
    if (got[..., :2] - want[..., :2]).abs().max() < 1e-4:
        raise Broken("head 0 does not change")


@ex.behaviour("a hidden token of the context cannot change the output")
def _(answer):
    x, context, *others = _reading(7)
    mask = torch.tensor([True, True, False, True]).expand(3, 4)
    other = context.clone()
    other[:, 2] += 5
    expect(answer(x, other, *others, mask=mask), answer(x, context, *others, mask=mask))


@ex.behaviour("a query that may see nothing gets the output 0")
def _(answer):
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    expect(answer(*_reading(8), mask=mask)[:, 1], torch.zeros(2, 4))


@ex.behaviour("batch elements do not meet")
def _(answer):
    x, context, *others = _reading(9)
    expect(answer(x, context, *others)[1:], answer(x[1:], context[1:], *others))


def _project(x, context, w_q, w_k, w_v):
    return x @ w_q, context @ w_k, context @ w_v


def _split(t: Tensor, num_heads: int) -> Tensor:
    return t.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (batch, heads, n, d_k)


def _merge(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)  # (batch, n_q, d_model)


def _cross(*, project=_project, split=_split, scale=None, normalise=None, weigh=None, mix=None,
           merge=_merge, finish=None) -> Function:  # fmt: skip
    """Cross-attention with some parts replaced."""

    def function(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
        projections = project(x, context, w_q, w_k, w_v)
        query, key, value = (split(t, num_heads) for t in projections)
        scores = query @ key.mT * (scale(query, key, context) if scale else 1 / _root(query))
        if normalise:
            hidden = scores if mask is None else scores.masked_fill(~mask, -INF)
            weights = normalise(hidden) if mask is None else normalise(hidden).nan_to_num(0.0)
        else:
            weights = (
                scores.softmax(-1) if mask is None else (weigh or visible_softmax)(scores, mask)
            )
        heads = merge(mix(weights, query, key, value) if mix else weights @ value)
        return finish(heads, weights, x, w_o) if finish else heads @ w_o

    return function


CROSSED = "Who asks, and who is asked?"
ONCE = "Does each of the three matrices appear once?"
KEY_VALUE = "Keys are what the queries are compared with; values are what comes back."
WIDTH = "Which entry of `query.shape`, after the heads are split, is d_k?"

# Where queries, keys and values come from: (x, context, w_q, w_k, w_v) -> Q, K, V.
WIRINGS = [
    Mistake(
        "with queries from the context, keys and values from x",
        "The roles are swapped: the output has one row for each token of the context.",
        CROSSED,
        lambda x, c, a, b, v: (c @ a, x @ b, x @ v),
    ),
    Mistake(
        "with keys from x",
        "x is compared with itself, and the weights are then laid on the context's values.",
        "Whose keys belong to the values that come back?",
        lambda x, c, a, b, v: (x @ a, x @ b, c @ v),
    ),
    Mistake(
        "with values from x",
        "The context decides who is looked at, but what comes back is x itself.",
        "Whose content should a query bring home?",
        lambda x, c, a, b, v: (x @ a, c @ b, x @ v),
    ),
    Mistake(
        "that ignores the context: self-attention of x",
        "Queries, keys and values all come from x.",
        "Where does `context` enter?",
        lambda x, c, a, b, v: (x @ a, x @ b, x @ v),
    ),
    Mistake(
        "that ignores x: self-attention of the context",
        "Queries, keys and values all come from the context.",
        "Where does `x` enter?",
        lambda x, c, a, b, v: (c @ a, c @ b, c @ v),
    ),
    Mistake(
        "with queries and keys from the context",
        "The context looks at itself, so x has no say in the weights.",
        CROSSED,
        lambda x, c, a, b, v: (c @ a, c @ b, x @ v),
    ),
    Mistake(
        "over x and the context together",
        "Keys and values are made of both sequences, so x also looks at itself.",
        "How many keys should a query be compared with: n_k, or n_q + n_k?",
        lambda x, c, a, b, v: (x @ a, torch.cat([x, c], 1) @ b, torch.cat([x, c], 1) @ v),
    ),
    Mistake(
        "with w_k and w_v swapped",
        KEY_VALUE,
        "Which of the two makes what is compared?",
        lambda x, c, a, b, v: (x @ a, c @ v, c @ b),
    ),
    Mistake(
        "with w_q and w_k swapped",
        "w_k is applied to x and w_q to the context.",
        "Which matrix has d_context rows?",
        lambda x, c, a, b, v: (x @ b, c @ a, c @ v),
    ),
    Mistake(
        "with w_q and w_v swapped",
        "w_v is applied to x and w_q to the context.",
        "Which matrix has d_context rows?",
        lambda x, c, a, b, v: (x @ v, c @ b, c @ a),
    ),
    Mistake(
        "with w_q for queries and keys",
        "w_k has no effect.",
        ONCE,
        lambda x, c, a, b, v: (x @ a, c @ a, c @ v),
    ),
    Mistake(
        "with w_k for queries and keys",
        "w_q has no effect.",
        ONCE,
        lambda x, c, a, b, v: (x @ b, c @ b, c @ v),
    ),
    Mistake(
        "with w_k for keys and values",
        "w_v has no effect.",
        ONCE,
        lambda x, c, a, b, v: (x @ a, c @ b, c @ b),
    ),
    Mistake(
        "with w_v for keys and values",
        "w_k has no effect.",
        ONCE,
        lambda x, c, a, b, v: (x @ a, c @ v, c @ v),
    ),
    Mistake(
        "with x itself as queries",
        "w_q has no effect.",
        "What are the queries made of?",
        lambda x, c, a, b, v: (x, c @ b, c @ v),
    ),
    Mistake(
        "with the context itself as keys",
        "w_k has no effect.",
        "What are the keys made of?",
        lambda x, c, a, b, v: (x @ a, c, c @ v),
    ),
    Mistake(
        "with the context itself as values",
        "w_v has no effect.",
        "What are the values made of?",
        lambda x, c, a, b, v: (x @ a, c @ b, c),
    ),
    Mistake(
        "with the context itself as keys and values",
        "w_k and w_v have no effect.",
        "What are keys and values made of?",
        lambda x, c, a, b, v: (x @ a, c, c),
    ),
    Mistake(
        "with w_q, w_k and w_v transposed",
        "They are used as x @ w, so no transpose is needed; torch.nn.Linear stores its weight the "
        "other way round.",
        "What shape does `context @ w_k` have?",
        lambda x, c, a, b, v: (x @ a.mT, c @ b.mT, c @ v.mT),
    ),
]

ex.mistakes_from(WIRINGS, "cross-attention", lambda part: _cross(project=part))
ex.mistakes_from(
    SCALES, "cross-attention", lambda part: _cross(scale=lambda q, k, context: part(q, k))
)
ex.mistakes_from(NORMALISATIONS, "cross-attention", lambda part: _cross(normalise=part))
# The first mixture, of the keys, is what w_k for keys and values gives.
ex.mistakes_from(MIXTURES[1:3], "cross-attention", lambda part: _cross(mix=part))
ex.mistakes_from(MASKINGS, "cross-attention", lambda part: _cross(weigh=part))
ex.mistake(
    "cross-attention scaled by √d_model",
    "Each head's dot product is a sum over d_k = d_model / num_heads products.",
    WIDTH,
)(_cross(scale=lambda q, k, context: (q.shape[1] * q.shape[-1]) ** -0.5))
ex.mistake(
    "cross-attention scaled by √d_context",
    "The width of the context is gone once w_k has been applied.",
    WIDTH,
)(_cross(scale=lambda q, k, context: context.shape[-1] ** -0.5))
ex.mistake(
    "cross-attention scaled by the root of the number of heads",
    "√num_heads stands where √d_k should.",
    WIDTH,
)(_cross(scale=lambda q, k, context: q.shape[1] ** -0.5))
ex.mistake(
    "cross-attention with the scale after the softmax",
    "1/√d_k is applied to the weights, which no longer sum to 1.",
    "Does the scale act on the scores or on the weights?",
)(_cross(scale=lambda *_: 1.0, mix=lambda w, q, k, v: w @ v / _root(q)))
ex.mistake(
    "cross-attention with softmax over the heads",
    "Dimension 1 is the heads now, so the heads compete instead of the keys.",
    "How do you name the last dimension, however many there are?",
)(_cross(normalise=lambda s: s.softmax(1)))
ex.mistake(
    "causal cross-attention where nobody asked for it",
    "Later tokens of the context are hidden, with a mask and without.",
    "Must a translator wait for the second source word before reading it?",
)(
    _cross(
        normalise=lambda s: s.masked_fill(~torch.ones_like(s[0, 0]).tril().bool(), -INF).softmax(-1)
    )
)
ex.mistake(
    "cross-attention with the mask transposed",
    "Its rows are read as keys and its columns as queries.",
    "Which dimension of the mask belongs to the queries?",
)(_cross(weigh=lambda s, m: visible_softmax(s, m.mT)))
ex.mistake(
    "cross-attention with one head",
    "num_heads has no effect.",
    "Where does the width fall into (heads, d_k)?",
)(_cross(split=lambda t, num_heads: t[:, None]))
ex.mistake(
    "cross-attention with heads of width num_heads",
    "The number of heads was taken for their width.",
    "In `unflatten(-1, (…, …))`, which of the two is num_heads?",
)(_cross(split=lambda t, num_heads: t.unflatten(-1, (-1, num_heads)).transpose(1, 2)))


def _torn(t: Tensor, num_heads: int) -> Tensor:
    """Reshaped to (batch, heads, n, d_k) without a transpose."""
    return t.reshape(len(t), num_heads, -1, t.shape[-1] // num_heads)


def _strided(t: Tensor, num_heads: int) -> Tensor:
    """Head i takes every num_heads-th column."""
    return t.unflatten(-1, (-1, num_heads)).permute(0, 3, 1, 2)


def _merge_torn(heads: Tensor) -> Tensor:
    return heads.reshape(len(heads), heads.shape[2], -1)


def _merge_strided(heads: Tensor) -> Tensor:
    return heads.permute(0, 2, 3, 1).flatten(2)


TORN = "`reshape` reads the numbers row by row, so a head gets pieces of several tokens."
SPLIT = "In which order do you need the two steps: split the width, swap heads and length?"
STRIDED = "Head i takes every h-th column instead of d_k neighbouring ones."
COLUMNS = "Which columns does the exercise give to head 0?"

ex.mistake(
    "cross-attention with the heads not transposed back",
    "The result is reshaped while it is still (batch, heads, n_q, d_k): rows mix tokens and heads.",
    "In which order must the dimensions stand before heads and d_k can become one?",
)(_cross(merge=_merge_torn))
ex.mistake("cross-attention split by reshape, without a transpose", TORN, SPLIT)(
    _cross(split=_torn)
)
ex.mistake("cross-attention split and merged by reshape, without a transpose", TORN, SPLIT)(
    _cross(split=_torn, merge=_merge_torn)
)
ex.mistake("cross-attention with the columns dealt out to the heads in turn", STRIDED, COLUMNS)(
    _cross(split=_strided)
)
ex.mistake(
    "cross-attention with the columns dealt out to the heads in turn, and collected so",
    STRIDED,
    COLUMNS,
)(_cross(split=_strided, merge=_merge_strided))
ex.mistake(
    "cross-attention with the heads interleaved in the result",
    "d_k and heads became one in the wrong order: column 0 of every head comes first.",
    "Should the result begin with all of head 0, or with a column of each?",
)(_cross(merge=_merge_strided))
ex.mistake(
    "cross-attention with the heads looking at one another",
    "Without a transpose the product pairs heads of one token, not tokens of one head.",
    "Which two dimensions must stand last for `query @ key.transpose(-2, -1)`?",
)(_cross(split=lambda t, num_heads: t.unflatten(-1, (num_heads, -1)), merge=lambda h: h.flatten(2)))
ex.mistake(
    "cross-attention without w_o",
    "The heads are put side by side but not mixed.",
    "What is left to do after Concat?",
)(_cross(finish=lambda heads, weights, x, w_o: heads))
ex.mistake(
    "cross-attention with w_o transposed",
    "It is used as heads @ w_o; torch.nn.Linear stores its weight the other way round.",
    "Is there one transpose too many?",
)(_cross(finish=lambda heads, weights, x, w_o: heads @ w_o.mT))
ex.mistake(
    "cross-attention with w_o applied twice",
    "The heads are mixed once too often.",
    "How often does W_O stand in the formula?",
)(_cross(finish=lambda heads, weights, x, w_o: heads @ w_o @ w_o))
ex.mistake(
    "cross-attention with x added",
    "That is the residual connection; it belongs to the layer around.",
    "Does the formula add X to the result?",
)(_cross(finish=lambda heads, weights, x, w_o: x + heads @ w_o))
ex.mistake(
    "cross-attention with x added before w_o",
    "That is a residual connection, and in the wrong place besides.",
    "Does the formula add X to the result?",
)(_cross(finish=lambda heads, weights, x, w_o: (x + heads) @ w_o))
ex.mistake(
    "cross-attention that returns the weights as well",
    "Two things come back where one was asked for.",
    "What does the docstring say about the result?",
)(_cross(finish=lambda heads, weights, x, w_o: (heads @ w_o, weights)))


@ex.alternative("einsum, with finfo.min and zeroed rows")
def _(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
    query, key, value = (
        torch.einsum("bnd,dhk->bnhk", t, w.unflatten(1, (num_heads, -1)))
        for t, w in ((x, w_q), (context, w_k), (context, w_v))
    )
    scores = torch.einsum("bihk,bjhk->bhij", query, key) / key.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) if mask is None else scores.softmax(-1) * mask
    mixed = torch.einsum("bhij,bjhk->bihk", weights, value)
    return torch.einsum("bihk,hkd->bid", mixed, w_o.unflatten(0, (num_heads, -1)))


@ex.alternative("PyTorch's scaled_dot_product_attention")
def _(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
    batch, n_q, d_model = x.shape
    query = (x @ w_q).view(batch, n_q, num_heads, -1).transpose(1, 2)
    key, value = (
        (context @ w).view(batch, context.shape[1], num_heads, -1).transpose(1, 2)
        for w in (w_k, w_v)
    )
    heads = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return heads.transpose(1, 2).reshape(batch, n_q, d_model) @ w_o


@ex.alternative("a loop over the heads, each with its columns of the weights")
def _(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
    d_k, output = w_q.shape[1] // num_heads, 0.0
    for head in range(num_heads):
        columns = slice(head * d_k, (head + 1) * d_k)
        scores = (x @ w_q[:, columns]) @ (context @ w_k[:, columns]).mT / math.sqrt(d_k)
        if mask is not None:
            visible = mask.expand(len(x), num_heads, *scores.shape[-2:])[:, head]
            scores = torch.where(visible, scores, -INF)
        weights = scores.softmax(-1).nan_to_num(0.0)
        output = output + weights @ (context @ w_v[:, columns]) @ w_o[columns]
    return output


@ex.alternative("chunk and stack")
def _(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
    query, key, value = (
        torch.stack(t.chunk(num_heads, dim=-1), dim=1)
        for t in (x @ w_q, context @ w_k, context @ w_v)
    )
    scores = torch.matmul(query / math.sqrt(query.size(-1)), key.permute(0, 1, 3, 2))
    weights = scores.softmax(-1) if mask is None else visible_softmax(scores, mask)
    return torch.cat((weights @ value).unbind(1), dim=-1) @ w_o


@ex.alternative("in float64, and back")
def _(x, context, w_q, w_k, w_v, w_o, num_heads, mask=None):
    wide = (t.double() for t in (x, context, w_q, w_k, w_v, w_o))
    return cross_attention(*wide, num_heads, mask).to(x.dtype)


# --- 2. the mask of two padded sequences ------------------------------------------------------

ex = Exercise(
    "cross_mask",
    chapter="07_cross_attention",
    title="The mask between two padded sequences",
    minutes=10,
    difficulty=2,
    importance=4,
    points=2,
    prompt=r"""
In a batch, sentences have different lengths; the shorter ones are padded **on the right**. Between
two sequences both sides can hold padding. Make the mask that says which pairs are real:

$$M_{b,1,i,j} = \left(i < \text{query\_lengths}_b\right) \wedge
                \left(j < \text{key\_lengths}_b\right)$$

It is bool, **True = may attend**, and has the shape `(batch, 1, n_q, n_k)`: the 1 stands where the
heads are, for the same pairs are real in every head. A length may be 0. `n_q` and `n_k` are the
padded lengths; they can be larger than every length in the batch.
""",
    hints=(
        "Which positions of a sequence of length 2, padded to 4, are real? Write that as a "
        "comparison.",
        "(n,) < (batch, 1) gives (batch, n): one row of real or not for each sequence. A row for "
        "the queries and a row for the keys meet by broadcasting.",
        "real_key = torch.arange(n_k) < key_lengths[:, None], and the same for the queries; where "
        "must each get a new dimension of size 1 so that & makes (batch, n_q, n_k)?",
    ),
)


@ex.solution
def cross_mask(query_lengths: Tensor, key_lengths: Tensor, n_q: int, n_k: int) -> Tensor:
    """Which pairs of a real query and a real key there are.

    query_lengths, key_lengths: (batch,) integers -> bool (batch, 1, n_q, n_k), True = may attend.
    """
    ### BEGIN SOLUTION
    positions = torch.arange(max(n_q, n_k), device=query_lengths.device)
    real_query = positions[:n_q] < query_lengths[:, None]  # (n_q,) < (batch, 1) -> (batch, n_q)
    real_key = positions[:n_k] < key_lengths[:, None]  # (n_k,) < (batch, 1) -> (batch, n_k)
    # (batch, 1, n_q, 1) & (batch, 1, 1, n_k) -> (batch, 1, n_q, n_k)
    return real_query[:, None, :, None] & real_key[:, None, None, :]
    ### END SOLUTION


def _lengths(query: list[int], key: list[int], n_q: int, n_k: int) -> Case:
    return {
        "query_lengths": torch.tensor(query),
        "key_lengths": torch.tensor(key),
        "n_q": n_q,
        "n_k": n_k,
    }


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def drawn(batch: int, n_q: int, n_k: int) -> Case:
        query, key = (torch.randint(0, n + 1, (batch,), generator=g) for n in (n_q, n_k))
        return _lengths(query.tolist(), key.tolist(), n_q, n_k)

    return [
        _lengths([1], [2], 2, 3),
        _lengths([2], [1], 3, 2),
        _lengths([1, 2], [3, 1], 2, 3),
        _lengths([3, 1, 2], [1, 3, 2], 3, 3),
        _lengths([0, 2], [1, 0], 2, 2),
        _lengths([2, 1], [2, 3], 4, 5),  # the longest is shorter than the padding
        _lengths([1, 1], [2, 1], 1, 2),
        _lengths([3, 3], [4, 4], 3, 4),
        drawn(1, 4, 4),
        drawn(5, 4, 3),
        drawn(3, 4, 5),
    ]


@ex.behaviour("a real query may attend to the real keys and to no others")
def _(answer):
    case = _lengths([1], [2], 1, 3)
    expect(answer.on(case), torch.tensor([[[[True, True, False]]]]), case=case)


@ex.behaviour("a padded query may attend to nothing")
def _(answer):
    case = _lengths([1], [2], 2, 2)
    expect(answer.on(case), torch.tensor([[[[True, True], [False, False]]]]), case=case)


@ex.behaviour("a padded key is seen by nobody")
def _(answer):
    case = _lengths([2], [1], 2, 2)
    expect(answer.on(case), torch.tensor([[[[True, False], [True, False]]]]), case=case)


@ex.behaviour("each sequence has query length · key length real pairs")
def _(answer):
    query, key = torch.tensor([3, 0, 2, 4]), torch.tensor([1, 2, 5, 5])
    expect(answer(query, key, 4, 5).sum((1, 2, 3)), query * key)


@ex.behaviour("where nothing is padded everything is visible")
def _(answer):
    got = answer(torch.tensor([2, 2]), torch.tensor([3, 3]), 2, 3)
    expect(got, torch.ones(2, 1, 2, 3, dtype=torch.bool))


@ex.behaviour("more padding adds hidden pairs and changes none of the others")
def _(answer):
    lengths = torch.tensor([2, 1]), torch.tensor([1, 3])
    wide = answer(*lengths, 4, 6)
    expect(wide[..., :2, :3], answer(*lengths, 2, 3))
    expect(wide.sum(), answer(*lengths, 2, 3).sum())


@ex.behaviour("batch elements do not meet")
def _(answer):
    query, key = torch.tensor([1, 3, 2]), torch.tensor([2, 1, 3])
    expect(answer(query, key, 3, 3)[1:], answer(query[1:], key[1:], 3, 3))


def _real(lengths: Tensor, n: int) -> Tensor:
    return torch.arange(n) < lengths[:, None]  # (batch, n)


def _pairs(real_query: Tensor, real_key: Tensor) -> Tensor:
    return real_query[:, None, :, None] & real_key[:, None, None, :]


def _sides(change: Function) -> Function:
    """Both sides made by `change(lengths, n)` -> (batch, n)."""
    return lambda q, k, n_q, n_k: _pairs(change(q, n_q), change(k, n_k))


BOTH = "A pair is real if both its tokens are."
AND = "When is a pair real: if one of its tokens is, or if both are?"
WHICH = "Which lengths belong to the rows, and which to the columns?"
LAST = "With length 2, which is the last real position?"
LEFT = "Where does the padding stand, before the tokens or after them?"
OWN = "Which length belongs to batch element b?"

ex.mistake(
    "a mask of the keys alone",
    "Padded queries attend to the real keys.",
    "Where do the query lengths enter?",
)(lambda q, k, n_q, n_k: _pairs(torch.ones(len(q), n_q, dtype=torch.bool), _real(k, n_k)))
ex.mistake(
    "a mask of the keys alone, (batch, 1, 1, n_k)",
    "It broadcasts, but padded queries attend to the real keys.",
    "Where do the query lengths enter?",
)(lambda q, k, n_q, n_k: _real(k, n_k)[:, None, None])
ex.mistake(
    "a mask of the queries alone",
    "Padded keys are seen.",
    "Where do the key lengths enter?",
)(lambda q, k, n_q, n_k: _pairs(_real(q, n_q), torch.ones(len(q), n_k, dtype=torch.bool)))
ex.mistake(
    "a mask of the queries alone, (batch, 1, n_q, 1)",
    "It broadcasts, but padded keys are seen.",
    "Where do the key lengths enter?",
)(lambda q, k, n_q, n_k: _real(q, n_q)[:, None, :, None])
ex.mistake(
    "a mask with “or” instead of “and”",
    BOTH,
    AND,
)(lambda q, k, n_q, n_k: _real(q, n_q)[:, None, :, None] | _real(k, n_k)[:, None, None, :])
ex.mistake(
    "a mask with “either … or” instead of “and”",
    "Pairs of two real tokens are hidden.",
    AND,
)(lambda q, k, n_q, n_k: _real(q, n_q)[:, None, :, None] ^ _real(k, n_k)[:, None, None, :])
ex.mistake(
    "a mask in which padding may attend to padding",
    "Two padded positions are equally real, but neither is real.",
    "Is `==` the same as `&`?",
)(lambda q, k, n_q, n_k: _real(q, n_q)[:, None, :, None] == _real(k, n_k)[:, None, None, :])
ex.mistake(
    "a mask in which padded queries see everything",
    "Their rows are open, perhaps to keep a softmax from NaN.",
    "What does the exercise ask of the row of a padded query?",
)(lambda q, k, n_q, n_k: ~_real(q, n_q)[:, None, :, None] | _real(k, n_k)[:, None, None, :])
ex.mistake(
    "the mask with True where attention is forbidden",
    "True means may attend.",
    "Does your comparison ask for real positions or for padding?",
)(lambda *args: ~cross_mask(*args))
ex.mistake(
    "a mask of the pairs of padded tokens",
    "The comparisons ask for padding instead of real tokens.",
    "Is a position real if it is below the length, or from the length on?",
)(_sides(lambda lengths, n: ~_real(lengths, n)))
ex.mistake(
    "the mask with query and key lengths swapped",
    "Rows are cut by the key lengths and columns by the query lengths.",
    WHICH,
)(lambda q, k, n_q, n_k: _pairs(_real(k, n_q), _real(q, n_k)))
ex.mistake(
    "the mask transposed, (batch, 1, n_k, n_q)",
    "Keys are rows and queries are columns.",
    "In scores of shape (batch, heads, n_q, n_k), which dimension is the queries?",
)(lambda *args: cross_mask(*args).mT)
ex.mistake(
    "the mask with n_q and n_k swapped",
    "The query lengths are compared with n_k positions and the key lengths with n_q.",
    WHICH,
)(lambda q, k, n_q, n_k: cross_mask(q, k, n_k, n_q))
ex.mistake(
    "a mask with the query lengths on both sides",
    "The key lengths have no effect.",
    WHICH,
)(lambda q, k, n_q, n_k: _pairs(_real(q, n_q), _real(q, n_k)))
ex.mistake(
    "a mask with the key lengths on both sides",
    "The query lengths have no effect.",
    WHICH,
)(lambda q, k, n_q, n_k: _pairs(_real(k, n_q), _real(k, n_k)))
ex.mistake(
    "a mask with the shorter of the two lengths on both sides",
    "Real tokens of the longer sequence are hidden.",
    WHICH,
)(lambda q, k, n_q, n_k: _pairs(_real(q.minimum(k), n_q), _real(q.minimum(k), n_k)))
ex.mistake(
    "the mask with <= on both sides",
    "The first padded token of each sequence counts as real.",
    LAST,
)(_sides(lambda lengths, n: _real(lengths + 1, n)))
ex.mistake(
    "the mask with <= for the keys",
    "The first padded key counts as real.",
    LAST,
)(lambda q, k, n_q, n_k: _pairs(_real(q, n_q), _real(k + 1, n_k)))
ex.mistake(
    "the mask with <= for the queries",
    "The first padded query counts as real.",
    LAST,
)(lambda q, k, n_q, n_k: _pairs(_real(q + 1, n_q), _real(k, n_k)))
ex.mistake(
    "the mask with each length one too short",
    "The last real token of each sequence is hidden: positions are counted from 1, or the last "
    "index was taken for the length.",
    LAST,
)(_sides(lambda lengths, n: _real(lengths - 1, n)))
ex.mistake(
    "the mask of sequences padded on the left",
    "The last positions count as real instead of the first.",
    LEFT,
)(_sides(lambda lengths, n: _real(lengths, n).flip(1)))
ex.mistake(
    "the mask with a causal mask on top",
    "Later keys are hidden; nothing in this exercise asks for that.",
    "Must a translator wait for the second source word before reading it?",
)(lambda *args: cross_mask(*args).tril())
ex.mistake(
    "the mask with a causal mask on top, aligned at the bottom right",
    "Later keys are hidden; nothing in this exercise asks for that.",
    "Must a translator wait for the second source word before reading it?",
)(lambda q, k, n_q, n_k: cross_mask(q, k, n_q, n_k).tril(n_k - n_q))
ex.mistake(
    "the mask without the dimension of the heads",
    "(batch, n_q, n_k) meets (batch, heads, n_q, n_k) the wrong way: batch against heads.",
    "Where must a dimension of size 1 stand?",
)(lambda *args: cross_mask(*args)[:, 0])
ex.mistake(
    "the mask with the dimension of the heads in front, (1, batch, n_q, n_k)",
    "Batch and heads have changed places.",
    "Where must the dimension of size 1 stand?",
)(lambda *args: cross_mask(*args).transpose(0, 1))
ex.mistake(
    "the mask with the dimension of the heads behind, (batch, n_q, n_k, 1)",
    "It does not line up with (batch, heads, n_q, n_k).",
    "Where must the dimension of size 1 stand?",
)(lambda *args: cross_mask(*args)[:, 0, ..., None])
ex.mistake(
    "the mask of the first batch element for all",
    "The other lengths have no effect.",
    OWN,
)(lambda *args: cross_mask(*args)[:1].expand(len(args[0]), -1, -1, -1))
ex.mistake(
    "a mask with the longest length for all",
    "`max` over the batch leaves one length for every sequence.",
    OWN,
)(_sides(lambda lengths, n: _real(lengths.max().expand_as(lengths), n)))
ex.mistake(
    "a mask as large as the longest sequences",
    "n_q and n_k have no effect: the sizes come from the lengths.",
    "What if the whole batch is padded further than its longest sequence?",
)(lambda q, k, n_q, n_k: cross_mask(q, k, int(q.max()), int(k.max())))


@ex.mistake(
    "a mask with positions compared to the batch",
    "Without a dimension of size 1, position i is compared with the length of batch element i.",
    "What shape must the lengths have so that every position meets every length?",
)
def _(query_lengths, key_lengths, n_q, n_k):
    real_query, real_key = torch.arange(n_q) < query_lengths, torch.arange(n_k) < key_lengths
    pairs = real_query[:, None] & real_key  # (n_q, 1) & (n_k,) -> (n_q, n_k)
    return pairs.expand(len(query_lengths), 1, -1, -1)


@ex.alternative("a loop over the batch that opens a rectangle")
def _(query_lengths, key_lengths, n_q, n_k):
    mask = torch.zeros(len(query_lengths), 1, n_q, n_k, dtype=torch.bool)
    for b, (rows, columns) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        mask[b, :, :rows, :columns] = True
    return mask


@ex.alternative("a product of zeros and ones")
def _(query_lengths, key_lengths, n_q, n_k):
    query = (torch.arange(n_q)[None] < query_lengths[:, None]).float()
    key = (torch.arange(n_k)[None] < key_lengths[:, None]).float()
    return torch.einsum("bi,bj->bij", query, key).bool().unsqueeze(1)


@ex.alternative("logical_not of where there is padding")
def _(query_lengths, key_lengths, n_q, n_k):
    padded_query = torch.arange(n_q)[:, None] >= query_lengths.view(-1, 1, 1, 1)
    padded_key = torch.arange(n_k) >= key_lengths.view(-1, 1, 1, 1)
    return torch.logical_or(padded_query, padded_key).logical_not()


@ex.alternative("a pair at a time")
def _(query_lengths, key_lengths, n_q, n_k):
    lengths = zip(query_lengths.tolist(), key_lengths.tolist(), strict=True)
    pairs = [[[[i < a and j < b for j in range(n_k)] for i in range(n_q)]] for a, b in lengths]
    return torch.tensor(pairs)


# --- 3. what the decoder reads ----------------------------------------------------------------

ex = Exercise(
    "shift_right",
    chapter="07_cross_attention",
    title="Shifting the targets to the right",
    minutes=10,
    difficulty=1,
    importance=5,
    prompt=r"""
Under **teacher forcing** the decoder learns all positions at once. At position $i$ it must predict
target $y_i$, and what it may read is the right answer up to $y_{i-1}$. So it reads the targets one
place later, with a start token in front:

$$\text{input}_0 = \text{start}, \qquad \text{input}_i = y_{i-1} \quad (0 < i < n)$$

The last target is never read: nothing comes after it. `targets` is `(batch, n)` integers, `start`
one integer, and the result has the shape and dtype of `targets`.
""",
    hints=(
        "If the decoder read y_i at position i, what would be the easiest way to predict y_i?",
        "The result has n tokens in each row: 1 start and n - 1 targets. Which target is left out?",
        "torch.full_like(targets[:, :1], start) is a column of start tokens; what stands to the "
        "right of it?",
    ),
)


@ex.solution
def shift_right(targets: Tensor, start: int) -> Tensor:
    """What the decoder reads under teacher forcing. targets: (batch, n) ids -> (batch, n)."""
    ### BEGIN SOLUTION
    first = torch.full_like(targets[:, :1], start)  # (batch, 1)
    return torch.cat([first, targets[:, :-1]], dim=1)  # (batch, 1), (batch, n - 1) -> (batch, n)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    def case(batch: int, n: int, start: int) -> Case:
        ids = 10 + torch.randperm(90, generator=g)[: batch * n]
        return {"targets": ids.reshape(batch, n), "start": start}  # (batch · n,) -> (batch, n)

    padded = case(2, 4, 1)
    padded["targets"][0, 2:] = 0  # right padding
    repeated = case(2, 5, 7)
    repeated["targets"][:, 1:3] = 7  # the start token is also a target
    repeated["targets"][:, 4] = repeated["targets"][:, 0]
    return [
        case(1, 3, 1),
        case(1, 1, 5),
        case(2, 3, 2),
        case(3, 3, 0),
        case(3, 2, 99),
        padded,
        repeated,
        case(3, 1, 4),
        case(2, 6, 3),
    ]


THREE = torch.tensor([[11, 12, 13], [21, 22, 23]])


@ex.behaviour("every row begins with the start token")
def _(answer):
    expect(answer(THREE, 5)[:, 0], torch.tensor([5, 5]))


@ex.behaviour("at position i stands target i - 1")
def _(answer):
    case = {"targets": THREE, "start": 5}
    expect(answer.on(case)[:, 1:], THREE[:, :-1], case=case)


@ex.behaviour("the last target is never read")
def _(answer):
    other = THREE.clone()
    other[:, -1] += 1
    expect(answer(other, 5), answer(THREE, 5))


@ex.behaviour("position i does not show what it must predict")
def _(answer):
    for i in range(3):
        other = THREE.clone()
        other[:, i] += 50
        expect(answer(other, 5)[:, : i + 1], answer(THREE, 5)[:, : i + 1], f"target {i} is shown")


@ex.behaviour("a single target is replaced by the start token")
def _(answer):
    case = {"targets": torch.tensor([[8]]), "start": 3}
    expect(answer.on(case), torch.tensor([[3]]), case=case)


@ex.behaviour("rows do not meet")
def _(answer):
    expect(answer(THREE, 5)[1:], answer(THREE[1:], 5))


def _starts(targets: Tensor, start: int) -> Tensor:
    return torch.full_like(targets[:, :1], start)


def _shifted_with(first: Function) -> Function:
    """The right shift, with another first column."""
    return lambda t, start: torch.cat([first(t, start), t[:, :-1]], dim=1)


DIRECTION = "At position 0, has the decoder read y_0 already?"
LENGTH = "How many tokens must each row of the result have?"
FIRST = "What does the decoder read before it has written anything?"
LEAK = "The token to predict stands where it can be read."
ROWS = "Along which dimension do the tokens of one sequence lie?"

ex.mistake(
    "the shifted targets with the first one repeated",
    "The first target was left standing where the start token belongs.",
    FIRST,
)(_shifted_with(lambda t, s: t[:, :1]))
ex.mistake(
    "the targets shifted to the left, with the start token behind",
    "Position i reads y_{i+1}, which is still to be predicted.",
    DIRECTION,
)(lambda t, s: torch.cat([t[:, 1:], _starts(t, s)], 1))
ex.mistake(
    "the targets shifted to the left, with 0 behind",
    "Position i reads y_{i+1}, and the start token has no effect.",
    DIRECTION,
)(lambda t, s: torch.cat([t[:, 1:], _starts(t, 0)], 1))
ex.mistake(
    "the targets shifted to the left, with the last one repeated",
    "Position i reads y_{i+1}, and the start token has no effect.",
    DIRECTION,
)(lambda t, s: torch.cat([t[:, 1:], t[:, -1:]], 1))
ex.mistake(
    "the targets rolled to the right, the last one in front",
    "`roll` brings round what falls off the end; the start token has no effect.",
    FIRST,
)(lambda t, s: t.roll(1, 1))
ex.mistake(
    "the targets rolled to the left",
    "Position i reads y_{i+1}, and the start token has no effect.",
    DIRECTION,
)(lambda t, s: t.roll(-1, 1))
ex.mistake(
    "all targets rolled as one row",
    "Without `dims`, `roll` flattens: a row begins with the last token of the row before.",
    ROWS,
)(lambda t, s: t.roll(1))
ex.mistake(
    "the targets shifted as one row",
    "Only the first row begins with the start token; the others begin with their neighbour's last.",
    ROWS,
)(lambda t, s: torch.cat([torch.tensor([s]), t.flatten()[:-1]]).reshape(t.shape))
ex.mistake(
    "the start token and all targets",
    "The rows have n + 1 tokens: the last target was not dropped.",
    LENGTH,
)(lambda t, s: torch.cat([_starts(t, s), t], 1))
ex.mistake(
    "all targets and then the start token",
    "The start token stands at the end, and the rows have n + 1 tokens.",
    FIRST,
)(lambda t, s: torch.cat([t, _starts(t, s)], 1))
ex.mistake(
    "the targets without the last one",
    "The start token is missing, so the rows have n - 1 tokens.",
    LENGTH,
)(lambda t, s: t[:, :-1])
ex.mistake(
    "the targets without the first one",
    "The start token is missing, and position i reads y_{i+1}.",
    DIRECTION,
)(lambda t, s: t[:, 1:])
ex.mistake(
    "the targets with the first one overwritten",
    f"Nothing has moved. {LEAK}",
    "Where should the first target stand in the result?",
)(lambda t, s: torch.cat([_starts(t, s), t[:, 1:]], 1))
ex.mistake(
    "the targets with the last one overwritten",
    f"Nothing has moved. {LEAK}",
    FIRST,
)(lambda t, s: torch.cat([t[:, :-1], _starts(t, s)], 1))
ex.mistake(
    "the shifted targets with 0 for the start token",
    "`start` has no effect.",
    "Which number stands in the first column?",
)(_shifted_with(lambda t, s: _starts(t, 0)))
ex.mistake(
    "the shifted targets with 1 for the start token",
    "`start` has no effect: the id of one vocabulary is written into the code.",
    "Which number stands in the first column?",
)(_shifted_with(lambda t, s: _starts(t, 1)))
ex.mistake(
    "the shifted targets with the start token in the first row only",
    "`[0, 0]` is one place; every row has a first place.",
    "How do you name the first column?",
)(lambda t, s: torch.cat([torch.cat([_starts(t, s)[:1], t[1:, :1]]), t[:, :-1]], 1))


@ex.mistake(
    "the targets rolled to the right, with the start token in the first row only",
    "`[0, 0]` is one place; every row has a first place.",
    "How do you name the first column?",
)
def _(targets, start):
    inputs = targets.roll(1, 1)
    inputs[0, 0] = start
    return inputs


ex.mistake(
    "the targets shifted along the batch",
    "Each row reads the row before: another sentence.",
    ROWS,
)(lambda t, s: torch.cat([torch.full_like(t[:1], s), t[:-1]]))
ex.mistake(
    "the targets shifted by two",
    "Position i reads y_{i-2}: one token that it may know is kept from it.",
    "How many places does the first target move?",
)(lambda t, s: torch.cat([_starts(t, s), _starts(t, s), t[:, :-2]], 1)[:, : t.shape[1]])
ex.mistake(
    "the targets with the start token in second place",
    "The first target stands still and can be read where it must be predicted.",
    FIRST,
)(lambda t, s: torch.cat([t[:, :1], _starts(t, s), t[:, 1:-1]], 1)[:, : t.shape[1]])
ex.mistake(
    "nothing but start tokens",
    "Each token was copied from its left neighbour after that had been overwritten, or no target "
    "was copied at all.",
    "In a loop from left to right, does `x[:, i - 1]` still hold a target when you copy it?",
)(lambda t, s: torch.full_like(t, s))
ex.mistake(
    "the start token and then the first target again and again",
    "Each token was copied from its left neighbour after that had been overwritten.",
    "In a loop from left to right, does `x[:, i - 1]` still hold its own target when you copy it?",
)(lambda t, s: torch.cat([_starts(t, s), t[:, :1].expand(-1, t.shape[1] - 1)], 1))
ex.mistake(
    "the targets backwards after the start token",
    "The order of the tokens is turned round.",
    "Does the decoder read from the left?",
)(lambda t, s: torch.cat([_starts(t, s), t.flip(1)[:, :-1]], 1))
ex.mistake(
    "the targets without the first one after the start token and a gap",
    f"Everything but the first target stands still, with 0 in its place. {LEAK}",
    "Where should the second target stand in the result?",
)(lambda t, s: torch.cat([_starts(t, s), _starts(t, 0), t[:, 2:]], 1)[:, : t.shape[1]])
ex.mistake(
    "the shifted targets and the targets",
    "Two things come back where one was asked for.",
    "What does the docstring say about the result?",
)(lambda t, s: (torch.cat([_starts(t, s), t[:, :-1]], 1), t))
ex.mistake(
    "the start token alone",
    "The targets are missing.",
    LENGTH,
)(_starts)


@ex.alternative("an empty tensor, filled")
def _(targets, start):
    inputs = torch.empty_like(targets)
    inputs[:, 0] = start
    inputs[:, 1:] = targets[:, :-1]
    return inputs


@ex.alternative("roll, then the first column")
def _(targets, start):
    inputs = torch.roll(targets, shifts=1, dims=1)
    inputs[:, 0] = start
    return inputs


ex.alternative("F.pad")(lambda targets, start: F.pad(targets[:, :-1], (1, 0), value=start))
ex.alternative("where the position is 0")(
    lambda targets, start: torch.where(
        torch.arange(targets.shape[1]) == 0, start, targets.roll(1, -1)
    )
)
ex.alternative("a list for each row")(
    lambda targets, start: torch.tensor([[start, *row[:-1]] for row in targets.tolist()])
)


# --- 4. one step of decoding ------------------------------------------------------------------

ex = Exercise(
    "cached_step",
    chapter="07_cross_attention",
    title="One step of decoding with a cache",
    minutes=15,
    difficulty=3,
    importance=4,
    points=2,
    batched=True,
    prompt=r"""
When text is written token by token, the keys and values of earlier tokens never change: so they are
kept. One step gets the new token `x`, `(batch, 1, d_model)`, and the caches of the $t$ tokens
before it, `(batch, t, d)`, with $t \geq 0$. It

1. makes the new token's key $x W_K$ and value $x W_V$ and appends them to the caches;
2. lets the new token's query $x W_Q$ attend to **all t + 1** keys, its own included:

$$\text{output} = \mathrm{softmax}\left(\frac{q\,K^\top}{\sqrt{d}}\right) V$$

It returns `(output, key, value)`: the output `(batch, 1, d)` and the longer caches
`(batch, t + 1, d)`. One head, no mask: what is in the cache lies in the past. The caches passed in
stay as they are.
""",
    hints=(
        "Which token does the first one of a text attend to?",
        "The caches hold keys and values, already projected. Only the new token still has to be, "
        "and it goes to the end of dimension 1.",
        "key = torch.cat([key_cache, x @ w_k], dim=1) has t + 1 tokens; the rest is attention of "
        "one query.",
    ),
)


@ex.solution
def cached_step(
    x: Tensor, key_cache: Tensor, value_cache: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of decoding with one head.

    x: (batch, 1, d_model), caches: (batch, t, d) with t >= 0, weights: (d_model, d).
    Returns output (batch, 1, d), keys (batch, t + 1, d), values (batch, t + 1, d).
    """
    ### BEGIN SOLUTION
    key = torch.cat([key_cache, x @ w_k], dim=1)  # (batch, t, d), (batch, 1, d) -> (…, t + 1, d)
    value = torch.cat([value_cache, x @ w_v], dim=1)  # the same
    query = x @ w_q  # (batch, 1, d_model) x (d_model, d) -> (batch, 1, d)
    # (batch, 1, d) x (batch, d, t + 1) -> (batch, 1, t + 1)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    output = torch.softmax(scores, dim=-1) @ value  # (…, 1, t + 1) x (…, t + 1, d) -> (…, 1, d)
    return output, key, value
    ### END SOLUTION


def _step_case(g: torch.Generator, batch: int, t: int, d_model: int, d: int) -> Case:
    case = {"x": normal(g, batch, 1, d_model)}
    case |= {name: normal(g, batch, t, d) for name in ("key_cache", "value_cache")}
    return case | {name: normal(g, d_model, d) for name in ("w_q", "w_k", "w_v")}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    return [
        _step_case(g, 1, 1, 1, 2),
        _step_case(g, 1, 2, 2, 2),
        _step_case(g, 1, 0, 2, 3),  # the first token
        _step_case(g, 2, 2, 3, 4),
        _step_case(g, 2, 0, 3, 3),
        _step_case(g, 2, 3, 4, 4),
        _step_case(g, 3, 1, 2, 5),
        _step_case(g, 1, 4, 3, 1),
        {n: v / 3 for n, v in _step_case(g, 3, 4, 5, 3).items()},  # no round numbers
    ]


def _step(seed: int, t: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return list(_step_case(g, 2, t, 3, 4).values())


@ex.behaviour("the caches come back one token longer, the old tokens first")
def _(answer):
    x, key_cache, value_cache, *weights = _step(1)
    _, key, value = answer(x, key_cache, value_cache, *weights)
    expect((key[:, :3], value[:, :3]), (key_cache, value_cache))


@ex.behaviour("the last key and value are those of the new token")
def _(answer):
    x, key_cache, value_cache, w_q, w_k, w_v = _step(2)
    _, key, value = answer(x, key_cache, value_cache, w_q, w_k, w_v)
    expect((key[:, 3:], value[:, 3:]), (x @ w_k, x @ w_v))


@ex.behaviour("with empty caches the output is the new token's own value")
def _(answer):
    x, key_cache, value_cache, w_q, w_k, w_v = _step(3, t=0)
    expect(answer(x, key_cache, value_cache, w_q, w_k, w_v)[0], x @ w_v)


@ex.behaviour("with w_q = 0 the output is the mean of all t + 1 values")
def _(answer):
    x, key_cache, value_cache, w_q, w_k, w_v = _step(4)
    want = torch.cat([value_cache, x @ w_v], dim=1).mean(1, keepdim=True)
    expect(answer(x, key_cache, value_cache, torch.zeros_like(w_q), w_k, w_v)[0], want)


@ex.behaviour("step by step it gives what one causal pass over the whole text gives")
def _(answer):
    _, key, value, w_q, w_k, w_v = _step(5, t=0)
    x = normal(torch.Generator().manual_seed(6), 2, 4, 3)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    want = F.scaled_dot_product_attention(x @ w_q, x @ w_k, x @ w_v, attn_mask=causal)
    for i in range(4):
        output, key, value = answer(x[:, i : i + 1], key, value, w_q, w_k, w_v)
        expect(output, want[:, i : i + 1])


@ex.behaviour("cached tokens in another order give the same output")
def _(answer):
    x, key_cache, value_cache, *weights = _step(7)
    order = torch.tensor([2, 0, 1])
    got = answer(x, key_cache[:, order], value_cache[:, order], *weights)[0]
    expect(got, answer(x, key_cache, value_cache, *weights)[0])


@ex.behaviour("batch elements do not meet")
def _(answer):
    x, key_cache, value_cache, *weights = _step(8)
    got = answer(x, key_cache, value_cache, *weights)[0]
    expect(got[1:], answer(x[1:], key_cache[1:], value_cache[1:], *weights)[0])


def _new(x, w_q, w_k, w_v):
    return x @ w_q, x @ w_k, x @ w_v


def _append(cache: Tensor, new: Tensor) -> Tensor:
    return torch.cat([cache, new], dim=1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / _root(query)).softmax(-1) @ value


def _stepping(
    *, new=_new, append=_append, read=None, scale=None, normalise=None, mix=None, give=None
) -> Function:
    """A step of decoding with some parts replaced; `read` chooses what the query looks at."""

    def function(x, key_cache, value_cache, w_q, w_k, w_v):
        query, new_key, new_value = new(x, w_q, w_k, w_v)
        key, value = append(key_cache, new_key), append(value_cache, new_value)
        k, v = (read(key), read(value)) if read else (key, value)
        scores = query @ k.mT * (scale(query, k) if scale else 1 / _root(query))
        weights = normalise(scores) if normalise else scores.softmax(-1)
        output = mix(weights, query, k, v) if mix else weights @ v
        return give(output, key, value) if give else (output, key, value)

    return function


def _return(*names: str) -> Function:
    """A right step that returns other things: output, key, value, old or new keys and values."""

    def function(x, key_cache, value_cache, w_q, w_k, w_v):
        output, key, value = cached_step(x, key_cache, value_cache, w_q, w_k, w_v)
        things = {
            "output": output, "key": key, "value": value, "old key": key_cache,
            "old value": value_cache, "new key": x @ w_k, "new value": x @ w_v,
        }  # fmt: skip
        found = tuple(things[name] for name in names)
        return found if len(found) > 1 else found[0]

    return function


PLACE = "At which end of the cache does the newest token belong?"
RETURNS = "Which three things should come back, and in which order?"
ITSELF = "How many keys does the query look at, t or t + 1?"
ALREADY = "What is in the cache: tokens, or keys and values that are already projected?"

ex.mistakes_from(SCALES[:5], "the step", lambda part: _stepping(scale=part))
ex.mistakes_from(NORMALISATIONS, "the step", lambda part: _stepping(normalise=part))
ex.mistakes_from(MIXTURES[:2], "the step", lambda part: _stepping(mix=part))
ex.mistake(
    "the step scaled by √d_model",
    "The width of a token stands where the width of a key should.",
    "Is √d read off `x` or off the query?",
)(lambda x, *others: _stepping(scale=lambda q, k: 1 / _root(x))(x, *others))
ex.mistake(
    "the step with the new token in front of the cached ones",
    "The output is right, but the cache is out of order for whoever relies on positions.",
    PLACE,
)(_stepping(append=lambda cache, new: torch.cat([new, cache], 1)))
ex.mistake(
    "the step in which the new token does not see itself",
    "The query looks at the old cache only, which is empty at the first token.",
    ITSELF,
)(_stepping(read=lambda cache: cache[:, :-1]))
ex.mistake(
    "the step in which the new token sees itself alone",
    "The cache is not looked at.",
    ITSELF,
)(_stepping(read=lambda cache: cache[:, -1:]))
ex.mistake(
    "the step in which the new token does not see the first one",
    "One key too few is looked at.",
    ITSELF,
)(_stepping(read=lambda cache: cache[:, 1:] if cache.shape[1] > 1 else cache))
ex.mistake(
    "the step under a causal mask aligned at the top left",
    "The one query counts as position 0, so it sees the oldest key alone.",
    "At which position does the new token stand?",
)(_stepping(read=lambda cache: cache[:, :1]))
ex.mistake(
    "the step with the last cached token overwritten",
    "The caches stay as long as they were, and one token is forgotten at each step.",
    "How long are the caches afterwards?",
)(_stepping(append=lambda cache, new: torch.cat([cache[:, :-1], new], 1)))
ex.mistake(
    "the step with the oldest cached token dropped",
    "That is a sliding window; nothing in this exercise asks for it.",
    "How long are the caches afterwards?",
)(_stepping(append=lambda cache, new: torch.cat([cache[:, 1:], new], 1)))
ex.mistake(
    "the step with the new token appended twice",
    "The caches grow by two.",
    "How long are the caches afterwards?",
)(_stepping(append=lambda cache, new: torch.cat([cache, new, new], 1)))
ex.mistake(
    "the step with the new token appended along the batch",
    "Dimension 0 is the batch: the new token became a sentence of its own.",
    "Along which dimension do the tokens of one sequence lie?",
)(_stepping(append=lambda cache, new: torch.cat([cache, new], 0)))
ex.mistake(
    "the step with the new token added to every cached one",
    "`+` adds numbers; it does not append a token.",
    "How long are the caches afterwards?",
)(_stepping(append=lambda cache, new: cache + new if cache.shape[1] else new))
ex.mistake("the step that returns the output alone", "The caches are lost.", RETURNS)(
    _return("output")
)
ex.mistake(
    "the step that returns the old caches",
    "The next step would not know of this token.",
    RETURNS,
)(_return("output", "old key", "old value"))
ex.mistake(
    "the step that returns the old keys",
    "Keys and values are no longer of the same length.",
    RETURNS,
)(_return("output", "old key", "value"))
ex.mistake(
    "the step that returns the old values",
    "Keys and values are no longer of the same length.",
    RETURNS,
)(_return("output", "key", "old value"))
ex.mistake(
    "the step that returns the new key and value alone",
    "The earlier tokens are lost.",
    RETURNS,
)(_return("output", "new key", "new value"))
ex.mistake(
    "the step that returns values before keys",
    "The next step would take keys for values.",
    RETURNS,
)(_return("output", "value", "key"))
ex.mistake(
    "the step that returns the caches first",
    "The output should come first.",
    RETURNS,
)(_return("key", "value", "output"))
ex.mistake(
    "the step that returns the keys alone beside the output",
    "The values are lost.",
    RETURNS,
)(_return("output", "key"))
ex.mistake(
    "the step with w_k and w_v swapped",
    "The new key is made by w_v and the new value by w_k.",
    "Which of the two makes what is compared?",
)(_stepping(new=lambda x, a, b, v: (x @ a, x @ v, x @ b)))
ex.mistake(
    "the step with w_q and w_k swapped",
    "The new key is made by w_q and the query by w_k.",
    "Which of the two makes what is kept for later?",
)(_stepping(new=lambda x, a, b, v: (x @ b, x @ a, x @ v)))
ex.mistake(
    "the step with w_k for key and value",
    "w_v has no effect.",
    ONCE,
)(_stepping(new=lambda x, a, b, v: (x @ a, x @ b, x @ b)))
ex.mistake(
    "the step with w_v for key and value",
    "w_k has no effect.",
    ONCE,
)(_stepping(new=lambda x, a, b, v: (x @ a, x @ v, x @ v)))
ex.mistake(
    "the step with w_q for query and key",
    "w_k has no effect.",
    ONCE,
)(_stepping(new=lambda x, a, b, v: (x @ a, x @ a, x @ v)))
ex.mistake(
    "the step with w_k for query and key",
    "w_q has no effect.",
    ONCE,
)(_stepping(new=lambda x, a, b, v: (x @ b, x @ b, x @ v)))
ex.mistake(
    "the step with x itself as key and value",
    "The new token is cached as it came in, not projected.",
    ALREADY,
)(_stepping(new=lambda x, a, b, v: (x @ a, x, x)))
ex.mistake(
    "the step with x itself as query",
    "w_q has no effect.",
    "What is the query made of?",
)(_stepping(new=lambda x, a, b, v: (x, x @ b, x @ v)))
ex.mistake(
    "the step with the new key stored already scaled",
    "The next step would scale it once more.",
    "Which keys does the cache of the exercise hold, with 1/√d or without?",
)(
    lambda x, k, v, a, b, c: (
        cached_step(x, k, v, a, b, c)[0],
        _append(k, x @ b / _root(b)),
        _append(v, x @ c),
    )
)
ex.mistake(
    "the step with the scale on the new key alone",
    "The cached keys are compared without it.",
    "Do all t + 1 scores get the same factor?",
)(_stepping(new=lambda x, a, b, v: (x @ a, x @ b / _root(b), x @ v), scale=lambda q, k: 1.0))
ex.mistake(
    "the step with all keys stored scaled",
    "At the next step they would be scaled once more.",
    "Which keys does the cache of the exercise hold, with 1/√d or without?",
)(_stepping(give=lambda output, key, value: (output, key / _root(key), value)))


@ex.mistake(
    "the step with the two caches swapped",
    "The cached values are taken for keys and the cached keys for values.",
    "In which order do the two caches come in?",
)
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    return cached_step(x, value_cache, key_cache, w_q, w_k, w_v)


@ex.mistake(
    "the step with the caches projected again",
    "w_k and w_v are applied to cached keys and values once more.",
    ALREADY,
)
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    return cached_step(x, key_cache @ w_k, value_cache @ w_v, w_q, w_k, w_v)


@ex.mistake(
    "the step with x added to the output",
    "That is the residual connection; it belongs to the layer around.",
    "Does the formula add x to the result?",
)
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    output, key, value = cached_step(x, key_cache, value_cache, w_q, w_k, w_v)
    return x + output, key, value


@ex.mistake(
    "the step with a query for every token",
    "All t + 1 keys were taken for queries too: the earlier outputs are computed again.",
    "How many queries does one step have?",
)
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    _, key, value = cached_step(x, key_cache, value_cache, w_q, w_k, w_v)
    return _attend(key, key, value), key, value


@ex.mistake(
    "the step with old keys against new values",
    "The scores are those of the t cached keys, with a 0 for the new token.",
    "Is the new key appended before the scores are made?",
)
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    _, key, value = cached_step(x, key_cache, value_cache, w_q, w_k, w_v)
    scores = F.pad(x @ w_q @ key_cache.mT, (0, 1)) / _root(w_q)  # (batch, 1, t + 1)
    return scores.softmax(-1) @ value, key, value


@ex.alternative("PyTorch's scaled_dot_product_attention")
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    key, value = torch.hstack([key_cache, x @ w_k]), torch.hstack([value_cache, x @ w_v])
    return F.scaled_dot_product_attention(x @ w_q, key, value), key, value


@ex.alternative("einsum on a single query")
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    query, new_key, new_value = (torch.einsum("bnm,md->bnd", x, w) for w in (w_q, w_k, w_v))
    key, value = torch.cat((key_cache, new_key), 1), torch.cat((value_cache, new_value), 1)
    weights = (torch.einsum("bd,btd->bt", query[:, 0], key) * w_q.shape[1] ** -0.5).softmax(-1)
    return torch.einsum("bt,btd->bd", weights, value).unsqueeze(1), key, value


@ex.alternative("old and new scores apart")
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    query, new_key, new_value = x @ w_q, x @ w_k, x @ w_v
    old, own = query @ key_cache.mT, (query * new_key).sum(-1, keepdim=True)
    weights = (torch.cat([old, own], -1) / math.sqrt(query.shape[-1])).softmax(-1)
    output = weights[..., :-1] @ value_cache + weights[..., -1:] * new_value
    return output, torch.cat([key_cache, new_key], 1), torch.cat([value_cache, new_value], 1)


@ex.alternative("a loop over the batch")
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    steps = []
    for token, keys, values in zip(x, key_cache, value_cache, strict=True):
        keys, values = torch.vstack([keys, token @ w_k]), torch.vstack([values, token @ w_v])
        weights = ((token @ w_q) @ keys.T / math.sqrt(keys.shape[1])).softmax(-1)
        steps.append((weights @ values, keys, values))
    return tuple(torch.stack(things) for things in zip(*steps, strict=True))


@ex.alternative("in float64, and back")
def _(x, key_cache, value_cache, w_q, w_k, w_v):
    wide = (t.double() for t in (x, key_cache, value_cache, w_q, w_k, w_v))
    return tuple(t.to(x.dtype) for t in cached_step(*wide))


# --- 5. the decoder layer ---------------------------------------------------------------------

ex = Exercise(
    "decoder_layer",
    chapter="07_cross_attention",
    title="The decoder layer",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    batched=True,
    prompt=r"""
A decoder layer has three sublayers, each with a norm before it and a residual connection around it:

$$\begin{aligned}
x &\leftarrow x + \mathrm{SelfAttention}(\mathrm{Norm}_1(x)) \\
x &\leftarrow x + \mathrm{CrossAttention}(\mathrm{Norm}_2(x),\ \text{context}) \\
x &\leftarrow x + \mathrm{FeedForward}(\mathrm{Norm}_3(x))
\end{aligned}$$

All six are given to you as functions: `self_attention(x)`, `cross_attention(x, context)`,
`feed_forward(x)`, and `norm_1` to `norm_3`, each of one tensor. `x` is `(batch, n_q, d_model)`,
`context` `(batch, n_k, d_context)`. The context comes from the encoder, which has normed it
already: it goes into the cross-attention as it is.
""",
    hints=(
        "What does each sublayer read: what came into the layer, or what the sublayer before made?",
        "A norm stands only in front of its sublayer; what it is added to is never normed. With "
        "all sublayers 0, the layer must give back x.",
        "x = x + self_attention(norm_1(x)); the next line has the same form, with two arguments.",
    ),
)


@ex.solution
def decoder_layer(
    x: Tensor,
    context: Tensor,
    self_attention: Callable[[Tensor], Tensor],
    cross_attention: Callable[[Tensor, Tensor], Tensor],
    feed_forward: Callable[[Tensor], Tensor],
    norm_1: Callable[[Tensor], Tensor],
    norm_2: Callable[[Tensor], Tensor],
    norm_3: Callable[[Tensor], Tensor],
) -> Tensor:
    """A pre-norm decoder layer (Vaswani et al. 2017, section 3.1, with the norms in front).

    x: (batch, n_q, d_model), context: (batch, n_k, d_context) -> (batch, n_q, d_model).
    """
    ### BEGIN SOLUTION
    x = x + self_attention(norm_1(x))  # among the tokens written so far
    x = x + cross_attention(norm_2(x), context)  # from the source
    return x + feed_forward(norm_3(x))  # each token on its own
    ### END SOLUTION


def _fixed(rows: int, columns: int, like: Tensor) -> Tensor:
    """A weight matrix (rows, columns) that is always the same."""
    return torch.arange(rows * columns).reshape(rows, columns).add(1).cos().to(like.dtype)


def _look_back(x: Tensor) -> Tensor:
    """A stand-in for causal self-attention: the mean of the tokens so far, times 2."""
    counts = torch.arange(1, x.shape[1] + 1).to(x.dtype)[:, None]  # (n_q, 1)
    return 2 * x.cumsum(1) / counts


def _look_across(x: Tensor, context: Tensor) -> Tensor:
    """A stand-in for cross-attention, with one fixed matrix for keys and values."""
    read = context @ _fixed(context.shape[-1], x.shape[-1], x)  # (batch, n_k, d_model)
    return (x @ read.mT).softmax(-1) @ read  # (…, n_q, n_k) x (…, n_k, d_model)


def _bend(x: Tensor) -> Tensor:
    """A stand-in for the feed-forward network."""
    return (x @ _fixed(x.shape[-1], x.shape[-1], x)).relu() - 0.5


def _shrink(x: Tensor) -> Tensor:
    return x / (1 + x.square().mean(-1, keepdim=True)).sqrt()


def _centre(x: Tensor) -> Tensor:
    return 2 * _shrink(x - 0.5 * x.mean(-1, keepdim=True))


def _lift(x: Tensor) -> Tensor:
    return 0.5 * _shrink(x) + 0.3


PARTS = {
    "self_attention": _look_back, "cross_attention": _look_across, "feed_forward": _bend,
    "norm_1": _shrink, "norm_2": _centre, "norm_3": _lift,
}  # fmt: skip


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [(1, 2, 2, 2, 2), (1, 2, 3, 2, 2), (2, 3, 3, 3, 3), (2, 3, 2, 4, 3), (1, 1, 4, 3, 2),
             (2, 4, 1, 1, 1), (3, 4, 5, 6, 5)]  # fmt: skip
    return [
        {"x": normal(g, batch, n_q, d), "context": normal(g, batch, n_k, d_context), **PARTS}
        for batch, n_q, n_k, d, d_context in sizes
    ]


def _nothing(x: Tensor, context: Tensor | None = None) -> Tensor:
    return 0 * x


def _the_context(x: Tensor, context: Tensor) -> Tensor:
    return context


def _copy(x: Tensor, context: Tensor | None = None) -> Tensor:
    return x


def _with_parts(n_q: int, n_k: int, seed: int, **parts: Function) -> Case:
    """A case in which the sublayers that are not named give 0."""
    g = torch.Generator().manual_seed(seed)
    quiet = {name: part if "norm" in name else _nothing for name, part in PARTS.items()}
    return {"x": normal(g, 2, n_q, 3), "context": normal(g, 2, n_k, 3), **quiet, **parts}


@ex.behaviour("if all three sublayers give 0, x comes through unchanged")
def _(answer):
    case = _with_parts(2, 3, 1)
    expect(answer.on(case), case["x"])


@ex.behaviour("cross-attention gets the context as it came in")
def _(answer):
    case = _with_parts(3, 3, 2, cross_attention=_the_context)
    expect(answer.on(case), case["x"] + case["context"])


@ex.behaviour("self-attention reads norm_1 of x")
def _(answer):
    case = _with_parts(3, 2, 3, self_attention=_copy)
    expect(answer.on(case), case["x"] + _shrink(case["x"]))


@ex.behaviour("cross-attention reads norm_2 of what self-attention has made of x")
def _(answer):
    case = _with_parts(3, 2, 4, self_attention=_copy, cross_attention=_copy)
    x = case["x"] + _shrink(case["x"])
    expect(answer.on(case), x + _centre(x))


@ex.behaviour("the feed-forward network reads norm_3 of what cross-attention has made of x")
def _(answer):
    case = _with_parts(3, 2, 5, cross_attention=_copy, feed_forward=_copy)
    x = case["x"] + _centre(case["x"])
    expect(answer.on(case), x + _lift(x))


@ex.behaviour("the context reaches the output through cross-attention only")
def _(answer):
    case = _with_parts(3, 3, 6, self_attention=_look_back, feed_forward=_bend)
    expect(answer.on(case | {"context": case["context"] + 1}), answer.on(case))


@ex.behaviour("where the sublayers do not look ahead, neither does the layer")
def _(answer):
    case = _with_parts(3, 3, 7, **PARTS)
    x = case["x"].clone()
    x[:, 2] += 1
    expect(answer.on(case | {"x": x})[:, :2], answer.on(case)[:, :2])


@ex.behaviour("batch elements do not meet")
def _(answer):
    case = _with_parts(3, 2, 8, **PARTS)
    one = case | {"x": case["x"][1:], "context": case["context"][1:]}
    expect(answer.on(case)[1:], answer.on(one))


ORDER = "In which order do the three lines of the exercise stand?"
READS = "What has x become by the time this sublayer reads it?"
AROUND = "What is added to the result of each sublayer?"
PRE = "On which side of the sublayer does the norm stand?"
EACH = "Which norm belongs to which sublayer?"
GIVEN = "Which of the two arguments asks, and which is asked?"
AS_IT_IS = "What does the exercise say about the context?"


class _Parts(NamedTuple):
    """What a step of the layer can use; `start` is the layer's input."""

    start: Tensor
    look: Function
    read: Function
    feed: Function
    norm_1: Function
    norm_2: Function
    norm_3: Function


def _look(x: Tensor, context: Tensor, p: _Parts) -> Tensor:
    return x + p.look(p.norm_1(x))


def _read(x: Tensor, context: Tensor, p: _Parts) -> Tensor:
    return x + p.read(p.norm_2(x), context)


def _feed(x: Tensor, context: Tensor, p: _Parts) -> Tensor:
    return x + p.feed(p.norm_3(x))


def _layer(*steps: Function) -> Function:
    """A layer of other steps, one after the other."""

    def function(x, context, self_attention, cross_attention, feed_forward, norm_1, norm_2, norm_3):
        parts = _Parts(x, self_attention, cross_attention, feed_forward, norm_1, norm_2, norm_3)
        for step in steps:
            x = step(x, context, parts)
        return x

    return function


def _renormed(*order: int) -> Function:
    """The right layer with its norms in another order."""

    def function(x, context, look, read, feed, *norms):
        return decoder_layer(x, context, look, read, feed, *(norms[i - 1] for i in order))

    return function


ex.mistake(
    "a layer with cross-attention before self-attention",
    "The source is read before the tokens have looked at one another.",
    ORDER,
)(_layer(_read, _look, _feed))
ex.mistake(
    "a layer with the feed-forward network before cross-attention",
    "The feed-forward network never works on what cross-attention brings.",
    ORDER,
)(_layer(_look, _feed, _read))
ex.mistake(
    "a layer with the feed-forward network first",
    "The feed-forward network never works on what the attentions bring.",
    ORDER,
)(_layer(_feed, _look, _read))
ex.mistake(
    "a layer with the order turned round",
    "The feed-forward network comes first and self-attention last.",
    ORDER,
)(_layer(_feed, _read, _look))
ex.mistake(
    "a post-norm layer",
    "Each norm is laid on x plus the sublayer, as in the paper of 2017; here it stands in front.",
    PRE,
)(
    _layer(
        lambda x, c, p: p.norm_1(x + p.look(x)),
        lambda x, c, p: p.norm_2(x + p.read(x, c)),
        lambda x, c, p: p.norm_3(x + p.feed(x)),
    )
)
ex.mistake(
    "a layer with the norms behind the sublayers, inside the residual",
    "The result of each sublayer is normed, what it reads is not.",
    PRE,
)(
    _layer(
        lambda x, c, p: x + p.norm_1(p.look(x)),
        lambda x, c, p: x + p.norm_2(p.read(x, c)),
        lambda x, c, p: x + p.norm_3(p.feed(x)),
    )
)
ex.mistake(
    "a layer in which x itself is normed",
    "x = norm(x) overwrites what the sublayer's result is added to.",
    AROUND,
)(
    _layer(
        lambda x, c, p: _look(p.norm_1(x), c, p._replace(norm_1=_copy)),
        lambda x, c, p: _read(p.norm_2(x), c, p._replace(norm_2=_copy)),
        lambda x, c, p: _feed(p.norm_3(x), c, p._replace(norm_3=_copy)),
    )
)
ex.mistake(
    "a layer that adds norm_1 of x instead of x",
    "x = norm_1(x) overwrites what the result of self-attention is added to.",
    AROUND,
)(_layer(lambda x, c, p: p.norm_1(x) + p.look(p.norm_1(x)), _read, _feed))
ex.mistake(
    "a layer that adds norm_2 of x instead of x",
    "x = norm_2(x) overwrites what the result of cross-attention is added to.",
    AROUND,
)(_layer(_look, lambda x, c, p: p.norm_2(x) + p.read(p.norm_2(x), c), _feed))
ex.mistake(
    "a layer that adds norm_3 of x instead of x",
    "x = norm_3(x) overwrites what the feed-forward network's result is added to.",
    AROUND,
)(_layer(_look, _read, lambda x, c, p: p.norm_3(x) + p.feed(p.norm_3(x))))
ex.mistake(
    "a layer without norms",
    "The norms have no effect.",
    PRE,
)(
    _layer(
        lambda x, c, p: x + p.look(x),
        lambda x, c, p: x + p.read(x, c),
        lambda x, c, p: x + p.feed(x),
    )
)
ex.mistake(
    "a layer without norm_1",
    "Self-attention reads x as it is.",
    EACH,
)(_layer(lambda x, c, p: x + p.look(x), _read, _feed))
ex.mistake(
    "a layer without norm_2",
    "Cross-attention reads x as it is.",
    EACH,
)(_layer(_look, lambda x, c, p: x + p.read(x, c), _feed))
ex.mistake(
    "a layer without norm_3",
    "The feed-forward network reads x as it is.",
    EACH,
)(_layer(_look, _read, lambda x, c, p: x + p.feed(x)))
ex.mistake(
    "a layer with norm_1 in all three places",
    "norm_2 and norm_3 have no effect.",
    EACH,
)(_renormed(1, 1, 1))
ex.mistake(
    "a layer with norm_1 and norm_2 swapped",
    "Each sublayer has a norm of its own.",
    EACH,
)(_renormed(2, 1, 3))
ex.mistake(
    "a layer with norm_2 and norm_3 swapped",
    "Each sublayer has a norm of its own.",
    EACH,
)(_renormed(1, 3, 2))
ex.mistake(
    "a layer with norm_1 and norm_3 swapped",
    "Each sublayer has a norm of its own.",
    EACH,
)(_renormed(3, 2, 1))
ex.mistake(
    "a layer with norm_3 of the result",
    "A pre-norm layer leaves its result unnormed.",
    "How often does each norm occur in the three lines?",
)(_layer(_look, _read, _feed, lambda x, c, p: p.norm_3(x)))
ex.mistake(
    "a layer that norms the context with norm_2",
    "The context goes in as it is: the encoder has normed it.",
    AS_IT_IS,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(x), p.norm_2(c)), _feed))
ex.mistake(
    "a layer that norms the context and not x",
    "norm_2 was laid on the wrong one of the two arguments.",
    AS_IT_IS,
)(_layer(_look, lambda x, c, p: x + p.read(x, p.norm_2(c)), _feed))
ex.mistake(
    "a layer with the arguments of cross-attention swapped",
    "The context asks, and x is asked.",
    GIVEN,
)(_layer(_look, lambda x, c, p: x + p.read(c, p.norm_2(x)), _feed))
ex.mistake(
    "a layer with the arguments of cross-attention swapped, and the context normed",
    "The context asks, and x is asked.",
    GIVEN,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(c), x), _feed))
ex.mistake(
    "a layer whose cross-attention reads x itself",
    "The context has no effect: x, normed, is both who asks and who is asked.",
    GIVEN,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(x), p.norm_2(x)), _feed))
ex.mistake(
    "a layer whose cross-attention reads x before its norm",
    "The context has no effect: x is both who asks and who is asked.",
    GIVEN,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(x), x), _feed))
ex.mistake(
    "a layer that looks at the context with self-attention",
    "The context goes through self_attention before it is read.",
    AS_IT_IS,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(x), p.look(c)), _feed))
ex.mistake(
    "a layer without the residual around self-attention",
    "x is replaced by the result of self-attention.",
    AROUND,
)(_layer(lambda x, c, p: p.look(p.norm_1(x)), _read, _feed))
ex.mistake(
    "a layer without the residual around cross-attention",
    "x is replaced by what was read from the context.",
    AROUND,
)(_layer(_look, lambda x, c, p: p.read(p.norm_2(x), c), _feed))
ex.mistake(
    "a layer without the residual around the feed-forward network",
    "x is replaced by the result of the feed-forward network.",
    AROUND,
)(_layer(_look, _read, lambda x, c, p: p.feed(p.norm_3(x))))
ex.mistake(
    "a layer without residuals",
    "Each sublayer's result replaces x.",
    AROUND,
)(
    _layer(
        lambda x, c, p: p.look(p.norm_1(x)),
        lambda x, c, p: p.read(p.norm_2(x), c),
        lambda x, c, p: p.feed(p.norm_3(x)),
    )
)
ex.mistake(
    "a layer with the context as residual of cross-attention",
    "What was read is added to the context instead of to x.",
    AROUND,
)(_layer(_look, lambda x, c, p: c + p.read(p.norm_2(x), c), _feed))
ex.mistake(
    "a layer with its input as residual of cross-attention",
    "What self-attention has added is lost.",
    AROUND,
)(_layer(_look, lambda x, c, p: p.start + p.read(p.norm_2(x), c), _feed))
ex.mistake(
    "a layer with its input as residual of the feed-forward network",
    "What the two attentions have added is lost.",
    AROUND,
)(_layer(_look, _read, lambda x, c, p: p.start + p.feed(p.norm_3(x))))
ex.mistake(
    "a layer with its input as residual of every sublayer",
    "What the sublayers before have added is lost.",
    AROUND,
)(
    _layer(
        _look,
        lambda x, c, p: p.start + p.read(p.norm_2(x), c),
        lambda x, c, p: p.start + p.feed(p.norm_3(x)),
    )
)
ex.mistake(
    "a layer with all three sublayers in parallel",
    "Each reads the layer's input; none reads what the others have made.",
    READS,
)(
    _layer(
        _look,
        lambda x, c, p: x + p.read(p.norm_2(p.start), c),
        lambda x, c, p: x + p.feed(p.norm_3(p.start)),
    )
)
ex.mistake(
    "a layer whose cross-attention reads the layer's input",
    "Cross-attention does not see what self-attention has made.",
    READS,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(p.start), c), _feed))
ex.mistake(
    "a layer whose cross-attention reads what self-attention has read",
    "norm_1 of the layer's input is used a second time; norm_2 has no effect.",
    READS,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_1(p.start), c), _feed))
ex.mistake(
    "a layer whose feed-forward network reads the layer's input",
    "The feed-forward network does not see what the attentions have made.",
    READS,
)(_layer(_look, _read, lambda x, c, p: x + p.feed(p.norm_3(p.start))))
ex.mistake(
    "a layer whose cross-attention reads the result of self-attention without x",
    "What was added to x was kept apart and read alone.",
    READS,
)(_layer(_look, lambda x, c, p: x + p.read(p.norm_2(x - p.start), c), _feed))
ex.mistake(
    "a layer without self-attention",
    "The tokens written so far do not look at one another.",
    "Does each of the six functions appear once?",
)(_layer(_read, _feed))
ex.mistake(
    "a layer without cross-attention",
    "The context has no effect.",
    "Does each of the six functions appear once?",
)(_layer(_look, _feed))
ex.mistake(
    "a layer without the feed-forward network",
    "It ends after the two attentions.",
    "Does each of the six functions appear once?",
)(_layer(_look, _read))
ex.mistake(
    "a layer with self-attention twice",
    "It is run a second time on its own result.",
    "How often does each sublayer stand in the three lines?",
)(_layer(_look, _look, _read, _feed))
ex.mistake(
    "a layer with the feed-forward network after each attention",
    "It is run twice.",
    "How often does each sublayer stand in the three lines?",
)(_layer(_look, _feed, _read, _feed))
ex.mistake(
    "what the layer adds, without its input",
    "The residual connections begin from nothing.",
    AROUND,
)(_layer(_look, _read, _feed, lambda x, c, p: x - p.start))


@ex.alternative("a loop over norms and sublayers")
def _(x, context, self_attention, cross_attention, feed_forward, norm_1, norm_2, norm_3):
    across = functools.partial(_flipped, cross_attention, context)
    sublayers = (self_attention, across, feed_forward)
    for norm, sublayer in zip((norm_1, norm_2, norm_3), sublayers, strict=True):
        x = x + sublayer(norm(x))
    return x


def _flipped(function: Function, second: Tensor, first: Tensor) -> Tensor:
    return function(first, second)


@ex.alternative("a new name for every step")
def _(x, context, self_attention, cross_attention, feed_forward, norm_1, norm_2, norm_3):
    looked = self_attention(norm_1(x)) + x
    read = torch.add(looked, cross_attention(norm_2(looked), context))
    fed = feed_forward(norm_3(read))
    return x + (looked - x) + (read - looked) + fed


@ex.alternative("a helper for the residual")
def _(x, context, self_attention, cross_attention, feed_forward, norm_1, norm_2, norm_3):
    def residual(y, sublayer, norm):
        return y + sublayer(norm(y))

    x = residual(x, self_attention, norm_1)
    x = residual(x, lambda y: cross_attention(y, context), norm_2)
    return residual(x, feed_forward, norm_3)


@ex.alternative("in float64, and back")
def _(x, context, *functions):
    return decoder_layer(x.double(), context.double(), *functions).to(x.dtype)


@ex.alternative("one batch element at a time")
def _(x, context, *functions):
    parts = [decoder_layer(x[b, None], context[b, None], *functions) for b in range(len(x))]
    return torch.cat(parts)
