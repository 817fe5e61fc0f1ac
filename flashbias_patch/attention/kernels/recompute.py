"""Gradients by plain PyTorch, a chunk of queries at a time: what backward falls back to when its
kernels fail."""

from __future__ import annotations

import math
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ...bias.grids import WindowMaskParts, WindowParts, dense_bias, hidden

CHUNK_ELEMENTS = 1 << 26  # scores held at once
BY_ROW = (0, 3, 5, 7)  # of Call.needs, those with a value for each query


class Call(NamedTuple):
    """What a fused attention call was given, and what its forward drew (seed, empty without
    dropout)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Optional[Tensor]
    k_factor: Optional[Tensor]
    segment_weights: Optional[Tensor]
    segment_lengths: Tuple[int, ...]
    dense: Optional[Tensor]
    mask: Optional[Tensor]
    key_padding: Optional[Tensor]
    dropout_p: float
    scale: float
    seed: Tensor
    needs: Tuple[
        bool, ...
    ]  # of q, k, v, q_factor, k_factor, segment_weights, dense, the weights of windows
    windows: Optional[WindowParts] = None
    window_mask: Optional[WindowMaskParts] = None


def keep_threshold(dropout_p: float) -> int:
    """Of sixteen random bits those from here on keep a weight (common._threshold)."""
    return int(dropout_p * 65536 + 0.5)


def keep_scale(dropout_p: float) -> float:
    """1 / the share that is kept."""
    return 65536 / (65536 - keep_threshold(dropout_p))


def dropout_shift(first_key: int, segment: int) -> int:
    """What dropout adds to a key of the segment that begins at `first_key`
    (common.dropout_shift)."""
    return (first_key + 15) // 16 * 16 + 16 * segment - first_key


def keep_mask(
    seed: Tensor, batch_heads: Tensor, rows: Tensor, keys: Tensor, dropout_p: float
) -> Tensor:
    """What dropout keeps, as common.keep_tile draws it. Broadcasts; `keys` are counted as dropout
    counts them."""
    low = 0xFFFFFFFF
    seed = seed.to(torch.int64)
    key0, key1 = seed & low, (seed >> 32) & low
    nil = (batch_heads + rows + keys) * 0
    c0, c1, c2, c3 = nil + (keys & ~9), nil + (rows & ~8), nil + batch_heads, nil

    def product(
        a: int, b: Tensor
    ) -> Tuple[Tensor, Tensor]:  # high and low words of a 32 x 32 bit product
        by_low, by_high = a * (b & 0xFFFF), a * (b >> 16)
        middle = (by_low >> 16) + by_high
        return (middle >> 16) & low, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)

    for _ in range(7):
        high0, low0 = product(0xD2511F53, c0)
        high2, low2 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    row_bit, key_bit = nil + (rows & 8) > 0, nil + (keys & 8) > 0
    word = torch.where(key_bit, torch.where(row_bit, c3, c2), torch.where(row_bit, c1, c0))
    sixteen = torch.where(nil + (keys & 1) > 0, word >> 16, word & 0xFFFF)
    return sixteen >= keep_threshold(dropout_p)


def counted_keys(lengths: Tuple[int, ...], N: int, device: torch.device) -> Tensor:
    """(N,) keys as dropout counts them: each segment from a multiple of sixteen."""
    keys, lo = torch.arange(N, device=device), 0
    for segment, length in enumerate(lengths):
        keys[lo : lo + length] += dropout_shift(lo, segment)
        lo += length
    return keys


def counted(call: Call, N: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """(M,) or (B|1, M) queries and (N,) keys as dropout counts them."""
    if call.windows is None and call.window_mask is None:
        rows = torch.arange(call.q.shape[1], device=device)
        return rows, counted_keys(
            call.segment_lengths if call.segment_weights is not None else (), N, device
        )
    from . import window_patches, window_tables  # which imports Triton

    local = window_tables.make(*window_tables.arguments(call.windows, call.window_mask))
    order = window_tables.tables_of(local).order[:, : call.q.shape[1]].long()
    return order.argsort(1), window_patches.counted_keys(local.frames, device)


def _operands(call: Call) -> List[Optional[Tensor]]:
    """The tensors that can have a gradient, in the order of Call.needs."""
    windows = None if call.windows is None else call.windows.weights
    return [
        call.q,
        call.k,
        call.v,
        call.q_factor,
        call.k_factor,
        call.segment_weights,
        call.dense,
        windows,
    ]


def plain_backward(
    call: Call, grad_out: Tensor, error: Optional[BaseException] = None
) -> Tuple[Any, ...]:
    """Gradients of q, k, v, q_factor, k_factor, segment_weights, dense and the weights of windows,
    None where call.needs says so."""
    B, M, H, D = call.q.shape
    N = call.k.shape[1]
    real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    tensors = _operands(call)
    needs = (*call.needs, False)[: len(tensors)]
    wanted = [t if t is not None and need else None for t, need in zip(tensors, needs)]
    total: List[Any] = [
        None if t is None else torch.zeros(t.shape, dtype=real, device=t.device) for t in wanted
    ]
    chunk = max(1, CHUNK_ELEMENTS // max(1, B * H * N))
    for lo in range(0, M if N else 0, chunk):
        hi = min(lo + chunk, M)
        pieces: List[Any] = []
        for place, tensor in enumerate(tensors):
            if tensor is not None and place in BY_ROW:
                tensor = tensor[:, lo:hi]
            elif place == 6 and tensor is not None and tensor.shape[2] > 1:
                tensor = tensor[:, :, lo:hi]
            if tensor is not None:
                tensor = tensor.detach().to(real).requires_grad_(wanted[place] is not None)
            pieces.append(tensor)
        with torch.enable_grad(), internals.autocast_off():
            out = _attend(call, pieces, lo, hi)
            leaves = [piece for piece in pieces if piece is not None and piece.requires_grad]
            found = iter(
                torch.autograd.grad(out, leaves, grad_out[:, lo:hi].to(real), allow_unused=True)
            )
        for place, piece in enumerate(pieces):
            if piece is None or not piece.requires_grad:
                continue
            grad = next(found)
            if grad is None:
                continue
            if place in BY_ROW:
                total[place][:, lo:hi] += grad
            elif place == 6 and total[6].shape[2] > 1:
                total[6][:, :, lo:hi] += grad
            else:
                total[place] += grad
    return tuple(None if t is None or w is None else t.to(w.dtype) for t, w in zip(total, wanted))


def differentiable_backward(call: Call, grad_out: Tensor) -> Tuple[Any, ...]:
    """As plain_backward, all queries at once; the gradients can be differentiated again if grad
    mode is on."""
    again = torch.is_grad_enabled()
    real = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    tensors = _operands(call)
    needs = (*call.needs, False)[: len(tensors)]
    with torch.enable_grad(), internals.autocast_off():
        # An operand that was made of another one must not count for both.
        leaves = [t.view_as(t) if t is not None and need else t for t, need in zip(tensors, needs)]
        out = _attend(call, [None if t is None else t.to(real) for t in leaves], 0, call.q.shape[1])
        wanted = [t for t, need in zip(leaves, needs) if t is not None and need]
        found = iter(
            torch.autograd.grad(
                out, wanted, grad_out.to(real), create_graph=again, allow_unused=True
            )
        )
    return tuple(next(found) if t is not None and need else None for t, need in zip(leaves, needs))


def _attend(call: Call, pieces: List[Any], lo: int, hi: int) -> Tensor:
    q, k, v, q_factor, k_factor, weights, dense, *held = pieces
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * call.scale
    if q_factor is not None:
        scores = scores + torch.matmul(q_factor.transpose(1, 2), k_factor.permute(0, 2, 3, 1))
    if weights is not None:
        lengths = torch.tensor(call.segment_lengths, device=q.device)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
        scores = scores + weights.transpose(1, 2)[..., owner]
    if dense is not None:
        scores = scores + dense
    if call.windows is not None:
        windows = call.windows._replace(weights=held[0], centres=call.windows.centres[:, lo:hi])
        scores = scores + dense_bias(windows)
    if call.window_mask is not None:
        scores = scores.masked_fill(
            hidden(call.window_mask._replace(centres=call.window_mask.centres[:, lo:hi])), -math.inf
        )
    if call.mask is not None:
        mask = call.mask if call.mask.shape[2] == 1 else call.mask[:, :, lo:hi]
        scores = scores.masked_fill(mask, -math.inf)
    if call.key_padding is not None:
        padding = call.key_padding[:, None, None]
        scores = (
            scores.masked_fill(padding, -math.inf)
            if padding.dtype == torch.bool
            else scores + padding
        )
    empty = (scores == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    if call.dropout_p > 0:
        device = q.device
        B, H, _, N = p.shape
        heads = torch.arange(B * H, device=device).view(B, H, 1, 1)
        rows, keys = counted(call, N, device)
        rows = rows[..., lo:hi, None] if rows.dim() == 1 else rows[:, None, lo:hi, None]
        keep = keep_mask(call.seed, heads, rows, keys, call.dropout_p)
        p = p * keep * keep_scale(call.dropout_p)
    return torch.einsum("bhmn,bnhd->bmhd", p, v)
