"""A bias as a tensor, and its dense tensor: whichever changes, gradients find both."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flashbias_patch import flash_bias_attention
from flashbias_patch.bias import LowRankBias, ModalityBias, described
from tests.patching.test_weights_elsewhere import Reversed
from tests.support import internals
from tests.support.capabilities import REENTRANT, RELEASE, since

M, N = 5, 7


def plain(q, k, v, mask):
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5 + mask
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v)


class Case:
    """One side of a comparison. Ways take it, use it, and return tensors to compare."""

    def __init__(self, ours):
        torch.manual_seed(0)
        self.a, self.b = (torch.randn(1, n, 1, 2).requires_grad_() for n in (M, N))
        self.weights = torch.randn(1, M, 2).requires_grad_()
        self.scale = torch.tensor(0.7, requires_grad=True)
        self.q = torch.randn(2, M, 2, 8).requires_grad_()
        self.k = torch.randn(2, N, 2, 8)
        self.compute = flash_bias_attention if ours else plain
        biases = ModalityBias(self.weights, (3, N - 3)), LowRankBias(self.a, self.b)
        self.mask, self.other = (
            described(bias, "mn") if ours else bias.dense()[0, 0].clone() for bias in biases
        )

    def attend(self, q, mask):
        return self.compute(q, self.k, self.k, mask)

    def reentrant(self, change=lambda mask: mask):
        return checkpoint(
            lambda q, m: self.attend(q, change(m)), self.q, self.mask, **REENTRANT
        ).sin()

    def leaf(self):
        self.mask = self.mask.detach().requires_grad_()
        return self.mask

    def results(self, way):
        found = way(self) or ()
        grads = [t.grad for t in (self.a, self.b, self.weights, self.scale, self.q)]
        return [*found, *grads]


def backward(loss):
    (loss * torch.linspace(-1, 1, loss.numel()).view(loss.shape)).sum().backward()


def leaf_in_a_function(c):
    mask = c.leaf()
    (c.attend(c.q, mask).sin().sum() + Reversed.apply(mask).square().sum()).backward()
    return [mask.grad]


def leaf_in_a_function_only(c):
    Reversed.apply(c.leaf()).square().sum().backward()
    return [c.mask.grad]


def leaf_in_a_reentrant_checkpoint(c):
    mask = c.leaf()
    with torch.no_grad():
        mask.mul_(2)
    backward(c.reentrant() + mask.square().sum())
    return [mask.grad]


def leaf_with_a_hook(c):
    mask = c.leaf()
    mask.register_hook(lambda grad: grad * 1.5)
    (c.attend(c.q, mask * 2).sin().sum() + Reversed.apply(mask).square().sum()).backward()
    return [mask.grad]


def leaf_whose_gradient_is_cleared(c):
    mask = c.leaf()
    c.attend(c.q, mask).sin().sum().backward()
    mask.grad = None
    c.attend(c.q, mask * 3).sin().sum().backward()
    return [mask.grad]


def leaf_that_is_frozen_for_a_while(c):
    mask = c.leaf()
    c.attend(c.q, mask).sin().sum().backward()
    mask.requires_grad_(False)
    frozen = c.attend(c.q, mask).sin()
    mask.requires_grad = True
    (frozen.sum() + c.attend(c.q, mask * 2).sin().sum()).backward()
    return [mask.grad]


def leaf_of_a_changed_bias(c):
    mask = c.mask.detach()
    mask[..., 0] = 1.0
    mask[:, 2:].mul_(3)
    mask.requires_grad_()
    (c.attend(c.q, mask).sin().sum() + Reversed.apply(mask).square().sum()).backward()
    return [mask.grad]


def leaf_of_a_bias_that_is_changed_afterwards(c):
    mask = c.mask.detach().requires_grad_()
    c.mask.mul_(c.scale)
    c.mask[..., 2:].zero_()
    (c.attend(c.q, c.mask + mask).sin().sum() + mask.square().sum()).backward()
    return [mask.grad]


def leaf_in_an_optimizer(c):
    mask = c.leaf()
    optimizer = torch.optim.AdamW([mask], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        c.attend(c.q, mask * c.scale).sin().sum().backward()
        optimizer.step()
    return [mask.detach() * 1, mask.grad]


def retained_gradient_that_is_cleared(c):
    c.mask.retain_grad()
    c.attend(c.q, c.mask).sin().sum().backward(retain_graph=True)
    c.mask.grad = None
    c.attend(c.q, c.mask * 3).sin().sum().backward()
    return [c.mask.grad]


def assigned_after_a_hook(c):
    c.mask.register_hook(lambda grad: grad * 1.5)
    c.mask[..., 1:3] = 0.25
    backward(c.attend(c.q, c.mask))


def scaled_in_place_after_a_hook(c):
    c.mask.register_hook(lambda grad: grad * 1.5)
    backward(c.attend(c.q, c.mask.mul_(c.scale)))


def view_changed_after_a_hook(c):
    c.mask.register_hook(lambda grad: grad * 1.5)
    c.mask[:2].mul_(c.scale)
    backward(c.attend(c.q, c.mask))


def hook_after_a_function(c):
    mask = c.mask = Reversed.apply(c.mask)
    mask.register_hook(lambda grad: grad * 1.5)
    mask.retain_grad()
    backward(c.reentrant())
    return [mask.grad]


def view_changed_before_a_reentrant_checkpoint(c):
    c.mask[..., 2:].zero_()
    backward(c.reentrant(lambda mask: mask * 2))


def view_changed_before_a_function(c):
    c.mask[..., 2:].zero_()
    c.mask[:2].mul_(c.scale)
    Reversed.apply(c.mask).square().sum().backward()


def view_of_a_view_changed(c):
    c.mask[..., 2:][:3].mul_(c.scale)
    c.mask.t()[1:].add_(c.other.t()[1:])
    (c.attend(c.q, c.mask).sin().sum() + Reversed.apply(c.mask).square().sum()).backward()


def view_of_a_constant_bias_changed(c):
    mask = c.mask.detach()
    mask[:2].mul_(c.scale)
    Reversed.apply(mask).square().sum().backward()


def view_changed_between_uses(c):
    mask = c.mask.add_(c.other, alpha=0.5)
    first = mask.sum() * 2
    mask[:2].mul_(c.scale)
    (first + Reversed.apply(mask).square().sum() + c.attend(c.q, mask).sin().sum()).backward()


WAYS = [value for name, value in list(globals().items()) if getattr(value, "__code__", None)]
WAYS = [way for way in WAYS if way.__code__.co_varnames[:1] == ("c",)]


@since(1, 11, "__torch_dispatch__")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_those_of_the_dense_tensor(way):
    if way is leaf_that_is_frozen_for_a_while and RELEASE < (2, 1):
        pytest.skip("there it is torch's error of a change in place")
    theirs, ours = Case(False).results(way), Case(True).results(way)
    assert any(each is not None for each in theirs)
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_leaf_cannot_be_changed_in_place():
    mask = Case(True).leaf()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        mask[..., 2:].zero_()


def test_a_bias_that_is_used_twice():
    """Its gradient counts each use once."""
    found = []
    for ours in (False, True):
        case = Case(ours)
        out = case.attend(case.q, case.mask - case.other - case.other)
        found.append(torch.autograd.grad(out.sin().sum(), case.other)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_strides_of_a_view_are_its_own():
    for view in (lambda mask: mask[..., 2:], lambda mask: mask[..., 2:].t(), lambda mask: mask[1:]):
        theirs, ours = view(Case(False).mask), view(Case(True).mask)
        assert ours.is_contiguous() == theirs.is_contiguous()
        assert ours.contiguous().view(-1).shape == theirs.contiguous().view(-1).shape
    assert Case(True).mask[..., 2:].stride() == (N, 1)


def test_views_of_a_lasting_bias_leave_nothing_behind():
    mask = Case(True).mask
    for _ in range(20):
        (mask[:2] + 1).sum()
        (mask[..., 2:] + 1).sum()
    assert len(internals.children_of(mask)) <= 2
