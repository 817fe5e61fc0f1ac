"""The forward pass of one class of calls: allocation, splitting over keys, launches."""

from __future__ import annotations

import itertools
from typing import Optional, Tuple

import torch
from torch import Tensor

from . import forward as fwd
from . import problem as pb
from .cached_launch import Launch
from .problem import BlockTable, Problem, block_columns, cdiv
from .recompute import keep_scale
from .tiles import Config

Outputs = Tuple[Tensor, Optional[Tensor], Tensor]


class Prepare:
    """q times scale, and the factors with their columns zero-padded to a power of two of at least
    16."""

    def __init__(self, q: Tensor, q_factor: Tensor, k_factor: Tensor, scale: float) -> None:
        D, R = q.shape[-1], q_factor.shape[-1]
        columns = block_columns(R)
        given = (q, q_factor, k_factor)
        self.padded = columns != R
        self.q_factor_shape, self.k_factor_shape = (
            (*t.shape[:3], columns) for t in (q_factor, k_factor)
        )
        q_rows, *factor_rows = (t.shape[0] * t.shape[1] * t.shape[2] for t in given)
        rows = q_rows, *(factor_rows if self.padded else (0, 0))
        per_program = 64
        qf_start, kf_start, programs = itertools.accumulate(cdiv(n, per_program) for n in rows)
        self.copy = Launch(
            fwd.prepare_kernel, programs,
            (
                *[n for t in given for n in pb.strides(t)],
                *[n for t in given for n in (t.shape[2], t.shape[1])],
                *rows, qf_start, kf_start, scale,
            ),
            dict(D=D, BLOCK_D=block_columns(D), R=R, BLOCK_R=columns, ROWS=per_program,
            WEIGHTS=pb.has_room(R)),
        )  # fmt: skip
        self.launches = programs > 0

    def __call__(
        self, q: Tensor, q_factor: Tensor, k_factor: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        new_q, new_qf, new_kf = (
            torch.empty(q.shape, dtype=q.dtype, device=q.device),
            q_factor,
            k_factor,
        )
        if self.padded:
            new_qf = q_factor.new_empty(self.q_factor_shape)
            new_kf = k_factor.new_empty(self.k_factor_shape)
        if self.launches:
            self.copy(q, new_q, q_factor, new_qf, k_factor, new_kf)
        return new_q, new_qf, new_kf


class Keys:
    """The blocks of keys that a loop visits; q in place of tables that the features do not use."""

    def __init__(self, problem: Problem, block: int) -> None:
        N, padding = problem.k.shape[1], problem.padding
        self.table: Optional[BlockTable] = None
        self.visible: Optional[Launch] = None
        self.count = cdiv(N, block)
        if problem.weights is None and padding is None:
            return
        self.table = pb.block_table(problem.lengths or (N,), block, problem.q.device)
        self.count = self.table.blocks.shape[0]
        if padding is not None:
            stride = padding.stride(0) if padding.shape[0] > 1 else 0
            self.visible = Launch(
                fwd.visible_kernel, padding.shape[0], (stride, self.count),
                dict(PAD_KIND=pb.pad_kind(padding), BLOCK_N=block, MANY=32),
            )  # fmt: skip

    def __call__(self, problem: Problem) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """BLOCKS and ENDS (problem.block_table); for each batch entry ORDER (B, blocks), the blocks
        with an unmasked key first, and COUNTS (B,), the number of these."""
        if self.table is None:
            return (problem.q,) * 4
        blocks, ends = self.table
        if self.visible is None or problem.padding is None:
            return blocks, ends, ends, ends
        padding = problem.padding
        numbers, at_counts = self.room(padding)
        memory = torch.empty((numbers,), dtype=torch.int32, device=padding.device)
        order = memory[: padding.shape[0] * self.count].view(padding.shape[0], self.count)
        counts = memory[at_counts:]
        self.visible(padding, blocks, order, counts)
        return blocks, ends, order, counts

    def room(self, padding: Tensor) -> Tuple[int, int]:
        """Numbers in ORDER and COUNTS together, and where COUNTS begins: at a multiple of 16 bytes,
        as an allocation does."""
        batch = padding.shape[0]
        at_counts = cdiv(batch * self.count, 4) * 4
        return at_counts + batch, at_counts


def split_over_keys(problem: Problem, config: Config, keys: Keys) -> Tuple[int, int, int]:
    """The number of parts into which a loop over keys is cut, the keys of each, and the programs of
    all."""
    B, M, N, H, _ = problem.sizes
    programs = cdiv(M, config.block_m) * B * H
    splits = (
        1
        if problem.whole
        else pb.split_count(programs, keys.count, pb.arch_of(problem.q).processors, config)
    )
    split_keys = cdiv(cdiv(N, config.block_n), splits) * config.block_n
    if problem.padding is None:
        splits = cdiv(N, split_keys)
    return splits, split_keys, programs * splits


class Outs:
    """The memory of a forward pass: out, its rounding error (half precision and `training`), its
    logsumexp, and if keys are split the parts that `combined` sums."""

    def __init__(self, problem: Problem, training: bool, splits: int) -> None:
        B, M, _, H, D = problem.sizes
        self.shape, self.rows, self.splits = (B, M, H, D), problem.lse_shape, splits
        self.dtype = problem.q.dtype if problem.out_dtype is None else problem.out_dtype
        self.has_low = training and self.dtype != torch.float32
        per_program = 16
        self.combine = Launch(
            fwd.combine_kernel, cdiv(M, per_program) * B * H, (B, H, M, splits),
            dict(HAS_LOW=self.has_low, APART=problem.apart, D=D, BLOCK_D=block_columns(D),
            BLOCK_M=per_program),
        )  # fmt: skip

    def allocate(self, problem: Problem) -> Tuple[Tensor, Optional[Tensor], Tensor, Tensor, Tensor]:
        """out, low, lse, and the tensors to which the kernel writes out and lse."""
        dtype, device = self.dtype, problem.q.device
        out = pb.empty(self.shape, dtype=dtype, device=device)
        low = pb.empty(self.shape, dtype=dtype, device=device) if self.has_low else None
        lse = pb.empty(self.rows, dtype=torch.float32, device=device)
        if self.splits == 1:
            return out, low, lse, out, lse
        parts = pb.empty((self.splits, *self.shape), dtype=torch.float32, device=device)
        return (
            out,
            low,
            lse,
            parts,
            pb.empty((self.splits, *self.rows), dtype=torch.float32, device=device),
        )

    def combined(
        self,
        problem: Problem,
        out: Tensor,
        low: Optional[Tensor],
        lse: Tensor,
        parts: Tensor,
        part_lse: Tensor,
    ) -> Outputs:
        if self.splits > 1:
            self.combine(parts, part_lse, out, problem.q if low is None else low, lse)
        return out, low, lse


class Forward(Outs):
    """The attention kernel on runs of keys."""

    def __init__(self, problem: Problem, training: bool, config: Config) -> None:
        B, M, N, H, D = problem.sizes
        self.keys = Keys(problem, config.block_n)
        splits, split_keys, programs = split_over_keys(problem, config, self.keys)
        super().__init__(problem, training, splits)
        split = splits > 1
        self.attend = Launch(
            fwd.forward_kernel, programs,
            (
                *problem.strides().numbers(), B * M * H * D if split else 0, M * H * D, H * D, D,
                B, H, M, N, self.splits, split_keys, self.keys.count,
                problem.score_scale, problem.dropout_p, keep_scale(problem.dropout_p),
            ),
            dict(PARTIAL=split, HAS_LOW=self.has_low and not split,
                 VECTOR=pb.vector(problem.q, problem.k, problem.v), **problem.features(config)),
        )  # fmt: skip

    def __call__(self, problem: Problem, seed: Optional[Tensor]) -> Outputs:
        q = problem.q
        out, low, lse, parts, part_lse = self.allocate(problem)
        blocks, ends, order, counts = self.keys(problem)
        self.attend(
            q, problem.k, problem.v, *problem.factors, ends, *problem.pairs, blocks, order, counts,
            q if seed is None else seed,
            parts, q if low is None else low, part_lse,
        )  # fmt: skip
        return self.combined(problem, out, low, lse, parts, part_lse)
