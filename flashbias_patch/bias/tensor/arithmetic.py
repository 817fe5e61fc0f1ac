"""Handlers for arithmetic, masks, dtypes and devices of a BiasTensor."""

from __future__ import annotations

import math
import operator
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from ..base import DenseBias, MaskBias, add_terms
from . import layout as layouts
from . import terms
from .core import BiasTensor, no_functions, rebind
from .layout import Layout
from .registry import HANDLERS, derived, handles, name_of, structured

DTYPES = {
    "half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
}


@handles("mul", "multiply", "__mul__", "__rmul__", "div", "divide", "true_divide", "__truediv__")
def _multiply(func: Any, args: Any, kwargs: Any) -> Any:
    division = name_of(func) in ("div", "divide", "true_divide", "__truediv__")
    if kwargs or len(args) != 2:
        return NotImplemented
    tensor, factor = args
    if not structured(tensor):
        if division:
            return NotImplemented
        tensor, factor = factor, tensor
    if not structured(tensor) or type(factor) is BiasTensor or tensor.dtype is torch.bool:
        return NotImplemented
    dtype, layout = result_type(tensor, factor), tensor._layout
    if isinstance(factor, Tensor):
        if not factor.is_floating_point():
            return NotImplemented
        aligned = _aligned(layout, factor)
        if aligned is None:
            return NotImplemented
        layout, factor = aligned
        if factor.shape[3] != 1:
            return NotImplemented
    elif isinstance(factor, bool) or not isinstance(factor, (int, float)):
        return NotImplemented
    bias = terms.scaled(tensor._bias, factor, operator.truediv if division else operator.mul)
    return derived(func, args, kwargs, bias, layout, dtype)


@handles("neg", "negative", "__neg__")
def _negate(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not structured(tensor) or tensor.dtype is torch.bool:
        return NotImplemented
    return derived(
        func, args, kwargs, terms.scaled(tensor._bias, -1.0, operator.mul), tensor._layout
    )


@handles("add", "__add__", "__radd__", "sub", "subtract", "__sub__")
def _add(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    minus = name_of(func) in ("sub", "subtract", "__sub__")
    tensor, other = args
    if not structured(tensor):
        if minus:
            return NotImplemented
        tensor, other = other, tensor
    if not structured(tensor) or tensor.dtype is torch.bool:
        return NotImplemented
    dtype = result_type(tensor, other)
    if isinstance(other, (int, float)) and other == 0:
        return derived(func, args, kwargs, tensor._bias, tensor._layout, dtype)
    if not isinstance(other, Tensor) or not other.is_floating_point() or other.dim() == 0:
        return NotImplemented
    if type(other) is BiasTensor:
        if not structured(other) or other._layout != tensor._layout:
            return NotImplemented
        layout, term = tensor._layout, other._bias
    else:
        aligned = _aligned(tensor._layout, other)
        if aligned is None:
            return NotImplemented
        layout, values = aligned
        if values.shape[3] != tensor._bias.shape[3]:
            return NotImplemented
        term = DenseBias(values)
    assert term is not None
    signed = terms.scaled(term, -1.0, operator.mul) if minus else term
    return derived(
        func, args, kwargs, None if signed is None else tensor._bias + signed, layout, dtype
    )


@handles("masked_fill")
def _masked_fill(func: Any, args: Any, kwargs: Any) -> Any:
    arguments = dict(zip(("self", "mask", "value"), args), **kwargs)
    tensor, mask, value = arguments.get("self"), arguments.get("mask"), arguments.get("value")
    if tensor is None or not structured(tensor) or tensor.dtype is torch.bool:
        return NotImplemented
    if not isinstance(mask, Tensor) or isinstance(value, Tensor) or value != -math.inf:
        return NotImplemented
    return _hidden(func, args, kwargs, tensor, mask)


@handles("logical_or", "__or__", "__ror__", "bitwise_or")
def _or(func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    tensor, mask = args
    if not structured(tensor):
        tensor, mask = mask, tensor
    if not structured(tensor) or tensor.dtype is not torch.bool or not isinstance(mask, Tensor):
        return NotImplemented
    return _hidden(func, args, kwargs, tensor, mask)


def _hidden(func: Any, args: Any, kwargs: Any, tensor: BiasTensor, mask: Tensor) -> Any:
    if mask.dtype is not torch.bool or isinstance(mask, BiasTensor) and not structured(mask):
        return NotImplemented
    if type(mask) is BiasTensor:
        layout, term = tensor._layout, mask._bias
        if mask._layout != layout:
            return NotImplemented
    else:
        aligned = _aligned(tensor._layout, mask)
        if aligned is None:
            return NotImplemented
        layout, hidden = aligned
        if hidden.shape[3] != tensor._bias.shape[3]:  # type: ignore[union-attr]
            return NotImplemented
        term = MaskBias(hidden)
    assert term is not None and tensor._bias is not None
    return derived(func, args, kwargs, add_terms((*tensor._bias._terms(), *term._terms())), layout)


@handles("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(func: Any, args: Any, kwargs: Any) -> Any:
    names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name_of(func), ("min", "max"))
    tensor, *rest = args
    if not structured(tensor) or tensor.dtype is torch.bool:
        return NotImplemented
    arguments = dict(zip(names, rest), **kwargs)
    low, high = arguments.get("min"), arguments.get("max")
    if set(arguments) - {"min", "max"} or any(
        not isinstance(bound, (int, float, type(None))) for bound in (low, high)
    ):
        return NotImplemented
    return derived(func, args, kwargs, terms.clamped(tensor._bias, low, high), tensor._layout)


def _aligned(layout: Layout, other: Tensor) -> Optional[Tuple[Layout, Tensor]]:
    """Return layouts.canonical of `other`, broadcast with `layout`."""
    try:
        grown = layouts.expanded(
            layout, torch.broadcast_shapes(layouts.shape_of(layout), other.shape)
        )
    except RuntimeError:
        return None  # they do not fit: the dense tensor raises the error
    return None if grown is None else layouts.canonical(grown, other)


IN_PLACE = {
    "mul_": "mul",
    "multiply_": "mul",
    "__imul__": "mul",
    "div_": "div",
    "divide_": "div",
    "true_divide_": "div",
    "__itruediv__": "div",
    "add_": "add",
    "__iadd__": "add",
    "sub_": "sub",
    "subtract_": "sub",
    "__isub__": "sub",
    "neg_": "neg",
    "negative_": "neg",
    "clamp_": "clamp",
    "clip_": "clamp",
    "clamp_min_": "clamp_min",
    "clamp_max_": "clamp_max",
    "masked_fill_": "masked_fill",
}


@handles(*IN_PLACE)
def _in_place(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation in place if no other tensor shares the memory."""
    tensor, *_ = args
    if not structured(tensor) or len(tensor._family()) > 1:
        return NotImplemented
    with no_functions():  # without a graph, a change leaves the gradient as it was
        if tensor.requires_grad and (tensor.is_leaf or not torch.is_grad_enabled()):
            return NotImplemented
    name = IN_PLACE[name_of(func)]
    result = HANDLERS[name](getattr(Tensor, name), args, kwargs)
    if result is NotImplemented or result.dtype != tensor.dtype or result.shape != tensor.shape:
        return NotImplemented
    old = tensor._before_change()
    function, (_, *replay_args), replay_kwargs = result._replay
    tensor._replay = function, (old, *replay_args), replay_kwargs
    tensor._parents, tensor._shares = (old, *result._parents[1:]), False
    rebind(tensor, result._bias, result._layout)
    return tensor


def result_type(tensor: BiasTensor, other: Any) -> torch.dtype:
    """Return torch.result_type without dispatch to BiasTensor."""
    with no_functions():
        return torch.result_type(tensor, other)


@handles(
    "half",
    "float",
    "double",
    "bfloat16",
    "to",
    "type",
    "type_as",
    "cuda",
    "cpu",
    "contiguous",
    "clone",
)
def _moved(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    if not structured(tensor):
        return NotImplemented
    name = name_of(func)
    dtype, device = tensor.dtype, tensor.device
    targets = [
        *rest,
        *(value for key, value in kwargs.items() if key in ("dtype", "device", "other")),
    ]
    if name in DTYPES:
        dtype = DTYPES[name]
    elif name in ("cuda", "cpu"):
        with no_functions():
            device = getattr(torch.empty(0, device=tensor.device), name)(*rest, **kwargs).device
    elif name in ("to", "type", "type_as"):
        for value in targets:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype = value.dtype
                device = value.device if name == "to" else device
            elif (
                isinstance(value, (torch.device, int, str))
                and not isinstance(value, bool)
                and name == "to"
            ):
                device = (
                    torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
                )
            elif isinstance(value, str) or value is not None and not isinstance(value, bool):
                return NotImplemented
    if name == "type" and not targets:
        return NotImplemented
    if dtype is torch.bool if tensor.dtype is not torch.bool else dtype is not torch.bool:
        return NotImplemented
    if not dtype.is_floating_point and dtype is not torch.bool:
        return NotImplemented
    bias = tensor._bias
    assert bias is not None
    same = device == tensor.device or device.type == tensor.device.type and device.index is None
    if same and dtype is tensor.dtype and name not in ("clone",) and not kwargs.get("copy"):
        return tensor
    bias = bias if same else bias.to(device)
    return derived(func, args, kwargs, bias, tensor._layout, dtype, is_view=name == "contiguous")


@handles("detach", "get data")
def _detach(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not structured(tensor):
        return NotImplemented
    with torch.no_grad():  # this detaches the description; changes of `data` are counted too
        return derived(Tensor.detach, args, kwargs, tensor._bias, tensor._layout, is_view=True)
