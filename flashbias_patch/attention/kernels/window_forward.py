"""Forward with windows on grids: as forward.py, but a tile of keys is a patch of a grid, and
queries come in an order in which neighbours have windows near each other (window_common.py,
window_tables.py). Imports nothing but Triton.
"""

import triton
import triton.language as tl

from .common import LOG2E, add_terms, bounded, dot, keep_tile, multiples, wide
from .forward import enter_segment, next_softmax, store_lse, store_rounded
from .window_common import (
    VALUES,
    frame_offsets,
    half_side,
    in_window,
    is_cut,
    largest_segment,
    load_centres,
    load_rows,
    middle_skew,
    own_keys,
    pair_pointers,
    patch_keys,
    patch_range,
    patch_tile,
    segment_weight,
    split_word,
    window_bias,
    window_lift,
    window_weight,
)


@triton.jit
def window_forward_kernel(
    Q, K, V, QF, KF, W, DENSE, MASK, PAD, SEED, WINDOWS, FRAMES, WIDTHS, ORDER, LIST, NUMBERS,
    COUNTS, CENTRES, SHOWN,
    OUT, LOW, LSE,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, qf_b, qf_m, qf_h, kf_b, kf_n, kf_h, w_b, w_m, w_h,
    dense_b, dense_h, dense_m, mask_b, mask_h, mask_m, pad_b, ww_b, ww_m, ww_h, out_s, out_b,
    out_m, out_h,
    B, H, M, padded, P, apiece, splits, score_scale, unit, dropout_p, keep_scale,
    F: tl.constexpr, MODE: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SEGMENTS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr, PAD_KIND: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    PARTIAL: tl.constexpr, HAS_LOW: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """OUT, LOW and LSE as forward_kernel writes them, queries in the caller's order.

    MODE 0: no bias, 1: boxes, 2: Gaussians. MASKED: keys outside the windows around SHOWN are
    hidden, and LIST has only
    the patches that these touch. apiece: 1 where the batch entries have tables of their own, else
    0.
    """
    PAIR: tl.constexpr = BLOCK_N == 128
    STEP: tl.constexpr = BLOCK_N // 64
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    block_m = pid % blocks_m
    split = (pid // blocks_m) % splits
    bh = pid // (blocks_m * splits)
    b = bh // H
    h = bh % H
    own = b * apiece  # the batch entry in the tables
    tables_b = 1 + (B - 1) * apiece
    q_h, k_h, v_h, _ = multiples(q_h, k_h, v_h, q_h, VECTOR)
    first_row = block_m * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < M
    places = tl.load(ORDER + own * padded + rows)

    K += wide(b) * k_b + wide(h) * k_h
    V += wide(b) * v_b + wide(h) * v_h
    q = load_rows(Q + wide(b) * q_b + wide(h) * q_h, q_m, places, inside, D, BLOCK_D)
    qf = q
    if BLOCK_R > 0:
        KF += wide(b) * kf_b + wide(h) * kf_h
        qf = load_rows(QF + wide(b) * qf_b + wide(h) * qf_h, qf_m, places, inside, BLOCK_R, BLOCK_R)
    if HAS_DENSE:
        DENSE += wide(b) * dense_b + wide(h) * dense_h
    if HAS_MASK:
        MASK += wide(b) * mask_b + wide(h) * mask_h
    if PAD_KIND > 0:
        PAD += wide(b) * pad_b
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    frame_stride = tables_b * padded * 2
    CENTRES += own * padded * 2
    SHOWN += own * padded * 2
    LIST += wide(own * blocks_m + block_m) * P
    NUMBERS += wide(own * blocks_m + block_m) * P
    COUNTS += (own * blocks_m + block_m) * F
    lift = tl.zeros([BLOCK_M], dtype=tl.float32)
    if MODE > 0:
        WINDOWS += wide(b) * ww_b + wide(h) * ww_h
        lift = window_lift(WINDOWS, ww_m, places, CENTRES, frame_stride, rows, F)
    weight = lift
    top = lift
    if SEGMENTS > 0:
        W += wide(b) * w_b + wide(h) * w_h
        if not APART:
            top = largest_segment(W, w_m, places, SEGMENTS)
    lanes = tl.arange(0, BLOCK_N)
    CAN_EMPTY: tl.constexpr = ((HAS_DENSE or HAS_MASK) or PAD_KIND > 0) or MASKED

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for f in range(0, F):
        FRAME = FRAMES + VALUES * f
        lo, hi = patch_range(FRAME, COUNTS, f, split, splits)
        place_r, place_c, offsets = frame_offsets(FRAME, lanes)
        k_offsets = offsets * k_n
        v_offsets = offsets * v_n
        half = half_side(FRAME, 5)
        width = tl.load(WIDTHS + f)
        skew = middle_skew(FRAME, 5)
        row, column = load_centres(CENTRES + f * frame_stride, rows)
        held = lift
        if MODE > 0:
            held = window_weight(WINDOWS + f, ww_m, places, lift, unit)
        mask_half = half
        mask_row = row
        mask_column = column
        if MASKED:
            mask_half = half_side(FRAME, 6)
            mask_row, mask_column = load_centres(SHOWN + f * frame_stride, rows)
        before = peak
        if SEGMENTS > 0:
            weight = segment_weight(W + tl.load(FRAME + 4), w_m, places)
            if not APART:
                weight = (weight - top) * LOG2E
                peak = enter_segment(before, weight)
        # A word is loaded while the patch before is worked on; LIST has two words more than it
        # needs.
        words = tl.load(LIST + lo)
        words2 = words
        if PAIR:
            words2 = tl.load(LIST + lo + 1)
        for index in range(lo, hi, STEP):
            low, high = split_word(words)
            low2, high2 = split_word(words2)
            words = tl.load(LIST + index + STEP)
            if PAIR:
                words2 = tl.load(LIST + index + STEP + 1)
            k = patch_tile(K, k_n, low, low2, k_offsets, lanes, D, BLOCK_D, PAIR)
            s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
            if BLOCK_R > 0:
                kf = patch_tile(KF, kf_n, low, low2, offsets * kf_n, lanes, BLOCK_R, BLOCK_R, PAIR)
                s = dot(qf, tl.trans(kf), s)
            if MODE > 0:
                touched = low < 0
                if PAIR:
                    touched = (low | low2) < 0
                if MASKED:
                    touched = low == low
                if touched:
                    s += window_bias(
                        low, high, low2, high2, lanes, place_r, place_c, row, column, half, width,
                        skew, held, PAIR,
                        MODE == 2,
                    )  # fmt: skip
            keys = patch_keys(low, low2, offsets, lanes, PAIR)
            if APART:
                dense = s
                padding = s
                if HAS_DENSE:
                    dense = tl.load(pair_pointers(DENSE, dense_m, places, keys))
                if PAD_KIND == 2:
                    padding = (bounded(tl.load(PAD + keys)) * LOG2E)[None, :]
                s = add_terms(
                    s,
                    score_scale,
                    dense,
                    padding,
                    weight[:, None],
                    HAS_DENSE,
                    PAD_KIND == 2,
                    SEGMENTS > 0,
                )
            if HAS_MASK:
                s = tl.where(
                    tl.load(pair_pointers(MASK, mask_m, places, keys)) != 0, float("-inf"), s
                )
            if PAD_KIND == 1:
                s = tl.where((tl.load(PAD + keys) == 0)[None, :], s, float("-inf"))
            if MASKED:
                shown = in_window(
                    low, high, low2, high2, lanes, place_r, place_c, mask_row, mask_column,
                    mask_half, PAIR,
                )  # fmt: skip
                s = tl.where(shown, s, float("-inf"))
            if is_cut(low, high, low2, high2, PAIR) != 0:
                mine = own_keys(low, high, low2, high2, lanes, place_r, place_c, PAIR)
                s = tl.where(mine[None, :], s, float("-inf"))

            p, alpha, new_peak, total = next_softmax(s, peak, total, score_scale, APART, CAN_EMPTY)
            if DROPOUT:
                number = index
                if MASKED:
                    number = tl.load(NUMBERS + index)
                p = tl.where(
                    keep_tile(seed, bh, first_row, number * 64, dropout_p, BLOCK_M, BLOCK_N), p, 0.0
                )
            acc = acc * alpha[:, None]
            v = patch_tile(V, v_n, low, low2, v_offsets, lanes, D, BLOCK_D, PAIR)
            acc = dot(p.to(v.dtype), v, acc)
            peak = new_peak
        if SEGMENTS > 0 and not APART:
            peak = tl.where(peak == enter_segment(before, weight), before, peak + weight)

    empty = total == 0.0
    kept = tl.where(empty, 1.0, total)
    if DROPOUT:
        kept = kept / keep_scale
    acc = acc / kept[:, None]
    places = tl.load(
        ORDER + own * padded + rows, volatile=True
    )  # again: not kept in registers in the loop
    store_lse(
        LSE, (wide(split) * B * H + bh) * M, places, peak, total, empty, inside, PARTIAL, APART
    )
    cols = tl.arange(0, BLOCK_D)
    base = wide(split) * out_s + wide(b) * out_b + wide(h) * out_h
    offsets = base + places.to(tl.int64)[:, None] * out_m + cols[None, :]
    store_rounded(OUT, LOW, offsets, acc, inside[:, None] & (cols < D)[None, :], HAS_LOW)
