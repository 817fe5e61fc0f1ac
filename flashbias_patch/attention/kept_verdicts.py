"""Verdicts of self-checks on disk: a self-check that passed on this machine is not repeated in the
next process.

The file is `verdicts.json`, beside the tuning cache. A row holds the machine (GPU, driver,
versions, the source of the kernels and backends), the call signature, the backend, and the
evidence: when it was checked, on which problems, and the largest error as a share of the tolerated
one. Only backends that passed are kept, and only for signatures on a GPU: elsewhere a check takes
milliseconds. The row of a backend that fails later is removed. A file that is damaged, or another
user's, counts as empty. FLASHBIAS_VERDICTS=off neither reads nor writes it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import zlib
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set

import torch

from .. import driver, settings
from .._torch_internals import cuda_driver_version
from .signature import CallSignature

# Backends whose source, and whose libraries' versions, `here` names.
NAMES = ("triton", "sdpa")
MAX_ROWS = 500  # the newest
Row = Dict[str, Any]


class RowKey(NamedTuple):
    """The key of a row; `signature` is its text."""

    place: str
    signature: str
    backend: str

    @classmethod
    def of(cls, signature: CallSignature, backend: str) -> RowKey:
        # The index of a GPU among several does not matter.
        device = torch.device(signature.device.type)
        return cls(here(signature.device), repr(signature._replace(device=device)), backend)

    @classmethod
    def of_row(cls, row: Row) -> RowKey:
        return cls(row["place"], row["signature"], row["backend"])


_passed: Optional[Set[RowKey]] = None  # None: the file was not read yet


def path() -> str:
    from .kernels import cache

    return os.path.join(cache.directory(), "verdicts.json")


def wanted(backend: Any, signature: CallSignature, name: str) -> bool:
    """True if verdicts of that signature and backend are kept. Those of an object in place of a
    backend are not."""
    ours = type(backend).__module__.startswith(f"{__package__}.backends.")
    on_gpu = signature.device.type == "cuda"
    return on_gpu and name in NAMES and ours and bool(settings.current().verdicts)


def holds(signature: CallSignature, backend: str) -> bool:
    """True if the backend passed the self-check for the signature in an earlier process."""
    global _passed
    if _passed is None:
        _passed = {RowKey.of_row(row) for row in rows()}
    return RowKey.of(signature, backend) in _passed


def keep(signature: CallSignature, backend: str, evidence: Dict[str, Any]) -> None:
    """Add a verdict. If the file cannot be written, the next process checks again."""
    key = RowKey.of(signature, backend)
    if _passed is not None:
        _passed.add(key)
    row = {
        **key._asdict(), "words": signature.describe(),
        "checked": time.strftime("%Y-%m-%d %H:%M:%S"), **evidence,
    }  # fmt: skip
    _change(lambda rows: [*_without(rows, key), row])


def forget(signature: CallSignature, backend: str) -> None:
    """Remove the verdict on a backend that failed since; nothing happens where there is none."""
    if not _passed:
        return
    key = RowKey.of(signature, backend)
    if key in _passed:
        _passed.discard(key)
        _change(lambda rows: _without(rows, key))


def here(device: torch.device) -> str:
    """The machine that a verdict holds on: GPU, driver, versions, and the source that was
    checked."""
    properties = torch.cuda.get_device_properties(device)
    return "; ".join(
        (
            f"{properties.name} sm_{properties.major}{properties.minor}",
            f"driver {_driver()}",
            f"torch {torch.__version__}",
            f"cuDNN {_cudnn()}",
            f"Triton {_triton()}",
            f"source {_source():08x}",
        )
    )


def rows() -> List[Row]:
    """The rows of every place; none where the file cannot be read, or belongs to another user."""
    from .kernels import cache

    return cache.own_rows(path(), (*RowKey._fields, "words", "checked"), "verdicts")


def reset() -> None:
    """Read the file again when it is next needed."""
    global _passed
    _passed = None


def _without(rows: List[Row], key: RowKey) -> List[Row]:
    return [row for row in rows if RowKey.of_row(row) != key]


@functools.lru_cache(maxsize=None)
def _driver() -> str:
    number = "unknown" if cuda_driver_version is None else cuda_driver_version()
    return driver.version() or str(number)


def _cudnn() -> Any:
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:  # it is not the version that torch was built for
        return f"unknown ({error})"


def _triton() -> Optional[str]:
    try:
        from triton import __version__
    except Exception:  # a broken installation raises anything
        return None
    return str(__version__)


@functools.lru_cache(maxsize=None)
def _source() -> int:
    """Checksum of this package's version, of its files for attention and biases, and of the tuned
    tile shapes."""
    from .. import __version__
    from .kernels import cache

    total = zlib.crc32(__version__.encode())
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for part in ("attention", "bias"):
        for folder, folders, files in os.walk(os.path.join(root, part)):
            folders.sort()
            for file_name in sorted(files):
                if file_name.endswith(".py"):
                    total = _with_file(total, os.path.join(folder, file_name))
    return _with_file(total, cache.path())


def _with_file(total: int, name: str) -> int:
    with contextlib.suppress(OSError), open(name, "rb") as file:
        total = zlib.crc32(file.read(), total)
    return total


def _change(edit: Callable[[List[Row]], List[Row]]) -> None:
    """Write edit(rows)."""
    from .kernels import cache

    cache.change(path(), lambda: edit(rows())[-MAX_ROWS:], "verdicts")
