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
    """tensor * factor, where -inf stays -inf: masked out whatever the factor, whose gradient is to
    be a number."""
    if isinstance(factor, (int, float)) and factor > 0:
        return tensor * factor
    masked = torch.isneginf(tensor)
    return (tensor.masked_fill(masked, 0.0) * factor).masked_fill(masked, float("-inf"))


def add_segments(first: Segments, second: Segments) -> Segments:
    """The sum of two biases that are constant over runs of keys: the runs that both have in
    common."""
    if first[1] == second[1]:
        return first[0] + second[0], first[1]
    ends = [list(itertools.accumulate(lengths)) for _, lengths in (first, second)]
    cuts = sorted({0, *ends[0], *ends[1]})
    # The run that a key lies in: empty ones end where they begin, and no key is in them.
    places = [[bisect.bisect_right(own, start) for start in cuts[:-1]] for own in ends]
    weights = first[0][..., places[0]] + second[0][..., places[1]]
    return weights, tuple(stop - start for start, stop in zip(cuts, cuts[1:]))


def total(tensors: Sequence[Tensor]) -> Tensor:
    result = tensors[0]
    for tensor in tensors[1:]:
        result = result + tensor
    return result


def concatenate(pairs: Sequence[Factors]) -> Factors:
    """Factors side by side along R; batch and heads grow only as far as some pair needs them."""
    if len(pairs) == 1:
        return pairs[0]

    def joined(factors: List[Tensor]) -> Tensor:
        batch = max(factor.shape[0] for factor in factors)
        heads = max(factor.shape[2] for factor in factors)
        return torch.cat([factor.expand(batch, -1, heads, -1) for factor in factors], dim=-1)

    return joined([pair[0] for pair in pairs]), joined([pair[1] for pair in pairs])


def multiply_out(q_factor: Tensor, k_factor: Tensor) -> Tensor:
    """(B|1, M, H|1, R), (B|1, N, H|1, R) -> (B|1, H|1, M, N), in their precision even under
    autocast."""
    dtype = torch.promote_types(q_factor.dtype, k_factor.dtype)
    with full_precision(q_factor.device):
        return q_factor.to(dtype).permute(0, 2, 1, 3) @ k_factor.to(dtype).permute(0, 2, 3, 1)


def full_precision(device: torch.device) -> ContextManager[object]:
    """Autocast off: digits of a bias are not to be lost in a matrix product."""
    if device.type in ("cpu", "cuda"):
        return autocast(device.type, enabled=False)
    return contextlib.nullcontext()
