"""Exercises of chapter 10: from teacher forcing to beams."""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function
from ..grading.observe import Broken, expect

INF = math.inf


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers with one decimal, so that a counterexample can be read."""
    return (torch.randn(*shape, generator=g) * 10).round() / 10 + 0.0


def _some(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [_normal(g, *shape) for shape in shapes]


def _ids(g: torch.Generator, *shape: int) -> Tensor:
    """Token ids from 10 to 89, each at most once."""
    return (10 + torch.randperm(80, generator=g)[: math.prod(shape)]).reshape(shape)


# --- 1. teacher forcing -----------------------------------------------------------------------

ex = Exercise(
    "teacher_forcing",
    chapter="10_encoder_decoder",
    title="What the decoder reads, and what it must say",
    minutes=15,
    difficulty=2,
    importance=5,
    points=2,
    prompt=r"""
Under **teacher forcing** the decoder learns all positions at once: at each it reads the right
tokens so far and must say the next one. After the last token it must say `stop`, or it will never
learn to end. For a target $t_1 \dots t_m$ that is

$$\text{inputs} = (\text{start}, t_1, \dots, t_m) \qquad
  \text{outputs} = (t_1, \dots, t_m, \text{stop})$$

`targets` is `(batch, n)` integers. A row with $m < n$ tokens is filled up with `pad` at its end.
Return `(inputs, outputs)`, both `(batch, n + 1)`:

- Behind `stop` the outputs are **-100**, the number that `F.cross_entropy` ignores. Behind $t_m$
  the inputs are `pad`.
- `stop` stands right behind the last real token of its row, and it is never read.
- In `targets`, a token is padding exactly where it equals `pad`. Any id may be `pad`. It may be the
  same id as `stop` or `start`, as in models that have one special token for everything.
- A row may be full ($m = n$) or empty ($m = 0$).
""",
    hints=(
        "How many tokens has the decoder read when it must say t_1, and how many when it must say "
        "stop?",
        "Inputs and outputs are the targets with one column more: the inputs in front, the outputs "
        "at the end. In row b, stop stands at position m, the number of real tokens.",
        "lengths = (targets != pad).sum(dim=1, keepdim=True); compare torch.arange(n + 1) with it: "
        "where is it equal, and where is it larger?",
    ),
)


@ex.solution
def teacher_forcing(targets: Tensor, start: int, stop: int, pad: int) -> tuple[Tensor, Tensor]:
    """What the decoder reads and what it must say. (batch, n) ids -> two of (batch, n + 1)."""
    ### BEGIN SOLUTION
    lengths = (targets != pad).sum(dim=1, keepdim=True)  # (batch, 1)
    inputs = F.pad(targets, (1, 0), value=start)  # (batch, n) -> (batch, n + 1)
    outputs = F.pad(targets, (0, 1), value=pad)  # (batch, n) -> (batch, n + 1)
    position = torch.arange(outputs.shape[1], device=targets.device)  # (n + 1,)
    # By position and not by id: stop and pad may be the same token.
    outputs = outputs.masked_fill(position == lengths, stop)
    return inputs, outputs.masked_fill(position > lengths, -100)
    ### END SOLUTION


def _padded(g: torch.Generator, n: int, lengths: list[int], *ids: int) -> Case:
    """Targets of these lengths; ids: start, stop, pad."""
    targets = _ids(g, len(lengths), n)
    start, stop, pad = ids
    for row, length in zip(targets, lengths, strict=True):
        row[length:] = pad
    return {"targets": targets, "start": start, "stop": stop, "pad": pad}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    repeated = _padded(g, 5, [4, 5], 1, 2, 0)
    repeated["targets"][:, 1:4] = repeated["targets"][:, :1]  # a token may occur twice
    low = _padded(g, 3, [1, 3, 2], 95, 96, 97)
    low["targets"][0, 0] = 0  # an id like any other
    return [
        _padded(g, 3, [2, 3], 1, 2, 0),
        _padded(g, 1, [1], 1, 2, 0),
        _padded(g, 2, [0, 2, 1], 3, 4, 5),
        _padded(g, 4, [1, 3], 1, 2, 2),  # pad is stop
        _padded(g, 3, [2, 0], 0, 1, 0),  # pad is start
        _padded(g, 3, [2, 3, 1], 7, 7, 7),  # one special token
        low,
        _padded(g, 4, [4], 8, 9, 0),
        _padded(g, 3, [3, 3, 3], 0, 1, 2),
        _padded(g, 4, [2, 1, 2], 4, 2, 1),
        repeated,
    ]


TARGETS = torch.tensor([[11, 12, 13], [21, 0, 0]])


@ex.behaviour("the decoder reads the start token first")
def _(answer):
    inputs, _ = answer(TARGETS, 1, 2, 0)
    expect(inputs[:, 0], torch.tensor([1, 1]))


@ex.behaviour("behind the start token it reads the targets as they are")
def _(answer):
    inputs, _ = answer(TARGETS, 1, 2, 0)
    expect(inputs[:, 1:], TARGETS)


@ex.behaviour("the first token to say is the first target")
def _(answer):
    _, outputs = answer(TARGETS, 1, 2, 0)
    expect(outputs[:, 0], TARGETS[:, 0])


@ex.behaviour("each row stops once, right behind its last real token")
def _(answer):
    _, outputs = answer(TARGETS, 1, 2, 0)
    want = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0]]).bool()
    expect(outputs == 2, want)


@ex.behaviour("behind stop there is nothing to say: -100")
def _(answer):
    case = {"targets": torch.tensor([[21, 0, 0]]), "start": 1, "stop": 2, "pad": 0}
    expect(answer.on(case)[1][0, 2:], torch.tensor([-100, -100]), case=case)


@ex.behaviour("stop is learned where it is the padding token's id, too")
def _(answer):
    case = {"targets": torch.tensor([[21, 2, 2]]), "start": 1, "stop": 2, "pad": 2}
    expect(answer.on(case)[1], torch.tensor([[21, 2, -100, -100]]), case=case)


@ex.behaviour("an empty row stops at once")
def _(answer):
    case = {"targets": torch.tensor([[0, 0]]), "start": 1, "stop": 2, "pad": 0}
    expect(answer.on(case)[1], torch.tensor([[2, -100, -100]]), case=case)


@ex.behaviour("padding the rows further changes none of the tokens before")
def _(answer):
    narrow, wide = answer(TARGETS, 1, 2, 0), answer(F.pad(TARGETS, (0, 2)), 1, 2, 0)
    expect((wide[0][:, :4], wide[1][:, :4]), narrow)


@ex.behaviour("rows do not meet")
def _(answer):
    both, one = answer(TARGETS, 1, 2, 0), answer(TARGETS[1:], 1, 2, 0)
    expect((both[0][1:], both[1][1:]), one)


class _Forced(NamedTuple):
    """The arguments, and what wrong answers are made of."""

    targets: Tensor
    start: int
    stop: int
    pad: int

    @property
    def lengths(self) -> Tensor:
        return (self.targets != self.pad).sum(1, keepdim=True)

    @property
    def place(self) -> Tensor:
        return torch.arange(self.targets.shape[1] + 1)

    @property
    def inputs(self) -> Tensor:
        return F.pad(self.targets, (1, 0), value=self.start)

    def outputs(self, lengths: Tensor | None = None, rest: int = -100) -> Tensor:
        """The outputs if the targets had these lengths; `rest` stands behind stop."""
        wide, m = F.pad(self.targets, (0, 1), value=self.pad), self.lengths
        m = m if lengths is None else lengths
        return wide.masked_fill(self.place == m, self.stop).masked_fill(self.place > m, rest)

    def ignored(self, row: Tensor) -> Tensor:
        """The row, -100 from the end of the real tokens on."""
        return row.masked_fill(self.place >= self.lengths, -100)


def _reads(inputs: Function) -> Function:
    """The right outputs with other inputs."""
    return lambda *a: (inputs(_Forced(*a)), _Forced(*a).outputs())


def _says(outputs: Function) -> Function:
    """The right inputs with other outputs."""
    return lambda *a: (_Forced(*a).inputs, outputs(_Forced(*a)))


def _both(pair: Function) -> Function:
    return lambda *a: pair(_Forced(*a))


def _stop_at_the_end(p: _Forced) -> Tensor:
    return p.ignored(p.outputs()).index_fill(1, torch.tensor([len(p.place) - 1]), p.stop)


WHEN = "How does the decoder learn where a sentence ends?"
WHERE = "At which position of its row does stop stand, with m real tokens?"
COUNTED = "Which number does `F.cross_entropy` ignore, and where should it stand?"
BY_ID = "Where pad and stop are the same id, what tells the one from the other?"
FIRST = "What does the decoder read before it has said anything?"
ALIGNED = "With which output does input i stand, the token that it shows or the one after it?"
FILLED = "What stands in the inputs behind the last real token?"
LENGTHS = "How many real tokens has each row, and how do you count them?"

ex.mistake(
    "the pair without the stop token",
    "The outputs end with the last real token, so the model never learns to end.",
    WHEN,
)(_says(lambda p: p.ignored(p.outputs())))
ex.mistake(
    "the pair with stop at the end of the row, behind the padding",
    "A short row says its last token, then nothing, and stop only at the very end.",
    WHERE,
)(_says(_stop_at_the_end))
ex.mistake(
    "the pair with the padding to be said, and stop behind it",
    "The model is taught to say pad, and to end where the longest row ends.",
    COUNTED,
)(_says(lambda p: F.pad(p.targets, (0, 1), value=p.stop)))
ex.mistake(
    "the pair with the padding ignored by its id, and stop behind it",
    "stop was put at the end of the padding, and is ignored itself where it has the same id.",
    WHERE,
)(
    _says(
        lambda p: (s := F.pad(p.targets, (0, 1), value=p.stop)).masked_fill(s == p.pad, -100),
    )
)
ex.mistake(
    "the pair with the padding to be said behind stop",
    "What stands behind stop counts in the loss.",
    COUNTED,
)(_says(lambda p: p.outputs(rest=p.pad)))
ex.mistake(
    "the pair with stop to be said again and again",
    "Every padded position says stop, and counts in the loss.",
    COUNTED,
)(_says(lambda p: p.outputs(rest=p.stop)))
ex.mistake(
    "the pair with 0 behind stop",
    "0 is a token like any other; the loss counts it.",
    COUNTED,
)(_says(lambda p: p.outputs(rest=0)))
ex.mistake(
    "the pair with -1 behind stop",
    "The loss takes -1 for a class and raises an error.",
    COUNTED,
)(_says(lambda p: p.outputs(rest=-1)))
ex.mistake(
    "the pair with stop ignored where it is the padding token's id",
    "The padding was looked for after stop had been written.",
    BY_ID,
)(_says(lambda p: p.outputs().masked_fill(p.outputs() == p.pad, -100)))
ex.mistake(
    "the pair with the start token among the outputs",
    "The model must say what it reads: the outputs were not moved.",
    ALIGNED,
)(_says(lambda p: p.inputs.masked_fill(p.place > p.lengths, -100)))
ex.mistake(
    "the pair with start said first, and stop behind the last token",
    "The start token is given, nobody needs to say it.",
    ALIGNED,
)(_says(lambda p: p.inputs.masked_fill(p.place > p.lengths, -100).where(p.place <= p.lengths - 0, p.stop)))
