"""A repository with a generator of its own, both generations of attention: patched it trains as
unpatched, with windows."""

from __future__ import annotations

import gc
import logging
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import flashbias_patch
from flashbias_patch import telemetry
from flashbias_patch.bias import grids
from tests import stand_ins
from tests.support import internals

MODULE = f"{stand_ins.UTILS}.petr_transformer"
ATTENTIONS = ("PETRMultiheadAttention", "PETRMultiheadFlashAttention")
B, M, N, E = 2, 5, 36 + 24, 16


@pytest.fixture
def heads():
    """(unpatched Head, patched Head)"""
    flashbias_patch.uninstall()
    with stand_ins.repository("aqr") as load:
        plain = load(MODULE).Head
    with stand_ins.repository("aqr") as load:
        flashbias_patch.install()
        yield plain, load(MODULE).Head
        flashbias_patch.uninstall()


def inputs(seed=0, batch=B, grad=True):
    g = torch.Generator().manual_seed(seed)
    sequences = {
        name: torch.randn(batch, length, E, generator=g).requires_grad_(grad)
        for name, length in dict(query=M, memory=N, query_pos=M, memory_pos=N).items()
    }
    places = torch.stack([torch.randint(0, n, (batch, M), generator=g) for n in (2, 3, 4)], -1)
    return dict(
        sequences,
        bev_indices=torch.randint(0, 36, (batch, M), generator=g).float(),
        camera_indices=places,
    )


def make(cls, attention, with_cp, **options):
    torch.manual_seed(0)
    return cls(attention, with_cp, **options).train()


def gradients(head, given):
    out = head(**given)
    wanted = {
        **{n: t for n, t in given.items() if t.requires_grad},
        **dict(head.named_parameters()),
    }
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    found = {name: tensor.grad for name, tensor in wanted.items()}
    for tensor in wanted.values():
        tensor.grad = None
    return out.detach(), found


def loss_of(out):
    return (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(9))).pow(2).sum()


def became_dense(caplog):
    return [r.getMessage() for r in caplog.records if "became dense" in r.getMessage()]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("with_cp", (False, True))
@pytest.mark.parametrize("options", (
    {}, dict(window_size=4, use_gaussian_window=True), dict(use_local_bias=False), dict(fp16=True),
    dict(learnable_scale=False), dict(init_scale=0.2),
), ids=str)  # fmt: skip
def test_gradients_are_the_unpatched_ones(heads, attention, with_cp, options, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    windows = []
    dense_bias = grids.dense_bias
    monkeypatch.setattr(grids, "dense_bias", lambda parts: windows.append(1) or dense_bias(parts))
    if attention == "PETRMultiheadFlashAttention" and options.get("fp16"):
        pytest.skip("torch's SDPA refuses a half mask with float32 sequences")
    plain, patched = (make(cls, attention, with_cp, **options) for cls in heads)
    out, found = gradients(patched, inputs())
    exact, true = gradients(plain, inputs())
    near = dict(rtol=2e-3, atol=2e-3) if options.get("fp16") else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, exact, **near)
    for name, grad in true.items():
        if grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(
                found[name], grad, msg=lambda text, name=name: f"{name}: {text}", **near
            )
    assert not became_dense(caplog), became_dense(caplog)
    assert telemetry.calls["original"] == 0
    if options.get("use_local_bias", True):
        assert windows  # windows reached a backend as windows


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("with_cp", (False, True))
def test_training_is_the_unpatched_training(heads, attention, with_cp, caplog):
    caplog.set_level(logging.INFO)
    losses, scales = [], []
    for cls in heads:
        head = make(cls, attention, with_cp)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.02)
        ran = []
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(head(**inputs(step, grad=False)))
            loss.backward()
            optimizer.step()
            ran.append(loss.item())
        losses.append(ran)
        scales.append(head.attention_bias_generator.bias_scale.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and scales[0] == pytest.approx(
        scales[1], rel=1e-5
    )
    assert abs(scales[1] - 2.5) > 1e-3 and not became_dense(caplog)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_evaluation_and_one_sample(heads, attention):
    plain, patched = (make(cls, attention, True).eval() for cls in heads)
    with torch.no_grad():
        for batch in (1, 3):
            given = inputs(batch, batch)
            torch.testing.assert_close(patched(**given), plain(**given), rtol=1e-4, atol=1e-5)


def test_dense_biases_length_first_are_understood(heads, monkeypatch):
    """A generator that is left alone: its (M, B, N) reaches both generations."""
    internals.leave_generators_alone(monkeypatch)
    for attention in ATTENTIONS:
        plain, patched = (make(cls, attention, False) for cls in heads)
        out, found = gradients(patched, inputs())
        exact, true = gradients(plain, inputs())
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
        name = "attention_bias_generator.bias_scale"
        torch.testing.assert_close(found[name], true[name], rtol=1e-4, atol=1e-5)


def test_dropout_reaches_the_later_generation(heads):
    _, patched = heads
    head = make(patched, "PETRMultiheadFlashAttention", False)
    for layer in head.layers:
        layer.attentions[1].attn.dropout = 0.5
    first, second = head(**inputs()), head(**inputs())
    assert not torch.equal(first, second)
    head.eval()
    assert torch.equal(head(**inputs()), head(**inputs()))


def test_both_names_of_the_later_generation(heads):
    plain, patched = (
        make(cls, "PETRMultiheadFlashAttention", False).layers[0].attentions[1].attn
        for cls in heads
    )
    q, k = torch.randn(B, M, E), torch.randn(B, N, E)
    bias = torch.randn(B, M, N)
    for core in (plain, patched):
        core.load_state_dict(plain.state_dict())
    for names in (("query", "key", "value"), ("q", "k", "v")):
        given = dict(zip(names, (q, k, k)))
        for more in (
            {},
            dict(attn_bias=bias),
            dict(attn_mask=bias),
            dict(attn_mask=bias, attn_bias=bias),
            dict(attn_bias=torch.randn(B * 2, M, N)),
            dict(attn_bias=bias.transpose(0, 1)),
        ):
            ours, theirs = patched(**given, **more), plain(**given, **more)
            assert type(ours) is tuple and ours[1] is None
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(patched(q, k, k)[0], plain(q, k, k)[0], rtol=1e-4, atol=1e-5)
    assert telemetry.calls["original"] == 0


def test_a_fork_of_the_later_generation_that_does_something_else(heads):
    plain, _ = heads
    flashbias_patch.uninstall()
    base = type(make(plain, "PETRMultiheadFlashAttention", False).layers[0].attentions[1].attn)

    class FlashMHA(base):
        def forward(self, query=None, key=None, value=None, q=None, k=None, v=None, attn_mask=None,
                    key_padding_mask=None, attn_bias=None, **kwargs):  # fmt: skip
            out, _ = base.forward(
                self, query, key, value, q, k, v, attn_mask, key_padding_mask, attn_bias
            )
            return out * 2, None

    from flashbias_patch.patching import install

    flashbias_patch.install()
    assert install.claim(FlashMHA)
    core, x = FlashMHA(E, 2), torch.randn(B, M, E)
    torch.testing.assert_close(core(x, x, x)[0], base.forward(core, x, x, x)[0] * 2)
    assert telemetry.calls["original"] == 1


# -- two processes ---------------------------------------------------------------------------------


def train(rank, port, folder, patch):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    with stand_ins.repository("aqr") as load:
        if patch:
            flashbias_patch.install()
        cls = load(MODULE).Head
        for attention in ATTENTIONS:
            model = DistributedDataParallel(make(cls, attention, True))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            for step in range(3):
                optimizer.zero_grad()
                loss_of(model(**inputs(10 * rank + step, grad=False))).backward()
                optimizer.step()
            found[attention] = {
                name: p.detach().clone() for name, p in model.module.named_parameters()
            }
            del model, optimizer
    torch.save(found, os.path.join(folder, f"{patch}{rank}.pt"))
    # DDP goes before its process group: gloo's threads outlive the interpreter otherwise, and it
    # aborts
    gc.collect()
    dist.destroy_process_group()


def test_two_processes_train_as_unpatched(tmp_path):
    for patch in (False, True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(train, (port, str(tmp_path), patch), nprocs=2)
    plain, first, second = (
        torch.load(str(tmp_path / f"{name}.pt")) for name in ("False0", "True0", "True1")
    )
    for attention in ATTENTIONS:
        for name, parameter in first[attention].items():
            assert torch.equal(parameter, second[attention][name])
            torch.testing.assert_close(parameter, plain[attention][name], rtol=1e-4, atol=1e-5)
        assert abs(first[attention]["attention_bias_generator.bias_scale"] - 2.5) > 1e-4
