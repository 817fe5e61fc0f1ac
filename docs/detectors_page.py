"""Sections of docs/performance.md on whole detectors, from the results of
benchmarks/real_models.py: for make_performance.py, which puts docs/ and benchmarks/ on the path."""

from __future__ import annotations

import re
import statistics
from typing import Any, Dict, Iterable, List

import numpy as np
from measured import load, source, table
from real_runs import counterpart

# Results, newest first.
FUSION = ("fusion_rows_h200", "fusion_blocks_h200")
FUSION_LATENCY = ("fusion_latency_h200", "inference_h200")
CAMERA = ("camera_rows_h200", "camera_again_h200", "camera_blocks_h200")  # latencies: not the first
BATCH = ("fusion_batch_h200", "real_batch_h200")
PROFILE, FIRST_STEP, PARITY = "fusion_profile_h200", "first_step_h200", "real_fp16_h200"
# The runs that the READMEs show: of each detector those of one result.
SHOWN = {
    "fusion": {
        FUSION[0]: r"fusion0100 ([AB] fp32( cp)?|B fp32 dtype=(fp16|bf16)( cp)?)",
        FUSION[1]: r"fusion0075 .*",
    },
    "camera": {
        CAMERA[0]: r"cmt (([AB] fp32|B fp32 dtype=fp16|B flash)( 800x320)?"
        r"|A amp|B amp dtype=fp16|A fp32 cp|B fp32 dtype=fp16 cp)|streampetr .*",
        CAMERA[-1]: r"petr .*",
    },
}
DETECTORS = {
    "fusion0100": "CMT fusion 0100",
    "fusion0075": "CMT fusion 0075",
    "cmt": "CMT camera",
    "petr": "PETR",
    "streampetr": "StreamPETR",
}


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
    from flashbias_patch.ab.statistics import compare_times

    text = f"{run['step_s'] / base['step_s']:.2f}x"  # of the medians
    sides = [
        [np.array(each["times"][2:]) for each in side.get("repeats", ())] for side in (base, run)
    ]
    if run is base or min(map(len, sides)) < 2:
        return text
    found = compare_times(sides[0], sides[1])
    return (
        text
        if found is None or found.low is None
        else f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f})"
    )


def cells(run: Dict[str, Any], base: Any) -> List[str]:
    """s/step, ratio, first step, MiB, ratio; or the error."""
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
        f"{run['times'][0]:.1f}",
        f"{run['peak_MiB']:.0f}",
        f"{run['peak_MiB'] / base['peak_MiB']:.2f}x" if known else "-",
    ]


COSTS = ("s/step", "time", "first step, s", "peak MiB", "memory")


def apart(run: Dict[str, Any], base: Dict[str, Any]) -> float:
    """Largest relative difference of two loss curves."""
    largest: float = max(abs(a - b) / abs(b) for a, b in zip(run["losses"], base["losses"]))
    return largest


def parity_rows(runs: List[Dict[str, Any]]) -> List[List[Any]]:
    """Of the patched runs without dropout, those with `FLASHBIAS_DTYPE=fp16` last."""
    named = {(run["family"], run["name"]): run for run in runs}
    rows = []
    for run in sorted(runs, key=lambda run: run["dtype"] == "fp16"):
        base = named.get((run["family"], counterpart(run["name"])))
        if run["dropout"] or "gradient_error" not in run or base is None or base is run:
            continue
        rows.append(
            [
                f"{run['family']} {run['size']}",
                words_of(run),
                f"{run['gradient_error']:.1e}",
                f"{apart(run, base):.1e}",
                len(run["losses"]),
            ]
        )
    return rows


def batches() -> List[str]:
    lines = ["### The largest batch that fits", ""]
    for name in BATCH:
        found = load(name)["batches"]
        caps = [row["cap_GiB"] for row in found[0]["batches"]]
        rows = [
            [
                f"{DETECTORS[run['family']]}, {run['size']}",
                words_of(run),
                *(
                    f"{row['batch']} ({row['step_s']:.2f} s)" if row["step_s"] else row["batch"]
                    for row in run["batches"]
                ),
            ]
            for run in found
        ]
        lines += [
            *table(("detector", "run", *(f"{cap:g} GiB" for cap in caps)), rows),
            source(name),
            "",
        ]
    return lines


def largest_batches() -> str:
    """Of all detectors, unpatched -> patched, in one line."""
    named: Dict[Any, Dict[bool, Any]] = {}
    for name in BATCH:
        for run in load(name)["batches"]:
            key = f"{DETECTORS[run['family']]} {run['size']}"
            named.setdefault(key, {})[run["patch"]] = run["batches"]
    return "; ".join(
        f"{detector}: "
        + ", ".join(
            f"{before['cap_GiB']:g} GiB {before['batch']} -> {after['batch']}"
            for before, after in zip(sides[False], sides[True])
        )
        for detector, sides in named.items()
    )


def profile() -> List[str]:
    """Where a step goes, and what that leaves for a faster attention."""
    found = load(PROFILE)["profiles"]
    base = found[0]
    kinds = sorted(
        {kind for run in found for kind in run["kind_ms"]},
        key=lambda k: -base["kind_ms"].get(k, 0.0),
    )
    rows = [
        [
            words_of(run),
            f"{run['wall_ms']:.0f}",
            f"{run['gpu_busy_ms']:.0f}",
            f"{run['kernels']:.0f}",
            *(f"{run['kind_ms'].get(kind, 0.0):.1f}" for kind in kinds),
        ]
        for run in found
    ]
    phases = list(base["phase_gpu_ms"])
    by_phase = [
        [
            words_of(run),
            *(
                f"{part['ms']:.0f} ({part['kernels']:.0f})"
                for part in (run["phase_gpu_ms"][phase] for phase in phases)
            ),
        ]
        for run in found
    ]
    patched = next(run for run in found if run["name"] == "B fp32 dtype=fp16")
    rest = patched["gpu_busy_ms"] - patched["kind_ms"]["attention"]
    own = sum(patched["phase_gpu_ms"][phase]["kernels"] for phase in phases)
    own -= patched["phase_gpu_ms"]["transformer"]["kernels"]
    return [
        "### Where a step goes",
        "",
        f"{named_detector(base)}. Milliseconds per step under torch.profiler, which slows the "
        "host.",
        "",
        *table(("run", "wall", "GPU busy", "kernels", *kinds), rows),
        "Of the GPU's time, by the part of the step that launched the kernels (and how many); "
        "`between` lies between the others, first of all the lidar branch:",
        "",
        *table(("run", *phases), by_phase),
        source(PROFILE),
        "",
        "Patched, with `FLASHBIAS_DTYPE=fp16`, the GPU is busy for "
        f"{patched['gpu_busy_ms'] / base['gpu_busy_ms']:.2f} of the unpatched time; with an "
        f"attention that takes no time it would be {rest / base['gpu_busy_ms']:.2f}. The rest of "
        f"the step waits for the host, which launches {patched['kernels']:.0f} kernels: "
        f"{own:.0f} of them outside the transformer's forward pass, in voxels, head, loss and "
        "backward pass.",
        "",
    ]


def latency(name: str) -> List[str]:
    """Forward passes without gradients: the median of the repeats' medians."""
    result = load(name)
    found: Dict[Any, List[Dict[str, Any]]] = {}
    for run in result["inference"]:
        found.setdefault((run["family"], run["name"]), []).append(run)
    rows = []
    for (family, kind), repeats in found.items():
        done = [run for run in repeats if "latency_ms" in run]
        if not done:
            rows.append([named_detector(repeats[0]), words_of(repeats[0]), repeats[0]["error"]])
            continue
        base = [r for r in found.get((family, counterpart(kind)), ()) if "latency_ms" in r]
        ms = statistics.median(run["latency_ms"] for run in done)
        against = statistics.median(run["latency_ms"] for run in base) if base else None
        rows.append(
            [
                named_detector(done[0]),
                words_of({**done[0], "dropout": 0.1}),
                f"{ms:.1f}",
                ", ".join(f"{run['latency_ms']:.1f}" for run in done),
                f"{ms / against:.2f}x" if against else "-",
                f"{1e3 * done[0]['bs'] / ms:.1f}",
                f"{statistics.median(run['first_ms'] for run in done):.0f}",
                f"{max(run['peak_MiB'] for run in done):.0f}",
            ]
        )
    head = ("detector", "run", "ms", "of each run", "time", "frames/s", "first, ms", "MiB")
    return [
        *table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows]),
        source(name),
        "",
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


def block_table(rows: List[List[str]], first: str) -> List[str]:
    """Of training_rows. The runs of a process share its first step, which is left out; so is an
    empty last column."""
    head = [first, "run", *COSTS, "bias_scale's gradient"]
    kept = [i for i, name in enumerate(head) if name != "first step, s"]
    if not any(row[-1] for row in rows):
        kept = kept[:-1]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def shown(kind: str, first: str) -> List[str]:
    """The table of a README."""
    return block_table(
        [row for name, wanted in SHOWN[kind].items() for row in training_rows(name, wanted)], first
    )


def blocks(name: str) -> List[str]:
    """Every training run of a result."""
    return [
        *block_table(training_rows(name), "detector"),
        f"{order_of(load(name))} " + source(name),
        "",
    ]


def order_of(result: Dict[str, Any]) -> str:
    note = f"; {result['note']}" if "note" in result else ""
    return f"Order: {result['order']}{note}."


def fusion() -> List[str]:
    """The fusion detector with its lidar branch."""
    newest, before = FUSION
    return [
        "## The fusion detector",
        "",
        "Fusion CMT with its lidar branch (spconv) and ResNet-50 as image branch. Ratios are "
        "patched / unpatched with 95% intervals, to the unpatched run of the same kind. Attention "
        "dropout is 0.1 where the row does not say otherwise.",
        "",
        *blocks(newest),
        "Another machine of the same kind, with an earlier version of this package:",
        "",
        *blocks(before),
        *batches(),
        *profile(),
        "### Latency",
        "",
        "Forward passes in evaluation mode without gradients, from images and points to the "
        "head's output; the median of 20 after 10, then of the runs.",
        "",
        *(line for name in FUSION_LATENCY for line in latency(name)),
    ]


def camera() -> List[str]:
    """Camera detectors of several sizes; the steps of the small ones wait for the host."""
    newest, *before = CAMERA
    return [
        "## Camera detectors",
        "",
        "ResNet-50, one nuScenes frame. The steps of small detectors wait for the host, whose "
        "speed varied: if the times of a row differ much, its interval is wide.",
        "",
        *blocks(newest),
        "Other machines of the same kind, with earlier versions of this package:",
        "",
        *(line for name in before for line in blocks(name)),
        "### Latency of camera detectors",
        "",
        *(line for name in CAMERA[1:] for line in latency(name)),
        *first_step(),
        *parity(),
    ]


def first_step() -> List[str]:
    """What a process pays once, with a cold and a warm cache."""
    result = load(FIRST_STEP)
    runs = result["runs"]
    times: Dict[bool, List[float]] = {}
    for run in runs:
        times.setdefault(run["patch"], []).append(run["times"][0])
    warm = {patch: statistics.mean(each[1:]) for patch, each in times.items()}
    rows = [
        [words_of(run), len(found), f"{found[0]:.2f}", ", ".join(f"{s:.2f}" for s in found[1:])]
        for run in runs[:2]
        for found in (times[run["patch"]],)
    ]
    return [
        "### The first step",
        "",
        f"Seconds of the first training step of {named_detector(runs[0])}, a fresh process each. "
        "The first patched process compiles and checks the kernels; later ones read both from "
        f"disk, and their first step takes {warm[True] / warm[False]:.2f}x of the unpatched "
        "processes'.",
        "",
        *table(("run", "processes", "the first one", "the others"), rows),
        f"{order_of(result)} " + source(FIRST_STEP),
        "",
    ]


def parity() -> List[str]:
    found = load(PARITY)
    runs = merged(run for run in (*found["runs"], *found["family"]) if "losses" in run)
    return [
        "### Parity",
        "",
        "Without dropout, against an unpatched run from the same weights: the first step's "
        "gradient of the decoder, and the largest relative difference of the loss curves. With "
        "`FLASHBIAS_DTYPE=fp16`, gradients are scaled on their way through "
        "(attention/fp16_gradients.py).",
        "",
        *table(("detector", "run", "gradient", "losses", "steps"), parity_rows(runs)),
        source(PARITY),
        "",
    ]


def small_detectors(page: str) -> str:
    """The sentence on inference and small detectors. `page`: in front of an anchor."""
    found: Dict[Any, List[float]] = {}
    for name in reversed(CAMERA[1:]):  # the newest of each detector
        times: Dict[Any, List[float]] = {}
        for run in load(name)["inference"]:
            key = run["family"], run["size"], run["name"]
            times.setdefault(key, []).append(run["latency_ms"])
        found.update(times)
    names = ("A fp32 b1", "B fp32 b1")
    ratios = []
    for family, size, suffix in (
        ("cmt", "1600x640", ""),
        ("cmt", "800x320", " 800x320"),
        ("streampetr", "704x256", ""),
    ):
        bare, ours = (statistics.median(found[family, size, name + suffix]) for name in names)
        ratios.append(f"{DETECTORS[family]} {size} {ours / bare:.2f}x")
    return (
        f"Inference at batch 1 takes, of the unpatched time: {', '.join(ratios)} "
        f"([latencies]({page}#latency-of-camera-detectors)). The steps of small detectors wait for "
        "the host and gain little or nothing. Measure yours with `flashbias ab`."
    )


def how_to_read(page: str) -> str:
    """Notes under the table: precision, and what dropout means for losses and memory. `page`: in
    front of an anchor."""
    runs = {run["name"]: run for run in merged(load(CAMERA[0])["runs"])}
    bare, patched, without = (
        runs["A fp32"],
        runs["B fp32"],
        (runs["A fp32 drop0"], runs["B fp32 drop0"]),
    )
    return (
        "`float32`: results have the error of PyTorch's own float32. Losses are not in this "
        "table: attention dropout "
        "draws other random numbers in every run, so that losses differ; they are compared "
        "without dropout under "
        f"[Parity]({page}#parity). At 1600x640 memory is "
        f"{patched['peak_MiB'] / bare['peak_MiB']:.2f}x with "
        "dropout and "
        f"{without[1]['peak_MiB'] / without[0]['peak_MiB']:.2f}x without, because the unpatched "
        "model also stores "
        f"dropout masks ({bare['peak_MiB']:.0f} MiB with, {without[0]['peak_MiB']:.0f} MiB "
        "without)."
    )
