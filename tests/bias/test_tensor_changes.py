"""A bias as a tensor, whose memory is changed through a view or whose gradient passes through
another autograd.Function: attention computes what the dense tensor says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flashbias_patch import flash_bias_attention
from flashbias_patch.bias import BiasTensor
from tests.bias.test_tensor import EXACT, F64, B, H, M, Made, N, generator
from tests.support.capabilities import REENTRANT, since

D = 8
needs_dispatch = since(1, 10, "dispatch to tensor subclasses below Python")


def spread(bias):
    return bias.unsqueeze(1).expand(B, H, M, N)


def attended(bias):
    q, k, v = (
        torch.randn(B, length, H, D, generator=generator(length), dtype=F64) for length in (M, N, N)
    )
    return flash_bias_attention(q, k, v, spread(bias))


def same(made, ours, theirs):
    """Outputs, and gradients of the weights and the scale."""
    torch.testing.assert_close(ours, theirs, **EXACT)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=F64).view_as(ours)
    found = []
    for out in (ours, theirs):
        (out * weights).sum().backward()
        found.append([leaf.grad for leaf in made.leaves])
        for leaf in made.leaves:
            leaf.grad = None
    assert found[1][0] is not None
    for mine, true in zip(*found):
        assert (mine is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(mine, true, **EXACT)


def numpy_(t):
    t.detach().numpy()[..., N // 2 :] = 0.0


def spread_first(t):
    """What was made before shares no memory, and keeps the old value."""
    heads = t.unsqueeze(1).expand(B, H, M, N).reshape(B * H, M, N)
    heads[0].mul_(2.0)
    return heads.view(B, H, M, N)


def copied_before(t):
    double = t * 2.0
    with torch.no_grad():
        t[..., 3:].mul_(5.0)
    return double


CHANGES = {
    "slice": lambda t: t[..., N // 2 :].zero_(),
    "row": lambda t: t[:, :, 3].fill_(-3.0),
    "narrow": lambda t: t.narrow(2, 4, 9).mul_(3.0),
    "element by element": lambda t: t[0][1][2:9].add_(4.0),
    "as_strided": lambda t: t.as_strided((N,), (1,)).zero_(),
    "diagonal": lambda t: t.diagonal(0, 1, 2).zero_(),
    "flattened": lambda t: t.view(B, -1)[:, 7:30].mul_(2.0),
    "turned": lambda t: t.transpose(1, 2)[:, 2:5].mul_(2.0),
    "detached": lambda t: t.detach()[..., 5:].mul_(2.0),
    "data": lambda t: t.data[..., 5:].mul_(2.0),
    "numpy": numpy_,
    "in place": lambda t: t.mul_(2.0),
    "clamped": lambda t: t.clamp_(-0.5, 0.5),
    "negated": lambda t: t.neg_(),
    "a head of heads": spread_first,
    "copied before": copied_before,
}
WITHOUT_GRAPH = ("detached", "data", "numpy", "copied before")


@pytest.mark.parametrize("grad", [True, False], ids=["graph", "no_grad"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["window", "modality"])
def test_changes_of_its_memory(kind, change, grad):
    made = Made(kind)
    results = []
    for bias in (made.tensor * made.scale, made.dense * made.scale):
        with torch.set_grad_enabled(grad or change in WITHOUT_GRAPH):
            made_of = CHANGES[change](bias)
        bias = made_of if change in ("a head of heads", "copied before") else bias
        if change == "a head of heads" and not grad:
            return  # computed without a graph: nothing learns
        again = bias * 1.0
        out = flash_bias_attention(*sequences(), bias if bias.dim() == 4 else spread(bias))
        results.append((out, again))
    (ours, again), (theirs, exact) = results
    same(made, ours, theirs)
    torch.testing.assert_close(
        again.numbers() if type(again) is BiasTensor else again, exact, **EXACT
    )


def sequences():
    return (
        torch.randn(B, length, H, D, generator=generator(length), dtype=F64) for length in (M, N, N)
    )


def test_changes_in_inference_mode():
    made = Made("window")
    results = []
    with torch.inference_mode():
        for bias in (made.tensor.detach() * 1.0, made.dense.detach() * 1.0):
            bias[..., N // 2 :].zero_()
            results.append(attended(bias))
    torch.testing.assert_close(*results, **EXACT)


class Unchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Reversed(torch.autograd.Function):
    """Gradient reversal: forward twice the value, backward the other sign."""

    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, grad):
        return -3.0 * grad


USES = {
    "attended": attended,
    "scaled, attended": lambda t: attended(t * 1.5),
    "dense": lambda t: t.sin(),
    "twice": lambda t: attended(t) + attended(t.transpose(1, 2).contiguous().transpose(1, 2)),
}


@needs_dispatch
@pytest.mark.parametrize("function", [Unchanged, Reversed])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["window", "low rank"])
def test_gradients_pass_through_another_function(kind, use, function):
    made = Made(kind)
    same(
        made, *(USES[use](function.apply(bias * made.scale)) for bias in (made.tensor, made.dense))
    )


class Attends(nn.Module):
    def forward(self, bias):
        return attended(bias)


@needs_dispatch
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("kind", ["window", "modality"])
def test_full_backward_hooks(kind, hook):
    """They pass the arguments of a module through an autograd.Function."""
    module, made, seen = Attends(), Made(kind), []
    if not hasattr(module, hook):
        pytest.skip(f"this torch has no {hook}")
    getattr(module, hook)(lambda *given: seen.append(len(given)))
    same(made, *(module(bias * made.scale) for bias in (made.tensor, made.dense)))
    assert seen


@needs_dispatch
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("kind", ["window", "modality"])
def test_a_reentrant_checkpoint_in_another(kind, outside):
    """Around a layer, and around the decoder that holds it."""

    def inner(bias):
        return checkpoint(lambda t: attended(t * 2.0), bias, **REENTRANT)

    made = Made(kind)
    results = []
    for bias in (made.tensor * made.scale, made.dense * made.scale):
        results.append(checkpoint(inner, bias, **REENTRANT) if outside else inner(bias))
    same(made, *results)
