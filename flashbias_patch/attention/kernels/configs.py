"""Which tile shape each kernel uses: a shipped table, what was tuned on request, and what to try when one won't fit."""
from __future__ import annotations

import json
import logging
import os
import tempfile
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from triton.runtime.errors import OutOfResources

log = logging.getLogger("flashbias_patch")

KERNELS = ("forward", "keys", "queries")


class Config(NamedTuple):
    """A tile of block_m queries by block_n keys; exp: see common.exp2; splits: 0 lets the launcher choose.

    registers: what a thread may use at most, so that more programs run side by side (0: the compiler's choice).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    exp: int = 0
    splits: int = 0
    registers: int = 0


class Key(NamedTuple):
    """What a choice depends on. `arch` is 10 * major + minor; block_d and block_r are powers of two (0: no factors)."""

    kernel: str
    arch: int
    half: bool
    block_d: int
    block_r: int
    plain: bool  # no mask, dense bias, padding or dropout: nothing but factors or segments


# (kernel, arch, half) -> rows of (largest block_d, largest block_r, Config), first that fits. Arch 90 measured on an
# H200 (docs/kernel-notes.md); the others follow its shapes within their shared memory and are not measured.
TABLE: Dict[Tuple[str, int, bool], List[Tuple[int, int, Config]]] = {
    ("forward", 90, True): [
        (32, 0, Config(64, 128, 4, 3, registers=168)),
        (32, 64, Config(128, 64, 4, 3)),
        (128, 64, Config(64, 64, 4, 3)),
    ],
    ("keys", 90, True): [
        (32, 0, Config(64, 128, 4, 3)),
        (32, 16, Config(64, 64, 4, 3)),
        (32, 64, Config(128, 64, 4, 3)),
        (64, 64, Config(64, 64, 4, 3, registers=168)),
        (128, 64, Config(64, 64, 4, 2)),
    ],
    ("queries", 90, True): [
        (32, 0, Config(64, 64, 4, 4, registers=128)),
        (32, 16, Config(64, 64, 4, 3, registers=128)),
        (128, 64, Config(64, 64, 4, 3)),
    ],
    # Eight warps and tf32x3 end in an illegal access on Triton 3.6: four only.
    ("forward", 90, False): [
        (32, 0, Config(64, 32, 4, 2)),
        (32, 64, Config(64, 32, 4, 3)),
        (128, 64, Config(64, 32, 4, 2)),
    ],
    ("keys", 90, False): [
        (32, 16, Config(32, 128, 4, 1)),
        (32, 64, Config(32, 64, 4, 1)),
        (64, 64, Config(32, 32, 4, 2)),
        (128, 64, Config(32, 32, 4, 1)),
    ],
    ("queries", 90, False): [
        (32, 64, Config(64, 64, 4, 1)),
        (64, 64, Config(32, 32, 4, 2)),
        (128, 64, Config(32, 32, 4, 1)),
    ],
    ("forward", 80, True): [(64, 64, Config(64, 64, 4, 3)), (128, 64, Config(64, 64, 4, 2))],
    ("keys", 80, True): [(64, 64, Config(64, 64, 4, 2)), (128, 64, Config(32, 64, 4, 2))],
    ("queries", 80, True): [(64, 64, Config(64, 64, 4, 2)), (128, 64, Config(64, 32, 4, 2))],
    ("forward", 80, False): [(64, 64, Config(64, 32, 4, 2)), (128, 64, Config(32, 32, 4, 2))],
    ("keys", 80, False): [(64, 64, Config(32, 32, 4, 2)), (128, 64, Config(16, 32, 4, 1))],
    ("queries", 80, False): [(64, 64, Config(32, 32, 4, 2)), (128, 64, Config(32, 16, 4, 1))],
}
# The same where there is a mask, a dense bias, padding or dropout, before TABLE.
BUSY: Dict[Tuple[str, int, bool], List[Tuple[int, int, Config]]] = {
    ("forward", 90, True): [(32, 16, Config(64, 128, 4, 3, registers=168))],
    ("keys", 90, True): [(32, 16, Config(64, 64, 4, 3, registers=168))],
    ("queries", 90, True): [(32, 16, Config(64, 64, 4, 3, registers=168))],
    ("queries", 90, False): [(32, 0, Config(64, 32, 4, 1))],
}
# What remains when nothing else fits into a GPU's shared memory or registers.
SMALLER = [Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
# The interpreter has no inline assembly and no use for large tiles.
INTERPRETED = Config(32, 64, 4, 1)

_tuned: Dict[Key, Config] = {}
_working: Dict[Key, Config] = {}
_loaded = False
generation = 0  # counts the changes of what candidates() answers, for whoever keeps launches


def candidates(key: Key) -> List[Config]:
    """The configurations to try for `key`, best first."""
    if key.arch == 0:
        return [INTERPRETED]
    _load()
    if key in _working:
        return [_working[key]]
    arch = 90 if key.arch >= 90 else 80
    found = [_tuned[key]] if key in _tuned else []
    place = key.kernel, arch, key.half
    for block_d, block_r, config in ([] if key.plain else BUSY.get(place, [])) + TABLE[place]:
        if key.block_d <= block_d and key.block_r <= block_r:
            found.append(config if key.plain or config.exp < 2 else config._replace(exp=1))
            break
    return found + SMALLER


def first_working(key: Key, launch: Callable[[Config], Any]) -> Any:
    """launch(config) with the first candidate that the GPU has room for; later calls go straight to it."""
    refusal: Optional[BaseException] = None
    for config in candidates(key):
        try:
            result = launch(config)
        except OutOfResources as error:
            refusal = error
            continue
        _working[key] = config
        return result
    raise RuntimeError(f"no tile shape fits this GPU for {key}: {refusal}")


def _cache_path() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "flashbias_patch", "tuned.json")


def _load() -> None:
    """Read what earlier runs tuned. A cache that cannot be read is as good as none."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    try:
        with open(_cache_path(), encoding="utf-8") as file:
            for row in json.load(file):
                _tuned.setdefault(Key(*row[0]), Config(*[int(number) for number in row[1]]))
    except FileNotFoundError:
        pass
    except Exception as error:
        log.debug("tuning cache %s not used: %s", _cache_path(), error)


def remember(found: Dict[Key, Config]) -> None:
    """Use `found` from now on, and write it (with what was there) to the disk cache, atomically."""
    global generation
    _load()
    _tuned.update(found)
    generation += 1
    for key in found:
        _working.pop(key, None)
    path = _cache_path()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump([[list(key), list(config)] for key, config in _tuned.items()], file)
        os.replace(temporary, path)
    except OSError as error:
        log.debug("tuning cache %s not written: %s", path, error)
