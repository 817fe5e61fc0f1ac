#!/bin/sh
# mini_cmt with a router, by overrides alone; run in examples/mini_cmt. Arguments go on to tools/train.py.
exec flashbias run python tools/train.py "$@" --cfg-options \
    model.pts_bbox_head.transformer.aqr.enable=True \
    model.pts_bbox_head.transformer.aqr.drop=0.5 \
    model.pts_bbox_head.transformer.aqr.supervision=1.0 \
    optimizer.lr_mult.bias_scale=10.0
