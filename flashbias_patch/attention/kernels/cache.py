"""The disk cache of tuned tile shapes: one JSON file, shared by processes, GPUs and versions.

A list of rows {"gpu", "triton", "flashbias_patch", "key", "config"}. The first three are what a
measurement depends on beside its key; rows of other machines' GPUs or other versions are kept and
not used. Anything else in the file, also the rows without these names that earlier versions wrote,
is dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("flashbias_patch")
NAMES = ("gpu", "triton", "flashbias_patch")
PATIENCE = 5.0  # seconds to wait for another process that writes
Row = Dict[str, Any]
Entry = Tuple[Sequence[Any], Sequence[Any]]  # a key and a config, as plain sequences


def directory() -> str:
    """Of the file; where no home is known, a path below no directory, at which nothing can be
    written."""
    home = os.environ.get("XDG_CACHE_HOME")
    if not home:
        user = os.path.expanduser(
            "~"
        )  # "~" itself for a user whom the system does not know, as in some containers
        home = os.devnull if user == "~" else os.path.join(user, ".cache")
    return os.path.join(home, "flashbias_patch")


def path() -> str:
    return os.path.join(directory(), "tuned.json")


def here() -> Tuple[str, str, str]:
    """This process's values of NAMES. Of several GPUs it is the current one's: a rank has one."""
    import torch
    import triton

    from ..._version import __version__

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return gpu, triton.__version__, __version__


def entries() -> List[Entry]:
    """The entries tuned on this GPU by these versions. ValueError or OSError if the file cannot be
    read."""
    place = here()
    return [(row["key"], row["config"]) for row in rows() if _place(row) == place]


def merge(found: Sequence[Entry]) -> None:
    """Add `found` to the file, over older rows of the same keys; what other processes wrote
    meanwhile stays."""
    place = here()
    new = [
        {**dict(zip(NAMES, place)), "key": list(key), "config": list(config)}
        for key, config in found
    ]
    os.makedirs(directory(), exist_ok=True)
    with _alone():
        write(
            path(), list({(_place(row), tuple(row["key"])): row for row in _known() + new}.values())
        )


def forget(keys: Optional[Sequence[Sequence[Any]]] = None) -> bool:
    """Remove the rows of `keys` that are in use here, or (None) the whole file; False if there is
    no file."""
    if not os.path.exists(path()):
        return False
    place = here() if keys else None
    gone = [list(key) for key in keys or ()]
    with _alone():
        if keys is None:
            os.unlink(path())
        else:
            write(
                path(), [row for row in _known() if _place(row) != place or row["key"] not in gone]
            )
    return True


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Under the file's lock, where there are locks: without, at worst another process's latest rows
    are lost."""
    with contextlib.ExitStack() as stack:
        try:
            if not stack.enter_context(locked(path() + ".lock", PATIENCE)):
                log.debug(
                    "tuning cache %s is held by another process; written without its lock", path()
                )
        except OSError as error:
            log.debug("tuning cache %s cannot be locked: %s", path(), error)
        yield


def _known() -> List[Row]:
    try:
        return rows()
    except (OSError, ValueError):
        return []


def _place(row: Row) -> Tuple[Any, ...]:
    return tuple(row[name] for name in NAMES)


def rows() -> List[Row]:
    """The file as it is. OSError or ValueError where it cannot be read."""
    with open(path(), encoding="utf-8") as file:
        found = json.load(file)
    return [row for row in found if _whole(row)] if isinstance(found, list) else []


def own_rows(name: str, texts: Sequence[str], what: str) -> List[Row]:
    """The rows of the file `name` of the directory that hold all `texts`; none where it cannot be
    read, or belongs to another user. what: its name in the log."""
    try:
        with open(name, encoding="utf-8") as file:
            owner = os.fstat(file.fileno()).st_uid
            if hasattr(os, "getuid") and owner not in (os.getuid(), 0):
                raise OSError("it belongs to another user")
            content = json.load(file)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        log.debug("%s %s not used: %s", what, name, error)
        return []
    found = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []
    return [row for row in found if all(isinstance(row.get(text), str) for text in texts)]


def change(name: str, edit: Callable[[], List[Row]], what: str) -> None:
    """Write the rows that edit() makes of those of the file `name`, all or nothing, under a lock;
    readers take none."""
    try:
        os.makedirs(directory(), exist_ok=True)
        with locked(name + ".lock", PATIENCE):
            write(name, edit())
    except OSError as error:
        log.debug("%s %s not written: %s", what, name, error)


def _whole(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in NAMES):
        return False
    flat = (list, tuple)
    values = (row.get("key"), row.get("config"))
    return all(isinstance(v, flat) and all(isinstance(x, (str, int)) for x in v) for v in values)


def write(name: str, whole: List[Row]) -> None:
    """Rows into the file `name` of the directory, all or nothing: readers take no lock."""
    handle, temporary = tempfile.mkstemp(dir=directory())
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("[\n" + ",\n".join(json.dumps(row) for row in whole) + "\n]\n")
        os.replace(temporary, name)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(name: str, seconds: float) -> Iterator[bool]:
    """Yield True if this process holds the lock file `name`, after waiting for at most `seconds`;
    OSError if the file cannot be locked."""
    handle = _acquire(name, time.monotonic() + seconds)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                os.unlink(name)
            os.close(handle)


def _acquire(name: str, until: float) -> Optional[int]:
    if fcntl is None:
        raise OSError("this platform has no fcntl")
    while True:
        handle = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A holder removes the file as it leaves: what was locked may be the removed one.
            if os.stat(name).st_ino == os.fstat(handle).st_ino:
                return handle
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() >= until:
            return None
        time.sleep(0.005)
