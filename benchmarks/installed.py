"""This package installed for a while, in a benchmark's own process."""

from __future__ import annotations

import contextlib
import os
from typing import Iterator

import flashbias_patch
from flashbias_patch import settings


@contextlib.contextmanager
def patched(dtype: str = "auto", aqr: str = "", backend: str = "") -> Iterator[None]:
    """Install for the block, with these FLASHBIAS_DTYPE, FLASHBIAS_AQR and FLASHBIAS_BACKEND."""
    given = {"FLASHBIAS_DTYPE": dtype, "FLASHBIAS_AQR": aqr, "FLASHBIAS_BACKEND": backend}
    given = {name: value for name, value in given.items() if value}
    os.environ.update(given)
    settings.reload()
    flashbias_patch.install()
    try:
        yield
    finally:
        flashbias_patch.uninstall()
        for name in given:
            del os.environ[name]
        settings.reload()
