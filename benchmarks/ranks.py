"""The processes of benchmarks/distributed.py, and the detectors and batches that they share."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import types
from typing import Any, Dict, Iterator, List

import detectors
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among all: its rank, its device and what the others say."""

    def __init__(self, device: str) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.cuda = device == "cuda"
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


class Builder:
    """Builds the real detector that `args` names again and again, the same each time."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args, self.processes = args, processes

    def build(self, bs: int, dropout: float) -> Any:
        usual = "800x320" if self.args.model == "fusion0100" else "1600x640"
        size = "160x64" if self.args.tiny else self.args.size or usual
        width, height = map(int, size.split("x"))
        return detectors.build(
            self.args.model,
            self.args.cmt,
            self.args.frame,
            detectors.Options(
                self.processes.device,
                bs,
                (width, height),
                "PETRMultiheadAttention",
                dropout,
                layers=1 if self.args.tiny else 6,
            ),
        )


class Samples:
    """A global batch in which every sample differs: images with noise of their own, boxes and
    points turned about z."""

    def __init__(self, detector: Any, total: int, device: str) -> None:
        given = detector.resize(total)(0)
        self.given = given
        g = torch.Generator().manual_seed(5)
        self.images = given["img"] + 0.3 * torch.randn(given["img"].shape, generator=g).to(device)
        self.boxes, self.points = [], []
        for i in range(total):
            boxes = (
                given["gt_bboxes_3d"][i].to("cpu").clone()
            )  # mmdet3d makes the rotation on the CPU
            boxes.rotate(0.2 * i)
            self.boxes.append(boxes.to(device))
            if given["points"] is not None:
                points = turned(given["points"][i], 0.2 * i)
                self.points.append(detectors.thinned(points, detector.voxels))

    def take(self, first: int, count: int) -> Dict[str, Any]:
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
            "points": [self.points[i] for i in chosen] or None if self.points else None,
            "gt_bboxes_3d": [self.boxes[i] for i in chosen],
            "gt_labels_3d": [self.given["gt_labels_3d"][i] for i in chosen],
        }


def turned(points: Tensor, angle: float) -> Tensor:
    """Points (P, 5) turned about z by `angle` radians."""
    c, s = math.cos(angle), math.sin(angle)
    out = points.clone()
    out[:, 0], out[:, 1] = c * points[:, 0] - s * points[:, 1], s * points[:, 0] + c * points[:, 1]
    return out


def loss_of(net: nn.Module, batch: Dict[str, Any]) -> Tensor:
    out = net(return_loss=True, **batch)
    return sum(value for name, value in out.items() if "loss" in name)


def without_noise(head: Any) -> None:
    """The denoising queries' noise is drawn for a whole batch: next to none, so that batches can be
    split."""
    head.bbox_noise_scale = 1e-9
    head.split = 1.8  # above the longest draw, sqrt(3): no label is changed


def freeze_statistics(net: nn.Module, batch: Dict[str, Any]) -> None:
    """Batch normalisation with the statistics of `batch` from now on: those of a part of a batch
    are not those of the whole."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [module for module in net.modules() if isinstance(module, kinds) and module.training]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        loss_of(net, batch)
    for norm in norms:
        norm.eval()


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


def distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to b's."""
    return float((a - b).norm() / b.norm())


def gradient(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double()
