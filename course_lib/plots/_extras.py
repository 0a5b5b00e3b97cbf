"""Import what only figures and widgets need, or say in one line how to get it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def need(module: str) -> ModuleType:
    """Import ``module``; where it is missing, raise an ImportError that says what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # it is there, but something inside it is broken: show that
            raise
        raise ImportError(
            f"course_lib.plots needs {package}: run  pip install 'course-lib[learn]'"
        ) from None
