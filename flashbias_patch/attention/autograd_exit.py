"""A wait for autograd's threads at the end of a process whose last work was a backward pass."""

from __future__ import annotations

import atexit
import functools
import time

import torch

PATIENCE = 0.1  # seconds


@functools.lru_cache(maxsize=None)
def wait_for_autograd() -> None:
    """Register a short wait at exit, in which autograd's threads release tensors owned by Python.

    Such a thread releases a node's gradients after backward() has returned. It needs the
    interpreter for gradients that have a Python object, which all gradients of a
    torch.autograd.Function have. If the process ends meanwhile, Python ends the thread inside a
    destructor, which C++ turns into abort(): "terminate called without an active exception", exit
    status 134. This happened in 5 of 64 processes that ended with a backward pass, and in 0 of 64
    that waited (benchmarks/exits.py, an H200). Attention that is all C++ does not have such
    gradients, so the patch would cause this.
    """
    atexit.register(_wait)


def _wait() -> None:
    if torch.cuda.is_initialized():
        time.sleep(PATIENCE)
