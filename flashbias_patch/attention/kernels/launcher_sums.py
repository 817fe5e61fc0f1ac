"""Gradients of what is shared: parts that programs wrote, and their sum."""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from . import problem as pb
from .cached_launch import Launch
from .problem import cdiv
from .sums import sum_kernel

ROWS = 32  # of a program
AT_ONCE = 3  # sums that sum_kernel does
DENSE = 6  # the place of dense's gradient, whose parts have another layout


class Sum:
    """Parts (splits, ...) summed over the splits and over every dimension in which `shape` is 1
    (was broadcast)."""

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
    """A backward pass' gradients, by place, from the parts that its kernels wrote: three sums a
    launch."""

    def __init__(self, sums: Dict[int, Sum]) -> None:
        self.sums = sums
        self.plain = [place for place, total in sums.items() if total.whole or place == DENSE]
        rest = [place for place in sums if place not in self.plain]
        self.launches = [_launch(sums, rest[i : i + AT_ONCE]) for i in range(0, len(rest), AT_ONCE)]

    def __call__(self, made: Dict[int, Tensor]) -> Dict[int, Tensor]:
        done = {place: self.sums[place].plain(made[place]) for place in self.plain}
        for places, launch in self.launches:
            pairs: List[Tensor] = []
            for place in places:
                total, parts = self.sums[place], made[place]
                done[place] = pb.empty(total.shape, dtype=total.dtype, device=parts.device)
                pairs += [parts, done[place]]
            launch(*pairs, *pairs[:2] * (AT_ONCE - len(places)))
        return done

    def at(self, made: Dict[int, Tensor], stream: int) -> Dict[int, Tensor]:
        """The same on that stream, once its launches are compiled."""
        done = {}
        for place in self.plain:
            total = self.sums[place]
            done[place] = made[place] if total.whole else total.plain(made[place])
        for places, launch in self.launches:
            pairs: List[int] = []
            for place in places:
                total, parts = self.sums[place], made[place]
                done[place] = torch.empty(total.shape, dtype=total.dtype, device=parts.device)
                pairs += [parts.data_ptr(), done[place].data_ptr()]
            launch.at(stream, *pairs, *pairs[:2] * (AT_ONCE - len(places)))
        return done


def _launch(sums: Dict[int, Sum], places: List[int]) -> Tuple[List[int], Launch]:
    numbers: List[int] = []
    options: Dict[str, int] = {"ROWS": ROWS}
    first = [0]
    for i in range(AT_ONCE):
        programs, own, constants = _layout(sums[places[i]]) if i < len(places) else NONE
        first.append(first[-1] + programs)
        numbers += own
        options.update({f"{name}{i}": value for name, value in zip(CONSTANTS, constants)})
    return places, Launch(sum_kernel, first[-1], (first[1], first[2], *numbers), options)


CONSTANTS = ("HEADS", "SUM_H", "COLUMNS", "BLOCK")  # of sum_kernel, one each a sum
NONE = 0, (0, 0, 0, 1, 0), (1, 1, 1, 1)


def _layout(total: Sum) -> Tuple[int, Tuple[int, ...], Tuple[int, ...]]:
    """Programs; count, stride, batch stride, length and rows; the constants: see sum_kernel."""
    splits, batch, length, heads, columns = total.parts
    out_batch, _, out_heads, _ = total.shape
    one = length * heads * columns
    shared = out_batch == 1
    numbers = (
        splits * batch if shared else splits, one if shared else batch * one, 0 if shared else one,
        length,
        out_batch * length * out_heads,
    )  # fmt: skip
    constants = (out_heads, heads // out_heads, columns, 1 << (columns - 1).bit_length())
    return cdiv(numbers[-1], ROWS), numbers, constants
