"""The charts of a report, as plain data for the page's script to draw."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import sides
from .judging import step_times
from .records import Experiment, Run
from .verdict import Verdict

MAX_POINTS = 1500  # of one curve on a page
MAX_BINS = 30


def all_of(experiment: Experiment, verdict: Verdict) -> List[Dict[str, Any]]:
    """The page's charts, as the data its script draws."""
    by_side = {x: experiment.side(x) for x in ("A", *sides.labels(experiment.options))}
    runs = [run for of_side in by_side.values() for run in of_side]
    a = by_side["A"]
    warmup = int(experiment.options.get("warmup", 0))
    found: List[Optional[Dict[str, Any]]] = []
    judged = {p.quantity: p for p in verdict.parities if not p.part}
    for title, key in (("Loss", "loss"), ("Gradient norm", "grad_norm"), ("Outputs", "output")):
        parity = judged.get(title.lower())
        chart = _lines(
            title,
            title.lower(),
            [(run, run.series(key)) for run in runs],
            note={
                "loss": "",
                "grad_norm": "Before clipping, where the command clips.",
                "output": "One number that stands for all values of the outputs.",
            }[key],
        )
        whole = [run for run in a if parity is not None and run.steps >= parity.steps]
        if chart and parity is not None and parity.band.size and whole:
            centre = np.array([run.series(key)[: parity.steps] for run in whole]).mean(axis=0)
            width = np.minimum(parity.band, 1e3) * np.abs(centre)
            chart["band"] = {
                "name": "noise band",
                "low": _points(centre - width),
                "high": _points(centre + width),
            }
            chart["mark"] = parity.first_step
        found.append(chart)
    measured = "outputs" if verdict.of_outputs else "loss"
    losses = [(each, p) for each in verdict.every for p in each.parities if p.quantity == measured]
    loss = judged.get(measured)
    if loss is not None and any((p.difference > 0).any() for _, p in losses):
        found.append(
            {
                "title": f"How far the {'outputs' if verdict.of_outputs else 'losses'} are apart",
                "kind": "lines",
                "x": "optimiser step",
                "y": "relative difference",
                "unit": "",
                "log": True,
                "mark": loss.first_step,
                "note": "Above the band they differ by more than noise or rounding explains.",
                "series": [
                    {
                        "name": f"A against {each.side}",
                        "side": each.side,
                        "values": _points(p.difference),
                    }
                    for each, p in losses
                ],
                "band": {
                    "name": "noise band",
                    "low": [None] * len(_points(loss.band)),
                    "high": _points(loss.band),
                },
            }
        )
    times_of = [(run, run.step_seconds() * 1e3) for run in runs]
    found.append(
        _lines("Step time", "milliseconds", times_of, unit="ms", warmup=warmup, robust=True)
    )
    found.append(
        _histogram(
            "Step times, warm-up left out",
            "milliseconds a step",
            {
                sides.title(experiment.options, x): [t * 1e3 for t in step_times(of_side, warmup)]
                for x, of_side in by_side.items()
                if of_side or x in "AB"
            },
        )
    )
    kind = verdict.memory_kind or "rss"
    held = {"cuda": "cuda_peak", "rss": "rss"}[kind]
    found.append(
        _lines(
            "Memory",
            "MiB",
            [(run, run.memory(held) / 2**20) for run in runs],
            unit="MiB",
            warmup=warmup,
            note={
                "cuda": "Peak GPU memory allocated so far.",
                "rss": "Resident memory of the process.",
            }[kind],
        )
    )
    found += _parameter_charts(runs)
    made = [chart for chart in found if chart is not None]
    if verdict.of_outputs:
        for chart in made:
            chart["x"] = chart["x"].replace("optimiser step", "forward pass")
    return made


def _parameter_charts(runs: Sequence[Run]) -> List[Optional[Dict[str, Any]]]:
    names: Dict[str, None] = {}
    for run in runs:
        names.update(dict.fromkeys(run.named("params")))
    found = []
    for name in names:
        sides = [(run, run.named("params")[name]) for run in runs if name in run.named("params")]
        still = [run.name for run, values in sides if _constant(values)]
        found.append(
            _lines(
                name, "value", sides, note=f"Never moved in {', '.join(still)}." if still else ""
            )
        )
    return found


def _constant(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return known.size > 1 and bool((known == known[0]).all())


def _lines(
    title: str,
    label: str,
    sides: Sequence[Tuple[Run, np.ndarray]],
    unit: str = "",
    warmup: int = 0,
    note: str = "",
    robust: bool = False,
) -> Optional[Dict[str, Any]]:
    series = [
        {
            "name": run.name + (" redrawn" if run.redrawn else " nudged" if run.nudged else ""),
            "side": run.label,
            "values": _points(values),
        }
        for run, values in sides
        if values.size and np.isfinite(values).any()
    ]
    if not series:
        return None
    chart = {
        "title": title,
        "kind": "lines",
        "x": "optimiser step",
        "y": label,
        "unit": unit,
        "series": series,
        "warmup": warmup,
        "note": note,
        "stride": _stride(max(values.size for _, values in sides)),
    }
    if robust:  # one slow first step must not flatten all others
        rest = np.concatenate([values[max(1, warmup) :] for _, values in sides])
        rest = rest[np.isfinite(rest)]
        if rest.size > 3:
            chart["top"] = float(np.percentile(rest, 98) * 1.25)
    return chart


def _stride(count: int) -> int:
    return max(1, -(-count // MAX_POINTS))


def _points(values: np.ndarray) -> List[Optional[float]]:
    return [
        float(f"{v:.6g}") if math.isfinite(v) else None for v in values[:: _stride(len(values))]
    ]


def _histogram(
    title: str, label: str, times_of: Dict[str, Sequence[np.ndarray]]
) -> Optional[Dict[str, Any]]:
    every = [x for values in times_of.values() for x in values]
    together = np.concatenate(every) if every else np.zeros(0)
    if together.size < 4 or not all(any(x.size for x in v) for v in times_of.values()):
        return None
    low, high = np.percentile(together, [0, 98])
    edges = np.linspace(
        low, max(high, low * 1.02), int(np.clip(2 * np.sqrt(together.size), 8, MAX_BINS)) + 1
    )
    counts = {
        name: np.histogram(np.clip(np.concatenate(v), edges[0], edges[-1]), edges)[0]
        for name, v in times_of.items()
    }
    return {
        "title": title,
        "kind": "bars",
        "x": label,
        "y": "share of steps",
        "unit": "ms",
        "edges": [float(f"{e:.6g}") for e in edges],
        "series": [
            {
                "name": name,
                "side": name[0],
                "values": [round(float(x), 4) for x in c / max(1, c.sum())],
            }
            for name, c in counts.items()
        ],
        "note": "The slowest 2% of steps are counted in the last bar.",
    }
