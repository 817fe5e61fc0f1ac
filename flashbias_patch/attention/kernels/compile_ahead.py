"""Compiling several kernels at once, in threads, before they are first launched.

Triton compiles a kernel when it is first launched, so the kernels of a call compile one after the
other. Nearly all of that is C++ outside Python's lock, and ptxas. Where Triton has
AsyncCompileMode (3.5 and later), launches are collected instead of made, and their kernels compile
side by side; the launches that follow find them compiled.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import triton

_Mode: Any = getattr(triton, "AsyncCompileMode", None)
SUPPORTED = _Mode is not None and "ignore_errors" in inspect.signature(_Mode).parameters
_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
THREADS = min(8, _CPUS)  # 1: kernels compile when they are launched

# Whether launches are collected, in this thread.
collecting: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "flashbias_patch.collecting", default=False
)


def compile_ahead(run: Callable[[], Any]) -> None:
    """Compile what run() launches in this thread, without launching it: what run() computes is
    undefined. A kernel that does not compile raises when it is launched, not here. Nothing happens
    where Triton cannot compile in threads."""
    if SUPPORTED and THREADS > 1 and not triton.knobs.runtime.interpret:
        # In a context of its own, in which both modes end also after an exception.
        contextvars.copy_context().run(_compile_ahead, run)


def _compile_ahead(run: Callable[[], Any]) -> None:
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, "flashbias-compile"))
        try:
            stack.enter_context(_Mode(pool, ignore_errors=True))
        except RuntimeError:  # the caller has opened such a mode
            return
        collecting.set(True)
        run()
