"""Casts of up to three tensors in one launch, and the power of two by which float16 gradients are
divided (fp16_gradients.py). Imports nothing but Triton."""

import triton
import triton.language as tl


@triton.jit
def _offsets(row, length, heads, x_b, x_l, x_h):
    """Where rows (batch, position, head) of a strided tensor (B, L, H, D) begin."""
    place = row // heads
    return (
        (place // length).to(tl.int64) * x_b
        + (place % length).to(tl.int64) * x_l
        + (row % heads).to(tl.int64) * x_h
    )


@triton.jit
def _cast_rows(
    X, Y, x_b, x_l, x_h, length, heads, rows, program, mult,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program's rows of X (B, L, H, D) strided, times mult, into Y contiguous."""
    row = program * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows)[:, None] & (cols < D)
    start = _offsets(row, length, heads, x_b, x_l, x_h)
    tile = tl.load(X + start[:, None] + cols, mask=inside, other=0.0).to(tl.float32) * mult
    tl.store(Y + row.to(tl.int64)[:, None] * D + cols, tile.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def cast_kernel(
    X0, Y0, X1, Y1, X2, Y2, POWER,
    x0_b, x0_l, x0_h, length0, heads0, rows0, x1_b, x1_l, x1_h, length1, heads1, rows1,
    x2_b, x2_l, x2_h, length2, heads2, rows2, first1, first2,
    SCALED: tl.constexpr, D0: tl.constexpr, BLOCK0: tl.constexpr, D1: tl.constexpr,
    BLOCK1: tl.constexpr, D2: tl.constexpr, BLOCK2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """X0, X1 and X2, times POWER if SCALED, into Y0, Y1 and Y2 of another dtype. Programs from
    first1 on do X1, from first2 on X2."""
    pid = tl.program_id(0)
    mult = 1.0
    if SCALED:
        mult = tl.load(POWER)
    if pid < first1:
        _cast_rows(X0, Y0, x0_b, x0_l, x0_h, length0, heads0, rows0, pid, mult, D0, BLOCK0, ROWS)
    elif pid < first2:
        program = pid - first1
        _cast_rows(
            X1, Y1, x1_b, x1_l, x1_h, length1, heads1, rows1, program, mult, D1, BLOCK1, ROWS
        )  # fmt: skip
    else:
        program = pid - first2
        _cast_rows(
            X2, Y2, x2_b, x2_l, x2_h, length2, heads2, rows2, program, mult, D2, BLOCK2, ROWS
        )  # fmt: skip


@triton.jit
def peaks_kernel(
    X, PEAKS, x_b, x_l, x_h, length, heads, rows, blocks, programs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bits of the largest magnitude in every `programs`-th block of rows, for each program. As
    integers, magnitudes have the order of their numbers, with nan above infinity."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)[None, :]
    peak = tl.zeros([ROWS], dtype=tl.int32)
    for block in range(pid, blocks, programs):
        row = block * ROWS + tl.arange(0, ROWS)
        start = _offsets(row, length, heads, x_b, x_l, x_h)
        inside = (row < rows)[:, None] & (cols < D)
        tile = tl.load(X + start[:, None] + cols, mask=inside, other=0.0).to(tl.float32)
        bits = tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        peak = tl.maximum(peak, tl.max(bits, 1))
    tl.store(PEAKS + pid, tl.max(peak, 0))


@triton.jit
def divide_kernel(
    X, Y, PEAKS, POWER, x_b, x_l, x_h, length, heads, rows, peaks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_PEAKS: tl.constexpr,
):  # fmt: skip
    """X / POWER into Y. POWER is fp16_gradients.power_for of the largest of PEAKS: its exponent
    is between 1 and 253: its inverse has the exponent 254 minus that, and is exact."""
    pid = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_PEAKS)
    peak = tl.max(tl.load(PEAKS + lanes, mask=lanes < peaks, other=0), 0)
    bits = (peak & 0x7F800000) - (2 << 23)
    bits = tl.maximum(bits, 1 << 23)
    if pid == 0:
        tl.store(POWER, bits.to(tl.float32, bitcast=True))
    inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
    _cast_rows(X, Y, x_b, x_l, x_h, length, heads, rows, pid, inverse, D, BLOCK_D, ROWS)
