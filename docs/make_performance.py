"""Writes docs/performance.md, and the figures of both READMEs, from benchmarks/results/*.json: none
is typed by hand.

python docs/make_performance.py [--check]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "docs")]
import detectors_page as detectors  # noqa: E402
import evidence  # noqa: E402
from measured import RESULTS, apart, load, source, table  # noqa: E402

MARKS = ("<!-- measured -->", "<!-- /measured -->")
# Result, report, and what was compared.
AB = (
    ("ab_fusion0100_h200", "ab_fusion0100", "Fusion 0100, without dropout, float32"),
    (
        "ab_fusion0100_fp16_h200",
        "ab_fusion0100_fp16",
        "Fusion 0100, attention dropout 0.1, patched with `FLASHBIAS_DTYPE=fp16`",
    ),
    ("ab_real_cmt_h200", "", "Camera 1600x640, without dropout, float32"),
)


def distributed() -> List[str]:
    two, shared = "distributed_h100", "distributed_shared_h200"
    fusion = "distributed_fusion_shared_h200"
    result = load(two)
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
    return [
        "## Several GPUs",
        "",
        "The real CMT under DistributedDataParallel, against one process that has the whole batch. "
        "More than two GPUs were not tried.",
        "",
        "Two processes with a GPU each (NCCL):",
        "",
        *reduced_gradients(result),
        *table(("run", "processes", "s/step", "samples/s", "scaling"), speed),
        source(two),
        "",
        *failing_rank("distributed_fault_h200"),
        "Newer: two processes that share a GPU (gloo); throughput was not measured. Patched, a "
        "batch of one is computed without transposes since, and so rounds otherwise than a larger "
        "one does:",
        "",
        *reduced_gradients(load(shared)),
        *failing_rank(shared),
        "The same of the fusion detector 0100, with one output of the lidar branch for all, since "
        "its order on a GPU is another in each run. The losses with a failing backend are with the "
        "branch itself:",
        "",
        *reduced_gradients(load(fusion)),
        *failing_rank(fusion),
    ]


def reduced_gradients(result: Dict[str, Any]) -> List[str]:
    """How far DDP's gradients are from those of one process."""
    found = result["gradients"]
    columns = {
        "DDP from one process": "ddp_against_one_process",
        "one process from an unpatched one": "one_process_against_unpatched",
        "DDP from an unpatched one": "ddp_against_unpatched_one_process",
    }
    return [
        f"Relative distances of the gradients; of one process, run twice: {found['noise']:.1e}.",
        "",
        *table(
            ("run", *columns),
            [
                [way, *(f"{found[way][key]:.1e}" for key in columns.values())]
                for way in ("unpatched", "patched", "patched dtype=fp16")
            ],
        ),
    ]


def failing_rank(name: str) -> List[str]:
    """Losses with a fault on one process."""
    fault = load(name)["fault"]

    def worst(kind: str) -> float:
        return max(max(apart(own, other)) for own, other in zip(fault[kind], fault["losses"]))

    noise = worst("losses_again")
    return [
        f"With a backend failing on the last process alone ({fault['struck'][-1]} times) losses "
        f"differ by at most {worst('losses_with_fault'):.1e}"
        + (f" (two runs without a fault by {noise:.1e})" if noise else "")
        + f", and the processes' weights {'agree' if fault['ranks_agree'] else 'DIFFER'}. "
        + source(name),
        "",
    ]


def fsdp() -> List[str]:
    """FSDP2 against DDP."""
    lines = [
        "### FSDP2",
        "",
        "examples/mini_cmt under `fully_shard`, against the losses and parameters of unpatched "
        "DistributedDataParallel without checkpointing: the largest relative difference of the "
        "losses in the first step and in all, and the relative distance of the parameters at the "
        "end. With one process nothing is divided: it shows that FSDP2's hooks and checkpointing "
        "work together with the patches on a GPU.",
        "",
    ]
    for name in ("fsdp_h200", "fsdp_one_h200", "fsdp_cpu"):
        result = load(name)
        found = result["fsdp"]
        truth = found["losses_ddp_unpatched"]
        rows = []
        for way, run in found.items():
            if not isinstance(run, dict):
                continue
            ranks = [apart(own, other) for own, other in zip(run["losses"], truth)]
            rows.append(
                [
                    *(way, f"{max(each[0] for each in ranks):.1e}", f"{max(map(max, ranks)):.1e}"),
                    *(f"{run['weights']:.1e}", f"{run['peak_MiB']:.0f}" if run["peak_MiB"] else ""),
                ]
            )
        lines += [
            f"{counted(result['processes'])}, {result['backend']}, {found['steps']} steps:",
            "",
            *table(("run", "losses, first step", "all steps", "parameters", "peak MiB"), rows),
            source(name),
            "",
        ]
    return lines


def counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


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

    lines = [
        "## `flashbias ab` on the real CMT",
        "",
        "A is unpatched, B patched; batch 2, `PETRMultiheadAttention`, and otherwise as "
        "[above](#the-fusion-detector). The command is a training loop around CMT's own code that "
        "is not part of this repository, so that it cannot be repeated exactly; it puts names in "
        "the place of an old flash-attn, which is imported and not called (`--stub-flash`). "
        "The fusion detector is not deterministic on a GPU, unpatched either: two unpatched runs "
        "differ. Of its two comparisons, the one with dropout would not notice a difference of "
        "20% ([which are noticed](ab.md#how-the-verdict-is-reached)). Another machine, and another "
        "training loop, than those of the tables above: other ratios.",
        "",
    ]
    for name, report, kind in AB:
        document = load(name)
        whole = f" [The whole report](reports/{report}.md)." if report else ""
        lines += [
            f"{kind}: {says(document)}{whole}",
            "",
            *table(("", "A unpatched", "B patched", "patched / unpatched"), rows(document)),
            source(name),
            "",
        ]
    return [
        *lines,
        "With dropout B draws other random numbers than A: its training is compared with one "
        "more A that draws other ones too, the redrawn A. The word on the loss says whether B "
        "differs from A, for three steps in a row, by more than three times as much as As differ "
        "from each other; the percentages are the largest differences at single steps "
        "([how both are found](ab.md#how-the-verdict-is-reached)).",
        "",
    ]


def interval(name: str) -> str:
    """How sure the ratio of times is, and what the run pays before its first step."""
    found = load(name)["headline"]
    time, total = found["time"], found.get("total_s")
    text = f"95% interval of the time per step: {time['low']:.2f} to {time['high']:.2f}"
    if total:
        text += (
            f"; the first step ends later, so that these short runs took "
            f"{total[1] / total[0]:.2f}x as long (even after {found['break_even_step']} steps)"
        )
    return text + "."


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


def fusion_evidence() -> List[str]:
    """Of the fusion detector: results that take the same work on any device, where they are."""
    lines: List[str] = []
    for begin, section in evidence.SECTIONS.items():
        for path in sorted(RESULTS.glob(f"{begin}_*.json")):
            lines += [*section(load(path.stem)), source(path.stem), ""]
    return lines


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
        detectors.fusion,
        fusion_evidence,
        detectors.camera,
        ab,
        distributed,
        fsdp,
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
        "Generated by `docs/make_performance.py` from `benchmarks/results/`. To measure it again: "
        "[measuring the real detectors](guides/measuring.md).",
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

    verdict = [
        "`flashbias ab`, 12 steps in each of several fresh processes, batch 2 "
        "([tables, reports, and what such a comparison notices]"
        "(docs/performance.md#flashbias-ab-on-the-real-cmt)):",
        "",
        *(f"* {kind}: {says(load(name))} {interval(name)}" for name, _, kind in AB),
    ]
    batch = (
        "**The largest batch that fits, unpatched -> patched** with `FLASHBIAS_DTYPE=fp16` "
        "([searched once](docs/performance.md#the-largest-batch-that-fits)): "
        f"{detectors.largest_batches()}."
    )
    exact, held = (load(name)["gradients"] for name in ("real_parity_cpu", "real_parity_held_h200"))
    nudged = held["unpatched, nudged"]["all"]
    parity = (
        "On the CPU two unpatched runs of CMT's camera detector are equal bit for bit, and the "
        "patched run's first gradients are within "
        f"{max(exact['patched'].values()):.0e} of theirs ([30 steps](docs/performance.md#parity-"
        "over-30-steps)). On a GPU the fusion detector's lidar branch computes in another order in "
        "each run. With one output of it for all, two unpatched runs are equal; the patched run's "
        f"first gradients are {held['patched']['all']:.2%} from theirs, and those of an unpatched "
        f"run with every parameter changed in the last place {nudged:.2%} "
        "([100 steps](docs/performance.md#parity-over-100-steps-lidar-held))."
    )
    assert not held["unpatched again"]["all"]
    assert not exact["unpatched again"]["all"]
    measured = "\n".join(
        [
            *detectors.shown("fusion", "fusion CMT, with lidar"),
            *detectors.shown("camera", "camera detectors"),
            detectors.how_to_read("docs/performance.md"),
            "",
            *detectors.inference_ratios("docs/performance.md"),
            "",
            batch,
            "",
            *verdict,
            "",
            parity,
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
