"""From tensors to kernel launches: allocation, strides, padding, splitting, and the sums over what is shared.

Additive terms, all optional: factors (second dot product into the same accumulator), segments (a constant a row for
each stretch of keys), a dense bias, a boolean mask, key padding (boolean, or floating and added).
"""
from __future__ import annotations

import functools
import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import backward as bwd
from . import forward as fwd
from .configs import Config, Key, first_working
from .recompute import dropout_shift, keep_scale

LOG2E = 1.4426950408889634
_empty = torch.empty  # tests poison it


class Problem(NamedTuple):
    """One attention call, its tensors ready for the kernels: last stride 1, factors padded, q scaled if need be."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Optional[Tensor]
    k_factor: Optional[Tensor]
    weights: Optional[Tensor]
    lengths: Tuple[int, ...]
    dense: Optional[Tensor]
    mask: Optional[Tensor]
    padding: Optional[Tensor]
    dropout_p: float
    scale: float
    rank: int

    @property
    def sizes(self) -> Tuple[int, int, int, int, int]:
        B, M, H, D = self.q.shape
        return B, M, self.k.shape[1], H, D

    @property
    def scaled(self) -> bool:
        return scales_q(self.q_factor, self.scale)


def scales_q(q_factor: Optional[Tensor], scale: float) -> bool:
    """Is the scale multiplied into q beforehand? With factors, since their product must join unscaled; and the
    kernels take the maximum before scaling, which wants a positive scale."""
    return q_factor is not None or scale <= 0


def block_columns(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes a microsecond."""
    return -(-a // b)


def unit_last(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 and tensor.is_contiguous() else tensor.contiguous()


def prepare(
    q: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor], scale: float
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """q times scale where the scale goes into q, and the factors with their columns zero-padded to a power of two of at
    least 16 (themselves if they are that already)."""
    if q_factor is None or k_factor is None:
        if scales_q(q_factor, scale):
            q = torch.mul(q, scale, out=torch.empty(q.shape, dtype=q.dtype, device=q.device))  # contiguous, as promised
        return q, q_factor, k_factor
    B, M, H, D = q.shape
    R = q_factor.shape[-1]
    columns = block_columns(R)
    given = [unit_last(q), unit_last(q_factor), unit_last(k_factor)]
    made = [q.new_empty(B, M, H, D), *given[1:]]
    if columns != R:
        made[1:] = [factor.new_empty(*factor.shape[:3], columns) for factor in given[1:]]
    rows = [t.shape[0] * t.shape[1] * t.shape[2] for t in given]
    if columns == R:
        rows[1:] = [0, 0]
    per_program = 64
    starts = [cdiv(count, per_program) for count in rows]
    if sum(starts):
        with on_device(q):
            fwd.prepare_kernel[(sum(starts),)](
                *[t for pair in zip(given, made) for t in pair], *[n for t in given for n in strides(t)],
                *[n for t in given for n in (t.shape[2], t.shape[1])], *rows, starts[0], starts[0] + starts[1], scale,
                D=D, BLOCK_D=block_columns(D), R=R, BLOCK_R=columns, ROWS=per_program,
            )  # fmt: skip
    return made[0], made[1], made[2]


def on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else torch.no_grad()


def strides(tensor: Tensor) -> Tuple[int, int, int]:
    """Strides of (B, L, H, .), 0 along a batch or head dimension of size 1, which is thereby shared."""
    b, length, h, _ = tensor.stride()
    return (b if tensor.shape[0] > 1 else 0), length, (h if tensor.shape[2] > 1 else 0)


def pair_strides(tensor: Optional[Tensor]) -> Tuple[int, int, int]:
    """Strides over batch, heads and queries of a (B|1, H|1, M|1, N) tensor."""
    if tensor is None:
        return 0, 0, 0
    return tuple(tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in range(3))  # type: ignore


def as_bytes(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Booleans as uint8 (no copy), other dtypes as they are, last stride 1."""
    if tensor is None:
        return None
    tensor = unit_last(tensor)
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


@functools.lru_cache(maxsize=256)
def _arch(index: int) -> Tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def arch_of(tensor: Tensor) -> Tuple[int, int]:
    """(10 * major + minor, multiprocessors); (0, 1) for the interpreter."""
    return _arch(tensor.device.index) if tensor.is_cuda else (0, 1)


@functools.lru_cache(maxsize=256)
def block_table(lengths: Tuple[int, ...], block: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Blocks of keys (count, 4): first key, end, segment, what dropout adds to a key (common.dropout_shift); and the
    segments' ends (S + 1,)."""
    rows: List[Tuple[int, int, int, int]] = []
    ends, offset = [0], 0
    for segment, length in enumerate(lengths):
        shift = dropout_shift(offset, segment)
        for start in range(offset, offset + length, block):
            rows.append((start, min(start + block, offset + length), segment, shift))
        offset += length
        ends.append(offset)
    with torch.inference_mode(False):
        make = functools.partial(torch.tensor, dtype=torch.int32)
        return make(rows).to(device), make(ends).to(device)


def visible_blocks(padding: Tensor, blocks: Tensor, block: int) -> Tuple[Tensor, Tensor]:
    """For each batch entry the blocks with an unmasked key, first (B, blocks) in order, and how many (B,)."""
    B, num_blocks = padding.shape[0], blocks.shape[0]
    order = torch.empty((B, num_blocks), dtype=torch.int32, device=padding.device)
    counts = torch.empty((B,), dtype=torch.int32, device=padding.device)
    fwd.visible_kernel[(B,)](
        padding, blocks, order, counts, padding.stride(0) if B > 1 else 0, num_blocks,
        PAD_KIND=pad_kind(padding), BLOCK_N=block, MANY=32,
    )  # fmt: skip
    return order, counts


def pad_kind(padding: Optional[Tensor]) -> int:
    return 0 if padding is None else 1 if padding.dtype == torch.uint8 else 2


def split_count(programs: int, blocks: int, processors: int, config: Config, least: int = 4) -> int:
    """Into how many parts to cut a loop over `blocks` so that `programs` of them fill the GPU."""
    if config.splits:
        return max(1, min(config.splits, blocks))
    room = processors * (3 if config.warps <= 4 else 2)
    if processors == 1 or programs * 4 > room * 3:
        return 1
    return max(1, min(room // max(programs, 1), blocks // least, 64))


def _whole(problem: Problem) -> bool:
    """Whether a loop over keys must not be cut: dropout counts in sixteens from each segment's first key."""
    return problem.weights is not None and problem.dropout_p > 0


def make_key(kernel: str, problem: Problem) -> Key:
    plain = problem.dense is None and problem.mask is None and problem.padding is None and not problem.dropout_p
    block_r = 0 if problem.q_factor is None else problem.q_factor.shape[-1]
    half = problem.q.dtype != torch.float32
    return Key(kernel, arch_of(problem.q)[0], half, block_columns(problem.q.shape[-1]), block_r, plain)


def _features(problem: Problem, config: Config) -> dict:
    D = problem.q.shape[-1]
    return dict(
        D=D,
        BLOCK_D=block_columns(D),
        BLOCK_R=0 if problem.q_factor is None else problem.q_factor.shape[-1],
        SEGMENTS=0 if problem.weights is None else len(problem.lengths),
        HAS_DENSE=problem.dense is not None,
        HAS_MASK=problem.mask is not None,
        PAD_KIND=pad_kind(problem.padding),
        DROPOUT=problem.dropout_p > 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        EXP=config.exp,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
        **(dict(maxnreg=config.registers) if config.registers else {}),
    )


def _operands(problem: Problem) -> List[Tensor]:
    q = problem.q
    return [q if tensor is None else tensor for tensor in problem[3:6]]


def _strides(problem: Problem) -> Tuple[int, ...]:
    none = (0, 0, 0)
    found: Tuple[int, ...] = ()
    for tensor in problem[:6]:
        found += none if tensor is None else strides(tensor)
    padding = problem.padding
    found += pair_strides(problem.dense) + pair_strides(problem.mask)
    return found + (0 if padding is None or padding.shape[0] == 1 else padding.stride(0),)


def _keys(problem: Problem, block_n: int) -> Tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """BLOCKS, ENDS, ORDER, COUNTS and the number of blocks; placeholders for what the features do not use."""
    N = problem.k.shape[1]
    if problem.weights is None and problem.padding is None:
        q = problem.q
        return q, q, q, q, cdiv(N, block_n)
    blocks, ends = block_table(problem.lengths or (N,), block_n, problem.q.device)
    order = counts = ends
    if problem.padding is not None:
        order, counts = visible_blocks(problem.padding, blocks, block_n)
    return blocks, ends, order, counts, blocks.shape[0]


def _score_scale(problem: Problem) -> float:
    return LOG2E if problem.scaled else LOG2E * problem.scale


def forward(problem: Problem, seed: Tensor, training: bool) -> Tuple[Tensor, Tensor, Tensor]:
    """out (B, M, H, D); what it lost by being rounded to half, where `training` needs it, else empty; its logsumexp
    (B * H, M), float32, in log2 units, +inf for a row without keys.

    Backward's delta, the sum of grad_out * out over a row, is taken from the unrounded output: its error is common to all
    keys, and so adds up in gradients that are sums over keys.
    """
    B, M, N, H, D = problem.sizes
    q, k, v = problem[:3]
    if not q.numel() or not k.numel():
        return q.new_zeros(B, M, H, D), q.new_empty(0), torch.full((B * H, M), math.inf, device=q.device)
    out = _empty((B, M, H, D), dtype=q.dtype, device=q.device)
    has_low = training and q.dtype != torch.float32
    low = _empty((B, M, H, D), dtype=q.dtype, device=q.device) if has_low else q.new_empty(0)
    lse = _empty((B * H, M), dtype=torch.float32, device=q.device)

    def run(config: Config) -> None:
        blocks, ends, order, counts, num_blocks = _keys(problem, config.block_n)
        programs = cdiv(M, config.block_m) * B * H
        splits = 1 if _whole(problem) else split_count(programs, num_blocks, arch_of(q)[1], config)
        split_keys = cdiv(cdiv(N, config.block_n), splits) * config.block_n
        if problem.padding is None:
            splits = cdiv(N, split_keys)
        parts, part_lse = out, lse
        if splits > 1:
            parts = _empty((splits, B, M, H, D), dtype=torch.float32, device=q.device)
            part_lse = _empty((splits, B * H, M), dtype=torch.float32, device=q.device)
        part_stride = B * M * H * D if splits > 1 else 0
        others = [q if t is None else t for t in (problem.dense, problem.mask, problem.padding)]
        fwd.forward_kernel[(programs * splits,)](
            q, k, v, *_operands(problem), ends, *others, blocks, order, counts, seed, parts, low, part_lse,
            *_strides(problem), part_stride, M * H * D, H * D, D,
            B, H, M, N, splits, split_keys, num_blocks,
            _score_scale(problem), problem.dropout_p, keep_scale(problem.dropout_p),
            PARTIAL=splits > 1, HAS_LOW=has_low and splits == 1, **_features(problem, config),
        )  # fmt: skip
        if splits > 1:
            rows = 16
            fwd.combine_kernel[(cdiv(M, rows) * B * H,)](
                parts, part_lse, out, low, lse, B, H, M, splits, HAS_LOW=has_low, D=D, BLOCK_D=block_columns(D), BLOCK_M=rows
            )

    with on_device(q):
        first_working(make_key("forward", problem), run)
    return out, low, lse


class Needs(NamedTuple):
    """Which gradients are wanted."""

    q: bool
    k: bool
    v: bool
    q_factor: bool
    k_factor: bool
    weights: bool
    dense: bool


def reduce_to(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Sum `tensor` over every dimension in which `shape` is 1 (was broadcast), as `dtype`."""
    axes = [axis for axis, size in enumerate(shape) if size == 1 and tensor.shape[axis] != 1]
    return (tensor.sum(axes, keepdim=True) if axes else tensor).to(dtype)


def backward(
    problem: Problem, needs: Needs, grad_out: Tensor, out: Tensor, low: Tensor, lse: Tensor, seed: Tensor,
    dtypes: Sequence[Any],
) -> Tuple[Optional[Tensor], ...]:
    """Gradients of q, k, v, q_factor, k_factor, weights, dense (None where not needed), shaped as these."""
    B, M, N, H, D = problem.sizes
    q, k, v = problem[:3]
    shapes = [None if t is None else tuple(t.shape) for t in problem[:6] + (problem.dense,)]
    for place in (3, 4):
        if shapes[place] is not None:
            shapes[place] = (*shapes[place][:3], problem.rank)  # type: ignore[index]
    if not q.numel() or not k.numel():
        return tuple(
            torch.zeros(shape, dtype=dtype, device=q.device) if need else None  # type: ignore
            for need, shape, dtype in zip(needs, shapes, dtypes)
        )
    if N == 1:
        # The one key's weight is 1 (or 0) whatever its score, so that only v has a gradient: exactly, where the
        # difference of two rounded numbers would not be.
        needs, rest = Needs(False, False, needs.v, False, False, False, False), needs
        zeros = [
            torch.zeros(shape, dtype=dtype, device=q.device) if need else None  # type: ignore
            for need, shape, dtype in zip(rest, shapes, dtypes)
        ]
    if not any(needs):
        return (None,) * 7 if N > 1 else tuple(zeros)
    grad_out = unit_last(grad_out)
    with on_device(q):
        rows = row_values(problem, grad_out, out, low, lse)
        grads = _Backward(problem, needs, grad_out, lse, rows, seed, shapes, dtypes).run()
    return grads if N > 1 else tuple(zero if grad is None else grad for grad, zero in zip(grads, zeros))


def row_values(problem: Problem, grad_out: Tensor, out: Tensor, low: Tensor, lse: Tensor) -> Tensor:
    """What backward needs of each row (segments or 1, B * H, padded M, 2): see rows_kernel."""
    B, M, _, H, D = problem.sizes
    weights = problem.weights
    segments = 0 if weights is None else len(problem.lengths)
    padded, block = cdiv(M, 256) * 256, 64
    rows = _empty((max(1, segments), B * H, padded, 2), dtype=torch.float32, device=out.device)
    bwd.rows_kernel[(padded // block * B * H,)](
        out, low, grad_out, lse, out if weights is None else weights, rows,
        *strides(out), *strides(grad_out), *((0, 0, 0) if weights is None else strides(weights)), B * H, H, M, padded,
        HAS_LOW=low.numel() > 0, D=D, BLOCK_D=block_columns(D), SEGMENTS=segments, BLOCK_M=block,
    )  # fmt: skip
    return rows


class _Backward:
    """One backward pass: the tensors that both kernels read, and the gradients as they come."""

    def __init__(self, problem: Problem, needs: Needs, grad_out: Tensor, lse: Tensor, rows: Tensor, seed: Tensor,
                 shapes: Sequence[Any], dtypes: Sequence[Any]) -> None:  # fmt: skip
        self.problem, self.needs, self.shapes, self.dtypes = problem, needs, shapes, dtypes
        self.grad_out, self.lse, self.rows, self.seed = grad_out, lse, rows, seed
        self.grads: List[Optional[Tensor]] = [None] * 7

    def run(self) -> Tuple[Optional[Tensor], ...]:
        needs = self.needs
        by_query = needs.q or needs.q_factor or needs.weights
        by_key = needs.k or needs.v or needs.k_factor or needs.dense
        if by_key:
            first_working(make_key("keys", self.problem), self._by_keys)
        if by_query:
            first_working(make_key("queries", self.problem), self._by_queries)
        return tuple(grad if need else None for grad, need in zip(self.grads, needs))

    def _make(self, shape: Sequence[int], zeros: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        make = torch.zeros if zeros else _empty
        return make(tuple(shape), dtype=dtype, device=self.problem.q.device)

    def _others(self) -> List[Tensor]:
        problem = self.problem
        return [problem.q if t is None else t for t in (problem.dense, problem.mask, problem.padding)]

    def _by_keys(self, config: Config) -> None:
        problem, needs, shapes, dtypes = self.problem, self.needs, self.shapes, self.dtypes
        B, M, N, H, D = problem.sizes
        q, rank = problem.q, problem.rank
        exact = torch.are_deterministic_algorithms_enabled()
        blocks, _, _, _, num_blocks = _keys(problem._replace(padding=None), config.block_n)
        splits = split_count(num_blocks * B * H, cdiv(M, config.block_m), _sms(q), config, 2)
        split_rows = cdiv(cdiv(M, config.block_m), splits) * config.block_m
        splits = cdiv(M, split_rows)
        partial = splits > 1

        kv_dtype = torch.float32 if partial else q.dtype
        need_kv = needs.k or needs.v
        dk = self._make((splits, B, N, H, D), False, kv_dtype) if need_kv else q
        dv = torch.empty_like(dk) if need_kv else q
        dkf, shared, dkf_split = q, False, 0
        if needs.k_factor:
            shared = not exact and shapes[4][:1] + shapes[4][2:3] != (B, H)
            if shared:
                dkf = self._make((1,) + shapes[4], True)
            else:
                dkf = self._make((splits, B, N, H, rank), False)
                dkf_split = dkf.stride(0)
        dkf_strides = strides(dkf[0]) if needs.k_factor else (0, 0, 0)

        mode, dd, dd_strides = 0, q, (0, 0, 0, 0)
        if needs.dense:
            assert problem.dense is not None
            Bd, Hd, Md, _ = problem.dense.shape
            skips = problem.padding is not None
            if Md == 1:
                mode, dd = 3, self._make((splits, B, H, 1, N), False)
            elif (Bd, Hd) == (B, H):
                mode, dd = 1, self._make((1, B, H, M, N), skips, problem.dense.dtype)
            elif exact:
                mode, dd = 1, self._make((1, B, H, M, N), skips)
            else:
                mode, dd = 2, self._make((1, Bd, Hd, M, N), True)
            dd_strides = (dd.stride(0) if mode == 3 else 0,) + pair_strides(dd[0])

        bwd.keys_kernel[(num_blocks * splits * B * H,)](
            q, problem.k, problem.v, *_operands(problem)[:2], *self._others(), blocks, self.seed,
            self.grad_out, self.rows, dk, dv, dkf, dd,
            *_strides(problem)[:15], *_strides(problem)[18:], *strides(self.grad_out),
            dk.stride(0) if need_kv else 0, dkf_split, *dkf_strides, *dd_strides,
            B * H, H, M, N, splits, split_rows, num_blocks, self.rows.shape[2], _score_scale(problem),
            1.0 if problem.scaled else problem.scale, problem.dropout_p, keep_scale(problem.dropout_p),
            R=rank, NEED_KV=need_kv, NEED_KF=needs.k_factor, DENSE_GRAD=mode, SHARED_KF=shared,
            **_features(problem, config),
        )  # fmt: skip

        grads = self.grads
        if need_kv:
            grads[1] = _sum_parts(dk).to(q.dtype)
            grads[2] = _sum_parts(dv).to(q.dtype)
        if needs.k_factor:
            grads[4] = reduce_to(_sum_parts(dkf), shapes[4], dtypes[4])
        if needs.dense:
            grads[6] = reduce_to(_sum_parts(dd), shapes[6], dtypes[6])

    def _by_queries(self, config: Config) -> None:
        problem, needs, shapes, dtypes = self.problem, self.needs, self.shapes, self.dtypes
        B, M, N, H, D = problem.sizes
        q, rank = problem.q, problem.rank
        blocks, ends, order, counts, num_blocks = _keys(problem, config.block_n)
        programs = cdiv(M, config.block_m) * B * H
        splits = 1 if _whole(problem) else split_count(programs, num_blocks, _sms(q), config)
        split_keys = cdiv(cdiv(N, config.block_n), splits) * config.block_n
        if problem.padding is None:
            splits = cdiv(N, split_keys)
        partial = splits > 1
        dq = self._make((splits, B, M, H, D), False, torch.float32 if partial else q.dtype) if needs.q else q
        dqf = self._make((splits, B, M, H, rank), False) if needs.q_factor else q
        dw = self._make((splits, B, M, H, len(problem.lengths)), True) if needs.weights else q
        bwd.queries_kernel[(programs * splits,)](
            q, problem.k, problem.v, *_operands(problem), ends, *self._others(), blocks, order, counts, self.seed,
            self.grad_out, self.lse, self.rows, dq, dqf, dw,
            *_strides(problem), *strides(self.grad_out),
            *[t.stride(0) if need else 0 for t, need in ((dq, needs.q), (dqf, needs.q_factor), (dw, needs.weights))],
            H, M, N, splits, split_keys, num_blocks, self.rows.shape[2], _score_scale(problem), problem.scale,
            problem.dropout_p, keep_scale(problem.dropout_p),
            R=rank, NEED_Q=needs.q, NEED_QF=needs.q_factor, NEED_W=needs.weights, **_features(problem, config),
        )  # fmt: skip
        grads = self.grads
        if needs.q:
            grads[0] = _sum_parts(dq).to(q.dtype)
        if needs.q_factor:
            grads[3] = reduce_to(_sum_parts(dqf), shapes[3], dtypes[3])
        if needs.weights:
            grads[5] = reduce_to(_sum_parts(dw), shapes[5], dtypes[5])


def _sum_parts(parts: Tensor) -> Tensor:
    """The sum over the first dimension: over what the split programs wrote."""
    return parts.sum(0) if parts.shape[0] > 1 else parts[0]


def _sms(tensor: Tensor) -> int:
    return arch_of(tensor)[1]
