"""Write what was measured on a GPU into docs/reliability.md, between its markers, from
benchmarks/results/*.json.

    python docs/make_reliability.py

soak.json, synchronisations.json (benchmarks/soak.py, with --profile), selfcheck.json
(benchmarks/selfcheck.py) and two_ranks.json
(python -m tests.integration.distributed.two_ranks --backend nccl); what has not been measured is
left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, List

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- measured: docs/make_reliability.py -->", "<!-- end of measured -->"


def source(name: str, result: Dict[str, Any]) -> str:
    return f"{result['device']}, torch {result['torch']}, `benchmarks/results/{name}.json`"


def soak(name: str, result: Dict[str, Any]) -> List[str]:
    tensors, reserved = result["in_tensors_mib"], result["reserved_mib"]
    lines = [
        f"**Soak.** {result['steps']} steps of mini_cmt in {result['seconds']:.0f} s with "
        f"{sum(result['struck'].values())} faults injected; {result['not_finite']} losses not "
        "finite; memory in tensors "
        f"after the first 100 steps grew by {result['growth_mib_after_first_100']:g} MiB "
        f"({tensors['first 100']:.1f} to "
        f"{tensors['later']:.1f}; held by the allocator {reserved['first 100']:.0f} to "
        f"{reserved['later']:.0f}). "
        f"{source(name, result)}.",
        "",
        "| fault | times |",
        "|---|---|",
    ]
    return lines + [f"| {fault} | {count} |" for fault, count in sorted(result["struck"].items())]


def synchronisations(name: str, result: Dict[str, Any]) -> List[str]:
    lines = [
        "**Synchronisations.** Calls that wait for the GPU in the profiled steps of mini_cmt. "
        f"{source(name, result)}.",
        "",
        "| | unpatched | patched |",
        "|---|---|---|",
    ]
    kinds = sorted({*result["unpatched"], *result["patched"]})
    return lines + [
        f"| {k} | {result['unpatched'].get(k, 0)} | {result['patched'].get(k, 0)} |" for k in kinds
    ]


def selfcheck(name: str, result: Dict[str, Any]) -> List[str]:
    lines = [
        "**Self-check.** First: with compilation, several processes at a time; warm: median of "
        "5. Largest warm time "
        f"{result['warm_ms_largest']} ms. {source(name, result)}, Triton {result['triton']}.",
        "",
        "| class | backend | first, s | warm, ms | verdict |",
        "|---|---|---|---|---|",
    ]
    for words, backends in result["classes"].items():
        for backend, found in backends.items():
            if "verdict" in found:
                times = f"{found['first_s']} | {found.get('warm_ms', '')}"
                lines.append(f"| {words} | {backend} | {times} | {found['verdict']} |")
    upstream = result.get("at size", {}).get("upstream", {})
    rows = [
        (words, rank, found)
        for words, ranks in upstream.items()
        for rank, found in ranks.items()
        if "refuses" not in found
    ]
    if rows:
        lines += [
            "",
            "FlashBias' own kernel unchecked, float16, at CMT's size (1490 x 22384) and at whole "
            "tiles "
            "(1536 x 22528): relative error against float32.",
            "",
            "| lengths | rank | output | gradients, largest |",
            "|---|---|---|---|",
        ]
        for words, rank, found in rows:
            if "output" in found:
                largest = max(value for key, value in found.items() if key != "output")
                lines.append(f"| {words} | {rank} | {found['output']:.2g} | {largest:.2g} |")
            else:
                lines.append(f"| {words} | {rank} | {found['raises']} | |")
    return lines


def two_ranks(name: str, result: Dict[str, Any]) -> List[str]:
    reasons = "; ".join(fallback["reason"] for fallback in result["fallbacks"]["1"])
    return [
        f"**Two ranks** ({result['backend']}): on rank 1 a backend failed ({reasons}); "
        f"the ranks' reduced gradients differ by {result['ranks_differ_by']:.1g}, from the "
        "unbroken run's by "
        f"{result['unbroken_differs_by']:.1g} of the largest. {source(name, result)}."
    ]


SECTIONS: Dict[str, Callable[[str, Dict[str, Any]], List[str]]] = {
    "soak": soak,
    "synchronisations": synchronisations,
    "selfcheck": selfcheck,
    "two_ranks": two_ranks,
}


def page() -> str:
    """The page as it should be."""
    lines: List[str] = []
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            lines += [*section(name, json.loads(path.read_text())), ""]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return (
        before
        + "\n".join([BEGIN, *(lines or ["Not measured yet.", ""])])
        + END
        + rest.partition(END)[2]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
