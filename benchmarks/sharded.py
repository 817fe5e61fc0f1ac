"""FSDP2 against DDP, on examples/mini_cmt: the task `fsdp` of benchmarks/distributed.py."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any, Dict

import torch
from installed import patched
from ranks import Processes, distance

from flashbias_patch import telemetry

ROOT = Path(__file__).resolve().parents[1]


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
