"""The table of targets: class name, required parameters of its forward, and seam."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from .. import telemetry

ENTRY_POINT_GROUP = "flashbias_patch.targets"


class Target(NamedTuple):
    """A class to patch. It is claimed by `name` if the parameters of its forward begin with
    `leading`, in order, and contain `having`."""

    name: str
    seam: str  # of its forward: a key of patching.seams.SEAMS
    leading: Tuple[str, ...]
    having: Tuple[str, ...] = ()
    others: Tuple[
        Tuple[str, str], ...
    ] = ()  # further methods, wrapped where the class has them: (name, seam)
    otherwise: Any = None  # the target of another generation of the class, by the same name


_QKV = ("query", "key", "value")
_POSITIONS = ("identity", "query_pos", "key_pos", "attn_mask", "key_padding_mask")

_BUILT = (("__init__", "transformer constructor"),)
_CALLED_BY_HEAD = (("query_embed", "head queries"), ("loss", "head loss"))

TARGETS: Tuple[Target, ...] = (
    Target("PETRMultiheadAttention", "outer", _QKV, ("attn_mask", "key_padding_mask")),
    Target("PETRMultiheadFlashAttention", "outer", _QKV, ("attn_mask", "key_padding_mask")),
    Target("MultiheadFlashAttention", "outer", _QKV, ("attn_mask", "key_padding_mask")),
    Target("GroupMultiheadAttention", "outer", _QKV, _POSITIONS),
    Target("MDHAMultiheadAttention", "outer", _QKV, _POSITIONS),
    Target("MultiheadAttention", "outer", _QKV, _POSITIONS),
    Target(
        "FlashMHA",
        "core",
        ("q", "k", "v"),
        ("key_padding_mask",),
        otherwise=Target("FlashMHA", "dual core", _QKV, ("q", "k", "v", "attn_bias")),
    ),
    Target("PETRTransformerDecoderLayer", "layer", ("query",), ("attn_masks",)),
    Target("PETRTemporalDecoderLayer", "layer", ("query",), ("attn_masks",)),
    Target("Detr3DTemporalDecoderLayer", "layer", ("query",), ("attn_masks",)),
    Target("MV2DFusionTransformerDecoderLayer", "layer", ("query",), ("attn_masks",)),
    Target("MDHATemporalDecoderLayer", "layer", ("query",), ("attn_masks",)),
    Target(
        "AttentionBiasGenerator",
        "bias generator",
        ("lidar_weights", "camera_weights"),
        ("pts_bev_indices", "pts_pers_indices"),
    ),
    Target("CmtTransformer", "transformer", ("x", "x_img", "query_embed"), (), _BUILT),
    Target("CmtLidarTransformer", "transformer", ("x", "mask", "query_embed"), (), _BUILT),
    Target("CmtImageTransformer", "transformer", ("x_img", "query_embed"), ("bs",), _BUILT),
    Target("PETRTransformer", "transformer", ("x", "mask", "query_embed"), (), _BUILT),
    Target("PETRDNTransformer", "transformer", ("x", "mask", "query_embed"), (), _BUILT),
    Target("PETRTemporalTransformer", "transformer", ("memory", "tgt", "query_pos"), (), _BUILT),
    Target("CmtHead", "head", (), ("img_metas",), _CALLED_BY_HEAD),
)

# Modules known to define targets; forks elsewhere are found through the registries and by what they
# import.
_UTILS = "projects.mmdet3d_plugin.models.utils"
MODULES: Tuple[str, ...] = (
    "mmcv.cnn.bricks.transformer",
    f"{_UTILS}.attention",
    f"{_UTILS}.attention_bias_generator",
    "projects.mmdet3d_plugin.models.attention",
    f"{_UTILS}.petr_transformer",
    f"{_UTILS}.cmt_transformer",
    f"{_UTILS}.pme_transformer",
    f"{_UTILS}.detr3d_transformer",
    f"{_UTILS}.mv2dfusion_transformer",
    "projects.mmdet3d_plugin.models.transformer.mdha_transformer",
    "projects.mmdet3d_plugin.bevformer.modules.group_attention",
    "projects.mmdet3d_plugin.models.dense_heads.cmt_head",
    "projects.PETR.petr.petr_transformer",
    "mmdet3d_plugin.models.utils.attention",
    "mmdet3d_plugin.models.utils.petr_transformer",
)

# Registries whose registrations are watched: module -> class with `_register_module`.
REGISTRIES: Dict[str, str] = {
    "mmcv.utils.registry": "Registry",
    "mmengine.registry.registry": "Registry",
}

_third_party: Optional[List[Target]] = None


def targets() -> Dict[str, Target]:
    """Targets by class name, third-party entry points included."""
    return {target.name: target for target in (*TARGETS, *_entry_points())}


def _entry_points() -> List[Target]:
    global _third_party
    if _third_party is None:
        _third_party = []
        entry_points = importlib.metadata.entry_points()
        if hasattr(entry_points, "select"):
            group: Any = entry_points.select(group=ENTRY_POINT_GROUP)
        else:  # before Python 3.10
            group = entry_points.get(ENTRY_POINT_GROUP, [])
        for entry in group:
            try:
                value = entry.load()
                _third_party.extend(
                    [value] if isinstance(value, Target) else [Target(*item) for item in value]
                )
            except Exception as error:  # a broken plugin must not disable patching
                telemetry.once(
                    ("entry point", entry.name),
                    "error",
                    "entry point %s of group %s is left out: %s",
                    entry.name,
                    ENTRY_POINT_GROUP,
                    error,
                )
    return _third_party


def target_of(cls: type) -> Optional[Target]:
    """Return the target with the name of `cls` or of a base class; None if there is none."""
    known = targets()
    return next((known[base.__name__] for base in cls.__mro__ if base.__name__ in known), None)


def fitting(cls: type, target: Target) -> Tuple[Target, Optional[str]]:
    """Return (the generation of `target` that `cls` fits, None), or (target, why it fits none)."""
    why = misfit(cls, target)
    if why is not None and target.otherwise is not None and misfit(cls, target.otherwise) is None:
        return target.otherwise, None
    return target, why


def misfit(cls: type, target: Target) -> Optional[str]:
    """Return why `cls` does not fit the target; None if it fits."""
    forward = getattr(cls, "forward", None)
    if not callable(forward):
        return "it has no forward"
    code_owner = inspect.unwrap(forward)
    try:
        parameters = list(inspect.signature(code_owner).parameters)[1:]
    except (TypeError, ValueError) as error:
        return f"its forward has no readable signature: {error}"
    leading = tuple(parameters[: len(target.leading)])
    if leading != target.leading:
        return f"its forward begins ({', '.join(leading)}), expected ({', '.join(target.leading)})"
    missing = [name for name in target.having if name not in parameters]
    if missing:
        return f"its forward has no {', '.join(missing)}"
    return None
