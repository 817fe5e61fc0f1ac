"""Sections of docs/performance.md on what the fusion detector computes: for make_performance.py."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

from measured import table

HELD = (
    "Sparse convolutions and their voxels have another order in each run on a GPU, and that "
    "rounding hides what attention does. Here the lidar branch's output was computed once and "
    "given to every run (`--hold-lidar`); its gradient is compared as that of the lidar branch, "
    "which is not trained."
)
PARTS = ("all", "decoder", "head", "image branch", "lidar branch")


def detector(result: Dict[str, Any]) -> str:
    """What was trained: as benchmarks/real_parity.py and its like call it, or with --tiny."""
    if "--tiny" in result.get("command", ""):
        return f"{result['family']}, 160x64, two layers, batch 1, {result['device']}"
    return f"{result['family']}, batch {result['bs']}"


def small(value: Any) -> str:
    return "" if value is None else f"{value:.1e}"


def parity(result: Dict[str, Any]) -> List[str]:
    """By benchmarks/real_parity.py."""
    gradients, curves, runs = result["gradients"], result["curves"], result["runs"]
    parts = [part for part in PARTS if any(part in each for each in gradients.values())]
    rows = []
    for name, run in runs.items():
        losses = run.get("losses") or []
        curve = curves.get(name, {})
        rows.append(
            [
                name,
                *(small(gradients.get(name, {}).get(part)) for part in parts),
                small(curve.get("median")),
                small(curve.get("largest")),
                f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else run.get("error", ""),
                len(losses),
            ]
        )
    held = result.get("lidar_held", False)
    return [
        f"### Parity over {result['steps']} steps{', lidar held' if held else ''}",
        "",
        *([HELD, ""] if held else []),
        f"{detector(result)}, without dropout, from the same weights on the "
        "same frame; relative distance from the first unpatched run, of the first step's gradients "
        "(L2), and of the losses over all steps. `unpatched again`: the same once more, which is "
        "the noise of the machine; `nudged`: unpatched with every parameter changed in the last "
        "place, which has the same effect as other rounding.",
        "",
        *first_losses(runs),
        *table(
            (
                "run",
                *(f"gradient, {part}" for part in parts),
                "losses, median",
                "losses, largest",
                "first, last",
                "steps",
            ),
            rows,
        ),
        *curves_by_step(curves),
    ]


def first_losses(runs: Dict[str, Any]) -> List[str]:
    """How far the first losses of the two unpatched runs, of the same weights, are apart."""
    both = [runs.get(name, {}).get("losses") for name in ("unpatched", "unpatched again")]
    if not all(both):
        return []
    if both[0] == both[1]:
        return ["The detector is reproducible there: both unpatched runs are equal.", ""]
    first, again = (losses[0] for losses in both)
    if first == again:
        return []
    return [
        f"The detector is not reproducible: {small(abs(again - first) / first)} between the first "
        "losses of the two unpatched runs.",
        "",
    ]


def curves_by_step(curves: Dict[str, Any]) -> List[str]:
    """The growth of the distances: medians of each tenth of the curves."""
    known = {name: curve["by_tenth"] for name, curve in curves.items() if curve.get("by_tenth")}
    count = max(map(len, known.values()), default=0)
    return [
        "Median distance of the losses by tenth of the steps:",
        "",
        *table(
            ("run", *map(str, range(1, count + 1))),
            [
                [name, *map(small, values), *[""] * (count - len(values))]
                for name, values in known.items()
            ],
        ),
    ]


def metrics(found: Dict[str, Any]) -> List[str]:
    """mAP and NDS, or why there are none."""
    if "mAP" not in found:
        return [found.get("why_not", ""), ""]
    return [f"{found['mAP']:.4f}", f"{found['NDS']:.4f}"]


def matched(pair: Any) -> List[str]:
    """How many of A's boxes match, and how far the matched ones are apart at most."""
    if not pair:
        return ["", "", ""]
    largest = {name: value["largest"] for name, value in pair["differences"].items()}
    if not pair["matched"]:
        return [f"0 of {pair['only_a']}", "", ""]
    return [
        f"{pair['matched']} of {pair['matched'] + pair['only_a']}",
        small(largest["centre (m)"]),
        small(largest["score"]),
    ]


def accuracy(result: Dict[str, Any]) -> List[str]:
    """By benchmarks/real_accuracy.py."""
    least = f"score {result['confident']:g} or more"
    trained = [
        [
            name,
            run.get("error") or f"{run['losses'][-1]:.3f}",
            *metrics(run.get("accuracy", {})),
            matched(run.get("boxes"))[0],
            *matched(run.get("confident_boxes")),
        ]
        for name, run in result["trained"].items()
    ]
    about = f"{detector(result)}, without dropout, learning rate up to {result['lr']:g}"
    lines: List[str] = []
    if len(trained) > 1:
        lines = [
            f"### Accuracy after {result['steps']} steps on one frame",
            "",
            f"{about}; trained from the same weights and evaluated on the frame, each in its own "
            "way. Boxes are those that CMT's get_bboxes gives, matched with the first unpatched "
            "run's by their centres (2 m at most); mAP and NDS are nuscenes-devkit's.",
            "",
            *table(
                (
                    *("run", "last loss", "mAP", "NDS", "boxes matched", f"of {least}"),
                    *("centres, m, at most", "scores, at most"),
                ),
                trained,
            ),
        ]
    return [*lines, *evaluated(result, about)]


def evaluated(result: Dict[str, Any], about: str) -> List[str]:
    """Of `flashbias ab --eval`; nothing where no comparison ended."""
    found = result["evaluated"]
    if not found:
        return []
    rows = []
    for dtype, each in found.items():
        side = f"`FLASHBIAS_DTYPE={dtype}`"
        if "error" in each:
            rows.append([side, each["error"], *[""] * 8])
            continue
        again = matched(each["a_a"])
        rows.append(
            [
                *(side, each["word"], *matched(each["a_b"])),
                *(str(each["a_b"]["labels_changed"]), again[1], again[2]),
                " / ".join(metrics(each["accuracy"][label])[0] for label in "AB"),
                " / ".join(metrics(each["accuracy"][label])[1] for label in "AB"),
            ]
        )
    return [
        f"### `flashbias ab --eval` after {result['steps']} steps on one frame",
        "",
        f"{about}. From the weights that the unpatched run trained, detections unpatched against "
        "patched; A/A is unpatched against unpatched again. Boxes are matched by their centres "
        "(2 m at most); mAP and NDS are nuscenes-devkit's.",
        "",
        *table(
            (
                *("patched side", "verdict", "boxes matched", "centres, m", "scores"),
                *("labels changed", "A/A centres, m", "A/A scores"),
                *("mAP, A / B", "NDS, A / B"),
            ),
            rows,
        ),
    ]


def windows(result: Dict[str, Any]) -> List[str]:
    """By benchmarks/real_windows.py."""
    options = result["windows"] or "by default"
    rate = f", bias_scale's learning rate {result['bias_lr']:g}" if result.get("bias_lr") else ""
    times = [
        "Times and memory, each process alone; ratios are to `dense`:",
        "",
        *timed(result["timed"]),
    ]
    return [
        f"### Windows over {result['steps']} steps{rate}",
        "",
        f"{detector(result)}, without dropout, `aqr`: bias='window', "
        f"{options}. `dense`: unpatched, the same router's windows written into a dense bias "
        "(B, M, N), the mask of each cross attention."
        + (
            " `dense again`: the same once more, which is the noise of the machine."
            if "dense again" in result["paths"]
            else ""
        ),
        "",
        *(times if result["timed"] else ()),
        *first_gradients(result.get("first_gradient", {})),
        *cut_paths(result),
        *paths(result["paths"], result["against_dense"]),
        *without_sensors(result["paths"]),
    ]


def cut_paths(result: Dict[str, Any]) -> List[str]:
    """Where the paths were ended before their last step."""
    made = max(len(run.get("scales", ())) for run in result["paths"].values())
    return [f"The paths were cut after {made} steps.", ""] if made < result["steps"] else []


def first_gradients(found: Dict[str, Any]) -> List[str]:
    """bias_scale's gradients at the same weights, with their standard errors."""
    if not found:
        return []
    rows = [
        [name, *(f"{m:.4f} ± {e:.4f}" for m, e in zip(each["mean"], each["standard_error"]))]
        for name, each in found.items()
    ]
    return [
        "`bias_scale`'s gradient in the first step, taken several times at the same weights: means "
        "and their standard errors. `trained with drops` is given other input: without one sensor "
        "in half of the steps.",
        "",
        *table(("run", "gradient"), rows),
    ]


def timed(runs: Dict[str, Any]) -> List[str]:
    base = runs.get("dense", {})
    rows = []
    for name, run in runs.items():
        if "step_s" not in run:
            rows.append([name, run.get("error", ""), "", "", "", ""])
            continue
        known = run is not base and "step_s" in base
        peak = run["peak_MiB"]
        rows.append(
            [
                *(name, f"{run['step_s']:.3f}"),
                f"{run['step_s'] / base['step_s']:.2f}x" if known else "",
                *(f"{run['times'][0]:.1f}", f"{peak:.0f}"),
                f"{peak / base['peak_MiB']:.2f}x" if known and base["peak_MiB"] else "",
            ]
        )
    return table(("run", "s/step", "time", "first step, s", "peak MiB", "memory"), rows)


def paths(runs: Dict[str, Any], against: Dict[str, Any]) -> List[str]:
    rows = []
    for name, run in runs.items():
        found = against.get(name, {})
        path, losses, scales = found.get("path", {}), found.get("losses", {}), run.get("scales")
        moved = ", ".join(f"{scales[i][0]:.5f}" for i in (0, -1)) if scales else ""
        rows.append(
            [
                name,
                *(len(scales or ()), moved or run.get("error", "")),
                *map(small, (found.get("gradient_error"), path.get("apart"))),
                small(path.get("relative")),
                *(small(losses.get(key)) for key in ("median", "largest")),
            ]
        )
    return [
        "The path of `bias_scale` against that of `dense`: its gradient in the first step, where "
        "all weights agree; the largest distance of the two paths, and that relative to how far "
        "the dense one moved. Both gradients are those of one step.",
        "",
        *table(
            (
                *("run", "steps", "bias_scale, first and last", "first gradient"),
                "path, at most",
                *("of its length", "losses, median", "losses, largest"),
            ),
            rows,
        ),
    ]


def without_sensors(runs: Dict[str, Any]) -> List[str]:
    """Losses at the end, and the mean weights that a router gives with both sensors and without."""
    sensors = ("none", "lidar", "cameras")
    rows = [
        [
            name,
            *(f"{run['under_drop'][sensor]['loss']:.3f}" for sensor in sensors),
            *(
                ", ".join(f"{weight:.2f}" for weight in run["under_drop"][sensor]["weights"])
                for sensor in sensors
            ),
        ]
        for name, run in runs.items()
        if "under_drop" in run
    ]
    if not rows:
        return []
    return [
        "At the end of the path, the loss with both sensors and with the features of one set to "
        "zero, and the mean weights of lidar and cameras that the router then gives:",
        "",
        *table(
            (
                *("run", "loss, both", "without lidar", "without cameras"),
                *("weights, both", "without lidar", "without cameras"),
            ),
            rows,
        ),
    ]


SECTIONS: Dict[str, Callable[[Dict[str, Any]], List[str]]] = {
    "real_parity": parity,
    "real_accuracy": accuracy,
    "real_windows": windows,
}
