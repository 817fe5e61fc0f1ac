"""Several comparisons over time: `flashbias report --history DIR...`."""

from __future__ import annotations

import datetime
import math
import os
import subprocess
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import report, sides, table, words
from .records import Experiment
from .verdict import Verdict

COLUMNS = (
    "date",
    "commit",
    "A, time per step",
    "B",
    "B / A",
    "speed",
    "A, peak memory",
    "B",
    "B / A",
    "memory",
    "A, last loss",
    "B",
    "training",
)
CSV_COLUMNS = (
    "date",
    "commit",
    "directory",
    "metric",
    "unit",
    "a",
    "b",
    "ratio",
    "low",
    "high",
    "level",
    "verdict",
    "failures",
)


def commit_of(directory: str) -> str:
    """The commit that is checked out there, with "+" where tracked files differ from it; empty
    where git knows none."""

    def git(*words: str) -> str:
        found = subprocess.run(
            ["git", "-C", directory, *words], capture_output=True, text=True, timeout=10
        )
        return found.stdout.strip() if found.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = commit and git("status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return commit + ("+" if changed else "")


class Entry(NamedTuple):
    """One comparison. `losses`: of A and B at the last step that was recorded; NaN where a side has
    none."""

    experiment: Experiment
    verdict: Verdict
    metrics: Dict[str, table.Metric]
    losses: Tuple[float, float]

    @property
    def date(self) -> str:
        started = self.experiment.started
        if not started:
            return "unknown"
        return datetime.datetime.fromtimestamp(started).strftime("%Y-%m-%d %H:%M")

    @property
    def commit(self) -> str:
        return self.experiment.commit or "unknown"

    @property
    def directory(self) -> str:
        return os.path.basename(os.path.abspath(self.experiment.directory))

    def failed(self, side: str) -> bool:
        """Did a run of A or B fail? What it had recorded until then is no figure of that side."""
        return any(failure.side == side.upper() for failure in self.verdict.failures)

    @property
    def failures(self) -> str:
        return "; ".join(str(failure) for failure in self.verdict.failures)


def load(directories: Sequence[str], process: Optional[str] = None) -> List[Entry]:
    """The comparisons of these directories, the oldest first. Raises records.NotARecord."""
    found = []
    for directory in directories:
        experiment, verdict = report.load_and_judge(directory, process)
        metrics = {metric.name: metric for metric in table.metrics(verdict)}
        losses = (_last_loss(experiment, "A"), _last_loss(experiment, "B"))
        found.append(Entry(experiment, verdict, metrics, losses))
    return sorted(found, key=lambda entry: entry.experiment.started)


def _last_loss(experiment: Experiment, label: str) -> float:
    runs = [run for run in experiment.side(label) if not run.nudged and run.status == "ok"]
    last = [run.series("loss")[-1] for run in runs]
    return float(np.mean(last)) if last else math.nan


def rows(entries: Sequence[Entry]) -> List[Tuple[str, ...]]:
    """The table that the terminal, Markdown and the page show: COLUMNS."""
    found = []
    for entry in entries:
        cells = [entry.date, entry.commit]
        for name, show in (("step_time", words.seconds), ("peak_memory", words.size)):
            metric = entry.metrics.get(name)
            if metric is None:
                cells += ["-", "-", "-", "not compared"]
                continue
            shown = [
                "failed" if entry.failed(side) else show(getattr(metric, side)) for side in "ab"
            ]
            known = "failed" not in shown and math.isfinite(metric.ratio)
            ratio, word = ("-", "not compared")
            if known:
                ratio, word = words.times(metric.ratio), metric.word or "not compared"
            cells += [*shown, ratio, word]
        for side, loss in zip("ab", entry.losses):
            number = f"{loss:.4g}" if not math.isnan(loss) else "-"
            cells.append("failed" if entry.failed(side) else number)
        fits = entry.verdict.only_patched_fits
        cells.append("only patched fits" if fits else entry.verdict.parity_word)
        found.append(tuple(cells))
    return found


def csv_rows(entries: Sequence[Entry]) -> Iterator[Dict[str, Any]]:
    """A row per comparison and metric, and one for the training."""
    for entry in entries:
        about = {
            "date": entry.date,
            "commit": entry.experiment.commit,
            "directory": entry.directory,
            "failures": entry.failures,
        }
        for metric in entry.metrics.values():
            row = {**metric._asdict(), "metric": metric.name, "verdict": metric.word}
            yield {**row, **about}
        a, b = entry.losses
        word = entry.verdict.parity_word
        yield {**about, "metric": "last_loss", "unit": "loss", "a": a, "b": b, "verdict": word}


def problems(entries: Sequence[Entry]) -> List[str]:
    """The failures, by date and commit."""
    return [
        f"{entry.date}, {entry.commit}: {words.sentence(entry.verdict)}"
        for entry in entries
        if entry.verdict.failed or not entry.verdict.comparable
        if not entry.verdict.only_patched_fits
    ]


def notes(entries: Sequence[Entry]) -> List[str]:
    """The differences between comparisons other than the commit."""
    found = []
    for what, values in (
        ("commands", {tuple(e.experiment.command) for e in entries}),
        ("GPUs", {str(_environment(e).get("gpu") or "none") for e in entries}),
        ("versions of PyTorch", {str(_environment(e).get("torch") or "unknown") for e in entries}),
        ("numbers of steps", {str(e.experiment.options.get("steps")) for e in entries}),
    ):
        if len(values) > 1:
            named = "" if what == "commands" else f": {', '.join(sorted(map(str, values)))}"
            found.append(f"the comparisons have different {what}{named}")
    others = {sides.title(e.experiment.options, x.side) for e in entries for x in e.verdict.further}
    if others:
        found.append(
            f"A and B are shown; other sides are in the reports: {', '.join(sorted(others))}"
        )
    return found


def _environment(entry: Entry) -> Dict[str, Any]:
    return next((r.environment for r in entry.experiment.runs if r.environment), {})


def text(entries: Sequence[Entry]) -> str:
    """Plain lines for a terminal."""
    shown = [COLUMNS, *rows(entries)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(COLUMNS))]
    out = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in shown]
    out += [f"problem: {problem}" for problem in problems(entries)]
    return "\n".join(out + [f"note: {note}" for note in notes(entries)])


def markdown(entries: Sequence[Entry]) -> str:
    """For pasting in an issue."""
    cells = [[report.plain(cell) for cell in row] for row in rows(entries)]
    out = ["## flashbias A/B history", "", *report.table(COLUMNS, cells)]
    out += [f"- {report.plain(line)}" for line in [*problems(entries), *notes(entries)]]
    return "\n".join(out) + "\n"


def html(entries: Sequence[Entry]) -> str:
    """One file: no network, no other file. Raises report.MissingExtra."""
    return report.render(
        "history.html.j2",
        title="flashbias A/B history",
        count=len(entries),
        first=entries[0].date[:10].replace("-", "\u2011"),
        last=entries[-1].date[:10].replace("-", "\u2011"),
        columns=COLUMNS,
        rows=rows(entries),
        tones={word: words.tone(word) for word in (*words.GOOD, *words.BAD)},
        problems=problems(entries),
        notes=notes(entries),
        charts=charts(entries),
    )


def charts(entries: Sequence[Entry]) -> List[Dict[str, Any]]:
    """Trends of time, memory and loss by side; a side that failed leaves a gap."""

    def of(name: str, side: str, scale: float) -> List[Optional[float]]:
        found = [None if e.failed(side) else e.metrics.get(name) for e in entries]
        return [_point(math.nan if m is None else getattr(m, side) * scale) for m in found]

    losses = [
        [None if entry.failed(side) else _point(entry.losses[i]) for entry in entries]
        for i, side in enumerate("ab")
    ]
    kinds = {entry.verdict.memory_kind for entry in entries} - {""}
    memory = "" if len(kinds) < 2 else "Some are of a GPU, some of the process."
    found = [
        ("Time per step", "milliseconds", "ms", "", [of("step_time", x, 1e3) for x in "ab"]),
        ("Peak memory", "MiB", "MiB", memory, [of("peak_memory", x, 2**-20) for x in "ab"]),
        ("Loss at the last step", "loss", "", "", losses),
    ]
    return [
        {
            "title": title,
            "kind": "lines",
            "x": "comparison, by commit",
            "y": label,
            "unit": unit,
            "note": note,
            "labels": [f"{e.commit}, {e.date}" for e in entries],
            "ticks": [
                e.commit if e.experiment.commit else str(i + 1) for i, e in enumerate(entries)
            ],
            "series": [
                {"name": name, "side": name[0], "values": values}
                for name, values in zip(("A unpatched", "B patched"), of_sides)
            ],
        }
        for title, label, unit, note, of_sides in found
        if any(value is not None for side in of_sides for value in side)
    ]


def _point(value: float) -> Optional[float]:
    return float(f"{value:.6g}") if math.isfinite(value) else None
