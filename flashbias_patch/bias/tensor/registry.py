"""Operations on a BiasTensor: those that its description survives, by name (shapes.py, values.py,
gradients.py); all others run on the dense tensor."""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Tuple

import torch

from ... import _torch_internals as internals
from ..._torch_internals import tree_flatten, tree_map
from ..base import AttentionBias
from .core import BiasTensor, new, no_functions, rebind, to_numbers, traced
from .layout import Layout
from .notices import tell

# Answered by the wrapper itself: shape, dtype and the like. Of properties all but those in NUMBERS
# are.
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
    "stride",
    "is_contiguous",
    "__len__",
    "__hash__",
    "get_device",
    "is_inference",
    "result_type",
    "is_same_size",
    "is_tensor",
    "dim_order",
    "set grad",
}
NUMBERS = {"T", "mT", "H", "mH", "data", "grad", "real", "imag"}
Handler = Callable[..., Any]
HANDLERS: Dict[str, Handler] = {}


def run(func: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    name = name_of(func)
    if (
        name in METADATA
        or name[:4] in ("get ", "set ")
        and name[4:] not in NUMBERS
        and name not in HANDLERS
    ):
        with no_functions():
            return func(*args, **kwargs)
    if (
        internals.tracing_state() is not None
    ):  # torch.jit.trace records below, where numbers are put in
        with no_functions():
            return func(*args, **kwargs)
    handler = HANDLERS.get(name)
    if handler is not None:
        found = handler(func, args, kwargs)
        if found is not NotImplemented:
            return found
    return on_numbers(func, name, args, kwargs)


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):  # of a property
        owner = func.__self__
        # written in Python, as `grad` in torch 1.9
        return f"{name[2:5]} {getattr(owner, 'fget', owner).__name__}"
    return name


def on_numbers(func: Any, name: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """`func` on the dense tensors."""
    found = [value for value in tree_flatten((args, kwargs))[0] if type(value) is BiasTensor]
    for tensor in found:
        if tensor._bias is not None:
            tell(name, tensor)
    first = args[0] if args else None
    changed = [
        value
        for value in (kwargs.get("out"), first if changes_first(name) else None)
        if type(value) is BiasTensor
    ]
    family = [one for tensor in changed for one in tensor._family()]
    for one in family:  # whatever shares the numbers that change is dense from here on
        one.numbers()
        if one._bias is not None:
            one._before_change()
    plain_args, plain_kwargs = tree_map(to_numbers, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for one in family:
        rebind(one, None, one._layout)
    return next((tensor for tensor in changed if result is tensor._dense), result)


def changes_first(name: str) -> bool:
    if name in ("__setitem__", "set data"):
        return True
    return (
        name[:3] == "__i"
        and name not in ("__int__", "__index__", "__invert__")
        or (name.endswith("_") and not name.endswith("__"))
    )


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            HANDLERS[name] = handler
        return handler

    return register


def derived(
    func: Any, args: Any, kwargs: Any, bias: Optional[AttentionBias], layout: Optional[Layout],
    dtype: Optional[torch.dtype] = None, is_view: bool = False,
) -> Any:  # fmt: skip
    """The result of func(*args, **kwargs) as a description, or NotImplemented where there is
    none."""
    if bias is None or layout is None:
        return NotImplemented
    parents = tuple(value for value in tree_flatten((args, kwargs))[0] if type(value) is BiasTensor)
    return new(
        bias,
        layout,
        parents[0].dtype if dtype is None else dtype,
        (func, args, kwargs),
        parents,
        is_view,
    )


def structured(value: Any) -> bool:
    return (
        type(value) is BiasTensor
        and value._bias is not None
        and not value._must_be_dense()
        and not traced()
    )


@handles("__repr__", "__str__", "__format__")
def _repr(func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if tensor._bias is None:
        return NotImplemented
    return f"BiasTensor({tensor._bias!r}, shape={tuple(tensor.shape)}, dtype={tensor.dtype})"
