"""Attention weights have their gradients also where no torch function is called: in other
autograd Functions, checkpoints, scripted functions and DistributedDataParallel."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.patching.test_attention_weights import calling, gradients_by_backward, keeping, kept
from tests.patching.test_inner_attention import B, M, N, given_masks, outer, sequences
from tests.support.capabilities import REENTRANT, since

from .test_parity import assert_equal

# Before, C++ code cannot ask for the values of a tensor that has none yet.
pytestmark = since(1, 11, "__torch_dispatch__")


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


class Reversed(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x


class Unused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return y * 2

    @staticmethod
    def backward(ctx, grad):
        return None, grad * 2


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def hooked(w):
    module = Square()
    module.register_full_backward_hook(lambda module, g_in, g_out: (g_in[0] * 2,))
    return module(w)


def scripted(w):
    return torch.jit.script(_weighted)(w)


def _weighted(w):
    return (w * w).mean(0) + w.relu().sum(0)


def scripted_first(w):
    """Its values are computed in C++ first, where no graph is made."""
    return scripted(w).detach() + w.square().mean(0)


WAYS = {
    "reversal": Reversed.apply,
    "function": Squared.apply,
    "unused": lambda w: Unused.apply(w, w.exp()),
    "reentrant checkpoint": lambda w: checkpoint(torch.square, w, **REENTRANT),
    "checkpoint": lambda w: checkpoint(torch.square, w, use_reentrant=False),
    "scripted": scripted,
    "scripted first": scripted_first,
    "twice": lambda w: Squared.apply(w) + w.exp(),
    "full backward hook": hooked,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("mask", ["none", "learned", "both"])
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=since(1, 11, "use_reentrant")) if way == "checkpoint" else way
        for way in WAYS
    ],
)
def test_gradients_are_torchs(way, average, mask):
    options = {} if average else {"average_attn_weights": False}
    cls, original = outer(keeping(kept, **options))
    module, (query, key) = cls(), sequences()
    given = given_masks()[mask]
    leaves = [query, key, *(m for m in given.values() if m.requires_grad)]

    def gradients(forward):
        out = forward(query, key, key, **given)
        used = WAYS[way](module.kept)
        weight = torch.linspace(-1, 1, used.numel()).view(used.shape)
        total = (used * weight).sum() + out.square().mean()
        return [used.detach(), *gradients_by_backward(module, total, leaves)]

    theirs = gradients(lambda *a, **k: original(module, *a, **k))
    ours = gradients(module)
    assert_equal(ours, theirs)


def test_who_ignores_them_computes_none_in_the_backward_pass(monkeypatch):
    from flashbias_patch.attention import weights

    def fail(*args, **kwargs):
        raise AssertionError("computed")

    monkeypatch.setattr(weights, "attention_weights", fail)
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    out = module(query, key, key)
    Unused.apply(module.kept, out).sum().backward()
    assert query.grad is not None


def test_a_reentrant_checkpoint_computes_none_for_who_ignores_them(monkeypatch):
    from flashbias_patch.attention import weights

    calls, real = [], weights.attention_weights
    monkeypatch.setattr(
        weights, "attention_weights", lambda *a, **k: calls.append(1) or real(*a, **k)
    )

    def call(self, query, key, value, masks):
        out, _ = checkpoint(self.attn, query, key, value, **REENTRANT)
        return query + out

    cls, _ = outer(calling(call))
    module, (query, key) = cls(), sequences()
    module(query, key, key).sum().backward()
    assert not calls


def test_a_mask_changed_before_the_backward_pass_is_an_error():
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    mask = torch.zeros(M, N)
    module(query, key, key, attn_mask=mask)
    used = Squared.apply(module.kept)
    mask[0, 0] = 3.0
    with pytest.raises(RuntimeError, match="attn_mask was changed in place after the attention"):
        used.sum().backward()


class Returns(nn.Module):
    """A detector that returns its weights, so that its loss is computed outside."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.unused = attention, nn.Linear(2, 2)

    def forward(self, query, key):
        out = self.attention(query, key, key)
        return out, self.attention.kept


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    "options",
    [
        {"find_unused_parameters": True},
        pytest.param({"static_graph": True}, marks=since(1, 12, "static_graph")),
    ],
)
def test_data_parallel_passes_them_through_a_function(options):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        cls, original = outer(keeping(kept))
        torch.manual_seed(0)
        module, (query, key) = Returns(cls()), sequences()

        def gradients(net):
            out, weights = net(query, key)
            total = out.square().mean() + (weights * torch.linspace(-1, 1, N)).square().sum()
            total.backward()
            found = [query.grad, *(p.grad for p in module.attention.parameters())]
            query.grad, key.grad = None, None
            module.zero_grad(set_to_none=True)
            return [None if g is None else g.clone() for g in found]

        expected = gradients(module)
        net = nn.parallel.DistributedDataParallel(module, **options)
        assert_equal(gradients(net), expected)
        assert query.shape == (M, B, query.shape[-1])
    finally:
        torch.distributed.destroy_process_group()
