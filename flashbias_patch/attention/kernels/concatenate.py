"""A low-rank bias as more columns of q and k (FlashBias, arXiv 2505.12044, section 3.2), in one
launch.

    q' = [q * q_mult | f | low | 1 1 | 0]        f = q_factor * factor_mult
    k' = [k          | k_factor | k_factor | p   | 0]

so that (q' . k') * softmax_scale = q . k * scale + q_factor . k_factor + key_padding. `low` is what
f loses by being rounded, `p` the key padding in two columns (rounded, and what that lost). Without
Triton, the same in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# A score that ends as a weight of zero. Minus infinity would make NaN of the zeros it is multiplied
# with.
MASKED = -60000.0
PADDING_COLUMNS = 2


class Plan(NamedTuple):
    """The multipliers and sizes of the columns. Attention over them must use softmax_scale."""

    q_mult: float
    factor_mult: float
    low: bool
    softmax_scale: float
    width: int


class Joined(torch.autograd.Function):
    """(q', k') of shapes (B, M, H, width) and (B, N, H, width). No gradient reaches key_padding."""

    if TYPE_CHECKING:  # in some versions of torch it has no annotations

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Tuple[Tensor, Tensor]: ...

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_factor: Optional[Tensor],
        k_factor: Optional[Tensor],
        key_padding: Optional[Tensor],
        plan: Plan,
    ) -> Tuple[Tensor, Tensor]:
        ctx.plan, ctx.head_dim = plan, q.shape[-1]
        if q_factor is not None and k_factor is not None:
            ctx.q_factor_shape, ctx.k_factor_shape = q_factor.shape, k_factor.shape
        join = _join if _launches(q) else _join_in_torch
        return join(q, k, q_factor, k_factor, key_padding, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        D, plan = ctx.head_dim, ctx.plan
        need_q, need_k, need_q_factor, need_k_factor, _, _ = ctx.needs_input_grad
        parts: List[Optional[Part]] = [
            Part(q_grad, q_grad.shape[:3] + (D,), 0, plan.q_mult) if need_q else None,
            Part(k_grad, k_grad.shape[:3] + (D,), 0, 1.0) if need_k else None,
            Part(q_grad, ctx.q_factor_shape, D, plan.factor_mult) if need_q_factor else None,
            # The low columns hold a rounding error: the gradient through them is below half
            # precision's own.
            Part(k_grad, ctx.k_factor_shape, D, 1.0) if need_k_factor else None,
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

    q (B, M, H, D), k (B, N, H, D); q_factor (B|1, M, H|1, R), k_factor (B|1, N, H|1, R), all of one
    dtype and any strides; key_padding (B, N), bool with True = masked out, or floating and added.
    """
    return Joined.apply(q, k, q_factor, k_factor, key_padding, plan)


class Part(NamedTuple):
    """mult * columns first .. first + shape[-1] of `grad` (B, L, H, W), summed over what is 1 in
    `shape`."""

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
    return [
        None if part is None else part.columns() if part.is_view else next(sums) for part in parts
    ]


def _launches(tensor: Tensor) -> bool:
    """True if the Triton kernels can be used: on CUDA, or interpreted."""
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
    return _side_by_side(q_columns, plan.width), _side_by_side(k_columns, plan.width)


def _padding_values(key_padding: Tensor, plan: Plan) -> Tensor:
    if key_padding.dtype is torch.bool:
        return key_padding.float() * MASKED
    return (key_padding.float() / plan.softmax_scale).clamp(MASKED, -MASKED)


def _side_by_side(columns: List[Tensor], width: int) -> Tensor:
    lead = columns[0].shape[:3]
    joined = torch.cat([c.expand(*lead, -1) for c in columns], -1)
    return F.pad(joined, (0, width - joined.shape[-1]))


if triton is not None:

    @triton.jit
    def _index(first, ROWS: tl.constexpr, WIDE: tl.constexpr):
        row = first + tl.arange(0, ROWS)[:, None]
        return row.to(tl.int64) if WIDE else row

    @triton.jit
    def _write_rows(
        x, factor, padding, out, first, rows, x_l, x_h, x_d, f_l, f_h, f_d, p_l, x_mult, f_mult,
        p_mult,
        QUERIES: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        LOW: tl.constexpr,
        PADDING: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_R: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        """Rows (position, head) of one batch row of q' or k'. Pointers are at that batch row."""
        row = _index(first, ROWS, WIDE)
        head = row % HEADS
        position = row // HEADS
        within = row < rows
        dtype = out.dtype.element_ty
        out += row * WIDTH
        col = tl.arange(0, BLOCK_D)[None, :]
        inside = within & (col < D)
        value = tl.load(x + position * x_l + head * x_h + col * x_d, mask=inside, other=0.0)
        if QUERIES:
            value = (value.to(tl.float32) * x_mult).to(dtype)
        tl.store(out + col, value, mask=inside)
        if R > 0:
            col = tl.arange(0, BLOCK_R)[None, :]
            inside = within & (col < R)
            value = tl.load(
                factor + position * f_l + head * f_h + col * f_d, mask=inside, other=0.0
            )
            low = value
            if QUERIES:
                exact = value.to(tl.float32) * f_mult
                value = exact.to(dtype)
                low = (exact - value.to(tl.float32)).to(dtype)
            tl.store(out + D + col, value, mask=inside)
            if LOW:
                tl.store(out + (D + R) + col, low, mask=inside)
        if REST > 0:
            col = tl.arange(0, BLOCK_REST)[None, :]
            rest = tl.zeros((ROWS, BLOCK_REST), dtype=tl.float32)
            if PADDING > 0:
                if QUERIES:
                    rest = tl.where(col < 2, 1.0, rest)
                else:
                    added = tl.load(padding + position * p_l, mask=within, other=0).to(tl.float32)
                    if PADDING == 1:  # boolean
                        added = added * MASKED
                    else:
                        added = added * p_mult
                        added = tl.where(added < MASKED, MASKED, added)
                        added = tl.where(added > -MASKED, -MASKED, added)
                    high = added.to(dtype).to(tl.float32)
                    rest = tl.where(col == 0, high, tl.where(col == 1, added - high, rest))
            tl.store(out + (WIDTH - REST) + col, rest.to(dtype), mask=within & (col < REST))

    @triton.jit
    def _join_kernel(
        q, q_factor, q_out, q_blocks, q_rows, q_b, q_l, q_h, q_d, qf_b, qf_l, qf_h, qf_d,
        k, k_factor, k_out, padding, k_rows, k_b, k_l, k_h, k_d, kf_b, kf_l, kf_h, kf_d, p_b, p_l,
        q_mult, factor_mult, p_mult,
        HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LOW: tl.constexpr,
        PADDING: tl.constexpr,
        MASKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
        REST: tl.constexpr, BLOCK_REST: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        batch = tl.program_id(1).to(tl.int64)
        if block < q_blocks:
            _write_rows(
                q + batch * q_b, q_factor + batch * qf_b, padding, q_out + batch * q_rows * WIDTH,
                block * ROWS, q_rows, q_l, q_h, q_d, qf_l, qf_h, qf_d, p_l, q_mult, factor_mult,
                p_mult,
                True, HEADS, D, R, LOW, PADDING, MASKED, WIDTH, BLOCK_D, BLOCK_R, REST, BLOCK_REST,
                ROWS, WIDE,
            )  # fmt: skip
        else:
            block -= q_blocks
            _write_rows(
                k + batch * k_b, k_factor + batch * kf_b, padding + batch * p_b,
                k_out + batch * k_rows * WIDTH,
                block * ROWS, k_rows, k_l, k_h, k_d, kf_l, kf_h, kf_d, p_l, q_mult, factor_mult,
                p_mult,
                False, HEADS, D, R, LOW, PADDING, MASKED, WIDTH, BLOCK_D, BLOCK_R, REST, BLOCK_REST,
                ROWS, WIDE,
            )  # fmt: skip

    @triton.jit
    def _sum_rows(
        grad, out, first, rows, g_b, g_l, g_h, g_d, mult,
        HEADS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SUM_B: tl.constexpr,
        SUM_H: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """Rows (position, HEADS) of one batch row of out: mult * sum of grad over SUM_B and
        SUM_H."""
        row = _index(first, ROWS, WIDE)
        col = tl.arange(0, BLOCK)[None, :]
        within = (row < rows) & (col < COLUMNS)
        source = grad + (row // HEADS) * g_l + (row % HEADS) * g_h + col * g_d
        total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for _ in range(SUM_B):
            for head in tl.static_range(
                SUM_H
            ):  # unrolled, so that the loads are in flight together
                total += tl.load(source + head * g_h, mask=within, other=0.0).to(tl.float32)
            source += g_b
        tl.store(out + row * COLUMNS + col, (total * mult).to(out.dtype.element_ty), mask=within)

    @triton.jit
    def _sum_kernel(
        grad0, out0, blocks0, rows0, b0, l0, h0, d0, mult0,
        grad1, out1, blocks1, rows1, b1, l1, h1, d1, mult1,
        grad2, out2, blocks2, rows2, b2, l2, h2, d2, mult2,
        B0: tl.constexpr, HEADS0: tl.constexpr, COLUMNS0: tl.constexpr, BLOCK0: tl.constexpr,
        SUM_B0: tl.constexpr, SUM_H0: tl.constexpr,
        B1: tl.constexpr, HEADS1: tl.constexpr, COLUMNS1: tl.constexpr, BLOCK1: tl.constexpr,
        SUM_B1: tl.constexpr, SUM_H1: tl.constexpr,
        B2: tl.constexpr, HEADS2: tl.constexpr, COLUMNS2: tl.constexpr, BLOCK2: tl.constexpr,
        SUM_B2: tl.constexpr, SUM_H2: tl.constexpr,
        ROWS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        block = tl.program_id(0)
        batch = tl.program_id(1).to(tl.int64)
        if block < blocks0:
            if batch < B0:
                grad0 += batch * b0
                out0 += batch * rows0 * COLUMNS0
                _sum_rows(grad0, out0, block * ROWS, rows0, b0, l0, h0, d0, mult0,
                          HEADS0, COLUMNS0, BLOCK0, SUM_B0, SUM_H0, ROWS, WIDE)  # fmt: skip
        elif block < blocks0 + blocks1:
            if batch < B1:
                grad1 += batch * b1
                out1 += batch * rows1 * COLUMNS1
                _sum_rows(grad1, out1, (block - blocks0) * ROWS, rows1, b1, l1, h1, d1, mult1,
                          HEADS1, COLUMNS1, BLOCK1, SUM_B1, SUM_H1, ROWS, WIDE)  # fmt: skip
        elif batch < B2:
            grad2 += batch * b2
            out2 += batch * rows2 * COLUMNS2
            _sum_rows(grad2, out2, (block - blocks0 - blocks1) * ROWS, rows2, b2, l2, h2, d2, mult2,
                      HEADS2, COLUMNS2, BLOCK2, SUM_B2, SUM_H2, ROWS, WIDE)  # fmt: skip


ROWS = 32  # (position, head) rows of one program; 16 to 256 are within 20% on an H200


def _strides(tensor: Optional[Tensor]) -> Tuple[int, ...]:
    """Strides with 0 where an axis before the last is shared."""
    if tensor is None:
        return 0, 0, 0, 1
    *lead, last = tensor.stride()
    return (*(0 if size == 1 else stride for size, stride in zip(tensor.shape, lead)), last)


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last of a batch row: beyond 2**31 offsets need 64 bits."""
    return sum(
        (size - 1) * abs(stride) for size, stride in zip(tensor.shape[1:], tensor.stride()[1:])
    )


def _is_wide(*tensors: Optional[Tensor]) -> bool:
    return any(t is not None and _reach(t) >= 2**31 for t in tensors)


def _join(
    q: Tensor,
    k: Tensor,
    q_factor: Optional[Tensor],
    k_factor: Optional[Tensor],
    key_padding: Optional[Tensor],
    plan: Plan,
) -> Tuple[Tensor, Tensor]:
    B, M, H, D = q.shape
    N, R = k.shape[1], 0 if q_factor is None else q_factor.shape[-1]
    q_out, k_out = q.new_empty(B, M, H, plan.width), k.new_empty(B, N, H, plan.width)
    kind = 0 if key_padding is None else 1 if key_padding.dtype is torch.bool else 2
    padding = (
        key_padding.view(torch.uint8) if kind == 1 and key_padding is not None else key_padding
    )
    p_b, p_l = (0, 0) if padding is None else padding.stride()
    rest = plan.width - D - R * (1 + plan.low)
    q_blocks = triton.cdiv(M * H, ROWS)
    with _on_device(q):
        _join_kernel[(q_blocks + triton.cdiv(N * H, ROWS), B)](
            q, q if q_factor is None else q_factor, q_out, q_blocks, M * H, *_strides(q),
            *_strides(q_factor),
            k, k if k_factor is None else k_factor, k_out, k if padding is None else padding, N * H,
            *_strides(k), *_strides(k_factor), p_b, p_l,
            plan.q_mult, plan.factor_mult, 1.0 / plan.softmax_scale,
            HEADS=H, D=D, R=R, LOW=int(plan.low), PADDING=kind, MASKED=MASKED, WIDTH=plan.width,
            BLOCK_D=triton.next_power_of_2(D), BLOCK_R=triton.next_power_of_2(max(R, 1)),
            REST=rest, BLOCK_REST=triton.next_power_of_2(max(rest, 1)), ROWS=ROWS,
            WIDE=_is_wide(q, k, q_factor, k_factor, q_out, k_out),
        )  # fmt: skip
    return q_out, k_out


def _sum(parts: List[Part]) -> List[Tensor]:
    """At most three parts: k's own gradient is always a view."""
    outs = [part.grad.new_empty(part.shape) for part in parts]
    arguments: List[Any] = []
    constants = {}
    blocks, batch = 0, 0
    for i in range(3):
        part, out = (parts[i], outs[i]) if i < len(parts) else (parts[0], outs[0])
        (b, length, heads, columns), (B, _, H, _) = part.shape, part.grad.shape
        own = triton.cdiv(length * heads, ROWS) if i < len(parts) else 0
        blocks, batch = blocks + own, max(batch, b)
        arguments += [part.columns(), out, own, length * heads, *part.grad.stride(), part.mult]
        sizes = {
            "B": b,
            "HEADS": heads,
            "COLUMNS": columns,
            "BLOCK": triton.next_power_of_2(columns),
        }
        sizes.update(SUM_B=B // b, SUM_H=H // heads)
        constants.update({f"{name}{i}": size for name, size in sizes.items()})
    with _on_device(parts[0].grad):
        wide = _is_wide(*(part.grad for part in parts))
        _sum_kernel[(blocks, batch)](*arguments, **constants, ROWS=ROWS, WIDE=wide)
    return outs


def _on_device(tensor: Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
