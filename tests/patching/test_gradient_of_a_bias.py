"""torch.autograd.grad with respect to an attention bias, where attention read its description."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flashbias_patch.bias import LowRankBias, described
from tests.patching.test_attention_weights import keeping, kept
from tests.patching.test_inner_attention import B, M, N, outer, sequences
from tests.patching.test_weights_in_graph import USES
from tests.support.capabilities import checkpoint_options, since

from .test_parity import assert_equal

pytestmark = since(1, 11, "__torch_dispatch__")


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


class Calls:
    """The same calls, patched (with a description) and unpatched (with the dense tensor)."""

    def __init__(self):
        self.cls, self.original = outer(keeping(kept))
        torch.manual_seed(0)
        self.module = self.cls()
        self.query, self.key = sequences()
        self.factors = [torch.randn(1, n, 1, 2).requires_grad_() for n in (M, N)]
        self.scale = torch.tensor(0.7, requires_grad=True)

    def leaves(self):
        return [self.query, self.key, *self.factors, self.scale, *self.module.parameters()]

    def compare(self, run):
        """run(call, mask), with a fresh mask of (M, N) -> tensors."""
        bias = LowRankBias(*self.factors)

        def results(call, mask):
            return [None if each is None else each.clone() for each in run(call, mask)]

        theirs = results(
            lambda *args, **kwargs: self.original(self.module, *args, **kwargs),
            bias.dense()[0, 0].clone(),
        )
        assert_equal(results(self.module, described(bias, "mn")), theirs)


@pytest.fixture
def calls():
    return Calls()


@pytest.mark.parametrize("use", ["torch", "function", "both"])
@pytest.mark.parametrize("wanted", ["b", "bq", "qb", "w", "wb", "bw", "wbq", "qbw"])
def test_through_the_output_and_the_weights(calls, wanted, use):
    def run(call, mask):
        out = call(calls.query, calls.key, calls.key, attn_mask=mask)
        weights = calls.module.kept
        loss = USES[use](weights).square().sum() + out.square().mean()
        by_name = {"w": weights, "b": mask, "q": calls.query}
        return torch.autograd.grad(loss, [by_name[name] for name in wanted])

    calls.compare(run)


def test_through_the_weights_of_several_heads(calls):
    """As far as the mask is the same for all, its gradient is the sum."""

    def run(call, mask):
        call(calls.query, calls.key, calls.key, attn_mask=mask.expand(B * 2, M, N))
        return torch.autograd.grad(calls.module.kept[:, :3].square().sum(), mask)

    calls.compare(run)


@since(2, 0, "batched gradients of attention")
@pytest.mark.parametrize("wanted", ["w", "b", "q"])
def test_a_batch_of_gradients(calls, wanted):
    def run(call, mask):
        call(calls.query, calls.key, calls.key, attn_mask=mask)
        weights = calls.module.kept
        by_name = {"w": weights, "b": mask, "q": calls.query}
        grads = torch.linspace(-1, 1, 2 * weights.numel()).view(2, *weights.shape)
        return torch.autograd.grad(weights * 2, by_name[wanted], grads, is_grads_batched=True)

    calls.compare(run)


@since(2, 6, "GradientEdge")
def test_an_edge_among_the_inputs(calls):
    def run(call, mask):
        call(calls.query, calls.key, calls.key, attn_mask=mask)
        edge = torch.autograd.graph.get_gradient_edge(calls.query)
        loss = calls.module.kept.square().sum()
        found = [torch.autograd.grad(loss, edge, retain_graph=True)[0]]
        found += torch.autograd.grad(calls.module.kept.sum(), edge, retain_graph=True)
        return [*found, *torch.autograd.grad(loss, [edge, mask, calls.module.kept])]

    calls.compare(run)


@since(2, 1, "materialize_grads")
def test_zeros_in_place_of_none(calls):
    def run(call, mask):
        call(calls.query, calls.key, calls.key, attn_mask=mask)
        loss = calls.query.sum()
        (of_weights,) = torch.autograd.grad(loss, calls.module.kept, materialize_grads=True)
        return [of_weights, *torch.autograd.grad(loss, mask, materialize_grads=True)]

    calls.compare(run)


def test_unused(calls):
    def run(call, mask):
        call(calls.query, calls.key, calls.key, attn_mask=mask)
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(calls.query.sum(), mask)
        return torch.autograd.grad(calls.query.sum(), mask, allow_unused=True)

    calls.compare(run)


@pytest.mark.parametrize("of", ["output", "weights", "both"])
@pytest.mark.parametrize("kind", ["plain", "scaled", "padded"])
def test_a_penalty_on_it(calls, kind, of):
    """A gradient that is differentiated again."""

    def run(call, mask):
        given = mask * calls.scale if kind == "scaled" else mask
        padding = torch.arange(N).expand(B, N) >= 5 if kind == "padded" else None
        masks = {"attn_mask": given, "key_padding_mask": padding}
        out = call(calls.query, calls.key, calls.key, **masks)
        loss = 0
        if of != "weights":
            loss = loss + out.square().mean()
        if of != "output":
            loss = loss + calls.module.kept.square().sum()
        (gradient,) = torch.autograd.grad(loss, mask, create_graph=True)
        penalty = gradient.square().sum() * 10 + loss
        found = torch.autograd.grad(penalty, calls.leaves(), allow_unused=True)
        return [gradient.detach(), *found]

    calls.compare(run)


@pytest.mark.parametrize("use", ["torch", "function", "both"])
@pytest.mark.parametrize("create_graph", [True, False])
def test_a_layer_counts_once(calls, create_graph, use):
    """The weights of a second layer, whose queries come from a layer with the same bias."""

    def run(call, mask):
        first = call(calls.query, calls.key, calls.key, attn_mask=mask * calls.scale)
        call(first, calls.key, calls.key, attn_mask=mask)
        loss = USES[use](calls.module.kept).square().sum()
        return [g.detach() for g in torch.autograd.grad(loss, [mask], create_graph=create_graph)]

    calls.compare(run)


@pytest.mark.parametrize(
    "wanted", [pytest.param("weights", marks=since(2, 2, "GradientEdge")), "bias"]
)
def test_through_a_checkpoint(calls, wanted):
    """The recomputation runs inside torch.autograd.grad."""
    options = checkpoint_options(reentrant=False)

    def run(call, mask):
        call(calls.query, calls.key, calls.key)
        weights = calls.module.kept

        def layer(x, y):
            return call(x, y, y, attn_mask=mask * calls.scale)

        out = checkpoint(layer, calls.query + weights.sum(), calls.key, **options)
        inputs = [weights] if wanted == "weights" else [mask, calls.scale]
        return torch.autograd.grad(out.square().sum(), inputs)

    calls.compare(run)
