"""The end of a process whose last work was a backward pass on a GPU."""

from __future__ import annotations

import atexit
import functools
import time

import torch

PATIENCE = 0.1  # seconds


@functools.lru_cache(maxsize=None)
def wait_for_autograd() -> None:
    """At exit, give autograd's threads time to let go of what was made in Python.

    Such a thread drops a node's gradients after whoever waits for the pass has gone on, and needs
    the interpreter for those that have a Python object, as all have that a torch.autograd.Function
    made. If the process ends meanwhile, Python ends the thread inside a destructor, which C++
    answers with abort(): "terminate called without an active exception", exit status 134: 5 of 64
    processes that ended with a backward pass, 0 of 64 that waited (benchmarks/exits.py, an H200).
    Attention that is all C++ does not have such gradients, so it would be the patch that brought
    this about.
    """
    atexit.register(_wait)


def _wait() -> None:
    if torch.cuda.is_initialized():
        time.sleep(PATIENCE)
