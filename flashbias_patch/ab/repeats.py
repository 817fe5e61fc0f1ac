"""The number of runs of each side: fixed, or, with `--repeats auto`, as many as make the interval
of the time per step narrow enough; in both cases no more than `--max-time` allows."""

from __future__ import annotations

import math
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple

from . import intervals, sequential, sides
from .records import Experiment
from .sequential import MOST
from .statistics import LEVEL, MEAN_LEVEL, Ratio, quantile

AUTO = "auto"
HALF_WIDTH = 2.0  # percent: the default of --half-width
FIXED_NUMBER, NARROW, TIME_IS_UP, MOST_MADE, RUN_FAILED, NO_INTERVAL = (
    "number",
    "narrow",
    "time",
    "most",
    "failed",
    "no interval",
)  # why no further pair was run
NUDGED_SHARE = 0.5  # of a pair's time, kept for the nudged A that follows the pairs


def half_width(ratio: Ratio) -> float:
    """Half of the interval's width, in percent of the ratio; inf without an interval."""
    if ratio.low is None or ratio.high is None:
        return math.inf
    return 100 * (math.sqrt(ratio.high / ratio.low) - 1)


def deciding(speed: Optional[Ratio]) -> Optional[Ratio]:
    """The ratio that decides on speed: of the mean where it disagrees with the usual step."""
    return speed.mean if speed is not None and speed.disagree else speed


def levels(options: Mapping[str, Any], repeats: int, comparisons: int = 1) -> Tuple[float, float]:
    """Levels, in percent, of the intervals of the usual step and of the mean after so many
    repeats. `comparisons`: how many share the chance of a false alarm (sides.holm)."""
    usual, mean = (100 - (100 - level) / comparisons for level in (LEVEL, MEAN_LEVEL))
    if options.get("repeats") != AUTO:
        return usual, mean
    return sequential.level_at(repeats, usual), sequential.level_at(repeats, mean)


def foreseen(now: float, repeats: int, wanted: float) -> Optional[int]:
    """Repeats at which the interval will be narrow enough if runs go on to differ as they do now.
    None: more than MOST.

    `now`: its half-width after `repeats`.
    """

    def relative(n: int) -> float:
        return quantile(2 * n - 2, sequential.level_at(n, LEVEL)) / math.sqrt(n)

    for n in range(repeats, MOST + 1):
        if now * relative(n) / relative(repeats) <= wanted:
            return n
    return None


class Plan:
    """Iterates over the sides to run, in order. `stopped`, after that: why no more are.

    `judge`: the verdict on an experiment; `progress` receives ("look", {...}) after each pair of
    `--repeats auto`, see `look_text`.
    """

    def __init__(
        self,
        experiment: Experiment,
        options: Any,
        judge: Callable[[Experiment], Any],
        progress: Callable[[str, Dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.experiment, self.options, self.judge = experiment, options, judge
        self.progress, self.clock = progress, clock
        self.with_a = options.against is None
        self.sides = "A" * self.with_a + sides.labels(options._asdict())
        self.stopped = ""
        self.took: List[float] = []  # seconds of each pair
        self.begin = clock()

    def __iter__(self) -> Iterator[str]:
        while not self.stopped:
            begun = self.clock()
            yield from self.sides if len(self.took) % 2 == 0 else self.sides[::-1]
            self.took.append(self.clock() - begun)
            self.stopped = self._why_stop()
        if self.with_a and self.options.noise_run and self.options.repeats == 1:
            yield "A"  # A against A needs two of them

    def _why_stop(self) -> str:
        made = len(self.took)
        if self.options.repeats != AUTO:
            done = FIXED_NUMBER if made >= self.options.repeats else ""
        else:
            done = self._look(made)
        return done or (TIME_IS_UP if self.left() < self._next_takes() else "")

    def _look(self, made: int) -> str:
        """Return the reason to stop after `made` repeats; empty if more are needed."""
        if any(run.status != "ok" for run in self.experiment.runs):
            return RUN_FAILED
        ratios = widest_first(self.judge(self.experiment))
        if not ratios or ratios[0][1].low is None:
            return NO_INTERVAL
        if made < sequential.FIRST:
            return ""
        name, widest = ratios[0]
        width, wanted = half_width(widest), self.options.half_width
        more = foreseen(width, made, wanted)
        look = {
            "repeats": made,
            "name": name,
            "ratio": widest.value,
            "low": widest.low,
            "high": widest.high,
            "half_width": width,
            "wanted": wanted,
            "more": None if more is None else more - made,
            "seconds": (MOST if more is None else more - made) * self.took[-1],
            "left": self.left(),
        }
        self.progress("look", look)
        return NARROW if width <= wanted else MOST_MADE if made >= MOST else ""

    def left(self) -> float:
        """Seconds until `--max-time`; inf without it."""
        minutes = self.options.max_time
        return math.inf if minutes is None else 60 * minutes - (self.clock() - self.begin)

    def _next_takes(self) -> float:
        """Seconds of a further pair, and of the nudged A."""
        return max(self.took) * (
            1 + (NUDGED_SHARE if self.with_a and self.options.noise_run else 0.0)
        )


def widest_first(verdict: Any) -> List[Tuple[str, Ratio]]:
    """The ratios that decide on speed, of every side beside A, each with the side's name: the
    widest interval first. Empty where a side has none."""
    found = [(each.name, deciding(each.speed)) for each in verdict.every]
    known = [(name, ratio) for name, ratio in found if ratio is not None]
    known.sort(key=lambda side: half_width(side[1]), reverse=True)
    return known if len(known) == len(found) else []


def look_text(look: Mapping[str, Any]) -> str:
    """One line of progress."""
    wanted = f"wanted \u00b1{look['wanted']:g}%"
    if intervals.is_known(look["low"], look["high"]):
        ends = intervals.between(look["low"], look["high"])
        interval = f"interval {ends} (\u00b1{look['half_width']:.1f}%, {wanted})"
    else:
        interval = f"{intervals.UNKNOWN} the interval ({wanted})"
    said = (
        f"after {look['repeats']} repeats: {look['name']} / unpatched {look['ratio']:.3f}, "
        f"{interval}"
    )
    if look["half_width"] <= look["wanted"]:
        return f"{said}: narrow enough"
    if look["more"] is None:
        return f"{said}: cannot be reached with {MOST} repeats, if runs continue to differ so much"
    how = f"about {look['more']} more, {duration(look['seconds'])}"
    late = look["seconds"] > look["left"]
    return f"{said}: {how}" + (
        f"; --max-time leaves {duration(max(0.0, look['left']))}" if late else ""
    )


def duration(seconds: float) -> str:
    """About how long."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def notes(experiment: Experiment, speed: Optional[Ratio], made: int) -> List[str]:
    """Return a report's note on the number of repeats, and the reason for it."""
    options, why = experiment.options, experiment.stopped
    limit = f"the {options.get('max_time') or 0:g} min of --max-time were up"
    if options.get("repeats") != AUTO:
        wanted = options.get("repeats")
        return [f"{limit} after {made} of {wanted} repeats"] if why == TIME_IS_UP else []
    ratio = deciding(speed)
    known = (
        ratio is not None
        and ratio.low is not None
        and ratio.high is not None
        and intervals.is_known(ratio.low, ratio.high)
    )
    now = f"\u00b1{half_width(ratio):.1f}%" if ratio is not None and known else "unknown"
    wanted = f"\u00b1{options.get('half_width', HALF_WIDTH):g}%"
    count = "1 repeat" if made == 1 else f"{made} repeats"
    says = {
        NARROW: f"{count} made the interval as narrow as requested: {now}, wanted {wanted}",
        TIME_IS_UP: f"{limit} after {count}: the interval is {now}, wanted {wanted}",
        MOST_MADE: f"after {count}, the maximum, the interval is {now}, wanted "
        f"{wanted}: a quieter machine or more steps make it narrower",
        NO_INTERVAL: "no more repeats: the steps are too few for an interval",
    }
    held = "; the interval takes into account that it was evaluated after every repeat"
    return [says[why] + (held if why != NO_INTERVAL else "")] if why in says else []
