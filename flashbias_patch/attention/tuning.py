"""Find faster tile shapes for a class of call on this GPU, within a given time.

For each kernel: tiles and warps around the shipped shape first, then pipeline stages and register
limits of the best two; the fastest few once more, interleaved, the slower half dropped each time;
at last the fastest against the shipped one, in turns. Every shape must give what the shipped one
gives, on the calls themselves and on a small call of odd lengths. Launches are forced by
tiles.forced, so that they take the way that every launch takes.

The clock is read before each step, and a step compiles at most one shape: the time given is
exceeded by at most that.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import statistics
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import selfcheck
from .inputs import AttentionInputs
from .kernels import tiles
from .kernels.tiles import KERNELS, Config, Key
from .recovery import errors
from .tuning_trial import Trial, class_of, cuda_times, distance, small_call

log = logging.getLogger("flashbias_patch")

SECONDS = 60.0
# a shape that is faster by less than this is noise, or not worth a difference between machines
MARGIN = 0.03
SEARCH = 0.7  # of a kernel's time; the rest is for the finalists
SLOW = 1.3  # dropped after one run, if that took so many times the best one's
FINALISTS = 4
TURNS = 5  # of shipped against tuned
TIME_IS_UP = "the time was up"
# Two correct tile shapes differ by less than this, because they order sums differently. A wrong one
# differs by far more.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-4}

Timer = Callable[[Callable[[], Any], int], List[float]]
Progress = Callable[[float, float, str], None]


class Row(NamedTuple):
    """The result for one kernel. `tuned` is None where the shipped shape stays; `ratio` is tuned /
    shipped time."""

    kernel: str
    key: Key
    shipped: Optional[Config]
    tuned: Optional[Config]
    ratio: float
    why: str
    tried: int
    skipped: Dict[Config, str]


class Report(NamedTuple):
    call: str
    rows: List[Row]
    seconds: float


def tune(
    calls: Union[AttentionInputs, Sequence[AttentionInputs]], *, seconds: float = SECONDS,
    kernels: Sequence[str] = KERNELS, progress: Optional[Progress] = None, remember: bool = True,
    timer: Optional[Timer] = None, clock: Callable[[], float] = time.monotonic,
) -> Report:  # fmt: skip
    """Tune `kernels` for the class that `calls` (one, or several that differ in batch, heads and
    lengths) are of.

    The first call is searched on; on the others that are long enough to tell (LEAST scores), a new
    shape must not be slower than the shipped one by MARGIN. Winners are remembered
    (tiles.remember) as they are found, unless `remember` is off. progress(elapsed, seconds, what)
    is called before each step. Random state, grad mode and autocast stay as they are; of `calls`
    only values are read. Raises what a lost CUDA context raises; any other failure of a shape only
    leaves it out.
    """
    calls = [calls] if isinstance(calls, AttentionInputs) else list(calls)
    if len({class_of(call) for call in calls}) != 1:
        raise ValueError(
            f"calls: expected one class of call, got {[call.call_class() for call in calls]}"
        )
    began = clock()
    device = calls[0].q.device
    rows: List[Row] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(selfcheck.undisturbed(device))
        stack.enter_context(selfcheck.own_random_numbers(device))
        stack.enter_context(torch.no_grad())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        trials = [Trial(call) for call in [*calls, small_call(calls[0])]]
        for place, kernel in enumerate(kernels):
            now = clock()
            share = (began + seconds - now) / (len(kernels) - place)
            report = functools.partial(_say, progress, clock, began, seconds)
            key = class_of(calls[0], kernel)
            row = _Search(kernel, key, trials, timer or cuda_times, clock, now, share, report).run()
            if row.tuned is not None and remember:
                tiles.remember({row.key: row.tuned})
            rows.append(row)
    return Report(calls[0].call_class(), rows, clock() - began)


def _say(
    progress: Optional[Progress],
    clock: Callable[[], float],
    began: float,
    seconds: float,
    what: str,
) -> None:
    if progress is not None:
        progress(min(clock() - began, seconds), seconds, what)


def shapes_near(key: Key, config: Config) -> List[Config]:
    """Shapes within a factor of two of `config`, the nearest first."""
    sizes = (16, 32, 64, 128)
    warps = (
        (4, 8) if key.half else (4,)
    )  # eight and float32: an illegal access, which costs the process (tiles.py)
    found = [
        config._replace(block_m=m, block_n=n, warps=w)
        for m in sizes if m <= 2 * config.block_m <= 4 * m
        for n in sizes if n <= 2 * config.block_n <= 4 * n
        for w in warps
    ]  # fmt: skip

    def away(other: Config) -> float:
        ratios = (
            other.block_m / config.block_m,
            other.block_n / config.block_n,
            other.warps / config.warps,
        )
        return sum(abs(math.log2(ratio)) for ratio in ratios)

    return sorted(found, key=away)


def pipelines(config: Config) -> List[Config]:
    """`config` with other numbers of stages and registers, the nearest first."""
    found = [config._replace(stages=s, registers=r) for s in (1, 2, 3, 4) for r in (0, 128, 168)]
    return sorted(
        found, key=lambda c: abs(c.stages - config.stages) + (c.registers != config.registers)
    )


def words(config: Config) -> str:
    """`64 x 128, 4 warps, 3 stages`, and a limit on registers where there is one."""
    limit = f", {config.registers} registers" if config.registers else ""
    return (
        f"{config.block_m} x {config.block_n}, {config.warps} warps, {config.stages} stages{limit}"
    )


class _TimeIsUp(Exception):
    """Raised before a step when the time is used up."""


class _Search:
    """One kernel's search: `share` seconds from `now` on. Its trials end with the small one."""

    def __init__(
        self, kernel: str, key: Key, trials: List[Trial], timer: Timer, clock: Callable[[], float],
        now: float,
        share: float, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.kernel, self.key, self.trials, self.timer, self.clock, self.say = (
            kernel,
            key,
            trials,
            timer,
            clock,
            say,
        )
        self.now, self.share = now, share
        self.until, self.cut = now + share, False
        self.times: Dict[Config, float] = {}
        self.skipped: Dict[Config, str] = {}
        self.expected: Dict[int, List[Tensor]] = {}  # the shipped shape's results, by call
        self.tolerance = TOLERANCE[trials[0].problem.q.dtype]

    def run(self) -> Row:
        shipped, tuned, ratio, why = None, None, 1.0, TIME_IS_UP
        try:
            shipped = self._shipped()
            if shipped is None:
                why = "no shipped shape runs here"
            else:
                tuned, ratio = self._best(shipped)
                if tuned is None:
                    why = f"nothing is {MARGIN:.0%} faster" + (
                        ", of the shapes that there was time for" if self.cut else ""
                    )
        except _TimeIsUp:
            pass
        except Exception as error:
            if not errors.survivable(error):
                raise
            why = errors.first_line(error)
        tried = len(self.times) + len(self.skipped)
        return Row(
            self.kernel, self.key, shipped, tuned, ratio, "" if tuned else why, tried, self.skipped
        )

    def _step(self, what: str) -> None:
        if self.clock() >= self.until:
            raise _TimeIsUp
        self.say(f"{self.kernel} {what}")

    @contextlib.contextmanager
    def _phase(self, share: float) -> Iterator[None]:
        """Context manager: limit a phase to the time up to that share; its results are kept."""
        self.until = self.now + share * self.share
        try:
            yield
        except _TimeIsUp:
            self.cut = True
        self.until = self.now + self.share

    def _shipped(self) -> Optional[Config]:
        """The first of the shipped shapes that runs, its results and time."""
        for trial in self.trials:
            self._step("preparing")
            trial.prepare(self.kernel)
        for config in tiles.shipped(self.key):
            try:
                for place, trial in enumerate(self.trials):
                    self._step(words(config))
                    with tiles.forced(self.key, config):
                        self.expected[place] = trial.results(self.kernel)
                with tiles.forced(self.key, config):
                    self.times[config] = self._median(0, 10)
                return config
            except _TimeIsUp:
                raise
            except Exception as error:
                self._leave_out(config, error)
        return None

    def _best(self, shipped: Config) -> Tuple[Optional[Config], float]:
        with self._phase(SEARCH):
            for config in shapes_near(self.key, shipped):
                self._try(config)
            leaders = sorted(self.times, key=self.times.__getitem__)[:2]
            for pair in zip(*map(pipelines, leaders)):
                for config in pair:
                    self._try(config)
        faster = [config for config in self.times if self.times[config] < self.times[shipped]]
        field = sorted(faster, key=self.times.__getitem__)[:FINALISTS]
        with self._phase((1 + SEARCH) / 2):
            self._rank(field)
        for config in field:
            if not self._agrees(config):
                continue
            ratio = self._compare(0, config, shipped)
            if ratio >= 1 - MARGIN:
                break  # the others were slower still
            others = [
                place for place in range(1, len(self.trials) - 1) if self.trials[place].counts
            ]
            if all(self._compare(place, config, shipped) <= 1 + MARGIN for place in others):
                return config, ratio
        return None, 1.0

    def _try(self, config: Config) -> None:
        """Run, check and time a shape, unless that was done."""
        if config in self.times or config in self.skipped:
            return
        self._step(words(config))
        best = min(self.times.values())
        try:
            with tiles.forced(self.key, config):
                if not self._right(0, config):
                    return
                ms = self._median(0, 1)
                if ms <= SLOW * best:
                    ms = self._median(0, _repeats(ms))
                self.times[config] = ms
        except Exception as error:
            self._leave_out(config, error)

    def _rank(self, field: List[Config]) -> None:
        """Order the finalists, best first, in place: measured in turns, the slower half left where
        it is, and again."""
        count = len(field)
        while count > 1:
            taken: Dict[Config, List[float]] = {config: [] for config in field[:count]}
            for _ in range(3):
                for config in taken:
                    self._step(words(config))
                    with tiles.forced(self.key, config):
                        taken[config] += self._times(0, _repeats(self.times[config]))
            field[:count] = sorted(taken, key=lambda config: statistics.median(taken[config]))
            count = (count + 1) // 2

    def _agrees(self, config: Config) -> bool:
        """True if its results are correct on every other call too."""
        for place in range(1, len(self.trials)):
            self._step(words(config))
            try:
                with tiles.forced(self.key, config):
                    if not self._right(place, config):
                        return False
            except Exception as error:
                self._leave_out(config, error)
                return False
        return True

    def _compare(self, place: int, config: Config, shipped: Config) -> float:
        """Its time over the shipped one's, in turns, so that both see the same clocks and
        neighbours."""
        taken: Dict[Config, List[float]] = {shipped: [], config: []}
        for _ in range(TURNS):
            for one, times in taken.items():
                self._step(f"{words(config)} against the shipped shape")
                with tiles.forced(self.key, one):
                    times += self._times(place, _repeats(self.times[config]))
        return statistics.median(taken[config]) / statistics.median(taken[shipped])

    def _right(self, place: int, config: Config) -> bool:
        gap = distance(self.trials[place].results(self.kernel), self.expected[place])
        if gap <= self.tolerance:
            return True
        self.skipped[config] = f"its result is off by {gap:.2g}"
        self.times.pop(config, None)
        log.debug("tuning: %s %s: %s", self.kernel, words(config), self.skipped[config])
        return False

    def _leave_out(self, config: Config, error: Exception) -> None:
        if not errors.survivable(error):
            log.error(
                "tuning: the GPU failed while the %s kernel was tried with %s",
                self.kernel,
                words(config),
            )
            raise error
        self.skipped[config] = errors.first_line(error)
        self.times.pop(config, None)

    def _times(self, place: int, repeats: int) -> List[float]:
        trial = self.trials[place]
        return self.timer(lambda: trial.run(self.kernel), repeats)

    def _median(self, place: int, repeats: int) -> float:
        return statistics.median(self._times(place, repeats))


def _repeats(ms: float) -> int:
    """The number of runs of `ms` milliseconds to time: about 20 ms, from 2 to 10 runs."""
    return max(2, min(10, int(20 / max(ms, 1e-3))))
