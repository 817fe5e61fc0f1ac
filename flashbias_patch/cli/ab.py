"""`flashbias ab [options] [--] CMD...`: run a command unpatched and patched, compare, report."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

NAME = "ab"
HELP = "run a training command unpatched (A) and patched (B), and say what changed"

FAIL_IF = ("slower", "differs", "more-memory", "fails")
NOT_COMPARED, FAILED, INTERRUPTED = 3, 1, 130
MOST_REPEATS = 20  # of --repeats auto: ab.sequential.MOST
MOST_SEED = 2**32 - 1  # of numpy's and of PYTHONHASHSEED


def _pair(word: str) -> Tuple[str, str]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {word!r}")
    return name, value


def _side(text: str) -> Tuple[str, Dict[str, str]]:
    from ..ab import sides

    try:
        return sides.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(kind: Any, least: Any, most: float = math.inf) -> Any:
    def parse(word: str) -> Any:
        try:
            value = kind(word)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            upper = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(
                f"expected a number of at least {least}{upper}, got {word!r}"
            )
        return value

    return parse


def _repeats(word: str) -> Any:
    return word if word == "auto" else _at_least(int, 1)(word)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats",
        type=_repeats,
        default=2,
        metavar="R",
        help="runs of each side, in the order A B B A A B ... (default 2; with 1, a second A is "
        "run to compare A with A); auto: until the interval of the time per step is narrow enough",
    )
    parser.add_argument(
        "--half-width",
        type=_at_least(float, 0.1),
        metavar="PERCENT",
        help="of the interval that is narrow enough for --repeats auto (default 2)",
    )
    parser.add_argument(
        "--max-time",
        type=_at_least(float, 0),
        metavar="MINUTES",
        help="begin no further pair of runs that would end later than this",
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
        type=_at_least(int, 0, MOST_SEED),
        default=0,
        metavar="S",
        help="given to every run before its own code starts; its own seeding wins (default 0)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where everything is written (default runs/ab-DATE-TIME)"
    )
    parser.add_argument(
        "--against",
        metavar="OLD",
        help="take A from the directory of an earlier run instead of running A again; "
        "refused where the machine, versions, command or options that A depends on differ",
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="also write a row per metric, run and step, as `flashbias report --csv` does",
    )
    parser.add_argument(
        "--env-a",
        type=_pair,
        action="append",
        default=[],
        metavar="K=V",
        help="environment of A only",
    )
    parser.add_argument(
        "--env-b",
        type=_pair,
        action="append",
        default=[],
        metavar="K=V",
        help="environment of B only",
    )
    parser.add_argument(
        "--side",
        type=_side,
        action="append",
        default=[],
        metavar="NAME:K=V[,K=V...]",
        help="a further side, patched with this environment on top, compared with A as B is; may "
        "be given several times",
    )
    parser.add_argument(
        "--mode",
        choices=("train", "infer"),
        default="train",
        help="infer: CMD has no optimizer; forward passes in eval mode or without gradients are "
        "timed, and their outputs compared",
    )
    parser.add_argument(
        "--module",
        metavar="NAME",
        default="",
        help="with --mode infer: the module whose forward passes count, by class or by its place "
        "in the model (default: the largest that CMD calls)",
    )
    parser.add_argument(
        "--profile",
        type=_at_least(int, 0),
        default=0,
        metavar="N",
        help="N more steps of each side under torch.profiler, after the timed ones: the time by "
        "class of kernels",
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
        help="seconds without a step or any output after which a run is taken for hung (default "
        "600)",
    )
    parser.add_argument(
        "--no-aa",
        action="store_true",
        help="no runs for the command's own noise: no second A, no nudged A",
    )
    parser.add_argument(
        "--process",
        metavar="WHICH",
        help="of several trainings in one command, the one that is judged: its number in the "
        "order of their start, or "
        "part of its script's name (default: the longest)",
    )
    parser.add_argument(
        "--stand-in-for-a",
        action="store_true",
        help="where flash-attn is not installed, A gets functions of its names, computed by "
        "torch's "
        "scaled_dot_product_attention",
    )
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        choices=FAIL_IF,
        help="exit with 1 if so, and, given any of them, if a run failed; may be given several "
        "times",
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
    """Exit status: 0; 1 if --fail-if came true; 2 usage; 3 a run failed, or nothing could be
    compared; 130 interrupted.

    Unpatched out of memory while patched trains is a result: 0.
    """
    try:
        return _main(args)
    except KeyboardInterrupt:  # before the first run or after the last one
        _print("flashbias ab: interrupted", sys.stderr)
        return INTERRUPTED


def _main(args: argparse.Namespace) -> int:
    command = args.cmd[1:] if args.cmd[:1] == ["--"] else args.cmd
    problem = _usage(args, command)
    if problem:
        print(f"flashbias ab: {problem}", file=sys.stderr)
        return 2
    try:
        from ..ab import detections, records, repeats, report, runner, saved, sides
        from ..ab import verdict as verdicts
    except ImportError as error:
        print(
            f'flashbias ab: {error}; pip install "flashbias-patch[report]" brings what is missing',
            file=sys.stderr,
        )
        return 2
    out = os.path.expanduser(args.out or os.path.join("runs", time.strftime("ab-%Y%m%d-%H%M%S")))
    problem = _cannot_write(out)
    if problem:
        print(f"flashbias ab: --out: {problem}", file=sys.stderr)
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

    ends = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _as_interrupt) for number in ends}
    screen = _screen(
        runner.schedule(
            args.repeats, not args.no_aa, sides.labels(options._asdict()), args.against is None
        ),
        args.steps,
        not args.no_aa and args.eval is None and args.against is None,
        [side.name for side in args.side],
    )
    try:
        with screen:
            experiment = runner.run_all(command, out, options, screen.update)
    except saved.Refused as error:
        _print(f"flashbias ab: --against: {error}", sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        records.choose(experiment, args.process)
    except records.NotARecord as error:
        _print(f"flashbias ab: {error}", sys.stderr)
        return 2
    found = detections.compare_runs(experiment) if args.eval is not None else None
    verdict = verdicts.judge(experiment, detections=found)
    _show(experiment, verdict)
    _write(out, experiment, verdict, report, args.csv)
    if experiment.interrupted or any(run.status == "interrupted" for run in experiment.runs):
        return INTERRUPTED
    failed = verdict.fails(args.fail_if)
    if failed:
        _print(f"flashbias ab: --fail-if condition met: {', '.join(failed)}", sys.stderr)
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


def _print(text: str, stream: Any = None) -> None:
    """Print; a terminal or pipe that is closed must not cost the report's files."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stdout, flush=True)


def _usage(args: argparse.Namespace, command: List[str]) -> Optional[str]:
    if not command:
        return "CMD is missing: say what to run, e.g. flashbias ab -- python tools/train.py CONFIG"
    if shutil.which(command[0]) is None:
        return f"CMD: {command[0]!r} is not a program on PATH"
    if args.module and args.mode != "infer":
        return "--module: only with --mode infer"
    if args.mode == "infer" and args.eval is not None:
        return "--mode infer: not with --eval, which compares what CMD writes"
    problem = _side_problem(args)
    if problem:
        return problem
    if args.eval is not None and not any("{predictions}" in word for word in command):
        return "--eval: CMD has no {predictions}, the file its detections are written to"
    if args.eval is not None and args.repeats == "auto":
        return "--repeats auto: not with --eval, which compares detections and no times"
    if args.against is not None and (args.eval is not None or args.repeats == "auto"):
        with_what = "--eval" if args.eval is not None else "--repeats auto"
        return f"--against: not with {with_what}, which needs runs of A and B in turns"
    if args.half_width is not None and args.repeats != "auto":
        return "--half-width: only with --repeats auto"
    return None


def _side_problem(args: argparse.Namespace) -> Optional[str]:
    """What is wrong with --side, --env-a or --env-b, with the option's name."""
    from ..ab import sides

    problem = sides.check(args.side)
    if problem:
        return f"--side: {problem}"
    if args.side and args.eval is not None:
        return "--side: not with --eval, which compares the detections of A and B"
    for option, env in (("--env-a", args.env_a), ("--env-b", args.env_b)):
        problem = sides.mistake(dict(env))
        if problem:
            return f"{option}: {problem}"
    return None


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
            _print(f"no HTML: {error}", sys.stderr)
        except OSError as error:
            experiment.lost = experiment.lost or str(error)
    if experiment.lost:
        _print(
            f"flashbias ab: not everything could be written to {out}: {experiment.lost}", sys.stderr
        )
    if written:
        _print(f"report: {written[-1]}")


# -- the terminal
# ----------------------------------------------------------------------------------------------


class PlainScreen:
    """One line per run. `nudged`: a nudged A follows the schedule where it is needed. `names`: of
    further sides."""

    def __init__(self, schedule: str, nudged: bool, names: Sequence[str] = ()) -> None:
        self.schedule, self.nudged, self.names = schedule, nudged, names

    def __enter__(self) -> PlainScreen:
        from ..ab import sides

        identical = "all are" if self.names else "B is"
        further = f", then a nudged A unless {identical} identical" if self.nudged else ""
        letters = "AB" + sides.FURTHER[: len(self.names)]
        titles = "".join(f", {_title(x, self.names)}" for x in letters[2:])
        auto = not self.schedule
        count = f"up to {len(letters) * MOST_REPEATS}" if auto else len(self.schedule)
        order = " ".join(self.schedule or letters + letters[::-1]) + (" ..." if auto else "")
        runs = "1 run" if count == 1 else f"{count} runs"
        _print(f"{runs}: {order} (A unpatched, B patched{titles}){further}")
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def update(self, event: str, run: Dict[str, Any]) -> None:
        if event == "done":
            _print(
                f"  run {run['index'] + 1} {_name(run, self.names)}: {run['status']} "
                f"in {run['seconds']:.1f} s: {run['message']}"
            )
        elif event == "look":
            _print(f"  {_look(run)}")


def _look(look: Dict[str, Any]) -> str:
    from ..ab import repeats

    return repeats.look_text(look)


def _title(label: str, names: Sequence[str]) -> str:
    from ..ab import sides

    return sides.title({"sides": [(name, {}) for name in names]}, label)


def _name(run: Dict[str, Any], names: Sequence[str]) -> str:
    from ..ab.words import extra_run

    return extra_run(run["redrawn"]) if run["nudged"] else _title(run["label"], names)


class RichScreen:
    """A progress bar per run, by steps."""

    def __init__(self, schedule: str, steps: int, names: Sequence[str] = ()) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.schedule, self.steps, self.names = schedule, steps, names
        self.tasks: Dict[int, Any] = {}
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
        for index, label in enumerate(self.schedule):
            self._task({"index": index, "label": label, "nudged": False})
        return self

    def _task(self, run: Dict[str, Any]) -> None:
        description = f"{run['index'] + 1} {_color(run['label'])}{_name(run, self.names)}"
        self.tasks[run["index"]] = self.progress.add_task(
            description, total=self.steps, start=False, message=""
        )

    def __exit__(self, *exc: Any) -> None:
        self.progress.__exit__(*exc)

    def update(self, event: str, run: Dict[str, Any]) -> None:
        if event == "look":
            self.progress.console.print(_look(run), markup=False, highlight=False)
            return
        if event == "start":
            if (
                run["index"] in self.tasks
            ):  # of the schedule, of which a side that failed is left out
                self.progress.remove_task(self.tasks[run["index"]])
            self._task(run)
        task = self.tasks[run["index"]]
        if event == "start":
            self.progress.start_task(task)
        elif event == "steps":
            self.progress.update(task, completed=min(run["steps"], self.steps))
        else:
            color = "green" if run["status"] == "ok" else "red"
            self.progress.update(task, message=f"[{color}]{run['status']}")
            self.progress.stop_task(task)


def _screen(schedule: str, steps: int, nudged: bool, names: Sequence[str]) -> Any:
    try:
        if _is_terminal():
            return RichScreen(schedule, steps, names)
    except ImportError:
        pass
    return PlainScreen(schedule, nudged, names)


def _color(label: str) -> str:
    return {"A": "[blue]", "B": "[dark_orange]", "C": "[green]", "D": "[magenta]"}.get(
        label, "[cyan]"
    )


def _is_terminal() -> bool:
    """Is standard output a terminal? Without raising where it is closed."""
    try:
        return sys.stdout.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def _show(experiment: Any, verdict: Any) -> None:
    from ..ab import detections, page, report

    try:
        if not _is_terminal():
            raise ImportError
        from rich.console import Console
    except ImportError:
        _print(report.text(experiment, verdict))
    else:
        with contextlib.suppress(OSError, ValueError):
            Console().print(*_rich(experiment, verdict), sep="\n")
    for entry in page.failures(experiment):
        if entry["log"]:
            tail = "\n".join(f"    {line}" for line in entry["log"].splitlines()[-8:])
            _print(f"the end of {entry['name']}'s output:\n{tail}")
    if verdict.detections is not None:
        _print(detections.text(verdict.detections))


def _rich(experiment: Any, verdict: Any) -> List[Any]:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from ..ab import report, words

    colors = {"good": "green", "bad": "red", "neutral": "yellow"}

    def painted(word: str) -> str:
        return f"[{colors[words.tone(word)]}]{word}" if word else ""

    tables = [Table(*words.OVERVIEW, box=box.SIMPLE_HEAD)]
    for whole in words.overview(verdict):
        tables[0].add_row(
            *(painted(cell) if i in (3, 6, 7) else cell for i, cell in enumerate(whole))
        )
    for each in verdict.every:
        table = Table(box=box.SIMPLE_HEAD)
        paints = ("", _color("A"), _color(each.side), "", "", "")
        for column, color in zip(words.columns(each), paints):
            table.add_column(color + column, justify="left" if column == "" else "right")
        for row in words.figures(each):
            table.add_row(*row[:-1], painted(row.word))
        tables.append(table)
    head = "[bold red]" if verdict.failed else "[bold]"
    shown: List[Any] = [f"{head}{escape(words.sentence(verdict))}"]
    shown += [table for table in tables if table.row_count]
    return shown + [escape(line) for line in report.remarks(experiment, verdict)]
