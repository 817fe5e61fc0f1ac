"""Detect installed packages that are known to fail together, and suggest fixes.

Only versions and files are read; none of the packages is imported.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import Callable, List, NamedTuple, Optional, Tuple


class Issue(NamedTuple):
    """A problem with the installed packages, and how to fix it."""

    problem: str
    fix: str


def installed_version(name: str) -> Optional[Tuple[int, ...]]:
    """The first three numbers of a distribution's installed version; None where it is not there."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version(name))[:3])
    except importlib.metadata.PackageNotFoundError:
        return None


def source_of(package: str) -> str:
    """The source of a package's __init__.py, which is not imported; "" where there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin or not os.path.exists(spec.origin):
        return ""
    with open(spec.origin, encoding="utf-8", errors="replace") as file:
        return file.read()


def _dotted(version: Tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def mmcv_assertion() -> Optional[Issue]:
    """Check the mmcv versions that mmdet, mmsegmentation and mmdet3d assert on import."""
    mmcv = installed_version("mmcv-full") or installed_version("mmcv")
    if mmcv is None:
        return None
    for package in ("mmdet3d", "mmdet", "mmseg"):
        limit = re.search(
            r"(?m)^(?:mmcv_maximum_version|MMCV_MAX)\s*=\s*['\"]([\d.]+)['\"]", source_of(package)
        )
        if limit and mmcv > tuple(int(part) for part in limit.group(1).split(".")):
            return Issue(
                f"{package} asserts mmcv <= {limit.group(1)} when imported, and mmcv "
                f"{_dotted(mmcv)} is installed",
                f"raise the limit in {package}/__init__.py to {_dotted(mmcv)}; 1.7.0 to 1.7.2 "
                "changed no interface",
            )
    return None


def mmcv_operators() -> Optional[Issue]:
    """Check for mmcv 1.x without its compiled operators."""
    mmcv = installed_version("mmcv-full") or installed_version("mmcv")
    if mmcv is None or mmcv[0] != 1:
        return None
    spec = importlib.util.find_spec("mmcv")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    if any(name.startswith("_ext") for folder in folders for name in os.listdir(folder)):
        return None
    return Issue(
        "mmcv is installed without its compiled operators (mmcv._ext): mmcv.ops fails on import",
        "install mmcv-full built for this torch, or build it: MMCV_WITH_OPS=1 pip install "
        "mmcv-full==1.7.2",
    )


def numpy_abi() -> Optional[Issue]:
    """Check for torch before 2.3, which was built for NumPy 1, with NumPy 2."""
    numpy, torch = installed_version("numpy"), installed_version("torch")
    if numpy is None or torch is None or numpy < (2,) or torch >= (2, 3):
        return None
    return Issue(
        f"torch {_dotted(torch)} was built for NumPy 1, and NumPy {_dotted(numpy)} is installed: "
        "torch.from_numpy and tensor.numpy() fail",
        "pip install 'numpy<2'",
    )


def spconv() -> Optional[Issue]:
    """Check for a missing spconv, which the plugins of CMT and MoME import in every config."""
    if installed_version("mmdet3d") is None or importlib.util.find_spec("spconv") is not None:
        return None
    return Issue(
        "spconv is not installed: CMT and MoME import it with their plugin",
        "pip install spconv-cu120, or spconv on a machine without a GPU",
    )


CHECKS: Tuple[Callable[[], Optional[Issue]], ...] = (
    mmcv_assertion,
    mmcv_operators,
    numpy_abi,
    spconv,
)


def known_issues() -> List[Issue]:
    """Return the issues that the checks find."""
    return [issue for issue in (check() for check in CHECKS) if issue is not None]
