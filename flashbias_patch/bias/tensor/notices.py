"""Log where a BiasTensor became dense, once per operation and line of code."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Set, Tuple

import torch
from torch import Tensor

BECAME_DENSE = (
    "an attention bias was needed as numbers by %s at %s and became dense there: %s, %.0f MiB"
)
log = logging.getLogger("flashbias_patch")
_lock = threading.Lock()
_logged: Set[Tuple[str, str]] = set()
# Frames in these directories are skipped: the message names the line of the user's code.
_INTERNAL_PATHS = (torch.__file__.rpartition("/")[0], __file__.rpartition("/bias/")[0])


def log_dense(operation: str, tensor: Tensor) -> None:
    """Log that `operation` made `tensor` dense, once per operation and line of code."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INTERNAL_PATHS):
        frame = frame.f_back
    location = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    with _lock:
        if (operation, location) in _logged:
            return
        _logged.add((operation, location))
    size = tensor.numel() * tensor.element_size() / 2**20
    log.info(BECAME_DENSE, operation, location, tuple(tensor.shape), size)
