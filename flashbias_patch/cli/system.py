"""Describe the machine for `flashbias doctor`: operating system, driver, cuDNN, packages, NumPy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from typing import Any, Dict, NamedTuple, Optional

from .. import driver

PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "wrapt",
    "mmcv-full",
    "mmcv",
    "mmcv-lite",
    "mmengine",
    "mmdet",
    "mmdet3d",
    "mmsegmentation",
    "spconv",
    "nuscenes-devkit",
    "flash-attn",
    "flash-attn-4",
    "numpy",
    "numba",
    "onnx",
    "onnxruntime",
)
TIMEOUT = 5.0  # seconds that nvidia-smi may take


def packages() -> Dict[str, Optional[str]]:
    """Return the version of each package, or None if it is missing.

    spconv has one distribution per CUDA version; the value then includes the distribution's name.
    """
    versions = {name: version(name) for name in PACKAGES}
    if versions["spconv"] is None:
        for distribution in importlib.metadata.distributions():
            name = str(distribution.metadata["Name"] or "")
            if name.startswith("spconv-"):
                versions["spconv"] = f"{distribution.version} ({name})"
    return versions


def version(name: str) -> Optional[str]:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> Dict[str, Any]:
    """Return os, machine, libc, driver, cuda, cudnn and numpy_abi as a JSON-able dict.

    Imports torch if it is installed.
    """
    values: Dict[str, Any] = {
        "os": platform.platform(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "driver": driver_version(),
        "cuda": None,
        "cudnn": None,
        "numpy_abi": None,
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        values["cuda"] = torch.version.cuda
        if torch.backends.cudnn.is_available():
            values["cudnn"] = ".".join(map(str, cudnn_version(torch.backends.cudnn.version() or 0)))
        values["numpy_abi"] = numpy_abi(torch)
    return values


class CudnnVersion(NamedTuple):
    major: int
    minor: int
    patch: int


def cudnn_version(number: int) -> CudnnVersion:
    """Decode the version number of cuDNN: 8902 is 8.9.2, 91002 is 9.10.2."""
    unit = 10000 if number >= 10000 else 1000
    return CudnnVersion(number // unit, number % unit // 100, number % 100)


def driver_version() -> Optional[str]:
    """Return the version of the NVIDIA driver, or None if there is none."""
    loaded = driver.version()
    if loaded is not None:
        return loaded
    try:
        process = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.split("\n")[0].strip() or None if process.returncode == 0 else None


def numpy_abi(torch: Any) -> str:
    """Return "ok" if torch and the installed NumPy can exchange arrays, else the error."""
    if importlib.util.find_spec("numpy") is None:
        return "NumPy is not installed"
    try:
        torch.zeros(1).numpy()
        return "ok"
    except Exception as error:  # the type depends on the versions of both
        return f"torch and NumPy do not fit: {type(error).__name__}: {error}"[:200]
