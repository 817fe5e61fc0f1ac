"""Draw the attention weights of one query over the BEV plane and the cameras (matplotlib)."""

from __future__ import annotations

import math
from typing import Any, Optional, Sequence, Tuple

import torch
from torch import Tensor

COLUMNS = 3  # cameras per line of the figure


def paint(
    row: Tensor,
    *,
    bev: Optional[Tuple[int, int]] = None,
    cameras: Optional[Tuple[int, int, int]] = None,
    images: Optional[Sequence[Any]] = None,
    names: Optional[Sequence[str]] = None,
    title: Optional[str] = None,
) -> Any:
    """Return a figure of one row of attention weights.

    Args:
        row: (N,), as `maps[0].weights[0].mean(0)[0]`: the first frame, all heads, the first query.
        bev: (h, w) of the BEV tokens, the first h*w keys; None: there are none.
        cameras: (V, h, w) of the camera tokens, the keys after those; None: there are none.
        images: V pictures to paint on, (height, width, 3), uint8 or floats from 0 to 1.
        names: V titles of the cameras.
        title: of the figure.

    Returns:
        matplotlib.figure.Figure; `figure.savefig("map.png")` writes it. Colours are relative to the
            row's largest weight.

    Raises:
        ValueError: the parts do not sum to N, or the images or names are not one per camera.
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = bev[0] * bev[1] if bev else 0
    views = cameras[0] if cameras else 0
    length = first + (math.prod(cameras) if cameras else 0)
    if row.dim() != 1 or row.shape[0] != length:
        raise ValueError(
            f"row must have shape (N,) with N = {length} for bev={bev} and cameras={cameras}, "
            f"got {tuple(row.shape)}"
        )
    for argument, value in (("images", images), ("names", names)):
        if value is not None and len(value) != views:
            raise ValueError(
                f"{argument} must hold one entry for each of {views} cameras, got {len(value)}"
            )
    weights = row.detach().float().cpu()
    largest = float(weights.max()) or 1.0 if length else 1.0
    camera_lines = math.ceil(views / COLUMNS)
    figure = Figure(
        figsize=(
            4 * bool(bev) + 3.2 * min(views, COLUMNS) + 0.4,
            max(3.6 * bool(bev), 1.9 * camera_lines) + 0.5,
        ),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        max(camera_lines, 1),
        bool(bev) + min(views, COLUMNS),
        width_ratios=[*([1.4] if bev else []), *[1.0] * min(views, COLUMNS)],
    )
    if bev:
        axes = figure.add_subplot(grid[:, 0])
        axes.imshow(
            weights[:first].reshape(bev).numpy(), origin="lower", cmap="magma", vmin=0, vmax=largest
        )
        _bare(axes, f"BEV: {100 * float(weights[:first].sum()):.0f} %")
    for view in range(views):
        assert cameras is not None
        axes = figure.add_subplot(grid[view // COLUMNS, bool(bev) + view % COLUMNS])
        size = cameras[1] * cameras[2]
        part = weights[first + view * size : first + (view + 1) * size].reshape(cameras[1:])
        picture = None if images is None else torch.as_tensor(images[view])
        if picture is None:
            axes.imshow(part.numpy(), cmap="magma", vmin=0, vmax=largest)
        else:
            height, width = picture.shape[:2]
            large = torch.nn.functional.interpolate(
                part[None, None], (height, width), mode="bilinear"
            )[0, 0]
            axes.imshow(picture.numpy())
            shade = 0.25 + 0.65 * (large / largest).clamp(0, 1)
            axes.imshow(large.numpy(), cmap="magma", vmin=0, vmax=largest, alpha=shade.numpy())
        _bare(
            axes, f"{names[view] if names else f'camera {view}'}: {100 * float(part.sum()):.0f} %"
        )
    if title:
        figure.suptitle(title)
    return figure


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
