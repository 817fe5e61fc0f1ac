"""mini_cmt with a learned window bias: each query favours the BEV cells around the one that its
position is most like.

    flashbias run -- python examples/window_bias/train.py --steps 50
    flashbias ab -- python examples/window_bias/train.py --steps 40 --dropout 0 --no-cp

The whole recipe for a bias of one's own: a parameter, its learning rate, a monitor, and what
happens unpatched. Options are those of mini_cmt's tools/train.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flashbias_patch
from flashbias_patch.bias import AttentionBias, Grid, WindowBias

MINI_CMT = Path(__file__).resolve().parents[1] / "mini_cmt"
sys.path[:0] = [str(MINI_CMT / "tools"), str(MINI_CMT)]
import train  # noqa: E402  (mini_cmt's tools/train.py)
from projects.mmdet3d_plugin.models.utils.petr_transformer import CmtTransformer  # noqa: E402
from projects.mmdet3d_plugin.registry import TRANSFORMER  # noqa: E402

OPTIONS = [
    "model.pts_bbox_head.transformer.type=WindowTransformer",
    "optimizer.lr_mult.bias_scale=10.0",
]  # a learning rate of its own: ten times that of the weights


# [start: docs/quickstart.md]
@TRANSFORMER.register_module()
class WindowTransformer(CmtTransformer):
    """CmtTransformer with a bias: `bias_scale` per head times a weight per query, on 7 x 7 BEV
    cells."""

    def __init__(self, decoder: Any, heads: int = 8) -> None:
        super().__init__(decoder)
        self.gate = nn.Linear(self.embed_dims, 1)  # the weight of each query
        self.bias_scale = nn.Parameter(torch.full((heads,), 0.5))
        self.patched = bool(flashbias_patch.status()["patched"])

    def window_bias(
        self, x: Tensor, x_img: Tensor, query_embed: Tensor, bev_pos_embed: Tensor
    ) -> AttentionBias:
        """x (B, C, h, w), x_img (B*V, C, h', w'), query_embed (B, M, C), bev_pos_embed (h*w, C)."""
        frames = [
            Grid(*x.shape[2:]),
            Grid(*x_img.shape[2:], views=len(x_img) // len(x)),
        ]  # in the order of the keys
        cell = (query_embed.detach() @ bev_pos_embed.detach().T).argmax(-1)  # (B, M)
        bev = torch.stack(
            [cell * 0, cell // x.shape[3], cell % x.shape[3]], dim=-1
        )  # view, row, column
        centres = torch.stack([bev, bev * 0], dim=2)  # (B, M, S, 3), S = 2 frames
        visible = torch.tensor([True, False], device=cell.device).expand(
            *cell.shape, 2
        )  # no window in the cameras
        weights = torch.tanh(self.gate(query_embed)).expand(-1, -1, 2)  # (B, M, S)
        return WindowBias(weights, centres, frames, side=7, visible=visible) * self.bias_scale

    def forward(
        self,
        x: Tensor,
        x_img: Tensor,
        query_embed: Tensor,
        bev_pos_embed: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        bias = self.window_bias(x, x_img, query_embed, bev_pos_embed)
        if self.patched:
            with flashbias_patch.attention_bias(bias, kind="cross"):
                return super().forward(x, x_img, query_embed, bev_pos_embed, *args, **kwargs)
        # Unpatched, no class adds the bias: pass it as a dense mask, (B*H, M, N). Only without
        # checkpointing, which loses the gradient of a tensor in a list of masks.
        dense = bias.dense().flatten(0, 1)
        handles = [
            layer.attentions[1].register_forward_pre_hook(
                lambda module, arguments, keywords: (arguments, {**keywords, "attn_mask": dense}),
                with_kwargs=True,
            )
            for layer in self.decoder.layers
        ]
        try:
            return super().forward(x, x_img, query_embed, bev_pos_embed, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


# [end: docs/quickstart.md]


def main() -> None:
    if "--cfg-options" not in sys.argv:
        sys.argv.append("--cfg-options")
    first = sys.argv.index("--cfg-options") + 1
    sys.argv[first:first] = OPTIONS
    train.main()


if __name__ == "__main__":
    main()
