"""The one table of a comparison: its metrics as numbers, which text, Markdown, the page and CSV
show."""

from __future__ import annotations

import csv
import io
import math
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .records import Experiment, Run
from .statistics import Ratio
from .verdict import Verdict


class Metric(NamedTuple):
    """A row: both sides, patched / unpatched, its interval and its word; NaN where unknown."""

    name: str  # stable, for programs
    title: str  # for readers
    unit: str  # s or bytes
    a: float
    b: float
    ratio: float
    low: float = math.nan
    high: float = math.nan
    level: float = math.nan  # of the interval, in percent
    word: str = ""


def metrics(verdict: Verdict) -> List[Metric]:
    """The metrics that the verdict has, in the order in which they are shown."""
    rows = []
    speed, timing = verdict.speed, verdict.timing
    if speed is not None:
        rows.append(_of("step_time", "time per step, usual", "s", speed, verdict.speed_word))
        if speed.mean is not None:
            excludes = 0 if verdict.failures else speed.mean.excludes_one
            word = {1: "slower", -1: "faster"}.get(excludes, "")
            rows.append(_of("mean_step_time", "time per step, mean", "s", speed.mean, word))
    elif math.isfinite(verdict.patched_step):
        rows.append(_pair("step_time", "time per step, usual", "s", math.nan, verdict.patched_step))
    if timing is not None:
        rows.append(_pair("startup", "start to first step", "s", *timing.startup))
        rows.append(_pair("total", "whole run", "s", *timing.total))
        if any(timing.waits):
            waits = [0.0 if w is None else w.seconds for w in timing.waits]
            rest = [math.nan if w is None else w.step - w.seconds for w in timing.waits]
            rows.append(_pair("loader_wait", "of a step, waiting for data", "s", *waits))
            rows.append(_pair("without_loader", "of a step, all else", "s", *rest))
    if verdict.memory is not None:
        rows.append(_of("peak_memory", "peak memory", "bytes", verdict.memory, verdict.memory_word))
    elif math.isfinite(verdict.patched_peak):
        rows.append(_pair("peak_memory", "peak memory", "bytes", math.nan, verdict.patched_peak))
    return rows


def _of(name: str, title: str, unit: str, ratio: Ratio, word: str) -> Metric:
    found = Metric(name, title, unit, ratio.a, ratio.b, ratio.value, word=word)
    if ratio.low is None or ratio.high is None:
        return found
    return found._replace(low=ratio.low, high=ratio.high, level=ratio.level)


def _pair(name: str, title: str, unit: str, a: float, b: float) -> Metric:
    known = math.isfinite(a) and math.isfinite(b) and a > 0
    return Metric(name, title, unit, a, b, b / a if known else math.nan)


# -- CSV
# ----------------------------------------------------------------------------------------------

# Names and units stay as they are: others read them. docs/ab.md has a row for each.
COLUMNS = (
    "kind",
    "run",
    "side",
    "step",
    "step_s",
    "loss",
    "grad_norm",
    "memory_bytes",
    "status",
    "steps",
    "total_s",
    "startup_s",
    "metric",
    "unit",
    "a",
    "b",
    "ratio",
    "low",
    "high",
    "level",
    "difference",
    "noise",
    "verdict",
)


def rows(experiment: Experiment, verdict: Verdict) -> Iterator[Dict[str, Any]]:
    """A row per metric, per quantity of the training, per run and per step; `kind` tells which."""
    for each in verdict.every:
        for metric in metrics(each):
            kept = {**metric._asdict(), "metric": metric.name, "verdict": metric.word}
            kept = {name: kept[name] for name in COLUMNS if name in kept}
            yield {"kind": "metric", "side": each.side, **kept}
        for parity in each.parities:
            yield {
                "kind": "training",
                "side": each.side,
                "metric": parity.quantity,
                "unit": "relative",
                "step": parity.first_step,
                "steps": parity.steps,
                "difference": parity.largest,
                "noise": max(
                    (x for x in (parity.noise, parity.drift) if x is not None), default=None
                ),
                "verdict": parity.word,
            }
    for run in experiment.runs:
        yield {
            "kind": "run",
            **_who(run),
            "memory_bytes": run.peak_memory(),
            "status": run.status,
            "steps": run.steps,
            "total_s": run.seconds,
            "startup_s": run.startup_seconds(),
        }
    for run in experiment.runs:
        yield from _steps(run)


def _who(run: Run) -> Dict[str, Any]:
    nudged = " redrawn" if run.redrawn else " nudged" if run.nudged else ""
    return {"run": run.name, "side": run.label + nudged}


def _steps(run: Run) -> Iterator[Dict[str, Any]]:
    held = run.memory("cuda_peak" if run.memory_kind() == "cuda" else "rss")
    series = (run.step_seconds(), run.series("loss"), run.series("grad_norm"), held)
    for step, (seconds, loss, norm, memory) in enumerate(zip(*series)):
        yield {
            "kind": "step",
            **_who(run),
            "step": step,
            "step_s": seconds,
            "loss": loss,
            "grad_norm": norm,
            "memory_bytes": memory,
        }


def to_csv(found: Iterator[Dict[str, Any]], columns: Tuple[str, ...] = COLUMNS) -> str:
    """CSV as RFC 4180 has it, but for its line ends; an unknown number is empty, one that is not
    finite is inf."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in found:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return text.getvalue()


def _cell(value: Optional[Any]) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return value
