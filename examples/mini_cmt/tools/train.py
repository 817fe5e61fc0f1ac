"""Train the detector on one frame, and write what it predicts.

python tools/train.py --frame DIR --steps 200 --save last.pth --eval predictions.json
python tools/train.py --steps 0 --load last.pth --eval predictions.json
torchrun --nproc_per_node 2 tools/train.py --steps 20
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import projects.mmdet3d_plugin.models  # noqa: F401  (fills the registries)
from projects.configs.mini_cmt import PRESETS, make_config, override
from projects.mmdet3d_plugin.core.boxes import CLASS_NAMES
from projects.mmdet3d_plugin.core.evaluation import mean_average_precision
from projects.mmdet3d_plugin.datasets import Frame, load_frame, make_batch, synthetic_frame
from projects.mmdet3d_plugin.registry import DETECTORS

GradScaler = (
    getattr(getattr(torch, "amp", None), "GradScaler", None) or torch.cuda.amp.GradScaler
)  # moved in torch 2.3
SENSORS = ("lidar", "camera")


def image_size(text: str) -> Tuple[int, int]:
    width, _, height = text.partition("x")
    try:
        return int(width), int(height)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected WIDTHxHEIGHT, e.g. 288x128, got {text!r}"
        ) from None


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--frame",
        metavar="DIR",
        help="a nuScenes frame in mmdet3d's info format (default: synthetic)",
    )
    add("--steps", type=int, default=20)
    add("--bs", type=int, default=1, help="frames a step and process; a real frame is repeated")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--fp16", action="store_true", help="autocast and loss scaling, on CUDA")
    add("--lr", type=float, default=6e-4)
    add(
        "--preset",
        choices=sorted(PRESETS),
        default="mini",
        help="cmt: shapes of the real thing, for GPUs",
    )
    add(
        "--attn",
        choices=("PETRMultiheadAttention", "PETRMultiheadFlashAttention"),
        default="PETRMultiheadAttention",
        help="the class of the cross attention",
    )
    add(
        "--with-cp",
        dest="with_cp",
        action="store_true",
        default=True,
        help="checkpoint layers (default)",
    )
    add("--no-cp", dest="with_cp", action="store_false")
    add("--dropout", type=float, default=0.1)
    add("--image-size", type=image_size, metavar="WxH")
    add("--bev", type=int, metavar="N", help="N x N lidar tokens")
    add("--queries", type=int)
    add("--layers", type=int)
    add("--drop", choices=SENSORS, help="zero the features of a sensor, in training and evaluation")
    add(
        "--modality-dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="in training, drop one of the two sensors with this probability a frame",
    )
    add(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="A.B.C=VALUE",
        help="override the configuration",
    )
    add("--load", metavar="FILE")
    add("--save", metavar="FILE")
    add("--eval", metavar="FILE.json", help="afterwards, write boxes, scores and labels")
    add("--log-interval", type=int, default=1)
    return parser.parse_args(argv)


def setup_device(args: argparse.Namespace) -> Tuple[torch.device, int, int]:
    """(device, rank, number of processes); joins the others when started by torchrun."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if args.fp16 and name != "cuda":
        raise SystemExit("--fp16 needs a CUDA device")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(name)
    if name == "cuda":
        device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    return device, rank, world


def build(args: argparse.Namespace) -> Tuple[Dict[str, Any], torch.nn.Module]:
    """The configuration with all overrides, and its model with weights from the seed."""
    settings = dict(PRESETS[args.preset])
    settings.update(
        {
            key: getattr(args, key)
            for key in ("image_size", "bev", "queries", "layers")
            if getattr(args, key) is not None
        }
    )
    config = make_config(
        attn=args.attn, with_cp=args.with_cp, dropout=args.dropout, lr=args.lr, **settings
    )
    override(config, args.cfg_options)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    return config, DETECTORS.build(config["model"])


def load_frames(args: argparse.Namespace, rank: int = 0) -> List[Frame]:
    if args.frame:
        return [load_frame(args.frame)] * args.bs
    return [synthetic_frame(args.seed + rank * args.bs + i) for i in range(args.bs)]


def to_device(item: Any, device: torch.device) -> Any:
    if isinstance(item, torch.Tensor):
        return item.to(device)
    if isinstance(item, dict):
        return {key: to_device(value, device) for key, value in item.items()}
    return [to_device(value, device) for value in item] if isinstance(item, list) else item


def draw_step(batch: Dict[str, Any], args: argparse.Namespace, step: int, rank: int) -> None:
    """Set what differs by step, from a generator of its own: the noise, and which sensor is
    dropped."""
    rng = np.random.default_rng([args.seed, step, rank])
    for meta in batch["img_metas"]:
        meta["noise_seed"] = int(rng.integers(2**31))
        dropped, which = rng.random() < args.modality_dropout, SENSORS[int(rng.integers(2))]
        meta["drop"] = args.drop or (which if dropped else None)


def peak_memory(device: torch.device) -> int:
    """MiB: allocated at most on the GPU, or the resident set at its largest."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def parameter_groups(model: torch.nn.Module, settings: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The learning rate of each parameter, by `lr_mult` for names that end so."""
    rates: Dict[float, List[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = settings["lr"] * settings["lr_mult"].get(name.rpartition(".")[2], 1.0)
        rates.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]


def train(
    args: argparse.Namespace,
    config: Dict[str, Any],
    model: torch.nn.Module,
    batch: Dict[str, Any],
    device: torch.device,
    rank: int,
) -> None:
    settings = config["optimizer"]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings), weight_decay=settings["weight_decay"]
    )
    steps = settings["warmup"]
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
    scaler = GradScaler(enabled=args.fp16)
    model.train()
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        draw_step(batch, args, step, rank)
        with (
            torch.autocast(device.type, dtype=torch.float16)
            if args.fp16
            else contextlib.nullcontext()
        ):
            losses = model(**batch)
            loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_norm"])
        scaler.step(optimizer)
        scaler.update()
        warmup.step()
        values = {"loss": loss.item(), **{name: value.item() for name, value in losses.items()}}
        if rank == 0 and (step % args.log_interval == 0 or step == args.steps):
            parts = "  ".join(f"{name}: {value:.4f}" for name, value in values.items())
            print(
                f"step {step}/{args.steps}  {parts}  grad_norm: {grad_norm.item():.4f}  "
                f"time: {time.perf_counter() - start:.3f}  memory: {peak_memory(device)}",
                flush=True,
            )


def evaluate(
    model: torch.nn.Module, batch: Dict[str, Any], frames: List[Frame], drop: Optional[str]
) -> Dict[str, Any]:
    """Predictions and ground truth by frame; boxes are (x, y, z, l, w, h, yaw, vx, vy) in the lidar
    frame."""
    model.eval()
    metas = [{**meta, "drop": drop} for meta in batch["img_metas"]]
    results = model(points=batch["points"], img=batch["img"], img_metas=metas)
    report: Dict[str, Any] = {"classes": list(CLASS_NAMES), "frames": []}
    for i, (frame, result) in enumerate(zip(frames, results)):
        truth = {"boxes": batch["gt_bboxes_3d"][i], "labels": batch["gt_labels_3d"][i]}
        entry = {
            "token": frame.info["token"],
            "lidar2ego": frame.info["lidar_points"]["lidar2ego"],
            "ego2global": frame.info["ego2global"],
        }
        for key, group in (("predictions", result), ("ground_truth", truth)):
            entry[key] = {name: tensor.cpu().tolist() for name, tensor in group.items()}
            entry[key]["names"] = [CLASS_NAMES[label] for label in entry[key]["labels"]]
        report["frames"].append(entry)
    report["ap"] = mean_average_precision(report["frames"])
    return report


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    device, rank, world = setup_device(args)
    config, model = build(args)
    model = model.to(device)
    if args.load:
        state = torch.load(args.load, map_location=device)["state_dict"]
        problems = model.load_state_dict(state, strict=False)
        for kind, names in (
            ("missing", problems.missing_keys),
            ("unexpected", problems.unexpected_keys),
        ):
            if names:
                print(f"{args.load}: {kind} {', '.join(names)}", file=sys.stderr)
    torch.manual_seed(args.seed + rank)  # dropout differs between processes, not between runs
    frames = load_frames(args, rank)
    batch = to_device(make_batch(frames, **config["data"]), device)
    if args.steps:
        # kept by nobody: DDP has to be gone before its process group
        train(
            args,
            config,
            DistributedDataParallel(model) if world > 1 else model,
            batch,
            device,
            rank,
        )
    if rank == 0 and args.save:
        torch.save({"state_dict": model.state_dict(), "step": args.steps}, args.save)
    if rank == 0 and args.eval:
        report = evaluate(model, batch, frames, args.drop)
        Path(args.eval).write_text(json.dumps(report))
        print("ap  " + "  ".join(f"{name}: {value:.4f}" for name, value in report["ap"].items()))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
