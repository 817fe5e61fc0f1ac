"""One rank of test_distributed_two_processes: a patched model in mmengine's
MMDistributedDataParallel."""

import gc
import os

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

import flashbias_patch
from tests import stand_ins

flashbias_patch.install()
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", rank=rank, world_size=2)
with stand_ins.repository("mmdet3d", openmmlab=False) as load:
    load("projects.PETR.petr.petr_transformer")
    from tests.integration.openmmlab import test_mmengine
    from tests.integration.openmmlab.helpers import answered, batches

    torch.manual_seed(0)
    wrapped = MMDistributedDataParallel(test_mmengine.Trainable(), broadcast_buffers=False)
    wrapped(batches(2)[rank], mode="loss")["loss"].backward()
    grads = {name: parameter.grad for name, parameter in wrapped.module.named_parameters()}
    torch.save(
        {"grads": grads, "answered": answered()}, os.path.join(os.environ["OUT"], f"rank{rank}.pt")
    )
del wrapped, grads
# DDP goes before its process group: gloo's threads outlive the interpreter otherwise, and torch
# 2.14 aborts
gc.collect()
dist.destroy_process_group()
