"""The processes of a run: how all of them are ended, and how much of the machine's work is
theirs."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from typing import Any, Callable, Dict, Optional, Set, Tuple

from . import probe_variables

POLL = 0.05
PR_SET_PDEATHSIG = 1
GRACE_TO_DIE = 5.0  # between SIGTERM and SIGKILL


class Machine:
    """Work of this machine since the object was made: the command's own, and that of others."""

    def __init__(self) -> None:
        self.begin = self.read()

    @staticmethod
    def read() -> Optional[Tuple[float, float, float]]:
        """(all CPU seconds, those not idle, those of this process and the children that it has
        waited for)."""
        try:
            with open("/proc/stat", "rb") as file:
                ticks = [int(word) for word in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return None
        usage = [
            resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        ]
        unit = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return (
            sum(ticks) / unit,
            (sum(ticks) - idle) / unit,
            sum(u.ru_utime + u.ru_stime for u in usage),
        )

    def since(self) -> Dict[str, float]:
        """`others`: CPUs that other work kept busy; `busy`: share of all CPUs that was; empty where
        unknown."""
        end = self.read()
        if self.begin is None or end is None or end[0] <= self.begin[0]:
            return {}
        whole, busy, own = (y - x for x, y in zip(self.begin, end))
        others = max(0.0, busy - own) / whole * (os.cpu_count() or 1)
        return {"others": round(others, 2), "busy": round(min(1.0, busy / whole), 3)}


def end_with_parent() -> Optional[Callable[[], None]]:
    """Return a function that makes Linux end the child if this process is killed by SIGKILL; the
    child's other processes end at their next step."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
    except (OSError, AttributeError):  # no Linux
        return None
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def end(child: Any, probes: str) -> None:
    """End the command's processes: its group, and who left the group but has the run's
    environment."""
    for number, grace in ((signal.SIGTERM, GRACE_TO_DIE), (signal.SIGKILL, GRACE_TO_DIE)):
        deadline = time.monotonic() + grace
        alive = _signal_all(child, probes, number)
        while alive and time.monotonic() < deadline:
            time.sleep(POLL)
            child.poll()
            alive = _signal_all(child, probes, 0)
        if not alive:
            break
    child.poll()


def _signal_all(child: Any, probes: str, number: int) -> bool:
    """Signal every process of the run; True if there was one."""
    found = False
    for process in _marked(probes) - {os.getpid()}:
        try:
            os.kill(process, number)
            found = True
        except OSError:
            pass
    try:
        os.killpg(child.pid, number)
        # A zombie leader still has a group; poll() reaps it, and only others keep the group alive.
        found = found or child.poll() is None or _group_alive(child.pid)
    except OSError:
        pass
    return found


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return True
    except OSError:
        return False


def _marked(probes: str) -> Set[int]:
    """Processes whose environment names this run's probe directory (torchrun gives its workers
    sessions of their own).
    """
    mark = f"{probe_variables.DIRECTORY}={probes}".encode()
    found = set()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if mark in file.read().split(b"\0"):
                        found.add(int(name))
            except OSError:
                continue
    return found


class deaf_to_interrupts:
    """While children are being ended, a second Ctrl-C must not leave them behind."""

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
        self.before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
