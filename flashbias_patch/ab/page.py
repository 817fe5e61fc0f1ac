"""The content of a report, cards and tables, as plain data for a template."""

from __future__ import annotations

import datetime
import math
import shlex
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from . import intervals, sides, words
from .records import Experiment
from .verdict import Verdict
from .words import interval, relative, seconds, size, times, tone

MEMORY = {"cuda": "GPU, allocated", "rss": "process, resident"}
BIG = {
    "identical": "Identical",
    "within rounding": "Same",
    "within noise": "Same",
    "differs": "Differs",
    "undecided": "Undecided",
    "not finite": "Not finite",
    "fails": "Fails",
}
SETTINGS = ("steps", "warmup", "seed")  # of a training, worth showing


def headlines(verdict: Verdict) -> List[Dict[str, Any]]:
    """The cards at the top: speed, memory, parity."""
    cards: List[Dict[str, Any]] = []
    for title, ratio, word, show, unit, measured in (
        ("Time per step", verdict.speed, verdict.speed_word, seconds, "a step", verdict.clock),
        (
            "Peak memory",
            verdict.memory,
            verdict.memory_word,
            size,
            "",
            MEMORY.get(verdict.memory_kind, ""),
        ),
    ):
        if ratio is None:
            cards.append(_lone_card(title, verdict))
            continue
        cards.append(
            {
                "title": title,
                "big": times(ratio.value),
                "word": word,
                "tone": tone(word),
                "whisker": _whisker(ratio.value, ratio.low, ratio.high),
                "interval": f"{verdict.name} / unpatched, {interval(ratio)}",
                "side": verdict.side.lower(),
                "a": f"{show(ratio.a)} {unit}".strip(),
                "b": f"{show(ratio.b)} {unit}".strip(),
                "lines": [measured],
            }
        )
        if ratio.mean is not None and ratio.disagree:
            cards[-1]["lines"].append(f"mean of all steps: {times(ratio.mean.value)}")
    word = verdict.parity_word
    fits = verdict.only_patched_fits
    shown = [p for p in verdict.parities if not p.part] + [
        p for p in verdict.parities if p.part and tone(p.word) == "bad"
    ]
    cards.append(
        {
            "title": "Outputs" if verdict.of_outputs else "Training",
            "big": f"Only {verdict.name} fits" if fits else BIG.get(word, "\u2014"),
            "long": fits or word in ("undecided", "not finite"),
            "word": "unpatched runs out of memory"
            if fits
            else f"diverges at step {verdict.first_step}"
            if word == "differs" and verdict.first_step is not None
            else ", ".join(dict.fromkeys(f.status for f in verdict.failures))
            if word == "fails"
            else word,
            "tone": "good" if fits else tone(word),
            # no break in a number
            "lines": [
                (words.until_then(verdict) + words.parity_line(p)).replace("e-", "e\u2011")
                for p in shown
            ],
        }
    )
    return cards


def _lone_card(title: str, verdict: Verdict) -> Dict[str, Any]:
    """The card of a figure that one side only has, if any."""
    value, show = (
        (verdict.patched_step, seconds)
        if title == "Time per step"
        else (verdict.patched_peak, size)
    )
    card: Dict[str, Any] = {
        "title": title,
        "big": "\u2014",
        "word": "not compared",
        "tone": "neutral",
        "lines": [],
    }
    if math.isfinite(value):
        card.update(big=show(value), word=f"{verdict.name} alone", long=True)
        card["tone"] = "good" if verdict.only_patched_fits else "neutral"
    return card


def _whisker(
    value: float, low: Optional[float], high: Optional[float]
) -> Optional[Dict[str, float]]:
    """Positions in percent of an interval on an axis that has 1 in it."""
    if low is None or high is None or not intervals.is_known(low, high):
        return None
    left, right = min(low, 1.0), max(high, 1.0)
    margin = 0.12 * max(right - left, 0.02)
    left, right = left - margin, right + margin
    place = {
        name: round(100 * (x - left) / (right - left), 2)
        for name, x in (("low", low), ("high", high), ("value", value), ("one", 1.0))
    }
    return {**place, "width": round(place["high"] - place["low"], 2)}


def sides_of(experiment: Experiment, verdict: Verdict) -> List[Dict[str, Any]]:
    """The page's part for each side that is compared with A."""
    found = []
    for each in verdict.every:
        pair = sides.pair(experiment, each.side)
        found.append(
            {
                "letter": each.side.lower(),
                "title": f"{each.side} {each.name}",
                "env": " ".join(
                    f"{k}={v}" for k, v in sides.environment(experiment.options, each.side).items()
                ),
                "cards": [] if each.inference else headlines(each),
                "columns": words.columns(each),
                "figures": words.figures(each),
                "parts": parts_table(pair, each),
                "backends": backends_table(pair),
                "fallbacks": fallbacks_table(pair),
            }
        )
    return found


def parts_table(experiment: Experiment, verdict: Verdict) -> List[Dict[str, str]]:
    """The loss's parts: their last common values of rank 0, the largest difference of any rank and
    step, the word."""
    judged = [p for p in verdict.parities if p.part]
    if not judged:
        return []
    a, b = (next(iter(experiment.side(label))) for label in ("A", verdict.side))
    last = min(a.steps, b.steps) - 1
    rows = []
    for p in judged:
        section = "outputs" if verdict.of_outputs else "loss_parts"
        x, y = (float(run.per_step(section, p.quantity)[0][last]) for run in (a, b))
        rows.append(
            {
                "name": p.quantity,
                "a": f"{x:.6g}",
                "b": f"{y:.6g}",
                "side": verdict.side,
                "difference": relative(p.largest),
                "word": p.word,
                "tone": tone(p.word),
            }
        )
    return rows


def gradients_table(experiment: Experiment) -> List[Dict[str, str]]:
    """One row per watched parameter: did a gradient ever reach it?"""
    rows = []
    for label in ("A", *sides.labels(experiment.options)):
        for run in experiment.side(label)[:1]:
            for name in dict.fromkeys(
                n for p in run.ranks for line in p.steps for n in line.get("param_grads") or {}
            ):
                values = run.series("param_grads", name)
                arrived = int(np.isfinite(values).sum())
                rows.append(
                    {
                        "name": name,
                        "side": label,
                        "arrived": "never" if not arrived else f"{arrived} of {run.steps} steps",
                        "norm": "-" if not arrived else f"{np.nanmedian(values):.3g}",
                    }
                )
    return rows


def values_table(experiment: Experiment) -> List[Dict[str, str]]:
    """First and last value of each watched parameter, in the first run of each side."""
    rows = []
    for label in ("A", *sides.labels(experiment.options)):
        for run in experiment.side(label)[:1]:
            for name, values in run.named("params").items():
                known = values[np.isfinite(values)]
                if known.size:
                    rows.append(
                        {
                            "name": name,
                            "side": label,
                            "first": f"{known[0]:.6g}",
                            "last": f"{known[-1]:.6g}",
                        }
                    )
    return rows


def environment_rows(experiment: Experiment) -> List[Tuple[str, str]]:
    run = next((r for r in experiment.runs if r.environment), None)
    found = dict(run.environment) if run else {}
    header = (
        next((p.header for p in (run.ranks or run.processes) if p.environment), {}) if run else {}
    )
    modules = found.pop("modules", {}) or {}
    options = experiment.options
    rows = [
        ("GPU", found.get("gpu")),
        ("PyTorch", found.get("torch")),
        ("CUDA", found.get("cuda")),
        ("cuDNN", found.get("cudnn")),
        ("Python", header.get("python") or experiment.host.get("python")),
        ("numpy", found.get("numpy")),
        *sorted(modules.items()),
        ("processes (world size)", found.get("world_size")),
        ("threads", found.get("threads")),
        ("CPUs", experiment.host.get("cpus")),
        ("platform", experiment.host.get("platform")),
        ("directory", experiment.cwd),
        ("schedule", " ".join(experiment.schedule)),
        *(
            (name, options.get(name))
            for name in (["seed"] if options.get("inference") else SETTINGS)
        ),
        (
            "date",
            datetime.datetime.fromtimestamp(experiment.started).strftime("%Y-%m-%d %H:%M")
            if experiment.started
            else None,
        ),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def commands(experiment: Experiment) -> List[Tuple[str, str]]:
    """The commands that run each side by hand."""
    quoted = " ".join(shlex.quote(word) for word in experiment.command)
    options = experiment.options

    def side(env: Dict[str, str]) -> str:
        return "".join(
            f"{k}={shlex.quote(str(v))} "
            for k, v in {"PYTHONHASHSEED": options.get("seed", 0), **env}.items()
        )

    found = []
    for label in ("A", *sides.labels(options)):
        env = sides.environment(options, label)
        off = "" if sides.is_patched(options, label) else "--off "
        own = side({k: v for k, v in env.items() if k != "FLASHBIAS_PATCH"})
        found.append(
            (f"{label}, {sides.name(options, label)}", f"{own}flashbias run {off}-- {quoted}")
        )
    return found


def runs_table(experiment: Experiment) -> List[Dict[str, Any]]:
    return [
        {
            "name": run.name,
            "side": run.label,
            "status": run.status,
            "steps": run.steps,
            "seconds": seconds(run.seconds),
            "exit": "-" if run.exit_code is None else run.exit_code,
            "ranks": len(run.ranks),
            "message": run.message
            + (
                "; parameters nudged in the last place, to see how far rounding drifts"
                if run.nudged
                else ""
            )
            + (", and other random numbers drawn" if run.redrawn else ""),
            "first_step_s": _seconds_or_none(run.startup_seconds()),
            "killed": run.killed,
            "ok": run.status == "ok",
        }
        for run in experiment.runs
    ]


def _seconds_or_none(value: float) -> Optional[float]:
    return round(value, 3) if math.isfinite(value) else None


def backends_table(experiment: Experiment) -> List[Dict[str, Any]]:
    totals: Dict[str, int] = {}
    for run in experiment.patched():
        for name, count in run.calls().items():
            totals[name] = totals.get(name, 0) + count
    whole = sum(totals.values()) or 1
    return [
        {"name": name, "count": f"{count:,}", "share": round(100 * count / whole, 1)}
        for name, count in sorted(totals.items(), key=lambda item: -item[1])
    ]


def fallbacks_table(experiment: Experiment) -> List[Dict[str, Any]]:
    found: Dict[Tuple[str, str, str], int] = {}
    for run in experiment.patched():
        for entry in run.fallbacks():
            key = (
                str(entry.get("source", "")),
                str(entry.get("call", "")),
                str(entry.get("reason", entry)),
            )
            found[key] = found.get(key, 0) + int(entry.get("count", 1))
    return [{"source": s, "call": c, "reason": r, "count": n} for (s, c, r), n in found.items()]


def failures(experiment: Experiment) -> List[Dict[str, str]]:
    """Failed runs with the end of their output."""
    return [
        {"name": run.name, "what": f"{run.status}: {run.message}", "log": run.log_tail}
        for run in experiment.runs
        if run.status != "ok"
    ]
