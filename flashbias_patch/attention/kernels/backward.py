"""Backward in two passes, neither of which adds into what another program writes (but for a shared
dk_factor).

`keys_kernel` owns a block of keys and keeps dk, dv and dk_factor in registers; `queries_kernel`
owns a block of queries and keeps dq, dq_factor and the segments' row sums. Scores are computed
twice; one pass that adds dq into a float32 buffer, by atomics or by the bulk copy engine, was
measured slower (docs/experiments.md).

With p = exp2(s - lse): dv = p^T do, dp = do v^T, ds = p (dp - delta), delta = rowsum(do * out),
dq = ds k * scale, dk = ds^T q * scale, dq_factor = ds k_factor, dk_factor = ds^T q_factor.

Where they are FOLDED (problem.py), lse and delta are subtracted by the matrix products themselves:
a tile of factors has COLUMNS columns, of which six that the rank leaves free hold them, in parts
(common.weights). That makes the keys kernel a fifth faster: it no longer loads, broadcasts and
subtracts two numbers per row. Imports nothing but Triton.
"""

import triton
import triton.language as tl

from .common import (
    COLUMNS,
    LOG2E,
    add_terms,
    bounded,
    dot,
    dropout_shift,
    keep_tile,
    keep_tile_by_key,
    largest_weight,
    load_keys,
    load_pairs,
    load_row_values,
    load_tile,
    load_weights,
    multiples,
    pair_tile,
    parts,
    weights,
    wide,
)


@triton.jit
def _load_lse(LSE, bh, M, first_row, ROWS: tl.constexpr, APART: tl.constexpr):
    """LSE of a block of rows: (peak, log2 of the sum) if APART, else the logsumexp twice."""
    if APART:
        lse = load_row_values(LSE + wide(bh) * M * 2, 2, first_row, M, ROWS, float("inf"))
        log_total = load_row_values(LSE + wide(bh) * M * 2 + 1, 2, first_row, M, ROWS, 0.0)
    else:
        lse = load_row_values(LSE + wide(bh) * M, 1, first_row, M, ROWS, float("inf"))
        log_total = lse
    return lse, log_total


@triton.jit
def store_part_weights(ROWS, columns, R: tl.constexpr):
    """The two rows with which a folded ROWS begins: the weights of lse's and of delta's parts."""
    both = tl.arange(0, 2)[:, None]
    tl.store(
        ROWS + both * COLUMNS + columns, weights(columns, R + 3 * both).to(ROWS.dtype.element_ty)
    )


@triton.jit
def store_row(
    ROWS, base, lanes, tile, columns, lse, log_total, shifted, delta, weight, unit,
    R: tl.constexpr, FOLDED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Write the values of rows base + lanes to ROWS (rows_kernel). `tile`, if FOLDED: the factors
    and delta's parts; `shifted`: lse without the segment's weight."""
    if FOLDED:
        whole = parts(tile, columns, R, -shifted * unit, ROWS.dtype.element_ty)
        tl.store(
            ROWS + base * COLUMNS + lanes[:, None] * COLUMNS + columns,
            whole.to(ROWS.dtype.element_ty),
        )
    elif APART:
        ROW = ROWS + base * 4 + 4 * lanes
        tl.store(ROW, lse)
        tl.store(ROW + 1, log_total)
        tl.store(ROW + 2, delta)
        tl.store(ROW + 3, weight)
    else:
        tl.store(ROWS + base * 2 + 2 * lanes, shifted)
        tl.store(ROWS + base * 2 + 2 * lanes + 1, delta)


@triton.jit
def rows_kernel(
    OUT, LOW, DO, LSE, W, QF, ROWS, out_b, out_m, out_h, do_b, do_m, do_h, w_b, w_m, w_h, qf_b,
    qf_m, qf_h,
    heads, H, M, padded, unit,
    HAS_LOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    FOLDED: tl.constexpr, APART: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write the values of each row that backward needs: lse - weight of the segment, and delta =
    sum of DO * (OUT + LOW).

    ROWS (SEGMENTS or 1, B * H, padded, 2): both values of a row together, because every thread
    loads a vector of fewer values than threads again. FOLDED: (SEGMENTS or 1, B * H, padded,
    COLUMNS), for each row its R columns of q_factor, then -lse * unit and -delta in three parts
    each; before all of them two rows with the factors of these parts. APART: (SEGMENTS or 1, B * H,
    padded, 4), LSE's two numbers, delta, and the weight, which is not subtracted. Rows from M on
    get lse +inf and delta 0, which makes their p zero.
    """
    blocks_m = padded // BLOCK_M
    pid = tl.program_id(0)
    bh = pid // blocks_m
    b = bh // H
    h = bh % H
    first_row = (pid % blocks_m) * BLOCK_M
    place = wide(b) * out_b + wide(h) * out_h
    out = load_tile(OUT + place, out_m, first_row, M, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    if HAS_LOW:
        out += load_tile(LOW + place, out_m, first_row, M, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    do = load_tile(
        DO + wide(b) * do_b + wide(h) * do_h, do_m, first_row, M, BLOCK_M, D, BLOCK_D, True
    )
    delta = tl.sum(out * do.to(tl.float32), 1)
    lse, log_total = _load_lse(LSE, bh, M, first_row, BLOCK_M, APART)
    lanes = tl.arange(0, BLOCK_M)
    if SEGMENTS > 0:
        W += wide(b) * w_b + wide(h) * w_h
        top = largest_weight(W, w_m, first_row, M, SEGMENTS, BLOCK_M)
    columns = tl.arange(0, COLUMNS)[None, :]
    tile = columns
    if FOLDED:
        if pid == 0:
            store_part_weights(ROWS, columns, R)
        ROWS += 2 * COLUMNS
        tile = tl.zeros([BLOCK_M, COLUMNS], dtype=tl.float32)
        if R > 0:
            QF += wide(b) * qf_b + wide(h) * qf_h
            tile = load_tile(QF, qf_m, first_row, M, BLOCK_M, COLUMNS, COLUMNS, True).to(tl.float32)
        tile = parts(tile, columns, R + 3, -delta, ROWS.dtype.element_ty)
    for segment in range(0, SEGMENTS if SEGMENTS > 0 else 1):
        shifted = lse
        weight = delta * 0.0
        if SEGMENTS > 0:
            weight = load_weights(W + segment, w_m, first_row, M, BLOCK_M)
            if not APART:
                shifted = lse - (weight - top) * LOG2E
        base = (wide(segment) * heads + bh) * padded + first_row
        store_row(
            ROWS, base, lanes, tile, columns, lse, log_total, shifted, delta, weight, unit,
            R, FOLDED, APART,
        )  # fmt: skip


@triton.jit
def load_two(BASE, first_row, BLOCK_M: tl.constexpr):
    """Both columns of rows of two values, loaded together."""
    both = tl.load(BASE + 2 * first_row + tl.arange(0, 2 * BLOCK_M))
    return tl.split(tl.reshape(both, [BLOCK_M, 2]))


@triton.jit
def load_four(ROWS, first_row, BLOCK_M: tl.constexpr):
    """The columns of rows of four values, loaded together."""
    four = tl.load(ROWS + 4 * first_row + tl.arange(0, 4 * BLOCK_M))
    first_third, second_fourth = tl.split(tl.reshape(four, [BLOCK_M, 2, 2]))
    first, third = tl.split(first_third)
    second, fourth = tl.split(second_fourth)
    return first, second, third, fourth


@triton.jit
def weight_tile(ROWS, which, ROW_COUNT: tl.constexpr):
    """(ROW_COUNT, COLUMNS), each row the weights of lse (`which` 0) or delta (1), with which ROWS
    begins.

    It is loaded, because a computed operand would be held in registers, which delays the tensor
    cores' products.
    """
    columns = tl.arange(0, COLUMNS)[None, :]
    return tl.load(ROWS + which * COLUMNS + tl.arange(0, ROW_COUNT)[:, None] * 0 + columns)


@triton.jit
def _key_pointers(base, stride, start, keys, cols):
    return base + wide(start) * stride + (keys - start)[:, None] * stride + cols[None, :]


@triton.jit
def _repeat_tile(
    base, stride, start, end, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """As load_tile; rows from `end` on repeat the last before it."""
    rows = tl.minimum(tl.arange(0, ROWS), end - 1 - start)
    cols = tl.arange(0, BLOCK_COLS)
    pointers = base + wide(start) * stride + rows[:, None] * stride + cols[None, :]
    if COLS != BLOCK_COLS:
        return tl.load(pointers, mask=(cols < COLS)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_tile(
    BASE, stride, start, end, tile, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    rows = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_COLS)
    pointers = BASE + wide(start) * stride + rows[:, None] * stride + cols[None, :]
    inside = (start + rows < end)[:, None] & (cols < COLS)[None, :]
    tl.store(pointers, tile.to(BASE.dtype.element_ty), mask=inside)


@triton.jit
def _load_pairs_by_key(
    base, stride, first_row, row_end, first_key, key_end, whole, OTHER: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """load_pairs as (keys, queries). `whole` is the same for all tiles of a program."""
    if whole:
        tile = load_pairs(
            base, stride, first_row, row_end, first_key, key_end, OTHER, ROWS, KEYS, False
        )
    else:
        tile = load_pairs(
            base, stride, first_row, row_end, first_key, key_end, OTHER, ROWS, KEYS, True
        )
    return tl.trans(tile)


@triton.jit
def _store_pairs(
    BASE, stride, first_row, row_end, first_key, key_end, tile,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ADD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Write a tile (ADD: add it) to the places from which load_pairs would load it."""
    pointers, inside = pair_tile(
        BASE, stride, first_row, row_end, first_key, key_end, ROWS, KEYS, EDGE
    )
    if ADD:
        tl.atomic_add(pointers, tile, mask=inside, sem="relaxed")
    else:
        tl.store(pointers, tile.to(BASE.dtype.element_ty), mask=inside)


@triton.jit
def keys_kernel(
    Q, K, V, QF, KF, DENSE, MASK, PAD, BLOCKS, SEED, DO, ROWS, DK, DV, DKF, DDENSE,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, qf_b, qf_m, qf_h, kf_b, kf_n, kf_h,
    dense_b, dense_h, dense_m, mask_b, mask_h, mask_m, pad_b, do_b, do_m, do_h,
    dk_s, dkf_s, dkf_b, dkf_n, dkf_h, dd_s, dd_b, dd_h, dd_m,
    heads, H, M, N, splits, split_rows, num_blocks, padded, score_scale, dk_scale, dropout_p,
    keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr, PAD_KIND: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_KV: tl.constexpr, NEED_KF: tl.constexpr, DENSE_GRAD: tl.constexpr, SHARED_KF: tl.constexpr,
    FOLDED: tl.constexpr, VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of keys against queries split * split_rows .. + split_rows. Tiles are (keys,
    queries).

    DK, DV (splits, B, N, H, D), DKF written (SHARED_KF: added to).
    DENSE_GRAD: 0 none, 1 written, 2 added to, 3 summed over the queries and written.
    BLOCKS (num_blocks, 4): see problem.block_table; none straddles two segments.
    """
    pid = tl.program_id(0)
    block = pid % num_blocks
    split = (pid // num_blocks) % splits
    bh = pid // (num_blocks * splits)
    b = bh // H
    h = bh % H
    q_h, k_h, v_h, do_h = multiples(q_h, k_h, v_h, do_h, VECTOR)
    start = block * BLOCK_N
    end = N
    segment = 0
    shift = 0
    if SEGMENTS > 0:
        shift = tl.load(BLOCKS + 4 * block + 3)
        start = tl.load(BLOCKS + 4 * block)
        end = tl.load(BLOCKS + 4 * block + 1)
        segment = tl.load(BLOCKS + 4 * block + 2)
    lanes = tl.arange(0, BLOCK_N)
    inside = start + lanes < end
    whole = start + BLOCK_N <= end
    # Beyond the end the last key is repeated: its scores are finite, so p needs no mask in the
    # loop, and what these rows of dk and dv collect is not stored.
    keys = tl.minimum(start + lanes, end - 1)
    cols = tl.arange(0, BLOCK_D)
    in_head = (cols < D)[None, :]
    k_pointers = _key_pointers(K + wide(b) * k_b + wide(h) * k_h, k_n, start, keys, cols)
    v_pointers = _key_pointers(V + wide(b) * v_b + wide(h) * v_h, v_n, start, keys, cols)
    if D == BLOCK_D:
        k = tl.load(k_pointers)
        v = tl.load(v_pointers)
    else:
        k = tl.load(k_pointers, mask=in_head, other=0.0)
        v = tl.load(v_pointers, mask=in_head, other=0.0)
    if BLOCK_R > 0:
        KF += wide(b) * kf_b + wide(h) * kf_h + wide(start) * kf_n
        kf = tl.load(KF + (keys - start)[:, None] * kf_n + tl.arange(0, BLOCK_R)[None, :])
        QF += wide(b) * qf_b + wide(h) * qf_h
        dkf = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    row_values: tl.constexpr = COLUMNS if FOLDED else 4 if APART else 2
    if FOLDED:
        of_delta = weight_tile(ROWS, 1, BLOCK_N)
        if BLOCK_R == 0:
            kf = weight_tile(ROWS, 0, BLOCK_N)  # as prepare_kernel has put them into k_factor
        ROWS += 2 * COLUMNS
    row_lo = split * split_rows
    row_hi = tl.minimum(row_lo + split_rows, M)
    if PAD_KIND > 0:
        PAD += wide(b) * pad_b
        if PAD_KIND == 1:
            visible = tl.load(PAD + keys) == 0
        else:
            pad = bounded(tl.load(PAD + keys)) * LOG2E
            visible = pad > float("-inf")
        row_hi = tl.where(tl.max((visible & inside).to(tl.int32), 0) > 0, row_hi, row_lo)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    Q += wide(b) * q_b + wide(h) * q_h
    DO += wide(b) * do_b + wide(h) * do_h
    ROWS += (wide(segment) * heads + bh) * padded * row_values
    if HAS_DENSE:
        DENSE += wide(b) * dense_b + wide(h) * dense_h
    if HAS_MASK:
        MASK += wide(b) * mask_b + wide(h) * mask_h
    DDENSE += wide(split) * dd_s + wide(b) * dd_b + wide(h) * dd_h

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    column_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first_row in range(row_lo, row_hi, BLOCK_M):
        q = _repeat_tile(Q, q_m, first_row, row_hi, BLOCK_M, D, BLOCK_D)
        s = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if FOLDED:
            lanes_m = tl.arange(0, BLOCK_M)[:, None]
            qf = tl.load(
                ROWS + first_row * COLUMNS + lanes_m * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            )
        elif BLOCK_R > 0:
            qf = _repeat_tile(QF, qf_m, first_row, row_hi, BLOCK_M, BLOCK_R, BLOCK_R)
        if FOLDED or BLOCK_R > 0:
            s = dot(kf, tl.trans(qf), s)
        s = dot(k, tl.trans(q), s)
        # Issued before the exponentials, which the tensor cores then overlap.
        do = _repeat_tile(DO, do_m, first_row, row_hi, BLOCK_M, D, BLOCK_D)
        dp = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if FOLDED:
            dp = dot(of_delta, tl.trans(qf), dp)
        dp = dot(v, tl.trans(do), dp)
        if FOLDED:
            x = s * score_scale
        elif APART:
            peak, log_total, delta, weight = load_four(ROWS, first_row, BLOCK_M)
            dense = s
            padding = s
            if HAS_DENSE:
                dense = _load_pairs_by_key(
                    DENSE,
                    dense_m,
                    first_row,
                    row_hi,
                    start,
                    end,
                    whole,
                    float("-inf"),
                    BLOCK_M,
                    BLOCK_N,
                )
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
        p = tl.exp2(x)
        if HAS_MASK:
            hidden = _load_pairs_by_key(
                MASK, mask_m, first_row, row_hi, start, end, whole, 1, BLOCK_M, BLOCK_N
            )
            p = tl.where(hidden == 0, p, 0.0)
        if PAD_KIND == 1:
            p = tl.where(visible[:, None], p, 0.0)
        dropped = p
        if DROPOUT:
            keep = keep_tile_by_key(seed, bh, first_row, start + shift, dropout_p, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, p, 0.0)
        dv = dot(dropped.to(do.dtype), do, dv)
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        if FOLDED:
            ds = p * dp
        else:
            ds = p * (dp - delta[None, :])
        half = ds.to(q.dtype)
        if NEED_KV:
            dk = dot(half, q, dk)
        if BLOCK_R > 0 and NEED_KF:
            dkf = dot(half, qf, dkf)
        if DENSE_GRAD == 3:
            column_sum += tl.sum(ds, 1)
        elif DENSE_GRAD > 0:
            tile = tl.trans(ds)
            if whole:
                _store_pairs(
                    DDENSE,
                    dd_m,
                    first_row,
                    row_hi,
                    start,
                    end,
                    tile,
                    BLOCK_M,
                    BLOCK_N,
                    DENSE_GRAD == 2,
                    False,
                )
            else:
                _store_pairs(
                    DDENSE,
                    dd_m,
                    first_row,
                    row_hi,
                    start,
                    end,
                    tile,
                    BLOCK_M,
                    BLOCK_N,
                    DENSE_GRAD == 2,
                    True,
                )

    if NEED_KV:
        if DROPOUT:
            dv = dv * keep_scale
        base = wide(split) * dk_s + (wide(b) * N * H + h) * D
        _store_tile(DK + base, H * D, start, end, dk * dk_scale, BLOCK_N, D, BLOCK_D)
        _store_tile(DV + base, H * D, start, end, dv, BLOCK_N, D, BLOCK_D)
    if BLOCK_R > 0 and NEED_KF:
        DKF += wide(split) * dkf_s + wide(b) * dkf_b + wide(h) * dkf_h
        if SHARED_KF:
            ranks = tl.arange(0, BLOCK_R)
            pointers = DKF + wide(start) * dkf_n + lanes[:, None] * dkf_n + ranks[None, :]
            tl.atomic_add(pointers, dkf, mask=inside[:, None] & (ranks < R)[None, :], sem="relaxed")
        else:
            _store_tile(DKF, dkf_n, start, end, dkf, BLOCK_N, R, BLOCK_R)
    if DENSE_GRAD == 3:
        tl.store(DDENSE + keys, column_sum, mask=inside)


@triton.jit
def _queries_step(
    dq, dqf, row_sum, q, qf, do, lse, log_total, weight, delta, of_delta,
    K, V, KF, DENSE, MASK, PAD, seed, bh, k_n, v_n, kf_n, dense_m, mask_m,
    first_row, start, end, shift, M, score_scale, dropout_p, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, SEGMENTS: tl.constexpr, HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr,
    PAD_KIND: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, NEED_Q: tl.constexpr,
    NEED_QF: tl.constexpr,
    NEED_W: tl.constexpr, FOLDED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    k = load_tile(K, k_n, start, end, BLOCK_N, D, BLOCK_D, EDGE)
    s = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
    if BLOCK_R > 0:
        kf = load_tile(KF, kf_n, start, end, BLOCK_N, BLOCK_R, BLOCK_R, EDGE)
        s = dot(qf, tl.trans(kf), s)
    v = load_tile(V, v_n, start, end, BLOCK_N, D, BLOCK_D, EDGE)
    dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))
    if FOLDED:
        dp = dot(delta, tl.trans(of_delta), dp)
    keys = start + tl.arange(0, BLOCK_N)
    if APART:
        dense = s
        padding = s
        if HAS_DENSE:
            dense = load_pairs(
                DENSE, dense_m, first_row, M, start, end, float("-inf"), BLOCK_M, BLOCK_N, EDGE
            )
        if PAD_KIND == 2:
            padding = (bounded(load_keys(PAD, keys, end, float("-inf"), EDGE)) * LOG2E)[None, :]
        x = add_terms(
            s, score_scale, dense, padding, weight[:, None], HAS_DENSE, PAD_KIND == 2, SEGMENTS > 0
        )
        x = (x - lse[:, None]) - log_total[:, None]
    else:
        x = s * score_scale - lse[:, None]
    p = tl.exp2(x)
    if HAS_MASK:
        p = tl.where(
            load_pairs(MASK, mask_m, first_row, M, start, end, 1, BLOCK_M, BLOCK_N, EDGE) == 0,
            p,
            0.0,
        )
    if PAD_KIND == 1:
        p = tl.where((load_keys(PAD, keys, end, 1, EDGE) == 0)[None, :], p, 0.0)
    elif EDGE and PAD_KIND == 0:
        p = tl.where((keys < end)[None, :], p, 0.0)
    if DROPOUT:
        keep = keep_tile(seed, bh, first_row, start + shift, dropout_p, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    if FOLDED:
        ds = p * dp
    else:
        ds = p * (dp - delta[:, None])
    half = ds.to(k.dtype)
    if NEED_Q:
        dq = dot(half, k, dq)
    if BLOCK_R > 0 and NEED_QF:
        dqf = dot(half, kf, dqf)
    if NEED_W:
        row_sum += tl.sum(ds, 1)
    return dq, dqf, row_sum


@triton.jit
def queries_kernel(
    Q, K, V, QF, KF, W, ENDS, DENSE, MASK, PAD, BLOCKS, ORDER, COUNTS, SEED, DO, LSE, ROWS, DQ,
    DQF, DW,
    q_b, q_m, q_h, k_b, k_n, k_h, v_b, v_n, v_h, qf_b, qf_m, qf_h, kf_b, kf_n, kf_h, w_b, w_m, w_h,
    dense_b, dense_h, dense_m, mask_b, mask_h, mask_m, pad_b, do_b, do_m, do_h, dq_s, dqf_s, dw_s,
    H, M, N, splits, split_keys, num_blocks, padded, score_scale, dq_scale, dropout_p, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_DENSE: tl.constexpr, HAS_MASK: tl.constexpr, PAD_KIND: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_Q: tl.constexpr, NEED_QF: tl.constexpr, NEED_W: tl.constexpr, FOLDED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DQ (splits, B, M, H, D) and DQF (splits, B, M, H, R) written, DW (splits, B, M, H, SEGMENTS)
    added to."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)
    split = (pid // blocks_m) % splits
    bh = pid // (blocks_m * splits)
    b = bh // H
    h = bh % H
    q_h, k_h, v_h, do_h = multiples(q_h, k_h, v_h, do_h, VECTOR)
    first_row = (pid % blocks_m) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)

    K += wide(b) * k_b + wide(h) * k_h
    V += wide(b) * v_b + wide(h) * v_h
    q = load_tile(Q + wide(b) * q_b + wide(h) * q_h, q_m, first_row, M, BLOCK_M, D, BLOCK_D, True)
    do = load_tile(
        DO + wide(b) * do_b + wide(h) * do_h, do_m, first_row, M, BLOCK_M, D, BLOCK_D, True
    )
    lse, log_total = _load_lse(LSE, bh, M, first_row, BLOCK_M, APART)
    if FOLDED:
        of_delta = weight_tile(ROWS, 1, BLOCK_N)
        ROWS += 2 * COLUMNS
        delta = load_tile(
            ROWS + wide(bh) * padded * COLUMNS,
            COLUMNS,
            first_row,
            M,
            BLOCK_M,
            COLUMNS,
            COLUMNS,
            True,
        )
    else:
        if APART:
            delta = load_row_values(ROWS + wide(bh) * padded * 4 + 2, 4, first_row, M, BLOCK_M, 0.0)
        else:
            delta = load_row_values(ROWS + wide(bh) * padded * 2 + 1, 2, first_row, M, BLOCK_M, 0.0)
        of_delta = delta
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    qf = q
    dqf = dq
    if BLOCK_R > 0:
        KF += wide(b) * kf_b + wide(h) * kf_h
        QF += wide(b) * qf_b + wide(h) * qf_h
        qf = load_tile(QF, qf_m, first_row, M, BLOCK_M, BLOCK_R, BLOCK_R, True)
        dqf = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    if SEGMENTS > 0:
        W += wide(b) * w_b + wide(h) * w_h
    DW += wide(split) * dw_s + ((wide(b) * M + first_row) * H + h) * SEGMENTS
    dw_offsets = tl.arange(0, BLOCK_M) * H * SEGMENTS
    if HAS_DENSE:
        DENSE += wide(b) * dense_b + wide(h) * dense_h
    if HAS_MASK:
        MASK += wide(b) * mask_b + wide(h) * mask_h
    seed = 0
    drop_shift = 0
    if DROPOUT:
        seed = tl.load(SEED)
    shift = lse
    weight = lse
    top = lse
    if SEGMENTS > 0 and not APART:
        top = largest_weight(W, w_m, first_row, M, SEGMENTS, BLOCK_M)

    if PAD_KIND > 0:
        PAD += wide(b) * pad_b
        ORDER += b * num_blocks
        count = tl.load(COUNTS + b)
        share = tl.cdiv(count, splits)
        lo = split * share
        hi = tl.minimum(lo + share, count)
        whole = lo
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        if SEGMENTS == 0:
            # The last block alone may be cut short: the others need no masks.
            last = tl.load(ORDER + tl.maximum(hi - 1, 0))
            whole = tl.where((hi > lo) & ((last + 1) * BLOCK_N > N), hi - 1, hi)
            for index in range(lo, whole):
                start = tl.load(ORDER + index) * BLOCK_N
                dq, dqf, row_sum = _queries_step(
                    dq, dqf, row_sum, q, qf, do, lse, log_total, weight, delta, of_delta,
                    K, V, KF, DENSE, MASK, PAD, seed, bh,
                    k_n, v_n, kf_n, dense_m, mask_m, first_row, start, N, drop_shift, M,
                    score_scale, dropout_p, keep_scale,
                    BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK, PAD_KIND,
                    APART, DROPOUT,
                    NEED_Q, NEED_QF, NEED_W, FOLDED, False,
                )  # fmt: skip
        for index in range(whole, hi):
            block = tl.load(ORDER + index)
            start = tl.load(BLOCKS + 4 * block)
            end = tl.load(BLOCKS + 4 * block + 1)
            segment = tl.load(BLOCKS + 4 * block + 2)
            if SEGMENTS > 0:
                drop_shift = tl.load(BLOCKS + 4 * block + 3)
                weight = load_weights(W + segment, w_m, first_row, M, BLOCK_M)
            row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            dq, dqf, row_sum = _queries_step(
                dq, dqf, row_sum, q, qf, do, shift, log_total, weight, delta, of_delta,
                K, V, KF, DENSE, MASK, PAD, seed, bh,
                k_n, v_n, kf_n, dense_m, mask_m, first_row, start, end, drop_shift, M, score_scale,
                dropout_p, keep_scale,
                BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK, PAD_KIND,
                APART, DROPOUT,
                NEED_Q, NEED_QF, NEED_W, FOLDED, True,
            )  # fmt: skip
            if NEED_W:
                # No other program adds to these rows. Atomic because they are added to repeatedly.
                tl.atomic_add(DW + dw_offsets + segment, row_sum, mask=rows < M, sem="relaxed")
    else:
        split_lo = split * split_keys
        split_hi = tl.minimum(split_lo + split_keys, N)
        for segment in range(0, SEGMENTS if SEGMENTS > 0 else 1):
            lo = split_lo
            hi = split_hi
            if SEGMENTS > 0:
                drop_shift = dropout_shift(tl.load(ENDS + segment), segment)
                lo = tl.maximum(lo, tl.load(ENDS + segment))
                hi = tl.maximum(lo, tl.minimum(hi, tl.load(ENDS + segment + 1)))
                weight = load_weights(W + segment, w_m, first_row, M, BLOCK_M)
                if not APART:
                    shift = lse - (weight - top) * LOG2E
            row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
            tail = lo + (hi - lo) // BLOCK_N * BLOCK_N
            for start in range(lo, tail, BLOCK_N):
                dq, dqf, row_sum = _queries_step(
                    dq, dqf, row_sum, q, qf, do, shift, log_total, weight, delta, of_delta,
                    K, V, KF, DENSE, MASK, PAD, seed, bh,
                    k_n, v_n, kf_n, dense_m, mask_m, first_row, start, hi, drop_shift, M,
                    score_scale, dropout_p, keep_scale,
                    BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK, PAD_KIND,
                    APART, DROPOUT,
                    NEED_Q, NEED_QF, NEED_W, FOLDED, False,
                )  # fmt: skip
            if tail < hi:
                dq, dqf, row_sum = _queries_step(
                    dq, dqf, row_sum, q, qf, do, shift, log_total, weight, delta, of_delta,
                    K, V, KF, DENSE, MASK, PAD, seed, bh,
                    k_n, v_n, kf_n, dense_m, mask_m, first_row, tail, hi, drop_shift, M,
                    score_scale, dropout_p, keep_scale,
                    BLOCK_M, BLOCK_N, D, BLOCK_D, BLOCK_R, SEGMENTS, HAS_DENSE, HAS_MASK, PAD_KIND,
                    APART, DROPOUT,
                    NEED_Q, NEED_QF, NEED_W, FOLDED, True,
                )  # fmt: skip
            if NEED_W:
                tl.atomic_add(DW + dw_offsets + segment, row_sum, mask=rows < M, sem="relaxed")

    if NEED_Q:
        base = wide(split) * dq_s + (wide(b) * M * H + h) * D
        _store_tile(DQ + base, H * D, first_row, M, dq * dq_scale, BLOCK_M, D, BLOCK_D)
    if BLOCK_R > 0 and NEED_QF:
        base = wide(split) * dqf_s + (wide(b) * M * H + h) * R
        _store_tile(DQF + base, H * R, first_row, M, dqf, BLOCK_M, R, BLOCK_R)
