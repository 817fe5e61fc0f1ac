"""Find failures and notable events in the runs of two sides, before any figure is compared."""

from __future__ import annotations

import re
from typing import List, NamedTuple

from . import records, sides, stand_in
from .records import Experiment, Run

CUT_SHORT = (
    "crashed",
    "hung",
    "record lost",
    records.OUT_OF_MEMORY,
)  # of these the headline says after how many steps


class Failure(NamedTuple):
    """A run that did not come to the end that the others came to."""

    run: str
    side: str  # A, B, or the letter of a further side
    status: str  # crashed, hung, out of memory, ended early, ...
    message: str
    steps: int
    who: str  # the side's name: unpatched, patched, ...

    def __str__(self) -> str:
        return f"{self.run} ({self.who}): {self.status}{self.joint}{self.message}"

    @property
    def joint(self) -> str:
        """Between the status and the message."""
        return " " if self.message.startswith(("after ", "before ")) else ": "


def failures(experiment: Experiment) -> List[Failure]:
    inference = bool(experiment.options.get("inference"))
    done = [run for run in experiment.runs if run.status == "ok"]
    longest = max(done, key=lambda run: run.steps, default=None)
    wanted = int(experiment.options.get("steps") or 0)
    found = []
    for run in experiment.runs:
        status, message = run.status, run.message
        if status == "ok" and not inference and longest is not None and run.steps < longest.steps:
            status, message = (
                "ended early",
                f"{run.steps} steps, where {longest.name} made {longest.steps}",
            )
            said = [note for p in run.ranks or run.processes for note in p.notes]
            message += f"; {said[0]}" if said else ""
        elif status == "ok":
            continue
        if status in CUT_SHORT and not inference and run.steps < wanted:
            reached = (
                f"after {run.steps} of {wanted} steps" if run.steps else "before its first step"
            )
            message = f"{reached}: {message}"
        if run.label == "A" and re.search(stand_in.MISSING, run.log_tail):
            message += (
                "; unpatched code imports flash_attn, which is not installed or not complete: "
                "`--stand-in-for-a` runs A "
                "with functions of the same names, computed by torch's scaled_dot_product_attention"
            )
        who = sides.name(experiment.options, run.label)
        found.append(Failure(run.name, run.label, status, message, run.steps, who))
    return found


def other_problems(experiment: Experiment, a: List[Run], b: List[Run]) -> List[str]:
    found = []
    name = sides.name(experiment.options, experiment.judged)
    for label, runs in (("A (unpatched)", a), (f"{experiment.judged} ({name})", b)):
        if not runs and not experiment.options.get("inference"):
            found.append(f"{label} recorded no step, so there is nothing to compare")
    for run in a + b:
        missing = records.missing_ranks(run)
        if missing:
            found.append(
                f"{run.name}: {missing} of {missing + len(run.ranks)} ranks recorded no step"
            )
    return found


def notes(experiment: Experiment, runs: List[Run]) -> List[str]:
    found = [
        f"{run.name}: a process was killed; what it had recorded is used"
        for run in runs
        if run.killed
    ]
    for run in runs:
        said = list(dict.fromkeys(note for p in run.ranks for note in p.notes))
        found += [f"{run.name}: {note}" for note in said[:2]]
    many = max((records.trainings(run.processes) for run in runs), key=len, default=[])
    if len(many) > 1:
        chosen = runs[0].training or 0
        names = ", ".join(f"{i + 1} {t.name} ({t.steps} steps)" for i, t in enumerate(many))
        found.append(
            f"the command runs {len(many)} trainings, in the order of their start: {names}; "
            f"number {chosen + 1} is judged; --process NUMBER or NAME selects another"
        )
    if experiment.options.get("stand_in"):
        found.append(
            "A ran with a stand-in for flash_attn (--stand-in-for-a), not with flash-attn itself"
        )
    wanted = int(experiment.options.get("steps") or 0)
    steps = {run.steps for run in runs}
    if len(steps) == 1 and max(steps) < wanted and all(run.status == "ok" for run in runs):
        found.append(f"every run ended by itself after {max(steps)} of {wanted} steps")
    return found
