"""The run of `training_run` in several processes: started by torchrun with a FOLDER."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from training_run import CONFIG, run

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model, history = run(folder, config=replace(CONFIG, dropout=0.0, bias=False))
if os.environ["RANK"] == "0":
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(torch.tensor(history.loss), folder / "losses.pt")
