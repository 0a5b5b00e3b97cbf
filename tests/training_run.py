"""A small run for tests that start processes: ``python training_run.py FOLDER [--slow]``.

Writes the trained weights into FOLDER/weights.pt, a checkpoint beside them; says each step.
"""

import sys
import time
from pathlib import Path

import torch

from course_lib import data, training
from course_lib.models import Decoder, TransformerConfig

STEPS = 12
LINE = torch.arange(8).repeat(20)
CONFIG = TransformerConfig(
    vocab_size=8, d_model=16, num_layers=1, num_heads=2, max_length=8, dropout=0.1
)


def batches(steps=STEPS):
    g = torch.Generator().manual_seed(0)
    return data.random_batches(LINE, length=6, batch_size=8, steps=steps, generator=g)


def run(folder, pause=0.0, config=CONFIG, **options):
    """Train, and go on where a checkpoint stands; returns the model and its history."""
    torch.manual_seed(0)
    model = Decoder(config)
    folder = Path(folder)

    def slowly():
        for number, batch in enumerate(batches()):
            print("step", number, flush=True)
            time.sleep(pause)
            yield batch

    defaults = {"steps": STEPS, "lr": 1e-2, "progress": False, "checkpoint_every": 2}
    files = {"checkpoint": folder / "run.ckpt", "log": folder / "log.csv", "eval_every": 3}
    history = training.fit(model, slowly(), **defaults | files | options)
    return model, history


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model, history = run(folder, pause=0.2 if "--slow" in sys.argv else 0.0)
    torch.save(model.state_dict(), folder / "weights.pt")
