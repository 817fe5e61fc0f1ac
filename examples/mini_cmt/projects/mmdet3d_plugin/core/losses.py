"""Focal loss over classes, weighted L1 over box codes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ALPHA, GAMMA = 0.25, 2.0


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over logits (n, classes); labels (n,), where the number of classes means background."""
    num_classes = logits.shape[-1]
    target = F.one_hot(labels, num_classes + 1)[:, :num_classes].to(logits.dtype)
    prob = logits.sigmoid()
    right = prob * target + (1 - prob) * (1 - target)
    weight = (ALPHA * target + (1 - ALPHA) * (1 - target)) * (1 - right) ** GAMMA
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum()


def code_loss(codes: Tensor, targets: Tensor, code_weights: Tensor) -> Tensor:
    """Sum of weighted L1 distances, (n, 10) each; what is unknown (nan) in `targets` costs
    nothing."""
    known = targets.isfinite()
    return ((codes - targets.nan_to_num()).abs() * code_weights * known).sum()
