"""Triton's key of its own installation, on disk: a process does not compute it again while the
installation's files are the same.

The key is part of the name of every kernel in Triton's cache. Each process computes it when it
first needs a kernel, by hashing the whole library (half a gigabyte) and its sources: 0.4 to 0.7 s,
most of what the first call costs where its kernels are cached. `prepare` gives Triton the key from
`triton_keys.json`, beside the tuning cache, under two conditions:

- every .py and library file of the installation has the size, the time of change and the time of
  modification that it had when the key was computed;
- the code of Triton's function names nothing but what it has in Triton 3.0, 3.2, 3.8 and 3.9,
  where it reads these files alone.

Otherwise Triton computes the key, and it is stored. FLASHBIAS_VERDICTS=off neither reads nor writes
the file.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import threading
from types import CodeType
from typing import Any, Callable, Iterator, List, Optional, Tuple

import triton

from ... import settings
from . import cache

log = logging.getLogger("flashbias_patch")
WHAT = "Triton's keys"  # in the log
MAX_ROWS = 20  # the newest; machines that share a home directory have their own
FILES = (".py", ".pyc", ".so", ".pyd", ".dll")
# Global names, attributes and texts in the code of triton_key, Triton 3.0, 3.2, 3.8 and 3.9.
# fmt: off
NAMES = frozenset((
    "pkgutil", "os", "path", "dirname", "abspath", "join", "__file__", "open", "hashlib", "sha256",
    "read", "hexdigest", "walk_packages", "iter_modules", "module_finder", "find_spec", "name",
    "origin", "append", "update", "sysconfig", "get_config_var", "split", "__version__",
))
TEXTS = frozenset((
    "rb", "compiler", "triton.compiler.", "backends", "triton.backends.", "language",
    "triton.language.", "_C", "_C/libtriton.so", "libtriton.", "EXT_SUFFIX", ".", "", "-",
))
# fmt: on
# Only launches take it, and a process that was forked from one with CUDA cannot launch.
_lock = threading.Lock()
_done = False


def prepare() -> None:
    """Before a kernel is compiled or found in Triton's cache: provide the key, once per process.
    Threads that need it meanwhile wait."""
    global _done
    if _done:
        return
    with _lock:
        if not _done and settings.current().verdicts:
            _prepare()
        _done = True


def _prepare() -> None:
    """Replace Triton's function by one that returns the stored key, or store what it returns."""
    modules = _modules()
    function: Any = modules[0].triton_key if modules else None
    if not _is_known(function) or function.cache_info().currsize:
        return
    files = _files()
    if files is None:
        return
    key = next((row["key"] for row in rows() if row["files"] == files and row["key"]), None)
    if key is None:
        key = function()
        if _files() == files:  # not replaced meanwhile
            _store({"files": files, "key": key})
    else:
        stored = _returning(key, function)
        for module in modules:
            if module.triton_key is function:
                module.triton_key = stored


def _modules() -> List[Any]:
    """Triton's modules in which triton_key is looked up; the first has it since it moved there."""
    names = ("triton.runtime.cache", "triton.compiler.compiler")
    modules = [sys.modules.get(name) for name in names]
    return [module for module in modules if hasattr(module, "triton_key")]


def _is_known(function: Any) -> bool:
    """True if it is Triton's function, not a replacement, and reads what is known to be read."""
    code = getattr(getattr(function, "__wrapped__", None), "__code__", None)
    if code is None or not hasattr(function, "cache_info"):
        return False
    for part in _codes(code):
        texts = {constant for constant in part.co_consts if isinstance(constant, str)}
        if not NAMES.issuperset(part.co_names) or not TEXTS.issuperset(texts):
            return False
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _files() -> Optional[str]:
    """Digest of the names, sizes and times of the installation's files; None if it cannot be told,
    or if directories are links, as in a development tree of Triton."""
    root = os.path.dirname(os.path.abspath(triton.__file__))
    try:
        found = sorted(_states(root))
    except OSError as error:
        log.debug("Triton's key not stored: %s", error)
        return None
    if any(state is None for _, state in found):
        return None
    return hashlib.sha256(repr((root, found)).encode()).hexdigest()


def _states(folder: str) -> Iterator[Tuple[str, Any]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if entry.is_symlink():
                    yield entry.path, None
                elif entry.name != "__pycache__":
                    yield from _states(entry.path)
            elif entry.name.endswith(FILES):
                state = os.stat(entry.path)  # that of a link's target
                yield entry.path, (state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _returning(key: str, function: Any) -> Callable[[], str]:
    @functools.lru_cache(maxsize=None)
    @functools.wraps(function.__wrapped__)
    def triton_key() -> str:
        return key

    return triton_key


def path() -> str:
    return os.path.join(cache.directory(), "triton_keys.json")


def rows() -> List[cache.Row]:
    """The keys on disk, each with the digest of the installation's files."""
    return cache.own_rows(path(), ("files", "key"), WHAT)


def _store(row: cache.Row) -> None:
    def edit() -> List[cache.Row]:
        others = [other for other in rows() if other["files"] != row["files"]]
        return [*others, row][-MAX_ROWS:]

    cache.change(path(), edit, WHAT)
