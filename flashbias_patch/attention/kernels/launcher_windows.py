"""The forward and backward pass of one class of calls with windows: the counterpart of
launcher_forward.py and launcher_backward.py."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from . import problem as pb
from . import window_backward as bwd
from . import window_forward as fwd
from .cached_launch import Launch
from .launcher_backward import Needs, Passed, Step, key_sums, needed, shapes_of
from .launcher_forward import Outputs, Outs
from .launcher_sums import Sum
from .problem import Problem, block_columns, cdiv, strides
from .recompute import keep_scale
from .tiles import Config
from .window_patches import LOG2E
from .window_tables import Windows, tables_of


def windows_of(problem: Problem) -> Windows:
    assert problem.windows is not None
    return problem.windows


class Common:
    """Tables, sizes and constants that the launches of one class of problems share."""

    def __init__(self, problem: Problem) -> None:
        windows, (B, M, _, H, _) = windows_of(problem), problem.sizes
        self.words, self.owners, self.frames, self.widths = windows.frame_tables(
            problem.lengths, problem.q.device
        )
        self.patches = self.words.shape[0]
        self.padded = cdiv(M, 256) * 256
        weights = windows.weights
        self.strides = (0, 0, 0) if weights is None else strides(weights)
        self.unit = LOG2E / problem.score_scale
        self.lengths = B, H, M, self.padded
        self.sizes = (*self.lengths, self.patches, windows.apiece)
        self.constants = dict(F=len(windows.frames), MODE=windows.mode, MASKED=windows.masked)

    def splits(self, problem: Problem, config: Config) -> int:
        """Into how many parts a loop over patches is cut."""
        B, M, _, H, _ = problem.sizes
        visited = self.patches // 8 if windows_of(problem).masked else self.patches
        programs, processors = cdiv(M, config.block_m) * B * H, pb.arch_of(problem.q).processors
        return pb.split_count(programs, visited, processors, config)

    def by_queries(self, problem: Problem, block: int) -> Tuple[Tensor, ...]:
        """WINDOWS, FRAMES, WIDTHS, ORDER, LIST, NUMBERS, COUNTS, CENTRES, SHOWN"""
        windows = windows_of(problem)
        weights, tables = windows.weights, tables_of(windows)
        lists = tables.lists(block)
        return (
            problem.q if weights is None else weights, self.frames, self.widths, tables.order,
            lists.words, lists.numbers, lists.counts, tables.centres, tables.mask_centres,
        )  # fmt: skip


class WindowForward(Outs):
    """launcher_forward.Forward for calls with windows."""

    def __init__(self, problem: Problem, training: bool, config: Config) -> None:
        B, M, _, H, D = problem.sizes
        self.common, self.block = Common(problem), config.block_m
        splits = self.common.splits(problem, config)
        super().__init__(problem, training, splits)
        split = splits > 1
        self.attend = Launch(
            fwd.window_forward_kernel, cdiv(M, config.block_m) * B * H * splits,
            (
                *problem.strides().numbers(), *self.common.strides, B * M * H * D if split else 0,
                M * H * D, H * D, D,
                *self.common.sizes, splits, problem.score_scale, self.common.unit,
                problem.dropout_p,
                keep_scale(problem.dropout_p),
            ),
            dict(PARTIAL=split, HAS_LOW=self.has_low and not split,
                 VECTOR=pb.vector(problem.q, problem.k, problem.v), **self.common.constants,
                 **problem.features(config)),
        )  # fmt: skip

    def __call__(self, problem: Problem, seed: Optional[Tensor]) -> Outputs:
        q = problem.q
        out, low, lse, parts, part_lse = self.allocate(problem)
        self.attend(
            q, problem.k, problem.v, *problem.factors, *problem.pairs, q if seed is None else seed,
            *self.common.by_queries(problem, self.block), parts, q if low is None else low,
            part_lse,
        )  # fmt: skip
        return self.combined(problem, out, low, lse, parts, part_lse)


class WindowRows:
    """The step that computes lse and delta of each row, and copies rows in the order of the tables:
    see window_rows_kernel."""

    def __init__(self, problem: Problem, passed: Passed) -> None:
        windows, (B, _, _, H, D) = windows_of(problem), problem.sizes
        self.common = common = Common(problem)
        self.padded = common.padded
        q_factor, weights, segments, folded = (
            problem.q_factor,
            problem.weights,
            problem.segments,
            problem.folded,
        )
        rows = max(1, segments) * B * H * self.padded
        self.rows = (2 + rows, pb.COLUMNS) if folded else (rows, 4 if problem.apart else 2)
        self.dtype = problem.q.dtype if folded else torch.float32
        columns = 0 if q_factor is None else q_factor.shape[-1]
        self.copies = (B * H, self.padded, block_columns(D))
        self.factors = (B * H, self.padded, columns) if columns and not folded else None
        self.weights = (len(windows.frames), B * H, self.padded) if windows.mode else None
        nothing = (0, 0, 0)
        block = 64
        self.launch = Launch(
            bwd.window_rows_kernel, self.padded // block * B * H,
            (
                *strides(problem.q), *(nothing if q_factor is None else strides(q_factor)),
                *strides(passed.grad_out),
                *strides(passed.out), *(nothing if weights is None else strides(weights)),
                *common.strides,
                *common.lengths, windows.apiece, common.unit,
                1.0 / problem.score_scale if folded else 1.0,
            ),
            dict(F=len(windows.frames), MODE=windows.mode, HAS_LOW=passed.low is not None, D=D,
                 BLOCK_D=block_columns(D), BLOCK_R=columns, R=problem.rank, SEGMENTS=segments,
                 FOLDED=folded,
                 APART=problem.apart, BLOCK_M=block),
        )  # fmt: skip

    def __call__(self, problem: Problem, passed: Passed) -> Tuple[Tensor, ...]:
        """QS, QFS, DOS, WS, ROWS"""
        q, windows = problem.q, windows_of(problem)
        q_factor, _, weights = problem.factors
        tables = tables_of(windows)
        made = [
            q if shape is None else pb.empty(shape, dtype=dtype, device=q.device)
            for shape, dtype in (
                (self.copies, q.dtype), (self.factors, q.dtype), (self.copies,
                passed.grad_out.dtype),
                (self.weights, torch.float32), (self.rows, self.dtype),
            )
        ]  # fmt: skip
        self.launch(
            q, q_factor, passed.grad_out, passed.out,
            passed.out if passed.low is None else passed.low, passed.lse,
            weights, q if windows.weights is None else windows.weights, tables.order,
            tables.centres, *made,
        )  # fmt: skip
        return tuple(made)


class WindowStep(Step):
    def make(self, problem: Problem) -> Any:
        """With the tables, which must exist before the two kernels run on two streams."""
        return {name: total.make(problem.q) for name, total in self.sums.items()}, self.tables(
            problem
        )

    def tables(self, problem: Problem) -> Tuple[Tensor, ...]:
        raise NotImplementedError


class WindowByKeys(WindowStep):
    """Gradients of k, v and k_factor."""

    def __init__(
        self, problem: Problem, needs: Needs, passed: Passed, padded: int, config: Config
    ) -> None:
        windows, (B, M, N, H, D) = windows_of(problem), problem.sizes
        self.common, self.block = Common(problem), config.block_m
        patches = self.common.patches
        processors = pb.arch_of(problem.q).processors
        splits = pb.split_count(patches * B * H, cdiv(M, config.block_m), processors, config, 2)
        self.sums, shared, kf_strides = key_sums(problem, needs, splits)
        features = problem.features(config)
        self.launch = Launch(
            bwd.window_keys_kernel, patches * splits * B * H,
            (
                *problem.strides().numbers(without=("q", "q_factor", "weights")),
                B * N * H * D if "k" in self.sums else 0, *kf_strides,
                B, H, M, N, padded, patches, windows.apiece, splits, problem.score_scale,
                1.0 if problem.scaled else problem.scale, problem.dropout_p,
                keep_scale(problem.dropout_p),
            ),
            dict(MODE=windows.mode, MASKED=windows.masked, R=problem.rank, NEED_KV="k" in self.sums,
                 NEED_KF=needs.k_factor, SHARED_KF=shared, FOLDED=problem.folded,
                 VECTOR=pb.vector(problem.k, problem.v), **features),
        )  # fmt: skip

    def tables(self, problem: Problem) -> Tuple[Tensor, ...]:
        windows = windows_of(problem)
        tables = tables_of(windows)
        flags = tables.lists(self.block).flags
        blocks = tables.blocks(self.block) if windows.masked else (tables.order, tables.order)
        return tables.order, flags, *blocks, tables.centres, tables.mask_centres

    def run(
        self, problem: Problem, passed: Passed, rows: Any, made: Any, stream: Optional[int] = None
    ) -> None:
        q, (parts, tables), common = problem.q, made, self.common
        _, k_factor, _ = problem.factors
        qs, qfs, dos, ws, values = rows
        self.launch(
            qs, problem.k, problem.v, qfs, k_factor, *problem.pairs,
            q if passed.seed is None else passed.seed,
            common.words, common.owners, common.frames, common.widths, *tables, ws, dos, values,
            *[parts.get(name, q) for name in ("k", "v", "k_factor")], stream=stream,
        )  # fmt: skip


class WindowByQueries(WindowStep):
    """Gradients of q, q_factor, weights and the windows' weights."""

    def __init__(
        self, problem: Problem, needs: Needs, passed: Passed, padded: int, config: Config
    ) -> None:
        windows, (B, M, _, H, D) = windows_of(problem), problem.sizes
        self.common, self.block = Common(problem), config.block_m
        dtype, rank, shapes, S = (
            problem.q.dtype,
            problem.rank,
            shapes_of(problem),
            len(windows.frames),
        )
        splits = self.common.splits(problem, config)
        q = qf = weights = held = None
        if needs.q:
            kept = torch.float32 if splits > 1 else dtype
            q = Sum((splits, B, M, H, D), shapes.q, dtype, kept=kept)
        if needs.q_factor:
            assert problem.q_factor is not None
            qf = Sum((splits, B, M, H, rank), shapes.q_factor, problem.q_factor.dtype)
        if needs.weights:
            assert problem.weights is not None
            parts = (splits, B, M, H, problem.segments)
            weights = Sum(parts, shapes.weights, problem.weights.dtype, zeros=True)
        if needs.windows:
            assert windows.weights is not None
            held = Sum((splits, B, M, H, S), shapes.windows, windows.weights.dtype)
        self.sums = needed({"q": q, "q_factor": qf, "weights": weights, "windows": held})
        part = B * M * H
        self.launch = Launch(
            bwd.window_queries_kernel, cdiv(M, config.block_m) * B * H * splits,
            (
                *problem.strides().numbers(), *self.common.strides, *strides(passed.grad_out),
                part * D if needs.q else 0,
                part * rank if needs.q_factor else 0,
                part * problem.segments if needs.weights else 0,
                part * S if needs.windows else 0, *self.common.sizes, splits, problem.score_scale,
                self.common.unit,
                problem.scale, problem.dropout_p, keep_scale(problem.dropout_p),
            ),
            dict(R=rank, NEED_Q=needs.q, NEED_QF=needs.q_factor, NEED_W=needs.weights,
                 NEED_WINDOWS=needs.windows,
                 FOLDED=problem.folded,
                 VECTOR=pb.vector(problem.q, problem.k, problem.v, passed.grad_out),
                 **self.common.constants,
                 **problem.features(config)),
        )  # fmt: skip

    def tables(self, problem: Problem) -> Tuple[Tensor, ...]:
        return self.common.by_queries(problem, self.block)

    def run(
        self, problem: Problem, passed: Passed, rows: Any, made: Any, stream: Optional[int] = None
    ) -> None:
        q, (parts, tables) = problem.q, made
        *_, values = rows  # of window_rows_kernel
        self.launch(
            q, problem.k, problem.v, *problem.factors, *problem.pairs,
            q if passed.seed is None else passed.seed,
            *tables, passed.grad_out, passed.lse, values,
            *[parts.get(name, q) for name in ("q", "q_factor", "weights", "windows")],
            stream=stream,
        )  # fmt: skip
