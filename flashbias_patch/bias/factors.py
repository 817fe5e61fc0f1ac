"""Arithmetic on the parts of biases: factors, segment weights and dense tensors."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from typing import ContextManager, List, Sequence, Tuple, Union

import torch
from torch import Tensor

from .._torch_internals import autocast

Factors = Tuple[Tensor, Tensor]
Segments = Tuple[Tensor, Tuple[int, ...]]


def scaled_visible(tensor: Tensor, factor: Union[float, Tensor]) -> Tensor:
    """Multiply, but keep -inf entries: they stay masked for every factor, and its gradient is
    finite."""
    if isinstance(factor, (int, float)) and factor > 0:
        return tensor * factor
    masked = torch.isneginf(tensor)
    return (tensor.masked_fill(masked, 0.0) * factor).masked_fill(masked, float("-inf"))


def add_segments(first: Segments, second: Segments) -> Segments:
    """Add two biases that are constant in segments of keys; the result has the common segments."""
    (weights1, lengths1), (weights2, lengths2) = first, second
    if lengths1 == lengths2:
        return weights1 + weights2, lengths1
    ends1, ends2 = list(itertools.accumulate(lengths1)), list(itertools.accumulate(lengths2))
    cuts = sorted({0, *ends1, *ends2})
    # The segment that each part belongs to. Empty segments end where they begin and hold no key.
    indices1, indices2 = (
        [bisect.bisect_right(ends, start) for start in cuts[:-1]] for ends in (ends1, ends2)
    )
    weights = weights1[..., indices1] + weights2[..., indices2]
    return weights, tuple(stop - start for start, stop in zip(cuts, cuts[1:]))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Add tensors; at least one."""
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result


def concatenate(pairs: Sequence[Factors]) -> Factors:
    """Concatenate factors along R; batch and heads are expanded only if another pair has them."""
    if len(pairs) == 1:
        return pairs[0]

    def joined(factors: List[Tensor]) -> Tensor:
        batch = max(factor.shape[0] for factor in factors)
        heads = max(factor.shape[2] for factor in factors)
        return torch.cat([factor.expand(batch, -1, heads, -1) for factor in factors], dim=-1)

    return (
        joined([q_factor for q_factor, _ in pairs]),
        joined([k_factor for _, k_factor in pairs]),
    )


def multiply_out(q_factor: Tensor, k_factor: Tensor) -> Tensor:
    """Multiply (B|1, M, H|1, R) and (B|1, N, H|1, R) to (B|1, H|1, M, N).

    The product has the precision of the factors, also under autocast.
    """
    dtype = torch.promote_types(q_factor.dtype, k_factor.dtype)
    with full_precision(q_factor.device):
        return q_factor.to(dtype).permute(0, 2, 1, 3) @ k_factor.to(dtype).permute(0, 2, 3, 1)


def full_precision(device: torch.device) -> ContextManager[object]:
    """Return a context with autocast off, so that matrix products keep the precision of a bias."""
    if device.type in ("cpu", "cuda"):
        return autocast(device.type, enabled=False)
    return contextlib.nullcontext()
