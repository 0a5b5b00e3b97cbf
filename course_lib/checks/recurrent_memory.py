"""Exercises of chapter 13: what a layer remembers from one segment to the next."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.judge import Answer, own_line
from ..grading.observe import Broken, expect, gradients
from ._inputs import normal, some
from ._wrong_parts import MIXTURES, NORMALISATIONS, SCALES

INF = math.inf


def _joined(hidden: Tensor, memory: Tensor) -> Tensor:
    return torch.cat([memory, hidden], 1)  # (batch, m + n, d)


def _last(x: Tensor, length: int) -> Tensor:
    """The last `length` vectors, or all where there are fewer."""
    return x[:, max(x.shape[1] - length, 0) :]


def _slice_from_minus(x: Tensor, length: int) -> Tensor:
    """The last `length` vectors but for a length of 0: [-0:] is [0:]."""
    return x[:, -length:]


def _groups(x: Tensor, rate: int) -> Tensor:
    return x.unflatten(1, (-1, rate))  # (batch, m, d) -> (batch, m / rate, rate, d)


def _reached(answer: Answer, case: Case, result: int = 0) -> list[str] | None:
    """The inputs that a gradient of one result reaches; None where it has no gradient at all."""
    frozen: list[str] = []

    def one(*args):
        value = answer.function(*args)
        tensors = zip(case, args, strict=True)
        frozen.extend(n for n, x in tensors if isinstance(x, Tensor) and not x.requires_grad)
        return value[result] if isinstance(value, tuple | list) else value

    answer.on(case)  # an answer of another kind is told so
    seen = gradients(answer.exercise, one, case)
    if seen.error is not None and frozen:
        raise Broken(f"after the call {_listed(frozen)} can have no gradient any more", case=case)
    if seen.error is not None:
        raise Broken(own_line(answer.function, seen.error), case=case, crash=True)
    return [name for name, g in seen.value.items() if g.any()] if seen.value else None


def _listed(names: list[str]) -> str:
    """ "`q`, `k` and `v`" """
    *front, last = [f"`{name}`" for name in names]
    return f"{', '.join(front)} and {last}" if front else last


def _expect_no_gradient(answer: Answer, case: Case, result: int = 0) -> None:
    reached = _reached(answer, case, result)
    if reached is not None:
        flows = f"a gradient reaches {_listed(reached)}" if reached else "it requires a gradient"
        raise Broken(flows, case=case)


def _expect_kept_gradient(answer: Answer, case: Case) -> None:
    """`hidden.detach_()` would cut the layer above off as well."""
    cut: list[bool] = []

    def watched(hidden, *others):
        hidden = hidden * 1  # no leaf, as in a network
        value = answer.function(hidden, *others)
        cut.append(not hidden.requires_grad)
        return value

    answer.on(case)
    gradients(answer.exercise, watched, case)
    if any(cut):
        raise Broken("after the call `hidden` itself can have no gradient any more", case=case)


# --- 1. extend the memory ---------------------------------------------------------------------

ex = Exercise(
    "extend_memory",
    chapter="13_recurrent_memory",
    title="Remember the last vectors",
    minutes=10,
    difficulty=2,
    importance=5,
    batched=True,
    prompt=r"""
A long text is read in segments. Each layer of a Transformer-XL remembers what it read, its own
inputs, so that the next segment can look back over the edge. After a segment the memory becomes

$$M' = \mathrm{SG}\big(\text{the last } \textit{length} \text{ vectors of } [\,M \circ H\,]\big)$$

where $\circ$ joins two sequences along time, the oldest first, and SG stops the gradient.

- `hidden` is `(batch, n, d)`, what the layer read now; `memory` is `(batch, m, d)`, what it read
  before. $m$ may be 0: a text begins.
- The result is `(batch, min(m + n, length), d)`: with `length` = 0 nothing is left, and where fewer
  vectors are there than `length`, all of them stay.
- **No gradient** may flow through the result, into `hidden` or into `memory`. `hidden` itself must
  keep its gradient: the layer above still needs it.
""",
    hints=(
        "In which order do the vectors stand, and at which end must they be cut off?",
        "`x[:, -length:]` is right for every length but one. Which number does `-0` stand for?",
        "both = torch.cat([memory, hidden], dim=1).detach(); from which index on do its last "
        "`length` vectors begin, if that index may not be below 0?",
    ),
)


@ex.solution
def extend_memory(hidden: Tensor, memory: Tensor, length: int) -> Tensor:
    """The last `length` vectors of memory followed by hidden, without gradient.

    hidden: (batch, n, d), memory: (batch, m, d), m may be 0. Returns (batch, min(m + n, length),
    d). Dai et al. 2019, section 3.2.
    """
    ### BEGIN SOLUTION
    both = torch.cat([memory, hidden], dim=1).detach()  # (batch, m + n, d)
    start = max(both.shape[1] - length, 0)  # [-length:] would keep everything for length 0
    return both[:, start:]
    ### END SOLUTION


def _memory_case(g: torch.Generator, batch: int, n: int, m: int, d: int, length: int) -> Case:
    return {"hidden": normal(g, batch, n, d), "memory": normal(g, batch, m, d), "length": length}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 1, 2, 1, 2),
        (1, 2, 2, 1, 2),  # hidden fills it
        (2, 3, 2, 2, 2),  # hidden alone is too long
        (1, 2, 0, 2, 1),
        (2, 1, 0, 3, 4),
        (2, 2, 2, 2, 0),
        (2, 2, 1, 2, 1),
        (1, 2, 1, 3, 5),  # there is room left
        (2, 2, 3, 2, 5),  # exactly full
        (1, 3, 3, 2, 4),
        (3, 2, 4, 2, 3),
    ]
    return [_memory_case(g, *size) for size in sizes]


def _remembered(seed: int, n: int = 2, m: int = 3, length: int = 4) -> Case:
    return _memory_case(torch.Generator().manual_seed(seed), 2, n, m, 2, length)


@ex.behaviour("the older vectors stand first: memory, then hidden")
def _(answer):
    case = {
        "hidden": torch.tensor([[[3.0]]]),
        "memory": torch.tensor([[[1.0], [2.0]]]),
        "length": 3,
    }
    expect(answer.on(case), torch.tensor([[[1.0], [2.0], [3.0]]]), case=case)


@ex.behaviour("the newest vectors stay, and the oldest fall out")
def _(answer):
    case = {
        "hidden": torch.tensor([[[3.0]]]),
        "memory": torch.tensor([[[1.0], [2.0]]]),
        "length": 2,
    }
    expect(answer.on(case), torch.tensor([[[2.0], [3.0]]]), case=case)


@ex.behaviour("with a length of 0 nothing is left")
def _(answer):
    case = _remembered(1, length=0)
    expect(answer.on(case), torch.zeros(2, 0, 2), case=case)


@ex.behaviour("where fewer vectors are there than `length`, all of them stay")
def _(answer):
    case = _remembered(2, length=7)
    expect(answer.on(case), _joined(case["hidden"], case["memory"]))


@ex.behaviour("two segments leave what one long segment leaves")
def _(answer):
    first, second, memory = some(3, (2, 2, 2), (2, 3, 2), (2, 1, 2))
    for length in (1, 4, 9):
        want = answer(torch.cat([first, second], 1), memory, length)
        expect(answer(second, answer(first, memory, length), length), want)


@ex.behaviour("batch elements do not meet")
def _(answer):
    case = _remembered(4)
    one = {name: v[1:] if isinstance(v, Tensor) else v for name, v in case.items()}
    expect(answer.on(case)[1:], answer.on(one))


@ex.behaviour("no gradient flows through what is remembered")
def _(answer):
    for length in (4, 7):
        _expect_no_gradient(answer, _remembered(5, length=length))


@ex.behaviour("hidden itself keeps its gradient")
def _(answer):
    _expect_kept_gradient(answer, _remembered(6))


SIDE = "Which end of the memory is the older one, and which end must be cut?"
BOTH = "What are the two things that the memory is made of?"
COUNT = "How many vectors should come back, and from which index on?"
TIME = "Along which dimension of (batch, n, d) does time run?"
MINUS_ZERO = "What does `x[:, -0:]` give?"

ex.mistake(
    "the last `length` vectors of hidden alone",
    "What was remembered before is forgotten at every segment.",
    BOTH,
)(lambda h, m, length: _last(h, length))
ex.mistake(
    "the last `length` vectors of memory alone",
    "Nothing new is ever remembered.",
    BOTH,
)(lambda h, m, length: _last(m, length))
ex.mistake(
    "the last `length` vectors with hidden in front of memory",
    "Time runs backwards over the seam, and what is new falls out first.",
    "Which of the two was read earlier, and where must it stand?",
)(lambda h, m, length: _last(_joined(m, h), length))
ex.mistake(
    "the first `length` vectors",
    "The oldest stay for ever, and what is new falls out.",
    SIDE,
)(lambda h, m, length: _joined(h, m)[:, :length])
ex.mistake(
    "the first `length` vectors with hidden in front of memory",
    "The right ones may stay, but time runs backwards over the seam.",
    "Which of the two was read earlier, and where must it stand?",
)(lambda h, m, length: _joined(m, h)[:, :length])
ex.mistake(
    "what falls out, not what stays",
    "`[:-length]` is the part before the last `length` vectors.",
    "On which side of the colon does the start of a slice stand?",
)(lambda h, m, length: _joined(h, m)[:, : max(h.shape[1] + m.shape[1] - length, 0)])
ex.mistake(
    "memory and hidden, never cut",
    "The memory grows with the text.",
    "What does `length` limit?",
)(lambda h, m, length: _joined(h, m))
ex.mistake(
    "one vector too many",
    "The border lies one vector too early.",
    COUNT,
)(lambda h, m, length: _last(_joined(h, m), length + 1))
ex.mistake(
    "one vector too few",
    "The border lies one vector too late.",
    COUNT,
)(lambda h, m, length: _last(_joined(h, m), max(length - 1, 0)))
ex.mistake(
    "everything where length is 0",
    "`[:, -length:]` is `[:, -0:]` there, and that is the whole.",
    MINUS_ZERO,
)(lambda h, m, length: _slice_from_minus(_joined(h, m), length))
ex.mistake(
    "at least one vector",
    "With length 0 one is left.",
    "What should be left with a length of 0?",
)(lambda h, m, length: _last(_joined(h, m), max(length, 1)))
ex.mistake(
    "too little where there is room left",
    "A start below 0 counts from the end: `x[:, -2:]` is two vectors, not all.",
    "What is m + n - length where fewer vectors are there than `length`?",
)(lambda h, m, length: _joined(h, m)[:, h.shape[1] + m.shape[1] - length :])
ex.mistake(
    "the last `length` vectors of memory, then all of hidden",
    "The memory was cut before hidden joined it, so that more than `length` stay.",
    COUNT,
)(lambda h, m, length: _joined(h, _last(m, length)))
ex.mistake(
    "the last `length` vectors of each of the two",
    "Each was cut alone, so that up to twice as many stay.",
    COUNT,
)(lambda h, m, length: _joined(_last(h, length), _last(m, length)))
ex.mistake(
    "all of hidden, with as much of memory as still fits",
    "Where hidden alone is longer than `length`, it must be cut too.",
    "What if a segment is longer than the memory?",
)(lambda h, m, length: _joined(h, _last(m, max(length - h.shape[1], 0))))
ex.mistake(
    "all of hidden, with memory[:, -(length - n):] before it",
    "Where hidden fills the memory that slice begins at -0, and where it is longer, at n - length.",
    "What is length - n where hidden alone fills the memory, or more?",
)(lambda h, m, length: _joined(h, m[:, h.shape[1] - length :]))
ex.mistake(
    "a memory as long as before",
    "As many vectors fall out as come in, whatever `length` says: it never fills.",
    "How long does the memory become after the first segment?",
)(lambda h, m, length: _joined(h, m)[:, h.shape[1] :])
ex.mistake(
    "a memory filled up with 0 to `length`",
    "Keys of 0 are keys too: the softmax would give them weight.",
    "How many vectors should come back where fewer are there than `length`?",
)(
    lambda h, m, length: F.pad(
        _last(_joined(h, m), length), (0, 0, max(length - h.shape[1] - m.shape[1], 0), 0)
    )
)
ex.mistake(
    "all of hidden where the memory is empty",
    "The first segment is remembered uncut.",
    "Is an empty memory a special case, or does the general rule handle it?",
)(lambda h, m, length: _last(_joined(h, m), length) if m.shape[1] else h.clone())
ex.mistake(
    "an empty memory that stays empty",
    "Where nothing was remembered before, nothing is remembered now: it never begins.",
    "Is an empty memory a special case, or does the general rule handle it?",
)(lambda h, m, length: _last(_joined(h, m), length) if m.shape[1] else m.clone())
ex.mistake(
    "the newest vector first",
    "The right vectors stay, but their time runs backwards.",
    "Which neighbour must the first vector of the next segment have?",
)(lambda h, m, length: _last(_joined(h, m), length).flip(1))
ex.mistake(
    "the memory with only the last vector of hidden",
    "The other vectors of the segment are forgotten.",
    "How many vectors of hidden join?",
)(lambda h, m, length: _last(_joined(h[:, -1:], m), length))
ex.mistake(
    "the memory with all of hidden but its last vector",
    "`[:-1]` leaves out the newest, the one next to the seam.",
    "How many vectors of hidden join?",
)(lambda h, m, length: _last(_joined(h[:, :-1], m), length))
ex.mistake(
    "the memory with the mean of hidden",
    "The whole segment was made one vector; compressing comes later.",
    "How many vectors of hidden join?",
)(lambda h, m, length: _last(_joined(h.mean(1, keepdim=True), m), length))
ex.mistake(
    "hidden added to the memory",
    "The two are joined along time, not summed.",
    "Which function puts one tensor behind another?",
)(lambda h, m, length: _last(m + h, length))
ex.mistake(
    "the mean of hidden and the memory",
    "The two are joined along time, not averaged.",
    "Which function puts one tensor behind another?",
)(lambda h, m, length: _last((m + h) / 2, length))
ex.mistake(
    "memory and hidden joined along the batch",
    "`torch.cat` joins along the first dimension unless told otherwise.",
    TIME,
)(lambda h, m, length: _last(torch.cat([m, h]), length))
ex.mistake(
    "memory and hidden joined along the features",
    "The vectors become twice as wide, not twice as many.",
    TIME,
)(lambda h, m, length: _last(torch.cat([m, h], -1), length))
ex.mistake(
    "memory and hidden cut along the batch",
    "The slice counts batch elements.",
    TIME,
)(lambda h, m, length: _joined(h, m)[-length:])
ex.mistake(
    "memory and hidden cut along the features",
    "The slice counts features.",
    TIME,
)(lambda h, m, length: _joined(h, m)[..., -length:])


@ex.alternative("a deque with a maximal length")
def _(hidden, memory, length):
    from collections import deque

    kept = deque([*memory.unbind(1), *hidden.unbind(1)], maxlen=length)
    return torch.stack(list(kept), 1).detach() if kept else memory[:, :0].detach()


@ex.alternative("under no_grad, with narrow")
def _(hidden, memory, length):
    with torch.no_grad():
        both = torch.cat((memory, hidden), dim=-2)
        kept = min(length, both.shape[-2])
        return both.narrow(-2, both.shape[-2] - kept, kept)


@ex.alternative("only as much of each as fits")
def _(hidden, memory, length):
    new = hidden.detach()[:, max(hidden.shape[1] - length, 0) :]
    room = length - new.shape[1]
    return torch.cat([memory.detach()[:, memory.shape[1] - min(room, memory.shape[1]) :], new], 1)


@ex.alternative("turned round, cut, and turned back")
def _(hidden, memory, length):
    both = torch.cat([hidden.flip(1), memory.flip(1)], 1)
    return both[:, :length].flip(1).data


@ex.alternative("by index, in float64, and back")
def _(hidden, memory, length):
    both = torch.cat([memory.double(), hidden.double()], 1)
    index = torch.arange(both.shape[1])[-length:] if length else torch.arange(0)
    return both.index_select(1, index).to(hidden.dtype).detach()


# --- 2. who sees what of the memory -----------------------------------------------------------

ex = Exercise(
    "memory_scores",
    chapter="13_recurrent_memory",
    title="Scores over memory and segment",
    minutes=10,
    difficulty=2,
    importance=5,
    batched=True,
    prompt=r"""
With a memory there are more keys than queries: the $m$ keys of the memory come first, then the $n$
keys of the segment. Query $i$ of the segment **stands at key** $m + i$. It may look at the whole
memory and at the segment up to itself; what comes later is hidden:

$$S_{ij} = \begin{cases} \textit{scale} \cdot q_i^\top k_j & j \le m + i \\
  -\infty & \text{otherwise}\end{cases}$$

- `q` is `(batch, heads, n, d)`, `k` is `(batch, heads, m + n, d)`: $m$ is the difference of their
  lengths and may be 0.
- `scale` is the number that the products are multiplied by.
- A hidden score is **replaced** by exactly `-inf`, whatever it was: one that is `inf` must be gone
  too.

The scores are `(batch, heads, n, m + n)`.
""",
    hints=(
        "With 3 remembered keys and a segment of 2, how many keys may the first query see, and how "
        "many the second?",
        "The triangle is aligned at the bottom right: the last query sees every key, and each one "
        "before it one key less.",
        "visible = torch.ones(n, m + n, dtype=torch.bool).tril(…) keeps j <= i + diagonal. Which "
        "diagonal is it here?",
    ),
)


@ex.solution
def memory_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores of a segment's queries over memory and segment, -inf where a key is later.

    q: (batch, heads, n, d), k: (batch, heads, m + n, d). Returns (batch, heads, n, m + n).
    """
    ### BEGIN SOLUTION
    n, total = q.shape[-2], k.shape[-2]  # total = m + n
    # (batch, heads, n, d) x (batch, heads, d, m + n) -> (batch, heads, n, m + n)
    scores = q @ k.transpose(-2, -1) * scale
    everything = torch.ones(n, total, dtype=torch.bool, device=q.device)
    visible = everything.tril(total - n)  # query i stands at key m + i
    return scores.masked_fill(~visible, -math.inf)
    ### END SOLUTION


def _scores_case(g: torch.Generator, *sizes: int, scale: float) -> Case:
    """sizes: batch, heads, n, m, d."""
    batch, heads, n, m, d = sizes
    shapes = {"q": (batch, heads, n, d), "k": (batch, heads, m + n, d)}
    return {name: normal(g, *shape) for name, shape in shapes.items()} | {"scale": scale}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    quiet = _scores_case(g, 1, 1, 2, 2, 2, scale=0.5)
    quiet["q"][..., 0, :] = 0.0  # a visible score may be 0
    loud = _scores_case(g, 1, 1, 3, 1, 1, scale=0.5)
    loud["q"], loud["k"][..., -1, :] = loud["q"].abs() + 0.1, INF  # hidden scores of inf
    return [
        _scores_case(g, 1, 1, 2, 1, 1, scale=0.5),
        _scores_case(g, 1, 1, 1, 2, 2, scale=2.0),
        _scores_case(g, 1, 1, 3, 0, 2, scale=0.5),
        quiet,
        loud,
        _scores_case(g, 2, 1, 2, 3, 3, scale=0.3),
        _scores_case(g, 1, 2, 3, 2, 2, scale=0.2),
        _scores_case(g, 2, 3, 3, 3, 4, scale=0.5),
        _scores_case(g, 1, 2, 4, 1, 1, scale=3.0),
        _scores_case(g, 3, 2, 2, 4, 3, scale=0.7),
    ]


def _looking(seed: int, n: int = 3, m: int = 2) -> Case:
    return _scores_case(torch.Generator().manual_seed(seed), 2, 2, n, m, 3, scale=0.5)


@ex.behaviour("every query sees the whole memory")
def _(answer):
    scores = answer.on(_looking(1))
    if scores[..., :2].isinf().any():
        raise Broken("a key of the memory is hidden", case=_looking(1))


@ex.behaviour("the first query sees the memory and its own key, and nothing more")
def _(answer):
    case = _looking(2)
    visible = answer.on(case)[0, 0, 0] != -INF
    expect(visible, torch.tensor([True, True, True, False, False]))


@ex.behaviour("the last query sees every key")
def _(answer):
    case = _looking(3)
    visible = answer.on(case)[..., -1, :] != -INF
    expect(visible, torch.ones(2, 2, 5, dtype=torch.bool))


@ex.behaviour("without a memory it is the causal triangle")
def _(answer):
    visible = answer.on(_looking(4, m=0))[0, 0] != -INF
    expect(visible, torch.ones(3, 3, dtype=torch.bool).tril())


@ex.behaviour("a visible score is scale · qᵀk")
def _(answer):
    case = _looking(5)
    want = torch.einsum("bhd, bhkd -> bhk", case["q"][:, :, -1], case["k"]) * 0.5
    expect(answer.on(case)[..., -1, :], want)


@ex.behaviour("a hidden score is -inf, exactly")
def _(answer):
    case = _looking(6, n=2, m=1)
    hidden = answer.on(case)[0, 0, 0, 2].item()
    if hidden != -INF:
        raise Broken(f"it is {hidden:.4g}", case=case)


@ex.behaviour("what has become memory is seen as it was in the segment")
def _(answer):
    case = _looking(7, n=4)
    later = case | {"q": case["q"][:, :, 2:]}  # the first half of the segment is memory now
    expect(answer.on(later), answer.on(case)[:, :, 2:])


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    case = _looking(8)
    one = case | {name: case[name][1:, 1:] for name in ("q", "k")}
    expect(answer.on(case)[1:, 1:], answer.on(one))


def _in_sight(i: Tensor, j: Tensor, m: int, n: int) -> Tensor:
    return j <= m + i


def _product(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q @ k.mT * scale


def _hidden(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, -INF)


def _scores(*, product=_product, see=_in_sight, hide=_hidden) -> Function:
    """Scores with another product, another rule of who sees whom, or another way to hide."""

    def function(q, k, scale):
        n, total = q.shape[-2], k.shape[-2]
        i, j = torch.arange(n)[:, None], torch.arange(total)
        visible = see(i, j, total - n, n)
        return hide(product(q, k, scale), visible)

    return function


STANDS = "At which key does the first query stand?"
OWN = "May a token see itself, and does your comparison let it?"

# Wrong rules: (query i, key j, m, n) -> visible.
SIGHTS = [
    Mistake(
        "aligned at the top left",
        "Query 0 was taken to stand at key 0: the newest part of the memory is hidden, and even "
        "the query's own key.",
        STANDS,
        lambda i, j, m, n: j <= i,
    ),
    Mistake(
        "aligned at the top left, with one key less",
        "Query 0 was taken to stand at key 0, and the diagonal was left out as well.",
        STANDS,
        lambda i, j, m, n: j < i,
    ),
    Mistake(
        "aligned at the top left, with one key more",
        "Query 0 was taken to stand at key 0, and the border lies one key further.",
        STANDS,
        lambda i, j, m, n: j <= i + 1,
    ),
    Mistake(
        "with nothing hidden",
        "In its own segment a query sees what comes later.",
        "Which keys come later than query i?",
        lambda i, j, m, n: (j >= 0).expand(n, -1),
    ),
    Mistake(
        "with only the memory visible",
        "The segment's own keys up to the query are hidden.",
        "May a query see its own segment?",
        lambda i, j, m, n: (j < m).expand(n, -1),
    ),
    Mistake(
        "with the memory hidden",
        "Each query sees its own segment alone, as if nothing were remembered.",
        "May a query see the memory?",
        lambda i, j, m, n: (j >= m) & (j <= m + i),
    ),
    Mistake(
        "with the memory hidden and the whole segment visible",
        "The mask hides what is remembered and shows what comes later.",
        "Which keys come earlier than query i, and which later?",
        lambda i, j, m, n: (j >= m).expand(n, -1),
    ),
    Mistake(
        "with each query's own key hidden",
        "The triangle stops one key too early.",
        OWN,
        lambda i, j, m, n: j < m + i,
    ),
    Mistake(
        "with one later key visible",
        "The triangle reaches one key too far, so the next token is seen.",
        STANDS,
        lambda i, j, m, n: j <= m + i + 1,
    ),
    Mistake(
        "with the past hidden instead of the future",
        "The triangle lies on the other side of the diagonal.",
        "`tril` or `triu`: which one keeps the keys before the query?",
        lambda i, j, m, n: j >= m + i,
    ),
    Mistake(
        "with the future visible, and it alone",
        "The visible keys were filled with -inf, not the others.",
        "Which entries does `masked_fill` fill: those where its argument is True or False?",
        lambda i, j, m, n: j > m + i,
    ),
    Mistake(
        "with the past hidden, aligned at the top left",
        "The triangle lies on the other side, and it starts at the wrong corner.",
        "`tril` or `triu`, and with which `diagonal`?",
        lambda i, j, m, n: j >= i,
    ),
    Mistake(
        "with the future visible, and it alone, aligned at the top left",
        "The visible keys were filled with -inf, and the triangle starts at the wrong corner.",
        "Which entries does `masked_fill` fill, and at which key does the first query stand?",
        lambda i, j, m, n: j > i,
    ),
    Mistake(
        "with the oldest of the memory hidden from later queries",
        "That is a sliding window of m keys back; here every query sees the whole memory.",
        "Does the memory slide on while a segment is read?",
        lambda i, j, m, n: (j >= i) & (j <= m + i),
    ),
    Mistake(
        "with only the last key of the memory visible",
        "The rest of what is remembered is hidden.",
        "How far back may a query look?",
        lambda i, j, m, n: (j >= m - 1) & (j <= m + i),
    ),
    Mistake(
        "with the last key of the memory hidden",
        "The key next to the seam belongs to the memory too.",
        "How many keys has the memory, and which index does its last one have?",
        lambda i, j, m, n: (j <= m + i) & (j != m - 1),
    ),
    Mistake(
        "with a triangle for the memory and one for the segment",
        "The whole memory lies in the past of every query; it needs no triangle.",
        "Which keys of the memory are later than a query of the segment?",
        lambda i, j, m, n: (j < m) & (j <= i) | (j >= m) & (j <= m + i),
    ),
    Mistake(
        "with the triangle shifted by n instead of m",
        "The diagonal is the number of keys before the segment, not in it.",
        "How many keys came before the first query?",
        lambda i, j, m, n: j <= i + n,
    ),
    Mistake(
        "with the triangle shifted to the wrong side",
        "The diagonal is n - (m + n) instead of m.",
        "With a memory, does the first query see more than one key, or fewer?",
        lambda i, j, m, n: j <= i - m,
    ),
    Mistake(
        "as if the memory stood behind the segment",
        "The first n columns were taken for the segment; they belong to the memory.",
        "Which keys come first in `k`?",
        lambda i, j, m, n: (j <= i) | (j >= n),
    ),
    Mistake(
        "with the memory and each query's own key, but no other of the segment",
        "Of the segment only the diagonal is left.",
        "Which keys of its segment lie before a query, and are they visible?",
        lambda i, j, m, n: (j < m) | (j == m + i),
    ),
    Mistake(
        "with nothing visible but each query's own key",
        "Only the diagonal is left of the triangle.",
        "Which keys lie before the query, and are they visible?",
        lambda i, j, m, n: j == m + i,
    ),
    Mistake(
        "with a triangle that leans to the other side",
        "The rows are in the wrong order: the first query sees the most.",
        "Which query may see the most keys, the first or the last?",
        lambda i, j, m, n: j <= m + n - 1 - i,
    ),
]

EXACTLY = "Which score makes exp exactly 0?"
FACTOR = "How often, and how, does `scale` enter the formula?"

# Wrong products: (q, k, scale) -> scores.
PRODUCTS = [
    Mistake(
        "without the scale",
        "The products stand as they are.",
        "Where does `scale` enter?",
        lambda q, k, scale: q @ k.mT,
    ),
    Mistake(
        "scaled twice",
        "The factor was put on both sides.",
        FACTOR,
        lambda q, k, scale: q @ k.mT * scale**2,
    ),
    Mistake(
        "divided by the scale",
        "The factor is upside down.",
        FACTOR,
        lambda q, k, scale: q @ k.mT / scale,
    ),
    Mistake(
        "with the scale added",
        "It should be a factor.",
        FACTOR,
        lambda q, k, scale: q @ k.mT + scale,
    ),
    Mistake(
        "scaled by the root of the scale",
        "`scale` is the factor itself, often 1/√d: no more roots are needed.",
        FACTOR,
        lambda q, k, scale: q @ k.mT * scale**0.5,
    ),
    Mistake(
        "scaled by 1/√d, whatever the scale",
        "The factor is given here.",
        "Where does `scale` enter?",
        lambda q, k, scale: q @ k.mT / q.shape[-1] ** 0.5,
    ),
    Mistake(
        "scaled by 1/√d as well",
        "`scale` is the whole factor.",
        FACTOR,
        lambda q, k, scale: q @ k.mT * scale / q.shape[-1] ** 0.5,
    ),
    Mistake(
        "summed over the heads",
        "Each head has scores of its own.",
        "Over which index is summed in qᵀk?",
        lambda q, k, scale: (
            _product(q, k, scale).sum(1, keepdim=True).expand(-1, q.shape[1], -1, -1)
        ),
    ),
]

# Ways to hide that do not: (scores, visible) -> scores.
HIDINGS = [
    Mistake(
        "with 0 for what is hidden",
        "`tril` sets the rest to 0, and a score of 0 is not hidden: exp(0) = 1.",
        EXACTLY,
        lambda s, visible: s.masked_fill(~visible, 0.0),
    ),
    Mistake(
        "with 0 for what is hidden, aligned at the top left",
        "Two things at once: 0 does not hide, and the first query does not stand at key 0.",
        "Which score makes exp exactly 0, and at which key does the first query stand?",
        lambda s, visible: s.tril(),
    ),
    Mistake(
        "multiplied by the mask",
        "That makes 0 of a hidden score, and NaN of one that was infinite.",
        EXACTLY,
        lambda s, visible: s * visible,
    ),
    Mistake(
        "with softmax already taken",
        "Weights came back instead of scores.",
        "Does the formula contain a softmax?",
        lambda s, visible: _hidden(s, visible).softmax(-1),
    ),
    Mistake(
        "with -inf wherever `tril` left a 0",
        "A visible score can be 0 too, and then it is hidden.",
        "Can the mask be made from positions alone, without looking at the scores?",
        lambda s, visible: s.masked_fill((s == 0) | ~visible, -INF),
    ),
    Mistake(
        "with -1e9 for what is hidden",
        "That hides too, as long as no visible score is as low; here -inf is asked.",
        "Is there a number below every other?",
        lambda s, visible: s.masked_fill(~visible, -1e9),
    ),
    Mistake(
        "with finfo.min for what is hidden",
        "The lowest finite number hides too; here -inf is asked.",
        "Is there a number below every other?",
        lambda s, visible: s.masked_fill(~visible, torch.finfo(s.dtype).min),
    ),
    Mistake(
        "with +inf for what is hidden",
        "exp(inf) is inf: what comes later gets all the weight.",
        "Which sign makes exp 0?",
        lambda s, visible: s.masked_fill(~visible, INF),
    ),
    Mistake(
        "with -inf added to what is hidden",
        "A hidden score that is inf turns to NaN: inf - inf.",
        "Which operation puts -inf in place of a hidden score, whatever it was?",
        lambda s, visible: s + torch.zeros_like(s).masked_fill(~visible, -INF),
    ),
    Mistake(
        "plus (1 - mask) · (-inf)",
        "0 · inf is NaN: the visible scores are spoiled.",
        "What is (1 - mask) · (-inf) where the mask is 1?",
        lambda s, visible: s + (~visible).to(s.dtype) * -INF,
    ),
    Mistake(
        "times -inf where hidden",
        "A negative score times -inf is +inf.",
        "Should a hidden score keep its sign?",
        lambda s, visible: torch.where(visible, s, s * -INF),
    ),
    Mistake(
        "with the mask added",
        "True adds 1 to a visible score; the others are not hidden.",
        EXACTLY,
        lambda s, visible: s + visible,
    ),
    Mistake(
        "for the segment's keys alone",
        "The columns of the memory are missing.",
        "How many keys are there?",
        lambda s, visible: _hidden(s, visible)[..., s.shape[-1] - s.shape[-2] :],
    ),
    Mistake(
        "for the memory's keys alone",
        "The columns of the segment are missing.",
        "How many keys are there?",
        lambda s, visible: s[..., : s.shape[-1] - s.shape[-2]],
    ),
    Mistake(
        "with queries and keys swapped",
        "Rows are keys and columns are queries.",
        "Which of the two lengths should the last dimension have?",
        lambda s, visible: _hidden(s, visible).mT,
    ),
]

ex.mistakes_from(SIGHTS, "the scores", lambda see: _scores(see=see))
ex.mistakes_from(PRODUCTS, "the scores", lambda product: _scores(product=product))
ex.mistakes_from(HIDINGS, "the scores", lambda hide: _scores(hide=hide))


@ex.alternative("einsum, and a comparison of positions")
def _(q, k, scale):
    n, total = q.shape[-2], k.shape[-2]
    later = torch.arange(total) > torch.arange(total - n, total)[:, None]
    return torch.einsum("bhqd, bhkd -> bhqk", q, k * scale).masked_fill(later, -INF)


@ex.alternative("the memory's scores beside the segment's")
def _(q, k, scale):
    n = q.shape[2]
    memory, own = k[:, :, : k.shape[2] - n], k[:, :, k.shape[2] - n :]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    return torch.cat([q @ memory.mT, (q @ own.mT).masked_fill(later, -INF)], -1) * scale


@ex.alternative("the lower rows of a square triangle")
def _(q, k, scale):
    square = torch.ones(k.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return torch.where(square[-q.shape[-2] :], (scale * q) @ k.mT, -INF)


@ex.alternative("query by query, filled up with -inf")
def _(q, k, scale):
    n, m = q.shape[2], k.shape[2] - q.shape[2]
    rows = [(k[:, :, : m + i + 1] @ q[:, :, i, :, None])[..., 0] * scale for i in range(n)]
    return torch.stack([F.pad(row, (0, n - 1 - i), value=-INF) for i, row in enumerate(rows)], 2)


@ex.alternative("in float64, and back")
def _(q, k, scale):
    return memory_scores(q.double(), k.double(), scale).to(q.dtype)


# --- 3. the relative shift --------------------------------------------------------------------

ex = Exercise(
    "relative_shift",
    chapter="13_recurrent_memory",
    title="From distances to keys",
    minutes=20,
    difficulty=4,
    importance=3,
    points=2,
    batched=True,
    prompt=r"""
In Transformer-XL the score of a pair depends on how **far back** the key lies. A layer computes it
once for every distance, one product of queries and distances, and then brings each score to its
key. `by_distance` is `(batch, heads, n_q, n_k)`; column $c$ holds the score $B_{ic}$ of query $i$
for the distance $n_k - 1 - c$: the largest distance comes first, **distance 0 is the last column**.

There are $n_k \ge n_q$ keys, the memory's first. Query $i$ stands at key $i + n_k - n_q$, so that
key $j$ lies $i + n_k - n_q - j$ behind it:

$$S_{ij} = \begin{cases} B_{ic} \text{ with } n_k - 1 - c = i + n_k - n_q - j &
  \text{if } i + n_k - n_q - j \ge 0 \\ 0 & \text{otherwise: the key is ahead}\end{cases}$$

So each row is moved to the left, each by another number of places, and what is free on the right
becomes 0. With two queries and three keys:

$$\begin{pmatrix} a_2 & a_1 & a_0 \\ b_2 & b_1 & b_0 \end{pmatrix} \longrightarrow
  \begin{pmatrix} a_1 & a_0 & 0 \\ b_2 & b_1 & b_0 \end{pmatrix}$$
""",
    hints=(
        "By how many places must the last row move, and by how many the row above it?",
        "Solve the equation in the formula for c: in row i, every key finds its score the same "
        "number of columns further right. And where no such column is left, the key is ahead.",
        "`x.gather(-1, column.expand_as(x))` reads x[..., i, column[i, j]] for each i and j; an "
        "index outside the row must be clamped, and its result set to 0.",
    ),
)


@ex.solution
def relative_shift(by_distance: Tensor) -> Tensor:
    """Scores by distance brought to their keys; 0 where the key is ahead of the query.

    by_distance: (batch, heads, n_q, n_k), column c for distance n_k - 1 - c. Returns the same
    shape, column j for key j. Dai et al. 2019, appendix B.
    """
    ### BEGIN SOLUTION
    n_q, n_k = by_distance.shape[-2:]
    query = torch.arange(n_q, device=by_distance.device)[:, None]
    key = torch.arange(n_k, device=by_distance.device)
    distance = query + n_k - n_q - key  # (n_q, n_k); below 0 where the key is ahead
    column = n_k - 1 - distance.clamp(min=0)  # where the score of that distance stands
    scores = by_distance.gather(-1, column.expand_as(by_distance))  # [i, j] = [i, column[i, j]]
    return scores.masked_fill(distance < 0, 0.0)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    shapes = [
        (1, 1, 2, 2),
        (1, 1, 1, 3),
        (1, 1, 2, 3),
        (1, 1, 3, 3),
        (2, 1, 2, 4),
        (1, 2, 3, 5),
        (2, 3, 4, 4),
        (3, 2, 3, 6),
    ]
    return [{"by_distance": normal(g, *shape)} for shape in shapes]


@ex.behaviour("the last query's row stays as it is")
def _(answer):
    (scores,) = some(1, (1, 2, 3, 5))
    expect(answer(scores)[..., -1, :], scores[..., -1, :])


@ex.behaviour("a query's own key gets the score of distance 0")
def _(answer):
    (scores,) = some(2, (1, 2, 3, 5))
    expect(answer(scores).diagonal(2, -2, -1), scores[..., -1])


@ex.behaviour("with two queries and three keys the first row moves by one place")
def _(answer):
    case = {"by_distance": torch.tensor([[[[3.0, 2.0, 1.0], [6.0, 5.0, 4.0]]]])}
    want = torch.tensor([[[[2.0, 1.0, 0.0], [6.0, 5.0, 4.0]]]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("a key ahead of the query gets 0")
def _(answer):
    (scores,) = some(3, (1, 1, 4, 6))
    expect(answer(scores)[0, 0, 0, 3:], torch.zeros(3))


@ex.behaviour("what depends on the distance alone comes out the same along each diagonal")
def _(answer):
    scores = torch.tensor([9.0, 7.0, 4.0, 2.0]).expand(1, 1, 3, 4)
    rows = [[4.0, 2.0, 0.0, 0.0], [7.0, 4.0, 2.0, 0.0], [9.0, 7.0, 4.0, 2.0]]
    expect(answer(scores)[0, 0], torch.tensor(rows))


@ex.behaviour("one query stays as it is")
def _(answer):
    (scores,) = some(4, (2, 2, 1, 4))
    expect(answer(scores), scores)


@ex.behaviour("it gives what a product with r of each pair's own distance gives")
def _(answer):
    q, r = some(5, (1, 1, 3, 2), (5, 2))  # r[s] belongs to distance s
    got = answer(q @ r.flip(0).mT)[0, 0]  # (…, 3, 2) x (2, 5): the largest distance first
    for i in range(3):
        for j in range(3 + i):  # query i stands at key i + 2
            expect(got[i, j], q[0, 0, i] @ r[i + 2 - j], f"query {i} and key {j}")


@ex.behaviour("batch elements and heads do not meet")
def _(answer):
    (scores,) = some(6, (2, 2, 3, 4))
    expect(answer(scores)[1:, 1:], answer(scores[1:, 1:]))


def _take(x: Tensor, column: Tensor, keep: Tensor | None = None) -> Tensor:
    """x[..., i, column[i, j]], and 0 for columns outside or not to be kept."""
    inside = (column >= 0) & (column < x.shape[-1])
    keep = inside if keep is None else inside & keep
    column = column.clamp(0, x.shape[-1] - 1).expand_as(x)
    return x.gather(-1, column).masked_fill(~keep, 0.0)


def _from(rule: Function) -> Function:
    """Shifted by another rule: (i, j, n_q, n_k) -> column, or (column, kept)."""

    def function(x):
        n_q, n_k = x.shape[-2:]
        found = rule(torch.arange(n_q)[:, None], torch.arange(n_k), n_q, n_k)
        return _take(x, *found) if isinstance(found, tuple) else _take(x, found)

    return function


def _by_view(x: Tensor, first: int) -> Tensor:
    """A column of zeros in front, read as (n_k + 1, n_q), n_k rows of it read as (n_q, n_k)."""
    n_q, n_k = x.shape[-2:]
    padded = F.pad(x, (1, 0)).flatten(-2).unflatten(-1, (n_k + 1, n_q))
    return padded[..., first : first + n_k, :].flatten(-2).unflatten(-1, (n_q, n_k))


def _rolled(sign: int) -> Function:
    def function(x):
        n_q = x.shape[-2]
        return torch.stack([x[..., i, :].roll(sign * (n_q - 1 - i), -1) for i in range(n_q)], -2)

    return function


def _ahead(x: Tensor) -> Tensor:
    return torch.ones(x.shape[-2:], dtype=torch.bool).triu(x.shape[-1] - x.shape[-2] + 1)


def _zeroed(x: Tensor) -> Tensor:
    return x.masked_fill(_ahead(x), 0.0)


LEFT = "By how many places, and to which side, must row i move?"
BEHIND = "At which key does query i stand, and how far behind it lies key j?"
COLUMN = "Which column holds the score of distance 0?"
FREE = "What should stand where the key is ahead of the query?"

ex.mistake(
    "the scores not shifted, with 0 for the keys ahead",
    "The columns still stand for distances, not for keys.",
    LEFT,
)(_zeroed)
ex.mistake(
    "the scores shifted to the right",
    "Each row moved as far as it should, but to the other side.",
    LEFT,
)(_from(lambda i, j, n_q, n_k: j - (n_q - 1 - i)))
ex.mistake(
    "the scores shifted by one place less",
    "Each key gets the score of the distance one further.",
    "What is the shift of the last row?",
)(_from(lambda i, j, n_q, n_k: (j + n_q - 2 - i, j <= i + n_k - n_q)))
ex.mistake(
    "the scores shifted by one place less, and one key ahead with a score",
    "Each key gets the score of the distance one further, and the key ahead that of distance 0.",
    "What is the shift of the last row?",
)(_from(lambda i, j, n_q, n_k: j + n_q - 2 - i))
ex.mistake(
    "the scores shifted by one place more",
    "Each key gets the score of the distance one nearer, and a query's own key gets none.",
    "What is the shift of the last row?",
)(_from(lambda i, j, n_q, n_k: j + n_q - i))
ex.mistake(
    "the scores for the distance i - j, without the memory",
    "Queries were counted from the segment's start, keys from the memory's.",
    BEHIND,
)(_from(lambda i, j, n_q, n_k: j + n_k - 1 - i))
ex.mistake(
    "the scores with the memory counted on the wrong side",
    "The offset is n_q - n_k instead of n_k - n_q.",
    BEHIND,
)(_from(lambda i, j, n_q, n_k: j + 2 * n_k - 1 - n_q - i))
ex.mistake(
    "the scores with row i shifted by i",
    "The last row moves the most; it should not move at all.",
    LEFT,
)(_from(lambda i, j, n_q, n_k: j + i))
ex.mistake(
    "the scores with row i shifted by i, to the right",
    "The first row stays and the last one moves the most: it should be the other way round.",
    LEFT,
)(_from(lambda i, j, n_q, n_k: j - i))
ex.mistake(
    "the scores with every row shifted alike, by n_q - 1",
    "Only the first row moves that far.",
    LEFT,
)(_from(lambda i, j, n_q, n_k: j + n_q - 1 + 0 * i))
ex.mistake(
    "the scores rolled round",
    "`roll` brings in at the right what leaves at the left; a key ahead must get 0.",
    FREE,
)(_rolled(-1))
ex.mistake(
    "the scores rolled round to the right",
    "Each row moved to the other side, and what left came back in.",
    LEFT,
)(_rolled(1))
ex.mistake(
    "the scores rolled round to the right, with 0 for the keys ahead",
    "Each row moved to the other side.",
    LEFT,
)(lambda x: _zeroed(_rolled(1)(x)))
ex.mistake(
    "the scores with what the padded view leaves ahead",
    "Pad, view and cut shifts the rows, and leaves numbers of the next row where keys are ahead. "
    "Under a causal mask they would not matter; here they must be 0.",
    FREE,
)(lambda x: _by_view(x, 1))
ex.mistake(
    "the scores by a padded view with the wrong row cut off",
    "The first row of the (n_k + 1, n_q) view must go, not the last.",
    "Where does the 0 that was padded stand in the view?",
)(lambda x: _by_view(x, 0))
ex.mistake(
    "the scores by a view padded on the right",
    "The padding stands at the wrong end of each row, so row i moves to the right by i.",
    "On which side does a free place push a row to the left?",
)(
    lambda x: (
        F.pad(x, (0, 1))
        .flatten(-2)[..., : x.shape[-2] * x.shape[-1]]
        .unflatten(-1, tuple(x.shape[-2:]))
    )
)
ex.mistake(
    "the scores with that of distance 0 for every key ahead",
    "The index was clamped, but its result was not set to 0.",
    FREE,
)(_from(lambda i, j, n_q, n_k: (j + n_q - 1 - i).clamp(max=n_k - 1)))
ex.mistake(
    "the scores with the absolute distance for the keys ahead",
    "A key ahead has no score here, however near it is.",
    FREE,
)(_from(lambda i, j, n_q, n_k: n_k - 1 - (i + n_k - n_q - j).abs()))
ex.mistake(
    "the scores with -inf for the keys ahead",
    "Hiding comes later; these scores are added to others, and here 0 is asked.",
    FREE,
)(lambda x: relative_shift(x).masked_fill(_ahead(x), -INF))
ex.mistake(
    "the scores with what stood there before for the keys ahead",
    "The rows were shifted inside a copy, and the free places kept their old numbers.",
    FREE,
)(lambda x: torch.where(_ahead(x), x, relative_shift(x)))
ex.mistake(
    "the scores with column c taken for distance c",
    "The columns were read from the wrong end: the largest distance comes first.",
    COLUMN,
)(_from(lambda i, j, n_q, n_k: i + n_k - n_q - j))
ex.mistake(
    "the scores with the columns turned round",
    "`flip` turns every row round and moves none against another.",
    COLUMN,
)(lambda x: x.flip(-1))
ex.mistake(
    "the scores with the columns turned round, with 0 for the keys ahead",
    "`flip` moves no row against another.",
    COLUMN,
)(lambda x: _zeroed(x.flip(-1)))
ex.mistake(
    "the scores with the zeros aligned at the top left",
    "The shift is right, but keys of the memory were taken for keys ahead.",
    "Which keys are ahead of query 0 if there is a memory?",
)(lambda x: relative_shift(x).tril())
ex.mistake(
    "the scores with 0 for each query's own key too",
    "Distance 0 is not ahead: the comparison should be < 0, not <= 0.",
    "What should a query's own key get?",
)(lambda x: relative_shift(x).tril(x.shape[-1] - x.shape[-2] - 1))
ex.mistake(
    "the scores with a 0 for each query's oldest key",
    "The score of the first column that belongs to a key was lost.",
    "Which distance has key 0 for query i?",
)(_from(lambda i, j, n_q, n_k: (j + n_q - 1 - i, j > 0)))
ex.mistake(
    "the scores of the last query for every query",
    "Each query has scores of its own.",
    "Which row of `by_distance` belongs to query i?",
)(lambda x: relative_shift(x[..., -1:, :].expand_as(x)))
ex.mistake(
    "the scores of the queries in reverse order",
    "Row i of the result was made of another row.",
    "Which row of `by_distance` belongs to query i?",
)(lambda x: relative_shift(x.flip(-2)))
ex.mistake(
    "the scores transposed",
    "Queries and keys have changed places.",
    "Is there one transpose too many?",
)(lambda x: relative_shift(x).mT)
ex.mistake(
    "the scores without the zeros, cut to the n_q keys behind",
    "The columns of the segment alone are left.",
    "How many keys are there, the memory's counted?",
)(lambda x: relative_shift(x)[..., x.shape[-1] - x.shape[-2] :])


@ex.alternative("pad, view, cut, and zero what is ahead")
def _(by_distance):
    batch, heads, n_q, n_k = by_distance.shape
    padded = F.pad(by_distance, (1, 0)).reshape(batch, heads, n_k + 1, n_q)
    return padded[:, :, 1:].reshape(batch, heads, n_q, n_k).tril(n_k - n_q)


@ex.alternative("row by row")
def _(by_distance):
    n_q = by_distance.shape[-2]
    rows = [F.pad(by_distance[..., i, n_q - 1 - i :], (0, n_q - 1 - i)) for i in range(n_q)]
    return torch.stack(rows, dim=-2)


@ex.alternative("entry by entry")
def _(by_distance):
    n_q, n_k = by_distance.shape[-2:]
    result = torch.zeros_like(by_distance)
    for i in range(n_q):
        for j in range(i + n_k - n_q + 1):
            result[..., i, j] = by_distance[..., i, j + n_q - 1 - i]
    return result


@ex.alternative("a product with a one-hot tensor")
def _(by_distance):
    n_q, n_k = by_distance.shape[-2:]
    i, j, c = torch.arange(n_q)[:, None, None], torch.arange(n_k)[:, None], torch.arange(n_k)
    moves = (c == j + n_q - 1 - i).to(by_distance.dtype)  # (n_q, n_k, n_k)
    return torch.einsum("bhic, ijc -> bhij", by_distance, moves)


@ex.alternative("in float64, and back")
def _(by_distance):
    return relative_shift(by_distance.double()).to(by_distance.dtype)


# --- 4. compress ------------------------------------------------------------------------------

ex = Exercise(
    "compress",
    chapter="13_recurrent_memory",
    title="Compress what is old",
    minutes=10,
    difficulty=2,
    importance=4,
    batched=True,
    prompt=r"""
What falls out of a memory need not be lost. A Compressive Transformer keeps it coarsely: each
`rate` neighbours become one vector. The simplest compression is their mean:

$$C_g = \frac{1}{\textit{rate}} \sum_{r=0}^{\textit{rate} - 1} O_{g \cdot \textit{rate} + r}$$

- `old` is `(batch, m, d)`; $m$ is a multiple of `rate`.
- The result is `(batch, m / rate, d)`, in the order of time. Each feature is averaged for itself.
""",
    hints=(
        "Which vectors become the first compressed one if rate is 3?",
        "Give every group a dimension of its own: (batch, m, d) becomes (batch, groups, rate, d). "
        "Over which of the four do you average then?",
        "`old.unflatten(1, (-1, rate))` splits time and leaves neighbours together.",
    ),
)


@ex.solution
def compress(old: Tensor, rate: int) -> Tensor:
    """The mean of each `rate` neighbours: (batch, m, d) -> (batch, m / rate, d).

    Rae et al. 2020, section 3.
    """
    ### BEGIN SOLUTION
    groups = old.unflatten(1, (-1, rate))  # (batch, m, d) -> (batch, m / rate, rate, d)
    return groups.mean(dim=2)
    ### END SOLUTION


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [  # batch, m, d, rate
        (1, 4, 1, 2),
        (1, 3, 2, 3),
        (2, 4, 3, 2),
        (1, 6, 2, 2),
        (1, 6, 3, 3),
        (2, 3, 1, 1),
        (2, 8, 4, 4),
        (3, 6, 2, 2),
    ]
    return [{"old": normal(g, *size), "rate": rate} for *size, rate in sizes]


@ex.behaviour("neighbours become their mean")
def _(answer):
    case = {"old": torch.tensor([[[1.0], [3.0], [5.0], [9.0]]]), "rate": 2}
    expect(answer.on(case), torch.tensor([[[2.0], [7.0]]]), case=case)


@ex.behaviour("a rate of 1 changes nothing")
def _(answer):
    (old,) = some(1, (2, 3, 2))
    expect(answer(old, 1), old)


@ex.behaviour("a rate of m leaves one vector, the mean of all")
def _(answer):
    (old,) = some(2, (2, 4, 3))
    expect(answer(old, 4), old.mean(1, keepdim=True))


@ex.behaviour("the mean over the whole memory stays what it was")
def _(answer):
    (old,) = some(3, (2, 6, 2))
    for rate in (2, 3):
        expect(answer(old, rate).mean(1), old.mean(1))


@ex.behaviour("equal vectors stay what they are, only fewer")
def _(answer):
    (vector,) = some(4, (2, 1, 3))
    expect(answer(vector.expand(2, 6, 3), 3), vector.expand(2, 2, 3))


@ex.behaviour("by 2 and again by 2 is by 4")
def _(answer):
    (old,) = some(5, (2, 8, 2))
    expect(answer(answer(old, 2), 2), answer(old, 4))


@ex.behaviour("a vector changes its own group alone")
def _(answer):
    (old,) = some(6, (1, 6, 2))
    other = old.clone()
    other[:, 3] += 5  # the first vector of group 1
    expect(answer(other, 3)[:, 0], answer(old, 3)[:, 0])


@ex.behaviour("batch elements and features do not meet")
def _(answer):
    (old,) = some(7, (2, 4, 3))
    expect(answer(old, 2)[1:, :, 1:], answer(old[1:, :, 1:], 2))


NEIGHBOURS = "Which vectors are neighbours in time, and do they stand in one group?"
EACH_FEATURE = "Along which dimension of (batch, m, d) does time run?"
FEWER = "How many vectors should be left, and of which group is each one the mean?"

# What becomes of one group: (batch, groups, rate, d) -> (batch, groups, d).
POOLINGS = [
    Mistake(
        "the max of each group",
        "The largest number of each feature is kept.",
        "Does the formula pick one of the numbers, or average all of them?",
        lambda groups: groups.amax(2),
    ),
    Mistake(
        "the min of each group",
        "The smallest number of each feature is kept.",
        "Does the formula pick one of the numbers, or average all of them?",
        lambda groups: groups.amin(2),
    ),
    Mistake(
        "the sum of each group",
        "A compressed vector is as large as its group together.",
        "What is the sum divided by?",
        lambda groups: groups.sum(2),
    ),
    Mistake(
        "the median of each group",
        "The vector in the middle is kept, feature by feature.",
        "Does the formula pick one of the numbers, or average all of them?",
        lambda groups: groups.median(2).values,
    ),
    Mistake(
        "the first of each group",
        "A stride of `rate` keeps one vector and forgets the others.",
        "Do all vectors of a group have a say?",
        lambda groups: groups[:, :, 0],
    ),
    Mistake(
        "the last of each group",
        "One vector is kept and the others are forgotten.",
        "Do all vectors of a group have a say?",
        lambda groups: groups[:, :, -1],
    ),
    Mistake(
        "the mean of the first and the last of each group",
        "What lies between them is forgotten.",
        "Do all vectors of a group have a say?",
        lambda groups: (groups[:, :, 0] + groups[:, :, -1]) / 2,
    ),
    Mistake(
        "the mean of the largest and the smallest of each group",
        "What lies between them is forgotten.",
        "Do all vectors of a group have a say?",
        lambda groups: (groups.amax(2) + groups.amin(2)) / 2,
    ),
    Mistake(
        "the sum of each group divided by √rate",
        "That keeps the variance of random vectors; a mean divides by their number.",
        "What is the sum divided by?",
        lambda groups: groups.sum(2) / groups.shape[2] ** 0.5,
    ),
    Mistake(
        "the mean of each group, divided by rate once more",
        "`mean` has divided already.",
        "What is the sum divided by?",
        lambda groups: groups.mean(2) / groups.shape[2],
    ),
    Mistake(
        "the sum of each group divided by the number of groups",
        "m / rate is how many groups there are, not how many vectors are in one.",
        "What is the sum divided by?",
        lambda groups: groups.sum(2) / groups.shape[1],
    ),
    Mistake(
        "the sum of each group divided by m",
        "m is the number of all old vectors.",
        "What is the sum divided by?",
        lambda groups: groups.sum(2) / (groups.shape[1] * groups.shape[2]),
    ),
    Mistake(
        "the root of the mean square of each group",
        "Signs are lost.",
        "What does the formula do to a number before it is added?",
        lambda groups: groups.square().mean(2).sqrt(),
    ),
    Mistake(
        "the mean of the absolute values of each group",
        "Signs are lost.",
        "What does the formula do to a number before it is added?",
        lambda groups: groups.abs().mean(2),
    ),
    Mistake(
        "the running average (a + b) / 2 of each group",
        "Averaged one after the other, the last vector counts for half.",
        "Does every vector of a group count alike?",
        lambda groups: _running(groups),
    ),
    Mistake(
        "the means with the newest group first",
        "Time runs backwards in the compressed memory.",
        "Which compressed vector is the oldest?",
        lambda groups: groups.mean(2).flip(1),
    ),
    Mistake(
        "the vectors of each group side by side, not averaged",
        "The result has rate · d features.",
        "What should become of the `rate` vectors of a group?",
        lambda groups: groups.flatten(2),
    ),
    Mistake(
        "the mean of the first group alone",
        "The other groups are forgotten.",
        FEWER,
        lambda groups: groups.mean(2)[:, :1],
    ),
    Mistake(
        "the mean over the groups",
        "The average was taken over the wrong one of the two dimensions: vectors of different "
        "groups were mixed.",
        "Which dimension of (batch, groups, rate, d) holds the neighbours?",
        lambda groups: groups.mean(1),
    ),
    Mistake(
        "the means, each repeated for its whole group",
        "The memory is as long as before.",
        FEWER,
        lambda groups: groups.mean(2).repeat_interleave(groups.shape[2], 1),
    ),
    Mistake(
        "one number for each group",
        "The mean was taken over the features as well.",
        EACH_FEATURE,
        lambda groups: groups.mean((2, 3)),
    ),
    Mistake(
        "one number for each group, as its only feature",
        "The mean was taken over the features as well.",
        EACH_FEATURE,
        lambda groups: groups.mean((2, 3))[..., None],
    ),
    Mistake(
        "the groups of all batch elements in one row",
        "The batch was merged with the time and not taken apart again.",
        "Which shape should the result have for a batch of 2?",
        lambda groups: groups.mean(2).flatten(0, 1),
    ),
]


def _running(groups: Tensor) -> Tensor:
    mean = groups[:, :, 0]
    for r in range(1, groups.shape[2]):
        mean = (mean + groups[:, :, r]) / 2
    return mean


def _pooled(pool: Function) -> Function:
    return lambda old, rate: pool(_groups(old, rate))


for wrong in POOLINGS:
    ex.mistake(wrong.name, wrong.cause, wrong.ask)(_pooled(wrong.function))
ex.mistake(
    "the mean of every (m / rate)-th vector",
    "The sizes of the split stand in the wrong order, (rate, m / rate): no neighbours meet.",
    NEIGHBOURS,
)(lambda old, rate: old.unflatten(1, (rate, -1)).mean(1))
ex.mistake(
    "the means of groups of m / rate",
    "The number of groups and their size were swapped.",
    "How many vectors are in a group, and how many groups are there?",
)(lambda old, rate: old.unflatten(1, (rate, -1)).mean(2))
ex.mistake(
    "the mean of numbers that a view to (m / rate, d, rate) puts together",
    "A view keeps the order of the numbers: features of one vector are averaged.",
    "In which order do rate and d follow one another in memory?",
)(lambda old, rate: old.reshape(len(old), -1, old.shape[2], rate).mean(-1))
ex.mistake(
    "the memory compressed along the features",
    "`avg_pool1d` pools the last dimension.",
    EACH_FEATURE,
)(lambda old, rate: F.avg_pool1d(old, rate))
ex.mistake(
    "the mean of all vectors",
    "One vector is left, whatever `rate` says.",
    FEWER,
)(lambda old, rate: old.mean(1, keepdim=True))
ex.mistake(
    "the mean of all vectors, in each place",
    "Each compressed vector is the mean of the whole memory, not of its own group.",
    FEWER,
)(lambda old, rate: old.mean(1, keepdim=True).expand(-1, old.shape[1] // rate, -1))
ex.mistake(
    "the means of pairs, whatever the rate",
    "A 2 is written into the code.",
    "Where does `rate` enter?",
)(lambda old, rate: _groups(old, 2).mean(2))
ex.mistake(
    "the moving average, with a step of 1",
    "The groups overlap; they should lie side by side.",
    FEWER,
)(lambda old, rate: old.unfold(1, rate, 1).mean(-1))
ex.mistake(
    "the groups begun one vector late",
    "The first vector went into the last group.",
    "Which vectors become the first compressed one?",
)(lambda old, rate: _groups(old.roll(-1, 1), rate).mean(2))
ex.mistake(
    "the newest m / rate vectors, as they were",
    "Nothing was compressed; the older ones are forgotten.",
    "Do all old vectors have a say?",
)(lambda old, rate: old[:, -(old.shape[1] // rate) :])
ex.mistake(
    "the oldest m / rate vectors, as they were",
    "Nothing was compressed; the newer ones are forgotten.",
    "Do all old vectors have a say?",
)(lambda old, rate: old[:, : old.shape[1] // rate])


@ex.alternative("avg_pool1d along time")
def _(old, rate):
    return F.avg_pool1d(old.transpose(1, 2), kernel_size=rate).transpose(1, 2)


@ex.alternative("the sum of strided slices")
def _(old, rate):
    return sum(old[:, r::rate] for r in range(rate)) / rate


@ex.alternative("group by group")
def _(old, rate):
    return torch.stack([group.mean(dim=1) for group in old.split(rate, dim=1)], dim=1)


@ex.alternative("a product with a matrix of 1 / rate")
def _(old, rate):
    m = old.shape[1]
    pool = torch.eye(m // rate, dtype=old.dtype).repeat_interleave(rate, dim=1) / rate
    return torch.einsum("gm, bmd -> bgd", pool, old)


@ex.alternative("differences of a running sum, in float64, and back")
def _(old, rate):
    sums = F.pad(old.double().cumsum(1), (0, 0, 1, 0))[:, ::rate]
    return (sums.diff(dim=1) / rate).to(old.dtype)


# --- 5. two memories --------------------------------------------------------------------------

ex = Exercise(
    "update_memories",
    chapter="13_recurrent_memory",
    title="What falls out is compressed",
    minutes=20,
    difficulty=4,
    importance=4,
    points=2,
    batched=True,
    prompt=r"""
A Compressive Transformer has two memories in each layer, the newer one as it was and the older one
compressed. In the order of time:

$$[\ \text{compressed} \mid \text{memory} \mid \text{segment}\ ]$$

After a segment

1. `hidden` joins `memory`, at its end;
2. of both together the last `memory_length` vectors stay; the others, **the oldest, fall out**;
3. what falls out is compressed: the mean of each `rate` neighbours becomes one vector;
4. these join `compressed`, at its end, and the last `compressed_length` vectors of it stay.

- `hidden` is `(batch, n, d)`, `memory` `(batch, m, d)`, `compressed` `(batch, c, d)`; $m$ and $c$
  may be 0, and so may both lengths.
- The number of vectors that fall out is a multiple of `rate` here. It may be **0**, as long as
  there is room: then nothing is compressed.
- No gradient may flow through the results. `hidden` itself keeps its gradient.

Return `(memory, compressed)`.
""",
    hints=(
        "With 4 remembered vectors, a segment of 2 and memory_length 4: which vectors fall out?",
        "Every vector goes one way: from hidden to memory, to what falls out, to compressed, and "
        "away. At each step the oldest stand first, and the oldest leave.",
        "`old = max(both.shape[1] - memory_length, 0)` vectors fall out, both[:, :old]. What are "
        "the two other parts made of?",
    ),
)


@ex.solution
def update_memories(
    hidden: Tensor,
    memory: Tensor,
    compressed: Tensor,
    memory_length: int,
    compressed_length: int,
    rate: int,
) -> tuple[Tensor, Tensor]:
    """(memory, compressed) after a segment, without gradient.

    hidden: (batch, n, d), memory: (batch, m, d), compressed: (batch, c, d). What no longer fits
    into memory_length is a multiple of rate, or nothing. Rae et al. 2020, section 3.
    """
    ### BEGIN SOLUTION
    both = torch.cat([memory, hidden], dim=1).detach()  # (batch, m + n, d)
    old = max(both.shape[1] - memory_length, 0)  # how many fall out
    leaving, memory = both[:, :old], both[:, old:]
    # (batch, old, d) -> (batch, old / rate, rate, d) -> (batch, old / rate, d)
    new = leaving.unflatten(1, (-1, rate)).mean(dim=2)
    compressed = torch.cat([compressed.detach(), new], dim=1)  # (batch, c + old / rate, d)
    start = max(compressed.shape[1] - compressed_length, 0)
    return memory, compressed[:, start:]
    ### END SOLUTION


def _two_case(g: torch.Generator, sizes: tuple[int, ...], lengths: tuple[int, int, int]) -> Case:
    """sizes: batch, n, m, c, d; lengths: of memory and compressed, and the rate."""
    batch, n, m, c, d = sizes
    counts = {"hidden": n, "memory": m, "compressed": c}
    case: Case = {name: normal(g, batch, count, d) for name, count in counts.items()}
    names = ("memory_length", "compressed_length", "rate")
    return case | dict(zip(names, lengths, strict=True))


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        ((1, 2, 1, 1, 1), (1, 2, 2)),
        ((1, 2, 2, 2, 1), (2, 2, 2)),  # the oldest compressed one falls out
        ((1, 2, 0, 0, 2), (4, 2, 2)),  # the beginning: nothing falls out
        ((2, 2, 2, 2, 2), (4, 3, 2)),  # exactly full
        ((1, 6, 0, 0, 2), (2, 3, 2)),  # a first segment that is longer than the memory
        ((1, 1, 1, 3, 2), (3, 2, 2)),  # nothing falls out, but compressed is too long
        ((2, 3, 6, 2, 3), (3, 3, 3)),
        ((1, 4, 2, 1, 2), (2, 2, 2)),  # of hidden, too, something falls out
        ((2, 4, 4, 1, 2), (0, 3, 2)),
        ((2, 2, 4, 1, 2), (4, 0, 2)),
        ((1, 3, 3, 2, 2), (3, 4, 1)),
        ((1, 4, 2, 1, 2), (4, 3, 2)),  # less falls out than comes in
        ((3, 4, 4, 3, 2), (4, 4, 2)),
    ]
    return [_two_case(g, *size) for size in sizes]


def _two(seed: int, sizes: tuple[int, ...], *lengths: int) -> Case:
    g = torch.Generator().manual_seed(seed)
    return _two_case(g, (2, *sizes, 2), (lengths[0], lengths[1], lengths[2]))


@ex.behaviour("the last memory_length vectors of memory and hidden stay as they were")
def _(answer):
    case = _two(1, (2, 4, 1), 4, 3, 2)
    expect(answer.on(case)[0], torch.cat([case["memory"][:, 2:], case["hidden"]], 1))


@ex.behaviour("what falls out, the oldest, is compressed and joins at the end")
def _(answer):
    case = _two(2, (2, 4, 1), 4, 3, 2)
    new = case["memory"][:, :2].mean(1, keepdim=True)
    expect(answer.on(case)[1], torch.cat([case["compressed"], new], 1))


@ex.behaviour("the last compressed_length compressed vectors stay")
def _(answer):
    case = _two(3, (2, 4, 3), 4, 2, 2)
    new = case["memory"][:, :2].mean(1, keepdim=True)
    expect(answer.on(case)[1], torch.cat([case["compressed"][:, 2:], new], 1))


@ex.behaviour("as long as there is room, nothing is compressed")
def _(answer):
    case = _two(4, (2, 2, 1), 4, 3, 2)
    want = (torch.cat([case["memory"], case["hidden"]], 1), case["compressed"])
    expect(answer.on(case), want)


@ex.behaviour("with a memory_length of 0 all goes into the compressed memory")
def _(answer):
    case = _two(5, (4, 2, 1), 0, 9, 2)
    both = torch.cat([case["memory"], case["hidden"]], 1)
    means = both.unflatten(1, (3, 2)).mean(2)  # (2, 6, 2) -> (2, 3, 2, 2) -> (2, 3, 2)
    expect(answer.on(case), (both[:, :0], torch.cat([case["compressed"], means], 1)))


@ex.behaviour("with a compressed_length of 0 nothing compressed is left")
def _(answer):
    case = _two(6, (2, 4, 1), 4, 0, 2)
    expect(answer.on(case)[1], torch.zeros(2, 0, 2))


@ex.behaviour("at a rate of 1 the two are one long memory")
def _(answer):
    case = _two(7, (3, 2, 3), 2, 4, 1)
    everything = torch.cat([case["compressed"], case["memory"], case["hidden"]], 1)
    memory, compressed = answer.on(case)
    expect(torch.cat([compressed, memory], 1), everything[:, -6:])


@ex.behaviour("two segments leave what one long segment leaves")
def _(answer):
    case = _two(8, (4, 4, 1), 4, 3, 2)
    first, second = (case | {"hidden": part} for part in case["hidden"].split(2, 1))
    memory, compressed = answer.on(first)
    got = answer.on(second | {"memory": memory, "compressed": compressed})
    expect(got, answer.on(case))


@ex.behaviour("batch elements do not meet")
def _(answer):
    case = _two(9, (2, 4, 1), 4, 3, 2)
    one = {name: v[1:] if isinstance(v, Tensor) else v for name, v in case.items()}
    memory, compressed = answer.on(case)
    expect((memory[1:], compressed[1:]), answer.on(one))


@ex.behaviour("no gradient flows through the memory")
def _(answer):
    _expect_no_gradient(answer, _two(10, (2, 4, 1), 4, 3, 2))


@ex.behaviour("no gradient flows through the compressed memory")
def _(answer):
    _expect_no_gradient(answer, _two(11, (2, 4, 1), 4, 3, 2), 1)


@ex.behaviour("hidden itself keeps its gradient")
def _(answer):
    _expect_kept_gradient(answer, _two(12, (2, 4, 1), 4, 3, 2))


def _oldest_out(both: Tensor, length: int, n: int) -> tuple[Tensor, Tensor]:
    """(what falls out, what stays)"""
    old = max(both.shape[1] - length, 0)
    return both[:, :old], both[:, old:]


def _mean_out(leaving: Tensor, kept: Tensor, hidden: Tensor, rate: int) -> Tensor:
    return _groups(leaving, rate).mean(2)


def _behind(compressed: Tensor, new: Tensor) -> Tensor:
    return torch.cat([compressed, new], 1)


def _updated(*, join=_joined, split=_oldest_out, pool=_mean_out, add=_behind, cut=_last,
             give=None) -> Function:  # fmt: skip
    """The update with some steps replaced.

    split(both, memory_length, n) gives what falls out and what stays; pool(leaving, kept, hidden,
    rate) what is compressed of it; give(memory, compressed, leaving) what is returned.
    """

    def function(hidden, memory, compressed, memory_length, compressed_length, rate):
        leaving, kept = split(join(hidden, memory), memory_length, hidden.shape[1])
        new = pool(leaving, kept, hidden, rate)
        longer = cut(add(compressed, new), compressed_length)
        return give(kept, longer, leaving) if give else (kept, longer)

    return function


def _of_groups(pool: Function) -> Function:
    return lambda leaving, kept, hidden, rate: pool(_groups(leaving, rate))


OUT = "Which vectors are the oldest of memory and hidden together?"
WHAT = "Which vectors are compressed: those that stay, those that come in, or those that leave?"
JOIN = "Where in the compressed memory is the newest one to stand?"
ROOM = "How many fall out while the memory is not full?"
ALONE = "What are the two results, and in which order?"

# Wrong ways to part what falls out from what stays: (both, memory_length, n) -> (out, stays).
PARTINGS = [
    Mistake(
        "with the newest falling out",
        "The first memory_length vectors stay, so the memory never moves on.",
        OUT,
        lambda both, length, n: (both[:, length:], both[:, :length]),
    ),
    Mistake(
        "in which memory_length vectors fall out",
        "That many should stay.",
        "How many vectors stay, and how many fall out?",
        lambda both, length, n: (both[:, :length], both[:, length:]),
    ),
    Mistake(
        "in which nothing ever falls out",
        "The memory grows with the text.",
        "How long may the memory be?",
        lambda both, length, n: (both[:, :0], both),
    ),
    Mistake(
        "with the memory not cut",
        "What falls out is compressed, but it stays in the memory as well.",
        "How long may the memory be?",
        lambda both, length, n: (_oldest_out(both, length, n)[0], both),
    ),
    Mistake(
        "in which nothing falls out where memory_length is 0",
        "`[:, :-0]` is empty and `[:, -0:]` is everything.",
        MINUS_ZERO,
        lambda both, length, n: (both[:, :-length], both[:, -length:]),
    ),
    Mistake(
        "in which as many fall out as come in",
        "A memory that is not full yet must not lose anything, and one that shrinks loses more.",
        ROOM,
        lambda both, length, n: (both[:, :n], both[:, n:]),
    ),
    Mistake(
        "in which the whole old memory falls out",
        "Only hidden stays, however much room there is.",
        ROOM,
        lambda both, length, n: (both[:, :-n], both[:, -n:]),
    ),
    Mistake(
        "in which hidden may not fall out",
        "A segment longer than memory_length must be cut too.",
        "What if a segment is longer than the memory?",
        lambda both, length, n: (
            both[:, : max(both.shape[1] - max(length, n), 0)],
            both[:, max(both.shape[1] - max(length, n), 0) :],
        ),
    ),
    Mistake(
        "with the memory cut before hidden joins it",
        "Only old vectors beyond memory_length fall out, so that up to n too many stay.",
        "When is the memory cut, before hidden joins or after?",
        lambda both, length, n: (
            both[:, : max(both.shape[1] - n - length, 0)],
            both[:, max(both.shape[1] - n - length, 0) :],
        ),
    ),
    Mistake(
        "with the wrong vectors compressed, the newest",
        "As many as fall out were taken from the end, and the oldest are lost.",
        OUT,
        lambda both, length, n: (
            both[:, both.shape[1] - max(both.shape[1] - length, 0) :],
            _oldest_out(both, length, n)[1],
        ),
    ),
    Mistake(
        "with the oldest vector of the memory lost",
        "The memory begins one vector too late.",
        "Is every vector either in the memory or among those that fall out?",
        lambda both, length, n: (
            _oldest_out(both, length, n)[0],
            _oldest_out(both, length, n)[1][:, 1:],
        ),
    ),
    Mistake(
        "with the newest vector of the memory lost",
        "The memory ends one vector too early.",
        "Is every vector either in the memory or among those that fall out?",
        lambda both, length, n: (
            _oldest_out(both, length, n)[0],
            _oldest_out(both, length, n)[1][:, :-1],
        ),
    ),
    Mistake(
        "with the memory's time turned round",
        "The right vectors stay, but the newest stands first.",
        "Which neighbour must the first vector of the next segment have?",
        lambda both, length, n: (
            _oldest_out(both, length, n)[0],
            _oldest_out(both, length, n)[1].flip(1),
        ),
    ),
]

# Wrong ways to compress: (what falls out, what stays, hidden, rate) -> new.
COMPRESSED = [
    Mistake(
        "in which what falls out is lost",
        "Nothing joins the compressed memory.",
        "Where do the vectors go that no longer fit?",
        lambda leaving, kept, hidden, rate: leaving[:, :0],
    ),
    Mistake(
        "in which what stays is compressed",
        "What falls out is lost, and what is still remembered is remembered twice.",
        WHAT,
        lambda leaving, kept, hidden, rate: _groups(kept, rate).mean(2),
    ),
    Mistake(
        "in which hidden is compressed",
        "The segment was compressed as soon as it was read, and what falls out is lost.",
        WHAT,
        lambda leaving, kept, hidden, rate: _groups(hidden, rate).mean(2),
    ),
    Mistake(
        "in which everything is compressed",
        "Memory and hidden were compressed whole, not only what falls out.",
        WHAT,
        lambda leaving, kept, hidden, rate: _groups(torch.cat([leaving, kept], 1), rate).mean(2),
    ),
    Mistake(
        "in which what falls out joins as it was",
        "It was not compressed.",
        "How many compressed vectors do `rate` old ones become?",
        lambda leaving, kept, hidden, rate: leaving,
    ),
    Mistake(
        "in which what falls out is compressed twice",
        "Each compressed vector stands for rate · rate old ones.",
        "How many old vectors does a compressed one stand for?",
        lambda leaving, kept, hidden, rate: _groups(_groups(leaving, rate).mean(2), rate).mean(2),
    ),
    Mistake(
        "in which all that falls out becomes one vector",
        "The mean was taken over everything that falls out.",
        "How many vectors does a compressed one stand for?",
        lambda leaving, kept, hidden, rate: (
            leaving.mean(1, keepdim=True) if leaving.shape[1] else leaving
        ),
    ),
    Mistake(
        "in which all that falls out becomes one vector, even nothing",
        "The mean was taken over everything that falls out; of nothing it is NaN.",
        "How many vectors does a compressed one stand for, and what if nothing falls out?",
        lambda leaving, kept, hidden, rate: leaving.mean(1, keepdim=True),
    ),
    Mistake(
        "in which every (old / rate)-th vector is averaged",
        "The sizes of the split stand in the wrong order: no neighbours meet.",
        NEIGHBOURS,
        lambda leaving, kept, hidden, rate: leaving.unflatten(1, (rate, -1)).mean(1),
    ),
    Mistake(
        "with pairs compressed, whatever the rate",
        "A 2 is written into the code.",
        "Where does `rate` enter?",
        lambda leaving, kept, hidden, rate: _groups(leaving, 2).mean(2),
    ),
    Mistake(
        "with max instead of the mean",
        "The largest number of each feature is kept.",
        "How is a group compressed here?",
        _of_groups(lambda groups: groups.amax(2)),
    ),
    Mistake(
        "with the sum instead of the mean",
        "A compressed vector is as large as its group together.",
        "How is a group compressed here?",
        _of_groups(lambda groups: groups.sum(2)),
    ),
    Mistake(
        "with the first of each group instead of the mean",
        "One vector is kept and the others are forgotten.",
        "How is a group compressed here?",
        _of_groups(lambda groups: groups[:, :, 0]),
    ),
    Mistake(
        "with the last of each group instead of the mean",
        "One vector is kept and the others are forgotten.",
        "How is a group compressed here?",
        _of_groups(lambda groups: groups[:, :, -1]),
    ),
]

# Wrong ways to cut the compressed memory: (compressed, compressed_length) -> compressed.
CUTS = [
    Mistake(
        "with the compressed memory never cut",
        "It grows with the text.",
        "What does `compressed_length` limit?",
        lambda x, length: x,
    ),
    Mistake(
        "with the newest of the compressed memory cut off",
        "The first compressed_length vectors stay for ever.",
        "Which compressed vectors are the oldest?",
        lambda x, length: x[:, :length],
    ),
    Mistake(
        "with the whole compressed memory kept where compressed_length is 0",
        "`[:, -length:]` is `[:, -0:]` there, and that is the whole.",
        MINUS_ZERO,
        _slice_from_minus,
    ),
    Mistake(
        "with at least one compressed vector",
        "With compressed_length 0 one is left.",
        "What should be left with a compressed_length of 0?",
        lambda x, length: _last(x, max(length, 1)),
    ),
    Mistake(
        "with one compressed vector too many",
        "The border lies one vector too early.",
        COUNT,
        lambda x, length: _last(x, length + 1),
    ),
    Mistake(
        "with one compressed vector too few",
        "The border lies one vector too late.",
        COUNT,
        lambda x, length: _last(x, max(length - 1, 0)),
    ),
    Mistake(
        "with too little compressed memory where there is room left",
        "A start below 0 counts from the end of the memory.",
        "What is the start where fewer vectors are there than compressed_length?",
        lambda x, length: x[:, x.shape[1] - length :],
    ),
]

# Wrong ways to join: (compressed, new) -> compressed.
ADDITIONS = [
    Mistake(
        "with the new in front of the compressed memory",
        "Time runs backwards there, and the cut hits the newest.",
        JOIN,
        lambda compressed, new: torch.cat([new, compressed], 1),
    ),
    Mistake(
        "with the compressed memory replaced by the new",
        "What was compressed before is forgotten.",
        "What happens to what was compressed before?",
        lambda compressed, new: new,
    ),
    Mistake(
        "with the new joined in reverse order",
        "Of two vectors that are new the older one must stand first.",
        JOIN,
        lambda compressed, new: torch.cat([compressed, new.flip(1)], 1),
    ),
]

# What is returned: (memory, compressed, what fell out) -> result.
RETURNS = [
    Mistake(
        "with the two memories in the wrong order",
        "The compressed one came first.",
        ALONE,
        lambda memory, compressed, leaving: (compressed, memory),
    ),
    Mistake(
        "that returns the memory alone",
        "The compressed memory is lost.",
        ALONE,
        lambda memory, compressed, leaving: memory,
    ),
    Mistake(
        "that returns the compressed memory alone",
        "The memory is lost.",
        ALONE,
        lambda memory, compressed, leaving: compressed,
    ),
    Mistake(
        "that returns both in one tensor",
        "The two were joined, as attention will see them; here they are still apart.",
        ALONE,
        lambda memory, compressed, leaving: torch.cat([compressed, memory], 1),
    ),
    Mistake(
        "that also returns what fell out",
        "Three things came back.",
        ALONE,
        lambda memory, compressed, leaving: (memory, compressed, leaving),
    ),
]

NAME = "an update"
BOTH_FROM_MINUS = _updated(
    split=lambda both, length, n: (both[:, :-length], both[:, -length:]), cut=_slice_from_minus
)
ex.mistakes_from(PARTINGS, NAME, lambda split: _updated(split=split))
ex.mistakes_from(COMPRESSED, NAME, lambda pool: _updated(pool=pool))
ex.mistakes_from(CUTS, NAME, lambda cut: _updated(cut=cut))
ex.mistakes_from(ADDITIONS, NAME, lambda add: _updated(add=add))
ex.mistakes_from(RETURNS, NAME, lambda give: _updated(give=give))
ex.mistake(
    f"{NAME} with both memories cut by [-length:]",
    "For a length of 0 that is `[:, -0:]`: everything stays.",
    MINUS_ZERO,
)(BOTH_FROM_MINUS)
ex.mistake(
    f"{NAME} in which the memory is cut, but what falls out is counted without hidden",
    "The oldest are looked for in the old memory alone, where all may still fit: they are lost.",
    "When does something fall out: before hidden joins, or after?",
)(
    lambda h, memory, c, length, c_length, rate: (
        _last(_joined(h, memory), length),
        _last(_behind(c, _mean_out(_oldest_out(memory, length, 0)[0], h, h, rate)), c_length),
    )
)
ex.mistake(
    f"{NAME} in which the whole old memory is compressed",
    "What still fits is remembered twice, as it was and compressed.",
    WHAT,
)(
    lambda h, memory, c, length, c_length, rate: (
        _last(_joined(h, memory), length),
        _last(_behind(c, _groups(memory, rate).mean(2)), c_length),
    )
)
ex.mistake(
    f"{NAME} in which nothing falls out unless the old memory was full",
    "`memory` was compared with memory_length before hidden joined it.",
    "When does something fall out: before hidden joins, or after?",
)(
    lambda h, memory, c, length, c_length, rate: (
        (_joined(h, memory), c.clone())
        if memory.shape[1] < length
        else update_memories(h, memory, c, length, c_length, rate)
    )
)
ex.mistake(
    f"{NAME} that forgets hidden",
    "Nothing new is ever remembered.",
    BOTH,
)(_updated(join=lambda hidden, memory: memory))
ex.mistake(
    f"{NAME} that forgets the old memory",
    "Only the segment is remembered.",
    BOTH,
)(_updated(join=lambda hidden, memory: hidden))
ex.mistake(
    f"{NAME} with hidden in front of the memory",
    "Time runs backwards over the seam, and what is new falls out first.",
    "Which of the two was read earlier, and where must it stand?",
)(_updated(join=lambda hidden, memory: torch.cat([hidden, memory], 1)))
ex.mistake(
    f"{NAME} with the compressed memory not cut where nothing falls out",
    "A shortcut for a memory with room left returns `compressed` as it came in.",
    "Which of the four steps must be done even if nothing falls out?",
)(
    lambda h, memory, c, length, c_length, rate: (
        (_joined(h, memory), c.clone())
        if h.shape[1] + memory.shape[1] <= length
        else update_memories(h, memory, c, length, c_length, rate)
    )
)
ex.mistake(
    f"{NAME} with the compressed memory cut before the new joins it",
    "Up to old / rate too many stay.",
    "When is the compressed memory cut?",
)(
    lambda h, memory, c, length, c_length, rate: update_memories(
        h, memory, _last(c, c_length), length, c_length + 99, rate
    )
)
ex.mistake(
    f"{NAME} with the two lengths swapped",
    "The memory was cut to compressed_length, and the compressed memory to memory_length.",
    "Which length limits which memory?",
)(
    lambda h, memory, c, length, c_length, rate: update_memories(
        h, memory, c, c_length, length, rate
    )
)
ex.mistake(
    f"{NAME} with compressed_length counted in tokens",
    "Only compressed_length / rate compressed vectors stay.",
    "Does compressed_length count compressed vectors, or what they stand for?",
)(
    lambda h, memory, c, length, c_length, rate: update_memories(
        h, memory, c, length, c_length // rate, rate
    )
)
ex.mistake(
    f"{NAME} with memory_length for both memories together",
    "The compressed vectors were taken off the room of the memory.",
    "Which length limits which memory?",
)(
    lambda h, memory, c, length, c_length, rate: update_memories(
        h, memory, c, max(length - c.shape[1], 0), c_length, rate
    )
)


@ex.alternative("vector by vector, in lists")
def _(hidden, memory, compressed, memory_length, compressed_length, rate):
    recent = [*memory.detach().unbind(1), *hidden.detach().unbind(1)]
    coarse, group = list(compressed.detach().unbind(1)), []
    while len(recent) > memory_length:
        group.append(recent.pop(0))
        if len(group) == rate:
            coarse.append(torch.stack(group).mean(0))
            group = []
    while len(coarse) > compressed_length:
        coarse.pop(0)
    nothing = hidden[:, :0].detach()
    return tuple(torch.stack(x, 1) if x else nothing for x in (recent, coarse))


@ex.alternative("with the functions of the exercises before")
def _(hidden, memory, compressed, memory_length, compressed_length, rate):
    everything = extend_memory(hidden, memory, memory.shape[1] + hidden.shape[1])
    old = max(everything.shape[1] - memory_length, 0)
    new = compress(everything[:, :old], rate)
    kept = extend_memory(hidden, memory, memory_length)
    return kept, extend_memory(new, compressed, compressed_length)


@ex.alternative("torch.split, under no_grad")
@torch.no_grad()
def _(hidden, memory, compressed, memory_length, compressed_length, rate):
    total = memory.shape[1] + hidden.shape[1]
    kept = min(total, memory_length)
    leaving, recent = torch.cat((memory, hidden), 1).split([total - kept, kept], 1)
    coarse = sum((leaving[:, r::rate] for r in range(rate)), 0.0) / rate
    every = torch.cat((compressed, coarse), 1)
    return recent, every[:, every.shape[1] - min(compressed_length, every.shape[1]) :]


@ex.alternative("return early while there is room")
def _(hidden, memory, compressed, memory_length, compressed_length, rate):
    both, compressed = torch.cat([memory.data, hidden.data], 1), compressed.data
    size = both.shape[1]
    if size > memory_length:
        leaving, both = both[:, : size - memory_length], both[:, size - memory_length :]
        pooled = F.avg_pool1d(leaving.mT, rate).mT
        compressed = torch.cat([compressed, pooled], 1)
    over = compressed.shape[1] - compressed_length
    return both, compressed[:, over:] if over > 0 else compressed


@ex.alternative("in float64, and back")
def _(hidden, memory, compressed, *sizes):
    doubles = (x.double() for x in (hidden, memory, compressed))
    return tuple(x.to(hidden.dtype) for x in update_memories(*doubles, *sizes))


# --- 6. what compression loses ----------------------------------------------------------------

ex = Exercise(
    "reconstruction_loss",
    chapter="13_recurrent_memory",
    title="What compression loses",
    minutes=20,
    difficulty=4,
    importance=3,
    points=2,
    prompt=r"""
Is a compressed memory as good as the old one? Ask both the same, and compare what comes back. The
**attention-reconstruction loss** is the mean squared difference

$$\mathcal{L} = \frac{1}{\textit{batch} \cdot n \cdot d}\;
  \big\lVert \mathrm{attn}(H, \text{old}) - \mathrm{attn}(H, \text{compressed}) \big\rVert^2,
  \qquad \mathrm{attn}(H, M) =
  \mathrm{softmax}\left(\frac{H W_Q (M W_K)^\top}{\sqrt d}\right) M W_V$$

- `hidden` is `(batch, n, d)`; `old` is `(batch, m, d)`, what fell out; `compressed` is
  `(batch, c, d)`, what became of it. The weights are `(d, d)`, used as `x @ w`. There is one head
  and no mask.
- **Only `compressed` gets a gradient**: the compression learns to serve the layer. `hidden`, `old`
  and the weights must get none, or the layer would learn to be easily served.

The loss is a scalar.
""",
    hints=(
        "How many different attentions are computed, and what do they have in common?",
        "The queries are the same in both. Write a function of the memory alone and call it twice; "
        "cut the gradient before it can begin.",
        "hidden, old, w_q, w_k, w_v = (t.detach() for t in (hidden, old, w_q, w_k, w_v)); after "
        "that, which path to `compressed` is still open?",
    ),
)


@ex.solution
def reconstruction_loss(
    hidden: Tensor, old: Tensor, compressed: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor
) -> Tensor:
    """Mean squared difference of attention to old and to compressed memories; a scalar.

    hidden: (batch, n, d), old: (batch, m, d), compressed: (batch, c, d), weights: (d, d). Only
    compressed gets a gradient. Rae et al. 2020, section 3.2.
    """
    ### BEGIN SOLUTION
    hidden, old, w_q, w_k, w_v = (t.detach() for t in (hidden, old, w_q, w_k, w_v))
    query = hidden @ w_q  # (batch, n, d)

    def read(memory: Tensor) -> Tensor:
        key, value = memory @ w_k, memory @ w_v  # (batch, m or c, d) each
        # (batch, n, d) x (batch, d, m or c) -> (batch, n, m or c)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        return torch.softmax(scores, dim=-1) @ value  # (batch, n, d)

    return (read(old) - read(compressed)).square().mean()
    ### END SOLUTION


def _loss_case(g: torch.Generator, batch: int, n: int, m: int, c: int, d: int) -> Case:
    counts = {"hidden": n, "old": m, "compressed": c}
    case: Case = {name: normal(g, batch, count, d) for name, count in counts.items()}
    return case | {name: normal(g, d, d, spread=0.7) for name in ("w_q", "w_k", "w_v")}


def _steep(g: torch.Generator) -> Case:
    """Scores of some hundreds, for which exp is infinite."""
    case = _loss_case(g, 1, 2, 3, 2, 2)
    eye = torch.eye(2)
    return case | {"hidden": 30 * case["hidden"].sign(), "w_q": 3 * eye, "w_k": 5 * eye}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    sizes = [
        (1, 2, 2, 1, 1),
        (1, 1, 2, 2, 2),
        (1, 2, 4, 2, 3),
        (2, 3, 4, 2, 2),
        (2, 3, 3, 3, 3),
        (1, 3, 6, 2, 4),
        (1, 4, 2, 4, 4),
        (3, 2, 4, 2, 3),
    ]
    cases = [_loss_case(g, *size) for size in sizes]
    return [*cases[:4], _steep(g), *cases[4:]]


def _reading(seed: int, n: int = 3, m: int = 4, c: int = 2) -> Case:
    return _loss_case(torch.Generator().manual_seed(seed), 2, n, m, c, 3)


@ex.behaviour("memories that are the same cost nothing")
def _(answer):
    case = _reading(1)
    expect(answer.on(case | {"compressed": case["old"]}), torch.tensor(0.0))


@ex.behaviour("neighbours that are equal are compressed without loss")
def _(answer):
    case = _reading(2)
    old = case["compressed"].repeat_interleave(2, 1)  # (2, 2, 3) -> (2, 4, 3)
    expect(answer.on(case | {"old": old}), torch.tensor(0.0))


@ex.behaviour("with w_q = 0 it compares the means of the values")
def _(answer):
    case = _reading(3)
    means = [(case[name] @ case["w_v"]).mean(1) for name in ("old", "compressed")]
    want = (means[0] - means[1]).square().mean()
    expect(answer.on(case | {"w_q": torch.zeros(3, 3)}), want)


@ex.behaviour("the order of a memory does not matter")
def _(answer):
    case = _reading(4)
    expect(answer.on(case | {"old": case["old"].flip(1)}), answer.on(case))


@ex.behaviour("values twice as large give four times the loss")
def _(answer):
    case = _reading(5)
    expect(answer.on(case | {"w_v": 2 * case["w_v"]}), 4 * answer.on(case))


@ex.behaviour("the same queries once more give the same loss")
def _(answer):
    case = _reading(6)
    expect(answer.on(case | {"hidden": case["hidden"].repeat(1, 2, 1)}), answer.on(case))


@ex.behaviour("it is the mean of what the batch elements give alone")
def _(answer):
    case = _reading(7)
    names = ("hidden", "old", "compressed")
    alone = [answer.on(case | {name: case[name][b, None] for name in names}) for b in (0, 1)]
    expect(answer.on(case), sum(alone) / 2)


@ex.behaviour("a gradient reaches compressed")
def _(answer):
    case = _reading(8)
    if "compressed" not in (_reached(answer, case) or []):
        raise Broken("no gradient reaches `compressed`", case=case)


@ex.behaviour("no gradient reaches anything but compressed")
def _(answer):
    case = _reading(9)
    others = [name for name in _reached(answer, case) or [] if name != "compressed"]
    if others:
        raise Broken(f"a gradient also reaches {_listed(others)}", case=case)


def _attention(query, key, value, *, scale=None, normalise=None, mix=None) -> Tensor:
    scores = query @ key.mT * (scale(query, key) if scale else query.shape[-1] ** -0.5)
    weights = normalise(scores) if normalise else scores.softmax(-1)
    return mix(weights, query, key, value) if mix else weights @ value


def _squares(want: Tensor, got: Tensor) -> Tensor:
    return (want - got).square().mean()


def _projected(hidden: Tensor, memory: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor):
    return hidden @ w_q, memory @ w_k, memory @ w_v


def _lossy(*, project=_projected, compare=_squares, sides=(True, True), **parts) -> Function:
    """The loss with some parts replaced, where `sides` says so: (for old, for compressed)."""

    def function(hidden, old, compressed, w_q, w_k, w_v):
        def read(memory: Tensor, replaced: bool) -> Tensor:
            wires = (project if replaced else _projected)(hidden, memory, w_q, w_k, w_v)
            return _attention(*wires, **(parts if replaced else {}))

        return compare(read(old, sides[0]), read(compressed, sides[1]))

    return function


MEASURE = "What is averaged over what in the formula?"
ONCE = "Which matrix belongs to queries, which to keys, and which to values?"
ROLES = "Who asks, and who is asked?"
COMPARED = "Which two things are compared?"
ALIKE = "Are the two attentions the same but for the memory?"

# Wrong ways to compare: (what old gives, what compressed gives) -> loss.
MEASURES = [
    Mistake(
        "with the sum instead of the mean",
        "It grows with the batch, the segment and the width.",
        MEASURE,
        lambda want, got: (want - got).square().sum(),
    ),
    Mistake(
        "summed over the features",
        "The mean was taken over the queries alone.",
        MEASURE,
        lambda want, got: (want - got).square().sum(-1).mean(),
    ),
    Mistake(
        "summed over queries and features",
        "The mean was taken over the batch alone.",
        MEASURE,
        lambda want, got: (want - got).square().sum((1, 2)).mean(),
    ),
    Mistake(
        "summed over the queries",
        "The mean was taken over batch and features alone.",
        MEASURE,
        lambda want, got: (want - got).square().sum(1).mean(),
    ),
    Mistake(
        "summed over the batch",
        "The mean was taken within each batch element alone.",
        MEASURE,
        lambda want, got: (want - got).square().mean((1, 2)).sum(),
    ),
    Mistake(
        "with absolute instead of squared differences",
        "That is the L1 distance.",
        "Which power has the norm in the formula?",
        lambda want, got: (want - got).abs().mean(),
    ),
    Mistake(
        "with the root of the mean square",
        "The formula takes no root.",
        "Which power has the norm in the formula?",
        lambda want, got: (want - got).square().mean().sqrt(),
    ),
    Mistake(
        "with the norm of the whole difference",
        "`norm()` takes a root and no mean.",
        "Which power has the norm in the formula?",
        lambda want, got: (want - got).norm(),
    ),
    Mistake(
        "with the mean norm of each query's difference",
        "The norm was not squared, and not divided by d.",
        "Which power has the norm in the formula?",
        lambda want, got: (want - got).norm(dim=-1).mean(),
    ),
    Mistake(
        "with half the mean square",
        "The formula has no 1/2.",
        MEASURE,
        lambda want, got: (want - got).square().mean() / 2,
    ),
    Mistake(
        "with differences that are not squared, old minus compressed",
        "Positive and negative ones cancel.",
        "Which power has the norm in the formula?",
        lambda want, got: (want - got).mean(),
    ),
    Mistake(
        "with differences that are not squared, compressed minus old",
        "Positive and negative ones cancel.",
        "Which power has the norm in the formula?",
        lambda want, got: (got - want).mean(),
    ),
    Mistake(
        "with the square of the mean difference",
        "Positive and negative differences cancel before they are squared.",
        "Which comes first, squaring or averaging?",
        lambda want, got: (want - got).mean().square(),
    ),
    Mistake(
        "with the squared difference of the means over the queries",
        "What one query loses is made up for by another.",
        "Which comes first, squaring or averaging?",
        lambda want, got: (want - got).mean(1).square().mean(),
    ),
    Mistake(
        "with the largest squared difference",
        "The maximum was taken, not the mean.",
        MEASURE,
        lambda want, got: (want - got).square().max(),
    ),
    Mistake(
        "with the negative sign",
        "The more alike the two are, the larger this is.",
        "Which loss should two equal memories have?",
        lambda want, got: -(want - got).square().mean(),
    ),
    Mistake(
        "as one minus the cosine",
        "Lengths do not count there.",
        MEASURE,
        lambda want, got: 1 - F.cosine_similarity(want, got, dim=-1).mean(),
    ),
    Mistake(
        "with one number for each batch element",
        "The mean over the batch is missing.",
        "Which shape has a loss?",
        lambda want, got: (want - got).square().mean((1, 2)),
    ),
    Mistake(
        "with one number for each query",
        "The mean over batch and queries is missing.",
        "Which shape has a loss?",
        lambda want, got: (want - got).square().mean(-1),
    ),
    Mistake(
        "with all squared differences, not averaged",
        "`reduction` was set to none, or the mean is missing.",
        "Which shape has a loss?",
        lambda want, got: (want - got).square(),
    ),
    Mistake(
        "of the last query alone",
        "All queries of the segment count.",
        "Whose answers are compared?",
        lambda want, got: (want - got)[:, -1].square().mean(),
    ),
    Mistake(
        "of the first batch element alone",
        "All batch elements count.",
        "Whose answers are compared?",
        lambda want, got: (want - got)[0].square().mean(),
    ),
    Mistake(
        "divided by the size of the target",
        "The formula divides by the number of entries only.",
        MEASURE,
        lambda want, got: (want - got).square().mean() / want.square().mean(),
    ),
]

# Wrong ways to make queries, keys and values: (hidden, memory, w_q, w_k, w_v) -> Q, K, V.
PROJECTIONS = [
    Mistake(
        "with queries from the memory",
        "Each memory asks itself; what the segment wants has no say.",
        ROLES,
        lambda h, m, q, k, v: (m @ q, m @ k, m @ v),
    ),
    Mistake(
        "with keys from hidden",
        "The segment is compared with itself.",
        ROLES,
        lambda h, m, q, k, v: (h @ q, h @ k, m @ v),
    ),
    Mistake(
        "with values from hidden",
        "What comes back is the segment itself.",
        ROLES,
        lambda h, m, q, k, v: (h @ q, m @ k, h @ v),
    ),
    Mistake(
        "that also looks at hidden",
        "The segment's own keys take their share; here the memory alone is asked.",
        ROLES,
        lambda h, m, q, k, v: (h @ q, torch.cat([m, h], 1) @ k, torch.cat([m, h], 1) @ v),
    ),
    Mistake(
        "without w_q",
        "The queries are hidden itself.",
        ONCE,
        lambda h, m, q, k, v: (h, m @ k, m @ v),
    ),
    Mistake(
        "without w_k",
        "The keys are the memory itself.",
        ONCE,
        lambda h, m, q, k, v: (h @ q, m, m @ v),
    ),
    Mistake(
        "without w_v",
        "The values are the memory itself.",
        ONCE,
        lambda h, m, q, k, v: (h @ q, m @ k, m),
    ),
    Mistake(
        "without projections",
        "Queries are hidden itself, keys and values the memory itself.",
        ONCE,
        lambda h, m, q, k, v: (h, m, m),
    ),
    Mistake(
        "with w_q and w_k swapped",
        "Queries were made with the matrix of the keys, and keys with that of the queries.",
        ONCE,
        lambda h, m, q, k, v: (h @ k, m @ q, m @ v),
    ),
    Mistake(
        "with w_k and w_v swapped",
        "Keys were made with the matrix of the values, and values with that of the keys.",
        ONCE,
        lambda h, m, q, k, v: (h @ q, m @ v, m @ k),
    ),
    Mistake(
        "with w_q and w_v swapped",
        "Queries were made with the matrix of the values, and values with that of the queries.",
        ONCE,
        lambda h, m, q, k, v: (h @ v, m @ k, m @ q),
    ),
    Mistake(
        "with w_q for the keys too",
        "w_k has no effect.",
        ONCE,
        lambda h, m, q, k, v: (h @ q, m @ q, m @ v),
    ),
    Mistake(
        "with w_k for the values too",
        "w_v has no effect.",
        ONCE,
        lambda h, m, q, k, v: (h @ q, m @ k, m @ k),
    ),
    Mistake(
        "with the weights transposed",
        "`F.linear(x, w)` computes x @ wᵀ; here it is x @ w.",
        "On which side of the matrix do the inputs of (d, d) lie?",
        lambda h, m, q, k, v: (h @ q.T, m @ k.T, m @ v.T),
    ),
]

LOSS = "the loss"
# With both outputs transposed nothing changes, and mixing the keys is `w_k for the values too`.
MIXED = [m for m in MIXTURES if m.name not in ("with the output transposed", "that mixes the keys")]
ex.mistakes_from(MEASURES, LOSS, lambda compare: _lossy(compare=compare))
ex.mistakes_from(PROJECTIONS, LOSS, lambda project: _lossy(project=project))
ex.mistakes_from(SCALES, f"{LOSS} of attention", lambda scale: _lossy(scale=scale))
ex.mistakes_from(
    NORMALISATIONS, f"{LOSS} of attention", lambda normalise: _lossy(normalise=normalise)
)
ex.mistakes_from(MIXED, f"{LOSS} of attention", lambda mix: _lossy(mix=mix))
ex.mistake(
    "the loss of attention with exp of the raw scores",
    "exp of a large score is inf, and inf / inf is NaN.",
    "What may be subtracted from every score of a row without changing the result?",
)(_lossy(normalise=lambda s: s.exp() / s.exp().sum(-1, keepdim=True)))
ex.mistake(
    "the loss of attention under a causal mask",
    "A memory lies in the past of every query: nothing of it is hidden.",
    "Which memories are later than a query?",
)(_lossy(normalise=lambda s: s.masked_fill(torch.ones_like(s).triu(1).bool(), -INF).softmax(-1)))
ex.mistake(
    "the loss with a target without softmax",
    "The scores for the old memory were used as weights.",
    ALIKE,
)(_lossy(normalise=lambda s: s, sides=(True, False)))
ex.mistake(
    "the loss with the compressed side without softmax",
    "The scores for the compressed memory were used as weights.",
    ALIKE,
)(_lossy(normalise=lambda s: s, sides=(False, True)))
ex.mistake(
    "the loss with a target without the 1/√d scale",
    "The scores for the old memory were not scaled.",
    ALIKE,
)(_lossy(scale=lambda q, k: 1.0, sides=(True, False)))
ex.mistake(
    "the loss with the compressed side without the 1/√d scale",
    "The scores for the compressed memory were not scaled.",
    ALIKE,
)(_lossy(scale=lambda q, k: 1.0, sides=(False, True)))
ex.mistake(
    "the loss with the raw memory as values of the target",
    "w_v is missing on one side.",
    ALIKE,
)(_lossy(project=lambda h, m, q, k, v: (h @ q, m @ k, m), sides=(True, False)))
ex.mistake(
    "the loss against hidden",
    "What the compressed memory gives was compared with the segment.",
    COMPARED,
)(lambda h, old, c, q, k, v: _squares(h, _attention(*_projected(h, c, q, k, v))))
ex.mistake(
    "the loss against 0",
    "What the old memory gives is missing: silence would be the best compression.",
    COMPARED,
)(lambda h, old, c, q, k, v: _attention(*_projected(h, c, q, k, v)).square().mean())
ex.mistake(
    "the loss against old and compressed together",
    "The target already contains what is to be judged.",
    COMPARED,
)(lambda h, old, c, q, k, v: _lossy()(h, torch.cat([old, c], 1), c, q, k, v))
ex.mistake(
    "the loss of old and compressed together against old",
    "The old memory helps the compressed one to its answer.",
    COMPARED,
)(lambda h, old, c, q, k, v: _lossy()(h, old, torch.cat([old, c], 1), q, k, v))


def _stretched(old: Tensor, compressed: Tensor) -> Tensor:
    return compressed.repeat_interleave(old.shape[1] // compressed.shape[1], 1)


ex.mistake(
    "the loss of the memories themselves",
    "Each old vector was compared with its compressed one: that is the auto-encoding loss. It also "
    "asks for what no query will ever look for.",
    COMPARED,
)(lambda h, old, c, q, k, v: _squares(old, _stretched(old, c)))
ex.mistake(
    "the loss of the values, not of what attention finds",
    "Each old value was compared with its compressed one; the queries have no say.",
    COMPARED,
)(lambda h, old, c, q, k, v: _squares(old @ v, _stretched(old, c) @ v))
ex.mistake(
    "the loss of the mean values",
    "All memories counted alike, whatever the queries ask.",
    "Where do the queries enter?",
)(lambda h, old, c, q, k, v: _squares((old @ v).mean(1), (c @ v).mean(1)))


@ex.alternative("scaled_dot_product_attention and mse_loss")
def _(hidden, old, compressed, w_q, w_k, w_v):
    hidden, old, w_q, w_k, w_v = (t.detach() for t in (hidden, old, w_q, w_k, w_v))
    look = F.scaled_dot_product_attention
    got = look(hidden @ w_q, compressed @ w_k, compressed @ w_v)
    return F.mse_loss(got, look(hidden @ w_q, old @ w_k, old @ w_v))


@ex.alternative("einsum, the target under no_grad")
def _(hidden, old, compressed, w_q, w_k, w_v):
    def read(memory):
        key = torch.einsum("bmd, de -> bme", memory, w_k.detach())
        query = torch.einsum("bnd, de -> bne", hidden.detach(), w_q.detach())
        weights = (torch.einsum("bne, bme -> bnm", query, key) / len(w_q) ** 0.5).softmax(-1)
        return torch.einsum("bnm, bmd, de -> bne", weights, memory, w_v.detach())

    with torch.no_grad():
        target = read(old)
    return (target - read(compressed)).pow(2).mean()


@ex.alternative("the weights folded into one matrix")
def _(hidden, old, compressed, w_q, w_k, w_v):
    both = (w_q @ w_k.T).detach()  # x W_Q (m W_K)ᵀ = x (W_Q W_Kᵀ) mᵀ
    asked = hidden.detach() @ both / math.sqrt(hidden.shape[-1])
    old_side, new_side = (
        (asked @ memory.mT).softmax(-1) @ memory @ w_v.data for memory in (old.data, compressed)
    )
    return ((old_side - new_side) ** 2).sum() / old_side.numel()


@ex.alternative("one batch element and one query at a time")
def _(hidden, old, compressed, w_q, w_k, w_v):
    hidden, old, w_q, w_k, w_v = (t.detach() for t in (hidden, old, w_q, w_k, w_v))

    def read(x, memory):
        scores = memory @ w_k @ (x @ w_q) / math.sqrt(len(x))
        weights = (scores - scores.max()).exp()
        return weights @ (memory @ w_v) / weights.sum()

    losses = [
        (read(x, old[b]) - read(x, compressed[b])).square().mean()
        for b in range(len(hidden))
        for x in hidden[b]
    ]
    return torch.stack(losses).mean()


@ex.alternative("in float64, and back")
def _(*tensors):
    return reconstruction_loss(*(t.double() for t in tensors)).to(tensors[0].dtype)
