"""Rotary position encoding as a function."""

from .api import rotary

__all__ = ["rotary"]
