"""Values and lengths that break CUDA kernels, on a GPU: each backend against plain PyTorch, which
is given float64."""

from __future__ import annotations

import math

import pytest
import torch

from flashbias_patch.attention import flash_bias_attention
from flashbias_patch.attention.backends import sdpa
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.bias import DenseBias, LowRankBias, ModalityBias

pytestmark = pytest.mark.gpu
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
LEAST = torch.finfo(FULL).min
H, D = 4, 32
FLOOR = {HALF: 3e-3, BRAIN: 2e-2, FULL: 1e-4}
BACKENDS = ("triton", "sdpa", "reference")


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).cuda()


def plainly(q, k, v, bias, dtype):
    """softmax(q k^T / sqrt(D) + bias) v in `dtype`; a row without keys is zero."""
    q, k, v, bias = (t.to(dtype) for t in (q, k, v, bias))
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * D**-0.5 + bias
    dead = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return torch.einsum("bhmn,bnhd->bmhd", p, v)


def check(backend, dtype, bias, needs, B=2, k=None, v=None):
    """`needs` of q, k, v and bias; near -1e9 the weights are what float32 keeps of the scores."""
    M, N = bias.shape[2], bias.shape[3]
    q = draw(B, M, H, D).to(dtype)
    k = draw(B, N, H, D, seed=1).to(dtype) if k is None else k
    v = draw(B, N, H, D, seed=2).to(dtype) if v is None else v
    tensors = {"q": q, "k": k, "v": v, "bias": bias}
    grad = draw(B, M, H, D, seed=3)

    def run(attend):
        leaves = {
            name: t.detach().clone().requires_grad_(name in needs)
            if t.stride(0)
            else t.requires_grad_(name in needs)
            for name, t in tensors.items()
        }
        out = attend(*leaves.values())
        found = (
            torch.autograd.grad(out, [leaves[name] for name in needs], grad.to(out.dtype))
            if needs
            else ()
        )
        return [out.detach(), *found]

    got = run(lambda q, k, v, bias: flash_bias_attention(q, k, v, DenseBias(bias), backend=backend))
    exact, plain = (run(lambda *t, kind=kind: plainly(*t, kind)) for kind in (torch.float64, FULL))
    for name, mine, low, true in zip(("out", *needs), got, plain, exact):
        assert mine.isfinite().all(), name
        error, allowed = (mine - true).norm(), 2 * (low - true).norm()
        floor = FLOOR[dtype] * max(true.norm(), true.numel() ** 0.5 / N)
        assert error <= allowed + floor, (name, error.item(), allowed.item())


@pytest.mark.parametrize("value", [0.0, -200.0, -1e4, -1e6, -1e9, LEAST, 1e9])
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_from_zero(backend, dtype, value):
    bias = draw(2, H, 70, 192)
    bias[0, :, 3] = value
    check(backend, dtype, bias, ("q", "k", "v", "bias"))


@pytest.mark.parametrize("needs", [("bias",), ("q",), ("k",), ("v",), ("q", "bias"), ()])
@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_set_of_gradients(backend, dtype, needs):
    for N in (192, 193, 61):
        check(backend, dtype, draw(2, H, 70, N), needs)


@pytest.mark.parametrize(
    "lengths", [(70, 64), (70, 192), (64, 65), (1, 65), (1, 64), (1, 1000), (33, 1025)]
)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_lengths_of_sdpa(dtype, lengths):
    bias = draw(2, H, *lengths) - 200.0  # logsumexp far below -88.7
    check("sdpa", dtype, bias, ("q", "k", "v", "bias"))
    check("sdpa", dtype, bias, ("q", "k", "v"))


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_expanded_keys(dtype):
    for N in (65, 64, 97):
        k, v = (draw(1, N, H, D, seed=seed).to(dtype).expand(2, -1, -1, -1) for seed in (1, 2))
        check("sdpa", dtype, draw(2, H, 70, N), ("q", "bias"), k=k, v=v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_modality_weights(backend):
    q, k, v = (draw(2, n, H, D).half().requires_grad_() for n in (70, 192, 192))
    weights = torch.zeros(2, 70, 2).cuda()
    weights[:, :10, 1], weights[:, 3] = -math.inf, -math.inf
    bias = ModalityBias(weights, (100, 92))
    out = flash_bias_attention(q, k, v, bias, backend=backend)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    exact = plainly(q, k, v, bias.dense(), torch.float64)
    assert (out - exact).norm() <= 2e-3 * exact.norm() and not out[:, 3].any()
    for mine, true in zip(found, torch.autograd.grad(exact.sum(), (q, k, v))):
        assert (mine - true).norm() <= 5e-3 * true.norm() + 1e-3


@pytest.mark.parametrize("keys", [64, 65, 128, 192, 256, 320])
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_low_logsumexp_made_by_factors(backend, dtype, keys):
    """A row at -200, as squared distances have them: cuDNN's gradients are NaN at N % 128 == 64."""
    q, k, v = (draw(2, n, H, D).to(dtype).requires_grad_() for n in (70, keys, keys))
    a, b = torch.zeros(1, 70, 1, 1).cuda(), -torch.ones(1, keys, 1, 1).cuda()
    a[:, 3], a[:, 5] = 200.0, 2e4
    bias = LowRankBias(a, b)
    out = flash_bias_attention(q, k, v, bias, backend=backend)
    found = torch.autograd.grad(out.sum(), (q, k, v))
    low = plainly(
        q, k, v, torch.zeros(()).cuda(), torch.float64
    )  # a row's constant changes nothing
    exact = (low, *torch.autograd.grad(low.sum(), (q, k, v)))
    for mine, true in zip((out, *found), exact):
        assert mine.isfinite().all()
        assert (mine - true).norm() <= 4 * FLOOR[dtype] * true.norm() + 1e-2


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_whose_memory_holds_their_negative(backend, dtype):
    """As that of x.conj().imag does."""
    leaves = [draw(2, n, H, D).to(dtype).requires_grad_() for n in (70, 193, 193)]
    leaves += [draw(2, H, 70, 193).requires_grad_()]
    grad = draw(2, 70, H, D).to(dtype)

    def results(of):
        q, k, v, bias = map(of, leaves)
        out = flash_bias_attention(q, k, v, DenseBias(bias), backend=backend)
        return [out, *torch.autograd.grad(out, leaves, of(grad))]

    want = results(lambda tensor: tensor)
    for mine, true in zip(results(lambda tensor: torch._neg_view(-tensor)), want):
        assert (mine - true).norm() <= 1e-3 * true.norm()  # sums in any order


def test_a_long_mask_is_unsupported():
    q, k = (torch.zeros(1, n, 1, 8).cuda() for n in (2, 65536))
    hidden = torch.zeros(1, 65536, dtype=torch.bool).cuda()
    assert any(
        "65536 keys" in why
        for why in sdpa.backend.why_not(AttentionInputs(q, k, k, key_padding=hidden))
    )
    assert not sdpa.backend.why_not(AttentionInputs(q, k, k))
    out = flash_bias_attention(q, k, k + 1.0, key_padding_mask=hidden)
    assert torch.allclose(out, torch.ones_like(out))
