# A CMT config with a router of local windows: put it in projects/configs/fusion/ of a CMT checkout
# and train it as any other, after `import flashbias_patch` (sitecustomize, or `flashbias run python
# tools/train.py ...`).
_base_ = ["./cmt_voxel0100_r50_800x320_cbgs.py"]

model = dict(
    pts_bbox_head=dict(
        transformer=dict(
            aqr=dict(
                enable=True,
                bias="window",
                window=8,  # cells of the 20 x 50 of each camera
                lidar_window=8,  # cells of the 128 x 128 of the BEV grid
                gaussian=False,  # or sigma in cells
                # the first camera that sees the query; "all": each that does
                camera_windows="first",
                init_bias_scale=2.5,
                min_scale=0.5,  # bias_scale is clamped to these bounds ...
                max_scale=5.0,  # ... so that scores change by no more than 5
            )
        )
    )
)

# Weight decay would pull bias_scale below min_scale, and a single number may move faster than a
# matrix.
optimizer = dict(
    paramwise_cfg=dict(custom_keys={"aqr.bias_scale": dict(lr_mult=10.0, decay_mult=0.0)})
)
custom_hooks = [dict(type="BiasScaleMonitorHook", interval=50, patience=200)]
