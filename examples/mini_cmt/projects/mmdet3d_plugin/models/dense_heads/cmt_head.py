"""Anchor queries, the transformer, and a box and class for each query after each layer."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ...core.boxes import CLASS_NAMES, CODE_SIZE, decode_boxes, denormalise_points, encode_boxes
from ...core.losses import code_loss, focal_loss
from ...core.matching import hungarian_match
from ...registry import HEADS, TRANSFORMER
from .denoising import IGNORED, Denoising, make_denoising
from .positions import PositionEmbedding

CODE_WEIGHTS = (1.0,) * 8 + (0.2, 0.2)


def _branch(embed_dims: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(embed_dims, embed_dims),
        nn.LayerNorm(embed_dims),
        nn.ReLU(inplace=True),
        nn.Linear(embed_dims, outputs),
    )


@HEADS.register_module()
class CmtHead(nn.Module):
    """Sizes in tokens and queries, pc_range in metres, loss weights as plain factors."""

    def __init__(
        self,
        transformer: Dict[str, Any],
        pc_range: Sequence[float],
        num_query: int = 200,
        num_layers: int = 3,
        dn_groups: int = 3,
        dn_noise_scale: float = 1.0,
        dn_split: float = 0.75,
        cls_weight: float = 2.0,
        bbox_weight: float = 0.25,
        max_boxes: int = 300,
    ) -> None:
        super().__init__()
        self.pc_range = tuple(pc_range)
        self.num_query, self.num_classes = num_query, len(CLASS_NAMES)
        self.dn_groups, self.dn_noise_scale, self.dn_split = dn_groups, dn_noise_scale, dn_split
        self.cls_weight, self.bbox_weight, self.max_boxes = cls_weight, bbox_weight, max_boxes
        self.transformer = TRANSFORMER.build(transformer)
        embed_dims = self.transformer.embed_dims
        self.reference_points = nn.Parameter(torch.rand(num_query, 3).logit(eps=1e-2))
        self.positions = PositionEmbedding(embed_dims, pc_range)
        self.cls_branches = nn.ModuleList(
            _branch(embed_dims, self.num_classes) for _ in range(num_layers)
        )
        self.reg_branches = nn.ModuleList(_branch(embed_dims, CODE_SIZE) for _ in range(num_layers))
        for branch in self.cls_branches:
            nn.init.constant_(branch[-1].bias, -math.log(99.0))  # a chance of 1% at first
        for branch in self.reg_branches:
            nn.init.normal_(branch[-1].weight, std=0.01)  # near the reference point at first
            nn.init.zeros_(branch[-1].bias)
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS), persistent=False)

    def forward(
        self,
        x: Tensor,
        x_img: Tensor,
        img_metas: List[Dict[str, Any]],
        gt_bboxes_3d: Optional[List[Tensor]] = None,
        gt_labels_3d: Optional[List[Tensor]] = None,
    ) -> Dict[str, Any]:
        """x (B, C, h, w), x_img (B*V, C, h', w') -> logits (layers, B, M, classes), codes (layers,
        B, M, 10).

        With ground truth, the first queries are denoising queries, described under "denoising".
        """
        batch = x.shape[0]
        lidar2img = torch.stack([meta["lidar2img"] for meta in img_metas])
        img2lidar = torch.stack([meta["img2lidar"] for meta in img_metas])
        img_shape = img_metas[0]["img_shape"]
        reference = self.reference_points.sigmoid().expand(batch, -1, -1)
        denoising = None
        if gt_bboxes_3d is not None and gt_labels_3d is not None:
            denoising = make_denoising(
                gt_bboxes_3d,
                gt_labels_3d,
                [meta["noise_seed"] for meta in img_metas],
                self.dn_groups,
                self.num_query,
                self.num_classes,
                self.pc_range,
                self.dn_noise_scale,
                self.dn_split,
            )
        if denoising is not None:
            reference = torch.cat([denoising.reference, reference], dim=1)

        hidden, _ = self.transformer(
            x,
            x_img,
            self.positions.queries(reference, lidar2img, img2lidar, img_shape),
            self.positions.bev_tokens(*x.shape[-2:]),
            self.positions.rv_tokens(*x_img.shape[-2:], img2lidar.flatten(0, 1), img_shape),
            attn_masks=None if denoising is None else denoising.mask,
        )
        logits = torch.stack([branch(h) for branch, h in zip(self.cls_branches, hidden)]).float()
        raw = torch.stack([branch(h) for branch, h in zip(self.reg_branches, hidden)]).float()
        centre = (raw[..., :3] + reference.logit(eps=1e-3)).sigmoid()
        codes = torch.cat([denormalise_points(centre, self.pc_range), raw[..., 3:]], dim=-1)
        return {"logits": logits, "codes": codes, "denoising": denoising}

    def loss(
        self, outs: Dict[str, Any], gt_bboxes_3d: List[Tensor], gt_labels_3d: List[Tensor]
    ) -> Dict[str, Tensor]:
        """The last layer's losses by their plain names, those of layer i as d{i}.*."""
        denoising = outs["denoising"]
        noisy = 0 if denoising is None else denoising.boxes.shape[1]
        gt_codes = [encode_boxes(boxes) for boxes in gt_bboxes_3d]
        losses: Dict[str, Tensor] = {}
        for layer, (logits, codes) in enumerate(zip(outs["logits"], outs["codes"])):
            prefix = "" if layer == len(outs["logits"]) - 1 else f"d{layer}."
            cls, bbox = self._object_loss(
                logits[:, noisy:], codes[:, noisy:], gt_labels_3d, gt_codes
            )
            losses[f"{prefix}loss_cls"], losses[f"{prefix}loss_bbox"] = cls, bbox
            if denoising is not None:
                cls, bbox = self._denoising_loss(logits[:, :noisy], codes[:, :noisy], denoising)
                losses[f"{prefix}dn_loss_cls"], losses[f"{prefix}dn_loss_bbox"] = cls, bbox
        return losses

    def _object_loss(
        self, logits: Tensor, codes: Tensor, gt_labels: List[Tensor], gt_codes: List[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        targets = torch.full(
            logits.shape[:2], self.num_classes, dtype=torch.long, device=logits.device
        )
        bbox = codes.sum() * 0.0
        for i, (labels, wanted) in enumerate(zip(gt_labels, gt_codes)):
            queries, objects = hungarian_match(
                logits[i], codes[i], labels, wanted, self.cls_weight, self.bbox_weight
            )
            targets[i, queries] = labels[objects]
            bbox = bbox + code_loss(codes[i, queries], wanted[objects], self.code_weights)
        positives = max(sum(len(labels) for labels in gt_labels), 1)
        cls = focal_loss(logits.flatten(0, 1), targets.flatten())
        return self.cls_weight * cls / positives, self.bbox_weight * bbox / positives

    def _denoising_loss(
        self, logits: Tensor, codes: Tensor, denoising: Denoising
    ) -> Tuple[Tensor, Tensor]:
        known = denoising.labels != IGNORED
        positive = known & (denoising.labels != self.num_classes)
        cls = focal_loss(logits[known], denoising.labels[known])
        bbox = code_loss(
            codes[positive], encode_boxes(denoising.boxes[positive]), self.code_weights
        )
        positives = positive.sum().clamp(min=1)
        return self.cls_weight * cls / positives, self.bbox_weight * bbox / positives

    def get_bboxes(self, outs: Dict[str, Any]) -> List[Dict[str, Tensor]]:
        """Per frame the best `max_boxes` of all (query, class) pairs by score: boxes, scores,
        labels."""
        results = []
        for logits, codes in zip(outs["logits"][-1], outs["codes"][-1]):
            scores, index = logits.sigmoid().flatten().topk(min(self.max_boxes, logits.numel()))
            results.append(
                {
                    "boxes": decode_boxes(codes)[index // self.num_classes],
                    "scores": scores,
                    "labels": index % self.num_classes,
                }
            )
        return results
