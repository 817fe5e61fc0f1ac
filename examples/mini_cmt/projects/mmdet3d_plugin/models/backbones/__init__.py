from .image_net import ImageNet
from .pillar_net import PillarNet

__all__ = ["ImageNet", "PillarNet"]
