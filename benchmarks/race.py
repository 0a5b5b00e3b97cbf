"""The race: how fast to the loss of nanoGPT's published recipe for a CPU, one change at a time.

Every runner trains on the same text from a random start, by gradients only, with no statistics of
the text and no table indexed by more than one character. A time is that of the training loop. All
runners run one after the other for each seed, so that a slow minute of the machine hits all alike.
The play in neither split, King Lear, says whether what was tuned was only the validation text.

    python benchmarks/race.py [--seeds 3] [--only NAME …] [--quick]

writes benchmarks/results/race.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from common import write
from torch import Tensor, nn

from course_lib import data, training
from course_lib.models import Decoder, KneserNey, TransformerConfig
from course_lib.training.optimizers import split_parameters

BLOCK, CHARACTERS, UNSEEN = 64, 1_115_394, "king-lear"
THREADS = 2


@dataclass(frozen=True)
class Runner:
    """One way to train: what it changes, the model, and the arguments of the loop."""

    name: str
    change: str
    group: str  # "recipe": its own network; "plain": a plain Transformer; "open"; "long": own goal
    steps: int
    batch: int
    config: dict[str, Any] = field(default_factory=dict)
    smear: int = 0
    muon: float | None = None  # the peak rate of matrices, √max(1, out / in) left aside
    adamw: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.1
    order: str = "random"  # of the blocks: "random" places, or "shuffled": each once
    loop: dict[str, Any] = field(default_factory=dict)

    def build(self, vocab_size: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: Any = Decoder(replace(RECIPE, vocab_size=vocab_size, **self.config))
        if self.smear:
            model.embedding = Smear(model.embedding, self.smear, model.config.d_model)
        return model

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices, rest = split_parameters(model)
        if self.muon is None:  # the recipe: decay for matrices and embeddings, none for vectors
            decayed = [p for p in model.parameters() if p.ndim >= 2]
            vectors = [p for p in model.parameters() if p.ndim < 2]
            groups = [
                {"params": decayed, "weight_decay": self.decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            return [torch.optim.AdamW(groups, lr=self.adamw, betas=self.betas, fused=True)]
        adamw = torch.optim.AdamW(
            rest, lr=self.adamw, betas=self.betas, weight_decay=0.0, fused=True
        )
        return [training.Muon(matrices, self.muon), adamw]


class Smear(nn.Module):
    """An embedding mixed with those of the characters before it, each channel as it has learned.

    x_t = e_t + Σ_k g_k ⊙ e_{t-k}: a causal convolution of a few taps, one per channel.
    """

    def __init__(self, embedding: nn.Module, taps: int, d_model: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.gates = nn.Parameter(torch.zeros(taps, d_model))

    def forward(self, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        e = self.embedding(tokens, *args, **options)  # (batch, n, d_model)
        x = e
        for k, gate in enumerate(self.gates, 1):
            x = x + gate * nn.functional.pad(e, (0, 0, k, 0))[:, : e.shape[1]]
        return x


RECIPE = TransformerConfig(
    vocab_size=64, d_model=128, num_layers=4, num_heads=4, max_length=BLOCK, bias=False
)
"""4 layers, 4 heads, width 128, learned positions, no biases, tied embeddings, no dropout."""

LINEAR = {"schedule": "linear", "warmup": 0, "clip": None}
HALF = {**LINEAR, "autocast": torch.bfloat16}
MODERN = {
    "position": "rotary", "activation": "relu2", "zero_residuals": True, "tie_embeddings": False,
    "norm_affine": False, "num_heads": 2,
}  # fmt: skip
FAST = {"betas": (0.8, 0.95), "order": "shuffled"}
RUNNERS = [
    Runner(
        "recipe", "nanoGPT's recipe as published", "recipe", 2000, 12,
        loop={"schedule": "cosine", "final": 0.1, "warmup": 100, "clip": 1.0},
    ),
    Runner(
        "rate", "learning rate 4e-3, linear decay to 0", "recipe", 1350, 12, adamw=4e-3,
        loop={**LINEAR, "warmup": 50, "clip": 1.0},
    ),
    Runner(
        "muon", "Muon for matrices; no block twice", "recipe", 380, 16, muon=0.04, adamw=0.006,
        loop=LINEAR, **FAST,
    ),
    Runner(
        "bfloat16", "products in bfloat16", "recipe", 380, 16, muon=0.04, adamw=0.006, loop=HALF,
        **FAST,
    ),
    Runner(
        "modern", "rotary, squared ReLU, outputs from zero, free head", "plain", 250, 16, MODERN,
        muon=0.03, adamw=0.03, loop=HALF, **FAST,
    ),
    Runner(
        "shallow", "2 layers of 96", "plain", 360, 16, {**MODERN, "num_layers": 2, "d_model": 96},
        muon=0.04, adamw=0.03, loop=HALF, **FAST,
    ),
    Runner(
        "smear", "2 layers of 64, embeddings mixed with their 5 predecessors", "open", 305, 16,
        {**MODERN, "num_layers": 2, "d_model": 64}, smear=5, muon=0.04, adamw=0.03, loop=HALF,
        **FAST,
    ),
    Runner(
        "long", "4 layers of 128 and the same mixing, for the recipe's time", "long", 1300, 24,
        MODERN, smear=5, muon=0.02, adamw=0.02, loop=HALF, **FAST,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Course:
    """The track: training text, validation batches, and those of a play that nobody tuned on."""

    vocab_size: int
    train: Tensor
    validation: list[Any]
    unseen: list[Any]


def course() -> Course:
    plays = data.shakespeare()
    tokenizer = data.CharTokenizer("".join(plays.values()))
    text = "".join(text for name, text in plays.items() if name != UNSEEN)[:CHARACTERS]
    train, validation = data.split(tokenizer.encode(text))
    blocks = [
        data.consecutive_batches(ids, length=BLOCK, batch_size=64)
        for ids in (validation, tokenizer.encode(plays[UNSEEN]))
    ]
    return Course(tokenizer.vocab_size, train, *blocks)


def run(runner: Runner, track: Course, seed: int) -> dict[str, float]:
    """Train once: seconds in the loop and the losses."""
    model = runner.build(track.vocab_size, seed)
    draw = {"random": data.random_batches, "shuffled": data.shuffled_batches}[runner.order]
    batches = draw(
        track.train, length=BLOCK, batch_size=runner.batch, steps=runner.steps,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    history = training.fit(
        model, batches, steps=runner.steps, lr=runner.adamw, progress=False,
        optimizer=lambda *_, **__: runner.optimizers(model), **runner.loop,
    )  # fmt: skip
    return {
        "seconds": history.seconds[-1],
        "validation": training.mean_loss(model, track.validation),
        "unseen": training.mean_loss(model, track.unseen),
    }


def count(track: Course, context: int = 5) -> dict[str, float]:
    """The table of counts, with the same track: seconds to count, and its losses."""
    started = time.perf_counter()
    table = KneserNey(track.train, track.vocab_size, context)
    return {
        "seconds": time.perf_counter() - started,
        "validation": table.loss(track.validation),
        "unseen": table.loss(track.unseen),
    }


def summary(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per runner: medians over the seeds, and how much sooner than the recipe it is done."""
    rows = []
    goal = statistics.median(r["validation"] for r in runs["recipe"]) if "recipe" in runs else None
    for runner in RUNNERS:
        seen = runs.get(runner.name, [])
        if not seen:
            continue
        row: dict[str, Any] = {
            "name": runner.name,
            "change": runner.change,
            "group": runner.group,
            "runs": seen,
        }
        for key in ("seconds", "validation", "unseen"):
            row[key] = round(statistics.median(r[key] for r in seen), 4)
        if goal is not None:
            ratios = [
                a["seconds"] / b["seconds"] for a, b in zip(runs["recipe"], seen, strict=True)
            ]
            row["times_faster"] = round(statistics.median(ratios), 2)
            row["reaches_the_recipe"] = row["validation"] <= goal
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the race and write its result."""
    parser = argparse.ArgumentParser(description="The race to the loss of nanoGPT's CPU recipe.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[r.name for r in RUNNERS], help="runners")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    track = course()
    chosen = [r for r in RUNNERS if not options.only or r.name in options.only]
    for runner in chosen:  # the first steps are slow
        run(replace(runner, steps=3, loop={**runner.loop, "warmup": 0}), track, 0)
    runs: dict[str, list[dict[str, float]]] = {runner.name: [] for runner in chosen}
    for seed in range(options.seeds):
        for runner in chosen:
            result = run(runner, track, seed)
            runs[runner.name].append({"seed": seed, **{k: round(v, 4) for k, v in result.items()}})
            print(f"seed {seed}  {runner.name:8s} {result}", flush=True)
    table: dict[str, Any] = {
        "text": {"characters": CHARACTERS, "block": BLOCK, "unseen": UNSEEN},
        "kneser_ney": {k: round(v, 4) for k, v in count(track).items()},
        "runners": summary(runs),
    }
    for row in table["runners"]:
        print({k: v for k, v in row.items() if k != "runs"})
    print("Kneser-Ney", table["kneser_ney"])
    if options.write:
        write("race", table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
