"""`flashbias ab [options] [--] CMD...`: run a command unpatched and patched, compare, report."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from typing import Any, Callable, Dict, Optional

from . import ab_options, ab_screen
from .ab_screen import print_line
from .terminal import unwritable

NAME = "ab"
HELP = "run a training command unpatched (A) and patched (B), and say what changed"

NOT_COMPARED, FAILED, INTERRUPTED = 3, 1, 130

add_arguments = ab_options.add_arguments


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 1 if --fail-if came true; 2 usage; 3 a run failed, or nothing could be
    compared; 130 interrupted.

    Unpatched out of memory while patched trains is a result: 0.
    """
    try:
        return _main(args)
    except KeyboardInterrupt:  # before the first run or after the last one
        print_line("flashbias ab: interrupted", sys.stderr)
        return INTERRUPTED


def _main(args: argparse.Namespace) -> int:
    command = args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd
    problem = ab_options.problem_with(args, command)
    if problem is None and args.csv is not None:
        problem = unwritable("--csv", args.csv)
    if problem:
        print(f"flashbias ab: {problem}", file=sys.stderr)
        return 2
    try:
        from ..ab import detections, judging, records, repeats, report, runner, saved, sides
    except ImportError as error:
        print(
            f'flashbias ab: {error}; pip install "flashbias-patch[report]" brings what is missing',
            file=sys.stderr,
        )
        return 2
    out = os.path.expanduser(args.out or os.path.join("runs", time.strftime("ab-%Y%m%d-%H%M%S")))
    command = [word.replace("{checkpoint}", args.eval or "") for word in command]
    options = runner.Options(
        repeats=args.repeats,
        steps=args.steps,
        warmup=args.warmup,
        seed=args.seed,
        noise_run=not args.no_aa,
        timeout=args.timeout,
        params=tuple(args.param) or runner.Options().params,
        env_a=dict(args.env_a),
        env_b=dict(args.env_b),
        inference=args.eval is not None,
        stand_in=args.stand_in_for_a,
        process=args.process,
        sides=args.side,
        half_width=args.half_width or repeats.HALF_WIDTH,
        max_time=args.max_time,
        against=args.against,
        mode=args.mode,
        module=args.module,
        profile=args.profile,
    )

    try:
        prepared = runner.prepare(command, out, options)
    except saved.Refused as error:
        print(f"flashbias ab: --against: {error}", file=sys.stderr)
        return 2
    problem = _cannot_write(out)
    if problem:
        print(f"flashbias ab: --out: {problem}", file=sys.stderr)
        return 2

    ends = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _as_interrupt) for number in ends}
    screen = ab_screen.screen(
        runner.schedule(
            args.repeats, not args.no_aa, sides.labels(options._asdict()), args.against is None
        ),
        args.steps,
        not args.no_aa and args.eval is None and args.against is None,
        [side.name for side in args.side],
    )
    try:
        with screen:
            experiment = runner.run(prepared, screen.update)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        records.choose(experiment, args.process)
    except records.NotARecord as error:
        print_line(f"flashbias ab: {error}", sys.stderr)
        return 2
    found = detections.compare_runs(experiment) if args.eval is not None else None
    verdict = judging.judge(experiment, detections=found)
    ab_screen.show(experiment, verdict)
    _write(out, experiment, verdict, report, args.csv)
    if experiment.interrupted or any(run.status == "interrupted" for run in experiment.runs):
        return INTERRUPTED
    failed = verdict.fails(args.fail_if)
    if failed:
        print_line(f"flashbias ab: --fail-if condition met: {', '.join(failed)}", sys.stderr)
        return FAILED
    return 0 if verdict.succeeded else NOT_COMPARED


def _cannot_write(out: str) -> Optional[str]:
    """Makes the directory. Why nothing can be written to it; None if it can."""
    if os.path.exists(os.path.join(out, "ab.json")):
        return f"{out} already holds a comparison; give another directory"
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        return f"{out[:200]} cannot be made: {error.strerror}"
    return None if os.access(out, os.W_OK) else f"{out} is not writable"


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _write(out: str, experiment: Any, verdict: Any, report: Any, csv: Optional[str] = None) -> None:
    """Write summary.json, report.md, report.html and `csv`, as far as that is possible."""
    from ..ab import table

    pages: Dict[str, Callable[[], str]] = {
        "summary.json": lambda: json.dumps(
            report.summary(experiment, verdict), indent=1, allow_nan=False
        ),
        "report.md": lambda: report.markdown(experiment, verdict),
    }
    if csv:  # a path of the caller, beside the names in `out`
        pages[os.path.abspath(csv)] = lambda: table.to_csv(table.rows(experiment, verdict))
    pages["report.html"] = lambda: report.html(experiment, verdict)
    written = []
    for name, make in pages.items():
        path = os.path.join(out, name)
        try:
            text = make()
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            written.append(path)
        except report.MissingExtra as error:
            print_line(f"no HTML: {error}", sys.stderr)
        except OSError as error:
            experiment.lost = experiment.lost or str(error)
    if experiment.lost:
        print_line(
            f"flashbias ab: not everything could be written to {out}: {experiment.lost}", sys.stderr
        )
    if written:
        print_line(f"report: {written[-1]}")
