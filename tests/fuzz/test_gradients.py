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
LAYERS = st.fixed_dictionaries(
    {
        "operations": st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=2),
        "checkpointed": st.booleans(),
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

    def __init__(self, plans):
        made = [outer(keeping(kept)) for _ in plans]
        torch.manual_seed(0)
        self.layers = [(cls(), original, plan) for (cls, original), plan in zip(made, plans)]
        self.query, self.key = sequences()
        self.factors = [torch.randn(1, n, 1, 2).requires_grad_() for n in (M, N, M, N)]
        self.scale = torch.tensor(0.7, requires_grad=True)
        self.rows = torch.randn(M, 1, requires_grad=True)

    def leaves(self):
        parameters = [p for module, *_ in self.layers for p in module.parameters()]
        return [self.query, self.key, *self.factors, self.scale, self.rows, *parameters]

    def forward(self, patched):
        """The loss, and what its gradient can be asked for, by name."""
        biases = [LowRankBias(*self.factors[:2]), LowRankBias(*self.factors[2:])]
        first, self.second = (
            described(bias, "mn") if patched else bias.dense()[0, 0].clone() for bias in biases
        )
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
                x = checkpoint(layer, x, mask, use_reentrant=False)
                continue
            x = layer(x, mask)
            named.setdefault("weights", module.kept)
            if plan["weights"]:
                loss = loss + USES[plan["weights"]](module.kept).square().sum()
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


@pytest.mark.slow
@settings(
    max_examples=PER_TEST,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(plans=st.lists(LAYERS, min_size=1, max_size=3), names=INPUTS, again=st.booleans())
def test_gradients_are_those_of_the_unpatched_network(plans, names, again):
    network = Network(plans)
    theirs = gradients(network, False, names, again)
    ours = gradients(network, True, names, again)
    scale = max(float(each.abs().max()) for each in theirs if each is not None)
    assert_equal(
        [None if each is None else each / scale for each in ours],
        [None if each is None else each / scale for each in theirs],
    )
