"""The columns that are written for q and k, and the gradients that come back through them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from flashbias_patch.attention.kernels.concatenate import MASKED, Plan, join, split

pytestmark = pytest.mark.usefixtures("written_by")
SHARED = list(itertools.product(itertools.product((False, True), repeat=2), repeat=2))
HALVES = [torch.float16, torch.bfloat16]
B, M, N, H = 2, 5, 37, 3


def operands(D, R, q_shared=(False, False), k_shared=(False, False), dtype=torch.float16, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype).requires_grad_()

    def factor(length, shared):
        return draw(1 if shared[0] else B, length, 1 if shared[1] else H, R) if R else None

    return draw(B, M, H, D), draw(B, N, H, D), factor(M, q_shared), factor(N, k_shared)


def by_cat(q, k, q_factor, k_factor, plan):
    def wide(x, *factors):
        joined = torch.cat([x, *(f.expand(*x.shape[:3], -1) for f in factors)], -1)
        return torch.nn.functional.pad(joined, (0, plan.width - joined.shape[-1]))

    if q_factor is None:
        return wide(q * plan.q_mult), wide(k)
    return wide(q * plan.q_mult, q_factor * plan.factor_mult), wide(k, k_factor)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D,R", [(32, 8), (17, 1), (40, 3), (8, 33), (32, 0)])
def test_columns_are_those_of_cat(D, R, dtype):
    q, k, q_factor, k_factor = operands(D, R, dtype=dtype)
    plan = Plan(0.25, 0.5, False, 1.0, -(-(D + R) // 16) * 16)
    for got, expected in zip(
        join(q, k, q_factor, k_factor, None, plan), by_cat(q, k, q_factor, k_factor, plan)
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("q_shared,k_shared", SHARED)
def test_gradients_are_those_of_cat(q_shared, k_shared):
    leaves = operands(12, 3, q_shared, k_shared)
    plan = Plan(0.25, 0.5, False, 1.0, 16)
    outs = join(*leaves, None, plan)
    weights = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) for out in outs]
    grads = torch.autograd.grad(outs, leaves, [w.half() for w in weights])
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(
        by_cat(*doubles, plan), doubles, [w.half().double() for w in weights]
    )
    for grad, leaf, truth in zip(grads, leaves, exact):
        assert grad.dtype == leaf.dtype and grad.shape == leaf.shape
        assert_close(grad.double(), truth, rtol=2**-11, atol=1e-6)


def test_strided_operands_are_read_in_place():
    """(B, M, H, D) views of a packed projection, a last axis that is not dense, expanded
    factors."""
    packed = torch.randn(B, N, 3, H, 16, generator=torch.Generator().manual_seed(0)).half()
    q, k = packed[:, :M, 0], packed.flip(1)[:, :, 1, :, ::1]
    k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    q_factor = torch.randn(M, 4).half().expand(B, 1, M, 4).transpose(1, 2)
    k_factor = torch.randn(1, N, 1, 8).half()[..., ::2]
    plan = Plan(0.25, 1.0, False, 1.0, 32)
    for got, expected in zip(
        join(q, k, q_factor, k_factor, None, plan), by_cat(q, k, q_factor, k_factor, plan)
    ):
        assert torch.equal(got, expected)


def test_a_gradient_that_is_not_needed_is_not_computed():
    q, k, q_factor, k_factor = operands(12, 3)
    outs = join(q, k.detach(), q_factor.detach(), k_factor, None, Plan(0.25, 0.5, False, 1.0, 16))
    sum(out.sum() for out in outs).backward()
    assert (
        q.grad is not None
        and k_factor.grad is not None
        and k.grad is None
        and q_factor.grad is None
    )
    assert split([None, None]) == [None, None]


@pytest.mark.parametrize("dtype", HALVES)
def test_low_columns_hold_what_rounding_lost(dtype):
    q, k, q_factor, k_factor = operands(16, 5, (False, True), (True, False), dtype)
    third = 1.0 / 3.0
    q_out, k_out = (
        t.double() for t in join(q, k, q_factor, k_factor, None, Plan(1.0, third, True, 1.0, 32))
    )
    product = torch.einsum("bmhd,bnhd->bhmn", q_out[..., 16:], k_out[..., 16:])
    exact = (
        torch.einsum(
            "bmhr,bnhr->bhmn", *(f.double().expand(B, -1, H, -1) for f in (q_factor, k_factor))
        )
        * third
    )
    unit = torch.finfo(dtype).eps ** 2
    assert (product - exact).abs().max() < 8 * unit * exact.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_float_padding_keeps_its_digits_and_stays_finite(dtype, scale):
    q, k, _, _ = operands(12, 0, dtype=dtype)
    padding = torch.randn(B, N, generator=torch.Generator().manual_seed(3)) * 3
    padding[0, 0], padding[0, 1], padding[1, 0] = float("-inf"), -1e9, 1e9
    q_out, k_out = (
        t.double() for t in join(q, k, None, None, padding, Plan(1.0, 1.0, False, scale, 16))
    )
    added = torch.einsum("bmhd,bnhd->bhmn", q_out[..., 12:], k_out[..., 12:])[:, 0, 0] * scale
    assert torch.isfinite(k_out).all()
    assert added[0, :2].max() <= MASKED * 0.99 and added[1, 0] >= -MASKED * 0.99
    ordinary = padding.abs() < 1e3
    assert (added - padding.double())[ordinary].abs().max() < 16 * torch.finfo(dtype).eps ** 2 * 10


def test_boolean_padding():
    q, k, q_factor, k_factor = operands(8, 2)
    padding = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.5
    q_out, k_out = join(q, k, q_factor, k_factor, padding, Plan(1.0, 1.0, False, 1.0, 16))
    assert torch.equal(q_out[..., 10:12], torch.ones_like(q_out[..., 10:12]))
    assert torch.equal(
        k_out[..., 10], torch.where(padding, MASKED, 0.0).half()[:, :, None].expand(B, N, H)
    )
    assert not k_out[..., 11:].any() and not q_out[..., 12:].any()
    assert torch.equal(k_out[..., :10], torch.cat([k, k_factor], -1))
