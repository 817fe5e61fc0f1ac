"""`flashbias tune` where there is no GPU, and what it does with what the tuner finds."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")

from flashbias_patch.attention import benchmark  # noqa: E402
from flashbias_patch.attention import tuning as tuner  # noqa: E402
from flashbias_patch.attention import tuning_trial as trial  # noqa: E402
from flashbias_patch.attention.kernels import cache, tiles  # noqa: E402
from flashbias_patch.cli import tune  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
KEY = tiles.Key("forward", 90, True, 32, 16, True)
CONFIG = tiles.Config(32, 32, 4, 2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in (("_tuned", {}), ("_working", {}), ("_loaded", False)):
        monkeypatch.setattr(tiles, name, value)


def status(*words):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return tune.main(parser.parse_args(words))


def test_command_says_why_it_cannot_run_without_cuda():
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("FLASHBIAS_", "TRITON_"))
    }
    environment.update(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(
        [sys.executable, "-m", "flashbias_patch.cli.main", "tune", "--shapes", "tiny"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3 and not done.stdout
    assert (
        "torch sees no CUDA device" in done.stderr and "on the GPU that will run it" in done.stderr
    )


def test_names_and_exit_status(capsys, monkeypatch):
    assert status("--shapes", "list") == 0
    assert capsys.readouterr().out.split() == list(benchmark.SHAPES)
    assert status("--shapes", "huge") == 2
    assert "--shapes: huge: not one of tiny" in capsys.readouterr().err
    for bad in (["--seconds", "0"], ["--seconds", "x"], ["--show", "--forget"], ["--dtype", "fp8"]):
        with pytest.raises(SystemExit):
            status(*bad)
    assert "expected a number of seconds above 0, got 'x'" in capsys.readouterr().err
    monkeypatch.setattr(tune, "BENCHMARK", "flashbias_patch.missing")
    assert status("--shapes", "tiny") == 2 and "cannot tune here" in capsys.readouterr().err


def test_other_reasons_are_the_backends(monkeypatch):
    made = benchmark.make(benchmark.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(benchmark, "make", lambda *sizes: made)
    assert tune.why_not() == "cannot tune here: CUDA only, got cpu"


def test_show_and_forget(capsys):
    assert status("--show") == 0 and "no tile shape is stored in" in capsys.readouterr().out
    tiles.remember({KEY: CONFIG})
    assert status("--show") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and "forward 90 True 32 16 True False False  32, 32, 4, 2, 0" in shown[1]
    assert status("--forget") == 0 and "removed: " in capsys.readouterr().out
    assert not os.path.exists(cache.path())
    assert status("--forget") == 0 and "no tile shape is stored in" in capsys.readouterr().out


def test_a_cache_that_cannot_be_removed(capsys, monkeypatch):
    tiles.remember({KEY: CONFIG})

    def refuse(path):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(cache.os, "unlink", refuse)
    assert status("--forget") == 2 and "cannot be removed" in capsys.readouterr().err


def test_shapes_of_one_class_go_together_the_largest_first():
    groups = tune.classes(benchmark.SHAPES)
    assert len(groups) == 3 and sorted(name for group in groups for name in group) == sorted(
        benchmark.SHAPES
    )
    assert groups[0][0] == "square-16384" and groups[0][-1] == "tiny"


@pytest.mark.parametrize("feature", [*tune.FEATURES, "none"])
def test_features_are_the_requested_ones(feature):
    made = benchmark.make(benchmark.SHAPES["tiny"], torch.float32, torch.device("cpu"))
    inputs = tune.with_features(made, [feature])
    has = dict(
        factors=inputs.q_factor is not None,
        segments=inputs.segment_weights is not None,
        mask=inputs.mask is not None,
        dropout=inputs.dropout_p > 0,
        padding=inputs.key_padding is not None,
    )
    assert [name for name, there in has.items() if there] == (
        [] if feature == "none" else [feature]
    )
    key = trial.class_of(inputs)
    assert key.plain == (feature in ("factors", "segments", "none")) and key.segments == (
        feature == "segments"
    )
    assert key.pairs == (feature == "mask")


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for the tuner, on the CPU."""
    asked = []

    def stand_in(calls, *, seconds, progress, remember):
        asked.append(([call.q.shape[1] for call in calls], seconds, remember))
        if len(asked) == 2:
            raise KeyboardInterrupt
        progress(1.0, seconds, "forward")
        rows = [tuner.Row("forward", KEY, CONFIG, CONFIG._replace(registers=168), 0.75, "", 9, {}),
                tuner.Row("keys", KEY, CONFIG, None, 1.0, "the time was up", 4, {})]  # fmt: skip
        return tuner.Report("cuda float16", rows, 2.0)

    monkeypatch.setattr(tuner, "tune", stand_in)
    monkeypatch.setattr(tune, "why_not", lambda: "")
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda name: real("cpu"))
    return asked


def test_the_table_and_its_request(gpu, capsys):
    assert status("--shapes", "tiny", "square-1024", "--seconds", "7", "--dry-run") == 0
    assert gpu == [([1024, 64], 7.0, False)]
    out = capsys.readouterr().out
    heads, forward, keys = out.splitlines()
    assert heads.split() == ["class", "kernel", "shipped", "tuned", "ratio"]
    assert (
        "32 x 32, 4 warps, 2 stages  32 x 32, 4 warps, 2 stages, 168 registers" in forward
        and forward.endswith("0.750")
    )
    assert "- (the time was up; 4 tried)" in keys


def test_interrupted_it_prints_what_there_is(gpu, capsys, monkeypatch):
    small = {
        name: dict(batch=1, queries=8, keys=8, heads=1, head_dim=dim, rank=4)
        for name, dim in (("a", 16), ("b", 32))
    }
    monkeypatch.setattr(benchmark, "SHAPES", small)
    assert status() == 130
    said = capsys.readouterr()
    assert "0.750" in said.out and "written: " in said.out and "interrupted" in said.err
    assert [remember for _, _, remember in gpu] == [True, True]
