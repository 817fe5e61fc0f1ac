"""What a finished comparison looks like: plain text, Markdown, and one self-contained HTML file."""
from __future__ import annotations

import datetime
import math
import os
import shlex
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from . import records, statistics
from .records import Experiment, Run
from .statistics import Parity, Ratio, Verdict

MAX_POINTS = 1500  # of one curve on a page
MAX_BINS = 30
GOOD = ("faster", "less memory", "identical", "within rounding", "within noise")
BAD = ("slower", "more memory", "differs")
PARITY_SAYS = {
    "identical": "trains identically, bit for bit",
    "within rounding": "trains the same within rounding",
    "within noise": "trains the same within the command's own noise",
    "differs": "does not train the same",
    "not compared": "could not be compared in its losses",
}
EXTRA = 'pip install "flashbias-patch[report]"'


class MissingExtra(RuntimeError):
    """A library of an extra is not installed; the message says how to get it."""


# -- words ---------------------------------------------------------------------------------------------------


def tone(word: str) -> str:
    """good, bad or neutral: the colour a verdict's word is shown in."""
    return "good" if word in GOOD else "bad" if word in BAD else "neutral"


def sentence(verdict: Verdict) -> str:
    """The verdict in one sentence."""
    if not verdict.comparable:
        return "Nothing to compare: " + (verdict.problems[-1] if verdict.problems else "no run recorded a step") + "."
    says = []
    if verdict.speed is not None:
        says.append({"faster": f"is {times(1 / verdict.speed.value)} as fast",
                     "slower": f"takes {times(verdict.speed.value)} the time",
                     "no difference": "is as fast as unpatched"}.get(verdict.speed_word, "shows no clear change in speed"))
    if verdict.memory is not None:
        says.append({"less memory": f"needs {times(verdict.memory.value)} the memory",
                     "more memory": f"needs {times(verdict.memory.value)} the memory",
                     "no difference": "needs the same memory"}.get(verdict.memory_word, "no clear change in memory"))
    says.append(PARITY_SAYS[verdict.parity_word])
    text = "Patched " + ", ".join(says[:-1]) + (" and " if len(says) > 1 else "") + says[-1]
    return text + (f" from step {verdict.first_step} on." if verdict.first_step is not None else ".")


def times(ratio: float) -> str:
    return f"{ratio:.2f}\u00d7" if 0.1 <= ratio < 100 else f"{ratio:.3g}\u00d7"


def seconds(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    for limit, scale, unit in ((1e-3, 1e6, "\u00b5s"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * scale:.3g} {unit}"
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"


def size(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def interval(ratio: Ratio, inverse: bool = False) -> str:
    if ratio.low is None or ratio.high is None:
        return "too few steps for an interval"
    low, high = (1 / ratio.high, 1 / ratio.low) if inverse else (ratio.low, ratio.high)
    return f"95% interval {low:.3f} to {high:.3f}"


def relative(value: Optional[float]) -> str:
    if value is None:
        return "unknown"
    return "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.2%}"


def parity_line(parity: Parity) -> str:
    if parity.word == "not compared":
        return f"{parity.quantity}: not recorded on both sides"
    parted = f", they part at step {parity.first_step}" if parity.first_step is not None else ""
    noise = "no A/A pair" if parity.noise is None else f"A/A {relative(parity.noise)}"
    noise += "" if parity.drift is None else f", nudged A {relative(parity.drift)}"
    return (f"{parity.quantity}: {parity.word}{parted}; largest difference {relative(parity.largest)} at step "
            f"{parity.largest_at} of {parity.steps} ({noise})")


# -- what a page shows -----------------------------------------------------------------------------------------


def headlines(verdict: Verdict) -> List[Dict[str, Any]]:
    """The cards at the top: speed, memory, parity."""
    cards = []
    for title, ratio, word, show, unit, inverse in (
            ("Speed", verdict.speed, verdict.speed_word, seconds, "a step", True),
            ("Peak memory", verdict.memory, verdict.memory_word, size, "", False)):
        if ratio is None:
            cards.append({"title": title, "big": "\u2014", "word": "not compared", "tone": "neutral", "lines": []})
            continue
        value = 1 / ratio.value if inverse else ratio.value
        low, high = (None, None) if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)
        if inverse and low is not None and high is not None:
            low, high = 1 / high, 1 / low
        measured = verdict.clock if inverse else {"cuda": "GPU, allocated", "rss": "process, resident"}[verdict.memory_kind]
        cards.append({"title": title, "big": times(value), "word": word, "tone": tone(word),
                      "whisker": _whisker(value, low, high), "interval": interval(ratio, inverse),
                      "a": f"{show(ratio.a)} {unit}".strip(), "b": f"{show(ratio.b)} {unit}".strip(), "lines": [measured]})
    word = verdict.parity_word
    cards.append({"title": "Training", "big": {"identical": "Identical", "within rounding": "Same", "within noise": "Same",
                                               "differs": "Differs"}.get(word, "\u2014"),
                  "word": word if word != "differs" else f"parts at step {verdict.first_step}", "tone": tone(word),
                  "lines": [parity_line(p) for p in verdict.parities]})
    return cards


def _whisker(value: float, low: Optional[float], high: Optional[float]) -> Optional[Dict[str, float]]:
    """Positions in percent of an interval on an axis that has 1 in it."""
    if low is None or high is None:
        return None
    left, right = min(low, 1.0), max(high, 1.0)
    margin = 0.12 * max(right - left, 0.02)
    left, right = left - margin, right + margin
    place = {name: round(100 * (x - left) / (right - left), 2)
             for name, x in (("low", low), ("high", high), ("value", value), ("one", 1.0))}
    return {**place, "width": round(place["high"] - place["low"], 2)}


def charts(experiment: Experiment, verdict: Verdict) -> List[Dict[str, Any]]:
    """The page's charts, as the data its script draws."""
    runs = experiment.side("A") + experiment.side("B")
    a, b = experiment.side("A"), experiment.side("B")
    warmup = int(experiment.options.get("warmup", 0))
    found: List[Optional[Dict[str, Any]]] = []
    for parity, key, title in zip(verdict.parities or [None, None], ("loss", "grad_norm"), ("Loss", "Gradient norm")):
        chart = _lines(title, title.lower(), [(run, run.series(key)) for run in runs],
                       note="" if key == "loss" else "Before clipping, where the command clips.")
        if chart and parity is not None and parity.band.size and a:
            centre = np.array([run.series(key)[: parity.steps] for run in a]).mean(axis=0)
            width = np.minimum(parity.band, 1e3) * np.abs(centre)
            chart["band"] = {"name": "noise band", "low": _points(centre - width), "high": _points(centre + width)}
            chart["mark"] = parity.first_step
        found.append(chart)
    loss = next((p for p in verdict.parities if p.quantity == "loss" and p.difference.size), None)
    if loss is not None and loss.difference.any():
        found.append({"title": "How far the losses are apart", "kind": "lines", "x": "optimiser step", "y": "relative difference",
                      "unit": "", "log": True, "mark": loss.first_step,
                      "note": "Above the band, patched and unpatched differ by more than noise or rounding explains.",
                      "series": [{"name": "A against B", "side": "B", "values": _points(loss.difference)}],
                      "band": {"name": "noise band", "low": [None] * len(_points(loss.band)), "high": _points(loss.band)}})
    times_of = [(run, run.step_seconds() * 1e3) for run in runs]
    found.append(_lines("Step time", "milliseconds", times_of, unit="ms", warmup=warmup, robust=True))
    found.append(_histogram("Step times, warm-up left out", "milliseconds a step",
                            [t * 1e3 for t in statistics.step_times(a, warmup)], [t * 1e3 for t in statistics.step_times(b, warmup)]))
    kind = verdict.memory_kind or "rss"
    key = {"cuda": ("memory", "cuda_peak"), "rss": ("memory", "rss")}[kind]
    found.append(_lines("Memory", "MiB", [(run, np.nanmax(np.atleast_2d(run.per_step(*key)), axis=0) / 2**20
                                           if run.steps else np.zeros(0)) for run in runs], unit="MiB", warmup=warmup,
                        note={"cuda": "Peak GPU memory allocated so far.", "rss": "Resident memory of the process."}[kind]))
    found += _parameter_charts(runs)
    return [chart for chart in found if chart is not None]


def _parameter_charts(runs: Sequence[Run]) -> List[Optional[Dict[str, Any]]]:
    names: Dict[str, None] = {}
    for run in runs:
        names.update(dict.fromkeys(run.named("params")))
    found = []
    for name in names:
        sides = [(run, run.named("params")[name]) for run in runs if name in run.named("params")]
        still = [run.name for run, values in sides if _constant(values)]
        found.append(_lines(name, "value", sides, note=f"Never moved in {', '.join(still)}." if still else ""))
    return found


def _constant(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return known.size > 1 and bool((known == known[0]).all())


def _lines(title: str, label: str, sides: Sequence[Tuple[Run, np.ndarray]], unit: str = "", warmup: int = 0, note: str = "",
           robust: bool = False) -> Optional[Dict[str, Any]]:
    series = [{"name": run.name + (" nudged" if run.nudged else ""), "side": run.label, "values": _points(values)} for run, values in sides
              if values.size and np.isfinite(values).any()]
    if not series:
        return None
    chart = {"title": title, "kind": "lines", "x": "optimiser step", "y": label, "unit": unit, "series": series,
             "warmup": warmup, "note": note, "stride": _stride(max(values.size for _, values in sides))}
    if robust:  # one slow first step must not flatten all others
        rest = np.concatenate([values[max(1, warmup):] for _, values in sides])
        rest = rest[np.isfinite(rest)]
        if rest.size > 3:
            chart["top"] = float(np.percentile(rest, 98) * 1.25)
    return chart


def _stride(count: int) -> int:
    return max(1, -(-count // MAX_POINTS))


def _points(values: np.ndarray) -> List[Optional[float]]:
    return [float(f"{v:.6g}") if math.isfinite(v) else None for v in values[:: _stride(len(values))]]


def _histogram(title: str, label: str, a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> Optional[Dict[str, Any]]:
    together = np.concatenate([*a, *b]) if a or b else np.zeros(0)
    if together.size < 4 or not all(any(x.size for x in side) for side in (a, b)):
        return None
    low, high = np.percentile(together, [0, 98])
    edges = np.linspace(low, max(high, low * 1.02), int(np.clip(2 * np.sqrt(together.size), 8, MAX_BINS)) + 1)
    counts = {side: np.histogram(np.clip(np.concatenate(v), edges[0], edges[-1]), edges)[0] for side, v in (("A", a), ("B", b))}
    return {"title": title, "kind": "bars", "x": label, "y": "share of steps", "unit": "ms",
            "edges": [float(f"{e:.6g}") for e in edges],
            "series": [{"name": {"A": "A unpatched", "B": "B patched"}[side], "side": side,
                        "values": [round(float(x), 4) for x in c / max(1, c.sum())]} for side, c in counts.items()],
            "note": "The slowest 2% of steps are counted in the last bar."}


def parts_table(experiment: Experiment) -> List[Dict[str, str]]:
    """The loss's parts at the last common step, side by side."""
    a, b = experiment.side("A"), experiment.side("B")
    if not a or not b:
        return []
    parts = [side[0].named("loss_parts") for side in (a, b)]
    last = min(a[0].steps, b[0].steps) - 1
    rows = []
    for name in parts[0]:
        if name in parts[1]:
            x, y = (float(side[name][last]) for side in parts)
            rows.append({"name": name, "a": f"{x:.6g}", "b": f"{y:.6g}",
                         "difference": relative(abs(x - y) / abs(x)) if x else relative(abs(y))})
    return rows


def gradients_table(experiment: Experiment) -> List[Dict[str, str]]:
    """Whether a gradient ever reached each watched parameter."""
    rows = []
    for label in "AB":
        for run in experiment.side(label)[:1]:
            for name in dict.fromkeys(n for p in run.ranks for line in p.steps for n in line.get("param_grads") or {}):
                values = run.series("param_grads", name)
                arrived = int(np.isfinite(values).sum())
                rows.append({"name": name, "side": label,
                             "arrived": "never" if not arrived else f"{arrived} of {run.steps} steps",
                             "norm": "-" if not arrived else f"{np.nanmedian(values):.3g}"})
    return rows


def environment_rows(experiment: Experiment) -> List[Tuple[str, str]]:
    run = next((r for r in experiment.runs if r.environment), None)
    found = dict(run.environment) if run else {}
    header = run.ranks[0].header if run else {}
    modules = found.pop("modules", {}) or {}
    options = experiment.options
    rows = [("GPU", found.get("gpu")), ("PyTorch", found.get("torch")), ("CUDA", found.get("cuda")),
            ("cuDNN", found.get("cudnn")), ("Python", header.get("python") or experiment.host.get("python")),
            ("numpy", found.get("numpy")), *sorted(modules.items()), ("processes (world size)", found.get("world_size")),
            ("threads", found.get("threads")), ("CPUs", experiment.host.get("cpus")), ("platform", experiment.host.get("platform")),
            ("directory", experiment.cwd), ("schedule", " ".join(experiment.schedule)),
            *((name, options.get(name)) for name in ("steps", "warmup", "seed")),
            ("date", datetime.datetime.fromtimestamp(experiment.started).strftime("%Y-%m-%d %H:%M") if experiment.started else None)]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]


def commands(experiment: Experiment) -> List[Tuple[str, str]]:
    """How to run each side by hand."""
    quoted = " ".join(shlex.quote(word) for word in experiment.command)
    options = experiment.options

    def side(env: Dict[str, str]) -> str:
        return "".join(f"{k}={shlex.quote(str(v))} " for k, v in {"PYTHONHASHSEED": options.get("seed", 0), **env}.items())

    return [("A, unpatched", f"{side(options.get('env_a') or {})}flashbias run --off -- {quoted}"),
            ("B, patched", f"{side(options.get('env_b') or {})}flashbias run -- {quoted}")]


def runs_table(experiment: Experiment) -> List[Dict[str, Any]]:
    return [{"name": run.name, "side": run.label, "status": run.status, "steps": run.steps, "seconds": seconds(run.seconds),
             "exit": "-" if run.exit_code is None else run.exit_code, "ranks": len(run.ranks),
             "message": run.message + ("; parameters nudged in the last place, to see how far rounding drifts" if run.nudged else ""),
             "killed": run.killed, "ok": run.status == "ok"} for run in experiment.runs]


def backends_table(experiment: Experiment) -> List[Dict[str, Any]]:
    totals: Dict[str, int] = {}
    for run in experiment.side("B"):
        for name, count in run.calls().items():
            totals[name] = totals.get(name, 0) + count
    whole = sum(totals.values()) or 1
    return [{"name": name, "count": f"{count:,}", "share": round(100 * count / whole, 1)}
            for name, count in sorted(totals.items(), key=lambda item: -item[1])]


def fallbacks_table(experiment: Experiment) -> List[Dict[str, Any]]:
    found: Dict[Tuple[str, str, str], int] = {}
    for run in experiment.side("B"):
        for entry in run.fallbacks():
            key = (str(entry.get("source", "")), str(entry.get("call", "")), str(entry.get("reason", entry)))
            found[key] = found.get(key, 0) + int(entry.get("count", 1))
    return [{"source": s, "call": c, "reason": r, "count": n} for (s, c, r), n in found.items()]


def failures(experiment: Experiment) -> List[Dict[str, str]]:
    """Failed runs with the end of their output."""
    return [{"name": run.name, "what": f"{run.status}: {run.message}", "log": run.log_tail}
            for run in experiment.runs if run.status != "ok"]


# -- the formats -----------------------------------------------------------------------------------------------


def text(experiment: Experiment, verdict: Verdict) -> str:
    """A few plain lines, for a terminal without rich."""
    lines = [sentence(verdict)]
    if verdict.speed:
        lines.append(f"  speed   {times(1 / verdict.speed.value)} ({verdict.speed_word}), {interval(verdict.speed, True)}; "
                     f"{seconds(verdict.speed.a)} -> {seconds(verdict.speed.b)} a step, {verdict.clock}")
    if verdict.memory:
        lines.append(f"  memory  {times(verdict.memory.value)} ({verdict.memory_word}), {interval(verdict.memory)}; "
                     f"{size(verdict.memory.a)} -> {size(verdict.memory.b)}")
    lines += [f"  {parity_line(p)}" for p in verdict.parities]
    lines += [f"  backend {row['name']}: {row['count']} calls" for row in backends_table(experiment)]
    lines += [f"  problem: {p}" for p in verdict.problems] + [f"  note: {n}" for n in verdict.notes]
    return "\n".join(lines)


def markdown(experiment: Experiment, verdict: Verdict) -> str:
    """For pasting in an issue."""
    out = ["## flashbias A/B", "", f"**{sentence(verdict)}**", "",
           "| | A unpatched | B patched | B to A | 95% interval | verdict |", "|---|---|---|---|---|---|"]
    for name, ratio, word, show in (("time a step", verdict.speed, verdict.speed_word, seconds),
                                    ("peak memory", verdict.memory, verdict.memory_word, size)):
        if ratio is not None:
            ends = "-" if ratio.low is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
            out.append(f"| {name} | {show(ratio.a)} | {show(ratio.b)} | {times(ratio.value)} | {ends} | {word} |")
    out += ["", *(f"- {parity_line(p)}" for p in verdict.parities), ""]
    for title, entries in (("Problems", verdict.problems), ("Notes", verdict.notes),
                           ("Attention calls", [f"{r['name']}: {r['count']}" for r in backends_table(experiment)]),
                           ("Fallbacks", [f"{r['source']}, {r['call']}: {r['reason']} (x{r['count']})" for r in fallbacks_table(experiment)])):
        if entries:
            out += [f"### {title}", *(f"- {entry}" for entry in entries), ""]
    out += ["### Runs", "| run | status | steps | exit | message |", "|---|---|---|---|---|",
            *(f"| {r['name']} | {r['status']} | {r['steps']} | {r['exit']} | {_cell(r['message'])} |" for r in runs_table(experiment)), "",
            "### Environment", *(f"- {name}: {value}" for name, value in environment_rows(experiment)), "", "### Commands", "```sh",
            *(f"# {name}\n{command}" for name, command in commands(experiment)), "```", ""]
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
        "report.html.j2", title="flashbias A/B", sentence=sentence(verdict), cards=headlines(verdict), charts=charts(experiment, verdict),
        problems=verdict.problems, notes=verdict.notes, failures=failures(experiment), parts=parts_table(experiment),
        gradients=gradients_table(experiment), backends=backends_table(experiment), fallbacks=fallbacks_table(experiment),
        runs=runs_table(experiment), environment=environment_rows(experiment), commands=commands(experiment),
        command=" ".join(shlex.quote(word) for word in experiment.command), detections=extra)


def summary(experiment: Experiment, verdict: Verdict) -> Dict[str, Any]:
    """The verdict as JSON: what CI and benchmarks/results/ keep."""
    def ratio(value: Optional[Ratio]) -> Optional[Dict[str, Any]]:
        return None if value is None else value._asdict()

    return {
        "sentence": sentence(verdict), "speed": ratio(verdict.speed), "speed_word": verdict.speed_word,
        "memory": ratio(verdict.memory), "memory_word": verdict.memory_word, "memory_kind": verdict.memory_kind,
        "clock": verdict.clock, "parity_word": verdict.parity_word, "first_step": verdict.first_step,
        "parity": [{"quantity": p.quantity, "word": p.word, "first_step": p.first_step, "steps": p.steps, "noise": p.noise, "drift": p.drift,
                    "largest": p.largest if math.isfinite(p.largest) else None, "largest_at": p.largest_at} for p in verdict.parities],
        "problems": verdict.problems, "notes": verdict.notes, "backends": backends_table(experiment),
        "fallbacks": fallbacks_table(experiment), "runs": runs_table(experiment), "command": experiment.command,
        "environment": dict(environment_rows(experiment)),
    }


def load_and_judge(directory: str) -> Tuple[Experiment, Verdict]:
    experiment = records.load(directory)
    return experiment, statistics.judge(experiment)


def bench_html(found: Dict[str, Any]) -> str:
    """`flashbias bench`'s page: for each shape, the backends by time; bars of forward + backward."""
    shapes: Dict[str, List[Dict[str, Any]]] = {}
    for row in found["rows"]:
        shapes.setdefault(row["shape"], []).append(dict(row))
    for rows in shapes.values():
        slowest = max((r.get("total_ms") or r.get("forward_ms") or 0 for r in rows), default=0) or 1
        for row in rows:
            row["share"] = round(100 * (row.get("total_ms") or row.get("forward_ms") or 0) / slowest, 1)
        rows.sort(key=lambda r: (r.get("forward_ms") is None, r.get("total_ms") or r.get("forward_ms") or 0))
    return render("bench.html.j2", title="flashbias bench", shapes=shapes,
                  environment=[(k, v) for k, v in (found.get("environment") or {}).items() if v])
