"""Where this package's Triton kernels can be launched: versions and GPUs."""

from __future__ import annotations

import functools
import importlib.util
from typing import List, Tuple

import torch

from .._torch_internals import RELEASE

LEAST_TRITON = (3, 0)
LEAST_TORCH = (2, 1)


@functools.lru_cache(maxsize=None)
def missing() -> Tuple[str, ...]:
    """Reasons why the kernels cannot be imported."""
    if RELEASE < LEAST_TORCH:
        return ("torch {} is older than {}.{}".format(torch.__version__, *LEAST_TORCH),)
    if importlib.util.find_spec("triton") is None:
        return ("triton is not installed",)
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < LEAST_TRITON:
        return ("triton {} is older than {}.{}".format(triton.__version__, *LEAST_TRITON),)
    return ()


@functools.lru_cache(maxsize=64)
def capability(index: int) -> Tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def reasons_of_device(device: torch.device) -> List[str]:
    """Reasons why no kernel of this package is launched on that GPU."""
    if torch.version.hip:
        return ["not tried on ROCm"]
    major, minor = capability(device.index)
    return [f"compute capability {major}.{minor} is below 8.0"] if major < 8 else []
