# A CMT config with a router: put it in projects/configs/fusion/ of a CMT checkout and train it as
# any other, after `import flashbias_patch` (sitecustomize, or `flashbias run python tools/train.py
# ...`). No file of CMT is edited.
_base_ = ["./cmt_voxel0100_r50_800x320_cbgs.py"]

model = dict(
    pts_bbox_head=dict(
        transformer=dict(
            aqr=dict(
                enable=True,
                per="head",  # one bias_scale a head; "scalar", "layer"
                init_bias_scale=1.0,
                cameras=1,  # all cameras as one segment; 6: one each
                # True: subtract squared distances around the query's reference point
                locality=False,
                drop=0.2,  # zero lidar or cameras for a fifth of the samples ...
                supervision=0.1,  # ... and teach the router which is left: adds loss_aqr
            )
        )
    )
)

# Weight decay would pull bias_scale to 0, and a single number may move faster than a matrix.
optimizer = dict(
    paramwise_cfg=dict(custom_keys={"aqr.bias_scale": dict(lr_mult=10.0, decay_mult=0.0)})
)
custom_hooks = [dict(type="BiasScaleMonitorHook", interval=50, patience=200)]
