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
import datetime
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import data, training
from course_lib.checkout import find_root
from course_lib.models import Decoder, KneserNey, TransformerConfig
from course_lib.training.optimizers import split_parameters

BLOCK, CHARACTERS, UNSEEN = 64, 1_115_394, "king-lear"
RESULT = Path("benchmarks/results/race.json")
THREADS = 2


@dataclass(frozen=True)
class Runner:
    """One way to train: what it changes, the model, and the arguments of the loop."""

    name: str
    change: str
    group: str  # "recipe": the recipe's own network; "plain": a plain Transformer; "open"
    steps: int
    batch: int
    config: dict[str, Any] = field(default_factory=dict)
    smear: int = 0
    muon: float | None = None  # the peak rate of matrices, √max(1, out / in) left aside
    adamw: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 0.1
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
            return [torch.optim.AdamW(groups, lr=self.adamw, betas=self.betas)]
        muon = torch.optim.Muon(matrices, lr=self.muon, momentum=0.9, weight_decay=0.0, ns_steps=3)
        return [muon, torch.optim.AdamW(rest, lr=self.adamw, betas=self.betas, weight_decay=0.0)]


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
MODERN = {
    "position": "rotary", "activation": "relu2", "zero_residuals": True, "tie_embeddings": False,
    "norm_affine": False,
}  # fmt: skip
RUNNERS = [
    Runner(
        "recipe", "nanoGPT's recipe as published", "recipe", 2000, 12,
        loop={"schedule": "cosine", "final": 0.1, "warmup": 100, "clip": 1.0},
    ),
    Runner(
        "rate", "learning rate 4e-3, linear decay to 0", "recipe", 1000, 12, adamw=4e-3,
        loop={**LINEAR, "warmup": 50, "clip": 1.0},
    ),
    Runner("muon", "Muon for matrices", "recipe", 380, 16, muon=0.04, adamw=0.006, loop=LINEAR),
    Runner(
        "modern", "rotary positions, squared ReLU, outputs from zero, free head", "plain", 255, 16,
        MODERN, muon=0.03, adamw=0.03, loop=LINEAR,
    ),
    Runner(
        "shallow", "2 layers", "plain", 350, 16, {**MODERN, "num_layers": 2}, muon=0.03,
        adamw=0.03, loop=LINEAR,
    ),
    Runner(
        "smear", "2 layers of 96, embeddings mixed with their 3 predecessors", "open", 280, 16,
        {**MODERN, "num_layers": 2, "d_model": 96, "num_heads": 2}, smear=3, muon=0.03,
        adamw=0.03, loop=LINEAR,
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
    batches = data.random_batches(
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
    parser.add_argument("--write", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    track = course()
    chosen = [r for r in RUNNERS if not options.only or r.name in options.only]
    run(replace(chosen[0], steps=3, loop=LINEAR), track, 0)  # the first steps are slow
    runs: dict[str, list[dict[str, float]]] = {runner.name: [] for runner in chosen}
    for seed in range(options.seeds):
        for runner in chosen:
            result = run(runner, track, seed)
            runs[runner.name].append({"seed": seed, **{k: round(v, 4) for k, v in result.items()}})
            print(f"seed {seed}  {runner.name:8s} {result}", flush=True)
    table: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": platform.machine(), "threads": THREADS},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "text": {"characters": CHARACTERS, "block": BLOCK, "unseen": UNSEEN},
        "kneser_ney": {k: round(v, 4) for k, v in count(track).items()},
        "runners": summary(runs),
    }
    for row in table["runners"]:
        print({k: v for k, v in row.items() if k != "runs"})
    print("Kneser-Ney", table["kneser_ney"])
    if options.write:
        target = find_root(Path(__file__).parent) / RESULT
        target.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
