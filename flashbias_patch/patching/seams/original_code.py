"""Count and log that the original code of an attention runs, and make its mask from the biases."""

from __future__ import annotations

from typing import Optional, Tuple

from torch import Tensor

from ... import telemetry
from ...attention.inputs import mask_4d
from ...bias import AttentionBias
from ..call_adapter import Bias
from ..route import Route


def count_original(name: str, why: str) -> None:
    telemetry.calls["original"] += 1
    telemetry.fallback(name, "call", f"the original code ran: {why}", level="info")


def note_original(name: str, why: str, opened: Route, own: Tuple[Bias, ...]) -> None:
    """Record that the core `name` runs its original code, which does not see the biases of this
    call."""
    count_original(name, why)
    opened.unsupported = why
    if own:
        telemetry.unreached(f"{name}: attention_bias", why)


def dense_mask(
    bias: AttentionBias, attn_mask: Optional[Tensor], B: int, H: int, M: int, N: int, like: Tensor
) -> Tensor:
    """Return bias + attn_mask for torch's multi-head attention: (B*H, M, N), with the dtype and
    device of `like`."""
    total = bias.dense().to(like.device, like.dtype)
    if attn_mask is not None:
        kind, mask = mask_4d(attn_mask, B, H, M, N)
        total = total.masked_fill(mask, float("-inf")) if kind == "bool" else total + mask
    return total.expand(B, H, M, N).reshape(B * H, M, N)
