"""The detector: two backbones and the head."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from ...registry import BACKBONES, DETECTORS, HEADS


@DETECTORS.register_module()
class CmtDetector(nn.Module):
    """Lidar and cameras in, boxes out.

    A frame's meta may say ``drop``: "lidar" or "camera". The features of that sensor are zeros
    then; its tokens and their positions stay.
    """

    def __init__(
        self,
        img_backbone: Dict[str, Any],
        pts_backbone: Dict[str, Any],
        pts_bbox_head: Dict[str, Any],
    ) -> None:
        super().__init__()
        self.img_backbone = BACKBONES.build(img_backbone)
        self.pts_backbone = BACKBONES.build(pts_backbone)
        self.pts_bbox_head = HEADS.build(pts_bbox_head)

    def forward(
        self,
        points: List[Tensor],
        img: Tensor,
        img_metas: List[Dict[str, Any]],
        gt_bboxes_3d: Optional[List[Tensor]] = None,
        gt_labels_3d: Optional[List[Tensor]] = None,
    ) -> Any:
        """A dict of losses when training, else a list of dicts: boxes (n, 9), scores (n,), labels
        (n,)."""
        x_img = self.img_backbone(img.flatten(0, 1))
        x = self.pts_backbone(points)
        drops = [meta.get("drop") for meta in img_metas]
        if any(drops):
            keep_lidar = x.new_tensor([drop != "lidar" for drop in drops])
            keep_camera = x.new_tensor([drop != "camera" for drop in drops]).repeat_interleave(
                img.shape[1]
            )
            x = x * keep_lidar[:, None, None, None]
            x_img = x_img * keep_camera[:, None, None, None]
        if self.training:
            outs = self.pts_bbox_head(x, x_img, img_metas, gt_bboxes_3d, gt_labels_3d)
            return self.pts_bbox_head.loss(outs, gt_bboxes_3d, gt_labels_3d)
        with torch.no_grad():
            return self.pts_bbox_head.get_bboxes(self.pts_bbox_head(x, x_img, img_metas))
