"""A bias as a tensor that keeps its description: see core.py."""

from __future__ import annotations

from . import arithmetic, core, gradients, registry, shapes  # arithmetic, ... register operations
from .core import BiasTensor, described

core.run = registry.run
__all__ = ["BiasTensor", "arithmetic", "core", "described", "gradients", "registry", "shapes"]
