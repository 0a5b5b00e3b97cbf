"""Whole models."""

from course_lib.models.recurrent import LSTMLanguageModel

__all__ = ["LSTMLanguageModel"]
