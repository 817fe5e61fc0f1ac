"""The backward pass of one class of calls: one launch over the keys, one over the queries, and sums
over operands that batch entries or heads share."""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import backward as bwd
from . import problem as pb
from .cached_launch import Launch
from .launcher_forward import Keys, split_over_keys
from .launcher_sums import Sum
from .problem import Problem, block_columns, cdiv, strides
from .recompute import keep_scale
from .tiles import Config

# Numbers, B * N * H * R, up to which each head writes its own part of a shared k_factor's gradient:
# summing these costs less than clearing memory that all of them add to.
SEPARATE = 1 << 20


class Needs(NamedTuple):
    """The gradients that a backward pass computes."""

    q: bool
    k: bool
    v: bool
    q_factor: bool
    k_factor: bool
    weights: bool
    dense: bool
    windows: bool = False

    @property
    def by_keys(self) -> bool:
        return self.k or self.v or self.k_factor or self.dense

    @property
    def by_queries(self) -> bool:
        return self.q or self.q_factor or self.weights or self.windows


class Passed(NamedTuple):
    """The inputs of a backward pass besides the problem; `low` and `seed` are None if forward made
    none."""

    grad_out: Tensor
    out: Tensor
    low: Optional[Tensor]
    lse: Tensor
    seed: Optional[Tensor]


# The memory that a step allocates before it runs: parts of gradients by their name in Needs, and
# the blocks of keys.
Made = Tuple[Dict[str, Tensor], Tuple[Tensor, Tensor, Tensor, Tensor]]


def differentiable(problem: Problem) -> Tuple[Optional[Tensor], ...]:
    """The tensors that can have a gradient, in the order of Needs."""
    windows = problem.windows
    return (
        problem.q, problem.k, problem.v, problem.q_factor, problem.k_factor, problem.weights,
        problem.dense, None if windows is None else windows.weights,
    )  # fmt: skip


class Shapes(NamedTuple):
    """The shapes of the tensors that can have a gradient, None for those that are not there. The
    fields are those of Needs."""

    q: Any
    k: Any
    v: Any
    q_factor: Any
    k_factor: Any
    weights: Any
    dense: Any
    windows: Any


def shapes_of(problem: Problem) -> Shapes:
    """The shapes as the caller gave them: factors without the columns that `prepare` added."""
    shapes = Shapes(*[None if t is None else tuple(t.shape) for t in differentiable(problem)])
    if problem.q_factor is None or problem.k_factor is None:
        return shapes
    return shapes._replace(
        q_factor=(*problem.q_factor.shape[:3], problem.rank),
        k_factor=(*problem.k_factor.shape[:3], problem.rank),
    )


class Rows:
    """The step that computes lse and delta of each row: see rows_kernel."""

    def __init__(self, problem: Problem, passed: Passed) -> None:
        B, M, _, H, D = problem.sizes
        weights, segments, q_factor = problem.weights, problem.segments, problem.q_factor
        self.padded, block = cdiv(M, 256) * 256, 64
        rows = max(1, segments) * B * H * self.padded
        self.shape = (2 + rows, pb.COLUMNS) if problem.folded else (rows, 4 if problem.apart else 2)
        self.dtype = problem.q.dtype if problem.folded else torch.float32
        nothing = (0, 0, 0)
        self.launch = Launch(
            bwd.rows_kernel, self.padded // block * B * H,
            (
                *strides(passed.out), *strides(passed.grad_out),
                *(nothing if weights is None else strides(weights)),
                *(nothing if q_factor is None else strides(q_factor)), B * H, H, M, self.padded,
                1.0 / problem.score_scale if problem.folded else 1.0,
            ),
            dict(HAS_LOW=passed.low is not None, D=D, BLOCK_D=block_columns(D), SEGMENTS=segments,
                 BLOCK_M=block,
                 FOLDED=problem.folded, APART=problem.apart, R=problem.rank),
        )  # fmt: skip

    def __call__(self, problem: Problem, passed: Passed) -> Tensor:
        out, (q_factor, _, weights) = passed.out, problem.factors
        rows = pb.empty(self.shape, dtype=self.dtype, device=out.device)
        low = out if passed.low is None else passed.low
        self.launch(out, low, passed.grad_out, passed.lse, weights, q_factor, rows)
        return rows


class Step:
    """A launch that writes parts of gradients: of those in `sums`, over the keys in `keys`."""

    sums: Dict[str, Sum]  # by the gradient's name in Needs
    keys: Keys

    def make(self, problem: Problem) -> Made:
        q = problem.q
        return {name: total.make(q) for name, total in self.sums.items()}, self.keys(problem)


def key_sums(
    problem: Problem, needs: Needs, splits: int
) -> Tuple[Dict[str, Sum], bool, Tuple[int, ...]]:
    """The sums of k, v and k_factor's gradients; True if all programs add to the last; and its
    parts' strides."""
    B, _, N, H, D = problem.sizes
    q, rank = problem.q, problem.rank
    shapes = shapes_of(problem)
    k = v = kf = None
    if needs.k or needs.v:
        kept = torch.float32 if splits > 1 else q.dtype
        k = Sum((splits, B, N, H, D), shapes.k, q.dtype, kept=kept)
        v = Sum((splits, B, N, H, D), shapes.v, q.dtype, kept=kept)

    shared = False
    kf_strides: Tuple[int, ...] = (0, 0, 0, 0)
    if needs.k_factor:
        assert problem.k_factor is not None
        exact = torch.are_deterministic_algorithms_enabled()
        kf_batch, _, kf_heads, _ = shapes.k_factor
        separate = B * N * H * rank <= SEPARATE or exact or (kf_batch, kf_heads) == (B, H)
        shared = not separate
        count, part = (1, shapes.k_factor) if shared else (splits, (B, N, H, rank))
        kf = Sum((count, *part), shapes.k_factor, problem.k_factor.dtype, zeros=shared)
        kf_strides = (0 if shared else B * N * H * rank, *_contiguous(part))
    return needed({"k": k, "v": v, "k_factor": kf}), shared, kf_strides


class ByKeys(Step):
    """Gradients of k, v, k_factor and dense."""

    def __init__(
        self, problem: Problem, needs: Needs, passed: Passed, padded: int, config: Config
    ) -> None:
        B, M, N, H, D = problem.sizes
        q, rank = problem.q, problem.rank
        exact = torch.are_deterministic_algorithms_enabled()
        self.keys = Keys(problem._replace(padding=None), config.block_n)
        count = self.keys.count
        processors = pb.arch_of(q).processors
        splits = pb.split_count(count * B * H, cdiv(M, config.block_m), processors, config, 2)
        split_rows = cdiv(cdiv(M, config.block_m), splits) * config.block_m
        splits = cdiv(M, split_rows)

        sums, shared, kf_strides = key_sums(problem, needs, splits)
        dense = None
        mode = 0
        dd_strides: Tuple[int, ...] = (0, 0, 0, 0)
        if needs.dense:
            assert problem.dense is not None
            shape: Tuple[int, ...] = tuple(problem.dense.shape)
            part: Tuple[int, ...] = (B, H, M, N)
            dtype, skips = problem.dense.dtype, problem.padding is not None
            batch, heads, rows, _ = shape
            if rows == 1:
                mode, part = 3, (B, H, 1, N)
                dense = Sum((splits, *part), shape, dtype)
            elif (batch, heads) == (B, H):
                mode, dense = 1, Sum((1, *part), shape, dtype, zeros=skips, kept=dtype)
            elif exact:
                mode, dense = 1, Sum((1, *part), shape, dtype, zeros=skips)
            else:
                mode, part = 2, shape
                dense = Sum((1, *part), shape, dtype, zeros=True)
            dd_strides = (B * H * N if mode == 3 else 0, *_contiguous(part))

        self.sums = needed({**sums, "dense": dense})
        self.launch = Launch(
            bwd.keys_kernel, count * splits * B * H,
            (
                *problem.strides().numbers(without=("weights",)), *strides(passed.grad_out),
                B * N * H * D if "k" in sums else 0,
                *kf_strides, *dd_strides,
                B * H, H, M, N, splits, split_rows, count, padded, problem.score_scale,
                1.0 if problem.scaled else problem.scale, problem.dropout_p,
                keep_scale(problem.dropout_p),
            ),
            dict(R=rank, NEED_KV="k" in sums, NEED_KF=needs.k_factor, DENSE_GRAD=mode,
                 SHARED_KF=shared, FOLDED=problem.folded,
                 VECTOR=pb.vector(q, problem.k, problem.v, passed.grad_out),
                 **problem.features(config)),
        )  # fmt: skip

    def run(
        self,
        problem: Problem,
        passed: Passed,
        rows: Tensor,
        made: Made,
        stream: Optional[int] = None,
    ) -> None:
        q, (parts, (blocks, *_)) = problem.q, made
        q_factor, k_factor, _ = problem.factors
        self.launch(
            q, problem.k, problem.v, q_factor, k_factor, *problem.pairs, blocks,
            q if passed.seed is None else passed.seed, passed.grad_out, rows,
            *[parts.get(name, q) for name in ("k", "v", "k_factor", "dense")], stream=stream,
        )  # fmt: skip


class ByQueries(Step):
    """Gradients of q, q_factor and weights."""

    def __init__(
        self, problem: Problem, needs: Needs, passed: Passed, padded: int, config: Config
    ) -> None:
        B, M, N, H, D = problem.sizes
        dtype, rank = problem.q.dtype, problem.rank
        shapes = shapes_of(problem)
        self.keys = Keys(problem, config.block_n)
        splits, split_keys, programs = split_over_keys(problem, config, self.keys)
        q = qf = weights = None
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
        self.sums = needed({"q": q, "q_factor": qf, "weights": weights})
        part = B * M * H
        self.launch = Launch(
            bwd.queries_kernel, programs,
            (
                *problem.strides().numbers(), *strides(passed.grad_out), part * D if needs.q else 0,
                part * rank if needs.q_factor else 0,
                part * problem.segments if needs.weights else 0,
                H, M, N, splits, split_keys, self.keys.count, padded, problem.score_scale,
                problem.scale,
                problem.dropout_p, keep_scale(problem.dropout_p),
            ),
            dict(R=rank, NEED_Q=needs.q, NEED_QF=needs.q_factor, NEED_W=needs.weights,
                 FOLDED=problem.folded,
                 VECTOR=pb.vector(problem.q, problem.k, problem.v, passed.grad_out),
                 **problem.features(config)),
        )  # fmt: skip

    def run(
        self,
        problem: Problem,
        passed: Passed,
        rows: Tensor,
        made: Made,
        stream: Optional[int] = None,
    ) -> None:
        q, (parts, (blocks, ends, order, counts)) = problem.q, made
        self.launch(
            q, problem.k, problem.v, *problem.factors, ends, *problem.pairs, blocks, order, counts,
            q if passed.seed is None else passed.seed, passed.grad_out, passed.lse, rows,
            *[parts.get(name, q) for name in ("q", "q_factor", "weights")], stream=stream,
        )  # fmt: skip


def needed(sums: Dict[str, Optional[Sum]]) -> Dict[str, Sum]:
    return {name: total for name, total in sums.items() if total is not None}


def _contiguous(shape: Sequence[int]) -> Tuple[int, ...]:
    """Strides over the first three of four dimensions of a contiguous tensor, 0 over one of size 1,
    which is shared."""
    _, second, third, last = shape
    return tuple(
        stride if size > 1 else 0
        for stride, size in zip((second * third * last, third * last, last), shape)
    )
