"""Layouts: how the dimensions of a tensor map to batch, heads, queries and keys.

A dimension is a product of factors (axis, size), slowest first; the axis is one of "b", "h", "m",
"n", or "*" for a dimension along which nothing changes (created by expand). The layout (B*H, M, N)
of a bias that is the same for all heads is ((("b", B), ("*", H)), (("m", M),), (("n", N),)). A
dimension of size 1 has no factors.
"""

from __future__ import annotations

import math
from typing import List, Optional, Sequence, Tuple

from torch import Tensor

Factor = Tuple[str, int]
Dim = Tuple[Factor, ...]
Layout = Tuple[Dim, ...]
SAME = "*"


def dim_of(axis: str, size: int) -> Dim:
    return () if size == 1 else ((axis, size),)


def size_of(dim: Dim) -> int:
    return math.prod(size for _, size in dim)


def shape_of(layout: Layout) -> Tuple[int, ...]:
    return tuple(size_of(dim) for dim in layout)


def axis_of(dim: Dim) -> Optional[str]:
    """Return the axis if the dimension is one whole axis, "*" if nothing changes along it, else
    None."""
    axes = {axis for axis, _ in dim}
    if axes <= {SAME}:
        return SAME
    if len(dim) != 1:
        return None
    ((axis, _),) = dim
    return axis


def expanded(layout: Layout, sizes: Sequence[int]) -> Optional[Layout]:
    """Return the layout after Tensor.expand, or None if the sizes do not fit."""
    added = len(sizes) - len(layout)
    if added < 0:
        return None
    dims: List[Dim] = []
    for dim, size in zip(((),) * added + layout, sizes):
        if size in (-1, size_of(dim)):
            dims.append(dim)
        elif size_of(dim) == 1:
            dims.append(dim_of(SAME, size))
        else:
            return None
    return tuple(dims)


def repeated(layout: Layout, counts: Sequence[int]) -> Optional[Layout]:
    """Return the layout after Tensor.repeat, or None if the counts do not fit."""
    added = len(counts) - len(layout)
    if added < 0 or any(count < 1 for count in counts):
        return None
    return tuple(dim_of(SAME, count) + dim for dim, count in zip(((),) * added + layout, counts))


def regrouped(layout: Layout, sizes: Sequence[int]) -> Optional[Layout]:
    """Return the layout after Tensor.reshape, or None if an axis would be split."""
    total = math.prod(shape_of(layout))
    sizes = list(sizes)
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        if not known or total % known:
            return None
        sizes[sizes.index(-1)] = total // known
    if math.prod(sizes) != total or total == 0:
        return None
    remaining = [factor for dim in layout for factor in dim]
    dims: List[Dim] = []
    for size in sizes:
        dim: List[Factor] = []
        while size > 1:
            if not remaining:
                return None
            axis, length = remaining.pop(0)
            if size % length == 0:
                dim.append((axis, length))
                size //= length
            elif axis == SAME and length % size == 0:
                dim.append((SAME, size))
                remaining.insert(0, (SAME, length // size))
                size = 1
            else:
                return None
        dims.append(tuple(dim))
    return tuple(dims) if not remaining else None


def spread(layout: Layout, tensor: Tensor) -> Tensor:
    """Bring a canonical (B|1, H|1, M, N) tensor into `layout`, as a view if possible."""
    factors = [factor for dim in layout for factor in dim]
    present = [axis for axis, _ in factors if axis != SAME]
    order = ["bhmn".index(axis) for axis in present]
    rest = [position for position in range(4) if position not in order]
    tensor = tensor.permute(*order, *rest).reshape([tensor.shape[position] for position in order])
    for position, (axis, _) in enumerate(factors):
        if axis == SAME:
            tensor = tensor.unsqueeze(position)
    return tensor.expand([size for _, size in factors]).reshape(shape_of(layout))


def canonical(layout: Layout, tensor: Tensor) -> Optional[Tuple[Layout, Tensor]]:
    """Bring a plain tensor that broadcasts to `layout` into the form (B|1, H|1, M|1, N|1).

    Returns the layout too: a "*" factor along which the tensor changes becomes heads, or batch and
    heads. Returns None if this is not possible.
    """
    if tensor.dim() > len(layout):
        return None
    tensor = tensor[(None,) * (len(layout) - tensor.dim())]
    layout = _named(layout, tensor)
    sizes: List[int] = []
    axes: List[str] = []
    for dim, size in zip(layout, tensor.shape):
        if size not in (1, size_of(dim)):
            return None
        for axis, length in dim:
            axes.append(axis)
            sizes.append(1 if size == 1 else length)
    if any(axis == SAME and size > 1 for axis, size in zip(axes, sizes)):
        return None
    tensor = tensor.reshape(sizes)
    keep = [position for position, axis in enumerate(axes) if axis != SAME]
    tensor = tensor.permute(*keep, *(p for p in range(len(axes)) if p not in keep))
    tensor = tensor.reshape([sizes[position] for position in keep])
    present = [axes[position] for position in keep]
    for axis in "bhmn":
        if axis not in present:
            present.append(axis)
            tensor = tensor.unsqueeze(-1)
    return layout, tensor.permute(*(present.index(axis) for axis in "bhmn"))


def _named(layout: Layout, tensor: Tensor) -> Layout:
    """Name the "*" factors along which `tensor` changes: the last is "h", the one before "b"."""
    changing = [
        (position, index)
        for position, dim in enumerate(layout)
        for index, (axis, _) in enumerate(dim)
        if axis == SAME and tensor.shape[position] != 1
    ]
    taken = {axis for dim in layout for axis, _ in dim}
    names = [axis for axis in "hb" if axis not in taken]
    if not changing or len(changing) > len(names):
        return layout
    named = [list(dim) for dim in layout]
    for (position, index), axis in zip(reversed(changing), names):
        _, size = named[position][index]
        named[position][index] = (axis, size)
    return tuple(tuple(dim) for dim in named)


def readable(layout: Layout, B: int, H: int, M: int, N: int) -> Optional[str]:
    """Return how attention reads a tensor of that layout, or None if it cannot.

    The result is "mn", "bmn", "mbn", "(bh)mn" or "bhmn". (M, B, N) comes from repositories with
    length-first tensors; it is not accepted for plain tensors.
    """

    def fits(dim: Dim, axis: str, size: int) -> bool:
        return size_of(dim) in (1, size) and axis_of(dim) in (SAME, axis)

    if not 2 <= len(layout) <= 4:
        return None
    *leading, before_last, last = layout
    is_rows = fits(before_last, "m", M) and fits(last, "n", N)
    if not leading:
        return "mn" if is_rows else None
    if len(leading) == 2:
        batch, heads = leading
        return "bhmn" if is_rows and fits(batch, "b", B) and fits(heads, "h", H) else None
    (first,) = leading
    if is_rows and fits(first, "b", B):
        return "bmn"
    queries_first = axis_of(first) == "m" and fits(first, "m", M)
    if queries_first and fits(before_last, "b", B) and fits(last, "n", N):
        return "mbn"
    batch_and_heads = regrouped((first,), (B, H)) if is_rows and size_of(first) == B * H else None
    if batch_and_heads is None:
        return None
    batch, heads = batch_and_heads
    return "(bh)mn" if fits(batch, "b", B) and fits(heads, "h", H) else None


def as_read(tensor: Tensor, reading: str) -> Tensor:
    """Convert a gradient (B, H, M, N) of the scores to the shape of the tensor that was read."""
    if reading == "mn":
        return tensor.sum((0, 1))
    if reading == "(bh)mn":
        return tensor.flatten(0, 1)
    if reading == "bhmn":
        return tensor
    tensor = tensor.sum(1)
    return tensor.transpose(0, 1) if reading == "mbn" else tensor
