"""Handing context on to threads: nn.DataParallel runs its replicas in threads, which start with empty context variables.

While a block of `handing_on` is open, threading.Thread.start and ThreadPoolExecutor.submit wrap what the new thread, or
the task, runs. Code that calls neither of them inside the block is not affected.
"""
from __future__ import annotations

import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterator, Optional

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]  # returns the function itself where there is nothing to hand on

_lock = threading.Lock()
_depth = 0
_thread_start, _pool_submit = threading.Thread.start, ThreadPoolExecutor.submit
_wrap_run: Optional[Wrap] = None
_wrap_task: Optional[Wrap] = None


@contextlib.contextmanager
def handing_on(wrap_run: Wrap, wrap_task: Wrap) -> Iterator[None]:
    """Wrap the `run` of every thread started, and every function submitted to a pool, in this block (of any thread:
    the wraps look at the context that calls them)."""
    global _depth, _thread_start, _pool_submit, _wrap_run, _wrap_task
    with _lock:
        _depth += 1
        if _depth == 1:
            _wrap_run, _wrap_task = wrap_run, wrap_task
            if threading.Thread.start is not _start:  # else somebody put it back
                _thread_start, threading.Thread.start = threading.Thread.start, _start  # type: ignore[method-assign]
            if ThreadPoolExecutor.submit is not _submit:
                _pool_submit = ThreadPoolExecutor.submit
                ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:  # what somebody else has wrapped meanwhile stays
                if threading.Thread.start is _start:
                    threading.Thread.start = _thread_start  # type: ignore[method-assign]
                if ThreadPoolExecutor.submit is _submit:
                    ThreadPoolExecutor.submit = _pool_submit  # type: ignore[method-assign]


@functools.wraps(threading.Thread.start)
def _start(self: threading.Thread) -> None:
    run = self.run
    wrapped = run if _wrap_run is None else _wrap_run(run)
    if wrapped is not run:
        self.run = functools.partial(_run_once, self, wrapped)  # type: ignore[method-assign]
    return _thread_start(self)


def _run_once(thread: threading.Thread, run: Callable[[], Any]) -> None:
    del thread.run  # the thread must not hold itself
    run()


@functools.wraps(ThreadPoolExecutor.submit)
def _submit(self: Any, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    return _pool_submit(self, fn if _wrap_task is None else _wrap_task(fn), *args, **kwargs)
