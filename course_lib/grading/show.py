"""Showing: small tensors on one line, where two results part, and a verdict in a notebook."""

from __future__ import annotations

import html
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .exercise import Case
from .observe import Broken, same

if TYPE_CHECKING:
    from .judge import Verdict

MOST = 12  # numbers of an input shown before it is named by its shape; of a result two thirds


def shorten(value: Any) -> str:
    """A value on one short line: small tensors by their numbers, large ones by their shape."""
    if isinstance(value, tuple):
        return "(" + ", ".join(shorten(v) for v in value) + ")"
    if callable(value) and hasattr(value, "__name__"):
        return str(value.__name__)
    if not isinstance(value, Tensor):
        text = " ".join(repr(value).split())
        return text if len(text) <= 60 else text[:59] + "…"
    if value.numel() > MOST:
        return f"a tensor of shape {tuple(value.shape)}"
    return _numbers(value.detach().tolist())


def shapes(case: Case) -> str:
    """The case by the shapes of its tensors: "scores (2, 3), mask (3,)"."""
    parts = [
        f"{name} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name} = {shorten(value)}"
        for name, value in case.items()
    ]
    return ", ".join(parts)


def counterexample(broken: Broken) -> list[str]:
    """One or two lines: the input, got beside want, and the first place where they differ."""
    prefix = f"For {shapes(broken.case)}: " if broken.case else ""
    if broken.crash:
        return [f"{prefix}your code raised {broken.message}."]
    if broken.message:
        return [f"{prefix}{broken.message}."]
    small = 3 * max(_count(broken.got), _count(broken.want)) <= 2 * MOST
    if not small:
        return [prefix + line for line in where(broken)]
    if broken.case and _count(tuple(broken.case.values())) <= MOST:
        shown = ", ".join(f"{name} = {shorten(value)}" for name, value in broken.case.items())
        prefix = f"For {shown}: "
    got_and_want = f"{prefix}got {shorten(broken.got)}, want {shorten(broken.want)}."
    return [got_and_want, *where(broken)] if _count(broken.got) > 3 else [got_and_want]


def where(broken: Broken) -> list[str]:
    """The first index at which got and want differ, as a line."""
    pairs = [("", broken.got, broken.want)]
    if isinstance(broken.want, tuple):
        both = zip(broken.got, broken.want, strict=True)
        pairs = [(f"result {i}, ", got, want) for i, (got, want) in enumerate(both)]
    for name, got, want in pairs:
        if not isinstance(got, Tensor) or same(got, want):
            continue
        wrong = ~torch.isclose(got.double(), want.double(), 1e-4, 1e-5, equal_nan=True)
        index = tuple(wrong.nonzero()[0].tolist())
        here, right = (_numbers(tensor[index].item()) for tensor in (got, want))
        return [f"First difference at {name}{list(index)}: got {here}, want {right}."]
    return []


def verdict_bundle(verdict: Verdict) -> dict[str, str]:
    """How Jupyter shows a verdict. For nbgrader the plain text is the number of points."""
    colour, ground = ("#0b6e4f", "#eaf6f1") if verdict.passed else ("#a03c00", "#fdf1e8")
    first, *rest = [html.escape(line) for line in verdict.lines]
    box = (
        f'<div style="border-left:4px solid {colour};background:{ground};color:#1a1a1a;'
        f'padding:8px 12px;line-height:1.5"><b>{first}</b>'
        + "".join(f"<br>{line}" for line in rest)
        + "</div>"
    )
    plain = str(verdict.points) if "NBGRADER_EXECUTION" in os.environ else str(verdict)
    return {"text/plain": plain, "text/html": box}


def _count(value: Any) -> int:
    """How many numbers would be shown."""
    if isinstance(value, tuple):
        return sum(_count(v) for v in value)
    return value.numel() if isinstance(value, Tensor) else 1


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_numbers(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
