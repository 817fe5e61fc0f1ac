"""The runner hooks, on stand-ins of both runners; the real mmcv 1.x where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import types

import pytest
import torch

from flashbias_patch.monitor import runner_hooks as hooks

from .test_parameters import Model


class Registry(dict):
    def register_module(self, name, module):
        assert name not in self
        self[name] = module


class Hook:
    """Both runners' bases: no constructor arguments, every stage does nothing."""

    def before_run(self, runner):
        pass


def module(name, **attributes):
    made = types.ModuleType(name)
    made.Hook = Hook
    vars(made).update(attributes)
    return made


class LogBuffer:
    def __init__(self):
        self.seen = []

    def update(self, values):
        self.seen.append(values)


def step(runner):
    optimizer = runner.optimizer
    runner.model(torch.ones(1, 2)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_mmcv_hook(tmp_path):
    registry = Registry()
    hooks.register(module("mmcv.runner.hooks", HOOKS=registry))
    hooks.register(module("mmcv.runner.hooks", HOOKS=registry))  # once
    hook = registry[hooks.NAME](interval=2, patience=3)
    assert not hasattr(hook, "priority")  # mmcv 1.x refuses hooks that have one
    model = Model()
    runner = types.SimpleNamespace(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        iter=0,
        work_dir=str(tmp_path),
        log_buffer=LogBuffer(),
    )
    hook.before_run(runner)
    for runner.iter in range(4):
        step(runner)
        hook.after_train_iter(runner)
    hook.after_run(runner)
    found = [json.loads(line) for line in (tmp_path / "bias_scale.jsonl").read_text().splitlines()]
    assert [r["step"] for r in found] == [1, 1, 2, 2, 3, 3, 4, 4] and found[0]["grad_norm"] > 0
    assert {"aqr.bias_scale/value"} <= set().union(*runner.log_buffer.seen)


def test_mmengine_hook(tmp_path, monkeypatch):
    registry = Registry()
    monkeypatch.setitem(sys.modules, "mmengine", module("mmengine"))
    monkeypatch.setitem(
        sys.modules, "mmengine.registry", module("mmengine.registry", HOOKS=registry)
    )
    hooks.register(module("mmengine.hooks"))
    hook = registry[hooks.NAME](interval=1, jsonl=None)
    model, scalars = Model(), {}
    hub = types.SimpleNamespace(update_scalar=scalars.__setitem__)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    runner = types.SimpleNamespace(
        model=model,
        optimizer=optimizer,
        iter=0,
        work_dir=str(tmp_path),
        message_hub=hub,
        optim_wrapper=types.SimpleNamespace(optimizer=optimizer),
    )
    hook.before_run(runner)
    hook.before_train(runner)
    step(runner)
    hook.after_train_iter(runner, 0, data_batch=None, outputs=None)
    hook.after_run(runner)
    assert scalars["train/aqr.bias_scale/grad_norm"] > 0 and not list(tmp_path.iterdir())


class Scaler:
    """A GradScaler whose scale falls after the steps that it left out."""

    def __init__(self, *scales):
        self.scales = list(scales)

    def get_scale(self):
        return self.scales.pop(0)


def watched(mmengine, monkeypatch, scales, **options):
    """(the hook, a runner) of one of the two libraries, before its first iteration."""
    registry = Registry()
    if mmengine:
        made = module("mmengine.registry", HOOKS=registry)
        monkeypatch.setitem(sys.modules, "mmengine.registry", made)
        hooks.register(module("mmengine.hooks"))
    else:
        hooks.register(module("mmcv.runner.hooks", HOOKS=registry))
    model = Model()
    holder = types.SimpleNamespace(loss_scaler=Scaler(*scales)) if scales else None
    runner = types.SimpleNamespace(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        iter=0,
        hooks=[object(), holder],
        optim_wrapper=holder,
    )
    return registry["FiniteWatchHook"](**options), runner


def iterate(hook, runner, factor):
    hook.before_train_iter(runner)
    (runner.model(torch.ones(1, 2)) * factor).sum().backward()
    hook.after_train_iter(runner)
    runner.iter += 1


@pytest.mark.parametrize("mmengine", [False, True])
def test_finite_watch_hook_names_the_first_gradient(mmengine, monkeypatch, caplog):
    hook, runner = watched(mmengine, monkeypatch, ())
    for factor in (1.0, 1.0, float("nan"), float("nan")):
        iterate(hook, runner, factor)
    assert hook.watch.first.what == "gradient" and hook.watch.first.step == 3
    assert caplog.text.count("is not finite") == 1
    assert not runner.model._forward_hooks and not runner.model._forward_pre_hooks
    hook.after_run(runner)


@pytest.mark.parametrize("mmengine", [False, True])
def test_finite_watch_hook_ignores_what_a_grad_scaler_left_out(mmengine, monkeypatch):
    hook, runner = watched(mmengine, monkeypatch, (4.0, 4.0, 2.0, 2.0))
    for factor in (1.0, float("inf"), 1.0):
        iterate(hook, runner, factor)
    assert hook.watch.first is None
    hook, runner = watched(mmengine, monkeypatch, (4.0, 4.0, 4.0))
    for factor in (1.0, float("inf")):
        iterate(hook, runner, factor)
    assert hook.watch.first.step == 2


def test_finite_watch_hook_options(monkeypatch):
    hook, runner = watched(False, monkeypatch, (), stop=True)
    with pytest.raises(FloatingPointError, match="gradient that is not finite"):
        iterate(hook, runner, float("nan"))
    with pytest.raises(TypeError, match="names must be a sequence of strings"):
        watched(False, monkeypatch, (), names="pts_bbox_head")


def test_a_registry_that_raises_does_not_break_the_import(caplog):
    class Broken(Registry):
        def get(self, name):
            raise RuntimeError("no")

    hooks.register(module("mmcv.runner.hooks", HOOKS=Broken()))
    assert "not registered" in caplog.text


def test_importing_the_registration_imports_no_torch():
    code = "import sys, flashbias_patch.monitor.runner_hooks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", [dict(interval=0), dict(patience=True)])
def test_a_bad_count_is_an_error_when_the_hook_is_built(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a positive integer"):
        hooks.make(Hook, mmengine=False)(**bad)


MODEL = """
import logging, sys, flashbias_patch, torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias_scale = nn.Parameter(torch.tensor(2.0))
    def train_step(self, data, optimizer, **kwargs):
        loss = (self.bias_scale * data).sum()
        return {"loss": loss, "log_vars": {"loss": loss.item()}, "num_samples": 1}

"""  # as a runner of mmcv trains it


@pytest.mark.openmmlab
@pytest.mark.parametrize(
    "kind, taken",
    [
        ("OptimizerHook", [1, 2, 3, 4, 5]),
        ("GradientCumulativeOptimizerHook", [2, 4, 5]),
        ("Fp16OptimizerHook", [2, 3, 4, 5]),
    ],
)
def test_real_mmcv_steps(tmp_path, kind, taken):
    """Iterations of mmcv's own runner and optimizer hooks: accumulated over two, and left out by
    GradScaler."""
    pytest.importorskip("mmcv.runner")
    code = textwrap.dedent("""
        from mmcv.runner import EpochBasedRunner
        from mmcv.runner.hooks import optimizer as hooks

        config = {"type": sys.argv[2]}
        if "Cumulative" in sys.argv[2]:
            config["cumulative_iters"] = 2
        if "Fp16" in sys.argv[2]:
            scaler = getattr(getattr(torch, "amp", None), "GradScaler", None)
            if scaler is None:
                sys.exit(77)
            hooks.GradScaler = lambda **given: scaler("cpu", init_scale=2.0 ** 127, growth_interval=1000)
        model = Model()
        runner = EpochBasedRunner(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), work_dir=sys.argv[1], meta={},
                                  logger=logging.getLogger("run"), max_epochs=1)
        runner.register_training_hooks(
            dict(policy="fixed"), config, None, dict(interval=2, hooks=[dict(type="TextLoggerHook")]),
            custom_hooks_config=[dict(type="BiasScaleMonitorHook", interval=2, patience=2)])
        runner.run([torch.utils.data.DataLoader(torch.ones(5, 3))], [("train", 1)])
    """)  # noqa: E501
    environment = {
        "PATH": "/usr/bin:/bin",
        "FLASHBIAS_PATCH": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", MODEL + code, str(tmp_path), kind], env=environment
    )
    if done.returncode == 77:
        pytest.skip("this torch has no GradScaler for the CPU")
    assert done.returncode == 0
    found = [json.loads(line) for line in (tmp_path / "bias_scale.jsonl").read_text().splitlines()]
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5] and [
        r["step"] for r in found if r["stepped"]
    ] == taken
    assert {r["grad_norm"] for r in found if r["stepped"]} == {3.0}


@pytest.mark.openmmlab
def test_real_mmcv_runner(tmp_path):
    pytest.importorskip("mmcv.runner")
    code = textwrap.dedent("""
        from mmcv.runner import IterBasedRunner, build_optimizer

        model = Model()
        runner = IterBasedRunner(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), work_dir=sys.argv[1],
                                 logger=logging.getLogger("run"), max_iters=4)
        runner.register_training_hooks(
            dict(policy="fixed"), dict(grad_clip=None), None, dict(interval=2, hooks=[dict(type="TextLoggerHook")]),
            custom_hooks_config=[dict(type="BiasScaleMonitorHook", interval=2)])
        runner.run([torch.utils.data.DataLoader(torch.ones(4, 3))], [("train", 1)])
    """)  # noqa: E501
    environment = {
        "PATH": "/usr/bin:/bin",
        "FLASHBIAS_PATCH": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    subprocess.run([sys.executable, "-c", MODEL + code, str(tmp_path)], check=True, env=environment)
    found = [json.loads(line) for line in (tmp_path / "bias_scale.jsonl").read_text().splitlines()]
    assert [r["grad_norm"] for r in found] == [3.0] * 4
    assert found[0]["value"] == pytest.approx(1.7) and found[0]["change"] == pytest.approx(0.3)


@pytest.mark.openmmlab
def test_real_mmcv_runner_stops_at_the_first_nan(tmp_path):
    pytest.importorskip("mmcv.runner")
    code = textwrap.dedent("""
        from mmcv.runner import IterBasedRunner, build_optimizer

        class Layered(Model):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 1)
            def train_step(self, data, optimizer, **kwargs):
                return super().train_step(self.layer(data), optimizer)

        model = Layered()
        runner = IterBasedRunner(
            model, optimizer=torch.optim.SGD(model.parameters(), 0.1), work_dir=sys.argv[1],
            logger=logging.getLogger("run"), max_iters=4)
        runner.register_training_hooks(
            dict(policy="fixed"), dict(grad_clip=None), None, None,
            custom_hooks_config=[dict(type="FiniteWatchHook", stop=True)])
        batches = torch.ones(4, 3)
        batches[2] = float("nan")
        try:
            runner.run([torch.utils.data.DataLoader(batches)], [("train", 1)])
        except FloatingPointError as error:
            assert "at step 3" in str(error), error
            sys.exit(9)
    """)
    environment = {
        "PATH": "/usr/bin:/bin",
        "FLASHBIAS_PATCH": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", MODEL + code, str(tmp_path)], env=environment)
    assert done.returncode == 9
