"""Biases on attention scores: low-rank, dense, windowed and masks, and factorisation of dense
ones."""

from __future__ import annotations

from .base import AttentionBias, BiasParts, DenseBias, LowRankBias, MaskBias, SumBias
from .exact import AlibiBias, ModalityBias, SquaredDistanceBias
from .factorize import Factorization, FactorState, factorize
from .precision import split_factors
from .tensor import BiasTensor, described
from .windows import Grid, WindowBias, WindowMask, WindowMaskParts, WindowParts

__all__ = [
    "AlibiBias",
    "AttentionBias",
    "BiasParts",
    "BiasTensor",
    "DenseBias",
    "FactorState",
    "Factorization",
    "Grid",
    "LowRankBias",
    "MaskBias",
    "ModalityBias",
    "SquaredDistanceBias",
    "SumBias",
    "WindowBias",
    "WindowMask",
    "WindowMaskParts",
    "WindowParts",
    "described",
    "factorize",
    "split_factors",
]
