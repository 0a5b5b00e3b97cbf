"""Exercises of chapter 08: hide words, guess them, and read a whole sentence at once."""

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
- `tokens`, `noise`, `kinds` and `random_tokens` are all `(batch, n)`. Chance comes from outside, so
  that the result can be checked: `noise` and `kinds` are uniform in [0, 1), and
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


ALL, NONE = [0.0] * 4, [0.9] * 4
EVERY_KIND = [0.0, 0.79, 0.85, 0.95]


def _four(noise: list[float], kinds: list[float], **options: float) -> Case:
    """The tokens 5, 6, 7, 8, beside them the random tokens 1, 2, 3, 4 and the mask 9."""
    tokens, others = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 2, 3, 4]])
    case = {"tokens": tokens, "noise": torch.tensor([noise]), "kinds": torch.tensor([kinds])}
    return case | {"random_tokens": others, "mask_id": 9, **options}


@ex.behaviour("where no token is chosen, the inputs are the tokens and all targets are -100")
def _(answer):
    case = _four(NONE, EVERY_KIND)
    expect(answer.on(case), (case["tokens"], torch.full((1, 4), -100)), case=case)


@ex.behaviour("a chosen token below 0.8 is masked, below 0.9 random, above that it stays")
def _(answer):
    case = _four(ALL, EVERY_KIND)
    inputs, _ = answer.on(case)
    expect(inputs, torch.tensor([[9, 9, 3, 8]]), case=case)


@ex.behaviour("every chosen token is a target, also one that stays in the input")
def _(answer):
    case = _four(ALL, EVERY_KIND)
    _, targets = answer.on(case)
    expect(targets, case["tokens"], case=case)


@ex.behaviour("what stands at -100 in the targets is unchanged in the inputs")
def _(answer):
    case = _four([0.1, 0.9, 0.9, 0.1], EVERY_KIND)
    inputs, targets = answer.on(case)
    expect(inputs[targets == -100], torch.tensor([6, 7]))


@ex.behaviour("with a rate of 1 every token is chosen")
def _(answer):
    case = _four(NONE, ALL, rate=1.0)
    _, targets = answer.on(case)
    expect(targets, case["tokens"], case=case)


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
        "0 is a token too: the model is asked to predict it wherever nothing was chosen.",
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
    "the masking with all chosen tokens masked and a target at every position",
    "The kinds have no effect, and most of the loss is about tokens that stand in the input.",
    ASKED,
)(lambda t, noise, kinds, r, m, rate=0.15: (t.masked_fill(noise < rate, m), t.clone()))
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
)(
    lambda t, noise, kinds, r, m, rate=0.15: mask_tokens(
        t, noise, noise / max(rate, 0.01), r, m, rate
    )
)


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
    """Row b has asked[b] targets, about half of them guessed; a token's logits all differ."""
    ranks = torch.rand(batch, n, V, generator=g).argsort(-1)  # (batch, n, V)
    scale = torch.randint(1, 5, (batch, n, 1), generator=g) / 2
    logits = ranks * scale + normal(g, batch, n, 1)
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
        "Sentences of different length stand in one tensor: is each divided by the same number?",
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
    hidden = normal(g, len(lengths), n, d)
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
        lambda x, real, lengths: ((x * real).sum((0, 1)) / real.sum((0, 1)).clamp(min=1)).expand(
            len(x), -1
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
    sums = F.pad(
        hidden.double().cumsum(1), (0, 0, 1, 0)
    )  # (batch, n + 1, d): entry i sums i tokens
    total = sums[torch.arange(len(hidden)), lengths]  # (batch, d)
    return (total / lengths.clamp(min=1)[:, None]).to(hidden.dtype)


@ex.alternative("scaled before the sum")
def _(hidden, lengths):
    mask = (torch.arange(hidden.size(1)).expand(len(hidden), -1) < lengths.view(-1, 1)).float()
    weight = mask / (mask.sum(1, keepdim=True) + 1e-9)
    return (hidden.mT @ weight.unsqueeze(2).to(hidden.dtype)).squeeze(2)


# --- 4. an encoder block ----------------------------------------------------------------------

ex = Exercise(
    "encoder_block",
    chapter="08_encoder",
    title="A block that reads in both directions",
    minutes=20,
    difficulty=3,
    importance=5,
    points=3,
    batched=True,
    prompt=r"""
An encoder block is the block you know, without the causal mask: every token may attend to every
**real** token, before it or after it. One head, pre-norm, no biases and no weights in the norm:

$$z = \mathrm{norm}(x), \qquad
  x \leftarrow x + \mathrm{softmax}\left(\frac{z W_Q (z W_K)^\top}{\sqrt{d_k}}\right) z W_V\, W_O,
  \qquad x \leftarrow x + \mathrm{relu}(\mathrm{norm}(x)\, W_{up})\, W_{down}$$

$$\mathrm{norm}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + 10^{-5}}} \quad
  \text{over the features of each token, with } \sigma^2 \text{ divided by } d_{model}$$

- `x` is `(batch, n, d_model)`, `w_q` and `w_k` are `(d_model, d_k)`, `w_v` is `(d_model, d_v)` and
  `w_o` `(d_v, d_model)`, `w_up` `(d_model, d_ff)` and `w_down` `(d_ff, d_model)`. No matrix needs a
  transpose.
- `padding`, if given, is bool `(batch, n)`; **True = real**, that is, may be attended to. It hides
  keys: a padded token still attends to the real ones, and nobody reads what it becomes.
- In a sequence without a real token the attention adds 0, not NaN.
""",
    hints=(
        "Whom may a query attend to here, and which dimension of the scores (batch, n_q, n_k) is "
        "that of the keys?",
        "x itself is only ever added to; each half reads norm(x), and the second half reads what "
        "the first has added to. `padding[:, None, :]` lines up with the keys.",
        "scores.masked_fill(~padding[:, None, :], -math.inf) hides the padding; what does softmax "
        "give where a whole row is -inf, and what should stand there?",
    ),
)


@ex.solution
def encoder_block(
    x: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """Pre-norm block that reads in both directions (Vaswani et al. 2017, §3; Xiong et al. 2020).

    x: (batch, n, d_model) -> the same shape; w_q and w_k: (d_model, d_k), w_v: (d_model, d_v), w_o:
    (d_v, d_model), w_up: (d_model, d_ff), w_down: (d_ff, d_model); padding: bool (batch, n).
    """

    ### BEGIN SOLUTION
    def norm(t: Tensor) -> Tensor:  # each token by itself: (batch, n, d_model) -> the same shape
        centred = t - t.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-5)

    z = norm(x)
    query, key, value = z @ w_q, z @ w_k, z @ w_v  # (batch, n, d_k), d_k and d_v
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (batch, n_q, n_k)
    if padding is not None:
        scores = scores.masked_fill(~padding[:, None, :], -math.inf)  # the same keys for all
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)  # no real token: 0 / 0 -> 0
    x = x + weights @ value @ w_o  # (…, n, n) x (…, n, d_v) x (d_v, d_model) -> (…, n, d_model)
    return x + torch.relu(norm(x) @ w_up) @ w_down  # d_model -> d_ff -> d_model
    ### END SOLUTION


def _block_case(g: torch.Generator, sizes: tuple[int, ...], spread: float = 0.7, **options: Tensor):
    """sizes: batch, n, d_model, d_k, d_v, d_ff."""
    batch, n, d_model, d_k, d_v, d_ff = sizes
    shapes = {"w_q": (d_model, d_k), "w_k": (d_model, d_k), "w_v": (d_model, d_v)}
    shapes |= {"w_o": (d_v, d_model), "w_up": (d_model, d_ff), "w_down": (d_ff, d_model)}
    case: Case = {"x": 0.3 + normal(g, batch, n, d_model)}
    case |= {name: normal(g, *shape, spread=spread) for name, shape in shapes.items()}
    return case | options


def _bools(*rows: str) -> Tensor:
    """ "110" is True, True, False."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def _by_hand(g: torch.Generator) -> Case:
    """The smallest case; features and w_up far from where norm and relu have a kink."""
    case = _block_case(g, (1, 2, 2, 1, 1, 1))
    case["x"] = torch.tensor([[[1.0, 3.0], [2.0, 0.0]]]) + normal(g, 1, 2, 2, spread=0.2)
    return case | {"w_up": torch.tensor([[1.3], [0.2]]) + normal(g, 2, 1, spread=0.1)}


def _towering(g: torch.Generator) -> Case:
    """Visible scores around -130, hidden ones around 130."""
    case = _block_case(g, (2, 4, 4, 1, 4, 3), padding=_bools("1011", "0110"))
    ramp, w_q = torch.arange(4.0), torch.tensor([[-4.0], [-1.0], [1.0], [4.0]])
    x = torch.where(case["padding"][..., None], ramp, -ramp) + case["x"] / 20
    return case | {"x": x, "w_q": w_q, "w_k": -w_q}


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    faint = _block_case(g, (1, 3, 4, 2, 3, 5))
    return [
        _by_hand(g),
        _block_case(g, (1, 3, 4, 2, 4, 5)),
        faint | {"x": faint["x"] / 256},  # the variance is about 1e-5
        _block_case(g, (2, 3, 4, 4, 4, 4)),
        _block_case(g, (2, 4, 3, 5, 3, 4)),
        _block_case(g, (1, 4, 4, 4, 4, 4), padding=_bools("1110")),
        _block_case(g, (3, 3, 4, 3, 2, 4), padding=_bools("110", "011", "101")),
        _block_case(g, (2, 3, 4, 3, 4, 3), padding=_bools("000", "110")),
        _towering(g),
        _block_case(g, (3, 4, 3, 2, 5, 4)),
        _block_case(g, (3, 4, 5, 3, 4, 6), padding=_bools("1100", "1111", "0100")),
    ]


def _arguments(seed: int, n: int = 3) -> list[Tensor]:
    """Arguments for a batch of 2, d_model = 4."""
    g = torch.Generator().manual_seed(seed)
    return list(_block_case(g, (2, n, 4, 3, 4, 5)).values())


@ex.behaviour("with w_o = 0 and w_down = 0 the block gives x back")
def _(answer):
    x, w_q, w_k, w_v, w_o, w_up, w_down = _arguments(1)
    expect(answer(x, w_q, w_k, w_v, 0 * w_o, w_up, 0 * w_down), x)


@ex.behaviour("the first token reads the last one")
def _(answer):
    x, w_q, w_k, w_v, w_o, w_up, w_down = _arguments(2)
    want = x + F.layer_norm(x, (4,)).mean(1, keepdim=True) @ w_v @ w_o  # w_q = 0: equal weights
    expect(answer(x, 0 * w_q, w_k, w_v, w_o, w_up, 0 * w_down), want)


@ex.behaviour("without attention it is x + relu(norm(x) w_up) w_down")
def _(answer):
    x, w_q, w_k, w_v, w_o, w_up, w_down = _arguments(3)
    want = x + F.layer_norm(x, (4,)).matmul(w_up).relu() @ w_down
    expect(answer(x, w_q, w_k, w_v, 0 * w_o, w_up, w_down), want)


@ex.behaviour("the tokens in another order give the same outputs in that order")
def _(answer):
    x, *weights = _arguments(4)
    order = torch.tensor([2, 0, 1])
    expect(answer(x[:, order], *weights), answer(x, *weights)[:, order])


@ex.behaviour("the same number added to all features of a token is added to its output, no more")
def _(answer):
    x, *weights = _arguments(5)
    shift = torch.tensor([[[1.0], [-2.0], [0.5]]])
    expect(answer(x + shift, *weights), answer(x, *weights) + shift)


@ex.behaviour("a padded token cannot change a real one")
def _(answer):
    x, *weights = _arguments(6)
    padding, other = _bools("110", "101"), x.clone()
    other[0, 2], other[1, 1] = 3 * x[0, 0] + 1, -x[1, 0]
    expect(answer(other, *weights, padding)[padding], answer(x, *weights, padding)[padding])


@ex.behaviour("with the padding cut off the real tokens come out the same")
def _(answer):
    x, *weights = _arguments(7)
    expect(answer(x, *weights, _bools("110", "110"))[:, :2], answer(x[:, :2], *weights))


@ex.behaviour("in a sequence without a real token the attention adds 0")
def _(answer):
    *arguments, w_down = _arguments(8)
    got = answer(*arguments, 0 * w_down, padding=_bools("111", "000"))
    expect(got[1], arguments[0][1])


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _project(z: Tensor, x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> tuple[Tensor, ...]:
    return z @ w_q, z @ w_k, z @ w_v


def _keys(padding: Tensor | None, n: int) -> Tensor | None:
    """Who is visible: (batch, 1, n_k)."""
    return None if padding is None else padding[:, None, :]


def _pre_norm(x: Tensor, attend: Function, feed: Function, norm: Function) -> Tensor:
    x = x + attend(norm(x), x)
    return x + feed(norm(x))


def _feed(z: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return (z @ w_up).relu() @ w_down


def _encoder(*, wire=_pre_norm, norm=_norm, project=_project, see=_keys, scale=None,
             normalise=None, weigh=visible_softmax, mix=None, feed=_feed,
             out=torch.matmul) -> Function:  # fmt: skip
    """The block with some parts replaced."""

    def function(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
        def attend(z, x):
            query, key, value = project(z, x, w_q, w_k, w_v)
            scores = query @ key.mT * (scale(query, key) if scale else query.shape[-1] ** -0.5)
            mask = see(padding, x.shape[1])
            if normalise:
                hidden = scores if mask is None else scores.masked_fill(~mask, -INF)
                weights = normalise(hidden).nan_to_num(0.0)
            else:
                weights = scores.softmax(-1) if mask is None else weigh(scores, mask)
            return out(mix(weights, query, key, value) if mix else weights @ value, w_o)

        return wire(x, attend, lambda z: feed(z, w_up, w_down), norm)

    return function


RESIDUAL = "What is the result of each half added to?"
NORMED = "What does each half read, and is x itself ever normalised on its way through the block?"
SECOND = "What does the second half read: the block's input, or what the first half made of it?"

# Wrong wirings: (x, attend, feed, norm) -> output.
WIRES = [
    Mistake(
        "with post-norm",
        "x itself is normalised after each sum.",
        NORMED,
        lambda x, a, f, norm: norm(norm(x + a(x, x)) + f(norm(x + a(x, x)))),
    ),
    Mistake(
        "with one more norm at the end",
        "That norm stands once after the last block of the stack, not in a block.",
        NORMED,
        lambda x, a, f, norm: norm(_pre_norm(x, a, f, norm)),
    ),
    Mistake("without any norm", "Both halves read x as it is.", NORMED,
            lambda x, a, f, norm: x + a(x, x) + f(x + a(x, x))),
    Mistake("without the norm before attention", "The first half reads x as it is.", NORMED,
            lambda x, a, f, norm: _second(x + a(x, x), f, norm)),
    Mistake("without the norm before the feed-forward network", "The second half reads x as it is.",
            NORMED, lambda x, a, f, norm: (y := x + a(norm(x), x)) + f(y)),
    Mistake(
        "with the norm on what is added instead of on what is read",
        "The norm stands after each half and before the sum.",
        NORMED,
        lambda x, a, f, norm: (y := x + norm(a(x, x))) + norm(f(y)),
    ),
    Mistake(
        "with the residuals taken from the normalised x",
        "x itself is lost: norm(x) is carried on in its place.",
        RESIDUAL,
        lambda x, a, f, norm: norm(norm(x) + a(norm(x), x)) + f(norm(norm(x) + a(norm(x), x))),
    ),
    Mistake("without the residual around attention", "What attention gives replaces x.", RESIDUAL,
            lambda x, a, f, norm: _second(a(norm(x), x), f, norm)),
    Mistake("without the residual around the feed-forward network",
            "What the second half gives replaces x.", RESIDUAL,
            lambda x, a, f, norm: f(norm(x + a(norm(x), x)))),
    Mistake("without residuals", "Each half replaces x.", RESIDUAL,
            lambda x, a, f, norm: f(norm(a(norm(x), x)))),
    Mistake("without attention", "The tokens never look at one another.", "Are both halves there?",
            lambda x, a, f, norm: _second(x, f, norm)),
    Mistake("without the feed-forward network", "The second half is missing.",
            "Are both halves there?", lambda x, a, f, norm: x + a(norm(x), x)),
    Mistake("with the feed-forward network first", "The two halves have changed places.",
            "Which half comes first?",
            lambda x, a, f, norm: (y := _second(x, f, norm)) + a(norm(y), y)),
    Mistake(
        "with both halves reading the block's input",
        "That is a parallel block: the network never sees what attention found.",
        SECOND,
        lambda x, a, f, norm: x + a(norm(x), x) + f(norm(x)),
    ),
    Mistake(
        "with the second residual from the block's input",
        "What attention added is read by the network and then lost.",
        "In the second line of the formula, is x the old one or the new one?",
        lambda x, a, f, norm: x + f(norm(x + a(norm(x), x))),
    ),
]  # fmt: skip


def _second(x: Tensor, feed: Function, norm: Function) -> Tensor:
    """The second half, as it should be."""
    return x + feed(norm(x))


ROOT = "What exactly stands under the root, and what above the line?"

NORMS = [
    Mistake(
        "with the unbiased variance",
        "The variance divides by d - 1, as `var` and `std` do unless told otherwise.",
        "Which argument of `var` and `std` makes them divide by d?",
        lambda x: _centred(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    ),
    Mistake(
        "with 1e-5 outside the root",
        "√v + ε and √(v + ε) differ where v is small.",
        ROOT,
        lambda x: _centred(x) / (x.std(-1, correction=0, keepdim=True) + 1e-5),
    ),
    Mistake(
        "with the unbiased standard deviation plus 1e-5",
        "The variance divides by d - 1, and ε stands outside the root.",
        ROOT,
        lambda x: _centred(x) / (x.std(-1, keepdim=True) + 1e-5),
    ),
    Mistake(
        "with an RMS norm",
        "The mean is not subtracted.",
        ROOT,
        lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5),
    ),
    Mistake(
        "without the root in the norm",
        "A token ten times as large comes out ten times as small.",
        ROOT,
        lambda x: _centred(x) / (x.var(-1, correction=0, keepdim=True) + 1e-5),
    ),
    Mistake(
        "with a norm that only subtracts the mean",
        "A large token stays large.",
        ROOT,
        _centred,
    ),
    Mistake(
        "with the norm over the tokens instead of the features",
        "Each feature is normalised along the sequence.",
        "Should the numbers of one token depend on another token here?",
        lambda x: _norm(x.mT).mT,
    ),
    Mistake(
        "with the norm over tokens and features together",
        "The statistics of a whole sequence are used for each of its tokens.",
        "Should the numbers of one token depend on another token here?",
        lambda x: F.layer_norm(x, x.shape[-2:]),
    ),
]

PART = "Does each of the six matrices appear once, and in its place?"

PROJECTIONS = [
    Mistake(
        "with w_q and w_k swapped",
        "Row i of the scores says how well key i fits to the queries.",
        "Which index of the scores belongs to the query?",
        lambda z, x, q, k, v: (z @ k, z @ q, z @ v),
    ),
    Mistake("with w_q for queries and keys", "w_k has no effect.", PART,
            lambda z, x, q, k, v: (z @ q, z @ q, z @ v)),
    Mistake("with w_k for keys and values", "w_v has no effect.", PART,
            lambda z, x, q, k, v: (z @ q, z @ k, z @ k)),
    Mistake("with the tokens themselves as values", "w_v has no effect.", PART,
            lambda z, x, q, k, v: (z @ q, z @ k, z)),
    Mistake(
        "with values that are not normalised",
        "Only queries and keys are made of norm(x).",
        "What are the values made of: x, or norm(x)?",
        lambda z, x, q, k, v: (z @ q, z @ k, x @ v),
    ),
    Mistake(
        "with keys and values that are not normalised",
        "Only the queries are made of norm(x).",
        "What are keys and values made of: x, or norm(x)?",
        lambda z, x, q, k, v: (z @ q, x @ k, x @ v),
    ),
]  # fmt: skip

FEEDS = [
    Mistake("without relu", "Two matrices in a row are one.", "What stands between the matrices?",
            lambda z, up, down: z @ up @ down),
    Mistake("with gelu instead of relu", "The formula has relu.", "What is between the matrices?",
            lambda z, up, down: F.gelu(z @ up) @ down),
    Mistake("with relu before w_up", "relu acts on the token instead of on the hidden features.",
            "What is the argument of relu in the formula?",
            lambda z, up, down: z.relu() @ up @ down),
    Mistake("with relu after w_down", "The block can then only add, never take away.",
            "What is the argument of relu in the formula?",
            lambda z, up, down: (z @ up @ down).relu()),
    Mistake("with relu after both matrices", "The block can then only add, never take away.",
            "How often does the formula apply relu?",
            lambda z, up, down: ((z @ up).relu() @ down).relu()),
]  # fmt: skip


def _causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


AHEAD = "May a token of an encoder attend to a later one?"
KEYS = "Which dimension of the scores (batch, n_q, n_k) is that of the keys?"

# Wrong views: (padding or None, n) -> visible, broadcasts to (batch, n_q, n_k), or None.
VIEWS = [
    Mistake(
        "with a causal mask too",
        "No token sees a later one: that is a decoder.",
        AHEAD,
        lambda p, n: _causal(n) if p is None else p[:, None, :] & _causal(n),
    ),
    Mistake(
        "with a causal mask instead of the padding",
        "No token sees a later one, and the padding is visible.",
        AHEAD,
        lambda p, n: _causal(n),
    ),
    Mistake(
        "with a causal mask where padding is given",
        "The two masks have nothing to do with each other.",
        AHEAD,
        lambda p, n: None if p is None else p[:, None, :] & _causal(n),
    ),
    Mistake(
        "with the padding along the queries",
        "A padded query is blind, but a real one sees the padding.",
        KEYS,
        lambda p, n: None if p is None else p[:, :, None].expand(-1, n, n),
    ),
    Mistake(
        "with the padding along queries and keys",
        "A padded query is blind too, so a padded token comes out differently.",
        "Which of the two does `padding` hide: queries, keys or both?",
        lambda p, n: None if p is None else p[:, :, None] & p[:, None, :],
    ),
    Mistake(
        "with the padding of the first row for the whole batch",
        "Each row has padding of its own.",
        "Which shape must the mask have so that its batch meets the batch of the scores?",
        lambda p, n: None if p is None else p[:1, None, :],
    ),
    Mistake(
        "in which no token sees itself",
        "The diagonal is hidden.",
        "Is there a reason why a token should not attend to itself?",
        lambda p, n: (~torch.eye(n, dtype=torch.bool)) & (True if p is None else p[:, None, :]),
    ),
]

THING = "an encoder block"
ALIKE = ("queries", "causal", "along the queries", "without keepdim", "the output", "-inf, and the")
"""In the names of shared mistakes that do not show here: n_q = n_k, and all queries see alike."""


def _fitting(table: list[Mistake]) -> list[Mistake]:
    return [part for part in table if not any(words in part.name for words in ALIKE)]


ex.mistakes_from(WIRES, THING, lambda part: _encoder(wire=part))
ex.mistakes_from(NORMS, THING, lambda part: _encoder(norm=part))
ex.mistakes_from(PROJECTIONS, THING, lambda part: _encoder(project=part))
ex.mistakes_from(FEEDS, THING, lambda part: _encoder(feed=part))
ex.mistakes_from(VIEWS, THING, lambda part: _encoder(see=part))
ex.mistakes_from(_fitting(SCALES), THING, lambda part: _encoder(scale=part))
ex.mistakes_from(NORMALISATIONS, THING, lambda part: _encoder(normalise=part))
ex.mistakes_from(_fitting(MIXTURES[1:]), THING, lambda part: _encoder(mix=part))
ex.mistakes_from(_fitting(MASKINGS), THING, lambda part: _encoder(weigh=part))
ex.mistake(
    "an encoder block scaled by √d_model",
    "The width of the tokens stands where that of queries and keys should.",
    "Over how many products does one score sum?",
)(
    lambda x, w_q, *others, padding=None: encoder_block(
        x, w_q * (w_q.shape[1] / x.shape[-1]) ** 0.5, *others, padding=padding
    )
)
ex.mistake(
    "an encoder block without w_o",
    "What attention gives is added as it is, at the width d_v.",
    PART,
)(_encoder(out=lambda heads, w_o: heads))
ex.mistake(
    "an encoder block with the padded tokens set to 0 at the end",
    "Nobody reads them, but the formula does not do it.",
    "What does the formula do with a padded query?",
)(
    lambda *args, padding=None: (
        encoder_block(*args, padding=padding) * (1 if padding is None else padding[..., None])
    )
)
ex.mistake(
    "an encoder block with the padded tokens set to 0 at the start, and visible",
    "A token of zeros still has a score, and takes its share of the weights.",
    "Which score makes exp exactly 0?",
)(
    lambda x, *weights, padding=None: encoder_block(
        x * (1 if padding is None else padding[..., None]), *weights
    )
)


@ex.alternative("F.layer_norm and scaled_dot_product_attention")
def _(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
    z = F.layer_norm(x, x.shape[-1:])
    mask = None if padding is None else padding[:, None, :].expand(-1, x.shape[1], -1)
    heads = F.scaled_dot_product_attention(z @ w_q, z @ w_k, z @ w_v, attn_mask=mask)
    x = x + heads.nan_to_num(0.0) @ w_o
    return x + F.relu(F.layer_norm(x, x.shape[-1:]) @ w_up) @ w_down


@ex.alternative("a loop over rows, the padding cut off the keys")
def _(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
    rows = []
    for b, row in enumerate(x):
        z = F.layer_norm(row, row.shape[-1:])
        real = z if padding is None else z[padding[b]]  # (number of real tokens, d_model)
        weights = (z @ w_q @ (real @ w_k).T / w_q.shape[1] ** 0.5).softmax(-1)
        rows.append(row + weights @ (real @ w_v @ w_o))
    x = torch.stack(rows)
    return x + (F.layer_norm(x, x.shape[-1:]) @ w_up).clamp(min=0) @ w_down


@ex.alternative("finfo.min, and the mask again")
def _(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
    z = (x - x.mean(-1, keepdim=True)) * (x.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    real = torch.ones(x.shape[:2], dtype=torch.bool) if padding is None else padding
    scores = torch.einsum("bik,bjk->bij", z @ w_q, z @ w_k) * w_k.size(1) ** -0.5
    scores = torch.where(real[:, None], scores, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * real[:, None]
    x = x + torch.einsum("bij,bjv,vd->bid", weights, z @ w_v, w_o)
    hidden = F.layer_norm(x, x.shape[2:]) @ w_up
    return torch.addmm(x.flatten(0, 1), hidden.relu().flatten(0, 1), w_down).view_as(x)


@ex.alternative("an additive mask, in float64 and back")
def _(x, w_q, w_k, w_v, w_o, w_up, w_down, padding=None):
    dtype = x.dtype
    x, w_q, w_k, w_v, w_o, w_up, w_down = (
        t.double() for t in (x, w_q, w_k, w_v, w_o, w_up, w_down)
    )
    z = _norm(x)
    scores = (z @ w_q / w_q.shape[1] ** 0.5) @ (z @ w_k).mT
    if padding is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~padding[:, None, :], -INF)
    x = x + (scores.softmax(-1).nan_to_num(0.0) @ z) @ (w_v @ w_o)
    return (x + _feed(_norm(x), w_up, w_down)).to(dtype)


# --- 5. a head that classifies ----------------------------------------------------------------

ex = Exercise(
    "classify_loss",
    chapter="08_encoder",
    title="A loss for a classifier that should not be too sure",
    minutes=15,
    difficulty=2,
    importance=3,
    points=2,
    prompt=r"""
A pooled vector and one matrix make a classifier. **Label smoothing** asks it not for all of the
probability at the right class $y$, but for a little less, and spreads the rest evenly over **all**
classes, the right one included:

$$p = \mathrm{softmax}(h W), \qquad
  q_c = (1 - \varepsilon)\,[c = y] + \frac{\varepsilon}{\text{classes}}, \qquad
  \text{loss} = -\frac{1}{\text{batch}} \sum_b \sum_c q_{b,c} \log p_{b,c}$$

- `hidden` is `(batch, d)`, `w` is `(d, classes)`, used as `hidden @ w`; `labels` is `(batch,)`.
- `smoothing` is $\varepsilon$, from 0 to 1. With 0 the loss is the ordinary cross-entropy.
- The logarithm is the natural one. Logits may be as large as 1000.

`torch.log_softmax` is allowed. Write it without `F.cross_entropy` to learn something.
""",
    hints=(
        "Do the q of one row sum to 1, and how much of it has the right class?",
        "The sum over c falls into two parts: (1 - ε) times the log p of the label, and ε times "
        "the mean of log p over all classes.",
        "log_p = torch.log_softmax(hidden @ w, dim=-1); log_p.gather(1, labels[:, None]) gives "
        "that of the label. What is the other part?",
    ),
)


@ex.solution
def classify_loss(hidden: Tensor, w: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy [nats] with label smoothing (Szegedy et al. 2016, §7), mean over the batch.

    hidden: (batch, d), w: (d, classes), labels: ints (batch,), smoothing: ε in [0, 1]
    -> a number, shape ().
    """
    ### BEGIN SOLUTION
    # log_softmax in one step: log of a softmax that has become 0 would be -inf.
    log_p = torch.log_softmax(hidden @ w, dim=-1)  # (batch, d) x (d, classes) -> (batch, classes)
    right = log_p.gather(1, labels[:, None]).squeeze(1)  # (batch, 1) -> (batch,)
    everyone = log_p.mean(dim=1)  # (batch,): each class has the share 1 / classes
    return -((1 - smoothing) * right + smoothing * everyone).mean()
    ### END SOLUTION


def _labelled(g: torch.Generator, batch: int, d: int, classes: int, **options: float) -> Case:
    hidden, w = normal(g, batch, d), normal(g, d, classes)
    return {
        "hidden": hidden,
        "w": w,
        "labels": torch.randint(classes, (batch,), generator=g),
    } | options


@ex.cases
def _(g: torch.Generator) -> list[Case]:
    low = _labelled(g, 2, 1, 2, smoothing=0.5)
    low |= {"hidden": torch.tensor([[1.0], [-1.0]]), "w": torch.tensor([[60.0, -60.0]])}
    high = _labelled(g, 2, 2, 3) | {"hidden": torch.tensor([[100.0, 0.0], [0.0, 100.0]])}
    return [
        _labelled(g, 2, 1, 2),
        _labelled(g, 1, 2, 3, smoothing=0.1),
        _labelled(g, 3, 4, 2, smoothing=0.5),
        _labelled(g, 3, 3, 3),
        _labelled(g, 4, 2, 5),
        _labelled(g, 5, 3, 3, smoothing=0.3),
        low,
        high | {"w": torch.tensor([[2.0, 1.0, -1.5], [1.0, 2.0, 3.0]])},
        _labelled(g, 2, 3, 4, smoothing=1.0),
        _labelled(g, 4, 4, 4, smoothing=0.2),
        _labelled(g, 6, 5, 3),
        _labelled(g, 2, 3, 7),
    ]


EYE = torch.eye(3)
"""With this w the logits are the hidden vector."""
LABELS = torch.tensor([0, 2])


@ex.behaviour("with equal logits it is log(classes), whatever the smoothing")
def _(answer):
    for smoothing in (0.0, 0.4, 1.0):
        loss = answer(torch.zeros(2, 3), EYE, LABELS, smoothing=smoothing)
        expect(loss, torch.tensor(math.log(3)))


@ex.behaviour("without smoothing it is -log p of the label")
def _(answer):
    case = {"hidden": torch.tensor([[0.5, 0.2, 0.3]]).log(), "w": EYE, "labels": torch.tensor([1])}
    expect(answer.on(case), torch.tensor(-math.log(0.2)), case=case)


@ex.behaviour("it is the mean over the batch")
def _(answer):
    hidden, w, labels = *some(1, (2, 3), (3, 4)), torch.tensor([3, 1])
    alone = [answer(hidden[b : b + 1], w, labels[b : b + 1], smoothing=0.2) for b in (0, 1)]
    expect(answer(hidden, w, labels, smoothing=0.2), (alone[0] + alone[1]) / 2)


@ex.behaviour("with a smoothing of 1 the labels have no effect")
def _(answer):
    hidden, w = some(2, (2, 3), (3, 3))
    others = torch.tensor([1, 0])
    expect(answer(hidden, w, LABELS, smoothing=1.0), answer(hidden, w, others, smoothing=1.0))


@ex.behaviour("with p equal to q = (0.8, 0.1, 0.1) it is the entropy of q: 0.639")
def _(answer):
    case = {"hidden": torch.tensor([[0.8, 0.1, 0.1]]).log(), "w": EYE, "labels": LABELS[:1]}
    case["smoothing"] = 0.3
    expect(answer.on(case), torch.tensor(0.6390319), case=case)


@ex.behaviour("half-way from ε = 0 to ε = 1 the loss is half-way too")
def _(answer):
    hidden, w = some(3, (2, 3), (3, 3))
    none, half, full = (answer(hidden, w, LABELS, smoothing=s) for s in (0.0, 0.5, 1.0))
    expect(half, (none + full) / 2)


@ex.behaviour("the same number added to all logits changes nothing")
def _(answer):
    hidden, w = some(4, (2, 3), (3, 3))
    shift = torch.tensor([[1.0], [-2.0], [0.5]])  # (3, 1): the same for each class
    got, want = (answer(hidden, m, LABELS, smoothing=0.2) for m in (w + shift, w))
    expect(got, want)


@ex.behaviour("logits of ±1000 give a loss of 2000, not inf")
def _(answer):
    case = {"hidden": torch.tensor([[1000.0]]), "w": torch.tensor([[1.0, -1.0]])}
    case["labels"] = torch.tensor([1])
    expect(answer.on(case), torch.tensor(2000.0), case=case)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).float()


def _smoothed(y: Tensor, e: float) -> Tensor:
    """The targets q, as they should be, from one-hot ones (batch, classes)."""
    return (1 - e) * y + e / y.shape[1]


def _smooth_loss(*, target=_smoothed, log=None, reduce=None) -> Function:
    """The loss with one part replaced.

    target: (one-hot labels (batch, classes), ε) -> q; log: logits (batch, classes) -> log p;
    reduce: (q, log p) -> ().
    """

    def function(hidden, w, labels, smoothing=0.0):
        logits = hidden @ w
        q = target(_one_hot(labels, w.shape[1]).to(logits.dtype), smoothing)
        log_p = log(logits) if log else logits.log_softmax(-1)
        return reduce(q, log_p) if reduce else -(q * log_p).sum(1).mean()

    return function


SPREAD = "Among how many classes is ε shared out, and is the right one among them?"
SUM_1 = "What do the q of one row sum to?"

# Wrong targets: (one-hot labels, ε) -> q.
SMOOTHINGS = [
    Mistake(
        "without smoothing",
        "The argument smoothing has no effect.",
        "Where does `smoothing` enter?",
        lambda y, e: y,
    ),
    Mistake(
        "with a fixed smoothing of 0.1",
        "The argument smoothing has no effect.",
        "Where does `smoothing` enter?",
        lambda y, e: _smoothed(y, 0.1),
    ),
    Mistake(
        "with ε shared out among the wrong classes only",
        "ε / (classes - 1) goes to each wrong class and nothing of it to the right one.",
        SPREAD,
        lambda y, e: (1 - e) * y + (1 - y) * e / (y.shape[1] - 1),
    ),
    Mistake(
        "with ε / (classes - 1) for every class",
        "There are as many shares as classes, so the q sum to more than 1.",
        SUM_1,
        lambda y, e: (1 - e) * y + e / (y.shape[1] - 1),
    ),
    Mistake(
        "with ε / classes for the wrong classes only",
        "The right class lacks its share, so the q sum to less than 1.",
        SUM_1,
        lambda y, e: (1 - e) * y + (1 - y) * e / y.shape[1],
    ),
    Mistake(
        "with ε taken away from the right class and given to none",
        "The uniform part is missing, so the loss is only scaled by 1 - ε.",
        SUM_1,
        lambda y, e: (1 - e) * y,
    ),
    Mistake(
        "with ε / classes added and nothing taken away",
        "The right class keeps all of its 1, so the q sum to 1 + ε.",
        SUM_1,
        lambda y, e: y + e / y.shape[1],
    ),
    Mistake(
        "with ε for each class",
        "ε is not divided, so the q sum to more than 1.",
        SUM_1,
        lambda y, e: (1 - e) * y + e,
    ),
    Mistake(
        "with ε and 1 - ε swapped",
        "ε goes to the label and 1 - ε to the uniform part.",
        "What should be left of the formula when ε is 0?",
        lambda y, e: _smoothed(y, 1 - e),
    ),
    Mistake(
        "with ε divided by the batch",
        "`shape[0]` is the batch, not the number of classes.",
        SPREAD,
        lambda y, e: (1 - e) * y + e / y.shape[0],
    ),
    Mistake(
        "with the q brought through softmax",
        "The q are probabilities already.",
        SUM_1,
        lambda y, e: _smoothed(y, e).softmax(-1),
    ),
]

INSIDE = "Which of the two is smoothed: what is asked for, or what the model says?"

# Wrong log p: logits (batch, classes) -> (batch, classes).
LOGS = [
    Mistake(
        "without softmax",
        "The logits themselves are taken for log-probabilities.",
        "What turns logits into log-probabilities?",
        lambda z: z,
    ),
    Mistake(
        "with softmax applied twice",
        "The probabilities are taken for logits once more.",
        "What does `F.cross_entropy` or `log_softmax` expect: logits or probabilities?",
        lambda z: z.softmax(-1).log_softmax(-1),
    ),
    Mistake(
        "with softmax over the batch",
        "The rows compete with one another instead of the classes.",
        "Along which dimension of (batch, classes) do the classes lie?",
        lambda z: z.log_softmax(0),
    ),
    Mistake(
        "with the probability instead of its logarithm",
        "The logarithm is missing.",
        "What stands between q and p in the formula?",
        lambda z: z.softmax(-1),
    ),
    Mistake(
        "with the logarithm to the base 2",
        "That loss is in bits instead of nats.",
        "What is the loss of two equal logits: log 2, or 1?",
        lambda z: z.log_softmax(-1) / math.log(2),
    ),
    Mistake(
        "with the logarithm of a softmax that has underflowed",
        "Softmax of an unlikely class is 0 in float32, and log 0 is -inf.",
        "Which function computes the logarithm of softmax in one step?",
        lambda z: z.softmax(-1).log(),
    ),
    Mistake(
        "with a small number added before the logarithm",
        "An unlikely class costs no more than -log of that number.",
        "Which function computes the logarithm of softmax in one step?",
        lambda z: (z.softmax(-1) + 1e-9).log(),
    ),
    Mistake(
        "with exp of the raw logits",
        "exp of a large logit is inf.",
        "What may be subtracted from all logits of a row without changing the result?",
        lambda z: z - z.exp().sum(-1, keepdim=True).log(),
    ),
    Mistake(
        "with sigmoid instead of softmax",
        "Each class is judged alone, so the probabilities do not sum to 1.",
        "Which classes share the probability 1?",
        lambda z: F.logsigmoid(z),
    ),
]

# What is made of q and log p, both (batch, classes): -> ().
ENDS = [
    Mistake(
        "summed over the batch",
        "The loss grows with the batch.",
        "By what is the sum divided?",
        lambda q, log_p: -(q * log_p).sum(),
    ),
    Mistake(
        "averaged over the classes too",
        "The q of a row already are the weights of a mean: their products are to be summed.",
        "Over which dimension is the sum, and over which the mean?",
        lambda q, log_p: -(q * log_p).mean(),
    ),
    Mistake(
        "divided by the classes instead of the batch",
        "`shape[1]` is the number of classes.",
        "By what is the sum divided?",
        lambda q, log_p: -(q * log_p).sum() / q.shape[1],
    ),
    Mistake(
        "with the sign turned round",
        "That is never above 0.",
        "Should a good model have a low loss or a high one?",
        lambda q, log_p: (q * log_p).sum(1).mean(),
    ),
    Mistake(
        "as the distance KL(q, p)",
        "The entropy of q is subtracted, so that the least loss is 0.",
        "Is there a logarithm of q in the formula?",
        lambda q, log_p: (torch.xlogy(q, q) - q * log_p).sum(1).mean(),
    ),
    Mistake(
        "as the squared distance of p and q",
        "That is the Brier score, not the cross-entropy.",
        "Where is the logarithm?",
        lambda q, log_p: (log_p.exp() - q).square().sum(1).mean(),
    ),
    Mistake(
        "as perplexity",
        "exp of the mean loss is the perplexity.",
        "Does the formula take exp at the end?",
        lambda q, log_p: (-(q * log_p).sum(1).mean()).exp(),
    ),
    Mistake(
        "with the logarithm of the expected probability",
        "Sum and logarithm are in the wrong order.",
        "Is it the sum of logarithms, or the logarithm of a sum?",
        lambda q, log_p: -(q * log_p.exp()).sum(1).log().mean(),
    ),
    Mistake(
        "of the worst row alone",
        "The largest loss of the batch stands where the mean should.",
        "By what is the sum over the rows divided?",
        lambda q, log_p: (-(q * log_p).sum(1)).amax(),
    ),
]
ex.mistakes_from(SMOOTHINGS, "the loss", lambda part: _smooth_loss(target=part))
ex.mistakes_from(LOGS, "the loss", lambda part: _smooth_loss(log=part))
ex.mistakes_from(ENDS, "the loss", lambda part: _smooth_loss(reduce=part))


def _of_log(change: Function) -> Function:
    """The loss -log of `change(p, ε)` at the label."""

    def function(hidden, w, labels, smoothing=0.0):
        p = change((hidden @ w).log_softmax(-1), smoothing)
        return -p.gather(1, labels[:, None]).mean()

    return function


ex.mistake(
    "the loss with the probabilities smoothed instead of the targets",
    "log((1 - ε) p + ε / classes) bounds the loss: a wrong model is forgiven.",
    INSIDE,
)(_of_log(lambda log_p, e: torch.log((1 - e) * log_p.exp() + e / log_p.shape[1]) if e else log_p))
ex.mistake(
    "the loss with the logits smoothed instead of the targets",
    "The logits are multiplied by 1 - ε.",
    INSIDE,
)(_of_log(lambda log_p, e: ((1 - e) * log_p).log_softmax(-1)))
ex.mistake(
    "the loss minus ε times the entropy of p",
    "That is the confidence penalty, a sister of label smoothing.",
    "Which distribution stands in front of the logarithm: p or q?",
)(
    lambda h, w, y, smoothing=0.0: (
        _smooth_loss()(h, w, y)
        + smoothing * ((h @ w).softmax(-1) * (h @ w).log_softmax(-1)).sum(1).mean()
    )
)
ex.mistake(
    "the loss with logits divided by √d",
    "That scale belongs to the scores of attention.",
    "Does the formula divide the logits?",
)(lambda h, w, y, smoothing=0.0: _smooth_loss()(h / h.shape[1] ** 0.5, w, y, smoothing))
ex.mistake(
    "the loss with w transposed",
    "w is used as hidden @ w; torch.nn.Linear stores its weight the other way round.",
    "What shape does `hidden @ w` have?",
)(lambda h, w, y, smoothing=0.0: _smooth_loss()(h, w.mT, y, smoothing))
ex.mistake(
    "the loss with the classes counted from 1",
    "The label 0 is the first class.",
    "Which column of the logits belongs to the label 0?",
)(lambda h, w, y, smoothing=0.0: _smooth_loss()(h, w, (y - 1) % w.shape[1], smoothing))

ex.alternative("F.cross_entropy with label_smoothing")(
    lambda hidden, w, labels, smoothing=0.0: F.cross_entropy(
        hidden @ w, labels, label_smoothing=smoothing
    )
)
ex.alternative("the targets q written out, einsum")(
    lambda hidden, w, labels, smoothing=0.0: (
        -torch.einsum(
            "bc,bc->",
            _smoothed(_one_hot(labels, w.shape[1]).to(w.dtype), smoothing),
            F.log_softmax(torch.einsum("bd,dc->bc", hidden, w), dim=1),
        )
        / len(labels)
    )
)


@ex.alternative("F.cross_entropy with soft targets")
def _(hidden, w, labels, smoothing=0.0):
    q = torch.full((len(labels), w.shape[1]), smoothing / w.shape[1], dtype=w.dtype)
    q[torch.arange(len(labels)), labels] += 1 - smoothing
    return F.cross_entropy(hidden @ w, q)


@ex.alternative("a loop over the rows, log-sum-exp")
def _(hidden, w, labels, smoothing=0.0):
    total = 0.0
    for vector, label in zip(hidden, labels.tolist(), strict=True):
        logits = vector @ w  # (d,) x (d, classes) -> (classes,)
        expected = (1 - smoothing) * logits[label] + smoothing * logits.mean()
        total = total + torch.logsumexp(logits, 0) - expected
    return total / len(hidden)


@ex.alternative("KL divergence plus the entropy of q, in float64")
def _(hidden, w, labels, smoothing=0.0):
    log_p = (hidden.double() @ w.double()).log_softmax(-1)
    q = _smoothed(_one_hot(labels, w.shape[1]).double(), smoothing)
    loss = F.kl_div(log_p, q, reduction="batchmean") - torch.xlogy(q, q).sum(1).mean()
    return loss.to(hidden.dtype)
