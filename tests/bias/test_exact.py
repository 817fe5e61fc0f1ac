"""Exact biases: factors give what the formula says, gradients included, and nothing of size M*N is
formed."""

from __future__ import annotations

import pytest
import torch

from flashbias_patch.bias import AlibiBias, LowRankBias, ModalityBias, SquaredDistanceBias
from tests.support.capabilities import storage_bytes

F64 = torch.float64
B, M, N, H = 2, 5, 9, 3
LENGTHS = (4, 0, 5)


def rand(*shape):
    return torch.randn(shape, dtype=F64, requires_grad=True)


def product(bias):
    return LowRankBias(*bias.factors()).dense()


def test_modality_by_hand():
    weights = torch.randn(B, M, 3, dtype=F64)
    bias = ModalityBias(weights, LENGTHS)
    expected = torch.stack([weights[..., s] for s in (0,) * 4 + (2,) * 5], dim=-1)[:, None]
    assert bias.shape == (B, 1, M, N) and bias.rank == 3
    assert torch.equal(bias.dense(), expected) and torch.equal(product(bias), expected)
    assert bias.parts().q_factor is None and bias.parts().segments == (bias.weights, LENGTHS)


def test_distance_by_hand():
    x, y, scale = (
        torch.randn(B, M, 2, dtype=F64),
        torch.randn(1, N, 2, dtype=F64),
        torch.rand(H, dtype=F64),
    )
    bias = SquaredDistanceBias(x, y, scale)
    expected = -scale[:, None, None] * torch.cdist(x, y.expand(B, N, 2)).square()[:, None]
    assert bias.shape == (B, H, M, N) and bias.rank == 4
    assert torch.allclose(bias.dense(), expected) and torch.allclose(product(bias), expected)


def test_distance_per_segment_by_hand():
    x, y = torch.randn(B, M, 3, 2, dtype=F64), torch.randn(B, N, 2, dtype=F64)
    valid = torch.rand(B, M, 3) > 0.4
    x[~valid] = float("nan")
    bias = SquaredDistanceBias(x, y, 0.7, segments=LENGTHS, valid=valid)
    expected = torch.zeros(B, 1, M, N, dtype=F64)
    for b in range(B):
        for m in range(M):
            for n in range(N):
                s = 0 if n < 4 else 2
                if valid[b, m, s]:
                    expected[b, 0, m, n] = -0.7 * (x[b, m, s] - y[b, n]).square().sum()
    assert bias.rank == 12
    assert torch.allclose(bias.dense(), expected) and torch.allclose(product(bias), expected)


def test_dropped_query_term_is_invisible_to_softmax():
    x, y = torch.randn(B, M, 2, dtype=F64) + 5, torch.randn(B, N, 2, dtype=F64) + 5
    whole, dropped = (
        SquaredDistanceBias(x, y, 0.5),
        SquaredDistanceBias(x, y, 0.5, drop_query_term=True),
    )
    assert dropped.rank == 3 and torch.allclose(dropped.dense(), product(dropped))
    difference = whole.dense() - dropped.dense()
    assert torch.allclose(difference, difference[..., :1].expand_as(difference))
    assert torch.allclose(whole.dense().softmax(-1), dropped.dense().softmax(-1))


@pytest.mark.parametrize("queries, offset", [(N, None), (4, None), (4, 0), (4, -2)])
def test_alibi_by_hand(queries, offset):
    slopes = 2.0 ** -torch.arange(1, H + 1, dtype=F64)
    bias = AlibiBias(slopes, queries, N, offset)
    shift = N - queries if offset is None else offset
    i, j = torch.arange(queries)[:, None], torch.arange(N)
    expected = slopes[:, None, None] * (j - (i + shift))
    assert bias.shape == (1, H, queries, N) and bias.rank == 2
    assert torch.allclose(bias.dense()[0], expected) and torch.allclose(product(bias)[0], expected)
    causal = j <= i + shift
    assert (bias.dense()[0][:, causal] <= 0).all()


def test_gradients():
    def segments(x, y, scale):
        valid = torch.tensor([[[True, False, True]] * M])
        return SquaredDistanceBias(x, y, scale, segments=LENGTHS, valid=valid.expand(B, M, 3))

    cases = [
        (lambda w: ModalityBias(w, LENGTHS), (rand(B, M, 3),)),
        (SquaredDistanceBias, (rand(B, M, 2), rand(1, N, 2), rand(H))),
        (SquaredDistanceBias, (rand(B, M, 2), rand(1, N, 2), rand())),
        (segments, (rand(B, M, 3, 2), rand(B, N, 2), rand(H))),
        (lambda s: AlibiBias(s, M, N), (rand(H),)),
    ]
    g = torch.randn(B, H, M, N, dtype=F64)
    for build, inputs in cases:
        assert torch.autograd.gradcheck(lambda *args, build=build: product(build(*args)), inputs)
        through_factors = torch.autograd.grad((product(build(*inputs)) * g).sum(), inputs)
        through_dense = torch.autograd.grad((build(*inputs).dense() * g).sum(), inputs)
        for one, other in zip(through_factors, through_dense):
            assert torch.allclose(one, other)


def test_dropped_query_term_gradients():
    """Under softmax, as without it the constant that is dropped moves with the keys' centre."""

    def attention(x, y, scale):
        return product(SquaredDistanceBias(x, y, scale, drop_query_term=True)).softmax(-1)

    assert torch.autograd.gradcheck(attention, (rand(B, M, 2), rand(1, N, 2), rand(H)))


def test_invalid_nan_coordinates_give_finite_gradients():
    x = torch.randn(1, 3, 2, 2)
    x[0, 1, 0] = float("nan")
    x.requires_grad_()
    valid = torch.ones(1, 3, 2, dtype=torch.bool)
    valid[0, 1, 0] = False
    bias = SquaredDistanceBias(x, torch.randn(1, 6, 2), segments=(2, 4), valid=valid)
    (grad,) = torch.autograd.grad(product(bias).sum(), x)
    assert torch.isfinite(grad).all() and (grad[0, 1, 0] == 0).all() and (grad[0, 0] != 0).any()


def test_nothing_of_size_m_times_n():
    queries, keys = 1_000_000, 1_000_000  # 4 TB dense
    one = torch.zeros(1, queries, 2)
    biases = [
        ModalityBias(one, (keys - 7, 7)),
        SquaredDistanceBias(one, torch.zeros(1, keys, 2), torch.ones(8)[:1]),
        AlibiBias(torch.ones(1), queries, keys),
    ]
    total = biases[0] + biases[1] * 2.0 + biases[2]
    for bias in [*biases, total]:
        for factor in bias.factors():
            assert storage_bytes(factor) <= 4 * bias.rank * queries
            assert factor.shape[0] == factor.shape[2] == 1


def test_half_inputs_are_raised_to_float32():
    x, y = torch.randn(1, M, 2).half(), torch.randn(1, N, 2).bfloat16()
    assert SquaredDistanceBias(x, y).factors()[0].dtype == torch.float32
    assert AlibiBias(torch.ones(2).half(), M, N).factors()[0].dtype == torch.float32


xy, keys_xy = torch.zeros(2, M, 2), torch.zeros(1, N, 2)


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda: ModalityBias(torch.zeros(2, M, 3), (4, 5)), ValueError, r"S = 2.*\(2, 5, 3\)"),
        (lambda: ModalityBias(torch.zeros(2, M, 2), (4, -5)), ValueError, ">= 0"),
        (lambda: ModalityBias(torch.zeros(2, M, 2), (4, 5.0)), TypeError, "segments.*5.0"),
        (lambda: ModalityBias(torch.zeros(2, M, 0), ()), ValueError, "segments"),
        (lambda: ModalityBias(torch.zeros(2, M, 2).long(), (4, 5)), TypeError, "weights.*int64"),
        (lambda: SquaredDistanceBias(xy.int(), keys_xy), TypeError, "query_xy"),
        (lambda: SquaredDistanceBias(xy, keys_xy[0]), ValueError, r"key_xy.*\(9, 2\)"),
        (lambda: SquaredDistanceBias(xy, torch.zeros(1, N, 3)), ValueError, r"key_xy.*\(1, 9, 3\)"),
        (lambda: SquaredDistanceBias(xy, torch.zeros(3, N, 2)), ValueError, "batch sizes"),
        (lambda: SquaredDistanceBias(xy, keys_xy, segments=(4, 5)), ValueError, r"S = 2"),
        (lambda: SquaredDistanceBias(xy, keys_xy, segments=(4,)), ValueError, "9 keys"),
        (lambda: SquaredDistanceBias(xy, keys_xy, "1"), TypeError, "scale"),
        (lambda: SquaredDistanceBias(xy, keys_xy, torch.ones(2, 2)), ValueError, "scale"),
        (
            lambda: SquaredDistanceBias(xy, keys_xy, valid=torch.ones(2, M, 1)),
            TypeError,
            "valid.*float32",
        ),
        (lambda: SquaredDistanceBias(xy, keys_xy, valid=torch.ones(2, M) > 0), ValueError, "valid"),
        (
            lambda: SquaredDistanceBias(
                xy, keys_xy, valid=torch.ones(2, M, 1) > 0, drop_query_term=True
            ),
            ValueError,
            "drop_query_term",
        ),
        (lambda: AlibiBias(torch.ones(2, 2), M, N), ValueError, "slopes"),
        (lambda: AlibiBias([0.5], M, N), TypeError, "slopes"),
        (lambda: AlibiBias(torch.ones(2), M, -1), ValueError, "queries and keys"),
    ],
)
def test_mistakes_are_named(build, error, words):
    with pytest.raises(error, match=words):
        build()
