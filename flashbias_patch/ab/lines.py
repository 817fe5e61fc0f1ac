"""JSON lines that survive what a command does to its files: closed descriptors, a full disk."""

from __future__ import annotations

import json
import math
import os
from typing import Any


class Lines:
    """Appends JSON lines to `path`, each by one write.

    A command may close every descriptor that it did not open (daemons do), and the number may then
    be a file of its own: before a write the descriptor is compared with the file that was opened,
    and opened anew if need be.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.torn = False  # the last write was cut off
        self._open()

    def _open(self) -> None:
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.identity = self._identity()

    def _identity(self) -> Any:
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino

    def _is_ours(self) -> bool:
        try:
            return bool(self._identity() == self.identity)
        except OSError:
            return False

    def write(self, line: Any) -> None:
        """Raises OSError where nothing can be written."""
        if not self._is_ours():
            self._open()
        text = json.dumps(plain(line), default=str, allow_nan=False) + "\n"
        data = ("\n" if self.torn else "").encode() + text.encode("utf-8", "backslashreplace")
        self.torn = True
        written = os.write(self.descriptor, data)
        self.torn = written < len(data)
        if self.torn:
            raise OSError(f"{written} of {len(data)} bytes written to {self.path}")

    def close(self) -> None:
        if self._is_ours():
            os.close(self.descriptor)


def plain(value: Any, other: Any = str) -> Any:
    """`value` with its numbers that JSON does not have (NaN, infinities) as `other(number)`: "nan",
    "inf", "-inf"."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else other(float(value))
    if isinstance(value, dict):
        return {key: plain(entry, other) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, other) for entry in value]
    return value


def alive(process: int) -> bool:
    """Is there a process of that id? True also for one of another user."""
    try:
        os.kill(process, 0)
        return True
    except ProcessLookupError:
        return False
    except OSError:
        return True
