from mmcv.utils.registry import Registry

ATTENTION = Registry("attention")
TRANSFORMER_LAYER = Registry("transformer layer")
FEEDFORWARD_NETWORK = Registry("feed-forward network")
