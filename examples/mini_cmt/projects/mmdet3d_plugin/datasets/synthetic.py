"""A street made up from a seed: boxes, six painted images and a lidar sweep, as a nuScenes
frame."""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import cv2
import numpy as np

from .frame import CAMERAS, Frame, camera_matrix

# Camera headings in degrees to the left of straight ahead; image sizes and focal lengths in pixels.
HEADINGS = dict(zip(CAMERAS, (0.0, -55.0, 55.0, 180.0, 110.0, -110.0)))
WIDTH, HEIGHT = 800, 450
FOCAL, FOCAL_BACK = 630.0, 405.0
LIDAR_HEIGHT = 1.84
LIDAR2EGO = [[0, 1, 0, 0.94], [-1, 0, 0, 0], [0, 0, 1, LIDAR_HEIGHT], [0, 0, 0, 1]]
# By label: length, width, height in metres, and a colour to paint it in (BGR).
KINDS = (
    ((4.6, 1.9, 1.7), (200, 60, 40)),
    ((6.9, 2.5, 2.8), (40, 140, 230)),
    ((12.0, 2.9, 3.9), (140, 140, 60)),
    ((11.0, 2.9, 3.5), (60, 200, 220)),
    ((6.4, 2.8, 3.2), (20, 100, 160)),
    ((1.7, 0.6, 1.3), (180, 60, 200)),
    ((2.1, 0.8, 1.5), (90, 30, 120)),
    ((0.7, 0.7, 1.8), (60, 60, 230)),
    ((0.4, 0.4, 1.1), (30, 170, 255)),
    ((0.5, 2.5, 1.0), (210, 210, 210)),
)
# How often each kind occurs.
SHARES = np.array([8, 3, 1, 2, 1, 2, 2, 10, 4, 6], dtype=float)
MOVING = range(8)
# Of a box: its six faces as corner numbers, corners being numbered by the bits of (x, y, z).
FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))


def synthetic_frame(seed: int, num_objects: int = 30) -> Frame:
    """The same frame for the same seed."""
    rng = np.random.default_rng(seed)
    images_info = {camera: _calibration(camera) for camera in CAMERAS}
    instances = _instances(rng, num_objects)
    points = _sweep(rng, instances)
    for item in instances:
        item["num_lidar_pts"] = int(item["num_lidar_pts"])
        item["bbox_3d_isvalid"] = item["num_lidar_pts"] > 0
    info = {
        "token": f"synthetic-{seed}",
        "timestamp": 0.0,
        "ego2global": np.eye(4).tolist(),
        "images": images_info,
        "instances": instances,
        "lidar_points": {"lidar2ego": LIDAR2EGO, "num_pts_feats": 5},
    }
    images = {camera: _paint(instances, camera_matrix(images_info[camera])) for camera in CAMERAS}
    return Frame(info, images, points)


def _calibration(camera: str) -> Dict[str, Any]:
    heading = np.deg2rad(HEADINGS[camera])
    sin, cos = np.sin(heading), np.cos(heading)
    lidar2cam = np.eye(4)
    lidar2cam[:3, :3] = [[cos, sin, 0], [0, 0, -1], [-sin, cos, 0]]  # right, down, forward
    lidar2cam[:3, 3] = [0.0, -0.33, -0.5]
    focal = FOCAL_BACK if camera == "CAM_BACK" else FOCAL
    return {
        "img_path": f"{camera}.jpg",
        "lidar2cam": lidar2cam.tolist(),
        "cam2img": [[focal, 0.0, WIDTH / 2], [0.0, focal, HEIGHT / 2], [0.0, 0.0, 1.0]],
    }


def _instances(rng: np.random.Generator, count: int) -> List[Dict[str, Any]]:
    instances: List[Dict[str, Any]] = []
    while len(instances) < count:
        label = int(rng.choice(len(KINDS), p=SHARES / SHARES.sum()))
        dims = np.array(KINDS[label][0]) * rng.uniform(0.85, 1.15, 3)
        distance, angle = rng.uniform(5, 48), rng.uniform(-np.pi, np.pi)
        x, y = distance * np.cos(angle), distance * np.sin(angle)
        apart = [
            np.hypot(x - o["bbox_3d"][0], y - o["bbox_3d"][1]) - o["bbox_3d"][3] / 2
            for o in instances
        ]
        if min(apart, default=np.inf) < dims[0] / 2 + 0.5:
            continue
        yaw = rng.uniform(-np.pi, np.pi)
        speed = rng.uniform(0, 8) if label in MOVING and rng.random() < 0.4 else 0.0
        instances.append(
            {
                "bbox_3d": [float(v) for v in (x, y, dims[2] / 2 - LIDAR_HEIGHT, *dims, yaw)],
                "velocity": [float(speed * np.cos(yaw)), float(speed * np.sin(yaw))],
                "bbox_label": label,
                "bbox_label_3d": label,
                "num_lidar_pts": 0,
                "num_radar_pts": 0,
            }
        )
    return instances


def _to_lidar(local: np.ndarray, box: List[float]) -> np.ndarray:
    """Points in units of the box, -0.5 .. 0.5, to the lidar frame."""
    scaled = local * np.asarray(box[3:6])
    sin, cos = np.sin(box[6]), np.cos(box[6])
    return scaled @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + np.asarray(box[:3])


def _sweep(rng: np.random.Generator, instances: List[Dict[str, Any]]) -> np.ndarray:
    """Rings on the ground, and points on each box, fewer with distance, counted in `instances`."""
    parts = []
    for ring, radius in enumerate(np.geomspace(3.0, 60.0, 24)):
        angle = rng.uniform(-np.pi, np.pi, 500)
        x, y, z = radius * np.cos(angle), radius * np.sin(angle), np.full(500, -LIDAR_HEIGHT)
        parts.append(
            _with_features(np.stack([x, y, z], axis=1) + rng.normal(0, 0.03, (500, 3)), 8.0, ring)
        )
    for item in instances:
        box = item["bbox_3d"]
        area = box[5] * (box[3] + box[4])
        count = int(np.clip(2500 * area / (box[0] ** 2 + box[1] ** 2), 2, 600))
        local = rng.uniform(-0.5, 0.5, (count, 3))
        axis = rng.integers(0, 3, count)
        local[np.arange(count), axis] = rng.choice([-0.5, 0.5], count)
        parts.append(_with_features(_to_lidar(local, box), 20.0 + 20.0 * item["bbox_label"], 12))
        item["num_lidar_pts"] += count
    return np.concatenate(parts).astype(np.float32)


def _with_features(xyz: np.ndarray, intensity: float, ring: int) -> np.ndarray:
    return np.concatenate([xyz, np.tile([intensity, float(ring)], (len(xyz), 1))], axis=1)


def _paint(instances: List[Dict[str, Any]], lidar2img: np.ndarray) -> np.ndarray:
    image = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[: HEIGHT // 2] = np.linspace(235, 190, HEIGHT // 2)[:, None, None]  # sky
    image[HEIGHT // 2 :] = np.linspace(130, 70, HEIGHT - HEIGHT // 2)[:, None, None]  # ground
    corners = np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]) - 0.5
    faces: List[Tuple[float, np.ndarray, Tuple[int, ...]]] = []
    for item in instances:
        xyz = _to_lidar(corners, item["bbox_3d"])
        projected = np.concatenate([xyz, np.ones((8, 1))], axis=1) @ lidar2img.T
        depth = projected[:, 2]
        if depth.min() < 1.0:
            continue
        pixels = np.clip(projected[:, :2] / depth[:, None], -4000, 4000)
        for number, face in enumerate(FACES):
            shade = 0.7 + 0.06 * number
            colour = tuple(int(shade * c) for c in KINDS[item["bbox_label"]][1])
            polygon = pixels[list(face)].round().astype(np.int32)
            faces.append((float(depth[list(face)].mean()), polygon, colour))
    for _, polygon, colour in sorted(faces, key=lambda face: -face[0]):  # the far ones first
        cv2.fillConvexPoly(image, polygon, colour)
    return image
