"""Grids of keys (bias/grids.py) in patches of 8 x 8 cells, which are the tiles of keys in the
kernels with windows.

A patch is one word of 64 bits, from the lowest: its first key (28), rows at its beginning that the
patch above has too (3), whether a window touches it (1), row (16) and column (12) of its first
cell, columns at its beginning that the patch to the left has too (4; PADDING: no patch). At a
grid's edge a patch begins earlier than its place, so that it ends with the grid. Rows of view v are
counted from v * spacing + EDGE, columns from EDGE: in a grid of fewer than 8 rows or columns a
patch begins before the grid, and its keys there are the grid's first.
"""

from __future__ import annotations

import functools
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ...bias.grids import Grid, key_count

EDGE = 8
SIZE = EDGE * EDGE
PADDING = 8  # as in window_common.py
SIDE, MASK_SIDE = 5, 6  # columns of FRAMES
KEYS, ROWS, COLUMNS = 1 << 28, (1 << 16) - EDGE, (1 << 12) - EDGE
LOG2E = 1.4426950408889634


def why_not(frames: Sequence[Grid], sides: Sequence[int]) -> Optional[str]:
    """The reason why these grids do not fit into the words of patches; None if they do."""
    if key_count(frames) > KEYS:
        return f"grids of windows: they have more than {KEYS} keys"
    for frame, side in zip(frames, sides):
        if frame.columns > COLUMNS or frame.views * (frame.rows + side) > ROWS:
            return (
                f"grids of windows: {frame.views} x {frame.rows} x {frame.columns} cells and "
                f"side {side} are more than "
                f"{COLUMNS} columns, or {ROWS} rows and sides of all views"
            )
    return None


def _cuts(length: int) -> List[Tuple[int, int]]:
    """(first, how many of the patch before) of the patches along an edge."""
    last = length - EDGE
    return [(min(first, last), first - min(first, last)) for first in range(0, length, EDGE)]


class FrameTables(NamedTuple):
    """The kernels' tables of a call's frames, which depend on sizes alone.

    A row of FRAMES: first patch, patches (an even number), columns, rows, segment, side of the bias
    (SIDE) and of the mask (MASK_SIDE), spacing, views.
    """

    words: Tensor  # PATCHES (P,) int64
    owners: Tensor  # OWNERS (P,) int32: the frame of each patch
    frames: Tensor  # FRAMES (F, 9) int32
    widths: Tensor  # WIDTHS (F,) float32: -log2(e) / (2 sigma^2)


@functools.lru_cache(maxsize=64)
def tables(
    frames: Tuple[Grid, ...], sides: Tuple[int, ...], mask_sides: Tuple[int, ...],
    sigmas: Optional[Tuple[float, ...]],
    lengths: Tuple[int, ...], device: torch.device,
) -> FrameTables:  # fmt: skip
    """The tables of these frames. `lengths` of segments, whose ends are ends of frames; () for
    none."""
    words: List[int] = []
    owners: List[int] = []
    rows: List[Tuple[int, ...]] = []
    first_key = 0
    for place, frame in enumerate(frames):
        first, spacing = len(words), frame.rows + max(sides[place], mask_sides[place])
        for view in range(frame.views):
            for row, above in _cuts(frame.rows):
                for column, left in _cuts(frame.columns):
                    key = (
                        first_key
                        + (view * frame.rows + max(row, 0)) * frame.columns
                        + max(column, 0)
                    )
                    words.append(
                        _word(key, above, view * spacing + row + EDGE, column + EDGE, left)
                    )
        if len(words) % 2:
            words.append(_word(first_key, 0, 0, 0, PADDING))
        owners += [place] * (len(words) - first)
        segment = _segment(lengths, first_key)
        rows.append(
            (first, len(words) - first, frame.columns, frame.rows, segment, sides[place],
             mask_sides[place], spacing,
             frame.views)
        )  # fmt: skip
        first_key += frame.size
    widths = [
        0.0 if math.isinf(sigma) else -LOG2E / (2 * sigma * sigma) for sigma in sigmas or ()
    ] or [0.0] * len(frames)
    with torch.inference_mode(False):
        return FrameTables(
            words=torch.tensor(words, dtype=torch.int64).to(device),
            owners=torch.tensor(owners, dtype=torch.int32).to(device),
            frames=torch.tensor(rows, dtype=torch.int32).to(device),
            widths=torch.tensor(widths, dtype=torch.float32).to(device),
        )


def _word(key: int, above: int, row: int, column: int, left: int) -> int:
    word = key | above << 28 | row << 32 | column << 48 | left << 60
    return word - (1 << 64) if word >> 63 else word


def _segment(lengths: Sequence[int], key: int) -> int:
    for place, length in enumerate(lengths):
        if key < length:
            return place
        key -= length
    return 0


def aligned(lengths: Sequence[int], frames: Sequence[Grid]) -> bool:
    """True if every frame lies in one segment."""
    ends, end = {0}, 0
    for frame in frames:
        end += frame.size
        ends.add(end)
    end = 0
    for length in lengths:
        end += length
        if end not in ends:
            return False
    return True


def counted_keys(frames: Sequence[Grid], device: torch.device) -> Tensor:
    """(N,) keys as dropout counts them: 64 times the number of the patch, and the place in it."""
    found, first = [], 0
    for frame in frames:
        (row_patch, row_place), (column_patch, column_place) = (
            _counted(n, device) for n in (frame.rows, frame.columns)
        )
        across = len(_cuts(frame.columns))
        views = torch.arange(frame.views, device=device)[:, None, None] * (
            len(_cuts(frame.rows)) * across
        )
        patch = first + views + row_patch[:, None] * across + column_patch
        found.append((patch * SIZE + row_place[:, None] * EDGE + column_place).flatten())
        first += (frame.views * len(_cuts(frame.rows)) * across + 1) // 2 * 2
    return torch.cat(found)


def _counted(length: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """The patch along an edge of each cell, and the place in it."""
    cell = torch.arange(length, device=device)
    patch = cell // EDGE
    return patch, cell - (patch * EDGE).clamp(max=length - EDGE)
