"""A verdict in words and figures, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import intervals, records
from .parity import Parity
from .statistics import LEVEL, Ratio
from .table import Metric, metrics
from .verdict import Verdict

SPACE = "\u00a0"  # between a figure and its unit: never the end of a line
GOOD = ("faster", "less memory", "identical", "within rounding", "within noise", "same")
BAD = ("slower", "more memory", "differs", "fails", "not finite")
UNCLEAR = "shows no clear change in {}"
PARITY_SAYS = {
    "identical": "trains identically, bit for bit",
    "within rounding": "trains the same within rounding",
    "within noise": "trains the same within the command's own noise",
    "differs": "does not train the same",
    "not compared": "could not be compared in its losses",
}
OUTPUTS_SAY = {
    "identical": "gives identical outputs",
    "within rounding": "gives the same outputs within rounding",
    "within noise": "gives the same outputs within the command's own noise",
    "differs": "does not give the same outputs",
    "not compared": "could not be compared in its outputs",
}
ZERO_CALLS = "Zero attention calls went through the patch{}. "
NO_CALLS = "is anything patched? `flashbias doctor --repo DIR` tells"


def tone(word: str) -> str:
    """good, bad or neutral: the colour a verdict's word is shown in."""
    return "good" if word in GOOD else "bad" if word in BAD else "neutral"


def sentences(verdict: Verdict) -> List[str]:
    """One for each side: the headline, and what stands below it on the page."""
    only_a = verdict.failed and all(f.side == "A" for f in verdict.failures)
    further = [
        _sentence(each)
        for each in verdict.further
        if not (only_a and all(f.side == "A" for f in each.failures))
    ]
    return [_sentence(verdict), *further]


def sentence(verdict: Verdict) -> str:
    """The verdict in one or two sentences, and in one or two for each further side: failures
    first."""
    return " ".join(sentences(verdict))


def _sentence(verdict: Verdict) -> str:
    where = "" if verdict.side == "B" else f" of {verdict.who}"
    zero = ZERO_CALLS.format(where) if verdict.nothing_patched else ""
    if verdict.failures:
        return zero + _failure(verdict)
    if verdict.detections is not None:
        from . import detections

        return zero + detections.sentence(verdict.detections)
    if verdict.inference:
        return "Inference, unpatched and patched: the detections are what is compared."
    if not verdict.comparable:
        return (
            "Nothing to compare: "
            f"{verdict.problems[-1] if verdict.problems else 'no run recorded a step'}."
        )
    return zero + _comparison(verdict)


def _failure(verdict: Verdict) -> str:
    """Name the side that fails, and its failure."""
    first = {
        side: next((f for f in verdict.failures if f.side == side), None)
        for side in ("A", verdict.side)
    }
    if verdict.only_patched_fits:
        made = verdict.failures[0].steps
        after = f" after {made} step{'' if made == 1 else 's'}" if made else ""
        return (
            f"Unpatched runs out of memory{after}; {verdict.who} trains at "
            f"{seconds(verdict.patched_step)} a step in "
            f"{size(verdict.patched_peak)}."
        )
    if all(f is None or f.status == "interrupted" for f in first.values()):
        return f"Interrupted in {verdict.failures[0].run}: {verdict.failures[0].message}."
    by_side = {"A": "unpatched", verdict.side: verdict.who}
    names = [by_side[side] for side in first if first[side] is not None]
    who = capital(" and ".join(names))
    if all(f is None or f.status == records.OUT_OF_MEMORY for f in first.values()):
        return f"{who} run{'' if len(names) > 1 else 's'} out of memory: {_which(first)}"
    imports = any("--stand-in-for-a" in f.message for f in verdict.failures)
    hint = (
        " It imports flash_attn, which is not installed: `--stand-in-for-a` stands in for it."
        if imports
        else ""
    )
    return f"{who} fail{'' if len(names) > 1 else 's'}: {_which(first)}{hint}"


def _which(first: Dict[str, Any]) -> str:
    said = []
    for failure in filter(None, first.values()):
        message = failure.message.partition("; ")[0]
        said.append(
            f"{failure.run} {_verb(failure.status)}{failure.joint}{message}"
            + ("" if message.endswith("?") else ".")
        )
    return " ".join(said)


def _verb(status: str) -> str:
    """A status that is a noun or an adjective with its verb."""
    plain = {
        records.OUT_OF_MEMORY: "ran out of memory",
        "hung": "hung",
        "no steps": "made no step",
        "not started": "was not started",
        "record lost": "lost its record",
        "interrupted": "was interrupted",
    }
    return plain.get(status, status)


def _comparison(verdict: Verdict) -> str:
    speed, memory, word = verdict.speed, verdict.memory, verdict.parity_word
    if speed is not None and speed.mean is not None and speed.disagree:
        speed = speed.mean
    says = clauses(
        None if speed is None else (speed.value, verdict.speed_word),
        None if memory is None else (memory.value, verdict.memory_word),
    )
    who = capital(verdict.who)
    if word in ("undecided", "not finite"):
        worst = next(p for p in sorted(verdict.parities, key=lambda p: p.badness) if p.word == word)
        what = (
            f"Whether it {'infers' if verdict.of_outputs else 'trains'} the same is undecided"
            if word == "undecided"
            else f"The {worst.quantity} is not finite"
        )
        return f"{joined(says, who)}. {what}: {worst.why}{_since(worst)}."
    clause = training_clause(word, verdict.first_step, verdict.of_outputs)
    return joined([*says, clause], who) + "."


def capital(text: str) -> str:
    """Its first letter a capital, the others as they are."""
    return text[:1].upper() + text[1:]


def clauses(speed: Optional[Tuple[float, str]], memory: Optional[Tuple[float, str]]) -> List[str]:
    """Speed and memory, each (patched / unpatched, word), as parts of a sentence that begins with
    the side."""
    says = []
    if speed is not None:
        value, word = speed
        says.append(
            {
                "faster": f"takes {times(value)} the time per step (faster)",
                "slower": f"takes {times(value)} the time per step (slower)",
                "no difference": "takes the same time per step",
            }.get(word, UNCLEAR.format("speed"))
        )
    if memory is not None:
        value, word = memory
        changed = word in ("less memory", "more memory")
        same = "needs the same memory" if word == "no difference" else UNCLEAR.format("memory")
        says.append(f"needs {times(value)} the memory" if changed else same)
    if says == [UNCLEAR.format("speed"), UNCLEAR.format("memory")]:
        says = [UNCLEAR.format("speed or memory")]
    return says


def training_clause(word: str, first_step: Optional[int], outputs: bool = False) -> str:
    says = (OUTPUTS_SAY if outputs else PARITY_SAYS)[word]
    return says + ("" if first_step is None else f" from step {first_step} on")


def joined(says: List[str], who: str = "Patched") -> str:
    return (
        f"{who} {', '.join(says[:-1])}{' and ' if len(says) > 1 else ''}{says[-1]}"
        if says
        else f"{who} runs"
    )


def _since(parity: Parity) -> str:
    return (
        f" from step {parity.drowned_at} on"
        if parity.word == "undecided" and parity.drowned_at
        else ""
    )


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


def ends(ratio: Ratio) -> str:
    return (
        "-" if ratio.low is None or ratio.high is None else intervals.between(ratio.low, ratio.high)
    )


def level(ratio: Ratio) -> str:
    """The level of its interval: 95%, or more where several sides are compared."""
    return f"{ratio.level:.4g}%"


def interval(ratio: Ratio) -> str:
    """The interval in words."""
    return (
        "too few steps for an interval"
        if ratio.low is None
        else f"{level(ratio)} interval {ends(ratio)}"
    )


class Figure(NamedTuple):
    """A row of the table of a verdict, as text. `ratio`: patched / unpatched."""

    name: str
    a: str
    b: str
    ratio: str
    interval: str
    word: str


COLUMNS = ("", "A unpatched", "B patched", "patched / unpatched", "95% interval", "verdict")


def columns(verdict: Verdict) -> Tuple[str, ...]:
    """The head of the table of a side."""
    if verdict.side == "B":
        return COLUMNS
    name = f"{verdict.side} {verdict.name}"
    return ("", COLUMNS[1], name, f"{verdict.name} / unpatched", *COLUMNS[4:])


OVERVIEW = (
    "side",
    "time per step",
    "of A's",
    "speed",
    "peak memory",
    "of A's",
    "memory",
    "losses or outputs",
)


def overview(verdict: Verdict) -> List[Tuple[str, ...]]:
    """One row a side where there are more than two: A's own figures, then every other side's."""
    if not verdict.further:
        return []
    rows: List[Tuple[str, ...]] = []
    for each in verdict.every:
        speed, memory = each.speed, each.memory
        if not rows:
            own = [seconds(speed.a) if speed else "-", size(memory.a) if memory else "-"]
            rows.append(("A unpatched", own[0], "", "", own[1], "", "", ""))
        rows.append(
            (
                f"{each.side} {each.name}",
                seconds(speed.b if speed else each.patched_step),
                times(speed.value) if speed else "-",
                each.speed_word,
                size(memory.b if memory else each.patched_peak),
                times(memory.value) if memory else "-",
                each.memory_word,
                each.parity_word,
            )
        )
    return rows


def figures(verdict: Verdict) -> List[Figure]:
    """The table that the terminal, Markdown and the page show: table.metrics in words."""
    return [_figure(metric) for metric in metrics(verdict)]


def _figure(metric: Metric) -> Figure:
    show = {"s": seconds, "bytes": size}[metric.unit]
    ratio = times(metric.ratio) if math.isfinite(metric.ratio) else "-"
    return Figure(
        metric.title, show(metric.a), show(metric.b), ratio, _ends_of(metric), metric.word
    )


def _ends_of(metric: Metric) -> str:
    if not math.isfinite(metric.low):
        return "-"
    level = "" if metric.level == LEVEL else f" ({metric.level:.4g}%)"
    return f"{intervals.between(metric.low, metric.high)}{level}"


def relative(value: Optional[float]) -> str:
    if value is None:
        return "unknown"
    if not math.isfinite(value):
        return "not finite"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.2%}"


def extra_run(redrawn: bool) -> str:
    """The name of a run beside the schedule."""
    return "redrawn A" if redrawn else "nudged A"


def parity_line(parity: Parity) -> str:
    """One quantity: its word, where the curves diverge, and how far A is from A."""
    where = "" if parity.rank is None else f" (rank {parity.rank})"
    if parity.word == "not compared":
        return f"{parity.quantity}: not recorded on both sides"
    parted = f", they diverge at step {parity.first_step}" if parity.first_step is not None else ""
    why = f": {parity.why}{_since(parity)}" if parity.why else ""
    noise = "no A/A pair" if parity.noise is None else f"A/A {relative(parity.noise)}"
    noise += (
        "" if parity.drift is None else f", {extra_run(parity.redrawn)} {relative(parity.drift)}"
    )
    return (
        f"{parity.quantity}{where}: {parity.word}{parted}{why}; largest difference "
        f"{relative(parity.largest)} at step "
        f"{parity.largest_at} of {parity.steps} ({noise})"
    )


def parity_lines(verdict: Verdict) -> List[str]:
    """Loss and gradient norm, then the parts of the loss that are not within noise, and how many
    are."""
    found = [parity_line(p) for p in verdict.parities if not p.part]
    parts = [p for p in verdict.parities if p.part and p.word != "not compared"]
    what = "output" if verdict.of_outputs else "part of the loss"
    bad = sorted((p for p in parts if tone(p.word) != "good"), key=lambda p: p.badness)
    found += [f"{what}, {parity_line(p)}" for p in bad]
    if len(bad) < len(parts):
        found.append(
            f"{len(parts) - len(bad)} of {len(parts)} "
            f"{'outputs' if verdict.of_outputs else 'parts of the loss'}: within rounding or noise"
        )
    return [until_then(verdict) + line for line in found]


def until_then(verdict: Verdict) -> str:
    """Before a word on training: beside a failure it holds only for what both sides had
    recorded."""
    return "until then, " if verdict.failures else ""
