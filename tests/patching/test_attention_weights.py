"""Attention weights arrive wherever the code looks at them, and cost nothing where it does not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashbias_patch
from flashbias_patch import telemetry
from flashbias_patch.attention import weights as weights_module
from flashbias_patch.bias import LowRankBias
from tests.patching.test_inner_attention import (
    FLOATING_PADDING,
    B,
    E,
    H,
    M,
    N,
    added,
    given_masks,
    gradients,
    outer,
    sequences,
)
from tests.support.capabilities import REENTRANT, needs_compile, needs_transforms, since

from .test_parity import assert_equal


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


@pytest.fixture
def computed(monkeypatch):
    """A list with an entry for each time that weights were computed."""
    calls, real = [], weights_module.attention_weights
    monkeypatch.setattr(
        weights_module, "attention_weights", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    return calls


def calling(call):
    """A forward as PETR's attention has it: returns `call(self, query, key, value, masks)`."""

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ):
        masks = dict(attn_mask=attn_mask, key_padding_mask=key_padding_mask)
        return call(self, query, key, value, masks)

    return forward


def keeping(take, **options):
    """A forward that keeps what `take` makes of its attention's result."""

    def call(self, query, key, value, masks):
        return query + take(self, *self.attn(query, key, value, **masks, **options))

    return calling(call)


def kept(self, out, probabilities):
    self.kept = probabilities
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(dict(average_attn_weights=False), marks=since(1, 11, "average_attn_weights")),
        dict(need_weights=True),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("inner", [{}, dict(batch_first=True)])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_weights_are_torchs_with_every_mask(options, biased, inner):
    """Values, gradients, shape and dtype; unbatched too."""
    cls, original = outer(keeping(kept, **options))
    module = cls(**inner)
    bias = torch.randn(B, H, M, N, requires_grad=True)
    for kwargs in given_masks().values():
        query, key = sequences()
        if inner:
            query, key = (x.transpose(0, 1) for x in (query, key))
        mask, padding = kwargs.get("attn_mask"), kwargs.get("key_padding_mask")
        masks = dict(kwargs)
        if biased:
            masks["attn_mask"] = added(bias, mask).flatten(0, 1)
        if (
            FLOATING_PADDING
            and padding is not None
            and padding.dtype == torch.bool
            and (mask is None) is biased
        ):
            masks["key_padding_mask"] = torch.zeros(padding.shape).masked_fill(
                padding, float("-inf")
            )
        original(module, query, key, key, **masks)
        theirs = module.kept
        module(query, key, key, **kwargs, **({"attention_bias": bias} if biased else {}))
        ours = module.kept
        assert telemetry.calls["original"] == 0
        assert (ours.shape, ours.dtype, ours.dim(), len(ours)) == (
            theirs.shape,
            theirs.dtype,
            theirs.dim(),
            len(theirs),
        )
        leaves = [query, key, bias]
        assert_equal(
            [ours.clone(), *gradients(module, ours * 1, leaves)],
            [theirs, *gradients(module, theirs, leaves)],
        )


@since(1, 11, "attention of unbatched sequences")
def test_weights_of_unbatched_queries():
    for options in ({}, dict(average_attn_weights=False)):
        cls, original = outer(keeping(kept, **options))
        module, query, key = cls(), torch.randn(M, E), torch.randn(N, E)
        original(module, query, key, key)
        theirs = module.kept
        module(query, key, key)
        assert module.kept.shape == theirs.shape
        torch.testing.assert_close(module.kept + 0, theirs)


def test_without_weights_there_are_none():
    cls, _ = outer(keeping(kept, need_weights=False))
    module, (query, key) = cls(), sequences()
    module(query, key, key)
    assert module.kept is None


def test_who_ignores_them_computes_none(computed):
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    out = module(query, key, key, attention_bias=torch.randn(M, N))
    out.sum().backward()
    assert (
        module.kept.shape == (B, M, N)
        and module.kept.dtype == torch.float32
        and module.kept.device == out.device
    )
    assert not computed and isinstance(module.kept, torch.Tensor) and module.kept in {module.kept}


def used(way):
    """A way to use weights: a function of them."""
    return {
        "arithmetic": lambda w: w * 2,
        "method": lambda w: w.mean(1),
        "function": lambda w: torch.stack([w, w]),
        "index": lambda w: w[0, :2],
        "rows": lambda w: torch.stack(list(w)),
        "data": lambda w: w.data,
        "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
        "list": lambda w: torch.tensor(w.tolist()),
        "to": lambda w: w.to(torch.float64).float(),
        "detach": lambda w: w.detach().cpu(),
        "einsum": lambda w: torch.einsum("bmn->nm", w),
        "deepcopy": lambda w: copy.deepcopy(w.detach()),
        "pickle": lambda w: pickle.loads(pickle.dumps(w.detach())),
        "saved": lambda w: saved(w),
        "out=": lambda w: torch.add(w.detach(), 1, out=torch.empty(w.shape)),
        "repr": lambda w: torch.tensor([len(repr(w))]),
        "in place": lambda w: w.detach().mul_(2),
        "compare": lambda w: w == w,
        "where": lambda w: torch.where(w > 0.2, w, torch.zeros(())),
    }[way]


def saved(w):
    buffer = io.BytesIO()
    torch.save({"weights": w.detach()}, buffer)
    buffer.seek(0)
    return torch.load(buffer)["weights"]


WAYS = (
    "arithmetic",
    "method",
    "function",
    "index",
    "rows",
    "data",
    "numpy",
    "list",
    "to",
    "detach",
    "einsum",
    "deepcopy",
    "pickle",
    "saved",
    "out=",
    "repr",
    "in place",
    "compare",
    "where",
)


@pytest.mark.parametrize("way", WAYS)
def test_every_use_computes_them(way, computed):
    cls, original = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    original(module, query, key, key)
    theirs = used(way)(module.kept)
    module(query, key, key)
    ours = used(way)(module.kept)
    assert type(ours) is torch.Tensor and computed == [1]
    if way != "repr":
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "forward hook",
        pytest.param("always calling", marks=since(2, 1, "always_call")),
        pytest.param("pre hook and kwargs", marks=since(2, 0, "with_kwargs")),
    ],
)
def test_a_hook_on_the_inner_module(name, computed):
    """How attention maps of CMT and PETR are drawn."""
    cls, original = outer(keeping(lambda self, out, _: out))
    module, (query, key) = cls().eval(), sequences(False)
    seen = []

    def hook(inner, args, *rest):
        seen.append(rest[-1][1])

    if name == "forward hook":
        module.attn.register_forward_hook(hook)
    elif name == "always calling":
        module.attn.register_forward_hook(hook, always_call=True)
    else:
        module.attn.register_forward_hook(hook, with_kwargs=True)
        module.attn.register_forward_pre_hook(lambda inner, args: None)
    original(module, query, key, key)
    with torch.no_grad():
        module(query, key, key)
    theirs, ours = seen
    assert not computed
    torch.testing.assert_close(ours.clone(), theirs)


def test_a_full_backward_hook_on_the_inner_module():
    """torch passes the outputs through an autograd function: weights keep their gradient."""
    cls, original = outer(
        keeping(lambda self, out, probabilities: out + probabilities.square().mean())
    )
    module, (query, key) = cls(), sequences()
    grads = []
    module.attn.register_full_backward_hook(lambda inner, g_in, g_out: grads.append(g_out[1]))
    theirs = original(module, query, key, key)
    their_grads = gradients(module, theirs, [query, key])
    ours = module(query, key, key)
    assert_equal([ours, *gradients(module, ours, [query, key])], [theirs, *their_grads])
    torch.testing.assert_close(grads[1], grads[0])


def test_weights_in_the_loss():
    cls, original = outer(
        keeping(lambda self, out, probabilities: out + probabilities.square().mean())
    )
    module, (query, key) = cls(), sequences()
    bias = torch.randn(M, N, requires_grad=True)
    theirs = original(module, query, key, key, attn_mask=bias)
    their_grads = gradients(module, theirs, [query, key, bias])
    ours = module(query, key, key, attention_bias=bias)
    assert_equal([ours, *gradients(module, ours, [query, key, bias])], [theirs, *their_grads])


def test_they_are_computed_in_the_mode_of_the_call():
    """Read first under no_grad or inference_mode, they still carry a gradient afterwards; and the
    other way round."""
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    for mode in (torch.no_grad, torch.inference_mode):
        module(query, key, key)
        with mode():
            module.kept.sum()
        assert module.kept.requires_grad
        assert torch.autograd.grad(module.kept.square().sum(), query)[0].any()
        with mode():
            module(query, key, key)
        assert not (module.kept + 0).requires_grad and not module.kept.requires_grad


@pytest.mark.parametrize("what", ["attn_mask", "key_padding_mask", "attention_bias"])
def test_a_mask_changed_in_place_before_they_are_read_is_an_error(what):
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    given = {"attn_mask": torch.zeros(M, N), "key_padding_mask": torch.zeros(B, N),
             "attention_bias": torch.zeros(B, H, M, N)}[what]  # fmt: skip
    module(query, key, key, **{what: given})
    early = module.kept.clone()
    given[..., 0] = float("-inf")
    torch.testing.assert_close(module.kept + 0, early)  # computed by then
    module(query, key, key, **{what: given})
    given[..., 1] = float("-inf")
    with pytest.raises(RuntimeError, match=f"{what} was changed in place"):
        module.kept.sum()


def test_a_fully_masked_row_is_zero():
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    mask = torch.zeros(M, N, dtype=torch.bool)
    mask[2] = True
    module(query, key, key, attn_mask=mask)
    assert not module.kept[:, 2].detach().any() and torch.allclose(
        module.kept[:, 0].sum(-1), torch.ones(B)
    )


@pytest.mark.parametrize(
    "reentrant", [pytest.param(False, marks=since(1, 11, "use_reentrant")), True]
)
def test_inside_a_checkpoint_of_the_inner_attention(reentrant):
    """Weights that are ignored do no harm. Used, they have the right gradient."""

    def call(self, query, key, value, masks):
        options = {"use_reentrant": False} if not reentrant else REENTRANT
        out, probabilities = checkpoint(self.attn, query, key, value, **options)
        self.kept = probabilities
        return query + out + (probabilities.square().mean() if self.in_loss else 0)

    cls, original = outer(calling(call))
    module, (query, key) = cls(), sequences()
    for module.in_loss in (False, True):
        theirs = original(module, query, key, key)
        their_grads, their_weights = (
            gradients_by_backward(module, theirs, [query, key]),
            module.kept,
        )
        ours = module(query, key, key)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(module.kept.detach(), their_weights.detach())
        assert_equal(gradients_by_backward(module, ours, [query, key]), their_grads)


def gradients_by_backward(module, out, leaves):
    leaves = [*leaves, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    out.sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=since(1, 10, "softmax in bfloat16 on the CPU")),
        torch.float64,
    ],
)
def test_dtypes(dtype):
    cls, original = outer(keeping(kept))
    module = cls().to(dtype)
    query, key = (x.to(dtype) for x in sequences(False))
    original(module, query, key, key)
    theirs = module.kept
    exact = module.double()
    original(exact, query.double(), key.double(), key.double())
    module(query.double(), key.double(), key.double())
    torch.testing.assert_close(module.kept + 0, exact.kept + 0)
    module.to(dtype)
    module(query, key, key)
    assert module.kept.dtype == theirs.dtype
    truth = theirs.double()
    tolerance = (
        dict(rtol=0.05, atol=1e-2) if dtype is torch.bfloat16 else dict(rtol=1e-12, atol=1e-12)
    )
    torch.testing.assert_close((module.kept + 0).double(), truth, **tolerance)


@since(1, 10, "autocast on the CPU")
def test_under_autocast():
    cls, original = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    with torch.autocast("cpu", torch.bfloat16):
        original(module, query, key, key)
        theirs = module.kept
        module(query, key, key)
    assert module.kept.dtype == theirs.dtype
    torch.testing.assert_close(module.kept.detach(), theirs.detach(), rtol=0.05, atol=1e-2)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_of_a_traced_module():
    cls, original = outer(keeping(kept))
    cls.forward_with_weights = lambda self, query, key: (self(query, key, key), self.kept)
    module, (query, key) = cls().eval(), sequences(False)
    with torch.no_grad():
        traced = torch.jit.trace_module(module, {"forward_with_weights": (query, key)})
        out, weights = traced.forward_with_weights(key[:M] * 2, key)
        torch.testing.assert_close(out, original(module, key[:M] * 2, key, key))
    torch.testing.assert_close(weights, module.kept)


@needs_compile
def test_of_a_compiled_module():
    torch._dynamo.reset()
    cls, original = outer(
        keeping(lambda self, out, probabilities: out + probabilities.square().mean())
    )
    module, (query, key) = cls(), sequences()
    theirs = original(module, query, key, key)
    torch.testing.assert_close(torch.compile(module, backend="eager")(query, key, key), theirs)


@needs_transforms
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap_and_grad():
    cls, original = outer(
        keeping(lambda self, out, probabilities: out + probabilities.square().mean())
    )
    module, (query, key) = cls().eval(), sequences(False)
    for transform in (lambda f: torch.func.grad(lambda q: f(q).sum()), torch.func.vmap):
        queries = query[None] if transform is torch.func.vmap else query
        torch.testing.assert_close(
            transform(lambda q: module(q, key, key))(queries),
            transform(lambda q: original(module, q, key, key))(queries),
        )


def test_structured_biases_and_the_function_itself():
    q, k = torch.randn(B, M, H, 4), torch.randn(B, N, H, 4)
    bias = LowRankBias(torch.randn(1, M, H, 2), torch.randn(B, N, 1, 2))
    padding = torch.arange(N).expand(B, N) > 4
    got = weights_module.attention_weights(q, k, bias, key_padding_mask=padding)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / 2 + bias.dense()
    torch.testing.assert_close(
        got, scores.masked_fill(padding[:, None, None], float("-inf")).softmax(-1)
    )
    v = torch.randn(B, N, H, 4)
    out = flashbias_patch.flash_bias_attention(q, k, v, bias, key_padding_mask=padding)
    torch.testing.assert_close(torch.einsum("bhmn,bnhd->bmhd", got, v), out)
    assert isinstance(nn.Identity()(got), torch.Tensor)
