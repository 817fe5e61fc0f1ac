"""Text of the interval of a ratio: the same rule wherever its ends or its width are printed.

Ends that differ by more than a factor WIDEST are not printed: such an interval says nothing, since
the spread between runs is known from too few of them.
"""

from __future__ import annotations

WIDEST = 100.0
UNKNOWN = "too few runs to tell"


def is_known(low: float, high: float) -> bool:
    """Return whether an interval is narrow enough to be printed; False for NaN or infinite ends."""
    return high <= WIDEST * low < float("inf")


def between(low: float, high: float) -> str:
    """Return the ends of an interval of ratios as text."""
    return f"{low:.3f} to {high:.3f}" if is_known(low, high) else UNKNOWN
