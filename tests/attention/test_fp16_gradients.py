"""float16 inside float32 code: gradients as exact as float16 allows, however small the one that
arrives."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from flashbias_patch.attention import flash_bias_attention, fp16_gradients
from flashbias_patch.bias import DenseBias, LowRankBias, ModalityBias
from tests.attention.backends.test_sdpa_and_reference import dense_attention
from tests.support.capabilities import TRANSFORMS, checkpoint_options, needs_compile


def operands(dtype=torch.float32, M=21, N=301, B=2, H=2, D=16):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g).to(dtype).requires_grad_()  # noqa: E731
    return [draw(B, M, H, D), draw(B, N, H, D), draw(B, N, H, D)]


def low_rank(g, M, N):
    parts = [torch.randn(1, M, 1, 4, generator=g), torch.randn(1, N, 1, 4, generator=g)]
    return parts, lambda p: LowRankBias(*p)


def dense(g, M, N):
    return [torch.randn(1, 2, M, N, generator=g)], lambda p: DenseBias(p[0])


def segments(g, M, N):
    return [torch.randn(2, M, 1, 2, generator=g)], lambda p: ModalityBias(
        p[0], (N // 3, N - N // 3)
    )


def relative(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize("size", (1e-30, 1e-12, 1e-6, 1.0, 1e6))
@pytest.mark.parametrize("biased", (low_rank, dense, segments))
def test_gradients_do_not_depend_on_the_size_of_the_one_that_arrives(biased, size):
    q, k, v = operands()
    parts, make = biased(torch.Generator().manual_seed(1), q.shape[1], k.shape[1])
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))

    def gradients(cast, factor, dtype=None, by=None):
        leaves = [t.detach().to(cast).requires_grad_() for t in (q, k, v, *parts)]
        qkv = [t.to(by) if by else t for t in leaves[:3]]
        out = flash_bias_attention(*qkv, make(leaves[3:]), dtype=dtype)
        assert out.dtype is (by or cast)
        return torch.autograd.grad(out, leaves, (grad.to(cast) * factor).to(out.dtype))

    exact = gradients(torch.float64, size)
    usual = [
        relative(a, b)
        for a, b in zip(
            gradients(torch.float32, 1.0, by=torch.float16), gradients(torch.float64, 1.0)
        )
    ]
    for found, wanted, error in zip(gradients(torch.float32, size, torch.float16), exact, usual):
        assert found.dtype is torch.float32
        assert relative(found, wanted) <= 2 * error + 1e-5


@settings(deadline=None)
@given(
    st.floats(min_value=2.0**-120, max_value=2.0**120),
    st.sampled_from((torch.float32, torch.float64, torch.bfloat16)),
)
def test_the_largest_element_ends_between_4_and_8(size, dtype):
    grad = torch.tensor([[0.0, -size], [size / 3, 0.0]], dtype=dtype)
    power = fp16_gradients.power_for(grad)
    assert power.shape == (1,) and power.dtype is torch.float32
    assert torch.frexp(power).mantissa.item() == 0.5
    assert 4 * (1 - 1e-6) <= (grad.double().abs().max() / power.double()).item() < 8


def test_nothing_to_go_by():
    assert (
        fp16_gradients.power_for(torch.zeros(3)).isfinite().all()
        and fp16_gradients.power_for(torch.zeros(3)).item() > 0
    )
    assert fp16_gradients.power_for(torch.ones(0, 3)).item() == 1.0
    q, k, v = operands(M=3, N=5)
    out = flash_bias_attention(q, k, v, dtype=torch.float16)
    for grad in torch.autograd.grad(out, (q, k, v), torch.zeros_like(out)):
        assert not grad.any()
    q, k, v = operands(M=0, N=5)
    out = flash_bias_attention(q, k, v, dtype=torch.float16)
    assert [g.shape for g in torch.autograd.grad(out, (q, k, v), out)] == [
        q.shape,
        k.shape,
        v.shape,
    ]


@pytest.mark.parametrize("bad", (float("inf"), float("nan")))
def test_what_is_not_finite_stays_so(bad):
    q, k, v = operands(M=3, N=5)
    out = flash_bias_attention(q, k, v, dtype=torch.float16)
    grad = torch.ones_like(out)
    grad[0, 0, 0, 0] = bad
    (found,) = torch.autograd.grad(out, v, grad)
    assert not found.isfinite().all()


def test_only_what_needs_a_gradient_gets_one():
    q, k, _ = operands()
    fixed, bias = k.detach(), torch.zeros(3)
    (narrow_q, narrow_k), (same, none), power = fp16_gradients.narrowed((q, fixed), (bias, None))
    assert narrow_q.requires_grad and not narrow_k.requires_grad and power is not None
    assert same is bias and none is None
    assert fp16_gradients.narrowed((fixed,), (bias,))[2] is None
    with torch.no_grad():
        assert fp16_gradients.narrowed((q,), ())[2] is None


def test_other_precisions_are_plain_casts(monkeypatch):
    monkeypatch.setattr(fp16_gradients, "narrowed", None)
    half, full = torch.float16, torch.float32
    for given_dtype, dtype in ((full, torch.bfloat16), (half, full), (half, half)):
        q, k, v = operands(given_dtype)
        out = flash_bias_attention(q, k, v, dtype=dtype)
        assert out.dtype is given_dtype
        assert all(g.dtype is given_dtype for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_torchs_default_dtype_is_nothing_to_it():
    q, k, v = operands()
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)) * 1e-9
    found = []
    for default in (torch.float32, torch.float16):
        torch.set_default_dtype(default)
        try:
            found.append(
                torch.autograd.grad(
                    flash_bias_attention(q, k, v, dtype=torch.float16), (q, k, v), grad
                )
            )
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_in_a_checkpoint():
    q, k, v = operands()
    grad = torch.randn(q.shape) * 1e-7
    found = []
    for reentrant in (None, True, False):
        run = lambda *t: flash_bias_attention(*t, dtype=torch.float16)  # noqa: E731
        out = (
            run(q, k, v)
            if reentrant is None
            else checkpoint(run, q, k, v, **checkpoint_options(reentrant))
        )
        found.append(
            torch.autograd.grad(out, (q, k, v), grad)
            if reentrant is not True
            else _backward(out, (q, k, v), grad)
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def _backward(out, leaves, grad):
    out.backward(grad)
    return [leaf.grad for leaf in leaves]


def textbook(q, k, v):
    """By operators that can be differentiated twice, between float16 tensors (older torch has no
    products of them)."""
    narrow_ones, _, power = fp16_gradients.narrowed((q, k, v), ())
    return fp16_gradients.widened(
        dense_attention(*(t.float() for t in narrow_ones)).half(), q.dtype, power
    )


def test_twice_and_by_functions():
    q, k, v = operands(M=3, N=7)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    (once,) = torch.autograd.grad(textbook(q, k, v), q, grad, create_graph=True)
    (twice,) = torch.autograd.grad(once.square().sum(), q)
    (exact,) = torch.autograd.grad(dense_attention(q, k, v), q, grad, create_graph=True)
    (wanted,) = torch.autograd.grad(exact.square().sum(), q)
    assert relative(twice, wanted.double()) < 5e-3
    small = (
        textbook(q, k, v).mul(grad * 1e-3).sum()
    )  # a loss with a penalty on its own gradient, in one last pass
    (once,) = torch.autograd.grad(small, q, create_graph=True)
    (both,) = torch.autograd.grad(small + 1e3 * once.square().sum(), q)
    assert relative(both, (exact * 1e-3 + wanted * 1e-3).double()) < 5e-3
    if not TRANSFORMS:
        return
    by_function = torch.func.grad(lambda x: (textbook(x, k, v) * grad).sum())(q)
    assert relative(by_function, exact.double()) < 5e-3


@needs_compile
def test_compiled():
    q, k, v = operands(M=3, N=7)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)) * 1e-9
    compiled = torch.compile(textbook, backend="aot_eager")
    eager, traced = (
        torch.autograd.grad(run(q, k, v), (q, k, v), grad) for run in (textbook, compiled)
    )
    for a, b in zip(eager, traced):
        assert relative(b, a.double()) < 1e-3


def test_the_casts_do_not_bind_arguments_by_their_signature():
    """torch's own Function.apply does, in some 120 function calls."""
    q, k, v = operands(M=3, N=5)
    called = []

    def profile(frame, event, argument):
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        narrow_ones, _, power = fp16_gradients.narrowed((q, k, v), ())
        wide = fp16_gradients.widened(narrow_ones[0], q.dtype, power)
    finally:
        sys.setprofile(None)
    assert wide.requires_grad and wide.dtype is torch.float32
    assert len(called) < 40 and "bind" not in called, called


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1.0, 1e4, float("inf"), float("nan")])
def test_a_batch_of_gradients_is_each_gradient(size):
    """is_grads_batched: each of them is scaled by its own power, however far apart they are."""
    tensors = operands(M=3, N=5)
    out = flash_bias_attention(*tensors, dtype=torch.float16)
    g = torch.Generator().manual_seed(5)
    grads = torch.randn(3, *out.shape, generator=g) * torch.tensor([size, 1.0, 1e-7]).view(
        -1, *[1] * 4
    )
    found = torch.autograd.grad(out, tensors, grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        one = torch.autograd.grad(out, tensors, grad, retain_graph=True)
        for batched, alone in zip(found, one):
            largest = alone.nan_to_num(0.0, 0.0, 0.0).abs().max()
            torch.testing.assert_close(
                batched[index], alone, rtol=4e-3, atol=4e-3 * float(largest), equal_nan=True
            )


@pytest.mark.parametrize("sizes", [dict(M=0, N=5), dict(M=3, N=5, B=0)])
def test_a_batch_of_empty_gradients(sizes):
    tensors = operands(**sizes)
    out = flash_bias_attention(*tensors, dtype=torch.float16)
    grads = torch.zeros(3, *out.shape)
    found = torch.autograd.grad(out, tensors, grads, is_grads_batched=True)
    assert [g.shape for g in found] == [(3, *t.shape) for t in tensors]
    assert not any(g.any() for g in found)
