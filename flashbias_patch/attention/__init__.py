"""How softmax(q k^T * scale + bias) v is computed. Knows nothing of mmcv or of any repository."""

from .api import flash_bias_attention
from .inputs import AttentionInputs

__all__ = ["AttentionInputs", "flash_bias_attention"]
