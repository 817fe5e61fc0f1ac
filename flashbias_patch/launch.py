"""Run a command patched: prepare its environment and start each of its Python processes.

As in OpenTelemetry's auto-instrumentation, a directory with a sitecustomize.py is put in front of
PYTHONPATH and the command is executed. Every Python process of the command, including spawned
workers, imports that file.
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
    """Return the environment for a command that runs patched, or unpatched (patch=False).

    PYTHONPATH keeps its entries, also empty ones, which mean the working directory. If this package
    is used from a checkout, its directory is appended; an installed package needs no entry.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    entries = _entries(env.get("PYTHONPATH", ""))
    is_checkout = not home.endswith(("site-packages", "dist-packages"))
    path = [BOOTSTRAP, *entries] + ([home] if is_checkout and home not in entries else [])
    return {
        **env,
        "PYTHONPATH": os.pathsep.join(path),
        "FLASHBIAS_PATCH": "1" if patch else "0",
        **(extra or {}),
    }


def _entries(pythonpath: str) -> List[str]:
    """Return the entries without the bootstrap directory; none for an empty variable, which Python
    ignores."""
    return (
        [part for part in pythonpath.split(os.pathsep) if part != BOOTSTRAP] if pythonpath else []
    )


def start_process(*_: str) -> None:
    """Start the probe of `flashbias ab` or the observer of `flashbias why`, if one is requested.

    sitecustomize.py calls it. Importing this package has already installed the patches. It never
    raises: an error here must not stop the process from starting.
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
        telemetry.logger().exception(
            "start-up of flashbias_patch failed; this process may be unpatched or unrecorded"
        )
