"""One rank of test_distributed_two_processes: a patched model in mmcv's
MMDistributedDataParallel."""

import gc
import os

import torch
import torch.distributed as dist
from mmcv.parallel import MMDistributedDataParallel
from mmcv.utils import build_from_cfg

import flashbias_patch
from tests import stand_ins

flashbias_patch.install()
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)
with stand_ins.repository("cmt", openmmlab=False) as load:
    load(stand_ins.UTILS + ".petr_transformer")
    from mmcv.cnn.bricks.registry import TRANSFORMER_LAYER

    from tests.integration.openmmlab import test_mmcv1
    from tests.integration.openmmlab.helpers import answered, batches

    torch.manual_seed(0)
    model = test_mmcv1.Trainable(
        build_from_cfg(test_mmcv1.layer_config(with_cp=False), TRANSFORMER_LAYER)
    )
    wrapped = MMDistributedDataParallel(model, broadcast_buffers=False)
    wrapped.train_step(batches(2)[rank], None)["loss"].backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save(
        {"grads": grads, "answered": answered()}, os.path.join(os.environ["OUT"], f"rank{rank}.pt")
    )
del wrapped, model, grads
# DDP goes before its process group: gloo's threads outlive the interpreter otherwise, and torch
# 2.14 aborts
gc.collect()
dist.destroy_process_group()
