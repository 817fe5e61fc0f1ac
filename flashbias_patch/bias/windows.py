"""Local windows on grids: a bias with one weight per window, and a mask of all keys outside.

Both keep their description (grids.py) in sums and products and in attention. Only `dense()` creates
a tensor of size M x N.
"""

from __future__ import annotations

import copy
import math
from typing import Callable, Iterable, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .base import AttentionBias, BiasParts, Shape
from .checks import check_device, check_floating, head_last, is_int, is_number
from .grids import (
    LARGEST_SIDE,
    OUTSIDE,
    Grid,
    WindowMaskParts,
    WindowParts,
    dense_bias,
    hidden,
    key_count,
    same_tensor,
)

__all__ = ["Grid", "WindowBias", "WindowMask", "WindowMaskParts", "WindowParts"]

Sides = Union[int, Sequence[int]]
Sigmas = Union[float, Sequence[float]]


class _Windows(AttentionBias):
    """Base class of WindowBias and WindowMask: one window per query and frame.

    `centres` is int32 (B|1, M, S, 3); windows that are not visible have grids.OUTSIDE.
    """

    centres: Tensor
    frames: Tuple[Grid, ...]
    sides: Tuple[int, ...]

    def _set_windows(
        self, centres: Tensor, frames: Sequence[Grid], side: Sides, visible: Optional[Tensor]
    ) -> None:
        self.frames = check_frames(frames)
        self.sides = check_sides(side, len(self.frames))
        self.centres = check_centres(centres, len(self.frames), visible)

    @property
    def rank(self) -> None:
        return None

    def _joins(self, other: AttentionBias) -> bool:
        """Return True if `other` is of this class and has the same windows."""
        return (
            type(other) is type(self)
            and self._static() == other._static()
            and same_tensor(self.centres, other.centres)
        )

    def _static(self) -> Tuple[object, ...]:
        return self.frames, self.sides

    def _map(self, function: Callable[[Tensor], Tensor]) -> AttentionBias:
        other = copy.copy(self)
        for name in self._fields:
            setattr(other, name, function(getattr(self, name)))
        return other


class WindowBias(_Windows):
    """bias[b, h, m, n] = weights[b, m, h, s] * profile if key n is in the window of query m in
    frame s, else 0.

    Args:
        weights: (B|1, M, S) or (B|1, M, H|1, S), floating; learned if it requires grad.
        centres: (B|1, M, S, 3), integers or whole floating numbers: view, row, column of each
            window's centre. Windows are clipped at the grid, and a centre may be outside it.
        frames: S Grids in the order of the keys; their sizes sum to N.
        side: length of a window's edge in cells, an int or one per frame. Odd 2h + 1: offsets
            -h .. h around the centre; even 2h: -h + 1 .. h.
        sigma: None for a profile of 1, or the width in cells of exp(-(dy^2 + dx^2) / (2 sigma^2)),
            a float or one per frame; infinite means a profile of 1.
        visible: (B|1, M, S) bool, False where a query has no window in that frame; None: all True.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    _fields = ("weights", "centres")

    def __init__(
        self,
        weights: Tensor,
        centres: Tensor,
        frames: Sequence[Grid],
        side: Sides,
        sigma: Optional[Sigmas] = None,
        visible: Optional[Tensor] = None,
    ) -> None:
        check_floating("weights", weights)
        self._set_windows(centres, frames, side, visible)
        self.sigmas = check_sigmas(sigma, len(self.frames))
        queries = self.centres.shape[1]
        weights = weights.unsqueeze(2) if weights.dim() == 3 else weights
        batch = self.centres.shape[0]
        fits = (
            weights.dim() == 4
            and weights.shape[1] == queries
            and weights.shape[3] == len(self.frames)
        )
        if not (fits and broadcasts(weights.shape[0], batch)):
            raise ValueError(
                f"weights: expected (B|1, M, S) or (B|1, M, H|1, S) with B = {batch}, M = "
                f"{queries} and S = "
                f"{len(self.frames)} to fit centres {tuple(self.centres.shape)}, got "
                f"{tuple(weights.shape)}"
            )
        check_device("weights", weights, "centres", self.centres)
        self.weights = weights

    @property
    def shape(self) -> Shape:
        batch, queries, heads, _ = self.weights.shape
        return (
            (self.centres.shape[0] if batch == 1 else batch),
            heads,
            queries,
            key_count(self.frames),
        )

    def _static(self) -> Tuple[object, ...]:
        return self.frames, self.sides, self.sigmas

    def windows(self) -> WindowParts:
        """Return the weights, centres and grids, as attention backends receive them."""
        return WindowParts(self.weights, self.centres, self.frames, self.sides, self.sigmas)

    def parts(self) -> BiasParts:
        return BiasParts(windows=self.windows())

    def dense(self) -> Tensor:
        return dense_bias(self.windows())

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return self._weighted(self.weights * head_last(factor, 1))

    def _weighted(self, weights: Tensor) -> WindowBias:
        """Return a bias with the same windows and other weights (B|1, M, H|1, S)."""
        other = copy.copy(self)
        other.weights = weights
        return other

    def _merged(self, other: AttentionBias) -> Optional[AttentionBias]:
        if not self._joins(other):
            return None
        return self._weighted(self.weights + other.weights)  # type: ignore[attr-defined]


class WindowMask(_Windows):
    """A mask of all keys that are in no window of the query.

    A query without a visible window sees no key. Arguments and errors as in WindowBias.
    Multiplication does not change it, as with MaskBias.
    """

    _fields = ("centres",)

    def __init__(
        self, centres: Tensor, frames: Sequence[Grid], side: Sides, visible: Optional[Tensor] = None
    ) -> None:
        self._set_windows(centres, frames, side, visible)

    @property
    def shape(self) -> Shape:
        batch, queries = self.centres.shape[:2]
        return batch, 1, queries, key_count(self.frames)

    def windows(self) -> WindowMaskParts:
        """Return the centres and grids, as attention backends receive them."""
        return WindowMaskParts(self.centres, self.frames, self.sides)

    def parts(self) -> BiasParts:
        return BiasParts(window_mask=self.windows())

    def dense(self) -> Tensor:
        mask = hidden(self.windows())
        return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf)

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return self

    def _merged(self, other: AttentionBias) -> Optional[AttentionBias]:
        return self if self._joins(other) else None


def check_frames(frames: Sequence[Grid]) -> Tuple[Grid, ...]:
    """Return the frames as a tuple; raise TypeError unless all are Grids, at least one."""
    frames = (frames,) if isinstance(frames, Grid) else tuple(frames)
    if not frames or not all(isinstance(frame, Grid) for frame in frames):
        raise TypeError(
            f"frames: expected one Grid or more, in the order of the keys, got {frames!r}"
        )
    return frames


def check_sides(side: Sides, count: int) -> Tuple[int, ...]:
    """Return one side per frame, else raise TypeError or ValueError."""
    sides = tuple(side) if isinstance(side, Iterable) else (side,) * count
    if len(sides) != count:
        raise ValueError(
            f"side: expected an int or one for each of the {count} frames, got {side!r}"
        )
    for cells in sides:
        if not is_int(cells):
            raise TypeError(f"side: expected an int, got {cells!r} ({type(cells).__name__})")
        if not 1 <= cells <= LARGEST_SIDE:
            raise ValueError(f"side: expected 1 .. {LARGEST_SIDE} cells, got {cells}")
    return tuple(map(int, sides))


def check_sigmas(sigma: Optional[Sigmas], count: int) -> Optional[Tuple[float, ...]]:
    """Return one sigma per frame, None if all are infinite, else raise TypeError or ValueError."""
    if sigma is None:
        return None
    sigmas = tuple(sigma) if isinstance(sigma, Iterable) else (sigma,) * count
    if len(sigmas) != count:
        raise ValueError(
            f"sigma: expected a float or one for each of the {count} frames, got {sigma!r}"
        )
    for width in sigmas:
        if not is_number(width):
            raise TypeError(f"sigma: expected a float, got {width!r} ({type(width).__name__})")
        if not width > 0:
            raise ValueError(f"sigma: expected a positive width in cells, got {width}")
    return (
        None
        if all(math.isinf(width) for width in sigmas)
        else tuple(float(width) for width in sigmas)
    )


def check_centres(centres: Tensor, count: int, visible: Optional[Tensor]) -> Tensor:
    """Return `centres` as int32 (B|1, M, S, 3), OUTSIDE where not `visible`. Not differentiable."""
    if not isinstance(centres, Tensor) or centres.dtype is torch.bool or centres.dtype.is_complex:
        got = centres.dtype if isinstance(centres, Tensor) else type(centres).__name__
        raise TypeError(
            f"centres: expected a tensor of integers or whole floating numbers, got {got}"
        )
    if centres.dim() != 4 or centres.shape[2:] != (count, 3):
        raise ValueError(
            f"centres: expected (B|1, M, S, 3) with S = {count} frames and (view, row, column) "
            "last, "
            f"got {tuple(centres.shape)}"
        )
    centres = centres.detach()
    if centres.is_floating_point():
        centres = centres.float().nan_to_num(OUTSIDE)
    if centres.dtype is not torch.int32:
        small = centres.dtype in (torch.uint8, torch.int8, torch.int16)
        centres = centres.int() if small else centres.clamp(OUTSIDE, -OUTSIDE).int()
    if visible is not None:
        _check_visible(visible, centres)
        centres = torch.where(visible[..., None], centres, centres.new_full((), OUTSIDE))
    return centres


def _check_visible(visible: Tensor, centres: Tensor) -> None:
    if not isinstance(visible, Tensor) or visible.dtype is not torch.bool:
        got = getattr(visible, "dtype", type(visible).__name__)
        raise TypeError(f"visible: expected a bool tensor, got {got}")
    batch, queries, count, _ = centres.shape
    fits = visible.dim() == 3 and visible.shape[1:] == (queries, count)
    if not (fits and broadcasts(visible.shape[0], batch)):
        raise ValueError(
            f"visible: expected (B|1, M, S) = ({batch}|1, {queries}, {count}), got "
            f"{tuple(visible.shape)}"
        )
    check_device("visible", visible, "centres", centres)


def broadcasts(size: int, other_size: int) -> bool:
    return size == other_size or 1 in (size, other_size)
