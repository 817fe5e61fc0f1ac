"""Choose the runs that a verdict still needs after the schedule, to separate noise from effects."""

from __future__ import annotations

from typing import NamedTuple, Optional

from . import parity
from .probe_variables import Nudge
from .records import Experiment
from .verdict import Verdict

MOST_CONFIRMATIONS = 4  # nudged runs of A, before "differs" is said
FURTHER_CONFIRMATIONS = 2  # more of them for each further side


class NextRun(NamedTuple):
    """A run to be made of a side, for a nudged run with its nudge."""

    side: str
    nudge: Optional[Nudge] = None


def next_run(experiment: Experiment, verdict: Verdict) -> Optional[NextRun]:
    """Return the run that the verdict still needs, or None.

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
        redraw = any(run.random != a[0].random for run in runs)
        return NextRun("A", Nudge(len(nudged) + 1, redraw))
    few = next((side for side in differing if len(experiment.side(side)) < 2), None)
    return None if few is None else NextRun(few)


def most_confirmations(comparisons: int) -> int:
    """Nudged As before "differs" is said. Several sides are several chances of a false alarm, and
    the more As there are, the rarer is a side further from them than they are from each other."""
    return MOST_CONFIRMATIONS + FURTHER_CONFIRMATIONS * (comparisons - 1)
