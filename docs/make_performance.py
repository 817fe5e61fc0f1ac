"""Writes docs/performance.md, and the figures of both READMEs, from benchmarks/results/*.json: none
is typed by hand.

python docs/make_performance.py [--check]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "docs")]
import evidence  # noqa: E402
from real_runs import counterpart  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
MARKS = ("<!-- measured -->", "<!-- /measured -->")


def load(name: str) -> Dict[str, Any]:
    result: Dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> List[str]:
    head = list(head)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
        "",
    ]


def source(name: str) -> str:
    """Where a section's figures come from: file, commit, and what produced it."""
    path = RESULTS / f"{name}.json"
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", str(path)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout.strip()
    result = load(name)
    about = result.get("about") or result.get("environment", result)
    command = result.get("command", f"python benchmarks/{name.rsplit('_', 1)[0]}.py")
    device = about.get("device") or about.get("gpu") or "CPU"
    return (
        f"From `benchmarks/results/{name}.json` (commit {commit}); {device}, torch "
        f"{about['torch']}; "
        f"`{command}`."
    )


def real_cmt_rows() -> List[List[str]]:
    """The same command on two machines, of which the second stopped early; ratios within each."""
    runs, others = (
        {run["name"]: run for run in merged(load(name)["runs"])}
        for name in ("real_cmt_h200", "real_cmt_again_h200")
    )
    words = {
        "A fp32": "unpatched",
        "B fp32": "patched, float32",
        "B fp32 dtype=fp16": "patched, `FLASHBIAS_DTYPE=fp16`",
        "B flash": "patched, `PETRMultiheadFlashAttention`",
        "A fp32 cp": "unpatched, checkpointing",
        "B fp32 dtype=fp16 cp": "patched, checkpointing, `FLASHBIAS_DTYPE=fp16`",
    }
    rows = []
    for name, word in words.items():
        against = "A fp32 cp" if name.endswith(" cp") else "A fp32"
        run, base = runs[name], runs[against]
        rows.append(
            [
                word,
                *(
                    cell
                    for each in (runs, others)
                    for cell in (f"{each[name]['step_s']:.3f}", ratio(each[name], each[against]))
                ),
                f"{run['peak_MiB']:.0f}",
                f"{run['peak_MiB'] / base['peak_MiB']:.2f}x",
            ]
        )
    return rows


def real_head() -> List[str]:
    return [
        "CMT camera, 1600x640, batch 2",
        "s/step",
        "time",
        "other machine, s/step",
        "time",
        "peak MiB",
        "memory",
    ]


def how_to_read(page: str) -> str:
    """Notes under the table: precision, and what dropout means for losses and memory. `page`: in
    front of an anchor."""
    runs = {run["name"]: run for run in merged(load("real_cmt_h200")["runs"])}
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


def real_cmt() -> List[str]:
    return [
        "## The real CMT",
        "",
        load("real_cmt_h200")["detector"] + ". Attention dropout 0.1. Ratios are to the "
        "unpatched run above each.",
        "",
        *table(real_head(), real_cmt_rows()),
        how_to_read(""),
        "",
        source("real_cmt_h200"),
        "",
        "The host of the other machine was faster, and the cost of a step's launches affects the "
        "patched runs most. " + source("real_cmt_again_h200"),
        "",
        *every_run(),
        *parity(),
        *batches(),
        *profiles(),
        *family(),
    ]


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
    return ", ".join(
        parts
        + ([] if run["dropout"] else ["no dropout"])
        + (["again"] if "again" in run["name"] else [])
    )


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
ONE_PROCESS = (
    "every run once, in one process, unpatched runs first: no interval, and a drift of "
    "the machine is in the ratios"
)


def ordered(result: Dict[str, Any]) -> str:
    """How the runs of a result were ordered, and what the first step holds."""
    order = result.get("order", ONE_PROCESS)
    note = (
        " (in one process, a kernel that an earlier run compiled is not compiled again)"
        if "order" not in result
        else ""
    )
    return (
        f"Order: {order}. The first step holds what is done once: compiling, choosing "
        f"kernels, self-checks{note}."
    )


def every_run() -> List[str]:
    lines = [
        "### Every run",
        "",
        "Ratios are patched / unpatched, to the unpatched run of the same kind in the same file.",
        "",
    ]
    for name in ("real_cmt_h200", "real_cmt_again_h200", "real_fp16_h200"):
        lines += runs_of(name)
    return lines


def runs_of(name: str) -> List[str]:
    """The table of every training run of a result file."""
    result = load(name)
    runs = merged(
        run
        for run in (*result["runs"], *result.get("family", ()))
        if "patch" in run and "dtype" in run
    )
    named = {(run.get("family"), run["name"]): run for run in runs}

    def scale(run: Dict[str, Any]) -> str:
        """bias_scale's gradient in the last step."""
        seen = run.get("bias_scale_and_gradient")
        return "" if not seen else "none" if seen[-1][1] is None else f"{seen[-1][1]:.3g}"

    def base(run: Dict[str, Any]) -> Any:
        return named.get((run.get("family"), counterpart(run["name"].replace(" again", ""))))

    rows = [
        [f"{run['family']} {run['size']}", words_of(run), *cells(run, base(run)), scale(run)]
        for run in runs
    ]
    return [
        *table(("size", "run", *COSTS, "bias_scale's gradient"), rows),
        ordered(result) + " " + source(name),
        "",
    ]


def apart(run: Dict[str, Any], base: Dict[str, Any]) -> float:
    """Largest relative difference of two loss curves."""
    largest: float = max(abs(a - b) / abs(b) for a, b in zip(run["losses"], base["losses"]))
    return largest


def parity_rows(runs: List[Dict[str, Any]], half: bool = False) -> List[List[Any]]:
    """Of the runs with `FLASHBIAS_DTYPE=fp16` (half) or the others."""
    named = {(run.get("family"), run["name"]): run for run in runs}
    rows = []
    for run in runs:
        base = named.get(
            (run.get("family"), counterpart(run["name"].replace(" again", "").replace(" cp", "")))
        )
        if (run.get("dtype") == "fp16") != half:
            continue
        if (
            run.get("dropout") == 0.0
            and "gradient_error" in run
            and base is not None
            and base is not run
        ):
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


def parity() -> List[str]:
    rows = parity_rows(merged(run for run in load("real_cmt_h200")["runs"] if "losses" in run))
    return [
        "### Parity",
        "",
        "Runs without dropout are compared with an unpatched run from the same weights: the "
        "first step's "
        "gradient of the "
        "decoder, and the largest relative difference of the loss curves. `again` is the "
        "unpatched run repeated, which shows the noise.",
        "",
        *table(("detector", "run", "gradient", "losses", "steps"), rows),
        source("real_cmt_h200"),
        "",
        *half_parity(),
    ]


def half_parity() -> List[str]:
    found = load("real_fp16_h200")
    rows = parity_rows(
        merged(run for run in (*found["runs"], *found["family"]) if "losses" in run), half=True
    )
    return [
        "`FLASHBIAS_DTYPE=fp16` with gradients scaled on their way through "
        "(attention/fp16_gradients.py):",
        "",
        *table(("detector", "run", "gradient", "losses", "steps"), rows),
        source("real_fp16_h200"),
        "",
    ]


def batches() -> List[str]:
    found = load("real_batch_h200")["batches"]
    caps = [row["cap_GiB"] for row in found[0]["batches"]]
    rows = [
        [
            run["size"],
            words_of(run),
            *(
                f"{row['batch']} ({row['step_s']:.2f} s)" if row["step_s"] else row["batch"]
                for row in run["batches"]
            ),
        ]
        for run in found
    ]
    return [
        "### The largest batch that fits",
        "",
        *table(("size", "run", *(f"{cap:g} GiB" for cap in caps)), rows),
        source("real_batch_h200"),
        "",
    ]


def profiles() -> List[str]:
    """Where a step goes, and what that leaves for a faster attention and a smaller one."""
    found = load("real_profile_h200")["profiles"]
    kinds = sorted(
        {kind for run in found for kind in run["kind_ms"]},
        key=lambda k: -found[0]["kind_ms"].get(k, 0.0),
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
    before, after = (
        next(run for run in found if run["name"] == name)
        for name in ("A fp32", "B fp32 dtype=fp16")
    )
    busy, rest = before["gpu_busy_ms"], after["gpu_busy_ms"] - after["kind_ms"]["attention"]
    runs = {run["name"]: run for run in merged(load("real_cmt_h200")["runs"])}
    step, peak = (runs["B fp32 dtype=fp16"][key] for key in ("step_s", "peak_MiB"))
    kept = runs["B fp32 dtype=fp16 cp"]["peak_MiB"]
    return [
        "### Where a step goes",
        "",
        "Times are milliseconds per step under torch.profiler, which slows the CPU.",
        "",
        *table(("run", "wall", "GPU busy", "kernels", *kinds), rows),
        source("real_profile_h200"),
        "",
        f"Patched, with `FLASHBIAS_DTYPE=fp16`, the GPU is busy for "
        f"{after['gpu_busy_ms'] / busy:.2f} "
        "of the unpatched time; "
        f"with an attention that takes no time it would be {rest / busy:.2f}. It is busy for "
        f"{after['gpu_busy_ms']:.0f} ms; a step takes {step * 1e3:.0f} ms without the profiler "
        "(another run, "
        "`real_cmt_h200.json`). During the rest of the step it waits for the detector's own "
        "Python, which the choice of "
        "attention does not change.",
        "",
        "The image backbone determines the peak of memory: with the decoder's layers "
        "checkpointed as "
        "well it is "
        f"{kept:.0f} MiB of {peak:.0f}.",
        "",
    ]


def family() -> List[str]:
    result = load("real_family_h200")
    runs = merged(result["family"])
    named = {(run["family"], run["name"]): run for run in runs}
    rows = [
        [
            run["family"],
            run["size"],
            words_of(run),
            *cells(run, named.get((run["family"], counterpart(run["name"].replace(" again", ""))))),
        ]
        for run in runs
    ]
    return [
        "### PETR and StreamPETR",
        "",
        "Batch 2, ResNet-50, no dropout; StreamPETR reads a stream of frames, so its memory "
        "queue fills step by step.",
        "",
        *table(("detector", "size", "run", *COSTS), rows),
        *table(
            ("detector", "run", "gradient", "losses", "steps"),
            parity_rows([r for r in runs if "losses" in r]),
        ),
        ordered(result) + " " + source("real_family_h200"),
        "",
    ]


def distributed() -> List[str]:
    name = "distributed_h100"
    result = load(name)
    grads = [
        [
            way,
            *(
                f"{result['gradients'][way][key]:.1e}"
                for key in (
                    "ddp_against_one_process",
                    "one_process_against_unpatched",
                    "ddp_against_unpatched_one_process",
                )
            ),
        ]
        for way in ("unpatched", "patched", "patched dtype=fp16")
    ]
    speed = [
        [
            row["name"],
            row["processes"],
            f"{row['step_s']:.3f}",
            f"{row['samples_s']:.2f}",
            f"{row['scaling']:.2f}x",
        ]
        for row in result["throughput"]
    ]
    lines = [
        "## Several GPUs",
        "",
        f"The real CMT under DistributedDataParallel, {result['processes']} processes. Relative "
        "distance of the reduced gradients from those of one process with the whole batch; the "
        "same process twice: "
        f"{result['gradients']['noise']:.1e}.",
        "",
        *table(
            ("run", "DDP - one process", "one process - unpatched one", "DDP - unpatched one"),
            grads,
        ),
        *table(("run", "processes", "s/step", "samples/s", "scaling"), speed),
    ]
    fault = load("distributed_fault_h200")["fault"]
    worst = max(
        abs(a - b) / abs(b)
        for own, other in zip(fault["losses_with_fault"], fault["losses"])
        for a, b in zip(own, other)
    )
    return [
        *lines,
        source(name),
        "",
        f"With a backend failing on the last process alone ({fault['struck'][-1]} times) losses "
        "differ by at most "
        f"{worst:.1e}, and the processes' weights {'agree' if fault['ranks_agree'] else 'DIFFER'}. "
        + source("distributed_fault_h200"),
        "",
    ]


def attention() -> List[str]:
    methods = [
        "picked",
        "picked, no bias",
        "triton",
        "triton segments",
        "triton factors",
        "sdpa flash",
        "sdpa cudnn",
        "sdpa cudnn concatenated",
        "sdpa efficient",
        "sdpa efficient concatenated",
        "sdpa efficient dense",
        "flash-attn 4",
        "flash-attn 4 concatenated",
        "FlashBias' kernel",
    ]
    shapes = dict(
        sorted(
            load("attention_h200")["shapes"].items(), key=lambda item: not item[0].startswith("cmt")
        )
    )

    def cell(result: Any, kind: str = "") -> str:
        if not result or kind + "forward" not in result:
            return "-"
        both = result.get(kind + "forward+backward")
        return (
            f"{result[kind + 'forward']:.3f} / {both:.3f}"
            if both
            else f"{result[kind + 'forward']:.3f} / -"
        )

    def words(shape: str) -> str:
        entry = shapes[shape]["shape"]
        return f"{shape} {tuple(entry[:6])} {entry[6]}"

    rows = [
        [words(shape), *(cell(entry["results"].get(method)) for method in methods)]
        for shape, entry in shapes.items()
    ]
    walls = [
        "picked",
        "triton factors",
        "sdpa cudnn concatenated",
        "sdpa efficient concatenated",
        "flash-attn 4 concatenated",
        "FlashBias' kernel",
    ]
    small = [
        [words(shape), *(cell(shapes[shape]["results"].get(method), "wall ") for method in walls)]
        for shape in shapes
        if "wall forward" in shapes[shape]["results"]["picked"]
    ]

    def worst(result: Any) -> str:
        name, size = result["worst gradient error"]
        return f"{name} ({size:.1e})" if size < 1e9 else f"{name} (not finite)"

    checked = [
        "picked",
        "triton factors",
        "triton segments",
        "sdpa cudnn concatenated",
        "flash-attn 4",
        "flash-attn 4 concatenated",
        "FlashBias' kernel",
    ]
    errors = [
        [
            shape,
            method,
            f"{result['error']:.1e}" if result["error"] < 1e9 else "not finite",
            worst(result),
        ]
        for shape, entry in shapes.items()
        for method, result in entry["results"].items()
        if method in checked and "error" in result and "worst gradient error" in result
    ]
    check = load("attention_check_h200")
    ratios = [case["ratio"] for case in check["cases"]]
    return [
        "## Attention alone",
        "",
        "Milliseconds on the GPU, forward / forward and backward. `concatenated`: the factors as "
        "columns of q and k. "
        "`dense`: the bias materialised. A dash: not measured or not possible.",
        "",
        *table(["shape (B, M, N, H, D, rank)", *methods], rows),
        source("attention_h200"),
        "",
        "`picked` used an earlier order of backends; the current order "
        "(attention/order.py) selects `triton "
        "factors` at every one of these shapes.",
        "",
        "Milliseconds of consecutive calls, with the time of the host included:",
        "",
        *table(["shape (B, M, N, H, D, rank)", *walls], small),
        "Relative errors (L2) against float64. FlashAttention-4 with the factors as columns, 40 "
        "of them, gives a wrong "
        "gradient; `FLASHBIAS_BACKEND=flash` concatenates to a width at which the gradient is "
        "correct, and "
        "checks it.",
        "",
        *table(("shape", "method", "output", "worst gradient"), errors),
        f"The grid of odd lengths, ranks, head dims, dtypes and features: {len(ratios)} cases, "
        "errors at most "
        f"{max(ratios):.2f} of what is allowed (twice plain PyTorch's in the same precision, "
        "plus 1e-5). " + source("attention_check_h200"),
        "",
        *flex(),
    ]


def flex() -> List[str]:
    """flex_attention with a bias that learns, in three forms."""
    name = "attention_flex_h100"
    (entry,) = load(name)["shapes"].values()
    words = {
        "triton factors": "this package, factors",
        "flex_attention concatenated": "flex_attention, factors as columns of q and k",
        "flex_attention factors": "flex_attention, factors read by score_mod",
        "flex_attention dense": "flex_attention, dense bias read by score_mod",
        "sdpa efficient dense": "SDPA efficient, dense bias as mask",
    }
    rows = []
    for method, text in words.items():
        found = entry["results"][method]
        mode = "forward" if "no backward" in found else "forward+backward"
        rows.append(
            [
                text,
                f"{found['forward']:.3f}",
                "refuses" if "no backward" in found else f"{found['forward+backward']:.3f}",
                f"{found['MiB ' + mode]:.0f}",
                f"{found['error']:.1e}" if "error" in found else "",
            ]
        )
    return [
        "For comparison, flex_attention with a learned bias of rank 8, 1490 x 22384, batch 2, 8 "
        "heads of 32, float16. flex_attention does not support factors that need a gradient if "
        "score_mod reads them (several reads of one tensor).",
        "",
        *table(("way", "forward, ms", "forward+backward, ms", "MiB", "error"), rows),
        source(name),
        "",
    ]


def ab() -> List[str]:
    from flashbias_patch.ab.result import rows, says

    lines = ["## `flashbias ab` on the real CMT", ""]
    for name in ("ab_real_cmt_h200", "ab_real_cmt_fp16_h200"):
        document = load(name)
        lines += [
            says(document),
            "",
            *table(("", "A unpatched", "B patched", "patched / unpatched"), rows(document)),
            source(name),
            "",
        ]
    return [
        *lines,
        "The second command trains with attention dropout 0.1: B draws other random numbers "
        "than A, so its training is compared with one more A that also draws other random numbers.",
        "",
    ]


def bias_memory() -> List[str]:
    result = load("bias_memory_h200")
    shape, rows = result["shape"], result["rows"]
    dense_mib = shape["B"] * shape["H"] * shape["M"] * shape["N"] * 4 / 2**20
    dense = rows["DenseBias"]["extra_mib"] + dense_mib
    lines = [
        "## Memory of a bias that learns",
        "",
        f"Forward and backward of one attention at {shape['M']}x{shape['N']}, fp16. Peak above "
        "q, k and v, their "
        f"gradients included; the dense bias itself ({dense_mib:.0f} MiB) is counted with it.",
        "",
    ]
    body = [
        [
            name,
            f"{row['ms']:.2f}",
            f"{row['extra_mib'] + (dense_mib if name == 'DenseBias' else 0):.0f}",
            f"1/{dense / row['extra_mib']:.0f}" if name not in ("DenseBias", "none") else "",
        ]
        for name, row in rows.items()
        if name != "none"
    ]
    return [
        *lines,
        *table(("bias", "ms, host included", "MiB", "of the dense"), body),
        source("bias_memory_h200"),
        "",
    ]


def factorize() -> List[str]:
    rows = [
        [
            f"{r['rows']}x{r['columns']}",
            r["method"],
            f"{r['seconds'] * 1e3:.1f}",
            r["rank"],
            f"{r['relative_error']:.2e}",
        ]
        for r in load("factorize_h200")["results"]
    ]
    return [
        "## Factorising a dense bias",
        "",
        *table(("shape", "method", "ms", "rank", "relative error"), rows),
        source("factorize_h200"),
        "",
    ]


def flash() -> List[str]:
    def cell(method: Dict[str, Any]) -> str:
        return f"{method['forward']['ms']:.3f} / {method['forward_backward']['ms']:.3f}"

    def worst(method: Dict[str, Any]) -> str:
        errors = method.get("errors")
        return (
            ""
            if not errors
            else "{} ({:.1e})".format(*max(errors.items(), key=lambda item: item[1]))
        )

    rows = [
        [
            c["name"],
            cell(c["methods"]["no bias"]),
            cell(c["methods"]["by hand"]),
            worst(c["methods"]["by hand"]),
            cell(c["methods"]["backend"]),
        ]
        for c in load("flash_backend_h200")["cases"]
    ]
    return [
        "## FlashAttention-4 with concatenated factors",
        "",
        "FlashAttention-4 4.0.0b36. Where its head dims differ (every row but `rank 24 split`) "
        "the gradient of q that "
        "it returns is wrong, both by hand and through the backend: those times are not of a "
        "usable backward pass. "
        "The backend now pads v to q's head dim.",
        "",
        *table(
            (
                "case",
                "no bias, ms",
                "concatenated by hand, ms",
                "worst relative error",
                "backend, ms",
            ),
            rows,
        ),
        source("flash_backend_h200"),
        "",
    ]


def overhead() -> List[str]:
    result = load("overhead_cpu")
    call, imports = result["call"], result["import"]
    rows = [
        ["import, on / off", f"{imports['import_ms']:.1f} / {imports['import_off_ms']:.1f} ms"],
        ["a bare interpreter's start", f"{imports['bare_interpreter_ms']:.1f} ms"],
        ["the shim's Python a call", f"{call['shim_us']:.0f} us"],
        [
            "a call of almost no arithmetic, patched / unpatched",
            f"{call['ratio']:.2f}x of {call['unpatched_us']:.0f} us",
        ],
        ["of it guarding, at most", f"{max(result['guarding_us'].values()):.1f} us"],
    ]
    return [
        "## Overhead",
        "",
        "The table gives processor time on a machine that had other work to do; it varies by some "
        "microseconds between runs.",
        "",
        *table(("what", "cost"), rows),
        source("overhead_cpu"),
        "",
    ]


def host_calls() -> List[str]:
    """The host's work per call, as counted by benchmarks/host_calls.py: on the CPU, and on the
    fused path without its GPU."""
    lines = [
        "## The host's work per call",
        "",
        "One steady-state call (batch 1) of each class's stand-in, unpatched -> patched: function "
        "calls (Python and C), the ratio of these, operators and allocations of torch. A count has "
        "no noise. On the CPU path SDPA computes; on the "
        "fused path each kernel launch is counted as two calls and is not made. If a "
        "bias is given, or the "
        "class needs flash-attn, there is no unpatched call to compare with.",
        "",
    ]
    titles = {"host_calls_cpu": "The CPU path", "host_calls_fused": "The fused path"}
    for name, title in titles.items():
        rows = []
        for row in load(name)["counts"]:
            if row["class"] not in ("CMT", "CMT flash", "StreamPETR", "CMT decoder layer"):
                continue
            ours, theirs = row["patched"], row.get("unpatched")
            calls = ours["python"] + ours["c"]
            before = None if theirs is None else theirs["python"] + theirs["c"]

            def pair(figure: str, ours: Any = ours, theirs: Any = theirs) -> str:
                return (
                    f"{ours[figure]}" if theirs is None else f"{theirs[figure]} -> {ours[figure]}"
                )

            what = ", ".join(word for word in (row["call"], row["features"]) if word)
            rows.append(
                [
                    row["class"],
                    what,
                    calls if before is None else f"{before} -> {calls}",
                    "" if before is None else f"{calls / before:.2f}x",
                    pair("operators"),
                    pair("allocations"),
                ]
            )
        lines += [
            title,
            "",
            *table(("class", "call", "function calls", "ratio", "operators", "allocations"), rows),
            source(name),
            "",
        ]
    return [*lines, *decoders()]


def decoders() -> List[str]:
    """Six layers on a GPU, from benchmarks/host_calls.py: launches, and the time of the host and of
    all."""
    rows = [
        [
            run["decoder"],
            f"{run['launches_unpatched']} -> {run['launches_patched']}",
            f"{run['host_ms_unpatched']:.1f} -> {run['host_ms_patched']:.1f}",
            f"{run['ms_unpatched']:.1f} -> {run['ms_patched']:.1f}",
            f"{run['ms_ratio']:.2f}",
            f"{run['first_s_unpatched']:.1f} -> {run['first_s_patched']:.1f}",
        ]
        for run in load("host_calls_h200")["decoders"]
    ]
    return [
        "Decoders of six layers on a GPU, each measured once, float32 where no autocast is "
        "named. The first call of a "
        "new class includes the compilation of its kernels.",
        "",
        *table(
            ("decoder", "launches", "host, ms", "ms", "patched / unpatched", "first call, s"), rows
        ),
        source("host_calls_h200"),
        "",
    ]


FUSION, FRESH, INFERENCE, CAMERA, CAMERA_AGAIN = (
    "fusion_blocks_h200",
    "fusion_h200",
    "inference_h200",
    "camera_blocks_h200",
    "camera_again_h200",
)
DETECTORS = {
    "fusion0100": "CMT fusion 0100",
    "fusion0075": "CMT fusion 0075",
    "cmt": "CMT camera",
    "petr": "PETR",
    "streampetr": "StreamPETR",
}


def named_detector(run: Dict[str, Any]) -> str:
    return f"{DETECTORS[run['family']]}, {run['size']}, batch {run['bs']}"


def training_rows(name: str) -> List[List[str]]:
    """Rows under COSTS."""
    result = load(name)
    runs = merged([*result["runs"], *result["family"]])
    named = {(run["family"], run["name"]): run for run in runs}
    return [
        [
            named_detector(run),
            words_of(run),
            *cells(run, named.get((run["family"], counterpart(run["name"])))),
        ]
        for run in runs
    ]


def block_table(name: str, first: str) -> List[str]:
    """Runs that shared a process: their first steps tell nothing and are left out."""
    head = [first, "run", *COSTS]
    place = head.index("first step, s")
    rows = training_rows(name)
    return table(head[:place] + head[place + 1 :], [row[:place] + row[place + 1 :] for row in rows])


def fusion() -> List[str]:
    """The fusion detector with its lidar branch, by real_models.py."""
    return [
        "## The fusion detector",
        "",
        "Fusion CMT with its lidar branch (spconv) and ResNet-50 as image branch. Ratios are "
        "patched / unpatched with 95% intervals, to the unpatched run of the same kind.",
        "",
        *block_table(FUSION, "detector"),
        f"Order: {load(FUSION)['order']}. " + source(FUSION),
        "",
        "### A fresh process for each run",
        "",
        "These runs were made on another machine and before the current tile shapes of float32.",
        "",
        *table(("detector", "run", *COSTS), training_rows(FRESH)),
        ordered(load(FRESH)) + " " + source(FRESH),
        "",
        "### Latency",
        "",
        "Forward passes in evaluation mode without gradients, from images and points to the "
        "head's output; the median of 20 after 10, then of the runs.",
        "",
        *latency(INFERENCE),
    ]


def fusion_evidence() -> List[str]:
    """Of the fusion detector: results that take the same work on any device, where they are."""
    lines: List[str] = []
    for begin, section in evidence.SECTIONS.items():
        for path in sorted(RESULTS.glob(f"{begin}_*.json")):
            lines += [*section(load(path.stem), table), source(path.stem), ""]
    return lines


def camera() -> List[str]:
    """Camera detectors of several sizes; the steps of the small ones wait for the host."""
    return [
        "## Camera detectors",
        "",
        "The steps of small detectors wait for the host, whose speed varied: if the times of a row "
        "differ much, its interval is wide.",
        "",
        *block_table(CAMERA, "detector"),
        f"Order: {load(CAMERA)['order']}.",
        "",
        *latency(CAMERA),
        "### With less work of the host",
        "",
        "CMT camera again, on another machine of the same kind, since kernels are launched without "
        "the Python of Triton's launcher, and long backward passes from a plan too. The unpatched "
        "steps show how the host's speed drifted. The run was cut before StreamPETR.",
        "",
        *block_table(CAMERA_AGAIN, "detector"),
        *latency(CAMERA_AGAIN),
    ]


def small_detectors(page: str) -> str:
    """The sentence on inference and small detectors. `page`: in front of an anchor."""
    found: Dict[Any, List[float]] = {}
    for name in (CAMERA, CAMERA_AGAIN):  # the newest of each detector
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
        f"([latencies]({page}#camera-detectors)). The steps of small detectors wait for the host "
        "and gain little or nothing. Measure yours with `flashbias ab`."
    )


def reference_backend() -> List[str]:
    """The backend that needs nothing but torch, beside plain attention."""
    name = "reference_backend_h200"
    words = {
        "plain": "softmax(bmm) bmm",
        "weights": "the same, and the mean of the weights",
        "reference": "`FLASHBIAS_BACKEND=reference`",
    }
    rows = [
        [words[key], f"{row['ms']:.1f}", row["time / plain"], row["mib"], row["memory / plain"]]
        for key, row in load(name)["rows"].items()
    ]
    return [
        "## The reference backend on a GPU",
        "",
        "Float32, 1490 x 22384, batch 2, dropout 0.1, a tenth of the keys hidden; forward and "
        "backward. It saves memory, not time.",
        "",
        *table(("attention", "ms", "time", "MiB", "memory"), rows),
        source(name),
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


def bias_scale() -> List[str]:
    lines = [
        "## bias_scale learns",
        "",
        "`bias_scale` times a fixed map: relative error of its first gradient, and the largest "
        "difference of its "
        "path over 20 optimiser steps, against the same decoder unpatched in float64 with the "
        "dense map as mask.",
        "",
    ]
    for name in ("bias_scale_mini_cmt", "bias_scale_cmt"):
        if not (RESULTS / f"{name}.json").exists():
            continue
        result = load(name)
        rows = [
            [
                r["way"],
                "on" if r["checkpoint"] else "off",
                r["bias"],
                f"{r['gradient_error']:.1e}",
                f"{r['path_error']:.1e}",
            ]
            for r in result["rows"]
        ]
        lost = result["unpatched_checkpointed_gradient"]
        lines += [
            f"{result['decoder']}, {result['M']}x{result['N']}. Unpatched and checkpointed, its "
            f"gradient is `{lost}`.",
            "",
            *table(("way", "checkpointing", "bias", "gradient", "path"), rows),
            source(name),
            "",
        ]
    return lines


def windows() -> List[str]:
    name = "windows_h200"
    if not (RESULTS / f"{name}.json").exists():
        return []
    result = load(name)

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else "-"

    def memory(value: Any) -> str:
        return f"{value:.0f}" if isinstance(value, float) else "-"

    lines = [
        "## Local windows on grids",
        "",
        "Batch 2, 1490 queries, 8 heads of 32, 180 x 180 + 6 x 40 x 100 keys, windows of 15 x 15 "
        "in both frames; "
        "MiB beyond the operands. Each way starts from the input that its user has: a "
        "generator writes a dense "
        "bias in every call.",
        "",
    ]
    modes = ("forward", "forward+backward")
    groups = {
        "float16": "float16",
        "bfloat16": "bfloat16",
        "float32": "float32",
        "generators": "Dense biases and masks, float16",
        "flex": "flex_attention, float16",
    }
    for group, title in groups.items():
        rows = [
            [way, *(cell(got.get(mode)) for mode in modes), memory(got.get("MiB forward+backward"))]
            for way, got in result.get(group, {}).items()
        ]
        lines += [f"{title}, ms", "", *table(("way", *modes, "MiB"), rows)] if rows else []
    rows = [
        [way, f"{got['milliseconds']:.2f}", f"{got['MiB']:.0f}"]
        for way, got in result["layers"].items()
    ]
    lines += [
        "A bias made once and six layers, forward and backward:",
        "",
        *table(("bias", "ms", "MiB"), rows),
    ]
    return [*lines, source(name), ""]


def performance() -> str:
    sections = [
        real_cmt,
        fusion,
        fusion_evidence,
        camera,
        ab,
        distributed,
        attention,
        windows,
        bias_memory,
        factorize,
        bias_scale,
        flash,
        reference_backend,
        overhead,
        host_calls,
    ]
    lines = [
        "# Performance",
        "",
        "Generated by `docs/make_performance.py` from `benchmarks/results/`.",
        "",
    ]
    return "\n".join([*lines, *(line for section in sections for line in section())])


def readme(name: str = "README.md") -> str:
    """README.md, or a translation of it, with the table and the sentences that the JSON files
    give."""
    text = (ROOT / name).read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    from flashbias_patch.ab.result import says

    verdict = (
        "`flashbias ab` on CMT camera, 1600x640, batch 2, without dropout, in fresh processes; a "
        "second unpatched run gives the noise "
        "([all of it](docs/performance.md#flashbias-ab-on-the-real-cmt)): "
        f"{says(load('ab_real_cmt_h200'))}"
    )
    named = {
        (run["patch"], run["size"]): run["batches"] for run in load("real_batch_h200")["batches"]
    }
    fits = "; ".join(
        f"{size}: "
        + ", ".join(
            f"{before['cap_GiB']:g} GiB {before['batch']} -> {after['batch']}"
            for before, after in zip(named[False, size], named[True, size])
        )
        for size in ("1600x640", "800x320")
    )
    batch = (
        "**The largest batch that fits, unpatched -> patched** with `FLASHBIAS_DTYPE=fp16` "
        f"([times](docs/performance.md#the-largest-batch-that-fits)): {fits}."
    )
    notes = how_to_read("docs/performance.md")
    measured = "\n".join(
        [
            *block_table(FUSION, "fusion CMT, with lidar"),
            *block_table(CAMERA, "camera detectors"),
            notes,
            "",
            small_detectors("docs/performance.md"),
            "",
            batch,
            "",
            verdict,
        ]
    )
    return f"{before}{MARKS[0]}\n{measured}\n{MARKS[1]}{after}"


def main() -> int:
    wanted = {
        ROOT / "docs" / "performance.md": performance(),
        **{ROOT / name: readme(name) for name in ("README.md", "README.zh-CN.md")},
    }
    stale = [
        path
        for path, text in wanted.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        print(
            "\n".join(
                f"{path.name} is not what its JSON files say: run docs/make_performance.py"
                for path in stale
            )
        )
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
