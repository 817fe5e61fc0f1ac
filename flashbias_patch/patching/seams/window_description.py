"""The window bias of an AttentionBiasGenerator as a description."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ...bias import AttentionBias, Grid, ModalityBias, WindowBias, described

NAMES = ("lidar_weights", "camera_weights", "pts_bev_indices", "pts_pers_indices")
SIZES = ("bev_h", "bev_w", "num_views", "pers_h", "pers_w", "window_size")  # positive ints
ATTRIBUTES = (
    *SIZES,
    "use_local_bias",
    "use_gaussian_window",
    "gaussian_sigma",
    "fp16",
    "learnable_scale",
    "min_scale",
    "max_scale",
)
SCALE = "bias_scale"
LIMIT = 5.0  # entries are clamped to +- min(LIMIT, max_scale)


WHOLE: Dict[str, Callable[[Tensor], Tensor]] = {  # ways to make a cell of a fraction
    "truncate": torch.trunc,
    "round": torch.round,
}


class Recipe(NamedTuple):
    """The recipe by which a module's bias is described."""

    dtype: torch.dtype  # of its result
    whole: str  # a key of WHOLE
    clamped: bool  # True if the scale is clamped to [min_scale, max_scale]
    counter: Optional[str]  # the attribute that counts the calls
    periods: Tuple[int, ...]  # numbers of calls after which it may print


class Verdict(NamedTuple):
    """The result of a check: a recipe, or the reason why the module keeps its dense bias."""

    recipe: Optional[Recipe] = None
    reason: Optional[str] = None


def describe(
    module: Any,
    recipe: Recipe,
    lidar_weights: Tensor,
    camera_weights: Tensor,
    bev: Tensor,
    camera: Tensor,
) -> Tensor:
    """The bias of one call as a BiasTensor (B, M, N)."""
    bias = bias_of(module, recipe.clamped, recipe.whole, lidar_weights, camera_weights, bev, camera)
    return described(bias, "bmn", recipe.dtype)


def bias_of(
    module: Any,
    clamp_scale: bool,
    whole: str,
    lidar_weights: Tensor,
    camera_weights: Tensor,
    bev: Tensor,
    camera: Tensor,
) -> AttentionBias:
    scale = getattr(module, SCALE)
    weights = torch.stack([lidar_weights, camera_weights], -1)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if clamp_scale:
        low, high = module.min_scale, module.max_scale
        scale = scale.clamp(low, high) if isinstance(scale, Tensor) else min(max(scale, low), high)
    limit = min(LIMIT, module.max_scale)
    weights = (weights * scale).clamp(-limit, limit)
    frames = Grid(module.bev_h, module.bev_w), Grid(module.pers_h, module.pers_w, module.num_views)
    if not module.use_local_bias:
        return ModalityBias(weights, tuple(frame.size for frame in frames))
    cell, camera = ((WHOLE[whole](t) if t.is_floating_point() else t).long() for t in (bev, camera))
    row = torch.div(cell, module.bev_w, rounding_mode="floor")
    on_bev = torch.stack([torch.zeros_like(cell), row, cell - row * module.bev_w], -1)
    centres = torch.stack([on_bev, camera], 2)
    sigma = float(module.gaussian_sigma) if module.use_gaussian_window else None
    return WindowBias(weights, centres, frames, module.window_size, sigma)


def bounded(module: Any, tensors: List[Tensor]) -> bool:
    """Return True if clamping the weights is the same as clamping the entries: always for boxes;
    for Gaussian windows where nothing is clamped."""
    if not (module.use_local_bias and module.use_gaussian_window) or not tensors[0].numel():
        return True
    if module.max_scale > LIMIT:
        return False
    lidar_weights, camera_weights, *_ = tensors
    if lidar_weights.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    peaks = torch.stack([t.detach().abs().amax() for t in (lidar_weights, camera_weights)])
    return bool((peaks <= 1).all())
