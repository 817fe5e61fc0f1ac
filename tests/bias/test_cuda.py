"""The same on a GPU: digits of half factors, factorisation, its gradient, and nobody's random state
moved."""

from __future__ import annotations

import pytest
import torch

from flashbias_patch.bias import LowRankBias, SquaredDistanceBias, factorize, split_factors

pytestmark = pytest.mark.gpu
F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distance_scores_survive_half(dtype):
    x, y = ((torch.rand(1, n, 2, device="cuda") - 0.5) * 108 for n in (900, 5000))
    scale = 100 / (2 * 108**2)
    split = split_factors(*SquaredDistanceBias(x, y, scale).factors(), dtype)
    got = LowRankBias(*(factor.double() for factor in split)).dense()
    assert (got - SquaredDistanceBias(x.double(), y.double(), scale).dense()).abs().max() < 2e-3


@pytest.mark.parametrize("method", ["svd", "randomized"])
def test_factorize(method):
    a = torch.randn(2, 3, 150, 4, device="cuda", dtype=F64, requires_grad=True)
    b = torch.randn(2, 3, 200, 4, device="cuda", dtype=F64, requires_grad=True)
    upstream = torch.randn(2, 3, 150, 200, device="cuda", dtype=F64)
    before = torch.cuda.get_rng_state()
    result = factorize(a @ b.mT, method=method)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert result.rank == 4 and result.relative_error < 1e-9 and result.bias.q_factor.is_cuda
    got = torch.autograd.grad((result.bias.dense() * upstream).sum(), (a, b))
    exact = torch.autograd.grad((a @ b.mT * upstream).sum(), (a, b))
    for one, other in zip(got, exact):
        assert torch.allclose(one, other, atol=1e-8)
    warm = factorize((a @ b.mT).detach() * 1.01, method=method, warm_start=result.state)
    assert warm.rank == 4 and warm.relative_error < 1e-9


def test_masked_half_over_heads():
    dense = (torch.randn(150, 4, device="cuda") @ torch.randn(4, 200, device="cuda")).half()
    dense[:, 150:] = float("-inf")
    result = factorize(dense.repeat(6, 1, 1), num_heads=3)
    assert not result.used_dense and result.bias.shape == (1, 1, 150, 200)
    assert result.bias.parts().mask[0, 0, :, 150:].all()
