"""The report: its words, its formats, and the page in a real headless Chromium."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest

from flashbias_patch.ab import charts, page, report, result, words
from flashbias_patch.ab.judging import judge

from . import synthetic

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def rich_experiment():
    """Everything a page can show: parts, parameters, gradients, backends, fallbacks, a failure,
    awkward names.
    """
    found = synthetic.trial(3, slowdown=-0.25, memory=0.41, part_at=40, jump=0.2)
    for run in found.runs:
        for i, line in enumerate(run.processes[0].steps):
            line["loss_parts"] = {
                "loss_cls": 1.0,
                "d0.loss_bbox": 2.0 / (i + 1),
                "<b>loss</b>": 0.0,
            }
            line["params"] = {
                "transformer.decoder.bias_scale": 0.1 + (0.001 * i if run.label == "B" else 0.0)
            }
            line["param_grads"] = {
                "transformer.decoder.bias_scale": 0.2 if run.label == "B" else None
            }
        run.seconds = 12.3
    found.runs[1].processes[0].fallbacks = [
        {"source": "triton", "call": "fp16 d32 <r8>", "reason": "a long reason " * 8, "count": 3}
    ]
    found.command = [
        "python",
        "tools/train.py",
        "projects/configs/" + "very_long_name_" * 8 + ".py",
    ]
    return found


def failing_experiment():
    found = rich_experiment()
    found.runs[4].status, found.runs[4].message = "crashed", "exit status 1; 60 steps recorded"
    found.runs[4].log_tail = "Traceback </pre><script>alert(1)</script>\n" + "x" * 400
    return found


def html_of(experiment=None, detections=None):
    pytest.importorskip("jinja2")
    experiment = experiment or rich_experiment()
    return report.html(experiment, judge(experiment, detections=detections))


def test_sentence_and_cards_say_the_verdict():
    experiment = rich_experiment()
    verdict = judge(experiment)
    text = words.sentence(verdict)
    assert re.fullmatch(
        r"Patched takes 0\.7\d× the time per step \(faster\), needs 0\.41× the memory and does "
        r"not train the same from step 40 on\.",
        text,
    )
    speed, memory, training = page.headlines(verdict)
    assert (speed["word"], memory["word"], training["big"]) == ("faster", "less memory", "Differs")
    assert speed["whisker"]["low"] < speed["whisker"]["value"] < speed["whisker"]["high"]
    assert (
        speed["whisker"]["one"] > speed["whisker"]["high"]
    )  # 1x lies outside the interval: it is faster


def test_a_failure_is_the_headline_of_every_format():
    experiment = failing_experiment()
    verdict = judge(experiment)
    says = "Unpatched fails: A5 crashed: exit status 1."
    assert words.sentence(verdict) == says and verdict.parity_word == "fails"
    assert [card["word"] for card in page.headlines(verdict)] == [
        "undecided",
        "undecided",
        "crashed",
    ]
    assert says in report.text(experiment, verdict) and says in report.markdown(experiment, verdict)
    assert f'<h1 class="bad">{says}</h1>' in html_of(experiment)
    assert result.compact(experiment, verdict)["headline"]["sentence"] == says


def test_markdown_holds_the_figures():
    experiment = rich_experiment()
    text = report.markdown(experiment, judge(experiment))
    assert "| peak memory | 8.00\u00a0GiB | 3.28\u00a0GiB | 0.41× |" in text
    assert "- `triton`, `fp16 d32 <r8>`" in text and "flashbias run --off -- python" in text


NASTY = (
    "```\n# heading <img src=x onerror=alert(1)> @everyone | cell | `code` "
    "[link](https://example.org) ~~~"
)


def test_markdown_holds_the_watched_parameters():
    found = rich_experiment()
    text = report.markdown(found, judge(found))
    name = "`transformer.decoder.bias_scale`"
    assert f"- {name}, A: first 0.1, last 0.1\n- {name}, B: first 0.1, last 0.159\n" in text
    assert (
        f"- {name}, A: gradient arrived: never, median norm -\n- {name}, B: gradient arrived: 60 "
        "of 60 steps, " in text
    )


def outside_code(text):
    """Markdown without its code blocks and code spans, as CommonMark reads them."""
    kept, fence = [], None
    for line in text.split("\n"):
        opening = re.match(r"(`{3,})", line)
        if fence is None and opening:
            fence = opening.group(1)
        elif fence is not None and re.fullmatch(f"`{{{len(fence)},}}", line):
            fence = None
        elif fence is None:
            kept.append(line)
    assert fence is None
    # Spans, as CommonMark finds them: runs of ticks of equal length, none of them escaped.
    return re.sub(r"(?<![`\\])(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", "\n".join(kept))


def test_nothing_of_the_command_leaves_its_fence():
    experiment = failing_experiment()
    experiment.command = ["python", "-c", NASTY]
    experiment.options = {**experiment.options, "env_b": {"X": NASTY}}
    experiment.cwd = NASTY
    run = experiment.runs[1]
    run.processes[0].environment = {
        **run.processes[0].environment,
        "gpu": NASTY,
        "modules": {"mmcv": NASTY},
    }
    experiment.runs[0].processes[0].environment = run.processes[0].environment
    run.processes[0].fallbacks = [{"source": NASTY, "call": NASTY, "reason": NASTY, "count": 1}]
    run.processes[0].notes, run.message = [f"probe: {NASTY}"], f"cannot be started: {NASTY}"
    for each in experiment.runs:
        for line in each.processes[0].steps:
            line["loss_parts"][NASTY] = 5.0 if each.label == "A" else 7.0
    verdict = judge(experiment)
    rest = outside_code(report.markdown(experiment, verdict))
    assert not re.search(r"(?<!\\)<img|(?<!\\)\[link\]|@everyone|https://", rest)
    assert not re.search(r"^# ", rest, re.MULTILINE)
    rows = [line for line in rest.split("\n") if line.startswith("|") and "run" not in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6, 7}  # the cells of two tables
    assert "<img" not in report.html(experiment, verdict)


def test_result_holds_the_figures_and_no_path_of_the_machine():
    experiment = rich_experiment()
    experiment.command = [
        "/opt/x/python",
        "train.py",
        "/data/frame/",
        "--load=/home/me/last.pth",
        "a/b",
    ]
    experiment.options = {
        **experiment.options,
        "repeats": 3,
        "env_b": {"HOME_OF": "/somewhere/else"},
    }
    verdict = judge(experiment)
    found = json.loads(json.dumps(result.compact(experiment, verdict), allow_nan=False))
    assert found["command"] == (
        "flashbias ab --repeats 3 --steps 60 --warmup 5 --seed 0 --env-b HOME_OF=else -- "
        "python train.py frame --load=last.pth a/b"
    )
    assert "/home" not in json.dumps(found) and "/opt" not in json.dumps(found)
    head = found["headline"]
    assert (
        head["time"]["ratio"] == pytest.approx(verdict.speed.value)
        and head["time"]["word"] == "faster"
    )
    assert head["memory"]["b_mib"] == pytest.approx(8192 * 0.41, rel=1e-6) and head["repeats"] == [
        3,
        3,
    ]
    assert head["memory"]["reserved_mib"] == [8192, pytest.approx(8192 * 0.41, rel=1e-6)]
    assert head["training"]["word"] == "differs" and head["training"]["first_step"] == 40
    assert found["runs"][0]["loss"][5] == pytest.approx(experiment.runs[0].series("loss")[5])
    assert (
        found["backends"] == {"triton": 3 * 360, "sdpa": 3 * 60}
        and found["fallbacks"][0]["count"] == 3
    )
    time, memory, loss = result.rows(found)
    assert time[0] == "time per step" and time[3].endswith("faster") and memory[2] == "3359 MiB"
    assert loss[3].startswith("differs: A from A")
    nudged = {**head, "training": {**head["training"], "loss_drift": 0.5}}
    for drawn, name in ((False, "nudged"), (True, "redrawn")):
        runs = [{**found["runs"][0], "redrawn": drawn}]
        said = result.rows({**found, "headline": nudged, "runs": runs})[2][3]
        assert f"a {name} A from A 50" in said
    assert result.says(found).replace(" ", " ") == words.sentence(verdict).replace("\u00a0", " ")
    long = synthetic.trial(0, repeats=1, steps=5000)
    kept = result.compact(long, judge(long))
    assert all(len(run["loss"]) <= result.MOST_STEPS for run in kept["runs"])
    assert len(json.dumps(kept, indent=1)) < 300_000


def test_page_is_self_contained_and_escapes():
    text = html_of(failing_experiment())
    assert "<script>alert" not in text and "<b>loss</b>" not in text
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", text)
    assert not re.search(r"url\((?!#)", text.replace('"url(#" + clip', "url(#"))
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert len(text) < 400_000
    html.parser.HTMLParser().feed(text)


def test_page_of_nothing_and_of_one_side():
    empty = synthetic.experiment([])
    assert "Nothing to compare" in html_of(empty)
    one = synthetic.experiment(synthetic.trial(0).runs[:1])
    assert "recorded no step" in html_of(one)


def test_never_moving_parameter_is_reported():
    text = html_of()
    assert "Never moved in A1, A4, A5" in text and "never</span>" in text


def test_non_finite_values_leave_gaps():
    experiment = synthetic.trial(0)
    for line in experiment.runs[1].processes[0].steps[20:]:
        line["loss"] = math.nan
    data = json.loads(
        re.search(r'id="charts">(.*?)</script>', html_of(experiment), re.DOTALL).group(1)
    )
    series = {s["name"]: s["values"] for s in data[0]["series"]}
    assert series["B2"][20] is None and series["A1"][20] is not None


def test_steps_without_figures_leave_gaps_and_no_warning():
    experiment = synthetic.trial(0, repeats=1, steps=20)
    for run in experiment.runs:
        for line in run.processes[0].steps[:12]:
            line["memory"] = None
    for line in experiment.runs[1].processes[0].steps:
        line["memory"] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = html_of(experiment)
    drawn = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL).group(1))
    (memory,) = (chart for chart in drawn if chart["title"] == "Memory")
    assert {s["name"]: [v is None for v in s["values"]] for s in memory["series"]} == {
        name: [True] * 12 + [False] * 8 for name in ("A1", "A3")
    }


@pytest.mark.parametrize("option", ["--json", "--markdown", "--html", "--tensorboard"])
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys, option):
    from flashbias_patch.ab import tensorboard
    from flashbias_patch.cli import main

    monkeypatch.setattr(tensorboard, "write", lambda experiment, folder: os.makedirs(folder))
    (tmp_path / "ab.json").write_text(json.dumps({"command": ["x"], "options": {}, "runs": []}))
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path / "file" / "x", "is not a directory"),
        (tmp_path, "it is a directory|File exists"),
    ):
        assert main.main(["report", str(tmp_path), option, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"flashbias report: .*'{path}': .*({says})", line), line
        assert f"{option}: expected a " in line or "File exists" in line


def test_long_runs_are_thinned():
    experiment = synthetic.trial(0, repeats=1, steps=5000)
    data = charts.all_of(experiment, judge(experiment))
    assert all(len(s["values"]) <= charts.MAX_POINTS for chart in data for s in chart["series"])
    assert data[0]["stride"] == 4


def test_missing_jinja2_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(report.MissingExtra, match=r'pip install "flashbias-patch\[report\]"'):
        report.html(rich_experiment(), judge(rich_experiment()))


def test_tensorboard_export_reads_back(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from flashbias_patch.ab import tensorboard

    experiment = rich_experiment()
    tensorboard.write(experiment, str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(run.name for run in experiment.runs)
    read = EventAccumulator(str(tmp_path / "B2")).Reload()
    values = [(e.step, e.value) for e in read.Scalars("loss/total")]
    assert values == [
        (i, pytest.approx(v, rel=1e-6)) for i, v in enumerate(experiment.runs[1].series("loss"))
    ]
    assert "parameter/transformer.decoder.bias_scale" in read.Tags()["scalars"]
    assert "attention calls/triton" in read.Tags()["scalars"]


def test_missing_tensorboard_is_one_clear_message(monkeypatch, tmp_path):
    from flashbias_patch.ab import tensorboard

    for name in ("tensorboard.compat.proto.event_pb2", "tensorboard.compat.proto.summary_pb2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(report.MissingExtra, match=r'pip install "flashbias-patch\[tensorboard\]"'):
        tensorboard.write(rich_experiment(), str(tmp_path))


def test_bench_html_of():
    pytest.importorskip("jinja2")
    text = report.bench_html(
        {
            "environment": {"GPU": "Some GPU"},
            "rows": [
                {
                    "shape": "cmt-800x320",
                    "backend": "sdpa",
                    "forward_ms": 0.5,
                    "total_ms": 1.5,
                    "extra_mib": 34.0,
                    "error": 2e-4,
                },
                {"shape": "cmt-800x320", "backend": "triton", "forward_ms": 0.3, "total_ms": 1.0},
                {
                    "shape": "cmt-800x320",
                    "backend": "flash",
                    "forward_ms": None,
                    "why_not": "flash-attn is not installed",
                },
            ],
        }
    )
    assert (
        text.index("triton")
        < text.index("sdpa")
        < text.index("flash: cannot: flash-attn is not installed")
    )


# -- in a browser
# ----------------------------------------------------------------------------------------------

# Put in front of the page's own script: errors and, once all is drawn, measures, end up in the
# document's title.
WATCH = """<script>
window.problems = [];
addEventListener("error", function (e) { problems.push(String(e.message || e.target.src)); }, true);
console.error = console.warn = function () { problems.push(Array.prototype.join.call(arguments, " ")); };
addEventListener("load", function () { setTimeout(function () {
  var wide = [].filter.call(document.querySelectorAll("main *"), function (n) {
    return n.getBoundingClientRect().right > innerWidth + 1 && !n.closest(".scroll, svg"); });
  var first = document.querySelector(".plot svg"), box = first && first.getBoundingClientRect();
  if (first) first.dispatchEvent(new PointerEvent("pointermove", {
    clientX: box.left + box.width / 2, clientY: box.top + 50}));
  var touching = [];
  document.querySelectorAll(".plot svg").forEach(function (svg) {
    var boxes = [].map.call(svg.querySelectorAll("text"), function (n) { return n.getBoundingClientRect(); });
    boxes.forEach(function (a, i) { boxes.slice(i + 1).forEach(function (b) {
      if (a.top === b.top && a.left < b.right && b.left < a.right) touching.push([a.left, b.left]); }); }); });
  var tip = document.querySelector(".tip"), button = document.querySelector(".legend button");
  var lines = document.querySelectorAll(".plot path").length;
  if (button) button.click();
  document.documentElement.setAttribute("data-found", JSON.stringify({
    problems: problems, touching: touching, scroll: document.documentElement.scrollWidth, inner: innerWidth,
    wide: wide.map(function (n) { return n.tagName + "." + n.className; }),
    drawn: document.querySelectorAll(".plot svg").length, charts: document.querySelectorAll(".chart").length,
    tip: tip && tip.textContent, lines: lines, hidden: lines - document.querySelectorAll(".plot path").length,
    ground: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map(function (r) { return r.name; }) }));
}, 300); });
</script>"""  # noqa: E501


def browse(tmp_path, text, width, dark=False):
    """What Chromium found on the page at that width. In a frame, as a window has a least width."""
    (tmp_path / "page.html").write_text(text.replace("<style>", WATCH + "<style>", 1))
    (tmp_path / "frame.html").write_text(
        f'<iframe id="f" src="page.html" style="width:{width}px;height:4000px;border:0"></iframe>'
        "<script>setTimeout(function () { document.body.dataset.found = "
        'f.contentDocument.documentElement.dataset.found || ""; }, 2500);</script>'
    )
    words = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--window-size=1400,4000",
        "--virtual-time-budget=6000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    document = subprocess.run(
        [*words, f"file://{tmp_path / 'frame.html'}"], capture_output=True, text=True, timeout=120
    ).stdout
    found = re.search(r'<body data-found="([^"]*)"', document)
    assert found and found.group(1), "the page's script did not come to its end"
    return json.loads(
        found.group(1)
        .replace("&quot;", '"')
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width,dark", [(1280, False), (390, False), (390, True)])
def test_page_in_chromium(tmp_path, width, dark):
    found = browse(tmp_path, html_of(), width, dark)
    assert found["problems"] == [] and found["requests"] == []
    assert found["inner"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["drawn"] == found["charts"] >= 6
    assert re.match(r"step (2[5-9]|3\d)A1 ", found["tip"])
    assert found["hidden"] == 1  # a click in the legend hides its curve
    assert (found["ground"] == "rgb(14, 19, 25)") == dark


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width,dark", [(1280, True), (390, False)])
def test_page_of_four_sides_in_chromium(tmp_path, width, dark):
    """With clocks, a profile, waiting for data, and a long environment of a side."""
    from .test_clocks import clocked
    from .test_profiles import profiled
    from .test_sides import several

    found = several(0, {"B": -0.25, "C": 0.0, "D": 0.3}, {"D": 1.3})
    env = {"FLASHBIAS_PATCH": "0", "SOME_VARIABLE": "/a/long/path/" + "x" * 80}
    found.options["sides"] = [["sdpa", env], ["a-name-of-24-characters-", env]]
    kernels = profiled(dict.fromkeys("AB", {"softmax_warp_forward": 0.1, "x" * 90: 0.1}))
    for run in found.runs:
        run.gpus = clocked(1800.0, 1800.0).runs[0].gpus
        run.processes[0].profile = kernels.runs[0].processes[0].profile
        for line in run.processes[0].steps:
            line["loader_s"] = line["wall_s"] * 0.6
    found = browse(tmp_path, html_of(found), width, dark)
    assert found["problems"] == [] and found["requests"] == []
    assert found["inner"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["drawn"] == found["charts"] >= 5
    assert (found["ground"] == "rgb(14, 19, 25)") == dark


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_page_of_a_failure_in_chromium(tmp_path):
    experiment = synthetic.experiment(failing_experiment().runs[4:5])
    found = browse(tmp_path, html_of(experiment), 390)
    assert found["problems"] == [] and found["scroll"] <= 390
