"""A block that calls FlashMHA itself, outside any outer class."""

from torch import nn

from .flash import FlashMHA


class InstanceFusion(nn.Module):
    def __init__(self, embed_dims, num_heads):
        super().__init__()
        self.attn, self.norm = FlashMHA(embed_dims, num_heads), nn.LayerNorm(embed_dims)

    def forward(self, instances, scene):
        """(B, M, E), (B, N, E) -> (B, M, E)."""
        return self.norm(instances + self.attn(instances, scene, scene)[0])
