"""Showing: small tensors on one line, where two results part, and a verdict in a notebook."""

from __future__ import annotations

import html
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .observe import Broken, same

if TYPE_CHECKING:
    from .judge import Verdict

MOST = 12  # numbers shown before a tensor is named by its shape


def shorten(value: Any) -> str:
    """A value on one short line: small tensors by their numbers, large ones by their shape."""
    if isinstance(value, tuple):
        return "(" + ", ".join(shorten(v) for v in value) + ")"
    if not isinstance(value, Tensor):
        text = repr(value)
        return text if len(text) <= 60 else text[:57] + "…"
    if value.numel() > MOST:
        return f"a tensor of shape {tuple(value.shape)}"
    return _numbers(value.detach().tolist())


def shapes(case: dict[str, Any]) -> str:
    """The case by the shapes of its tensors: "scores (2, 3), mask (3,)"."""
    parts = [
        f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} = {value!r}"
        for name, value in case.items()
    ]
    return ", ".join(parts)


def counterexample(broken: Broken) -> list[str]:
    """One or two lines: the input, got beside want, and the first place where they differ."""
    if broken.message:
        return [broken.message[0].upper() + broken.message[1:] + "."]
    lines = []
    if broken.case and all(_is_small(v) for v in broken.case.values()):
        shown = ", ".join(f"{name} = {shorten(value)}" for name, value in broken.case.items())
        lines.append(f"For {shown}:")
    elif broken.case:
        lines.append(f"For {shapes(broken.case)}:")
    first = lines[0] + " " if lines else ""
    if _is_small(broken.got) and _is_small(broken.want):
        return [f"{first}got {shorten(broken.got)}, want {shorten(broken.want)}.", *where(broken)]
    return [first + line for line in where(broken)]


def where(broken: Broken) -> list[str]:
    """The first index at which got and want differ, as a line."""
    pairs = [("", broken.got, broken.want)]
    if isinstance(broken.want, tuple) and isinstance(broken.got, tuple):
        pairs = [
            (f"result {i}, ", g, w)
            for i, (g, w) in enumerate(zip(broken.got, broken.want, strict=False))
        ]
    for name, got, want in pairs:
        if isinstance(got, Tensor) and isinstance(want, Tensor) and got.shape == want.shape:
            if same(got, want) or got.ndim == 0:
                continue
            wrong = ~torch.isclose(got.double(), want.double(), 1e-4, 1e-5, equal_nan=True)
            index = tuple(wrong.nonzero()[0].tolist())
            return [
                f"First difference at {name}{list(index)}: got {_numbers(got[index].item())}, "
                f"want {_numbers(want[index].item())}."
            ]
    return []


def verdict_bundle(verdict: Verdict) -> dict[str, str]:
    """How Jupyter shows a verdict. For nbgrader the plain text is the number of points."""
    colour, ground = ("#0b6e4f", "#eaf6f1") if verdict.passed else ("#a03c00", "#fdf1e8")
    lines = [html.escape(line) for line in verdict.lines]
    box = (
        f'<div style="border-left:4px solid {colour};background:{ground};color:#1a1a1a;'
        f'padding:8px 12px;line-height:1.5"><b>{lines[0]}</b>'
        + "".join(f"<br>{line}" for line in lines[1:])
        + "</div>"
    )
    if "NBGRADER_EXECUTION" in os.environ:
        return {"text/plain": str(verdict.points), "text/html": box}
    return {"text/plain": str(verdict), "text/html": box}


def _is_small(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_small(v) for v in value)
    return not isinstance(value, Tensor) or value.numel() <= MOST


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_numbers(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
