"""Comparing a class with its own code once, before it is replaced."""

from __future__ import annotations

import weakref
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn

from ... import _torch_internals as internals


def plain_attributes(module: nn.Module) -> Tuple[Tuple[str, Any], ...]:
    """The attributes that a module's forward may depend on, besides its class and tensors. Ints may
    be counts of calls: see `integers`."""
    return tuple(
        (name, _plain(value))
        for name, value in module.__dict__.items()
        if (type(value) in (bool, float, str) or _is_sequence(value)) and name != "_is_replica"
    )


def integers(module: nn.Module) -> Tuple[Tuple[str, int], ...]:
    return tuple((name, value) for name, value in module.__dict__.items() if type(value) is int)


class Buffers:
    """Tells modules apart whose buffers have other values: a number for each set of values. They
    are read again only where a buffer was changed or replaced."""

    def __init__(self) -> None:
        self.numbers: Dict[Any, int] = {}  # by values
        self.read: Any = weakref.WeakKeyDictionary()  # module -> (state, number)
        self.latest: Dict[Any, int] = {}  # by kind of module

    def number(self, module: nn.Module, kind: Any, without: str) -> Optional[int]:
        """None while a CUDA graph is captured, where values cannot be read.

        nn.DataParallel copies modules and buffers in each step: a copy has the number of the last
        module of its kind.
        """
        if getattr(module, "_is_replica", False) and kind in self.latest:
            return self.latest[kind]
        held = [(name, tensor) for name, tensor in module.named_buffers() if name != without]
        state = [(name, tensor.data_ptr(), internals.version(tensor)) for name, tensor in held]
        before, number = self.read.get(module, (None, 0))
        if before != state:
            on_gpu = any(tensor.is_cuda for _, tensor in held)
            if on_gpu and torch.cuda.is_current_stream_capturing():
                return None
            values = tuple((name, tuple(tensor.flatten().tolist())) for name, tensor in held)
            number = self.numbers.setdefault(values, len(self.numbers))
            self.read[module] = state, number
        self.latest[kind] = number
        return self.latest[kind]


def _is_sequence(value: Any) -> bool:
    return (
        type(value) in (tuple, list)
        and len(value) <= 8
        and all(type(each) in (bool, float, str, int) for each in value)
    )


def _plain(value: Any) -> Any:
    return tuple(value) if type(value) is list else value
