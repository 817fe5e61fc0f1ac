"""Importing this fills the registries."""

from . import backbones, dense_heads, detectors  # noqa: F401
from .utils import petr_transformer  # noqa: F401
