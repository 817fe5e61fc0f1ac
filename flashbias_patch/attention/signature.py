"""What backends succeed or fail by: the class of a call. Self-checks, verdicts and breakers are
kept by it.

A class is a plain tuple, since every call hashes one: (device, dtype, D, Dv, aligned, dropout,
grad, scale > 0, deterministic, factors, segments, dense, mask, padding, windows, window mask).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Tuple

import torch
from torch import Tensor

from .._torch_internals import deterministic

if TYPE_CHECKING:
    from .inputs import AttentionInputs

Key = Tuple[Any, ...]

# Kernels that lose the tail of a tile are right at whole tiles; 128 is the largest that is in use.
ALIGNMENT = 128


def key_of(inputs: AttentionInputs, grad: Optional[bool] = None) -> Key:
    """The class of a call. `grad` overrides whether a gradient is wanted (grad mode is off in
    backward).

    Dropout implies `grad`: it is training, and a checkpointed forward (without grad) must be
    answered by the backend that will recompute it (with grad), or its dropout would differ.
    """
    (
        q,
        k,
        v,
        q_factor,
        k_factor,
        weights,
        lengths,
        dense,
        mask,
        padding,
        dropout_p,
        scale,
        windows,
        window_mask,
    ) = inputs
    _, M, _, D = q.shape
    _, N, _, Dv = v.shape
    factors = segments = added = masked = padded = local = local_mask = None
    if q_factor is not None and k_factor is not None:
        Bq, _, Hq, R = q_factor.shape
        Bk, _, Hk, _ = k_factor.shape
        bucket = rank_bucket(R)
        factors = (bucket, bucket == R, Bq == 1, Hq == 1, Bk == 1, Hk == 1)
    if weights is not None:
        Bw, _, Hw, S = weights.shape
        segments = (S, weights.dtype, Bw == 1, Hw == 1)
    if dense is not None:
        Bd, Hd, Md, _ = dense.shape
        added = (dense.dtype, dense.requires_grad, Bd == 1, Hd == 1, Md == 1)
    if mask is not None:
        Bm, Hm, Mm, _ = mask.shape
        masked = (Bm == 1, Hm == 1, Mm == 1)
    if padding is not None:
        padded = padding.dtype
    if windows is not None:
        Bw, _, Hw, S = windows.weights.shape
        box = windows.sigmas is None
        local = (S, box, windows.weights.dtype, Bw == 1, Hw == 1, windows.centres.shape[0] == 1)
    if window_mask is not None:
        Bc, _, S, _ = window_mask.centres.shape
        local_mask = (S, Bc == 1)
    if grad is None:
        grad = (
            dropout_p > 0
            or torch.is_grad_enabled()
            and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or _wants_grad(q_factor)
                or _wants_grad(k_factor)
                or _wants_grad(weights)
                or _wants_grad(dense)
                or (windows is not None and windows.weights.requires_grad)
            )
        )
    return (
        q.device,
        q.dtype,
        D,
        Dv,
        not (M % ALIGNMENT or N % ALIGNMENT),
        dropout_p > 0,
        grad,
        scale > 0,
        deterministic(),
        factors,
        segments,
        added,
        masked,
        padded,
        local,
        local_mask,
    )


def rank_bucket(rank: int) -> int:
    """The power of two that holds `rank`."""
    return 1 << (int(rank) - 1).bit_length() if rank else 0  # torch.jit.trace makes sizes tensors


def _wants_grad(tensor: Optional[Tensor]) -> bool:
    return tensor is not None and tensor.requires_grad


def describe(key: Key) -> str:
    """The class in words, for logs and status: `cuda float16 D32 R8 grad key_padding`."""
    device, dtype, D, Dv, aligned, dropout, grad, positive, deterministic = key[:9]
    factors, segments, dense, mask, padding, windows, window_mask = key[9:]
    words = [
        device.type, str(dtype)[6:], f"D{D}",
        Dv != D and f"Dv{Dv}",
        factors and f"R{factors[0]}",
        aligned and f"lengths of {ALIGNMENT}s",
        dropout and "dropout",
        grad and "grad",
        not positive and "scale <= 0",
        deterministic and "deterministic",
        segments and f"segments{segments[0]}",
        dense and ("dense with gradient" if dense[1] else "dense"),
        mask and "mask",
        padding and "key_padding",
        windows and f"{'' if windows[1] else 'gaussian '}windows{windows[0]}",
        window_mask and f"window mask{window_mask[0]}",
    ]  # fmt: skip
    return " ".join(word for word in words if word)
