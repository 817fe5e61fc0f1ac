"""Gradients by the reference attention, with the kernels' own dropout: the fallback of backward
when its kernels fail."""

from __future__ import annotations

from itertools import compress
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ...bias.grids import WindowMaskParts, WindowParts
from .. import chunked_attention, reference_attention
from ..reference_attention import Dropout


class Call(NamedTuple):
    """The arguments of a fused attention call, and the seed of its forward's dropout (empty without
    dropout). The fields that reference_attention reads are named as in AttentionInputs."""

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
    needs: Tuple[bool, ...]  # in the order of OPERANDS
    windows: Optional[WindowParts] = None
    window_mask: Optional[WindowMaskParts] = None


def keep_threshold(dropout_p: float) -> int:
    """The least value of sixteen random bits that keeps a weight (common._threshold)."""
    return int(dropout_p * 65536 + 0.5)


def keep_scale(dropout_p: float) -> float:
    """1 / the share of weights that is kept."""
    return 65536 / (65536 - keep_threshold(dropout_p))


def dropout_shift(first_key: int, segment: int) -> int:
    """The offset of a segment's keys in dropout; the segment begins at `first_key`
    (common.dropout_shift)."""
    return (first_key + 15) // 16 * 16 + 16 * segment - first_key


def keep_mask(
    seed: Tensor, batch_heads: Tensor, rows: Tensor, keys: Tensor, dropout_p: float
) -> Tensor:
    """True for the attention weights that dropout keeps, as common.keep_tile draws them.
    Broadcasts; `keys` are counted as dropout counts them."""
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


# The operands that can have a gradient, in the order of Call.needs.
OPERANDS = (
    "q", "k", "v", "q_factor", "k_factor", "segment_weights", "dense", "window_weights",
)  # fmt: skip


def _operands(call: Call) -> Dict[str, Optional[Tensor]]:
    """The tensors of OPERANDS by name."""
    weights = None if call.windows is None else call.windows.weights
    return {name: weights if name == "window_weights" else getattr(call, name) for name in OPERANDS}


def _needed(call: Call) -> List[bool]:
    """For each of OPERANDS, True if it is there and needs a gradient."""
    operands = _operands(call).values()
    return [t is not None and need for t, need in zip(operands, (*call.needs, False))]


def dropout_of(call: Call) -> Optional[Dropout]:
    """The dropout of the kernels' forward."""
    if call.dropout_p <= 0:
        return None
    B, _, H, _ = call.q.shape
    N, device = call.k.shape[1], call.q.device
    heads = torch.arange(B * H, device=device).view(B, H, 1, 1)
    rows, keys = counted(call, N, device)
    rows = rows[None, None] if rows.dim() == 1 else rows[:, None]

    def kept(row: int, end_row: int, key: int, end_key: int) -> Tensor:
        some = rows[..., row:end_row, None]
        return keep_mask(call.seed, heads, some, keys[key:end_key], call.dropout_p)

    return Dropout(kept, keep_scale(call.dropout_p))


def plain_backward(
    call: Call, grad_out: Tensor, chunk_bytes: Optional[int] = None
) -> Tuple[Optional[Tensor], ...]:
    """Gradients of OPERANDS, None where call.needs says so, with `chunk_bytes` of scores at once
    (chunked_attention.chunks_of)."""
    needed = [name for name, need in zip(OPERANDS, _needed(call)) if need]
    chunks = chunked_attention.chunks_of(call, chunk_bytes)
    found = chunked_attention.gradients(call, grad_out, needed, chunks, dropout_of(call))
    return tuple(map(found.get, OPERANDS))


def differentiable_backward(call: Call, grad_out: Tensor) -> Tuple[Optional[Tensor], ...]:
    """As plain_backward, all queries at once; the gradients can be differentiated again if grad
    mode is on."""
    again, needed, dropout = torch.is_grad_enabled(), _needed(call), dropout_of(call)
    with torch.enable_grad(), internals.autocast_off():
        # An operand that was made of another one must not count for both.
        leaves: Dict[str, Any] = {
            name: t.view_as(t) if need and t is not None else t
            for (name, t), need in zip(_operands(call).items(), needed)
        }
        wanted = [*compress(leaves.values(), needed)]
        weights = leaves.pop("window_weights")
        windows = None if call.windows is None else call.windows._replace(weights=weights)
        out = reference_attention.attend(call._replace(**leaves, windows=windows), dropout)
        found = iter(
            torch.autograd.grad(out, wanted, grad_out, create_graph=again, allow_unused=True)
        )
    return tuple(next(found) if need else None for need in needed)
