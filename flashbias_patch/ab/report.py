"""The report's formats: plain text, Markdown, JSON, and one self-contained HTML file."""

from __future__ import annotations

import math
import os
import shlex
from typing import Any, Dict, Optional, Tuple

from . import detections, page, records, statistics
from .records import Experiment
from .statistics import Ratio, Verdict
from .words import interval, parity_line, seconds, sentence, size, times

EXTRA = 'pip install "flashbias-patch[report]"'


class MissingExtra(RuntimeError):
    """A library of an extra is not installed; the message says how to get it."""


def text(experiment: Experiment, verdict: Verdict) -> str:
    """A few plain lines, for a terminal without rich."""
    lines = [sentence(verdict)]
    if verdict.speed:
        lines.append(
            f"  speed   {times(1 / verdict.speed.value)} ({verdict.speed_word}), "
            f"{interval(verdict.speed, True)}; "
            f"{seconds(verdict.speed.a)} -> {seconds(verdict.speed.b)} a step, {verdict.clock}"
        )
    if verdict.memory:
        lines.append(
            f"  memory  {times(verdict.memory.value)} ({verdict.memory_word}), {interval(verdict.memory)}; "
            f"{size(verdict.memory.a)} -> {size(verdict.memory.b)}"
        )
    lines += [f"  {parity_line(p)}" for p in verdict.parities]
    lines += [f"  backend {row['name']}: {row['count']} calls" for row in page.backends_table(experiment)]
    lines += [f"  problem: {p}" for p in verdict.problems] + [f"  note: {n}" for n in verdict.notes]
    return "\n".join(lines)


def markdown(experiment: Experiment, verdict: Verdict) -> str:
    """For pasting in an issue."""
    out = [
        "## flashbias A/B",
        "",
        f"**{sentence(verdict)}**",
        "",
        "| | A unpatched | B patched | B to A | 95% interval | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for name, ratio, word, show in (
        ("time a step", verdict.speed, verdict.speed_word, seconds),
        ("peak memory", verdict.memory, verdict.memory_word, size),
    ):
        if ratio is not None:
            ends = "-" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
            out.append(
                f"| {name} | {show(ratio.a)} | {show(ratio.b)} | {times(ratio.value)} | {ends} | {word} |"
            )
    out += ["", *(f"- {parity_line(p)}" for p in verdict.parities), ""]
    for title, entries in (
        ("Problems", verdict.problems),
        ("Notes", verdict.notes),
        ("Attention calls", [f"{r['name']}: {r['count']}" for r in page.backends_table(experiment)]),
        (
            "Fallbacks",
            [
                f"{r['source']}, {r['call']}: {r['reason']} (x{r['count']})"
                for r in page.fallbacks_table(experiment)
            ],
        ),
    ):
        if entries:
            out += [f"### {title}", *(f"- {entry}" for entry in entries), ""]
    out += [
        "### Runs",
        "| run | status | steps | exit | message |",
        "|---|---|---|---|---|",
        *(
            f"| {r['name']} | {r['status']} | {r['steps']} | {r['exit']} | {_cell(r['message'])} |"
            for r in page.runs_table(experiment)
        ),
        "",
        "### Environment",
        *(f"- {name}: {value}" for name, value in page.environment_rows(experiment)),
        "",
        "### Commands",
        "```sh",
        *(f"# {name}\n{command}" for name, command in page.commands(experiment)),
        "```",
        "",
    ]
    return "\n".join(out)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def render(template: str, **context: Any) -> str:
    """A page of this package's templates; raises MissingExtra without jinja2."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra(f"an HTML report needs jinja2: {EXTRA}") from error
    loader = jinja2.FileSystemLoader(os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates"))
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**context)


def html(experiment: Experiment, verdict: Verdict, extra: Optional[Dict[str, Any]] = None) -> str:
    """One file: no network, no other file. `extra`: the detection comparison, when there is one."""
    return render(
        "report.html.j2",
        title="flashbias A/B",
        sentence=detections.sentence(extra) if extra and verdict.inference else sentence(verdict),
        cards=[] if verdict.inference else page.headlines(verdict),
        charts=page.charts(experiment, verdict),
        problems=verdict.problems,
        notes=verdict.notes,
        failures=page.failures(experiment),
        parts=page.parts_table(experiment),
        gradients=page.gradients_table(experiment),
        backends=page.backends_table(experiment),
        fallbacks=page.fallbacks_table(experiment),
        runs=page.runs_table(experiment),
        environment=page.environment_rows(experiment),
        commands=page.commands(experiment),
        command=" ".join(shlex.quote(word) for word in experiment.command),
        detections=extra,
    )


def summary(experiment: Experiment, verdict: Verdict) -> Dict[str, Any]:
    """The verdict as JSON: what CI and benchmarks/results/ keep."""

    def ratio(value: Optional[Ratio]) -> Optional[Dict[str, Any]]:
        return None if value is None else value._asdict()

    return {
        "sentence": sentence(verdict),
        "speed": ratio(verdict.speed),
        "speed_word": verdict.speed_word,
        "memory": ratio(verdict.memory),
        "memory_word": verdict.memory_word,
        "memory_kind": verdict.memory_kind,
        "clock": verdict.clock,
        "parity_word": verdict.parity_word,
        "first_step": verdict.first_step,
        "parity": [
            {
                "quantity": p.quantity,
                "word": p.word,
                "first_step": p.first_step,
                "steps": p.steps,
                "noise": p.noise,
                "drift": p.drift,
                "largest": p.largest if math.isfinite(p.largest) else None,
                "largest_at": p.largest_at,
            }
            for p in verdict.parities
        ],
        "problems": verdict.problems,
        "notes": verdict.notes,
        "backends": page.backends_table(experiment),
        "fallbacks": page.fallbacks_table(experiment),
        "runs": page.runs_table(experiment),
        "command": experiment.command,
        "environment": dict(page.environment_rows(experiment)),
    }


def load_and_judge(directory: str) -> Tuple[Experiment, Verdict]:
    experiment = records.load(directory)
    return experiment, statistics.judge(experiment)


def bench_html(found: Dict[str, Any]) -> str:
    """`flashbias bench`'s page: for each shape, the backends by time (bars of forward + backward), and, by
    reason, those that could not.
    """
    shapes: Dict[str, Dict[str, Any]] = {}
    for row in found["rows"]:
        shape = shapes.setdefault(row["shape"], {"rows": [], "cannot": {}, "sizes": row.get("sizes")})
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
