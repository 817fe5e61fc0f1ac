"""What of the real runs can be tested without their third-party code: plans, searches, and how a profile is read."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_unpatched_runs_come_first_under_unique_names():
    import real_models

    for runs in (*real_models.RUNS.values(), real_models.BATCH, real_models.PROFILE):
        order = [fields["patch"] for fields in runs]
        assert order == sorted(order)
        names = [fields["name"] for fields in runs]
        assert len(set(names)) == len(names)


def test_every_field_of_a_plan_is_one_of_a_run():
    import real_models
    import real_worker

    for runs in real_models.RUNS.values():
        for fields in real_models.chosen(runs, "", quick=True, tiny=True):
            run = real_worker.Run(**fields)
            assert run.options("cpu").size == (160, 64) and run.patch == run.name.startswith("B")


@pytest.mark.parametrize("words", (["--only", "petr|PETR"], ["--parts", "batch"]))
def test_nothing_to_run_is_said(words, monkeypatch, capsys):
    import real_models

    monkeypatch.setattr(sys, "argv", ["real_models.py", "--petr", "PETR", "--frame", "frame", *words])
    with pytest.raises(SystemExit) as ended:
        real_models.main()
    assert ended.value.code == 2 and "nothing to run" in capsys.readouterr().err


def test_only_is_searched_in_names():
    import real_models

    found = real_models.chosen(real_models.RUNS["cmt"], "drop0$", quick=False, tiny=False)
    assert {fields["name"] for fields in found} == {
        "A fp32 drop0", "B fp32 drop0", "B fp32 dtype=fp16 drop0", "B flash drop0"}


@pytest.mark.parametrize("best", [0, 1, 2, 3, 7, 16, 31, 40])
@pytest.mark.parametrize("low", [1, 3])
def test_the_largest_batch_is_found(best, low):
    import real_worker

    tried = []

    def fits(n):
        tried.append(n)
        return n <= best

    found = real_worker.largest(fits, low, 32)
    assert found == max(low - 1, min(best, 32))
    assert len(tried) == len(set(tried)) <= 12


def test_a_worker_that_dies_loses_one_run_only(monkeypatch):
    import real_models

    class Ended:
        def __init__(self, code):
            self.code = code

        def poll(self):
            return self.code

    def started(command, **kwargs):
        plan, out = (Path(part) for part in command[-2:])
        with open(out, "a") as file:
            for fields in json.loads(plan.read_text())["runs"]:
                file.write(json.dumps({"begin": fields["name"]}) + "\n")
                if fields["name"] == "two":
                    return Ended(-9)
                file.write(json.dumps({"name": fields["name"], "ok": True}) + "\n")
        return Ended(0)

    monkeypatch.setattr(real_models.subprocess, "Popen", started)
    lines = list(real_models.work({"family": "cmt", "runs": [{"name": name} for name in ("one", "two", "three")]}))
    assert [line["name"] for line in lines] == ["one", "two", "three"]
    assert [("ok" in line, line.get("error")) for line in lines] == [
        (True, None), (False, "the process died: -9"), (True, None)]


def event(cat, name, start, duration, correlation=None):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration,
            "args": {} if correlation is None else {"correlation": correlation}}


def test_a_profile_is_read():
    import step_profile

    events = [
        event("user_annotation", "step", 0, 1000), event("user_annotation", "head", 0, 400),
        event("user_annotation", "backward", 400, 500),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, 1), event("cuda_runtime", "cudaLaunchKernel", 450, 5, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 900, 50),
        event("cpu_op", "aten::linear_sum", 250, 200),
        event("kernel", "forward_kernel", 100, 100, 1), event("kernel", "sm90_xmma_gemm_f16", 150, 100, 2),
        event("kernel", "something", 500, 100), event("gpu_memcpy", "Memcpy HtoD", 601, 9),
    ]
    found = step_profile.summarise(events, 1, ("head", "backward"))
    assert (found["wall_ms"], found["gpu_busy_ms"], found["kernels"]) == (1.0, 0.259, 4)
    assert found["kind_ms"] == {"attention": 0.1, "matmul": 0.1, "other": 0.1, "copy": 0.009}
    assert found["phase_wall_ms"] == {"head": 0.4, "backward": 0.5}
    assert found["phase_gpu_ms"]["head"] == {"ms": 0.1, "kernels": 1}  # by where it was launched, not where it ran
    assert found["gaps"] == [{"name": "head: aten::linear_sum", "ms": 0.25, "count": 1}]  # 1 us is no gap
    assert found["blocking_calls"][0]["name"] == "cudaStreamSynchronize"


@pytest.mark.parametrize("name, kind", [
    ("void pytorch_flash::flash_fwd_kernel<...>", "attention"), ("rows_kernel", "attention"),
    ("ampere_sgemm_128x64_tn", "matmul"), ("nvjet_hsh_128x256", "matmul"),
    ("void cudnn::bn_fw_tr_1C11_kernel", "norm"), ("sm80_xmma_wgrad_implicit_gemm_tf32", "convolution"),
    ("void at::native::multi_tensor_apply_kernel<..., FusedAdam>", "optimizer"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "elementwise"),
])
def test_kernels_have_a_kind(name, kind):
    import step_profile

    assert step_profile.kind_of(name) == kind


def test_a_real_trace_is_read_on_the_cpu():
    import step_profile
    import torch

    layer = torch.nn.Linear(4, 4)
    with step_profile.marked(layer, "forward", "head"):
        found = step_profile.profile(lambda i: layer(torch.ones(2, 4)).sum().backward(), 2, ("head",), cuda=False)
    assert found["steps"] == 2 and found["wall_ms"] > 0 and found["phase_wall_ms"]["head"] > 0
    assert "forward" not in vars(layer)


def test_the_list_needs_no_checkout():
    done = subprocess.run([sys.executable, str(BENCHMARKS / "real_models.py"), "--list"], text=True, stdout=subprocess.PIPE,
                          check=True)
    assert "cmt: A fp32\n" in done.stdout and "streampetr: B flash drop0" in done.stdout
