"""The loss curve that grows while a model trains."""

import matplotlib as mpl
import torch
from torch import nn

from course_lib import plots, training

mpl.use("agg")
PNG = b"\x89PNG"


def fit(watch, steps=6):
    torch.manual_seed(0)
    x = torch.randint(5, (4, 3))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    return training.fit(
        model, [(x, x)] * steps, steps=steps, lr=0.1, validation=[(x, x)], eval_every=2,
        progress=False, watch=watch,
    )  # fmt: skip


def test_it_is_drawn_at_each_evaluation_and_shown_once(monkeypatch):
    shown = []
    monkeypatch.setattr(plots.LiveLoss, "show", lambda self: shown.append(self.picture()))
    live = plots.LiveLoss(every=0.0)
    fit(live)
    assert live.drawn >= 3
    assert [picture[:4] for picture in shown] == [PNG]


def test_a_fresh_picture_is_not_drawn_again_but_the_last_history_is(monkeypatch):
    monkeypatch.setattr(plots.LiveLoss, "show", lambda self: None)
    live = plots.LiveLoss(every=60.0)
    fit(live)
    first = live._image.value
    assert live.drawn == 1
    assert live.picture() != first


def test_before_training_there_is_no_picture():
    assert plots.LiveLoss().picture() == b""
