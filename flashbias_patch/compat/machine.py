"""What a look at the installed packages tells will fail, with the cure; nothing of them is
imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import Callable, List, Optional, Tuple


def _version(name: str) -> Optional[Tuple[int, ...]]:
    try:
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(name))[:3])
    except importlib.metadata.PackageNotFoundError:
        return None


def _source(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin or not os.path.exists(spec.origin):
        return ""
    with open(spec.origin, encoding="utf-8", errors="replace") as file:
        return file.read()


def _dotted(version: Tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def mmcv_assertion() -> Optional[Tuple[str, str]]:
    """mmdet, mmsegmentation and mmdet3d assert a range of mmcv versions when they are imported."""
    mmcv = _version("mmcv-full") or _version("mmcv")
    if mmcv is None:
        return None
    for package in ("mmdet3d", "mmdet", "mmseg"):
        limit = re.search(
            r"(?m)^(?:mmcv_maximum_version|MMCV_MAX)\s*=\s*['\"]([\d.]+)['\"]", _source(package)
        )
        if limit and mmcv > tuple(int(part) for part in limit.group(1).split(".")):
            return (
                f"{package} asserts mmcv <= {limit.group(1)} when imported, and mmcv "
                f"{_dotted(mmcv)} is installed",
                f"raise the limit in {package}/__init__.py to {_dotted(mmcv)}; 1.7.0 to 1.7.2 "
                "changed no interface",
            )
    return None


def mmcv_operators() -> Optional[Tuple[str, str]]:
    """mmcv 1.x without its compiled operators."""
    mmcv = _version("mmcv-full") or _version("mmcv")
    if mmcv is None or mmcv[0] != 1:
        return None
    spec = importlib.util.find_spec("mmcv")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if any(name.startswith("_ext") for folder in folders for name in os.listdir(folder)):
        return None
    return (
        "mmcv is installed without its compiled operators (mmcv._ext): mmcv.ops fails on import",
        "install mmcv-full built for this torch, or build it: MMCV_WITH_OPS=1 pip install "
        "mmcv-full==1.7.2",
    )


def numpy_and_numba() -> Optional[Tuple[str, str]]:
    """mmcv 1.x and the devkits were built against NumPy 1; torch before 2.3 too."""
    numpy, torch = _version("numpy"), _version("torch")
    if numpy is None or torch is None or numpy < (2,) or torch >= (2, 3):
        return None
    return (
        f"torch {_dotted(torch)} was built for NumPy 1, and NumPy {_dotted(numpy)} is installed: "
        "torch.from_numpy and tensor.numpy() fail",
        "pip install 'numpy<2'",
    )


def spconv() -> Optional[Tuple[str, str]]:
    """CMT and MoME import spconv when their plugin is imported, in the camera-only configurations
    too."""
    if _version("mmdet3d") is None or importlib.util.find_spec("spconv") is not None:
        return None
    return (
        "spconv is not installed: CMT and MoME import it with their plugin",
        "pip install spconv-cu120, or spconv on a machine without a GPU",
    )


CHECKS: Tuple[Callable[[], Optional[Tuple[str, str]]], ...] = (
    mmcv_assertion,
    mmcv_operators,
    numpy_and_numba,
    spconv,
)


def unmendable() -> List[Tuple[str, str]]:
    """Every check that finds something: (what, the cure)."""
    return [found for found in (check() for check in CHECKS) if found is not None]
