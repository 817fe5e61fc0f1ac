"""The table of numbers that every format shows, and CSV."""

from __future__ import annotations

import csv
import io
import json

import pytest

from flashbias_patch.ab import table, words
from flashbias_patch.ab.judging import judge
from flashbias_patch.cli import main

from . import synthetic


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


def written(experiment):
    return read(table.to_csv(table.rows(experiment, judge(experiment))))


def test_csv_has_a_row_per_metric_run_and_step():
    experiment = synthetic.trial(3, slowdown=0.25, memory=0.41, part_at=40, jump=0.2)
    experiment.runs[4].status = "crashed"
    found, verdict = written(experiment), judge(experiment)
    assert {row["kind"] for row in found} == {"metric", "training", "run", "step"}
    assert sum(row["kind"] == "step" for row in found) == 6 * 60
    runs = [row for row in found if row["kind"] == "run"]
    assert [row["status"] for row in runs] == ["ok"] * 4 + ["crashed", "ok"]
    assert {row["unit"] for row in found if row["kind"] == "metric"} == {"s", "bytes"}
    steps = [row for row in found if row["kind"] == "step" and row["run"] == "B2"]
    series = experiment.runs[1].series("loss")
    assert [float(row["loss"]) for row in steps] == pytest.approx(series.tolist(), rel=1e-8)
    (loss,) = (row for row in found if row["kind"] == "training" and row["metric"] == "loss")
    assert (loss["verdict"], loss["step"]) == (verdict.parities[0].word, "40")


def test_every_format_shows_the_same_table():
    experiment = synthetic.trial(3, slowdown=0.25, memory=0.41)
    verdict = judge(experiment)
    shown = {row.name: row for row in words.figures(verdict)}
    for row in (row for row in written(experiment) if row["kind"] == "metric"):
        title = {m.name: m.title for m in table.metrics(verdict)}[row["metric"]]
        figure = shown.pop(title)
        assert figure.word == row["verdict"]
        assert figure.ratio == (words.times(float(row["ratio"])) if row["ratio"] else "-")
        if row["low"]:
            ends = f"{float(row['low']):.3f} to {float(row['high']):.3f}"
            assert figure.interval.startswith(ends)
    assert not shown


def test_unknown_numbers_are_empty_and_names_with_commas_are_quoted():
    experiment = synthetic.trial(0, repeats=1, steps=20)
    for line in experiment.runs[0].processes[0].steps:
        line["loss"] = None if line["step"] < 5 else float("inf")
    experiment.runs[1].status = 'a "status", of two\nlines'
    found = written(experiment)
    losses = [row["loss"] for row in found if row["kind"] == "step" and row["run"] == "A1"]
    assert losses == [""] * 5 + ["inf"] * 15
    assert found[-1]["kind"] == "step" and set(found[0]) == set(table.COLUMNS)
    assert any(row["status"] == experiment.runs[1].status for row in found)


def test_the_columns_and_metrics_are_documented(request):
    page = (request.config.rootpath / "docs" / "ab.md").read_text()
    for name in table.COLUMNS:
        assert f"`{name}`" in page, name
    for metric in table.metrics(judge(synthetic.trial(0))):
        assert f"`{metric.name}`" in page, metric.name


def test_report_writes_csv_to_standard_output(tmp_path, capsys):
    (tmp_path / "ab.json").write_text(json.dumps({"command": ["x"], "options": {}, "runs": []}))
    assert main.main(["report", str(tmp_path), "--csv", "-"]) == 0
    assert capsys.readouterr().out == ",".join(table.COLUMNS) + "\n"
    assert not (tmp_path / "report.html").exists()
