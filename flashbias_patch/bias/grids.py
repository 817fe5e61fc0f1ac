"""Windows on grids of keys: the form in which attention receives them, and what they mean entry by
entry.

The keys are S frames, one after the other: a frame is a Grid of views x rows x columns cells, key =
first key of the frame + (view * rows + row) * columns + column. Every query has one window a frame:
a square of `side` cells around a centre (view, row, column). Cells outside the grid do not count,
so a centre may lie outside it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

# The centre of a window that is not there: no cell of a window around this place lies in a grid.
OUTSIDE = -(1 << 24)
LARGEST_SIDE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Grid:
    """A frame of keys: `views` grids of `rows` x `columns` cells, row by row and view by view."""

    rows: int
    columns: int
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "views"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"Grid.{name}: expected an int, got {value!r} ({type(value).__name__})"
                )
            if not 1 <= value <= LARGEST_SIDE:
                raise ValueError(f"Grid.{name}: expected 1 .. {LARGEST_SIDE}, got {value}")

    @property
    def size(self) -> int:
        """Number of keys."""
        return self.rows * self.columns * self.views


class WindowParts(NamedTuple):
    """A bias for attention to consume: weight * profile inside the window of each frame, 0 outside.

    weights (B|1, M, H|1, S) floating; centres (B|1, M, S, 3) int32: view, row, column, a window
    that is not there has them at OUTSIDE; frames, sides and sigmas have S entries. sigmas is None
    for boxes (profile 1), an infinite sigma is a box too.
    """

    weights: Tensor
    centres: Tensor
    frames: Tuple[Grid, ...]
    sides: Tuple[int, ...]
    sigmas: Optional[Tuple[float, ...]] = None

    @property
    def place(self) -> Tuple[object, ...]:
        """What must be equal (centres by `same_tensor`) for weights to be added."""
        return self.frames, self.sides, self.sigmas


class WindowMaskParts(NamedTuple):
    """A mask for attention to consume: the keys outside all windows of a query are hidden. Fields
    as in WindowParts."""

    centres: Tensor
    frames: Tuple[Grid, ...]
    sides: Tuple[int, ...]

    @property
    def place(self) -> Tuple[object, ...]:
        """What must be equal (centres by `same_tensor`) for two masks to be one."""
        return self.frames, self.sides


def key_count(frames: Sequence[Grid]) -> int:
    return sum(frame.size for frame in frames)


def reach(side: int) -> Tuple[int, int]:
    """(first, last) offset of a window of that side: odd 2h + 1: -h .. h, even 2h: -h + 1 .. h."""
    return side // 2 - side + 1, side // 2


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, or views of the same numbers, without looking at the numbers."""
    if one is other:
        return True
    if one.shape != other.shape or one.stride() != other.stride() or one.device != other.device:
        return False
    try:
        return one.data_ptr() == other.data_ptr() and one._version == other._version
    except RuntimeError:  # no storage: traced, functorch
        return False


def dense_bias(parts: WindowParts) -> Tensor:
    """The bias (B|1, H|1, M, N) in the dtype of the weights, differentiable in them."""
    weights, centres, frames, sides, sigmas = parts
    wide = torch.promote_types(weights.dtype, torch.float32)
    found = []
    for place, (inside, frame) in enumerate(zip(_inside(centres, frames, sides), frames)):
        value = weights[..., place].to(wide).transpose(1, 2)[..., None]  # (B|1, H|1, M, 1)
        if sigmas is not None and math.isfinite(sigmas[place]):
            value = (
                value
                * _gaussian(centres[..., place, :], frame, sides[place], sigmas[place], wide)[
                    :, None
                ]
            )
        found.append(torch.where(inside[:, None], value, value.new_zeros(())).to(weights.dtype))
    return found[0] if len(found) == 1 else torch.cat(found, -1)


def hidden(parts: WindowMaskParts) -> Tensor:
    """The mask (B|1, 1, M, N), True = masked out."""
    return ~torch.cat(list(_inside(*parts)), -1)[:, None]


def added(one: Optional[WindowParts], other: WindowParts) -> Tuple[WindowParts, Optional[Tensor]]:
    """The sum of two as (one, and what does not fit into it as a dense bias)."""
    if one is None:
        return other, None
    if one.place == other.place and same_tensor(one.centres, other.centres):
        return one._replace(weights=one.weights + other.weights), None
    return one, dense_bias(other)


def both(
    one: Optional[WindowMaskParts], other: WindowMaskParts
) -> Tuple[WindowMaskParts, Optional[Tensor]]:
    """What two masks hide, as (one, and what does not fit into it as a boolean mask)."""
    if one is None:
        return other, None
    same = one.place == other.place and same_tensor(one.centres, other.centres)
    return one, None if same else hidden(other)


def _inside(centres: Tensor, frames: Sequence[Grid], sides: Sequence[int]) -> Iterator[Tensor]:
    """A frame at a time: whether a key lies in its window, (B|1, M, keys of the frame)."""
    for place, (frame, side) in enumerate(zip(frames, sides)):
        view, row, column = centres[..., place, :, None].unbind(-2)  # (B|1, M, 1) each
        views = torch.arange(frame.views, device=centres.device) == view
        square = (
            _within(row, frame.rows, side)[..., :, None]
            & _within(column, frame.columns, side)[..., None, :]
        )
        yield (views[..., None, None] & square[..., None, :, :]).flatten(-3)


def _within(centre: Tensor, length: int, side: int) -> Tensor:
    """(B|1, M, 1) -> (B|1, M, length): whether a row or column is within reach of the centre."""
    first, last = reach(side)
    offset = torch.arange(length, device=centre.device) - centre
    return (offset >= first) & (offset <= last)


def _gaussian(centre: Tensor, frame: Grid, side: int, sigma: float, dtype: torch.dtype) -> Tensor:
    """exp(-(dy^2 + dx^2) / (2 sigma^2)) around each centre (B|1, M, 3): (B|1, M, keys of the
    frame)."""
    _, row, column = centre[..., None].unbind(-2)

    def squared(middle: Tensor, length: int) -> Tensor:
        # The clamp leaves distances inside the window as they are, and squares within the range of
        # the dtype.
        offset = (torch.arange(length, device=centre.device) - middle).clamp(-side, side).to(dtype)
        return offset * offset

    squares = squared(row, frame.rows)[..., :, None] + squared(column, frame.columns)[..., None, :]
    cells = torch.exp(squares / (-2.0 * sigma * sigma))
    shape = (*cells.shape[:-2], frame.views, *cells.shape[-2:])
    return cells[..., None, :, :].expand(shape).flatten(-3)
