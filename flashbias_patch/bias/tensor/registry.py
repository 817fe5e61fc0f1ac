"""Dispatch operations on a BiasTensor to handlers, by name; all others run on the dense tensor.

The handlers, which keep the description, are in shapes.py, arithmetic.py and gradients.py.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

import torch

from ... import _torch_internals as internals
from ..._torch_internals import tree_flatten, tree_map
from ..base import AttentionBias
from .core import (
    BiasTensor,
    dense_view,
    follows,
    is_leaf,
    new,
    no_functions,
    rebind,
    to_numbers,
    traced,
)
from .layout import Layout
from .notices import log_dense

# Computed by the tensor itself: shape, dtype and the like; also all properties not in NUMBERS.
METADATA = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "is_floating_point",
    "is_complex",
    "is_signed",
    "element_size",
    "__len__",
    "__hash__",
    "get_device",
    "is_inference",
    "result_type",
    "is_same_size",
    "is_tensor",
}
# What they return can change the memory unseen: torch does not count it.
HAND_OUT = {
    "numpy",
    "__array__",
    "data_ptr",
    "storage",
    "_storage",
    "typed_storage",
    "_typed_storage",
    "untyped_storage",
    "__dlpack__",
}
NUMBERS = {"T", "mT", "H", "mH", "data", "grad", "real", "imag"}
Handler = Callable[..., Any]
HANDLERS: Dict[str, Handler] = {}


def run(func: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """Run an operation that has a BiasTensor among its arguments."""
    name = name_of(func)
    if (
        name in METADATA
        or name[:4] in ("get ", "set ")
        and name[4:] not in NUMBERS
        and name not in HANDLERS
    ):
        with no_functions():
            return func(*args, **kwargs)
    # torch.jit.trace records below __torch_function__, where the dense tensor is used.
    if internals.tracing_state() is not None:
        with no_functions():
            return func(*args, **kwargs)
    handler = HANDLERS.get(name)
    if handler is not None:
        given, named = (args, kwargs) if args else _positional(kwargs)
        result = handler(func, given, named) if given else NotImplemented
        if result is not NotImplemented:
            return result
    return on_numbers(func, name, args, kwargs)


def _positional(kwargs: Dict[str, Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
    """Make the first argument of a handled operation positional, by torch's names for it."""
    first = next((name for name in ("tensors", "input") if name in kwargs), None)
    if first is None:
        return (), kwargs
    return (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}


def name_of(func: Any) -> str:
    """Return the name of an operation; "get X" and "set X" for a property X."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # a property
        owner = func.__self__
        # a property written in Python, such as `grad` in torch 1.9
        return f"{name[2:5]} {getattr(owner, 'fget', owner).__name__}"
    return name


def on_numbers(func: Any, name: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """Run `func` on the dense tensors."""
    values, _ = tree_flatten((args, kwargs))
    biases = [value for value in values if type(value) is BiasTensor]
    for tensor in biases:
        if tensor._bias is not None:
            log_dense(name, tensor)
    first = args[0] if args else None
    changed = [
        value
        for value in (kwargs.get("out"), first if changes_first(name) else None)
        if type(value) is BiasTensor
    ]
    family = [relative for tensor in changed for relative in tensor._family()]
    for relative in family:  # every tensor that shares the changed memory becomes dense
        relative.numbers()
        if relative._bias is not None:
            relative._before_change()
    plain_args, plain_kwargs = tree_map(to_numbers, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for tensor in biases:
        if name in HAND_OUT or internals.is_inference(tensor.numbers()):
            for relative in tensor._family():
                relative._shared = True
    for relative in family:
        # A leaf shares memory with what it was detached from, not the graph.
        if not (is_leaf(relative) and follows(relative)):
            rebind(relative, None, relative._layout)
    if type(result) is torch.Tensor and result._is_view() and torch.is_grad_enabled():
        owner = next((tensor for tensor in biases if _is_view_of(result, tensor._dense)), None)
        return result if owner is None else dense_view(owner, result)
    return next((tensor for tensor in changed if result is tensor._dense), result)


def _is_view_of(view: torch.Tensor, dense: Optional[torch.Tensor]) -> bool:
    return dense is not None and view._base is (dense._base if dense._is_view() else dense)


def changes_first(name: str) -> bool:
    """Return True if the operation changes its first argument in place."""
    if name in ("__setitem__", "set data"):
        return True
    return (
        name[:3] == "__i"
        and name not in ("__int__", "__index__", "__invert__")
        or (name.endswith("_") and not name.endswith("__"))
    )


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for the operations with these names."""

    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def derived(
    func: Any, args: Any, kwargs: Any, bias: Optional[AttentionBias], layout: Optional[Layout],
    dtype: Optional[torch.dtype] = None, is_view: bool = False,
) -> Any:  # fmt: skip
    """Return the result of func(*args, **kwargs) as a BiasTensor with the description `bias`.

    Returns NotImplemented if `bias` or `layout` is None.
    """
    if bias is None or layout is None:
        return NotImplemented
    values, _ = tree_flatten((args, kwargs))
    parents = tuple(value for value in values if type(value) is BiasTensor)
    return new(
        bias,
        layout,
        parents[0].dtype if dtype is None else dtype,
        (func, args, kwargs),
        parents,
        is_view,
    )


def structured(value: Any) -> bool:
    """Return True for a BiasTensor that has a description which may be used."""
    return type(value) is BiasTensor and value._described() and not traced()


@handles("stride", "is_contiguous", "dim_order")
def _strides(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    if tensor._bias is None:  # it may be a view
        return func(tensor.numbers(), *rest, **kwargs)
    with no_functions():
        return func(*args, **kwargs)


@handles("__repr__", "__str__", "__format__")
def _repr(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if tensor._bias is None:
        return NotImplemented
    return f"BiasTensor({tensor._bias!r}, shape={tuple(tensor.shape)}, dtype={tensor.dtype})"
