"""Rows of the tables on whole detectors, from the results of benchmarks/real_models.py."""

from __future__ import annotations

import re
import statistics
from typing import Any, Dict, Iterable, List, Sequence

import numpy as np
from measured import apart, load, table
from real_runs import counterpart

DETECTORS = {
    "fusion0100": "CMT fusion 0100",
    "fusion0075": "CMT fusion 0075",
    "cmt": "CMT camera",
    "petr": "PETR",
    "streampetr": "StreamPETR",
}
COSTS = ("s/step", "time", "first step, s", "peak MiB", "memory")


def named_detector(run: Dict[str, Any]) -> str:
    return f"{DETECTORS[run['family']]}, {run['size']}, batch {run['bs']}"


def words_of(run: Dict[str, Any]) -> str:
    parts = ["patched" if run["patch"] else "unpatched"]
    parts += ["`PETRMultiheadFlashAttention`"] if "Flash" in run["attn"] else []
    parts += [f"`FLASHBIAS_DTYPE={run['dtype']}`"] if run["dtype"] != "auto" else []
    parts += [f"`FLASHBIAS_AQR={run['aqr']}`"] if run.get("aqr") else []
    parts += [f"`FLASHBIAS_BACKEND={run['backend']}`"] if run.get("backend") else []
    parts += [
        word
        for field, word in (
            ("fp16", "mmcv's fp16"),
            ("with_cp", "checkpointing"),
            ("bias", "learned bias"),
        )
        if run[field]
    ]
    return ", ".join(parts + ([] if run["dropout"] else ["no dropout"]))


def merged(runs: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """One run per name and family: that of the first repeat, step_s the mean of all, every repeat
    under "repeats"."""
    found: Dict[Any, List[Dict[str, Any]]] = {}
    for run in runs:
        found.setdefault((run.get("family"), run["name"]), []).append(run)
    kept = []
    for repeats in found.values():
        done = [run for run in repeats if "losses" in run]
        first = dict(
            done[0]
            if len(done) == len(repeats)
            else next(run for run in repeats if "losses" not in run)
        )
        if "losses" in first:
            first["step_s"] = sum(run["step_s"] for run in done) / len(done)
            first["peak_MiB"] = max(run["peak_MiB"] for run in done)
            later = [run["gradient_error"] for run in done if "gradient_error" in run]
            first.update({"gradient_error": max(later)} if later else {})
        kept.append(
            {**first, "repeats": done, "failed": len(repeats) - len(done), "made": len(repeats)}
        )
    return kept


def ratio(run: Dict[str, Any], base: Dict[str, Any]) -> str:
    """Time against the unpatched run, with the 95% interval that `flashbias ab` gives where runs
    were repeated."""
    text = f"{run['step_s'] / base['step_s']:.2f}x"  # of the medians
    if run is base:
        return text
    return interval(base.get("repeats", ()), run.get("repeats", ()), 2) or text


def interval(base: Sequence[Any], runs: Sequence[Any], uncounted: int) -> str:
    """Ratio of the times of several runs to those of several others, with its interval; "" where
    there are too few. `uncounted`: first steps or calls of each."""
    from flashbias_patch.ab.statistics import compare_times

    sides = [[np.array(run["times"][uncounted:]) for run in side] for side in (base, runs)]
    found = compare_times(sides[0], sides[1]) if min(map(len, sides)) > 1 else None
    if found is None or found.low is None:
        return ""
    return f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f})"


def cells(run: Dict[str, Any], base: Any) -> List[str]:
    """s/step, ratio, first step of each run, MiB, ratio; or the error."""
    if "losses" not in run:
        some = (
            f"({run['failed']} of {run['made']} runs)"
            if run.get("failed", 1) < run.get("made", 1)
            else ""
        )
        return [run["error"].partition("(")[0][:90] + some, "", "", "", ""]
    known = base is not None and "losses" in base
    return [
        f"{run['step_s']:.3f}",
        ratio(run, base) if known else "-",
        ", ".join(f"{each['times'][0]:.1f}" for each in run.get("repeats") or [run]),
        f"{run['peak_MiB']:.0f}",
        f"{run['peak_MiB'] / base['peak_MiB']:.2f}x" if known else "-",
    ]


def training_rows(name: str, wanted: str = ".*") -> List[List[str]]:
    """Rows under "detector", "run" and COSTS, of the runs whose family and name match `wanted`."""
    result = load(name)
    runs = merged([*result["runs"], *result["family"]])
    named = {(run["family"], run["name"]): run for run in runs}
    return [
        [
            named_detector(run),
            words_of(run),
            *cells(run, named.get((run["family"], counterpart(run["name"])))),
            scale_gradient(run),
        ]
        for run in runs
        if re.fullmatch(wanted, f"{run['family']} {run['name']}")
    ]


def scale_gradient(run: Dict[str, Any]) -> str:
    """bias_scale's gradient in the last step."""
    seen = run.get("bias_scale_and_gradient")
    return "" if not seen else "none" if seen[-1][1] is None else f"{seen[-1][1]:.3g}"


def block_table(rows: List[List[str]], first: str, fresh: bool = False) -> List[str]:
    """Of training_rows. Runs that are no fresh processes share a first step, which is left out; so
    is an empty last column."""
    head = [first, "run", *COSTS, "bias_scale's gradient"]
    kept = [i for i, name in enumerate(head) if fresh or name != "first step, s"]
    if not any(row[-1] for row in rows):
        kept = kept[:-1]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def order_of(result: Dict[str, Any]) -> str:
    note = f"; {result['note']}" if "note" in result else ""
    return f"Order: {result['order']}{note}."


def latency_table(names: Iterable[str]) -> List[str]:
    """Forward passes without gradients: the median of the repeats' medians."""
    found: Dict[Any, List[Dict[str, Any]]] = {}
    for name in names:
        for run in load(name)["inference"]:
            found.setdefault((name, run["family"], run["name"]), []).append(run)
    rows = []
    for (name, family, kind), repeats in found.items():
        done = [run for run in repeats if "latency_ms" in run]
        if not done:
            rows.append([named_detector(repeats[0]), words_of(repeats[0]), repeats[0]["error"]])
            continue
        base = [r for r in found.get((name, family, counterpart(kind)), ()) if "latency_ms" in r]
        ms = statistics.median(run["latency_ms"] for run in done)
        versus = "-"
        if base:
            bare = statistics.median(run["latency_ms"] for run in base)
            versus = "1.00x" if kind == base[0]["name"] else interval(base, done, 10)
            versus = versus or f"{ms / bare:.2f}x"
        rows.append(
            [
                named_detector(done[0]),
                words_of({**done[0], "dropout": 0.1}),
                f"{ms:.1f}",
                ", ".join(f"{run['latency_ms']:.1f}" for run in done),
                versus,
                f"{1e3 * done[0]['bs'] / ms:.1f}",
                f"{done[0]['first_ms']:.0f}",
                f"{max(run['peak_MiB'] for run in done):.0f}",
            ]
        )
    head = ("detector", "run", "ms", "of each run", "time", "frames/s", "first call, ms", "MiB")
    return table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


def parity_rows(runs: List[Dict[str, Any]]) -> List[List[Any]]:
    """Of the runs without dropout, against the first unpatched one: detector, run, first gradient,
    losses of the first step and of all, steps. Those with `FLASHBIAS_DTYPE=fp16` last."""
    named = {(run["family"], run["name"]): run for run in runs}
    rows = []
    for run in sorted(runs, key=lambda run: run["dtype"] == "fp16"):
        base = named.get((run["family"], counterpart(run["name"])))
        if run["dropout"] or "gradient_error" not in run or base is None:
            continue
        again = [each["losses"] for each in run["repeats"][base is run :]]
        losses = [apart(each, base["losses"]) for each in again]
        rows.append(
            [
                f"{DETECTORS[run['family']]} {run['size']}",
                words_of(run) + (", again" if base is run else ""),
                f"{run['gradient_error']:.1e}",
                f"{max(each[0] for each in losses):.1e}",
                f"{max(map(max, losses)):.1e}",
                len(run["losses"]),
            ]
        )
    return rows
