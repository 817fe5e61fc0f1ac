"""Make the verdict on recorded runs: failures first, then speed, memory and training."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from . import clocks, failures, loader, parity, repeats, saved, sides, statistics, timing_notes
from .records import Experiment, Run
from .statistics import MIN_STEPS, Ratio
from .verdict import Timing, Verdict


def judge(
    experiment: Experiment,
    warmup: Optional[int] = None,
    seed: int = 0,
    detections: Optional[Dict[str, Any]] = None,
) -> Verdict:
    """The verdict on what `flashbias ab` recorded: that of B, which holds those of further sides.

    Failed runs count for what they recorded, where their side has no other: a run cut short would
    shorten all that is compared. `detections`: their comparison, of an inference.
    """
    labels = sides.labels(experiment.options)
    made: Dict[Tuple[str, int], Verdict] = {}

    def judged(label: str, comparisons: int) -> Verdict:
        key = label, comparisons
        if key not in made:
            found = detections if label == "B" else None
            made[key] = _judge(sides.pair(experiment, label), warmup, seed, found, comparisons)
        return made[key]

    def is_decided(quantity: str, label: str, comparisons: int) -> bool:
        ratio = getattr(judged(label, comparisons), quantity)
        return ratio is not None and ratio.decided != 0

    at = {
        quantity: sides.holm(labels, functools.partial(is_decided, quantity))[0]
        for quantity in ("speed", "memory")
    }
    found = []
    for label in labels:
        verdict = judged(label, at["speed"][label])
        memory = judged(label, at["memory"][label]).memory
        found.append(dataclasses.replace(verdict, memory=memory))
    found[0].further = found[1:]
    if len(labels) > 1:
        found[0].notes.append(
            f"{len(labels)} sides are compared with A: Holm's procedure keeps the chance that any "
            "side is falsely called slower, faster or of other memory as low as for one side, by "
            f"intervals of up to {100 - 5 / len(labels):.4g}% for the usual step"
        )
    return found[0]


def _judge(
    experiment: Experiment,
    warmup: Optional[int],
    seed: int,
    detections: Optional[Dict[str, Any]],
    comparisons: int,
) -> Verdict:
    """The verdict on A and the side `experiment.judged`, one of so many comparisons."""
    label = experiment.judged
    a, b = (_whole(experiment.side(each)) for each in ("A", label))
    verdict = Verdict(inference=bool(experiment.options.get("inference")), detections=detections)
    verdict.side, verdict.name = label, sides.name(experiment.options, label)
    verdict.failures = failures.failures(experiment)
    verdict.notes = failures.notes(experiment, a + b)
    patched = [run for run in experiment.patched() if run.steps or run.status == "ok"]
    if patched and (label == "B" or sides.is_patched(experiment.options, label)):
        verdict.calls = sum(sum(run.calls().values()) for run in patched)
    if b:
        done = [run for run in b if run.status == "ok"]
        if done:
            verdict.patched_peak = max(run.peak_memory() for run in done)
            steps = [t[np.isfinite(t)] for t in (run.step_seconds() for run in done)]
            warm_up = min(
                int(experiment.options.get("warmup", 0)), max(0, min(map(len, steps)) - 1)
            )
            kept = [t[warm_up:] for t in steps if t[warm_up:].size]
            verdict.patched_step = (
                float(np.mean([statistics.midmean(t) for t in kept])) if kept else float("nan")
            )
            verdict.memory_kind = done[0].memory_kind()
    verdict.problems = [str(failure) for failure in verdict.failures]
    if not verdict.only_patched_fits:
        verdict.problems += failures.other_problems(experiment, a, b)
    if a and b:
        _compare(verdict, experiment, a, b, warmup, seed, comparisons)
    return verdict


def _compare(
    verdict: Verdict,
    experiment: Experiment,
    a: List[Run],
    b: List[Run],
    warmup: Optional[int],
    seed: int,
    comparisons: int,
) -> None:
    plain, nudged = [r for r in a if not r.nudged] or a, [r for r in a if r.nudged]
    warm = int(experiment.options.get("warmup", 0)) if warmup is None else warmup
    fewest = min(run.steps for run in plain + b)
    if fewest - warm < MIN_STEPS:
        fitting = max(min(warm, 1), min(warm, fewest - MIN_STEPS))
        steps = "1 step is" if fewest == 1 else f"{fewest} steps are"
        if fitting != warm:
            verdict.notes.append(
                f"{steps} too few for a warm-up of {warm}; the warm-up is {fitting} instead"
            )
        warm = fitting
    crowded = [run for run in plain + b if timing_notes.is_crowded(run, experiment)]
    # Runs that do not alternate differ by what changed in between too.
    apart = crowded or any(run.saved for run in plain)
    spread = statistics.CROWDED_SPREAD if apart else statistics.TYPICAL_SPREAD["time"]
    times = [[run.step_seconds()[warm:] for run in side] for side in (plain, b)]
    made = min(len(plain), len(b))
    levels = repeats.levels(experiment.options, made, comparisons)
    verdict.speed = statistics.compare_times(times[0], times[1], seed, spread, levels)
    kinds = {run.memory_kind() for run in plain + b}
    verdict.memory_kind = "cuda" if kinds == {"cuda"} else "rss"
    peaks = [[run.peak_memory() for run in side] for side in (plain, b)]
    verdict.memory = statistics.compare_peaks(peaks[0], peaks[1], verdict.memory_kind, levels[0])
    timed_by = {run.clock for run in plain + b}
    verdict.clock = timed_by.pop() if len(timed_by) == 1 else "wall clock"
    verdict.parities = parity.of_runs(
        plain, b, nudged if nudged != plain else [], any(run.half for run in a + b)
    )
    waits = (loader.wait_of(plain, warm), loader.wait_of(b, warm))
    verdict.timing = _timing(plain, b, verdict.speed, times)._replace(waits=waits)
    said = [*saved.notes(experiment), loader.note(waits, verdict.name)]
    said += [loader.by_loader(w, x) for w, x in zip(waits, ("unpatched", verdict.name))]
    verdict.notes += [each for each in said if each]
    verdict.notes += clocks.notes(plain, b, verdict.name)
    verdict.notes += timing_notes.notes(verdict, experiment, crowded, made)
    if any(run.redrawn for run in nudged):
        verdict.notes.append(
            f"{verdict.who} draws other random numbers (for dropout, for example): training is "
            "compared with additional As that also draw other random numbers. Without dropout it "
            "can be compared with rounding"
        )


def _whole(runs: List[Run]) -> List[Run]:
    """Those that came to their end, where a plain one did; else all."""
    longest = max((run.steps for run in runs if run.status == "ok"), default=0)
    done = [run for run in runs if run.status == "ok" and run.steps == longest]
    return done if any(not run.nudged for run in done) else runs


def _mean(seconds: Iterable[float]) -> float:
    return float(np.mean(list(seconds)))


def _timing(
    a: List[Run], b: List[Run], speed: Optional[Ratio], times: Sequence[Sequence[np.ndarray]]
) -> Timing:
    startup = (_mean(run.startup_seconds() for run in a), _mean(run.startup_seconds() for run in b))
    total = (
        _mean(run.seconds for run in a) or math.nan,
        _mean(run.seconds for run in b) or math.nan,
    )
    later, gain = (
        startup[1] - startup[0],
        speed.mean.a - speed.mean.b if speed and speed.mean else 0.0,
    )
    break_even = (
        math.ceil(later / gain) if gain > 0 and math.isfinite(later) and later > 0 else None
    )
    stalls = (statistics.stalls(times[0]), statistics.stalls(times[1]))
    return Timing(startup, total, break_even, stalls)


def step_times(runs: Sequence[Run], warmup: int) -> Tuple[np.ndarray, ...]:
    """The step times that were judged, one array per run (for a report's histogram)."""
    return tuple(t[np.isfinite(t)] for t in (run.step_seconds()[warmup:] for run in runs))
