"""Explain a difference in speed: the time of kernels by class, per side (recorded by
profiling.py)."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from .kernel_classes import CLASSES, OTHER, class_of
from .records import Experiment, Run
from .verdict import Verdict


class Profile(NamedTuple):
    """Of one side: seconds a step by class, and its kernels as (name, class, seconds a step)."""

    device: str  # cuda or cpu
    steps: int
    classes: Dict[str, float]
    kernels: List[Tuple[str, str, float]]

    @property
    def seconds(self) -> float:
        return sum(self.classes.values())


def profile_of(runs: Sequence[Run]) -> Any:
    """The profile of rank 0 of the first run that has one; None if none has."""
    lines = [p.profile for run in runs for p in run.ranks if p.profile]
    if not lines:
        return None
    line, steps = lines[0], max(1, int(lines[0].get("steps") or 1))
    classes = dict.fromkeys(CLASSES, 0.0)
    kernels = []
    for name, seconds, _ in line["kernels"]:
        kind = class_of(str(name))
        classes[kind] += float(seconds) / steps
        kernels.append((str(name), kind, float(seconds) / steps))
    classes[OTHER] += float(line.get("rest_s") or 0.0) / steps
    return Profile(str(line.get("device")), steps, classes, kernels)


class Row(NamedTuple):
    """A class, or the sum of all: seconds a step of A and of the other side."""

    name: str
    a: float
    b: float

    @property
    def difference(self) -> float:
        return self.b - self.a


def rows(experiment: Experiment, verdict: Verdict) -> List[Row]:
    """By class, the largest difference first, then all; empty where a side has no profile."""
    a, b = (profile_of(experiment.side(label)) for label in ("A", verdict.side))
    if a is None or b is None:
        return []
    found = [Row(name, a.classes[name], b.classes[name]) for name in CLASSES]
    found = [row for row in found if row.a or row.b]
    found.sort(key=lambda row: -abs(row.difference))
    return [*found, Row("all", a.seconds, b.seconds)]


def columns(verdict: Verdict) -> Tuple[str, ...]:
    return ("class", "A unpatched", f"{verdict.side} {verdict.name}", "difference")


def shown(experiment: Experiment, verdict: Verdict) -> List[Tuple[str, ...]]:
    """`rows` as text."""
    return [
        (row.name, _ms(row.a), _ms(row.b), f"{row.difference * 1e3:+.3f}\u00a0ms")
        for row in rows(experiment, verdict)
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}\u00a0ms"


def title(experiment: Experiment) -> str:
    """The source of the times, for the head of the table."""
    profile = profile_of(experiment.side("A"))
    if profile is None:
        return ""
    what = "GPU kernels" if profile.device == "cuda" else "operators on the CPU"
    steps = "1 step" if profile.steps == 1 else f"{profile.steps} steps"
    return f"Time of {what} a step, by class ({steps} under torch.profiler, after the timed ones)"


def document(experiment: Experiment, verdict: Verdict) -> Any:
    """For JSON: the classes, and the ten kernels of the most time on each side."""
    found = rows(experiment, verdict)
    if not found:
        return None
    sides = {x: profile_of(experiment.side(x)) for x in ("A", verdict.side)}
    return {
        "device": sides["A"].device,
        "steps": sides["A"].steps,
        "classes": [{**row._asdict(), "difference": row.difference} for row in found],
        "kernels": {
            label: [
                {"name": name, "class": kind, "seconds": seconds}
                for name, kind, seconds in side.kernels[:10]
            ]
            for label, side in sides.items()
        },
    }
