"""Do the curves of B (losses, gradient norms) follow those of A, as far as those of A follow each
other?

Curves part where they differ, three steps in a row, by more than the command's own noise: three
times the largest difference seen so far between two unpatched runs (six times, where there is one
pair only), and never less than rounding. Among the unpatched runs is one that was nudged in the
last place, for training amplifies rounding, and B rounds otherwise than A. Every patched run must
part: where only some do, that is undecided, and so is everything once unpatched runs are as far
apart as the losses are large.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .records import Run

NOISE_BAND = 3.0  # times the largest difference between runs of A
LONE_PAIR = 2.0  # times as much again where only one pair of runs shows it
LOOK_AHEAD = 2
PERSISTENCE = 3  # steps in a row out of the band: one spike is no parting


class Rounding(NamedTuple):
    """Relative tolerance at the first step, its assumed growth per step, and where it ends."""

    base: float
    growth: float
    most: float


ROUNDING = {"loss": Rounding(1e-4, 1.3, 0.02), "gradient norm": Rounding(1e-3, 1.3, 0.10)}
HALF_ROUNDING = 20.0  # times as much under automatic mixed precision
DROWNED = {"loss": 0.5, "gradient norm": 1.0}  # relative noise from which a comparison says nothing
SMALL_PART = 1e-2  # of the loss: a part that is smaller is measured by this

WORST_FIRST = ("differs", "not finite", "undecided", "within noise", "within rounding", "identical")
NOT_COMPARED = "not compared"
OUTPUTS = "outputs"  # the quantity of an inference


@dataclass
class Parity:
    """Two families of curves compared. `word`: one of WORST_FIRST, or "not compared"."""

    quantity: str
    word: str
    first_step: Optional[int] = None  # where they part
    largest: float = 0.0  # largest relative difference between a run of B and the mean of A
    largest_at: Optional[int] = None
    noise: Optional[float] = None  # largest relative difference between runs of A; None: one run
    steps: int = 0
    difference: np.ndarray = field(default_factory=lambda: np.zeros(0))
    band: np.ndarray = field(default_factory=lambda: np.zeros(0))
    drift: Optional[float] = None  # as noise, of the runs that were nudged in the last place
    redrawn: bool = False  # and that drew other random numbers
    drowned_at: Optional[int] = (
        None  # from here on runs of A are as far apart as the quantity is large
    )
    why: str = ""  # of "undecided", "not finite" and "differs", more than the figures tell
    rank: Optional[int] = None  # of several, the one that this is of
    part: bool = False  # a part of the loss

    @property
    def badness(self) -> Tuple[int, float]:
        """Sorts the worst first."""
        order = WORST_FIRST.index(self.word) if self.word in WORST_FIRST else len(WORST_FIRST)
        return order, -self.largest if np.isfinite(self.largest) else -np.inf


def worst(parities: Sequence[Parity]) -> str:
    """The worst word of all that was compared. A part of the loss counts where it differs or is not
    finite."""
    found = [
        p
        for p in parities
        if p.word != NOT_COMPARED and not (p.part and p.word not in WORST_FIRST[:2])
    ]
    return min(found, key=lambda p: p.badness).word if found else NOT_COMPARED


class Curves(NamedTuple):
    """One quantity of one rank: (steps,) per run."""

    quantity: str
    kind: str
    rank: Optional[int]
    part: bool
    a: List[np.ndarray]
    b: List[np.ndarray]
    nudged: List[np.ndarray]
    least: float

    def noise(self) -> np.ndarray:
        """(steps,) largest relative difference between unpatched runs."""
        steps = min(len(x) for x in (*self.a, *self.nudged))
        curves = np.array([x[:steps] for x in (*self.a, *self.nudged)])
        scale = np.maximum(_scale(curves[: len(self.a)]), self.least)
        return _largest(_pairs(curves, scale), steps)


def of_runs(a: Sequence[Run], b: Sequence[Run], nudged: Sequence[Run], half: bool) -> List[Parity]:
    """Loss, gradient norm and each part of the loss, every rank apart: per quantity, the rank that
    is worst.

    Many curves are many chances of a false alarm: the noise of one rank counts for all, and so does
    that of one part.
    """
    redrawn = any(run.redrawn for run in nudged)
    found: List[Parity] = []
    for group in _groups(a, b, nudged, half):
        judged = judge_together(group, half, redrawn)
        names = dict.fromkeys(p.quantity for p in judged)
        found += [
            min((p for p in judged if p.quantity == name), key=lambda p: p.badness)
            for name in names
        ]
    return found


def judge_together(
    group: Sequence[Curves], half: bool = False, redrawn: bool = False
) -> List[Parity]:
    """Curves that share their noise: that of any of them counts for all."""
    noises = [curves.noise() for curves in group]
    steps = max(map(len, noises), default=0)
    pooled = np.max([np.pad(x, (0, steps - len(x))) for x in noises], axis=0) if noises else None
    found = []
    for each in group:
        result = parity(
            each.quantity, each.a, each.b, each.nudged, half, redrawn, each.kind, each.least, pooled
        )
        result.rank, result.part = each.rank, each.part
        found.append(result)
    return found


def _groups(
    a: Sequence[Run], b: Sequence[Run], nudged: Sequence[Run], half: bool
) -> List[List[Curves]]:
    """The curves of the loss, of the gradient norm, and of all parts of the loss."""
    sides = (a, b, nudged)
    runs = [run for side in sides for run in side]
    ranks = min(len(run.ranks) for run in runs)
    named = [set(run.named("loss_parts")) for run in runs]
    parts = [name for name in a[0].named("loss_parts") if all(name in each for each in named)]
    losses = [run.per_step("loss") for run in a]

    def curves(name: str, keys: Tuple[str, ...], kind: str, part: bool = False) -> List[Curves]:
        values = [[run.per_step(*keys) for run in side] for side in sides]
        if (
            kind == "gradient norm" and half
        ):  # a gradient scaler looks for the scale that just overflows
            values = [[np.where(np.isinf(x), np.nan, x) for x in side] for side in values]
        found = []
        for rank in range(ranks):
            of_a, of_b, of_nudged = ([x[rank] for x in side] for side in values)
            least = SMALL_PART * _typical([x[rank] for x in losses]) if part else 0.0
            found.append(
                Curves(name, kind, rank if ranks > 1 else None, part, of_a, of_b, of_nudged, least)
            )
        return found

    if any(np.isfinite(run.per_step("output")).any() for run in runs):  # inference
        named = [set(run.named("outputs")) for run in runs]
        outputs = [x for x in a[0].named("outputs") if all(x in each for each in named)]
        each_output = [curves(x, ("outputs", x), "loss", True) for x in outputs]
        return [
            curves(OUTPUTS, ("output",), "loss"),
            [c for found in each_output for c in found] if len(outputs) > 1 else [],
        ]
    return [
        curves("loss", ("loss",), "loss"),
        curves("gradient norm", ("grad_norm",), "gradient norm"),
        [each for name in parts for each in curves(name, ("loss_parts", name), "loss", True)],
    ]


def parity(
    quantity: str,
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    nudged: Sequence[np.ndarray] = (),
    half: bool = False,
    redrawn: bool = False,
    kind: Optional[str] = None,
    least: float = 0.0,
    pooled: Optional[np.ndarray] = None,
) -> Parity:
    """One (steps,) array per run: NaN where nothing was recorded, inf where the value was not
    finite.

    `nudged`: curves of A after a change of its parameters by a few units in the last place;
    `redrawn`: and of what it
    draws at random. `kind`: the quantity whose tolerances apply. `least`: differences are relative
    to at least this.
    `pooled`: (steps,) noise of related curves.
    """
    kind = kind or quantity
    steps = min((len(x) for x in (*a, *b, *nudged)), default=0)
    curves_a, curves_b, curves_n = (
        np.array([x[:steps] for x in side], dtype=float).reshape(len(side), steps)
        for side in (a, b, nudged)
    )
    if not steps or np.isnan(curves_a).all() or np.isnan(curves_b).all():
        return Parity(quantity, NOT_COMPARED, steps=steps)
    unpatched = np.concatenate([curves_a, curves_n])
    scale = np.maximum(_scale(curves_a), least)
    pairs = _pairs(unpatched, scale)
    noise, drift = (
        _largest(_pairs(curves_a, scale), steps),
        _largest(_between(curves_n, curves_a, scale), steps),
    )
    every = np.array([_relative(x, _mean(curves_a), scale) for x in curves_b])
    difference, nearest = every.max(axis=0), every.min(axis=0)
    at = int(np.argmax(difference))
    seen = np.maximum.accumulate(
        np.maximum(_largest(pairs, steps), 0.0 if pooled is None else pooled[:steps])
    )
    seen = seen[np.minimum(np.arange(steps) + LOOK_AHEAD, steps - 1)]
    base, growth, most = ROUNDING[kind]
    base *= HALF_ROUNDING if half else 1.0
    # Where drift is known there is no need to guess how rounding grows.
    known = bool(seen.any())
    rounding = (
        np.full(steps, base)
        if known
        else np.minimum(base * growth ** np.arange(steps), max(most, base))
    )
    band = np.maximum(
        rounding, NOISE_BAND * (LONE_PAIR if len(pairs) == 1 else 1.0) * np.minimum(seen, 1e9)
    )
    result = Parity(
        quantity,
        "within noise" if noise.any() or redrawn else "within rounding",
        largest=float(difference[at]),
        largest_at=at,
        noise=float(noise.max()) if len(curves_a) > 1 else None,
        steps=steps,
        difference=difference,
        band=band,
        drift=float(drift.max()) if len(curves_n) else None,
        redrawn=redrawn,
        drowned_at=_first_run(_largest(pairs, steps) >= DROWNED[kind], min(PERSISTENCE, steps)),
    )
    return _decide(result, unpatched, curves_b, nearest, most)


def _decide(
    result: Parity, unpatched: np.ndarray, curves_b: np.ndarray, nearest: np.ndarray, most: float
) -> Parity:
    """Fill in word, first step and why."""
    length = min(PERSISTENCE, result.steps)
    broken_a, broken_b = (np.isinf(side).any(axis=0) for side in (unpatched, curves_b))
    parts_at = _first_run(nearest > result.band, length)
    broken_at = int(np.argmax(broken_b)) if broken_b.any() else None
    if broken_a.any():
        first = int(np.argmax(broken_a))
        lasting = "from step {} on" if broken_a[first:].all() else "at step {}"
        result.word = "not finite"
        result.why = (
            f"unpatched {lasting.format(first)}, and patched "
            f"{'as well' if broken_b.any() else 'never'}"
        )
        if parts_at is not None and parts_at < first:
            result.word, result.first_step = "differs", parts_at
    elif broken_at is not None:
        result.word = "differs"
        result.first_step = broken_at if parts_at is None else min(broken_at, parts_at)
        result.why = f"not finite at step {broken_at}, patched only"
    elif parts_at is not None:
        result.word, result.first_step = "differs", parts_at
    elif not result.difference.any() and bool(
        (curves_b == curves_b[0]).all() or np.isnan(curves_b).any()
    ):
        result.word = "identical"
    elif result.drowned_at is not None:
        noise = max(result.noise or 0.0, result.drift or 0.0)
        result.word, result.why = "undecided", f"A differs from A by {noise:.0%}"
    elif _first_run(result.difference > result.band, length) is not None:
        result.word, result.why = "undecided", "some patched runs differ and some do not"
    elif result.largest > result.band.max():
        result.word, result.why = (
            "undecided",
            f"a difference of {result.largest:.1%} at step {result.largest_at}",
        )
    elif result.word == "within rounding" and result.largest > most:
        result.word = "within noise"
    return result


def _typical(curves: Sequence[np.ndarray]) -> float:
    """Mean magnitude of the finite values of all curves; 0 if there are none."""
    values = np.abs(np.concatenate(list(curves)))
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else 0.0


def _scale(curves: np.ndarray) -> np.ndarray:
    """(steps,) magnitude to which differences are relative; a loss near zero does not blow them
    up."""
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(_mean(curves))
    usual = np.median(magnitude[np.isfinite(magnitude)]) if np.isfinite(magnitude).any() else 0.0
    floor = max(1e-2 * usual, 1e-30)
    scale: np.ndarray = np.maximum(np.where(np.isfinite(magnitude), magnitude, usual), floor)
    return scale


def _mean(curves: np.ndarray) -> np.ndarray:
    """Of equal curves exactly one of them."""
    mean: np.ndarray = np.where((curves == curves[0]).all(axis=0), curves[0], curves.mean(axis=0))
    return mean


def _pairs(curves: np.ndarray, scale: np.ndarray) -> List[np.ndarray]:
    return [_relative(curves[i], curves[j], scale) for i in range(len(curves)) for j in range(i)]


def _between(some: np.ndarray, others: np.ndarray, scale: np.ndarray) -> List[np.ndarray]:
    return [_relative(x, y, scale) for x in some for y in others]


def _largest(differences: Sequence[np.ndarray], steps: int) -> np.ndarray:
    return np.max(differences, axis=0) if len(differences) else np.zeros(steps)


def _relative(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Relative difference per step; zero where neither is finite, infinite where one of them is
    not."""
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
