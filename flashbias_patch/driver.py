"""Read the version of the NVIDIA driver without starting CUDA."""

from __future__ import annotations

import re
from typing import Optional

FILE = "/proc/driver/nvidia/version"


def version() -> Optional[str]:
    """Return the version of the loaded kernel module, e.g. "550.54.14"; None if there is none."""
    try:
        with open(FILE, encoding="utf-8", errors="replace") as file:
            match = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", file.readline())
    except OSError:
        return None
    return None if match is None else match.group(1)
