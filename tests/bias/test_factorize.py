"""factorize keeps its promises on planted spectra: rank, energy, measured error, gradient, the way
out."""

from __future__ import annotations

import math

import pytest
import torch

from flashbias_patch.bias import DenseBias, LowRankBias, MaskBias, ModalityBias, factorize
from tests.support import internals
from tests.support.capabilities import needs_autocast, storage_bytes

F64 = torch.float64
SEARCHES = ["svd", "randomized"]


def planted(values, rows=96, columns=200, seed=0, lead=(), dtype=torch.float32):
    """A matrix with these singular values."""
    g = torch.Generator().manual_seed(seed)
    rank = len(values)
    u = torch.linalg.qr(torch.randn(*lead, rows, rank, generator=g, dtype=F64)).Q
    v = torch.linalg.qr(torch.randn(*lead, columns, rank, generator=g, dtype=F64)).Q
    return ((u * torch.tensor(values, dtype=F64)) @ v.transpose(-2, -1)).to(dtype)


def low_part(result):
    return next(term for term in internals.terms_of(result.bias) if isinstance(term, LowRankBias))


def true_error(result, dense):
    got, dense = low_part(result).dense().double(), dense.double()
    dense = dense.reshape((1,) * (4 - dense.dim()) + dense.shape)
    return ((got - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1)).max().item()


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize(
    "values, energy, rank",
    [
        ([1.0] * 8, 0.9999, 8),
        ([1.0, 0.1, 0.001], 0.9999, 2),
        ([1.0, 0.1, 0.001], 0.98, 1),
        ([1.0] * 10, 0.9, 9),
        ([2.0**-i for i in range(20)], 1 - 1e-5, 9),
        ([1.0] * 40, 0.9999, 40),  # wider than the first guess: the search widens
    ],
)
def test_smallest_rank_that_keeps_the_energy(method, values, energy, rank):
    dense = planted(values)
    result = factorize(dense, energy=energy, method=method)
    assert result.rank == rank and not result.used_dense and low_part(result).rank == rank
    tail = math.sqrt(sum(v * v for v in values[rank:]) / sum(v * v for v in values))
    assert result.relative_error == pytest.approx(tail, abs=1e-5, rel=1e-2)
    assert result.relative_error == pytest.approx(true_error(result, dense), abs=1e-6, rel=1e-3)
    assert result.energy == pytest.approx(1 - result.relative_error**2)
    assert result.energy >= energy - 1e-6


@pytest.mark.parametrize("method", SEARCHES)
def test_fixed_rank_and_both(method):
    dense = planted([1.0, 0.5, 0.01, 0.001])
    assert factorize(dense, rank=3, method=method).rank == 3
    assert factorize(dense, rank=3, energy=0.9, method=method).rank == 2
    refused = factorize(dense, rank=1, method=method)
    assert refused.used_dense and refused.bias.dense() is not None and "max_error" in refused.reason
    assert (
        refused.relative_error == pytest.approx(math.sqrt(0.25 / 1.25), rel=1e-2)
        and refused.rank == 1
    )
    assert torch.equal(refused.bias.dense()[0, 0], dense)
    accepted = factorize(dense, rank=1, method=method, max_error=0.5)
    assert not accepted.used_dense and accepted.reason == ""
    assert factorize(dense, rank=500, method=method).rank == 96


def test_error_is_measured_under_noise_and_never_far_from_the_optimum():
    g = torch.Generator().manual_seed(3)
    dense = planted([10.0] * 8, 300, 500) + 1e-3 * torch.randn(300, 500, generator=g)
    exact = factorize(dense, rank=8, method="svd")
    random = factorize(dense, rank=8, method="randomized")
    assert exact.relative_error == pytest.approx(true_error(exact, dense), rel=1e-3)
    assert random.relative_error == pytest.approx(true_error(random, dense), rel=1e-3)
    assert random.relative_error <= 1.01 * exact.relative_error


def test_no_low_rank_means_dense():
    dense = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    for method in SEARCHES:
        result = factorize(dense, method=method)
        assert (
            result.used_dense
            and isinstance(result.bias, DenseBias)
            and "keeps 0.9999" in result.reason
        )
        assert 0.02 < result.relative_error < 1
    assert result.state.hopeless
    again = factorize(dense, method="randomized", warm_start=result.state)
    assert again.used_dense and again.rank < 40  # one narrow try, no search
    back = factorize(planted([1.0] * 5, 200, 300), method="randomized", warm_start=again.state)
    assert not back.used_dense and back.rank == 5 and not back.state.hopeless


def test_a_lower_energy_allows_its_own_error():
    dense = planted([1.0, 0.3])
    assert factorize(dense, rank=1).used_dense
    lower = factorize(dense, energy=0.9)
    assert lower.rank == 1 and not lower.used_dense and lower.relative_error > 0.2
    assert factorize(dense, energy=0.9, max_error=0.1).used_dense


@pytest.mark.parametrize("method", SEARCHES)
def test_worst_of_a_batch_decides(method):
    dense = torch.stack([planted([1.0] * r, seed=r) for r in (1, 2, 3, 6)]).reshape(2, 2, 96, 200)
    result = factorize(dense, method=method)
    assert result.rank == 6 and result.bias.shape == (2, 2, 96, 200)
    assert true_error(result, dense) < 1e-4
    assert factorize(dense.flatten(0, 1), num_heads=2, method=method).bias.shape == (2, 2, 96, 200)
    assert factorize(dense[:, 0], method=method).bias.shape == (2, 1, 96, 200)
    assert all(torch.isfinite(factor).all() for factor in result.bias.factors())


def test_wide_and_tall_and_half():
    for rows, columns in ((30, 500), (500, 30), (1, 40), (40, 1)):
        dense = planted([1.0], rows, columns)
        assert factorize(dense, rank=1).relative_error < 1e-5
    half = planted([100.0] * 4).half()
    result = factorize(half)
    assert (
        result.bias.q_factor.dtype == torch.float32
        and result.rank == 4
        and result.relative_error < 1e-3
    )


def test_repeated_heads_are_stored_once():
    dense = planted([1.0] * 4)
    copies = dense.repeat(6, 1, 1)
    for given in (dense.expand(6, -1, -1), copies, copies.reshape(2, 3, 96, 200)):
        assert factorize(given, num_heads=3).bias.shape == (1, 1, 96, 200)
    per_batch = torch.stack([dense, 2 * dense])[:, None].repeat(1, 3, 1, 1)
    assert factorize(per_batch).bias.shape == (2, 1, 96, 200)
    copies[5, 50, 60] += 1e-3
    assert factorize(copies, num_heads=3).bias.shape == (2, 3, 96, 200)


def test_equal_copies_get_their_own_gradients():
    """Heads that only happen to be equal must be free to part."""
    heads = planted([1.0] * 4, dtype=F64).repeat(1, 3, 1, 1).requires_grad_()
    bias = factorize(heads).bias
    assert bias.shape == (1, 3, 96, 200)
    assert storage_bytes(bias.q_factor) == 8 * 96 * 4
    weights = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
    (grad,) = torch.autograd.grad(
        (bias.dense() * weights[:, None, None] * heads.detach()).sum(), heads
    )
    assert torch.allclose(grad, weights[:, None, None] * heads.detach(), atol=1e-9)


def test_masked_entries_are_split_off():
    dense = planted([1.0] * 4)
    masked = torch.zeros(96, 200, dtype=torch.bool)
    masked[:, 150:] = True
    masked[:20] = True
    given = dense.masked_fill(masked, float("-inf"))
    result = factorize(given)
    assert not result.used_dense and result.rank == 4
    assert torch.equal(result.bias.parts().mask[0, 0], masked)
    assert torch.equal(torch.isneginf(result.bias.dense()[0, 0]), masked)
    assert (result.bias.dense()[0, 0] - given)[~masked].abs().max() < 1e-5
    assert factorize(dense).bias.parts().mask is None

    leaf = given.clone().requires_grad_()
    bias = low_part(factorize(leaf))
    (grad,) = torch.autograd.grad(bias.dense().sum(), leaf)
    assert torch.isfinite(grad).all() and (grad[masked] == 0).all() and (grad[~masked] != 0).any()


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_gradient_is_exact_for_a_bias_of_that_rank(method, lead):
    g = torch.Generator().manual_seed(5)
    a, b = (torch.randn(*lead, n, 4, generator=g, dtype=F64, requires_grad=True) for n in (70, 90))
    scale = torch.tensor(0.3, dtype=F64, requires_grad=True)
    upstream = torch.randn(*lead, 70, 90, generator=g, dtype=F64)
    leaves = (a, b, scale)
    dense = scale * (a @ b.transpose(-2, -1))
    got = torch.autograd.grad(
        (factorize(dense, method=method).bias.dense() * upstream).sum(), leaves
    )
    exact = torch.autograd.grad((scale * (a @ b.transpose(-2, -1)) * upstream).sum(), leaves)
    for one, other in zip(got, exact):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_gradient_is_the_projection_stated():
    """What does not arrive is the part outside the rows and columns kept, and no more."""
    dense = planted([1.0, 0.5, 0.001], dtype=F64).requires_grad_()
    result = factorize(dense, rank=2)
    upstream = torch.randn(96, 200, dtype=F64, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((result.bias.dense()[0, 0] * upstream).sum(), dense)
    u, _, vh = torch.linalg.svd(dense.detach(), full_matrices=False)
    p, q = u[:, :2] @ u[:, :2].T, vh[:2].T @ vh[:2]
    assert torch.allclose(grad, upstream @ q + p @ upstream - p @ upstream @ q, atol=1e-7)


def test_a_zero_bias_still_learns():
    fixed_map = planted([1.0] * 4)
    scale = torch.zeros((), requires_grad=True)
    result = factorize(scale * fixed_map)
    assert result.used_dense and "zero" in result.reason
    result.bias.dense().mul(fixed_map).sum().backward()
    assert scale.grad == pytest.approx(4.0, rel=1e-4)
    constant = factorize(torch.zeros(96, 200))
    assert not constant.used_dense and constant.relative_error == 0
    assert (constant.bias.dense() == 0).all()


def test_nan_and_overflow_go_through_dense():
    for bad in (float("nan"), float("inf")):
        dense = planted([1.0])
        dense[3, 4] = bad
        result = factorize(dense)
        assert result.used_dense and "NaN or +inf" in result.reason and result.state is None


def test_no_queries():
    """An expert of a routed decoder may get none."""
    result = factorize(torch.zeros(2, 0, 30))
    assert result.used_dense and result.bias.shape == (2, 1, 0, 30) and "empty" in result.reason


def moved(dense, step):
    """A little further: each step turns and shifts the rows and columns."""
    return dense + 0.02 * planted([dense.norm().item() / 2] * 3, *dense.shape[-2:], seed=step)


def test_warm_start_follows_a_moving_bias():
    dense = planted([10.0, 8.0, 5.0, 3.0], 128, 300)
    result = factorize(dense, method="randomized")
    for step in range(1, 8):
        dense = moved(dense, step)
        result = factorize(dense, method="randomized", warm_start=result.state)
        exact = factorize(dense, method="svd")
        assert not result.used_dense and result.energy >= 0.9999 - 1e-6
        assert result.rank <= exact.rank + 1
        assert result.relative_error == pytest.approx(true_error(result, dense), rel=1e-3)
    assert result.state.calls == 7


def test_warm_start_at_fixed_rank_recovers_from_a_jump():
    """One pass from rows that no longer matter is not enough; the search begins again before giving
    up."""
    values = [1.0] * 6 + [0.15] * 80
    first, other = planted(values, seed=1), planted(values, seed=2)
    state = factorize(first, rank=6, method="randomized", max_error=1.0).state
    best = factorize(other, rank=6, method="svd", max_error=1.0).relative_error
    result = factorize(other, rank=6, method="randomized", warm_start=state, max_error=1.05 * best)
    assert not result.used_dense and result.relative_error < 1.05 * best


def test_warm_start_with_other_queries_and_unfitting_state():
    dense = planted([1.0] * 6, 128, 300)
    state = factorize(dense, method="randomized").state
    assert factorize(dense[:100], method="randomized", warm_start=state).rank == 6
    assert factorize(dense[:, :200], method="randomized", warm_start=state).rank == 6
    assert factorize(dense.repeat(2, 1, 1), method="randomized", warm_start=state).rank == 6


def test_randomness_is_private_and_repeatable():
    dense = planted([1.0] * 4 + [1e-3] * 20, 128, 300)
    before = torch.get_rng_state()
    one, two = (
        factorize(dense, rank=4, method="randomized"),
        factorize(dense, rank=4, method="randomized"),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.bias.q_factor, two.bias.q_factor)
    generator = torch.Generator().manual_seed(7)
    seeded = generator.get_state()
    factorize(dense, rank=4, method="randomized", generator=generator)
    assert not torch.equal(generator.get_state(), seeded)


def test_other_terms_are_kept():
    dense = planted([1.0] * 4)
    modality = ModalityBias(torch.randn(1, 96, 2), (150, 50))
    mask = MaskBias(torch.rand(96, 200) > 0.9)
    result = factorize(DenseBias(dense) + modality + mask)
    parts = result.bias.parts()
    assert parts.dense is None and parts.segments is not None and torch.equal(parts.mask, mask.mask)
    assert parts.q_factor.shape[-1] == 4
    low = LowRankBias(torch.randn(1, 4, 1, 2), torch.randn(1, 5, 1, 2))
    assert (
        factorize(low).bias is low
        and factorize(low).relative_error == 0
        and factorize(low).rank == 2
    )


@needs_autocast
def test_autocast_does_not_touch_digits():
    dense = planted([1.0] * 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = factorize(dense, method="randomized")
    assert result.relative_error < 1e-5 and result.bias.q_factor.dtype == torch.float32


@pytest.mark.parametrize(
    "arguments, error, word",
    [
        ({"rank": 0}, ValueError, "rank"),
        ({"rank": 2.0}, ValueError, "rank"),
        ({"energy": 0.0}, ValueError, "energy"),
        ({"energy": 1.5}, ValueError, "energy"),
        ({"method": "qr"}, ValueError, "method.*qr"),
        ({"max_error": -1.0}, ValueError, "max_error"),
        ({"bias": torch.ones(3, 4, dtype=torch.long)}, TypeError, "int64"),
        ({"bias": torch.ones(7, 3, 4), "num_heads": 2}, ValueError, "num_heads=2"),
    ],
)
def test_mistakes_are_named(arguments, error, word):
    with pytest.raises(error, match=word):
        factorize(**{"bias": torch.ones(3, 4), **arguments})
