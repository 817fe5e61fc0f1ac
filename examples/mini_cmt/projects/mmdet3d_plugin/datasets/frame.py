"""One nuScenes frame in mmdet3d's info format, and batches made of such frames."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
import torch

from ..core.boxes import BOX_SIZE

CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_FRONT_LEFT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_BACK_RIGHT",
)
IMAGE_MEAN = np.array([103.5, 116.3, 123.7], dtype=np.float32)  # BGR
IMAGE_STD = np.array([57.4, 57.1, 58.4], dtype=np.float32)


class Frame(NamedTuple):
    info: Dict[str, Any]  # an entry of `data_list`
    images: Dict[str, np.ndarray]  # by camera: (H, W, 3) uint8, BGR
    points: np.ndarray  # (P, 5) float32: x, y, z, intensity, ring


def load_frame(folder: str) -> Frame:
    """Read the first frame of the only info file (*.pkl) in `folder`."""
    root = Path(folder)
    infos = sorted(root.glob("*.pkl"))
    if len(infos) != 1:
        raise FileNotFoundError(f"{root} should hold one info file (*.pkl), found {len(infos)}")
    with open(str(infos[0]), "rb") as file:
        info = pickle.load(file)["data_list"][0]
    images = {}
    for camera in CAMERAS:
        path = root / info["images"][camera]["img_path"]
        images[camera] = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if images[camera] is None:
            raise FileNotFoundError(f"{path} is not a readable image")
    lidar = info["lidar_points"]
    points = np.fromfile(str(root / lidar["lidar_path"]), dtype=np.float32)
    return Frame(info, images, points.reshape(-1, lidar.get("num_pts_feats", 5)))


def ground_truth(info: Dict[str, Any], pc_range: Sequence[float]) -> Tuple[np.ndarray, np.ndarray]:
    """Boxes (G, 9) and labels (G,) of the known classes that were hit by a beam and lie within
    pc_range."""
    boxes, labels = [], []
    for item in info["instances"]:
        centre = item["bbox_3d"][:3]
        inside = all(low < c < high for low, c, high in zip(pc_range[:3], centre, pc_range[3:]))
        if item["bbox_label_3d"] >= 0 and item["bbox_3d_isvalid"] and inside:
            boxes.append([*item["bbox_3d"], *item["velocity"]])
            labels.append(item["bbox_label_3d"])
    return np.asarray(boxes, dtype=np.float32).reshape(-1, BOX_SIZE), np.asarray(
        labels, dtype=np.int64
    )


def prepare_image(image: np.ndarray, size: Tuple[int, int]) -> Tuple[np.ndarray, np.ndarray]:
    """Scale to the width of `size` (W, H) and keep the lowest H rows.

    Returns (3, H, W) float32 and the 4x4 matrix that takes old pixels to new ones.
    """
    width, height = size
    scale = width / image.shape[1]
    scaled_height = int(round(image.shape[0] * scale))
    if scaled_height < height:
        raise ValueError(
            f"image size {width}x{height} is taller than the camera's {width}x{scaled_height}"
        )
    crop = scaled_height - height
    pixels = cv2.resize(image, (width, scaled_height), interpolation=cv2.INTER_AREA)[crop:]
    pixels = (pixels.astype(np.float32) - IMAGE_MEAN) / IMAGE_STD
    matrix = np.diag([scale, scaled_height / image.shape[0], 1.0, 1.0])
    matrix[1, 2] = -crop
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)), matrix


def camera_matrix(camera: Dict[str, Any]) -> np.ndarray:
    """4x4: lidar coordinates -> (u * depth, v * depth, depth, 1) in pixels of the original
    image."""
    cam2img = np.eye(4)
    intrinsics = np.asarray(camera["cam2img"])
    cam2img[: intrinsics.shape[0], : intrinsics.shape[1]] = intrinsics
    return cam2img @ np.asarray(camera["lidar2cam"])


def make_batch(
    frames: Sequence[Frame], image_size: Tuple[int, int], pc_range: Sequence[float]
) -> Dict[str, Any]:
    """Keyword arguments of the detector, on the CPU.

    points: list of (P, 5); img (B, V, 3, H, W); img_metas: per frame token, img_shape (H, W),
    lidar2img and img2lidar (V, 4, 4); gt_bboxes_3d: list of (G, 9); gt_labels_3d: list of (G,).
    """
    batch: Dict[str, List[Any]] = {
        "points": [],
        "img": [],
        "img_metas": [],
        "gt_bboxes_3d": [],
        "gt_labels_3d": [],
    }
    for frame in frames:
        pixels, lidar2img = [], []
        for camera in CAMERAS:
            image, matrix = prepare_image(frame.images[camera], image_size)
            pixels.append(image)
            lidar2img.append(matrix @ camera_matrix(frame.info["images"][camera]))
        boxes, labels = ground_truth(frame.info, pc_range)
        batch["points"].append(torch.from_numpy(frame.points.copy()))
        batch["img"].append(torch.from_numpy(np.stack(pixels)))
        batch["img_metas"].append(
            {
                "token": frame.info["token"],
                "img_shape": (image_size[1], image_size[0]),
                "lidar2img": torch.from_numpy(np.stack(lidar2img)).float(),
                "img2lidar": torch.from_numpy(np.linalg.inv(np.stack(lidar2img))).float(),
            }
        )
        batch["gt_bboxes_3d"].append(torch.from_numpy(boxes))
        batch["gt_labels_3d"].append(torch.from_numpy(labels))
    return {**batch, "img": torch.stack(batch["img"])}
