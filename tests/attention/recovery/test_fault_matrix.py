"""Every backend x layer x pass x fault: training goes on, each step's loss is the unbroken
run's."""

from __future__ import annotations

import logging

import pytest

from tests.attention.recovery import fault_table as table
from tests.attention.recovery.fault_matrix import run_case
from tests.support.fake_backends import BACKENDS, FAULTS, cases
from tests.support.internals import tells_hooks

ALL = cases()
# By default every fault x pass x moment with backends and layers taking turns; the slow tier runs
# them all.
CHOSEN = {
    (f.name, passing, late): [
        c for c in ALL if (c.fault, c.passing, c.layer >= 0) == (f, passing, late)
    ]
    for f in FAULTS
    for passing in ("forward", "backward")
    for late in (False, True)
}
DEFAULT = [group[(5 * place) % len(group)] for place, group in enumerate(CHOSEN.values()) if group]


def check(case, patched, monkeypatch, caplog):
    if not tells_hooks() and case.passing == "backward" and case.backend != "triton":
        pytest.skip(
            "only torch 2.8 and later tell which saved-tensor hooks are in force: unguarded here"
        )
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        outcome = run_case(case, patched, monkeypatch)
    assert outcome.losses == pytest.approx(outcome.unbroken, rel=2e-5), str(case)
    told = [f for f in outcome.fallbacks if f["source"] == case.backend]
    lines = [
        r.message for r in caplog.records if r.message.startswith(f"{case.backend} not used for")
    ]
    assert len(lines) == len(
        {(f["call"], f["reason"]) for f in told}
    )  # one line a reason and class
    if case.fault.name == "slow compile":
        assert not told
    elif case.fault.name == "OOM":
        assert all("out of memory" in f["reason"] for f in told)
        if case.layer >= 0:  # it did not become slower for good
            assert outcome.answered_last.get(case.backend, 0) > 0
    else:
        assert told
        assert all(f["count"] == 1 for f in told if "backward" not in f["reason"]), (
            told
        )  # paid for once
        if case.layer < 0:
            assert case.backend not in outcome.answered_last
            if case.fault.silent:
                assert all(
                    "self-check failed" in f["reason"] and "plain PyTorch is off by" in f["reason"]
                    for f in told
                )
    table.survived.add(str(case))


@pytest.mark.parametrize("case", DEFAULT, ids=str)
def test_training_survives(case, patched, monkeypatch, caplog):
    check(case, patched, monkeypatch, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in ALL if c not in DEFAULT], ids=str)
def test_training_survives_everything(case, patched, monkeypatch, caplog):
    check(case, patched, monkeypatch, caplog)


def test_the_page_lists_what_is_tried_and_survived():
    """Rewritten where one process ran every case; elsewhere it must say what the cases are."""
    passed = [case for case in ALL if str(case) in table.survived]
    if len(passed) == len(ALL):
        table.write(passed)
    assert table.on_page() == table.lines(ALL)


def test_the_matrix_is_whole():
    assert {c.backend for c in ALL} == set(BACKENDS)
    assert {c.layer for c in ALL} == {-1, 0, 1, 2, 3}
    assert {c.fault.name for c in DEFAULT} == {f.name for f in FAULTS}
