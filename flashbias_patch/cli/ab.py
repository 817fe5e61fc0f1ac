"""`flashbias ab [options] [--] CMD...`: run a command unpatched and patched, compare, report."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from typing import Any, Dict, List, Optional, Tuple

NAME = "ab"
HELP = "run a training command unpatched (A) and patched (B), and say what changed"

FAIL_IF = ("slower", "differs", "more-memory")
NOT_COMPARED, FAILED, INTERRUPTED = 3, 1, 130


def _pair(word: str) -> Tuple[str, str]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {word!r}")
    return name, value


def _at_least(kind: Any, least: Any) -> Any:
    def parse(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or value < least:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {word!r}")
        return value

    return parse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats",
        type=_at_least(int, 1),
        default=2,
        metavar="R",
        help="runs of each side, in the order A B B A A B ... (default 2; 1 adds one A for A/A)",
    )
    parser.add_argument(
        "--steps",
        type=_at_least(int, 1),
        default=30,
        metavar="N",
        help="optimiser steps after which a run is stopped (default 30)",
    )
    parser.add_argument(
        "--warmup",
        type=_at_least(int, 0),
        default=5,
        metavar="W",
        help="first steps left out of the timing (default 5)",
    )
    parser.add_argument(
        "--seed",
        type=_at_least(int, 0),
        default=0,
        metavar="S",
        help="given to every run before its own code starts; its own seeding wins (default 0)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where everything is written (default runs/ab-DATE-TIME)"
    )
    parser.add_argument(
        "--env-a", type=_pair, action="append", default=[], metavar="K=V", help="environment of A only"
    )
    parser.add_argument(
        "--env-b", type=_pair, action="append", default=[], metavar="K=V", help="environment of B only"
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME",
        help="record parameters whose name ends in NAME (default bias_scale)",
    )
    parser.add_argument(
        "--timeout",
        type=_at_least(float, 1),
        default=600.0,
        metavar="S",
        help="seconds without a step or any output after which a run is taken for hung (default 600)",
    )
    parser.add_argument(
        "--no-aa", action="store_true", help="with --repeats 1: no second A to judge the noise by"
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        choices=FAIL_IF,
        help="exit with 1 if so; may be given several times",
    )
    parser.add_argument(
        "--eval",
        metavar="CHECKPOINT",
        help="CMD runs inference from CHECKPOINT: compare the detections it "
        "writes to {predictions}; {checkpoint} in CMD stands for CHECKPOINT",
    )
    parser.add_argument(
        "cmd", nargs=argparse.REMAINDER, metavar="CMD", help="the command, after an optional --"
    )


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 1 if --fail-if came true; 2 usage; 3 nothing could be compared; 130 interrupted."""
    command = args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd
    problem = _usage(args, command)
    if problem:
        print(f"flashbias ab: {problem}", file=sys.stderr)
        return 2
    try:
        from ..ab import records, report, runner, statistics
    except ImportError as error:
        print(
            f'flashbias ab: {error}; pip install "flashbias-patch[report]" brings what is missing',
            file=sys.stderr,
        )
        return 2
    out = args.out or os.path.join("runs", time.strftime("ab-%Y%m%d-%H%M%S"))
    if os.path.exists(os.path.join(out, "ab.json")):
        print(
            f"flashbias ab: --out: {out} already holds a comparison; give another directory", file=sys.stderr
        )
        return 2
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
    )

    before = signal.signal(signal.SIGTERM, _as_interrupt)
    screen = _screen(runner.schedule(args.repeats, not args.no_aa), args.steps)
    try:
        with screen:
            runs = runner.run_all(command, out, options, screen.update)
    finally:
        signal.signal(signal.SIGTERM, before)

    experiment = records.load(out)
    verdict = statistics.judge(experiment)
    found = _detections(experiment) if args.eval is not None else None
    _show(experiment, verdict, found)
    _write(out, experiment, verdict, found, report)
    if any(run["status"] == "interrupted" for run in runs):
        return INTERRUPTED
    failed = verdict.fails(args.fail_if)
    if failed:
        print(f"flashbias ab: failing, as asked to: {', '.join(failed)}", file=sys.stderr)
        return FAILED
    done = found is not None and "error" not in found if args.eval is not None else verdict.comparable
    return 0 if done else NOT_COMPARED


def _usage(args: argparse.Namespace, command: List[str]) -> Optional[str]:
    if not command:
        return "CMD is missing: say what to run, e.g. flashbias ab -- python tools/train.py CONFIG"
    if shutil.which(command[0]) is None:
        return f"CMD: {command[0]!r} is not a program on PATH"
    if args.eval is not None and not any("{predictions}" in word for word in command):
        return "--eval: CMD has no {predictions}, the file its detections are written to"
    return None


def _as_interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _detections(experiment: Any) -> Dict[str, Any]:
    from ..ab import detections

    return detections.compare_runs(experiment)


def _write(out: str, experiment: Any, verdict: Any, found: Optional[Dict[str, Any]], report: Any) -> None:
    kept = report.summary(experiment, verdict)
    if found is not None:
        kept["detections"] = found
    with open(os.path.join(out, "summary.json"), "w", encoding="utf-8") as file:
        json.dump(kept, file, indent=1)
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as file:
        file.write(report.markdown(experiment, verdict))
    try:
        page = report.html(experiment, verdict, found)
    except report.MissingExtra as error:
        print(f"no HTML: {error}", file=sys.stderr)
        print(f"written: {os.path.join(out, 'report.md')}, summary.json")
        return
    path = os.path.join(out, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)
    print(f"report: {path}")


# -- the terminal
# ----------------------------------------------------------------------------------------------


class PlainScreen:
    """One line a run."""

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule

    def __enter__(self) -> PlainScreen:
        print(f"{len(self.schedule)} runs: {' '.join(self.schedule)} (A unpatched, B patched)", flush=True)
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def update(self, event: str, run: Dict[str, Any]) -> None:
        if event == "done":
            from ..ab.words import extra_run

            what = extra_run(run["redrawn"]) if run["nudged"] else run["label"]
            print(
                f"  run {run['index'] + 1} {what}: {run['status']} in {run['seconds']:.1f} s: "
                f"{run['message']}",
                flush=True,
            )


class RichScreen:
    """A progress bar a run, by steps."""

    def __init__(self, schedule: str, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.schedule, self.steps = schedule, steps
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[message]}"),
        )

    def __enter__(self) -> RichScreen:
        self.progress.__enter__()
        self.tasks = [self._task(i, label) for i, label in enumerate(self.schedule)]
        return self

    def _task(self, index: int, label: str, name: str = "A unpatched") -> Any:
        return self.progress.add_task(
            f"{index + 1} {'[blue]' + name if label == 'A' else '[dark_orange]B patched'}",
            total=self.steps,
            start=False,
            message="",
        )

    def __exit__(self, *exc: Any) -> None:
        self.progress.__exit__(*exc)

    def update(self, event: str, run: Dict[str, Any]) -> None:
        from ..ab.words import extra_run

        if run["index"] == len(self.tasks):
            self.tasks.append(self._task(run["index"], run["label"], extra_run(run["redrawn"])))
        task = self.tasks[run["index"]]
        if event == "start":
            self.progress.start_task(task)
        elif event == "steps":
            self.progress.update(task, completed=min(run["steps"], self.steps))
        else:
            color = "green" if run["status"] == "ok" else "red"
            self.progress.update(task, message=f"[{color}]{run['status']}")
            self.progress.stop_task(task)


def _screen(schedule: str, steps: int) -> Any:
    try:
        if sys.stdout.isatty():
            return RichScreen(schedule, steps)
    except ImportError:
        pass
    return PlainScreen(schedule)


def _show(experiment: Any, verdict: Any, found: Optional[Dict[str, Any]]) -> None:
    from ..ab import detections, page, report

    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
    except ImportError:
        print(report.text(experiment, verdict))
    else:
        Console().print(*_rich(experiment, verdict), sep="\n")
    for entry in page.failures(experiment):
        if entry["log"]:
            tail = "\n".join(f"    {line}" for line in entry["log"].splitlines()[-8:])
            print(f"the end of {entry['name']}'s output:\n{tail}")
    if found is not None:
        print(detections.text(found))


def _rich(experiment: Any, verdict: Any) -> List[Any]:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from ..ab import page, words

    colors = {"good": "green", "bad": "red", "neutral": "yellow"}
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "[blue]A unpatched", "[dark_orange]B patched", "B to A", "95% interval", "verdict"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, ratio, word, show in (
        ("time a step", verdict.speed, verdict.speed_word, words.seconds),
        ("peak memory", verdict.memory, verdict.memory_word, words.size),
    ):
        if ratio is not None:
            ends = "-" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
            table.add_row(
                name,
                show(ratio.a),
                show(ratio.b),
                words.times(ratio.value),
                ends,
                f"[{colors[words.tone(word)]}]{word}",
            )
    shown: List[Any] = [f"[bold]{escape(words.sentence(verdict))}"] + ([table] if table.row_count else [])
    shown += [f"[{colors[words.tone(p.word)]}]{escape(words.parity_line(p))}" for p in verdict.parities]
    shown += [f"{row['name']}: {row['count']} attention calls" for row in page.backends_table(experiment)]
    shown += [f"[red]problem: {escape(p)}" for p in verdict.problems] + [
        f"[dim]note: {escape(n)}" for n in verdict.notes
    ]
    return shown
