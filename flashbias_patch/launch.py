"""Running a command patched: its environment, and the start-up of each of its Python processes.

As in OpenTelemetry's auto-instrumentation, a directory that holds a sitecustomize goes in front of
PYTHONPATH, and the command is executed; every Python process of it, spawned workers included,
imports that file.
"""

from __future__ import annotations

import os
from typing import Dict, List, Mapping, Optional

from . import telemetry

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")
PROBE = "FLASHBIAS_PROBE"
WHY = "FLASHBIAS_PROBE_WHY"


def prepare_environment(
    env: Mapping[str, str], *, patch: bool, extra: Optional[Mapping[str, str]] = None
) -> Dict[str, str]:
    """The environment of a command that runs patched or not.

    PYTHONPATH keeps its entries, the empty ones included: they stand for the working directory. A
    package used from a checkout is appended to it; an installed one is found without.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    given = _entries(env.get("PYTHONPATH", ""))
    is_checkout = not home.endswith(("site-packages", "dist-packages"))
    path = [BOOTSTRAP, *given] + ([home] if is_checkout and home not in given else [])
    return {
        **env,
        "PYTHONPATH": os.pathsep.join(path),
        "FLASHBIAS_PATCH": "1" if patch else "0",
        **(extra or {}),
    }


def _entries(pythonpath: str) -> List[str]:
    """Its entries without the bootstrap directory. An empty variable has none: Python ignores
    it."""
    return (
        [part for part in pythonpath.split(os.pathsep) if part != BOOTSTRAP] if pythonpath else []
    )


def start_process(*_: str) -> None:
    """Called by the sitecustomize: start the probe of `flashbias ab`, or the observer of
    `flashbias why`, if there is one. Importing this package has
    installed the patches already.

    Never raises: a process must start, whatever is wrong here.
    """
    try:
        if os.environ.get(PROBE):
            if os.environ.get(WHY):
                from .why import observer

                observer.start()
            else:
                from .ab import probe

                probe.start()
    except Exception:
        telemetry.logger().exception("this process starts without all of flashbias_patch")
