"""Verdicts: failures first, and what --fail-if fires on."""

from __future__ import annotations

import numpy as np
import pytest

from flashbias_patch.ab import page, words
from flashbias_patch.ab.further_runs import NextRun, next_run
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.probe_variables import Nudge
from flashbias_patch.cli.ab_options import FAIL_IF

from . import synthetic


def test_a_run_cut_short_counts_only_where_its_side_has_no_other():
    found = synthetic.trial(0, 0.2, repeats=2, part_at=30, jump=0.5)
    cut = found.runs[2]
    cut.status, cut.processes[0].steps = "interrupted", cut.processes[0].steps[:6]
    verdict = judge(found)
    assert (
        verdict.first_step == 30
        and verdict.parities[0].steps == 60
        and verdict.parity_word == "fails"
    )
    found.runs[1].status, found.runs[1].processes[0].steps = (
        "hung",
        found.runs[1].processes[0].steps[:20],
    )
    assert judge(found).parities[0].steps == 6


def test_warmup_is_cut_where_runs_are_short():
    verdict = judge(synthetic.trial(0, steps=8), warmup=20)
    assert verdict.speed.low is not None
    assert any("too few for a warm-up" in note for note in verdict.notes)


@pytest.mark.parametrize(
    "steps, warm, note",
    [(4, 0, ""), (4, 1, ""), (4, 5, "4 steps are too few"), (1, 5, "1 step is too few")],
)
def test_a_shorter_warmup_is_noted_only_where_it_is_shorter(steps, warm, note):
    found = synthetic.trial(0, repeats=1, steps=steps)
    found.options.update(warmup=warm, steps=steps)
    notes = [n for n in judge(found).notes if "warm-up" in n]
    assert [n.startswith(note) for n in notes] == ([True] if note else [])


def test_without_a_repeat_the_spread_between_runs_is_assumed():
    runs = synthetic.trial(0, 0.01, repeats=1).runs[:2]
    verdict = judge(synthetic.experiment(runs))
    assert verdict.speed_word != "slower"
    assert any("no run was repeated" in note for note in verdict.notes)
    assert (
        judge(synthetic.experiment(synthetic.trial(0, 0.20, repeats=1).runs[:2])).speed_word
        == "slower"
    )


def test_other_work_on_the_machine_widens_the_interval():
    found = synthetic.trial(0, slowdown=0.15)
    assert judge(found).speed_word == "slower"
    found.runs[0].busy, found.runs[0].others = 0.99, 40.0  # of 64 CPUs
    verdict = judge(found)
    assert verdict.speed_word == "undecided" and verdict.fails(["slower"]) == []
    assert any("40.0 of 64 CPUs during A1" in note for note in verdict.notes)
    found.runs[0].others = 1.0  # the command's own work
    assert judge(found).speed_word == "slower"


def test_fail_if():
    verdict = judge(synthetic.trial(0, 0.2, memory=1.5, part_at=10, jump=0.5))
    assert verdict.fails(["slower", "differs", "more-memory"]) == [
        "slower",
        "differs",
        "more-memory",
    ]
    same = judge(synthetic.trial(0))
    assert same.fails(["slower", "differs", "more-memory", "fails"]) == []
    assert verdict.fails([]) == []


@pytest.mark.parametrize(
    "status", ["crashed", "hung", "out of memory", "record lost", "no steps", "not started"]
)
@pytest.mark.parametrize("condition", FAIL_IF)
def test_a_failed_run_beats_every_word_and_every_condition(status, condition):
    found = synthetic.trial(0)
    found.runs[1].status, found.runs[1].message = status, "of its own"
    verdict = judge(found)
    assert (
        verdict.failed
        and verdict.fails([condition]) == ["fails"]
        and verdict.parity_word == "fails"
    )
    assert words.sentence(verdict).startswith("Patched ") and "B2" in words.sentence(verdict)
    assert verdict.fails([]) == []


@pytest.mark.parametrize(
    "status, verb",
    [
        ("crashed", "crashed"),
        ("hung", "hung"),
        ("out of memory", "ran out of memory"),
        ("record lost", "lost its record"),
    ],
)
@pytest.mark.parametrize(
    "steps, reached", [(0, "before its first step"), (13, "after 13 of 60 steps")]
)
def test_the_headline_says_how_far_a_failed_run_came(status, verb, steps, reached):
    found = synthetic.trial(0, repeats=1)
    found.runs[1].status, found.runs[1].message = status, "exit status 1; so many recorded"
    del found.runs[1].processes[0].steps[steps:]
    verdict = judge(found)
    assert words.sentence(verdict).endswith(f": B2 {verb} {reached}: exit status 1.")
    assert f"B2 (patched): {status} {reached}: exit status 1; so many recorded" in verdict.problems


def test_a_question_needs_no_full_stop():
    found = synthetic.trial(0, repeats=1)
    for run in found.runs:
        run.status, run.message = "no steps", "is this the training command?"
        run.processes = []
    assert words.sentence(judge(found)) == (
        "Unpatched and patched fail: A1 made no step: is this the training command? B2 made no "
        "step: is this the training "
        "command?"
    )


def test_beside_a_failure_nothing_is_a_verdict():
    found = synthetic.trial(0, slowdown=0.3, repeats=1)
    found.runs[1].status, found.runs[1].message = "crashed", "exit status 1"
    found.runs[1].processes[0].steps[20]["wall_s"] = 5.0
    verdict = judge(found)
    assert {row.word for row in words.figures(verdict)} <= {"", "undecided"}
    assert all(line.startswith("until then, ") for line in words.parity_lines(verdict))
    assert page.headlines(verdict)[2]["lines"][0].startswith("until then, ")
    whole = judge(synthetic.trial(0, slowdown=0.3, repeats=1))
    assert "slower" in {row.word for row in words.figures(whole)}
    assert not any("until then" in line for line in words.parity_lines(whole))


@pytest.mark.parametrize("label", ["A", "B"])
def test_a_run_that_ends_early_fails(label):
    found = synthetic.trial(0)
    run = next(run for run in found.runs if run.label == label)
    del run.processes[0].steps[20:]
    verdict = judge(found)
    assert verdict.fails(["differs"]) == ["fails"]
    assert f"{run.name} ended early: 20 steps, where" in words.sentence(verdict)


def test_all_runs_equally_short_are_no_failure():
    found = synthetic.trial(0, steps=30)
    verdict = judge(found)
    assert not verdict.failed and any(
        "every run ended by itself after 30 of 60 steps" in note for note in verdict.notes
    )


@pytest.mark.parametrize("steps", [0, 1, 6])
def test_only_patched_fits_is_the_best_result(steps):
    found = synthetic.trial(0)
    found.runs = found.runs[:3]  # A B B
    found.runs[0].status, found.runs[0].message = "out of memory", "exit status 1"
    del found.runs[0].processes[0].steps[steps:]
    verdict = judge(found)
    assert verdict.only_patched_fits and not verdict.failed and verdict.fails(FAIL_IF) == []
    says = words.sentence(verdict)
    after = {0: "", 1: " after 1 step"}.get(steps, f" after {steps} steps")
    assert not any("1 steps" in note for note in verdict.notes)
    assert says.startswith(f"Unpatched runs out of memory{after}; patched trains at 9")
    assert says.endswith("8.00\u00a0GiB.")
    assert [row.b[0] for row in words.figures(verdict) if row.name == "time per step, usual"] == [
        "9"
    ]
    found.runs[1].status = "crashed"
    assert judge(found).failed


def test_zero_attention_calls_are_the_headline():
    found = synthetic.trial(0)
    for run in found.runs:
        for line in run.processes[0].steps:
            line.pop("calls", None)
    verdict = judge(found)
    assert words.sentence(verdict).startswith(
        "Zero attention calls went through the patch. Patched "
    )
    assert verdict.fails(["fails"]) == ["fails"] and verdict.fails(["differs", "slower"]) == []


def test_unpatched_without_flash_attn_is_offered_the_stand_in():
    found = synthetic.trial(0)
    found.runs[0].status, found.runs[0].log_tail = (
        "crashed",
        "ModuleNotFoundError: No module named 'flash_attn'",
    )
    assert "--stand-in-for-a" in judge(found).problems[0] and "--stand-in-for-a" in words.sentence(
        judge(found)
    )
    found.runs[0].label, found.runs[1].label = "B", "A"
    assert "--stand-in-for-a" not in judge(found).problems[0]  # patched, flash-attn is not needed


def test_a_longer_start_is_compensated_for():
    found = synthetic.trial(0, slowdown=-0.3)
    for run in found.runs:
        for line in run.processes[0].steps:
            line["time"] += 4.0 if run.label == "B" else 1.0
        run.started = 1e9
        run.seconds = 10.0
    verdict = judge(found)
    assert verdict.timing.startup == (1.0, 4.0) and 80 < verdict.timing.break_even < 130
    assert any("compensate for this at step" in note for note in verdict.notes)
    names = [row.name for row in words.figures(verdict)]
    assert names == [
        "time per step, usual",
        "time per step, mean",
        "start to first step",
        "whole run",
        "peak memory",
    ]


def test_which_run_is_still_needed():
    found = synthetic.trial(0, noise=0.0)
    assert next_run(found, judge(found)) is None  # identical
    found = synthetic.trial(0, noise=1e-6, repeats=2)
    # A differs from A, and is nudged all the same
    assert next_run(found, judge(found)) == NextRun("A", Nudge(1))
    found = synthetic.trial(0, noise=0.0, part_at=3, repeats=1)
    nudged = synthetic.trial(1, noise=0.0, repeats=1).runs[0]
    for number in (1, 2, 3, 4):
        assert next_run(found, judge(found)) == NextRun("A", Nudge(number))
        nudged = synthetic.trial(1, noise=0.0, repeats=1).runs[0]
        nudged.nudged, nudged.index = True, 2 + number
        found.runs.append(nudged)
    assert next_run(found, judge(found)) == NextRun("B")
    found.runs.append(synthetic.trial(0, noise=0.0, part_at=3, repeats=1).runs[1])
    assert next_run(found, judge(found)) is None and judge(found).parity_word == "differs"


def test_of_several_trainings_the_same_is_judged_in_every_run():
    from flashbias_patch.ab import records

    found = synthetic.trial(0, repeats=2)
    for run in found.runs:
        first = run.processes[0]
        first.header.update(time=100.0, argv=["python", "pretrain.py"])
        first.path = "first"
        second = synthetic.make_run(run.label, 0, np.ones(40), np.full(40, 9.0)).processes[0]
        second.header.update(time=200.0, argv=["python", "-W", "ignore", "tools/finetune.py"])
        second.path = "second"
        run.processes = [second, first]  # as files lie, not as they began
    records.choose(found)
    assert [run.steps for run in found.runs] == [60] * 4
    verdict = judge(found)
    assert any(
        "1 pretrain.py (60 steps), 2 finetune.py (40 steps); number 1" in note
        for note in verdict.notes
    )
    for which in ("2", "finetune"):
        records.choose(found, which)
        assert [run.steps for run in found.runs] == [40] * 4
    with pytest.raises(
        records.NotARecord,
        match="--process 3: the command's trainings are 1 pretrain.py, 2 finetune.py",
    ):
        records.choose(found, "3")
