"""Clocks and throttling, from a nvidia-smi that is a shell script."""

from __future__ import annotations

import math
import os
import time

import pytest

from flashbias_patch.ab import clocks, reading, report, runner
from flashbias_patch.ab.judging import judge

from . import synthetic
from .test_runner import command

BUSY = "0, GPU-aa, 97, 1400, 1980, 2619, 60, 412.5, 0x0000000000000004"
IDLE = "0, GPU-aa, 0, 345, 1980, 2619, 35, 70.0, 0x0000000000000001"
OTHER = "1, GPU-bb, 99, 900, 1980, 2619, 70, 300.0, 0x0000000000000040"


def fake(tmp_path, body):
    """Put a nvidia-smi first on PATH; returns the environment."""
    place = tmp_path / "bin"
    place.mkdir(exist_ok=True)
    (place / "nvidia-smi").write_text("#!/bin/sh\n" + body)
    (place / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}


def watched(environ, samples=1):
    watch = clocks.Watch(environ, period=0.05)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and len(watch.samples) < samples:
        if watch.thread is None or not watch.thread.is_alive():
            break
        time.sleep(0.01)
    return watch.stop()


def test_samples_while_a_gpu_is_busy(tmp_path):
    environ = fake(tmp_path, f"echo '{IDLE}'; echo '{BUSY}'; echo '0, GPU-a'; exec sleep 60\n")
    (gpu,) = watched(environ, 2)
    assert gpu["sm_mhz"] == gpu["sm_mhz_least"] == 1400 and gpu["sm_mhz_limit"] == 1980
    assert (gpu["busy"], gpu["samples"], gpu["celsius"], gpu["watts"]) == (True, 1, 60, 412.5)
    assert gpu["throttled"] == {"power limit": 1.0}


def test_an_older_driver_knows_another_name(tmp_path):
    body = (
        'case "$1" in *event_reasons*) echo \'Field "clocks_event_reasons.active" is not a valid '
        f"field to query.'; exit 2;; esac\necho '{BUSY}'; exec sleep 60\n"
    )
    (gpu,) = watched(fake(tmp_path, body))
    assert gpu["sm_mhz"] == 1400


@pytest.mark.parametrize(
    "body", ["exit 9", "echo 'No devices were found'; exit 6", "echo '\xff, garbage'", "kill -9 $$"]
)
def test_a_failing_nvidia_smi_is_no_event(tmp_path, capfd, body):
    assert watched(fake(tmp_path, body + "\n")) == []
    assert capfd.readouterr() == ("", "")


def test_without_nvidia_smi_nothing_starts(tmp_path):
    watch = clocks.Watch({"PATH": str(tmp_path)})
    assert watch.thread is None and watch.stop() == []


@pytest.mark.parametrize(
    "visible, gpus", [(None, [0, 1]), ("0", [0]), ("1", [1]), ("GPU-b", [1]), ("0,1", [0, 1])]
)
def test_only_gpus_that_the_run_sees(visible, gpus):
    samples = [clocks.parse(line) for line in (BUSY, OTHER)]
    assert [gpu["gpu"] for gpu in clocks.summary(samples, visible)] == gpus


def test_unknown_values_are_left_out():
    sample = clocks.parse("0, GPU-aa, [N/A], 1400, [N/A], 2619, 60, [Not Supported], [N/A]")
    assert math.isnan(sample["power"]) and sample["mask"] == 0
    (gpu,) = clocks.summary([sample])
    assert gpu["watts"] is None and gpu["sm_mhz_limit"] is None and not gpu["busy"]
    assert clocks.parse("Failed to initialize NVML") is None


def clocked(a, b, throttled=None):
    found = synthetic.trial(0, repeats=2)
    for run in found.runs:
        sample = {**clocks.parse(BUSY), "mask": 0, "sm": a if run.label == "A" else b}
        run.gpus = clocks.summary([sample])
        if run.label == "B" and throttled:
            run.gpus[0]["throttled"] = throttled
    return found


def test_clocks_that_differ_are_warned_of():
    for b, warned in ((1700.0, True), (1400.0, True), (1790.0, False)):
        notes = [n for n in judge(clocked(1800.0, b)).notes if n.startswith("GPU clocks differ")]
        assert bool(notes) is warned
    found = clocked(1800.0, 1800.0, {"power limit": 0.4, "power brake": 0.02})
    (note,) = [n for n in judge(found).notes if n.startswith("GPU throttled")]
    assert "by power limit during B2 40%, B3 40% of the time" in note
    text = report.markdown(found, judge(found))
    assert "| A1 | 0 | 1800\u00a0MHz |" in text and "power limit 40%" in text
    assert report.summary(found, judge(found))["gpus"]["B2"][0]["sm_mhz"] == 1800
    pytest.importorskip("jinja2")
    assert "GPU clocks</h2>" in report.html(found, judge(found))
    assert "GPU clocks</h2>" not in report.html(synthetic.trial(0), judge(synthetic.trial(0)))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_run_without_visible_gpus_has_no_clocks(hidden):
    samples = [clocks.parse(BUSY)]
    assert clocks.summary(samples, None) and not clocks.summary(samples, hidden)


def test_runs_of_ab_are_watched(tmp_path, monkeypatch):
    environ = fake(tmp_path, f"echo '{BUSY}'; echo $$ >> {tmp_path}/pids; exec sleep 60\n")
    monkeypatch.setenv("PATH", environ["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    out = str(tmp_path / "out")
    options = runner.Options(steps=6, warmup=1, noise_run=False, timeout=20)
    runner.run_all(command(tmp_path, "time.sleep(1)\ntrain(6)"), out, options)
    assert [run.gpus[0]["sm_mhz"] for run in reading.load(out).runs] == [1400, 1400]
    for pid in (tmp_path / "pids").read_text().split():
        assert not os.path.exists(f"/proc/{pid}")
