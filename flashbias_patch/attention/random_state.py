"""The default random states of the CPU and of one CUDA device, taken and restored without
synchronising."""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

from .._torch_internals import stream_capturing

_new: Callable[..., State] = tuple.__new__  # State(...) without the Python function around it


class State(NamedTuple):
    """`cuda`: of `device`; both None where CUDA is not in use, or a stream is captured."""

    cpu: Tensor
    cuda: Optional[Tensor]
    device: Optional[torch.device]


def now(device: Optional[torch.device] = None) -> State:
    """The state of the CPU and of one CUDA device (default: the current one; for a CPU device
    none)."""
    cpu, cuda = torch.default_generator.get_state(), None
    of_cpu = device is not None and device.type == "cpu"
    if of_cpu or not torch.cuda.is_initialized() or stream_capturing():
        device = None
    else:
        device = device if device is not None and device.type == "cuda" else torch.device("cuda")
        cuda = torch.cuda.get_rng_state(device)
    return _new(State, (cpu, cuda, device))


def restore(state: Optional[State]) -> None:
    """Set the random state; None: nothing happens."""
    if state is not None:
        torch.set_rng_state(state.cpu)
        if state.cuda is not None and state.device is not None:
            torch.cuda.set_rng_state(state.cuda, state.device)
