"""The probe in real processes: what it records, what it leaves alone, what survives a kill."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from flashbias_patch import launch
from flashbias_patch.ab import probe, step_lines
from flashbias_patch.ab.probe_variables import Nudge
from flashbias_patch.ab.reading import load_process
from flashbias_patch.ab.records import Run

pytest.importorskip("torch")

NET = """
import sys, time, torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.bias_scale = torch.nn.Parameter(torch.tensor(0.5))
        self.frozen = torch.nn.Parameter(torch.tensor(1.0))
    def forward(self, x):
        return self.linear(x) * self.bias_scale
net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
def step(x):
    y = net(x)
    parts = {"loss_cls": y.pow(2).mean(), "loss_box": (y - 1).abs().mean(), "accuracy": y.mean()}
    loss = parts["loss_cls"] + parts["loss_box"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
"""


def python(tmp_path, body, wait=True, **env):
    """Run NET + body with the probe on; returns (process, output, [Process])."""
    script = tmp_path / "train.py"
    script.write_text(NET + textwrap.dedent(body))
    probes = tmp_path / "probe"
    environment = launch.prepare_environment(
        os.environ, patch=False, extra={"FLASHBIAS_PROBE": str(probes), **env}
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    if not wait:
        return process, probes
    output = process.communicate(timeout=120)[0].decode()
    return process, output, [load_process(str(p)) for p in sorted(probes.glob("*.jsonl"))]


def test_records_what_the_loop_did(tmp_path):
    process, output, (found,) = python(
        tmp_path,
        """
        for i in range(6):
            print(step(torch.ones(2, 4)))
            if i == 2: torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    """,
        FLASHBIAS_PROBE_PARAMS="bias_scale,frozen",
    )
    assert process.returncode == 0
    run = Run("A", 0, processes=[found])
    assert run.series("loss").tolist() == pytest.approx(
        [float(x) for x in output.split()], rel=1e-12
    )
    assert found.ended and not found.stopped and found.error is None and not found.notes
    first = found.steps[0]
    assert set(first["loss_parts"]) == {"loss_cls", "loss_box"}
    assert sum(first["loss_parts"].values()) == pytest.approx(first["loss"], rel=1e-6)
    assert first["param_grads"]["bias_scale"] > 0 and first["param_grads"]["frozen"] is None
    assert run.named("params")["bias_scale"][-1] != pytest.approx(0.5)
    assert (run.named("params")["frozen"] == 1).all()
    assert "wall_s" not in first and all(line["wall_s"] > 0 for line in found.steps[1:])
    assert run.memory_kind() == "rss" and run.peak_memory() > 50 * 2**20
    # The norm given by clipping (after step 2) is the one before it, not the limit of 1e-3.
    assert all(line["grad_norm"] > 1e-2 for line in found.steps)


def test_stops_after_n_steps_and_not_before(tmp_path):
    process, output, (found,) = python(
        tmp_path,
        """
        for i in range(1000):
            step(torch.ones(2, 4))
        print("not reached")
    """,
        FLASHBIAS_PROBE_STEPS="4",
    )
    assert (process.returncode, len(found.steps), found.stopped, found.ended) == (0, 4, True, True)
    assert "not reached" not in output


def test_seed_is_given_and_the_users_own_wins(tmp_path):
    body = (
        "import random, numpy\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())\n"
    )
    outputs = {python(tmp_path, body, FLASHBIAS_PROBE_SEED=seed)[1] for seed in ("3", "3", "4")}
    assert len(outputs) == 2
    own = {
        python(
            tmp_path, "torch.manual_seed(7); print(torch.rand(1).item())", FLASHBIAS_PROBE_SEED=seed
        )[1]
        for seed in "34"
    }
    assert len(own) == 1


def test_killed_process_keeps_its_steps(tmp_path):
    process, probes = python(
        tmp_path,
        """
        for i in range(100000):
            step(torch.ones(2, 4)); time.sleep(0.01)
    """,
        wait=False,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        p.read_bytes().count(b'"event": "step"') > 5 for p in probes.glob("*.jsonl")
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (path,) = probes.glob("*.jsonl")
    found = load_process(str(path))
    assert len(found.steps) >= 5 and not found.ended
    assert Run("A", 0, processes=[found]).killed
    with open(path, "rb+") as file:  # killed in the middle of a line
        file.truncate(path.stat().st_size - 20)
    cut = load_process(str(path))
    assert cut.truncated and len(cut.steps) == len(found.steps) - 1


def test_scaled_losses_accumulation_and_a_second_optimizer(tmp_path):
    process, output, (found,) = python(
        tmp_path,
        """
        from torch.utils.checkpoint import checkpoint
        reentrant = {"use_reentrant": True} if int(torch.__version__[0]) > 1 else {}
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if torch.__version__ > "2.3" else None
        other = torch.optim.Adam([net.frozen])
        for i in range(4):
            total = 0
            optimizer.zero_grad()
            for micro in range(2):
                loss = checkpoint(net, torch.ones(2, 4, requires_grad=True), **reentrant).pow(2).mean()
                total += float(loss.detach())
                (scaler.scale(loss) if scaler else loss).backward()
            scaler.step(optimizer) if scaler else optimizer.step()
            scaler and scaler.update()
            other.step()
            print(total)
    """,  # noqa: E501
    )
    assert process.returncode == 0, output
    assert len(found.steps) == 4  # the second optimiser's steps are not counted
    assert [line["loss"] for line in found.steps] == pytest.approx(
        [float(x) for x in output.split()], rel=1e-6
    )
    assert all(line["backwards"] == 2 for line in found.steps)


def test_autocast_counts_as_half_precision(tmp_path):
    _, _, (found,) = python(
        tmp_path,
        """
        step(torch.ones(2, 4))
        with torch.autocast("cpu", torch.bfloat16, enabled=False): step(torch.ones(2, 4))
        with torch.autocast("cpu", torch.bfloat16): y = net(torch.ones(2, 4))
        step(torch.ones(2, 4))
    """,
    )
    assert [line.get("half", False) for line in found.steps] == [False, False, True]


def test_uncaught_exception_is_in_the_last_line(tmp_path):
    process, output, (found,) = python(
        tmp_path, "step(torch.ones(2, 4))\nraise RuntimeError('out of cheese')"
    )
    assert process.returncode == 1 and "out of cheese" in output
    assert found.ended and found.error == "RuntimeError: out of cheese" and len(found.steps) == 1


def test_forked_trainer_records_and_forked_loader_does_not(tmp_path):
    process, output, found = python(
        tmp_path,
        """
        import multiprocessing
        def train():
            for i in range(3): step(torch.ones(2, 4))
        torch.set_num_threads(1)
        fork = multiprocessing.get_context("fork")
        for work in (train, time.sleep):
            child = fork.Process(target=work, args=() if work is train else (0,)); child.start(); child.join()
        print("done", child.exitcode)
    """,  # noqa: E501
    )
    assert "done 0" in output
    assert sorted(len(p.steps) for p in found) == [0, 3]
    assert all(p.ended for p in found)


def test_starting_imports_no_torch_and_costs_no_step(tmp_path):
    environment = launch.prepare_environment(
        os.environ, patch=False, extra={"FLASHBIAS_PROBE": str(tmp_path / "probe")}
    )
    code = (
        "import sys; print(sorted(m for m in ('torch', 'numpy', 'rich', 'jinja2') if m in "
        "sys.modules))"
    )
    assert (
        subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip()
        == "[]"
    )
    (line,) = [
        json.loads(x) for x in next((tmp_path / "probe").glob("*")).read_text().splitlines()[:1]
    ]
    assert line["event"] == "process" and line["argv"][1:3] == ["-c", code]


def test_unwritable_directory_never_stops_the_command(tmp_path):
    (tmp_path / "file").write_text("")
    process, output, _ = python(
        tmp_path, "print(step(torch.ones(2, 4)) > 0)", FLASHBIAS_PROBE=str(tmp_path / "file" / "x")
    )
    assert process.returncode == 0 and "True" in output and "cannot be recorded" in output


def test_class_wrapping_where_torch_has_no_global_hook(monkeypatch):
    """torch before 2.0: steps are heard by wrapping each optimiser class."""
    import importlib

    import torch

    from flashbias_patch.ab import capture

    module = importlib.import_module("torch.optim.optimizer")
    monkeypatch.delattr(module, "register_optimizer_step_post_hook")
    monkeypatch.setattr(module.Optimizer, "__init__", module.Optimizer.__init__)
    monkeypatch.setattr(torch.optim.SGD, "step", torch.optim.SGD.step)
    heard = []
    capture.on_optimizer_step(heard.append, capture.Inbox(torch))
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    optimizer.step()
    torch.optim.SGD([parameter], lr=0.1).step()
    assert len(heard) == 2 and heard[0] is optimizer


def test_gradient_norm_over_kinds_of_gradients():
    import torch

    from flashbias_patch.ab import capture

    dense, half = (
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(4, dtype=torch.float16)),
    )
    sparse = torch.nn.Parameter(torch.zeros(5, 2))
    dense.grad, half.grad = torch.full((3,), 2.0), torch.full((4,), 1.0, dtype=torch.float16)
    sparse.grad = torch.sparse_coo_tensor([[0, 0]], torch.ones(2, 2), (5, 2))
    optimizer = torch.optim.SGD([dense, half, sparse, torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    norm = capture.norm_of(torch, capture.gradients_of(optimizer))
    assert float(norm) == pytest.approx((3 * 4 + 4 * 1 + 2 * 4) ** 0.5)
    assert capture.norm_of(torch, []) is None


def test_start_without_the_variable_does_nothing():
    assert probe.start({}) is None


@pytest.mark.parametrize("nudge", [Nudge(1), Nudge(12), Nudge(3, redraw=True)])
def test_a_nudge_passes_through_its_variable(nudge):
    assert Nudge.parse(nudge.text) == nudge
    assert Nudge.parse("") is None and Nudge.parse("0") is None


def test_openmmlab_loss_parts_are_recorded(tmp_path):
    """mmcv 1.x's LogBuffer, mmdet's _parse_losses, mmengine's parse_losses: modules of those names
    and shapes."""
    for name, body in {
        "mmcv/runner/log_buffer": "class LogBuffer:\n    def update(self, vars, count=1): "
        "self.seen = vars\n",
        "mmdet/models/detectors/base": "class BaseDetector:\n    def _parse_losses(self, losses):\n"
        "        return sum(losses.values()), {k: float(v) for k, v in losses.items()}\n",
        "mmengine/model/base_model/base_model": "class BaseModel:\n    def parse_losses(self, "
        "losses):\n"
        "        return sum(losses.values()), losses\n",
    }.items():
        path = tmp_path / (name + ".py")
        path.parent.mkdir(parents=True)
        path.write_text(body)
        for folder in (path.parent, *path.parent.parents):
            if folder == tmp_path:
                break
            (folder / "__init__.py").touch()
    process, output, (found,) = python(
        tmp_path,
        """
        from mmcv.runner.log_buffer import LogBuffer
        from mmdet.models.detectors.base import BaseDetector
        from mmengine.model.base_model.base_model import BaseModel
        def learn(tell):
            optimizer.zero_grad()
            total, keep = tell()
            del keep
            total.backward()
            optimizer.step()
        def value(): return net(torch.ones(2, 4)).pow(2).mean()
        def buffer():
            loss = value(); LogBuffer().update({"loss_heatmap": 2.5, "lr": 1.0}, 1)
            return loss, None
        learn(lambda: BaseDetector()._parse_losses({"d0.loss_cls": value()}))
        learn(lambda: BaseModel().parse_losses({"loss_bbox": value()}))
        learn(buffer)
    """,
    )
    assert process.returncode == 0, output
    parts = [line["loss_parts"] for line in found.steps]
    assert [list(p) for p in parts] == [["d0.loss_cls"], ["loss_bbox"], ["loss_heatmap"]]
    assert parts[0]["d0.loss_cls"] == pytest.approx(found.steps[0]["loss"], rel=1e-6)
    assert parts[2]["loss_heatmap"] == 2.5


@pytest.mark.parametrize("seeds", ["0 if i == 0 else None", "i"])
def test_the_state_of_the_generators_is_recorded_once(tmp_path, seeds):
    """And a redrawn run draws otherwise from the second step on, also where each step is seeded."""
    body = f"""
        for i in range(3):
            seed = {seeds}
            if seed is not None: torch.manual_seed(seed)
            step(torch.ones(2, 4))
            print("drawn", torch.rand(1).item())
    """
    runs = {}
    for nudge in ("", "1", "redraw1"):
        place = tmp_path / (nudge or "plain")
        place.mkdir()
        runs[nudge] = python(place, body, **({"FLASHBIAS_PROBE_NUDGE": nudge} if nudge else {}))
    for process, output, (found,) in runs.values():
        assert process.returncode == 0, output
        assert ["random" in line for line in found.steps] == [True, False, False]
    assert len({found.steps[0]["random"] for _, _, (found,) in runs.values()}) == 1
    plain, nudged, redrawn = (
        [part.split()[0] for part in output.split("drawn")[1:]] for _, output, _ in runs.values()
    )
    assert plain == nudged and len(plain) == 3
    assert all(
        a != b for a, b in zip(plain, redrawn)
    )  # what is drawn right after the first step already


def test_perturbation_changes_parameters_by_rounding_only():
    import torch

    from flashbias_patch.ab import capture

    parameter = torch.nn.Parameter(torch.linspace(1, 2, 100))
    before, state = parameter.detach().clone(), torch.get_rng_state()
    capture.nudge(torch, torch.optim.SGD([parameter], lr=0.1), step_lines.NUDGE_SIZES["float32"])
    change = ((parameter - before) / before).detach().abs()
    assert 0 < change.max() < 2e-6
    assert torch.equal(torch.get_rng_state(), state)


ITERATIONS = {
    "one optimiser per layer": """
        parts = [torch.optim.SGD([p], lr=0.1) for p in net.parameters() if p is not net.frozen]
        def iterate():
            loss = net(torch.ones(2, 4)).pow(2).mean()
            for each in parts: each.zero_grad()
            loss.backward()
            for each in parts: each.step()
            return loss
    """,
    "optimiser inside backward": """
        from torch.distributed.optim import _apply_optimizer_in_backward
        _apply_optimizer_in_backward(torch.optim.SGD, list(net.linear.parameters()), {"lr": 0.1})
        def iterate():
            loss = net(torch.ones(2, 4)).pow(2).mean()
            loss.backward()
            return loss
    """,
    "closure": """
        optimizer = torch.optim.LBFGS(net.linear.parameters(), lr=0.1, max_iter=5)
        def iterate():
            losses = []
            def closure():
                optimizer.zero_grad()
                losses.append(net(torch.ones(2, 4)).pow(2).mean())
                losses[-1].backward()
                return losses[-1]
            optimizer.step(closure)
            return losses[0]
    """,
    "two optimisers, two backward passes": """
        other = torch.optim.Adam([net.bias_scale])
        def iterate():
            for each in (optimizer, other):
                loss = net(torch.ones(2, 4)).pow(2).mean()
                optimizer.zero_grad(); other.zero_grad()
                loss.backward()
                each.step()
            return loss
    """,
    "steps left out by a scaler": """
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        net.count = 0
        def iterate():
            net.count += 1
            loss = net(torch.ones(2, 4)).pow(2).mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if net.count % 3 == 1: net.linear.weight.grad.fill_(float("inf"))
            scaler.step(optimizer); scaler.update()
            return loss
    """,
}  # fmt: skip


def test_a_step_is_an_iteration(tmp_path):
    """However many optimisers, closures or skipped steps there are in it; its loss is its own. One
    fork per kind."""
    import torch

    kinds = {
        k: textwrap.dedent(v)
        for k, v in ITERATIONS.items()
        if "scaler" not in k or hasattr(torch.amp, "GradScaler")
    }
    process, output, found = python(
        tmp_path,
        f"""
        import multiprocessing, os
        torch.set_num_threads(1)
        def run(kind, code):
            names = dict(globals())
            exec(code, names)
            path, values = f"{{os.getpid()}}.txt", []
            try:
                for i in range(100): values.append(float(names["iterate"]()))
            finally:
                open(path, "w").write(repr((kind, i + 1, values)))
        for kind, code in {kinds!r}.items():
            child = multiprocessing.get_context("fork").Process(target=run, args=(kind, code))
            child.start(); child.join()
    """,
        FLASHBIAS_PROBE_STEPS="40",
    )
    assert process.returncode == 0, output
    made = {path.stem: ast.literal_eval(path.read_text()) for path in tmp_path.glob("*.txt")}
    assert {kind for kind, _, _ in made.values()} == set(kinds), output
    for each in found:
        if not each.steps:
            continue
        kind, iterations, values = made[str(each.header["pid"])]
        assert (len(each.steps), iterations, each.stopped, each.notes) == (40, 40, True, []), kind
        if "two backward" not in kind:
            assert [line["loss"] for line in each.steps[: len(values)]] == pytest.approx(
                values, rel=1e-6
            ), kind
        if "scaler" in kind:
            assert [line.get("skipped", False) for line in each.steps[:6]] == [
                True,
                False,
                False,
            ] * 2
        if "closure" not in kind and "scaler" not in kind:
            assert all(line["grad_norm"] > 0 for line in each.steps), kind


def test_descriptors_closed_by_the_command(tmp_path):
    """Its steps are recorded all the same, it is stopped, and nothing is written into a file of its
    own."""
    process, output, (found,) = python(
        tmp_path,
        """
        import os
        os.closerange(3, 64)
        own = open("own.txt", "w")
        for i in range(100):
            step(torch.ones(2, 4))
        print("not reached")
    """,
        FLASHBIAS_PROBE_STEPS="5",
    )
    assert (process.returncode, len(found.steps), found.stopped) == (0, 5, True), output
    assert (tmp_path / "own.txt").read_text() == "" and "not reached" not in output


def test_steps_are_counted_where_nothing_can_be_written(tmp_path):
    process, output, found = python(
        tmp_path,
        """
        from flashbias_patch.ab import lines
        def full(*_): raise OSError(28, "No space left on device")
        lines.os = type("os", (), {"write": full, "fstat": lines.os.fstat, "close": lines.os.close})
        for i in range(100):
            step(torch.ones(2, 4))
        print("not reached")
    """,
        FLASHBIAS_PROBE_STEPS="6",
    )
    assert process.returncode == 0 and "not reached" not in output and found[0].steps == []


def test_a_line_cut_off_by_a_full_disk_costs_that_line(tmp_path, monkeypatch):
    from flashbias_patch.ab import lines

    file, write = lines.Lines(str(tmp_path / "x.jsonl")), os.write
    file.write({"event": "step", "step": 0, "loss": float("nan")})
    monkeypatch.setattr(lines.os, "write", lambda descriptor, data: write(descriptor, data[:10]))
    with pytest.raises(OSError, match="10 of"):
        file.write({"event": "step", "step": 1})
    monkeypatch.setattr(lines.os, "write", write)
    file.write({"event": "step", "step": 2, "loss": 1.0})
    file.close()
    first = (tmp_path / "x.jsonl").read_text().split("\n")[0]
    assert json.loads(first, parse_constant=pytest.fail)["loss"] == "nan"
    found = load_process(str(tmp_path / "x.jsonl"))
    assert found.truncated and [line.get("step") for line in found.steps] == [0, None, 2]
    assert Run("A", 0, processes=[found]).series("loss").tolist()[2] == 1.0


def test_without_its_watcher_a_command_ends(tmp_path):
    watcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    process, probes = python(
        tmp_path,
        """
        for i in range(100000):
            step(torch.ones(2, 4)); time.sleep(0.01)
    """,
        wait=False,
        FLASHBIAS_PROBE_WATCHER=str(watcher.pid),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        b'"step"' in p.read_bytes() for p in probes.glob("*.jsonl")
    ):
        time.sleep(0.05)
    assert process.poll() is None
    watcher.kill()
    watcher.wait()
    assert process.wait(timeout=30) == 0


def test_flash_attn_for_the_unpatched_side(tmp_path):
    """Only where none is installed; torch's own attention behind the names."""
    body = """
        from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func
        from flash_attn.bert_padding import unpad_input, pad_input
        q, kv = torch.randn(6, 2, 8), torch.randn(10, 2, 2, 8)
        out = flash_attn_unpadded_kvpacked_func(q, kv, torch.tensor([0, 6]), torch.tensor([0, 10]), 6, 10, 0.0)
        k, v = kv.unbind(1)
        wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
        print(float((out - wanted).abs().max()) < 1e-5)
        step(torch.ones(2, 4))
    """  # noqa: E501
    (tmp_path / "with").mkdir()
    process, output, (found,) = python(
        tmp_path / "with", body, FLASHBIAS_PROBE_STAND_IN="1", FLASHBIAS_BACKEND="sdpa"
    )
    assert process.returncode == 0 and output.strip() == "True", output
    assert "calls" not in found.steps[0]
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        (tmp_path / "without").mkdir()
        assert "No module named 'flash_attn'" in python(tmp_path / "without", body)[1]
