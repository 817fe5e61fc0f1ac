"""What transposing, expanding, reshaping, slicing and concatenating do to a BiasTensor."""

from __future__ import annotations

import math
import numbers
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from . import layout as layouts
from . import terms
from .core import BiasTensor
from .layout import SAME, Layout
from .registry import derived, handles, name_of, structured


def _dims(args: Tuple[Any, ...], kwargs: Dict[str, Any], *names: str) -> List[int]:
    """Sizes or dimensions given as f(t, 1, 2), f(t, (1, 2)) or by keyword."""
    for name in names:
        if name in kwargs:
            value = kwargs[name]
            return list(value) if isinstance(value, (tuple, list)) else [value]
    rest = args[1:]
    if len(rest) == 1 and isinstance(rest[0], (tuple, list)):
        rest = tuple(rest[0])
    return [int(size) for size in rest]


def _permuted(func: Any, args: Any, kwargs: Any, order: List[int]) -> Any:
    tensor = args[0]
    count = len(tensor._layout)
    if any(not -count <= place < count for place in order):
        return NotImplemented
    order = [place % count for place in order]
    if sorted(order) != list(range(count)):
        return NotImplemented
    return derived(
        func,
        args,
        kwargs,
        tensor._bias,
        tuple(tensor._layout[place] for place in order),
        is_view=True,
    )


@handles("transpose", "swapaxes", "swapdims")
def _transpose(func: Any, args: Any, kwargs: Any) -> Any:
    if not structured(args[0]):
        return NotImplemented
    pair = list(args[1:]) + [
        kwargs[name] for name in ("dim0", "dim1", "axis0", "axis1") if name in kwargs
    ]
    count = len(args[0]._layout)
    if len(pair) != 2 or any(not -count <= place < count for place in pair):
        return NotImplemented
    order = list(range(count))
    a, b = pair[0] % count, pair[1] % count
    order[a], order[b] = b, a
    return _permuted(func, args, kwargs, order)


@handles("permute")
def _permute(func: Any, args: Any, kwargs: Any) -> Any:
    return (
        _permuted(func, args, kwargs, _dims(args, kwargs, "dims"))
        if structured(args[0])
        else NotImplemented
    )


@handles("get T", "get mT")
def _flipped(func: Any, args: Any, kwargs: Any) -> Any:
    if not structured(args[0]):
        return NotImplemented
    count = len(args[0]._layout)
    order = list(range(count))
    order = order[::-1] if name_of(func) == "get T" else [*order[:-2], count - 1, count - 2]
    return _permuted(func, args, kwargs, order)


@handles("unsqueeze")
def _unsqueeze(func: Any, args: Any, kwargs: Any) -> Any:
    if not structured(args[0]):
        return NotImplemented
    (place,) = _dims(args, kwargs, "dim")
    dims = list(args[0]._layout)
    if not -len(dims) - 1 <= place <= len(dims):
        return NotImplemented
    dims.insert(place % (len(dims) + 1), ())
    return derived(func, args, kwargs, args[0]._bias, tuple(dims), is_view=True)


@handles("squeeze")
def _squeeze(func: Any, args: Any, kwargs: Any) -> Any:
    if not structured(args[0]):
        return NotImplemented
    layout = args[0]._layout
    places = _dims(args, kwargs, "dim") or list(range(len(layout)))
    places = [place % len(layout) for place in places if -len(layout) <= place < len(layout)]
    kept = tuple(
        dim for place, dim in enumerate(layout) if place not in places or layouts.size_of(dim) != 1
    )
    return derived(func, args, kwargs, args[0]._bias, kept, is_view=True)


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
    if not structured(args[0]):
        return NotImplemented
    tensor, name = args[0], name_of(func)
    layout = tensor._layout
    if name in ("view", "reshape", "expand", "repeat", "tile"):
        if "dtype" in kwargs or len(args) == 2 and isinstance(args[1], torch.dtype):
            return NotImplemented
        sizes = _dims(args, kwargs, "size", "shape", "sizes", "repeats", "dims")
    if name in ("expand", "expand_as"):
        found = layouts.expanded(layout, sizes if name == "expand" else tuple(args[1].shape))
    elif name in ("repeat", "tile"):
        if name == "tile" and len(sizes) < len(layout):
            sizes = [1] * (len(layout) - len(sizes)) + sizes
        found = layouts.repeated(layout, sizes)
    elif name == "repeat_interleave":
        found = _interleaved(layout, args, kwargs)
    else:
        if name in ("view_as", "reshape_as"):
            sizes = list(args[1].shape)
        elif name == "flatten":
            sizes = _flat_sizes(layout, *args[1:], **kwargs)
        elif name == "unflatten":
            place, parts = [*args[1:], *kwargs.values()][:2]
            sizes = list(tensor.shape)
            sizes[place : place + 1 or None] = parts
        found = layouts.regrouped(layout, sizes)
    copied = name in ("repeat", "tile", "repeat_interleave")
    return derived(func, args, kwargs, tensor._bias, found, is_view=not copied)


def _flat_sizes(layout: Layout, start_dim: int = 0, end_dim: int = -1) -> List[int]:
    sizes = list(layouts.shape_of(layout))
    start, end = start_dim % len(sizes), end_dim % len(sizes)
    return [*sizes[:start], math.prod(sizes[start : end + 1]), *sizes[end + 1 :]]


def _interleaved(layout: Layout, args: Any, kwargs: Any) -> Optional[Layout]:
    given = dict(zip(("repeats", "dim"), args[1:]), **kwargs)
    count, place = given.get("repeats"), given.get("dim")
    if (
        not isinstance(count, int)
        or count < 1
        or place is None
        or not -len(layout) <= place < len(layout)
    ):
        return None
    dims = list(layout)
    dims[place] = dims[place] + layouts.dim_of(SAME, count)
    return tuple(dims)


# -- choosing entries ------------------------------------------------------------------------------


@handles("__getitem__")
def _getitem(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, index = args
    if not structured(tensor):
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    if (
        any(type(each) is BiasTensor for each in index)
        or sum(each is Ellipsis for each in index) > 1
    ):
        return NotImplemented
    dims = tensor._layout
    given = sum(each is not None and each is not Ellipsis for each in index)
    whole = (slice(None),) * (len(dims) - given)
    place = next((i for i, each in enumerate(index) if each is Ellipsis), None)
    index = (*index, *whole) if place is None else (*index[:place], *whole, *index[place + 1 :])
    return _chosen(func, args, kwargs, index)


@handles("select", "narrow", "index_select")
def _choose(func: Any, args: Any, kwargs: Any) -> Any:
    if not structured(args[0]):
        return NotImplemented
    name = name_of(func)
    order = ("dim", "index") if name != "narrow" else ("dim", "start", "length")
    given = dict(zip(order, args[1:]), **kwargs)
    count = len(args[0]._layout)
    if set(given) != set(order) or not -count <= given["dim"] < count:
        return NotImplemented
    place = given["dim"] % count
    which = given.get("index")
    if name == "narrow":
        start = int(given["start"])
        start += args[0].shape[place] if start < 0 else 0
        which = slice(start, start + given["length"])
    return _chosen(
        func, args, kwargs, (*(slice(None),) * place, which, *(slice(None),) * (count - place - 1))
    )


def _chosen(func: Any, args: Any, kwargs: Any, index: Tuple[Any, ...]) -> Any:
    """Whole batch entries, heads and queries; `index` has an entry for each dimension, and None for
    a new one."""
    tensor = args[0]
    bias, dims = tensor._bias, iter(tensor._layout)
    found: List[Any] = []
    lists = 0
    for each in index:
        if each is None:
            found.append(())
            continue
        dim = next(dims, None)
        if dim is None:
            return NotImplemented
        length = layouts.size_of(dim)
        if isinstance(each, slice) and each.indices(length) == (0, length, 1):
            found.append(dim)
            continue
        axis = layouts.axis_of(dim)
        if axis is None or axis == "n":
            return NotImplemented
        if isinstance(each, numbers.Integral) and not isinstance(each, bool):
            if not -length <= int(each) < length:
                return NotImplemented  # the dense tensor raises as ever
            place = int(each) % length
            bias = bias if axis == SAME else terms.take(bias, axis, slice(place, place + 1))
            continue
        if isinstance(each, slice):
            start, stop, step = each.indices(length)
            if step < 1:
                return NotImplemented
            size, each = len(range(start, stop, step)), slice(start, stop, step)
        else:
            each = _as_indices(each, length, tensor)
            lists += 1
            if each is None or lists > 1:
                return NotImplemented
            size = len(each)
        bias = bias if axis == SAME else terms.take(bias, axis, each)
        found.append(layouts.dim_of(axis, size))
    if (
        next(dims, None) is not None
        or lists
        and any(isinstance(each, numbers.Integral) for each in index)
    ):
        return NotImplemented
    return derived(func, args, kwargs, bias, tuple(found), is_view=not lists)


def _as_indices(given: Any, length: int, tensor: BiasTensor) -> Optional[Tensor]:
    if isinstance(given, (list, range)) and all(
        isinstance(one, int) and not isinstance(one, bool) for one in given
    ):
        given = torch.tensor(given, dtype=torch.int64)
    if not isinstance(given, Tensor) or given.dim() != 1:
        return None
    if given.dtype is torch.bool:
        if len(given) != length:
            return None
        given = given.nonzero()[:, 0]
    if given.is_floating_point() or given.dtype is torch.uint8:
        return None
    return given.to(tensor.device)


@handles("cat", "concat", "concatenate")
def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("tensors", "dim"), args), **kwargs)
    pieces, place = given.get("tensors"), given.get("dim", given.get("axis", 0))
    if "out" in given or not isinstance(pieces, (tuple, list)):
        return NotImplemented
    ours = [piece for piece in pieces if type(piece) is BiasTensor]
    if len(ours) != 1 or not structured(ours[0]):
        return NotImplemented
    tensor = ours[0]
    others = [piece for piece in pieces if piece is not tensor]
    count = len(tensor._layout)
    if not -count <= place < count or any(piece.dtype != tensor.dtype for piece in others):
        return NotImplemented
    where = next(i for i, piece in enumerate(pieces) if piece is tensor)
    rows = [piece.shape[place] if piece.dim() == count else None for piece in others]
    if None in rows or any(map(_holds_anything, others)):
        return NotImplemented
    before, after = sum(rows[:where]), sum(rows[where:])  # type: ignore[arg-type]
    return _with_rows(func, args, kwargs, tensor, place % count, before, after)


def _holds_anything(tensor: Tensor) -> bool:
    """Whether some entry is not zero. Waits for the GPU, which takes less than a dense bias."""
    if tensor.requires_grad or tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    for dim in range(tensor.dim()):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return bool(tensor.any())


@handles("pad", "_pad", "constant_pad_nd")
def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    given = dict(zip(("input", "pad", "mode", "value"), args), **kwargs)
    tensor, around = given["input"], list(given.get("pad", ()))
    if (
        not structured(tensor)
        or given.get("mode", "constant") != "constant"
        or given.get("value") not in (None, 0)
    ):
        return NotImplemented
    count = len(tensor._layout)
    padded = [i // 2 for i, width in enumerate(around) if width]
    if len(around) % 2 or len(around) > 2 * count or len(set(padded)) != 1 or min(around) < 0:
        return NotImplemented
    before, after = around[2 * padded[0] : 2 * padded[0] + 2]
    return _with_rows(func, args, kwargs, tensor, count - 1 - padded[0], before, after)


def _with_rows(
    func: Any, args: Any, kwargs: Any, tensor: BiasTensor, place: int, before: int, after: int
) -> Any:
    dim = tensor._layout[place]
    assert tensor._bias is not None
    queries = tensor._bias.shape[2]
    is_rows = (
        layouts.axis_of(dim) == "m" or not dim and queries == 1 and place == len(tensor._layout) - 2
    )
    if not is_rows:
        return NotImplemented
    bias = terms.with_empty_rows(tensor._bias, before, after)
    layout = list(tensor._layout)
    layout[place] = layouts.dim_of("m", queries + before + after)
    return derived(func, args, kwargs, bias, tuple(layout))
