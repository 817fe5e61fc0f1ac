"""Training machinery around a patched layer with a learned bias."""

from __future__ import annotations

import gc
import os
import tempfile
import warnings

import pytest
import torch
from torch import nn

import flashbias_patch
from tests.support.capabilities import RELEASE, needs_compile, since
from tests.support.mini_cmt import MINI_CMT, MODULE

from .test_bias_ways import (
    B,
    BiasModule,
    assert_same,
    decoder_of,
    gradients,
    inputs,
    reference,
    run_biased,
)


class Model(nn.Module):
    """A decoder and the module that makes its bias, as one model; `slice_` is this rank's part of
    the batch."""

    def __init__(self, module, with_cp, attention="PETRMultiheadAttention"):
        super().__init__()
        self.decoder = decoder_of(module, attention, with_cp)
        self.maker = BiasModule()
        self.unused = nn.Linear(2, 2)

    def forward(self, tensors, slice_=slice(None), way="ambient"):
        maker = self.maker
        bias = flashbias_patch.bias.LowRankBias(maker.a[slice_] * maker.bias_scale, maker.b[slice_])
        if way == "ambient":
            with flashbias_patch.attention_bias(bias):
                return self.decoder(**tensors)
        return self.decoder(**tensors, attn_masks=[None, bias])


def gradients_of(model, out):
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    out.backward(grad)
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_gradient_accumulation(patched):
    model = Model(patched, with_cp=True)
    once = gradients_of(model, model(inputs(True)))
    twice = gradients_of(model, model(inputs(True)))
    for name, grad in once.items():
        if grad is not None:
            torch.testing.assert_close(twice[name], grad * 2, rtol=1e-4, atol=1e-5)


def test_eval_and_no_grad(patched):
    model, tensors = Model(patched, with_cp=True), inputs(False)
    expected = model(tensors).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(tensors), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.eval()(tensors), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(model(tensors).clone(), expected, rtol=1e-4, atol=1e-5)


@since(1, 10, "autocast on the CPU")
@pytest.mark.parametrize("with_cp", [False, True])
def test_autocast(repository, with_cp):
    """bfloat16 autocast: the gradient of bias_scale is the dense float64 one, to that precision."""
    truth = reference(repository, False)
    flashbias_patch.install()
    decoder, maker, tensors = (
        decoder_of(repository(), "PETRMultiheadAttention", with_cp),
        BiasModule(),
        inputs(False),
    )
    rtol = 0.05 if RELEASE >= (2, 0) else 0.07  # plain PyTorch errs by 0.011 and, before 2.0, 0.020
    with torch.autocast("cpu", torch.bfloat16):
        out = run_biased(decoder, maker, tensors, "ambient", True)
    found = gradients(decoder, maker, tensors, out.float())
    assert_same(
        {k: found[k] for k in ("out", "bias_scale")},
        {k: truth[k] for k in ("out", "bias_scale")},
        rtol,
    )


@pytest.mark.skipif(
    not hasattr(getattr(torch, "amp", None), "GradScaler"),
    reason="torch.amp.GradScaler came with torch 2.3",
)
def test_grad_scaler(patched):
    model = Model(patched, with_cp=True)
    plain = gradients_of(model, model(inputs(False)))
    model.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    out = model(inputs(False))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    scaler.scale((out * grad).sum()).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad / 1024, plain[name], rtol=1e-3, atol=1e-5)


@needs_compile
def test_compiled_with_a_bias(patched):
    """A compiled decoder: right results; the graph breaks are where the routes open."""
    torch._dynamo.reset()
    model, tensors = Model(patched, with_cp=False), inputs(False)
    expected = gradients_of(model, model(tensors))
    model.zero_grad()
    flashbias_patch.telemetry.reset()
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients_of(model, compiled(tensors))
    assert sum(flashbias_patch.status()["calls"].values()) == 4, (
        "the compiled decoder ran unpatched"
    )
    assert_same(found, expected, rtol=1e-4)


DDP_CASES = [  # (find_unused_parameters, static_graph, with_cp, way)
    (False, False, True, "ambient"),
    (True, False, True, "attn_masks"),
    (True, False, False, "ambient"),
    (False, True, True, "ambient"),
]
if RELEASE < (1, 11):  # reentrant checkpoints only, which do not go with find_unused_parameters
    DDP_CASES = [case for case in DDP_CASES if not (case[0] and case[2])]


def ddp_worker(rank, port, folder):
    import importlib
    import sys

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    flashbias_patch.install()
    sys.path.insert(0, str(MINI_CMT))
    module = importlib.import_module(MODULE)
    part = slice(rank, rank + 1)
    tensors = {k: v.detach()[:, part] for k, v in inputs(False).items()}
    for i, (find_unused, static, with_cp, way) in enumerate(DDP_CASES):
        model = Model(module, with_cp)
        if not find_unused:
            del model.unused
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
        if static:
            ddp._set_static_graph()
        grads = None
        for _ in range(2):
            ddp.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = ddp(tensors, part, way)
            layers, queries, _, channels = out.shape
            whole = torch.randn(
                (layers, queries, B, channels), generator=torch.Generator().manual_seed(5)
            )
            (out * whole[:, :, part]).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if rank == 0:
            torch.save(grads, os.path.join(folder, f"{i}.pt"))
    del model, ddp, out, grads
    # DDP goes before its process group: gloo's threads outlive the interpreter otherwise, and it
    # aborts
    gc.collect()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(patched):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ddp_worker, (port, folder), nprocs=2)
        for i, (_, _, with_cp, way) in enumerate(DDP_CASES):
            model = Model(patched, with_cp)
            expected = gradients_of(model, model(inputs(False), way=way))
            found = torch.load(os.path.join(folder, f"{i}.pt"))
            assert found["maker.bias_scale"].abs() > 1e-3
            for name, grad in found.items():
                if expected[name] is not None:  # DDP averages over the two ranks
                    torch.testing.assert_close(grad * 2, expected[name], rtol=1e-3, atol=1e-4)
