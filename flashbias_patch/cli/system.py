"""The machine for `flashbias doctor`: operating system, driver, cuDNN, packages, and whether NumPy
and torch fit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import subprocess
from typing import Any, Dict, Optional

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
DRIVER = "/proc/driver/nvidia/version"
SECONDS = 5.0  # that nvidia-smi may take


def packages() -> Dict[str, Optional[str]]:
    """Version per package, None where it is missing. spconv has a distribution per CUDA version:
    its name is in the value."""
    found = {name: version(name) for name in PACKAGES}
    if found["spconv"] is None:
        for distribution in importlib.metadata.distributions():
            name = str(distribution.metadata["Name"] or "")
            if name.startswith("spconv-"):
                found["spconv"] = f"{distribution.version} ({name})"
    return found


def version(name: str) -> Optional[str]:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> Dict[str, Any]:
    """JSON-able: os, machine, libc, driver, cuda, cudnn, numpy_abi. Imports torch where it is
    installed."""
    found: Dict[str, Any] = {
        "os": platform.platform(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "driver": driver(),
        "cuda": None,
        "cudnn": None,
        "numpy_abi": None,
    }
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["cuda"] = torch.version.cuda
        if torch.backends.cudnn.is_available():
            found["cudnn"] = ".".join(map(str, cudnn_version(torch.backends.cudnn.version() or 0)))
        found["numpy_abi"] = numpy_abi(torch)
    return found


def cudnn_version(number: int) -> Any:
    """(major, minor, patch) of cuDNN's number: 8902 is 8.9.2, 91002 is 9.10.2."""
    unit = 10000 if number >= 10000 else 1000
    return number // unit, number % unit // 100, number % 100


def driver() -> Optional[str]:
    """The NVIDIA driver's version; None without one."""
    try:
        with open(DRIVER) as file:
            found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.readline())
            if found:
                return found.group(1)
    except OSError:
        pass
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def numpy_abi(torch: Any) -> str:
    """Whether torch and the installed NumPy exchange arrays: "ok", or the error."""
    if importlib.util.find_spec("numpy") is None:
        return "NumPy is not installed"
    try:
        torch.zeros(1).numpy()
        return "ok"
    except Exception as error:  # whatever a NumPy of another ABI raises
        return f"torch and NumPy do not fit: {type(error).__name__}: {error}"[:200]
