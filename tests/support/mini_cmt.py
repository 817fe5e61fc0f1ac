"""examples/mini_cmt, a repository of its own: imported as one, and forgotten afterwards."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.scripts import ROOT, load

MINI_CMT = ROOT / "examples" / "mini_cmt"
PLUGIN = "projects.mmdet3d_plugin."
MODULE = PLUGIN + "models.utils.petr_transformer"
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


def take_out(package="projects"):
    """Remove a package and its modules from sys.modules; they are returned."""
    names = [n for n in sys.modules if n == package or n.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def on_path():
    """mini_cmt first on sys.path, nothing of its packages imported; as before afterwards."""
    earlier, path = take_out(), list(sys.path)
    sys.path.insert(0, str(MINI_CMT))
    try:
        yield
    finally:
        take_out()
        sys.modules.update(earlier)
        sys.path[:] = path


@pytest.fixture(scope="module")
def mini_cmt():
    """tools/train.py as `train`, and the plugin's modules by their last name."""
    with on_path():
        train = load("examples/mini_cmt/tools/train.py")
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
        modules = {name.split(".")[-1]: importlib.import_module(PLUGIN + name) for name in names}
        yield SimpleNamespace(train=train, **modules)


@pytest.fixture
def repository():
    """A function that imports mini_cmt's petr_transformer anew."""
    with on_path():
        yield lambda: importlib.import_module(MODULE)


@pytest.fixture
def patched(installed, repository):
    """mini_cmt's petr_transformer, imported with the patches on."""
    return repository()
