"""Computation of softmax(q k^T * scale + bias) v. It imports neither mmcv nor any repository."""

from .api import flash_bias_attention
from .inputs import AttentionInputs

__all__ = ["AttentionInputs", "flash_bias_attention"]
