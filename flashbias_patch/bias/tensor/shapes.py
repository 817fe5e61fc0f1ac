"""Handlers for transposing, expanding, reshaping, slicing and concatenating a BiasTensor."""

from __future__ import annotations

import math
import numbers
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..checks import is_int
from . import layout as layouts
from . import terms
from .core import BiasTensor
from .layout import SAME, Layout
from .registry import derived, handles, name_of, structured


def _dims(args: Tuple[Any, ...], kwargs: Dict[str, Any], *names: str) -> List[int]:
    """Return sizes or dimensions passed as f(t, 1, 2), f(t, (1, 2)) or by keyword."""
    for name in names:
        if name in kwargs:
            value = kwargs[name]
            return list(value) if isinstance(value, (tuple, list)) else [value]
    _, *sizes = args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        (sizes,) = sizes
    return [int(size) for size in sizes]


def _permuted(func: Any, args: Any, kwargs: Any, order: List[int]) -> Any:
    tensor, *_ = args
    count = len(tensor._layout)
    if any(not -count <= index < count for index in order):
        return NotImplemented
    order = [index % count for index in order]
    if sorted(order) != list(range(count)):
        return NotImplemented
    return derived(
        func,
        args,
        kwargs,
        tensor._bias,
        tuple(tensor._layout[index] for index in order),
        is_view=True,
    )


@handles("transpose", "swapaxes", "swapdims")
def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *pair = args
    if not structured(tensor):
        return NotImplemented
    pair = [
        *pair,  # a tuple while torch 2.1 compiles
        *(kwargs[name] for name in ("dim0", "dim1", "axis0", "axis1") if name in kwargs),
    ]
    count = len(tensor._layout)
    if len(pair) != 2 or any(not -count <= index < count for index in pair):
        return NotImplemented
    order = list(range(count))
    a, b = (index % count for index in pair)
    order[a], order[b] = b, a
    return _permuted(func, args, kwargs, order)


@handles("permute")
def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not structured(tensor):
        return NotImplemented
    return _permuted(func, args, kwargs, _dims(args, kwargs, "dims"))


@handles("get T", "get mT")
def _flipped(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not structured(tensor):
        return NotImplemented
    count = len(tensor._layout)
    order = list(range(count))
    order = order[::-1] if name_of(func) == "get T" else [*order[:-2], count - 1, count - 2]
    return _permuted(func, args, kwargs, order)


@handles("unsqueeze")
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not structured(tensor):
        return NotImplemented
    (index,) = _dims(args, kwargs, "dim")
    dims = list(tensor._layout)
    if not -len(dims) - 1 <= index <= len(dims):
        return NotImplemented
    dims.insert(index % (len(dims) + 1), ())
    return derived(func, args, kwargs, tensor._bias, tuple(dims), is_view=True)


@handles("squeeze")
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not structured(tensor):
        return NotImplemented
    layout = tensor._layout
    indices = _dims(args, kwargs, "dim") or list(range(len(layout)))
    indices = [index % len(layout) for index in indices if -len(layout) <= index < len(layout)]
    remaining = tuple(
        dim for index, dim in enumerate(layout) if index not in indices or layouts.size_of(dim) != 1
    )
    return derived(func, args, kwargs, tensor._bias, remaining, is_view=True)


@handles(
    "expand",
    "repeat",
    "tile",
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "expand_as",
    "view_as",
    "reshape_as",
    "repeat_interleave",
)
def _resized(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    if not structured(tensor):
        return NotImplemented
    name, layout = name_of(func), tensor._layout
    if name in ("view", "reshape", "expand", "repeat", "tile"):
        if "dtype" in kwargs or len(rest) == 1 and isinstance(rest[0], torch.dtype):
            return NotImplemented
        sizes = _dims(args, kwargs, "size", "shape", "sizes", "repeats", "dims")
    elif name in ("expand_as", "view_as", "reshape_as"):
        (other,) = rest
        sizes = list(other.shape)
    if name in ("expand", "expand_as"):
        new_layout = layouts.expanded(layout, sizes)
    elif name in ("repeat", "tile"):
        if name == "tile" and len(sizes) < len(layout):
            sizes = [1] * (len(layout) - len(sizes)) + sizes
        new_layout = layouts.repeated(layout, sizes)
    elif name == "repeat_interleave":
        new_layout = _interleaved(layout, rest, kwargs)
    else:
        if name == "flatten":
            sizes = _flat_sizes(layout, *rest, **kwargs)
        elif name == "unflatten":
            index, parts = _dim_and_sizes(*rest, **kwargs)
            sizes = list(tensor.shape)
            sizes[index : index + 1 or None] = parts
        new_layout = layouts.regrouped(layout, sizes)
    copied = name in ("repeat", "tile", "repeat_interleave")
    return derived(func, args, kwargs, tensor._bias, new_layout, is_view=not copied)


def _dim_and_sizes(dim: int, sizes: Sequence[int]) -> Tuple[int, Sequence[int]]:
    return dim, sizes


def _flat_sizes(layout: Layout, start_dim: int = 0, end_dim: int = -1) -> List[int]:
    sizes = list(layouts.shape_of(layout))
    if not -len(sizes) <= min(start_dim, end_dim) <= max(start_dim, end_dim) < len(sizes):
        return []  # the dense tensor raises the error
    start, end = start_dim % len(sizes), end_dim % len(sizes)
    return [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]]


def _interleaved(layout: Layout, rest: Any, kwargs: Any) -> Optional[Layout]:
    arguments = dict(zip(("repeats", "dim"), rest), **kwargs)
    count, index = arguments.get("repeats"), arguments.get("dim")
    if (
        not isinstance(count, int)
        or count < 1
        or index is None
        or not -len(layout) <= index < len(layout)
    ):
        return None
    dims = list(layout)
    dims[index] = dims[index] + layouts.dim_of(SAME, count)
    return tuple(dims)


@handles("__getitem__")
def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, index = args
    if not structured(tensor):
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    if (
        any(type(entry) is BiasTensor for entry in index)
        or sum(entry is Ellipsis for entry in index) > 1
    ):
        return NotImplemented
    dims = tensor._layout
    entries = sum(entry is not None and entry is not Ellipsis for entry in index)
    whole = (slice(None),) * (len(dims) - entries)
    ellipsis_at = next((i for i, entry in enumerate(index) if entry is Ellipsis), None)
    index = (
        (*index, *whole)
        if ellipsis_at is None
        else (*index[:ellipsis_at], *whole, *index[ellipsis_at + 1 :])
    )
    return _chosen(func, args, kwargs, index)


@handles("select", "narrow", "index_select")
def _choose(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    if not structured(tensor):
        return NotImplemented
    name = name_of(func)
    order = ("dim", "index") if name != "narrow" else ("dim", "start", "length")
    arguments = dict(zip(order, rest), **kwargs)
    count = len(tensor._layout)
    if set(arguments) != set(order) or not -count <= arguments["dim"] < count:
        return NotImplemented
    position = arguments["dim"] % count
    chosen = arguments.get("index")
    if name == "narrow":
        start = int(arguments["start"])
        start += tensor.shape[position] if start < 0 else 0
        chosen = slice(start, start + arguments["length"])
    return _chosen(
        func,
        args,
        kwargs,
        (*(slice(None),) * position, chosen, *(slice(None),) * (count - position - 1)),
    )


def _chosen(func: Any, args: Any, kwargs: Any, index: Tuple[Any, ...]) -> Any:
    """Select whole batch entries, heads and queries.

    index: one entry per dimension, and None for a new dimension.
    """
    tensor, *_ = args
    if not all(map(layouts.size_of, tensor._layout)):
        return NotImplemented  # of an empty tensor torch allows any index
    bias, dims = tensor._bias, iter(tensor._layout)
    new_dims: List[Any] = []
    lists = 0
    for entry in index:
        if entry is None:
            new_dims.append(())
            continue
        dim = next(dims, None)
        if dim is None:
            return NotImplemented
        length = layouts.size_of(dim)
        if isinstance(entry, slice) and entry.indices(length) == (0, length, 1):
            new_dims.append(dim)
            continue
        axis = layouts.axis_of(dim)
        if axis is None or axis == "n":
            return NotImplemented
        if is_int(entry):
            if not -length <= int(entry) < length:
                return NotImplemented  # the dense tensor raises the error
            position = int(entry) % length
            bias = bias if axis == SAME else terms.take(bias, axis, slice(position, position + 1))
            continue
        if isinstance(entry, slice):
            start, stop, step = entry.indices(length)
            if step < 1:
                return NotImplemented
            size, entry = len(range(start, stop, step)), slice(start, stop, step)
        else:
            entry = _as_indices(entry, length, tensor)
            lists += 1
            if entry is None or lists > 1:
                return NotImplemented
            size = len(entry)
        bias = bias if axis == SAME else terms.take(bias, axis, entry)
        new_dims.append(layouts.dim_of(axis, size))
    if (
        next(dims, None) is not None
        or lists
        and any(isinstance(entry, numbers.Integral) for entry in index)
    ):
        return NotImplemented
    return derived(func, args, kwargs, bias, tuple(new_dims), is_view=not lists)


def _as_indices(indices: Any, length: int, tensor: BiasTensor) -> Optional[Tensor]:
    if isinstance(indices, (list, range)) and all(
        isinstance(index, int) and not isinstance(index, bool) for index in indices
    ):
        indices = torch.tensor(indices, dtype=torch.int64)
    if not isinstance(indices, Tensor) or indices.dim() != 1:
        return None
    if indices.dtype is torch.bool:
        if len(indices) != length:
            return None
        indices = indices.nonzero()[:, 0]
    if indices.is_floating_point() or indices.dtype is torch.uint8:
        return None
    moved: Tensor = indices.to(tensor.device)
    return moved


@handles("cat", "concat", "concatenate")
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    arguments = dict(zip(("tensors", "dim"), args), **kwargs)
    pieces, position = arguments.get("tensors"), arguments.get("dim", arguments.get("axis", 0))
    if "out" in arguments or not isinstance(pieces, (tuple, list)):
        return NotImplemented
    biases = [piece for piece in pieces if type(piece) is BiasTensor]
    if len(biases) != 1:
        return NotImplemented
    (tensor,) = biases
    if not structured(tensor):
        return NotImplemented
    others = [piece for piece in pieces if piece is not tensor]
    count = len(tensor._layout)
    if not -count <= position < count or any(piece.dtype != tensor.dtype for piece in others):
        return NotImplemented
    bias_at = next(i for i, piece in enumerate(pieces) if piece is tensor)
    shape = list(tensor.shape)
    for piece in others:
        shape[position] = piece.shape[position] if piece.dim() == count else -1
        if list(piece.shape) != shape:  # the dense tensor raises the error
            return NotImplemented
    if any(map(_has_nonzero, others)):
        return NotImplemented
    rows = [piece.shape[position] for piece in others]
    before, after = sum(rows[:bias_at]), sum(rows[bias_at:])
    return _with_rows(func, args, kwargs, tensor, position % count, before, after)


def _has_nonzero(tensor: Tensor) -> bool:
    """Return True if an entry is not zero, or if that cannot be checked.

    This synchronises with the GPU, which costs less than a dense bias.
    """
    if tensor.requires_grad or tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return bool(tensor.any())


@handles("pad", "_pad", "constant_pad_nd")
def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    arguments = dict(zip(("input", "pad", "mode", "value"), args), **kwargs)
    tensor, around = arguments["input"], list(arguments.get("pad", ()))
    if (
        not structured(tensor)
        or arguments.get("mode", "constant") != "constant"
        or arguments.get("value") not in (None, 0)
    ):
        return NotImplemented
    count = len(tensor._layout)
    padded = {i // 2 for i, width in enumerate(around) if width}
    if len(around) % 2 or len(around) > 2 * count or len(padded) != 1 or min(around) < 0:
        return NotImplemented
    (from_last,) = padded
    before, after = around[2 * from_last : 2 * from_last + 2]
    return _with_rows(func, args, kwargs, tensor, count - 1 - from_last, before, after)


def _with_rows(
    func: Any, args: Any, kwargs: Any, tensor: BiasTensor, position: int, before: int, after: int
) -> Any:
    dim = tensor._layout[position]
    assert tensor._bias is not None
    queries = tensor._bias.shape[2]
    is_rows = (
        layouts.axis_of(dim) == "m"
        or not dim
        and queries == 1
        and position == len(tensor._layout) - 2
    )
    if not is_rows:
        return NotImplemented
    bias = terms.with_empty_rows(tensor._bias, before, after)
    layout = list(tensor._layout)
    layout[position] = layouts.dim_of("m", queries + before + after)
    return derived(func, args, kwargs, bias, tuple(layout))
