"""The trend over several comparisons, as text, Markdown, CSV and a page."""

from __future__ import annotations

import csv
import io
import json
import subprocess

import pytest

from flashbias_patch.ab import history, report
from flashbias_patch.ab.judging import judge
from flashbias_patch.cli import main

from . import synthetic
from .test_report import CHROMIUM, browse
from .test_sides import several


def entries(count=5):
    """Comparisons over commits: the middle one crashed, patched."""
    made = {}
    for i in range(count):
        found = synthetic.trial(i, slowdown=-0.2 - 0.05 * i, memory=0.5 - 0.02 * i)
        found.started, found.commit = 1.7e9 + 86400 * (count - i), f"c0ffee{i:04d}"
        if i == 2:
            for run in found.side("B"):
                run.status, run.message = "crashed", "exit status 1"
                run.processes[0].steps = run.processes[0].steps[:3]
        made[f"/runs/{i}"] = found, judge(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "load_and_judge", lambda directory, process: made[directory])
        return history.load(list(made))


def test_the_oldest_is_first_and_a_failure_is_shown_as_one():
    found = entries()
    assert [entry.commit[-1] for entry in found] == list("43210")
    rows = history.rows(found)
    assert rows[0][0].startswith("2023-11-1")
    assert [row[-1] for row in rows][2] == "fails"
    assert rows[2][3:6] == ("failed", "-", "not compared") and rows[2][11] == "failed"
    (problem,) = history.problems(found)
    assert "c0ffee0002: Patched fails: B2 crashed after 3 of 60 steps: exit status 1." in problem
    for text in (history.text(found), history.markdown(found)):
        assert "crashed after 3 of 60 steps" in text and "c0ffee0004" in text


def test_charts_leave_a_gap_where_a_side_failed():
    found = entries()
    time, memory, loss = history.charts(found)
    assert time["ticks"] == [entry.commit for entry in found]
    for chart in (time, memory, loss):
        a, b = (series["values"] for series in chart["series"])
        assert [v is None for v in b] == [False, False, True, False, False] and None not in a
    assert memory["series"][1]["values"][0] == pytest.approx(0.42 * 8192, rel=1e-3)
    assert all(len(series["values"]) == 5 for series in time["series"])


@pytest.mark.parametrize("inference", [False, True], ids=["train", "infer"])
def test_further_sides_and_inference_are_in_a_history(inference):
    """A and B are shown, and a note names the others; forward passes have no loss."""
    found = several(0, {"B": -0.3, "C": 0.0, "D": 0.4})
    for run in found.runs if inference else ():
        for line in run.processes[0].steps:
            line["output"] = line.pop("loss")
            line.pop("grad_norm", None)
    if inference:
        found.options["mode"] = "infer"
    two = synthetic.trial(1)
    with pytest.MonkeyPatch.context() as patch:
        made = {"four": (found, judge(found)), "two": (two, judge(two))}
        patch.setattr(report, "load_and_judge", lambda directory, process: made[directory])
        shown = history.load(["four", "two"])
    (note,) = (n for n in history.notes(shown) if n.startswith("A and B are shown"))
    assert note.endswith(": C sdpa, D old")
    row = history.rows(shown)[[e.experiment for e in shown].index(found)]
    assert row[5] == "faster" and (row[10] == "-") == inference
    assert "C sdpa, D old" in history.text(shown)
    if not inference:
        assert not any(
            "sides" in n for n in history.notes([e for e in shown if not e.verdict.further])
        )


def test_other_commands_are_noted():
    found = entries(2)
    assert history.notes(found) == []
    found[0].experiment.command = ["other"]
    found[1].experiment.options["steps"] = 7
    assert history.notes(found) == [
        "the comparisons have different commands",
        "the comparisons have different numbers of steps: 60, 7",
    ]


def test_commit_of_a_directory(tmp_path):
    assert history.commit_of(str(tmp_path / "none")) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = history.commit_of(str(tmp_path))
    assert len(commit) >= 10 and not commit.endswith("+")
    (tmp_path / "file").write_text("2")
    assert history.commit_of(str(tmp_path)) == commit + "+"


def empty(directory, started):
    directory.mkdir()
    document = {"command": ["x"], "options": {}, "runs": [], "started": started, "commit": "abc"}
    (directory / "ab.json").write_text(json.dumps(document))
    return str(directory)


def test_command_line(tmp_path, capsys):
    pytest.importorskip("jinja2")
    directories = [empty(tmp_path / "new", 2e9), empty(tmp_path / "old", 1e9)]
    assert main.main(["report", "--history", *directories]) == 0
    assert (tmp_path / "history.html").exists() and "Nothing to compare" in capsys.readouterr().out
    assert main.main(["report", "--csv", "-", "--history", *directories]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["directory"] for row in rows] == ["old", "new"]
    assert rows[0]["metric"] == "last_loss" and tuple(rows[0]) == history.CSV_COLUMNS
    for words in (["report"], ["report", directories[0], "--history", directories[1]]):
        assert main.main(words) == 2
        assert "give one DIR, or --history DIR..." in capsys.readouterr().err
    assert main.main(["report", "--json", "-", "--history", *directories]) == 2
    assert main.main(["report", "--history", str(tmp_path)]) == 2
    assert "holds no ab.json" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1280, 700, 390])
@pytest.mark.parametrize("count", [2, 5, 12])
def test_labels_of_commits_do_not_touch(tmp_path, width, count):
    pytest.importorskip("jinja2")
    found = entries(count)
    for entry in found:
        entry.experiment.commit = "8888888888+"
    assert browse(tmp_path, history.html(found), width)["touching"] == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width,dark", [(1280, False), (390, False), (1280, True), (390, True)])
def test_page_in_chromium(tmp_path, width, dark):
    pytest.importorskip("jinja2")
    found = browse(tmp_path, history.html(entries()), width, dark)
    assert found["problems"] == [] and found["requests"] == []
    assert found["inner"] == width and found["scroll"] <= width and found["wide"] == []
    assert found["drawn"] == found["charts"] == 3
    assert found["tip"].startswith("c0ffee000") and "A unpatched" in found["tip"]
    assert found["hidden"] == 1


def test_the_page_escapes_what_it_shows():
    pytest.importorskip("jinja2")
    found = entries(2)
    found[0].experiment.commit = "<script>alert(1)</script>"
    assert "<script>alert" not in history.html(found)
