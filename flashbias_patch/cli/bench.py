"""`flashbias bench`: the attention backends timed on this machine's device, at the shapes of known models."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from typing import Any, Dict, List

NAME = "bench"
HELP = "time the attention backends here, at the shapes of known models"
BENCHMARK = "flashbias_patch.attention.benchmark"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="named shapes, e.g. cmt-800x320 cmt-1600x640 streampetr-r50; `list` lists them (default: all)",
    )
    parser.add_argument("--backends", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    parser.add_argument("--out", metavar="DIR", help="write bench.json and bench.html there")


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 2 for an unknown name or a missing library; 3 when no backend ran at all; 130 interrupted."""
    try:
        benchmark = importlib.import_module(BENCHMARK)
    except ImportError as error:
        print(f"flashbias bench: cannot measure here: {error}", file=sys.stderr)
        return 2
    if args.shapes == ["list"]:
        for name, shape in benchmark.SHAPES.items():
            print(f"{name:<20} {', '.join(f'{k} {v}' for k, v in dict(shape).items())}")
        return 0
    problem = _unknown("--shapes", args.shapes, benchmark.SHAPES) or _unknown(
        "--backends", args.backends, benchmark.BACKENDS
    )
    if problem:
        print(f"flashbias bench: {problem}", file=sys.stderr)
        return 2
    with _progress() as progress:
        found = benchmark.run(
            args.shapes or list(benchmark.SHAPES),
            args.backends or list(benchmark.BACKENDS),
            args.dtype,
            progress,
        )
    print(table(found["rows"]))
    if args.out:
        _write(args.out, found)
    if found.get("interrupted"):
        print("flashbias bench: interrupted; the rows above are what there is", file=sys.stderr)
        return 130
    return 0 if any(row.get("forward_ms") is not None for row in found["rows"]) else 3


def _unknown(option: str, given: List[str], known: Any) -> str | None:
    bad = [name for name in given if name not in known]
    return f"{option}: {', '.join(bad)}: not one of {', '.join(known)}" if bad else None


def table(rows: List[Dict[str, Any]]) -> str:
    """One line a measurement, aligned; what could not run says why."""
    cells = [("shape", "backend", "forward", "forward+backward", "extra memory", "error")]
    for row in rows:
        if row.get("forward_ms") is None:
            cells.append(
                (row["shape"], row["backend"], "cannot: " + row.get("why_not", "unknown"), "", "", "")
            )
        else:
            cells.append(
                (
                    row["shape"],
                    row["backend"],
                    *(
                        _number(row.get(k), unit)
                        for k, unit in (
                            ("forward_ms", " ms"),
                            ("total_ms", " ms"),
                            ("extra_mib", " MiB"),
                            ("error", ""),
                        )
                    ),
                )
            )
    widths = [
        max(len(cell[i]) for cell in cells if i < 2 or not cell[2].startswith("cannot")) for i in range(6)
    ]
    return "\n".join(
        "  ".join(
            word.ljust(w) if i < 2 else word.rjust(w) for i, (word, w) in enumerate(zip(cell, widths))
        ).rstrip()
        for cell in cells
    )


def _number(value: Any, unit: str) -> str:
    return "-" if value is None else f"{value:.3g}{unit}"


class _progress:
    """`progress(done, total, what)`: a bar where rich and a terminal are, nothing otherwise."""

    def __enter__(self) -> Any:
        self.bar = None
        try:
            if sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                self.bar = Progress(console=Console(stderr=True), transient=True)
                self.bar.start()
                self.task = self.bar.add_task("", total=None)
        except ImportError:
            pass
        return self.update

    def update(self, done: int, total: int, what: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total, description=what)

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.stop()


def _write(out: str, found: Dict[str, Any]) -> None:
    from ..ab import report

    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "bench.json"), "w", encoding="utf-8") as file:
        json.dump({**found, "date": time.strftime("%Y-%m-%d")}, file, indent=1)
    print(f"written: {os.path.join(out, 'bench.json')}")
    try:
        page = report.bench_html(found)
    except report.MissingExtra as error:
        print(f"no HTML: {error}", file=sys.stderr)
        return
    with open(os.path.join(out, "bench.html"), "w", encoding="utf-8") as file:
        file.write(page)
    print(f"report: {os.path.join(out, 'bench.html')}")
