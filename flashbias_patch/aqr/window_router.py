"""Define the router of local windows: two weights per query, applied around its position."""

from __future__ import annotations

import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..bias import AttentionBias, Grid, WindowBias
from .geometry import Places
from .options import CAMERA_WINDOWS, INIT_BIAS_SCALE, WINDOW
from .router import AdaptiveQueryRouter, Routing


class WindowRouter(AdaptiveQueryRouter):
    """Score each query over lidar and cameras; the weights are added to the scores of near keys.

        w = tanh(logits)                                                           (B, M, S), S = 1
        or 2 bias[b, h, m, n] = clamp(bias_scale) * w[b, m, s(n)] * profile[b, m, n]    inside a
        window of the query, else 0

    The windows of a query are squares of `lidar_window` cells around its cell of the BEV grid and
    of `window` cells around its place in a camera. The bias is exact and never dense, see
    bias.WindowBias. logits: as AdaptiveQueryRouter.

    Args:
        embed_dims, num_segments, num_heads, num_layers, per, hidden_dims: as AdaptiveQueryRouter;
            num_segments is 2, or 1 without lidar or without cameras.
        window: edge of a window in cells; an even side 2h covers offsets -h + 1 .. h.
        lidar_window: the same on the BEV grid; None: `window`.
        gaussian: None for a profile of 1, or sigma in cells of exp(-(dy^2 + dx^2) / (2 sigma^2)).
        camera_windows: "first": one window, in the first camera that sees the query; "all": one in
            each camera that sees it.
        init_bias_scale, min_scale, max_scale: initial value of bias_scale, and the bounds to which
            it is clamped when used; outside them its gradient is 0.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        embed_dims: int,
        num_segments: int,
        *,
        window: int = 15,
        lidar_window: Optional[int] = None,
        gaussian: Optional[float] = None,
        camera_windows: str = CAMERA_WINDOWS[0],
        init_bias_scale: float = INIT_BIAS_SCALE[WINDOW],
        min_scale: float = 0.5,
        max_scale: float = 5.0,
        **options: Any,
    ) -> None:
        super().__init__(embed_dims, num_segments, init_bias_scale=init_bias_scale, **options)
        if num_segments not in (1, 2):
            raise ValueError(
                "num_segments: expected 2, or 1 without lidar or without cameras, got "
                f"{num_segments!r}"
            )
        if camera_windows not in CAMERA_WINDOWS:
            raise ValueError(
                f"camera_windows: expected one of {', '.join(CAMERA_WINDOWS)}, got "
                f"{camera_windows!r}"
            )
        if not 0.0 <= min_scale <= init_bias_scale <= max_scale < math.inf:
            raise ValueError(
                "init_bias_scale: expected 0 <= min_scale <= init_bias_scale <= max_scale, got "
                f"{min_scale!r}, {init_bias_scale!r}, {max_scale!r}"
            )
        self.window, self.lidar_window = window, window if lidar_window is None else lidar_window
        self.gaussian, self.camera_windows = gaussian, camera_windows
        self.min_scale, self.max_scale = float(min_scale), float(max_scale)

    def _weights(self, logits: Tensor) -> Tensor:
        return logits.tanh()

    @property
    def needs_places(self) -> bool:
        return True

    def biases(
        self, routing: Routing, segments: Sequence[int]
    ) -> List[Tuple[AttentionBias, Optional[Tuple[int, ...]]]]:
        # One bias for all layers, so that they share the tables that a kernel builds from it.
        windows = self.windows(routing)
        if self.per != "layer":
            return [(windows * self._scale(None), None)]
        return [(windows * self._scale(layer), (layer,)) for layer in range(len(self.bias_scale))]

    def bias(
        self, routing: Routing, segments: Sequence[int], layer: Optional[int] = None
    ) -> AttentionBias:
        """Return the bias (B|1, 1|H, M, N) over the keys of `routing.places`; `segments` is
        ignored."""
        return self.windows(routing) * self._scale(layer)

    def windows(self, routing: Routing) -> WindowBias:
        """Return the bias without bias_scale; ValueError if the routing has no places."""
        places = routing.places
        if places is None:
            raise ValueError(
                "window: the router needs the queries' reference points; call "
                "flashbias_patch.aqr.provide_geometry(...) "
                "before the transformer, or set bias='modality'"
            )
        centres, visible, frames = window_places(places, self.camera_windows)
        cameras = len(frames) - int(places.bev)
        weights = routing.weights[..., -1:].expand(-1, -1, cameras)
        if places.bev:
            weights = torch.cat([routing.weights[..., :1], weights], -1)
        batch = max(weights.shape[0], centres.shape[0])
        sides = (self.lidar_window,) * int(places.bev) + (self.window,) * cameras
        return WindowBias(
            weights.expand(batch, -1, -1),
            centres.expand(batch, -1, -1, -1),
            frames,
            sides,
            self.gaussian,
            visible.expand(batch, -1, -1),
        )

    def _scale(self, layer: Optional[int]) -> Tensor:
        return super()._scale(layer).clamp(self.min_scale, self.max_scale)

    def extra_repr(self) -> str:
        sides = (
            f"window={self.window}, lidar_window={self.lidar_window}, "
            f"camera_windows={self.camera_windows!r}"
        )
        return f"{super().extra_repr()}, {sides}"


def window_places(places: Places, camera_windows: str) -> Tuple[Tensor, Tensor, Tuple[Grid, ...]]:
    """Return centres (B, M, S, 3), whole floats; visible (B, M, S) bool; and the S frames.

    The frames are the BEV grid, if there is one, and then one frame for all cameras ("first") or
    one per camera ("all").
    """
    cells, in_view, bev = places.cells(), places.valid, int(places.bev)
    grids = places.grids[bev:]
    frames = [Grid(*grid) for grid in places.grids[:bev]]
    centres = [_with_view(cells[..., :bev, :])]
    visible = [in_view[..., :bev]]
    if grids and camera_windows == "first":
        order = torch.arange(len(grids), 0, -1, device=in_view.device)
        view = (in_view[..., bev:] * order).argmax(-1)  # argmax of the order: the first camera
        cell = cells[..., bev:, :].gather(2, view[..., None, None].expand(-1, -1, 1, 2))
        centres.append(torch.cat([view[..., None, None].to(cell.dtype), cell], -1))
        visible.append(in_view[..., bev:].any(-1, keepdim=True))
        frames.append(Grid(*grids[0], views=len(grids)))
    elif grids:
        centres.append(_with_view(cells[..., bev:, :]))
        visible.append(in_view[..., bev:])
        frames += [Grid(*grid) for grid in grids]
    return torch.cat(centres, 2), torch.cat(visible, 2), tuple(frames)


def _with_view(cells: Tensor) -> Tensor:
    """Prepend view 0 to row and column."""
    return torch.nn.functional.pad(cells, (1, 0))
