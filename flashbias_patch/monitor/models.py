"""Find parameters in a model by name, and this process among its ranks."""

from __future__ import annotations

import fnmatch
from typing import Dict, Optional, Sequence

import torch
from torch import nn

from .. import telemetry


def at(model: nn.Module, name: str) -> Optional[nn.Parameter]:
    """Return the parameter with this name, or None."""
    *path, last = name.split(".")
    module: Optional[nn.Module] = model
    for part in path:
        module = None if module is None else module._modules.get(part)
    return None if module is None else module._parameters.get(last)


def named(model: nn.Module, names: Sequence[str]) -> Dict[str, nn.Parameter]:
    """Return the parameters of the unwrapped model whose names match one of the patterns."""
    return {
        name: parameter
        for name, parameter in unwrapped(model).named_parameters()
        if any(fnmatch.fnmatchcase(name, "*" + pattern.lstrip("*")) for pattern in names)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, MMDataParallel and similar wrappers."""
    while (
        isinstance(getattr(model, "module", None), nn.Module) and len(list(model.children())) == 1
    ):
        model = model.module  # type: ignore[assignment]
    return model


def rank() -> int:
    """Return the rank of this process; 0 outside distributed runs."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_rank())
    return telemetry.rank()
