"""Boxes, and the codes in which they are learned.

A box is (x, y, z, l, w, h, yaw, vx, vy) in the lidar frame, in metres, radians and m/s, around its
centre. A code is (x, y, z, log l, log w, log h, sin yaw, cos yaw, vx, vy).
"""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

CLASS_NAMES = (
    "car",
    "truck",
    "trailer",
    "bus",
    "construction_vehicle",
    "bicycle",
    "motorcycle",
    "pedestrian",
    "traffic_cone",
    "barrier",
)
BOX_SIZE = 9
CODE_SIZE = 10


def encode_boxes(boxes: Tensor) -> Tensor:
    """(..., 9) boxes -> (..., 10) codes; an unknown velocity (nan) stays nan."""
    centre, dims, yaw, velocity = boxes.split((3, 3, 1, 2), dim=-1)
    return torch.cat([centre, dims.log(), yaw.sin(), yaw.cos(), velocity], dim=-1)


def decode_boxes(codes: Tensor) -> Tensor:
    """(..., 10) codes -> (..., 9) boxes."""
    centre, dims, sin, cos, velocity = codes.split((3, 3, 1, 1, 2), dim=-1)
    return torch.cat([centre, dims.exp(), torch.atan2(sin, cos), velocity], dim=-1)


def normalise_points(points: Tensor, pc_range: Sequence[float]) -> Tensor:
    """Metres -> 0..1 within pc_range (x_min, y_min, z_min, x_max, y_max, z_max)."""
    low, high = points.new_tensor(pc_range[:3]), points.new_tensor(pc_range[3:])
    return (points - low) / (high - low)


def denormalise_points(points: Tensor, pc_range: Sequence[float]) -> Tensor:
    """0..1 within pc_range -> metres."""
    low, high = points.new_tensor(pc_range[:3]), points.new_tensor(pc_range[3:])
    return low + points * (high - low)
