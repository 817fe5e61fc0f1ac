"""Sums over what split or shared programs wrote, up to three tensors in one launch. Imports nothing
but Triton."""

import triton
import triton.language as tl


@triton.jit
def _sum_rows(
    PARTS, OUT, program, count, stride, batch_stride, length, total,
    HEADS: tl.constexpr, SUM_H: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Rows (batch, length, HEADS) of OUT: the sum of `count` parts, and of SUM_H heads in each."""
    rows = program * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (cols < COLUMNS)[None, :]
    place = rows // HEADS
    source = (place // length).to(tl.int64) * batch_stride
    source += ((place % length).to(tl.int64) * (HEADS * SUM_H) + rows % HEADS) * COLUMNS
    pointers = PARTS + source[:, None] + cols[None, :]
    sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for _ in range(0, count):
        for head in tl.static_range(SUM_H):  # unrolled: the loads are in flight together
            sums += tl.load(pointers + head * COLUMNS, mask=inside, other=0.0).to(tl.float32)
        pointers += stride
    target = OUT + rows.to(tl.int64)[:, None] * COLUMNS + cols[None, :]
    tl.store(target, sums.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    PARTS0, OUT0, PARTS1, OUT1, PARTS2, OUT2, first1, first2,
    count0, stride0, batch0, length0, total0, count1, stride1, batch1, length1, total1,
    count2, stride2, batch2, length2, total2,
    HEADS0: tl.constexpr, SUM_H0: tl.constexpr, COLUMNS0: tl.constexpr, BLOCK0: tl.constexpr,
    HEADS1: tl.constexpr, SUM_H1: tl.constexpr, COLUMNS1: tl.constexpr, BLOCK1: tl.constexpr,
    HEADS2: tl.constexpr, SUM_H2: tl.constexpr, COLUMNS2: tl.constexpr, BLOCK2: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Programs from first1 on do the second sum, from first2 on the third."""
    pid = tl.program_id(0)
    if pid < first1:
        _sum_rows(
            PARTS0,
            OUT0,
            pid,
            count0,
            stride0,
            batch0,
            length0,
            total0,
            HEADS0,
            SUM_H0,
            COLUMNS0,
            BLOCK0,
            ROWS,
        )
    elif pid < first2:
        _sum_rows(
            PARTS1,
            OUT1,
            pid - first1,
            count1,
            stride1,
            batch1,
            length1,
            total1,
            HEADS1,
            SUM_H1,
            COLUMNS1,
            BLOCK1,
            ROWS,
        )
    else:
        _sum_rows(
            PARTS2,
            OUT2,
            pid - first2,
            count2,
            stride2,
            batch2,
            length2,
            total2,
            HEADS2,
            SUM_H2,
            COLUMNS2,
            BLOCK2,
            ROWS,
        )
