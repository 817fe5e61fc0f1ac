"""Images to features at a sixteenth of the size."""

from __future__ import annotations

from typing import Tuple

import torch.nn as nn
from torch import Tensor

from ...registry import BACKBONES

STRIDE = 16


@BACKBONES.register_module()
class ImageNet(nn.Module):
    """Four strided convolutions, and a 1x1 to the width of the transformer."""

    def __init__(self, out_channels: int, widths: Tuple[int, ...] = (32, 64, 128, 128)) -> None:
        super().__init__()
        layers, channels = [], 3
        for width in widths:
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 1))

    def forward(self, img: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, C, H / 16, W / 16), rounded up."""
        return self.layers(img)
