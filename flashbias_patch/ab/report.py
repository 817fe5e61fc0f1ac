"""The report's formats: plain text, Markdown, JSON, and one self-contained HTML file."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any, Dict, List, Optional, Sequence, Tuple

from . import charts, clocks, judging, lines, page, profiles, reading, sides, words
from .records import Experiment
from .statistics import Ratio
from .verdict import Verdict

EXTRA = 'pip install "flashbias-patch[report]"'


class MissingExtra(RuntimeError):
    """A library of an extra is not installed; the message says how to get it."""


def text(experiment: Experiment, verdict: Verdict) -> str:
    """A few plain lines, for a terminal without rich."""
    out = [words.sentence(verdict)]
    out += _columns([words.OVERVIEW, *words.overview(verdict)])
    for each in verdict.every:
        out += _columns([words.columns(each), *words.figures(each)])
    for each in verdict.every:
        table_of = _columns([profiles.columns(each), *profiles.shown(experiment, each)])
        out += [f"  {profiles.title(experiment)}:", *table_of] if table_of else []
    out += [f"  {line}" for line in remarks(experiment, verdict)]
    return "\n".join(out)


def _columns(rows: Sequence[Sequence[str]]) -> List[str]:
    """A table of plain text; nothing where it has a head only."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines_of = ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    return lines_of if len(rows) > 1 else []


def remarks(experiment: Experiment, verdict: Verdict) -> List[str]:
    """The lines below the tables in a terminal."""
    found = []
    for each in verdict.every:
        calls = page.backends_table(sides.pair(experiment, each.side))
        said = words.parity_lines(each)
        said += [f"{row['name']}: {row['count']} attention calls" for row in calls]
        found += said if each.side == "B" else [f"{each.side} {each.name}, {x}" for x in said]
    return (
        found
        + [f"problem: {p}" for p in problems(verdict)]
        + [f"note: {n}" for n in notes(verdict)]
    )


def problems(verdict: Verdict) -> List[str]:
    """Those of all sides; what is said of A is said once."""
    return list(dict.fromkeys(p for each in verdict.every for p in each.problems))


def notes(verdict: Verdict) -> List[str]:
    """Those of all sides, a further side's own ones under its name."""
    found = list(verdict.notes)
    for each in verdict.further:
        found += [f"{each.side} {each.name}: {n}" for n in each.notes if n not in verdict.notes]
    return found


def markdown(experiment: Experiment, verdict: Verdict) -> str:
    """For pasting in an issue. Whatever comes from the command stays in code spans and blocks."""
    from . import detections

    found = verdict.detections
    out = ["## flashbias A/B", "", f"**{plain(words.sentence(verdict))}**", ""]
    if verdict.further:
        out += table(words.OVERVIEW, words.overview(verdict))
    for each in verdict.every:
        rows = words.figures(each)
        if rows:
            out += table(words.columns(each), rows)
        out += [f"- {plain(line)}" for line in words.parity_lines(each)]
        out += [""] if verdict.further else []
    for title, entries in (
        ("Problems", [plain(entry) for entry in problems(verdict)]),
        ("Notes", [plain(entry) for entry in notes(verdict)]),
        (
            "Detections",
            []
            if found is None
            else [plain(line.strip()) for line in detections.text(found).splitlines()],
        ),
        (
            "Watched parameters",
            [
                f"{code(r['name'])}, {r['side']}: first {r['first']}, last {r['last']}"
                for r in page.values_table(experiment)
            ]
            + [
                f"{code(r['name'])}, {r['side']}: gradient arrived: {r['arrived']}, median norm "
                f"{r['norm']}"
                for r in page.gradients_table(experiment)
            ],
        ),
        (
            "Attention calls",
            [
                f"{where}{code(r['name'])}: {r['count']}"
                for where, pair in _pairs(experiment, verdict)
                for r in page.backends_table(pair)
            ],
        ),
        (
            "Fallbacks",
            [
                f"{where}{code(r['source'])}, {code(r['call'])}: {code(r['reason'])} "
                f" (x{r['count']})"
                for where, pair in _pairs(experiment, verdict)
                for r in page.fallbacks_table(pair)
            ],
        ),
    ):
        if entries:
            out += ["", f"### {title}", *(f"- {entry}" for entry in entries)]
    out += ["", "### Runs"]
    out += table(
        ("run", "status", "steps", "exit", "message"),
        [
            [r["name"], r["status"], r["steps"], r["exit"], plain(r["message"])]
            for r in page.runs_table(experiment)
        ],
    )
    if profiles.title(experiment):
        out += [f"### {profiles.title(experiment)}"]
        for each in verdict.every:
            out += table(profiles.columns(each), profiles.shown(experiment, each))
    gpus = clocks.table(experiment)
    if gpus:
        out += ["### GPU clocks", *table(clocks.COLUMNS, gpus)]
    out += [
        "### Environment",
        *(f"- {name}: {code(value)}" for name, value in page.environment_rows(experiment)),
    ]
    out += ["", "### Commands"]
    for name, command in page.commands(experiment):
        out += [f"{name}:", *fenced(command), ""]
    return "\n".join(out)


def _pairs(experiment: Experiment, verdict: Verdict) -> List[Tuple[str, Experiment]]:
    """Every side's experiment with the words before what is said of it."""
    return [
        (
            "" if each.side == "B" else f"{each.side} {each.name}, ",
            sides.pair(experiment, each.side),
        )
        for each in verdict.every
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> List[str]:
    """A Markdown table. Cells are Markdown already."""
    cells = [[str(cell).replace("\n", " ") for cell in row] for row in (head, *rows)]
    divider = "|" + "---|" * len(head)
    shown = ["| " + " | ".join(row) + " |" for row in cells]
    return [shown[0], divider, *shown[1:], ""]


def plain(value: str) -> str:
    """Text of ours that may hold words of the command: nothing in it is Markdown, HTML, a table's
    end or a mention."""
    kept = re.sub(r"\s+", " ", value)
    kept = re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", kept)
    return kept.replace("@", "@\u200b").replace("://", ":\u200b//")


def code(value: Any) -> str:
    """A code span that holds whatever is in `value`, on one line, in a table too."""
    kept = re.sub(r"\s+", " ", str(value)).strip() or " "
    ticks = "`" * (max(map(len, re.findall("`+", kept)), default=0) + 1)
    space = " " if kept[0] == "`" or kept[-1] == "`" else ""
    return f"{ticks}{space}{kept}{space}{ticks}".replace("|", "\\|")


def fenced(value: str) -> List[str]:
    """A code block that nothing in `value` can end."""
    fence = "`" * max(3, max(map(len, re.findall("`+", value)), default=0) + 1)
    return [f"{fence}sh", *value.splitlines(), fence]


def render(template: str, **context: Any) -> str:
    """A page of this package's templates; raises MissingExtra without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra(f"an HTML report needs jinja2: {EXTRA}") from error
    loader = jinja2.FileSystemLoader(
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")
    )
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**context)


def html(experiment: Experiment, verdict: Verdict) -> str:
    """One file: no network, no other file."""
    return render(
        "report.html.j2",
        title="flashbias A/B",
        sentences=words.sentences(verdict),
        bad=verdict.failed,
        fits=verdict.only_patched_fits,
        sides=page.sides_of(experiment, verdict),
        overview=words.overview(verdict),
        overview_columns=words.OVERVIEW,
        tones={word: words.tone(word) for word in (*words.GOOD, *words.BAD)},
        charts=charts.all_of(experiment, verdict),
        problems=problems(verdict),
        notes=notes(verdict),
        failures=page.failures(experiment),
        gradients=page.gradients_table(experiment),
        gpus=clocks.table(experiment),
        parts_title="Outputs" if verdict.of_outputs else "Parts of the loss",
        profiles=[
            (profiles.columns(each), profiles.shown(experiment, each))
            for each in verdict.every
            if profiles.rows(experiment, each)
        ],
        profile_title=profiles.title(experiment),
        gpu_columns=clocks.COLUMNS,
        runs=page.runs_table(experiment),
        environment=page.environment_rows(experiment),
        commands=page.commands(experiment),
        command=" ".join(shlex.quote(word) for word in experiment.command),
        detections=verdict.detections,
    )


def summary(experiment: Experiment, verdict: Verdict) -> Dict[str, Any]:
    """The verdict as strict JSON: a number that JSON does not have is null. Further sides are under
    `sides`."""
    found = {
        **_of_side(experiment, verdict),
        "sentence": words.sentence(verdict),
        "sides": [
            {
                "side": each.side,
                "name": each.name,
                "env": sides.environment(experiment.options, each.side),
                **_of_side(sides.pair(experiment, each.side), each),
            }
            for each in verdict.further
        ],
        "runs": page.runs_table(experiment),
        "gpus": {run.name: run.gpus for run in experiment.runs if run.gpus},
        "command": experiment.command,
        "environment": dict(page.environment_rows(experiment)),
        **({"detections": verdict.detections} if verdict.detections is not None else {}),
    }
    kept: Dict[str, Any] = lines.plain(found, lambda number: None)
    return kept


def _of_side(experiment: Experiment, verdict: Verdict) -> Dict[str, Any]:
    """The verdict on one side as JSON."""

    def ratio(value: Optional[Ratio]) -> Optional[Dict[str, Any]]:
        if value is None:
            return None
        return {**value._asdict(), "mean": ratio(value.mean)}

    timing = verdict.timing
    return {
        "failed": verdict.failed,
        "failures": [failure._asdict() for failure in verdict.failures],
        "speed": ratio(verdict.speed),
        "speed_word": verdict.speed_word,
        "startup_seconds": None if timing is None else timing.startup,
        "total_seconds": None if timing is None else timing.total,
        "break_even_step": None if timing is None else timing.break_even,
        "stalls": None if timing is None else [each._asdict() for each in timing.stalls],
        "waiting_for_data": None
        if timing is None
        else [None if w is None else {**w._asdict(), "share": w.share} for w in timing.waits],
        "memory": ratio(verdict.memory),
        "memory_word": verdict.memory_word,
        "memory_kind": verdict.memory_kind,
        "clock": verdict.clock,
        "attention_calls": verdict.calls,
        "parity_word": verdict.parity_word,
        "first_step": verdict.first_step,
        "parity": [
            {
                "quantity": p.quantity,
                "word": p.word,
                "why": p.why,
                "rank": p.rank,
                "part_of_loss": p.part,
                "first_step": p.first_step,
                "steps": p.steps,
                "noise": p.noise,
                "drift": p.drift,
                "largest": p.largest,
                "largest_at": p.largest_at,
            }
            for p in verdict.parities
        ],
        "problems": verdict.problems,
        "notes": verdict.notes,
        "backends": page.backends_table(experiment),
        "fallbacks": page.fallbacks_table(experiment),
        "profile": profiles.document(experiment, verdict),
    }


def load_and_judge(directory: str, process: Optional[str] = None) -> Tuple[Experiment, Verdict]:
    """Raises records.NotARecord. `process`: the training to judge, see records.choose."""
    from . import detections

    experiment = reading.load(directory, process)
    found = detections.compare_runs(experiment) if experiment.options.get("inference") else None
    return experiment, judging.judge(experiment, detections=found)


def bench_html(found: Dict[str, Any]) -> str:
    """`flashbias bench`'s page: for each shape, the backends by time (bars of forward + backward),
    and, by reason, those that could not.
    """
    shapes: Dict[str, Dict[str, Any]] = {}
    for row in found["rows"]:
        shape = shapes.setdefault(
            row["shape"], {"rows": [], "cannot": {}, "sizes": row.get("sizes")}
        )
        if row.get("forward_ms") is None:
            shape["cannot"].setdefault(row.get("why_not", "unknown"), []).append(row["backend"])
        else:
            shape["rows"].append(dict(row))
    for shape in shapes.values():
        shape["rows"].sort(key=_bench_ms)
        slowest = max(map(_bench_ms, shape["rows"]), default=0) or 1
        for row in shape["rows"]:
            row["share"] = round(100 * _bench_ms(row) / slowest, 1)
    return render(
        "bench.html.j2",
        title="flashbias bench",
        shapes=shapes,
        environment=[(k, v) for k, v in (found.get("environment") or {}).items() if v],
    )


def _bench_ms(row: Dict[str, Any]) -> float:
    return row.get("total_ms") or row.get("forward_ms") or 0.0
