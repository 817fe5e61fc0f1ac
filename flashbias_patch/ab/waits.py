"""Measure the time that a step waits for its data: the time in `next()` of torch's data loaders.

Every loop over a torch.utils.data.DataLoader, and a `next(iterator)` as OpenMMLab's IterLoader
makes it, goes through `_BaseDataLoaderIter.__next__`; starting the workers goes through
`DataLoader.__iter__`. Both are wrapped. Only waits of the thread that trains count: a loader that
another thread drains ahead of time costs the step nothing there.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Dict

from . import capture

MODULE = "torch.utils.data.dataloader"


class Waits:
    """Seconds that each thread spent in data loaders since it last took them, by loader."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.by_thread: Dict[int, Dict[str, float]] = {}
        self.names: Dict[int, str] = {}
        self.inside = threading.local()

    def take(self) -> Dict[str, float]:
        """Return this thread's waits, {loader: seconds}; those of other threads are dropped."""
        found, self.by_thread = self.by_thread, {}
        return found.get(threading.get_ident(), {})

    def timed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`original(loader or its iterator, ...)`, timed. A loader inside another one's call is
        part of that call."""

        def waited(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self.inside, "yes", False):
                return original(owner, *args, **kwargs)
            self.inside.yes, begin = True, time.perf_counter()
            try:
                return original(owner, *args, **kwargs)
            finally:
                self.inside.yes = False
                self._add(owner, time.perf_counter() - begin)

        return waited

    def _add(self, owner: Any, seconds: float) -> None:
        data = getattr(owner, "_dataset", None)  # of an iterator
        data = getattr(owner, "dataset", None) if data is None else data
        name = self.names.get(id(data))
        if name is None:  # loaders of one class are told apart by the order of their first use
            kind = type(data).__name__
            alike = sum(each.split(" ")[0] == kind for each in self.names.values())
            name = self.names[id(data)] = kind + (f" {alike + 1}" if alike else "")
        mine = self.by_thread.setdefault(threading.get_ident(), {})
        mine[name] = mine.get(name, 0.0) + seconds


def listen(waits: Waits) -> None:
    """Wrap torch's data loaders, now or once they are imported."""
    import wrapt

    def arrived(module: Any) -> None:
        iterator = getattr(module, "_BaseDataLoaderIter", None)
        capture._wrap(iterator, "__next__", waits.timed)
        capture._wrap(getattr(module, "DataLoader", None), "__iter__", waits.timed)

    wrapt.register_post_import_hook(arrived, MODULE)
