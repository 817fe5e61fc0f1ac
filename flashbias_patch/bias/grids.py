"""Define windows on grids of keys: the input of attention, and the equal dense bias and mask.

The keys are S frames, one after the other. A frame is a Grid of views x rows x columns cells; key =
first key of the frame + (view * rows + row) * columns + column. Every query has one window per
frame: a square of `side` cells around a centre (view, row, column). Cells outside the grid are
ignored, so a centre may be outside it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .checks import is_int

# The centre of a missing window: no cell of a window around this point is in a grid.
OUTSIDE = -(1 << 24)
LARGEST_SIDE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Grid:
    """A frame of keys: `views` grids of `rows` x `columns` cells, row by row and view by view.

    Raises:
        TypeError, ValueError: a size is not an int in 1 .. LARGEST_SIDE.
    """

    rows: int
    columns: int
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "views"):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(
                    f"Grid.{name}: expected an int, got {value!r} ({type(value).__name__})"
                )
            if not 1 <= value <= LARGEST_SIDE:
                raise ValueError(f"Grid.{name}: expected 1 .. {LARGEST_SIDE}, got {value}")
            object.__setattr__(self, name, int(value))

    @property
    def size(self) -> int:
        """Number of keys."""
        return self.rows * self.columns * self.views


class WindowParts(NamedTuple):
    """A bias of windows, as attention backends receive it: weight * profile inside, 0 outside.

    weights (B|1, M, H|1, S) floating; centres (B|1, M, S, 3) int32: view, row, column (OUTSIDE for
    a missing window); frames, sides and sigmas have S entries. sigmas is None
    for boxes (profile 1); an infinite sigma is a box too.
    """

    weights: Tensor
    centres: Tensor
    frames: Tuple[Grid, ...]
    sides: Tuple[int, ...]
    sigmas: Optional[Tuple[float, ...]] = None

    @property
    def place(self) -> Tuple[object, ...]:
        """Frames, sides and sigmas. If these and the centres are equal, weights can be added."""
        return self.frames, self.sides, self.sigmas


class WindowMaskParts(NamedTuple):
    """A mask of windows: the keys outside all windows of a query are masked out.

    Fields as in WindowParts.
    """

    centres: Tensor
    frames: Tuple[Grid, ...]
    sides: Tuple[int, ...]

    @property
    def place(self) -> Tuple[object, ...]:
        """Frames and sides. If these and the centres are equal, two masks are the same."""
        return self.frames, self.sides


def key_count(frames: Sequence[Grid]) -> int:
    """Return the number of keys of all frames."""
    return sum(frame.size for frame in frames)


def reach(side: int) -> Tuple[int, int]:
    """Return the (first, last) offset of a window: -h .. h for side 2h + 1, -h + 1 .. h for 2h."""
    return side // 2 - side + 1, side // 2


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors are one object or equal views of one memory; reads no entries."""
    if first is second:
        return True
    if (
        first.shape != second.shape
        or first.stride() != second.stride()
        or first.device != second.device
    ):
        return False
    try:
        return first.data_ptr() == second.data_ptr() and first._version == second._version
    except RuntimeError:  # no storage: traced, functorch
        return False


def dense_bias(parts: WindowParts) -> Tensor:
    """Return the bias (B|1, H|1, M, N) in the dtype of the weights; differentiable in the
    weights."""
    weights, centres, frames, sides, sigmas = parts
    compute_dtype = torch.promote_types(weights.dtype, torch.float32)
    values = []
    for index, (inside, frame) in enumerate(zip(_inside(centres, frames, sides), frames)):
        value = weights[..., index].to(compute_dtype).transpose(1, 2)[..., None]  # (B|1, H|1, M, 1)
        if sigmas is not None and math.isfinite(sigmas[index]):
            value = (
                value
                * _gaussian(
                    centres[..., index, :], frame, sides[index], sigmas[index], compute_dtype
                )[:, None]
            )
        values.append(torch.where(inside[:, None], value, value.new_zeros(())).to(weights.dtype))
    return values[0] if len(values) == 1 else torch.cat(values, -1)


def profiles(parts: WindowParts) -> Iterator[Tensor]:
    """The derivative of each frame's bias by its weight, (B|1, M, keys of the frame): bool for a
    box, else floating, at least float32."""
    weights, centres, frames, sides, sigmas = parts
    wide = torch.promote_types(weights.dtype, torch.float32)
    for place, (inside, frame) in enumerate(zip(_inside(centres, frames, sides), frames)):
        if sigmas is not None and math.isfinite(sigmas[place]):
            cells = _gaussian(centres[..., place, :], frame, sides[place], sigmas[place], wide)
            yield cells.masked_fill(~inside, 0.0)
        else:
            yield inside


def hidden(parts: WindowMaskParts) -> Tensor:
    """Return the mask (B|1, 1, M, N), True = masked out."""
    return ~torch.cat(list(_inside(*parts)), -1)[:, None]


def added(
    first: Optional[WindowParts], second: WindowParts
) -> Tuple[WindowParts, Optional[Tensor]]:
    """Add two biases; return the sum, or the first one and the second as a dense bias."""
    if first is None:
        return second, None
    if first.place == second.place and same_tensor(first.centres, second.centres):
        return first._replace(weights=first.weights + second.weights), None
    return first, dense_bias(second)


def both(
    first: Optional[WindowMaskParts], second: WindowMaskParts
) -> Tuple[WindowMaskParts, Optional[Tensor]]:
    """Combine two masks; return one mask, or the first one and the second as a boolean mask."""
    if first is None:
        return second, None
    same = first.place == second.place and same_tensor(first.centres, second.centres)
    return first, None if same else hidden(second)


def _inside(centres: Tensor, frames: Sequence[Grid], sides: Sequence[int]) -> Iterator[Tensor]:
    """Yield for each frame a bool tensor (B|1, M, keys of the frame), True inside the window."""
    for index, (frame, side) in enumerate(zip(frames, sides)):
        view, row, column = centres[..., index, :, None].unbind(-2)  # (B|1, M, 1) each
        views = torch.arange(frame.views, device=centres.device) == view
        square = (
            _within(row, frame.rows, side)[..., :, None]
            & _within(column, frame.columns, side)[..., None, :]
        )
        yield (views[..., None, None] & square[..., None, :, :]).flatten(-3)


def _within(centre: Tensor, length: int, side: int) -> Tensor:
    """Return (B|1, M, length): True for rows (or columns) inside a window around centre (B|1, M,
    1)."""
    first, last = reach(side)
    offset = torch.arange(length, device=centre.device) - centre
    return (offset >= first) & (offset <= last)


def _gaussian(centre: Tensor, frame: Grid, side: int, sigma: float, dtype: torch.dtype) -> Tensor:
    """Return exp(-(dy^2 + dx^2) / (2 sigma^2)), (B|1, M, keys of the frame), for centres
    (B|1, M, 3)."""
    _, row, column = centre[..., None].unbind(-2)

    def squared(middle: Tensor, length: int) -> Tensor:
        # The clamp does not change distances inside the window; it keeps squares in the range of
        # the dtype.
        offset = (torch.arange(length, device=centre.device) - middle).clamp(-side, side).to(dtype)
        return offset * offset

    squares = squared(row, frame.rows)[..., :, None] + squared(column, frame.columns)[..., None, :]
    cells = torch.exp(squares / (-2.0 * sigma * sigma))
    shape = (*cells.shape[:-2], frame.views, *cells.shape[-2:])
    return cells[..., None, :, :].expand(shape).flatten(-3)
