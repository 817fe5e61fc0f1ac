"""Several processes: does a patched detector train as it should, and does it scale?

    torchrun --nproc_per_node 2 benchmarks/distributed.py ddp --cmt DIR --frame DIR [--out F.json]
    torchrun --nproc_per_node 2 benchmarks/distributed.py fsdp [--out F.json]
    ... --device cpu --tiny                         gloo on the CPU: a proof that it runs

With fewer GPUs than processes, those of ddp share them through gloo, because NCCL wants a GPU for
each: what is compared stays the same, but throughput is not measured. fully_shard does not run on a
GPU with gloo.

ddp, on the real CMT (--model: its camera detector, or fusion with lidar) under
DistributedDataParallel:
* gradients: of one global batch (on every sample a different image, points and boxes of its own),
  reduced over the processes, against one process that is given the whole batch; no dropout, batch
  normalisation with statistics that do not change, one output of the lidar branch for all; the same
  process asked twice is the noise
* throughput: samples a second of one process alone and of all, unpatched, patched, and patched with
  FLASHBIAS_DTYPE=fp16, in rounds that go through them forwards and backwards in turn
* fault: the backend fails on the last rank alone, forward and backward: nothing may hang, losses
  must stay

fsdp, on examples/mini_cmt: losses and parameters under fully_shard against DistributedDataParallel,
with checkpointed decoder layers and without.

`flashbias ab` compares several processes on a command: benchmarks/ddp_train.py is one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List

os.environ.setdefault("FLASHBIAS_PATCH", "0")  # installed and uninstalled below

import torch
import torch.distributed as dist
from detectors import hold_lidar, lidar_features
from faulty_rank import fault
from installed import patched
from ranks import (
    Builder,
    Processes,
    Samples,
    distance,
    freeze_statistics,
    freeze_unused,
    gradient,
    loss_of,
    single_process,
    without_noise,
)
from sharded import fsdp
from torch import Tensor

WAYS: Dict[str, Callable[[], Any]] = {
    "unpatched": contextlib.nullcontext,
    "patched": patched,
    "patched dtype=fp16": lambda: patched("fp16"),
}


def gradients(builder: Builder, processes: Processes, each: int) -> Dict[str, Any]:
    """Relative distance of DDP's gradients from those of one process that has the whole batch."""
    total = each * processes.world
    features: List[Tensor] = []  # of the lidar branch, the same for all: its order changes

    def build() -> Any:
        detector = builder.build(each, 0.0)
        without_noise(detector.net.pts_bbox_head)
        return detector, Samples(detector, total, processes.device)

    def alone(first: int, count: int, wrap: bool) -> Any:
        detector, samples = build()
        if features:
            hold_lidar(detector.net, [f[:1] for f in features])
        freeze_statistics(detector.net, samples.take(0, 1))
        if features:
            hold_lidar(detector.net, [f[first : first + count] for f in features])
        freeze_unused(detector.net, samples.take(first, count))
        net = processes.ddp(detector.net) if wrap else detector.net
        torch.manual_seed(3)
        loss = loss_of(net, samples.take(first, count))
        loss.backward()
        return gradient(detector.net), float(loss)

    detector, samples = build()
    if detector.voxels:
        freeze_statistics(detector.net, samples.take(0, 1))
        features.extend(lidar_features(detector.net, samples.take(0, total)))
        for feature in features:
            dist.broadcast(feature, 0)
    del detector, samples
    result: Dict[str, Any] = {"samples_a_process": each}
    with single_process():
        truth, loss = alone(0, total, False)
        result["noise"] = distance(alone(0, total, False)[0], truth)
        result["lidar_held"] = bool(features)
    for name, way in WAYS.items():
        with way():
            with single_process():
                own = alone(0, total, False)[0]
            reduced, part = alone(processes.rank * each, each, True)
        result[name] = {
            "ddp_against_one_process": distance(reduced, own),
            "one_process_against_unpatched": distance(own, truth),
            "ddp_against_unpatched_one_process": distance(reduced, truth),
            "losses_of_ranks": processes.gather(part),
            "loss_of_one_process": loss,
            "ranks_agree": len(set(processes.gather(float(reduced.sum())))) == 1,
        }
    return result


def throughput(
    builder: Builder, processes: Processes, each: int, steps: int, rounds: int
) -> List[Dict[str, Any]]:
    """A row for each way, with one process and with all: the seconds a step of every round, of
    which the rates are those of the median."""
    kinds = [(name, count) for name in WAYS for count in (1, processes.world)]
    seconds: Dict[Any, List[float]] = {kind: [] for kind in kinds}
    for i in range(rounds):
        for name, count in kinds if i % 2 == 0 else kinds[::-1]:
            dist.barrier()
            times: List[float] = []
            if processes.rank < count:
                with WAYS[name](), single_process() if count == 1 else contextlib.nullcontext():
                    times = timed(builder, processes, each, steps, count > 1)
            slowest = processes.gather(statistics.median(times[2:] or times) if times else 0.0)
            seconds[name, count].append(max(slowest))
            if processes.cuda:
                torch.cuda.empty_cache()
    rows = []
    for (name, count), all_rounds in seconds.items():
        alone = statistics.median(seconds[name, 1])
        step = statistics.median(all_rounds)
        rows.append(
            {
                "name": name,
                "processes": count,
                "rounds_s": all_rounds,
                "step_s": step,
                "samples_s": each * count / step,
                "scaling": count * alone / step,
            }
        )
    return rows


def timed(builder: Builder, processes: Processes, each: int, steps: int, wrap: bool) -> List[float]:
    detector = builder.build(each, 0.1)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("ddp", "fsdp"))
    parser.add_argument("--cmt", metavar="DIR", help="a checkout of junjie18/CMT")
    parser.add_argument("--frame", metavar="DIR", help="a nuScenes frame in mmdet3d's info format")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=("cmt", "fusion0100", "fusion0075"), default="cmt")
    parser.add_argument("--size", help="default: 800x320 for fusion0100, else 1600x640")
    parser.add_argument("--bs", type=int, default=2, help="samples a process, for the throughput")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput")
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
    processes = Processes(args.device)
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
        "model": args.model if args.task == "ddp" else "examples/mini_cmt",
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
        builder = Builder(args, processes)
        if "gradients" in parts:
            save("gradients", gradients(builder, processes, 1))
        if "throughput" in parts:
            save("throughput", throughput(builder, processes, each, steps, args.rounds))
        if "fault" in parts:
            save("fault", fault(builder, processes, 1, max(4, steps // 2)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
