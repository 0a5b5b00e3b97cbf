"""Exercises of chapter 10: from teacher forcing to beams."""

from __future__ import annotations

import itertools
import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function
from ..grading.observe import Broken, expect
from ._inputs import normal, some

INF = math.inf


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
        _padded(g, 3, [3, 1], 6, 6, 0),  # start is stop
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
    "the pair with the outputs one token ahead",
    "The first target is never said: the outputs were moved twice.",
    ALIGNED,
)(_says(lambda p: F.pad(p.outputs()[:, 1:], (0, 1), value=-100)))
ex.mistake(
    "the pair with stop in place of the last real token",
    "That token is never said.",
    WHERE,
)(_says(lambda p: p.outputs(p.lengths - 1)))
ex.mistake(
    "the pair with the last real token unsaid, and nothing said in its place",
    "The last output is missing along with stop.",
    WHERE,
)(_says(lambda p: p.ignored(p.outputs()).masked_fill(p.place == p.lengths - 1, -100)))
ex.mistake(
    "the pair with stop one place too late",
    "A padded place lies between the last real token and stop.",
    WHERE,
)(_says(lambda p: p.outputs(p.lengths + 1)))
ex.mistake(
    "the pair with stop where the first row stops",
    "Every row has a length of its own.",
    LENGTHS,
)(_says(lambda p: p.outputs(p.lengths[:1])))
ex.mistake(
    "the pair with stop where the longest row stops",
    "Every row has a length of its own.",
    LENGTHS,
)(_says(lambda p: p.outputs(p.lengths.max())))
ex.mistake(
    "the pair with stop in padded rows only",
    "A full row has no padding to write stop into; it needs the new column.",
    "In how many columns do the outputs of a full row find room for all targets and stop?",
)(_says(lambda p: p.ignored(p.outputs()).where(p.lengths == len(p.place) - 1, p.outputs())))
ex.mistake(
    "the pair with stop in full rows only",
    "A padded row ends without stop.",
    WHERE,
)(_says(lambda p: p.outputs().where(p.lengths == len(p.place) - 1, p.ignored(p.outputs()))))
ex.mistake(
    "the pair in which a full row is taken for an empty one",
    "`argmax` gives 0 where no padding is found, and stop is written there.",
    "What is the argmax of a row in which every entry is False?",
)(_says(lambda p: p.outputs(p.lengths % (len(p.place) - 1))))
ex.mistake(
    "the pair in which an empty row has one token",
    "The first padded place is taken for a token.",
    "What must the decoder say for a target without a token?",
)(_says(lambda p: p.outputs(p.lengths.clamp(min=1))))
ex.mistake(
    "the pair with the padding looked for as 0",
    "`pad` has no effect on the outputs.",
    LENGTHS,
)(_says(lambda p: p.outputs((p.targets != 0).sum(1, keepdim=True))))
ex.mistake(
    "the pair with the tokens above pad taken for the real ones",
    "An id may be lower than that of the padding.",
    LENGTHS,
)(_says(lambda p: p.outputs((p.targets > p.pad).sum(1, keepdim=True))))
ex.mistake(
    "the pair with the tokens below pad taken for the real ones",
    "An id may be higher than that of the padding.",
    LENGTHS,
)(_says(lambda p: p.outputs((p.targets < p.pad).sum(1, keepdim=True))))
ex.mistake(
    "the pair with inputs that begin with the first target",
    "The decoder reads the token that it must say.",
    FIRST,
)(_reads(lambda p: F.pad(p.targets, (0, 1), value=p.pad)))
ex.mistake(
    "the pair with start written over the first target",
    "The decoder reads the second target where it must say it, and never the first.",
    FIRST,
)(_reads(lambda p: F.pad(p.targets, (0, 1), value=p.pad).masked_fill(p.place == 0, p.start)))
ex.mistake(
    "the pair with start twice in the inputs",
    "The inputs were moved two places to the right.",
    ALIGNED,
)(_reads(lambda p: F.pad(p.inputs, (1, 0), value=p.start)[:, :-1]))
ex.mistake(
    "the pair with the padding token for start",
    "`start` has no effect.",
    FIRST,
)(_reads(lambda p: F.pad(p.targets, (1, 0), value=p.pad)))
ex.mistake(
    "the pair with start in the first row only",
    "`[0, 0]` is one place; every row has a first place.",
    "How do you name the first column?",
)(_reads(lambda p: torch.cat([p.inputs[:1], F.pad(p.targets, (1, 0), value=p.pad)[1:]])))
ex.mistake(
    "the pair with start and stop swapped",
    "The decoder reads stop first and must say start at the end.",
    "Which of the two does it read, and which must it say?",
)(lambda t, start, stop, pad: teacher_forcing(t, stop, start, pad))
ex.mistake(
    "the pair with stop among the inputs",
    "Nothing is said after stop, so it is never read.",
    FILLED,
)(_reads(lambda p: p.inputs.masked_fill(p.place == p.lengths + 1, p.stop)))
ex.mistake(
    "the pair with the inputs filled up with stop",
    "Nothing is said after stop, so it is never read.",
    FILLED,
)(_reads(lambda p: p.inputs.masked_fill(p.place > p.lengths, p.stop)))
ex.mistake(
    "the pair with the inputs filled up with -100",
    "The inputs are looked up in an embedding table, and that has no row -100.",
    FILLED,
)(_reads(lambda p: p.inputs.masked_fill(p.place > p.lengths, -100)))
ex.mistake(
    "the pair with the inputs filled up with 0",
    "`pad` has no effect on the inputs.",
    FILLED,
)(_reads(lambda p: p.inputs.masked_fill(p.place > p.lengths, 0)))
ex.mistake(
    "the pair with the last real token left out of the inputs",
    "The decoder does not see it when it must say stop.",
    "How many tokens has the decoder read when it must say stop?",
)(_reads(lambda p: p.inputs.masked_fill((p.place == p.lengths) & (p.place > 0), p.pad)))
ex.mistake(
    "the pair with the inputs made of the outputs, stop and -100 among them",
    "The outputs were moved one place to the right, with all that stands behind their tokens.",
    FILLED,
)(_reads(lambda p: F.pad(p.outputs()[:, :-1], (1, 0), value=p.start)))
ex.mistake(
    "the pair with nothing to say wherever pad is read",
    "The start token may have the same id as pad, and then the first target is ignored.",
    "Where pad and start are the same id, what tells the one from the other?",
)(_says(lambda p: p.outputs().masked_fill((p.inputs == p.pad), -100)))
ex.mistake(
    "the pair cut to n tokens",
    "A full row has no room for stop.",
    "How many outputs does a full row have, stop included?",
)(_both(lambda p: (p.inputs[:, :-1], p.outputs()[:, :-1])))
ex.mistake(
    "the pair with the outputs before the inputs",
    "The two results are in the wrong order.",
    "Which comes first in the docstring?",
)(_both(lambda p: (p.outputs(), p.inputs)))
ex.mistake(
    "the targets without the last token, and without the first",
    "That is how a language model learns from a text; here start and stop must be added.",
    "How many tokens are read and said for a target of m tokens?",
)(_both(lambda p: (p.targets[:, :-1], p.targets[:, 1:])))
ex.mistake(
    "the inputs alone",
    "The outputs are missing.",
    "What does the docstring say about the result?",
)(_both(lambda p: p.inputs))
ex.mistake(
    "the outputs alone",
    "The inputs are missing.",
    "What does the docstring say about the result?",
)(_both(lambda p: p.outputs()))


@ex.alternative("a list for each row")
def _(targets, start, stop, pad):
    inputs, outputs = [], []
    for row in targets.tolist():
        real = [token for token in row if token != pad]
        gap = len(row) - len(real)
        inputs.append([start, *real, *[pad] * gap])
        outputs.append([*real, stop, *[-100] * gap])
    return torch.tensor(inputs), torch.tensor(outputs)


@ex.alternative("columns joined, stop scattered")
def _(targets, start, stop, pad):
    column = targets.new_full((len(targets), 1), start)
    real = targets != pad
    outputs = torch.cat([targets.masked_fill(~real, -100), torch.full_like(column, -100)], dim=1)
    outputs = outputs.scatter(1, real.sum(1, keepdim=True), stop)
    return torch.cat([column, targets], dim=1), outputs


@ex.alternative("the first place that is not real")
def _(targets, start, stop, pad):
    wide = torch.cat([targets, torch.full_like(targets[:, :1], pad)], 1)
    gone = (wide == pad).long().cumsum(1)  # 1 at the place of stop, more behind it
    outputs = torch.where(gone == 0, wide, torch.where(gone == 1, stop, -100))
    inputs = wide.roll(1, 1)
    inputs[:, 0] = start
    return inputs, outputs


@ex.alternative("empty tensors, filled row by row")
def _(targets, start, stop, pad):
    batch, n = targets.shape
    inputs = torch.full((batch, n + 1), pad, dtype=targets.dtype)
    outputs = torch.full((batch, n + 1), -100, dtype=targets.dtype)
    for b in range(batch):
        m = int((targets[b] != pad).sum())
        inputs[b, 0], outputs[b, m] = start, stop
        inputs[b, 1 : m + 1] = outputs[b, :m] = targets[b, :m]
    return inputs, outputs


# --- 2. scheduled sampling --------------------------------------------------------------------

ex = Exercise(
    "scheduled_sampling",
    chapter="10_encoder_decoder",
    title="Scheduled sampling",
    minutes=10,
    difficulty=1,
    importance=3,
    prompt=r"""
A decoder that has only ever read right tokens has not learned to go on after its own mistakes: this
is **exposure bias**. Scheduled sampling (Bengio et al. 2015, §2.4) lets it read some of its own
words while it trains. At each position a coin decides, and `share` grows as the training goes on:

$$\text{read}_{b,i} = \begin{cases} \text{predicted}_{b,i} & \text{coin}_{b,i} < \text{share}
  \text{ and } i > 0 \\ \text{gold}_{b,i} & \text{otherwise}\end{cases}$$

- `gold` is what the decoder reads under teacher forcing, `(batch, n)` integers. Position 0 holds
  the start token, which nobody predicts: it stays.
- `predicted`, `(batch, n)` integers, holds what the model said for the same places: it is shifted
  already.
- `coins`, `(batch, n)`, are uniform numbers from 0 up to, but without, 1. Take these and draw none
  yourself: with `share` 0 all is gold, with 1 all but the start token is predicted.

Here `share` is the share of predictions; the paper's $\epsilon_i$ is that of the gold tokens.
""",
    hints=(
        "With share = 0.2, how many of a hundred tokens should be the model's own?",
        "Every position of every row has a coin of its own, and no coin counts at position 0.",
        "use = coins < share gives (batch, n) bools; what must be set in its first column before "
        "`torch.where(use, predicted, gold)`?",
    ),
)


@ex.solution
def scheduled_sampling(gold: Tensor, predicted: Tensor, coins: Tensor, share: float) -> Tensor:
    """What the decoder reads: predicted where coins < share, but gold at position 0.

    gold, predicted: ids (batch, n); coins: (batch, n) in [0, 1) -> ids (batch, n).
    """
    ### BEGIN SOLUTION
    later = torch.arange(gold.shape[1], device=gold.device) > 0  # (n,): the start token stays
    return torch.where((coins < share) & later, predicted, gold)  # (batch, n)
    ### END SOLUTION


def _coined(g: torch.Generator, batch: int, n: int, share: float) -> Case:
    gold, predicted = _ids(g, 2, batch, n)
    gold[:, 0] = 1  # the start token
    # Each row has its own order of evenly spread coins: some above the share, some below.
    coins = torch.rand(batch, n, generator=g).argsort(1).argsort(1) * (10 // n) / 10
    return {"gold": gold, "predicted": predicted, "coins": coins, "share": share}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    tie = _coined(g, 2, 4, 0.5)
    tie["coins"][:, 2] = 0.5  # not below the share
    zero = _coined(g, 2, 3, 0.0)
    zero["coins"][0, 1] = 0.0
    again = _coined(g, 2, 5, 0.45)
    again["gold"][:, 2:4] = again["gold"][:, :1]  # the start token, once more
    again["coins"][:, 3] = 0.1
    mixed = _coined(g, 2, 5, 0.65)
    mixed["coins"] = torch.tensor([[0.7, 0.1, 0.8, 0.2, 0.9], [0.3, 0.9, 0.6, 0.7, 0.1]])
    return [
        _coined(g, 1, 3, 0.35),
        _coined(g, 1, 1, 0.5),
        _coined(g, 2, 3, 0.45),
        _coined(g, 2, 3, 1.0),
        _coined(g, 3, 3, 0.25),
        _coined(g, 3, 1, 0.95),
        _coined(g, 3, 4, 0.75),
        tie,
        zero,
        again,
        mixed,
        _coined(g, 4, 5, 0.35),
    ]


GOLD = torch.tensor([[1, 11, 12, 13], [1, 21, 22, 23]])
PREDICTED = torch.tensor([[70, 71, 72, 73], [80, 81, 82, 83]])
COINS = torch.tensor([[0.1, 0.6, 0.2, 0.4], [0.3, 0.1, 0.8, 0.9]])


@ex.behaviour("with share 0 it is teacher forcing: all gold")
def _(answer):
    expect(answer(GOLD, PREDICTED, 0.0 * COINS, 0.0), GOLD)


@ex.behaviour("with share 1 all but the start token is predicted")
def _(answer):
    expect(answer(GOLD, PREDICTED, COINS, 1.0)[:, 1:], PREDICTED[:, 1:])


@ex.behaviour("the start token stays, whatever its coin")
def _(answer):
    for share in (0.2, 0.5, 1.0):
        expect(answer(GOLD, PREDICTED, COINS, share)[:, 0], GOLD[:, 0])


@ex.behaviour("a low coin gives the prediction, a high one the gold token")
def _(answer):
    case = {
        "gold": torch.tensor([[1, 11, 12]]),
        "predicted": torch.tensor([[70, 71, 72]]),
        "coins": torch.tensor([[0.9, 0.2, 0.7]]),
        "share": 0.5,
    }
    expect(answer.on(case), torch.tensor([[1, 71, 12]]), case=case)


@ex.behaviour("a coin that equals the share gives the gold token")
def _(answer):
    coins = torch.full((2, 4), 0.5)
    expect(answer(GOLD, PREDICTED, coins, 0.5), GOLD)


@ex.behaviour("each position has a coin of its own")
def _(answer):
    want = torch.tensor([[1, 11, 72, 73], [1, 81, 22, 23]])
    expect(answer(GOLD, PREDICTED, COINS, 0.5), want)


@ex.behaviour("a larger share never brings back a gold token")
def _(answer):
    own = [answer(GOLD, PREDICTED, COINS, s) == PREDICTED for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    for less, more in itertools.pairwise(own):
        expect(less & more, less)


@ex.behaviour("rows do not meet")
def _(answer):
    inputs = (GOLD, PREDICTED, COINS)
    expect(answer(*inputs, 0.5)[1:], answer(*(x[1:] for x in inputs), 0.5))


def _choose(own: Function) -> Function:
    """Predicted where `own(coins, share)` says so, but never at position 0."""

    def function(gold, predicted, coins, share):
        use = own(coins, share).expand(gold.shape) & (torch.arange(gold.shape[1]) > 0)
        return torch.where(use, predicted, gold)

    return function


def _from(first: int) -> Function:
    """Predicted where the coin says so, from position `first` on."""

    def function(gold, predicted, coins, share):
        return torch.where(
            (coins < share) & (torch.arange(gold.shape[1]) >= first), predicted, gold
        )

    return function


def _later(x: Tensor) -> Tensor:
    """One place to the right, with the first of each row again in front."""
    return torch.cat([x[:, :1], x[:, :-1]], 1)


DIRECTION = "Which tokens should be the model's own: those with a low coin or with a high one?"
OWN_COIN = "How many coins are there, and for how many positions does each decide?"
START = "At which position stands the start token, and who predicts it?"
SAME_PLACE = "For which place has the model said `predicted[b, i]`?"

ex.mistake(
    "the mix with gold and predicted swapped",
    "Low coins give gold tokens, high ones predictions.",
    DIRECTION,
)(_choose(lambda c, s: c >= s))
ex.mistake(
    "the mix with gold and predicted swapped, and the coin that equals the share gold",
    "Low coins give gold tokens: the comparison is > where it should be <.",
    DIRECTION,
)(_choose(lambda c, s: c > s))
ex.mistake(
    "the mix with gold and predicted swapped, the start token too",
    "Low coins give gold tokens, high ones predictions, and position 0 is treated like the others.",
    DIRECTION,
)(lambda gold, predicted, c, s: torch.where(c < s, gold, predicted))
ex.mistake(
    "the mix with coins above the share taken for predicted, the start token's too",
    "The comparison is > where it should be <, and position 0 is treated like the others.",
    DIRECTION,
)(lambda gold, predicted, c, s: torch.where(c > s, predicted, gold))
ex.mistake(
    "the mix with the start token replaced",
    "At position 0 the decoder reads a prediction for a token that nobody predicts.",
    START,
)(_from(0))
ex.mistake(
    "the mix with the start token always replaced",
    "Position 0 was left to the prediction instead of to gold.",
    START,
)(
    lambda gold, predicted, c, s: torch.where(
        (c < s) | (torch.arange(gold.shape[1]) == 0), predicted, gold
    )
)
ex.mistake(
    "the mix with the first two positions gold",
    "Only the start token is never predicted.",
    START,
)(_from(2))
ex.mistake(
    "the mix with the last position gold instead of the first",
    "The start token stands at the other end.",
    START,
)(
    lambda gold, predicted, c, s: torch.where(
        (c < s) & (torch.arange(gold.shape[1]) < gold.shape[1] - 1), predicted, gold
    )
)
ex.mistake(
    "the mix with the first row gold instead of the first position",
    "`[0]` is the first sentence; the start tokens stand in the first column.",
    START,
)(
    lambda gold, predicted, c, s: torch.where(
        (c < s) & (torch.arange(len(gold))[:, None] > 0), predicted, gold
    )
)
ex.mistake(
    "the mix with every token gold that equals the start token",
    "The start token is known by its place; the same id may stand further back.",
    START,
)(lambda gold, predicted, c, s: torch.where((c < s) & (gold != gold[:, :1]), predicted, gold))
ex.mistake(
    "the mix with a coin that equals the share taken for predicted",
    "The comparison is <= where it should be <: with share 0, a coin of 0 gives a prediction.",
    "What must come out with share 0, whatever the coins?",
)(_choose(lambda c, s: c <= s))
ex.mistake(
    "the mix with share taken for the share of gold tokens",
    "That is the paper's epsilon: here `share` counts the predictions.",
    "With share 0, are all tokens gold or none?",
)(_choose(lambda c, s: c < 1 - s))
ex.mistake(
    "the mix with coins above 1 - share",
    "As many tokens are predicted, but not those that the coins choose.",
    DIRECTION,
)(_choose(lambda c, s: c > 1 - s))
ex.mistake(
    "the mix with one coin for each row",
    "A whole sentence is gold or predicted.",
    OWN_COIN,
)(_choose(lambda c, s: c[:, :1] < s))
ex.mistake(
    "the mix with one coin for each position, in all rows",
    "The first row's coins decide for every row.",
    OWN_COIN,
)(_choose(lambda c, s: c[:1] < s))
ex.mistake(
    "the mix with one coin for everything",
    "The first coin decides for the whole batch.",
    OWN_COIN,
)(_choose(lambda c, s: c[:1, :1] < s))
ex.mistake(
    "the mix with a row predicted where its mean coin is below the share",
    "The coins of a row were averaged before they were compared.",
    OWN_COIN,
)(_choose(lambda c, s: c.mean(1, keepdim=True) < s))
ex.mistake(
    "the mix with a row predicted where any of its coins is below the share",
    "One low coin decides for the whole row.",
    OWN_COIN,
)(_choose(lambda c, s: (c < s).any(1, keepdim=True)))
ex.mistake(
    "the mix that stays with the predictions after the first one",
    "After a prediction the next token may be gold again.",
    OWN_COIN,
)(_choose(lambda c, s: ((c < s) & (torch.arange(c.shape[1]) > 0)).cumsum(1) > 0))
ex.mistake(
    "the mix that stays with gold after the first high coin",
    "After a gold token the next one may be predicted again.",
    OWN_COIN,
)(_choose(lambda c, s: (c < s).long().cumprod(1) > 0))
ex.mistake(
    "the mix with the coins one place too late",
    "Position i is decided by the coin of position i - 1.",
    OWN_COIN,
)(_choose(lambda c, s: _later(c) < s))
ex.mistake(
    "the mix with a fixed share of 0.5",
    "`share` has no effect.",
    "Where does `share` enter?",
)(_choose(lambda c, s: c < 0.5))
ex.mistake(
    "the mix with the first positions gold and the last ones predicted",
    "The coins have no effect: a share of each row was cut off.",
    "Where do the coins enter?",
)(
    _choose(
        lambda c, s: (torch.arange(c.shape[1]) >= c.shape[1] - int(s * c.shape[1])) & (c > -1),
    )
)
ex.mistake(
    "the predictions after the start token",
    "That is free running: the coins have no effect.",
    "Where do the coins enter?",
)(_choose(lambda c, s: c > -1))
ex.mistake(
    "the mix with the predictions shifted once more",
    "Position i reads what was said for position i - 1.",
    SAME_PLACE,
)(lambda gold, predicted, c, s: scheduled_sampling(gold, _later(predicted), c, s))
ex.mistake(
    "the mix with the predictions shifted back",
    "Position i reads what was said for position i + 1, which it is yet to say.",
    SAME_PLACE,
)(
    lambda gold, predicted, c, s: scheduled_sampling(
        gold, torch.cat([predicted[:, 1:], predicted[:, -1:]], 1), c, s
    )
)
ex.mistake(
    "the mix with the gold tokens shifted",
    "gold begins with the start token already.",
    "What stands in gold's first column?",
)(lambda gold, predicted, c, s: scheduled_sampling(_later(gold), predicted, c, s))
ex.mistake(
    "a weighted average of the ids",
    "An id is a name; the number between two names is a third token, or none.",
    "Is what you read at each position one of the two tokens?",
)(lambda gold, predicted, c, s: torch.lerp(gold.float(), predicted.float(), s))
ex.mistake(
    "the positions to predict instead of the tokens",
    "The mask comes back and not what it chooses.",
    "What does the docstring say about the result?",
)(lambda gold, predicted, c, s: (c < s) & (torch.arange(gold.shape[1]) > 0))
ex.mistake(
    "the mix without the start token",
    "Position 0 was cut off.",
    "What shape must the result have?",
)(lambda *a: scheduled_sampling(*a)[:, 1:])


@ex.alternative("a copy of gold, written into where the mask says")
def _(gold, predicted, coins, share):
    use = coins < share
    use[:, 0] = False
    read = gold.clone()
    read[use] = predicted[use]
    return read


@ex.alternative("the start column and the rest, joined")
def _(gold, predicted, coins, share):
    rest = torch.where(coins[:, 1:] >= share, gold[:, 1:], predicted[:, 1:])
    return torch.cat([gold[:, :1], rest], dim=1)


@ex.alternative("a loop over rows and positions")
def _(gold, predicted, coins, share):
    rows = []
    for row, said, tossed in zip(gold.tolist(), predicted.tolist(), coins.tolist(), strict=True):
        pairs = zip(row[1:], said[1:], tossed[1:], strict=True)
        rows.append([row[0], *(p if coin < share else t for t, p, coin in pairs)])
    return torch.tensor(rows)


@ex.alternative("arithmetic with the mask")
def _(gold, predicted, coins, share):
    use = (coins < share).long()
    mixed = use * predicted + (1 - use) * gold
    mixed[:, 0] = gold[:, 0]
    return mixed


# --- 3. Bahdanau's scores ---------------------------------------------------------------------

ex = Exercise(
    "bahdanau_scores",
    chapter="10_encoder_decoder",
    title="Bahdanau's scores",
    minutes=15,
    difficulty=2,
    importance=3,
    prompt=r"""
Before the dot product there was **additive attention** (Bahdanau, Cho & Bengio 2015, Appendix
A.1.2). A small network compares the decoder's state, the query, with each state of the encoder, the
keys:

$$S_{j} = v^\top \tanh(q\,W + k_j\,U)$$

Query and keys may have different widths: $W$ and $U$ bring both to width $d$, and $v$ makes one
number of it. Nothing is scaled, and the softmax comes later.

`query` is `(batch, d_q)`: one decoder step for each sentence. `keys` is `(batch, n, d_k)`, `w`
`(d_q, d)`, `u` `(d_k, d)`, `v` `(d,)`, and the scores are `(batch, n)`. Numbers may be large:
`torch.tanh` has no trouble with them.
""",
    hints=(
        "How many scores does one query give, and what differs from one to the next?",
        "query @ w is (batch, d), keys @ u is (batch, n, d): each sentence's one vector must meet "
        "its own n vectors.",
        "(query @ w)[:, None] has the shape (batch, 1, d), so its sum with keys @ u broadcasts; "
        "what is left to do with tanh and v?",
    ),
)


@ex.solution
def bahdanau_scores(query: Tensor, keys: Tensor, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Additive attention scores, v · tanh(q W + k U), not normalised.

    query: (batch, d_q), keys: (batch, n, d_k), w: (d_q, d), u: (d_k, d), v: (d,) -> (batch, n).
    """
    ### BEGIN SOLUTION
    asked = (query @ w)[:, None]  # (batch, d_q) x (d_q, d) -> (batch, 1, d)
    hidden = torch.tanh(asked + keys @ u)  # (batch, 1, d) + (batch, n, d) -> (batch, n, d)
    return hidden @ v  # (batch, n, d) x (d,) -> (batch, n)
    ### END SOLUTION


def _additive(g: torch.Generator, *sizes: int) -> Case:
    batch, n, d_q, d_k, d = sizes
    shapes = {
        "query": (batch, d_q),
        "keys": (batch, n, d_k),
        "w": (d_q, d),
        "u": (d_k, d),
        "v": (d,),
    }
    return {name: normal(g, *shape) for name, shape in shapes.items()}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    large = _additive(g, 1, 3, 2, 2, 2)
    large["query"] = torch.tensor([[300.0, -200.0]])
    large["w"] = large["u"] = torch.eye(2)
    return [
        _additive(g, 1, 2, 1, 1, 2),
        _additive(g, 1, 1, 1, 1, 1),
        _additive(g, 2, 3, 2, 3, 4),
        _additive(g, 2, 2, 2, 2, 2),
        _additive(g, 3, 3, 3, 3, 3),
        _additive(g, 2, 4, 3, 3, 2),
        _additive(g, 1, 4, 2, 3, 3),
        _additive(g, 3, 1, 4, 2, 3),
        large,
        _additive(g, 3, 5, 3, 2, 4),
    ]


def _qkwuv(seed: int) -> list[Tensor]:
    return some(seed, (2, 2), (2, 3, 4), (2, 3), (4, 3), (3,))


@ex.behaviour("a query and keys of zeros give the score 0")
def _(answer):
    query, keys, w, u, v = _qkwuv(1)
    expect(answer(0 * query, 0 * keys, w, u, v), torch.zeros(2, 3))


@ex.behaviour("with widths of 1 the score is v · tanh(q w + k u)")
def _(answer):
    one = torch.ones(1, 1)
    case = {"query": one / 2, "keys": one[None] / 4, "w": one, "u": 2 * one, "v": 3 * one[0]}
    expect(answer.on(case), 3 * torch.tanh(one), case=case)


@ex.behaviour("no score is larger than the sum of |v|")
def _(answer):
    query, keys, w, u, v = _qkwuv(2)
    scores, most = answer(50 * query, 50 * keys, w, u, v), v.abs().sum()
    expect(scores.clamp(-most, most), scores)


@ex.behaviour("doubling v doubles the scores")
def _(answer):
    query, keys, w, u, v = _qkwuv(3)
    expect(answer(query, keys, w, u, 2 * v), 2 * answer(query, keys, w, u, v))


@ex.behaviour("query and keys are added before tanh: what one gains the other can lose")
def _(answer):
    query, keys, v = some(4, (2, 3), (2, 4, 3), (3,))
    shift, one = torch.tensor([0.5, -1.0, 2.0]), torch.eye(3)
    expect(answer(query + shift, keys - shift, one, one, v), answer(query, keys, one, one, v))


@ex.behaviour("score j depends on key j alone")
def _(answer):
    query, keys, w, u, v = _qkwuv(5)
    other = keys.clone()
    other[:, 1] += 1
    expect(answer(query, other, w, u, v)[:, ::2], answer(query, keys, w, u, v)[:, ::2])


@ex.behaviour("each sentence's keys meet its own query")
def _(answer):
    query, keys, w, u, v = _qkwuv(6)
    expect(answer(query, keys, w, u, v)[1:], answer(query[1:], keys[1:], w, u, v))


def _scores(*, join=operator.add, bend=torch.tanh, read=torch.matmul) -> Function:
    """The scores with one part replaced."""

    def function(query, keys, w, u, v):
        return read(bend(join((query @ w)[:, None], keys @ u)), v)

    return function


def _then(change: Function) -> Function:
    """The right scores, changed: change(scores, query, keys, v)."""
    return lambda q, k, w, u, v: change(bahdanau_scores(q, k, w, u, v), q, k, v)


def _tanh_by_hand(x: Tensor) -> Tensor:
    return (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())


LINEAR = "Which function stands between the sum and v?"
OTHER = "Is that the function of the formula?"
INSIDE = "What stands inside the tanh, and what outside?"
SUM = "How do q W and k U meet?"
BY_V = "What makes one number of the d numbers, and how?"
RAW = "Are scores or weights asked, and is anything said of a scale?"
WHOSE = "Which matrix belongs to the query, and which to the keys?"
SHAPES = "What shapes must query @ w and keys @ u have when they meet?"

ex.mistake(
    "the scores without tanh",
    "v · (q W + k U) is linear: the query adds the same number to all scores, and softmax loses "
    "it.",
    LINEAR,
)(_scores(bend=lambda x: x))
ex.mistake("the scores with relu instead of tanh", "Negative sums are lost.", OTHER)(
    _scores(bend=torch.relu)
)
ex.mistake("the scores with sigmoid instead of tanh", "Zeros do not give 0.", OTHER)(
    _scores(bend=torch.sigmoid)
)
ex.mistake("the scores with gelu instead of tanh", "Large sums are not bounded.", OTHER)(
    _scores(bend=F.gelu)
)
ex.mistake(
    "the scores with hardtanh instead of tanh",
    "It is bounded, but straight between -1 and 1.",
    OTHER,
)(_scores(bend=F.hardtanh))
ex.mistake(
    "the scores with sin instead of tanh",
    "It goes up and down, where a larger sum should never count for less.",
    OTHER,
)(_scores(bend=torch.sin))
ex.mistake(
    "the scores with tanh made of exp, which overflows",
    "exp of a large sum is inf, and inf / inf is NaN.",
    "Which function of PyTorch does not overflow?",
)(_scores(bend=_tanh_by_hand))
ex.mistake(
    "the scores with tanh after v instead of before",
    "The sum over the features is squashed, not the features.",
    INSIDE,
)(_scores(bend=lambda x: x, read=lambda x, v: (x @ v).tanh()))
ex.mistake(
    "the scores with tanh before v and once more after it",
    "The scores can no longer leave -1 to 1.",
    INSIDE,
)(_scores(read=lambda x, v: (x @ v).tanh()))
ex.mistake(
    "the scores with tanh of v times the sum",
    "v stands inside the tanh.",
    INSIDE,
)(_scores(bend=lambda x: x, read=lambda x, v: (x * v).tanh().sum(-1)))
ex.mistake(
    "the scores with tanh of query and keys apart",
    "tanh(a) + tanh(b) is not tanh(a + b): query and keys do not interact.",
    INSIDE,
)(_scores(join=lambda a, b: a.tanh() + b.tanh(), bend=lambda x: x))
ex.mistake(
    "the scores with tanh of the keys alone",
    "The query is added outside the tanh.",
    INSIDE,
)(_scores(join=lambda a, b: a + b.tanh(), bend=lambda x: x))
ex.mistake(
    "the scores with tanh of the query alone",
    "The keys are added outside the tanh.",
    INSIDE,
)(_scores(join=lambda a, b: a.tanh() + b, bend=lambda x: x))
ex.mistake("the scores with q W and k U multiplied", "The two meet in a product.", SUM)(
    _scores(join=operator.mul)
)
ex.mistake("the scores with k U subtracted", "The two meet in a difference.", SUM)(
    _scores(join=operator.sub)
)
ex.mistake("the scores with q W subtracted", "The two meet in a difference.", SUM)(
    _scores(join=lambda a, b: b - a)
)
ex.mistake("the scores with the mean of q W and k U", "The sum is halved before tanh.", SUM)(
    _scores(join=lambda a, b: (a + b) / 2)
)
ex.mistake(
    "the scores without the query",
    "Every query would look at the same keys.",
    "Where does the query enter?",
)(_scores(join=lambda a, b: b))
ex.mistake(
    "the scores without the keys",
    "All scores of a query are the same.",
    "Where do the keys enter?",
)(_scores(join=lambda a, b: a + 0 * b))
ex.mistake(
    "the dot products of q W and k U",
    "That is multiplicative attention: tanh and v have no effect.",
    SUM,
)(_scores(join=operator.mul, bend=lambda x: x, read=lambda x, v: x.sum(-1)))
ex.mistake(
    "the dot products of q W and k U, weighted by v",
    "tanh has no effect, and the two meet in a product.",
    SUM,
)(_scores(join=operator.mul, bend=lambda x: x))
ex.mistake(
    "the dot products of query and keys",
    "w, u and v have no effect, and the widths must agree.",
    "Where do w, u and v enter?",
)(lambda q, k, w, u, v: (k @ q[..., None])[..., 0])
ex.mistake("the sum over the features, without v", "v has no effect.", BY_V)(
    _scores(read=lambda x, v: x.sum(-1))
)
ex.mistake("the mean over the features, weighted by v", "The sum is divided by d.", BY_V)(
    _scores(read=lambda x, v: (x * v).mean(-1))
)
ex.mistake("the features times v, not summed", "The sum over d is missing.", BY_V)(
    _scores(read=lambda x, v: x * v)
)
ex.mistake("the features, without v", "They were not made into one number.", BY_V)(
    _scores(read=lambda x, v: x)
)
ex.mistake("the largest feature times v", "A maximum stands where the sum should.", BY_V)(
    _scores(read=lambda x, v: (x * v).amax(-1))
)
ex.mistake("the scores with v brought to length 1", "v is divided by its norm.", BY_V)(
    _scores(read=lambda x, v: x @ (v / v.norm()))
)
ex.mistake("the scores divided by √d", "That scale belongs to the dot product.", RAW)(
    _then(lambda s, q, k, v: s / len(v) ** 0.5)
)
ex.mistake("the scores divided by √d_k", "That scale belongs to the dot product.", RAW)(
    _then(lambda s, q, k, v: s / k.shape[-1] ** 0.5)
)
ex.mistake(
    "the scores with the sum divided by √d before tanh",
    "That scale belongs to the dot product.",
    RAW,
)(_scores(bend=lambda x: (x / x.shape[-1] ** 0.5).tanh()))
ex.mistake("the weights instead of the scores", "A softmax over the keys is included.", RAW)(
    _then(lambda s, q, k, v: s.softmax(-1))
)
ex.mistake(
    "the softmax of the scores over the batch",
    "The sentences compete with one another, and no softmax is asked.",
    RAW,
)(_then(lambda s, q, k, v: s.softmax(0)))
ex.mistake("the logarithms of the weights", "A log-softmax is included.", RAW)(
    _then(lambda s, q, k, v: s.log_softmax(-1))
)
ex.mistake("the scores with w and u swapped", "Each has the other's matrix.", WHOSE)(
    lambda q, k, w, u, v: bahdanau_scores(q, k, u, w, v)
)
ex.mistake("the scores with w for the keys, too", "u has no effect.", WHOSE)(
    lambda q, k, w, u, v: bahdanau_scores(q, k, w, w, v)
)
ex.mistake("the scores with u for the query, too", "w has no effect.", WHOSE)(
    lambda q, k, w, u, v: bahdanau_scores(q, k, u, u, v)
)
ex.mistake(
    "the scores with both matrices transposed",
    "w and u are given as (width in, width out), not as `nn.Linear` keeps its weight.",
    SHAPES,
)(lambda q, k, w, u, v: bahdanau_scores(q, k, w.mT, u.mT, v))
ex.mistake(
    "the scores with the queries laid along the keys",
    "(batch, d) meets (batch, n, d) from the right: key j gets the query of sentence j.",
    SHAPES,
)(lambda q, k, w, u, v: ((q @ w) + (k @ u)).tanh() @ v)
ex.mistake(
    "the scores with the queries repeated in the wrong order",
    "`repeat` lays the whole batch out again and again, where each query should stand n times.",
    SHAPES,
)(
    lambda q, k, w, u, v: (
        ((q @ w).repeat(k.shape[1], 1).reshape(*k.shape[:2], -1) + k @ u).tanh() @ v
    )
)
ex.mistake(
    "the scores with the first sentence's query for all",
    "`query[0]` stands where the whole batch should.",
    "Which query meets the keys of the second sentence?",
)(lambda q, k, w, u, v: bahdanau_scores(q[:1].expand_as(q), k, w, u, v))
ex.mistake(
    "the scores transposed",
    "Sentences and keys have changed places.",
    "What shape must the scores have?",
)(_then(lambda s, q, k, v: s.mT))


@ex.alternative("einsum")
def _(query, keys, w, u, v):
    asked = torch.einsum("bi,id->bd", query, w)
    shown = torch.einsum("bnj,jd->bnd", keys, u)
    return torch.einsum("bnd,d->bn", torch.tanh(asked.unsqueeze(1) + shown), v)


@ex.alternative("a loop over sentences and keys")
def _(query, keys, w, u, v):
    rows = [
        torch.stack([torch.tanh(q @ w + key @ u).dot(v) for key in sentence])
        for q, sentence in zip(query, keys, strict=True)
    ]
    return torch.stack(rows)


@ex.alternative("query and key side by side, one matrix for both")
def _(query, keys, w, u, v):
    pairs = torch.cat([query[:, None].expand(-1, keys.shape[1], -1), keys], dim=-1)
    return (v * (pairs @ torch.cat([w, u])).tanh()).sum(dim=-1)


@ex.alternative("F.linear, and tanh as 2 · sigmoid(2x) - 1")
def _(query, keys, w, u, v):
    total = F.linear(query, w.T).unsqueeze(-2) + F.linear(keys, u.T)
    return F.linear(2 * torch.sigmoid(2 * total) - 1, v[None]).squeeze(-1)


@ex.alternative("in float64, and back")
def _(query, keys, w, u, v):
    wide = [x.double() for x in (query, keys, w, u, v)]
    return bahdanau_scores(*wide).to(query.dtype)


# --- 4. one step of beam search ---------------------------------------------------------------

ex = Exercise(
    "beam_step",
    chapter="10_encoder_decoder",
    title="One step of beam search",
    minutes=20,
    difficulty=3,
    importance=4,
    points=2,
    prompt=r"""
Beam search keeps several beginnings of a sentence, the **beams**. In each step every beam $b$ is
continued by every token $t$, and the `num_beams` best continuations of all are kept. The
probability of a sentence is a product, so its logarithm is a sum:

$$\text{total}_{b,t} = \text{score}_b + \log p(t \mid \text{beam } b)$$

`scores` is `(batch, beams)`. `log_probs` is `(batch, beams, V)` and holds logarithms of
probabilities already. Return three tensors, each `(batch, num_beams)`, **the best first**:

- the new scores, that is the totals of the kept continuations,
- `parent`, the beam that each one continues, from 0 to beams - 1 (integers),
- `token`, the token that it adds, from 0 to V - 1 (integers).

A good beam may have several children and a poor one none. `num_beams` may differ from the number of
beams that come in, and may be larger than V. A score of `-inf` belongs to a beam that has not
begun. No two of the best totals are equal.
""",
    hints=(
        "Do the beams of a sentence compete with one another, or each with itself?",
        "Lay the beams · V totals of a sentence in one row and take the best num_beams. Place p in "
        "that row was beam p // V and token p % V.",
        "total = scores[:, :, None] + log_probs has the shape (batch, beams, V); what do "
        "`flatten(1)` and `topk` make of it?",
    ),
)


@ex.solution
def beam_step(scores: Tensor, log_probs: Tensor, num_beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best continuations of all beams: (new scores, parent, token), each (batch, num_beams).

    scores: (batch, beams), log_probs: (batch, beams, V).
    """
    ### BEGIN SOLUTION
    V = log_probs.shape[-1]
    total = scores[:, :, None] + log_probs  # (batch, beams, 1) + (batch, beams, V)
    best, place = total.flatten(1).topk(num_beams)  # (batch, beams · V) -> (batch, num_beams)
    return best, place // V, place % V  # a row of places is beam after beam, V tokens each
    ### END SOLUTION


def _beams(g: torch.Generator, *sizes: int, far: float = 0.0) -> Case:
    """A step in which no two totals of a sentence are equal; far: added to the scores."""
    batch, beams, V, num_beams = sizes
    while True:
        log_probs = -torch.randint(1, 40, (batch, beams, V), generator=g) / 10
        scores = far - torch.randint(1, 20, (batch, beams), generator=g) / 10
        totals = (scores[..., None] + log_probs).flatten(1).sort().values
        if totals.shape[1] == 1 or totals.diff().min() > 0.05:
            return {"scores": scores, "log_probs": log_probs, "num_beams": num_beams}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    beginning = _beams(g, 2, 3, 3, 3)
    beginning["scores"][:, 1:] -= 1000  # as good as -inf, but for the ties
    forbidden = _beams(g, 2, 2, 4, 3)
    forbidden["log_probs"][:, 0, 1] = -INF
    crowded = _beams(g, 1, 3, 4, 3)
    crowded["scores"] = torch.tensor([[-9.0, -0.5, -9.5]])  # all children have one parent
    return [
        _beams(g, 1, 2, 3, 2),
        _beams(g, 1, 1, 3, 2),
        _beams(g, 1, 1, 1, 1),
        _beams(g, 2, 2, 2, 2),
        _beams(g, 2, 2, 4, 3),
        _beams(g, 2, 3, 2, 4),
        _beams(g, 3, 3, 3, 3),
        _beams(g, 2, 3, 4, 1),
        beginning,
        forbidden,
        crowded,
        _beams(g, 1, 2, 3, 2, far=-200.0),  # a long sentence: exp(-200) is 0 in float32
        _beams(g, 2, 4, 3, 2),
        _beams(g, 3, 2, 5, 2),
    ]


SCORES = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])
LOG_PROBS = torch.tensor(
    [
        [[-0.5, -3.0, -1.5], [-4.0, -0.25, -2.0]],
        [[-0.75, -2.5, -0.5], [-0.25, -3.5, -1.0]],
    ]
)


@ex.behaviour("one beam is continued by its likeliest tokens")
def _(answer):
    case = {
        "scores": torch.tensor([[-1.0]]),
        "log_probs": torch.tensor([[[-2.0, -0.5, -1.0]]]),
        "num_beams": 2,
    }
    want = torch.tensor([[-1.5, -2.0]]), torch.tensor([[0, 0]]), torch.tensor([[1, 2]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("a new score is the parent's score plus the token's log-probability")
def _(answer):
    best, parent, token = answer(SCORES, LOG_PROBS, 3)
    rows = torch.arange(2)[:, None]
    parent, token = parent.clamp(0, 1), token.clamp(0, 2)
    expect(best, SCORES[rows, parent] + LOG_PROBS[rows, parent, token])


@ex.behaviour("the best continuation stands first")
def _(answer):
    best = answer(SCORES, LOG_PROBS, 4)[0]
    expect(best, best.sort(descending=True).values)


@ex.behaviour("nothing that was left out is better than what was kept")
def _(answer):
    want = torch.tensor([[-1.5, -2.25, -2.5], [-1.25, -2.0, -3.5]])
    expect(answer(SCORES, LOG_PROBS, 3)[0], want)


@ex.behaviour("a good beam may have all the children")
def _(answer):
    case = {
        "scores": torch.tensor([[-9.0, -1.0]]),
        "log_probs": torch.tensor([[[-0.5, -1.0], [-2.0, -3.0]]]),
        "num_beams": 2,
    }
    expect(answer.on(case)[1], torch.tensor([[1, 1]]), case=case)


@ex.behaviour("a beam that has not begun has no child where another one can have it")
def _(answer):
    case = {
        "scores": torch.tensor([[0.0, -INF]]),
        "log_probs": torch.tensor([[[-1.0, -0.5], [-0.1, -2.0]]]),
        "num_beams": 2,
    }
    want = torch.tensor([[-0.5, -1.0]]), torch.tensor([[0, 0]]), torch.tensor([[1, 0]])
    expect(answer.on(case), want, case=case)


@ex.behaviour("parents are beams and tokens are tokens")
def _(answer):
    _, parent, token = answer(SCORES, LOG_PROBS, 6)
    if parent.min() < 0 or parent.max() > 1:
        raise Broken(f"with 2 beams, a parent is {parent.max().item()}")
    if token.min() < 0 or token.max() > 2:
        raise Broken(f"with 3 tokens, a token is {token.max().item()}")


@ex.behaviour("the beams of one sentence do not meet those of another")
def _(answer):
    both, one = answer(SCORES, LOG_PROBS, 2), answer(SCORES[1:], LOG_PROBS[1:], 2)
    expect(tuple(result[1:] for result in both), one)


def _add(scores: Tensor, log_probs: Tensor) -> Tensor:
    return scores[..., None] + log_probs


def _take(total: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    """The best totals and their places in a row of beams · V."""
    return total.flatten(1).topk(num_beams)


def _same(best: Tensor, parent: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return best, parent, token


def _step(*, total=_add, take=_take, give=_same) -> Function:
    """The step with one part replaced."""

    def function(scores, log_probs, num_beams):
        best, place = take(total(scores, log_probs), num_beams)
        V = log_probs.shape[-1]
        return give(best, place // V, place % V)

    return function


def _decode(parent: Function, token: Function) -> Function:
    """The right choice; parent(p, log_probs) and token(p, log_probs) decode its place p."""

    def function(scores, log_probs, num_beams):
        best, place = _take(_add(scores, log_probs), num_beams)
        return best, parent(place, log_probs), token(place, log_probs)

    return function


def _right_token(place: Tensor, log_probs: Tensor) -> Tensor:
    return place % log_probs.shape[-1]


def _right_parent(place: Tensor, log_probs: Tensor) -> Tensor:
    return place // log_probs.shape[-1]


def _ranked_by(rank: Function) -> Function:
    """Chosen by `rank(scores, log_probs)`, with the right totals."""

    def function(scores, log_probs, num_beams):
        place = rank(scores, log_probs).flatten(1).topk(num_beams).indices
        V = log_probs.shape[-1]
        return _add(scores, log_probs).flatten(1).gather(1, place), place // V, place % V

    return function


def _one_each(total: Tensor) -> tuple[Tensor, Tensor]:
    """The best continuation of each beam, and its place."""
    best, token = total.max(-1)  # (batch, beams)
    return best, token + total.shape[-1] * torch.arange(total.shape[1])


def _one_each_sorted(total: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    best, place = _one_each(total)
    best, order = best.topk(num_beams)
    return best, place.gather(1, order)


def _one_per_token(total: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    best, beam = total.max(1)  # (batch, V)
    best, token = best.topk(num_beams)
    return best, beam.gather(1, token) * total.shape[-1] + token


def _whole_batch(total: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    best, place = total.flatten().topk(num_beams)
    return best.expand(len(total), -1), place.expand(len(total), -1) % total[0].numel()


def _worst(total: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    return total.flatten(1).topk(num_beams, largest=False)


def _by_place(total: Tensor, num_beams: int) -> tuple[Tensor, Tensor]:
    place = _take(total, num_beams)[1].sort().values
    return total.flatten(1).gather(1, place), place


ACCUMULATE = "What is the log-probability of the whole sentence so far?"
LOGS = "The probability of a sentence is a product; what is its logarithm?"
COMPETE = "How many continuations does a sentence have in all, and which of them compete?"
PLACE = "Place p lies in a row of beams · V totals. How many places belong to one beam?"
ORDER = "In which order should the continuations come back?"

ex.mistake(
    "the step without the scores so far",
    "Only the last token counts: what the beams have cost before is forgotten.",
    ACCUMULATE,
)(_step(total=lambda s, lp: lp))
ex.mistake(
    "the step chosen by the last token alone, with the right totals",
    "The continuations are ranked before the scores are added.",
    ACCUMULATE,
)(_ranked_by(lambda s, lp: lp))
ex.mistake(
    "the right step, but with the last token's log-probability for a score",
    "The scores do not accumulate: the next step will not know what came before.",
    ACCUMULATE,
)(
    lambda s, lp, k: (
        lp.flatten(1).gather(1, (p := _take(_add(s, lp), k)[1])),
        p // lp.shape[-1],
        p % lp.shape[-1],
    )
)
ex.mistake("the step with scores times log-probabilities", "Logarithms are multiplied.", LOGS)(
    _step(total=lambda s, lp: s[..., None] * lp)
)
ex.mistake("the step with log-probabilities subtracted", "A difference stands for the sum.", LOGS)(
    _step(total=lambda s, lp: s[..., None] - lp)
)
ex.mistake(
    "the step with probabilities added to the scores",
    "exp was applied to `log_probs`, and the sum mixes logarithms with probabilities.",
    LOGS,
)(_step(total=lambda s, lp: s[..., None] + lp.exp()))
ex.mistake(
    "the step with probabilities for scores",
    "The continuations are right, but exp was applied to their scores.",
    LOGS,
)(_step(give=lambda best, parent, token: (best.exp(), parent, token)))
ex.mistake(
    "the step with the logarithm of a product of probabilities",
    "exp of a long sentence's score underflows to 0.",
    "What is exp(-200) in float32, and do you need it?",
)(_step(total=lambda s, lp: (s[..., None].exp() * lp.exp()).log()))
ex.mistake(
    "the step with log-probabilities normalised again",
    "`log_probs` holds logarithms of probabilities already.",
    "Are logits or log-probabilities given?",
)(_step(total=lambda s, lp: _add(s, lp.log_softmax(-1))))
ex.mistake(
    "the step with the logarithm taken twice",
    "`log_probs` holds logarithms already, and those of negative numbers are NaN.",
    "Are probabilities or log-probabilities given?",
)(_step(total=lambda s, lp: _add(s, lp.log())))
ex.mistake(
    "the step with the mean of score and log-probability",
    "Every step halves what came before.",
    ACCUMULATE,
)(_step(total=lambda s, lp: _add(s, lp) / 2))
ex.mistake(
    "the step with the first beam's score for all beams",
    "The beams differ by their scores.",
    "What shape must the scores have so that each meets its own beam's tokens?",
)(_step(total=lambda s, lp: s[:, :1, None] + lp))
ex.mistake(
    "the step with the scores laid along the tokens",
    "`scores[:, None]` gives each token a score instead of each beam.",
    "What shape must the scores have so that each meets its own beam's tokens?",
)(_step(total=lambda s, lp: s[:, None] + lp))
ex.mistake(
    "the step with scores and log-probabilities added as they are",
    "(batch, beams) meets (batch, beams, V) from the right: beams are laid along tokens.",
    "What shape must the scores have so that each meets its own beam's tokens?",
)(_step(total=lambda s, lp: s + lp))
ex.mistake(
    "the step with one child for each beam",
    "Each beam keeps its own best token, so that poor beams never die.",
    COMPETE,
)(_step(take=lambda total, k: _one_each(total)))
ex.mistake(
    "the step with at most one child for each beam",
    "The beams compete only with their best token.",
    COMPETE,
)(_step(take=_one_each_sorted))
ex.mistake(
    "the step that adds each token at most once",
    "Two beams may go on with the same token.",
    COMPETE,
)(_step(take=_one_per_token))
ex.mistake(
    "the step that continues the first beam alone",
    "The other beams have no child.",
    COMPETE,
)(_step(take=lambda total, k: total[:, 0].topk(k)))
ex.mistake(
    "the step that continues the best beam alone",
    "The parent is chosen before the tokens have been looked at.",
    COMPETE,
)(_ranked_by(lambda s, lp: _add(s, lp).masked_fill((s < s.amax(1, keepdim=True))[..., None], -INF)))
ex.mistake(
    "the step with the best of the whole batch in every row",
    "The sentences compete with one another.",
    "Along which dimensions do the continuations of one sentence lie?",
)(_step(take=_whole_batch))
ex.mistake(
    "the step with the worst continuations",
    "The lowest totals were taken.",
    "Is a log-probability of -1 better than one of -2?",
)(_step(take=_worst))
ex.mistake("the step with the worst of the best first", "The order is turned round.", ORDER)(
    _step(take=lambda total, k: tuple(x.flip(1) for x in _take(total, k)))
)
ex.mistake(
    "the step with the best in the order of their places",
    "They stand beam by beam, token by token.",
    ORDER,
)(_step(take=_by_place))
ex.mistake(
    "the step with the best continuation again and again",
    "The maximum was taken where the best `num_beams` are asked.",
    "How many different continuations should come back?",
)(_step(take=lambda total, k: tuple(x[:, :1].expand(-1, k) for x in _take(total, 1))))
ex.mistake(
    "the step with as many beams as came in",
    "`num_beams` has no effect.",
    "Where does `num_beams` enter?",
)(lambda s, lp, k: beam_step(s, lp, s.shape[1]))
ex.mistake(
    "the step with parent and token swapped",
    "A row of places is beam after beam, V tokens each.",
    PLACE,
)(_step(give=lambda best, parent, token: (best, token, parent)))
ex.mistake(
    "the step with places divided by the number of beams",
    "Each beam takes V places, not as many as there are beams.",
    PLACE,
)(_decode(lambda p, lp: p // lp.shape[1], lambda p, lp: p % lp.shape[1]))
ex.mistake(
    "the step with places divided by num_beams",
    "Each beam takes V places, not num_beams.",
    PLACE,
)(_decode(lambda p, lp: p // p.shape[1], lambda p, lp: p % p.shape[1]))
ex.mistake(
    "the step with places read as if all beams' first tokens came first",
    "Beam and token are decoded as p % beams and p // beams.",
    PLACE,
)(_decode(lambda p, lp: p % lp.shape[1], lambda p, lp: p // lp.shape[1]))
ex.mistake("the step with the place for a token", "A token counts from 0 to V - 1.", PLACE)(
    _decode(_right_parent, lambda p, lp: p)
)
ex.mistake("the step with the place for a parent", "A parent counts from 0 to beams - 1.", PLACE)(
    _decode(lambda p, lp: p, _right_token)
)
ex.mistake(
    "the step with the parents rounded",
    "p / V is rounded to the nearest beam, where it should be rounded down.",
    PLACE,
)(_decode(lambda p, lp: (p / lp.shape[-1]).round().long(), _right_token))
ex.mistake(
    "the step with fractions for parents",
    "/ stands where // should.",
    PLACE,
)(_decode(lambda p, lp: p / lp.shape[-1], _right_token))
ex.mistake(
    "the step with the parents counted through the batch",
    "A parent is a place among its own sentence's beams.",
    "Which numbers may a parent have in the second sentence?",
)(
    _decode(
        lambda p, lp: p // lp.shape[-1] + lp.shape[1] * torch.arange(len(lp))[:, None],
        _right_token,
    )
)
ex.mistake(
    "the step in which every beam is its own parent",
    "The kept continuations are numbered, not traced back.",
    "From which beam did the best continuation come?",
)(_decode(lambda p, lp: torch.arange(p.shape[1]).expand(p.shape), _right_token))
ex.mistake(
    "the step with places that nobody has decoded",
    "`topk` gives places in a row of beams · V totals, and each stands for a beam and a token.",
    PLACE,
)(lambda s, lp, k: _take(_add(s, lp), k))
ex.mistake(
    "the step without its scores",
    "Only parents and tokens come back.",
    "What does the docstring say about the result?",
)(_step(give=lambda best, parent, token: (parent, token)))
ex.mistake(
    "the step with the scores behind parents and tokens",
    "The three results are in the wrong order.",
    "Which comes first in the docstring?",
)(_step(give=lambda best, parent, token: (parent, token, best)))


@ex.alternative("a sort of everything")
def _(scores, log_probs, num_beams):
    total = (scores.unsqueeze(-1) + log_probs).reshape(len(scores), -1)
    best, order = torch.sort(total, dim=-1, descending=True)
    parent, token = (
        order.div(log_probs.size(-1), rounding_mode="floor"),
        order.fmod(log_probs.size(-1)),
    )
    return best[:, :num_beams], parent[:, :num_beams], token[:, :num_beams]


@ex.alternative("lists of (total, beam, token)")
def _(scores, log_probs, num_beams):
    kept = []
    for row, table in zip(_add(scores, log_probs), log_probs, strict=True):
        beams, V = table.shape
        found = [(row[b, t], b, t) for b in range(beams) for t in range(V)]
        kept.append(sorted(found, key=lambda one: -one[0].item())[:num_beams])
    best = torch.stack([torch.stack([total for total, _, _ in row]) for row in kept])
    parent = torch.tensor([[b for _, b, _ in row] for row in kept])
    return best, parent, torch.tensor([[t for _, _, t in row] for row in kept])


@ex.alternative("the best of each beam first, then the best of those")
def _(scores, log_probs, num_beams):
    few = min(num_beams, log_probs.shape[-1])  # no beam can have more children than that
    top, tokens = log_probs.topk(few, dim=-1)  # (batch, beams, few)
    best, place = (top + scores[..., None]).flatten(1).topk(num_beams)
    return best, place // few, tokens.flatten(1).gather(1, place)


@ex.alternative("the maximum, taken num_beams times")
def _(scores, log_probs, num_beams):
    total, found = _add(scores, log_probs).flatten(1), []
    for _ in range(num_beams):
        best, place = total.max(dim=1)
        found.append((best, place // log_probs.shape[2], place % log_probs.shape[2]))
        total = total.masked_fill(F.one_hot(place, total.shape[1]).bool(), -INF)
    return tuple(torch.stack(column, dim=1) for column in zip(*found, strict=True))


@ex.alternative("tokens first, decoded accordingly")
def _(scores, log_probs, num_beams):
    total = _add(scores, log_probs).mT.flatten(1)  # (batch, V · beams)
    best, place = total.topk(num_beams)
    return best, place % scores.shape[1], place // scores.shape[1]


# --- 5. BLEU ----------------------------------------------------------------------------------

ex = Exercise(
    "bleu_precision",
    chapter="10_encoder_decoder",
    title="Clipped n-grams, the heart of BLEU",
    minutes=15,
    difficulty=2,
    importance=3,
    prompt=r"""
BLEU asks how much of a translation also stands in a reference (Papineni et al. 2002, §2.1). It
counts **n-grams**, runs of n tokens that stand side by side. But a candidate that says "the" seven
times must not score seven times for a "the" that the reference has twice. So the count of each
n-gram is **clipped** by its count in the reference:

$$\text{matches} = \sum_{g} \min\big(\text{count}_\text{candidate}(g),
  \text{count}_\text{reference}(g)\big) \qquad
  \text{total} = \text{number of n-grams in the candidate}$$

with one term for each different n-gram g. The precision is matches / total. BLEU adds up both over
a whole test set before it divides, so they are returned apart: an integer tensor of shape `(2,)`,
matches first.

`candidate` and `reference` are token ids, `(length,)`, of different lengths. A text with fewer than
n tokens has no n-gram, and the total is then 0.
""",
    hints=(
        "How many runs of 2 tokens does a text of 5 tokens have, and of 1 token?",
        "Two n-grams are the same if they have the same tokens in the same order. Where they stand "
        "in the text does not matter, and how often they stand there does.",
        "grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] on lists of ids; which "
        "of `grams` and `set(grams)` do you go through, and what do you add for each?",
    ),
)


@ex.solution
def bleu_precision(candidate: Tensor, reference: Tensor, n: int) -> Tensor:
    """Clipped matches and total of the candidate's n-grams. ids (length,) twice -> ints (2,)."""
    ### BEGIN SOLUTION
    texts = candidate.tolist(), reference.tolist()
    ours, theirs = [[tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)] for ids in texts]
    # Each different n-gram once: it counts as often as both texts have it.
    matches = sum(min(ours.count(gram), theirs.count(gram)) for gram in set(ours))
    return torch.tensor([matches, len(ours)])
    ### END SOLUTION


def _named(g: torch.Generator, candidate: str, reference: str, n: int) -> Case:
    """Each letter is a token; which ids they have is drawn."""
    ids = dict(zip("abcdef", _ids(g, 6).tolist(), strict=True))
    texts = [torch.tensor([ids[letter] for letter in text]) for text in (candidate, reference)]
    return {"candidate": texts[0], "reference": texts[1], "n": n}


def _drawn(g: torch.Generator, least: int, length: int, n: int) -> Case:
    """Texts of few different tokens, so that many n-grams occur twice."""
    m = least + int(torch.randint(4, (), generator=g))
    draw = [torch.randint(1, 4, (size,), generator=g) for size in (m, length)]
    return {"candidate": draw[0], "reference": draw[1], "n": n}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    return [
        _named(g, "aab", "abc", 1),
        _named(g, "abab", "abcab", 2),
        _named(g, "aaaaaaa", "abcade", 1),
        _named(g, "ababab", "bababc", 2),
        _named(g, "abcd", "dcba", 2),
        _named(g, "abc", "dabcabc", 1),
        _named(g, "abcdab", "dab", 1),
        _named(g, "a", "abcabd", 4),  # no n-gram in the candidate
        _named(g, "ab", "cabab", 3),
        _named(g, "abcab", "ab", 3),  # none in the reference
        _named(g, "aaaa", "aaaaa", 2),  # n-grams that overlap with themselves
        _named(g, "ab", "ab", 2),
        _named(g, "aaabbb", "bbbaaaa", 3),
        _named(g, "abcabd", "eabcfabd", 4),
        _named(g, "aabaab", "aabbbbaa", 2),
        _drawn(g, 6, 4, 1),
        _drawn(g, 8, 7, 2),
        _drawn(g, 9, 12, 2),
        _drawn(g, 12, 10, 3),
    ]


def _word(*ids: int) -> Tensor:
    return torch.tensor(ids)


@ex.behaviour("a text that is its own reference matches in every n-gram")
def _(answer):
    text = _word(5, 6, 5, 7, 5)
    for n in (1, 2, 3, 4):
        expect(answer(text, text, n), torch.tensor([6 - n, 6 - n]))


@ex.behaviour("a text of m tokens has m - n + 1 n-grams, whatever the reference")
def _(answer):
    for n in (1, 2, 3, 4):
        expect(answer(_word(1, 2, 3, 4), _word(8, 9), n)[1], torch.tensor(5 - n))


@ex.behaviour("a token said three times matches once where the reference has it once")
def _(answer):
    case = {"candidate": _word(7, 7, 7), "reference": _word(4, 7, 5), "n": 1}
    expect(answer.on(case), torch.tensor([1, 3]), case=case)


@ex.behaviour("it matches twice where the reference has it twice")
def _(answer):
    case = {"candidate": _word(7, 7, 7), "reference": _word(7, 5, 7, 4), "n": 1}
    expect(answer.on(case), torch.tensor([2, 3]), case=case)


@ex.behaviour("the order within an n-gram counts")
def _(answer):
    case = {"candidate": _word(1, 2), "reference": _word(2, 1), "n": 2}
    expect(answer.on(case), torch.tensor([0, 1]), case=case)


@ex.behaviour("the place in the text does not count")
def _(answer):
    case = {"candidate": _word(1, 2, 3), "reference": _word(9, 9, 1, 2), "n": 2}
    expect(answer.on(case), torch.tensor([1, 2]), case=case)


@ex.behaviour("a candidate shorter than n has nothing to match")
def _(answer):
    case = {"candidate": _word(1), "reference": _word(1, 2, 3), "n": 3}
    expect(answer.on(case), torch.tensor([0, 0]), case=case)


@ex.behaviour("a longer reference never loses a match")
def _(answer):
    text, reference = _word(1, 2, 1, 2, 3), _word(1, 2, 4, 1, 2)
    for n in (1, 2, 3):
        more = answer(text, reference, n)
        expect(torch.maximum(more, answer(text, reference[:-2], n)), more)


def _grams(ids: Tensor, n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n].tolist()) for i in range(len(ids) - n + 1)]


def _clipped(ours: list, theirs: list) -> int:
    return sum(min(ours.count(gram), theirs.count(gram)) for gram in set(ours))


def _ours(ours: list, theirs: list) -> int:
    return len(ours)


def _counted(match: Function = _clipped, total: Function = _ours) -> Function:
    """match(ours, theirs) and total(ours, theirs), both of lists of n-grams."""

    def function(candidate, reference, n):
        ours, theirs = _grams(candidate, n), _grams(reference, n)
        return torch.tensor([match(ours, theirs), total(ours, theirs)])

    return function


def _cut(cut: Function) -> Function:
    """The n-grams cut otherwise: cut(ids, n), with ids a list."""

    def function(candidate, reference, n):
        ours, theirs = cut(candidate.tolist(), n), cut(reference.tolist(), n)
        return torch.tensor([_clipped(ours, theirs), len(ours)])

    return function


def _runs(n: int, at: range | list[int], ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in at]


CLIP = "How often may an n-gram count that the reference has once?"
ONCE = "How many terms has the sum for an n-gram that occurs three times?"
TOTAL = "How many runs of 2 tokens does a text of 5 tokens have?"
RUN = "Which tokens make up the last n-gram of a text?"
SAME = "When are two n-grams the same?"
WHO = "Of whose n-grams is the precision a share?"

ex.mistake(
    "the counts without clipping",
    "Every n-gram that the reference has counts, as often as the candidate says it.",
    CLIP,
)(_counted(lambda ours, theirs: sum(gram in theirs for gram in ours)))
ex.mistake(
    "the counts with every n-gram matched at most once",
    "Sets do not know how often: an n-gram that both have twice counts twice.",
    ONCE,
)(_counted(lambda ours, theirs: len(set(ours) & set(theirs))))
ex.mistake(
    "the counts of different n-grams",
    "Sets do not know how often, in the matches and in the total.",
    ONCE,
)(_counted(lambda ours, theirs: len(set(ours) & set(theirs)), lambda ours, theirs: len(set(ours))))
ex.mistake(
    "the counts with the total of different n-grams",
    "An n-gram that occurs three times is three n-grams of the total.",
    TOTAL,
)(_counted(total=lambda ours, theirs: len(set(ours))))
ex.mistake(
    "the counts with one term for each occurrence instead of each different n-gram",
    "The sum goes through the candidate's list, and adds the clipped count again and again.",
    ONCE,
)(_counted(lambda ours, theirs: sum(min(ours.count(x), theirs.count(x)) for x in ours)))
ex.mistake(
    "the counts with one term for each occurrence in the reference",
    "The sum goes through the reference's list, and adds the clipped count again and again.",
    ONCE,
)(_counted(lambda ours, theirs: sum(min(ours.count(x), theirs.count(x)) for x in theirs)))
ex.mistake(
    "the counts that the reference has of the candidate's n-grams",
    "The candidate's own count does not limit the matches.",
    CLIP,
)(_counted(lambda ours, theirs: sum(theirs.count(x) for x in set(ours))))
ex.mistake(
    "the counts with max instead of min",
    "The larger of the two counts was taken.",
    CLIP,
)(_counted(lambda ours, theirs: sum(max(ours.count(x), theirs.count(x)) for x in set(ours))))
ex.mistake(
    "the counts with all pairs of equal n-grams",
    "Each n-gram of the candidate was compared with each of the reference.",
    CLIP,
)(_counted(lambda ours, theirs: sum(x == y for x in ours for y in theirs)))
ex.mistake(
    "the counts clipped all together instead of n-gram by n-gram",
    "The sum was clipped by the reference's number of n-grams.",
    CLIP,
)(_counted(lambda ours, theirs: min(sum(x in theirs for x in ours), len(theirs))))
ex.mistake(
    "the counts with n-grams compared place by place",
    "An n-gram matches wherever it stands in the reference.",
    SAME,
)(_counted(lambda ours, theirs: sum(x == y for x, y in zip(ours, theirs, strict=False))))
ex.mistake(
    "the counts with the order of tokens ignored",
    "The n-grams were sorted, or made into bags.",
    SAME,
)(_cut(lambda ids, n: [tuple(sorted(x)) for x in _runs(n, range(len(ids) - n + 1), ids)]))
ex.mistake(
    "the counts with only the ends of the n-grams compared",
    "What stands between the first and the last token counts too.",
    SAME,
)(_cut(lambda ids, n: [(x[0], x[-1]) for x in _runs(n, range(len(ids) - n + 1), ids)]))
ex.mistake(
    "the counts of single tokens, whatever n",
    "`n` has no effect.",
    "Where does `n` enter?",
)(lambda c, r, n: bleu_precision(c, r, 1))
ex.mistake(
    "the counts of pairs, whatever n",
    "`n` has no effect.",
    "Where does `n` enter?",
)(lambda c, r, n: bleu_precision(c, r, 2))
ex.mistake(
    "the counts of (n + 1)-grams",
    "The slices are one token too long.",
    "How many tokens has ids[i : i + n]?",
)(lambda c, r, n: bleu_precision(c, r, n + 1))
ex.mistake(
    "the counts of (n - 1)-grams",
    "The slices are one token too short.",
    "How many tokens has ids[i : i + n - 1]?",
)(lambda c, r, n: bleu_precision(c, r, n - 1))
ex.mistake(
    "the counts of all n-grams from 1 to n",
    "BLEU joins the orders later; here one n is asked.",
    "Which n-grams have exactly n tokens?",
)(lambda c, r, n: sum(bleu_precision(c, r, k) for k in range(1, n + 1)))
ex.mistake(
    "the counts without the last n-gram of either text",
    "`range(len(ids) - n)` stops one too early.",
    RUN,
)(_cut(lambda ids, n: _runs(n, range(len(ids) - n), ids)))
ex.mistake(
    "the counts with shorter pieces at the end of the texts",
    "`range(len(ids))` goes on where no n tokens are left.",
    RUN,
)(_cut(lambda ids, n: _runs(n, range(len(ids)), ids)))
ex.mistake(
    "the counts with n-grams that go on at the beginning",
    "`roll` brings the first tokens round to the end.",
    RUN,
)(_cut(lambda ids, n: _runs(n, range(len(ids)), ids + ids[: n - 1])))
ex.mistake(
    "the counts of pieces that do not overlap",
    "The texts were cut into pieces of n tokens.",
    "Does an n-gram begin at every token?",
)(_cut(lambda ids, n: _runs(n, range(0, len(ids) - n + 1, n), ids)))
ex.mistake(
    "the counts with the reference's total",
    "That is recall: candidate and reference are swapped.",
    WHO,
)(lambda c, r, n: bleu_precision(r, c, n))
ex.mistake(
    "the counts with the candidate's number of tokens for a total",
    "A text has fewer n-grams than tokens where n is above 1.",
    TOTAL,
)(lambda c, r, n: torch.stack([bleu_precision(c, r, n)[0], torch.tensor(len(c))]))
ex.mistake(
    "the counts with a total of m - n",
    "That is one too few.",
    TOTAL,
)(lambda c, r, n: torch.stack([bleu_precision(c, r, n)[0], torch.tensor(max(len(c) - n, 0))]))
ex.mistake(
    "the counts with a total below 0",
    "m - n + 1 is negative where the candidate is shorter than n - 1.",
    "How many n-grams has a candidate of one token, with n = 3?",
)(lambda c, r, n: torch.stack([bleu_precision(c, r, n)[0], torch.tensor(len(c) - n + 1)]))
ex.mistake(
    "the counts with a total of at least 1",
    "That keeps a later division from 0 / 0, but this candidate has no n-gram.",
    "How many n-grams has a candidate of one token, with n = 3?",
)(_counted(total=lambda ours, theirs: max(len(ours), 1)))
ex.mistake(
    "the counts with 1 added to both",
    "That is a smoothing for short texts (Lin & Och 2004), not the count.",
    "Are the counts asked, or something made of them?",
)(lambda c, r, n: bleu_precision(c, r, n) + 1)
ex.mistake(
    "the total before the matches",
    "The two numbers are in the wrong order.",
    "Which comes first in the docstring?",
)(lambda c, r, n: bleu_precision(c, r, n).flip(0))
ex.mistake(
    "the misses instead of the matches",
    "What the reference lacks was counted.",
    "Do more matches make a better translation?",
)(_counted(lambda ours, theirs: len(ours) - _clipped(ours, theirs)))
ex.mistake(
    "the precision instead of the two counts",
    "matches / total can no longer be added up over a test set.",
    "What does the docstring say about the result?",
)(lambda c, r, n: torch.tensor(_clipped(_grams(c, n), _grams(r, n)) / max(len(_grams(c, n)), 1)))
ex.mistake(
    "the matches alone",
    "The total is missing.",
    "What does the docstring say about the result?",
)(lambda c, r, n: bleu_precision(c, r, n)[0])


@ex.alternative("dictionaries of counts")
def _(candidate, reference, n):
    counts = []
    for ids in (candidate.tolist(), reference.tolist()):
        count = {}
        for i in range(len(ids) - n + 1):
            gram = tuple(ids[i : i + n])
            count[gram] = count.get(gram, 0) + 1
        counts.append(count)
    matches = sum(min(times, counts[1].get(gram, 0)) for gram, times in counts[0].items())
    return torch.tensor([matches, sum(counts[0].values())])


@ex.alternative("a reference whose n-grams are used up")
def _(candidate, reference, n):
    left, matches, ours = _grams(reference, n), 0, _grams(candidate, n)
    for gram in ours:
        if gram in left:
            left.remove(gram)
            matches += 1
    return torch.tensor([matches, len(ours)])


@ex.alternative("unfold and unique, on tensors")
def _(candidate, reference, n):
    if min(len(candidate), len(reference)) < n:
        return torch.tensor([0, max(len(candidate) - n + 1, 0)])
    ours, theirs = candidate.unfold(0, n, 1), reference.unfold(0, n, 1)  # (m - n + 1, n)
    grams, name = torch.cat([ours, theirs]).unique(dim=0, return_inverse=True)
    first = F.one_hot(name[: len(ours)], len(grams)).sum(0)
    second = F.one_hot(name[len(ours) :], len(grams)).sum(0)
    return torch.stack([torch.minimum(first, second).sum(), first.sum()])


@ex.alternative("a table of equal n-grams")
def _(candidate, reference, n):
    ours, theirs = _grams(candidate, n), _grams(reference, n)
    equal = torch.tensor([[x == y for y in ours + theirs] for x in ours], dtype=torch.long)
    equal = equal.reshape(len(ours), len(ours) + len(theirs))
    mine, other = equal[:, : len(ours)].sum(1), equal[:, len(ours) :].sum(1)
    # The k-th occurrence counts if the reference has k of them.
    nth = equal[:, : len(ours)].tril().sum(1)
    return torch.stack([((nth <= other) & (mine > 0)).sum(), torch.tensor(len(ours))])
