"""The example is a repository of its own: it is imported as one, and forgotten afterwards."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINI_CMT = ROOT / "examples" / "mini_cmt"
SMALL = [
    "--device",
    "cpu",
    "--image-size",
    "96x48",
    "--bev",
    "6",
    "--queries",
    "24",
    "--layers",
    "2",
    "--cfg-options",
    "model.pts_bbox_head.dn_groups=2",
]


def frame_dir():
    """The folder of a real frame, or None."""
    folder = Path(
        os.environ.get("FLASHBIAS_FRAME") or ROOT.parent / "shared" / "data" / "nuscenes_frame"
    )
    return folder if folder.is_dir() else None


def pop_projects():
    return {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.split(".")[0] == "projects"
    }


@pytest.fixture(scope="module")
def mini_cmt():
    """tools/train.py as `train`, and the plugin's modules by their last name."""
    earlier, path = pop_projects(), list(sys.path)
    spec = importlib.util.spec_from_file_location(
        "mini_cmt_train", str(MINI_CMT / "tools" / "train.py")
    )
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    plugin = "projects.mmdet3d_plugin."
    names = (
        "models.backbones.pillar_net",
        "models.utils.petr_transformer",
        "models.dense_heads.denoising",
        "models.dense_heads.positions",
        "core.boxes",
        "core.evaluation",
        "core.losses",
        "core.matching",
        "datasets.frame",
        "registry",
    )
    modules = {name.split(".")[-1]: importlib.import_module(plugin + name) for name in names}
    yield SimpleNamespace(train=train, **modules)
    pop_projects()
    sys.modules.update(earlier)
    sys.path[:] = path
