"""Scores from half-precision factors keep the digits of float32 ones."""

from __future__ import annotations

import pytest
import torch

from flashbias_patch.bias import LowRankBias, SquaredDistanceBias, split_factors

HALF = [torch.float16, torch.bfloat16]


def accumulate(q_factor, k_factor):
    """What a tensor core does: exact products of half operands, summed in float32."""
    return LowRankBias(q_factor.float(), k_factor.float()).dense()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("offset", [0.0, 500.0])
@pytest.mark.parametrize("drop", [False, True])
def test_distance_scores_survive_half(dtype, offset, drop):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(1, 900, 2, generator=g) - 0.5) * 108 + offset
    y = (torch.rand(1, 2000, 2, generator=g) - 0.5) * 108 + offset
    scale = 100 / (2 * 108**2)
    exact = SquaredDistanceBias(x.double(), y.double(), scale).dense()
    assert 80 < exact.abs().max() <= 100
    factors = SquaredDistanceBias(x, y, scale, drop_query_term=drop).factors()
    difference = accumulate(*split_factors(*factors, dtype)).double() - exact
    if drop:
        difference = difference - difference.mean(-1, keepdim=True)
    assert difference.abs().max() < 2e-3
    plain = SquaredDistanceBias(x, y, scale).factors()
    unsplit = accumulate(*(factor.to(dtype) for factor in plain)).double()
    assert (unsplit - exact).abs().max() > 1e-2  # the split is what does it


def test_float16_with_steep_scale():
    """scale 1: terms of thousands cancel into scores up to 100; float16 keeps them."""
    g = torch.Generator().manual_seed(0)
    x, y = ((torch.rand(1, n, 2, generator=g) - 0.5) * 108 for n in (900, 2000))
    exact = SquaredDistanceBias(x.double(), y.double()).dense()
    got = accumulate(*split_factors(*SquaredDistanceBias(x, y).factors(), torch.float16)).double()
    near = exact.abs() <= 100
    assert near.sum() > 1000 and (got - exact)[near].abs().max() < 4e-3


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("q_size, k_size", [(1.0, 1.0), (1e6, 1e-6), (1e-6, 1e6), (3e5, 1e-2)])
def test_relative_error_whatever_the_magnitudes(dtype, q_size, k_size):
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, 40, 1, 3, generator=g) * q_size
    k = torch.randn(1, 50, 4, 3, generator=g) * k_size
    exact = LowRankBias(q.double(), k.double()).dense()
    size = LowRankBias(q.double().abs(), k.double().abs()).dense()
    split = split_factors(q, k, dtype)
    assert split[0].shape == (2, 40, 1, 9) and split[1].shape == (1, 50, 4, 9)
    assert split[0].dtype == split[1].dtype == dtype
    bound = 3 * 2.0 ** (-22 if dtype == torch.float16 else -16) + 2.0**-22
    floor = (
        1e-6 * size.max() if dtype == torch.float16 else 0.0
    )  # what goes subnormal beside a large entry
    assert ((accumulate(*split).double() - exact).abs() <= bound * size + floor).all()


@pytest.mark.parametrize("dtype", HALF)
def test_columns(dtype):
    q, k = torch.randn(1, 4, 1, 2), torch.randn(1, 5, 1, 2)
    assert split_factors(q.to(dtype), k, dtype)[0].shape[-1] == 4
    assert split_factors(q, k.to(dtype), dtype)[0].shape[-1] == 4
    same = split_factors(q.to(dtype), k.to(dtype), dtype)
    assert torch.equal(same[0], q.to(dtype)) and torch.equal(same[1], k.to(dtype))
    for other in (torch.float32, torch.float64):
        cast = split_factors(q, k, other)
        assert cast[0].dtype == other and cast[0].shape[-1] == 2


@pytest.mark.parametrize("dtype", HALF)
def test_one_half_factor_keeps_the_digits_of_the_other(dtype):
    q, k = torch.randn(1, 30, 1, 2), torch.randn(1, 40, 1, 2).to(dtype)
    exact = LowRankBias(q.double(), k.double()).dense()
    for pair in (split_factors(q, k, dtype), split_factors(k, q, dtype)[::-1]):
        assert (accumulate(*pair).double() - exact).abs().max() < 2.0**-14


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_those_of_the_product(dtype):
    g = torch.Generator().manual_seed(2)
    q = (torch.randn(2, 30, 1, 3, generator=g) * 50).requires_grad_()
    k = torch.randn(1, 40, 2, 3, generator=g).requires_grad_()
    upstream = torch.randn(2, 2, 30, 40, generator=g)
    got = torch.autograd.grad((accumulate(*split_factors(q, k, dtype)) * upstream).sum(), (q, k))
    exact = torch.autograd.grad(
        (LowRankBias(q.double(), k.double()).dense() * upstream).sum(), (q, k)
    )
    for one, other in zip(got, exact):  # each column's gradient is rounded once to half
        assert (one - other).norm() < 2 * torch.finfo(dtype).eps * other.norm()


def test_zero_columns_and_zero_factors():
    q, k = torch.zeros(1, 4, 1, 2), torch.randn(1, 5, 1, 2)
    for dtype in HALF:
        assert torch.equal(accumulate(*split_factors(q, k, dtype)), torch.zeros(1, 1, 4, 5))
