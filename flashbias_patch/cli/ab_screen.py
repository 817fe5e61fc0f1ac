"""The terminal output of `flashbias ab`: its progress, then the verdict."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Dict, List, Sequence

MOST_REPEATS = 20  # of --repeats auto: ab.sequential.MOST


def print_line(text: str, stream: Any = None) -> None:
    """Print; a terminal or pipe that is closed must not cost the report's files."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stdout, flush=True)


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
        print_line(f"{runs}: {order} (A unpatched, B patched{titles}){further}")
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def update(self, event: str, run: Dict[str, Any]) -> None:
        if event == "done":
            print_line(
                f"  run {run['index'] + 1} {_name(run, self.names)}: {run['status']} "
                f"in {run['seconds']:.1f} s: {run['message']}"
            )
        elif event == "look":
            print_line(f"  {_look(run)}")


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


def screen(schedule: str, steps: int, nudged: bool, names: Sequence[str]) -> Any:
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


def show(experiment: Any, verdict: Any) -> None:
    from ..ab import detections, page, report

    try:
        if not _is_terminal():
            raise ImportError
        from rich.console import Console
    except ImportError:
        print_line(report.text(experiment, verdict))
    else:
        with contextlib.suppress(OSError, ValueError):
            Console().print(*_rich(experiment, verdict), sep="\n")
    for entry in page.failures(experiment):
        if entry["log"]:
            tail = "\n".join(f"    {line}" for line in entry["log"].splitlines()[-8:])
            print_line(f"the end of {entry['name']}'s output:\n{tail}")
    if verdict.detections is not None:
        print_line(detections.text(verdict.detections))


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
