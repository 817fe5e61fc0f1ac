"""Denoising queries: noisy copies of the true boxes, which the decoder learns to put back."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ...core.boxes import BOX_SIZE, normalise_points

IGNORED = -1


class Denoising(NamedTuple):
    """`groups` groups of `size` queries in front of the others; a frame with fewer objects is
    padded."""

    reference: Tensor  # (B, groups * size, 3) noisy centres, 0..1 in pc_range
    boxes: Tensor  # (B, groups * size, 9)
    labels: (
        Tensor  # (B, groups * size) long: class; number of classes = background; IGNORED = padding
    )
    mask: Tensor  # (groups * size + queries) square, boolean, True = may not be seen


def denoising_mask(groups: int, size: int, num_queries: int) -> Tensor:
    """Object queries see no denoising query, and a group sees no other group; True = may not be
    seen."""
    noisy = groups * size
    mask = torch.zeros(noisy + num_queries, noisy + num_queries, dtype=torch.bool)
    mask[noisy:, :noisy] = True
    group = torch.arange(noisy) // max(size, 1)
    mask[:noisy, :noisy] = group[:, None] != group[None, :]
    return mask


def make_denoising(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    seeds: Sequence[int],
    groups: int,
    num_queries: int,
    num_classes: int,
    pc_range: Sequence[float],
    noise_scale: float,
    split: float,
) -> Optional[Denoising]:
    """Noise in units of half a box times noise_scale; beyond `split` of it the target is
    background.

    boxes: B tensors (G, 9), labels: B tensors (G,), seeds: B numbers, of which alone the noise
    depends. None if there is nothing to denoise.
    """
    size = max(len(b) for b in boxes)
    if size * groups == 0:
        return None
    device, batch, noisy = boxes[0].device, len(boxes), groups * size
    reference = torch.full((batch, groups, size, 3), 0.5, device=device)
    padded_boxes = torch.zeros(batch, groups, size, BOX_SIZE, device=device)
    padded_labels = torch.full((batch, groups, size), IGNORED, dtype=torch.long, device=device)
    for i, (frame_boxes, frame_labels, seed) in enumerate(zip(boxes, labels, seeds)):
        count = len(frame_boxes)
        generator = torch.Generator().manual_seed(seed)
        noise = (2 * torch.rand(groups, count, 3, generator=generator) - 1).to(device)
        centre = frame_boxes[:, :3] + noise * noise_scale * frame_boxes[:, 3:6] / 2
        reference[i, :, :count] = normalise_points(centre, pc_range).clamp(0.0, 1.0)
        padded_boxes[i, :, :count] = frame_boxes
        padded_labels[i, :, :count] = frame_labels.where(
            noise.norm(dim=-1) <= split, frame_labels.new_tensor(num_classes)
        )
    mask = denoising_mask(groups, size, num_queries).to(device)
    return Denoising(
        reference.view(batch, noisy, 3),
        padded_boxes.view(batch, noisy, BOX_SIZE),
        padded_labels.view(batch, noisy),
        mask,
    )
