"""Sections of docs/performance.md on what the fusion detector computes: for make_performance.py."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

Table = Callable[..., List[str]]
PARTS = ("all", "decoder", "head", "image branch", "lidar branch")


def small(value: Any) -> str:
    return "" if value is None else f"{value:.1e}"


def parity(result: Dict[str, Any], table: Table) -> List[str]:
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
    return [
        f"### Parity over {result['steps']} steps",
        "",
        f"{result['family']}, batch {result['bs']}, without dropout, from the same weights on the "
        "same frame; relative distance from the first unpatched run: of the first step's gradients "
        "(L2), and of the losses over all steps. `unpatched again`: the same once more, which is "
        "the noise of the machine; `nudged`: unpatched with every parameter changed in the last "
        "place, which is what any other rounding amounts to.",
        "",
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
        *curves_by_step(curves, table),
    ]


def curves_by_step(curves: Dict[str, Any], table: Table) -> List[str]:
    """How the distances grow: medians of each tenth of the curves."""
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


SECTIONS: Dict[str, Callable[[Dict[str, Any], Table], List[str]]] = {"real_parity": parity}
