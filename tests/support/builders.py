"""Tensors and calls of attention that tests of several folders make."""

from __future__ import annotations

import torch

from flashbias_patch.attention import selfcheck
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.bias import WindowMaskParts, WindowParts

FEATURES = ("factors", "segments", "dense", "mask", "padding", "windows", "window mask")


def call_of_zeros(
    features=("factors",),
    D=16,
    dtype=torch.float32,
    dropout_p=0.0,
    grad=True,
    M=9,
    N=14,
    Dv=None,
    R=3,
    scale=0.2,
):
    """AttentionInputs of zeros with these of FEATURES: what its class is, not what it computes."""
    B, H = 1, 2
    made = dict(
        q=torch.zeros(B, M, H, D, dtype=dtype, requires_grad=grad),
        k=torch.zeros(B, N, H, D, dtype=dtype),
        v=torch.zeros(B, N, H, Dv or D, dtype=dtype),
        dropout_p=dropout_p,
        scale=scale,
    )
    if "factors" in features:
        made.update(
            q_factor=torch.zeros(1, M, 1, R, dtype=dtype),
            k_factor=torch.zeros(B, N, H, R, dtype=dtype),
        )
    if "segments" in features:
        made.update(segment_weights=torch.zeros(B, M, 1, 3), segment_lengths=(N - 2, 1, 1))
    if "dense" in features:
        made.update(dense=torch.zeros(1, H, M, N, requires_grad=grad))
    if "mask" in features:
        made.update(mask=torch.zeros(1, H, M, N, dtype=torch.bool))
    if "padding" in features:
        made.update(key_padding=torch.zeros(B, N))
    frames, sides = selfcheck.grids_of(N, 2)
    if "windows" in features:
        made.update(
            windows=WindowParts(
                torch.zeros(B, M, H, 2), torch.zeros(1, M, 2, 3).int(), frames, sides, (1.0, 2.0)
            )
        )
    if "window mask" in features:
        made.update(window_mask=WindowMaskParts(torch.zeros(B, M, 2, 3).int(), frames, sides))
    return AttentionInputs(**made)


def tensors(M=6, N=10, H=2, D=8, B=1, grad=True, dtype=torch.float32):
    """q (B, M, H, D), k and v (B, N, H, D): the same numbers every time."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(B, n, H, D, generator=g, dtype=dtype).requires_grad_(grad) for n in (M, N, N)
    ]
