"""Pass context variables to threads: nn.DataParallel runs its replicas in threads, which start
with empty ones.

While a block of `handing_on` is open, threading.Thread.start and ThreadPoolExecutor.submit wrap
what the new thread, or the task, runs. Code that calls neither of them inside the block is not
affected.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, Tuple

Wrap = Callable[
    [Callable[..., Any]], Callable[..., Any]
]  # returns the function itself where there is nothing to pass on

_lock = threading.Lock()
_depth = 0
_put_back: List[Callable[[], None]] = []
_wrappers: Dict[Tuple[Any, Wrap], Any] = {}  # (original, wrap) -> wrapper


@contextlib.contextmanager
def handing_on(wrap_run: Wrap, wrap_task: Wrap) -> Iterator[None]:
    """Wrap the `run` of every thread started, and every function submitted to a pool, in this block
    (by any thread: the wraps look at the context that calls them)."""
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _put_back[:] = [
                _replace(threading.Thread, "start", _start_with, wrap_run),
                _replace(ThreadPoolExecutor, "submit", _submit_with, wrap_task),
            ]
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for put_back in _put_back:
                    put_back()


def _replace(
    owner: Any, name: str, make: Callable[[Any, Wrap], Any], wrap: Wrap
) -> Callable[[], None]:
    """Replace a method; return a function that undoes it unless other code replaced it since."""
    original = getattr(owner, name)
    wrapper = _wrappers.get((original, wrap))
    if wrapper is None:
        if len(_wrappers) > 16:  # other code wraps these methods again and again
            _wrappers.clear()
        wrapper = _wrappers[original, wrap] = functools.wraps(original)(make(original, wrap))
    setattr(owner, name, wrapper)

    def put_back() -> None:
        if getattr(owner, name) is wrapper:
            setattr(owner, name, original)

    return put_back


def _start_with(original: Any, wrap: Wrap) -> Any:
    def start(self: threading.Thread) -> None:
        run = self.run
        wrapped = wrap(run)
        if wrapped is not run:
            self.run = functools.partial(_run_once, self, wrapped)  # type: ignore[method-assign]
        original(self)

    return start


def _run_once(thread: threading.Thread, run: Callable[[], Any]) -> None:
    thread.__dict__.pop("run", None)  # the thread must not hold itself
    run()


def _submit_with(original: Any, wrap: Wrap) -> Any:
    def submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return original(self, wrap(fn), *args, **kwargs)

    return submit
