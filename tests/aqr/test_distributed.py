"""Two processes (gloo): one batch without images, and the router is no unused parameter."""

from __future__ import annotations

import gc
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from . import family

OPTIONS = ({}, dict(bias="window", window=3, camera_windows="all"))


def train(rank, port, folder, options):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    import flashbias_patch
    from flashbias_patch import aqr
    from flashbias_patch.monitor import ParameterMonitor
    from flashbias_patch.patching import install

    flashbias_patch.install()
    assert all(install.claim(cls) for cls in family.CLASSES)
    torch.manual_seed(rank)  # DDP makes the parameters one
    module = family.CmtTransformer(aqr=dict(enable=True, **options))
    model = DistributedDataParallel(
        module
    )  # find_unused_parameters=False: an unused one raises in the next step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ParameterMonitor(
        model, optimizer=optimizer, jsonl=os.path.join(folder, f"{rank}.jsonl")
    )
    given, _, _ = family.inputs("CmtTransformer", seed=rank)
    reference, metas = family.geometry(seed=rank)
    matrices = torch.stack([torch.as_tensor(matrix) for matrix in metas[0]["lidar2img"]]).expand(
        family.B, -1, -1, -1
    )
    for step in range(3):
        images = given["x_img"] if (step + rank) % 2 else None
        optimizer.zero_grad()
        aqr.provide_geometry(reference, (-10, -10, -2, 10, 10, 2), matrices, (20, 30))
        model(**{**given, "x_img": images})[0].pow(2).sum().backward()
        assert all(p.grad is not None for p in module.aqr.parameters())
        optimizer.step()
        monitor.update()
    monitor.close()
    torch.save(
        {n: p.detach() for n, p in module.aqr.named_parameters()},
        os.path.join(folder, f"{rank}.pt"),
    )
    del model, module, optimizer, monitor
    # DDP goes before its process group: gloo's threads outlive the interpreter otherwise, and it
    # aborts
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_without_images_under_ddp(tmp_path, options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train, (port, str(tmp_path), options), nprocs=2)
    first, second = (torch.load(str(tmp_path / f"{rank}.pt")) for rank in (0, 1))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["bias_scale"] != (2.5 if options else 1.0)
    assert (tmp_path / "0.jsonl").exists() and not (tmp_path / "1.jsonl").exists()
