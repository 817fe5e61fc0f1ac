"""Print one summary line to stderr when a process ends (FLASHBIAS_SUMMARY; set by `flashbias
run`)."""

from __future__ import annotations

import atexit
import os
import sys
from typing import List, Optional, Tuple

from . import telemetry

# imported by the process that starts the ranks, which computes nothing itself
LAUNCHER = "torch.distributed.launcher.api"
LONGEST = 120  # characters of a reason

_registered_in: Optional[int] = None


def at_exit() -> None:
    """Print the line once, when this process ends. A forked child of it prints nothing."""
    global _registered_in
    if _registered_in is None:
        _registered_in = os.getpid()
        atexit.register(_print)


def line() -> Optional[str]:
    """Summarise patched classes, calls per backend, fallbacks and biases without effect.

    Returns None if nothing is worth a line. Ranks other than 0 and worker processes print a line
    only for a fallback or a bias without effect; workers also if they computed attention.
    """
    from . import status  # the function; importing the module of that name would hide it

    now = status()
    trouble = now["fallbacks"] or now["unreached"]
    idle = not now["calls"] and (_is_worker() or not now["patched"] and LAUNCHER in sys.modules)
    if not trouble and (telemetry.rank() or idle):
        return None
    names = sorted({entry["class"] for entry in now["patched"]})
    if not names and not now["calls"] and not trouble:
        return (
            "flashbias_patch: no class was patched; `flashbias doctor --repo DIR` says what "
            "would be"
        )
    parts = [f"patched {', '.join(names) or 'no class'}"]
    calls = ", ".join(f"{name} {count}" for name, count in sorted(now["calls"].items()))
    parts.append(f"attention calls: {calls or 'none'}")
    parts.append(
        _counted(
            "fallbacks", [(f"{f['source']}: {f['reason']}", f["count"]) for f in now["fallbacks"]]
        )
    )
    parts.append(
        _counted(
            "biases without effect",
            [(f"{u['where']}: {u['reason']}", u["count"]) for u in now["unreached"]],
        )
    )
    rank = f"[rank {telemetry.rank()}] " if telemetry.rank() else ""
    return f"flashbias_patch: {rank}" + "; ".join(parts)


def _counted(noun: str, entries: List[Tuple[str, int]]) -> str:
    if not entries:
        return f"{noun}: none"
    first_reason, _ = entries[0]
    reason = " ".join(first_reason.split())
    reason = reason if len(reason) <= LONGEST else reason[: LONGEST - 3] + "..."
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    return f"{noun}: {sum(count for _, count in entries)} ({reason}{more})"


def _is_worker() -> bool:
    multiprocessing = sys.modules.get("multiprocessing.process")
    return multiprocessing is not None and multiprocessing.parent_process() is not None


def _print() -> None:
    if os.getpid() != _registered_in:
        return
    try:
        text = line()
        if text:
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):  # stderr is closed or absent
        pass
