"""Where a result comes from: what its JSON file says beside the figures."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from typing import Any, Dict, Optional

import torch


def command_of(*paths: Optional[str]) -> str:
    """As the script was called, of `paths` their names alone: no machine's folders."""
    words = [os.path.basename(word) if word in paths else word for word in sys.argv[1:]]
    return shlex.join(["python", "benchmarks/" + os.path.basename(sys.argv[0]), *words])


def about(*paths: Optional[str], device: str = "cuda") -> Dict[str, Any]:
    """The command, the device and the versions that a result holds for."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "command": command_of(*paths),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }
