"""Exercises of chapter 08: hide words, guess them, and read a whole sentence at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grading.exercise import Case, Exercise, Function, Mistake
from ..grading.observe import expect
from ._wrong_parts import MASKINGS, MIXTURES, NORMALISATIONS, SCALES, visible_softmax

INF = math.inf


def _normal(g: torch.Generator, *shape: int, spread: float = 1.0) -> Tensor:
    """Normal numbers with one decimal, so that a counterexample can be read."""
    return (torch.randn(*shape, generator=g) * 10 * spread).round() / 10 + 0.0


def _some(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [_normal(g, *shape) for shape in shapes]


# --- 1. hide words ----------------------------------------------------------------------------

ex = Exercise(
    "mask_tokens",
    chapter="08_encoder",
    title="Hide words",
    minutes=15,
    difficulty=2,
    importance=4,
    points=2,
    prompt=r"""
An encoder learns by filling gaps: some tokens are hidden, and it must say which they were. BERT
chooses 15 % of the tokens and treats the **chosen** ones in three ways, so that a token which looks
ordinary may be a question as well:

$$\text{input} = \begin{cases}
  \text{mask\_id} & \text{kind} < 0.8 \\
  \text{random token} & 0.8 \le \text{kind} < 0.9 \\
  \text{token} & 0.9 \le \text{kind}
\end{cases} \qquad
\text{target} = \begin{cases}
  \text{token} & \text{noise} < \text{rate} \\
  -100 & \text{otherwise}
\end{cases}$$

- A token is chosen where `noise < rate`. Tokens that are not chosen stay in the input as they are.
- The target of **every** chosen token is the original one, also where the input kept it. -100 is
  what `F.cross_entropy` leaves out.
- `tokens`, `noise`, `kinds` and `random_tokens` are all `(batch, n)`. The chance comes from outside,
  so that the result can be checked: `noise` and `kinds` are uniform in [0, 1), and
  `random_tokens[b, i]` is the random token for position i of row b.

Return `(inputs, targets)` and leave `tokens` as they were.
""",
    hints=(
        "Which positions have a target: those whose input was changed, or those that were chosen?",
        "Every condition on `kinds` goes together with `chosen`. torch.where(condition, a, b) and "
        "`masked_fill` make a new tensor.",
        "chosen = noise < rate; masked = chosen & (kinds < 0.8); what is the third condition, and "
        "which of the three tensors do the targets need?",
    ),
)


@ex.solution
def mask_tokens(
    tokens: Tensor,
    noise: Tensor,
    kinds: Tensor,
    random_tokens: Tensor,
    mask_id: int,
    rate: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of masked language modelling (Devlin et al. 2019, §3.1).

    tokens and random_tokens: ints (batch, n), noise and kinds: (batch, n) in [0, 1).
    Returns inputs (batch, n) and targets (batch, n), which are -100 where nothing is asked.
    """
    ### BEGIN SOLUTION
    chosen = noise < rate  # (batch, n), as all tensors here
    masked = chosen & (kinds < 0.8)
    replaced = chosen & (kinds >= 0.8) & (kinds < 0.9)  # what is left of the chosen stays
    inputs = torch.where(replaced, random_tokens, tokens).masked_fill(masked, mask_id)
    targets = tokens.masked_fill(~chosen, -100)
    return inputs, targets
    ### END SOLUTION


def _tokens_case(g: torch.Generator, batch: int, n: int, **options: float) -> Case:
    """Tokens 1 to 9 with mask_id 10; no number lies on a border."""
    shape = (batch, n)
    return {
        "tokens": torch.randint(1, 10, shape, generator=g),
        "noise": (torch.randint(20, shape, generator=g) + 0.5) / 20,
        "kinds": (torch.randint(10, 20, shape, generator=g) + 0.5) / 20,
        "random_tokens": torch.randint(1, 10, shape, generator=g),
        "mask_id": 10,
        **options,
    }


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    smallest = _tokens_case(g, 1, 3)
    smallest |= {"noise": torch.tensor([[0.1, 0.5, 0.1]])}
    smallest |= {"kinds": torch.tensor([[0.3, 0.5, 0.8]])}
    known = _tokens_case(g, 2, 6, rate=0.5)  # the mask is among the tokens, and so is class 0
    known |= {"mask_id": 1, "tokens": torch.randint(3, (2, 6), generator=g)}
    border = _tokens_case(g, 2, 4, rate=0.25)
    border |= {"noise": torch.tensor([[0.25, 0.0, 0.25, 0.5], [0.0, 0.25, 0.5, 0.0]])}
    border |= {"kinds": torch.tensor([[0.0, 0.8, 0.8, 0.8], [0.95, 0.85, 0.8, 0.0]])}
    same = _tokens_case(g, 2, 5, rate=1.0)
    all_kinds = _tokens_case(g, 1, 20, rate=1.0)
    all_kinds["kinds"] = (torch.arange(20)[None] + 0.5) / 20
    return [
        smallest,
        all_kinds,
        border,
        known,
        same | {"random_tokens": same["tokens"]},
        _tokens_case(g, 3, 3, rate=0.5),
        _tokens_case(g, 2, 5, rate=0.0),
        _tokens_case(g, 4, 6, rate=0.7),
        _tokens_case(g, 3, 12) | {"mask_id": 103},
    ]


TOKENS = torch.tensor([[5, 6, 7, 8]])
OTHERS = torch.tensor([[1, 2, 3, 4]])
ALL, NONE = torch.zeros(1, 4), torch.full((1, 4), 0.9)


@ex.behaviour("where no token is chosen, the inputs are the tokens and all targets are -100")
def _(answer):
    got = answer(TOKENS, NONE, torch.tensor([[0.0, 0.5, 0.85, 0.95]]), OTHERS, 9)
    expect(got, (TOKENS, torch.full((1, 4), -100)))


@ex.behaviour("a chosen token below 0.8 is masked, below 0.9 random, above that it stays")
def _(answer):
    inputs, _ = answer(TOKENS, ALL, torch.tensor([[0.0, 0.79, 0.85, 0.95]]), OTHERS, 9)
    expect(inputs, torch.tensor([[9, 9, 3, 8]]))


@ex.behaviour("every chosen token is a target, also one that stays in the input")
def _(answer):
    _, targets = answer(TOKENS, ALL, torch.tensor([[0.0, 0.5, 0.85, 0.95]]), OTHERS, 9)
    expect(targets, TOKENS)


@ex.behaviour("what stands at -100 in the targets is unchanged in the inputs")
def _(answer):
    kinds = torch.tensor([[0.1, 0.5, 0.85, 0.95]])
    noise = torch.tensor([[0.1, 0.9, 0.9, 0.1]])
    inputs, targets = answer(TOKENS, noise, kinds, OTHERS, 9)
    expect(inputs[targets == -100], TOKENS[:, 1:3].flatten())


@ex.behaviour("with a rate of 1 every token is chosen")
def _(answer):
    _, targets = answer(TOKENS, NONE, ALL, OTHERS, 9, rate=1.0)
    expect(targets, TOKENS)


@ex.behaviour("of 10,000 chosen tokens about 80 % are masked and 10 % random")
def _(answer):
    g = torch.Generator().manual_seed(1)
    kinds = torch.rand(1, 10_000, generator=g)
    tokens = torch.full((1, 10_000), 5)
    inputs, _ = answer(tokens, 0 * kinds, kinds, tokens + 1, 9)
    shares = torch.stack([(inputs == id).float().mean() for id in (9, 6, 5)])
    expect((shares * 20).round() / 20, torch.tensor([0.8, 0.1, 0.1]))


def _chosen(noise: Tensor, rate: float) -> Tensor:
    return noise < rate


def _corrupted(tokens: Tensor, chosen: Tensor, kinds: Tensor, others: Tensor, mask_id: int):
    """The inputs as they should be."""
    inputs = torch.where(chosen & (kinds >= 0.8) & (kinds < 0.9), others, tokens)
    return inputs.masked_fill(chosen & (kinds < 0.8), mask_id)


def _hide(*, choose=_chosen, corrupt=_corrupted, target=None) -> Function:
    """The masking with one part replaced.

    target: (tokens, chosen, inputs, kinds, mask_id) -> targets.
    """

    def function(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
        chosen = choose(noise, rate)
        inputs = corrupt(tokens, chosen, kinds, random_tokens, mask_id)
        if target is None:
            return inputs, tokens.masked_fill(~chosen, -100)
        return inputs, target(tokens, chosen, inputs, kinds, mask_id)

    return function


WHO = "For which values of `noise` is a token chosen?"

# Wrong choices: (noise, rate) -> chosen.
CHOICES = [
    Mistake(
        "with noise > rate",
        "The choice is upside down: most tokens are hidden.",
        WHO,
        lambda noise, rate: noise > rate,
    ),
    Mistake(
        "with noise >= rate",
        "The choice is upside down: most tokens are hidden.",
        WHO,
        lambda noise, rate: noise >= rate,
    ),
    Mistake(
        "with noise <= rate",
        "A token whose noise is exactly the rate is chosen too.",
        "Is the comparison < or <=?",
        lambda noise, rate: noise <= rate,
    ),
    Mistake(
        "with a fixed rate of 0.15",
        "The argument rate has no effect.",
        "Where does `rate` enter?",
        lambda noise, rate: noise < 0.15,
    ),
    Mistake(
        "with every token chosen",
        "noise and rate have no effect.",
        "Where does `noise` enter?",
        lambda noise, rate: noise < 2,
    ),
    Mistake(
        "with the same positions chosen in every row",
        "The noise of the first row decides for the whole batch.",
        "Which shape does `noise < rate` have, and which row of it belongs to row b?",
        lambda noise, rate: (noise[:1] < rate).expand(noise.shape),
    ),
    Mistake(
        "with the lowest noise of each row chosen, rate · n of them",
        "A fixed number is chosen in each row instead of each token by itself.",
        WHO,
        lambda noise, rate: noise.argsort(-1).argsort(-1) < round(rate * noise.shape[-1]),
    ),
]
ex.mistakes_from(CHOICES, "the masking", lambda part: _hide(choose=part))

THREE = "Which three things can become of a chosen token, and how often each?"
ONLY = "What becomes of a token that is not chosen?"
LAST = "What stands in the input after both steps, and which of them wrote it?"

# Wrong inputs: (tokens, chosen, kinds, random tokens, mask_id) -> inputs.
CORRUPTIONS = [
    Mistake(
        "with all chosen tokens masked",
        "None is replaced by a random one and none stays, so kinds have no effect.",
        THREE,
        lambda t, c, k, r, m: t.masked_fill(c, m),
    ),
    Mistake(
        "with the inputs left as they were",
        "The answer to every question stands in the input.",
        "Where do `mask_id` and `random_tokens` enter?",
        lambda t, c, k, r, m: t.clone(),
    ),
    Mistake(
        "without random tokens",
        "A fifth of the chosen tokens stays, instead of a tenth.",
        THREE,
        lambda t, c, k, r, m: t.masked_fill(c & (k < 0.8), m),
    ),
    Mistake(
        "with no chosen token left as it is",
        "Everything from 0.8 on is replaced: a fifth instead of a tenth.",
        THREE,
        lambda t, c, k, r, m: torch.where(c & (k >= 0.8), r, t).masked_fill(c & (k < 0.8), m),
    ),
    Mistake(
        "with the masks overwritten by random tokens",
        "kinds < 0.9 holds below 0.8 too, and that step comes last.",
        LAST,
        lambda t, c, k, r, m: torch.where(c & (k < 0.9), r, t),
    ),
    Mistake(
        "with the last tenth masked as well",
        "What should stay is masked: only random tokens are not.",
        THREE,
        lambda t, c, k, r, m: torch.where(c, torch.where((k >= 0.8) & (k < 0.9), r, m), t),
    ),
    Mistake(
        "with random and kept tokens swapped",
        "From 0.8 to 0.9 the token stays, and from 0.9 on it is replaced.",
        "Which of the two comes between 0.8 and 0.9?",
        lambda t, c, k, r, m: torch.where(c & (k >= 0.9), r, t).masked_fill(c & (k < 0.8), m),
    ),
    Mistake(
        "with masks and random tokens swapped",
        "Four fifths of the chosen are replaced by random tokens, and a tenth is masked.",
        THREE,
        lambda t, c, k, r, m: torch.where(c & (k < 0.8), r, t).masked_fill(
            c & (k >= 0.8) & (k < 0.9), m
        ),
    ),
    Mistake(
        "with masked and kept tokens swapped",
        "Four fifths of the chosen stay, and a tenth is masked.",
        "Is a token masked for a low `kind` or for a high one?",
        lambda t, c, k, r, m: torch.where(c & (k >= 0.8) & (k < 0.9), r, t).masked_fill(
            c & (k >= 0.9), m
        ),
    ),
    Mistake(
        "with random tokens where kinds < 0.1, over some of the masks",
        "A tenth is taken away from the masks, and a fifth is left as it was.",
        "Do the intervals for masked and random overlap?",
        lambda t, c, k, r, m: torch.where(c & (k < 0.1), r, t.masked_fill(c & (k < 0.8), m)),
    ),
    Mistake(
        "with kinds <= 0.8",
        "A kind of exactly 0.8 belongs to the random tokens.",
        "Is the comparison < or <=?",
        lambda t, c, k, r, m: torch.where(c & (k > 0.8) & (k < 0.9), r, t).masked_fill(
            c & (k <= 0.8), m
        ),
    ),
    Mistake(
        "with random tokens everywhere, not only at the chosen places",
        "0.8 <= kinds < 0.9 also holds for tokens that were not chosen.",
        ONLY,
        lambda t, c, k, r, m: torch.where((k >= 0.8) & (k < 0.9), r, t).masked_fill(
            c & (k < 0.8), m
        ),
    ),
    Mistake(
        "with masks everywhere, not only at the chosen places",
        "kinds < 0.8 also holds for tokens that were not chosen.",
        ONLY,
        lambda t, c, k, r, m: torch.where(c & (k >= 0.8) & (k < 0.9), r, t).masked_fill(k < 0.8, m),
    ),
    Mistake(
        "with masks and random tokens everywhere, not only at the chosen places",
        "The conditions on kinds also hold for tokens that were not chosen.",
        ONLY,
        lambda t, c, k, r, m: torch.where((k >= 0.8) & (k < 0.9), r, t).masked_fill(k < 0.8, m),
    ),
    Mistake(
        "with everything masked that was not chosen",
        "The chosen tokens are treated as they should be, but the rest is hidden too.",
        ONLY,
        lambda t, c, k, r, m: _corrupted(t, c, k, r, m).masked_fill(~c, m),
    ),
    Mistake(
        "with -100 in the inputs too",
        "-100 belongs to the targets: there is no token with this number.",
        ONLY,
        lambda t, c, k, r, m: _corrupted(t, c, k, r, m).masked_fill(~c, -100),
    ),
    Mistake(
        "with 103 as the mask, whatever mask_id",
        "103 is the number of [MASK] in BERT's vocabulary; the argument has no effect.",
        "Where does `mask_id` enter?",
        lambda t, c, k, r, m: _corrupted(t, c, k, r, 103),
    ),
    Mistake(
        "with 0 as the mask, whatever mask_id",
        "The argument has no effect, and 0 may be a token of the text.",
        "Where does `mask_id` enter?",
        lambda t, c, k, r, m: _corrupted(t, c, k, r, 0),
    ),
]
ex.mistakes_from(CORRUPTIONS, "the masking", lambda part: _hide(corrupt=part))

ASKED = "Which positions does the model have to answer for?"
MARK = "Which number does `F.cross_entropy` leave out, and is it never a token?"

# Wrong targets: (tokens, chosen, inputs, kinds, mask_id) -> targets.
TARGETS_OF = [
    Mistake(
        "with a target at every position",
        "Most of the loss is then about tokens that can be read off the input.",
        ASKED,
        lambda t, c, x, k, m: t.clone(),
    ),
    Mistake(
        "with targets taken from the corrupted inputs",
        "The model would learn to answer with the mask.",
        "Which token is the right answer at a masked position?",
        lambda t, c, x, k, m: x.masked_fill(~c, -100),
    ),
    Mistake(
        "with targets at the masked tokens only",
        "A chosen token that became random or stayed is a question too.",
        ASKED,
        lambda t, c, x, k, m: t.masked_fill(~(c & (k < 0.8)), -100),
    ),
    Mistake(
        "with targets wherever the mask stands in the inputs",
        "The text may hold the mask's number itself, and random and kept tokens are questions too.",
        ASKED,
        lambda t, c, x, k, m: t.masked_fill(x != m, -100),
    ),
    Mistake(
        "with targets wherever the input was changed",
        "A token that was kept is lost, and a random one that hit upon the same token.",
        ASKED,
        lambda t, c, x, k, m: t.masked_fill(x == t, -100),
    ),
    Mistake(
        "without targets for the kept tokens",
        "They are chosen as well: the model must not trust what it reads.",
        ASKED,
        lambda t, c, x, k, m: t.masked_fill(~(c & (k < 0.9)), -100),
    ),
    Mistake(
        "with targets where nothing was chosen",
        "-100 stands at the questions instead of at all the rest.",
        "Does `masked_fill` fill where its mask is True or where it is False?",
        lambda t, c, x, k, m: t.masked_fill(c, -100),
    ),
    Mistake(
        "with 0 instead of -100",
        "0 is a token like any other: the model is asked to predict it wherever nothing was chosen.",
        MARK,
        lambda t, c, x, k, m: t * c,
    ),
    Mistake(
        "with -1 instead of -100",
        "`F.cross_entropy` leaves out -100 and complains about -1.",
        MARK,
        lambda t, c, x, k, m: t.masked_fill(~c, -1),
    ),
    Mistake(
        "with the mask instead of -100",
        "The model would be asked to predict the mask wherever nothing was chosen.",
        MARK,
        lambda t, c, x, k, m: t.masked_fill(~c, m),
    ),
    Mistake(
        "with 1 for a chosen token and 0 for the others as targets",
        "That says where the questions are, but not the answers.",
        "Which token is the right answer at a masked position?",
        lambda t, c, x, k, m: c.long(),
    ),
    Mistake(
        "with the next token as target",
        "That is the target of a decoder. Here the question is what stands at the place itself.",
        "Which token is the right answer at a masked position?",
        lambda t, c, x, k, m: t.roll(-1, 1).masked_fill(~c, -100),
    ),
]
ex.mistakes_from(TARGETS_OF, "the masking", lambda part: _hide(target=part))
ex.mistake(
    "targets and inputs, in this order",
    "The two results are swapped.",
    "Which of the two comes first?",
)(lambda *args, **options: mask_tokens(*args, **options)[::-1])
ex.mistake(
    "the masking with noise in place of kinds",
    "The kinds have no effect: a chosen token has low noise, so it is always masked below 0.8.",
    "Are the two draws independent of each other in your code?",
)(lambda t, noise, kinds, r, m, rate=0.15: mask_tokens(t, noise, noise, r, m, rate))
ex.mistake(
    "the masking with kinds in place of noise",
    "The noise has no effect, and low kinds are chosen.",
    "Which of the two draws decides who is chosen?",
)(lambda t, noise, kinds, r, m, rate=0.15: mask_tokens(t, kinds, kinds, r, m, rate))
ex.mistake(
    "the masking with noise and kinds swapped",
    "The kinds decide who is chosen and the noise what becomes of it.",
    "Which of the two draws decides who is chosen?",
)(lambda t, noise, kinds, r, m, rate=0.15: mask_tokens(t, kinds, noise, r, m, rate))
ex.mistake(
    "the masking with the three parts cut out of the rate",
    "noise < 0.8 · rate is masked, noise < 0.9 · rate random; the kinds have no effect.",
    "Where do `kinds` enter?",
)(lambda t, noise, kinds, r, m, rate=0.15: mask_tokens(t, noise, noise / max(rate, 0.01), r, m, rate))


@ex.alternative("a loop over rows and positions")
def _(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
    inputs, targets = tokens.clone(), torch.full_like(tokens, -100)
    for b in range(len(tokens)):
        for i in range(tokens.shape[1]):
            if noise[b, i] < rate:
                targets[b, i] = tokens[b, i]
                if kinds[b, i] < 0.8:
                    inputs[b, i] = mask_id
                elif kinds[b, i] < 0.9:
                    inputs[b, i] = random_tokens[b, i]
    return inputs, targets


@ex.alternative("random tokens first, then the masks over them")
def _(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
    inputs, chosen = tokens.clone(), noise < rate
    places = chosen & (kinds < 0.9)
    inputs[places] = random_tokens[places]
    inputs[chosen & (kinds < 0.8)] = mask_id
    return inputs, torch.where(chosen, tokens, -100)


@ex.alternative("a table of the three inputs, one picked for each token")
def _(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
    table = torch.stack([torch.full_like(tokens, mask_id), random_tokens, tokens])  # (3, batch, n)
    row = (kinds >= 0.8).long() + (kinds >= 0.9).long()
    row[noise >= rate] = 2
    inputs = table.gather(0, row[None])[0]  # (3, batch, n) -> (1, batch, n) -> (batch, n)
    return inputs, torch.where(noise >= rate, -100, tokens)


@ex.alternative("sums of products with 0 and 1")
def _(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
    chosen = (noise < rate).long()
    masked = chosen * (kinds < 0.8)
    replaced = chosen * (kinds < 0.9) - masked
    inputs = masked * mask_id + replaced * random_tokens + (1 - masked - replaced) * tokens
    return inputs, chosen * tokens - 100 * (1 - chosen)


@ex.alternative("masked_scatter and nested where")
def _(tokens, noise, kinds, random_tokens, mask_id, rate=0.15):
    chosen = torch.lt(noise, rate)
    replaced = chosen & ~(kinds < 0.8) & (kinds < 0.9)
    inputs = tokens.masked_scatter(replaced, random_tokens[replaced])
    inputs = torch.where(chosen, torch.where(kinds < 0.8, mask_id, inputs), inputs)
    return inputs, tokens.masked_fill(chosen.logical_not(), -100)


# --- 2. how many were guessed -----------------------------------------------------------------

ex = Exercise(
    "masked_accuracy",
    chapter="08_encoder",
    title="How many were guessed?",
    minutes=10,
    difficulty=1,
    importance=3,
    prompt=r"""
The loss says how surprised the model is; the accuracy says how often it is right. Its guess at a
position is the token with the highest logit, and only positions that have a target count:

$$\text{accuracy} = \frac{\sum_{b,i} \big[\, t_{b,i} \ne -100 \,\big]
  \big[\, \mathrm{argmax}_v\, \text{logits}_{b,i,v} = t_{b,i} \,\big]}
  {\sum_{b,i} \big[\, t_{b,i} \ne -100 \,\big]}$$

The bracket $[\cdot]$ is 1 where the statement in it is true and 0 elsewhere.

- `logits` is `(batch, n, V)`, `targets` is `(batch, n)`: a token from 0 to V - 1, or -100 where
  nothing was asked. Token 0 is a token like any other.
- Every question counts alike, in whichever row it stands.
- Without any question the accuracy is 0, not NaN.

Return a tensor of shape `()` in the dtype of the logits, from 0 to 1.
""",
    hints=(
        "By how many positions is the number of right guesses divided?",
        "A comparison gives True and False, and their sum counts the True ones. -100 is never the "
        "argmax.",
        "counted = targets != -100; right = logits.argmax(dim=-1) == targets; what is divided by "
        "what, and what if counted.sum() is 0?",
    ),
)


@ex.solution
def masked_accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of targets that have the highest logit; -100 is left out, and without targets it is 0.

    logits: (batch, n, V), targets: ints (batch, n) -> a number, shape (), dtype of the logits.
    """
    ### BEGIN SOLUTION
    counted = targets != -100  # (batch, n)
    right = logits.argmax(dim=-1) == targets  # (batch, n): no argmax is ever -100
    return right.sum().to(logits.dtype) / counted.sum().clamp(min=1)  # 0 / 1 without targets
    ### END SOLUTION


def _guesses(g: torch.Generator, batch: int, n: int, V: int, asked: list[int]) -> Case:
    """Row b has asked[b] targets, about half of them guessed; no two logits of a token are equal."""
    ranks = torch.rand(batch, n, V, generator=g).argsort(-1)  # (batch, n, V)
    logits = ranks / 2 + _normal(g, batch, n, 1)
    others = torch.randint(V, (batch, n), generator=g)
    guessed = torch.rand(batch, n, generator=g) < 0.5
    targets = torch.where(guessed, logits.argmax(-1), others)
    order = torch.rand(batch, n, generator=g).argsort(-1)  # (batch, n): who is asked first
    hidden = order >= torch.tensor(asked)[:, None]
    return {"logits": logits, "targets": targets.masked_fill(hidden, -100)}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    first = _guesses(g, 1, 3, 2, [2])
    wide = _guesses(g, 2, 6, 5, [6, 3])
    return [
        first,
        _guesses(g, 1, 5, 3, [5]),
        _guesses(g, 2, 4, 3, [4, 1]),
        _guesses(g, 2, 4, 4, [0, 3]),
        _guesses(g, 2, 3, 5, [0, 0]),
        _guesses(g, 3, 3, 3, [3, 1, 2]),
        _guesses(g, 3, 7, 2, [7, 0, 2]),
        wide | {"logits": wide["logits"] - 50},
        _guesses(g, 4, 9, 4, [1, 9, 4, 7]),
        _guesses(g, 3, 9, 3, [2, 8, 5]),
    ]


GUESSES = torch.tensor([[[2.0, 0.0, 1.0], [0.0, 1.0, -1.0]], [[1.0, 0.5, 3.0], [5.0, 0.0, 1.0]]])
"""The guesses are 0 and 1 in the first row, 2 and 0 in the second."""


@ex.behaviour("all guessed gives 1, none guessed gives 0")
def _(answer):
    expect(answer(GUESSES, torch.tensor([[0, 1], [2, 0]])), torch.tensor(1.0))
    expect(answer(GUESSES, torch.tensor([[1, 2], [0, 1]])), torch.tensor(0.0))


@ex.behaviour("three of four guessed gives 0.75")
def _(answer):
    case = {"logits": GUESSES, "targets": torch.tensor([[0, 1], [2, 1]])}
    expect(answer.on(case), torch.tensor(0.75), case=case)


@ex.behaviour("a target of -100 is neither right nor wrong")
def _(answer):
    case = {"logits": GUESSES, "targets": torch.tensor([[0, -100], [0, -100]])}
    expect(answer.on(case), torch.tensor(0.5), case=case)


@ex.behaviour("every target counts alike, in whichever row it stands")
def _(answer):
    case = {"logits": GUESSES, "targets": torch.tensor([[0, -100], [1, 1]])}
    expect(answer.on(case), torch.tensor(1 / 3), case=case)


@ex.behaviour("without any target it is 0")
def _(answer):
    case = {"logits": GUESSES, "targets": torch.full((2, 2), -100)}
    expect(answer.on(case), torch.tensor(0.0), case=case)


@ex.behaviour("logits ten times as large change nothing")
def _(answer):
    targets = torch.tensor([[0, 2], [2, -100]])
    expect(answer(10 * GUESSES, targets), answer(GUESSES, targets))


@ex.behaviour("what the model says where nothing was asked changes nothing")
def _(answer):
    other, targets = GUESSES.clone(), torch.tensor([[0, -100], [1, -100]])
    other[:, 1] = torch.tensor([0.0, -1.0, 9.0])
    expect(answer(other, targets), answer(GUESSES, targets))


def _accuracy(*, right=None, count=None, reduce=None) -> Function:
    """The accuracy with one part replaced.

    right: (logits, targets) -> (batch, n); count: targets -> (batch, n);
    reduce: (right (batch, n), counted (batch, n)) -> ().
    """

    def function(logits, targets):
        counted = count(targets) if count else targets != -100
        found = right(logits, targets) if right else logits.argmax(-1) == targets
        found, counted = found.to(logits.dtype) * counted, counted.to(logits.dtype)
        return reduce(found, counted) if reduce else found.sum() / counted.sum().clamp(min=1)

    return function


OVER = "Over which positions is the mean taken?"
MEANS = "Is it the mean of means, or one mean over all questions?"
NOTHING = "What should come out if nothing was asked?"
SHARE = "What is the number of right guesses divided by?"

# Wrong means: (right, counted) -> (); both are 0 or 1, and right is 0 where nothing counts.
SHARES = [
    Mistake(
        "over all positions, with -100 counted as wrong",
        "No guess is ever -100, so every position without a target is a miss.",
        OVER,
        lambda right, counted: right.mean(),
    ),
    Mistake(
        "over all positions, with -100 counted as right",
        "Positions without a target are counted as found.",
        OVER,
        lambda right, counted: (right + 1 - counted).mean(),
    ),
    Mistake(
        "averaged within each row first, 0 for a row without targets",
        "A question counts more where few are asked.",
        MEANS,
        lambda right, counted: (right.sum(1) / counted.sum(1).clamp(min=1)).mean(),
    ),
    Mistake(
        "averaged within each row first, 0 / 0 for a row without targets",
        "A question counts more where few are asked, and a row without any gives NaN.",
        MEANS,
        lambda right, counted: (right.sum(1) / counted.sum(1)).mean(),
    ),
    Mistake(
        "averaged within each row first, rows without targets left out",
        "A question counts more where few are asked.",
        MEANS,
        lambda right, counted: (right.sum(1) / counted.sum(1)).nanmean().nan_to_num(0.0),
    ),
    Mistake(
        "with NaN where nothing was asked",
        "That is 0 / 0.",
        NOTHING,
        lambda right, counted: right.sum() / counted.sum(),
    ),
    Mistake(
        "with 1 where nothing was asked",
        "The exercise asks for 0 there.",
        NOTHING,
        lambda right, counted: right.sum() / counted.sum() if counted.any() else right.sum() + 1,
    ),
    Mistake(
        "as the number of right guesses",
        "It grows with the number of questions.",
        SHARE,
        lambda right, counted: right.sum(),
    ),
    Mistake(
        "in percent",
        "1 means all.",
        "Between which two numbers should the accuracy lie?",
        lambda right, counted: 100 * right.sum() / counted.sum().clamp(min=1),
    ),
    Mistake(
        "as the share of wrong guesses, 0 where nothing was asked",
        "That is the error rate.",
        "Should a good model have a high accuracy or a low one?",
        lambda right, counted: (counted - right).sum() / counted.sum().clamp(min=1),
    ),
    Mistake(
        "subtracted from 1",
        "That is the error rate.",
        "Should a good model have a high accuracy or a low one?",
        lambda right, counted: 1 - right.sum() / counted.sum().clamp(min=1),
    ),
    Mistake(
        "divided by the number of rows",
        "`shape[0]` is the batch; a row may hold several questions or none.",
        SHARE,
        lambda right, counted: right.sum() / len(right),
    ),
    Mistake(
        "divided by n",
        "`shape[1]` is the length of a row, with or without targets.",
        SHARE,
        lambda right, counted: right.sum() / right.shape[1],
    ),
    Mistake(
        "divided by the number of targets plus one",
        "Something was added so as not to divide by 0.",
        SHARE,
        lambda right, counted: right.sum() / (counted.sum() + 1),
    ),
    Mistake(
        "as right guesses divided by wrong ones",
        "Those are the odds, not the share.",
        SHARE,
        lambda right, counted: right.sum() / (counted - right).sum().clamp(min=1),
    ),
    Mistake(
        "as the share of rows without a miss",
        "A row counts only if everything in it was found.",
        MEANS,
        lambda right, counted: (right == counted).all(1).to(right.dtype).mean(),
    ),
]

CLASSES = "Along which dimension of (batch, n, V) do the tokens of the vocabulary lie?"
HARD = "Does the accuracy see how sure the model is?"


def _target_probability(logits: Tensor, targets: Tensor) -> Tensor:
    """What the model gives to each target, (batch, n)."""
    probabilities = logits.softmax(-1)
    return probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]


# What counts as right: (logits, targets) -> (batch, n).
RIGHTS = [
    Mistake(
        "with the lowest logit as the guess",
        "argmin stands where argmax should.",
        "Which logit belongs to the likeliest token?",
        lambda logits, targets: logits.argmin(-1) == targets,
    ),
    Mistake(
        "with argmax over the positions",
        "The guess is a position instead of a token.",
        CLASSES,
        lambda logits, targets: logits.argmax(1) == targets,
    ),
    Mistake(
        "with argmax over the batch",
        "The guess is a row instead of a token.",
        CLASSES,
        lambda logits, targets: logits.argmax(0) == targets,
    ),
    Mistake(
        "with one argmax over everything",
        "Without `dim`, argmax gives one number for the whole tensor.",
        CLASSES,
        lambda logits, targets: logits.argmax() == targets,
    ),
    Mistake(
        "with the logits reshaped to (batch, V, n) instead of transposed",
        "`view` and `reshape` read the same numbers row by row into another shape.",
        "Which call swaps two dimensions, and is a swap needed at all?",
        lambda logits, targets: logits.reshape(logits.mT.shape).argmax(1) == targets,
    ),
    Mistake(
        "with a target among the best two",
        "That is the top-2 accuracy.",
        "How many guesses has the model?",
        lambda logits, targets: (logits.topk(2, -1).indices == targets[..., None]).any(-1),
    ),
    Mistake(
        "as the mean probability of the targets",
        "A softmax is averaged; nothing is guessed.",
        HARD,
        _target_probability,
    ),
    Mistake(
        "with every probability above a half counted as right",
        "The likeliest of many tokens may have less than a half.",
        "Does the best guess need a certain probability?",
        lambda logits, targets: _target_probability(logits, targets) > 0.5,
    ),
    Mistake(
        "with a logit above 0 counted as right",
        "A logit has no zero point: the same number added to all changes nothing.",
        "Which of the V logits is compared with which?",
        lambda logits, targets: logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] > 0,
    ),
    Mistake(
        "with the guess made one place too early",
        "logits[b, i] is compared with targets[b, i + 1], as in a decoder whose targets were not "
        "shifted.",
        "Which logits belong to the target at position i?",
        lambda logits, targets: logits.argmax(-1).roll(1, 1) == targets,
    ),
]

# Which positions count: targets -> (batch, n).
COUNTED = [
    Mistake(
        "with token 0 left out, and -100 counted",
        "0 is taken for padding here, which -100 stands for.",
        "Which number marks a position without a target?",
        lambda targets: targets != 0,
    ),
    Mistake(
        "with token 0 left out too",
        "0 is a token like any other.",
        "Is the comparison > or >=?",
        lambda targets: targets > 0,
    ),
    Mistake(
        "over the positions without a target",
        "The comparison is upside down.",
        OVER,
        lambda targets: targets == -100,
    ),
]
ex.mistakes_from(SHARES, "the accuracy", lambda part: _accuracy(reduce=part))
ex.mistakes_from(RIGHTS, "the accuracy", lambda part: _accuracy(right=part))
ex.mistakes_from(COUNTED, "the accuracy", lambda part: _accuracy(count=part))
ex.mistake(
    "the accuracy over all positions, with -100 taken for token 0",
    "-100 was replaced by 0, and then every position counts.",
    OVER,
)(lambda logits, targets: _accuracy()(logits, targets.clamp(min=0)))
ex.mistake(
    "the accuracy over all positions, with -100 taken for the last token",
    "An index counted from the end is a position in a list, not a class.",
    OVER,
)(lambda logits, targets: _accuracy()(logits, targets.where(targets >= 0, logits.shape[-1] - 1)))
ex.mistake(
    "the cross-entropy instead of the accuracy",
    "The loss is 0 for a good model, the accuracy 1.",
    HARD,
)(lambda logits, targets: F.cross_entropy(logits.mT, targets).detach())

ex.alternative("the mean over the positions that are asked")(
    lambda logits, targets: (
        (logits[targets != -100].argmax(-1) == targets[targets != -100])
        .to(logits.dtype)
        .mean()
        .nan_to_num(0.0)
    )
)


@ex.alternative("a loop over rows and positions")
def _(logits, targets):
    right = counted = 0
    for row, answers in zip(logits, targets.tolist(), strict=True):
        for scores, answer in zip(row.tolist(), answers, strict=True):
            if answer != -100:
                counted += 1
                right += scores.index(max(scores)) == answer
    return torch.tensor(right / max(counted, 1), dtype=logits.dtype)


@ex.alternative("no logit above that of the target")
def _(logits, targets):
    counted = targets >= 0
    own = logits.gather(-1, targets.clamp(min=0)[..., None])  # (batch, n, 1)
    right = (logits <= own).all(-1) & counted
    return (right.sum() / max(int(counted.sum()), 1)).to(logits.dtype)


@ex.alternative("a weighted mean of one-hot guesses, in float64")
def _(logits, targets):
    guess = F.one_hot(logits.softmax(-1).argmax(-1), logits.shape[-1]).double()
    weight = (targets != -100).double()
    answer = F.one_hot(targets.clamp(min=0), logits.shape[-1]).double() * weight[..., None]
    found = torch.einsum("bnv,bnv->", guess, answer)
    return (found / weight.sum().clamp(min=1)).to(logits.dtype)


@ex.alternative("max with its indices, flattened")
def _(logits, targets):
    guess, answer = logits.flatten(0, 1).max(1).indices, targets.flatten()  # (batch · n,)
    counted = answer.ne(-100)
    if not counted.any():
        return logits.new_zeros(())
    return guess.eq(answer)[counted].to(logits.dtype).mean()


# --- 3. one vector for a sentence -------------------------------------------------------------

ex = Exercise(
    "mean_pool",
    chapter="08_encoder",
    title="One vector for a whole sentence",
    minutes=10,
    difficulty=2,
    importance=4,
    batched=True,
    prompt=r"""
An encoder gives one vector for each token. To compare or classify sentences you want one for each
sentence: the mean over its **real** tokens, which padding must not touch.

$$\text{pooled}_b = \frac{1}{\text{length}_b} \sum_{i < \text{length}_b} \text{hidden}_{b,i}$$

- `hidden` is `(batch, n, d)`, `lengths` is `(batch,)`: the real tokens of row b are its first
  `lengths[b]` ones. At the other positions there are numbers too; they mean nothing.
- A length of 0 gives the vector 0, not NaN.

The result is `(batch, d)`.
""",
    hints=(
        "Two sentences of different length stand in one tensor: is each divided by the same number?",
        "A bool mask of shape (batch, n, 1) times `hidden` leaves the real tokens and broadcasts "
        "over the features.",
        "real = torch.arange(n) < lengths[:, None]; which dimension does real lack to fit hidden, "
        "and by what is the sum over the tokens divided?",
    ),
)


@ex.solution
def mean_pool(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Mean over the real tokens of each row: those at positions below its length; 0 if none is.

    hidden: (batch, n, d), lengths: (batch,) -> (batch, d).
    """
    ### BEGIN SOLUTION
    n = hidden.shape[1]
    real = torch.arange(n, device=hidden.device) < lengths[:, None]  # (n,) < (batch, 1)
    total = (hidden * real[:, :, None]).sum(dim=1)  # (batch, n, d) * (batch, n, 1) -> (batch, d)
    return total / lengths[:, None].clamp(min=1)  # (batch, d) / (batch, 1): 0 / 1 without tokens
    ### END SOLUTION


def _pool_case(g: torch.Generator, n: int, d: int, *lengths: int) -> Case:
    hidden = _normal(g, len(lengths), n, d)
    return {"hidden": hidden + 0.5, "lengths": torch.tensor(lengths)}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    silent = _pool_case(g, 4, 3, 3, 4)  # a real token may be the vector 0
    silent["hidden"][:, 1] = 0.0
    return [
        _pool_case(g, 3, 2, 2),
        _pool_case(g, 4, 1, 4),
        _pool_case(g, 4, 3, 1, 3),
        _pool_case(g, 3, 3, 2, 0, 3),
        silent,
        _pool_case(g, 5, 2, 4, 1),
        _pool_case(g, 1, 4, 1, 0),
        _pool_case(g, 6, 4, 3, 6, 0, 2),
        _pool_case(g, 5, 4, 2, 5, 3),
    ]


WORDS = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [8.0, 9.0]], [[4.0, 1.0], [2.0, 2.0], [0.0, 3.0]]])


@ex.behaviour("two real tokens of three give the mean of these two")
def _(answer):
    case = {"hidden": WORDS[:1], "lengths": torch.tensor([2])}
    expect(answer.on(case), torch.tensor([[2.0, 1.0]]), case=case)


@ex.behaviour("what stands at a padded position changes nothing")
def _(answer):
    other, lengths = WORDS.clone(), torch.tensor([2, 1])
    other[0, 2], other[1, 1:] = -5.0, 7.0
    expect(answer(other, lengths), answer(WORDS, lengths))


@ex.behaviour("padding the rows further changes nothing")
def _(answer):
    lengths = torch.tensor([2, 1])
    wider = F.pad(WORDS, (0, 0, 0, 3), value=1.0)  # (2, 6, 2)
    expect(answer(wider, lengths), answer(WORDS, lengths))


@ex.behaviour("a length of 0 gives the vector 0")
def _(answer):
    case = {"hidden": WORDS, "lengths": torch.tensor([0, 3])}
    expect(answer.on(case)[:1], torch.zeros(1, 2), case=case)


@ex.behaviour("the real tokens in another order give the same vector")
def _(answer):
    lengths = torch.tensor([3, 3])
    expect(answer(WORDS[:, [2, 0, 1]], lengths), answer(WORDS, lengths))


@ex.behaviour("a sentence of one token is that token")
def _(answer):
    expect(answer(WORDS, torch.tensor([1, 1])), WORDS[:, 0])


@ex.behaviour("a sentence does not depend on the others in its batch")
def _(answer):
    expect(answer(WORDS, torch.tensor([1, 3]))[1:], answer(WORDS[1:], torch.tensor([3])))


def _is_real(lengths: Tensor, n: int) -> Tensor:
    """Which positions are real, as it should be: (batch, n)."""
    return torch.arange(n) < lengths[:, None]


def _pooled(*, real=_is_real, reduce=None) -> Function:
    """Pooling with one part replaced.

    real: (lengths, n) -> (batch, n); reduce: (hidden, real (batch, n, 1), lengths (batch, 1)) ->
    (batch, d).
    """

    def function(hidden, lengths):
        where = real(lengths, hidden.shape[1])[..., None]
        if reduce:
            return reduce(hidden, where, lengths[:, None])
        return (hidden * where).sum(1) / where.sum(1).clamp(min=1)

    return function


BY = "By how many tokens is the sum of a row divided?"
BORDER = "At which position does the last of `lengths[b]` real tokens stand?"
EVERY = "Should every real token count alike?"

# Wrong positions: (lengths (batch,), n) -> (batch, n).
PLACES = [
    Mistake(
        "over all positions",
        "The lengths have no effect: padding is averaged too.",
        "Where do the lengths enter?",
        lambda lengths, n: torch.ones(len(lengths), n),
    ),
    Mistake(
        "with one padded token taken for real",
        "The comparison is <= where it should be <.",
        BORDER,
        lambda lengths, n: torch.arange(n) <= lengths[:, None],
    ),
    Mistake(
        "without the last real token",
        "The range ends one token too early.",
        BORDER,
        lambda lengths, n: torch.arange(n) < lengths[:, None] - 1,
    ),
    Mistake(
        "without the first token",
        "No token at the front is special here.",
        EVERY,
        lambda lengths, n: _is_real(lengths, n) & (torch.arange(n) > 0),
    ),
    Mistake(
        "over the padding instead of the real tokens",
        "The comparison is upside down.",
        "Are the real tokens at the positions below the length, or from there on?",
        lambda lengths, n: ~_is_real(lengths, n),
    ),
    Mistake(
        "over the last tokens of a row",
        "The padding is taken to stand in front.",
        "At which end of a row do the real tokens stand?",
        lambda lengths, n: torch.arange(n) >= n - lengths[:, None],
    ),
    Mistake(
        "with the length of the first row for all",
        "Every row has a length of its own.",
        "Which shape must the lengths have to be compared with the positions, row by row?",
        lambda lengths, n: _is_real(lengths[:1].expand(len(lengths)), n),
    ),
    Mistake(
        "with the length of the longest row for all",
        "Every row has a length of its own.",
        "Which shape must the lengths have to be compared with the positions, row by row?",
        lambda lengths, n: _is_real(lengths.max().expand(len(lengths)), n),
    ),
]


def _extreme(hidden: Tensor, real: Tensor) -> Tensor:
    """The largest of each feature over the real tokens; -inf without any."""
    return hidden.masked_fill(~real, -INF).amax(1)


# What is made of the real tokens: (hidden, real (batch, n, 1), lengths (batch, 1)) -> (batch, d).
POOLINGS = [
    Mistake(
        "divided by n",
        "Padding adds nothing to the sum, but it is counted.",
        BY,
        lambda x, real, lengths: (x * real).mean(1),
    ),
    Mistake(
        "summed over all positions, divided by the length",
        "The padding has left the count, but not the sum.",
        "Which terms are in the sum?",
        lambda x, real, lengths: x.sum(1) / lengths.clamp(min=1),
    ),
    Mistake(
        "summed instead of averaged",
        "A long sentence gives a long vector.",
        BY,
        lambda x, real, lengths: (x * real).sum(1),
    ),
    Mistake(
        "with NaN for a length of 0",
        "That is 0 / 0.",
        "What should come out where there is no token?",
        lambda x, real, lengths: (x * real).sum(1) / lengths,
    ),
    Mistake(
        "divided by the length plus one",
        "Something was added so as not to divide by 0.",
        BY,
        lambda x, real, lengths: (x * real).sum(1) / (lengths + 1),
    ),
    Mistake(
        "divided by the root of the length",
        "A long sentence still gives a longer vector.",
        BY,
        lambda x, real, lengths: (x * real).sum(1) / lengths.clamp(min=1) ** 0.5,
    ),
    Mistake(
        "divided by the mean length of the batch",
        "The vector of a sentence depends on how long the others are.",
        BY,
        lambda x, real, lengths: (x * real).sum(1) / lengths.to(x.dtype).mean(),
    ),
    Mistake(
        "divided by all real tokens of the batch",
        "The count runs over the rows as well.",
        BY,
        lambda x, real, lengths: (x * real).sum(1) / lengths.sum(),
    ),
    Mistake(
        "divided by the width",
        "`shape[-1]` is the number of features, not of tokens.",
        BY,
        lambda x, real, lengths: (x * real).sum(1) / x.shape[-1],
    ),
    Mistake(
        "with a count and <=: one token too many in the sum",
        "The comparison is <= in the sum, while the length is the right divisor.",
        BORDER,
        lambda x, real, lengths: (
            (x * (torch.arange(x.shape[1]) <= lengths)[..., None]).sum(1) / lengths.clamp(min=1)
        ),
    ),
    Mistake(
        "over everything: one mean for the whole batch",
        "The rows are mixed: the sum runs over the batch too.",
        "Over which one of the three dimensions does the mean run?",
        lambda x, real, lengths: (
            ((x * real).sum((0, 1)) / real.sum((0, 1)).clamp(min=1)).expand(len(x), -1)
        ),
    ),
    Mistake(
        "over the features instead of the tokens",
        "The mean runs along the last dimension, and the width is lost.",
        "Which dimension of (batch, n, d) do the tokens lie along?",
        lambda x, real, lengths: (x * real).mean(2),
    ),
    Mistake(
        "with the largest of each feature, 0 without tokens",
        "That is max pooling.",
        EVERY,
        lambda x, real, lengths: _extreme(x, real).masked_fill(lengths == 0, 0.0),
    ),
    Mistake(
        "with the largest of each feature, -inf without tokens",
        "That is max pooling, and without any token nothing bounds it from below.",
        EVERY,
        lambda x, real, lengths: _extreme(x, real),
    ),
    Mistake(
        "with the largest of each feature over all positions",
        "That is max pooling, and padding takes part.",
        EVERY,
        lambda x, real, lengths: x.amax(1),
    ),
    Mistake(
        "with the first token",
        "That is how BERT reads off a sentence: from its [CLS] token.",
        EVERY,
        lambda x, real, lengths: x[:, 0],
    ),
    Mistake(
        "with the last real token",
        "That is how a decoder is read off.",
        EVERY,
        lambda x, real, lengths: x.take_along_dim(lengths[..., None].sub(1).clamp(min=0), 1)[:, 0],
    ),
    Mistake(
        "with the last position",
        "It may be padding, and the other tokens are lost.",
        EVERY,
        lambda x, real, lengths: x[:, -1],
    ),
    Mistake(
        "over the tokens that are not 0",
        "The padding is guessed from the numbers; a real token may be 0 and padding need not be.",
        "What decides whether a position is real: its numbers or the length?",
        lambda x, real, lengths: x.sum(1) / x.any(-1).sum(1, keepdim=True).clamp(min=1),
    ),
    Mistake(
        "over those of its real tokens that are not 0",
        "A real token that is the vector 0 counts as well.",
        "What decides whether a position is real: its numbers or the length?",
        lambda x, real, lengths: (
            (x * real).sum(1) / (x * real).any(-1).sum(1, keepdim=True).clamp(min=1)
        ),
    ),
    Mistake(
        "brought to the length 1",
        "That may follow before two sentences are compared, but it is not asked for here.",
        "Does the formula divide by anything but the number of tokens?",
        lambda x, real, lengths: F.normalize((x * real).sum(1), dim=-1),
    ),
]
ex.mistakes_from(PLACES, "the mean", lambda part: _pooled(real=part))
ex.mistakes_from(POOLINGS, "the mean", lambda part: _pooled(reduce=part))

ex.alternative("a product with weights: 1 / length at real tokens")(
    lambda hidden, lengths: torch.einsum(
        "bn,bnd->bd",
        _is_real(lengths, hidden.shape[1]).to(hidden.dtype) / lengths.clamp(min=1)[:, None],
        hidden,
    )
)


@ex.alternative("a loop over the rows")
def _(hidden, lengths):
    rows = [
        row[:length].mean(0) if length else torch.zeros_like(row[0])
        for row, length in zip(hidden, lengths.tolist(), strict=True)
    ]
    return torch.stack(rows)


@ex.alternative("nanmean with the padding set to NaN")
def _(hidden, lengths):
    real = _is_real(lengths, hidden.shape[1])[..., None]
    pooled = hidden.masked_fill(~real, torch.nan).nanmean(1)
    return pooled.where(lengths[:, None] > 0, 0.0)


@ex.alternative("the difference of running sums, in float64")
def _(hidden, lengths):
    sums = F.pad(hidden.double().cumsum(1), (0, 0, 1, 0))  # (batch, n + 1, d): entry i sums i tokens
    total = sums[torch.arange(len(hidden)), lengths]  # (batch, d)
    return (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)


@ex.alternative("scaled before the sum")
def _(hidden, lengths):
    mask = (torch.arange(hidden.size(1)).expand(len(hidden), -1) < lengths.view(-1, 1)).float()
    weight = mask / (mask.sum(1, keepdim=True) + 1e-9)
    return (hidden.mT @ weight.unsqueeze(2).to(hidden.dtype)).squeeze(2)
