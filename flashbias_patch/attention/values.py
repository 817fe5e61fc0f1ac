"""Large and infinite numbers in additive terms, shifted to where backends are exact.

A constant that is added to a whole row does not change its softmax. Backends that keep one float32
logsumexp lose a row whose keys are all at -1e9 or finfo.min ("masked" without -inf): gradients are
then off by a factor of the number of keys.
"""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

LARGEST = 5e37  # kernels' common.LARGEST: sums of a few such numbers are finite
# Up to this, a row's maximum is subtracted, which is exact. Beyond, plain PyTorch's float32 scores
# lose digits that a subtraction would keep, and its result is the expected one: near -1e9 the mean
# over the keys.
FAR = 2.0**16
# The weight of a hidden segment, relative to the row's largest: finite in half precision, and zero
# after exp().
LEAST_WEIGHT = -3e4


def bounded(term: Tensor) -> Tensor:
    """`term` with finite numbers within +-LARGEST, so that a sum of two does not overflow; its
    gradient passes."""
    return torch.where(
        _beyond(LARGEST, term),
        term.detach().clamp(-LARGEST, LARGEST) + (term - term.detach()),
        term,
    )


def relative_weights(weights: Tensor) -> Tensor:
    """Segment weights (..., S) minus the row's largest; a row of -inf stays."""
    top = weights.detach().amax(-1, keepdim=True)
    return weights - top.masked_fill(top == float("-inf"), 0.0)


def shift_of(top: Tensor) -> Tensor:
    """The number to subtract from rows with these maxima: 0 where they are not finite."""
    return torch.where(top.isfinite(), top, torch.zeros_like(top))


def finite_in_exp2(additive: Tensor, top: Tensor) -> Tensor:
    """Additive terms, whose rows have the maxima `top`, with rows beyond LARGEST divided by 8.

    For kernels that multiply scores by log2(e), which makes finfo.min -inf. The softmax of such a
    row stays the same: no score changes such a number.
    """
    return additive * torch.where(_beyond(LARGEST, top), 0.125, 1.0)


def any_far(top: Tensor) -> bool:
    """True if a row's finite maximum is beyond FAR. Waits for the GPU."""
    return bool(_beyond(FAR, top).any())


def _beyond(limit: float, numbers: Tensor) -> Tensor:
    """True where a finite number is larger than the limit in size."""
    return (numbers.abs() > limit) & ~numbers.isinf()


def rows_without_keys(weights: Tensor, lengths: Sequence[int], visible: Optional[Tensor]) -> Tensor:
    """(B|1, H|1, M, 1) bool: rows whose visible keys all lie in segments of weight -inf.

    weights (B|1, M, H|1, S); visible (B|1, H|1, M|1, N) bool, None: all keys are.
    """
    visible_segments = (weights.detach() > float("-inf")).transpose(1, 2)
    if visible is not None:
        visible_segments = visible_segments & torch.stack(
            [run.any(-1) for run in visible.split(list(lengths), -1)], -1
        )
    return ~visible_segments.any(-1, keepdim=True)
