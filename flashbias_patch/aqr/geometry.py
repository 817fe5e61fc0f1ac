"""Compute positions of queries and keys on the BEV grid and in the cameras."""

from __future__ import annotations

import contextvars
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._torch_internals import meshgrid

NEAREST = 0.1  # metres: points closer to a camera's plane than this, or behind it, are out of view

_geometry: contextvars.ContextVar[Optional[Geometry]] = contextvars.ContextVar(
    "flashbias_geometry", default=None
)


class Geometry(NamedTuple):
    """Reference points and camera matrices.

    reference (B|1, M, 3) in 0..1 of pc_range (x0, y0, z0, x1, y1, z1, metres); lidar2img (B, V, 4,
    4) to pixels, or None without cameras; img_shape (height, width) in pixels.
    """

    reference: Tensor
    pc_range: Tuple[float, ...]
    lidar2img: Optional[Tensor]
    img_shape: Optional[Tuple[int, int]]


class Places(NamedTuple):
    """Positions of queries and keys in the frames of their segments, for SquaredDistanceBias.

    A frame is the BEV grid (metres) or one camera (units of the image's width, from its upper left
    corner). query_xy (B, M, F, 2), valid (B, M, F) bool, lengths: keys in each of the F frames.
    """

    query_xy: Tensor
    valid: Tensor
    lengths: Tuple[int, ...]
    bev: bool  # True if the first frame is the BEV grid
    grids: Tuple[Tuple[int, int], ...] = ()  # rows and columns of each frame
    extents: Tuple[
        Tuple[float, float, float, float], ...
    ] = ()  # of each frame, in units of xy: x, y, width, height

    @property
    def key_xy(self) -> Tensor:
        """Centre of each key's cell in its frame, (1, N, 2)."""
        coordinates: List[Tensor] = []
        for index, (grid, (x, y, width, height)) in enumerate(zip(self.grids, self.extents)):
            if index and (grid, self.extents[index]) == (
                self.grids[index - 1],
                self.extents[index - 1],
            ):
                coordinates.append(coordinates[-1])  # all cameras have the same grid
                continue
            xy = _cells(*grid, self.query_xy) * self.query_xy.new_tensor((width, height))
            coordinates.append(xy + self.query_xy.new_tensor((x, y)) if x or y else xy)
        return torch.cat(coordinates)[None]

    def kinds(self, device: Any) -> Tensor:
        """Return (F,) long: 0 for the BEV frame, 1 for a camera."""
        return torch.tensor(
            [0 if self.bev and i == 0 else 1 for i in range(len(self.lengths))], device=device
        )

    def visible(self, num_segments: int) -> Tensor:
        """Return (B, M, S) bool: True if a query is in view of a camera of the segment, or on the
        BEV."""
        if num_segments == len(self.lengths):
            return self.valid
        cameras = self.valid[..., int(self.bev) :].any(-1, keepdim=True)
        return torch.cat([self.valid[..., :1], cameras], -1) if self.bev else cameras

    def cells(self) -> Tensor:
        """Return row and column of the cell of each query in each frame, (B, M, F, 2) whole floats.

        For a query outside a frame it is the nearest cell at the edge; NaN stays NaN.
        """
        numbers = [
            (-x, -y, columns / width, rows / height, columns - 1, rows - 1)
            for (x, y, width, height), (rows, columns) in zip(self.extents, self.grids)
        ]
        shift, scale, last = self.query_xy.new_tensor(numbers).split(2, -1)
        cell = ((self.query_xy + shift) * scale).floor()
        return torch.minimum(cell.clamp(min=0.0), last).flip(-1)


def provide_geometry(
    reference: Tensor,
    pc_range: Sequence[float],
    lidar2img: Optional[Any] = None,
    img_shape: Optional[Sequence[int]] = None,
) -> None:
    """Set the query positions for the next transformer with a router; CMT heads do it already.

    reference (B, M, 3) or (M, 3) in 0..1 of pc_range, used without gradient; lidar2img
    (B, V, 4, 4), tensor or array-like, lidar metres to pixels of the network input; img_shape
    (height, width) of that input.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """
    if (
        not isinstance(reference, Tensor)
        or reference.dim() not in (2, 3)
        or reference.shape[-1] != 3
    ):
        got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ValueError(f"reference: expected a Tensor (B, M, 3) or (M, 3), got {got}")
    if len(pc_range) != 6:
        raise ValueError(f"pc_range: expected x0, y0, z0, x1, y1, z1, got {pc_range!r}")
    if (lidar2img is None) != (img_shape is None):
        raise ValueError(
            "lidar2img and img_shape come together: give both, or neither where there is no camera"
        )
    points = reference.detach().float()
    matrices = (
        None
        if lidar2img is None
        else torch.as_tensor(lidar2img, dtype=torch.float32, device=points.device)
    )
    if matrices is not None and (matrices.dim() != 4 or matrices.shape[-2:] != (4, 4)):
        raise ValueError(f"lidar2img: expected (B, V, 4, 4), got {tuple(matrices.shape)}")
    size = None if img_shape is None else (int(img_shape[0]), int(img_shape[1]))
    points = points if points.dim() == 3 else points[None]
    _geometry.set(Geometry(points, tuple(float(x) for x in pc_range), matrices, size))


def take_geometry() -> Optional[Geometry]:
    """Return the geometry that was provided, and remove it."""
    geometry = _geometry.get()
    if geometry is not None:
        _geometry.set(None)
    return geometry


def places(
    geometry: Geometry, bev: Optional[Tuple[int, int]], views: Optional[Tuple[int, int, int]]
) -> Places:
    """Return the positions of queries and keys.

    bev: (rows along y, columns along x) of the grid; views: (V, rows, columns). Keys are in that
    order, row by row.

    Raises:
        ValueError: the geometry has no cameras, or another number of them.
    """
    low, high = geometry.reference.new_tensor(geometry.pc_range).split(3)
    points = geometry.reference * (high - low) + low
    query, valid, lengths = [], [], []
    grids: List[Tuple[int, int]] = []
    extents: List[Tuple[float, float, float, float]] = []
    if bev is not None:
        query.append(points[..., None, :2])
        valid.append(torch.ones_like(points[..., :1], dtype=torch.bool))
        lengths.append(bev[0] * bev[1])
        x, y, _, end_x, end_y, _ = geometry.pc_range
        grids.append(bev)
        extents.append((x, y, end_x - x, end_y - y))
    if views is not None:
        if (
            geometry.lidar2img is None
            or geometry.img_shape is None
            or geometry.lidar2img.shape[1] != views[0]
        ):
            got = "none" if geometry.lidar2img is None else geometry.lidar2img.shape[1]
            raise ValueError(f"lidar2img: expected the matrices of {views[0]} cameras, got {got}")
        height, width = geometry.img_shape
        xy, in_view = _project(points, geometry.lidar2img, height, width)
        query.append(xy)
        valid.append(in_view)
        lengths += [views[1] * views[2]] * views[0]
        grids += [views[1:]] * views[0]
        extents += [(0.0, 0.0, 1.0, height / width)] * views[0]
    batch = max(part.shape[0] for part in query)
    return Places(
        torch.cat([part.expand(batch, -1, -1, -1) for part in query], 2),
        torch.cat([part.expand(batch, -1, -1) for part in valid], 2),
        tuple(lengths),
        bev is not None,
        tuple(grids),
        tuple(extents),
    )


def _cells(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return (rows * columns, 2): x and y of the cell centres in 0..1, row by row."""
    y = (torch.arange(rows, device=like.device) + 0.5) / rows
    x = (torch.arange(columns, device=like.device) + 0.5) / columns
    grid = meshgrid(y, x)
    return torch.stack([grid[1], grid[0]], -1).flatten(0, 1)


def _project(points: Tensor, lidar2img: Tensor, height: int, width: int) -> Tuple[Tensor, Tensor]:
    """Project points (B|1, M, 3) by matrices (B, V, 4, 4).

    Returns positions (B, M, V, 2) in units of the image width, and (B, M, V) True if in view.
    """
    batch = lidar2img.shape[0]
    projected = torch.einsum("bvij,bmj->bmvi", lidar2img[..., :3, :3], points.expand(batch, -1, -1))
    projected = projected + lidar2img[:, None, :, :3, 3]
    depth = projected[..., 2]
    pixels = projected[..., :2] / depth.clamp(min=NEAREST)[..., None]
    below = (pixels[..., 0] < width) & (pixels[..., 1] < height)
    return pixels / width, (depth > NEAREST) & (pixels >= 0).all(-1) & below
