"""Allow indexing a CPU tensor with CUDA indices, inside the methods of the family that do so.

`_dn_loss_single_task` of CMT and `prepare_for_loss` of PETR compute `batch_idx[known_indice]`:
`batch_idx` is created on the CPU, `known_indice` comes from a CUDA tensor. torch before 1.13 copied
the indices to the CPU. This patch does the same, inside these methods only.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterable, List, Optional

import torch

from .._torch_internals import TorchFunctionMode

METHODS = ("_dn_loss_single_task", "prepare_for_loss")


class IndexFromAnyDevice(TorchFunctionMode or object):  # type: ignore[misc]
    """A context in which indices of a CPU tensor may be on another device: they are copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and args[0].device.type == "cpu":
            args = (args[0], _to_cpu(args[1]))
        return func(*args, **(kwargs or {}))


def _to_cpu(index: Any) -> Any:
    if isinstance(index, torch.Tensor):
        return index if index.device.type == "cpu" else index.cpu()
    if isinstance(index, tuple):
        return tuple(_to_cpu(part) for part in index)
    return index


def devices(values: Iterable[Any]) -> List[str]:
    """Return the sorted device types of all tensors in nested arguments."""
    kinds: List[str] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            kinds.append(value.device.type)
        elif isinstance(value, (tuple, list)):
            kinds += devices(value)
        elif isinstance(value, dict):
            kinds += devices(value.values())
    return sorted(set(kinds))


def wrap(module: Any) -> Optional[Callable[[], None]]:
    """Wrap METHODS of the classes that `module` defines; return a function that undoes it."""
    if TorchFunctionMode is None:  # torch before 1.13 copies the indices itself
        return None
    wrapped = [
        (cls, name, vars(cls)[name])
        for cls in list(vars(module).values())
        if isinstance(cls, type) and cls.__module__ == module.__name__
        for name in METHODS
        if name in vars(cls)
    ]
    for cls, name, original in wrapped:
        setattr(cls, name, _with_copied_indices(original))

    def undo() -> None:
        for cls, name, original in wrapped:
            if getattr(vars(cls).get(name), "__wrapped__", None) is original:
                setattr(cls, name, original)

    return undo if wrapped else None


def _with_copied_indices(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(devices([args, kwargs])) < 2:  # the usual case: one device
            return original(self, *args, **kwargs)
        with IndexFromAnyDevice():
            return original(self, *args, **kwargs)

    return method
