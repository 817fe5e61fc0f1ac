"""MEFormer's proximity decoder: cross attention only, with a floating, learned mask and -inf for
denoising groups."""

import torch
from mmcv.cnn.bricks.registry import TRANSFORMER_LAYER
from mmcv.runner.base_module import BaseModule
from torch import nn

from . import petr_transformer  # noqa: F401  (registers the layer that the config names)


class PMETransformer(BaseModule):
    def __init__(self, layer, num_heads, init_cfg=None):
        super().__init__(init_cfg)
        self.num_heads = num_heads
        self.dist_scaler, self.dist_bias = (
            nn.Parameter(torch.randn(1)),
            nn.Parameter(torch.randn(1)),
        )
        self.layer = TRANSFORMER_LAYER.build(layer)

    def forward(self, query, memory, center, center_memory, denoising_mask):
        """(M, B, E), (N, B, E), (B, M, 2), (B, N, 2), boolean (M, N) -> (M, B, E)."""
        distance = (center[:, :, None] - center_memory[:, None]).norm(p=2, dim=-1)
        mask = torch.zeros_like(denoising_mask, dtype=torch.float).masked_fill(
            denoising_mask, float("-inf")
        )
        mask = mask + distance * self.dist_scaler + self.dist_bias
        mask = mask.unsqueeze(1).repeat(1, self.num_heads, 1, 1).flatten(0, 1)
        return self.layer(query, key=memory, value=memory, attn_masks=[mask])
