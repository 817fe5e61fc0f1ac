"""Transforms of torch.func, forward mode and higher derivatives: as float64 gives them; ordinary
calls stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from flashbias_patch import flash_bias_attention, telemetry
from flashbias_patch.attention import dispatch
from flashbias_patch.attention.inputs import build
from flashbias_patch.attention.recovery import guard
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.bias import DenseBias, LowRankBias, ModalityBias
from tests.support.capabilities import FASTEST, checkpoint_options, needs_transforms, since

B, M, N, H, D = 2, 3, 5, 2, 4
FEATURES = (
    "none",
    "low rank",
    "modality",
    "dense",
    "dense with gradient",
    "mask",
    "padding",
    "all masked",
)
EPS = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 3e-2}


def problem(feature, dtype=torch.float64):
    """(q, k, v in float64, keyword arguments by dtype)."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = draw(B, M, H, D), draw(B, N, H, D), draw(B, N, H, D)
    given = {}
    if feature == "low rank":
        given["bias"] = LowRankBias(draw(1, M, H, 2), draw(B, N, 1, 2))
    elif feature == "modality":
        given["bias"] = ModalityBias(draw(B, M, 2), (2, N - 2))
    elif feature.startswith("dense"):
        given["bias"] = DenseBias(draw(1, H, M, N).requires_grad_("gradient" in feature))
    elif feature == "mask":
        given["attn_mask"] = torch.rand(M, N, generator=g) < 0.3
    elif feature == "padding":
        given["key_padding_mask"] = torch.arange(N) >= torch.tensor([[N], [N - 2]])
    elif feature == "all masked":
        given["attn_mask"] = torch.arange(M)[:, None].eq(1).expand(M, N)
    return (q, k, v), given


def attention(given, backend=None):
    return lambda q, k, v: flash_bias_attention(q, k, v, backend=backend, **given)


def textbook(given):
    return lambda q, k, v: attend_dense(build(q, k, v, **given))


def square(attend, k, v):
    return lambda q: attend(q, k, v).square().sum()


TRANSFORMS = {
    "grad": lambda f, q, k, v: torch.func.grad(square(f, k, v))(q),
    "vmap": lambda f, q, k, v: torch.func.vmap(lambda x: f(x, k, v))(torch.stack([q, 2 * q])),
    "vmap over keys": lambda f, q, k, v: torch.func.vmap(lambda x: f(q, x, x))(torch.stack([k, v])),
    "vmap of grad": lambda f, q, k, v: torch.func.vmap(torch.func.grad(square(f, k, v)))(
        torch.stack([q, 2 * q])
    ),
    "jvp": lambda f, q, k, v: torch.func.jvp(lambda x: f(x, k, v), (q,), (q.cos(),))[1],
    "jvp of k and v": lambda f, q, k, v: torch.func.jvp(
        lambda x, y: f(q, x, y), (k, v), (k.cos(), v.sin())
    )[1],
    "jacrev": lambda f, q, k, v: torch.func.jacrev(lambda x: f(x, k, v))(q),
    "jacfwd": lambda f, q, k, v: torch.func.jacfwd(lambda x: f(x, k, v))(q),
    "hessian": lambda f, q, k, v: torch.func.hessian(square(f, k, v))(q),
    "vjp": lambda f, q, k, v: torch.func.vjp(lambda x: f(x, k, v), q)[1](q.cos())[0],
    "forward mode": lambda f, q, k, v: forward_mode(f, q, k, v),
}


def forward_mode(f, q, k, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, q.cos()), k, v)).tangent


def close(ours, exact, dtype):
    scale = max(1.0, float(exact.abs().max()))
    assert (
        ours.dtype is dtype
        and float((ours.double() - exact).abs().max()) <= 50 * EPS[dtype] * scale
    )


def ordinary_calls_are_as_before(dtype, expected):
    """The first backend that takes such a call computes it."""
    (q, k, v), given = problem("none", dtype)
    telemetry.calls.clear()
    out = flash_bias_attention(q.requires_grad_(), k, v)
    torch.autograd.grad(out.float().sum(), q)
    assert (
        dict(telemetry.calls) == {expected: 1}
        and not telemetry.fallbacks()
        and not dispatch.breakers.failures()
    )


@needs_transforms
@pytest.mark.parametrize("dtype", EPS, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, feature, dtype):
    operands, given = problem(feature, dtype)
    exact_operands, exact = problem(feature)
    ours = TRANSFORMS[name](attention(given), *operands)
    close(ours.detach(), TRANSFORMS[name](textbook(exact), *exact_operands).detach(), dtype)
    ordinary_calls_are_as_before(dtype, "reference" if dtype is torch.bfloat16 else FASTEST)


@needs_transforms
def test_transforms_with_half_inside_float32():
    operands, given = problem("low rank", torch.float32)
    for name in ("jvp", "hessian", "vmap of grad"):
        ours = TRANSFORMS[name](
            lambda q, k, v: flash_bias_attention(q, k, v, dtype=torch.float16, **given), *operands
        )
        exact = TRANSFORMS[name](textbook(given), *operands)
        assert float((ours - exact).norm() / exact.norm()) < 2e-2


@needs_transforms
def test_a_transform_that_fails_raises_its_own_error():
    (q, k, v), _ = problem("none")
    flash_bias_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: flash_bias_attention(x, k, v, dropout_p=0.5))(torch.stack([q, q]))
    assert not telemetry.fallbacks() and not dispatch.breakers.failures()
    ordinary_calls_are_as_before(torch.float64, FASTEST)


@needs_transforms
def test_random_vmap():
    (q, k, v), _ = problem("none")
    ours = torch.func.vmap(
        lambda x: flash_bias_attention(x, k, v, dropout_p=0.5), randomness="different"
    )
    first, second = ours(torch.stack([q, q]))
    assert not torch.equal(first, second)


# -- differentiating gradients again ---------------------------------------------------------------


@pytest.mark.parametrize("guarded", (False, True), ids=("bare", "guarded"))
@pytest.mark.parametrize("backend", (None, "sdpa", "reference"))
@pytest.mark.parametrize("feature", FEATURES)
def test_double_backward(monkeypatch, feature, backend, guarded):
    monkeypatch.setattr(guard, "LARGE", 0 if guarded else 1 << 60)
    operands, given = problem(feature)
    leaves = [t.requires_grad_() for t in operands]
    if feature == "dense with gradient":
        leaves.append(given["bias"].dense())
    found = []
    for attend in (attention(given, backend), textbook(given)):
        out = attend(*operands)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), leaves, create_graph=True
        )
        third = torch.autograd.grad(sum(g.square().sum() for g in second), leaves)
        found.append([out, *first, *second, *third])
    for ours, exact in zip(*found):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    ordinary_calls_are_as_before(torch.float64, FASTEST)


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_numerically(backend):
    operands, given = problem("low rank")
    leaves = [t.requires_grad_() for t in operands]
    factors = [t.requires_grad_() for t in (given["bias"].q_factor, given["bias"].k_factor)]

    def attend(q, k, v, a, b):
        return flash_bias_attention(q, k, v, LowRankBias(a, b), backend=backend)

    assert torch.autograd.gradgradcheck(attend, (*leaves, *factors))
    # An operand that is made of another one must not count twice.
    assert torch.autograd.gradgradcheck(
        lambda q: attend(q, q.sum(1, True) * leaves[1], leaves[2], *factors), (leaves[0],)
    )


def test_double_backward_of_the_reference_drops_the_same():
    (q, k, v), _ = problem("none")
    q.requires_grad_()
    torch.manual_seed(3)
    out = flash_bias_attention(q, k, v, dropout_p=0.5, backend="reference")
    plain = torch.autograd.grad(out.sum(), q, retain_graph=True)[0]
    first = torch.autograd.grad(out.sum(), q, create_graph=True)[0]
    torch.testing.assert_close(first, plain)
    assert torch.autograd.grad(first.square().sum(), q)[0].abs().sum() > 0


@since(2, 0, "functorch's batches of gradients")
@pytest.mark.parametrize("guarded", (False, True), ids=("bare", "guarded"))
@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_a_batch_of_gradients(monkeypatch, backend, guarded):
    monkeypatch.setattr(guard, "LARGE", 0 if guarded else 1 << 60)
    operands, given = problem("low rank")
    leaves = [t.requires_grad_() for t in operands]
    grads = torch.randn(
        4, B, M, H, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    ours = torch.autograd.grad(
        attention(given, backend)(*operands), leaves, grads, is_grads_batched=True
    )
    exact = torch.autograd.grad(textbook(given)(*operands), leaves, grads, is_grads_batched=True)
    for one, other in zip(ours, exact):
        torch.testing.assert_close(one, other)


def test_a_gradient_penalty_leaves_no_memory_behind():
    """What is kept for a second pass goes with the graph, and the operands with the first pass."""
    import gc
    import weakref

    (q, k, v), _ = problem("none")
    q.requires_grad_()
    gc.disable()
    try:
        doubled = k * 2
        held = weakref.ref(doubled)
        out = flash_bias_attention(q, doubled, v)
        loss = out.sum()
        del doubled, out
        loss.backward()
        assert held() is None and loss.grad_fn is not None
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoints_are_as_before(reentrant):
    from torch.utils.checkpoint import checkpoint

    operands, given = problem("low rank")
    leaves = [t.requires_grad_() for t in operands]
    ours = torch.autograd.grad(attention(given)(*operands).sum(), leaves)
    for tensor in leaves:
        tensor.grad = None
    checkpoint(attention(given), *operands, **checkpoint_options(reentrant)).sum().backward()
    for one, tensor in zip(ours, leaves):
        torch.testing.assert_close(tensor.grad, one)
