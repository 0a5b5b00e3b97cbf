"""What an exercise is: a reference, behaviours, mistakes, alternatives, cases and hints."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch

Function = Callable[..., Any]
Case = dict[str, Any]
"""Inputs of one call: {argument: value}, in the order of the reference's signature."""

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
NOT_WRITTEN = "not written yet"
BLANK = f'raise NotImplementedError("{NOT_WRITTEN}")'


class _OneLine(Exception):
    """An error whose message says it all: a notebook shows that line and no stack."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class UnknownExerciseError(_OneLine, ValueError):
    """There is no exercise with this id."""


class NotAFunctionError(_OneLine, TypeError):
    """`check` got something that cannot be called."""


class HintLevelError(_OneLine, ValueError):
    """There is no hint of this level."""


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
    cause: str
    ask: str
    function: Function


@dataclass(frozen=True)
class Alternative:
    """A right answer that looks different from the reference."""

    name: str
    function: Function


@dataclass(eq=False)
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
        return _into(self.behaviours, lambda function: Behaviour(sentence, function))

    def mistake(self, name: str, cause: str, ask: str) -> Callable[[Function], Function]:
        """A named wrong implementation with the reference's signature."""
        return _into(self.mistakes, lambda function: Mistake(name, cause, ask, function))

    def mistakes_from(
        self, table: list[Mistake], thing: str, build: Callable[[Function], Function]
    ) -> None:
        """Mistakes that several exercises share, each a wrong part: `build(part)` is the answer.

        Their names follow `thing`: "attention" makes "attention without the 1/√d_k scale".
        """
        for part in table:
            self.mistake(f"{thing} {part.name}", part.cause, part.ask)(build(part.function))

    def alternative(self, name: str) -> Callable[[Function], Function]:
        """A right implementation that looks different."""
        return _into(self.alternatives, lambda function: Alternative(name, function))

    # -- what is asked of it

    @property
    def function(self) -> str:
        """The name of the function that the learner writes."""
        return self.reference.__name__

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the reference."""
        return inspect.signature(self.reference).parameters

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
        """Call with required arguments by position and options by name; a learner may rename both.

        Where the function does not know an option's name, but has the reference's number of
        parameters, options go by position too.
        """
        parameters = self.parameters
        required = [name for name, p in parameters.items() if p.default is p.empty]
        options = {name: value for name, value in case.items() if name not in required}
        if options and _renames(function, options, len(parameters)):
            return function(*[case.get(name, p.default) for name, p in parameters.items()])
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


def _into(parts: list[Any], make: Callable[[Function], Any]) -> Callable[[Function], Function]:
    """A decorator that adds what `make` makes of a function to the parts."""

    def add(function: Function) -> Function:
        parts.append(make(function))
        return function

    return add


def _renames(function: Function, options: Case, count: int) -> bool:
    """Does the function take `count` arguments by position, some option by another name?"""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    kinds = [p.kind for p in parameters.values()]
    positional = kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return (
        positional >= count
        and inspect.Parameter.VAR_KEYWORD not in kinds
        and not options.keys() <= parameters.keys()
    )


_REGISTRY: dict[str, Exercise] = {}


def all_exercises() -> dict[str, Exercise]:
    """Every exercise of the course by id, in the order of the chapters."""
    from .. import checks

    for module in pkgutil.iter_modules(checks.__path__):
        importlib.import_module(f"{checks.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items(), key=lambda item: item[1].chapter))


def find(id: str) -> Exercise:
    """The exercise with this id; an unknown one raises a ValueError that shows near ones."""
    exercises = all_exercises()
    if id not in exercises:
        near = get_close_matches(str(id), exercises, n=3, cutoff=0.4) or list(exercises)
        raise UnknownExerciseError(f"there is no exercise {id!r}; did you mean {', '.join(near)}?")
    return exercises[id]


def chapter_exercises(stem: str) -> list[Exercise]:
    """The exercises of one chapter, in their order."""
    return [e for e in all_exercises().values() if e.chapter == stem]


def chapters() -> Iterator[str]:
    """The stems of the chapters that have exercises."""
    yield from dict.fromkeys(e.chapter for e in all_exercises().values())
