"""Two ranks of one model under DDP; on rank 1 a backend fails. Prints the ranks' reduced gradients'
distance.

python -m tests.integration.distributed.two_ranks                 # gloo, CPU (what the tests run)
python -m tests.integration.distributed.two_ranks --backend nccl --out two_ranks.json  # two GPUs
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import socket
import sys
from pathlib import Path

os.environ["FLASHBIAS_PATCH"] = "0"
ROOT = Path(__file__).resolve().parents[3]


def rank_main(rank, port, backend, broken, results):
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import flashbias_patch
    from flashbias_patch import telemetry
    from flashbias_patch.attention import order, selection
    from tests.support.fake_backends import FAULTS, Faulty
    from tests.support.mini_cmt import MINI_CMT, MODULE
    from tests.support.small_training import train

    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    if backend == "nccl":
        torch.cuda.set_device(rank)
    flashbias_patch.install()
    sys.path.insert(0, str(MINI_CMT))
    module = importlib.import_module(MODULE)
    fault = (
        next(f for f in FAULTS if f.name == "CompilationError") if broken and rank == 1 else None
    )
    faulty = Faulty("triton", fault, "forward", 1)
    order.TABLE.clear()  # the faulty one is asked first, whatever is fastest here
    selection.MODULES = {
        "triton": "none",
        **{n: selection.MODULES[n] for n in ("sdpa", "reference")},
    }
    selection.loaded["triton"] = faulty
    losses, grads = train(
        module,
        on_step=faulty.on_step,
        wrap=DistributedDataParallel,
        with_cp=False,
        seed=rank,
        device=f"cuda:{rank}" if backend == "nccl" else "cpu",
    )
    results.put(
        (rank, losses, {name: g.cpu().numpy() for name, g in grads.items()}, telemetry.fallbacks())
    )
    del grads
    # DDP goes before its process group: gloo's threads outlive the interpreter otherwise, and it
    # aborts
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def run(backend="gloo", broken=True):
    """{rank: (losses, gradients by name, fallbacks)} of a run."""
    import torch.multiprocessing as mp

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=rank_main, args=(r, port, backend, broken, results))
        for r in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        found = {rank: rest for rank, *rest in (results.get(timeout=180) for _ in ranks)}
    finally:
        for process in ranks:
            process.join(30)
            if process.is_alive():
                process.kill()
    return found


def distance(a, b):
    """Largest difference between two sets of gradients, relative to the largest entry of all."""
    return float(max(abs(a[n] - b[n]).max() for n in a) / max(abs(x).max() for x in a.values()))


def main():
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="gloo", choices=("gloo", "nccl"))
    parser.add_argument("--out", metavar="FILE.json")
    args = parser.parse_args()
    unbroken, fallen = run(args.backend, broken=False), run(args.backend)
    report = {
        "backend": args.backend,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.backend == "nccl" else "cpu",
        "fallbacks": {rank: fallen[rank][2] for rank in (0, 1)},
        "ranks_differ_by": distance(fallen[0][1], fallen[1][1]),
        "unbroken_differs_by": distance(fallen[0][1], unbroken[0][1]),
        "losses": {"fallen": fallen[0][0], "unbroken": unbroken[0][0]},
    }
    report["passed"] = (
        bool(fallen[1][2])
        and not fallen[0][2]
        and report["ranks_differ_by"] == 0
        and report["unbroken_differs_by"] < 1e-4
    )
    print(json.dumps(report, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=2) + "\n")
    return not report["passed"]


if __name__ == "__main__":
    sys.exit(main())
