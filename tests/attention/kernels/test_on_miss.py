"""FLASHBIAS_TUNE: which calls start the tuner, that it happens once, and that nothing it does ends
a training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")

from flashbias_patch import settings  # noqa: E402
from flashbias_patch.attention import selfcheck  # noqa: E402
from flashbias_patch.attention.backends import triton_fused  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.kernels import autograd, cache, on_miss, tiles, trial, tune  # noqa: E402
from flashbias_patch.attention.kernels.tiles import KERNELS, Config, Key  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
KEY = Key("forward", 89, True, 16, 0, True)
FOUND = Config(32, 32, 4, 1)


def call(M=2048, N=1024, **rest):
    q, k = torch.zeros(2, M, 8, 16), torch.zeros(2, N, 8, 16)
    return AttentionInputs(q, k, k, scale=0.25, **rest)


@pytest.fixture(autouse=True)
def ada(monkeypatch, untuned):
    """A GPU of compute capability 8.9, as far as on_miss knows."""
    monkeypatch.setattr(on_miss, "_met", set())
    monkeypatch.setattr(
        trial, "class_of", lambda inputs, kernel="forward": KEY._replace(kernel=kernel)
    )


@pytest.fixture
def tuned(monkeypatch):
    """What the tuner was asked for; it finds a shape for forward only."""
    asked = []

    def stand_in(inputs, *, seconds, kernels):
        asked.append((seconds, tuple(kernels)))
        tiles.remember({KEY: FOUND})
        rows = [
            tune.Row(k, KEY, FOUND, FOUND if k == "forward" else None, 0.8, "", 3, {})
            for k in kernels
        ]
        return tune.Report("a call", rows, 1.0)

    monkeypatch.setattr(tune, "tune", stand_in)
    return asked


def restart(monkeypatch):
    monkeypatch.setattr(tiles, "_tuned", {})
    monkeypatch.setattr(tiles, "_loaded", False)
    monkeypatch.setattr(on_miss, "_met", set())


def test_once_a_class_and_machine(tuned, monkeypatch, caplog):
    caplog.set_level("INFO")
    for _ in range(3):
        on_miss.tune(call(), 9.0)
    assert tuned == [(9.0, KERNELS)]
    assert "takes up to 9 s, once on this machine" in caplog.text
    assert "in 1 s: forward 0.80x; keys as shipped; queries as shipped" in caplog.text
    restart(monkeypatch)
    on_miss.tune(call(), 9.0)
    assert len(tuned) == 1, "what stays as shipped is noted, too"
    assert tiles.candidates(KEY)[0] == FOUND
    keys = KEY._replace(kernel="keys")
    assert tiles.candidates(keys)[0] == tiles.shipped(keys)[0]


def test_only_what_was_not_measured(tuned, monkeypatch):
    tiles.remember({KEY._replace(kernel="keys"): FOUND})
    on_miss.tune(call(), 9.0)
    assert tuned == [(9.0, ("forward", "queries"))]
    monkeypatch.setattr(
        trial, "class_of", lambda inputs, kernel="forward": KEY._replace(arch=90, kernel=kernel)
    )
    on_miss.tune(call(), 9.0)
    assert len(tuned) == 1


def test_not_when_it_would_disturb(tuned, monkeypatch):
    """And the next call of the class, where it would not, is tuned for."""
    on_miss.tune(call(M=64, N=64), 9.0)  # bound by launching
    with monkeypatch.context() as patch:
        patch.setattr(
            selfcheck, "possible", lambda inputs: False
        )  # traced, captured or transformed
        on_miss.tune(call(), 9.0)
    thread = threading.Thread(target=on_miss.tune, args=(call(), 9.0))
    thread.start()
    thread.join()

    class Recomputing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            on_miss.tune(call(), 9.0)
            return grad

    Recomputing.apply(torch.ones(1, requires_grad=True)).backward()
    assert not tuned
    on_miss.tune(call(), 9.0)
    assert len(tuned) == 1


def test_a_failure_leaves_the_shipped_shapes(monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(tune, "tune", fail)
    on_miss.tune(call(), 9.0)
    assert (
        "gave up, the shipped tile shapes are used: RuntimeError: CUDA out of memory" in caplog.text
    )
    assert tiles.candidates(KEY)[0] == tiles.shipped(KEY)[0]


def test_what_killed_a_run_is_not_tried_again_but_an_interrupted_one_is(tuned, monkeypatch):
    def lost(*args, **options):
        raise RuntimeError("an illegal memory access was encountered")

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune, "tune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            on_miss.tune(call(), 9.0)
    restart(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "tune", lost)
        with pytest.raises(RuntimeError, match="illegal memory"):
            on_miss.tune(call(), 9.0)
    restart(monkeypatch)
    on_miss.tune(call(), 9.0)
    assert not tuned and len(cache.rows()) == len(KERNELS)


def test_a_rank_that_waits_in_vain_takes_the_shipped_shapes(tuned, tmp_path):
    os.makedirs(cache.directory())
    with cache.locked(cache.path() + ".89-True-16-0-True-False-False.tuning", 0) as mine:
        assert mine
        on_miss.tune(call(), 0.1)
    assert not tuned and tiles.candidates(KEY)[0] == tiles.shipped(KEY)[0]


def test_without_a_cache_directory_every_process_tunes(tuned, tmp_path):
    (tmp_path / "flashbias_patch").write_text("a file where the directory should be")
    on_miss.tune(call(), 9.0)
    assert len(tuned) == 1 and tiles.candidates(KEY)[0] == FOUND


RANK = """
import sys, time
from tests.attention.kernels.test_on_miss import *
trial.class_of = lambda inputs, kernel="forward": KEY._replace(kernel=kernel)
def slow(inputs, *, seconds, kernels):
    with open(sys.argv[1], "a") as file:
        file.write("tuned\\n")
    time.sleep(1)
    tiles.remember({KEY: FOUND})
    return tune.Report("a call", [], 1.0)
tune.tune = slow
tiles.tuned(KEY)  # the cache was read for an earlier class
on_miss.tune(call(), 30.0)
print(tiles.candidates(KEY)[0] == FOUND)
"""


def test_of_two_ranks_one_tunes_and_both_use_it(tmp_path):
    log = tmp_path / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLASHBIAS_PATCH": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(log)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == ["True", "True"]
    assert log.read_text() == "tuned\n"
    assert {row["key"][0] for row in json.loads(Path(cache.path()).read_text())} == set(KERNELS)


def test_the_backend_asks_where_the_variable_is_on_and_nothing_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr(on_miss, "tune", lambda inputs, seconds: asked.append(seconds))
    monkeypatch.setattr(autograd, "attend", lambda inputs, on_failure: inputs.q)
    monkeypatch.setattr(autograd, "fused_attention", lambda *inputs, **rest: inputs[0])
    settings.reload({})
    triton_fused.TritonFused()(call())
    settings.reload({"FLASHBIAS_TUNE": "45"})
    backend = triton_fused.TritonFused()
    backend(call())
    backend.traced(call())
    assert asked == [45.0]
    assert not triton_fused.backend.tune, "off by default"


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"), reason="torch 2.1 and 2.2 do not tell"
)
def test_torch_compile_does_not_tune(monkeypatch):
    asked = []
    monkeypatch.setattr(on_miss, "tune", lambda inputs, seconds: asked.append(seconds))
    monkeypatch.setattr(autograd, "fused_attention", lambda q, *rest, **others: q + 1)
    backend = triton_fused.TritonFused()
    backend.tune = 45.0
    rest = call(8, 8)[1:]
    out = torch.compile(
        lambda q: backend.traced(AttentionInputs(q, *rest)), backend="eager", fullgraph=True
    )(torch.zeros(3))
    assert not asked and bool((out == 1).all())
