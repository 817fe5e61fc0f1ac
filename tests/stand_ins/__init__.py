"""Importing the stand-ins: packages in the shape of mmcv 1.x and mmengine, and repositories of the
family.

    with stand_ins.repository("cmt") as load: Attention =
        load("projects.mmdet3d_plugin.models.utils.petr_transformer").PETRMultiheadAttention

They are written from facts about the public repositories (class names, signatures, what calls
what), not from their source. `REPOSITORIES` says what each one stands for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any, Callable, Dict, Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
OPENMMLAB = os.path.join(HERE, "openmmlab")
UTILS = "projects.mmdet3d_plugin.models.utils"

REPOSITORIES = {
    "cmt": "FlashMHA and nn.MultiheadAttention classes, checkpointed decoder layer over mmcv's "
    "BaseTransformerLayer",
    "streampetr": "MultiheadAttentionWrapper with half and float32 routes, temporal decoder "
    "layer of its own (Far3D too)",
    "petr": "no flash class, torch's checkpoint bound by name",
    "mome": "CMT's classes and the PME decoder: a floating, learned mask (MEFormer too)",
    "aqr": "AQR on CMT: a generator of dense window biases, both generations of attention that "
    "take them",
    "mmdet3d": "projects/PETR of mmdet3d >= 1.1, registered with mmengine",
    "sparsedrive": "a flash class that is batch first and refuses masks (DiffusionDrive too)",
    "isfusion": "FlashMHA in a package of another name, called without an outer class, for "
    "flash-attn 2.x",
    "internvl": "classes of the same names that have another shape: to be left alone",
    "variants": "forwards that add parameters, return weights, subclass or bear another's name",
}

_TOP_LEVEL = ("projects", "mmcv", "mmengine", "internvl")


def path(name: str) -> str:
    """The root of a stand-in repository."""
    if name not in REPOSITORIES:
        raise ValueError(f"name must be one of {', '.join(REPOSITORIES)}, got {name!r}")
    return os.path.join(HERE, "repos", name)


@contextlib.contextmanager
def repository(name: str, openmmlab: bool = True) -> Iterator[Callable[[str], Any]]:
    """Put a stand-in repository on sys.path, yield an importer, and take all that was imported out
    again.

    Args:
        openmmlab: put the stand-ins of mmcv and mmengine there too; False uses those that are
            installed.
    """
    paths = [path(name)] + ([OPENMMLAB] if openmmlab else [])
    tops = _TOP_LEVEL if openmmlab else ("projects", "internvl")
    hidden = _take_out(tops)
    sys.path[:0] = paths
    importlib.invalidate_caches()
    try:
        yield importlib.import_module
    finally:
        for entry in paths:
            sys.path.remove(entry)
        _take_out(tops)
        sys.modules.update(hidden)


def _take_out(tops: Any) -> Dict[str, Any]:
    return {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in tops
    }
