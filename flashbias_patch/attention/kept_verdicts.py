"""Verdicts of self-checks on disk: what this machine has proved is not checked again in the next
process.

One JSON file, `verdicts.json` beside the tuning cache: rows of a place (GPU, driver, versions, the
source of the kernels
and backends), a class of call, a backend, and the evidence: when it was checked, on which problems,
and the largest error as a share of what is tolerated. Only backends that were right are kept, and
only classes on a GPU: elsewhere a check takes milliseconds. A backend that fails later is removed.
A file that is damaged, or another user's, counts as empty. FLASHBIAS_VERDICTS=off neither reads nor
writes it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
import zlib
from typing import Any, Dict, List, Optional, Set, Tuple

import torch

from .. import settings
from .signature import Key, describe

log = logging.getLogger("flashbias_patch")
NAMES = (
    "triton",
    "sdpa",
)  # backends whose source, and whose libraries' versions, are part of a place
ROOM = 500  # rows, the newest
Row = Dict[str, Any]
_known: Optional[Set[Tuple[str, str, str]]] = (
    None  # (place, class, backend), once the file was read
)


def path() -> str:
    from .kernels import cache

    return os.path.join(cache.directory(), "verdicts.json")


def wanted(backend: Any, key: Key, name: str) -> bool:
    """Whether verdicts of that class and backend are kept; not those of an object that stands in
    for a backend."""
    ours = type(backend).__module__.startswith(f"{__package__}.backends.")
    return key[0].type == "cuda" and name in NAMES and ours and bool(settings.current().verdicts)


def holds(key: Key, name: str) -> bool:
    """Whether an earlier process of this place found the backend right for the class."""
    global _known
    if _known is None:
        _known = {(row["place"], row["class"], row["backend"]) for row in rows()}
    return (here(key[0]), _name(key), name) in _known


def keep(key: Key, name: str, evidence: Dict[str, Any]) -> None:
    """Add a verdict; a file that cannot be written costs the next process a check."""
    place = here(key[0])
    if _known is not None:
        _known.add((place, _name(key), name))
    row = {
        "place": place, "class": _name(key), "backend": name, "words": describe(key),
        "checked": time.strftime("%Y-%m-%d %H:%M:%S"), **evidence,
    }  # fmt: skip
    _change(lambda found: [each for each in found if not _is_same(each, row)] + [row])


def forget(key: Key, name: str) -> None:
    """Remove the verdict on a backend that failed since; nothing happens where there is none."""
    if not _known:
        return
    found = here(key[0]), _name(key), name
    if found not in _known:
        return
    _known.discard(found)
    gone = dict(zip(("place", "class", "backend"), found))
    _change(lambda found: [each for each in found if not _is_same(each, gone)])


def here(device: torch.device) -> str:
    """What a verdict depends on beside its class: GPU, driver, versions, and the source that was
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
    try:
        with open(path(), encoding="utf-8") as file:
            owner = os.fstat(file.fileno()).st_uid
            if hasattr(os, "getuid") and owner not in (os.getuid(), 0):
                raise OSError("it belongs to another user")
            found = json.load(file)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        log.debug("verdicts %s not used: %s", path(), error)
        return []
    texts = ("place", "class", "backend", "words", "checked")
    whole = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    return [row for row in whole if all(isinstance(row.get(name), str) for name in texts)]


def reset() -> None:
    """Read the file again when it is next needed."""
    global _known
    _known = None


def _is_same(one: Row, other: Row) -> bool:
    return all(one[name] == other[name] for name in ("place", "class", "backend"))


def _name(key: Key) -> str:
    """The class as text; which of several equal GPUs it is on does not matter."""
    return repr((key[0].type, *key[1:]))


@functools.lru_cache(maxsize=None)
def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            return " ".join(file.readline().split()[:8])
    except OSError:
        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")())


def _cudnn() -> Any:
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:  # another one is found than torch was built for
        return f"unknown ({error})"


def _triton() -> Optional[str]:
    try:
        from triton import __version__
    except Exception:  # a broken installation raises anything
        return None
    return str(__version__)


@functools.lru_cache(maxsize=None)
def _source() -> int:
    """A checksum of this package's version, of its files for attention and biases, and of the tuned
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


def _change(edit: Any) -> None:
    """Write edit(rows), all or nothing, under a lock; readers take none."""
    from .kernels import cache

    try:
        os.makedirs(cache.directory(), exist_ok=True)
        with cache.locked(path() + ".lock", cache.PATIENCE):
            cache.write(path(), edit(rows())[-ROOM:])
    except OSError as error:
        log.debug("verdicts %s not written: %s", path(), error)
