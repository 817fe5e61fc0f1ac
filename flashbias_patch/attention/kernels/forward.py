"""Forward: out = softmax(q k^T * scale + bias) v and its logsumexp, a block of queries at a time.

Imports nothing but Triton. The additive terms and their layouts are described in problem.py.
"""

import triton
import triton.language as tl

from .common import (
    LOG2E,
    add_terms,
    bounded,
    dot,
    dropout_shift,
    keep_tile,
    largest_weight,
    load_keys,
    load_pairs,
    load_tile,
    load_weights,
    multiples,
    weights,
    wide,
)


@triton.jit
def next_softmax(
    s, peak, total, score_scale, APART: tl.constexpr, CAN_EMPTY: tl.constexpr
):  # fmt: skip
    """The running softmax after a tile of scores: the tile's exponentials, the factor for sums made
    before, the new peak and total. APART: s is in the peak's units; else times score_scale.
    CAN_EMPTY: a row may have no key yet."""
    row_max = tl.max(s, 1)
    if not APART:
        row_max = row_max * score_scale
    new_peak = tl.maximum(peak, row_max)
    if CAN_EMPTY:
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    else:
        anchor = new_peak
    alpha = tl.exp2(peak - anchor)
    if APART:
        p = tl.exp2(s - anchor[:, None])
    else:
        p = tl.exp2(s * score_scale - anchor[:, None])
    return p, alpha, new_peak, total * alpha + tl.sum(p, 1)


@triton.jit
def _step(
    acc, peak, total, q, qf, weight,
    K, V, KF, DENSE, MASK, PAD, seed, bh,
    k_n, v_n, kf_n, dense_m, mask_m,
    first_row, start, end, shift, M,
    score_scale, dropout_p,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, SEGMENTS: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr,
    PAD_KIND: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax. `weight`: of the segment, for each row, where it
    is not in the peak."""
    k = load_tile(K, k_n, start, end, BLOCK_N, D, BLOCK_D, EDGE)
    s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
    if BLOCK_R > 0:
        kf = load_tile(KF, kf_n, start, end, BLOCK_N, BLOCK_R, BLOCK_R, EDGE)
        s = dot(qf, tl.trans(kf), s)
    keys = start + tl.arange(0, BLOCK_N)
    CAN_EMPTY: tl.constexpr = (HAS_DENSE or HAS_MASK) or PAD_KIND > 0
    if APART:
        dense = s
        padding = s
        if HAS_DENSE:
            dense = load_pairs(
                DENSE, dense_m, first_row, M, start, end, 0.0, BLOCK_M, BLOCK_N, EDGE
            )
        if PAD_KIND == 2:
            padding = (bounded(load_keys(PAD, keys, end, float("-inf"), EDGE)) * LOG2E)[None, :]
        s = add_terms(
            s, score_scale, dense, padding, weight[:, None], HAS_DENSE, PAD_KIND == 2, SEGMENTS > 0
        )
    if HAS_MASK:
        hidden = load_pairs(MASK, mask_m, first_row, M, start, end, 1, BLOCK_M, BLOCK_N, EDGE) != 0
        s = tl.where(hidden, float("-inf"), s)
    if PAD_KIND == 1:
        s = tl.where((load_keys(PAD, keys, end, 1, EDGE) == 0)[None, :], s, float("-inf"))
    elif EDGE and PAD_KIND == 0:
        s = tl.where((keys < end)[None, :], s, float("-inf"))

    p, alpha, new_peak, total = next_softmax(s, peak, total, score_scale, APART, CAN_EMPTY)
    if DROPOUT:
        p = tl.where(
            keep_tile(seed, bh, first_row, start + shift, dropout_p, BLOCK_M, BLOCK_N), p, 0.0
        )
    acc = acc * alpha[:, None]
    v = load_tile(V, v_n, start, end, BLOCK_N, D, BLOCK_D, EDGE)
    acc = dot(p.to(v.dtype), v, acc)
    return acc, new_peak, total


@triton.jit
def store_rounded(OUT, LOW, offsets, value, inside, HAS_LOW: tl.constexpr):
    rounded = value.to(OUT.dtype.element_ty)
    tl.store(OUT + offsets, rounded, mask=inside)
    if HAS_LOW:
        tl.store(
            LOW + offsets, (value - rounded.to(tl.float32)).to(LOW.dtype.element_ty), mask=inside
        )


@triton.jit
def enter_segment(peak, weight):
    """The peak in units of a segment with that weight, too high for any of its scores where the
    weight is -inf."""
    return tl.where(weight == float("-inf"), 3e38, peak - weight)


@triton.jit
def store_lse(
    LSE, first, rows, peak, total, empty, inside, PARTIAL: tl.constexpr, APART: tl.constexpr
):
    """peak + log2(total), or (APART) both of them, for rows first + rows; +inf, or -inf if PARTIAL,
    of an `empty` row."""
    log_total = tl.log2(tl.where(empty, 1.0, total))
    if APART:
        LSE += 2 * first
        tl.store(
            LSE + 2 * rows,
            tl.where(empty, float("-inf") if PARTIAL else float("inf"), peak),
            mask=inside,
        )
        tl.store(LSE + 2 * rows + 1, log_total, mask=inside)
    else:
        lse = tl.where(empty, float("-inf") if PARTIAL else float("inf"), peak + log_total)
        tl.store(LSE + first + rows, lse, mask=inside)


@triton.jit
def forward_kernel(
    Q, K, V, QF, KF, W, ENDS, DENSE, MASK, PAD, BLOCKS, ORDER, COUNTS, SEED, OUT, LOW, LSE,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, qf_b, qf_m, qf_h, kf_b, kf_n, kf_h, w_b, w_m, w_h,
    dense_b, dense_h, dense_m, mask_b, mask_h, mask_m, pad_b, out_s, out_b, out_m, out_h,
    B, H, M, N, splits, split_keys, num_blocks, score_scale, dropout_p, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr, PAD_KIND: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    PARTIAL: tl.constexpr, HAS_LOW: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT (splits, B, M, H, D), LOW what OUT lost by being rounded (HAS_LOW), and LSE (splits, B *
    H, M), in log2 units.

    LSE is relative to the row's largest segment weight. APART (problem.apart): it is (splits, B *
    H, M, 2): the largest score of a row and log2 of the sum apart, since near -1e9 one float32 has
    no digits for their sum. A row without any key gives out 0 and lse +inf, so that backward's
    exp2(s - lse) is 0; partial results (PARTIAL, to be combined) keep -inf there.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    block_m = pid % blocks_m
    split = (pid // blocks_m) % splits
    bh = pid // (blocks_m * splits)
    b = bh // H
    h = bh % H
    q_h, k_h, v_h, _ = multiples(q_h, k_h, v_h, q_h, VECTOR)
    first_row = block_m * BLOCK_M

    K += wide(b) * k_b + wide(h) * k_h
    V += wide(b) * v_b + wide(h) * v_h
    q = load_tile(Q + wide(b) * q_b + wide(h) * q_h, q_m, first_row, M, BLOCK_M, D, BLOCK_D, True)
    qf = q
    if BLOCK_R > 0:
        KF += wide(b) * kf_b + wide(h) * kf_h
        QF += wide(b) * qf_b + wide(h) * qf_h
        qf = load_tile(QF, qf_m, first_row, M, BLOCK_M, BLOCK_R, BLOCK_R, True)
    if SEGMENTS > 0:
        W += wide(b) * w_b + wide(h) * w_h
    if HAS_DENSE:
        DENSE += wide(b) * dense_b + wide(h) * dense_h
    if HAS_MASK:
        MASK += wide(b) * mask_b + wide(h) * mask_h
    seed = 0
    shift = 0
    if DROPOUT:
        seed = tl.load(SEED)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    weight = total
    top = total
    if SEGMENTS > 0 and not APART:
        top = largest_weight(W, w_m, first_row, M, SEGMENTS, BLOCK_M)

    if PAD_KIND > 0:
        # Only blocks with an unmasked key are visited; ORDER lists them, COUNTS says how many, for
        # each batch entry.
        PAD += wide(b) * pad_b
        ORDER += b * num_blocks
        count = tl.load(COUNTS + b)
        share = tl.cdiv(count, splits)
        lo = split * share
        hi = tl.minimum(lo + share, count)
        whole = lo
        if SEGMENTS == 0:
            # The last block alone may be cut short: the others need no masks.
            last = tl.load(ORDER + tl.maximum(hi - 1, 0))
            whole = tl.where((hi > lo) & ((last + 1) * BLOCK_N > N), hi - 1, hi)
            for index in range(lo, whole):
                start = tl.load(ORDER + index) * BLOCK_N
                acc, peak, total = _step(
                    acc, peak, total, q, qf, weight, K, V, KF, DENSE, MASK, PAD, seed, bh,
                    k_n, v_n, kf_n, dense_m, mask_m, first_row, start, N, shift, M, score_scale,
                    dropout_p,
                    BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK,
                    PAD_KIND, APART, DROPOUT, False,
                )  # fmt: skip
        for index in range(whole, hi):
            block = tl.load(ORDER + index)
            start = tl.load(BLOCKS + 4 * block)
            end = tl.load(BLOCKS + 4 * block + 1)
            if SEGMENTS > 0:
                segment = tl.load(BLOCKS + 4 * block + 2)
                shift = tl.load(BLOCKS + 4 * block + 3)
                weight = load_weights(W + segment, w_m, first_row, M, BLOCK_M)
            acc, peak, total = _step(
                acc, peak, total, q, qf, weight, K, V, KF, DENSE, MASK, PAD, seed, bh,
                k_n, v_n, kf_n, dense_m, mask_m, first_row, start, end, shift, M, score_scale,
                dropout_p,
                BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK,
                PAD_KIND, APART, DROPOUT, True,
            )  # fmt: skip
    else:
        split_lo = split * split_keys
        split_hi = tl.minimum(split_lo + split_keys, N)
        for segment in range(0, SEGMENTS if SEGMENTS > 0 else 1):
            lo = split_lo
            hi = split_hi
            if SEGMENTS > 0:
                shift = dropout_shift(tl.load(ENDS + segment), segment)
                lo = tl.maximum(lo, tl.load(ENDS + segment))
                hi = tl.maximum(lo, tl.minimum(hi, tl.load(ENDS + segment + 1)))
                weight = load_weights(W + segment, w_m, first_row, M, BLOCK_M)
                if not APART:
                    # Within a segment its constant only shifts the maximum: the loop is the one
                    # without a bias.
                    weight = (weight - top) * LOG2E
                    before = peak
                    peak = enter_segment(before, weight)
            tail = lo + (hi - lo) // BLOCK_N * BLOCK_N
            for start in range(lo, tail, BLOCK_N):
                acc, peak, total = _step(
                    acc, peak, total, q, qf, weight, K, V, KF, DENSE, MASK, PAD, seed, bh,
                    k_n, v_n, kf_n, dense_m, mask_m, first_row, start, hi, shift, M, score_scale,
                    dropout_p,
                    BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK,
                    PAD_KIND, APART, DROPOUT, False,
                )  # fmt: skip
            if tail < hi:
                acc, peak, total = _step(
                    acc, peak, total, q, qf, weight, K, V, KF, DENSE, MASK, PAD, seed, bh,
                    k_n, v_n, kf_n, dense_m, mask_m, first_row, tail, hi, shift, M, score_scale,
                    dropout_p,
                    BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK,
                    PAD_KIND, APART, DROPOUT, True,
                )  # fmt: skip
            if SEGMENTS > 0 and not APART:
                # The peak before, if no score of the segment was above it: to -1e9 and back it
                # would lose its digits.
                peak = tl.where(peak == enter_segment(before, weight), before, peak + weight)

    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < M
    empty = total == 0.0
    kept = tl.where(empty, 1.0, total)
    if DROPOUT:
        kept = kept / keep_scale
    acc = acc / kept[:, None]
    store_lse(LSE, (wide(split) * B * H + bh) * M, rows, peak, total, empty, inside, PARTIAL, APART)
    cols = tl.arange(0, BLOCK_D)
    base = wide(split) * out_s + wide(b) * out_b + wide(h) * out_h + wide(first_row) * out_m
    offsets = base + tl.arange(0, BLOCK_M)[:, None] * out_m + cols[None, :]
    store_rounded(OUT, LOW, offsets, acc, inside[:, None] & (cols < D)[None, :], HAS_LOW)


@triton.jit
def combine_kernel(
    PARTS, PART_LSE, OUT, LOW, LSE, B, H, M, splits, HAS_LOW: tl.constexpr, APART: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """PARTS (splits, B, M, H, D) float32 weighted by exp2(PART_LSE (splits, B * H, M)) into OUT (B,
    M, H, D).

    APART: PART_LSE and LSE have two numbers per row, as forward_kernel writes them.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // blocks_m
    first_row = (pid % blocks_m) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D)
    inside = rows < M
    inside_tile = inside[:, None] & (cols < D)[None, :]
    offsets = ((wide(bh // H) * M + rows) * H + bh % H)[:, None] * D + cols[None, :]

    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for split in range(0, splits):
        first = (wide(split) * B * H + bh) * M
        if APART:
            lse = tl.load(PART_LSE + 2 * first + 2 * rows, mask=inside, other=float("-inf"))
        else:
            lse = tl.load(PART_LSE + first + rows, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, lse)
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        alpha = tl.exp2(peak - anchor)
        weight = tl.exp2(lse - anchor)
        if APART:
            weight *= tl.exp2(tl.load(PART_LSE + 2 * first + 2 * rows + 1, mask=inside, other=0.0))
        part = tl.load(PARTS + wide(split) * B * M * H * D + offsets, mask=inside_tile, other=0.0)
        acc = acc * alpha[:, None] + part * weight[:, None]
        total = total * alpha + weight
        peak = new_peak
    empty = total == 0.0
    store_rounded(
        OUT, LOW, offsets, acc / tl.where(empty, 1.0, total)[:, None], inside_tile, HAS_LOW
    )
    store_lse(LSE, wide(bh) * M, rows, peak, total, empty, inside, False, APART)


@triton.jit
def visible_kernel(
    PAD, BLOCKS, ORDER, COUNTS, pad_b, num_blocks, PAD_KIND: tl.constexpr, BLOCK_N: tl.constexpr,
    MANY: tl.constexpr
):  # fmt: skip
    """For each batch entry the blocks with an unmasked key, ORDER (B, num_blocks), and how many,
    COUNTS (B,)."""
    b = tl.program_id(0)
    lanes = tl.arange(0, BLOCK_N)[None, :]
    count = 0
    for first in range(0, num_blocks, MANY):
        blocks = first + tl.arange(0, MANY)
        start = tl.load(BLOCKS + 4 * blocks, mask=blocks < num_blocks, other=0)
        end = tl.load(BLOCKS + 4 * blocks + 1, mask=blocks < num_blocks, other=0)
        keys = start[:, None] + lanes
        inside = keys < end[:, None]
        if PAD_KIND == 1:
            seen = (tl.load(PAD + wide(b) * pad_b + keys, mask=inside, other=1) == 0).to(tl.int32)
        else:
            pad = tl.load(PAD + wide(b) * pad_b + keys, mask=inside, other=float("-inf")).to(
                tl.float32
            )
            seen = (pad > float("-inf")).to(tl.int32)
        seen = tl.max(seen, 1)
        place = count + tl.cumsum(seen, 0) - 1
        tl.store(ORDER + b * num_blocks + place, blocks, mask=seen > 0)
        count += tl.sum(seen, 0)
    tl.store(COUNTS + b, count)


@triton.jit
def _copy_rows(
    SOURCE, TARGET, s_b, s_l, s_h, H, L, total, program, mult,
    COLS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Rows of SOURCE (B, L, H, COLS) strided, times mult, into TARGET (B, L, H, WIDTH) contiguous.

    Beyond COLS are zeros, or common.weights (WEIGHTS), which are multiplied by zeros except in
    backward's folded tiles.
    """
    rows = program * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (cols < WIDTH)[None, :]
    h = rows % H
    place = rows // H
    source = (place // L).to(tl.int64) * s_b + (place % L).to(tl.int64) * s_l + h.to(tl.int64) * s_h
    tile = tl.load(
        SOURCE + source[:, None] + cols[None, :], mask=inside & (cols < COLS)[None, :], other=0.0
    )
    tile = tile.to(tl.float32) * mult
    if WEIGHTS:
        tile += weights(cols[None, :], COLS)
    tile = tile.to(TARGET.dtype.element_ty)
    tl.store(TARGET + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :], tile, mask=inside)


@triton.jit
def prepare_kernel(
    Q, Q_OUT, QF, QF_OUT, KF, KF_OUT, q_b, q_m, q_h, qf_b, qf_m, qf_h, kf_b, kf_n, kf_h,
    Q_H, Q_L, QF_H, QF_L, KF_H, KF_L, q_rows, qf_rows, kf_rows, qf_start, kf_start, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    """q times scale, and both factors with BLOCK_R columns: loads of a full power of two of columns
    need no mask, which the main loop repays (docs/experiments.md). Programs from qf_start on do
    q_factor, from kf_start on k_factor, the latter with weights for backward's folded rows
    (WEIGHTS)."""
    pid = tl.program_id(0)
    if pid < qf_start:
        _copy_rows(
            Q, Q_OUT, q_b, q_m, q_h, Q_H, Q_L, q_rows, pid, scale, D, BLOCK_D, D, ROWS, False
        )
    elif pid < kf_start:
        program = pid - qf_start
        _copy_rows(
            QF,
            QF_OUT,
            qf_b,
            qf_m,
            qf_h,
            QF_H,
            QF_L,
            qf_rows,
            program,
            1.0,
            R,
            BLOCK_R,
            BLOCK_R,
            ROWS,
            False,
        )
    else:
        program = pid - kf_start
        _copy_rows(
            KF,
            KF_OUT,
            kf_b,
            kf_n,
            kf_h,
            KF_H,
            KF_L,
            kf_rows,
            program,
            1.0,
            R,
            BLOCK_R,
            BLOCK_R,
            ROWS,
            WEIGHTS,
        )
