"""`flashbias report DIR`: the report of a finished, or half finished, `flashbias ab`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Optional

from .terminal import unwritable

NAME = "report"
HELP = "write the report of an A/B comparison: HTML, Markdown, JSON, TensorBoard"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", nargs="?", help="the --out directory of flashbias ab"
    )
    parser.add_argument(
        "--history",
        metavar="DIR",
        nargs="+",
        help="the trend over several comparisons instead: time, memory and loss by commit and date",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="default DIR/report.html, when no other format is asked for"
    )
    parser.add_argument(
        "--markdown", metavar="FILE", help="for pasting in an issue; - is standard output"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="figures and curves to keep, without this machine's paths; - is standard output",
    )
    parser.add_argument(
        "--csv", metavar="FILE", help="a row per metric, run and step; - is standard output"
    )
    parser.add_argument(
        "--process", metavar="WHICH", help="the training that is judged, as of `flashbias ab`"
    )
    parser.add_argument(
        "--tensorboard", metavar="LOGDIR", help="one TensorBoard run for each run of the comparison"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 2 when DIR is no comparison or an extra is missing."""
    try:
        from ..ab import detections, lines, records, report, result, table, tensorboard
    except ImportError as error:
        print(
            f'flashbias report: {error}; pip install "flashbias-patch[report]" brings what is '
            "missing",
            file=sys.stderr,
        )
        return 2
    if (args.history is None) == (args.directory is None):
        print("flashbias report: give one DIR, or --history DIR...", file=sys.stderr)
        return 2
    if args.history and (args.json or args.tensorboard):
        print("flashbias report: --history: not with --json or --tensorboard", file=sys.stderr)
        return 2
    problem = _unwritable_option(args)
    if problem:
        print(f"flashbias report: {problem}", file=sys.stderr)
        return 2
    try:
        if args.history:
            return _history(args)
        experiment, verdict = report.load_and_judge(args.directory, args.process)
        other = args.markdown or args.json or args.csv or args.tensorboard
        page = args.html or (None if other else os.path.join(args.directory, "report.html"))
        if page:
            _write(page, report.html(experiment, verdict))
        if args.markdown:
            _write(args.markdown, report.markdown(experiment, verdict))
        if args.json:
            kept = lines.plain(result.compact(experiment, verdict), lambda number: None)
            _write(args.json, json.dumps(kept, indent=1, allow_nan=False) + "\n")
        if args.csv:
            _write(args.csv, table.to_csv(table.rows(experiment, verdict)))
        if args.tensorboard:
            tensorboard.write(experiment, args.tensorboard)
            print(f"TensorBoard: tensorboard --logdir {args.tensorboard}")
    except (records.NotARecord, report.MissingExtra) as error:
        print(f"flashbias report: {error}", file=sys.stderr)
        return 2
    if "-" not in (args.markdown, args.json, args.html, args.csv):
        print(report.text(experiment, verdict))
        if verdict.detections is not None:
            print(detections.text(verdict.detections))
    return 0


def _unwritable_option(args: argparse.Namespace) -> Optional[str]:
    """Return the message for the first output that cannot be written, or None."""
    for name in ("html", "markdown", "json", "csv"):
        path = getattr(args, name)
        problem = unwritable(f"--{name}", path) if path and path != "-" else None
        if problem:
            return problem
    return unwritable("--tensorboard", args.tensorboard, True) if args.tensorboard else None


def _history(args: argparse.Namespace) -> int:
    """The trend, as text or in the formats that were asked for."""
    from ..ab import history, table

    entries = history.load(args.history, args.process)
    beside = os.path.dirname(os.path.abspath(args.history[-1]))
    other = args.markdown or args.csv
    page = args.html or (None if other else os.path.join(beside, "history.html"))
    if page:
        _write(page, history.html(entries))
    if args.markdown:
        _write(args.markdown, history.markdown(entries))
    if args.csv:
        _write(args.csv, table.to_csv(history.csv_rows(entries), history.CSV_COLUMNS))
    if "-" not in (args.markdown, args.csv, args.html):
        print(history.text(entries))
    return 0


def _write(path: str, text: str) -> None:
    if path == "-":
        sys.stdout.write(text)
        return
    folder = os.path.dirname(path)
    if folder:
        with contextlib.suppress(
            FileExistsError
        ):  # no directory: open() says so, with the whole path
            os.makedirs(folder, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    print(f"written: {path}")
