"""Gradients of operands that programs share: the parts that the programs wrote, and their sum."""

from __future__ import annotations

import itertools
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from . import problem as pb
from .cached_launch import Launch
from .problem import cdiv
from .sums import sum_kernel

ROWS = 32  # rows per program
AT_ONCE = 3  # sums per launch of sum_kernel
DENSE = "dense"  # the gradient whose parts have another layout


class Sum:
    """Parts (splits, ...), summed over the splits and over every dimension that `shape` broadcasts
    (size 1)."""

    def __init__(self, parts: Sequence[int], shape: Sequence[int], dtype: torch.dtype,
                 zeros: bool = False,
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
        axes = [
            axis
            for axis, size in enumerate((1, *self.shape))
            if size == 1 and self.parts[axis] != 1
        ]
        return (parts.sum(axes) if axes else parts).view(self.shape).to(self.dtype)


class Sums:
    """The gradients of a backward pass, by their name in Needs, from the parts that its kernels
    wrote: three sums per launch."""

    def __init__(self, sums: Dict[str, Sum]) -> None:
        self.sums = sums
        self.plain = [name for name, total in sums.items() if total.whole or name == DENSE]
        rest = [name for name in sums if name not in self.plain]
        self.launches = [_launch(sums, rest[i : i + AT_ONCE]) for i in range(0, len(rest), AT_ONCE)]

    def __call__(self, made: Dict[str, Tensor]) -> Dict[str, Tensor]:
        done = {name: self.sums[name].plain(made[name]) for name in self.plain}
        for names, launch in self.launches:
            pairs: List[Tensor] = []
            for name in names:
                total, parts = self.sums[name], made[name]
                done[name] = pb.empty(total.shape, dtype=total.dtype, device=parts.device)
                pairs += [parts, done[name]]
            launch(*pairs, *pairs[:2] * (AT_ONCE - len(names)))
        return done


class Layout(NamedTuple):
    """One of the sums of a launch, as sum_kernel needs it."""

    programs: int
    numbers: Tuple[int, ...]  # count, stride, batch stride, length, rows
    constants: Tuple[int, ...]  # the values of CONSTANTS


CONSTANTS = ("HEADS", "SUM_H", "COLUMNS", "BLOCK")
NONE = Layout(0, (0, 0, 0, 1, 0), (1, 1, 1, 1))  # where a launch does fewer than AT_ONCE sums


def _launch(sums: Dict[str, Sum], names: List[str]) -> Tuple[List[str], Launch]:
    layouts = [_layout(sums[name]) for name in names] + [NONE] * (AT_ONCE - len(names))
    first1, first2, programs = itertools.accumulate(layout.programs for layout in layouts)
    numbers = [number for layout in layouts for number in layout.numbers]
    options = {
        f"{name}{i}": value
        for i, layout in enumerate(layouts)
        for name, value in zip(CONSTANTS, layout.constants)
    }
    return names, Launch(sum_kernel, programs, (first1, first2, *numbers), dict(options, ROWS=ROWS))


def _layout(total: Sum) -> Layout:
    splits, batch, length, heads, columns = total.parts
    out_batch, _, out_heads, _ = total.shape
    one = length * heads * columns
    shared, rows = out_batch == 1, out_batch * length * out_heads
    numbers = (
        splits * batch if shared else splits, one if shared else batch * one, 0 if shared else one,
        length, rows,
    )  # fmt: skip
    constants = (out_heads, heads // out_heads, columns, 1 << (columns - 1).bit_length())
    return Layout(cdiv(rows, ROWS), numbers, constants)
