"""Device functions of the forward and backward kernels: tile loads, exponentials, dropout, additive
terms.

Imports nothing but Triton, so that the kernels can be compiled where there is no PyTorch.

Scores are in log2 units: softmax(s) = exp2(s * log2(e) - lse2), one multiply-add and one
exponential per element.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Bound of each additive term: the sum of a dense bias, padding and a segment weight stays finite,
# times log2(e) too.
LARGEST = tl.constexpr(5e37)
# Columns of a tile of factors that has room for lse and delta (Problem.folded).
COLUMNS = tl.constexpr(16)


@triton.jit
def _upper(x):
    """x rounded to the eleven leading bits of its significand, which tf32 keeps. The tensor cores
    would truncate."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc):
    """acc + a b; float32 by three tf32 products, with the error of a float32 product.

    The same as input_precision="tf32x3", but without that option's care for infinities, which costs
    a comparison and a select per element. The sum over tiles is an addition of its own: the tensor
    cores truncate when they add, which over hundreds of tiles amounts to 1e-4.
    """
    if a.dtype == tl.float32:
        a_upper, b_upper = _upper(a), _upper(b)
        product = tl.dot(a - a_upper, b_upper, input_precision="tf32")
        product = tl.dot(a_upper, b - b_upper, product, input_precision="tf32")
        return acc + tl.dot(a_upper, b_upper, product, input_precision="tf32")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def bounded(x):
    """x as float32. Finite numbers stay within +-LARGEST: finfo.min * log2(e) would be -inf, which
    hides a key."""
    x = x.to(tl.float32)
    beyond = (tl.abs(x) > LARGEST) & (tl.abs(x) < float("inf"))
    return tl.where(beyond, tl.where(x > 0, LARGEST, -LARGEST), x)


@triton.jit
def add_terms(
    s, score_scale, dense, padding, weight,
    HAS_DENSE: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """s * score_scale + the additive terms, in log2 units; padding comes in these units, dense and
    weight do not.

    Every step is one explicit fma, so that forward and backward round alike: at -1e9 a difference
    in the last place is a factor of 2^128.
    """
    if HAS_DENSE:
        dense = dense.to(tl.float32) if dense.dtype == tl.float16 else bounded(dense)
        total = tl.fma(dense, LOG2E, padding) if HAS_PADDING else dense * LOG2E
    else:
        total = padding
    if HAS_WEIGHT:
        total = tl.fma(weight, LOG2E, total) if HAS_DENSE or HAS_PADDING else weight * LOG2E
    return tl.fma(s, score_scale, total)


@triton.jit
def load_weights(W, stride, first_row, end, ROWS: tl.constexpr):
    """A segment's weight of each row, float32."""
    return bounded(load_row_values(W, stride, first_row, end, ROWS, 0.0))


@triton.jit
def largest_weight(W, stride, first_row, end, SEGMENTS: tl.constexpr, ROWS: tl.constexpr):
    """The largest of each row's segment weights, 0 if all are -inf. It is subtracted, so that lse
    keeps its digits."""
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for segment in tl.static_range(SEGMENTS):
        top = tl.maximum(top, load_weights(W + segment, stride, first_row, end, ROWS))
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def weights(columns, first):
    """The factors of a number's three parts (`parts`), in the columns from `first` on; zero
    elsewhere."""
    small = tl.where(columns == first + 2, 0.00000095367431640625, 0.0)  # 2^-20, 2^-8, 2^4
    return tl.where(columns == first, 16.0, tl.where(columns == first + 1, 0.00390625, small))


@triton.jit
def parts(tile, columns, first, values, HALF: tl.constexpr):
    """`tile` with each row's value in three columns from `first` on, each in the dtype HALF. Their
    sum, weighted by `weights`, is the value.

    Error in float16: 2^-34 of the value, or 2^-44; values are cut to a million. In bfloat16: 2^-25
    of it.
    """
    limit: tl.constexpr = 1e30 if HALF == tl.bfloat16 else 65504.0  # noqa: SIM300  HALF is a type
    high = tl.minimum(tl.maximum(values * 0.0625, -limit), limit).to(HALF).to(tl.float32)
    rest = values - high * 16.0
    middle = tl.minimum(tl.maximum(rest * 256.0, -limit), limit).to(HALF).to(tl.float32)
    rest -= middle * 0.00390625
    low = tl.minimum(tl.maximum(rest * 1048576.0, -limit), limit).to(HALF).to(tl.float32)
    tile = tl.where(columns == first, high[:, None], tile)
    tile = tl.where(columns == first + 1, middle[:, None], tile)
    return tl.where(columns == first + 2, low[:, None], tile)


@triton.jit
def wide(index):
    """A scalar index as int64, whether Triton sees a tensor, a constant or (interpreted) an int."""
    return (tl.program_id(0) * 0 + index).to(tl.int64)


@triton.jit
def multiples(a, b, c, d, VECTOR: tl.constexpr):
    """The same strides, known to the compiler as multiples of VECTOR elements. By itself it knows
    multiples of 16 only, and would copy heads of 40 columns element by element."""
    return a // VECTOR * VECTOR, b // VECTOR * VECTOR, c // VECTOR * VECTOR, d // VECTOR * VECTOR


@triton.jit
def load_tile(
    base,
    stride,
    start,
    end,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Rows start .. start + ROWS of a row-strided matrix; zeros from row `end` (if EDGE) and from
    column COLS."""
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    pointers = base + wide(start) * stride + rows[:, None] * stride + cols[None, :]
    if EDGE:
        inside = (start + rows < end)[:, None]
        if COLS != BLOCK_COLS:
            inside = inside & (cols < COLS)[None, :]
        return tl.load(pointers, mask=inside, other=0.0)
    elif COLS != BLOCK_COLS:
        return tl.load(pointers, mask=(cols < COLS)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_row_values(base, stride, start, end, ROWS: tl.constexpr, OTHER: tl.constexpr):
    """One value per row, float32, OTHER from row `end` on."""
    rows = tl.arange(0, ROWS)
    return tl.load(
        base + wide(start) * stride + rows * stride, mask=start + rows < end, other=OTHER
    ).to(tl.float32)


@triton.jit
def load_keys(base, keys, end, OTHER: tl.constexpr, EDGE: tl.constexpr):
    """One value per key, OTHER from key `end` on (if EDGE)."""
    if EDGE:
        return tl.load(base + keys, mask=keys < end, other=OTHER)
    else:
        return tl.load(base + keys)


@triton.jit
def pair_tile(
    base,
    stride,
    first_row,
    row_end,
    first_key,
    key_end,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Pointers to a tile (queries, keys) of a matrix, and which of them lie before row_end and (if
    EDGE) key_end.

    Whole tiles have no mask over keys: with one that may differ between neighbours, a row would be
    read element by element.
    """
    rows = tl.arange(0, ROWS)
    keys = tl.arange(0, KEYS)
    pointers = base + wide(first_row) * stride + first_key + rows[:, None] * stride + keys[None, :]
    inside = (first_row + rows < row_end)[:, None]
    if EDGE:
        inside = inside & (first_key + keys < key_end)[None, :]
    return pointers, inside


@triton.jit
def load_pairs(
    base, stride, first_row, row_end, first_key, key_end, OTHER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """A tile (queries, keys) of a mask or dense bias, OTHER from row_end and (if EDGE) from
    key_end."""
    pointers, inside = pair_tile(
        base, stride, first_row, row_end, first_key, key_end, ROWS, KEYS, EDGE
    )
    return tl.load(pointers, mask=inside, other=OTHER)


@triton.jit
def _philox_words(seed, batch_head, row, key):
    """Philox 4x32-7 (Salmon et al., SC11) of each row and key: (.., 2, 2). The last two dimensions
    are the key's bit 3 and the row's."""
    nil = (row + key) * 0
    a, b, c, d = tl.philox(seed, nil + key, nil + row, nil + batch_head, nil, 7)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _threshold(dropout_p):
    return (tl.zeros([1, 1], dtype=tl.float32) + (dropout_p * 65536.0 + 0.5)).to(tl.uint32) << 16


@triton.jit
def keep_tile(
    seed, batch_head, first_row, first_key, dropout_p, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """True for the attention weights of a tile (queries, keys) that dropout keeps. first_row and
    first_key must be multiples of 16.

    Eight weights share a call of Philox, sixteen bits each. Its counter is the row without bit 3,
    the key without bits 3 and 0, and the batch and head; those three bits choose the sixteen. They
    are those that one thread holds in a tile of scores in the tensor cores' layout, so that nothing
    moves between threads.
    """
    row = tl.reshape(tl.arange(0, ROWS // 2), [ROWS // 16, 8, 1, 1])
    key = tl.reshape(tl.arange(0, KEYS // 4), [1, 1, KEYS // 16, 4])
    words = _philox_words(
        seed,
        batch_head,
        first_row + row // 8 * 16 + row % 8,
        first_key + key // 4 * 16 + key % 4 * 2,
    )
    # Dimensions: rows' 16, 8, keys' 16, 4, key bit 3, row bit 3, key bit 0.
    halves = tl.join(words << 16, words & 0xFFFF0000)
    return tl.reshape(tl.permute(halves, (0, 5, 1, 2, 4, 3, 6)), [ROWS, KEYS]) >= _threshold(
        dropout_p
    )


@triton.jit
def keep_tile_by_key(
    seed, batch_head, first_row, first_key, dropout_p, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """keep_tile as (keys, queries). There a thread holds bit 3 of key and row, but not the key's
    bit 0."""
    row = tl.reshape(tl.arange(0, ROWS // 2), [ROWS // 16, 8, 1, 1])
    key = tl.reshape(tl.arange(0, KEYS // 2), [1, 1, KEYS // 16, 8])
    words = _philox_words(
        seed,
        batch_head,
        first_row + row // 8 * 16 + row % 8,
        first_key + key // 8 * 16 + key % 8 // 2 * 2,
    )
    low = tl.reshape(key % 2 == 0, [1, 1, KEYS // 16, 8, 1, 1])
    # Dimensions: rows' 16, 8, keys' 16, 8, key bit 3, row bit 3.
    halves = tl.where(low, words << 16, words & 0xFFFF0000)
    return tl.reshape(tl.permute(halves, (2, 4, 3, 0, 5, 1)), [KEYS, ROWS]) >= _threshold(dropout_p)


@triton.jit
def dropout_shift(first_key, segment):
    """The offset of a segment's keys in dropout, which counts them from a multiple of 16; the
    segment begins at `first_key`."""
    return (first_key + 15) // 16 * 16 + 16 * segment - first_key
