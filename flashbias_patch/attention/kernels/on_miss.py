"""FLASHBIAS_TUNE: tile shapes are timed when a class of call comes that the shipped table was not
measured for.

Once per class and machine. The ranks of a node wait for the first one and read what it found; a
rank that waits in vain takes the shipped shapes, which costs speed and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import List, Set

from ... import telemetry
from ..._torch_internals import current_graph_task
from .. import selfcheck
from ..inputs import AttentionInputs
from ..recovery import errors
from . import cache, tiles, trial
from .problem import on_device
from .tiles import KERNELS, Key

_met: Set[Key] = set()


def tune(inputs: AttentionInputs, seconds: float) -> None:
    """Tune for this call if nobody has, in `seconds` and at most a compilation more; never raises
    for it.

    Not while a call is captured, traced or differentiated, and not outside the main thread:
    tiles.forced holds for every thread. A later call of the class is then the first.
    """
    if not trial.long(inputs):
        return
    key = trial.class_of(inputs)
    if key in _met:
        return
    if threading.current_thread() is not threading.main_thread() or current_graph_task() != -1:
        return
    if not selfcheck.possible(inputs):
        return
    _met.add(key)
    try:
        if not tiles.measured(key):
            with on_device(inputs.q):  # the cache goes by the current device
                _once(inputs, key, seconds)
    except Exception as error:
        if not errors.survivable(error):
            raise
        message = "tuning for %s gave up, the shipped tile shapes are used: %s"
        telemetry.once(
            ("tune", key), "warning", message, inputs.call_class(), errors.first_line(error)
        )


def _once(inputs: AttentionInputs, key: Key, seconds: float) -> None:
    with contextlib.ExitStack() as stack:
        name = "{}.{}.tuning".format(cache.path(), "-".join(str(value) for value in key[1:]))
        try:
            os.makedirs(cache.directory(), exist_ok=True)
            first = stack.enter_context(cache.locked(name, 2 * seconds))
        except OSError:
            first = True  # without locks every process tunes for itself
        tiles.reload()
        missing = [
            each
            for each in (key._replace(kernel=kernel) for kernel in KERNELS)
            if not tiles.tuned(each)
        ]
        if first and missing:
            _tune(inputs, missing, seconds)


def _tune(inputs: AttentionInputs, missing: List[Key], seconds: float) -> None:
    from . import tune

    # Noted beforehand: a shape that takes the process along must not meet the next run.
    tiles.remember({key: tiles.shipped(key)[0] for key in missing})
    kernels = [key.kernel for key in missing]
    call = inputs.call_class()
    telemetry.once(
        ("tuning", call),
        "info",
        "tuning for %s takes up to %.0f s, once on this machine",
        call,
        seconds,
    )
    try:
        report = tune.tune(inputs, seconds=seconds, kernels=kernels)
    except KeyboardInterrupt:
        tiles.forget(missing)
        raise
    found = "; ".join(
        f"{row.kernel} {row.ratio:.2f}x" if row.tuned else f"{row.kernel} as shipped"
        for row in report.rows
    )
    telemetry.once(
        ("tuned", call), "info", "tuned for %s in %.0f s: %s", call, report.seconds, found
    )
