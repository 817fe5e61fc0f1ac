"""Further sides: how they are named, run, judged and shown."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest

from flashbias_patch.ab import (
    charts,
    reading,
    repeats,
    report,
    result,
    runner,
    sides,
    statistics,
    words,
)
from flashbias_patch.ab.further_runs import NextRun, most_confirmations, next_run
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.probe_variables import Nudge
from flashbias_patch.ab.runner import Options, schedule
from flashbias_patch.cli import ab as cli_ab
from flashbias_patch.cli.ab_options import FAIL_IF

from . import synthetic


def several(seed, slowdown, loss=None, memory=None, repeats=2, steps=40, status=None):
    """Sides A B C ... of which each takes (1 + slowdown[letter]) the time; `loss`: a factor by
    letter, `memory` likewise."""
    rng = np.random.default_rng(seed)
    letters = "ABCDEFGH"[: len(slowdown) + 1]
    runs = []
    for index, label in enumerate(schedule(repeats, False, letters[1:])):
        made = synthetic.make_run(
            label,
            index,
            synthetic.step_times(rng, steps, 0.1 * (1 + {"A": 0.0, **slowdown}[label])),
            synthetic.losses(rng, steps) * (loss or {}).get(label, 1.0),
            synthetic.PEAK * (memory or {}).get(label, 1.0),
        )
        made.status = (status or {}).get(label, "ok")
        if label != "A":
            for i, line in enumerate(made.processes[0].steps):
                line["calls"] = {"triton": i + 1}
        runs.append(made)
    names = ["sdpa", "old", "third", "fourth", "fifth", "sixth"][: len(letters) - 2]
    return synthetic.experiment(
        runs, sides=[[name, {"FLASHBIAS_BACKEND": "sdpa"}] for name in names], steps=steps
    )


@pytest.mark.parametrize(
    "text, name, env",
    [
        ("sdpa:FLASHBIAS_BACKEND=sdpa", "sdpa", {"FLASHBIAS_BACKEND": "sdpa"}),
        ("old:FLASHBIAS_PATCH=0,X=", "old", {"FLASHBIAS_PATCH": "0", "X": ""}),
        ("t:FLASHBIAS_TARGETS=Aa,Bb,X=1", "t", {"FLASHBIAS_TARGETS": "Aa,Bb", "X": "1"}),
        ("q:FLASHBIAS_AQR=topk=9,seed=2", "q", {"FLASHBIAS_AQR": "topk=9,seed=2"}),
        ("p:PYTHONPATH=/a:/b", "p", {"PYTHONPATH": "/a:/b"}),
    ],
)
def test_a_side_is_parsed(text, name, env):
    assert sides.parse(text) == (name, env)


@pytest.mark.parametrize(
    "text, says",
    [
        ("sdpa", "expected NAME:VARIABLE=VALUE"),
        (":X=1", "expected NAME:VARIABLE=VALUE"),
        ("x:", "expected NAME:VARIABLE=VALUE"),
        ("x:FLASHBIAS_BACKEND", "'FLASHBIAS_BACKEND' of 'x' has no '='"),
        ("x:X=1,FLASHBIAS_BACKEND", "'FLASHBIAS_BACKEND' of 'x' has no '='"),
        ("x:=1", "has no '='"),
        ("x:FLASHBIAS_BAKEND=sdpa", "the nearest known is FLASHBIAS_BACKEND"),
        ("x:FLASHBIAS_BACKEND=sdqa", "FLASHBIAS_BACKEND='sdqa' is not understood"),
        ("patched:X=1", "'patched' is reserved"),
        ("C:X=1", "'C' is reserved"),
        ("a b:X=1", "no name of a side"),
        ("x:X=1,X=2", "X is given twice"),
    ],
)
def test_a_mistaken_side_is_named(text, says, capsys):
    parser = argparse.ArgumentParser()
    cli_ab.add_arguments(parser)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--side", text, "--", "true"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "argument --side: " in error and says in error


@pytest.mark.parametrize(
    "given, says",
    [
        (["--side", "x:X=1", "--side", "X:X=2"], "--side: the name 'x' is given twice"),
        ([w for i in range(7) for w in ("--side", f"s{i}:X=1")], "--side: at most 6"),
        (["--side", "x:X=1", "--eval", "last.pth"], "--side: not with --eval"),
        (["--env-b", "FLASHBIAS_BAKEND=sdpa"], "--env-b: FLASHBIAS_BAKEND is not a variable"),
        (["--env-a", "FLASHBIAS_BACKEND=x"], "--env-a: FLASHBIAS_BACKEND='x' is not understood"),
    ],
)
def test_mistakes_over_several_options(given, says, capsys):
    parser = argparse.ArgumentParser()
    cli_ab.add_arguments(parser)
    assert cli_ab.main(parser.parse_args([*given, "--", "true"])) == 2
    assert says in capsys.readouterr().err


def test_schedule_takes_sides_there_and_back():
    assert schedule(2, True, "BCD") == "ABCDDCBA"
    assert schedule(1, True, "BC") == "ABCA"
    assert schedule(3, False, "B") == "ABBAAB"


def test_each_side_runs_in_its_own_environment():
    options = Options(
        env_b={"X": "b"},
        sides=[sides.parse("old:FLASHBIAS_PATCH=0"), sides.parse("new:X=d")],
        stand_in=True,
    )
    made = {x: runner.run_environment(x, "probes", options, None) for x in "ABCD"}
    assert [made[x]["FLASHBIAS_PATCH"] for x in "ABCD"] == ["0", "1", "0", "1"]
    assert [made[x].get("X") for x in "ABCD"] == [None, "b", None, "d"]
    assert [made[x].get("FLASHBIAS_PROBE_STAND_IN") for x in "ABCD"] == ["1", None, "1", None]


def test_every_side_is_judged_against_a():
    found = several(0, {"B": 0.0, "C": 0.3, "D": -0.3}, {"D": 1.5}, {"C": 0.5})
    verdict = judge(found)
    assert [v.side for v in verdict.every] == ["B", "C", "D"]
    assert [v.speed_word for v in verdict.every] == ["no difference", "slower", "faster"]
    assert [v.memory_word for v in verdict.every] == ["no difference", "less memory"] + [
        "no difference"
    ]
    assert [v.parity_word == "differs" for v in verdict.every] == [False, False, True]
    assert verdict.fails(FAIL_IF) == ["slower: C (sdpa)", "differs: D (old)"]
    assert verdict.fails([]) == [] and verdict.succeeded
    text = words.sentence(verdict)
    assert text.startswith("Patched takes the same time per step") and "C (sdpa) takes 1." in text
    assert re.search(
        r"D \(old\) takes 0\.\d\d× the time per step \(faster\).* does not train the same", text
    )


def test_every_format_shows_every_side():
    found = several(0, {"B": 0.0, "C": 0.3, "D": -0.3})
    verdict = judge(found)
    shown = report.text(found, verdict), report.markdown(found, verdict)
    for text in shown:
        assert "C sdpa" in text and "D old" in text and "sdpa / unpatched" in text
        assert "Holm's procedure" in text and "98.33%" in text
    assert "C, sdpa:" in shown[1] and "FLASHBIAS_BACKEND=sdpa" in shown[1]
    kept = json.loads(json.dumps(report.summary(found, verdict), allow_nan=False))
    assert [(s["side"], s["name"], s["speed_word"]) for s in kept["sides"]] == [
        ("C", "sdpa", "slower"),
        ("D", "old", "faster"),
    ]
    document = json.loads(json.dumps(result.compact(found, verdict), allow_nan=False))
    assert [s["time"]["word"] for s in document["sides"]] == ["slower", "faster"]
    assert "--side sdpa:FLASHBIAS_BACKEND=sdpa" in document["command"]
    pytest.importorskip("jinja2")
    html = report.html(found, verdict)
    assert html.count('class="cards"') == 3 and "C sdpa against A" in html
    drawn = {chart["title"]: chart for chart in charts.all_of(found, verdict)}
    assert {s["side"] for s in drawn["Loss"]["series"]} == set("ABCD")
    bars = drawn["Step times, warm-up left out"]["series"]
    assert [s["name"] for s in bars] == ["A unpatched", "B patched", "C sdpa", "D old"]


def test_two_sides_look_as_before():
    found = several(0, {"B": 0.0})
    verdict = judge(found)
    assert verdict.further == [] and words.overview(verdict) == []
    assert not any("Holm" in note for note in verdict.notes)
    assert verdict.speed.level == 95.0 and verdict.speed.mean.level == 99.0


@pytest.mark.parametrize("label", ["A", "B", "C"])
def test_a_failed_side_fails_whatever_the_others_do(label):
    found = several(0, {"B": 0.0, "C": 0.0}, status={label: "crashed"})
    verdict = judge(found)
    assert not verdict.succeeded
    assert (
        verdict.fails(["slower"])
        == {"A": ["fails"], "B": ["fails"], "C": ["fails: C (sdpa)"]}[label]
    )
    who = {"A": "Unpatched", "B": "Patched", "C": "C (sdpa)"}[label]
    assert words.sentence(verdict).count(f"{who} fails: ") == 1
    assert len(report.problems(verdict)) == 2  # two runs of that side


def test_unpatched_out_of_memory_is_the_result_of_every_side():
    found = several(0, {"B": 0.0, "C": 0.0}, status={"A": "out of memory"})
    verdict = judge(found)
    assert verdict.succeeded and verdict.fails(FAIL_IF) == []
    assert "; patched trains at" in words.sentence(verdict)
    assert "; C (sdpa) trains at" in words.sentence(verdict)


@pytest.mark.parametrize("patch, zero", [("0", False), ("1", True)])
def test_zero_calls_count_where_the_side_is_patched(patch, zero):
    found = several(0, {"B": 0.0, "C": 0.0})
    found.options["sides"] = [["sdpa", {"FLASHBIAS_PATCH": patch}]]
    for run in found.runs:
        for line in run.processes[0].steps if run.label == "C" else ():
            line.pop("calls")
    verdict = judge(found)
    assert (
        "Zero attention calls went through the patch of C (sdpa)." in words.sentence(verdict)
    ) is zero
    assert verdict.fails(["fails"]) == (["fails: C (sdpa)"] if zero else [])


def test_holm_is_bonferroni_then_easier():
    p = {"B": 0.012, "C": 0.02, "D": 0.2}
    at, found = sides.holm("BCD", lambda name, m: p[name] <= 0.05 / m)
    assert found == ["B", "C"] and at == {"B": 3, "C": 2, "D": 1}
    at, found = sides.holm("BCD", lambda name, m: False)
    assert found == [] and at == {"B": 3, "C": 3, "D": 3}


def test_equal_sides_are_rarely_called_slower_or_faster():
    """Of seven equal sides any false alarm: at most 5% with Holm's procedure (binomial: 5 of 30 is
    1 in 100)."""
    wrong = 0
    for seed in range(30):
        found = several(seed, dict.fromkeys("BCDEFGH", 0.0), steps=20)
        wrong += any(v.speed_word in ("slower", "faster") for v in judge(found).every)
    assert wrong <= 4


def test_the_interval_widens_with_the_comparisons():
    rng = np.random.default_rng(0)
    a, b = ([synthetic.step_times(rng, 40, 0.1)[5:] for _ in range(2)] for _ in "ab")
    one, three = (statistics.compare_times(a, b, levels=repeats.levels({}, 2, m)) for m in (1, 3))
    assert three.low < one.low < one.high < three.high
    assert (one.level, three.level) == (95.0, pytest.approx(100 - 5 / 3))
    peaks = [statistics.compare_peaks([1.0, 1.01], [1.0, 1.01], "rss", m) for m in (1, 3)]
    assert peaks[1].high > peaks[0].high


def test_runs_that_are_still_needed_for_any_side():
    found = several(0, {"B": 0.0, "C": 0.0}, repeats=1)
    for run in found.runs:  # B identical to A, C not
        for i, line in enumerate(run.processes[0].steps):
            line["loss"] = 5.0 / (i + 1) * (1.5 if run.label == "C" else 1.0)
    for number in range(1, most_confirmations(2) + 1):
        assert next_run(found, judge(found)) == NextRun("A", Nudge(number))
        nudged = synthetic.make_run(
            "A", 9 + number, np.full(40, 0.1), [5.0 / (i + 1) for i in range(40)]
        )
        nudged.nudged = True
        found.runs.append(nudged)
    assert next_run(found, judge(found)) == NextRun("C")


def test_the_runner_makes_and_reads_every_side(tmp_path):
    from .test_runner import command

    out = str(tmp_path / "out")
    words_of = command(tmp_path, "print(os.environ.get('WHICH'))\ntrain(8)")
    options = Options(
        repeats=1, steps=8, warmup=1, noise_run=False, timeout=20, sides=[sides.parse("x:WHICH=c")]
    )
    runner.run_all(words_of, out, options)
    found = reading.load(out)
    assert [(run.name, run.log_tail.strip()) for run in found.runs] == [
        ("A1", "None"),
        ("B2", "None"),
        ("C3", "c"),
    ]
    assert judge(found).further[0].parity_word == "identical"
    assert "C x" in report.text(found, judge(found))
