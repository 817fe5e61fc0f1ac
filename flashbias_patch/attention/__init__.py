"""How softmax(q k^T * scale + bias) v is computed. Knows nothing of mmcv or of any repository."""

from .inputs import AttentionInputs
from .interface import flash_bias_attention

__all__ = ["AttentionInputs", "flash_bias_attention"]
