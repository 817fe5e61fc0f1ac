"""A bias as a tensor that remembers what it is: see core.py."""

from __future__ import annotations

from . import core, dispatch, gradients, shapes, values  # the last three register their operations
from .core import BiasTensor, described

core.run = dispatch.run
__all__ = ["BiasTensor", "core", "described", "dispatch", "gradients", "shapes", "values"]
