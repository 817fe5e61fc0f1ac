"""A low-rank bias as more columns of q and k (FlashBias, arXiv 2505.12044, section 3.2), in one launch.

    q' = [q * q_mult | f | low | 1 1 | 0]        f = q_factor * factor_mult
    k' = [k          | k_factor | k_factor | p   | 0]

so that (q' . k') * softmax_scale = q . k * scale + q_factor . k_factor + key_padding. `low` is what f loses
by being rounded, `p` the key padding in two columns (rounded, and what that lost). Without Triton, the same
in plain PyTorch.
"""
from __future__ import annotations

import contextlib
import os
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# A score that ends as a weight of zero. Minus infinity would make NaN of the zeros it is multiplied with.
MASKED = -60000.0
PADDING_COLUMNS = 2


class Plan(NamedTuple):
    """How q, k and the terms become columns. Attention over them must be given softmax_scale."""

    q_mult: float
    factor_mult: float
    low: bool
    softmax_scale: float
    width: int


class Joined(torch.autograd.Function):
    """(q', k') of shapes (B, M, H, width) and (B, N, H, width). No gradient reaches key_padding."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor],
        key_padding: Optional[Tensor], plan: Plan,
    ) -> Tuple[Tensor, Tensor]:
        ctx.plan, ctx.head_dim = plan, q.shape[-1]
        ctx.factor_shapes = None if q_factor is None else (q_factor.shape, k_factor.shape)
        join = _join if _launches(q) else _join_in_torch
        return join(q, k, q_factor, k_factor, key_padding, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        D, plan = ctx.head_dim, ctx.plan
        need = ctx.needs_input_grad
        parts: List[Optional[Part]] = [
            Part(q_grad, q_grad.shape[:3] + (D,), 0, plan.q_mult) if need[0] else None,
            Part(k_grad, k_grad.shape[:3] + (D,), 0, 1.0) if need[1] else None,
            Part(q_grad, ctx.factor_shapes[0], D, plan.factor_mult) if need[2] else None,
            # The low columns hold a rounding error: the gradient through them is below half precision's own.
            Part(k_grad, ctx.factor_shapes[1], D, 1.0) if need[3] else None,
        ]
        return (*split(parts), None, None)


def join(
    q: Tensor,
    k: Tensor,
    q_factor: Optional[Tensor],
    k_factor: Optional[Tensor],
    key_padding: Optional[Tensor],
    plan: Plan,
) -> Tuple[Tensor, Tensor]:
    """q' and k' as above, differentiable in q, k and the factors.

    q (B, M, H, D), k (B, N, H, D); q_factor (B|1, M, H|1, R), k_factor (B|1, N, H|1, R), all of one dtype and
    any strides; key_padding (B, N), bool with True = masked out, or floating and added.
    """
    return Joined.apply(q, k, q_factor, k_factor, key_padding, plan)


class Part(NamedTuple):
    """mult * columns first .. first + shape[-1] of `grad` (B, L, H, W), summed over what is 1 in `shape`."""

    grad: Tensor
    shape: Tuple[int, ...]
    first: int
    mult: float

    @property
    def is_view(self) -> bool:
        return self.mult == 1.0 and tuple(self.shape[:3]) == tuple(self.grad.shape[:3])

    def columns(self) -> Tensor:
        return self.grad[..., self.first : self.first + self.shape[-1]]

    def in_torch(self) -> Tensor:
        return (self.columns().float().sum_to_size(self.shape) * self.mult).to(self.grad.dtype)


def split(parts: List[Optional[Part]]) -> List[Optional[Tensor]]:
    """The parts' values: views of what is neither scaled nor summed, one launch for the others."""
    rest = [part for part in parts if part is not None and not part.is_view]
    launch = bool(rest) and _launches(rest[0].grad)
    sums = iter(_sum(rest) if launch else [part.in_torch() for part in rest])
    return [None if part is None else part.columns() if part.is_view else next(sums) for part in parts]


def _launches(tensor: Tensor) -> bool:
    """Whether the Triton kernels can be used: on CUDA, or interpreted."""
    return triton is not None and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def _join_in_torch(
    q: Tensor,
    k: Tensor,
    q_factor: Optional[Tensor],
    k_factor: Optional[Tensor],
    key_padding: Optional[Tensor],
    plan: Plan,
) -> Tuple[Tensor, Tensor]:
    q_columns, k_columns = [(q.float() * plan.q_mult).to(q.dtype)], [k]
    if q_factor is not None and k_factor is not None:
        exact = q_factor.float() * plan.factor_mult
        high = exact.to(q.dtype)
        q_columns.append(high)
        k_columns.append(k_factor)
        if plan.low:
            q_columns.append((exact - high.float()).to(q.dtype))
            k_columns.append(k_factor)
    if key_padding is not None:
        added = _padding_values(key_padding, plan)[:, :, None, None]
        high = added.to(q.dtype)
        q_columns.append(q.new_ones(1, 1, 1, PADDING_COLUMNS))
        k_columns += [high, (added - high.float()).to(q.dtype)]
    return _wide(q_columns, plan.width), _wide(k_columns, plan.width)


def _padding_values(key_padding: Tensor, plan: Plan) -> Tensor:
    if key_padding.dtype is torch.bool:
        return key_padding.float() * MASKED
    return (key_padding.float() / plan.softmax_scale).clamp(MASKED, -MASKED)


def _wide(columns: List[Tensor], width: int) -> Tensor:
    lead = columns[0].shape[:3]
    joined = torch.cat([c.expand(*lead, -1) for c in columns], -1)
    return F.pad(joined, (0, width - joined.shape[-1]))


if triton is not None:

    @triton.jit
    def _write_rows(
        x, factor, padding, out, block, rows, length, heads,
        x_b, x_l, x_h, x_d, f_b, f_l, f_h, f_d, p_b, p_l, x_mult, f_mult, p_mult,
        QUERIES: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, PADDING: tl.constexpr,
        MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Rows of q' or k', in the order (batch, position, head)."""
        row = block * ROWS + tl.arange(0, ROWS)
        col = tl.arange(0, BLOCK)[None, :]
        inside = row < rows
        head = (row % heads).to(tl.int64)[:, None]
        position = (row // heads % length).to(tl.int64)[:, None]
        batch = (row // heads // length).to(tl.int64)[:, None]
        within = inside[:, None]
        dtype = out.dtype.element_ty
        source = x + batch * x_b + position * x_l + head * x_h + col * x_d
        value = tl.load(source, mask=within & (col < D), other=0.0).to(tl.float32)
        if QUERIES:
            value = value * x_mult
        if R > 0:
            rank = col - D
            second = rank >= R
            if LOW:
                rank = tl.where(second, rank - R, rank)
            taken = (col >= D) & (rank < R)
            source = factor + batch * f_b + position * f_l + head * f_h + rank * f_d
            term = tl.load(source, mask=within & taken, other=0.0).to(tl.float32)
            if QUERIES:
                term = term * f_mult
                if LOW:
                    term = tl.where(second, term - term.to(dtype).to(tl.float32), term)
            value = tl.where(taken, term, value)
        if PADDING > 0:
            first = D + R * (1 + LOW)
            if QUERIES:
                value = tl.where((col == first) | (col == first + 1), 1.0, value)
            else:
                added = tl.load(padding + batch * p_b + position * p_l, mask=within, other=0).to(tl.float32)
                if PADDING == 1:  # boolean
                    added = added * MASKED
                else:
                    added = added * p_mult
                    added = tl.where(added < MASKED, MASKED, added)
                    added = tl.where(added > -MASKED, -MASKED, added)
                high = added.to(dtype).to(tl.float32)
                value = tl.where(col == first, high, tl.where(col == first + 1, added - high, value))
        target = out + row.to(tl.int64)[:, None] * WIDTH + col
        tl.store(target, value.to(dtype), mask=within & (col < WIDTH))

    @triton.jit
    def _join_kernel(
        q, q_factor, q_out, q_blocks, q_rows, M, q_b, q_l, q_h, q_d, qf_b, qf_l, qf_h, qf_d,
        k, k_factor, k_out, padding, k_rows, N, k_b, k_l, k_h, k_d, kf_b, kf_l, kf_h, kf_d, p_b, p_l,
        q_mult, factor_mult, p_mult, heads,
        D: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr, PADDING: tl.constexpr, MASKED: tl.constexpr,
        WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        if block < q_blocks:
            _write_rows(
                q, q_factor, padding, q_out, block, q_rows, M, heads,
                q_b, q_l, q_h, q_d, qf_b, qf_l, qf_h, qf_d, p_b, p_l, q_mult, factor_mult, p_mult,
                True, D, R, LOW, PADDING, MASKED, WIDTH, BLOCK, ROWS,
            )  # fmt: skip
        else:
            _write_rows(
                k, k_factor, padding, k_out, block - q_blocks, k_rows, N, heads,
                k_b, k_l, k_h, k_d, kf_b, kf_l, kf_h, kf_d, p_b, p_l, q_mult, factor_mult, p_mult,
                False, D, R, LOW, PADDING, MASKED, WIDTH, BLOCK, ROWS,
            )  # fmt: skip

    @triton.jit
    def _sum_rows(
        grad, out, block, rows, length, g_b, g_l, g_h, g_d, first, mult,
        HEADS: tl.constexpr, COLUMNS: tl.constexpr, SUM_B: tl.constexpr, SUM_H: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Rows of out (b, length, HEADS, COLUMNS), contiguous: mult * sum of grad over SUM_B and SUM_H."""
        row = block * ROWS + tl.arange(0, ROWS)
        col = tl.arange(0, BLOCK)[None, :]
        within = (row < rows)[:, None] & (col < COLUMNS)
        head = (row % HEADS).to(tl.int64)[:, None]
        position = (row // HEADS % length).to(tl.int64)[:, None]
        batch = (row // HEADS // length).to(tl.int64)[:, None]
        source = grad + batch * g_b + position * g_l + head * g_h + (col + first) * g_d
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for _ in range(SUM_B):
            here = source
            for _ in range(SUM_H):
                total += tl.load(here, mask=within, other=0.0).to(tl.float32)
                here += g_h
            source += g_b
        target = out + row.to(tl.int64)[:, None] * COLUMNS + col
        tl.store(target, (total * mult).to(out.dtype.element_ty), mask=within)

    @triton.jit
    def _sum_kernel(
        grad0, out0, blocks0, rows0, length0, b0, l0, h0, d0, first0, mult0,
        grad1, out1, blocks1, rows1, length1, b1, l1, h1, d1, first1, mult1,
        grad2, out2, rows2, length2, b2, l2, h2, d2, first2, mult2,
        HEADS0: tl.constexpr, COLUMNS0: tl.constexpr, BLOCK0: tl.constexpr, SUM_B0: tl.constexpr,
        SUM_H0: tl.constexpr,
        HEADS1: tl.constexpr, COLUMNS1: tl.constexpr, BLOCK1: tl.constexpr, SUM_B1: tl.constexpr,
        SUM_H1: tl.constexpr,
        HEADS2: tl.constexpr, COLUMNS2: tl.constexpr, BLOCK2: tl.constexpr, SUM_B2: tl.constexpr,
        SUM_H2: tl.constexpr,
        ROWS: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        if block < blocks0:
            _sum_rows(grad0, out0, block, rows0, length0, b0, l0, h0, d0, first0, mult0,
                      HEADS0, COLUMNS0, SUM_B0, SUM_H0, BLOCK0, ROWS)  # fmt: skip
        elif block < blocks0 + blocks1:
            _sum_rows(grad1, out1, block - blocks0, rows1, length1, b1, l1, h1, d1, first1, mult1,
                      HEADS1, COLUMNS1, SUM_B1, SUM_H1, BLOCK1, ROWS)  # fmt: skip
        else:
            _sum_rows(grad2, out2, block - blocks0 - blocks1, rows2, length2, b2, l2, h2, d2, first2, mult2,
                      HEADS2, COLUMNS2, SUM_B2, SUM_H2, BLOCK2, ROWS)  # fmt: skip


ROWS = 32  # of one program: 32 rows of 48 to 128 halves, 3 to 8 KiB


def _strides(tensor: Optional[Tensor]) -> Tuple[int, ...]:
    """Strides with 0 where an axis before the last is shared."""
    if tensor is None:
        return 0, 0, 0, 1
    *lead, last = tensor.stride()
    return (*(0 if size == 1 else stride for size, stride in zip(tensor.shape, lead)), last)


def _join(
    q: Tensor,
    k: Tensor,
    q_factor: Optional[Tensor],
    k_factor: Optional[Tensor],
    key_padding: Optional[Tensor],
    plan: Plan,
) -> Tuple[Tensor, Tensor]:
    B, M, H, D = q.shape
    N = k.shape[1]
    q_out, k_out = q.new_empty(B, M, H, plan.width), k.new_empty(B, N, H, plan.width)
    q_blocks, k_blocks = -(-q_out.numel() // (plan.width * ROWS)), -(-k_out.numel() // (plan.width * ROWS))
    kind = 0 if key_padding is None else 1 if key_padding.dtype is torch.bool else 2
    padding = key_padding.view(torch.uint8) if kind == 1 and key_padding is not None else key_padding
    p_b, p_l = (0, 0) if padding is None else (padding.stride(0), padding.stride(1))
    with _on_device(q):
        _join_kernel[(q_blocks + k_blocks,)](
            q, q if q_factor is None else q_factor, q_out, q_blocks, B * M * H, M,
            *_strides(q), *_strides(q_factor),
            k, k if k_factor is None else k_factor, k_out, k if padding is None else padding, B * N * H, N,
            *_strides(k), *_strides(k_factor), p_b, p_l,
            plan.q_mult, plan.factor_mult, 1.0 / plan.softmax_scale, H,
            D=D, R=0 if q_factor is None else q_factor.shape[-1], LOW=int(plan.low), PADDING=kind,
            MASKED=MASKED, WIDTH=plan.width, BLOCK=triton.next_power_of_2(plan.width), ROWS=ROWS,
        )  # fmt: skip
    return q_out, k_out


def _sum(parts: List[Part]) -> List[Tensor]:
    """At most three parts: k's own gradient is always a view."""
    outs = [part.grad.new_empty(part.shape) for part in parts]
    arguments: List[Any] = []
    constants = {}
    total = 0
    for i in range(3):
        part, out = (parts[i], outs[i]) if i < len(parts) else (parts[0], outs[0])
        (b, length, heads, columns), (B, _, H, _) = part.shape, part.grad.shape
        rows = b * length * heads
        blocks = -(-rows // ROWS) if i < len(parts) else 0
        total += blocks
        arguments += [part.grad, out, *([blocks] if i < 2 else []), rows, length]
        arguments += [*part.grad.stride(), part.first, part.mult]
        block = triton.next_power_of_2(columns)
        sizes = {"HEADS": heads, "COLUMNS": columns, "SUM_B": B // b, "SUM_H": H // heads, "BLOCK": block}
        constants.update({f"{name}{i}": size for name, size in sizes.items()})
    with _on_device(parts[0].grad):
        _sum_kernel[(total,)](*arguments, **constants, ROWS=ROWS)
    return outs


def _on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
