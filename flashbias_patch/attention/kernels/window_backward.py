"""Backward with windows on grids: backward.py with the tiles of keys and the order of queries of
window_forward.py.

Both kernels read the rows' values (ROWS) in that order. The keys kernel, every program of which
visits all queries, also reads q, the output's gradient and the windows' weights in it, copied by
`window_rows_kernel`. Gradients of the queries are written in the caller's order. Imports nothing
but Triton.
"""

import triton
import triton.language as tl

from .backward import load_four, load_two, store_part_weights, store_row, weight_tile
from .common import (
    COLUMNS,
    LOG2E,
    add_terms,
    bounded,
    dot,
    keep_tile,
    keep_tile_by_key,
    multiples,
    parts,
    wide,
)
from .window_common import (
    VALUES,
    distances,
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
    profile,
    segment_weight,
    split_word,
    store_rows,
    window_bias,
    window_lift,
    window_weight,
)


@triton.jit
def _load_lse(LSE, bh, M, places, inside, APART: tl.constexpr):
    """LSE of the rows at `places`: (peak, log2 of the sum) if APART, else the logsumexp twice."""
    if APART:
        LSE += wide(bh) * M * 2
        lse = tl.load(LSE + 2 * places, mask=inside, other=float("inf"))
        log_total = tl.load(LSE + 2 * places + 1, mask=inside, other=0.0)
    else:
        lse = tl.load(LSE + wide(bh) * M + places, mask=inside, other=float("inf"))
        log_total = lse
    return lse, log_total


@triton.jit
def window_rows_kernel(
    Q, QF, DO, OUT, LOW, LSE, W, WINDOWS, ORDER, CENTRES, QS, QFS, DOS, WS, ROWS,
    q_b, q_m, q_h, qf_b, qf_m, qf_h, do_b, do_m, do_h, out_b, out_m, out_h, w_b, w_m, w_h, ww_b,
    ww_m, ww_h,
    B, H, M, padded, apiece, unit, fold_unit,
    F: tl.constexpr, MODE: tl.constexpr, HAS_LOW: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, R: tl.constexpr, SEGMENTS: tl.constexpr, FOLDED: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """In the order of the tables: ROWS as backward.rows_kernel writes it; QS and DOS (B * H,
    padded, BLOCK_D), QFS (B * H, padded, BLOCK_R) unless FOLDED, zeros from row M on; WS (F, B * H,
    padded) float32 the windows' weights, times unit."""
    blocks_m = padded // BLOCK_M
    pid = tl.program_id(0)
    bh = pid // blocks_m
    b = bh // H
    h = bh % H
    own = b * apiece
    frame_stride = (1 + (B - 1) * apiece) * padded * 2
    heads = B * H
    first_row = (pid % blocks_m) * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    rows = first_row + lanes
    inside = rows < M
    places = tl.load(ORDER + own * padded + rows)
    target = wide(bh) * padded
    q = load_rows(Q + wide(b) * q_b + wide(h) * q_h, q_m, places, inside, D, BLOCK_D)
    do = load_rows(DO + wide(b) * do_b + wide(h) * do_h, do_m, places, inside, D, BLOCK_D)
    all_rows = rows >= 0
    store_rows(QS + target * BLOCK_D, BLOCK_D, rows, all_rows, q, BLOCK_D, BLOCK_D)
    store_rows(DOS + target * BLOCK_D, BLOCK_D, rows, all_rows, do, BLOCK_D, BLOCK_D)
    if BLOCK_R > 0:
        QF += wide(b) * qf_b + wide(h) * qf_h
        if not FOLDED:
            qf = load_rows(QF, qf_m, places, inside, BLOCK_R, BLOCK_R)
            store_rows(QFS + target * BLOCK_R, BLOCK_R, rows, all_rows, qf, BLOCK_R, BLOCK_R)
    if MODE > 0:
        WINDOWS += wide(b) * ww_b + wide(h) * ww_h
        CENTRES += own * padded * 2
        lift = window_lift(WINDOWS, ww_m, places, CENTRES, frame_stride, rows, F)
        for f in tl.static_range(F):
            tl.store(
                WS + (wide(f) * heads + bh) * padded + rows,
                window_weight(WINDOWS + f, ww_m, places, lift, unit),
            )

    out_place = wide(b) * out_b + wide(h) * out_h
    out = load_rows(OUT + out_place, out_m, places, inside, D, BLOCK_D).to(tl.float32)
    if HAS_LOW:
        out += load_rows(LOW + out_place, out_m, places, inside, D, BLOCK_D).to(tl.float32)
    delta = tl.sum(out * do.to(tl.float32), 1)
    lse, log_total = _load_lse(LSE, bh, M, places, inside, APART)
    if SEGMENTS > 0:
        W += wide(b) * w_b + wide(h) * w_h
        top = largest_segment(W, w_m, places, SEGMENTS)
    columns = tl.arange(0, COLUMNS)[None, :]
    tile = columns
    if FOLDED:
        if pid == 0:
            store_part_weights(ROWS, columns, R)
        ROWS += 2 * COLUMNS
        tile = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
        if R > 0:
            tile = load_rows(QF, qf_m, places, inside, COLUMNS, COLUMNS).to(tl.float32)
        tile = parts(tile, columns, R + 3, -delta, ROWS.dtype.element_ty)
    for segment in range(0, SEGMENTS if SEGMENTS > 0 else 1):
        shifted = lse
        weight = delta * 0.0
        if SEGMENTS > 0:
            weight = segment_weight(W + segment, w_m, places)
            if not APART:
                shifted = lse - (weight - top) * LOG2E
        base = (wide(segment) * heads + bh) * padded + first_row
        store_row(
            ROWS, base, lanes, tile, columns, lse, log_total, shifted, delta, weight, fold_unit,
            R, FOLDED, APART,
        )  # fmt: skip


@triton.jit
def window_keys_kernel(
    QS, K, V, QFS, KF, DENSE, MASK, PAD, SEED, PATCHES, OWNERS, FRAMES, WIDTHS, ORDER, FLAGS,
    BLOCKS, COUNTS, CENTRES,
    SHOWN, WS, DOS, ROWS, DK, DV, DKF,
    k_b, k_n, k_h, v_b, v_n, v_h, kf_b, kf_n, kf_h, dense_b, dense_h, dense_m, mask_b, mask_h,
    mask_m, pad_b,
    dk_s, dkf_s, dkf_b, dkf_n, dkf_h,
    B, H, M, N, padded, P, apiece, splits, score_scale, dk_scale, dropout_p, keep_scale,
    MODE: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr, PAD_KIND: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_KV: tl.constexpr, NEED_KF: tl.constexpr, SHARED_KF: tl.constexpr, FOLDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DK, DV (splits, B, N, H, D) and DKF as backward.keys_kernel writes them, a patch of keys at a
    time."""
    tl.static_assert(BLOCK_N == 64)
    pid = tl.program_id(0)
    patch = pid % P
    split = (pid // P) % splits
    bh = pid // (P * splits)
    b = bh // H
    h = bh % H
    own = b * apiece
    heads = B * H
    k_h, v_h, _, _ = multiples(k_h, v_h, k_h, k_h, VECTOR)
    words = tl.load(PATCHES + patch)
    f = tl.load(OWNERS + patch)
    FRAME = FRAMES + VALUES * f
    low, high = split_word(words)
    lanes = tl.arange(0, BLOCK_N)
    place_r, place_c, offsets = frame_offsets(FRAME, lanes)
    mine = own_keys(low, high, low, high, lanes, place_r, place_c, False)
    keys = patch_keys(low, low, offsets, lanes, False)
    half = half_side(FRAME, 5)
    mask_half = half_side(FRAME, 6)
    width = tl.load(WIDTHS + f)
    skew = middle_skew(FRAME, 5)
    key_row = ((high & 0xFFFF) + place_r).to(tl.float32)
    key_column = (((high >> 16) & 0xFFF) + place_c).to(tl.float32)
    k = patch_tile(
        K + wide(b) * k_b + wide(h) * k_h, k_n, low, low, offsets * k_n, lanes, D, BLOCK_D, False
    )
    v = patch_tile(
        V + wide(b) * v_b + wide(h) * v_h, v_n, low, low, offsets * v_n, lanes, D, BLOCK_D, False
    )
    cols = tl.arange(0, BLOCK_D)
    if BLOCK_R > 0:
        KF += wide(b) * kf_b + wide(h) * kf_h
        kf = patch_tile(KF, kf_n, low, low, offsets * kf_n, lanes, BLOCK_R, BLOCK_R, False)
        QFS += wide(bh) * padded * BLOCK_R
        dkf = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    row_values: tl.constexpr = COLUMNS if FOLDED else 4 if APART else 2
    if FOLDED:
        of_delta = weight_tile(ROWS, 1, BLOCK_N)
        if BLOCK_R == 0:
            kf = weight_tile(ROWS, 0, BLOCK_N)
        ROWS += 2 * COLUMNS
    segment = 0
    if SEGMENTS > 0:
        segment = tl.load(FRAME + 4)
    ROWS += (wide(segment) * heads + bh) * padded * row_values
    QS += wide(bh) * padded * BLOCK_D
    DOS += wide(bh) * padded * BLOCK_D
    WS += (wide(f) * heads + bh) * padded
    blocks_m = tl.cdiv(M, BLOCK_M)
    centres = (f * (1 + (B - 1) * apiece) + own) * padded * 2
    CENTRES += centres
    SHOWN += centres
    ORDER += own * padded
    FLAGS += wide(own) * blocks_m * P + patch
    BLOCKS += (wide(own) * P + patch) * blocks_m
    count = blocks_m
    if MASKED:
        count = tl.load(COUNTS + own * P + patch)
    share = tl.cdiv(count, splits)
    lo = tl.minimum(split * share, count)
    hi = tl.minimum(lo + share, count)
    if PAD_KIND > 0:
        PAD += wide(b) * pad_b
        if PAD_KIND == 1:
            visible = tl.load(PAD + keys) == 0
        else:
            pad = bounded(tl.load(PAD + keys)) * LOG2E
            visible = pad > float("-inf")
        hi = tl.where(tl.max((visible & mine).to(tl.int32), 0) > 0, hi, lo)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    if HAS_DENSE:
        DENSE += wide(b) * dense_b + wide(h) * dense_h
    if HAS_MASK:
        MASK += wide(b) * mask_b + wide(h) * mask_h

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    lanes_m = tl.arange(0, BLOCK_M)
    square = lanes_m[:, None] * BLOCK_D + cols[None, :]
    # The block or flag of the next step is loaded in this one; both tables are one longer than
    # needed.
    following = 0
    if MASKED:
        following = tl.load(BLOCKS + lo)
    elif MODE > 0:
        following = tl.load(FLAGS + wide(lo) * P).to(tl.int32)
    for index in range(lo, hi):
        current = following
        first_row = index * BLOCK_M
        if MASKED:
            first_row = current * BLOCK_M
            following = tl.load(BLOCKS + index + 1)
        elif MODE > 0:
            following = tl.load(FLAGS + wide(index + 1) * P).to(tl.int32)
        rows = first_row + lanes_m
        q = tl.load(QS + first_row * BLOCK_D + square)
        s = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if FOLDED:
            qf = tl.load(
                ROWS
                + first_row * COLUMNS
                + (lanes_m[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
            )
        elif BLOCK_R > 0:
            qf = tl.load(
                QFS
                + first_row * BLOCK_R
                + (lanes_m[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :])
            )
        if FOLDED or BLOCK_R > 0:
            s = dot(kf, tl.trans(qf), s)
        s = dot(k, tl.trans(q), s)
        do = tl.load(DOS + first_row * BLOCK_D + square)
        dp = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if FOLDED:
            dp = dot(of_delta, tl.trans(qf), dp)
        dp = dot(v, tl.trans(do), dp)
        if MODE > 0:
            touched = current != 0
            if MASKED:
                touched = current == current
            if touched:
                row, column = load_two(CENTRES, first_row, BLOCK_M)
                held = tl.load(WS + rows)
                dr = key_row[:, None] - row[None, :]
                dc = key_column[:, None] - column[None, :]
                if MODE == 2:  # one exponential per score: few scores share a factor here
                    near = (tl.abs(dr) <= half) & (tl.abs(dc) <= half)
                    dr += skew
                    dc += skew
                    s += tl.where(near, tl.exp2((dr * dr + dc * dc) * width) * held[None, :], 0.0)
                else:
                    s += profile(dr, half, width, skew, False) * (
                        profile(dc, half, width, skew, False) * held[None, :]
                    )
        if HAS_DENSE or HAS_MASK:
            places = tl.load(ORDER + rows)
        if FOLDED:
            x = s * score_scale
        elif APART:
            peak, log_total, delta, weight = load_four(ROWS, first_row, BLOCK_M)
            dense = s
            padding = s
            if HAS_DENSE:
                dense = tl.trans(tl.load(pair_pointers(DENSE, dense_m, places, keys)))
            if PAD_KIND == 2:
                padding = pad[:, None]
            x = add_terms(
                s,
                score_scale,
                dense,
                padding,
                weight[None, :],
                HAS_DENSE,
                PAD_KIND == 2,
                SEGMENTS > 0,
            )
            x = (x - peak[None, :]) - log_total[None, :]
        else:
            lse, delta = load_two(ROWS, first_row, BLOCK_M)
            x = s * score_scale - lse[None, :]
        if MASKED:
            row, column = load_two(SHOWN, first_row, BLOCK_M)
            near = tl.abs(key_row[:, None] - row[None, :]) <= mask_half
            near = near & (tl.abs(key_column[:, None] - column[None, :]) <= mask_half)
            x = tl.where(near, x, float("-inf"))
        p = tl.exp2(x)
        if HAS_MASK:
            p = tl.where(tl.trans(tl.load(pair_pointers(MASK, mask_m, places, keys))) == 0, p, 0.0)
        if PAD_KIND == 1:
            p = tl.where(visible[:, None], p, 0.0)
        dropped = p
        if DROPOUT:
            keep = keep_tile_by_key(seed, bh, first_row, patch * 64, dropout_p, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, p, 0.0)
        dv = dot(dropped.to(do.dtype), do, dv)
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        if FOLDED:
            ds = p * dp
        else:
            ds = p * (dp - delta[None, :])
        rounded = ds.to(q.dtype)
        if NEED_KV:
            dk = dot(rounded, q, dk)
        if BLOCK_R > 0 and NEED_KF:
            dkf = dot(rounded, qf, dkf)

    if NEED_KV:
        if DROPOUT:
            dv = dv * keep_scale
        base = wide(split) * dk_s + (wide(b) * N * H + h) * D
        store_rows(DK + base, H * D, keys, mine, dk * dk_scale, D, BLOCK_D)
        store_rows(DV + base, H * D, keys, mine, dv, D, BLOCK_D)
    if BLOCK_R > 0 and NEED_KF:
        DKF += wide(split) * dkf_s + wide(b) * dkf_b + wide(h) * dkf_h
        if SHARED_KF:
            ranks = tl.arange(0, BLOCK_R)
            pointers = DKF + keys.to(tl.int64)[:, None] * dkf_n + ranks[None, :]
            tl.atomic_add(pointers, dkf, mask=mine[:, None] & (ranks < R)[None, :], sem="relaxed")
        else:
            store_rows(DKF, dkf_n, keys, mine, dkf, R, BLOCK_R)


@triton.jit
def window_queries_kernel(
    Q, K, V, QF, KF, W, DENSE, MASK, PAD, SEED, WINDOWS, FRAMES, WIDTHS, ORDER, LIST, NUMBERS,
    COUNTS, CENTRES, SHOWN,
    DO, LSE, ROWS, DQ, DQF, DW, DWINDOWS,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, qf_b, qf_m, qf_h, kf_b, kf_n, kf_h, w_b, w_m, w_h,
    dense_b, dense_h, dense_m, mask_b, mask_h, mask_m, pad_b, ww_b, ww_m, ww_h, do_b, do_m, do_h,
    dq_s, dqf_s, dw_s, dww_s,
    B, H, M, padded, P, apiece, splits, score_scale, unit, dq_scale, dropout_p, keep_scale,
    F: tl.constexpr, MODE: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr, PAD_KIND: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_QF: tl.constexpr, NEED_W: tl.constexpr, NEED_WINDOWS: tl.constexpr,
    FOLDED: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As backward.queries_kernel; DWINDOWS (splits, B, M, H, F) float32 written: the windows'
    weights' gradient."""
    PAIR: tl.constexpr = BLOCK_N == 128
    STEP: tl.constexpr = BLOCK_N // 64
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    block_m = pid % blocks_m
    split = (pid // blocks_m) % splits
    bh = pid // (blocks_m * splits)
    b = bh // H
    h = bh % H
    own = b * apiece
    q_h, k_h, v_h, do_h = multiples(q_h, k_h, v_h, do_h, VECTOR)
    first_row = block_m * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < M
    places = tl.load(ORDER + own * padded + rows)

    K += wide(b) * k_b + wide(h) * k_h
    V += wide(b) * v_b + wide(h) * v_h
    q = load_rows(Q + wide(b) * q_b + wide(h) * q_h, q_m, places, inside, D, BLOCK_D)
    do = load_rows(DO + wide(b) * do_b + wide(h) * do_h, do_m, places, inside, D, BLOCK_D)
    lse, log_total = _load_lse(LSE, bh, M, places, inside, APART)
    if FOLDED:
        of_delta = weight_tile(ROWS, 1, BLOCK_N)
        ROWS += 2 * COLUMNS + wide(bh) * padded * COLUMNS
        delta = tl.load(ROWS + rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    else:
        if APART:
            delta = tl.load(ROWS + wide(bh) * padded * 4 + 4 * rows + 2)
        else:
            delta = tl.load(ROWS + wide(bh) * padded * 2 + 2 * rows + 1)
        of_delta = delta
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    qf = q
    dqf = dq
    if BLOCK_R > 0:
        KF += wide(b) * kf_b + wide(h) * kf_h
        qf = load_rows(QF + wide(b) * qf_b + wide(h) * qf_h, qf_m, places, inside, BLOCK_R, BLOCK_R)
        dqf = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if HAS_DENSE:
        DENSE += wide(b) * dense_b + wide(h) * dense_h
    if HAS_MASK:
        MASK += wide(b) * mask_b + wide(h) * mask_h
    if PAD_KIND > 0:
        PAD += wide(b) * pad_b
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    frame_stride = (1 + (B - 1) * apiece) * padded * 2
    CENTRES += own * padded * 2
    SHOWN += own * padded * 2
    LIST += wide(own * blocks_m + block_m) * P
    NUMBERS += wide(own * blocks_m + block_m) * P
    COUNTS += (own * blocks_m + block_m) * F
    lift = tl.zeros([BLOCK_M], dtype=tl.float32)
    if MODE > 0:
        WINDOWS += wide(b) * ww_b + wide(h) * ww_h
        lift = window_lift(WINDOWS, ww_m, places, CENTRES, frame_stride, rows, F)
    shift = lse
    weight = lift
    top = lift
    if SEGMENTS > 0:
        W += wide(b) * w_b + wide(h) * w_h
        DW += wide(split) * dw_s + (wide(b) * M * H + h) * SEGMENTS
        if not APART:
            top = largest_segment(W, w_m, places, SEGMENTS)
    DWINDOWS += wide(split) * dww_s + (wide(b) * M * H + h) * F
    lanes = tl.arange(0, BLOCK_N)

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
        segment = 0
        if SEGMENTS > 0:
            segment = tl.load(FRAME + 4)
            weight = segment_weight(W + segment, w_m, places)
            if not APART:
                shift = lse - (weight - top) * LOG2E
        window_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
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
            v = patch_tile(V, v_n, low, low2, v_offsets, lanes, D, BLOCK_D, PAIR)
            dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
            if FOLDED:
                dp = dot(delta, tl.trans(of_delta), dp)
            touched = low < 0
            if PAIR:
                touched = (low | low2) < 0
            if MASKED:
                touched = low == low
            if MODE > 0:  # noqa: SIM102  a constant
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
                x = add_terms(
                    s,
                    score_scale,
                    dense,
                    padding,
                    weight[:, None],
                    HAS_DENSE,
                    PAD_KIND == 2,
                    SEGMENTS > 0,
                )
                x = (x - lse[:, None]) - log_total[:, None]
            else:
                x = s * score_scale - shift[:, None]
            if MASKED:
                shown = in_window(
                    low, high, low2, high2, lanes, place_r, place_c, mask_row, mask_column,
                    mask_half, PAIR,
                )  # fmt: skip
                x = tl.where(shown, x, float("-inf"))
            if is_cut(low, high, low2, high2, PAIR) != 0:
                mine = own_keys(low, high, low2, high2, lanes, place_r, place_c, PAIR)
                x = tl.where(mine[None, :], x, float("-inf"))
            p = tl.exp2(x)
            if HAS_MASK:
                p = tl.where(tl.load(pair_pointers(MASK, mask_m, places, keys)) == 0, p, 0.0)
            if PAD_KIND == 1:
                p = tl.where((tl.load(PAD + keys) == 0)[None, :], p, 0.0)
            if DROPOUT:
                number = index
                if MASKED:
                    number = tl.load(NUMBERS + index)
                keep = keep_tile(seed, bh, first_row, number * 64, dropout_p, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            if FOLDED:
                ds = p * dp
            else:
                ds = p * (dp - delta[:, None])
            rounded = ds.to(k.dtype)
            if NEED_Q:
                dq = dot(rounded, k, dq)
            if BLOCK_R > 0 and NEED_QF:
                dqf = dot(rounded, kf, dqf)
            if NEED_W:
                row_sum += tl.sum(ds, 1)
            if NEED_WINDOWS:  # noqa: SIM102
                if touched:
                    dr, dc = distances(
                        low, high, low2, high2, lanes, place_r, place_c, row, column, PAIR
                    )
                    near = profile(dr, half, width, skew, MODE == 2) * profile(
                        dc, half, width, skew, MODE == 2
                    )
                    window_sum += tl.sum(ds * near, 1)
        if NEED_WINDOWS:
            tl.store(DWINDOWS + places * (H * F) + f, window_sum, mask=inside)
        if NEED_W:
            # No other program adds to these rows. Atomic since several frames may be in a segment.
            tl.atomic_add(
                DW + places * (H * SEGMENTS) + segment, row_sum, mask=inside, sem="relaxed"
            )

    places = tl.load(
        ORDER + own * padded + rows, volatile=True
    )  # again: not kept in registers in the loop
    if NEED_Q:
        base = wide(split) * dq_s + (wide(b) * M * H + h) * D
        store_rows(DQ + base, H * D, places, inside, dq * dq_scale, D, BLOCK_D)
    if BLOCK_R > 0 and NEED_QF:
        base = wide(split) * dqf_s + (wide(b) * M * H + h) * R
        store_rows(DQF + base, H * R, places, inside, dqf, R, BLOCK_R)
