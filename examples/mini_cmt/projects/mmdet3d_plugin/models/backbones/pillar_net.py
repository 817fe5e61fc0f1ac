"""Lidar points to a BEV grid of tokens."""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ...registry import BACKBONES

FINER = 4  # pillars a token, along each axis
POINT_FEATURES = 7  # x, y, z in the range; x, y in the pillar; intensity; ring


@BACKBONES.register_module()
class PillarNet(nn.Module):
    """Each point through a linear layer, the maximum in each pillar, then convolutions down to the
    tokens."""

    def __init__(
        self,
        out_channels: int,
        grid: int,
        pc_range: Sequence[float],
        widths: Tuple[int, ...] = (32, 64, 128),
    ) -> None:
        super().__init__()
        self.cells = grid * FINER
        self.pc_range = tuple(pc_range)
        self.point_net = nn.Sequential(nn.Linear(POINT_FEATURES, widths[0]), nn.ReLU())
        layers = []
        for before, after in zip(widths, widths[1:]):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, after),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], out_channels, 1))

    def forward(self, points: List[Tensor]) -> Tensor:
        """B tensors (P, 5) -> (B, C, grid, grid): rows along y, columns along x."""
        return self.layers(torch.stack([self._pillars(cloud) for cloud in points]))

    def _pillars(self, cloud: Tensor) -> Tensor:
        low, high = cloud.new_tensor(self.pc_range[:3]), cloud.new_tensor(self.pc_range[3:])
        place = (cloud[:, :3] - low) / (high - low)
        inside = ((place >= 0) & (place < 1)).all(dim=1)
        cloud, place = cloud[inside], place[inside]
        cell = (place[:, :2] * self.cells).long().clamp(max=self.cells - 1)
        within = place[:, :2] * self.cells - cell - 0.5
        features = torch.cat(
            [place - 0.5, within, cloud[:, 3:4] / 255.0, cloud[:, 4:5] / 32.0], dim=1
        )
        features = self.point_net(features)  # not negative, so that an empty pillar is a zero
        pillars = largest(features, cell[:, 1] * self.cells + cell[:, 0], self.cells**2)
        return pillars.T.unflatten(1, (self.cells, self.cells))


def largest(features: Tensor, pillar: Tensor, pillars: int) -> Tensor:
    """(P, C) features of points and the pillar of each, (P,), to (pillars, C): the maximum in each,
    0 in an empty one."""
    empty = features.new_zeros(pillars, features.shape[1])
    if hasattr(Tensor, "scatter_reduce"):
        return empty.scatter_reduce(0, pillar[:, None].expand_as(features), features, reduce="amax")
    # Before torch 1.12: points sorted by pillar, and by value in each; the last of each pillar is
    # its largest.
    rank = features.detach().argsort(0).argsort(0)
    order = (pillar[:, None] * len(pillar) + rank).argsort(0)
    found, counts = pillar.unique(return_counts=True)
    return empty.index_put((found,), features.gather(0, order[counts.cumsum(0) - 1]))
