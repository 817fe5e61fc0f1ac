"""The lines of a record that describe a process: itself, its environment, its memory."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Dict, Mapping

KEPT_ENV = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTHONHASHSEED",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# Modules whose versions are recorded if the process has imported them.
MODULES = ("mmcv", "mmengine", "mmdet", "mmdet3d", "triton", "flash_attn", "flashbias_patch")


def process(environ: Mapping[str, str], rank: str) -> Dict[str, Any]:
    """Return the first line of a record."""
    return {
        "event": "process",
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "rank": int(rank) if rank.isdigit() else 0,
        "argv": getattr(sys, "orig_argv", None) or getattr(sys, "argv", []),
        "executable": sys.executable,
        "cwd": os.getcwd(),
        "python": sys.version.split()[0],
        "time": time.time(),
        "env": {k: v for k, v in environ.items() if k in KEPT_ENV or k.startswith("FLASHBIAS_")},
    }


def environment(torch: Any, gpu: Any, environ: Mapping[str, str]) -> Dict[str, Any]:
    """Return the line of versions, threads, ranks and the GPU; `gpu` is a cuda.Gpu."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    line = {
        "event": "environment",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": getattr(sys.modules.get("numpy"), "__version__", None),
        "threads": torch.get_num_threads(),
        "rank": torch.distributed.get_rank() if distributed else int(environ.get("RANK") or 0),
        "world_size": torch.distributed.get_world_size() if distributed else 1,
        "modules": {
            name: getattr(sys.modules[name], "__version__", "?")
            for name in MODULES
            if name in sys.modules
        },
    }
    return {**line, **gpu.environment()}


def resident_memory() -> Dict[str, int]:
    """Return the resident memory now and its maximum so far, in bytes.

    The maximum of getrusage is used only where /proc cannot be read: it survives exec, and so
    starts at the launcher's size.
    """
    try:
        memory = {}
        with open("/proc/self/status", "rb") as file:
            for row in file:
                if row.startswith(b"VmHWM"):
                    memory["rss_peak"] = int(row.split()[1]) * 1024
                elif row.startswith(b"VmRSS"):
                    memory["rss"] = int(row.split()[1]) * 1024
        return memory
    except OSError:
        try:
            import resource
        except ImportError:
            return {}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
