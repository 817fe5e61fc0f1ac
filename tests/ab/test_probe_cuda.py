"""The probe on a GPU: a simulated one, whose every event and wait is known, and a real one where
there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from flashbias_patch import launch
from flashbias_patch.ab import cuda
from flashbias_patch.ab.reading import load_process
from flashbias_patch.ab.records import Run

torch = pytest.importorskip("torch")


class Simulated:
    """A GPU that lags behind the host: work and events queue up; a wait lets it catch up, and is
    counted."""

    def __init__(self):
        self.end = 0.0  # seconds on the GPU's clock when everything queued will be done
        self.done = 0.0  # how far it has come
        self.waits = 0
        self.devices = []
        self.capture = False

    def work(self, seconds):
        self.end += seconds

    def catch_up(self):
        self.waits += 1
        self.done = self.end

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self, stream):
                assert enable_timing
                gpu.devices.append(stream)
                self.at = gpu.end

            def query(self):
                return self.at <= gpu.done

            def synchronize(self):
                if not self.query():
                    gpu.catch_up()

            def elapsed_time(self, other):
                assert self.query() and other.query()
                return (other.at - self.at) * 1e3

        return Event()


class FakeTensor:
    """A 0-d tensor on the simulated GPU."""

    device = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    found = Simulated()
    stats = {
        "allocated_bytes": {"all": {"current": 1, "peak": 2}},
        "reserved_bytes": {"all": {"peak": 3}},
    }
    for owner, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "is_current_stream_capturing", lambda: found.capture),
        (torch.cuda, "current_stream", lambda device: device),
        (torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "get_device_name", lambda device: f"simulated {device}"),
        (torch.cuda, "Event", found.Event),
        (torch.cuda, "synchronize", lambda *a: found.catch_up()),
        (torch.cuda.memory, "memory_stats_as_nested_dict", lambda device: stats),
        (torch.backends.cudnn, "version", lambda: 90000),  # a CUDA build's asks the GPU
    ):
        monkeypatch.setattr(owner, name, value)
    return found


@pytest.fixture
def recorder(gpu, tmp_path):
    """A recorder as _torch_arrived leaves it, without hooks in this process's torch."""
    from flashbias_patch.ab import capture, probe, waits

    found = probe.Recorder(str(tmp_path), {"FLASHBIAS_PROBE_PARAMS": "", "FLASHBIAS_PATCH": "0"})
    found.torch, found.inbox, found.gpu = torch, capture.Inbox(torch), cuda.Gpu(torch)
    found.waits = waits.Waits()
    yield found
    found.limit = 0
    found.end()


def optimizer():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.1)


def recorded(tmp_path):
    (path,) = tmp_path.glob("*.jsonl")
    return load_process(str(path))


def test_a_step_is_timed_by_the_gpu_without_the_recording_itself(
    gpu, recorder, tmp_path, monkeypatch
):
    memory = cuda.Gpu.memory  # stands for everything the probe does between its two events

    def slow(self):
        gpu.work(5.0)
        return memory(self)

    monkeypatch.setattr(cuda.Gpu, "memory", slow)
    steps = optimizer()
    for i in range(6):
        gpu.work(0.25 + i)
        recorder.on_step(steps)
    gpu.catch_up()
    recorder.end()
    run = Run("B", 0, processes=[recorded(tmp_path)])
    assert not run.processes[0].notes
    assert run.clock == "CUDA events" and run.memory_kind() == "cuda" and run.peak_memory() == 2
    assert run.step_seconds()[1:].tolist() == pytest.approx([0.25 + i for i in range(1, 6)])
    assert "cuda_s" not in run.processes[0].steps[0]
    assert run.processes[0].steps[0]["memory"]["cuda_reserved_peak"] == 3


def test_no_step_waits_for_the_gpu(gpu, recorder, tmp_path):
    steps = optimizer()
    for _ in range(8):
        gpu.work(1.0)
        recorder.on_step(steps)
    assert (
        gpu.waits == 0 and not recorded(tmp_path).steps
    )  # nothing has arrived yet, and nobody waited
    gpu.done = 4.5
    gpu.work(1.0)
    recorder.on_step(steps)
    assert gpu.waits == 0 and [line["step"] for line in recorded(tmp_path).steps] == [0, 1, 2, 3]
    recorder.end()
    assert gpu.waits > 0 and [line["step"] for line in recorded(tmp_path).steps] == list(range(9))


def test_the_optimisers_own_device_is_used(gpu):
    class Optimizer:
        param_groups = [{"params": [torch.zeros(1), FakeTensor()]}]

    found = cuda.Gpu(torch)
    found.follow(Optimizer())
    assert found.environment()["gpu"] == "simulated cuda:1"
    found.event()
    assert gpu.devices == [torch.device("cuda", 1)]


def test_a_capture_is_left_alone(gpu, recorder, tmp_path):
    steps = optimizer()
    gpu.capture = True
    recorder.on_step(steps)
    assert recorder.step == 0 and gpu.devices == []
    gpu.capture = False
    recorder.on_step(steps)
    assert recorder.step == 1


def test_a_gpu_that_fails_costs_figures_not_the_command(gpu, recorder, tmp_path, monkeypatch):
    steps = optimizer()
    recorder.on_step(steps)

    def broken(other):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu.work(1.0)
    recorder.on_step(steps)
    recorder.pending[0].before.elapsed_time = broken
    recorder.end()
    found = recorded(tmp_path)
    assert [line["step"] for line in found.steps] == [
        0,
        1,
    ] and "illegal memory access" in found.notes[0]

    def refuses(*args):
        raise RuntimeError("no GPU any more")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuses)
    for _ in range(5):
        recorder.on_step(steps)  # must not raise


TRAINING = """
import sys, torch
torch.manual_seed(0)
if "ddp" in sys.argv:
    import os
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
net = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1)).cuda()
net.bias_scale = torch.nn.Parameter(torch.ones((), device="cuda"))
model = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) if "ddp" in sys.argv else net
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
x = torch.randn(64, 512, device="cuda")
big = torch.randn(4096, 4096, device="cuda")
for i in range(14):
    loss = (model(x) * net.bias_scale).pow(2).mean()
    for _ in range(8): big @ big
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if i > 2:
        torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device inside the step raises
    optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
"""  # noqa: E501


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2])
def test_on_a_real_gpu(tmp_path, ranks):
    """No synchronisation in a step, the GPU's own time, loss, norm, peak and reserved memory."""
    if ranks > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TRAINING))
    words = [sys.executable, str(script)]
    if ranks == 2:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words.append("ddp")
    probes = tmp_path / "probe"
    extra = {"FLASHBIAS_PROBE": str(probes), "FLASHBIAS_PROBE_STEPS": "12"}
    environment = launch.prepare_environment(os.environ, patch=False, extra=extra)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run("A", 0, processes=[load_process(str(p)) for p in sorted(probes.glob("*.jsonl"))])
    assert len(run.ranks) == ranks and run.steps == 12
    assert all(not p.notes and p.ended and p.environment["gpu"] for p in run.ranks)
    assert run.clock == "CUDA events" and run.memory_kind() == "cuda"
    line = run.ranks[-1].steps[-1]
    assert line["memory"]["cuda_reserved_peak"] >= line["memory"]["cuda_peak"] > 60 * 2**20
    assert line["loss"] >= 0 and line["grad_norm"] >= 0 and line["params"]["bias_scale"] != 1
    # Eight products of 4096 cubed, 1.1 TFLOP: the host is through in a millisecond or two, the GPU
    # is not.
    seconds = run.step_seconds()[4:]
    assert (seconds > 5e-3).all() and (seconds < 1).all()
