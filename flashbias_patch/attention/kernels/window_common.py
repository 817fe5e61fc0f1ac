"""Device functions of the kernels with windows: patches of keys (window_patches.py), windows of
queries, and the tables of both.

In a patch the window of a query is a product of a factor of the row and a factor of the column. In
a tile of scores a thread has few different ones: one multiply-add per score. The kernels at the end
make the tables, once for the centres of a bias. Imports nothing but Triton.
"""

import triton
import triton.language as tl

from .common import bounded, wide

FAR = tl.constexpr(-1e6)  # the centre of a window that reaches no cell
# Bound of window weights, and of their distances from each other: see window_lift.
LIMIT = tl.constexpr(32768.0)
VALUES = tl.constexpr(9)  # columns of FRAMES: window_patches.FrameTables
PADDING = tl.constexpr(8)
EDGE = tl.constexpr(8)


@triton.jit
def frame_offsets(FRAME, lanes):
    """Row and column in the patch of each lane, and the offset of its key from the patch's key. A
    frame of fewer than 8 rows or columns ends with its patch; in place of cells before the frame
    are its first."""
    place_r = lanes % 64 // 8
    place_c = lanes % 8
    columns = tl.load(FRAME + 2)
    rows = tl.load(FRAME + 3)
    row = tl.maximum(place_r - tl.maximum(EDGE - rows, 0), 0)
    offsets = row * columns + tl.maximum(place_c - tl.maximum(EDGE - columns, 0), 0)
    return place_r, place_c, offsets


@triton.jit
def patch_range(FRAME, COUNTS, f, split, splits):
    """The entries of LIST that a program visits in a frame: its share, an even number."""
    count = tl.load(COUNTS + f)
    share = (tl.cdiv(count, splits) + 1) // 2 * 2
    lo = tl.load(FRAME) + tl.minimum(split * share, count)
    hi = tl.minimum(lo + share, tl.load(FRAME) + count)
    return lo, hi


@triton.jit
def split_word(words):
    """The low and the high half of a patch's word (window_patches.py)."""
    return words.to(tl.int32), (words >> 32).to(tl.int32)


@triton.jit
def first_key(low):
    return low & 0x0FFFFFFF


@triton.jit
def unpack(low, high, low2, high2, lanes, PAIR: tl.constexpr):
    """Row and column (float32) of each lane's patch, rows and columns at its beginning that are
    another patch's."""
    row = (high & 0xFFFF).to(tl.float32)
    column = ((high >> 16) & 0xFFF).to(tl.float32)
    above = (low >> 28) & 7
    left = (high >> 28) & 15
    if PAIR:
        first = lanes < 64
        row = tl.where(first, row, (high2 & 0xFFFF).to(tl.float32))
        column = tl.where(first, column, ((high2 >> 16) & 0xFFF).to(tl.float32))
        above = tl.where(first, above, (low2 >> 28) & 7)
        left = tl.where(first, left, (high2 >> 28) & 15)
    else:
        nil = lanes * 0
        row += nil.to(tl.float32)
        column += nil.to(tl.float32)
        above += nil
        left += nil
    return row, column, above, left


@triton.jit
def is_cut(low, high, low2, high2, PAIR: tl.constexpr):
    """Not 0 where a patch holds keys that are not its own."""
    cut = ((low >> 28) & 7) | ((high >> 28) & 15)
    if PAIR:
        cut = cut | ((low2 >> 28) & 7) | ((high2 >> 28) & 15)
    return cut


@triton.jit
def own_keys(low, high, low2, high2, lanes, place_r, place_c, PAIR: tl.constexpr):
    """True for each lane whose key is its patch's own."""
    _, _, above, left = unpack(low, high, low2, high2, lanes, PAIR)
    return (place_r >= above) & (place_c >= left)


@triton.jit
def patch_keys(low, low2, offsets, lanes, PAIR: tl.constexpr):
    """The key of each lane."""
    if PAIR:
        return tl.where(lanes < 64, first_key(low), first_key(low2)) + offsets
    else:
        return first_key(low) + offsets


@triton.jit
def patch_tile(
    BASE,
    stride,
    low,
    low2,
    offsets,
    lanes,
    COLS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    PAIR: tl.constexpr,
):
    """The rows of a patch's keys. `offsets` of the lanes from its first key, times `stride`."""
    key = first_key(low)
    if PAIR:
        step = wide(first_key(low2) - key) * stride
        pointers = (
            BASE
            + wide(key) * stride
            + tl.where(lanes < 64, offsets.to(tl.int64), offsets + step)[:, None]
        )
    else:
        pointers = BASE + wide(key) * stride + offsets[:, None]
    cols = tl.arange(0, BLOCK_COLS)
    if COLS != BLOCK_COLS:
        return tl.load(pointers + cols[None, :], mask=(cols < COLS)[None, :], other=0.0)
    else:
        return tl.load(pointers + cols[None, :])


@triton.jit
def profile(distance, half, width, skew, GAUSS: tl.constexpr):
    """The factor of a row or column at that distance from a window's middle, which is `skew` from
    its centre."""
    if GAUSS:
        centred = distance + skew
        return tl.where(tl.abs(distance) <= half, tl.exp2(centred * centred * width), 0.0)
    else:
        return tl.where(tl.abs(distance) <= half, 1.0, 0.0)


@triton.jit
def distances(low, high, low2, high2, lanes, place_r, place_c, row, column, PAIR: tl.constexpr):
    """(queries, keys): rows and columns from the centres `row` and `column` of the queries'
    windows."""
    first_row, first_column, _, _ = unpack(low, high, low2, high2, lanes, PAIR)
    dr = (first_row + place_r.to(tl.float32))[None, :] - row[:, None]
    dc = (first_column + place_c.to(tl.float32))[None, :] - column[:, None]
    return dr, dc


@triton.jit
def in_window(
    low, high, low2, high2, lanes, place_r, place_c, row, column, half, PAIR: tl.constexpr
):  # fmt: skip
    """(queries, keys): True inside the queries' windows."""
    dr, dc = distances(low, high, low2, high2, lanes, place_r, place_c, row, column, PAIR)
    return (tl.abs(dr) <= half) & (tl.abs(dc) <= half)


@triton.jit
def window_bias(
    low, high, low2, high2, lanes, place_r, place_c, row, column, half, width, skew, held,
    PAIR: tl.constexpr,
    GAUSS: tl.constexpr,
):  # fmt: skip
    """(queries, keys): the weights `held` times the profile."""
    dr, dc = distances(low, high, low2, high2, lanes, place_r, place_c, row, column, PAIR)
    return profile(dr, half, width, skew, GAUSS) * (
        profile(dc, half, width, skew, GAUSS) * held[:, None]
    )


@triton.jit
def load_centres(CENTRES, rows):
    return tl.load(CENTRES + 2 * rows), tl.load(CENTRES + 2 * rows + 1)


@triton.jit
def half_side(FRAME, which):
    """Half the distance between a window's first and last row; `which`: 5 for the bias, 6 for the
    mask."""
    return (tl.load(FRAME + which) - 1).to(tl.float32) * 0.5


@triton.jit
def middle_skew(FRAME, which):
    """The distance from a window's centre to its middle: half a cell if the side is even."""
    return (1 - tl.load(FRAME + which) % 2).to(tl.float32) * 0.5


@triton.jit
def window_lift(WEIGHTS, stride, places, CENTRES, frame_stride, rows, F: tl.constexpr):
    """A row's largest window weight, at least 0. Where it is beyond LIMIT, window_weight shifts the
    row's weights so that it is LIMIT: with keys that are so far below it, attention gives the same,
    and lse keeps its digits."""
    top = tl.zeros([rows.shape[0]], dtype=tl.float32)
    for f in tl.static_range(F):
        there = tl.load(CENTRES + f * frame_stride + 2 * rows) > FAR
        weight = tl.load(WEIGHTS + places * stride + f).to(tl.float32)
        top = tl.where(there & (weight > top), weight, top)
    return top


@triton.jit
def window_weight(WEIGHTS, stride, places, lift, unit):
    """The weight of each row's window, in units of the scores' products."""
    weight = tl.load(WEIGHTS + places * stride).to(tl.float32)
    weight = tl.where(lift > LIMIT, weight - lift + LIMIT, weight)
    weight = tl.where(weight < -LIMIT, -LIMIT, weight)
    return tl.where(weight > LIMIT, LIMIT, weight) * unit  # of a window that is nowhere


@triton.jit
def segment_weight(W, stride, places):
    return bounded(tl.load(W + places * stride))


@triton.jit
def largest_segment(W, stride, places, SEGMENTS: tl.constexpr):
    """As common.largest_weight."""
    top = tl.full([places.shape[0]], float("-inf"), dtype=tl.float32)
    for segment in tl.static_range(SEGMENTS):
        top = tl.maximum(top, segment_weight(W + segment, stride, places))
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def load_rows(BASE, stride, places, inside, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Rows of a matrix at `places`, zeros where not `inside` and from column COLS."""
    cols = tl.arange(0, BLOCK_COLS)
    pointers = BASE + places.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(pointers, mask=inside[:, None] & (cols < COLS)[None, :], other=0.0)


@triton.jit
def store_rows(BASE, stride, places, inside, tile, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    cols = tl.arange(0, BLOCK_COLS)
    pointers = BASE + places.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(
        pointers, tile.to(BASE.dtype.element_ty), mask=inside[:, None] & (cols < COLS)[None, :]
    )


@triton.jit
def pair_pointers(BASE, stride, places, keys):
    """(queries, keys) of a mask or dense bias."""
    return BASE + places.to(tl.int64)[:, None] * stride + keys[None, :]


@triton.jit
def _reaches(view, row, column, FRAME, which):
    """True if the window around a centre has a cell in its frame."""
    side = tl.load(FRAME + which)
    first = side // 2 - side + 1
    last = side // 2
    by_row = (row + last >= 0) & (row + first < tl.load(FRAME + 3))
    by_column = (column + last >= 0) & (column + first < tl.load(FRAME + 2))
    return (view >= 0) & (view < tl.load(FRAME + 8)) & by_row & by_column


@triton.jit
def _spread(x):
    """The bits of a number below 2^16, a zero after each."""
    x = (x | (x << 8)) & 0x00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F
    x = (x | (x << 2)) & 0x33333333
    return (x | (x << 1)) & 0x55555555


@triton.jit
def places_kernel(CENTRES, FRAMES, CODES, M, c_b, c_m, which, F: tl.constexpr, BLOCK: tl.constexpr):
    """CODES (B, M) int64, in whose order neighbours in the first frame that a window is in are
    neighbours."""
    blocks = tl.cdiv(M, BLOCK)
    b = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < M
    code = tl.full([BLOCK], 1 << 62, dtype=tl.int64)
    for i in tl.static_range(F):
        f = F - 1 - i
        FRAME = FRAMES + VALUES * f
        pointers = CENTRES + wide(b) * c_b + rows * c_m + 3 * f
        view = tl.load(pointers, mask=inside, other=-1)
        row = tl.load(pointers + 1, mask=inside, other=0)
        column = tl.load(pointers + 2, mask=inside, other=0)
        there = _reaches(view, row, column, FRAME, which)
        row = tl.minimum(tl.maximum(row, 0), tl.load(FRAME + 3) - 1)
        column = tl.minimum(tl.maximum(column, 0), tl.load(FRAME + 2) - 1)
        morton = _spread(row.to(tl.int64)) * 2 + _spread(column.to(tl.int64))
        code = tl.where(there, (wide(f) << 50) + (view.to(tl.int64) << 32) + morton, code)
    tl.store(CODES + wide(b) * M + rows, code, mask=inside)


@triton.jit
def centres_kernel(
    CENTRES, ORDER, FRAMES, OUT, B, M, padded, c_b, c_m, o_b, which, F: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """OUT (F, B, padded, 2) float32: row and column of the middles of windows, queries in ORDER
    (B|1, padded); FAR where there is none."""
    blocks = padded // BLOCK
    b = tl.program_id(0) // blocks
    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    places = tl.load(ORDER + wide(b) * o_b + rows)
    for f in tl.static_range(F):
        FRAME = FRAMES + VALUES * f
        pointers = CENTRES + wide(b) * c_b + places * c_m + 3 * f
        view = tl.load(pointers)
        row = tl.load(pointers + 1)
        column = tl.load(pointers + 2)
        there = _reaches(view, row, column, FRAME, which) & (rows < M)
        skew = middle_skew(FRAME, which)
        row = row.to(tl.float32) + (view * tl.load(FRAME + 7) + EDGE).to(tl.float32) + skew
        target = OUT + ((wide(f) * B + b) * padded + rows) * 2
        tl.store(target, tl.where(there, row, FAR))
        tl.store(target + 1, tl.where(there, (column + EDGE).to(tl.float32) + skew, FAR))


@triton.jit
def lists_kernel(
    CENTRES, FRAMES, PATCHES, LIST, NUMBERS, COUNTS, FLAGS, B, padded, blocks, P, which,
    F: tl.constexpr, COMPACT: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each block of queries and frame: LIST (B, blocks, P) the words of patches, COUNTS (B,
    blocks, F) how many; FLAGS (B, blocks, P) whether a window touches a patch. COMPACT: only the
    touched ones, with their NUMBERS, laid out as LIST; else all, with a flag in the word."""
    f = tl.program_id(0) % F
    block = tl.program_id(0) // F
    b = block // blocks
    rows = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    FRAME = FRAMES + VALUES * f
    first = tl.load(FRAME)
    number = tl.load(FRAME + 1)
    half = half_side(FRAME, which)
    row, column = load_centres(CENTRES + (wide(f) * B + b) * padded * 2, rows)
    row = row[:, None]
    column = column[:, None]
    base = wide(block) * P
    count = first
    for start in range(0, number, CHUNK):
        place = start + tl.arange(0, CHUNK)
        inside = place < number
        words = tl.load(PATCHES + first + place, mask=inside, other=0)
        low, high = split_word(words)
        top, left, above, before = unpack(low, high, low, high, place, False)
        exists = inside & (before != PADDING)
        begins = (top + above.to(tl.float32))[None, :]
        touched = (row + half >= begins) & (row - half <= (top + 7.0)[None, :])
        begins = (left + before.to(tl.float32))[None, :]
        touched = touched & (column + half >= begins) & (column - half <= (left + 7.0)[None, :])
        near = (tl.max(touched.to(tl.int32), 0) > 0) & exists
        tl.store(FLAGS + base + first + place, near.to(tl.uint8), mask=inside)
        if COMPACT:
            target = base + count + tl.cumsum(near.to(tl.int32), 0) - 1
            tl.store(LIST + target, words, mask=near)
            tl.store(NUMBERS + target, first + place, mask=near)
            count += tl.sum(near.to(tl.int32), 0)
        else:
            tl.store(LIST + base + first + place, words | (near.to(tl.int64) << 31), mask=inside)
    if COMPACT:
        tl.store(COUNTS + wide(block) * F + f, count - first)
    else:
        tl.store(COUNTS + wide(block) * F + f, number)


@triton.jit
def blocks_kernel(FLAGS, BLOCKS, COUNTS, P, blocks, BLOCK: tl.constexpr):
    """For each patch the blocks of queries with a window that touches it: BLOCKS (B, P, blocks),
    COUNTS (B, P)."""
    programs = tl.cdiv(P, BLOCK)
    b = tl.program_id(0) // programs
    p = (tl.program_id(0) % programs) * BLOCK + tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    for block in range(0, blocks):
        near = tl.load(FLAGS + (wide(b) * blocks + block) * P + p, mask=p < P, other=0) > 0
        tl.store(BLOCKS + (wide(b) * P + p) * blocks + count, count * 0 + block, mask=near)
        count += near.to(tl.int32)
    tl.store(COUNTS + b * P + p, count, mask=p < P)
