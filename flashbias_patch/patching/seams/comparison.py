"""Comparing a class with its own code once, before it is replaced."""

from __future__ import annotations

from typing import Any, Tuple

from torch import nn


def plain_attributes(module: nn.Module) -> Tuple[Tuple[str, Any], ...]:
    """The attributes that a module's forward may depend on, besides its class and tensors. Ints may
    be counts of calls."""
    held = module.__dict__.items()
    return tuple(
        (name, value)
        for name, value in held
        if type(value) in (bool, float, str) and name != "_is_replica"
    )
