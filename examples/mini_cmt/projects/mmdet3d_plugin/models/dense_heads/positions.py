"""Where tokens and queries are: one embedding for the BEV plane, one for the rays of the cameras.

A query is embedded as the tokens it should look at: by its place in the BEV, and by the rays that
meet it.
"""

from __future__ import annotations

import math
from typing import Any, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ...core.boxes import denormalise_points, normalise_points

NEAREST = 1.0  # metres: points closer to a camera, or behind it, are not seen


def full_precision(device_type: str) -> Any:
    """No autocast inside; before torch 1.10 only CUDA has one."""
    if hasattr(torch, "autocast"):
        return torch.autocast(device_type, enabled=False)
    return torch.cuda.amp.autocast(enabled=False)


class PositionEmbedding(nn.Module):
    """Embeddings of width `embed_dims`; `depth_bins` points along a ray, 1 m to `max_depth` metres
    away."""

    def __init__(
        self,
        embed_dims: int,
        pc_range: Sequence[float],
        depth_bins: int = 16,
        max_depth: float = 60.0,
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.pc_range = tuple(pc_range)
        self.bev_mlp = nn.Sequential(
            nn.Linear(embed_dims, embed_dims), nn.ReLU(), nn.Linear(embed_dims, embed_dims)
        )
        self.rv_mlp = nn.Sequential(
            nn.Linear(3 * depth_bins, 2 * embed_dims),
            nn.ReLU(),
            nn.Linear(2 * embed_dims, embed_dims),
        )
        steps = torch.arange(depth_bins, dtype=torch.float32)
        depths = NEAREST + (max_depth - NEAREST) * steps * (steps + 1) / (
            depth_bins * (depth_bins - 1)
        )
        self.register_buffer("depths", depths, persistent=False)
        waves = (
            2 * math.pi * 2 ** torch.linspace(-1, 5, embed_dims // 4)
        )  # half a wave to 32 in the range
        self.register_buffer("waves", waves, persistent=False)

    def bev(self, xy: Tensor) -> Tensor:
        """(..., 2) in 0..1 -> (..., C)."""
        phases = xy[..., None] * self.waves
        return self.bev_mlp(torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(-2))

    def bev_tokens(self, height: int, width: int) -> Tensor:
        """(height * width, C), row by row: rows along y, columns along x."""
        device = self.waves.device
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        rows, columns = y[:, None].expand(len(y), len(x)), x.expand(len(y), len(x))
        return self.bev(torch.stack([columns, rows], dim=-1).flatten(0, 1))

    def _rays(self, pixels: Tensor, img2lidar: Tensor) -> Tensor:
        """pixels (n, p, 2), img2lidar (n, 4, 4) -> (n, p, C). Geometry stays in float32."""
        with full_precision(pixels.device.type):
            rotation, origin = img2lidar[:, :3, :3], img2lidar[:, :3, 3]
            ones = torch.ones_like(pixels[..., :1])
            direction = torch.einsum("nij,npj->npi", rotation, torch.cat([pixels, ones], dim=-1))
            points = origin[:, None, None] + direction[:, :, None] * self.depths[:, None]
            points = 2 * normalise_points(points, self.pc_range) - 1
        return self.rv_mlp(points.clamp(-3.0, 3.0).flatten(-2))

    def rv_tokens(
        self, height: int, width: int, img2lidar: Tensor, img_shape: Tuple[int, int]
    ) -> Tensor:
        """img2lidar (n, 4, 4) -> (n, height, width, C): the rays through the middles of the
        cells."""
        v = (torch.arange(height, device=img2lidar.device) + 0.5) * (img_shape[0] / height)
        u = (torch.arange(width, device=img2lidar.device) + 0.5) * (img_shape[1] / width)
        rows, columns = v[:, None].expand(height, width), u.expand(height, width)
        pixels = torch.stack([columns, rows], dim=-1).flatten(0, 1).expand(len(img2lidar), -1, -1)
        return self._rays(pixels, img2lidar).unflatten(1, (height, width))

    def queries(
        self, reference: Tensor, lidar2img: Tensor, img2lidar: Tensor, img_shape: Tuple[int, int]
    ) -> Tensor:
        """reference (B, M, 3) in 0..1, (B, V, 4, 4) -> (B, M, C): BEV and the cameras that see
        it."""
        batch, num_queries = reference.shape[:2]
        with full_precision(reference.device.type):
            points = denormalise_points(reference, self.pc_range)
            rotation, shift = lidar2img[..., :3, :3], lidar2img[:, :, None, :3, 3]
            seen = torch.einsum("bvij,bmj->bvmi", rotation, points) + shift
            depth = seen[..., 2]
            pixels = seen[..., :2] / depth.clamp(min=NEAREST)[..., None]
            limit = pixels.new_tensor((img_shape[1], img_shape[0]))
            visible = (depth > NEAREST) & ((pixels >= 0) & (pixels < limit)).all(dim=-1)
        frame, view, query = visible.nonzero(
            as_tuple=True
        )  # few of all pairs: a point is in one view or two
        rays = self._rays(pixels[frame, view, query][:, None], img2lidar[frame, view])[:, 0]
        embed = self.bev(reference[..., :2])
        return (
            embed.flatten(0, 1)
            .index_add(0, frame * num_queries + query, rays.to(embed.dtype))
            .view(batch, num_queries, self.embed_dims)
        )
