"""Forwards that call F.multi_head_attention_forward themselves, computed through FlashBias.

`FunctionalAttention` is only opened for classes whose code mentions that function.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from typing import Any, Dict, Iterator, Tuple

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


def _attend_function(
    open_route: Route, original: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Any:
    """A call of F.multi_head_attention_forward inside an outer forward."""
    if open_route.biases:
        unreachable.refuse(open_route.module)
    bound = _FUNCTION_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    dropout_p = given["dropout_p"] if given["training"] else 0.0
    static = given["static_k"] is not None or given["static_v"] is not None
    unsupported = (
        "static_k or static_v is not supported"
        if static
        else why_unsupported(
            given["query"],
            dropout_p,
            given.get("is_causal", False),
            given["use_separate_proj_weight"],
            given["bias_k"] is not None or given["bias_v"] is not None,
            given["add_zero_attn"],
        )
    )
    arguments_ = (
        given["query"],
        given["key"],
        given["value"],
        False,
        given["num_heads"],
        given["in_proj_weight"],
        given["in_proj_bias"],
        given["out_proj_weight"],
        given["out_proj_bias"],
        dropout_p,
        given["attn_mask"],
        given["key_padding_mask"],
        given["need_weights"],
        given.get("average_attn_weights", True),
    )
    result = attend(open_route, unsupported, arguments_)
    if result is None:
        masks = masks_with_biases(open_route, InnerCall(*arguments_))
        if masks is not None:
            given["attn_mask"], given["key_padding_mask"] = masks
            if "is_causal" in given:
                given["is_causal"] = False
        return original(*bound.args, **bound.kwargs)
    return result


def mentions_functional(classes: Any) -> bool:
    """Whether the code of these classes, or of the modules that define them, names
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
