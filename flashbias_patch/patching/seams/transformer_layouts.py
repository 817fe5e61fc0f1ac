"""Layouts: the arguments that hold the queries and keys, per class of transformers."""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional

from torch import Tensor

PETR_CAMERAS = 6  # nuScenes; only forward has the real number, and a router is built before


class Keys(NamedTuple):
    """The keys of one call: lidar (B, C, h, w), cameras (B, V, C, h, w) and flat memory (B, N, C),
    any of them None."""

    batch: int
    lidar: Optional[Tensor] = None
    cameras: Optional[Tensor] = None
    flat: Optional[Tensor] = None


def _cmt_keys(get: Callable[[str], Any]) -> Keys:
    lidar, images = get("x"), get("x_img")
    batch = lidar.shape[0]
    return Keys(batch, lidar, None if images is None else images.unflatten(0, (batch, -1)))


def _image_keys(get: Callable[[str], Any]) -> Keys:
    images, batch = get("x_img"), get("bs")
    return Keys(batch, cameras=images.unflatten(0, (batch, -1)))


class Layout(NamedTuple):
    """The places of queries and keys in a class of transformers."""

    query: str  # the parameter that holds (B, M, C) or (M, C)
    keys: Callable[[Callable[[str], Any]], Keys]
    lidar: bool = False  # the first segment is the lidar BEV
    cameras: int = 0  # camera segments unless the options say otherwise
    grid: bool = True  # whether rows and columns of the keys are known


LAYOUTS: Dict[str, Layout] = {
    "CmtTransformer": Layout("query_embed", _cmt_keys, lidar=True, cameras=1),
    "CmtLidarTransformer": Layout(
        "query_embed", lambda get: Keys(len(get("x")), get("x")), lidar=True
    ),
    "CmtImageTransformer": Layout("query_embed", _image_keys, cameras=PETR_CAMERAS),
    "PETRTransformer": Layout(
        "query_embed", lambda get: Keys(len(get("x")), cameras=get("x")), cameras=PETR_CAMERAS
    ),
    "PETRDNTransformer": Layout(
        "query_embed", lambda get: Keys(len(get("x")), cameras=get("x")), cameras=PETR_CAMERAS
    ),
    "PETRTemporalTransformer": Layout(
        "query_pos",
        lambda get: Keys(len(get("memory")), flat=get("memory")),
        cameras=PETR_CAMERAS,
        grid=False,
    ),
}


def layout_of(cls: type) -> Layout:
    return next(LAYOUTS[base.__name__] for base in cls.__mro__ if base.__name__ in LAYOUTS)
