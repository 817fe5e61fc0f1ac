"""Intervals that may be looked at after every pair of runs: `flashbias ab --repeats auto`.

An interval of 95% that is looked at often misses the truth at one of the looks far more often than
in 5% of all comparisons. Here every look has a level of its own, so that all of them together miss
in 5%: the error is spent over the looks as Lan and DeMets do (Discrete sequential boundaries for
clinical trials, Biometrika 70, 1983), by the function that approximates Pocock's bounds,
alpha * log(1 + (e - 1) * t), at the share t of all repeats. The bounds of the looks follow from the
joint distribution of the sums so far, by numerical integration (Armitage, McPherson and Rowe,
Repeated significance tests on accumulating data, Journal of the Royal Statistical Society A 132,
1969). The levels that belong to them are those of Student's t (the significance level approach:
Jennison and Turnbull, Group sequential methods with applications to clinical trials, 2000, section
4.4). t with few degrees of freedom crosses its bounds somewhat more often than the normal
distribution does, so that not all of the error is spent. The intervals are repeated confidence
intervals (Jennison and Turnbull, Interim analyses: the repeated confidence interval approach,
Journal of the Royal Statistical Society B 51, 1989): they hold whatever the reason for which the
runs end, a width that is reached among them.
"""

from __future__ import annotations

import functools
import math
from typing import Tuple

import numpy as np
from scipy import optimize, stats

FIRST = 2  # repeats at the first look: fewer tell nothing about the spread between runs
MOST = 20  # repeats of each side at the last look
GRID = 401  # points of the integration
STUDENT = 0.8  # share of the error that is spent: 95% intervals then miss in 4.7% of 40,000 trials


@functools.lru_cache(maxsize=None)
def levels(level: float, first: int = FIRST, most: int = MOST) -> Tuple[float, ...]:
    """The level, in percent, of the interval at each look: after `first`, first + 1, ..., `most`
    repeats.

    With these, all intervals together miss the truth with a probability of 1 - `level` / 100.
    """
    alpha = STUDENT * (1 - level / 100)
    shares = np.arange(first, most + 1) / most
    spent = alpha * np.log(1 + (math.e - 1) * shares)
    found, at, density = [], np.zeros(1), np.ones(1)  # the sum so far: (points, mass at them)
    before = before_spent = 0.0
    for share, total in zip(shares, spent):
        step = math.sqrt(share - before)

        def missed(bound: float, at=at, density=density, step=step) -> float:  # type: ignore[no-untyped-def]
            tails = stats.norm.sf((bound - at) / step) + stats.norm.cdf((-bound - at) / step)
            return float((density * tails).sum())

        bound = optimize.brentq(lambda x, d=total - before_spent: missed(x) - d, 0.0, 9.0)
        found.append(100 - 200 * float(stats.norm.sf(bound / math.sqrt(share))))
        points, width = np.linspace(-bound, bound, GRID, retstep=True)
        weights = np.full(GRID, width)
        weights[[0, -1]] /= 2
        moved = stats.norm.pdf((points[:, None] - at) / step) / step
        at, density = points, weights * (moved @ density)
        before, before_spent = share, total
    return tuple(found)


def level_at(repeats: int, level: float) -> float:
    """The level of the interval after so many repeats of each side."""
    found = levels(level)
    return found[min(max(repeats, FIRST), MOST) - FIRST]
