"""What an exercise is: a reference, behaviours, mistakes, alternatives, cases and hints."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

Function = Callable[..., Any]
Case = dict[str, Any]
"""Inputs of one call: {argument: value}, in the order of the reference's signature."""

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
BLANK = 'raise NotImplementedError("not written yet")'


@dataclass(frozen=True)
class Behaviour:
    """A sentence about a right answer, and the test of it: raises `Broken` where it fails."""

    sentence: str
    test: Callable[[Function], None]


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people give.

    name completes "Your result equals …"; cause says in one sentence how it comes about; ask is the
    question that leads out of it.
    """

    name: str
    function: Function
    cause: str
    ask: str


@dataclass(frozen=True)
class Alternative:
    """A right answer that looks different from the reference."""

    name: str
    function: Function


@dataclass
class Exercise:
    """One question of a chapter. Its parts are added by the decorators below.

    chapter: the stem of its notebook, as in "02_attention". difficulty and importance: 1 to 5.
    prompt: Markdown. hints: a question, a property, a line. batched: the last case has the batch
    in the first dimension of every tensor, and its elements must not mix.
    """

    id: str
    chapter: str
    title: str
    minutes: int
    difficulty: int
    importance: int
    prompt: str
    hints: tuple[str, str, str]
    points: int = 1
    batched: bool = False
    behaviours: list[Behaviour] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    alternatives: list[Alternative] = field(default_factory=list)
    reference: Function = field(init=False)
    make_cases: Callable[[torch.Generator], list[Case]] = field(init=False)

    def __post_init__(self) -> None:
        if self.id in _REGISTRY:
            raise ValueError(f"two exercises have the id {self.id!r}")
        _REGISTRY[self.id] = self

    # -- decorators that fill it

    def solution(self, function: Function) -> Function:
        """The reference; its source between the solution markers becomes the blank."""
        self.reference = function
        return function

    def cases(self, function: Callable[[torch.Generator], list[Case]]) -> Function:
        """Tiny inputs, smallest first: `function(generator)` gives a list of {argument: value}."""
        self.make_cases = function
        return function

    def behaviour(self, sentence: str) -> Callable[[Function], Function]:
        """`function(answer)` raises `Broken` (through `expect`) where the sentence is not true."""
        return lambda function: self.behaviours.append(Behaviour(sentence, function)) or function

    def mistake(self, name: str, cause: str, ask: str) -> Callable[[Function], Function]:
        """A named wrong implementation with the reference's signature."""
        return lambda f: self.mistakes.append(Mistake(name, f, cause, ask)) or f

    def alternative(self, name: str) -> Callable[[Function], Function]:
        """A right implementation that looks different."""
        return lambda function: self.alternatives.append(Alternative(name, function)) or function

    # -- what is asked of it

    @property
    def function(self) -> str:
        """The name of the function that the learner writes."""
        return self.reference.__name__

    @property
    def signature(self) -> str:
        """As written: "softmax(scores: Tensor) -> Tensor"."""
        node = ast.parse(self.source()).body[0]
        assert isinstance(node, ast.FunctionDef)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{node.name}({ast.unparse(node.args)}){returns}"

    def cases_for(self, seed: int = 0) -> list[Case]:
        """The cases, the same ones for the same seed."""
        return self.make_cases(torch.Generator().manual_seed(seed))

    def call(self, function: Function, case: Case) -> Any:
        """Call with required arguments by position (a learner may rename them), options by name."""
        parameters = inspect.signature(self.reference).parameters
        required = [name for name, p in parameters.items() if p.default is p.empty]
        options = {name: value for name, value in case.items() if name not in required}
        return function(*[case[name] for name in required], **options)

    def source(self) -> str:
        """The reference as written, with its solution markers, without the decorator."""
        text = textwrap.dedent(inspect.getsource(self.reference))
        return text[text.index("def ") :].rstrip()

    def blank(self) -> str:
        """The reference with its solution replaced by "not written yet"."""
        lines = self.source().splitlines()
        begin = next(i for i, line in enumerate(lines) if line.strip() == BEGIN)
        end = next(i for i, line in enumerate(lines) if line.strip() == END)
        indent = lines[begin][: lines[begin].index("#")]
        return "\n".join([*lines[:begin], indent + BLANK, *lines[end + 1 :]])


_REGISTRY: dict[str, Exercise] = {}


def all_exercises() -> dict[str, Exercise]:
    """Every exercise of the course by id, in the order of the chapters."""
    from .. import checks

    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items(), key=lambda item: item[1].chapter))


def find(id: str) -> Exercise:
    """The exercise with this id; an unknown one raises ValueError that shows near ones."""
    exercises = all_exercises()
    if id not in exercises:
        near = get_close_matches(str(id), exercises, n=3, cutoff=0.4) or list(exercises)
        raise ValueError(f"there is no exercise {id!r}; did you mean {', '.join(near)}?")
    return exercises[id]


def chapter_exercises(stem: str) -> list[Exercise]:
    """The exercises of one chapter, in their order."""
    return [e for e in all_exercises().values() if e.chapter == stem]


def chapters() -> Iterator[str]:
    """The stems of the chapters that have exercises."""
    yield from dict.fromkeys(e.chapter for e in all_exercises().values())
