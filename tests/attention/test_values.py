"""Values that break attention kernels: rows wholly at a large finite number, infinite weights,
factors of unlike sizes.

Errors against float64 are at most twice those of plain PyTorch's softmax in the same precision.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from flashbias_patch.attention import flash_bias_attention, values
from flashbias_patch.attention.backends import reference, sdpa
from flashbias_patch.attention.inputs import AttentionInputs, build
from flashbias_patch.bias import (
    AlibiBias,
    DenseBias,
    LowRankBias,
    ModalityBias,
    SquaredDistanceBias,
)
from flashbias_patch.bias.factors import add_segments
from tests.support import capabilities

HALF, BRAIN, FULL, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LEAST = torch.finfo(FULL).min
B, M, N, H, D = 2, 6, 75, 2, 16
FLOOR = {HALF: 2e-3, BRAIN: 1.6e-2, FULL: 1e-5}
BACKENDS = {"sdpa": sdpa.backend, "reference": reference.backend}


def random(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def row_at(value, *more):
    """(1, 1, M, N), the third row at `value`, the fourth at `more` by turns."""
    tensor = random(1, 1, M, N)
    tensor[:, :, 2] = value
    for place, other in enumerate(more):
        tensor[:, :, 3, place :: len(more)] = other
    return tensor


def sample_at(value):
    tensor = torch.zeros(B, N)
    tensor[1] = value
    return tensor


def softmax(q, k, v, dense=None, key_padding=None, mask=None):
    """What torch.nn.MultiheadAttention computes, a row without keys as zeros."""
    s = q.transpose(1, 2) @ k.transpose(1, 2).transpose(-1, -2) * q.shape[-1] ** -0.5
    for term in (dense, None if key_padding is None else key_padding[:, None, None]):
        s = s if term is None else s + term
    s = s if mask is None else s.masked_fill(mask, -math.inf)
    dead = (s == -math.inf).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return (p @ v.to(p.dtype).transpose(1, 2)).transpose(1, 2)


def run(attend, dtype, terms, needs=("q", "k", "v", "dense")):
    """The output and the gradients of `needs`; q, k and v are such as float16 has."""
    draw = torch.Generator().manual_seed(5)
    made = {
        name: torch.randn(B, n, H, D, generator=draw).half().to(dtype)
        for name, n in zip("qkv", (M, N, N))
    }
    grad = torch.randn(B, M, H, D, generator=draw).half()
    wide = {
        name: t.to(DOUBLE) if dtype == DOUBLE and t.is_floating_point() else t
        for name, t in terms.items()
    }
    made.update(wide)
    leaves = {name: made[name].clone().requires_grad_() for name in needs if name in made}
    out = attend(**{**made, **leaves})
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return dict(zip(("out", *leaves), (out.detach(), *found)))


def compare(ours, plain, exact, floor):
    for part, wanted in exact.items():
        assert ours[part].isfinite().all(), part
        error, allowed = (ours[part] - wanted).norm(), 2 * (plain[part] - wanted).norm()
        assert error <= allowed + floor * max(wanted.norm(), wanted.numel() ** 0.5), (
            part,
            float(error),
            float(allowed),
        )


TERMS = {
    **{
        f"dense {value:.0e}": dict(dense=row_at(value))
        for value in (-200.0, -1e4, -6e4, -1e6, -1e9, LEAST, 1e9, -LEAST)
    },
    "rows of two values": dict(dense=row_at(-1e9, -1e9, LEAST)),
    "dense beyond half": dict(dense=row_at(7e4, -1e5, -1e5 + 3)),
    **{f"padding {value:.0e}": dict(key_padding=sample_at(value)) for value in (-1e4, -1e9, LEAST)},
    "dense and padding": dict(dense=row_at(-1e9), key_padding=sample_at(-1e9)),
    "padding that a mask shows": dict(
        key_padding=torch.zeros(B, N).index_fill(1, torch.arange(40), -1e9),
        mask=(torch.arange(N) >= 40).expand(1, 1, M, N),
    ),
    "padding in half": dict(key_padding=sample_at(torch.finfo(HALF).min).half()),
    "-inf": dict(dense=row_at(-math.inf, -math.inf, -1e9)),
}


@pytest.mark.parametrize(
    "needs", [("q", "k", "v", "dense"), ("q", "k", "v"), ("dense",), ("v",), ("k",), ()]
)
@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_from_zero(backend, dtype, needs):
    if dtype is HALF and backend == "sdpa" and not capabilities.half_runs_here():
        pytest.skip("this torch has no half arithmetic on the CPU")
    for name, terms in TERMS.items():

        def ours(**arguments):
            return BACKENDS[backend](AttentionInputs(**arguments, scale=D**-0.5))

        if not needs:
            with torch.no_grad():
                got = {"out": ours(**{**dict(zip("qkv", _qkv(dtype))), **terms})}
        else:
            if needs == ("dense",) and "dense" not in terms:
                continue
            got = run(ours, dtype, terms, needs)
        exact, plain = (run(softmax, kind, terms, needs or ("q",)) for kind in (DOUBLE, FULL))
        try:
            compare(got, plain, {part: exact[part] for part in got}, FLOOR[dtype])
        except AssertionError as error:
            raise AssertionError(name, *error.args) from error


def _qkv(dtype):
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(B, n, H, D, generator=draw).half().to(dtype) for n in (M, N, N)]


@pytest.mark.parametrize("dtype", [BRAIN, FULL, DOUBLE])
def test_a_bound_passes_the_gradient(dtype):
    least = torch.finfo(dtype).min
    term = torch.tensor(
        [least, -least, 3.0, -1e4, -math.inf, math.inf, math.nan], dtype=dtype
    ).requires_grad_()
    found = values.bounded(term)
    size = min(values.LARGEST, -least)
    wanted = torch.tensor([-size, size, 3.0, -1e4, -math.inf, math.inf, math.nan], dtype=dtype)
    assert torch.allclose(found, wanted, equal_nan=True, rtol=1e-2)
    assert torch.equal(
        torch.autograd.grad(found[:4].sum(), term)[0][:4], torch.ones(4, dtype=dtype)
    )


@pytest.mark.parametrize("where", ("key_padding_mask", "attn_mask"))
@pytest.mark.parametrize("peak", (0.0, 1.0))
@capabilities.needs_sdpa
def test_a_mask_may_be_changed_in_place_before_backward(where, peak):
    """As with torch.nn.MultiheadAttention: a buffer for the mask of every batch."""
    q, k, v = (random(B, length, H, D) for length in (M, N, N))
    buffer = torch.zeros((B, N) if where == "key_padding_mask" else (B, 1, M, N))
    buffer[..., 3:] = -2.0
    buffer += peak
    found = []
    for changed in (False, True):
        mask, leaf = buffer.clone(), q.clone().requires_grad_()
        out = flash_bias_attention(leaf, k, v, **{where: mask})
        if changed:
            mask.fill_(-math.inf)
        found += torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def by_backend(attend, **arguments):
    return attend(AttentionInputs(**arguments, scale=D**-0.5))


def test_a_sum_of_finfo_min_hides_nothing():
    terms = dict(dense=row_at(LEAST), key_padding=sample_at(LEAST))
    exact = run(softmax, DOUBLE, terms)
    for attend in BACKENDS.values():
        got = run(partial(by_backend, attend), FULL, terms)
        compare(got, exact, exact, FLOOR[FULL])


LENGTHS = (30, 0, 25, 20)


def hiding_weights():
    weights = random(B, M, 1, len(LENGTHS))
    weights[:, 0, :, 0] = weights[:, 1, :, 2] = weights[:, 2, :, 2:] = weights[:, 3] = -math.inf
    weights[0, 4] = torch.tensor([-1e9, 0.0, -1e9 + 64, -1e9])  # the largest weight is of no key
    weights[1, 4], weights[:, 5, :, 3] = -1e9, -1e30
    return weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_float64_terms_at_the_least_number_give_the_mean(backend, grad):
    """In float32 that number is -inf, which would hide the keys."""
    q, k, v = _qkv(FULL)
    dense, padding = random(1, 1, M, N).double(), torch.zeros(B, N).double()
    dense[:, :, 2] = padding[1] = torch.finfo(DOUBLE).min
    dense.requires_grad_(grad)
    out = flash_bias_attention(q, k, v, DenseBias(dense), key_padding_mask=padding, backend=backend)
    mean = v.mean(1)
    assert torch.allclose(out[:, 2], mean, atol=1e-6) and torch.allclose(
        out[1], mean[1].expand(M, H, D), atol=1e-6
    )


def test_a_factor_that_keeps_exp2_finite_does_not_change_a_softmax():
    rows = torch.stack(
        [
            torch.full((N,), LEAST).index_fill(0, torch.tensor([0]), -math.inf),
            torch.full((N,), LEAST).index_fill(0, torch.tensor([1, 2]), -LEAST),
            random(N).index_fill(0, torch.tensor([3]), LEAST),
            torch.full((N,), -math.inf),
        ]
    )
    found = values.finite_in_exp2(rows, rows.amax(-1, keepdim=True))
    assert torch.equal(found.softmax(-1).nan_to_num(9.0), rows.softmax(-1).nan_to_num(9.0))
    top = (found * math.log2(math.e)).amax(-1)
    assert top[:3].isfinite().all() and top[3] == -math.inf
    assert torch.equal(found[2], rows[2])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "dtype, backend", [(FULL, None), (FULL, "sdpa"), (FULL, "reference"), (HALF, None)]
)
def test_infinite_modality_weights_hide(dtype, backend, padded):
    """Relative to float64, which has the digits for differences at -1e9; a row that sees no key is
    zero."""
    padding = (torch.arange(N) >= 30).expand(B, N) if padded else None
    q, k, v = _qkv(FULL)
    weights = hiding_weights().requires_grad_()
    more = (
        torch.zeros(1, M, 1, 2).index_fill(3, torch.tensor([1]), -math.inf)
        if not padded
        else torch.zeros(1, M, 1, 2)
    )
    wide = hiding_weights().double().requires_grad_()
    segments = add_segments((wide, LENGTHS), (more.double(), (60, 15)))
    dense = ModalityBias(*segments).dense()
    mask = None if padding is None else padding[:, None, None]
    wanted = softmax(q.double(), k.double(), v.double(), dense=dense, mask=mask)
    bias = ModalityBias(weights, LENGTHS) + ModalityBias(more, (60, 15))
    got = flash_bias_attention(
        q, k, v, bias, key_padding_mask=padding, backend=backend, dtype=dtype
    )
    (found,) = torch.autograd.grad(got.sum(), weights)
    (exact,) = torch.autograd.grad(wanted.sum(), wide)
    assert (got[:, 3] == 0).all() and (found[:, 3] == 0).all()
    assert (got - wanted).norm() <= FLOOR[dtype] * wanted.norm()
    assert (found - exact).norm() <= 2 * FLOOR[dtype] * exact.norm() + FLOOR[dtype]


def test_sums_of_segmentations_are_exact():
    for first, second in [
        ((3, 0, 4), (7,)),
        ((0, 7), (2, 0, 5)),
        ((1, 2, 4), (2, 2, 3)),
        ((7, 0), (0, 0, 7)),
    ]:
        one, two = random(1, 4, 1, len(first)), random(2, 4, 1, len(second))
        parts = (ModalityBias(one, first) + ModalityBias(two, second)).parts()
        assert parts.q_factor is None
        wanted = ModalityBias(one, first).dense() + ModalityBias(two, second).dense()
        assert torch.equal(ModalityBias(*parts.segments).dense(), wanted)


@pytest.mark.parametrize(
    "make",
    [lambda w: DenseBias(row_at(-math.inf, 0.0, -math.inf)), lambda w: ModalityBias(w, LENGTHS)],
)
def test_a_learned_scale_of_infinities_has_a_gradient(make):
    q, k, v = _qkv(FULL)
    for start in (0.0, 0.7):
        scale = torch.tensor(start, requires_grad=True)
        bias = make(
            hiding_weights().clamp_min(-5.0).masked_fill(hiding_weights() == -math.inf, -math.inf)
        )
        dense = bias.dense().double()
        hidden, wide = dense == -math.inf, torch.tensor(start, dtype=DOUBLE, requires_grad=True)
        wanted = softmax(
            q.double(), k.double(), v.double(), dense.masked_fill(hidden, 0.0) * wide, mask=hidden
        )
        got = flash_bias_attention(q, k, v, bias * scale)
        (found,), (exact,) = (
            torch.autograd.grad(got.sum(), scale),
            torch.autograd.grad(wanted.sum(), wide),
        )
        assert (got - wanted).abs().max() < 1e-5 and (found - exact).abs() < 1e-4 * (
            1 + exact.abs()
        )


ROWS, HALVES = random(1, M, 1, 2), torch.tensor([1.0, 0.0])
FACTORS = {
    "zeros beside 1e30": lambda s: LowRankBias(ROWS * s, random(1, N, 1, 2) * 1e30),
    "zeros in a column": lambda s: LowRankBias(
        ROWS * HALVES * (1 + s), random(1, N, 1, 2) * torch.tensor([1.0, 1e9])
    ),
    "zeros in k": lambda s: LowRankBias(ROWS * 1e30, random(1, N, 1, 2) * s * 1e-28),
    "pixels": lambda s: SquaredDistanceBias(ROWS.squeeze(2) * 900, random(1, N, 2) * 900, s * 1e-5),
    "modality": lambda s: ModalityBias(random(1, M, 2) * 1e5, (30, 45)) * (s * 1e-4),
    "alibi": lambda s: AlibiBias(torch.ones(H) * s, M, N),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_a_scale_that_starts_at_zero(dtype, name):
    """Output and the scale's gradient, over float32 inputs computed in `dtype`."""
    q, k, v = _qkv(FULL)
    for start in (0.0, 1e-30 if "1e30" in name else 1e-2):
        scale, wide = (
            torch.tensor(start, dtype=kind, requires_grad=True) for kind in (FULL, DOUBLE)
        )
        x = q.clone().requires_grad_()
        got = flash_bias_attention(x, k, v, FACTORS[name](scale), dtype=dtype)
        found, dq = torch.autograd.grad(got.sum(), (scale, x))
        dense = FACTORS[name](wide).dense().double()
        wanted = softmax(q.double(), k.double(), v.double(), dense)
        other = softmax(
            q.double(), k.double(), v.double().abs(), dense
        )  # whose gradient may cancel less
        exact, size = (
            torch.autograd.grad(out.sum(), wide, retain_graph=True)[0] for out in (wanted, other)
        )
        assert dq.isfinite().all() and (got - wanted).norm() <= 4 * FLOOR[dtype] * wanted.norm()
        assert (found - exact).abs() <= 20 * FLOOR[dtype] * max(exact.abs(), size.abs()), (
            float(found),
            float(exact),
        )


def test_factors_beyond_half_stay_numbers():
    """The product of two halves is at most 65504 ** 2: further away is as far."""
    q, k, v = (t.half() for t in _qkv(FULL))
    weights = random(1, M, 2)
    weights[0, 0, 0], weights[0, 1, 1] = -1e12, -1e30
    bias = ModalityBias(weights, (30, 45))
    out = flash_bias_attention(q, k, v, LowRankBias(*bias.factors()))
    wanted = softmax(q.double(), k.double(), v.double(), bias.dense().double())
    assert (out[:, :2] - wanted[:, :2]).norm() <= 2e-3 * wanted[
        :, :2
    ].norm() and out.isfinite().all()


@pytest.mark.parametrize("make", [lambda w: w, DenseBias])
def test_each_slice_of_an_expanded_bias_has_its_gradient(make):
    q, k, v = _qkv(FULL)
    base = random(M, N).requires_grad_()
    wide = base.expand(B, H, M, N)
    wide.retain_grad()
    copy = base.detach().expand(B, H, M, N).clone().requires_grad_()
    grad = random(B, M, H, D)
    flash_bias_attention(q, k, v, make(wide)).backward(grad)
    softmax(q, k, v, copy).backward(grad)
    assert torch.allclose(wide.grad, copy.grad, atol=1e-6) and torch.allclose(
        base.grad, copy.grad.sum((0, 1)), atol=1e-5
    )
    assert build(q, k, v, make(wide.detach())).dense.shape[:2] == (1, 1)


def test_head_dimension_zero_is_the_mean():
    q, k, v = (torch.zeros(B, n, H, 0) for n in (M, N, N))
    v = random(B, N, H, D)
    out = flash_bias_attention(q, k, v)
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out), atol=1e-6)


def test_what_the_cuda_kernels_cannot_take_is_changed(monkeypatch):
    q, k, v = (t.transpose(1, 2) for t in _qkv(FULL))
    mask = torch.zeros(B, H, M, N, requires_grad=True)
    new, *_ = sdpa.for_cuda(q, k, v, mask)
    assert (
        new.requires_grad and torch.equal(new, q) and not q.requires_grad
    )  # else no logsumexp for the mask's gradient
    learned = k.clone().requires_grad_()
    assert (
        sdpa.for_cuda(q, learned, v, mask)[0] is q and sdpa.for_cuda(q, k, v, mask.detach())[0] is q
    )
    with torch.no_grad():
        assert sdpa.for_cuda(q, k, v, mask)[0] is q
    shared = k[:1].expand(B, -1, -1, -1)
    _, new, same = sdpa.for_cuda(q, shared, v, None)
    assert 0 not in new.stride() and torch.equal(new, shared) and same is v
