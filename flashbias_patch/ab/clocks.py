"""Clocks, temperature, power and throttling of the GPUs while a run goes on, as nvidia-smi tells
them.

One nvidia-smi for each run, which prints a line for each GPU every PERIOD seconds: nothing is done
in the command's own processes. Without nvidia-smi, or where it fails, nothing is recorded.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from . import processes
from .records import Experiment, Run

PERIOD = 2.0  # seconds between two samples
FIELDS = (
    "index",
    "uuid",
    "utilization.gpu",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
)
# The name since driver 535, and the one before: each driver refuses a name that it does not know.
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of the mask for which a GPU runs slower than it could. Idle, and clocks set by an
# administrator, are none.
THROTTLED = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
BUSY = 10.0  # percent of utilisation, from which a sample counts: idle GPUs clock down
DIFFER = 0.03  # relative difference of the sides' clocks that is worth a warning
OFTEN = 0.1  # of the samples


class Watch:
    """Samples the GPUs until `stop`."""

    def __init__(self, environ: Mapping[str, str], period: float = PERIOD) -> None:
        self.visible, self.period = environ.get("CUDA_VISIBLE_DEVICES"), period
        self.program = shutil.which("nvidia-smi", path=environ.get("PATH"))
        self.samples: List[Dict[str, Any]] = []
        self.child: Optional[subprocess.Popen[bytes]] = None
        self.stopped = False
        self.lock = threading.Lock()
        self.thread: Optional[threading.Thread] = None
        if self.program is not None:
            self.thread = threading.Thread(target=self._sample, daemon=True)
            self.thread.start()

    def _sample(self) -> None:
        for reasons in REASONS:
            query = ",".join((*FIELDS, reasons))
            words = [str(self.program), f"--query-gpu={query}", "--format=csv,noheader,nounits"]
            with self.lock:
                if self.stopped or self.samples:
                    return
                try:
                    child = self.child = subprocess.Popen(
                        [*words, f"--loop-ms={int(self.period * 1000)}"],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        preexec_fn=processes.end_with_parent(),
                    )
                except OSError:
                    return
            assert child.stdout is not None
            for line in child.stdout:
                sample = parse(line.decode("utf-8", "replace"))
                if sample is not None:
                    self.samples.append(sample)
            child.stdout.close()
            child.wait()

    def stop(self) -> List[Dict[str, Any]]:
        """End the sampling; what was seen of each GPU (see `summary`)."""
        with self.lock:
            self.stopped = True
            child = self.child
        if child is not None:
            child.kill()
        if self.thread is not None:
            self.thread.join(timeout=5.0)
        return summary(list(self.samples), self.visible)


def parse(line: str) -> Optional[Dict[str, Any]]:
    """A sample of one GPU; None for a line that is none (an error, a cut-off last line)."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(FIELDS) + 1 or not cells[0].isdigit():
        return None
    numbers = [_number(cell) for cell in cells[2:-1]]
    try:
        mask = int(cells[-1], 16)
    except ValueError:  # [N/A]
        mask = 0
    names = ("utilization", "sm", "sm_max", "memory", "temperature", "power")
    return {"index": int(cells[0]), "uuid": cells[1], **dict(zip(names, numbers)), "mask": mask}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:  # [N/A], [Not Supported]
        return math.nan


def summary(
    samples: Sequence[Mapping[str, Any]], visible: Optional[str] = None
) -> List[Dict[str, Any]]:
    """Summarise each GPU that was visible to the run: clocks in MHz, degrees Celsius, watts, and
    {reason: share of the samples} of throttling, over the samples in which it was busy (over all,
    if it never was). `visible`: CUDA_VISIBLE_DEVICES, of which "" and "-1" hide all GPUs."""
    if visible is not None and visible.strip() in ("", "-1"):
        return []
    by_gpu: Dict[int, List[Mapping[str, Any]]] = {}
    for sample in samples:
        by_gpu.setdefault(sample["index"], []).append(sample)
    chosen = [i for i, seen in by_gpu.items() if _visible(seen[0], visible)] or list(by_gpu)
    found = []
    for index in sorted(chosen):
        seen = by_gpu[index]
        busy = [s for s in seen if s["utilization"] >= BUSY]
        used = busy or seen
        reasons = {
            name: sum(bool(s["mask"] & bit) for s in used) / len(used)
            for bit, name in THROTTLED.items()
        }
        found.append(
            {
                "gpu": index,
                "busy": bool(busy),
                "samples": len(used),
                "sm_mhz": _mean(used, "sm"),
                "sm_mhz_least": _of(np.min, used, "sm"),
                "sm_mhz_limit": _of(np.max, used, "sm_max"),
                "memory_mhz": _mean(used, "memory"),
                "celsius": _of(np.max, used, "temperature"),
                "watts": _mean(used, "power"),
                "throttled": {name: round(share, 3) for name, share in reasons.items() if share},
            }
        )
    return [each for each in found if each["busy"]] or found


def _visible(sample: Mapping[str, Any], visible: Optional[str]) -> bool:
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    return any(
        name == str(sample["index"]) or (not name.isdigit() and sample["uuid"].startswith(name))
        for name in names
    )


def _of(function: Any, samples: Sequence[Mapping[str, Any]], name: str) -> Optional[float]:
    values = [s[name] for s in samples if math.isfinite(s[name])]
    return round(float(function(values)), 1) if values else None


def _mean(samples: Sequence[Mapping[str, Any]], name: str) -> Optional[float]:
    return _of(np.mean, samples, name)


# -- the report
# ----------------------------------------------------------------------------------------------


def notes(a: Sequence[Run], b: Sequence[Run], who: str) -> List[str]:
    """Warnings: clocks of the sides differ, or GPUs throttled. `who`: the side beside A."""
    found = []
    clocks = [_clock(side) for side in (a, b)]
    if None not in clocks:
        mine, other = (float(clock or 0.0) for clock in clocks)
        if abs(mine - other) > DIFFER * max(mine, other):
            found.append(
                f"GPU clocks differ: {mine:.0f} MHz unpatched, {other:.0f} MHz {who} on average: "
                "part of a difference in speed comes from the clocks; more repeats, or clocks "
                "locked by `nvidia-smi -lgc`, show how much"
            )
    throttled: Dict[str, List[str]] = {}
    for run in (*a, *b):
        for gpu in run.gpus:
            for reason, share in gpu.get("throttled", {}).items():
                if share >= OFTEN:
                    throttled.setdefault(reason, []).append(f"{run.name} {share:.0%}")
    for reason, runs in throttled.items():
        found.append(
            f"GPU throttled by {reason} during {', '.join(dict.fromkeys(runs))} of the time: its "
            "speed does not depend on the command alone"
        )
    return found


def _clock(runs: Sequence[Run]) -> Optional[float]:
    """Mean SM clock of the busy GPUs of a side, MHz."""
    values = [g["sm_mhz"] for run in runs for g in run.gpus if g.get("busy") and g.get("sm_mhz")]
    return float(np.mean(values)) if values else None


COLUMNS = (
    "run",
    "GPU",
    "SM clock",
    "least clock",
    "highest possible",
    "temperature",
    "power",
    "throttled",
)


def table(experiment: Experiment) -> List[Tuple[str, ...]]:
    """One row for each GPU of each run; empty where nothing was recorded."""
    return [
        (
            run.name,
            str(gpu["gpu"]),
            _shown(gpu["sm_mhz"], "MHz"),
            _shown(gpu["sm_mhz_least"], "MHz"),
            _shown(gpu["sm_mhz_limit"], "MHz"),
            _shown(gpu["celsius"], "\u00b0C"),
            _shown(gpu["watts"], "W"),
            ", ".join(f"{k} {v:.0%}" for k, v in gpu["throttled"].items()) or "no",
        )
        for run in experiment.runs
        for gpu in run.gpus
    ]


def _shown(value: Optional[float], unit: str) -> str:
    return "-" if value is None else f"{value:.0f}\u00a0{unit}"
