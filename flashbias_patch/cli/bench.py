"""Implement `flashbias bench`: time the attention backends at the shapes of known models."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from typing import Any, Dict, List, Sequence

from .terminal import aligned, progress, unknown, unwritable

NAME = "bench"
HELP = "time the attention backends on this machine, at the shapes of known models"
BENCHMARK = "flashbias_patch.attention.benchmark"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="named shapes, e.g. cmt-800x320 cmt-1600x640 streampetr-r50; `list` lists them "
        "(default: all)",
    )
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32"),
        help="default: fp16; fp32 on a CPU, where half precision is slow or not supported",
    )
    parser.add_argument("--out", metavar="DIR", help="write bench.json and bench.html to DIR")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark and print a table.

    Exit status: 0; 2 for an unknown name or a missing library; 3 if no backend ran; 130 if
    interrupted.
    """
    try:
        benchmark = importlib.import_module(BENCHMARK)
    except ImportError as error:
        print(f"flashbias bench: cannot measure here: {error}", file=sys.stderr)
        return 2
    if args.shapes == ["list"]:
        for name, shape in benchmark.SHAPES.items():
            print(f"{name:<20} {', '.join(f'{k} {v}' for k, v in dict(shape).items())}")
        return 0
    problem = unknown("--shapes", args.shapes, benchmark.SHAPES) or unknown(
        "--backends", args.backends, benchmark.BACKENDS
    )
    if args.out is not None:
        problem = problem or unwritable("--out", args.out, directory=True)
    if problem:
        print(f"flashbias bench: {problem}", file=sys.stderr)
        return 2
    shapes, dtype = args.shapes or list(benchmark.SHAPES), args.dtype or "fp16"
    if not benchmark.has_gpu():
        feasible = [name for name in shapes if benchmark.fits_a_cpu(name)]
        if not feasible:
            print(
                f"flashbias bench: {', '.join(shapes)}: needs a GPU, and torch sees none",
                file=sys.stderr,
            )
            return 3
        if not args.shapes:
            print(
                f"flashbias bench: torch sees no GPU: only {', '.join(feasible)} is measured, on "
                "the CPU; the other shapes need a GPU",
                file=sys.stderr,
            )
            shapes = feasible
        dtype = args.dtype or "fp32"
    with progress() as say:
        result = benchmark.run(shapes, args.backends or list(benchmark.BACKENDS), dtype, say)
    print(table(result["rows"]))
    if args.out:
        _write(args.out, result)
    if result.get("interrupted"):
        print("flashbias bench: interrupted; the results above are partial", file=sys.stderr)
        return 130
    return 0 if any(row.get("forward_ms") is not None for row in result["rows"]) else 3


def table(rows: List[Dict[str, Any]]) -> str:
    """Return an aligned table with one line per measurement.

    A backend that is unsupported at every shape for one reason has one line below the table.
    """
    units = {"forward_ms": " ms", "total_ms": " ms", "extra_mib": " MiB", "error": ""}
    cells: List[Sequence[str]] = [
        ("shape", "backend", "forward", "forward+backward", "extra memory", "error")
    ]
    absent = _absent(rows)
    for row in rows:
        if row["backend"] in absent:
            continue
        if row.get("forward_ms") is None:
            cells.append(
                (row["shape"], row["backend"], "unsupported: " + row.get("why_not", "unknown"))
            )
        else:
            cells.append(
                (
                    row["shape"],
                    row["backend"],
                    *(_number(row.get(k), unit) for k, unit in units.items()),
                )
            )
    return "\n".join(
        [
            aligned(cells, left=2),
            *(f"{name} unsupported: {reason}" for name, reason in absent.items()),
        ]
    )


def _absent(rows: List[Dict[str, Any]]) -> Dict[str, str]:
    """Return {backend: reason} for backends that ran at no shape, at least two, all for one
    reason."""
    reasons: Dict[str, List[Any]] = {}
    for row in rows:
        why = row.get("why_not", "unknown") if row.get("forward_ms") is None else None
        reasons.setdefault(row["backend"], []).append(why)
    return {
        name: backend_reasons[0]
        for name, backend_reasons in reasons.items()
        if len(backend_reasons) > 1 and backend_reasons[0] and len(set(backend_reasons)) == 1
    }


def _number(value: Any, unit: str) -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


def _write(out: str, result: Dict[str, Any]) -> None:
    from ..ab import report

    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "bench.json"), "w", encoding="utf-8") as file:
        json.dump({**result, "date": time.strftime("%Y-%m-%d")}, file, indent=1)
    print(f"written: {os.path.join(out, 'bench.json')}")
    try:
        page = report.bench_html(result)
    except report.MissingExtra as error:
        print(f"no HTML: {error}", file=sys.stderr)
        return
    with open(os.path.join(out, "bench.html"), "w", encoding="utf-8") as file:
        file.write(page)
    print(f"report: {os.path.join(out, 'bench.html')}")
