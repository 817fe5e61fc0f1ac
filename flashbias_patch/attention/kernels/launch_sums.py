"""Gradients of what is shared: parts that programs wrote, and their sum."""
from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import problem as pb
from .problem import cdiv
from .settled import Launch
from .sums import sum_kernel

ROWS = 32  # of a program
AT_ONCE = 3  # sums that sum_kernel does


class Sum:
    """Parts (splits, ...) summed over the splits and over every dimension in which `shape` is 1 (was broadcast)."""

    def __init__(self, parts: Sequence[int], shape: Sequence[int], dtype: torch.dtype, zeros: bool = False,
                 kept: torch.dtype = torch.float32) -> None:  # fmt: skip
        self.parts, self.shape, self.dtype, self.kept = tuple(parts), tuple(shape), dtype, kept
        self.zeros = zeros  # the parts are added to
        self.whole = kept == dtype and self.parts == (1, *shape)  # nothing to sum
        if self.whole:
            self.parts = self.shape

    def make(self, like: Tensor) -> Tensor:
        make = torch.zeros if self.zeros else pb.empty
        return make(self.parts, dtype=self.kept, device=like.device)

    def plain(self, parts: Tensor) -> Tensor:
        """The sum by PyTorch."""
        if self.whole:
            return parts
        axes = [axis for axis, size in enumerate((1, *self.shape)) if size == 1 and self.parts[axis] != 1]
        return (parts.sum(axes) if axes else parts).view(self.shape).to(self.dtype)


class Sums:
    """Up to three sums over (splits, batch, length, heads, columns) in one launch; None where there is none."""

    def __init__(self, *sums: Optional[Sum]) -> None:
        self.sums = sums
        self.todo = [place for place, total in enumerate(sums) if total is not None and not total.whole]
        self.launch: Optional[Launch] = None
        if not self.todo:
            return
        numbers: List[int] = []
        options: Dict[str, int] = {"ROWS": ROWS}
        first = [0]
        for place in range(AT_ONCE):
            total = sums[self.todo[place]] if place < len(self.todo) else None
            programs, own, constants = (0, (0, 0, 0, 1, 0), (1, 1, 1, 1)) if total is None else _layout(total)
            first.append(first[-1] + programs)
            numbers += own
            options.update({f"{name}{place}": value for name, value in zip(CONSTANTS, constants)})
        self.launch = Launch(sum_kernel, first[-1], (first[1], first[2], *numbers), options)

    def make(self, like: Tensor) -> List[Optional[Tensor]]:
        return [None if total is None else total.make(like) for total in self.sums]

    def __call__(self, made: Sequence[Optional[Tensor]]) -> List[Optional[Tensor]]:
        if self.launch is None:
            return list(made)
        done = list(made)
        pairs: List[Any] = []
        for place in self.todo:
            total, parts = self.sums[place], made[place]
            assert total is not None and parts is not None
            done[place] = pb.empty(total.shape, dtype=total.dtype, device=parts.device)
            pairs += [parts, done[place]]
        pairs += pairs[:2] * (AT_ONCE - len(self.todo))
        self.launch(*pairs)
        return done


CONSTANTS = ("HEADS", "SUM_H", "COLUMNS", "BLOCK")  # of sum_kernel, one each a sum


def _layout(total: Sum) -> Tuple[int, Tuple[int, ...], Tuple[int, ...]]:
    """Programs; count, stride, batch stride, length and rows; the constants: see sum_kernel."""
    splits, batch, length, heads, columns = total.parts
    out_batch, _, out_heads, _ = total.shape
    one = length * heads * columns
    shared = out_batch == 1
    numbers = (
        splits * batch if shared else splits, one if shared else batch * one, 0 if shared else one, length,
        out_batch * length * out_heads,
    )  # fmt: skip
    constants = (out_heads, heads // out_heads, columns, 1 << (columns - 1).bit_length())
    return cdiv(numbers[-1], ROWS), numbers, constants
