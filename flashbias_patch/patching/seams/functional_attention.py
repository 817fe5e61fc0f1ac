"""Forwards that call F.multi_head_attention_forward themselves, computed through FlashBias.

`FunctionalAttention` is only opened for classes whose code mentions that function.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from typing import Any, Dict, Iterator, Optional, Tuple

import torch.nn.functional as F

from ..._torch_internals import TorchFunctionMode
from .. import route, unreachable
from ..route import Route
from .inner_attention import InnerCall, attend, masks_with_biases, why_unsupported

FUNCTION = "multi_head_attention_forward"


class _FunctionalMode(TorchFunctionMode or object):  # type: ignore[misc]
    """Inside an outer forward, F.multi_head_attention_forward is computed through FlashBias.

    A torch function mode is thread-local and open only during that forward. It sees every torch
    function of the forward, which costs time; hence `mentions_functional`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            open_route = route.current()
            if open_route is not None:
                return _attend_function(open_route, func, args, kwargs)
        return func(*args, **kwargs)


class _FunctionReplaced:
    """The same before torch 1.13, which has no function modes: torch.nn.functional's attribute is
    replaced while any such forward runs, and acts in those only. Names that were imported from
    there keep the original code."""

    _count, _lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not _FunctionReplaced._count:
                F.multi_head_attention_forward = _replacement
            _FunctionReplaced._count += 1

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            _FunctionReplaced._count -= 1
            if not _FunctionReplaced._count and F.multi_head_attention_forward is _replacement:
                F.multi_head_attention_forward = _FUNCTION


FunctionalAttention: Any = _FunctionReplaced if TorchFunctionMode is None else _FunctionalMode
_FUNCTION = F.multi_head_attention_forward


@functools.wraps(_FUNCTION)
def _replacement(*args: Any, **kwargs: Any) -> Any:
    open_route = route.current()
    if open_route is None or not open_route.functional:
        return _FUNCTION(*args, **kwargs)
    return _attend_function(open_route, _FUNCTION, args, kwargs)


_FUNCTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# Parameters of the function that are fields of InnerCall too; the others are set one by one.
_SAME_NAMES = tuple(
    name
    for name in InnerCall._fields
    if name not in ("batch_first", "dropout_p", "average_attn_weights", "length_first")
)


def _attend_function(
    open_route: Route, original: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Any:
    """A call of F.multi_head_attention_forward inside an outer forward."""
    if open_route.biases:
        unreachable.refuse(open_route.module)
    bound = _FUNCTION_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    dropout_p = arguments["dropout_p"] if arguments["training"] else 0.0
    if arguments["static_k"] is not None or arguments["static_v"] is not None:
        unsupported: Optional[str] = "static_k or static_v is not supported"
    else:
        unsupported = why_unsupported(
            arguments["query"],
            dropout_p,
            arguments.get("is_causal", False),
            arguments["use_separate_proj_weight"],
            arguments["bias_k"] is not None or arguments["bias_v"] is not None,
            arguments["add_zero_attn"],
        )
    call = {name: arguments[name] for name in _SAME_NAMES}
    call.update(
        batch_first=False,
        dropout_p=dropout_p,
        average_attn_weights=arguments.get("average_attn_weights", True),
    )
    result = attend(open_route, unsupported, call)
    if result is None:
        masks = masks_with_biases(open_route, InnerCall(**call))
        if masks is not None:
            arguments["attn_mask"] = masks.attn_mask
            arguments["key_padding_mask"] = masks.key_padding_mask
            if "is_causal" in arguments:
                arguments["is_causal"] = False
        return original(*bound.args, **bound.kwargs)
    return result


def mentions_functional(classes: Any) -> bool:
    """True if the code of these classes, or of the modules that define them, names
    F.multi_head_attention_forward."""
    return any(
        _names_functional(value)
        for cls in classes
        for base in cls.__mro__
        if not base.__module__.startswith("torch.") and base is not object
        for space in (vars(base), vars(sys.modules.get(base.__module__, base)))
        for value in list(space.values())
    )


def _names_functional(value: Any) -> bool:
    if value is _FUNCTION or value is _replacement:
        return True
    if type(value) in (staticmethod, classmethod):
        value = value.__func__
    if type(value) is types.FunctionType:
        code = getattr(inspect.unwrap(value), "__code__", None)
        return any(FUNCTION in names for names in _names_in(code))
    if issubclass(type(value), type) and not value.__module__.startswith("torch."):
        return any(
            type(inner) is types.FunctionType and _names_functional(inner)
            for inner in vars(value).values()
        )
    return False


def _names_in(code: Any) -> Iterator[Tuple[str, ...]]:
    """co_names of a code object and of those within it."""
    if isinstance(code, types.CodeType):
        yield code.co_names
        for constant in code.co_consts:
            yield from _names_in(constant)
