"""A verdict in words and figures, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from typing import Optional

from .statistics import Parity, Ratio, Verdict

SPACE = "\u00a0"  # between a figure and its unit: never the end of a line
GOOD = ("faster", "less memory", "identical", "within rounding", "within noise")
BAD = ("slower", "more memory", "differs")
UNCLEAR = "shows no clear change in {}"
PARITY_SAYS = {
    "identical": "trains identically, bit for bit",
    "within rounding": "trains the same within rounding",
    "within noise": "trains the same within the command's own noise",
    "differs": "does not train the same",
    "not compared": "could not be compared in its losses",
}


def tone(word: str) -> str:
    """good, bad or neutral: the colour a verdict's word is shown in."""
    return "good" if word in GOOD else "bad" if word in BAD else "neutral"


def sentence(verdict: Verdict) -> str:
    """The verdict in one sentence."""
    if verdict.inference:
        return "Inference, unpatched and patched: the detections are what is compared."
    if not verdict.comparable:
        return (
            "Nothing to compare: "
            + (verdict.problems[-1] if verdict.problems else "no run recorded a step")
            + "."
        )
    says = []
    if verdict.speed is not None:
        says.append(
            {
                "faster": f"is {times(1 / verdict.speed.value)} as fast",
                "slower": f"takes {times(verdict.speed.value)} the time",
                "no difference": "is as fast as unpatched",
            }.get(verdict.speed_word, UNCLEAR.format("speed"))
        )
    if verdict.memory is not None:
        says.append(
            {
                "less memory": f"needs {times(verdict.memory.value)} the memory",
                "more memory": f"needs {times(verdict.memory.value)} the memory",
                "no difference": "needs the same memory",
            }.get(verdict.memory_word, UNCLEAR.format("memory"))
        )
    if says == [UNCLEAR.format("speed"), UNCLEAR.format("memory")]:
        says = [UNCLEAR.format("speed or memory")]
    says.append(PARITY_SAYS[verdict.parity_word])
    text = "Patched " + ", ".join(says[:-1]) + (" and " if len(says) > 1 else "") + says[-1]
    return text + (f" from step {verdict.first_step} on." if verdict.first_step is not None else ".")


def times(ratio: float) -> str:
    return f"{ratio:.2f}\u00d7" if 0.1 <= ratio < 100 else f"{ratio:.3g}\u00d7"


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    for limit, scale, unit in ((1e-3, 1e6, "\u00b5s"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * scale:.3g}{SPACE}{unit}"
    return f"{value:.3g}{SPACE}s" if value < 100 else f"{value:.0f}{SPACE}s"


def size(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value / 2**30:.2f}{SPACE}GiB" if value >= 2**30 else f"{value / 2**20:.0f}{SPACE}MiB"


def interval(ratio: Ratio, inverse: bool = False) -> str:
    if ratio.low is None or ratio.high is None:
        return "too few steps for an interval"
    low, high = (1 / ratio.high, 1 / ratio.low) if inverse else (ratio.low, ratio.high)
    return f"95% interval {low:.3f} to {high:.3f}"


def relative(value: Optional[float]) -> str:
    if value is None:
        return "unknown"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.2%}"


def extra_run(redrawn: bool) -> str:
    """What the run beside the schedule is called."""
    return "redrawn A" if redrawn else "nudged A"


def parity_line(parity: Parity) -> str:
    if parity.word == "not compared":
        return f"{parity.quantity}: not recorded on both sides"
    parted = f", they part at step {parity.first_step}" if parity.first_step is not None else ""
    noise = "no A/A pair" if parity.noise is None else f"A/A {relative(parity.noise)}"
    noise += "" if parity.drift is None else f", {extra_run(parity.redrawn)} {relative(parity.drift)}"
    return (
        f"{parity.quantity}: {parity.word}{parted}; largest difference {relative(parity.largest)} at step "
        f"{parity.largest_at} of {parity.steps} ({noise})"
    )
