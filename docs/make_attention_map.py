"""Draw docs/images/attention-map.png: where the surest detection of the example looks, on the real
frame.

python docs/make_attention_map.py --frame ../shared/data/nuscenes_frame --steps 16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import flashbias_patch

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "examples" / "mini_cmt" / "tools"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--frame", required=True)
    parser.add_argument("--steps", type=int, default=16)
    own = parser.parse_args()
    flashbias_patch.install()
    sys.path.insert(0, str(TOOLS))
    import train
    from projects.mmdet3d_plugin.core.boxes import CLASS_NAMES
    from projects.mmdet3d_plugin.datasets.frame import CAMERAS

    args = train.parse_args(
        ["--frame", own.frame, "--steps", str(own.steps), "--no-cp", "--log-interval", "20"]
    )
    config, model = train.build(args)
    frames = train.load_frames(args)
    batch = train.make_batch(frames, **config["data"])
    train.train(args, config, model, batch, torch.device("cpu"), 0)
    model.eval()

    heads = {}
    head = model.pts_bbox_head
    handle = head.register_forward_hook(lambda module, inputs, out: heads.update(out))
    call = dict(
        points=batch["points"],
        img=batch["img"],
        img_metas=[{**meta, "drop": None} for meta in batch["img_metas"]],
    )
    with torch.no_grad():
        model(**call)
        scores = heads["logits"][-1][
            0
        ].sigmoid()  # (queries, classes) of the last layer, first frame
        query, label = divmod(int(scores.argmax()), scores.shape[1])
        with flashbias_patch.attention_map(model, queries=[query]) as maps:
            model(**call)
    handle.remove()
    last = [one for one in maps if one.kind == "cross"][-1]
    side, (width, height) = config["model"]["pts_backbone"]["grid"], config["data"]["image_size"]
    shades = batch["img"][0].float()
    low, high = shades.amin(), shades.amax()
    pictures = [
        ((image - low) / (high - low)).permute(1, 2, 0).flip(-1).numpy() for image in shades
    ]
    figure = flashbias_patch.maps.paint(
        last.weights[0].mean(0)[0],
        bev=(side, side),
        cameras=(len(CAMERAS), height // 16, width // 16),
        images=[np.ascontiguousarray(picture) for picture in pictures],
        names=[name[4:].lower() for name in CAMERAS],
        title=f"query {query}, {CLASS_NAMES[label]} ({float(scores.max()):.2f}), last layer, "
        f"mean of {len(last.heads)} heads",
    )
    target = ROOT / "docs" / "images" / "attention-map.png"
    figure.savefig(target, dpi=90)
    print("written:", target, "shares:", [axes.get_title() for axes in figure.axes])


if __name__ == "__main__":
    main()
