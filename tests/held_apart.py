"""Answers that a chapter's catalogue does not hold, read from `answers/<chapter>.txt`."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One answer: its text, the function, and what `check` must say of it."""

    text: str
    function: Callable[..., Any]
    right: bool
    mistake: str | None


@functools.cache  # the same functions each time, so that a verdict can be kept
def read(chapter: str) -> dict[str, list[Entry]]:
    """{exercise: answers}"""
    path = Path(__file__).parent / "answers" / f"{chapter}.txt"
    _, prelude, *sections = path.read_text(encoding="utf-8").split("--- ")
    namespace: dict[str, Any] = {}
    exec(prelude.removeprefix("prelude\n"), namespace)
    return {
        section.partition("\n")[0]: [_entry(part, namespace) for part in _parts(section)]
        for section in sections
    }


def _parts(section: str) -> list[str]:
    return re.split(r"^(?=wrong \| |right \| )", section, flags=re.MULTILINE)[1:]


def _entry(part: str, namespace: dict[str, Any]) -> Entry:
    kind, rest = part.strip().split(" | ", 1)
    name, text = rest.split(" | ", 1) if kind == "wrong" else ("-", rest)
    if text.startswith("def answer("):
        own = dict(namespace)
        exec(compile(text, "<answer>", "exec"), own)
        function = own["answer"]
    else:
        function = eval(compile(text, "<answer>", "eval"), dict(namespace))
    return Entry(text, function, kind == "right", None if name == "-" else name)
