"""Trace the operations and modules that use tensors computed from a parameter.

A torch function mode sees every operation.
"""

from __future__ import annotations

import os
import sys
import weakref
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_internals import all_functions_off

_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_VIEWS = {
    _DATA,
    *(
        getattr(Tensor, name).__get__
        for name in ("T", "mT", "H", "mH", "real")
        if hasattr(Tensor, name)
    ),
}
_SILENT = {
    "requires_grad_",
    "register_hook",
    "retain_grad",
    "is_floating_point",
    "size",
    "dim",
    "numel",
    "stride",
    "backward",
    "__len__",
    "__hash__",
    "__repr__",
    "data_ptr",
    "is_contiguous",
    "__format__",
    "untyped_storage",
    "_make_subclass",
    "register_post_accumulate_grad_hook",
    "is_complex",
    "has_names",
    "element_size",
    "get_device",
    "is_signed",
    "storage_offset",
    "type",
}
_TO_PYTHON = {"item", "tolist", "numpy", "__float__", "__int__", "__array__", "__bool__"}
_IN_PLACE = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}
MOST_EVENTS = 200


class Mark(NamedTuple):
    """A mark of a tensor computed from watched parameters.

    names: of the parameters. live: True if a gradient can flow from the tensor to them.
    """

    names: FrozenSet[str]
    live: bool


class Trace(TorchFunctionMode):
    """Mark every tensor that is computed from a watched parameter.

    events: name -> the operations involved, each {op, site, module, kind}. kind: "used", or how the
    gradient is cut: "detached", "no_grad", "reentrant", "not differentiable". writes: changes in
    place outside optimizer steps. `module_of()` returns the innermost running module.
    """

    def __init__(self, module_of: Callable[[], str]) -> None:
        super().__init__()
        self.watched: Dict[int, Tuple[str, Tensor]] = {}
        self.off = False
        self.stepping = False  # inside an optimizer's step
        self.module_of = module_of
        self.errors: List[str] = []
        self.writes: List[Dict[str, Any]] = []
        self._marks: Dict[int, Tuple[Any, Mark]] = {}
        self.clear()

    def clear(self) -> None:
        """Remove the events of one iteration."""
        self.events: Dict[str, List[Dict[str, Any]]] = {
            name: [] for name, _ in self.watched.values()
        }
        self.sites: Dict[Any, Dict[str, Any]] = {}  # grad_fn -> the operation that made it

    def watch(self, name: str, parameter: Tensor) -> None:
        self.watched[id(parameter)] = (name, parameter)
        self.events.setdefault(name, [])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.off and self.watched:
            try:
                with all_functions_off():
                    self._observe(func, args, kwargs, out)
            except Exception as error:  # the command must go on
                self.off = True
                self.errors.append(f"{type(error).__name__}: {error}")
        return out

    def mark_of(self, tensor: Any) -> Optional[Mark]:
        parameter_entry = self.watched.get(id(tensor))
        if parameter_entry is not None and parameter_entry[1] is tensor:
            return Mark(frozenset((parameter_entry[0],)), bool(tensor.requires_grad))
        entry = self._marks.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def mark(self, tensor: Tensor, mark: Mark) -> None:
        key, marks = id(tensor), self._marks
        marks[key] = (weakref.ref(tensor, lambda _: marks.pop(key, None)), mark)

    def _observe(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = getattr(func, "__name__", str(func))
        if (
            (name == "__get__" and func not in _VIEWS)
            or name in _SILENT
            or (name == "__set__" and func != _SET_DATA)
        ):
            return
        if not self.stepping:
            self._note_write(name, args, kwargs)
        marks = [
            mark
            for mark in map(self.mark_of, tensors_in((args, kwargs), depth=3))
            if mark is not None
        ]
        if not marks or self.stepping:
            return
        names = frozenset().union(*(mark.names for mark in marks))
        was_live = any(mark.live for mark in marks)
        outputs = [t for t in tensors_in(out, depth=2) if t.is_floating_point() or t.is_complex()]
        event: Optional[Dict[str, Any]] = None
        for tensor in outputs:
            live = was_live and tensor.requires_grad
            self.mark(tensor, Mark(names, live))
            if live and tensor.grad_fn is not None:
                event = event or self._event(name, func, args, kwargs, "used")
                self.sites.setdefault(tensor.grad_fn, event)
        if was_live and not any(t.requires_grad for t in outputs):
            event = self._event(name, func, args, kwargs, self._cut(func, name, outputs))
        if event is not None:
            for label in names:
                if len(self.events[label]) < MOST_EVENTS:
                    self.events[label].append(event)

    def _cut(self, func: Any, name: str, outputs: List[Tensor]) -> str:
        if name in _TO_PYTHON or func == _DATA or "detach" in name:
            return "detached"
        if not torch.is_grad_enabled():
            return "reentrant" if _in_checkpoint() else "no_grad"
        return (
            "detached"
            if name in ("tensor", "as_tensor", "new_tensor", "scalar_tensor")
            else "not differentiable"
        )

    def _event(self, name: str, func: Any, args: Any, kwargs: Any, kind: str) -> Dict[str, Any]:
        op = "data" if func == _DATA else name.strip("_") or name
        numbers = [
            f"{a:g}" for a in args if isinstance(a, (int, float)) and not isinstance(a, bool)
        ]
        numbers += [
            f"{k}={v:g}"
            for k, v in kwargs.items()
            if isinstance(v, (int, float)) and not isinstance(v, bool)
        ]
        op = f"{op}({', '.join(numbers)})" if numbers else op
        return {"op": op, "site": site(), "module": self.module_of(), "kind": kind}

    def _note_write(self, name: str, args: Any, kwargs: Any) -> None:
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        if not in_place and "out" not in kwargs:
            return
        targets = list(
            tensors_in((args[:1], [kwargs.get(key) for key in ("out", "tensor", "input")]), depth=3)
        )
        for target in targets:
            for label, parameter in self.watched.values():
                if target is parameter or _same_memory(target, parameter):
                    if len(self.writes) < MOST_EVENTS:
                        self.writes.append(
                            {
                                "name": label,
                                "op": name.strip("_"),
                                "site": site(),
                                "module": self.module_of(),
                            }
                        )
                    return


def _same_memory(first: Tensor, second: Tensor) -> bool:
    try:
        return (
            first.device == second.device
            and first.numel() > 0
            and first.layout == torch.strided
            and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() != 0
        )
    except (RuntimeError, NotImplementedError):  # tensors without storage
        return False


def tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors in `value`, in containers down to `depth`, and in biases
    (AttentionBias)."""
    if isinstance(value, Tensor):
        yield value
    elif depth > 0:
        if isinstance(value, (list, tuple, set, frozenset)):
            for item in value:
                yield from tensors_in(item, depth - 1)
        elif isinstance(value, dict):
            for item in value.values():
                yield from tensors_in(item, depth - 1)
        elif type(value).__module__.startswith("flashbias_patch.bias") and hasattr(
            value, "tensors"
        ):
            yield from value.tensors()


def site() -> str:
    """Return file:line and function of the innermost frame outside torch and this package."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _OWN, "<frozen")):
            return f"{short(file)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "?"


def short(file: str) -> str:
    """Return the path relative to the working directory if it is below it."""
    try:
        relative = os.path.relpath(file)
    except (ValueError, OSError):
        return file
    return file if relative.startswith("..") else relative


def _in_checkpoint() -> bool:
    """Return True if a caller is the forward of a checkpoint function (torch, mmcv, fairscale)."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and "checkpoint" in os.path.basename(
            frame.f_code.co_filename
        ):
            return True
        frame = frame.f_back
    return False
