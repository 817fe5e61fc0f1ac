"""Running a command patched: its environment, and what each of its Python processes does first.

As OpenTelemetry's auto-instrumentation does it: a directory that holds a sitecustomize goes in front of PYTHONPATH,
and the command is executed; every Python process of it, spawned workers included, imports that file.
"""
from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from typing import Dict, Mapping, Optional

from . import journal

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap")
PROBE = "FLASHBIAS_PROBE"


def prepare_environment(
    env: Mapping[str, str], *, patch: bool, extra: Optional[Mapping[str, str]] = None
) -> Dict[str, str]:
    """The environment of a command that runs patched or not.

    A package used from a checkout is appended to PYTHONPATH; an installed one is found without.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    given = [part for part in env.get("PYTHONPATH", "").split(os.pathsep) if part and part != BOOTSTRAP]
    is_checkout = not home.endswith(("site-packages", "dist-packages"))
    path = [BOOTSTRAP, *given] + ([home] if is_checkout and home not in given else [])
    return {
        **env,
        "PYTHONPATH": os.pathsep.join(path),
        "FLASHBIAS_PATCH": "1" if patch else "0",
        **(extra or {}),
    }


def start_process(sitecustomize: str) -> None:
    """What a sitecustomize of ours does: chain to the next one on the path, probe if asked to, install if on.

    Never raises: a process must start, whatever is wrong here.
    """
    try:
        chain(sitecustomize)
        if os.environ.get(PROBE):
            from .ab import probe

            probe.start()
    except Exception:
        journal.logger().exception("this process starts without all of flashbias_patch")


def chain(sitecustomize: str) -> None:
    """Execute the sitecustomize that `sitecustomize` hides, if there is one elsewhere on sys.path."""
    own = os.path.dirname(os.path.abspath(sitecustomize))
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p or os.curdir) != own])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
