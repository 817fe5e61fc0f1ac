"""`--repeats auto` and `--max-time`: when runs end, and how often that makes a verdict false."""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import types

import numpy as np
import pytest
from scipy import stats

from flashbias_patch.ab import reading, repeats, runner, sequential, statistics
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.runner import Options
from flashbias_patch.ab.statistics import Ratio
from flashbias_patch.cli import ab as cli_ab
from flashbias_patch.cli import ab_screen

from . import looks, synthetic
from .test_runner import STEPS
from .test_sides import several
from .test_statistics import at_most


def test_bounds_are_those_of_lan_and_demets():
    """Five looks, Pocock-like spending: Lan and DeMets, as in gsDesign and ldbounds."""
    found = sequential.levels(100 - 5 / sequential.STUDENT, 1, 5)
    bounds = stats.norm.isf((100 - np.array(found)) / 200)
    assert bounds == pytest.approx([2.438, 2.427, 2.410, 2.397, 2.386], abs=1e-3)


@pytest.mark.parametrize("level", [95.0, 99.0])
def test_all_looks_together_miss_no_more_often_than_one_should(level):
    trials, most = 20_000, sequential.MOST
    a, b = np.random.default_rng(3).normal(size=(2, trials, most))
    missed, naively = np.zeros((2, trials), bool)
    for n in range(sequential.FIRST, most + 1):
        spread = np.sqrt((a[:, :n].var(axis=1, ddof=1) + b[:, :n].var(axis=1, ddof=1)) / 2)
        t = np.abs(b[:, :n].mean(axis=1) - a[:, :n].mean(axis=1)) / (spread * np.sqrt(2 / n))
        missed |= t > stats.t.ppf(0.5 + sequential.level_at(n, level) / 200, 2 * n - 2)
        naively |= t > stats.t.ppf(0.5 + level / 200, 2 * n - 2)
    allowed = 1 - level / 100
    assert missed.mean() <= allowed + 2 * math.sqrt(allowed / trials) < naively.mean() / 4


@pytest.mark.parametrize("machine", ["0.2%", "1%"])
def test_equal_sides_raise_no_alarm_and_the_interval_holds(machine, monkeypatch):
    """docs/ab.md has more of it, by the same function."""
    monkeypatch.setattr(statistics, "DRAWS", looks.DRAWS)
    trials = 60
    found = looks.many(trials, machine, seed=17)
    assert sum(o.decided != 0 for o in found) <= at_most(trials)
    assert sum(not o.covers for o in found) <= at_most(trials)


def test_power_and_repeats_used(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", looks.DRAWS)
    found = looks.many(10, "0.5%", 0.05, seed=18)
    assert all(o.decided > 0 for o in found)
    assert 4 < np.mean([o.repeats for o in found]) < 9
    (noisy,) = looks.many(1, "5%", seed=18)
    assert noisy.repeats == sequential.MOST


# -- the plan
# ----------------------------------------------------------------------------------------------


class Bench:
    """A plan whose runs take `seconds` each and whose interval is `widths[repeats - 1]` percent."""

    def __init__(self, widths=(), seconds=10.0, fail_at=None, **options):
        self.now, self.widths, self.seconds, self.fail_at = 0.0, widths, seconds, fail_at
        self.experiment = synthetic.experiment([])
        self.said = []
        options = Options(**{"repeats": "auto", **options})
        progress = lambda event, look: self.said.append(repeats.look_text(look))  # noqa: E731
        self.plan = repeats.Plan(
            self.experiment, options, self.judge, progress, clock=lambda: self.now
        )

    def judge(self, experiment):
        width = self.widths[min(len(experiment.runs) // 2, len(self.widths)) - 1]
        factor = None if width is None else 1 + width / 100
        ends = (None, None) if factor is None else (1.01 / factor, 1.01 * factor)
        found = types.SimpleNamespace(name="patched", speed=Ratio(1.01, *ends, 1.0, 1.01, 1))
        found.every = [found]
        return found

    def run(self):
        labels = ""
        for label in self.plan:
            labels += label
            self.now += self.seconds
            run = synthetic.make_run(label, len(labels) - 1, [0.1] * 10)
            run.status = "crashed" if len(labels) == self.fail_at else "ok"
            self.experiment.runs.append(run)
        return labels, self.plan.stopped


@pytest.mark.parametrize(
    "bench,labels,why",
    [
        (Bench([9.0, 5.0, 3.0, 1.9]), "ABBAABBA", repeats.NARROW),
        (Bench([0.1, 0.1]), "ABBA", repeats.NARROW),  # one pair tells nothing about the spread
        (Bench([9.0, 4.0], half_width=5.0), "ABBA", repeats.NARROW),
        (Bench([9.0]), "ABBA" * 10, repeats.MOST_MADE),
        (Bench([9.0], max_time=1.4), "ABBAAB", repeats.TIME_IS_UP),  # 10 s are for a nudged A
        (Bench([9.0], max_time=1.4, noise_run=False), "ABBAABBA", repeats.TIME_IS_UP),
        (Bench([9.0], max_time=0.0), "AB", repeats.TIME_IS_UP),
        (Bench([9.0], fail_at=3), "ABBA", repeats.RUN_FAILED),
        (Bench([None]), "AB", repeats.NO_INTERVAL),
        (Bench(repeats=3), "ABBAAB", repeats.FIXED_NUMBER),
        (Bench(repeats=1), "ABA", repeats.FIXED_NUMBER),
        (Bench(repeats=5, max_time=1.1), "ABBA", repeats.TIME_IS_UP),
    ],
)
def test_when_runs_end(bench, labels, why):
    assert bench.run() == (labels, why)


def test_progress_says_the_width_and_what_is_left():
    bench = Bench([9.0, 5.0, 3.0, 1.9], max_time=2.0)
    bench.run()
    assert bench.said == [
        "after 2 repeats: patched / unpatched 1.010, interval 0.962 to 1.060 (±5.0%, wanted ±2%): "
        "about 1 more, 20 s",
        "after 3 repeats: patched / unpatched 1.010, interval 0.981 to 1.040 (±3.0%, wanted ±2%): "
        "about 1 more, 20 s",
        "after 4 repeats: patched / unpatched 1.010, interval 0.991 to 1.029 (±1.9%, wanted ±2%): "
        "narrow enough",
    ]
    late = Bench([90.0], max_time=2.0)
    late.run()
    assert late.said[0].endswith(
        "cannot be reached with 20 repeats, if runs continue to differ so much"
    )
    soon = Bench([9.0, 9.0], max_time=2.0, seconds=20.0)
    soon.run()
    assert soon.said[0].endswith("; --max-time leaves 40 s")


def test_a_look_at_several_sides_names_the_one_of_the_widest_interval(monkeypatch):
    bench = Bench([9.0, 9.0], max_time=2.0, seconds=20.0)
    judge = bench.judge

    def of_two(experiment):
        found = judge(experiment)
        wide = types.SimpleNamespace(name="sdpa", speed=Ratio(1.2, 0.6, 2.4, 1.0, 1.2, 1))
        found.every = [found, wide]
        return found

    bench.plan.judge = of_two
    bench.run()
    assert bench.said[0].startswith("after 2 repeats: sdpa / unpatched 1.200, interval 0.600 to ")


def test_each_side_has_a_note_with_its_own_interval():
    found = several(0, {"B": 0.0, "C": 0.5}, repeats=3)
    found.options.update(repeats="auto", half_width=0.01, max_time=7)
    found.stopped = repeats.TIME_IS_UP
    verdict = judge(found)
    for each in verdict.every:
        (note,) = (n for n in each.notes if "--max-time were up" in n)
        assert f"±{repeats.half_width(repeats.deciding(each.speed)):.1f}%" in note
    (single,) = repeats.notes(found, verdict.speed, 1)
    assert "after 1 repeat: " in single


@pytest.mark.parametrize("why", [repeats.NARROW, repeats.TIME_IS_UP, repeats.MOST_MADE])
def test_the_report_says_why_no_more_were_run(why):
    found = synthetic.trial(0, repeats=4)
    found.options.update(repeats="auto", half_width=2.0, max_time=7)
    found.stopped = why
    verdict = judge(found)
    (note,) = (n for n in verdict.notes if "evaluated after every repeat" in n)
    assert "4 repeats" in note and f"±{repeats.half_width(verdict.speed):.1f}%" in note
    assert verdict.speed.level == pytest.approx(sequential.level_at(4, 95.0))
    fixed = synthetic.trial(0, repeats=4)
    narrower = judge(fixed).speed
    assert narrower.high / narrower.low < verdict.speed.high / verdict.speed.low
    fixed.options.update(repeats=9, max_time=7)
    fixed.stopped = repeats.TIME_IS_UP
    assert "the 7 min of --max-time were up after 4 of 9 repeats" in judge(fixed).notes


def command(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(STEPS + textwrap.dedent(body))
    return [sys.executable, str(script)]


def test_runs_of_a_command_end_when_the_interval_is_narrow(tmp_path, monkeypatch):
    monkeypatch.setattr("flashbias_patch.ab.timing_notes.BUSY_SHARE", 2.0)
    out = tmp_path / "out"
    options = Options(repeats="auto", steps=8, warmup=1, half_width=3.0)
    said = []
    body = "train(100, seconds=0.001)"
    events = lambda event, entry: said.append(entry) if event == "look" else None  # noqa: E731
    made = runner.run_all(command(tmp_path, body), str(out), options, events)
    assert made.stopped == repeats.NARROW and [look["repeats"] for look in said] == [2]
    read = reading.load(str(out))
    assert (read.stopped, read.schedule) == (repeats.NARROW, "ABBA")
    assert json.loads((out / "ab.json").read_text())["options"]["repeats"] == "auto"
    assert any("as narrow as requested" in note for note in judge(read).notes)


def test_a_crash_ends_the_repeats(tmp_path):
    body = "train(100, seconds=0.001)\n"
    body = "if os.environ['FLASHBIAS_PATCH'] == '1': sys.exit(3)\n" + body
    options = Options(repeats="auto", steps=8, warmup=1)
    made = runner.run_all(command(tmp_path, body), str(tmp_path / "out"), options)
    assert [run.status for run in made.runs] == ["ok", "crashed"]
    assert judge(made).failed and made.stopped == repeats.RUN_FAILED


@pytest.mark.parametrize(
    "words,says",
    [
        (["--half-width", "1"], "--half-width: only with --repeats auto"),
        (
            ["--repeats", "auto", "--eval", "x.pth"],
            "--repeats auto: not with --eval, which compares detections and no times",
        ),
    ],
)
def test_usage(words, says, capsys):
    parser = argparse.ArgumentParser()
    cli_ab.add_arguments(parser)
    assert cli_ab.main(parser.parse_args([*words, "--", sys.executable, "{predictions}"])) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--repeats", "often"], ["--repeats", "0"], ["--max-time", "-1"]]
)
def test_bad_values_are_refused(words, capsys):
    parser = argparse.ArgumentParser()
    cli_ab.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--", "x"])
    assert words[0] in capsys.readouterr().err


def test_the_first_line_says_how_many_runs_there_are_at_most(capsys):
    with ab_screen.PlainScreen("", False):
        assert capsys.readouterr().out.startswith("up to 40 runs: A B B A ... (A unpatched")
    assert ab_screen.MOST_REPEATS == sequential.MOST


@pytest.mark.parametrize(
    "low, high, shown",
    [
        (0.9, 1.1, "interval 0.900 to 1.100 (\u00b12.0%, wanted \u00b12%)"),
        (0.01, 1.1, "too few runs to tell the interval (wanted \u00b12%)"),
    ],
)
def test_ends_that_say_nothing_are_not_printed_while_runs_are_made(low, high, shown):
    look = dict(repeats=2, name="patched", ratio=1.0, low=low, high=high, half_width=2.0, wanted=2)
    assert shown in repeats.look_text(look)
