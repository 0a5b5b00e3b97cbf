"""Modules of other libraries as modules of this one."""

from .pytorch import LengthFirst, from_torch, mask_from_torch

__all__ = ["LengthFirst", "from_torch", "mask_from_torch"]
