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
_told: Set[Tuple[str, str]] = set()
# Inside the package's directory and torch's, nobody is told where: the line of the user's code is.
_OURS = (torch.__file__.rpartition("/")[0], __file__.rpartition("/bias/")[0])


def tell(operation: str, tensor: Tensor) -> None:
    """One line for each operation and place that needs numbers."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    with _lock:
        if (operation, place) in _told:
            return
        _told.add((operation, place))
    size = tensor.numel() * tensor.element_size() / 2**20
    log.info(BECAME_DENSE, operation, place, tuple(tensor.shape), size)
