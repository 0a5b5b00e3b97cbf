"""`fit`: draw a batch, forward, backward, clip, update, and again."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint as disk
from .distributed import World, world
from .history import History
from .loss import Batch, Loss, call, device_of, mean_loss, next_token_loss
from .optimizers import Make, make_optimizers, set_rate
from .schedule import Schedule, learning_rate_factor

Evaluate = Callable[[nn.Module], float]
Watch = Callable[[History], Any]


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float,
    validation: Iterable[Batch] | None = None,
    evaluate: Evaluate | None = None,
    eval_every: int | None = None,
    loss: Loss = next_token_loss,
    optimizer: Literal["adamw", "muon", "sgd"] | Make = "adamw",
    schedule: Schedule = "cosine",
    warmup: int | None = None,
    final: float = 0.0,
    clip: float | None = 1.0,
    autocast: torch.dtype | None = None,
    max_seconds: float | None = None,
    progress: bool = True,
    watch: Watch | None = None,
    log: str | Path | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
) -> History:
    """Train `model` in place for `steps` batches and return what happened.

    Interrupted (Ctrl-C, or the process killed) and called again with the same arguments and a new
    iterator over the same batches, a run with a `checkpoint` goes on where it stood and ends, on a
    CPU, with the very same weights. Under torchrun each process takes its rows of every batch, and
    only the first shows progress and writes files.

    Args:
        model: maps inputs to logits (batch, length, vocab), or whatever `loss` takes. Batches are
            moved to the device of its parameters.
        batches: (inputs, targets) pairs, at least `steps` of them; a tuple of inputs is passed on
            as several arguments.
        lr: peak learning rate.
        validation: batches for the default evaluation, `mean_loss` in evaluation mode.
        evaluate: `model -> float`, in place of `validation`.
        eval_every: steps between evaluations; the last step is always evaluated, None does only it.
        loss: (outputs, targets) -> scalar; mean cross-entropy in nats per token by default.
        optimizer: a name, see `training.optimizers`, or anything called as
            `optimizer(parameters, lr=lr)` that gives one optimiser or a list.
        schedule, final: the learning rate after the warm-up, see `learning_rate_factor`.
        warmup: steps of linear warm-up; None takes a twentieth of `steps`.
        clip: largest allowed norm of the whole gradient; None does not clip.
        autocast: a dtype for the products inside the model, as torch.bfloat16, see
            `torch.autocast`; weights, loss and evaluation stay as they are. None: no autocast.
        max_seconds: stop after this much time, counted as in `History.seconds`.
        progress: show a bar with loss and time left on stdout, if tqdm is installed.
        watch: called with the history after each evaluation and at the end, as `plots.LiveLoss`.
        log: a .csv or .json file that gets the history, at each evaluation and at the end.
        checkpoint: a file to go on from if it is there, written every `checkpoint_every` steps, at
            Ctrl-C and at the end.

    Raises:
        ValueError: an argument is impossible, or `batches` ended before `steps`.
        TypeError: `validation` is an iterator, which could be used only once.
        FloatingPointError: the loss became infinite or NaN; names the step. The parameters stay
            those that produced it.
        CheckpointError: the checkpoint is torn or of another run; it stays as it is.
    """
    warmup = steps // 20 if warmup is None else warmup
    _check_numbers(steps, lr, warmup, eval_every, clip, max_seconds, final, checkpoint_every)
    learning_rate_factor(0, steps, warmup, schedule, final)  # an unknown schedule is refused now
    run = {
        "model": disk.describe(model), "steps": steps, "lr": lr, "warmup": warmup,
        "schedule": schedule, "final": final, "clip": clip, "autocast": str(autocast),
        "optimizer": optimizer if isinstance(optimizer, str) else "given",
    }  # fmt: skip
    with world() as here, _finish_step_first(checkpoint is not None) as interrupted:
        state = _State(model, make_optimizers(optimizer, model, lr), here, run, log, checkpoint)
        state.evaluate, state.watch = _evaluation(validation, evaluate, loss), watch
        update = _Update(here.wrap(model), model, state.optimizers, loss, clip, autocast, here)
        was_training = model.training
        done = len(state.history.step)
        with _bar(steps, progress and here.first, done) as bar:
            for step, batch in enumerate(_take(batches, steps, done), start=done + 1):
                started = time.perf_counter()
                set_rate(
                    state.optimizers,
                    learning_rate_factor(step - 1, steps, warmup, schedule, final),
                )
                value = update(batch, step)
                state.spent += time.perf_counter() - started
                late = max_seconds is not None and here.mean(state.spent) >= max_seconds
                last = step == steps or late
                state.note(step, value, last or (eval_every and step % eval_every == 0))
                bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
                bar.update()
                if last or interrupted or step % checkpoint_every == 0:
                    state.save()
                if interrupted:
                    raise KeyboardInterrupt
                if last:
                    break
        model.train(was_training)
        here.wait()
    return state.history


class _State:
    """A run as it stands: history, optimisers, what is on disk."""

    evaluate: Evaluate | None = None
    watch: Watch | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        here: World,
        run: dict[str, Any],
        log: str | Path | None,
        checkpoint: str | Path | None,
    ) -> None:
        self.model, self.optimizers, self.here, self.run, self.log = (
            model, optimizers, here, run, log,
        )  # fmt: skip
        self.path = None if checkpoint is None else Path(checkpoint)
        self.history = History()
        if log is not None and Path(log).suffix not in (".csv", ".json"):
            raise ValueError(f"log must end in .csv or .json, got {Path(log).name!r}")
        if self.path is not None and self.path.exists():
            self.history = disk.load(self.path, model, optimizers, run)
        self.spent = self.history.seconds[-1] if self.history.seconds else 0.0

    def note(self, step: int, value: float, due: object) -> None:
        """Put a step into the history; evaluate, show and log it where that is due."""
        measured = float(self.evaluate(self.model)) if self.evaluate and due else None
        self.history.add(step, self.spent, value, measured)
        if due and self.here.first:
            if self.log is not None:
                self.history.save(self.log)
            if self.watch is not None:
                self.watch(self.history)

    def save(self) -> None:
        if self.path is not None and self.here.first:
            disk.save(self.path, self.model, self.optimizers, self.history, self.run)


class _Update:
    """Forward, backward, clip, update; the loss before the update."""

    def __init__(
        self,
        wrapped: nn.Module,
        model: nn.Module,
        optimizers: list[Optimizer],
        loss: Loss,
        clip: float | None,
        autocast: torch.dtype | None,
        here: World,
    ) -> None:
        self.wrapped, self.model, self.optimizers = wrapped, model, optimizers
        self.loss, self.clip, self.here = loss, clip, here
        self.autocast, self.device = autocast, device_of(model)

    def __call__(self, batch: Batch, step: int) -> float:
        self.model.train()
        (inputs, targets), weight = self.here.share(batch)
        outputs = self._forward(inputs)
        value = self.loss(outputs, targets.to(self.device)) * weight
        number = self.here.mean(value)
        if not math.isfinite(number):
            raise FloatingPointError(
                f"the loss became {number} at step {step}: lower lr, warm up longer, or look for a "
                "division by zero or a row without any finite score"
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        value.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        return number

    def _forward(self, inputs: Any) -> Any:
        if self.autocast is None:
            return call(self.wrapped, inputs, self.device)
        with torch.autocast(self.device.type, self.autocast):
            outputs = call(self.wrapped, inputs, self.device)
        return outputs.float() if isinstance(outputs, Tensor) else outputs  # losses want digits


def _take(batches: Iterable[Batch], steps: int, done: int) -> Iterator[Batch]:
    """The batches from number `done` to `steps`, or an error that says how many there were."""
    taken = 0
    for batch in islice(batches, steps):
        taken += 1
        if taken > done:
            yield batch
    if taken < steps:
        raise ValueError(f"batches ended after {taken} of steps={steps}")


@contextlib.contextmanager
def _finish_step_first(wanted: bool) -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of tearing a step apart; a second one strikes at once."""
    asked: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _evaluation(
    validation: Iterable[Batch] | None, evaluate: Evaluate | None, loss: Loss
) -> Evaluate | None:
    if validation is None:
        return evaluate
    if evaluate is not None:
        raise ValueError("validation and evaluate are both given; one of them must be None")
    if isinstance(validation, Iterator):
        raise TypeError(
            "validation is an iterator and would be empty at its second use: give a list"
        )
    return lambda model: mean_loss(model, validation, loss)


def _bar(steps: int, progress: bool, done: int) -> Any:
    """A tqdm bar on stdout (a notebook paints stderr red), or something that does nothing."""
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(
                total=steps, initial=done, file=sys.stdout, ncols=88, mininterval=0.5, unit="step"
            )
    return _NoBar()


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def update(self) -> None:
        pass


def _check_numbers(
    steps: int,
    lr: float,
    warmup: int,
    eval_every: int | None,
    clip: float | None,
    max_seconds: float | None,
    final: float,
    checkpoint_every: int,
) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie between 0 and steps={steps}, got {warmup}")
    if not 0 <= final <= 1:
        raise ValueError(f"final must lie between 0 and 1, got {final}")
    for name, count in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1 or None, got {count}")
    for name, value in (("lr", lr), ("clip", clip), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
