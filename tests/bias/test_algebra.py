"""The algebra of biases: every operation equals the same operation on dense tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbias_patch.bias import (
    AlibiBias,
    AttentionBias,
    DenseBias,
    LowRankBias,
    MaskBias,
    ModalityBias,
    SquaredDistanceBias,
    SumBias,
)
from tests.support.capabilities import needs_autocast

B, M, N, H = 2, 5, 7, 3
F64 = torch.float64


def full(tensor):
    return tensor.expand(B, H, M, N)


def make(kind, seed):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=F64)

    b, h = (B, 1)[seed % 2], (H, 1)[seed // 2 % 2]
    return {
        "low": lambda: LowRankBias(rand(b, M, 1, 2), rand(1, N, h, 2)),
        "dense": lambda: DenseBias(rand(b, h, M, N)),
        "row": lambda: DenseBias(rand(b, h, 1, N)),
        "modality": lambda: ModalityBias(rand(b, M, h, 2), (4, 3)),
        "other_modality": lambda: ModalityBias(rand(b, M, 3), (1, 0, 6)),
        "distance": lambda: SquaredDistanceBias(rand(b, M, 2), rand(1, N, 2), rand(h)),
        "alibi": lambda: AlibiBias(rand(h), M, N),
        "mask": lambda: MaskBias(rand(b, h, M, N) > 1),
    }[kind]()


KINDS = ["low", "dense", "row", "modality", "other_modality", "distance", "alibi", "mask"]
terms = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.integers(0, 50),
        st.sampled_from([None, 2.0, -0.5, "head", "scalar"]),
    ),
    min_size=1,
    max_size=4,
)


def sum_of_parts(bias):
    """What attention would add: the parts, put together by hand."""
    parts = bias.parts()
    result = torch.zeros(B, H, M, N, dtype=F64)
    if parts.q_factor is not None:
        q, k = (factor.expand(B, -1, H, -1) for factor in (parts.q_factor, parts.k_factor))
        result = result + torch.einsum("bmhr,bnhr->bhmn", q, k)
    if parts.segments is not None:
        weights, lengths = parts.segments
        result = result + weights.permute(0, 2, 1, 3).repeat_interleave(
            torch.tensor(lengths), dim=-1
        )
    if parts.dense is not None:
        result = result + parts.dense
    return result if parts.mask is None else result.masked_fill(parts.mask, float("-inf"))


@settings(deadline=None, max_examples=80)
@given(terms)
def test_sums_and_multiples_equal_the_dense_ones(drawn):
    total, expected = None, torch.zeros(B, H, M, N, dtype=F64)
    for kind, seed, factor in drawn:
        bias = make(kind, seed)
        dense = full(bias.dense())
        if factor == "head":
            factor = torch.linspace(0.5, 2, H, dtype=F64)
        elif factor == "scalar":
            factor = torch.tensor(1.5, dtype=F64)
        if factor is not None:
            bias = factor * bias if isinstance(factor, float) else bias * factor
            shaped = (
                factor[:, None, None]
                if isinstance(factor, torch.Tensor) and factor.dim()
                else factor
            )
            dense = dense if kind == "mask" else dense * shaped
        total = bias if total is None else total + bias
        expected = expected + dense
    assert torch.allclose(full(total.dense().to(F64)), expected, atol=1e-10)
    assert torch.allclose(sum_of_parts(total), expected, atol=1e-10)
    if total.rank is not None:
        q_factor, k_factor = total.factors()
        assert q_factor.shape[-1] == k_factor.shape[-1] == total.rank
        assert torch.allclose(full(LowRankBias(q_factor, k_factor).dense()), expected, atol=1e-10)
    assert torch.equal((-total).to(dtype=F64).dense(), (total * -1).dense())


def test_ranks_concatenate_and_kinds_stay_apart():
    low = make("low", 0)
    assert isinstance(low + low * 2, LowRankBias) and (low + low).rank == 4
    assert (
        isinstance(low + make("distance", 1), LowRankBias) and (low + make("distance", 1)).rank == 6
    )
    both = low + make("modality", 0)
    assert isinstance(both, SumBias) and both.rank == 4 and both.parts().segments is not None
    mixed = low + make("dense", 0) + make("mask", 0) + low
    assert mixed.rank is None and len(mixed.terms) == 3
    assert isinstance(make("dense", 0) + make("dense", 1), DenseBias)
    twice = (make("modality", 0) + make("modality", 1)).parts()
    assert twice.q_factor is None and twice.segments[1] == (4, 3)


def test_sum_built_by_hand_merges_in_parts():
    terms = [make(kind, seed) for kind in ("mask", "dense", "low") for seed in (0, 3)]
    expected = sum(full(term.dense()) for term in terms)
    assert torch.allclose(sum_of_parts(SumBias(terms)), expected)


def test_broadcast_stays_broadcast():
    low = LowRankBias(torch.randn(1, M, 1, 2), torch.randn(1, N, 1, 2))
    assert (
        low.shape == (1, 1, M, N)
        and (low + low).shape == (1, 1, M, N)
        and (low * 2).shape == (1, 1, M, N)
    )
    dense = DenseBias(torch.randn(1, M, N).expand(B * H, M, N), num_heads=H)
    assert dense.shape == (1, 1, M, N)
    assert DenseBias(torch.randn(B, 1, M, N).expand(B, H, M, N)).shape == (B, 1, M, N)


def test_three_dimensional_layouts():
    tensor = torch.randn(B * H, M, N)
    assert torch.equal(DenseBias(tensor, num_heads=H).dense()[1, 2], tensor[1 * H + 2])
    assert DenseBias(tensor).shape == (B * H, 1, M, N)
    assert DenseBias(tensor[0]).shape == (1, 1, M, N)


def test_split_mask():
    tensor = torch.randn(M, N)
    tensor[1, 2] = float("-inf")
    finite, mask = DenseBias(tensor).split_mask()
    assert finite.dense()[0, 0, 1, 2] == 0 and mask.mask.sum() == 1 and mask.mask[0, 0, 1, 2]
    assert torch.equal((finite + mask).dense()[0, 0], tensor)
    parts = DenseBias(tensor).parts()
    assert parts.mask is None and torch.equal(parts.dense[0, 0], tensor)


@pytest.mark.parametrize("factor", (0.0, -2.0, torch.tensor(0.0), torch.tensor(-2.0)), ids=str)
def test_hidden_entries_stay_hidden_whatever_the_factor(factor):
    tensor = torch.randn(M, N, dtype=F64)
    tensor[1, 2] = float("-inf")
    factor = factor.clone().requires_grad_() if isinstance(factor, torch.Tensor) else factor
    found = (DenseBias(tensor) * factor).dense()[0, 0]
    exact = (tensor * factor).masked_fill(torch.isneginf(tensor), float("-inf"))
    assert torch.equal(found, exact)
    if isinstance(factor, torch.Tensor):
        (grad,) = torch.autograd.grad(found.softmax(-1).square().sum(), factor)
        assert grad.isfinite()


def test_the_shape_of_a_sum_is_that_of_both():
    for shapes in (((1, 1), (B, 1)), ((B, 1), (1, H)), ((1, H), (B, 1))):
        first, second = (DenseBias(torch.randn(*shape, M, N)) for shape in shapes)
        low = LowRankBias(torch.randn(B, M, H, 2), torch.randn(1, N, 1, 2))
        wanted = tuple(map(max, *shapes))
        assert (first + second).shape == (*wanted, M, N)
        assert (first + low).shape == (low + first).shape == (B, H, M, N)
    low = LowRankBias(torch.randn(1, M, 1, 2), torch.randn(1, N, 1, 2))
    dense = DenseBias(torch.randn(B, H, M, N))
    assert (dense + low).shape == (low + dense).shape == (B, H, M, N)


def test_gradients_reach_factors_and_multiplier():
    q = torch.randn(1, 3, 2, 2, dtype=F64, requires_grad=True)
    k = torch.randn(2, 4, 1, 2, dtype=F64, requires_grad=True)
    scale = torch.randn(2, dtype=F64, requires_grad=True)
    dense = torch.randn(3, 4, dtype=F64, requires_grad=True)

    def scores(q, k, scale, dense):
        low = LowRankBias(q, k) + LowRankBias(k.new_ones(1, 3, 1, 1), k[..., :1])
        return ((low + DenseBias(dense)) * scale).dense()

    assert torch.autograd.gradcheck(scores, (q, k, scale, dense))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_to(kind):
    bias = make(kind, 0)
    held = bias.tensors()
    assert held and all(isinstance(tensor, torch.Tensor) for tensor in held)
    moved = bias.to(dtype=torch.float32)
    assert type(moved) is type(bias) and moved.shape == bias.shape
    assert all(t.dtype in (torch.float32, torch.bool) for t in moved.tensors())
    assert all(t.dtype in (F64, torch.bool) for t in bias.tensors())
    assert torch.equal(copy.deepcopy(bias).dense(), bias.dense())
    assert str(bias.shape) in repr(bias)
    with pytest.raises(TypeError, match="dtype"):
        bias.to(dtype=torch.int64)


@needs_autocast
def test_autocast_does_not_touch_digits():
    bias = make("low", 0).to(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bias.dense().dtype == torch.float32


q, k = torch.zeros(2, M, 3, 2), torch.zeros(2, N, 1, 2)


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda: LowRankBias(q.int(), k), TypeError, "q_factor.*int32"),
        (lambda: LowRankBias(q, [1]), TypeError, "k_factor.*list"),
        (lambda: LowRankBias(q[0], k), ValueError, r"q_factor.*\(5, 3, 2\)"),
        (lambda: LowRankBias(q, k[..., :1]), ValueError, r"\(2, 5, 3, 2\).*\(2, 7, 1, 1\)"),
        (lambda: LowRankBias(q[..., :0], k[..., :0]), ValueError, "R >= 1"),
        (lambda: LowRankBias(torch.zeros(3, M, 1, 2), k), ValueError, "batch"),
        (lambda: LowRankBias(q, torch.zeros(2, N, 2, 2)), ValueError, "heads"),
        (lambda: LowRankBias(q.to("meta"), k), ValueError, "device"),
        (lambda: DenseBias(torch.ones(M, N, dtype=torch.bool)), TypeError, "MaskBias"),
        (lambda: DenseBias(torch.ones(M)), ValueError, r"\(5,\)"),
        (
            lambda: DenseBias(torch.ones(7, M, N), num_heads=3),
            ValueError,
            r"num_heads=3.*\(7, 5, 7\)",
        ),
        (lambda: DenseBias(torch.ones(2, 4, M, N), num_heads=3), ValueError, "3 or 1 heads"),
        (lambda: DenseBias(torch.ones(6, M, N), num_heads=0), ValueError, "num_heads"),
        (lambda: MaskBias(torch.ones(M, N)), TypeError, "mask.*float32"),
        (
            lambda: LowRankBias(q, k) + LowRankBias(q, torch.zeros(2, N + 1, 1, 2)),
            ValueError,
            "keys 7 and 8",
        ),
        (
            lambda: LowRankBias(q, k) + DenseBias(torch.zeros(2, 2, M, N)),
            ValueError,
            "heads 3 and 2",
        ),
        (lambda: LowRankBias(q, k) * torch.ones(2), ValueError, r"\(3,\).*\(2, 3, 5, 7\).*\(2,\)"),
        (lambda: LowRankBias(q, k) * torch.ones(3, 1), ValueError, "factor"),
        (lambda: LowRankBias(q, k) * torch.tensor(2), TypeError, "factor"),
        (lambda: LowRankBias(q, k) * True, TypeError, "unsupported operand"),
        (lambda: LowRankBias(q, k) + 1.0, TypeError, "unsupported operand"),
        (lambda: SumBias([]), ValueError, "terms"),
        (
            lambda: DenseBias(torch.ones(M, N)).factors(),
            ValueError,
            "DenseBias has no low-rank form",
        ),
        (
            lambda: (LowRankBias(q, k) + DenseBias(torch.ones(M, N))).factors(),
            ValueError,
            "no low-rank form",
        ),
    ],
)
def test_mistakes_are_named(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_base_is_abstract():
    with pytest.raises(NotImplementedError):
        AttentionBias().shape  # noqa: B018
