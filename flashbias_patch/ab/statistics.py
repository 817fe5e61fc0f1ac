"""What the runs say, and how surely: ratios with 95% confidence intervals, parity, a verdict. numpy only.

Speed. A run is summed up by the midmean (mean of the middle half) of its step times after warm-up. Runs
differ by more than their steps tell - clocks, neighbours, memory layout - so runs are the unit: the interval is
Student's t over repeats of the same side, with as few degrees of freedom as there are. Repeats may agree by
chance, so it is never narrower than what the steps' own scatter (a circular block bootstrap: step times are
correlated, and have outliers) and a typical spread between runs give together.

Parity. Two curves part where they differ by more than the command's own noise: three times the largest
difference seen so far between two unpatched runs (six times, where there is one pair only), and never less
than rounding. Patched runs do not widen the band: noise of their own is a difference. Where unpatched runs
agree bit for bit, one that was nudged in the last place shows how training amplifies rounding; without it, a
growth is assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .records import Experiment, Run

DRAWS = 4000
MIN_STEPS = 4  # fewer step times than this give no interval

# Spread of the log of a run's result between runs of the same thing, that no interval may be narrower than;
# how many degrees of freedom that guess is worth; and how many times it is assumed where no run was repeated.
TYPICAL_SPREAD = {"time": 0.005, "cuda": 0.001, "rss": 0.01}
GUESS_WORTH = 2
UNREPEATED = 4.0
SMALLEST_EFFECT = 0.005  # ratios closer to 1 than this are no difference in practice
BUSY = 1.5  # load average per CPU, at the start of a run, from which times decide nothing
SAME = 0.05  # an interval that reaches further than this from 1 does not say "no difference"
ENOUGH = 20  # more repeats than this are not proposed

NOISE_BAND = 3.0  # times the largest difference between runs of A
LONE_PAIR = 2.0  # times as much again where only one pair of runs shows it
LOOK_AHEAD = 2
PERSISTENCE = 3  # steps in a row out of the band: one spike is no parting
# Relative rounding tolerance at the first step, its growth a step, and where it ends.
ROUNDING = {"loss": (1e-4, 1.3, 0.02), "gradient norm": (1e-3, 1.3, 0.10)}
HALF_ROUNDING = 20.0  # times as much under automatic mixed precision


class Ratio(NamedTuple):
    """B over A: the estimate and its 95% interval (None: not enough data for one)."""

    value: float
    low: Optional[float]
    high: Optional[float]
    a: float  # seconds a step or bytes
    b: float
    repeats: int  # repeats of a side that the spread between runs was estimated from; 0: assumed
    spread: Optional[float] = None  # of the log of a run's result between repeats; None: no repeat

    @property
    def decided(self) -> int:
        """+1: B needs more, -1: B needs less, 0: neither shown."""
        if self.low is not None and self.low > 1 and self.value > 1 + SMALLEST_EFFECT:
            return 1
        if self.high is not None and self.high < 1 and self.value < 1 / (1 + SMALLEST_EFFECT):
            return -1
        return 0

    def repeats_needed(self) -> Optional[int]:
        """Runs of each side that would decide a difference as large as this one; None: not foreseeable."""
        effect = abs(math.log(self.value))
        if not self.spread or effect <= SMALLEST_EFFECT:
            return None
        for n in range(2, ENOUGH + 1):
            if student_t(2 * n - 2) * self.spread * math.sqrt(2 / n) < effect:
                return n
        return None


@dataclass
class Parity:
    """Two families of curves compared. `word`: identical, within rounding, within noise, differs, not
    compared.
    """

    quantity: str
    word: str
    first_step: Optional[int] = None  # where they part
    largest: float = 0.0  # largest relative difference between A and B
    largest_at: Optional[int] = None
    noise: Optional[float] = (
        None  # largest relative difference between runs of A; None: one run
    )
    steps: int = 0
    difference: np.ndarray = field(default_factory=lambda: np.zeros(0))
    band: np.ndarray = field(default_factory=lambda: np.zeros(0))
    drift: Optional[float] = None  # as noise, of a run that was nudged in the last place
    redrawn: bool = False  # and that drew other random numbers


@dataclass
class Verdict:
    """What a comparison came to; the words are what a report shows and --fail-if asks for."""

    speed: Optional[Ratio]
    memory: Optional[Ratio]
    memory_kind: str
    clock: str
    parities: List[Parity]
    problems: List[str]
    notes: List[str]
    busy: bool = False  # other work slowed the runs, unevenly: no verdict on speed
    inference: bool = False  # no training steps: detections are compared instead

    @property
    def speed_word(self) -> str:
        word = _word(self.speed, "slower", "faster")
        return "undecided" if self.busy and word in ("slower", "faster") else word

    @property
    def memory_word(self) -> str:
        return _word(self.memory, "more memory", "less memory")

    @property
    def parity_word(self) -> str:
        order = ("differs", "within noise", "within rounding", "identical")
        words = [p.word for p in self.parities]
        return next((word for word in order if word in words), "not compared")

    @property
    def first_step(self) -> Optional[int]:
        return min((p.first_step for p in self.parities if p.first_step is not None), default=None)

    def fails(self, conditions: Sequence[str]) -> List[str]:
        """Which of `slower`, `differs`, `more-memory` came true."""
        true = {
            "slower": self.speed_word == "slower",
            "differs": self.parity_word == "differs",
            "more-memory": self.memory_word == "more memory",
        }
        return [condition for condition in conditions if true[condition]]

    @property
    def comparable(self) -> bool:
        return self.speed is not None or any(p.word != "not compared" for p in self.parities)


def judge(experiment: Experiment, warmup: Optional[int] = None, seed: int = 0) -> Verdict:
    """The verdict on what `flashbias ab` recorded. Runs that failed count for what they recorded, where their
    side has no other: a run cut short would shorten all that is compared.
    """
    a, b = (_whole(experiment.side(label)) for label in "AB")
    problems = [
        f"{run.name} ({'unpatched' if run.label == 'A' else 'patched'}): {run.status}: {run.message}"
        for run in experiment.runs
        if run.status != "ok"
    ]
    notes = [f"{run.name}: a process was killed; what it had recorded is used" for run in a + b if run.killed]
    inference = bool(experiment.options.get("inference"))
    for label, runs in (("A (unpatched)", a), ("B (patched)", b)):
        if not runs and not inference:
            problems.append(f"{label} recorded no step, so there is nothing to compare")
    if experiment.patched() and not any(sum(r.calls().values()) for r in experiment.patched()):
        notes.append(
            "the patched runs made no attention call through flashbias_patch: is anything patched? "
            "`flashbias doctor --repo DIR` tells"
        )
    if not a or not b:
        return Verdict(None, None, "", "", [], problems, notes, inference=inference)

    warm = int(experiment.options.get("warmup", 0)) if warmup is None else warmup
    fewest = min(run.steps for run in a + b)
    if fewest - warm < MIN_STEPS:
        fitting = max(1, min(warm, fewest - MIN_STEPS))
        notes.append(f"{fewest} steps are too few for a warm-up of {warm}: {fitting} left out instead")
        warm = fitting
    speed = compare_times([r.step_seconds()[warm:] for r in a], [r.step_seconds()[warm:] for r in b], seed)
    kinds = {run.memory_kind() for run in a + b}
    kind = "cuda" if kinds == {"cuda"} else "rss"
    memory = compare_peaks([r.peak_memory() for r in a], [r.peak_memory() for r in b], kind)
    half = any(run.half for run in a + b)
    plain, nudged = [r for r in a if not r.nudged] or a, [r for r in a if r.nudged]
    redrawn = any(run.redrawn for run in nudged)
    if redrawn:
        notes.append(
            "patched, other random numbers are drawn (by dropout, say): training is held against one more A that draws "
            "others too. Without dropout it can be held against rounding"
        )
    parities = [
        parity(
            quantity,
            [r.series(key) for r in plain],
            [r.series(key) for r in b],
            [r.series(key) for r in nudged],
            half,
            redrawn,
        )
        for quantity, key in (("loss", "loss"), ("gradient norm", "grad_norm"))
    ]
    if speed and not speed.repeats:
        assumed = UNREPEATED * TYPICAL_SPREAD["time"]
        notes.append(f"no run was repeated: a spread of {assumed:.1%} between runs is assumed")
    load, cpus = max(run.load for run in a + b), int(experiment.host.get("cpus") or 1)
    busy = load > BUSY * cpus
    if busy:
        notes.append(
            f"other work kept the machine busy (load {load:.1f} on {cpus} CPUs): no verdict on speed"
        )
    needed = speed.repeats_needed() if speed and not busy and not speed.decided else None
    if needed is not None and needed > min(len(a), len(b)):
        notes.append(f"a difference in speed of this size would take {needed} repeats, or more steps, to decide")
    clocks = {run.clock for run in a + b}
    clock = clocks.pop() if len(clocks) == 1 else "wall clock"
    return Verdict(speed, memory, kind, clock, parities, problems, notes, busy=busy)


def _whole(runs: List[Run]) -> List[Run]:
    """Those that came to their end, where a plain one did; else all."""
    done = [run for run in runs if run.status == "ok"]
    return done if any(not run.nudged for run in done) else runs


def compare_times(a: Sequence[np.ndarray], b: Sequence[np.ndarray], seed: int = 0) -> Optional[Ratio]:
    """Ratio B/A of step times, from one array of seconds a run; None if a side has no step time."""
    sides = [[s[np.isfinite(s) & (s > 0)] for s in side] for side in (a, b)]
    sides = [[s for s in side if s.size] for side in sides]
    if not sides[0] or not sides[1]:
        return None
    rng = np.random.default_rng(seed)
    logs = [np.array([np.log(midmean(s)) for s in side]) for side in sides]
    if min(s.size for side in sides for s in side) < MIN_STEPS:
        return _ratio(logs, None)
    within = [np.mean([_block_bootstrap(s, rng) for s in side], axis=0) for side in sides]
    return _ratio(logs, np.percentile(within[1] - within[0], [2.5, 97.5]), TYPICAL_SPREAD["time"])


def compare_peaks(
    a: Sequence[float], b: Sequence[float], kind: str = "cuda"
) -> Optional[Ratio]:
    """Ratio B/A of peak memory, one number of bytes a run; `kind` (cuda, rss) says how much it varies."""
    logs = [np.log([x for x in side if np.isfinite(x) and x > 0]) for side in (a, b)]
    if not logs[0].size or not logs[1].size:
        return None
    return _ratio(logs, np.zeros(2), TYPICAL_SPREAD[kind])


def midmean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half along `axis`: as deaf to outliers as needed, and steadier than a median."""
    n = values.shape[axis]
    cut = n // 4
    ordered = np.sort(values, axis=axis)
    return np.take(ordered, np.arange(cut, n - cut), axis=axis).mean(axis=axis)


def _block_bootstrap(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(DRAWS,) deviations of the log midmean under resampling of blocks of consecutive steps."""
    n = values.size
    length = max(1, int(round(np.sqrt(n))))
    blocks = -(-n // length)
    starts = rng.integers(0, n, size=(DRAWS, blocks, 1))
    index = ((starts + np.arange(length)) % n).reshape(DRAWS, -1)[:, :n]
    return np.log(midmean(values[index])) - np.log(midmean(values))


def student_t(freedom: int) -> float:
    """The 97.5% quantile of Student's t; series of Abramowitz and Stegun 26.7.5, within 0.4% from 4 on."""
    few = {1: 12.7062, 2: 4.3027, 3: 3.1824}
    return few.get(freedom) or 1.95996 + 2.37227 / freedom + 2.8225 / freedom**2 + 2.5558 / freedom**3


def _ratio(logs: List[np.ndarray], within: Optional[np.ndarray], typical: float = 0.0) -> Ratio:
    """The ratio and its interval, from the log of each run's result by side.

    `within`: ends of the 95% interval of log B/A as far as the steps alone explain it; None: no interval.
    `typical`: the spread between runs.
    """
    a, b = (float(np.exp(x.mean())) for x in logs)
    freedom = sum(x.size - 1 for x in logs)
    spread = math.sqrt(sum(float(((x - x.mean()) ** 2).sum()) for x in logs) / freedom) if freedom else None
    if within is None:
        return Ratio(b / a, None, None, a, b, freedom, spread)
    root = math.sqrt(sum(1 / x.size for x in logs))
    guess = student_t(freedom + GUESS_WORTH) * typical * (1.0 if freedom else UNREPEATED) * root
    seen = student_t(freedom) * spread * root if spread is not None else 0.0
    below, above = (max(math.hypot(float(end), guess), seen) for end in within)
    return Ratio(b / a, b / a * math.exp(-below), b / a * math.exp(above), a, b, freedom, spread)


def parity(
    quantity: str,
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    nudged: Sequence[np.ndarray] = (),
    half: bool = False,
    redrawn: bool = False,
) -> Parity:
    """Do the curves of B follow those of A, as far as those of A follow each other? One (steps,) array a run.

    `nudged`: curves of A after a change of its parameters by a few units in the last place; `redrawn`: and of what it
    draws at random.
    """
    steps = min((len(x) for x in (*a, *b, *nudged)), default=0)
    curves_a, curves_b, curves_n = (np.array([x[:steps] for x in side]) for side in (a, b, nudged))
    if not steps or not np.isfinite(curves_a).any() or not np.isfinite(curves_b).any():
        return Parity(quantity, "not compared", steps=steps)
    scale = _scale(curves_a)
    pairs = [
        _relative(curves_a[i], curves_a[j], scale) for i in range(len(curves_a)) for j in range(i)
    ]
    noise = np.max(pairs, axis=0) if pairs else np.zeros(steps)
    drift = (
        np.max([_relative(x, curves_a[0], scale) for x in curves_n], axis=0) if nudged else np.zeros(steps)
    )
    difference = _relative(_mean(curves_a), _mean(curves_b), scale)
    base, growth, most = ROUNDING[quantity]
    base *= HALF_ROUNDING if half else 1.0
    known_drift = bool(noise.any() or drift.any())  # then there is no need to guess how rounding grows
    rounding = (
        np.full(steps, base)
        if known_drift
        else np.minimum(base * growth ** np.arange(steps), max(most, base))
    )
    finite_noise = np.nan_to_num(np.maximum(noise, drift), posinf=1e9)
    ahead = np.array([finite_noise[: k + 1 + LOOK_AHEAD].max() for k in range(steps)])
    band = np.maximum(rounding, NOISE_BAND * (LONE_PAIR if len(pairs) + len(curves_n) == 1 else 1.0) * ahead)
    first = _first_run(difference > band, min(PERSISTENCE, steps))
    known = difference[np.isfinite(difference)]
    at = int(np.argmax(np.where(np.isfinite(difference), difference, np.inf)))
    if first is not None:
        word = "differs"
    elif not difference.any():
        word = "identical"
    else:
        word = "within noise" if noise.any() or redrawn else "within rounding"
    return Parity(
        quantity,
        word,
        first,
        float(known.max()) if known.size else float("inf"),
        at,
        float(noise.max()) if pairs else None,
        steps,
        difference,
        band,
        float(drift.max()) if nudged else None,
        redrawn,
    )


def _scale(curves: np.ndarray) -> np.ndarray:
    """(steps,) magnitude to which differences are relative; a loss near zero does not blow them up."""
    magnitude = np.abs(_mean(curves))
    usual = np.median(magnitude[np.isfinite(magnitude)]) if np.isfinite(magnitude).any() else 0.0
    return np.maximum(np.where(np.isfinite(magnitude), magnitude, usual), max(1e-2 * usual, 1e-30))


def _mean(curves: np.ndarray) -> np.ndarray:
    return curves.mean(axis=0)


def _relative(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Relative difference a step; zero where both are equally not finite, infinite where one of them is."""
    both = ~np.isfinite(x) & ~np.isfinite(y)
    one = np.isfinite(x) ^ np.isfinite(y)
    with np.errstate(invalid="ignore"):
        plain = np.abs(x - y) / scale
    return np.where(both, 0.0, np.where(one, np.inf, plain))


def _first_run(flags: np.ndarray, length: int) -> Optional[int]:
    """Start of the first `length` true values in a row."""
    count = 0
    for i, flag in enumerate(flags):
        count = count + 1 if flag else 0
        if count == length:
            return i - length + 1
    return None


def _word(ratio: Optional[Ratio], more: str, less: str) -> str:
    if ratio is None:
        return "not compared"
    if ratio.decided:
        return more if ratio.decided > 0 else less
    if ratio.low is None or ratio.high is None or max(ratio.high, 1 / ratio.low) > 1 + SAME:
        return "undecided"
    return "no difference"


def step_times(runs: Sequence[Run], warmup: int) -> Tuple[np.ndarray, ...]:
    """The step times that were judged, one array a run (for a report's histogram)."""
    return tuple(t[np.isfinite(t)] for t in (run.step_seconds()[warmup:] for run in runs))
