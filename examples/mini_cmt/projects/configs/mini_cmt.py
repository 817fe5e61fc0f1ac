"""The configuration as a dict, small by default; `cmt` has the shapes of the real thing."""

from __future__ import annotations

import ast
from typing import Any, Dict, Sequence, Tuple

PC_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)

# preset: what the command line leaves open
PRESETS: Dict[str, Dict[str, Any]] = {
    "mini": dict(image_size=(288, 128), bev=32, queries=200, layers=3, embed_dims=256, dn_groups=3),
    "cmt": dict(
        image_size=(800, 320), bev=128, queries=900, layers=6, embed_dims=256, dn_groups=10
    ),
}


def make_config(
    attn: str,
    with_cp: bool,
    dropout: float,
    image_size: Tuple[int, int],
    bev: int,
    queries: int,
    layers: int,
    embed_dims: int,
    dn_groups: int,
    lr: float,
) -> Dict[str, Any]:
    """Everything that is built, as nested dicts with `type`."""
    layer = dict(
        type="PETRTransformerDecoderLayer",
        with_cp=with_cp,
        feedforward_channels=4 * embed_dims,
        ffn_dropout=dropout,
        attn_cfgs=[
            dict(type="MultiheadAttention", embed_dims=embed_dims, num_heads=8, dropout=dropout),
            dict(type=attn, embed_dims=embed_dims, num_heads=8, dropout=dropout),
        ],
    )
    return dict(
        model=dict(
            type="CmtDetector",
            img_backbone=dict(type="ImageNet", out_channels=embed_dims),
            pts_backbone=dict(
                type="PillarNet", out_channels=embed_dims, grid=bev, pc_range=PC_RANGE
            ),
            pts_bbox_head=dict(
                type="CmtHead",
                pc_range=PC_RANGE,
                num_query=queries,
                num_layers=layers,
                dn_groups=dn_groups,
                transformer=dict(
                    type="CmtTransformer",
                    decoder=dict(
                        type="PETRTransformerDecoder",
                        return_intermediate=True,
                        num_layers=layers,
                        transformerlayers=layer,
                    ),
                ),
            ),
        ),
        data=dict(image_size=image_size, pc_range=PC_RANGE),
        # A reference point of its own must travel metres; the weights need not.
        optimizer=dict(
            lr=lr, weight_decay=0.01, lr_mult=dict(reference_points=20.0), warmup=20, max_norm=35.0
        ),
    )


def override(config: Dict[str, Any], options: Sequence[str]) -> None:
    """Apply ``a.b.0.c=value`` in place.

    Missing dicts are made, numbers index lists, a value is a Python literal or else text.
    """
    for option in options:
        path, separator, text = option.partition("=")
        if not separator:
            raise ValueError(f"--cfg-options takes key=value, got {option!r}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        *parents, last = path.split(".")
        node: Any = config
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[int(last) if isinstance(node, list) else last] = value
