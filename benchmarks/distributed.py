"""Several processes: does a patched detector train as it should, and does it scale?

    torchrun --nproc_per_node 2 benchmarks/distributed.py ddp --cmt DIR --frame DIR [--out F.json]
    torchrun --nproc_per_node 2 benchmarks/distributed.py fsdp [--out F.json]
    ... --device cpu --tiny                         gloo on the CPU: a proof that it runs

With fewer GPUs than processes, those of ddp share them through gloo, because NCCL wants a GPU for
each: what is compared stays the same, but throughput is not measured. fully_shard does not run on a
GPU with gloo.

ddp, on the real CMT under DistributedDataParallel:
* gradients: of one global batch (a different image and its own boxes on every sample), reduced over
  the processes, against one process that is given the whole batch; no dropout; the same process
  asked twice is the noise
* throughput: samples a second of one process alone and of all, unpatched and patched
  (FLASHBIAS_DTYPE=fp16)
* fault: the backend fails on the last rank alone, forward and backward: nothing may hang, losses
  must stay

fsdp, on examples/mini_cmt: losses and parameters under fully_shard against DistributedDataParallel,
with checkpointed decoder layers and without.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

os.environ.setdefault("FLASHBIAS_PATCH", "0")  # installed and uninstalled below

import torch
import torch.distributed as dist
from installed import patched
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flashbias_patch import telemetry
from flashbias_patch.attention import dispatch
from flashbias_patch.attention.backends.base import Backend

ROOT = Path(__file__).resolve().parents[1]


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to b's."""
    return float((a - b).norm() / b.norm())


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double()


class Samples:
    """A global batch of CMT in which every sample differs: images with noise of their own, boxes
    turned about z."""

    def __init__(self, detector: Any, total: int, device: str) -> None:
        given = detector.resize(total)(0)
        self.given, self.device = given, device
        g = torch.Generator().manual_seed(5)
        self.images = given["img"] + 0.3 * torch.randn(given["img"].shape, generator=g).to(device)
        self.boxes = []
        for i in range(total):
            boxes = (
                given["gt_bboxes_3d"][i].to("cpu").clone()
            )  # mmdet3d makes the rotation on the CPU
            boxes.rotate(0.2 * i)
            self.boxes.append(boxes.to(device))

    def take(self, first: int, count: int) -> Dict[str, Any]:
        import types

        chosen = range(first, first + count)
        metas = [
            {
                **self.given["img_metas"][i],
                "gt_bboxes_3d": types.SimpleNamespace(_data=self.boxes[i].to("cpu")),
            }
            for i in chosen
        ]
        return {
            **self.given,
            "img": self.images[first : first + count].clone(),
            "img_metas": metas,
            "gt_bboxes_3d": [self.boxes[i] for i in chosen],
            "gt_labels_3d": [self.given["gt_labels_3d"][i] for i in chosen],
        }


def loss_of(net: nn.Module, batch: Dict[str, Any]) -> Tensor:
    out = net(return_loss=True, **batch)
    return sum(value for name, value in out.items() if "loss" in name)


def without_noise(head: Any) -> None:
    """The denoising queries' noise is drawn for a whole batch: next to none, so that batches can be
    split."""
    head.bbox_noise_scale = 1e-9
    head.split = 1.8  # above the longest draw, sqrt(3): no label is changed


def freeze_unused(net: nn.Module, batch: Dict[str, Any]) -> List[str]:
    """Parameters that take no part in the loss stop requiring gradients, as DDP wants. Their
    names."""
    loss_of(net, batch).backward()
    unused = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    for name, p in net.named_parameters():
        if name in unused:
            p.requires_grad_(False)
    net.zero_grad(set_to_none=True)
    return unused


class Processes:
    def __init__(self, args: argparse.Namespace) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = args.device == "cuda"
        self.gpus = torch.cuda.device_count() if self.cuda else 0
        self.a_gpu_each = self.gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = "cpu"
        if self.cuda:
            self.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % self.gpus}"
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if self.a_gpu_each else "gloo", timeout=datetime.timedelta(seconds=180)
        )

    def ddp(self, net: nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(
            net, device_ids=[torch.device(self.device).index] if self.cuda else None
        )

    def gather(self, value: Any) -> List[Any]:
        values: List[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Cmt:
    """Builds the real CMT again and again, the same each time."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import detectors

        self.detectors, self.args, self.processes = detectors, args, processes

    def build(self, bs: int, dropout: float, attn: str = "PETRMultiheadAttention") -> Any:
        width, height = (160, 64) if self.args.tiny else map(int, self.args.size.split("x"))
        return self.detectors.build(
            "cmt",
            self.args.cmt,
            self.args.frame,
            self.detectors.Options(
                self.processes.device,
                bs,
                (width, height),
                attn,
                dropout,
                layers=1 if self.args.tiny else 6,
            ),
        )


def gradients(cmt: Cmt, processes: Processes, each: int) -> Dict[str, Any]:
    """Relative distance of DDP's gradients from those of one process that has the whole batch."""
    total = each * processes.world

    def alone(batch_of: Callable[[Samples], Dict[str, Any]], wrap: bool) -> Any:
        detector = cmt.build(each, 0.0)
        without_noise(detector.net.pts_bbox_head)
        samples = Samples(detector, total, processes.device)
        freeze_unused(detector.net, samples.take(0, 1))
        net = processes.ddp(detector.net) if wrap else detector.net
        torch.manual_seed(3)
        loss = loss_of(net, batch_of(samples))
        loss.backward()
        return gradient(detector.net), float(loss)

    def whole(samples: Samples) -> Dict[str, Any]:
        return samples.take(0, total)

    def share(samples: Samples) -> Dict[str, Any]:
        return samples.take(processes.rank * each, each)

    result: Dict[str, Any] = {"samples_a_process": each}
    with single_process():
        truth, loss = alone(whole, False)
        result["noise"] = distance(alone(whole, False)[0], truth)
    for name, way in (
        ("unpatched", contextlib.nullcontext),
        ("patched", patched),
        ("patched dtype=fp16", lambda: patched("fp16")),
    ):
        with way():
            with single_process():
                own = alone(whole, False)[0]
            reduced, part = alone(share, True)
        result[name] = {
            "ddp_against_one_process": distance(reduced, own),
            "one_process_against_unpatched": distance(own, truth),
            "ddp_against_unpatched_one_process": distance(reduced, truth),
            "losses_of_ranks": processes.gather(part),
            "loss_of_one_process": loss,
            "ranks_agree": len(set(processes.gather(float(reduced.sum())))) == 1,
        }
    return result


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Every rank for itself: upstream's reduce_mean, which averages over processes, must not see
    the others."""
    real = dist.is_initialized
    dist.is_initialized = lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        dist.is_initialized = real  # type: ignore[assignment]


def throughput(cmt: Cmt, processes: Processes, each: int, steps: int) -> List[Dict[str, Any]]:
    rows = []
    for name, way in (
        ("unpatched", contextlib.nullcontext),
        ("patched dtype=fp16", lambda: patched("fp16")),
    ):
        for count in (1, processes.world):
            dist.barrier()
            times: List[float] = []
            if processes.rank < count:
                with way(), single_process() if count == 1 else contextlib.nullcontext():
                    times = timed(cmt, processes, each, steps, count > 1)
            seconds = max(
                s for s in processes.gather(statistics.median(times[2:] or times) if times else 0.0)
            )
            rows.append(
                {
                    "name": name,
                    "processes": count,
                    "step_s": seconds,
                    "samples_s": each * count / seconds,
                }
            )
            if processes.cuda:
                torch.cuda.empty_cache()
    for row in rows:
        one = next(r for r in rows if r["name"] == row["name"] and r["processes"] == 1)
        row["scaling"] = row["samples_s"] / one["samples_s"]
    return rows


def timed(cmt: Cmt, processes: Processes, each: int, steps: int, wrap: bool) -> List[float]:
    detector = cmt.build(each, 0.1)
    freeze_unused(detector.net, detector.batch(0))
    net = processes.ddp(detector.net) if wrap else detector.net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.01)
    times = []
    for i in range(steps):
        torch.manual_seed(100 + i)
        processes.synchronize()
        start = time.perf_counter()
        loss = loss_of(net, detector.batch(i))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 35.0)
        optimizer.step()
        processes.synchronize()
        times.append(time.perf_counter() - start)
    return times


class Broken(Backend):
    """A backend that fails in its forward from step 1 on, and is the real one otherwise."""

    def __init__(self, real: Any) -> None:
        self.real, self.name, self.armed, self.struck = real, real.name, False, 0
        self.recovers = real.recovers

    def why_not(self, inputs: Any) -> Any:
        return self.real.why_not(inputs)

    def __call__(self, inputs: Any) -> Tensor:
        self.strike()
        return self.real(inputs)

    def recovering(self, inputs: Any, on_failure: Any) -> Tensor:
        self.strike()
        return self.real.recovering(inputs, on_failure)

    def strike(self) -> None:
        if self.armed:
            self.struck += 1
            raise RuntimeError("injected")


def fault(cmt: Cmt, processes: Processes, each: int, steps: int) -> Dict[str, Any]:
    """Losses with and without the fault on the last rank, what it struck and what the journal
    says."""
    name = "triton" if processes.cuda else "sdpa"

    def run(broken: bool) -> Any:
        dispatch.reset()
        real = dispatch.backend(name)
        culprit = Broken(real)
        backward = [0]
        undo = _break_backward(backward, culprit) if broken and name == "triton" else None
        if broken and processes.rank == processes.world - 1:
            dispatch.loaded[name] = culprit
        detector = cmt.build(each, 0.0)
        samples = Samples(detector, each * processes.world, processes.device)
        freeze_unused(detector.net, samples.take(0, 1))
        net = processes.ddp(detector.net)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
        losses = []
        for i in range(steps):
            culprit.armed = i >= 2 and broken and processes.rank == processes.world - 1
            backward[0] = -1 if i == 1 and broken and processes.rank == processes.world - 1 else 0
            torch.manual_seed(100 + i + 1000 * processes.rank)
            loss = loss_of(net, samples.take(processes.rank * each, each))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 35.0)
            optimizer.step()
            losses.append(float(loss))
        if undo is not None:
            undo()
        weights = torch.cat([p.detach().flatten() for p in net.parameters()]).double()
        return losses, weights, culprit.struck

    with patched():
        healthy, weights, _ = run(False)
        again, _, _ = run(False)
        before = len(telemetry.fallbacks())
        failing, fallen, struck = run(True)
        told = [f"{f['source']}: {f['reason']}" for f in telemetry.fallbacks()[before:]]
        dispatch.reset()
    return {
        "backend": name,
        "steps": steps,
        "struck": processes.gather(struck),
        "fallbacks": processes.gather(told),
        "losses": processes.gather(healthy),
        "losses_again": processes.gather(again),
        "losses_with_fault": processes.gather(failing),
        "weights": distance(fallen, weights),
        "ranks_agree": len(set(processes.gather(float(fallen.sum())))) == 1,
    }


def _break_backward(flag: List[int], culprit: Broken) -> Callable[[], None]:
    """The fused operator rescues inside its own backward: fail there while flag[0] is not 0."""
    from flashbias_patch.attention.kernels import launcher

    real = launcher.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        if flag[0]:
            culprit.struck += 1
            raise RuntimeError("injected")
        return real(*args, **kwargs)

    launcher.backward = backward

    def undo() -> None:
        launcher.backward = real

    return undo


def fsdp(processes: Processes, tiny: bool, steps: int) -> Dict[str, Any]:
    """Losses of every rank and the parameters at the end, fully_shard against DDP; patched and
    not, with checkpointed layers and without."""
    spec = importlib.util.spec_from_file_location(
        "mini_cmt_train", str(ROOT / "examples/mini_cmt/tools/train.py")
    )
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    argv = ["--dropout", "0", "--device", "cuda" if processes.cuda else "cpu"]
    argv += (
        ["--queries", "40", "--bev", "12", "--image-size", "128x64"]
        if tiny
        else ["--preset", "cmt"]
    )
    args = train.parse_args(argv)

    def run(shard: bool, checkpointed: bool) -> Any:
        args.with_cp = checkpointed
        config, model = train.build(args)
        model = model.to(processes.device).train()
        batch = train.to_device(
            train.make_batch(train.load_frames(args, processes.rank), **config["data"]),
            torch.device(processes.device),
        )
        if shard:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cuda" if processes.cuda else "cpu", (processes.world,))
            for layer in model.pts_bbox_head.transformer.decoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            wrapped = model
        else:
            wrapped = processes.ddp(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if processes.cuda:
            torch.cuda.reset_peak_memory_stats()
        losses = []
        for step in range(steps):
            train.draw_step(batch, args, step, processes.rank)
            loss = sum(wrapped(**batch).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
            optimizer.step()
            losses.append(float(loss))
        weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        peak = torch.cuda.max_memory_allocated() / 2**20 if processes.cuda else 0.0
        return losses, torch.cat([w.detach().flatten() for w in weights]).double(), peak

    truth, weights, _ = run(False, False)
    result: Dict[str, Any] = {"steps": steps, "losses_ddp_unpatched": processes.gather(truth)}
    for name, way, checkpointed in (
        ("unpatched", contextlib.nullcontext, False),
        ("patched", patched, False),
        ("unpatched, checkpointed", contextlib.nullcontext, True),
        ("patched, checkpointed", patched, True),
    ):
        with way():
            before = dict(telemetry.calls)
            losses, found, peak = run(True, checkpointed)
            calls = {
                key: count - before.get(key, 0)
                for key, count in telemetry.calls.items()
                if count != before.get(key, 0)
            }
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, truth))
        result[name] = {
            "losses": processes.gather(losses),
            "loss_difference": max(processes.gather(worst)),
            "weights": distance(found, weights),
            "peak_MiB": round(peak, 1),
            "calls": calls,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("ddp", "fsdp"))
    parser.add_argument("--cmt", metavar="DIR", help="a checkout of junjie18/CMT")
    parser.add_argument("--frame", metavar="DIR", help="a nuScenes frame in mmdet3d's info format")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", default="1600x640")
    parser.add_argument("--bs", type=int, default=2, help="samples a process, for the throughput")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("gradients", "throughput", "fault"),
        help="default: all; without throughput where processes share a GPU",
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", metavar="F.json")
    args = parser.parse_args()
    if args.task == "ddp" and not (args.cmt and args.frame):
        parser.error("ddp needs --cmt and --frame")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and here is none; --device cpu needs none")
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    processes = Processes(args)
    shared = processes.cuda and not processes.a_gpu_each
    if shared and (args.task == "fsdp" or "throughput" in (args.parts or ())):
        needs = "fsdp" if args.task == "fsdp" else "--parts throughput"
        parser.error(
            f"{needs} needs a GPU for each process; GPUs: {processes.gpus}, processes: "
            f"{processes.world}"
        )
    parts = args.parts or ["gradients", *([] if shared else ["throughput"]), "fault"]
    steps, each = (3, 1) if args.tiny else (args.steps, args.bs)
    words = " ".join(os.path.basename(a.rstrip("/")) if "/" in a else a for a in sys.argv[1:])
    result: Dict[str, Any] = {
        "device": torch.cuda.get_device_name() if processes.cuda else "CPU",
        "processes": processes.world,
        "gpus": processes.gpus,
        "torch": torch.__version__,
        "backend": dist.get_backend(),
        "command": f"torchrun --nproc_per_node {processes.world} benchmarks/distributed.py {words}",
    }

    def save(name: str, value: Any) -> None:
        result[name] = value
        if processes.rank == 0:
            print(name, json.dumps(value), flush=True)
            if args.out:
                Path(args.out).write_text(json.dumps(result, indent=1) + "\n")

    if args.task == "fsdp":
        save("fsdp", fsdp(processes, args.tiny, steps))
    else:
        cmt = Cmt(args, processes)
        if "gradients" in parts:
            save("gradients", gradients(cmt, processes, 1))
        if "throughput" in parts:
            save("throughput", throughput(cmt, processes, each, steps))
        if "fault" in parts:
            save("fault", fault(cmt, processes, 1, max(4, steps // 2)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
