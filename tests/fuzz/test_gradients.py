"""Small networks of patched attention, described biases, attention weights and checkpoints: every
gradient that torch.autograd.grad can give is that of the unpatched network with dense tensors."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from flashbias_patch.bias import LowRankBias, described
from tests.patching.test_attention_weights import keeping, kept
from tests.patching.test_inner_attention import B, H, M, N, outer, sequences
from tests.patching.test_parity import assert_equal
from tests.patching.test_weights_elsewhere import Reversed, Squared
from tests.patching.test_weights_in_graph import USES
from tests.support.capabilities import since

pytestmark = since(2, 2, "GradientEdge")
PER_TEST = int(os.environ.get("FLASHBIAS_SEQUENCES", "0")) or 40
OPERATIONS = {
    "scaled": lambda mask, net: mask * net.scale,
    "with another": lambda mask, net: mask + net.second,
    "less another": lambda mask, net: mask - net.second,
    "with rows": lambda mask, net: mask + net.rows,
    "negative": lambda mask, net: -mask,
    "dense": lambda mask, net: torch.where(torch.ones_like(mask, dtype=torch.bool), mask, mask),
    "per head": lambda mask, net: mask.expand(B * H, M, N) if mask.dim() == 2 else mask,
}


def assigned(mask, net):
    mask[..., 1:3] = 0.25
    return mask


def changed_through_a_view(mask, net):
    mask[..., 2:].zero_()
    mask[:2].mul_(net.scale)
    return mask


def changed_without_a_graph(mask, net):
    with torch.no_grad():
        mask.mul_(2)
    return mask


def hooked(mask, net):
    mask.register_hook(lambda grad: grad * 1.5)
    return mask


def retained(mask, net):
    mask.retain_grad()
    net.retained.append(mask)
    return mask


# What happens to the first bias before any attention reads it, one after the other.
PREPARATIONS = {
    **OPERATIONS,
    "per head": lambda mask, net: mask.clone(),
    "added in place": lambda mask, net: mask.add_(net.second, alpha=0.5),
    "scaled in place": lambda mask, net: mask.mul_(net.scale),
    "filled": lambda mask, net: mask.masked_fill_(net.some, -3.0),
    "hidden": lambda mask, net: mask.masked_fill(net.some, float("-inf")),
    "of a function": lambda mask, net: Reversed.apply(mask),
    "squared by a function": lambda mask, net: Squared.apply(mask),
    "bounded": lambda mask, net: mask.tanh(),
    "turned": lambda mask, net: mask.t().contiguous().t(),
    "assigned": assigned,
    "changed through a view": changed_through_a_view,
    "changed without a graph": changed_without_a_graph,
    "hooked": hooked,
    "retained": retained,
}
LAYERS = st.fixed_dictionaries(
    {
        "operations": st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=2),
        "checkpointed": st.sampled_from([None, None, "without reentry", "reentrant"]),
        "weights": st.sampled_from([None, "torch", "function", "both"]),
    }
)
# What is asked for; one name each of what stands early and late in the network.
INPUTS = st.lists(
    st.sampled_from(["first", "second", "product", "weights", "query", "scale", "factor"]),
    min_size=1,
    max_size=4,
    unique=True,
)


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


class Network:
    """Layers of attention: of even index with a bias, of odd index with its product."""

    def __init__(self, plans, preparations=(), penalty=None, leaf=False):
        self.preparations, self.penalty, self.leaf = preparations, penalty, leaf
        made = [outer(keeping(kept)) for _ in plans]
        torch.manual_seed(0)
        self.layers = [(cls(), original, plan) for (cls, original), plan in zip(made, plans)]
        self.query, self.key = sequences()
        self.factors = [torch.randn(1, n, 1, 2).requires_grad_() for n in (M, N, M, N)]
        self.scale = torch.tensor(0.7, requires_grad=True)
        self.rows = torch.randn(M, 1, requires_grad=True)
        self.some = torch.rand(M, N) < 0.3
        self.some[:, 0] = False

    def leaves(self):
        parameters = [p for module, *_ in self.layers for p in module.parameters()]
        return [self.query, self.key, *self.factors, self.scale, self.rows, *parameters]

    def forward(self, patched):
        """The loss, and what its gradient can be asked for, by name."""
        biases = [LowRankBias(*self.factors[:2]), LowRankBias(*self.factors[2:])]
        first, self.second = (
            described(bias, "mn") if patched else bias.dense()[0, 0].clone() for bias in biases
        )
        self.retained = []
        if self.leaf:
            first = first.detach().requires_grad_()
            self.retained.append(first)
        for name in self.preparations:
            first = PREPARATIONS[name](first, self)
        product = first * self.scale
        named = {"first": first, "second": self.second, "product": product, "query": self.query}
        named.update(scale=self.scale, factor=self.factors[0])
        x, loss = self.query, 0
        for index, (module, original, plan) in enumerate(self.layers):

            def layer(x, mask, module=module, original=original, plan=plan):
                for name in plan["operations"]:
                    mask = OPERATIONS[name](mask, self)
                args = (x, self.key, self.key)
                return (
                    module(*args, attn_mask=mask)
                    if patched
                    else original(module, *args, attn_mask=mask)
                )

            mask = product if index % 2 else first
            if plan["checkpointed"]:
                x = checkpoint(layer, x, mask, use_reentrant=plan["checkpointed"] == "reentrant")
                continue
            x = layer(x, mask)
            named.setdefault("weights", module.kept)
            if plan["weights"]:
                loss = loss + USES[plan["weights"]](module.kept).square().sum()
        if self.penalty == "torch":
            loss = loss + first.clamp(-4, 4).square().mean()
        if self.penalty == "function":
            loss = loss + Reversed.apply(first).clamp(-4, 4).square().mean()
        return loss + (x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum(), named


def gradients(network, patched, names, again):
    loss, named = network.forward(patched)
    asked = [named[name] for name in names if name in named] or [network.query]
    found = list(torch.autograd.grad(loss, asked, create_graph=again, allow_unused=True))
    if again:
        penalty = sum(each.square().sum() for each in found if each is not None) + loss
        found += torch.autograd.grad(penalty, network.leaves(), allow_unused=True)
    else:
        loss, _ = network.forward(patched)
        found += torch.autograd.grad(loss, network.leaves(), allow_unused=True)
    return [None if each is None else each.detach() for each in found]


SETTINGS = settings(
    max_examples=PER_TEST,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def assert_same(ours, theirs):
    """Relative to the largest gradient of all."""
    scale = max(float(each.abs().max()) for each in theirs if each is not None)
    assert_equal(
        [None if each is None else each / scale for each in ours],
        [None if each is None else each / scale for each in theirs],
    )


@pytest.mark.slow
@SETTINGS
@given(plans=st.lists(LAYERS, min_size=1, max_size=3), names=INPUTS, again=st.booleans())
def test_gradients_that_are_asked_for(plans, names, again):
    for plan in plans:  # torch.autograd.grad cannot go through the other kind
        plan["checkpointed"] = plan["checkpointed"] and "without reentry"
    network = Network(plans)
    theirs = gradients(network, False, names, again)
    assert_same(gradients(network, True, names, again), theirs)


def gradients_by_backward(network, patched):
    leaves = network.leaves()
    for leaf in leaves:
        leaf.grad = None
    loss, _ = network.forward(patched)
    loss.backward()
    found = [loss, *(each.grad for each in (*network.retained, *leaves))]
    return [None if each is None else each.detach().clone() for each in found]


@pytest.mark.slow
@SETTINGS
@given(
    plans=st.lists(LAYERS, min_size=1, max_size=3),
    preparations=st.lists(st.sampled_from(sorted(PREPARATIONS)), max_size=3),
    penalty=st.sampled_from([None, "torch", "function"]),
    leaf=st.booleans(),
)
def test_gradients_after_changes(plans, preparations, penalty, leaf):
    network = Network(plans, preparations, penalty, leaf)
    try:
        theirs = gradients_by_backward(network, False)
    except RuntimeError:  # as a leaf that is changed in place
        return
    if all(each is None or each.isfinite().all() for each in theirs):
        assert_same(gradients_by_backward(network, True), theirs)
