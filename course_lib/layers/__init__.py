"""Modules with parameters, one file per component."""

from course_lib.layers.positional_encoding import (
    LearnedPositionalEncoding,
    SinusoidalPositionalEncoding,
)

__all__ = ["LearnedPositionalEncoding", "SinusoidalPositionalEncoding"]
