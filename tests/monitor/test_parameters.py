"""What the monitor records, and when it says that a parameter is stuck."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from flashbias_patch import telemetry
from flashbias_patch.monitor import ParameterMonitor


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.aqr = nn.Module()
        self.aqr.bias_scale = nn.Parameter(torch.tensor(2.0))
        self.heads = nn.Module()
        self.heads.bias_scale = nn.Parameter(torch.tensor([1.0, 3.0]))
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return (self.linear(x) * self.aqr.bias_scale).sum() + (self.heads.bias_scale * x).sum()


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(model, optimizer, monitor, steps, loss=None, scale=1.0, **update):
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        (loss or model)(torch.ones(1, 2)).mul(scale).backward()
        optimizer.step()
        monitor.update(**update)
    monitor.flush()


@pytest.mark.parametrize("given_optimizer", [True, False])
def test_value_gradient_and_change(tmp_path, given_optimizer):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ParameterMonitor(
        model, jsonl=str(tmp_path / "m.jsonl"), optimizer=optimizer if given_optimizer else None
    )
    expected = model.linear(torch.ones(1, 2)).sum().item()
    train(model, optimizer, monitor, 3)
    found = records(tmp_path / "m.jsonl")
    assert [(r["step"], r["name"]) for r in found[:2]] == [
        (1, "aqr.bias_scale"),
        (1, "heads.bias_scale"),
    ]
    assert len(found) == 6
    assert found[0]["grad_norm"] == pytest.approx(abs(expected), rel=1e-5)
    assert found[0]["value"] == pytest.approx(2.0 - 0.1 * expected, rel=1e-5)
    assert found[0]["change"] == pytest.approx(0.1 * abs(expected), rel=1e-4)
    assert found[1]["values"] == pytest.approx([0.9, 2.9]) and found[1]["value"] == pytest.approx(
        1.9
    )
    assert found[1]["grad_norm"] == pytest.approx(2**0.5, rel=1e-6)


def test_gradients_cleared_before_update_and_loss_scaling(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = ParameterMonitor(model, optimizer=optimizer, jsonl=str(tmp_path / "m.jsonl"))
    scaler = (
        torch.amp.GradScaler("cpu", init_scale=1024.0)
        if hasattr(getattr(torch, "amp", None), "GradScaler")
        else None
    )
    if scaler is None:
        pytest.skip("GradScaler on the CPU needs torch 2.3")
    for factor in (1.0, float("inf")):
        scaler.scale(model(torch.ones(1, 2)) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        monitor.update()
    monitor.flush()
    found = [r for r in records(tmp_path / "m.jsonl") if r["name"] == "heads.bias_scale"]
    assert found[0]["grad_norm"] == pytest.approx(2**0.5, rel=1e-6)
    assert found[1]["grad_norm"] is None  # the scaler skipped that step


def test_given_scale_is_divided_out(tmp_path):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    monitor = ParameterMonitor(model, "heads.bias_scale", jsonl=str(tmp_path / "m.jsonl"))
    train(model, optimizer, monitor, 1, scale=512.0, grad_scale=512.0)
    assert records(tmp_path / "m.jsonl")[0]["grad_norm"] == pytest.approx(2**0.5, rel=1e-6)


STUCK = {
    "no gradient": (
        lambda m: m.linear.weight.sum,
        "got no gradient",
        "no attention was computed by",
    ),
    "zero": (
        lambda m: lambda: m(torch.ones(1, 2)) * 0.0,
        "gradient of exactly 0",
        "softmax ignores it",
    ),
    "not in the optimizer": (
        lambda m: lambda: m(torch.ones(1, 2)),
        "has not moved",
        "the optimizer does not hold it",
    ),
    "lr": (lambda m: lambda: m(torch.ones(1, 2)), "has not moved", "learning rate is 0"),
    "frozen": (
        lambda m: lambda: m(torch.ones(1, 2)),
        "got no gradient",
        "does not require a gradient",
    ),
}


@pytest.mark.parametrize("case", sorted(STUCK))
def test_a_stuck_parameter_is_logged_once_with_its_cause(caplog, case):
    make, what, cause = STUCK[case]
    model = Model()
    loss = make(model)
    if case == "frozen":
        model.aqr.bias_scale.requires_grad_(False)
    held = [model.linear.weight] if case == "not in the optimizer" else model.parameters()
    optimizer = torch.optim.SGD(held, lr=0.0 if case == "lr" else 0.1)
    monitor = ParameterMonitor(model, "aqr.bias_scale", optimizer=optimizer, patience=5, interval=4)
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        train(model, optimizer, monitor, 4, loss=lambda x: loss())
        assert not caplog.records
        train(model, optimizer, monitor, 20, loss=lambda x: loss())
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert "aqr.bias_scale" in text and what in text and cause in text and "5 steps" in text


def test_no_gradient_although_attention_ran_names_the_usual_causes(caplog):
    telemetry.calls["sdpa"] += 1
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ParameterMonitor(model, "aqr.bias_scale", optimizer=optimizer, patience=2)
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        train(model, optimizer, monitor, 3, loss=lambda x: model.linear.weight.sum())
    assert "reentrant checkpointing" in caplog.text


def test_a_moving_parameter_is_left_in_peace(caplog):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = ParameterMonitor(model, optimizer=optimizer, patience=3, interval=5)
    with caplog.at_level(logging.INFO, "flashbias_patch"):
        train(model, optimizer, monitor, 10)
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO"]
    assert "step 5: aqr.bias_scale" in caplog.text and "heads.bias_scale" in caplog.text


def test_an_unknown_name_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "flashbias_patch"):
        monitor = ParameterMonitor(Model(), "bias_scales")
        monitor.update()
        monitor.flush()
    assert "no parameter is called bias_scales" in caplog.text and "aqr.bias_scale" in caplog.text


def test_other_ranks_write_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "1")
    model = Model()
    monitor = ParameterMonitor(
        model, jsonl=str(tmp_path / "m.jsonl"), tensorboard=str(tmp_path / "tb"), patience=2
    )
    with caplog.at_level(logging.INFO, "flashbias_patch"):
        train(model, torch.optim.SGD(model.parameters(), 0.0), monitor, 3)
    assert not list(tmp_path.iterdir()) and not caplog.records
    assert monitor.last["aqr.bias_scale"]["value"] == 2.0


def test_tensorboard_and_wrapped_models(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = Model()
    monitor = ParameterMonitor(Wrapper(model), tensorboard=str(tmp_path))
    train(model, torch.optim.SGD(model.parameters(), 0.1), monitor, 4)
    monitor.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("aqr.bias_scale/value")] == [1, 2, 3, 4]
    assert "aqr.bias_scale/grad_norm" in events.Tags()["scalars"]


@pytest.mark.parametrize("bad", [dict(interval=0), dict(patience=1.5)])
def test_bad_arguments_are_named_in_the_error(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ParameterMonitor(Model(), **bad)


@pytest.mark.parametrize("text, number", [("", 0), (" ", 0), ("3", 3), ("x", 0), (None, 0)])
def test_an_empty_rank_is_unset(monkeypatch, text, number):
    from flashbias_patch.monitor import parameters

    monkeypatch.delenv("RANK", raising=False) if text is None else monkeypatch.setenv("RANK", text)
    assert parameters.rank() == telemetry.rank() == number
