"""This package installed for a while, in a benchmark's own process."""

from __future__ import annotations

import contextlib
import os
from typing import Iterator

import flashbias_patch
from flashbias_patch import settings


@contextlib.contextmanager
def patched(dtype: str = "auto") -> Iterator[None]:
    """Install for the block, with that FLASHBIAS_DTYPE."""
    os.environ["FLASHBIAS_DTYPE"] = dtype
    settings.reload()
    flashbias_patch.install()
    try:
        yield
    finally:
        flashbias_patch.uninstall()
        del os.environ["FLASHBIAS_DTYPE"]
        settings.reload()
