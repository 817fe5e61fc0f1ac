"""The verdict on a comparison: failures first, then speed, memory and training; and what
`--fail-if` fires on."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import clocks, failures, loader, parity, records, repeats, saved, sides, statistics
from .failures import Failure
from .loader import Wait
from .parity import Parity
from .records import Experiment, Run
from .statistics import MIN_STEPS, Ratio, Stalls

FAIL_IF = ("slower", "differs", "more-memory", "fails")
BUSY_SHARE, BUSY_OTHERS = 0.9, 0.1  # of all CPUs: both together are other work that slows a run
MOST_CONFIRMATIONS = 4  # nudged runs of A, before "differs" is said
FURTHER_CONFIRMATIONS = 2  # more of them for each further side
STALLS_SHARE = 0.1  # of a side's time, from which stalls are worth a note
SIDES = sides.NAMES


class Timing(NamedTuple):
    """Seconds of both sides, beside the time per step: NaN where unknown."""

    startup: Tuple[float, float]  # from the start of the command to the end of its first step
    total: Tuple[float, float]  # of a run
    break_even: Optional[int]  # the step at which a faster B has made up for a longer start
    stalls: Tuple[Stalls, Stalls]
    waits: Tuple[Optional[Wait], Optional[Wait]] = (None, None)  # for data


@dataclass
class Verdict:
    """The result of a comparison; its words are what a report shows and --fail-if asks for."""

    speed: Optional[Ratio] = None
    memory: Optional[Ratio] = None
    memory_kind: str = ""
    clock: str = ""
    parities: List[Parity] = field(default_factory=list)
    failures: List[Failure] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)
    timing: Optional[Timing] = None
    calls: Optional[int] = (
        None  # attention calls of all patched runs; None: no patched run recorded any step
    )
    inference: bool = False  # no training steps: detections are compared instead
    detections: Optional[Dict[str, Any]] = None
    patched_peak: float = float("nan")  # bytes; also where there is nothing to compare it with
    patched_step: float = float("nan")  # seconds
    side: str = "B"  # that is compared with A
    name: str = SIDES["B"]
    further: List[Verdict] = field(default_factory=list)  # of B: those of the further sides

    @property
    def who(self) -> str:
        """The side in a sentence."""
        return "patched" if self.side == "B" else f"{self.side} ({self.name})"

    @property
    def every(self) -> List[Verdict]:
        """The verdicts of all sides, this one first."""
        return [self, *self.further]

    @property
    def of_outputs(self) -> bool:
        """Were outputs of forward passes compared instead of losses?"""
        return any(p.quantity == parity.OUTPUTS for p in self.parities)

    @property
    def only_patched_fits(self) -> bool:
        """The best result: unpatched runs out of memory, patched trains."""
        return (
            bool(self.failures)
            and all(f.side == "A" and f.status == records.OUT_OF_MEMORY for f in self.failures)
            and math.isfinite(self.patched_step)
        )

    @property
    def failed(self) -> bool:
        """Some run failed, and that is not the result."""
        return bool(self.failures) and not self.only_patched_fits

    @property
    def nothing_patched(self) -> bool:
        return self.calls == 0

    @property
    def speed_word(self) -> str:
        return self._word(self.speed, "slower", "faster")

    @property
    def memory_word(self) -> str:
        return self._word(self.memory, "more memory", "less memory")

    def _word(self, ratio: Optional[Ratio], more: str, less: str) -> str:
        if ratio is None:
            return "not compared"
        return "undecided" if self.failures else ratio.word(more, less)

    @property
    def parity_word(self) -> str:
        if self.failed:
            return "fails"
        return (
            self.detections["word"] if self.detections is not None else parity.worst(self.parities)
        )

    @property
    def first_step(self) -> Optional[int]:
        return min((p.first_step for p in self.parities if p.first_step is not None), default=None)

    def fails(self, conditions: Sequence[str]) -> List[str]:
        """Those of `conditions` (FAIL_IF) that came true for any side, with the side unless it is
        B; a failed run makes any of them true."""
        found = self._fails(conditions)
        for each in self.further:
            only_a = each.failed and all(f.side == "A" for f in each.failures)
            if not (only_a and self.failed):  # a failed A is said once
                found += [f"{condition}: {each.who}" for condition in each._fails(conditions)]
        return found

    @property
    def succeeded(self) -> bool:
        """Whether every side was compared, or unpatched alone ran out of memory."""
        return all(v.only_patched_fits or (v.comparable and not v.failed) for v in self.every)

    def _fails(self, conditions: Sequence[str]) -> List[str]:
        not_finite = self.parity_word == "not finite"
        true = {
            "slower": self.speed_word == "slower",
            "differs": self.parity_word == "differs" or not_finite,
            "more-memory": self.memory_word == "more memory",
            "fails": self.nothing_patched or not_finite,
        }
        if conditions and self.failed:
            return ["fails"]
        return [condition for condition in conditions if true[condition]]

    @property
    def comparable(self) -> bool:
        if self.detections is not None:
            return "error" not in self.detections
        return self.speed is not None or any(p.word != parity.NOT_COMPARED for p in self.parities)


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
            "is falsely called slower, faster or of other memory at what it is for one, by "
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
                f"{steps} too few for a warm-up of {warm}: {fitting} left out instead"
            )
        warm = fitting
    crowded = [run for run in plain + b if is_crowded(run, experiment)]
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
    verdict.notes += _notes_on_times(verdict, experiment, crowded, made)
    if any(run.redrawn for run in nudged):
        verdict.notes.append(
            f"{verdict.who}, other random numbers are drawn (by dropout, say): training is held "
            "against more As that draw others too. Without dropout it can be held against rounding"
        )


def next_run(experiment: Experiment, verdict: Verdict) -> Optional[Tuple[str, str]]:
    """The run that the verdict still needs: (side, nudge); None: no more.

    A nudged A, unless B and every further side are identical: where A differs from A hardly or not
    at all, that says nothing about rounding, of which B's is another than A's. And before "differs"
    is said, `most_confirmations` of them, and a second run of that side: noise of two kinds, or a
    decision that falls one way or the other late, is easily missing in two As.
    """
    a = experiment.side("A")
    nudged = [run for run in a if run.nudged]
    left = [
        each
        for each in verdict.every
        if not (each.failures or each.inference)
        and each.parity_word not in (parity.NOT_COMPARED, "identical", "not finite")
    ]
    if not a or not left:
        return None
    differing = [each.side for each in left if each.parity_word == "differs"]
    most = most_confirmations(len(verdict.every))
    if not nudged or (differing and len(nudged) < most):
        runs = [run for each in left for run in experiment.side(each.side)]
        kind = "redraw" if any(run.random != a[0].random for run in runs) else ""
        return "A", f"{kind}{len(nudged) + 1}"
    few = next((side for side in differing if len(experiment.side(side)) < 2), None)
    return None if few is None else (few, "")


def most_confirmations(comparisons: int) -> int:
    """Nudged As before "differs" is said. Several sides are several chances of a false alarm, and
    the more As there are, the rarer is a side further from them than they are from each other."""
    return MOST_CONFIRMATIONS + FURTHER_CONFIRMATIONS * (comparisons - 1)


def is_crowded(run: Run, experiment: Experiment) -> bool:
    """Was the machine busy with other work than the command's own?"""
    cpus = int(experiment.host.get("cpus") or 1)
    return run.busy >= BUSY_SHARE and run.others >= BUSY_OTHERS * cpus


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


def _notes_on_times(
    verdict: Verdict, experiment: Experiment, crowded: List[Run], made: int
) -> List[str]:
    found = repeats.notes(experiment, verdict.speed, made)
    speed, timing = verdict.speed, verdict.timing
    assert timing is not None
    if speed and not speed.repeats:
        assumed = statistics.UNREPEATED * statistics.TYPICAL_SPREAD["time"]
        found.append(f"no run was repeated: a spread of {assumed:.1%} between runs is assumed")
    if crowded:
        worst = max(crowded, key=lambda run: run.others)
        cpus = int(experiment.host.get("cpus") or 1)
        found.append(
            f"other work kept the machine busy ({worst.others:.1f} of {cpus} CPUs during "
            f"{worst.name}): "
            f"a spread of {statistics.CROWDED_SPREAD:.0%} between runs is assumed"
        )
    if speed and (speed.disagree or max(s.share for s in timing.stalls) > STALLS_SHARE):
        stalled = [
            f"{s.slow} of {s.steps} steps {who}, {s.share:.0%} of the time"
            for who, s in zip((verdict.name, SIDES["A"]), reversed(timing.stalls))
        ]
        found.append(
            f"stalls, steps that take more than {statistics.STALL:g} times the usual one: "
            f"{'; '.join(stalled)}"
        )
    if speed and speed.disagree and speed.mean:
        found.append(
            f"usual step and mean disagree: {verdict.name} / unpatched is "
            f"{speed.value:.2f} for the usual step and "
            f"{speed.mean.value:.2f} for the mean of all, which is what the command takes"
        )
    fixed = experiment.options.get("repeats") != repeats.AUTO
    foreseeable = speed and fixed and not crowded and not speed.decided
    needed = speed.repeats_needed() if speed and foreseeable else None
    if needed is not None and needed > made:
        found.append(
            f"a difference in speed of this size would take {needed} repeats, or more steps, to "
            "decide"
        )
    if timing.break_even is not None and verdict.speed_word == "faster":
        later = timing.startup[1] - timing.startup[0]
        found.append(
            f"{verdict.name}, the first step ends {later:.1f} s later: made up for at step "
            f"{timing.break_even}"
        )
    return found


def step_times(runs: Sequence[Run], warmup: int) -> Tuple[np.ndarray, ...]:
    """The step times that were judged, one array per run (for a report's histogram)."""
    return tuple(t[np.isfinite(t)] for t in (run.step_seconds()[warmup:] for run in runs))
