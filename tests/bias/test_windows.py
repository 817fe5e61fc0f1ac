"""Local windows on grids: the algebra and the plain backends against a loop over queries, frames
and cells."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashbias_patch import flash_bias_attention
from flashbias_patch.attention import chunked_attention, dispatch, inputs
from flashbias_patch.attention.backends import sdpa
from flashbias_patch.bias import (
    DenseBias,
    Grid,
    MaskBias,
    ModalityBias,
    SumBias,
    WindowBias,
    WindowMask,
    factorize,
)
from tests.support import internals
from tests.support.capabilities import needs_sdpa
from tests.support.reference import attention

FRAMES = (Grid(5, 4), Grid(3, 6, views=2))
B, M, H, N, S = 2, 7, 2, 20 + 36, 2
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def places(seed=0, batch=B, frames=FRAMES, queries=M):
    """Centres in the frames and a little outside, views too."""
    g = generator(seed)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.randint(-2, size + 2, (batch, queries), generator=g)
                    for size in (f.views, f.rows, f.columns)
                ],
                -1,
            )
            for f in frames
        ],
        2,
    )


def by_loop(weights, centres, frames, sides, sigmas=None, visible=None):
    """(bias (B, H, M, N), which keys are in a window (B, 1, M, N)), cell by cell."""
    batch = max(weights.shape[0], centres.shape[0])
    queries, heads = weights.shape[1:3]
    total = sum(f.size for f in frames)
    bias = weights.new_zeros(batch, heads, queries, total)
    inside = torch.zeros(batch, 1, queries, total, dtype=torch.bool)
    for b in range(batch):
        for m in range(queries):
            first = 0
            for s, (frame, side) in enumerate(zip(frames, sides)):
                view, row, column = (int(x) for x in centres[b % centres.shape[0], m, s])
                half = side // 2
                offsets = range(-half, half + 1) if side % 2 else range(-half + 1, half + 1)
                seen = visible is None or bool(visible[b % visible.shape[0], m, s])
                for dy in offsets if seen and 0 <= view < frame.views else ():
                    for dx in offsets:
                        y, x = row + dy, column + dx
                        if 0 <= y < frame.rows and 0 <= x < frame.columns:
                            key = first + (view * frame.rows + y) * frame.columns + x
                            profile = 1.0
                            if sigmas is not None:
                                profile = math.exp(-(dy * dy + dx * dx) / (2 * sigmas[s] ** 2))
                            bias[b, :, m, key] = weights[b % weights.shape[0], m, :, s] * profile
                            inside[b, 0, m, key] = True
                first += frame.size
    return bias, inside


@pytest.mark.parametrize("side", (1, 2, 3, 4, (4, 3), 15, 100), ids=str)
@pytest.mark.parametrize("sigma", (None, 1.3, (0.7, math.inf)), ids=str)
@pytest.mark.parametrize("batches", ((B, B), (1, B), (B, 1), (1, 1)), ids=str)
def test_dense_is_the_loop(side, sigma, batches):
    centres = places(batch=batches[1])
    weights = torch.randn(batches[0], M, H, S, generator=generator(1), dtype=F64)
    visible = torch.rand(batches[1], M, S, generator=generator(2)) < 0.8
    sides = (side, side) if isinstance(side, int) else side
    sigmas = None if sigma is None else (sigma, sigma) if isinstance(sigma, float) else sigma
    bias = WindowBias(weights, centres, FRAMES, side, sigma, visible)
    exact, inside = by_loop(weights, centres, FRAMES, sides, sigmas, visible)
    assert bias.shape == tuple(exact.shape) and bias.rank is None and bias.segments() is None
    torch.testing.assert_close(bias.dense(), exact, rtol=1e-13, atol=1e-15)
    mask = WindowMask(centres, FRAMES, side, visible)
    assert mask.shape == (batches[1], 1, M, N)
    assert torch.equal(mask.dense() == 0, inside[: batches[1]])


@pytest.mark.parametrize(
    "dtype", (torch.int64, torch.int32, torch.int16, torch.int8, torch.float32, torch.float16, F64)
)
def test_centres_of_every_dtype(dtype):
    centres = places()
    weights = torch.randn(B, M, S)
    plain = WindowBias(weights, centres, FRAMES, 3).dense()
    assert torch.equal(WindowBias(weights, centres.to(dtype), FRAMES, 3).dense(), plain)


def test_bytes_as_centres_and_what_is_not_visible():
    centres = places().clamp_min(0).to(torch.uint8)
    visible = torch.zeros(B, M, S, dtype=torch.bool)
    assert not WindowBias(torch.ones(B, M, S), centres, FRAMES, 3, visible=visible).dense().any()
    assert (
        not WindowBias(torch.ones(B, M, S), places().half(), FRAMES, 3, visible=visible)
        .dense()
        .any()
    )


@pytest.mark.parametrize(
    "far", (1 << 40, -(1 << 40), 1e30, -1e30, math.inf, -math.inf, math.nan), ids=str
)
def test_a_centre_far_away_is_no_window(far):
    centres = torch.full(
        (1, M, S, 3), far, dtype=torch.int64 if isinstance(far, int) else torch.float64
    )
    assert not WindowBias(torch.ones(1, M, S), centres, FRAMES, 100).dense().any()


def test_weights_that_are_not_finite_stay_in_their_window():
    weights = torch.zeros(1, M, S)
    weights[0, 0] = math.inf
    weights[0, 1] = math.nan
    for sigma in (None, 2.0):
        bias = WindowBias(weights, places(batch=1), FRAMES, 3, sigma).dense()
        assert bias[0, 0, 2:].isfinite().all() and bias.isfinite().any(-1).all()


def test_algebra_keeps_windows_and_their_gradients():
    centres, g = places(), generator(3)
    one, two = (
        torch.randn(shape, generator=g, dtype=F64, requires_grad=True)
        for shape in ((B, M, S), (1, M, H, S))
    )
    per_head = torch.randn(H, generator=g, dtype=F64, requires_grad=True)
    scale = torch.tensor([1.5], dtype=F64, requires_grad=True)
    first = WindowBias(one, centres, FRAMES, 3)
    second = internals.with_weights(first, two)
    for made, exact in (
        (first * 2.0, lambda: 2 * first.dense()),
        (first * scale, lambda: first.dense() * scale),
        (per_head * first, lambda: first.dense() * per_head[:, None, None]),
        (-first, lambda: -first.dense()),
        (first + second, lambda: first.dense() + second.dense()),
        (
            first * scale + second * per_head,
            lambda: first.dense() * scale + second.dense() * per_head[:, None, None],
        ),
    ):
        assert isinstance(made, WindowBias)
        torch.testing.assert_close(made.dense(), exact().expand_as(made.dense()))
        grad = torch.randn(made.dense().shape, generator=g, dtype=F64)
        wanted = (one, two, per_head, scale)
        found = torch.autograd.grad(made.dense(), wanted, grad, allow_unused=True)
        wished = torch.autograd.grad(exact().expand_as(grad), wanted, grad, allow_unused=True)
        for a, b in zip(found, wished):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_unlike_terms_stay_apart_and_add_up():
    bias = WindowBias(torch.randn(B, M, H, S), places(), FRAMES, 3)
    other = WindowBias(torch.randn(B, M, 1, S), places(1), FRAMES, (4, 5), sigma=2.0)
    mask, hidden = WindowMask(places(2), FRAMES, 4), MaskBias(torch.rand(1, 1, M, N) > 0.8)
    modality, dense = ModalityBias(torch.randn(B, M, 2), (20, 36)), DenseBias(torch.randn(M, N))
    whole = SumBias([bias, other, mask, WindowMask(places(3), FRAMES, 3), hidden, modality, dense])
    summed = bias + other + mask + WindowMask(places(3), FRAMES, 3) + hidden + modality + dense
    torch.testing.assert_close(summed.dense(), whole.dense())
    assert summed.rank is None and (summed + bias).terms[-4].weights.shape == (B, M, H, S)
    parts = summed.parts()
    assert parts.windows.weights is bias.weights and parts.window_mask.centres is mask.centres
    assert isinstance(mask + mask, WindowMask) and (mask * 3.0) is mask
    q, k, v = (torch.randn(B, length, H, 4) for length in (M, N, N))
    out = flash_bias_attention(q, k, v, summed, backend="reference")
    exact = flash_bias_attention(q, k, v, whole.dense(), backend="reference")
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)


def test_the_same_windows_of_a_sum_add_their_weights():
    centres = places()
    bias = WindowBias(torch.randn(B, M, S), centres, FRAMES, 3)
    again = SumBias([bias, bias * torch.randn(H)]).parts()
    assert again.dense is None and again.windows.weights.shape == (B, M, H, S)
    again = SumBias([WindowMask(bias.centres, FRAMES, 3)] * 2).parts()
    assert again.mask is None


def test_moving_copying_and_looking():
    bias = WindowBias(torch.randn(B, M, S), places(), FRAMES, 3, 1.0)
    half = bias.to(dtype=torch.float16)
    assert (
        half.weights.dtype == torch.float16
        and half.centres is bias.centres
        and half.sigmas == bias.sigmas
    )
    assert half.dense().dtype == torch.float16
    assert torch.equal(copy.deepcopy(bias).dense(), bias.dense())
    assert [t.shape for t in bias.tensors()] == [bias.weights.shape, bias.centres.shape]
    assert [t.shape for t in (bias + WindowMask(places(), FRAMES, 3)).tensors()][-1] == (B, M, S, 3)
    assert (
        "WindowBias" in repr(bias)
        and hash(Grid(2, 3)) == hash(Grid(2, 3, 1))
        and Grid(2, 3, 4).size == 24
    )
    assert factorize(bias).bias.shape == bias.shape  # nothing dense to factorise


GOOD = dict(weights=torch.zeros(B, M, S), centres=places(), frames=FRAMES, side=3)


@pytest.mark.parametrize(
    "change, error, says",
    [
        (
            dict(weights=torch.zeros(B, M, S).long()),
            TypeError,
            "weights: expected a floating tensor",
        ),
        (dict(weights=torch.zeros(B, M)), ValueError, "weights: expected"),
        (dict(weights=torch.zeros(3, M, S)), ValueError, "weights: expected"),
        (dict(weights=torch.zeros(B, M + 1, S)), ValueError, "weights: expected"),
        (dict(centres=places()[..., :2]), ValueError, "centres: expected"),
        (dict(centres=places() > 0), TypeError, "centres: expected"),
        (dict(frames=(Grid(5, 4),)), ValueError, "centres: expected"),
        (dict(frames=((5, 4), (3, 6))), TypeError, "frames: expected"),
        (dict(frames=()), TypeError, "frames: expected"),
        (dict(side=0), ValueError, "side: expected"),
        (dict(side=(3, 3, 3)), ValueError, "side: expected"),
        (dict(side=(3, 3.0)), TypeError, "side: expected"),
        (dict(sigma=0.0), ValueError, "sigma: expected"),
        (dict(sigma=(1.0,)), ValueError, "sigma: expected"),
        (dict(sigma=math.nan), ValueError, "sigma: expected"),
        (dict(visible=torch.ones(B, M, S)), TypeError, "visible: expected"),
        (dict(visible=torch.ones(B, M, dtype=torch.bool)), ValueError, "visible: expected"),
    ],
)
def test_what_does_not_fit_is_named(change, error, says):
    with pytest.raises(error, match=says):
        WindowBias(**{**GOOD, **change})


def test_numbers_of_numpy_are_numbers():
    """As configurations compute them: grids from ranges and voxels, sides from both."""
    grid = Grid(np.int64(4), np.int32(5), np.int64(2))
    assert grid == Grid(4, 5, 2) and all(type(n) is int for n in dataclasses.astuple(grid))
    weights, centres = torch.ones(1, 2, 1), torch.zeros(1, 2, 1, 3)
    numpy = WindowBias(weights, centres, (grid,), np.int64(3), sigma=np.float32(0.5))
    plain = WindowBias(weights, centres, (grid,), 3, sigma=0.5)
    assert numpy.sides == plain.sides and numpy.sigmas == plain.sigmas
    assert all(type(n) is int for n in numpy.sides)
    torch.testing.assert_close((numpy * np.float32(2)).dense(), (plain * 2).dense())
    lengths = ModalityBias(torch.ones(1, 2, 2), (np.int64(3), np.int64(4)))
    assert lengths.shape == ModalityBias(torch.ones(1, 2, 2), (3, 4)).shape
    for wrong in (np.bool_(True), np.float64(3.0)):
        with pytest.raises(TypeError, match="side: expected an int"):
            WindowBias(weights, centres, (grid,), wrong)


def test_grids_and_calls_that_do_not_fit():
    for bad in ((0, 3), (2, -1), (2, 3, 0)):
        with pytest.raises(ValueError, match="Grid"):
            Grid(*bad)
    with pytest.raises(TypeError, match="Grid.rows"):
        Grid(2.0, 3)
    q, k = torch.randn(B, M, H, 4), torch.randn(B, N + 1, H, 4)
    for bias in (WindowBias(**GOOD), WindowMask(places(), FRAMES, 3)):
        with pytest.raises(ValueError, match=f"N={N + 1}"):
            flash_bias_attention(q, k, k, bias)
        with pytest.raises(ValueError, match="keys"):
            bias + DenseBias(torch.zeros(M, N + 1))


def call(bias, dtype, seed=5, v_dim=4, **more):
    g = generator(seed)
    q, k = (
        torch.randn(B, length, H, 4, generator=g).to(dtype).requires_grad_() for length in (M, N)
    )
    v = torch.randn(B, N, H, v_dim, generator=g).to(dtype).requires_grad_()
    return q, k, v, inputs.build(q, k, v, bias, **more)


@pytest.mark.parametrize("backend", ("reference", pytest.param("sdpa", marks=needs_sdpa)))
@pytest.mark.parametrize("dtype", (torch.float32, F64))
@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("batches", ((B, B), (1, B), (B, 1), (1, 1)), ids=str)
def test_attention_is_the_loop(backend, dtype, masked, batches, monkeypatch):
    # Two queries at a time, or one: the gradients have two buffers of scores.
    monkeypatch.setitem(chunked_attention.CHUNK_BYTES, "cpu", 2 * 2 * B * H * N * 4)
    centres = places(batch=batches[1])
    weights = torch.randn(batches[0], M, H, S, generator=generator(1)).to(dtype).requires_grad_()
    bias = WindowBias(weights, centres, FRAMES, (3, 4), (1.0, 2.0))
    hidden = torch.zeros(B, 1, M, N, dtype=torch.bool)
    whole = bias
    if masked:
        visible = torch.rand(B, M, S, generator=generator(2)) < 0.7
        visible[0, 0] = False
        whole = bias + WindowMask(centres, FRAMES, (5, 3), visible)
        hidden = ~by_loop(torch.zeros(B, M, 1, S), centres, FRAMES, (5, 3), None, visible)[1]
    q, k, v, given = call(whole, dtype, v_dim=5)
    grad = torch.randn(B, M, H, 5, generator=generator(9)).to(dtype)
    found = dispatch.attend(given, backend)
    found = [found, *torch.autograd.grad(found, (q, k, v, weights), grad)]
    doubles = [t.detach().double().requires_grad_() for t in (q, k, v, weights)]
    exact_bias = by_loop(doubles[3], centres, FRAMES, (3, 4), (1.0, 2.0))[0]
    exact = attention(*doubles[:3], exact_bias, hidden)
    exact = [exact, *torch.autograd.grad(exact, doubles, grad.double())]
    near = dict(rtol=1e-10, atol=1e-12) if dtype is F64 else dict(rtol=2e-5, atol=2e-6)
    for one, other in zip(found, exact):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, **near)


def test_the_reference_holds_no_more_than_a_chunk(monkeypatch):
    monkeypatch.setitem(chunked_attention.CHUNK_BYTES, "cpu", 2 * 2 * B * H * N * 4)
    seen = []
    dense_bias = chunked_attention.grids.dense_bias
    monkeypatch.setattr(
        chunked_attention.grids,
        "dense_bias",
        lambda parts: seen.append(parts.weights.shape[1]) or dense_bias(parts),
    )
    weights = torch.randn(B, M, H, S, requires_grad=True)
    *_, given = call(WindowBias(weights, places(), FRAMES, 3), torch.float32)
    dispatch.attend(given, "reference").sum().backward()
    assert max(seen) == 2 and sum(seen) == 2 * M


@needs_sdpa
def test_sdpa_takes_windows_up_to_a_size(monkeypatch):
    *_, given = call(WindowBias(torch.randn(B, M, H, S), places(), FRAMES, 3), torch.float32)
    assert sdpa.window_entries(given) == B * H * M * N
    monkeypatch.setattr(sdpa, "WINDOW_ENTRIES", B * H * M * N - 1)
    assert "windows" in dispatch.explain(given)["sdpa"][0]
    dispatch.reset()
    assert dispatch.attend(given).shape == given.q.shape  # the reference


@pytest.mark.parametrize("backend", ("reference", pytest.param("sdpa", marks=needs_sdpa)))
def test_attention_adds_windows_to_a_dense_bias(backend):
    weights, dense = torch.randn(B, M, H, S), torch.randn(B, 1, M, N)
    q, k, v, given = call(WindowBias(weights, places(), FRAMES, 3) + DenseBias(dense), F64)
    exact = by_loop(weights, places(), FRAMES, (3, 3))[0] + dense
    torch.testing.assert_close(dispatch.attend(given, backend), attention(q, k, v, exact))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_weights_keep_their_digits_in_half_precision(dtype):
    weights = torch.randn(B, M, H, S) * 3
    q, k, v, given = call(WindowBias(weights, places(), FRAMES, 3), dtype)
    assert given.windows.weights is weights
    out = dispatch.attend(given, "reference")
    exact = attention(q, k, v, by_loop(weights.double(), places(), FRAMES, (3, 3))[0])
    assert (out.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()
    narrow = flash_bias_attention(
        q.float(),
        k.float(),
        v.float(),
        WindowBias(weights.requires_grad_(), places(), FRAMES, 3),
        dtype=torch.float16,
        backend="reference",
    )
    narrow.sum().backward()
    assert weights.grad.isfinite().all() and weights.grad.any()


def test_one_query_for_all():
    weights = torch.randn(1, 1, H, S, dtype=F64, requires_grad=True)
    bias = WindowBias(weights, places(batch=1, queries=1), FRAMES, 3, 1.0)
    wide = bias + DenseBias(torch.zeros(M, N, dtype=F64))
    q, k, v, given = call(wide, F64)
    assert given.windows.weights.shape == (1, M, H, S)
    exact = dispatch.attend(inputs.build(q, k, v, DenseBias(wide.dense())), "reference")
    torch.testing.assert_close(dispatch.attend(given, "reference"), exact)


grids = st.lists(
    st.builds(Grid, st.integers(1, 5), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(grids, st.data())
def test_any_windows(frames, data):
    count, queries = len(frames), data.draw(st.integers(1, 4))
    sides = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    sigmas = data.draw(st.none() | st.lists(st.floats(0.3, 5.0), min_size=count, max_size=count))
    seed = data.draw(st.integers(0, 1000))
    centres = places(seed, data.draw(st.sampled_from((1, B))), frames, queries)
    weights = torch.randn(
        data.draw(st.sampled_from((1, B))), queries, H, count, generator=generator(seed), dtype=F64
    )
    visible = data.draw(
        st.none() | st.just(torch.rand(centres.shape[:3], generator=generator(seed + 1)) < 0.6)
    )
    bias = WindowBias(weights, centres, frames, sides, sigmas, visible)
    mask = WindowMask(centres, frames, sides, visible)
    exact, inside = by_loop(weights, centres, frames, sides, sigmas, visible)
    torch.testing.assert_close(bias.dense(), exact, rtol=1e-13, atol=1e-15)
    keys = exact.shape[-1]
    g = generator(seed + 2)
    q, k, v = (
        torch.randn(B, length, H, 3, generator=g, dtype=F64) for length in (queries, keys, keys)
    )
    out = flash_bias_attention(q, k, v, bias + mask, backend="reference")
    torch.testing.assert_close(out, attention(q, k, v, exact, ~inside), rtol=1e-10, atol=1e-12)
