"""Sections of docs/performance.md on whole detectors, from the results of
benchmarks/real_models.py: for make_performance.py, which puts docs/ and benchmarks/ on the path."""

from __future__ import annotations

import statistics
from typing import Any, Dict, List, Tuple

from detector_rows import (
    DETECTORS,
    block_table,
    interval,
    latency_table,
    merged,
    named_detector,
    order_of,
    parity_rows,
    training_rows,
    words_of,
)
from measured import load, source, table
from real_runs import counterpart

FUSION = ("fusion0100_h200", "fusion0075_h200", "fusion0075_kinds_h200")
FUSION_ELSEWHERE = ("fusion0100_before_h200", "fusion0075_drop0_h200")
FUSION_FRESH = "fusion_fresh_h200"
FUSION_LATENCY = ("fusion0100_latency_h200", "fusion0075_latency_h200")
FUSION_LATENCY_ELSEWHERE = ("fusion0100_latency_before_h200", "fusion0100_latency_b6_h200")
CAMERA = ("camera_rows_h200",)
SMALL = ("streampetr_h200", "petr_h200")
CAMERA_LATENCY = ("camera_latency_1600_h200", "camera_latency_800_h200", "small_latency_h200")
SIX_LATENCY = (
    *("fusion0100_latency_b6_again_h200", "fusion0075_latency_b6_h200"),
    *("fusion0100_latency_amp_b6_h200", "fusion0075_latency_amp_b6_h200"),
    *("camera_latency_1600_b6_h200", "camera_latency_1600_amp_b6_h200"),
    "camera_latency_800_b6_h200",
    *("small_latency_b6_h200", "streampetr_latency_b6_h200"),
)
BATCH = ("fusion_batch_h200", "real_batch_h200")
RAN = (
    "The repository's own code, with ResNet-50 as image branch in every detector, random weights, "
    "no GridMask, and one nuScenes frame with one sweep of lidar points that is in memory: loading "
    "of data is not measured."
)
PROFILE, FIRST_STEP, PARITY = "fusion_profile_h200", "first_step_h200", "real_fp16_h200"
# The runs that the READMEs show: of each detector those of one machine.
SHOWN = {
    "fusion": {
        FUSION[0]: r"\S+ ([AB] fp32( cp)?|B fp32 dtype=fp16( cp)?|A amp|B flash( amp)?)",
        FUSION[1]: r"\S+ ([AB] fp32|B fp32 dtype=fp16|B flash)",
        FUSION[2]: r"\S+ (A fp32 cp|B fp32 dtype=fp16 cp|A amp|B flash amp)",
    },
    "camera": {
        CAMERA[0]: r"cmt (([AB] fp32|B fp32 dtype=fp16|B flash|A fp32 cp|B fp32 dtype=fp16 cp)"
        r"( 800x320)?|A amp|B amp dtype=fp16)",
        SMALL[0]: r".*",
        SMALL[1]: r".*",
    },
}


def batches() -> List[str]:
    lines = [
        "### The largest batch that fits",
        "",
        "Without checkpointing, in a given share of the H200's memory (of PyTorch's allocator, "
        "without the CUDA context), searched once. In parentheses the time of one step at that "
        "batch. Those of the camera are left out, because other programs used the GPU meanwhile.",
        "",
    ]
    for name in BATCH:
        result = load(name)
        found = result["batches"]
        caps = [row["cap_GiB"] for row in found[0]["batches"]]
        rows = [
            [
                f"{DETECTORS[run['family']]}, {run['size']}",
                words_of(run),
                *(
                    f"{row['batch']} ({row['step_s']:.2f} s)"
                    if row["step_s"] and not result.get("shared_gpu")
                    else row["batch"]
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
        f"attention that takes no time it would be {rest / base['gpu_busy_ms']:.2f}. For the "
        "rest of the step the GPU waits for the host, which launches "
        f"{patched['kernels']:.0f} kernels: "
        f"{own:.0f} of them outside the transformer's forward pass, in voxels, head, loss and "
        "backward pass.",
        "",
    ]


def latencies(*names: str) -> List[str]:
    return [*latency_table(names), *sources(*names)]


def shown(kind: str, first: str) -> List[str]:
    """The table of a README."""
    return block_table(
        [row for name, wanted in SHOWN[kind].items() for row in training_rows(name, wanted)], first
    )


def blocks(*names: str) -> List[str]:
    """Every training run of some results."""
    rows = [row for name in names for row in training_rows(name)]
    return [
        *block_table(rows, "detector", fresh=all(map(in_fresh_processes, names))),
        *sources(*names),
    ]


def in_fresh_processes(name: str) -> bool:
    return bool("fresh process each" in load(name)["order"])


def sources(*names: str) -> List[str]:
    """What a table's rows come from, a line each result."""
    lines = [f"* {source(name)} {order_of(load(name))}" for name in names]
    return [*lines, ""]


def fusion() -> List[str]:
    """The fusion detector with its lidar branch."""
    return [
        "## The fusion detector",
        "",
        "Fusion CMT with its lidar branch (spconv). " + RAN + " Ratios are patched / unpatched "
        "with 95% intervals, to the unpatched run of the same kind: those that `flashbias ab` "
        "gives, of midmeans, with unpaired intervals. A ratio can therefore differ from the "
        "quotient of the medians in front of it. Attention dropout is 0.1 where the row does not "
        "say otherwise. CMT's configuration has `PETRMultiheadFlashAttention` and mmcv's fp16. Its "
        "counterpart here is the unpatched `PETRMultiheadAttention` with mmcv's fp16, because the "
        "old flash-attn that the class needs does not run with this PyTorch. An unpatched run with "
        "that flash-attn would not hold the scores either: do not expect this saving of memory "
        "there.",
        "",
        *blocks(*FUSION),
        "Other machines of the same kind:",
        "",
        *blocks(*FUSION_ELSEWHERE),
        "A fresh process each, and what its first step takes (the first patched process compiles "
        "and checks the kernels; later ones read both from disk):",
        "",
        *blocks(FUSION_FRESH),
        *batches(),
        *profile(),
        "### Latency",
        "",
        "Forward passes in evaluation mode without gradients, from images and points to the "
        "head's output; the median of 20 after 10, then of the runs. The first call is that of the "
        "first run. Where it is patched it compiles and checks the kernels, unless an earlier "
        "run on the machine has.",
        "",
        *latencies(*FUSION_LATENCY),
        "Other machines of the same kind:",
        "",
        *latencies(*FUSION_LATENCY_ELSEWHERE),
    ]


def camera() -> List[str]:
    """Camera detectors of several sizes; the steps of the small ones wait for the host."""
    return [
        "## Camera detectors",
        "",
        RAN + " CMT's camera configuration has VoVNet; PETR's and StreamPETR's have checkpointing "
        "and dropout 0.1, for which there is no row here. The steps of small detectors wait for "
        "the host, whose speed varied: if the times of a row differ much, its interval is wide.",
        "",
        *blocks(*CAMERA),
        "StreamPETR and PETR, on another machine of the same kind:",
        "",
        *blocks(*SMALL),
        "### Latency of camera detectors",
        "",
        "As above. For many calls in a row the host took 1.3 to 1.8 times as long as for others, "
        "unpatched and patched alike.",
        "",
        *latencies(*CAMERA_LATENCY),
        "### Latency of six samples at once",
        "",
        "As [one sample at a time](#latency), with six copies of the frame in each call. The GPU "
        "then has more to do: fusion 0075, camera 1600x640 and PETR wait for it, and their times "
        "vary little. Of the others, patched, the host still makes some runs up to 1.4 times as "
        "long.",
        "",
        *latencies(*SIX_LATENCY),
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
        *sources(FIRST_STEP),
    ]


def parity() -> List[str]:
    found = load(PARITY)
    runs = merged(run for run in (*found["runs"], *found["family"]) if "losses" in run)
    return [
        "### Parity",
        "",
        "Without dropout, against an unpatched run from the same weights: the first step's "
        "gradient of the decoder, and relative differences of the losses, in the first step and "
        "the largest of all. Two unpatched runs of these camera detectors are equal. Patched ones "
        "round otherwise from the first step on, and training amplifies that: after some steps "
        "single losses differ by several per cent, as they do after a change of the weights in "
        "the last digit ([nudged](#flashbias-ab-on-the-real-cmt)). With "
        "`FLASHBIAS_DTYPE=fp16`, gradients are scaled on their way through "
        "(attention/fp16_gradients.py).",
        "",
        *table(
            ("detector", "run", "first gradient", "loss, first step", "losses, all", "steps"),
            parity_rows(runs),
        ),
        source(PARITY),
        "",
    ]


def inference_ratios(page: str) -> List[str]:
    """The table of a README on inference, and the sentence on small detectors. `page`: in front of
    an anchor."""
    found: Dict[Any, List[Any]] = {}
    for name in (*FUSION_LATENCY, *CAMERA_LATENCY, *SIX_LATENCY):
        for run in load(name)["inference"]:
            key = run["family"], run["size"], run["bs"], run["name"].partition(" b")[0]
            found.setdefault(key, []).append(run)

    def ratio(family: str, size: str, batch: int, kind: str) -> str:
        key, base = ((family, size, batch, name) for name in (kind, counterpart(kind)))
        return interval(found[base], found[key], 10) if key in found and base in found else "-"

    kinds = ("B fp32", "B fp32 dtype=fp16", "B amp dtype=fp16")
    columns = [(batch, kind) for batch in (1, 6) for kind in kinds]
    heads = ("", ", `FLASHBIAS_DTYPE=fp16`", ", mmcv's fp16 on both sides")
    return [
        *table(
            ("inference, patched / unpatched", *(f"batch {b}{h}" for b in (1, 6) for h in heads)),
            [
                [f"{DETECTORS[family]}, {size}", *(ratio(family, size, *each) for each in columns)]
                for family, size in sorted({key[:2] for key in found}, key=_in_readme)
            ],
        ),
        "2 or 3 runs a kind. `-`: not measured. `FLASHBIAS_DTYPE=fp16` is compared with unpatched "
        f"float32. Latencies: of [fusion]({page}#latency) and "
        f"[camera]({page}#latency-of-camera-detectors) detectors, and of "
        f"[six samples]({page}#latency-of-six-samples-at-once). At batch 1 small detectors wait "
        "for the host: they gain little, or become slower. Measure yours with `flashbias ab`.",
    ]


def _in_readme(detector: Tuple[str, str]) -> Tuple[int, bool]:
    family, size = detector
    return list(DETECTORS).index(family), size == "800x320"


def how_to_read(page: str) -> str:
    """Notes under the table: precision, and what dropout means for losses and memory. `page`: in
    front of an anchor."""
    memory = load("ab_real_cmt_h200")["headline"]["memory"]
    reserved = memory["reserved_mib"]
    runs = {run["name"]: run for run in merged(load(CAMERA[0])["runs"])}
    bare, patched, without = (
        runs["A fp32"],
        runs["B fp32"],
        (runs["A fp32 drop0"], runs["B fp32 drop0"]),
    )
    return (
        "Without `FLASHBIAS_DTYPE`, results are as accurate as PyTorch's own float32. Peak memory "
        "is what PyTorch's allocator has handed out (`torch.cuda.max_memory_allocated`); it "
        f"reserves more, unpatched and patched: {reserved[0]:.0f} and {reserved[1]:.0f} MiB in a "
        f"comparison where {memory['a_mib']:.0f} and {memory['b_mib']:.0f} were handed out. Losses "
        "are not in this table: attention dropout "
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
