"""Drop a sensor in training and supervise the router with it (as MoME does, arXiv 2503.19776)."""

from __future__ import annotations

import random
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

LIDAR, CAMERA = "lidar", "camera"


class ModalityDrop:
    """Select per sample whether a sensor is dropped: lidar or cameras, each with probability / 2.

    It has its own random generator, so other random numbers of a run do not change. Each `rank` has
    its own sequence.

    Raises:
        ValueError: the probability is not in 0 .. 1.
    """

    def __init__(self, probability: float, seed: int = 0, rank: int = 0) -> None:
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability: expected a number from 0 to 1, got {probability!r}")
        self.probability = probability
        self.rank = rank
        self._start(seed)

    def _start(self, seed: int) -> None:
        self.seed, self.drawn = seed % 2**63, 0
        self._random = random.Random(self.seed + self.rank)

    def draw(self, batch: int) -> List[Optional[str]]:
        """Return "lidar", "camera" or None for each of `batch` samples."""
        sensors: List[Optional[str]] = []
        self.drawn += batch
        for _ in range(batch):
            dropped, sensor = (
                self._random.random() < self.probability,
                self._random.choice((LIDAR, CAMERA)),
            )
            sensors.append(sensor if dropped else None)
        return sensors

    def state(self) -> Tensor:
        """Return (2,) int64: the seed and the number of samples drawn, the same on every rank."""
        return torch.tensor([self.seed, self.drawn], dtype=torch.int64)

    def restore(self, state: Any) -> None:
        """Continue the sequence of this rank after `state`; ValueError if it is not a `state()`."""
        if not isinstance(state, Tensor) or tuple(state.shape) != (2,) or state.is_floating_point():
            got = (
                f"{tuple(state.shape)} {state.dtype}"
                if isinstance(state, Tensor)
                else type(state).__name__
            )
            raise ValueError(f"the state of aqr.drop: expected two integers, got {got}")
        seed, drawn = state.tolist()
        self._start(seed)
        self.draw(drawn)


def drop_modalities(
    x: Tensor, x_img: Tensor, dropped: Sequence[Optional[str]]
) -> Tuple[Tensor, Tensor]:
    """Set x (B, ...) to zero where "lidar" is dropped, and x_img (B*V, ...) where "camera" is.

    Position embeddings are not changed.

    Raises:
        ValueError: `dropped` does not have one entry per sample.
    """
    if len(dropped) != x.shape[0] or x_img.shape[0] % x.shape[0]:
        raise ValueError(
            f"dropped: expected one entry per sample, B = {x.shape[0]}, got {len(dropped)}, with "
            "x_img's "
            f"first dimension {x_img.shape[0]} a multiple of B"
        )
    if not any(dropped):
        return x, x_img

    def without_dropped(like: Tensor, sensor: str) -> Tensor:
        keep = torch.tensor(
            [name != sensor for name in dropped], dtype=like.dtype, device=like.device
        )
        keep = keep.repeat_interleave(like.shape[0] // len(dropped))
        return like * keep.view(-1, *[1] * (like.dim() - 1))

    return without_dropped(x, LIDAR), without_dropped(x_img, CAMERA)


def supervision_loss(logits: Tensor, dropped: Sequence[Optional[str]]) -> Tensor:
    """Return the cross entropy of the router against the remaining sensors; 0 if none was dropped.

    logits (B, M, S), segment 0 the lidar, the others cameras. A sample's target is the lidar where
    "camera" was dropped, and all cameras equally where "lidar" was. MoME has a third class, fused,
    for intact samples; here those are left to the detection losses, since soft weights need no
    class for "both".

    Raises:
        ValueError: the shape of the logits does not fit.
    """
    batch, _, segments = logits.shape
    if len(dropped) != batch or segments < 2:
        raise ValueError(
            f"logits: expected (B, M, S) with S >= 2 and B = {len(dropped)}, got "
            f"{tuple(logits.shape)}"
        )
    target = logits.new_zeros(batch, segments)
    for sample, sensor in enumerate(dropped):
        if sensor == CAMERA:
            target[sample, 0] = 1.0
        elif sensor == LIDAR:
            target[sample, 1:] = 1.0 / (segments - 1)
    count = max(sum(sensor is not None for sensor in dropped), 1)
    return (-logits.float().log_softmax(-1).mean(1) * target).sum() / count
