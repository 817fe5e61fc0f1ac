"""A comparison as one compact JSON document to keep: figures, curves, what they depend on; no
machine's paths.

{"format": 1, "about": {device, torch, ...}, "command": ..., "headline": {...}, "notes": [...],
 "problems": [...], "backends": {name: attention calls}, "fallbacks": [...], "runs": [...],
 "detections": {...}}
"""

from __future__ import annotations

import datetime
import math
import re
import shlex
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import intervals, sides, words
from .parity import ROUNDING
from .records import Experiment, Run
from .statistics import Ratio
from .verdict import Verdict

FORMAT = 1
MOST_STEPS = 400  # of a run's curves; more are thinned evenly
MIB = 2**20


def compact(experiment: Experiment, verdict: Verdict) -> Dict[str, Any]:
    """The document."""
    fallbacks = [entry for run in experiment.patched() for entry in run.fallbacks()]
    return {
        "format": FORMAT,
        "about": about(experiment),
        "command": command(experiment),
        "headline": headline(experiment, verdict),
        **(
            {
                "sides": [
                    {
                        "side": each.side,
                        "name": each.name,
                        **headline(sides.pair(experiment, each.side), each),
                    }
                    for each in verdict.further
                ]
            }
            if verdict.further
            else {}
        ),
        "notes": verdict.notes,
        "problems": verdict.problems,
        "backends": _calls(experiment.patched()),
        "fallbacks": [
            {k: entry.get(k) for k in ("source", "call", "reason", "count")} for entry in fallbacks
        ],
        "runs": [_run(run) for run in experiment.runs],
        **({"detections": verdict.detections} if verdict.detections else {}),
    }


def headline(experiment: Experiment, verdict: Verdict) -> Dict[str, Any]:
    """The few numbers for a table: time and memory (A, B, ratio, interval, word), training,
    repeats."""
    losses = next((p for p in verdict.parities if p.quantity == "loss"), None)
    sides = [
        [r.peak_memory("reserved_peak") / MIB for r in experiment.side(x) if not r.nudged]
        for x in ("A", verdict.side)
    ]
    reserved = [_number(max(side)) if side else None for side in sides]
    timing, mean = verdict.timing, verdict.speed.mean if verdict.speed else None
    return {
        "sentence": words.sentence(verdict).replace(words.SPACE, " "),
        "failures": [str(failure) for failure in verdict.failures],
        "attention_calls": verdict.calls,
        "repeats": [
            sum(r.label == x and not r.nudged for r in experiment.runs) for x in ("A", verdict.side)
        ],
        "time": _ratio(verdict.speed, verdict.speed_word, 1.0, "s", clock=verdict.clock),
        "memory": _ratio(
            verdict.memory,
            verdict.memory_word,
            1 / MIB,
            "mib",
            kind=verdict.memory_kind,
            reserved_mib=reserved,
        ),
        "mean_time": _ratio(mean, "", 1.0, "s"),
        "startup_s": None if timing is None else [_number(value) for value in timing.startup],
        "total_s": None if timing is None else [_number(value) for value in timing.total],
        "break_even_step": None if timing is None else timing.break_even,
        "training": {
            "word": verdict.parity_word,
            "first_step": verdict.first_step,
            "loss_difference": None if losses is None else _number(losses.largest),
            "loss_noise": None if losses is None or losses.noise is None else _number(losses.noise),
            "loss_drift": None if losses is None or losses.drift is None else _number(losses.drift),
        },
    }


def says(document: Dict[str, Any]) -> str:
    """The sentence of a document, from its figures: also of one written before ratios were patched
    / unpatched."""
    found = document["headline"]
    if found.get("failures"):
        return str(found["sentence"])
    time, memory, training = found["time"], found["memory"], found["training"]
    if training["word"] not in words.PARITY_SAYS:
        return str(found["sentence"])
    word = training_word(document)
    parts = words.clauses(*(entry and (entry["ratio"], entry["word"]) for entry in (time, memory)))
    return words.joined([*parts, words.training_clause(word, training["first_step"])]) + "."


def training_word(document: Dict[str, Any]) -> str:
    """The word on training, no better than the difference allows: documents are kept that were
    written before that."""
    training = document["headline"]["training"]
    far = (training["loss_difference"] or 0.0) > ROUNDING["loss"].most
    return (
        "within noise" if far and training["word"] == "within rounding" else str(training["word"])
    )


def rows(document: Dict[str, Any]) -> List[Tuple[str, str, str, str]]:
    """A table of a document's headline: (what, A, B, patched / unpatched with its 95% interval and
    verdict)."""
    found = document["headline"]
    table = []
    for name, key, unit, digits in (
        ("time per step", "time", "s", 3),
        ("peak memory", "memory", "mib", 0),
    ):
        entry = found[key]
        if entry:
            ends = (
                ""
                if entry["low"] is None
                else f" ({intervals.between(entry['low'], entry['high'])})"
            )
            sides = [
                f"{entry[side + '_' + unit]:.{digits}f} {unit.replace('mib', 'MiB')}"
                for side in "ab"
            ]
            table.append((name, *sides, f"{entry['ratio']:.2f}x{ends}, {entry['word']}"))
    training = found["training"]
    drawn = any(run.get("redrawn") for run in document["runs"])
    if training["loss_difference"] is not None:
        apart = ", ".join(
            f"{name} {words.relative(value)}"
            for name, value in (
                ("A from A", training["loss_noise"] or 0.0),
                (f"a {'redrawn' if drawn else 'nudged'} A from A", training["loss_drift"]),
                ("B from A", training["loss_difference"]),
            )
            if value is not None
        )
        table.append(("loss", "", "", f"{training_word(document)}: {apart}"))
    return [tuple(str(cell) for cell in row) for row in table]  # type: ignore[misc]


def about(experiment: Experiment) -> Dict[str, Any]:
    run = next((r for r in experiment.runs if r.environment), None)
    found = run.environment if run else {}
    started = datetime.datetime.fromtimestamp(experiment.started) if experiment.started else None
    known = {
        "device": found.get("gpu") or "CPU",
        "torch": found.get("torch"),
        "cuda": found.get("cuda"),
        "cudnn": found.get("cudnn"),
        "python": experiment.host.get("python"),
        "numpy": found.get("numpy"),
        **(found.get("modules") or {}),
        "world_size": found.get("world_size"),
        "threads": found.get("threads"),
        "cpus": experiment.host.get("cpus"),
        "date": started.strftime("%Y-%m-%d") if started else None,
    }
    return {name: value for name, value in known.items() if value not in (None, "?")}


def command(experiment: Experiment) -> str:
    """The arguments of `flashbias ab`, with absolute paths cut to their last part."""
    options = experiment.options
    given = [
        f"--{name} {options[name]}"
        for name in ("repeats", "steps", "warmup", "seed")
        if name in options
    ]
    given = ["--eval CHECKPOINT"] if options.get("inference") else given
    given += ["--stand-in-for-a"] if options.get("stand_in") else []
    for side in "ab":
        given += [
            f"--env-{side} {k}={_local(str(v))}"
            for k, v in (options.get("env_" + side) or {}).items()
        ]
    given += [
        f"--side {name}:{','.join(f'{k}={_local(str(v))}' for k, v in env.items())}"
        for name, env in options.get("sides") or ()
    ]
    words_of = " ".join(shlex.quote(_local(word)) for word in experiment.command)
    return f"flashbias ab {' '.join(given)} -- {words_of}"


def _local(word: str) -> str:
    return re.sub(r"(^|=)/\S*?([^/\s]+)/?$", r"\1\2", word)


def _run(run: Run) -> Dict[str, Any]:
    stride = max(1, -(-run.steps // MOST_STEPS))
    kept = {
        "name": run.name,
        "side": run.label,
        "nudged": run.nudged,
        "redrawn": run.redrawn,
        "status": run.status,
        "steps": run.steps,
        "ranks": len(run.ranks),
        "seconds": _number(run.seconds),
        "others_cpus": run.others,
        "startup_s": _number(run.startup_seconds()) if run.steps else None,
    }
    if run.steps:
        kept.update(
            peak_mib=_number(run.peak_memory() / MIB),
            reserved_mib=_number(run.peak_memory("reserved_peak") / MIB),
            stride=stride,
            step_s=_numbers(run.step_seconds(), stride),
            loss=_numbers(run.series("loss"), stride),
            grad_norm=_numbers(run.series("grad_norm"), stride),
            params={name: _numbers(values, stride) for name, values in run.named("params").items()},
        )
    return kept


def _ratio(
    ratio: Optional[Ratio], word: str, scale: float, unit: str, **more: Any
) -> Optional[Dict[str, Any]]:
    if ratio is None:
        return None
    return {
        f"a_{unit}": _number(ratio.a * scale),
        f"b_{unit}": _number(ratio.b * scale),
        "ratio": _number(ratio.value),
        "low": _number(ratio.low),
        "high": _number(ratio.high),
        "spread": _number(ratio.spread),
        "word": word,
        **more,
    }


def _calls(runs: Sequence[Run]) -> Dict[str, int]:
    total: Dict[str, int] = {}
    for run in runs:
        for name, count in run.calls().items():
            total[name] = total.get(name, 0) + count
    return total


def _number(value: Optional[float]) -> Optional[float]:
    return float(f"{value:.8g}") if value is not None and math.isfinite(value) else None


def _numbers(values: np.ndarray, stride: int) -> List[Optional[float]]:
    return [_number(float(value)) for value in values[::stride]]
