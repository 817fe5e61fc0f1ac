"""Assign queries to objects at minimum cost."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .losses import ALPHA, GAMMA

MATCHED_CODES = 8  # all but the velocity, which is not always known


@torch.no_grad()
def hungarian_match(
    logits: Tensor,
    codes: Tensor,
    gt_labels: Tensor,
    gt_codes: Tensor,
    cls_weight: float,
    bbox_weight: float,
) -> Tuple[Tensor, Tensor]:
    """The queries that match, and the object of each.

    logits (M, classes), codes (M, 10), gt_labels (G,), gt_codes (G, 10).
    """
    if len(gt_labels) == 0:
        empty = torch.zeros(0, dtype=torch.long, device=logits.device)
        return empty, empty
    prob = logits.float().sigmoid()[:, gt_labels]
    miss = -ALPHA * (1 - prob) ** GAMMA * (prob + 1e-12).log()
    false_alarm = -(1 - ALPHA) * prob**GAMMA * (1 - prob + 1e-12).log()
    distance = torch.cdist(
        codes[:, :MATCHED_CODES].float(), gt_codes[:, :MATCHED_CODES].float(), p=1
    )
    cost = (cls_weight * (miss - false_alarm) + bbox_weight * distance).cpu().numpy()
    queries, objects = linear_sum_assignment(np.nan_to_num(cost, nan=1e4, posinf=1e4, neginf=-1e4))
    return torch.as_tensor(queries, device=logits.device), torch.as_tensor(
        objects, device=logits.device
    )
