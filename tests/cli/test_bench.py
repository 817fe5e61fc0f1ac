"""`flashbias bench` on the CPU: as a command, and what becomes of a backend that fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from flashbias_patch.attention import benchmark, dispatch, selection  # noqa: E402
from flashbias_patch.attention.backends.base import Backend  # noqa: E402
from flashbias_patch.cli import bench  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def flashbias(*words):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("FLASHBIAS_", "TRITON_"))
    }
    environment.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    return subprocess.run(
        [sys.executable, "-m", "flashbias_patch.cli.main", "bench", *words],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_command_measures_what_runs_and_says_why_the_rest_does_not(tmp_path):
    done = flashbias(
        *("--shapes", "tiny", "cmt-800x320", "--backends", "sdpa", "reference", "triton"),
        *("--dtype", "fp32", "--out", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(row["shape"], row["backend"]): row for row in found["rows"]}
    assert len(rows) == 6 and found["environment"]["dtype"] == "fp32"
    for name in ("sdpa", "reference"):
        row = rows["tiny", name]
        assert row["forward_ms"] > 0 and row["total_ms"] > 0 and row["extra_mib"] is None
        assert 0 < row["error"] < 1e-5
    assert rows["tiny", "triton"]["why_not"] and rows["tiny", "triton"]["forward_ms"] is None
    assert "needs a GPU" in rows["cmt-800x320", "sdpa"]["why_not"]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("tiny ") for line in lines) == 3
    assert any("unsupported: too large for a CPU" in line for line in lines)


def test_names_and_exit_status(capsys):
    def status(*words):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        return bench.main(parser.parse_args(words))

    assert status("--shapes", "list") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(benchmark.SHAPES)
    assert status("--shapes", "huge") == 2
    assert "--shapes: huge: not one of tiny" in capsys.readouterr().err
    assert status("--shapes", "tiny", "--backends", "flash") == 3, "nothing ran"


def test_without_a_gpu_it_measures_what_a_cpu_can(monkeypatch, capsys):
    """By default only small shapes, in float32; a shape that needs a GPU is one line."""
    asked = []
    monkeypatch.setattr(
        benchmark, "run", lambda *words: asked.append(words[:3]) or {"rows": [], "environment": {}}
    )

    def status(*words):
        parser = argparse.ArgumentParser()
        bench.add_arguments(parser)
        return bench.main(parser.parse_args(words))

    assert status("--shapes", "cmt-800x320", "cmt-camera") == 3 and not asked
    assert (
        capsys.readouterr().err
        == "flashbias bench: cmt-800x320, cmt-camera: needs a GPU, and torch sees none\n"
    )
    status("--backends", "sdpa")
    assert asked == [(["tiny", "square-1024"], ["sdpa"], "fp32")]
    assert "only tiny, square-1024 is measured, on the CPU" in capsys.readouterr().err
    status("--shapes", "tiny", "cmt-800x320", "--dtype", "bf16", "--backends", "sdpa")
    assert asked[1] == (["tiny", "cmt-800x320"], ["sdpa"], "bf16") and capsys.readouterr().err == ""


class Wrong(Backend):
    """A backend that raises, or answers with zeros."""

    name = "wrong"

    def __init__(self, raises):
        self.raises = raises

    def why_not(self, inputs):
        return []

    def __call__(self, inputs):
        if self.raises:
            raise RuntimeError("no such kernel")
        return inputs.q * 0


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    if "real_gpu" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("raises, words", [(True, "no such kernel"), (False, "self-check failed")])
def test_a_backend_that_fails_is_not_timed(monkeypatch, raises, words):
    monkeypatch.setitem(selection.MODULES, "wrong", "wrong")
    monkeypatch.setitem(dispatch.loaded, "wrong", Wrong(raises))
    found = benchmark.run(["tiny"], ["wrong"], "fp32", lambda *_: None)["rows"][0]
    assert found["forward_ms"] is None and words in found["why_not"]


def test_a_call_computed_by_another_backend_is_not_timed_as_this_one(monkeypatch):
    """Out of memory opens no breaker: the reference answers, and only the journal knows."""
    inputs = benchmark.make(benchmark.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    assert "error" in benchmark.measure(inputs, "sdpa")
    sdpa = dispatch.backend("sdpa")

    def exhausted(self, inputs):
        raise MemoryError("no room")

    monkeypatch.setattr(type(sdpa), "__call__", exhausted)
    found = benchmark.measure(inputs, "sdpa")
    assert "forward_ms" not in found and "out of memory" in found["why_not"]


def test_error_is_that_of_the_output():
    inputs = benchmark.make(benchmark.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    out = dispatch.attend(inputs, "reference").detach()
    assert benchmark.relative_error(inputs, out * 1.01) == pytest.approx(0.01, rel=1e-3)


def test_progress_reaches_the_end():
    seen = []
    benchmark.run(["tiny"], ["sdpa", "reference"], "fp32", lambda *now: seen.append(now))
    assert seen == [(0, 2, "tiny sdpa"), (1, 2, "tiny reference"), (2, 2, "")]


def test_interrupt_keeps_what_there_is(monkeypatch, capsys, tmp_path):
    measure, calls = benchmark.measure, []

    def once(inputs, name):
        calls.append(name)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return measure(inputs, name)

    monkeypatch.setattr(benchmark, "measure", once)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    words = [
        "--shapes",
        "tiny",
        "--backends",
        "sdpa",
        "reference",
        "--dtype",
        "fp32",
        "--out",
        str(tmp_path),
    ]
    assert bench.main(parser.parse_args(words)) == 130
    assert "interrupted" in capsys.readouterr().err
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept["interrupted"] and [row["backend"] for row in kept["rows"]] == ["sdpa"]


class Events:
    """CUDA's events, memory and waits as far as the benchmark asks: each call of `work` takes
    `seconds`."""

    def __init__(self, seconds):
        self.now, self.seconds, self.peak, self.waits = 0.0, list(seconds), 0, 0

    def work(self):
        self.now += self.seconds.pop(0)
        self.peak = 300 * 2**20

    def Event(self, enable_timing):
        events = self

        class Event:
            def record(self):
                self.at = events.now

            def elapsed_time(self, other):
                assert events.waits, "read before the GPU was waited for"
                return (other.at - self.at) * 1e3

        return Event()

    def synchronize(self):
        self.waits += 1

    def reset(self):
        self.peak = 100 * 2**20


def test_times_and_memory_of_a_gpu(monkeypatch):
    """Medians of pairs of events read after one wait; peak above what was held before."""
    on_gpu = argparse.Namespace(is_cuda=True)
    repeats = benchmark.REPEATS["cuda"]
    events = Events([9.0] * benchmark.WARM_UP + [1.0] * (repeats // 2 + 1) + [5.0] * repeats)
    for name, value in (
        ("Event", events.Event),
        ("synchronize", events.synchronize),
        ("reset_peak_memory_stats", events.reset),
        ("memory_allocated", lambda: 100 * 2**20),
        ("max_memory_allocated", lambda: events.peak),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    assert benchmark.median_ms(events.work, on_gpu) == pytest.approx(1000.0)
    assert events.waits == 1
    assert benchmark.extra_mib(events.work, on_gpu) == 200


@pytest.mark.gpu
def test_on_a_real_gpu(tmp_path):
    words = ["bench", "--shapes", "tiny", "streampetr-r50", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "flashbias_patch.cli.main", *words],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    ran = {(row["shape"], row["backend"]) for row in rows if row["forward_ms"] is not None}
    assert {
        (s, b) for s in ("tiny", "streampetr-r50") for b in ("triton", "sdpa", "reference")
    } <= ran, rows
    for row in rows:
        if row["forward_ms"] is not None:
            assert (
                0 < row["forward_ms"] <= row["total_ms"] * 1.2
                and row["extra_mib"] > 0
                and row["error"] < 5e-3
            )


def test_a_long_reason_does_not_widen_the_table():
    measured = {
        "shape": "tiny",
        "backend": "sdpa",
        "forward_ms": 1.25,
        "total_ms": 3.5,
        "extra_mib": None,
        "error": 1e-5,
    }
    refused = {"shape": "tiny", "backend": "triton", "forward_ms": None, "why_not": "no GPU, " * 20}
    head, row, other = bench.table([measured, refused]).splitlines()
    assert head == "shape  backend  forward  forward+backward  extra memory  error"
    assert row == "tiny   sdpa     1.25 ms            3.5 ms             -  1e-05"
    assert other.startswith("tiny   triton   unsupported: no GPU, no GPU")


def test_a_backend_that_runs_nowhere_says_why_once():
    rows = [dict(shape=shape, backend="sdpa", forward_ms=1.0) for shape in ("tiny", "large")]
    rows += [
        dict(shape=shape, backend="flash", why_not="not installed") for shape in ("tiny", "large")
    ]
    rows += [
        dict(shape=shape, backend="triton", why_not=f"no room for {shape}")
        for shape in ("tiny", "large")
    ]
    lines = bench.table(rows).split("\n")
    assert (
        lines[-1] == "flash unsupported: not installed"
        and sum("flash" in line for line in lines) == 1
    )
    assert sum(line.startswith(("tiny ", "large ")) and "triton" in line for line in lines) == 2
