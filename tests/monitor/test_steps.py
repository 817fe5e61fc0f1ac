"""What counts as a step: closures, accumulation, GradScaler, several and replaced optimizers and
parameters, NaN, clamps."""

from __future__ import annotations

import json
import logging
import math
import os
import sys

import pytest
import torch

from flashbias_patch.monitor import ParameterMonitor
from flashbias_patch.monitor import parameters as module
from tests.support import internals
from tests.support.capabilities import since

from .test_parameters import Model, records

NAME = "heads.bias_scale"
X = torch.ones(1, 2)
NORM = 2**0.5  # of the gradient of heads.bias_scale


def watched(model, optimizer=None, tmp_path=None, **options):
    jsonl = None if tmp_path is None else str(tmp_path / "m.jsonl")
    return ParameterMonitor(
        model, NAME, optimizer=optimizer, **{"interval": 1, "jsonl": jsonl, **options}
    )


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "flashbias_patch")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 1e-3),
        lambda p: torch.optim.LBFGS(p, 1e-3, max_iter=2),
        pytest.param(
            lambda p: torch.optim.AdamW(p, 1e-3, foreach=True), marks=since(1, 12, "foreach=")
        ),
        pytest.param(lambda p: torch.optim.AdamW(p, 1e-3, fused=True), marks=since(2, 0, "fused=")),
    ],
    ids=["sgd", "lbfgs", "foreach", "fused"],
)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("closure", [True, False])
def test_the_gradient_of_the_step_itself(warnings, make, given, closure):
    model = Model()
    optimizer = make(list(model.parameters()))
    monitor = watched(model, optimizer if given else None, patience=3)
    for factor in (1.0, 10.0, 100.0, 1000.0):

        def compute(factor=factor):
            optimizer.zero_grad(set_to_none=True)
            loss = model(X) * factor
            loss.backward()
            return loss

        if closure or isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        monitor.update()
        assert monitor.last[NAME]["grad_norm"] == pytest.approx(NORM * factor, rel=1e-5)
    assert not warnings()
    monitor.close()


def test_accumulation_counts_steps_only(tmp_path, warnings, caplog):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    monitor = watched(model, optimizer, tmp_path, patience=3)
    with caplog.at_level(logging.INFO, "flashbias_patch"):
        for i in range(10):
            model(X).backward()
            if i % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            monitor.update()
    found = records(tmp_path / "m.jsonl")
    assert [r["step"] for r in found if r["stepped"]] == [4, 8]
    assert [r["grad_norm"] for r in found if not r["stepped"]] == [None] * 8
    assert monitor.last[NAME]["step"] == 8 and not warnings()
    assert (
        "no optimizer step" in caplog.records[0].getMessage()
        and "grad 5.66" in caplog.records[-1].getMessage()
    )


@pytest.mark.skipif(
    not hasattr(getattr(torch, "amp", None), "GradScaler"),
    reason="GradScaler on the CPU needs torch 2.3",
)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_grad_scaler_leaves_out(tmp_path, warnings, fused):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = watched(model, optimizer, tmp_path, patience=3)
    for factor in (1.0, math.inf, 1.0, math.inf, math.inf, math.inf):
        optimizer.zero_grad()
        scaler.scale(model(X) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.update()
    found = records(tmp_path / "m.jsonl")
    assert [r["stepped"] for r in found] == [True, False, True, False, False, False]
    assert found[0]["grad_norm"] == pytest.approx(NORM, rel=1e-5) and found[1]["grad_norm"] is None
    (line,) = warnings()
    assert "gradients that are not finite, and no step was taken for 3 steps" in line


def test_several_optimizers_and_a_step_of_another(warnings):
    model = Model()
    ours = torch.optim.SGD([model.heads.bias_scale], 0.1)
    other = torch.optim.SGD(model.linear.parameters(), 0.1)
    monitor = watched(model, {"a": other, "b": ours}, patience=2)
    for i in range(9):
        model(X).backward()
        if i % 3 == 0:
            ours.step()
        other.step()
        ours.zero_grad()
        monitor.update()
        assert monitor.last[NAME]["step"] == i - i % 3 + 1
        assert monitor.last[NAME]["grad_norm"] == pytest.approx(NORM)
    assert not warnings()


def test_an_optimizer_and_a_parameter_that_are_built_again(warnings):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = watched(model, optimizer, patience=2)
    for value in (None, 5.0, 7.0):
        if value is not None:
            model.heads.bias_scale = torch.nn.Parameter(torch.full((2,), value))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            model(X).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.update()
    assert monitor.last[NAME]["value"] == pytest.approx(6.6) and monitor.last[NAME][
        "grad_norm"
    ] == pytest.approx(NORM)
    assert not warnings()


def test_an_optimizer_without_the_parameter_and_a_removed_parameter(warnings):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = watched(model, optimizer, patience=2)
    for i in range(12):
        if i == 1:
            optimizer = torch.optim.SGD(model.linear.parameters(), 0.1)
        model(X).backward()
        optimizer.step()
        monitor.update()
    assert len(warnings()) == 1 and "was in no step of an optimizer for 8 steps" in warnings()[0]
    del model.heads.bias_scale
    monitor.update()
    monitor.close()
    assert "is no longer in the model" in warnings()[1]


def test_nan_is_named_once_with_its_first_step(tmp_path, warnings):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = watched(model, optimizer, tmp_path, interval=4, patience=2)
    for i in range(8):
        optimizer.zero_grad()
        (model(X) * (math.nan if i >= 2 else 1.0)).backward()
        optimizer.step()
        monitor.update()
    (line,) = warnings()
    assert "its gradient and its value are not finite (nan, nan), first at step 3" in line

    def refuse(word):
        raise AssertionError(word)

    found = [
        json.loads(text, parse_constant=refuse)
        for text in (tmp_path / "m.jsonl").read_text().splitlines()
    ]
    assert found[2]["not_finite"] == ["value", "grad_norm", "change"] and found[2]["values"] == [
        None,
        None,
    ]
    assert "not_finite" not in found[1]


@pytest.mark.parametrize("inside", [False, True])
def test_a_clamped_parameter(warnings, inside):
    model = Model()
    model.heads.bias_scale.data.fill_(0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = watched(model, optimizer, patience=3)
    for _ in range(6):
        optimizer.zero_grad()
        (
            model.heads.bias_scale.clamp(min=1.0) if inside else model.heads.bias_scale
        ).sum().backward()
        optimizer.step()
        model.heads.bias_scale.data.clamp_(min=0.0)
        monitor.update()
    (line,) = warnings()
    assert (
        "gradient of exactly 0" if inside else "is changed by each step and set back"
    ) in line and "clamp" in line


@pytest.mark.parametrize("fault", ["directory", "full", "tensorboard"])
def test_a_file_that_cannot_be_written_costs_one_warning(tmp_path, warnings, fault):
    if fault == "full" and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    if fault == "tensorboard":
        pytest.importorskip("tensorboard")
        (tmp_path / "file").write_text("")
        options = {"tensorboard": str(tmp_path / "file" / "board")}
    else:
        options = {"jsonl": "/dev/full" if fault == "full" else str(tmp_path / "gone" / "m.jsonl")}
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = watched(model, optimizer, **options)
    for _ in range(3):
        model(X).backward()
        optimizer.step()
        monitor.update()
    monitor.close()
    (line,) = warnings()
    assert "cannot be written, nothing more goes there" in line and monitor.last[NAME]["step"] == 3


def test_a_failure_ends_the_watching_and_an_interrupt_passes(monkeypatch, caplog):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = watched(model, optimizer)
    for error in (KeyboardInterrupt, RuntimeError):

        def fail(*given, error=error):
            raise error("no")

        monkeypatch.setattr(module, "distance", fail)
        model(X).backward()
        optimizer.step()
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                monitor.update()
        else:
            monitor.update()
            monitor.update()
    assert [r.levelname for r in caplog.records] == [
        "ERROR"
    ] and "stopped at step 2: RuntimeError: no" in caplog.text


def test_a_parameter_without_a_shape_ends_the_watching(caplog):
    class Lazy(Model):
        def __init__(self):
            super().__init__()
            self.lazy_bias_scale = torch.nn.parameter.UninitializedParameter()

    model = Lazy()
    optimizer = torch.optim.SGD([model.aqr.bias_scale], 0.1)
    monitor = ParameterMonitor(model, optimizer=optimizer)
    model(X).backward()
    optimizer.step()
    monitor.update()
    monitor.close()
    (line,) = caplog.messages
    assert line.startswith("monitor: stopped at step 0: ValueError")


def test_tensorboard_that_is_not_installed_costs_one_warning(tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    watched(Model(), tensorboard=str(tmp_path)).close()
    (line,) = warnings()
    assert "cannot be written, nothing more goes there: ModuleNotFoundError" in line


def test_closing_takes_the_hooks_back():
    from torch.optim import optimizer as optimizers

    if not hasattr(optimizers, "_global_optimizer_pre_hooks"):  # torch 2.0
        before = internals.step_hook_count()
        monitor = watched(Model())
        assert internals.step_hook_count() == before + 2 and hasattr(
            torch.optim.SGD.step, "__flashbias_step__"
        )
        monitor.close()
        assert internals.step_hook_count() == before and hasattr(
            torch.optim.SGD.step, "__flashbias_step__"
        ) is (before > 0)
        return
    before = (
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
    )
    monitor = watched(Model())
    monitor.close()
    assert before == (
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
    )
