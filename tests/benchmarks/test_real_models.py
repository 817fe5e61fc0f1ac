"""What of the real runs can be tested without their third-party code: plans, searches, and how a
profile is read."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_runs_have_unique_names_and_a_counterpart():
    import real_runs

    tables = (*real_runs.RUNS.values(), *real_runs.INFERENCE.values())
    for runs in (*tables, *real_runs.BATCH.values(), *real_runs.PROFILE.values()):
        names = [fields["name"] for fields in runs]
        assert len(set(names)) == len(names)
        assert {real_runs.counterpart(name) for name in names} <= set(names)
        assert all(fields["patch"] == fields["name"].startswith("B") for fields in runs)


def test_runs_are_made_in_the_order_abba():
    """Each unpatched run and those measured against it, forwards and backwards in turn."""
    import real_models
    import real_runs

    for runs in real_models.RUNS.values():
        order = real_models.in_order(runs, 2)
        assert sorted(fields["name"] for fields in order) == sorted(
            2 * [fields["name"] for fields in runs]
        )
        places = {}
        for place, fields in enumerate(order):
            places.setdefault(fields["name"], []).append(place)
        for name, (first, second) in places.items():
            a_first, a_second = places[real_runs.counterpart(name)]
            assert (
                first + second == a_first + a_second
            )  # a drift of the machine falls on both alike
    pair = [{"name": "B fp32", "patch": True}, {"name": "A fp32", "patch": False}]
    assert [fields["name"][0] for fields in real_models.in_order(pair, 3)] == list("ABBAAB")


def test_together_an_unpatched_run_shares_a_process_with_its_counterparts():
    import real_models

    for runs in real_models.RUNS.values():
        order = real_models.in_order(runs, 2)
        assert real_models.in_processes(order, False) == [[fields] for fields in order]
        processes = real_models.in_processes(order, True)
        assert [fields for process in processes for fields in process] == order
        for process in processes:
            assert len({fields["name"] for fields in process if not fields["patch"]}) == 1


def test_runs_of_one_model_share_it_and_others_do_not():
    from real_runs import FLASH, Run

    unpatched = Run("A fp32", False)
    for field, value in dict(patch=True, dtype="fp16", backend="sdpa", repeat=1, steps=2).items():
        assert unpatched._replace(**{field: value}).model() == unpatched.model()
    changed = dict(
        attn=FLASH, size="8x8", bs=1, with_cp=True, fp16=True, dropout=0.0, bias=True, aqr="x"
    )
    for field, value in {**changed, "layers": 2}.items():
        assert unpatched._replace(**{field: value}).model() != unpatched.model()


def test_of_a_process_that_died_the_runs_that_ended_are_kept(monkeypatch, tmp_path):
    import real_models

    def worker(words, env, timeout):
        plan, out = json.loads(Path(words[2]).read_text()), Path(words[3])
        lines = [{"about": {}}, {**plan["runs"][0], "losses": [1.0]}]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "B')
        return subprocess.CompletedProcess(words, -9)

    monkeypatch.setattr(real_models.subprocess, "run", worker)
    runs = [{"name": name, "patch": name[0] == "B"} for name in ("A x", "B x", "B x dtype=fp16")]
    plan = {"runs": runs, "together": True, "family": "cmt", "timeout": 1.0}
    about, *lines = real_models.work(plan)
    assert "about" in about and [line["order"] for line in lines] == [0, 1, 2]
    assert lines[0]["losses"] == [1.0] and "error" not in lines[0]
    assert all(line["error"] == "the process died: -9" for line in lines[1:])


def test_every_field_of_a_plan_is_one_of_a_run():
    import real_models
    import real_runs
    import real_worker

    for runs in real_models.RUNS.values():
        for fields in real_models.chosen(runs, "", quick=True, tiny=True):
            run = real_runs.Run(**fields)
            assert real_worker.options(run, "cpu").size == (
                160,
                64,
            ) and run.patch == run.name.startswith("B")


@pytest.mark.parametrize("words", (["--only", "petr|PETR"], ["--parts", "batch"]))
def test_nothing_to_run_is_reported(words, monkeypatch, capsys):
    import real_models

    monkeypatch.setattr(
        sys, "argv", ["real_models.py", "--petr", "PETR", "--frame", "frame", *words]
    )
    with pytest.raises(SystemExit) as ended:
        real_models.main()
    assert ended.value.code == 2 and "nothing to run" in capsys.readouterr().err


def test_only_is_searched_in_names():
    import real_models

    found = real_models.chosen(real_models.RUNS["cmt"], "drop0$", quick=False, tiny=False)
    assert {fields["name"] for fields in found} == {
        "A fp32 drop0",
        "B fp32 drop0",
        "B fp32 dtype=fp16 drop0",
        "B flash drop0",
    }


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


def test_each_run_is_a_process_and_a_crash_loses_its_run_only(monkeypatch):
    import real_models

    folders = set()

    def started(command, env, timeout):
        plan, out = (Path(part) for part in command[-2:])
        given = json.loads(plan.read_text())
        (fields,) = given["runs"]
        folders.add(given["gradients"])
        with open(out, "a") as file:
            file.write(json.dumps({"about": {"torch": "2"}}) + "\n")
            if fields["name"] != "two":
                file.write(json.dumps({**fields, "ok": True}) + "\n")
        return subprocess.CompletedProcess(command, -9 if fields["name"] == "two" else 0)

    monkeypatch.setattr(real_models.subprocess, "run", started)
    runs = [{"name": name, "patch": False, "repeat": 0} for name in ("one", "two", "three")]
    plan = {"family": "cmt", "runs": runs, "timeout": 9, "together": False}
    lines = [line for line in real_models.work(plan) if "about" not in line]
    assert [(line["name"], line["order"]) for line in lines] == [
        ("one", 0),
        ("two", 1),
        ("three", 2),
    ]
    assert [("ok" in line, line.get("error")) for line in lines] == [
        (True, None),
        (False, "the process died: -9"),
        (True, None),
    ]
    assert len(folders) == 1


WORKER = """
import json, sys, time
plan = json.load(open(sys.argv[1]))
(run,) = plan["runs"]
name = run["name"]
if name == "B flash":
    sys.exit(7)  # before a line is written
with open(sys.argv[2], "a") as out:
    out.write(json.dumps({"about": {"device": "CPU", "torch": "2"}}) + "\\n")
    out.flush()
    if name == "B fp32 cp":
        time.sleep(60)
    line = {**run, "family": plan["family"], "calls": {}}
    if name == "B fp32 bias" and run["repeat"] == 1:
        line["error"] = "OutOfMemoryError: CUDA out of memory. (a lot)"
    else:
        usual = (0.5 if run["patch"] else 1.0) * (1 + 0.01 * run["repeat"])
        line.update(losses=[2.0, 1.0], peak_MiB=100.0, step_s=usual, times=[9.0, 3.0] + 6 * [usual])
    out.write(json.dumps(line) + "\\n")
if name == "B fp32":
    sys.exit(1)  # after its line
"""


def test_every_run_of_a_benchmark_reaches_the_page(tmp_path, monkeypatch, capsys):
    """Order, intervals and statuses, with a worker that computes nothing."""
    import real_models

    from tests.support.scripts import load

    (tmp_path / "real_worker.py").write_text(WORKER)
    monkeypatch.setattr(real_models, "HERE", tmp_path)
    names = "A fp32( bias| cp)?$|B fp32( bias| cp)?$|B flash$"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "real_models.py",
            "--cmt",
            str(tmp_path),
            "--frame",
            str(tmp_path),
            "--parts",
            "train",
            "--only",
            names,
            "--timeout",
            "2",
            "--out",
            str(tmp_path / "made.json"),
        ],
    )
    real_models.main()
    made = json.loads((tmp_path / "made.json").read_text())
    order = [line["name"] for line in made["runs"]]
    assert order[:6] == ["A fp32", "B fp32", "B flash", "B flash", "B fp32", "A fp32"]
    assert [line["order"] for line in made["runs"]] == list(range(len(order))) and len(order) == 14
    page = load("docs/make_performance.py")
    monkeypatch.setattr(sys.modules["measured"], "RESULTS", tmp_path)
    text = page.detectors.blocks("made")
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text
        if line.startswith("| CMT camera")
    ]
    shown = {row[1]: row[2:] for row in rows}
    assert len(rows) == len(shown) == 7 == len(set(order))
    assert shown["unpatched"][:2] == ["1.005", "1.00x"] and shown["patched"][1].startswith(
        "0.50x (0.4"
    )
    assert shown["patched, `PETRMultiheadFlashAttention`"][0] == "the process died: 7"
    assert shown["patched, checkpointing"][0] == "no end after 2 s"
    assert (
        shown["patched, learned bias"][0] == "OutOfMemoryError: CUDA out of memory. (1 of 2 runs)"
    )
    assert "Order: 2 runs of each kind, a fresh process each, in the order A B B A" in "\n".join(
        text
    )


def test_first_gradients_are_compared_across_processes(tmp_path):
    import real_runs
    import real_worker
    import torch

    run = real_runs.Run("A fp32 drop0", False, dropout=0.0)
    assert real_worker.Gradients(str(tmp_path)).error(run, torch.ones(4)) is None
    other = run._replace(name="B fp32 drop0", patch=True, with_cp=True, repeat=1)
    assert real_worker.Gradients(str(tmp_path)).error(other, torch.ones(4) * 1.5) == pytest.approx(
        0.5
    )
    flash = other._replace(name="B flash drop0", attn=real_runs.FLASH)
    for repeat in range(
        2
    ):  # no unpatched one to be held against: another patched one is not its stand-in
        assert (
            real_worker.Gradients(str(tmp_path)).error(flash._replace(repeat=repeat), torch.ones(4))
            is None
        )


def event(cat, name, start, duration, correlation=None):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start,
        "dur": duration,
        "args": {} if correlation is None else {"correlation": correlation},
    }


def test_a_profile_is_read():
    import step_profile

    events = [
        event("user_annotation", "step", 0, 1000),
        event("user_annotation", "head", 0, 400),
        event("user_annotation", "backward", 400, 500),
        event("cuda_runtime", "cudaLaunchKernel", 10, 5, 1),
        event("cuda_runtime", "cudaLaunchKernel", 450, 5, 2),
        event("cuda_runtime", "cudaStreamSynchronize", 900, 50),
        event("cpu_op", "aten::linear_sum", 250, 200),
        event("kernel", "forward_kernel", 100, 100, 1),
        event("kernel", "sm90_xmma_gemm_f16", 150, 100, 2),
        event("kernel", "something", 500, 100),
        event("gpu_memcpy", "Memcpy HtoD", 601, 9),
    ]
    found = step_profile.summarise(events, 1, ("head", "backward"))
    assert (found["wall_ms"], found["gpu_busy_ms"], found["kernels"]) == (1.0, 0.259, 4)
    assert found["kind_ms"] == {"attention": 0.1, "matmul": 0.1, "other": 0.1, "copy": 0.009}
    assert found["phase_wall_ms"] == {"head": 0.4, "backward": 0.5}
    assert found["phase_gpu_ms"]["head"] == {
        "ms": 0.1,
        "kernels": 1,
    }  # by where it was launched, not where it ran
    assert found["gaps"] == [
        {"name": "head: aten::linear_sum", "ms": 0.25, "count": 1}
    ]  # 1 us is no gap
    assert found["blocking_calls"][0]["name"] == "cudaStreamSynchronize"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("rows_kernel", "attention"),
        ("ampere_sgemm_128x64_tn", "matmul"),
        ("nvjet_hsh_128x256", "matmul"),
        ("void cudnn::bn_fw_tr_1C11_kernel", "norm"),
        ("sm80_xmma_wgrad_implicit_gemm_tf32", "convolution"),
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdam>", "optimizer"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>",
            "elementwise",
        ),
    ],
)
def test_kernels_have_a_kind(name, kind):
    import step_profile

    assert step_profile.kind_of(name) == kind


def test_a_real_trace_is_read_on_the_cpu():
    import step_profile
    import torch

    layer = torch.nn.Linear(4, 4)
    with step_profile.marked(layer, "forward", "head"):
        found = step_profile.profile(
            lambda i: layer(torch.ones(2, 4)).sum().backward(), 2, ("head",), cuda=False
        )
    assert found["steps"] == 2 and found["wall_ms"] > 0 and found["phase_wall_ms"]["head"] > 0
    assert "forward" not in vars(layer)


def test_fp16_leaves_the_parts_that_a_configuration_names(monkeypatch):
    import types

    import detectors
    import torch

    def wrap_fp16_model(net):
        for module in net.modules():
            module.fp16_enabled = True

    runner = types.SimpleNamespace(wrap_fp16_model=wrap_fp16_model)
    monkeypatch.setattr(detectors.importlib, "import_module", {"mmcv.runner": runner}.__getitem__)
    net = torch.nn.Module()
    net.img_backbone, net.pts_bbox_head = torch.nn.Module(), torch.nn.Sequential(torch.nn.Module())
    detectors.use_fp16(net, ("pts_bbox_head",))
    assert net.fp16_enabled and net.img_backbone.fp16_enabled
    assert not net.pts_bbox_head.fp16_enabled and net.pts_bbox_head[0].fp16_enabled


def test_help_names_the_families(monkeypatch, capsys):
    import real_models

    monkeypatch.setattr(sys, "argv", ["real_models.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        real_models.main()
    assert ended.value.code == 0 and "fusion0100, fusion0075" in capsys.readouterr().out


def test_the_list_needs_no_checkout():
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "real_models.py"), "--list"],
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert "cmt: A fp32\n" in done.stdout and "streampetr: B flash drop0" in done.stdout


def repeated(name, seconds, **more):
    return [
        {
            "name": name,
            "family": "cmt",
            "patch": name[0] == "B",
            "repeat": i,
            "losses": [1.0],
            "peak_MiB": 100.0 + i,
            "step_s": s,
            "times": [9.0, 2.0, *([s] * 6)],
            **more,
        }
        for i, s in enumerate(seconds)
    ]


def test_repeated_runs_are_one_row_with_an_interval():
    from tests.support.scripts import load

    load("docs/make_performance.py")
    page = sys.modules["detector_rows"]
    a, b, lost = page.merged(
        [
            *repeated("A fp32", [1.0, 1.02]),
            *repeated("B fp32", [0.5, 0.51]),
            {"name": "B flash", "family": "cmt", "error": "out of memory"},
        ]
    )
    assert a["step_s"] == pytest.approx(1.01) and a["peak_MiB"] == 101.0
    cells = page.cells(b, a)
    assert cells[:1] == ["0.505"] and cells[1].startswith("0.50x (0.4") and cells[2] == "9.0, 9.0"
    assert page.cells(lost, a)[0] == "out of memory"
    once = page.merged(repeated("A fp32", [1.0]) + repeated("B fp32", [0.5]))
    assert page.cells(once[1], once[0])[1] == "0.50x"  # no interval from one run


def test_the_page_shows_every_run_of_its_files():
    from tests.support.scripts import load

    page = load("docs/make_performance.py").detectors
    fresh = page.FUSION_FRESH
    assert "first step, s" in page.blocks(fresh)[0]
    for name in (*page.FUSION, *page.FUSION_ELSEWHERE, fresh, *page.CAMERA, *page.SMALL):
        result = page.load(name)
        rows = [
            line
            for line in page.blocks(name)
            if line.startswith("| ") and not line.startswith("| detector")
        ]
        runs = {(run["family"], run["name"]) for run in (*result["runs"], *result["family"])}
        assert len(rows) == len(runs)  # repeats are one row


def test_a_readme_shows_each_detector_from_one_result():
    from tests.support.scripts import load

    page = load("docs/make_performance.py").detectors
    for kind, first in (("fusion", "fusion CMT"), ("camera", "camera")):
        rows = [line.split(" | ") for line in page.shown(kind, first)[2:] if line]
        assert len({(row[0], row[1]) for row in rows}) == len(rows)
        assert all(
            any(row[0] == other[0] and other[1] == "unpatched" for other in rows)
            or "no dropout" in row[1]
            for row in rows
        )


def test_first_steps_are_of_cold_and_warm_caches():
    from tests.support.scripts import load

    text = "\n".join(load("docs/make_performance.py").detectors.first_step())
    assert re.search(r"unpatched \| 3 \| [0-9.]+ \| [0-9.]+, [0-9.]+ \|", text)
    assert re.search(r"their first step takes 1\.[0-9]+x of the unpatched", text)


def test_inference_ends_at_the_loss_and_its_output_is_digested(monkeypatch):
    """The head's output is what reaches its loss; no gradients, evaluation mode."""
    import real_runs
    import real_worker
    import torch

    class Head(torch.nn.Module):
        def loss(self, *args, **kwargs):
            raise AssertionError("the loss is computed")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pts_bbox_head, self.calls = Head(), 0

        def forward(self, return_loss, img):
            assert return_loss and not torch.is_grad_enabled()
            assert not self.pts_bbox_head.training
            self.calls += 1
            return self.pts_bbox_head.loss(
                [torch.ones(2)], {"cls": img, "count": torch.ones(1).int()}
            )

    net = Net()

    class Trainer:
        cuda, detector = False, type("Detector", (), {"net": net})

        def batch(self, i):
            return {"img": -3 * torch.ones(2)}

        def synchronize(self):
            pass

        def peak_mib(self):
            return 0.0

    clock = itertools.count(0.0, 0.5)  # each pass takes half a second
    monkeypatch.setattr(real_worker.time, "perf_counter", lambda: next(clock))
    run = real_runs.Run("A fp32 b6", False, bs=6, steps=12)
    found = real_worker.infer(run, {}, Trainer(), real_worker.Gradients("unused"))
    assert net.calls == len(found["times"]) == 12
    assert found["digest"] == 2.0
    assert (found["first_ms"], found["latency_ms"], found["frames_per_s"]) == (500.0, 500.0, 12.0)
