"""Waiting for the data loader, of each side (recorded by waits.py), told apart from the rest of a
step."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .records import Run

DOMINATES = 0.5  # of a side's time: from here on a note says that no attention patch helps much


class Wait(NamedTuple):
    """Of one side, over the steps that are timed."""

    seconds: float  # a step waits, on average
    step: float  # that a step takes, on average
    loaders: Dict[str, float]  # seconds a step by loader, where there are several

    @property
    def share(self) -> float:
        return self.seconds / self.step if self.step else 0.0


def wait_of(runs: Sequence[Run], warmup: int) -> Optional[Wait]:
    """None where no step waited for a torch data loader. Of several ranks the one that waited the
    longest in a step counts, as that step did not begin before."""
    waits: List[float] = []
    steps: List[float] = []
    names: Dict[str, List[float]] = {}
    for run in runs:
        loop = run.per_step("loop_s")  # of inference, whose wall_s is that of the forward pass
        whole = _slowest((loop if np.isfinite(loop).any() else run.per_step("wall_s"))[:, warmup:])
        wait = _slowest(run.per_step("loader_s")[:, warmup:])
        known = np.isfinite(whole)
        waits += list(np.nan_to_num(wait[known]))
        steps += list(whole[known])
        for name in {
            name for p in run.ranks for line in p.steps for name in line.get("loaders") or ()
        }:
            each = _slowest(run.per_step("loaders", name)[:, warmup:])
            names.setdefault(name, []).extend(np.nan_to_num(each[known]))
    if not steps or not any(waits):
        return None
    several = {name: float(np.sum(v)) / len(steps) for name, v in sorted(names.items())}
    return Wait(float(np.mean(waits)), float(np.mean(steps)), several if len(several) > 1 else {})


def _slowest(values: np.ndarray) -> np.ndarray:
    known = np.where(np.isfinite(values), values, -np.inf)
    found = known.max(axis=0) if known.size else np.zeros(0)
    return np.where(np.isfinite(found), found, np.nan)


def note(waits: Tuple[Optional[Wait], Optional[Wait]], who: str) -> str:
    """The warning where the loader dominates; empty otherwise. `who`: the side beside A."""
    first, second = waits
    if max(0.0 if w is None else w.share for w in waits) < DOMINATES:
        return ""
    said = [
        f"{w.share:.0%} {name}"
        for w, name in ((first, "unpatched"), (second, who))
        if w is not None
    ]
    most = "" if first is None else f": without it a step takes {1 - first.share:.0%} of the time"
    return (
        f"the data loader dominates: waiting for it is {' and '.join(said)} of the time of a step"
        f"{most}, so no attention patch can speed the run up by much; more workers, or data that "
        "are prepared once, can"
    )


def by_loader(wait: Optional[Wait], who: str) -> str:
    """Return the time spent waiting for each of several loaders; empty for one loader."""
    if wait is None or not wait.loaders:
        return ""
    shown = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in wait.loaders.items())
    return f"waiting for data {who}, a step: {shown}"
