"""What the installed torch can do on the CPU, for tests that run under many versions of it."""
from __future__ import annotations

import torch


def half_runs_here() -> bool:
    """Whether matrix products in float16 run: not before torch 2.2."""
    try:
        torch.baddbmm(*torch.zeros(3, 2, 2, 2).half())
    except RuntimeError:
        return False
    return True


def float16_has_autocast() -> bool:
    """False before torch 2.4."""
    before = torch.get_autocast_cpu_dtype()
    try:
        torch.set_autocast_cpu_dtype(torch.float16)
    except RuntimeError:
        return False
    torch.set_autocast_cpu_dtype(before)
    return True
