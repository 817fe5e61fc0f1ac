"""The default random states of the CPU and of one CUDA device: taken and put back without
synchronising."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from .._torch_internals import stream_capturing

State = Tuple[Tensor, Optional[Tensor], Optional[torch.device]]


def now(device: Optional[torch.device] = None) -> State:
    """Of the CPU and of one CUDA device (default: the current one)."""
    cpu = torch.get_rng_state()
    if not torch.cuda.is_initialized() or stream_capturing():
        return cpu, None, None
    device = device if device is not None and device.type == "cuda" else torch.device("cuda")
    return cpu, torch.cuda.get_rng_state(device), device


def restore(state: Optional[State]) -> None:
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None and state[2] is not None:
            torch.cuda.set_rng_state(state[1], state[2])
