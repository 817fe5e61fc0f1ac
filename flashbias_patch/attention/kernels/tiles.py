"""The tile shape of each kernel: a shipped table, shapes tuned on request, and smaller ones for a
GPU with less room."""

from __future__ import annotations

import contextlib
import logging
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

from triton.runtime.errors import OutOfResources

from . import cache
from .compile_ahead import collecting

log = logging.getLogger("flashbias_patch")
Result = TypeVar("Result")

KERNELS = (
    "forward",
    "keys",
    "queries",
)  # with windows: "window " and, where they are a mask, "mask " before these


class Config(NamedTuple):
    """A tile of block_m queries by block_n keys, and how it is compiled.

    registers: the most that a thread may use, so that more programs run at once (0: the compiler
    decides).
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int = 0


class Key(NamedTuple):
    """The properties that decide a tile shape. `arch` is 10 * major + minor; block_d and block_r
    are powers of two (0: no factors)."""

    kernel: str
    arch: int
    half: bool
    block_d: int
    block_r: int
    plain: bool  # no mask, dense bias, padding or dropout: nothing but factors or segments
    segments: bool = False
    pairs: bool = False  # a mask or dense bias, a value for each query and key


# (kernel, arch, half) -> rows of (largest block_d, largest block_r, Config), first that fits. Arch
# 90 measured on an H200 (docs/experiments.md); the others follow its shapes within their shared
# memory and are not measured.
TABLE: Dict[Tuple[str, int, bool], List[Tuple[int, int, Config]]] = {
    ("forward", 90, True): [
        (32, 0, Config(64, 128, 4, 3, registers=168)),
        (32, 64, Config(128, 64, 4, 3)),
        (128, 64, Config(64, 64, 4, 3)),
    ],
    ("keys", 90, True): [
        (32, 0, Config(64, 64, 4, 3, registers=144)),
        (32, 16, Config(64, 64, 4, 4)),
        (32, 64, Config(128, 64, 4, 3)),
        (64, 64, Config(64, 64, 4, 3)),
        (128, 64, Config(64, 64, 4, 2)),
    ],
    ("queries", 90, True): [
        (32, 16, Config(64, 64, 4, 3, registers=120)),
        (128, 64, Config(64, 64, 4, 3)),
    ],
    # Eight warps and tf32x3 end in an illegal access on Triton 3.6: four only.
    ("forward", 90, False): [(32, 64, Config(64, 32, 4, 3)), (128, 64, Config(64, 32, 4, 2))],
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
# A tile of keys is one patch of 64, or two in the forward and queries kernels of a bias.
WINDOWS: Dict[Tuple[str, int, bool], List[Tuple[int, int, Config]]] = {
    ("window forward", 90, True): [
        (32, 0, Config(64, 128, 4, 3, registers=168)),
        (128, 64, Config(64, 64, 4, 3)),
    ],
    ("window keys", 90, True): [
        (
            32,
            0,
            Config(64, 64, 4, 3, registers=152),
        ),  # one program beside three of the queries kernel
        (32, 16, Config(64, 64, 4, 3, registers=168)),
        (64, 64, Config(64, 64, 4, 3)),
        (128, 64, Config(64, 64, 4, 2)),
    ],
    ("window queries", 90, True): [
        (32, 16, Config(64, 64, 4, 3, registers=120)),
        (128, 64, Config(64, 64, 4, 3)),
    ],
    ("mask forward", 90, True): [(32, 16, Config(16, 64, 1, 3)), (128, 64, Config(32, 64, 4, 3))],
    ("mask keys", 90, True): [(32, 16, Config(16, 64, 4, 3)), (128, 64, Config(32, 64, 4, 2))],
    ("mask queries", 90, True): [(32, 16, Config(16, 64, 1, 3)), (128, 64, Config(32, 64, 4, 3))],
}
WINDOWS.update(
    {
        ("window forward", 90, False): [(32, 0, Config(128, 64, 4, 1))],
        ("window keys", 90, False): [(32, 0, Config(64, 64, 4, 1))],
        ("window queries", 90, False): [(32, 0, Config(64, 64, 4, 1))],
    }
)
for _kind in ("window", "mask"):
    for _kernel in KERNELS:
        for _arch in (90, 80):
            _place = f"{_kind} {_kernel}", _arch, True
            WINDOWS.setdefault(
                _place, [(64, 64, Config(64, 64, 4, 2)), (128, 64, Config(32, 64, 4, 2))]
            )
            WINDOWS.setdefault((f"{_kind} {_kernel}", _arch, False), []).extend(
                [
                    (64, 64, Config(64 if _kernel == "forward" else 32, 64, 4, 1)),
                    (128, 64, Config(16, 64, 4, 1)),
                ]
            )
SMALLER_WINDOWS = [Config(32, 64, 4, 2), Config(32, 64, 4, 1), Config(16, 64, 4, 1)]
# Searched before TABLE: PAIRS if there is a mask or dense bias, then BUSY if there is one of these,
# padding or dropout.
PAIRS: Dict[Tuple[str, int, bool], List[Tuple[int, int, Config]]] = {
    ("forward", 90, True): [(32, 16, Config(64, 64, 4, 3))],
    ("keys", 90, True): [(32, 16, Config(64, 64, 4, 3, registers=168))],
    ("queries", 90, True): [(32, 16, Config(64, 64, 4, 3, registers=168))],
    ("queries", 90, False): [(32, 0, Config(64, 32, 4, 1))],
}
BUSY: Dict[Tuple[str, int, bool], List[Tuple[int, int, Config]]] = {
    ("forward", 90, True): [(32, 16, Config(64, 128, 4, 3, registers=168))],
    ("keys", 90, True): [
        (32, 0, Config(32, 64, 4, 4, registers=112)),
        (32, 16, Config(64, 64, 4, 3, registers=168)),
    ],
    ("queries", 90, True): [
        (32, 0, Config(64, 64, 4, 3, registers=120)),
        (32, 16, Config(64, 64, 4, 3, registers=168)),
    ],
}
# Tried last, if nothing else fits into a GPU's shared memory or registers.
SMALLER = [Config(32, 32, 4, 2), Config(32, 32, 4, 1), Config(16, 16, 4, 1)]
# The interpreter has no inline assembly and no use for large tiles.
INTERPRETED = Config(32, 64, 4, 1)

# Incremented whenever the results of candidates() may change: results derived from earlier ones are
# then out of date.
generation = 0

_forced: Dict[Key, Config] = {}
_tuned: Dict[Key, Config] = {}
_working: Dict[Key, Config] = {}
_loaded = False


def _changed() -> None:
    global generation
    generation += 1


def shipped(key: Key) -> List[Config]:
    """The configurations to try for `key`, best first, without tuned ones."""
    if key.arch == 0:
        return [INTERPRETED]
    arch = 90 if key.arch >= 90 else 80
    place = key.kernel, arch, key.half
    pairs = PAIRS.get(place, []) if key.pairs else []
    busy = [] if key.plain else BUSY.get(place, [])
    smaller = SMALLER_WINDOWS if place in WINDOWS else SMALLER
    for block_d, block_r, config in (*pairs, *busy, *(WINDOWS.get(place) or TABLE[place])):
        if key.block_d <= block_d and key.block_r <= block_r:
            return [config, *smaller]
    return list(smaller)


def candidates(key: Key) -> List[Config]:
    """The configurations to try for `key`, best first."""
    if _forced and key in _forced:
        return [_forced[key]]
    if key.arch == 0:
        return [INTERPRETED]
    _load()
    if key in _working:
        return [_working[key]]
    return ([_tuned[key]] if key in _tuned else []) + shipped(key)


def first_working(key: Key, launch: Callable[[Config], Result]) -> Result:
    """launch(config) with the first candidate that the GPU has room for; later calls try that one
    only."""
    refusal: Optional[BaseException] = None
    for place, config in enumerate(candidates(key)):
        try:
            result = launch(config)
        except OutOfResources as error:
            refusal = error
            continue
        if key not in _forced and not collecting.get():
            _working[key] = config
            if place:
                _changed()
        return result
    raise RuntimeError(f"no tile shape fits this GPU for {key}: {refusal}")


@contextlib.contextmanager
def forced(key: Key, config: Config) -> Iterator[None]:
    """Make `config` the only candidate for `key`, in every thread of this process."""
    before = _forced.get(key)
    _forced[key] = config
    _changed()
    try:
        yield
    finally:
        if before is None:
            del _forced[key]
        else:
            _forced[key] = before
        _changed()


def _load() -> None:
    """Read the shapes that earlier runs tuned. A cache that cannot be read is ignored."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    try:
        found = cache.entries()
    except FileNotFoundError:
        return
    except Exception as error:
        log.debug("tuning cache %s not used: %s", cache.path(), error)
        return
    for key, config in found:
        try:
            _tuned[Key(*key)] = _sensible(Config(*config))
        except (TypeError, ValueError) as error:
            log.debug("tuning cache %s not used: %s", cache.path(), error)


def _sensible(config: Config) -> Config:
    """`config`; ValueError if a number is damaged. In the compiler it would fail, and the whole
    backend would be out."""
    powers = config.block_m, config.block_n, config.warps
    good = all(type(number) is int for number in config) and all(
        n > 0 and not n & n - 1 for n in powers
    )
    sizes = (
        min(config.block_m, config.block_n) >= 16
        and max(powers) <= 256
        and config.warps <= 16
        and 1 <= config.stages <= 8
    )
    if (
        not good
        or not sizes
        or not 0 <= config.registers <= 255
        or config.block_m * config.block_n * config.stages > 1 << 17
    ):
        raise ValueError(config)
    return config


def remember(found: Dict[Key, Config]) -> None:
    """Use `found` from now on, and add it to the disk cache."""
    _load()
    _tuned.update(found)
    for key in found:
        _working.pop(key, None)
    _changed()
    try:
        cache.merge(list(found.items()))
    except OSError as error:
        log.debug("tuning cache %s not written: %s", cache.path(), error)


def forget(keys: Optional[Sequence[Key]] = None) -> bool:
    """Return to TABLE, here and on disk, for `keys` or (None) for all keys of every GPU.

    Returns False if there was no disk cache; OSError if it cannot be changed.
    """
    _load()
    for key in list(_tuned) if keys is None else keys:
        _tuned.pop(key, None)
        _working.pop(key, None)
    _changed()
    return cache.forget(keys)
