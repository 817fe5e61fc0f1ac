"""Exact operations on the terms of a bias; they return None if the result is not a description."""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from ..base import AttentionBias, DenseBias, LowRankBias, MaskBias, add_terms
from ..exact import ModalityBias
from ..grids import OUTSIDE
from ..windows import WindowBias, WindowMask

# class -> its tensors, and the dimension of each axis in them
AXES: Dict[type, Dict[str, Dict[str, int]]] = {
    WindowBias: {"weights": {"b": 0, "m": 1, "h": 2}, "centres": {"b": 0, "m": 1}},
    WindowMask: {"centres": {"b": 0, "m": 1}},
    ModalityBias: {"weights": {"b": 0, "m": 1, "h": 2}},
    LowRankBias: {"q_factor": {"b": 0, "m": 1, "h": 2}, "k_factor": {"b": 0, "h": 2}},
    DenseBias: {"tensor": {"b": 0, "h": 1, "m": 2}},
    MaskBias: {"mask": {"b": 0, "h": 1, "m": 2}},
}
MASKS = (MaskBias, WindowMask)
FEW = 1 << 10  # largest number of factors whose signs are checked on the host
SCALED = {
    WindowBias: "weights",
    ModalityBias: "weights",
    LowRankBias: "q_factor",
    DenseBias: "tensor",
}


def is_known(bias: AttentionBias) -> bool:
    """Return True if every term is of a class in AXES."""
    return all(type(term) in AXES for term in bias._terms())


def take(bias: AttentionBias, axis: str, index: Any) -> AttentionBias:
    """Select the entries `index` (a slice, or a 1-D integer tensor) of batch, heads or queries."""

    def cut(tensor: Tensor, dim: int) -> Tensor:
        return tensor if tensor.shape[dim] == 1 else tensor[(slice(None),) * dim + (index,)]

    return _each(bias, axis, cut)


def _each(
    bias: AttentionBias, axis: str, function: Callable[[Tensor, int], Tensor]
) -> AttentionBias:
    terms = []
    for term in bias._terms():
        other = copy.copy(term)
        for name, axes in AXES[type(term)].items():
            if axis in axes:
                setattr(other, name, function(getattr(term, name), axes[axis]))
        terms.append(other)
    return add_terms(terms)


def with_empty_rows(bias: AttentionBias, before: int, after: int) -> Optional[AttentionBias]:
    """Add queries without a bias before and after those of `bias`."""
    terms: List[AttentionBias] = []
    queries = bias.shape[2]
    for term in bias._terms():
        if type(term) is WindowMask or term.shape[2] != queries:
            return None
        other = copy.copy(term)
        for name, axes in AXES[type(term)].items():
            if "m" in axes:
                tensor = getattr(term, name)
                around = (0, 0) * (tensor.dim() - 1 - axes["m"]) + (before, after)
                value = OUTSIDE if name == "centres" else 0
                setattr(other, name, F.pad(tensor, around, value=value))
        terms.append(other)
    return add_terms(terms)


def scaled(
    bias: AttentionBias, factor: Any, operation: Callable[[Any, Any], Any]
) -> Optional[AttentionBias]:
    """Multiply or divide (`operation`) by a number or a tensor (B|1, H|1, M|1, 1).

    A mask stays a mask only if every factor is positive: -inf times another factor is +inf or NaN.
    """
    terms: List[AttentionBias] = []
    is_number = isinstance(factor, (int, float))
    if is_number and factor != factor:
        return None
    if any(isinstance(term, MASKS) for term in bias._terms()) and not (
        factor > 0 if is_number else _positive(factor)
    ):
        return None
    for term in bias._terms():
        if isinstance(term, MASKS):
            terms.append(term)
            continue
        name = SCALED[type(term)]
        tensor = getattr(term, name)
        aligned = (
            factor if not isinstance(factor, Tensor) or name == "tensor" else factor.transpose(1, 2)
        )
        other = copy.copy(term)
        setattr(other, name, operation(tensor, aligned))
        terms.append(other)
    return add_terms(terms)


def _positive(factor: Tensor) -> bool:
    """Return True if there are few entries and all are positive; synchronises with the GPU."""
    return (
        factor.numel() <= FEW
        and type(factor) in (Tensor, Parameter)
        and bool((factor.detach() > 0).all())
    )


def clamped(
    bias: AttentionBias, low: Optional[float], high: Optional[float]
) -> Optional[AttentionBias]:
    """Clamp every entry to [low, high], by clamping the weights if each entry is a weight or 0."""
    terms = bias._terms()
    if len(terms) != 1:
        return None
    (term,) = terms
    if type(term) is WindowBias:
        keeps_zero = (low is None or low <= 0) and (high is None or high >= 0)
        if term.sigmas is not None or not keeps_zero:
            return None
    elif type(term) not in (ModalityBias, DenseBias):
        return None
    other = copy.copy(term)
    name = SCALED[type(term)]
    setattr(other, name, torch.clamp(getattr(term, name), low, high))
    return other


def boolean(bias: AttentionBias) -> Tensor:
    """Return a sum of masks as bool (B|1, H|1, M|1, N), True = masked out."""
    masks = [
        term.mask if isinstance(term, MaskBias) else torch.isneginf(term.dense())
        for term in bias._terms()
    ]
    return functools.reduce(operator.or_, masks)
