"""Waiting for data: recorded by the step, told apart from the rest, warned of if it dominates."""

from __future__ import annotations

import threading

import pytest

from flashbias_patch.ab import report, table
from flashbias_patch.ab.judging import judge
from flashbias_patch.ab.records import Run
from flashbias_patch.ab.waits import Waits

from . import synthetic
from .test_probe import python

DATA = """
from torch.utils.data import DataLoader, Dataset
class Slow(Dataset):
    def __init__(self, seconds): self.seconds = seconds
    def __len__(self): return 100
    def __getitem__(self, i): time.sleep(self.seconds); return torch.ones(4)
class Other(Slow): pass
"""


def waits_of(tmp_path, body, key="loader_s"):
    process, output, (found,) = python(tmp_path, DATA + body)
    assert process.returncode == 0, output
    assert not found.notes
    return found.steps, Run("A", 0, processes=[found]).per_step(key)[0]


def test_a_loop_over_a_loader_waits_for_it(tmp_path):
    body = """
for i, x in enumerate(DataLoader(Slow(0.02), batch_size=2)):
    time.sleep(0.01)
    step(x)
    if i == 3: break
"""
    steps, waits = waits_of(tmp_path, body)
    assert "loader_s" not in steps[0]  # no step ended before: there is no time to be a part of
    assert (waits[1:] >= 0.04).all()
    assert all(line["loader_s"] < line["wall_s"] - 0.009 for line in steps[1:])
    assert all("loaders" not in line for line in steps)


def test_iterators_and_several_loaders_are_kept_apart(tmp_path):
    body = """
one, two, three = (iter(DataLoader(d)) for d in (Slow(0.02), Other(0.01), Slow(0.0)))
for i in range(3):
    next(two); next(three)
    step(next(one))
"""
    steps, _ = waits_of(tmp_path, body)
    assert set(steps[1]["loaders"]) == {"Slow", "Other", "Slow 2"}
    # named by the order in which they were first used, here by iter()
    assert steps[2]["loaders"]["Slow"] >= 0.02 > steps[2]["loaders"]["Slow 2"]
    assert steps[2]["loader_s"] == pytest.approx(sum(steps[2]["loaders"].values()))


def test_a_thread_that_drains_the_loader_ahead_costs_the_step_nothing(tmp_path):
    body = """
import queue, threading
ready = queue.Queue()
def drain():
    for x in DataLoader(Slow(0.005)): ready.put(x)
thread = threading.Thread(target=drain, daemon=True); thread.start()
for i in range(4): step(ready.get())
thread.join()
"""
    steps, _ = waits_of(tmp_path, body)
    assert all("loader_s" not in line for line in steps)


def test_the_end_of_a_loader_and_its_errors_pass_through(tmp_path):
    body = """
class Broken(Slow):
    def __getitem__(self, i): raise KeyError("no such sample")
assert len([step(x) for x in DataLoader(Slow(0.0), batch_size=50)]) == 2
try: next(iter(DataLoader(Broken(0))))
except KeyError as error: print(error)
assert next(iter(DataLoader(Slow(0)))).shape == (1, 4)
step(torch.ones(2, 4))
"""
    steps, _ = waits_of(tmp_path, body)
    assert len(steps) == 3 and "loader_s" in steps[2]


def test_a_loader_inside_another_is_counted_once():
    waits = Waits()

    class Owner:
        dataset = ()

    inner = waits.timed(lambda owner: 1)
    outer = waits.timed(lambda owner: inner(owner))
    assert outer(Owner()) == 1
    assert list(waits.take()) == ["tuple"] and waits.take() == {}
    other = threading.Thread(target=outer, args=(Owner(),))
    other.start()
    other.join()
    assert waits.take() == {}


def waiting(a, b):
    """An A B B A experiment whose sides wait for `a` and `b` of 0.1 s a step."""
    found = synthetic.trial(0, slowdown=0.0, repeats=2)
    for run in found.runs:
        for line in run.processes[0].steps:
            line["loader_s"] = line["wall_s"] * (a if run.label == "A" else b)
    return found


@pytest.mark.parametrize(
    "a, b, says",
    [
        (0.6, 0.7, "60% unpatched and 70% patched"),
        (0.3, 0.55, "30% unpatched and 55%"),
        (0.4, 0.4, ""),
    ],
)
def test_a_loader_that_dominates_is_warned_of(a, b, says):
    verdict = judge(waiting(a, b))
    notes = [note for note in verdict.notes if "data loader dominates" in note]
    assert [says in note for note in notes] == ([True] if says else [])
    wait = verdict.timing.waits
    assert [w.share for w in wait] == [pytest.approx(a), pytest.approx(b)]


def test_waiting_is_in_every_format():
    found = waiting(0.6, 0.6)
    for line in found.runs[1].processes[0].steps:
        line["loaders"] = {"Frames": 0.05, "Sweeps": 0.01}
    verdict = judge(found)
    for text in (report.text(found, verdict), report.markdown(found, verdict)):
        assert "of a step, waiting for data" in text and "of a step, all else" in text
        assert "waiting for data patched, a step: Frames 25 ms, Sweeps 5 ms" in text
    names = [metric.name for metric in table.metrics(verdict)]
    assert {"loader_wait", "without_loader"} < set(names)
    assert report.summary(found, verdict)["waiting_for_data"][0]["share"] == pytest.approx(0.6)
    pytest.importorskip("jinja2")
    assert "data loader dominates" in report.html(found, verdict)
    plain = judge(synthetic.trial(0))
    assert "loader_wait" not in [metric.name for metric in table.metrics(plain)]
