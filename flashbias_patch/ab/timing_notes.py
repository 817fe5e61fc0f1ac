"""Notes of a verdict on its times: other work on the machine, stalls, too few repeats, start-up."""

from __future__ import annotations

from typing import List

from . import repeats, sides, statistics
from .records import Experiment, Run
from .verdict import Verdict

BUSY_SHARE, BUSY_OTHERS = 0.9, 0.1  # of all CPUs: both together are other work that slows a run
STALLS_SHARE = 0.1  # of a side's time, from which stalls are worth a note


def notes(verdict: Verdict, experiment: Experiment, crowded: List[Run], made: int) -> List[str]:
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
            for who, s in zip((verdict.name, sides.NAMES["A"]), reversed(timing.stalls))
        ]
        found.append(
            f"stalls, steps that take more than {statistics.STALL:g} times the usual one: "
            f"{'; '.join(stalled)}"
        )
    if speed and speed.disagree and speed.mean:
        found.append(
            f"usual step and mean disagree: {verdict.name} / unpatched is "
            f"{speed.value:.2f} for the usual step and "
            f"{speed.mean.value:.2f} for the mean of all steps, which decides how long the "
            "command takes"
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
            f"{verdict.name}: the first step ends {later:.1f} s later; its shorter steps "
            f"compensate for this at step {timing.break_even}"
        )
    return found


def is_crowded(run: Run, experiment: Experiment) -> bool:
    """Was the machine busy with other work than the command's own?"""
    cpus = int(experiment.host.get("cpus") or 1)
    return run.busy >= BUSY_SHARE and run.others >= BUSY_OTHERS * cpus
