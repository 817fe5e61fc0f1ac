"""Draw the windows of bias='window' on a real nuScenes frame: python docs/make_windows.py FRAME_DIR

FRAME_DIR holds one frame in mmdet3d's info format. The queries are at the centres of the frame's
objects, with a weight of 1 for the lidar and for the cameras; grids, image size and windows are
those of CMT at 1600 x 640. Needs matplotlib and OpenCV. Writes docs/images/aqr_windows_*.png.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "mini_cmt")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from flashbias_patch import aqr  # noqa: E402

PC_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)
IMAGE_SIZE = (1600, 640)  # width, height
BEV, VIEW = (180, 180), (40, 100)
ORDER = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
SIGMA = 4.0


def windows(frame: Any, **options: Any) -> Dict[str, np.ndarray]:
    """For each object of the frame what its query's bias adds: bev (M, 180, 180) and cameras (M, 6,
    40, 100), and the objects' boxes."""
    from projects.mmdet3d_plugin.datasets.frame import make_batch

    batch = make_batch([frame], IMAGE_SIZE, PC_RANGE)
    boxes = batch["gt_bboxes_3d"][0]
    low, high = torch.tensor(PC_RANGE[:3]), torch.tensor(PC_RANGE[3:])
    reference = ((boxes[:, :3] - low) / (high - low))[None]
    meta = batch["img_metas"][0]
    geometry = aqr.Geometry(reference, PC_RANGE, meta["lidar2img"][None], meta["img_shape"])
    places = aqr.places(geometry, BEV, (len(meta["lidar2img"]), *VIEW))
    router = aqr.WindowRouter(8, 2, init_bias_scale=1.0, **options)
    weights = torch.ones(1, len(boxes), 2)
    bias = router.bias(aqr.Routing(weights, weights, places), places.lengths)
    scores = bias.dense()[0, 0].detach().numpy()
    cells = BEV[0] * BEV[1]
    return {
        "bev": scores[:, :cells].reshape(-1, *BEV),
        "cameras": scores[:, cells:].reshape(len(boxes), -1, *VIEW),
        "boxes": boxes.numpy(),
        "pixels": batch["img"][0].mean(1).numpy(),
    }


def draw(frame: Any, folder: Path) -> List[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from projects.mmdet3d_plugin.datasets.frame import CAMERAS

    first, every = windows(frame, window=15), windows(frame, window=15, camera_windows="all")
    smooth = windows(frame, window=15, camera_windows="all", gaussian=SIGMA)
    written = []

    width, height = IMAGE_SIZE
    for name in ("cameras", "gaussian"):
        figure, grid = plt.subplots(2, 3, figsize=(7.4, 2.7), dpi=100)
        for axes, camera in zip(grid.flat, ORDER):
            view = CAMERAS.index(camera)
            axes.imshow(
                first["pixels"][view][::4, ::4],
                cmap="gray",
                extent=(0, width, height, 0),
                vmin=-3.0,
                vmax=3.0,
            )
            if name == "gaussian":
                paint(axes, smooth["cameras"][:, view].max(0), (0, width, height, 0))
            else:
                outline(axes, every["cameras"][:, view], "deepskyblue")
                outline(axes, first["cameras"][:, view], "orange")
            axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
            axes.set_title(camera[4:].lower().replace("_", " "), fontsize=7, pad=2)
        written.append(save(figure, folder / f"aqr_windows_{name}.png"))

    figure, axes_pair = plt.subplots(1, 2, figsize=(7.4, 3.7), dpi=100)
    points = frame.points[:, :2]
    points = points[(np.abs(points) < 54).all(1)]
    extent = (PC_RANGE[0], PC_RANGE[3], PC_RANGE[1], PC_RANGE[4])
    for axes, seen, title in zip(
        axes_pair, (first, smooth), ("box", f"Gaussian, sigma {SIGMA:g} cells")
    ):
        axes.scatter(points[:, 0], points[:, 1], s=0.1, color="0.55", linewidths=0, rasterized=True)
        paint(axes, seen["bev"].max(0), extent, origin="lower")
        axes.scatter(seen["boxes"][:, 0], seen["boxes"][:, 1], s=3, color="k")
        axes.set(aspect="equal", xlim=extent[:2], ylim=extent[2:])
        axes.set_xlabel("x, m", fontsize=7)
        axes.set_ylabel("y, m", fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_title(title, fontsize=7, pad=2)
    written.append(save(figure, folder / "aqr_windows_bev.png"))
    return written


def paint(axes: Any, scores: np.ndarray, extent: Any, origin: str = "upper") -> None:
    """Cells by their largest score: clear where it is 0."""
    shown = np.zeros((*scores.shape, 4))
    shown[..., 0], shown[..., 1] = 1.0, 0.35
    shown[..., 3] = 0.6 * scores
    axes.imshow(shown, extent=extent, origin=origin, interpolation="nearest", zorder=2)


def outline(axes: Any, scores: np.ndarray, colour: str) -> None:
    """The edge of each query's window in one camera."""
    from matplotlib.patches import Rectangle

    step = IMAGE_SIZE[0] / VIEW[1]
    for window in scores:
        rows, columns = window.nonzero()
        if len(rows):
            x, y = columns.min() * step, rows.min() * step
            size = (columns.max() + 1) * step - x, (rows.max() + 1) * step - y
            axes.add_patch(
                Rectangle((x, y), *size, edgecolor=colour, facecolor="none", linewidth=0.8)
            )


def save(figure: Any, path: Path) -> Path:
    """A PNG of few colours, to stay small."""
    import matplotlib.pyplot as plt
    from PIL import Image

    figure.tight_layout(pad=0.4)
    raw = io.BytesIO()
    figure.savefig(raw)
    plt.close(figure)
    Image.open(raw).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("frame", metavar="FRAME_DIR")
    parser.add_argument("--out", default=str(ROOT / "docs" / "images"), metavar="DIR")
    args = parser.parse_args()
    from projects.mmdet3d_plugin.datasets.frame import load_frame

    for path in draw(load_frame(args.frame), Path(args.out)):
        print(path)


if __name__ == "__main__":
    main()
