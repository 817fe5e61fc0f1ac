"""Biases on attention scores: exact low-rank ones, dense ones, and the way from dense to low rank."""
from __future__ import annotations

from .base import AttentionBias, BiasParts, DenseBias, LowRankBias, MaskBias, SumBias

__all__ = ["AttentionBias", "BiasParts", "DenseBias", "LowRankBias", "MaskBias", "SumBias"]
