"""Ratios of B to A with 95% confidence intervals: step times and peak memory.

A run is summed up twice: by the midmean (mean of the middle half) of its step times after warm-up,
which tells the usual step, and by their mean, which tells what the command takes: a patch that
stalls now and then has the midmean of one that does not. Runs differ by more than their steps tell
- clocks, neighbours, memory layout - so runs are the
unit: the interval is Student's t over repeats of the same side, with as few degrees of freedom as
there are. Repeats may agree by chance, so it is never narrower than what the steps' own scatter (a
circular block bootstrap: step times are correlated, and have outliers) and a typical spread between
runs give together.
"""

from __future__ import annotations

import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import stats

DRAWS = 4000
MIN_STEPS = 4  # fewer step times than this give no interval

# Spread of the log of a run's result between runs of the same thing, that no interval may be
# narrower than; how many degrees of freedom that guess is worth; and how many times it is assumed
# where no run was repeated.
TYPICAL_SPREAD = {"time": 0.005, "cuda": 0.001, "rss": 0.01}
CROWDED_SPREAD = 0.1  # of times, where other work kept the machine busy
GUESS_WORTH = 2
UNREPEATED = 4.0
SMALLEST_EFFECT = 0.005  # ratios closer to 1 than this are no difference in practice
SAME = 0.05  # an interval that reaches further than this from 1 does not say "no difference"
ENOUGH = 20  # more repeats than this are not proposed
DISAGREE = 0.15  # mean and midmean tell different things where they are further apart than this
STALL = 2.0  # a step that takes this many times the usual one
LEVEL = 95.0  # percent, of the interval of the usual step and of memory
MEAN_LEVEL = (
    99.0  # percent: means decide by a wider interval, being a second test of the same times
)


class Ratio(NamedTuple):
    """B over A: the estimate and its 95% interval (None: not enough data for one)."""

    value: float
    low: Optional[float]
    high: Optional[float]
    a: float  # seconds per step or bytes
    b: float
    repeats: int  # repeats of a side that the spread between runs was estimated from; 0: assumed
    spread: Optional[float] = None  # of the log of a run's result between repeats; None: no repeat
    mean: Optional[Ratio] = (
        None  # of times: the same of the mean instead of the midmean, with a 99% interval
    )
    level: float = LEVEL  # of the interval, percent

    @property
    def excludes_one(self) -> int:
        """+1: the interval lies above 1, -1: below, 0: it does not exclude 1, or the effect is too
        small to matter."""
        if self.low is not None and self.low > 1 and self.value > 1 + SMALLEST_EFFECT:
            return 1
        if self.high is not None and self.high < 1 and self.value < 1 / (1 + SMALLEST_EFFECT):
            return -1
        return 0

    @property
    def decided(self) -> int:
        """+1: B needs more, -1: B needs less, 0: neither shown. Where mean and midmean disagree the
        mean decides."""
        usual = self.excludes_one
        if self.mean is None:
            return usual
        if self.mean.excludes_one:
            return self.mean.excludes_one
        return 0 if self.disagree else usual

    @property
    def disagree(self) -> bool:
        """Do mean and midmean tell different things?"""
        if self.mean is None:
            return False
        usual, mean = math.log(self.value), math.log(self.mean.value)
        return abs(usual - mean) > math.log(1 + DISAGREE) and (
            usual * mean < 0 or abs(mean) > 2 * abs(usual)
        )

    def word(self, more: str, less: str) -> str:
        """`more`, `less`, "no difference" or "undecided"."""
        if self.decided:
            return more if self.decided > 0 else less
        if (
            self.low is None
            or self.high is None
            or max(self.high, 1 / self.low) > 1 + SAME
            or self.disagree
        ):
            return "undecided"
        return "no difference"

    def repeats_needed(self) -> Optional[int]:
        """Runs of each side that would decide a difference as large as this one; None: not
        foreseeable."""
        effect = abs(math.log(self.value))
        if not self.spread or effect <= SMALLEST_EFFECT:
            return None
        for n in range(2, ENOUGH + 1):
            if quantile(2 * n - 2) * self.spread * math.sqrt(2 / n) < effect:
                return n
        return None


class Stalls(NamedTuple):
    """Steps that took more than STALL times the usual step of their run."""

    slow: int
    steps: int
    share: float  # of the time of all steps


def compare_times(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    seed: int = 0,
    spread: float = TYPICAL_SPREAD["time"],
    levels: Tuple[float, float] = (LEVEL, MEAN_LEVEL),
) -> Optional[Ratio]:
    """Ratio B/A of step times, from one array of seconds per run; None if a side has no step
    time. `levels`: of the intervals of the usual step and of the mean, percent."""
    sides = [[s[np.isfinite(s) & (s > 0)] for s in side] for side in (a, b)]
    sides = [[s for s in side if s.size] for side in sides]
    if not sides[0] or not sides[1]:
        return None
    rng = np.random.default_rng(seed)
    usual, mean = (
        [np.array([np.log(of(s)) for s in side]) for side in sides] for of in (midmean, np.mean)
    )
    if min(s.size for side in sides for s in side) < MIN_STEPS:
        return _ratio(usual, None)._replace(mean=_ratio(mean, None))
    drawn = [[block_bootstrap(s, rng) for s in side] for side in sides]
    within = [np.mean([of_usual for of_usual, _ in side], axis=0) for side in drawn]
    of_means = [np.mean([of_mean for _, of_mean in side], axis=0) for side in drawn]
    ends, ends_of_mean = (
        np.percentile(found[1] - found[0], [50 - level / 2, 50 + level / 2])
        for found, level in zip((within, of_means), levels)
    )
    return _ratio(usual, ends, spread, levels[0])._replace(
        mean=_ratio(mean, ends_of_mean, spread, levels[1])
    )


def stalls(times: Sequence[np.ndarray]) -> Stalls:
    """Of the step times of one side, one array of seconds per run."""
    runs = [s[np.isfinite(s) & (s > 0)] for s in times]
    runs = [s for s in runs if s.size]
    slow = [s > STALL * midmean(s) for s in runs]
    whole = sum(float(s.sum()) for s in runs)
    share = sum(float(s[flags].sum()) for s, flags in zip(runs, slow)) / whole if whole else 0.0
    return Stalls(int(sum(flags.sum() for flags in slow)), sum(s.size for s in runs), share)


def compare_peaks(
    a: Sequence[float], b: Sequence[float], kind: str = "cuda", level: float = LEVEL
) -> Optional[Ratio]:
    """Ratio B/A of peak memory, one number of bytes a run; `kind` (cuda, rss) says how much it
    varies. `level`: of the interval, percent."""
    logs = [np.log([x for x in side if np.isfinite(x) and x > 0]) for side in (a, b)]
    if not logs[0].size or not logs[1].size:
        return None
    return _ratio(logs, np.zeros(2), TYPICAL_SPREAD[kind], level)


def midmean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half along `axis`: hardly moved by outliers, and steadier than a
    median."""
    mean: np.ndarray = stats.trim_mean(values, 0.25, axis=axis)
    return mean


def block_bootstrap(values: np.ndarray, rng: np.random.Generator) -> Tuple[np.ndarray, np.ndarray]:
    """(DRAWS,) deviations of the log midmean, and of the log mean, under resampling of blocks of
    consecutive steps."""
    n = values.size
    length = max(1, int(round(np.sqrt(n))))
    blocks = -(-n // length)
    starts = rng.integers(0, n, size=(DRAWS, blocks, 1))
    index = ((starts + np.arange(length)) % n).reshape(DRAWS, -1)[:, :n]
    drawn = values[index]
    return np.log(midmean(drawn)) - np.log(midmean(values)), np.log(drawn.mean(axis=1)) - np.log(
        values.mean()
    )


def quantile(freedom: int, level: float = LEVEL) -> float:
    """Student's t that a two-sided interval of `level` percent reaches to."""
    return float(stats.t.ppf(0.5 + level / 200, freedom))


def _ratio(
    logs: List[np.ndarray], within: Optional[np.ndarray], typical: float = 0.0, level: float = LEVEL
) -> Ratio:
    """The ratio and its interval, from the log of each run's result by side.

    `within`: ends of the interval of log B/A as far as the steps alone explain it; None: no
    interval.
    `typical`: the spread between runs.
    """
    a, b = (float(np.exp(x.mean())) for x in logs)
    freedom = sum(x.size - 1 for x in logs)
    spread = (
        math.sqrt(sum(float(((x - x.mean()) ** 2).sum()) for x in logs) / freedom)
        if freedom
        else None
    )
    if within is None:
        return Ratio(b / a, None, None, a, b, freedom, spread)
    root = math.sqrt(sum(1 / x.size for x in logs))
    if not freedom:
        typical = max(typical, UNREPEATED * min(typical, TYPICAL_SPREAD["rss"]))
    guess = quantile(freedom + GUESS_WORTH, level) * typical * root
    seen = quantile(freedom, level) * spread * root if spread is not None else 0.0
    below, above = (max(math.hypot(float(end), guess), seen) for end in within)
    ends = b / a * math.exp(-below), b / a * math.exp(above)
    return Ratio(b / a, *ends, a, b, freedom, spread, level=level)


def _word(ratio: Optional[Ratio], more: str, less: str) -> str:
    return "not compared" if ratio is None else ratio.word(more, less)
