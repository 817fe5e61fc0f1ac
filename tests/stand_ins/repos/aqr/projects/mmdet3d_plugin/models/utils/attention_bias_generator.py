"""Weights of every query, painted into windows on the BEV grid and in one camera: a dense bias (B,
M, N)."""

import torch
from torch import nn


class AttentionBiasGenerator(nn.Module):
    def __init__(
        self,
        bev_h=6,
        bev_w=6,
        num_views=2,
        pers_h=3,
        pers_w=4,
        window_size=3,
        use_local_bias=True,
        use_gaussian_window=False,
        gaussian_sigma=1.5,
        fp16=False,
        learnable_scale=True,
        init_scale=2.5,
        min_scale=0.5,
        max_scale=5.0,
    ):
        super().__init__()
        self.bev_h, self.bev_w, self.num_views, self.pers_h, self.pers_w = (
            bev_h,
            bev_w,
            num_views,
            pers_h,
            pers_w,
        )
        self.window_size, self.use_local_bias, self.fp16 = window_size, use_local_bias, fp16
        self.use_gaussian_window, self.gaussian_sigma = use_gaussian_window, gaussian_sigma
        self.learnable_scale, self.min_scale, self.max_scale = learnable_scale, min_scale, max_scale
        scale = torch.full((1,), init_scale)
        if learnable_scale:
            self.bias_scale = nn.Parameter(scale)
        else:
            self.register_buffer("bias_scale", scale)
        first = -(window_size // 2) if window_size % 2 else -(window_size // 2) + 1
        steps = torch.arange(first, window_size // 2 + 1)
        y, x = steps[:, None].expand(-1, len(steps)), steps[None].expand(len(steps), -1)
        self.register_buffer("y_offsets", y.flatten())
        self.register_buffer("x_offsets", x.flatten())
        self.calls = 0

    def _paint(self, weights, row, column, height, width):
        """(B, M) each -> (B, M, height, width)"""
        y, x = row[..., None] + self.y_offsets, column[..., None] + self.x_offsets
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        values = weights[..., None].expand_as(inside)
        if self.use_gaussian_window:
            squares = self.y_offsets.float() ** 2 + self.x_offsets.float() ** 2
            values = values * torch.exp(-squares / (2 * self.gaussian_sigma**2))
        values = torch.where(inside, values, torch.zeros_like(values))
        cells = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
        grid = weights.new_zeros(*weights.shape, height * width)
        return grid.scatter_add(-1, cells, values).unflatten(-1, (height, width))

    def forward(self, lidar_weights, camera_weights, pts_bev_indices, pts_pers_indices):
        B, M = lidar_weights.shape
        if self.use_local_bias:
            cell, place = pts_bev_indices.long(), pts_pers_indices.long()
            lidar = self._paint(
                lidar_weights, cell // self.bev_w, cell % self.bev_w, self.bev_h, self.bev_w
            )
            seen = self._paint(
                camera_weights, place[..., 1], place[..., 2], self.pers_h, self.pers_w
            )
            views = torch.arange(self.num_views, device=seen.device) == place[..., :1]
            camera = seen[:, :, None] * views[..., None, None]
            bias = torch.cat([lidar.flatten(2), camera.flatten(2)], -1)
        else:
            keys = self.bev_h * self.bev_w, self.num_views * self.pers_h * self.pers_w
            bias = torch.cat(
                [
                    w[..., None].expand(B, M, n)
                    for w, n in zip((lidar_weights, camera_weights), keys)
                ],
                -1,
            )
        bias = bias * torch.clamp(self.bias_scale, self.min_scale, self.max_scale)
        limit = min(5.0, self.max_scale)
        bias = torch.clamp(bias, -limit, limit)
        if self.calls % 1000 == 0:
            print(
                f"bias: mean {bias.mean().item():.4f} std {bias.std().item():.4f} "
                f"min {bias.min().item():.4f} max {bias.max().item():.4f}"
            )
        self.calls += 1
        return bias.half() if self.fp16 else bias
