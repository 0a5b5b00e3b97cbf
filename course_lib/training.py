"""One training loop, small enough to read, for every model of the course."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Evaluate = Callable[[nn.Module], float]
Schedule = Literal["cosine", "constant"]


@dataclass(frozen=True)
class History:
    """What `fit` saw: a table whose columns are lists with one entry per step.

    Attributes:
        step: 1, 2, …
        seconds: time in forward, backward and update since the start; drawing batches and
            evaluating are not counted.
        loss: training loss of the batch of that step, before its update.
        eval_loss: what the evaluation after that step returned; None where there was none.
    """

    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    eval_loss: list[float | None] = field(default_factory=list)

    def to_dict(self) -> dict[str, list[Any]]:
        """Plain lists by name, ready for JSON or a table."""
        return asdict(self)


def next_token_loss(
    logits: Float[Tensor, "batch length vocab"], targets: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Cross-entropy, mean nats per token. Targets of -100 are left out of the mean."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (B·n, vocab) against (B·n,)


def mean_loss(model: nn.Module, batches: Iterable[Batch], loss: Loss = next_token_loss) -> float:
    """Loss of a model over `batches`, in evaluation mode; each batch weighs as its targets' count.

    Raises:
        ValueError: `batches` is empty.
    """
    device, was_training = _device(model), model.training
    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in batches:
            inputs, targets = inputs.to(device), targets.to(device)
            total += loss(model(inputs), targets).item() * targets.numel()
            count += targets.numel()
    model.train(was_training)
    if count == 0:
        raise ValueError("batches is empty: there is nothing to take a mean over")
    return total / count


def learning_rate_factor(
    step: int, steps: int, warmup: int, schedule: Schedule = "cosine"
) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then cosine or constant.

    The cosine falls to 0 at `steps` (Loshchilov & Hutter 2017, "SGDR", eq. 5, without restarts).

    Raises:
        ValueError: `schedule` is neither "cosine" nor "constant".
    """
    if schedule not in ("cosine", "constant"):
        raise ValueError(f'schedule must be "cosine" or "constant", got {schedule!r}')
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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
    optimizer: Literal["adamw", "sgd"] | Callable[..., torch.optim.Optimizer] = "adamw",
    schedule: Schedule = "cosine",
    warmup: int | None = None,
    clip: float | None = 1.0,
    max_seconds: float | None = None,
    progress: bool = True,
) -> History:
    """Train `model` in place for `steps` batches and return what happened.

    Args:
        model: maps inputs (batch, length) to logits (batch, length, vocab), or whatever `loss`
            takes. Batches are moved to the device of its parameters.
        batches: (inputs, targets) pairs, at least `steps` of them.
        lr: peak learning rate.
        validation: batches for the default evaluation, `mean_loss` in evaluation mode.
        evaluate: `model -> float`, in place of `validation`.
        eval_every: steps between evaluations; the last step is always evaluated, None does only it.
        loss: (outputs, targets) -> scalar; mean cross-entropy in nats per token by default.
        optimizer: a name, or anything called as `optimizer(parameters, lr=lr)`.
        schedule: the learning rate after the warm-up, see `learning_rate_factor`.
        warmup: steps of linear warm-up; None takes a twentieth of `steps`.
        clip: largest allowed norm of the whole gradient; None does not clip.
        max_seconds: stop after this much time, counted as in `History.seconds`.
        progress: show a bar with loss and time left on stdout, if tqdm is installed.

    Raises:
        ValueError: an argument is impossible, or `batches` ended before `steps`.
        TypeError: `validation` is an iterator, which could be used only once.
        FloatingPointError: the loss became infinite or NaN; names the step. The parameters stay
            those that produced it.
    """
    warmup = steps // 20 if warmup is None else warmup
    _check_numbers(steps, lr, warmup, eval_every, clip, max_seconds)
    evaluate = _evaluation(validation, evaluate, loss)
    updater = _optimizer(optimizer, model, lr)
    history, spent, was_training = History(), 0.0, model.training
    with _bar(steps, progress) as bar:
        for step, batch in enumerate(_take(batches, steps), start=1):
            model.train()
            started = time.perf_counter()
            _set_lr(updater, lr * learning_rate_factor(step - 1, steps, warmup, schedule))
            value = _update(model, batch, step, loss, updater, clip)
            spent += time.perf_counter() - started
            last = step == steps or (max_seconds is not None and spent >= max_seconds)
            due = last or (eval_every is not None and step % eval_every == 0)
            history.step.append(step)
            history.seconds.append(spent)
            history.loss.append(value)
            history.eval_loss.append(float(evaluate(model)) if evaluate and due else None)
            bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
            bar.update()
            if last:
                break
    model.train(was_training)
    return history


def _update(
    model: nn.Module,
    batch: Batch,
    step: int,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    clip: float | None,
) -> float:
    """Forward, backward, clip, update; the loss before the update."""
    device = _device(model)
    inputs, targets = batch
    value = loss(model(inputs.to(device)), targets.to(device))
    number = value.item()
    if not math.isfinite(number):
        raise FloatingPointError(
            f"the loss became {number} at step {step}: lower lr, warm up longer, or look for a "
            "division by zero or a row without any finite score"
        )
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return number


def _take(batches: Iterable[Batch], steps: int) -> Iterator[Batch]:
    """The first `steps` batches, or an error that says how many there were."""
    taken = 0
    for batch in islice(batches, steps):
        yield batch
        taken += 1
    if taken < steps:
        raise ValueError(f"batches ended after {taken} of steps={steps}")


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


def _optimizer(
    optimizer: str | Callable[..., torch.optim.Optimizer], model: nn.Module, lr: float
) -> torch.optim.Optimizer:
    by_name = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    make = by_name.get(optimizer) if isinstance(optimizer, str) else optimizer
    if make is None:
        raise ValueError(
            f"optimizer must be one of {sorted(by_name)} or callable, got {optimizer!r}"
        )
    return make(model.parameters(), lr=lr)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _bar(steps: int, progress: bool) -> Any:
    """A tqdm bar on stdout (a notebook paints stderr red), or something that does nothing."""
    if progress:
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return tqdm(total=steps, file=sys.stdout, ncols=88, mininterval=0.5, unit="step")
    return _NoBar()


class _NoBar:
    def __enter__(self) -> "_NoBar":
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
) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup must lie between 0 and steps={steps}, got {warmup}")
    if eval_every is not None and eval_every < 1:
        raise ValueError(f"eval_every must be at least 1 or None, got {eval_every}")
    for name, value in (("lr", lr), ("clip", clip), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
