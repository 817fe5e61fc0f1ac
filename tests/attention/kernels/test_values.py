"""Rows whose keys are all at a large finite value, and weights of -inf: output and gradients
against float64, by error at most twice plain PyTorch's in the same precision. Near -1e9 that error
is the digits that float32 has for such scores."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", minversion="3.0")
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.attention.kernels import autograd, tiles
from flashbias_patch.attention.kernels import problem as problem_module
from flashbias_patch.attention.kernels.autograd import fused_attention
from flashbias_patch.attention.reference_attention import attend as attend_dense
from tests.support.splits import in_parts

HALF, FULL = torch.float16, torch.float32
LEAST = torch.finfo(FULL).min
B, M, N, H, D = 2, 4, 70, 1, 16
LENGTHS = (30, 25, 15)
FLOOR = {HALF: 5e-4, FULL: 1e-5}  # of the size of what is compared
HIDDEN = -math.inf


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Backward may not quietly fall back, and memory comes poisoned."""

    def fail(*unused):
        raise  # the error that is being handled

    monkeypatch.setattr(autograd, "plain_backward", fail)
    monkeypatch.setattr(
        problem_module, "empty", lambda *size, **options: torch.full(*size, float("nan"), **options)
    )


def random(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def dense(value):
    """One row, every key of it at `value`."""
    tensor = random(1, 1, M, N)
    tensor[:, :, 2] = value
    return tensor


def padding(value, whole=True):
    """The second sample's keys at `value`, all or half of them."""
    tensor = torch.zeros(B, N)
    tensor[1, 0 if whole else N // 2 :] = value
    return tensor


def weights(rows):
    """Random segment weights, but for `rows`: row -> its weights, None where random."""
    tensor = random(B, M, 1, len(LENGTHS))
    for row, values in rows.items():
        for segment, value in enumerate(values):
            if value is not None:
                tensor[:, row, :, segment] = value
    return tensor


def beyond(key):
    """A mask that hides the keys from there on."""
    return (torch.arange(N) >= key).expand(1, 1, M, N)


SOME = {
    0: (HIDDEN, None, None),
    1: (None, HIDDEN, None),
    2: (None, HIDDEN, HIDDEN),
    3: (HIDDEN,) * 3,
}
FAR = {
    0: (-1e30, None, None),
    1: (-1e9, -1e9 + 64, -1e9),
    2: (1e9, 1e9, 1e9),
    3: (None, LEAST, -1e5),
}
TERMS = {
    **{
        f"dense {value:.0e}": dict(dense=dense(value)) for value in (-1e4, -1e9, LEAST, 1e9, -LEAST)
    },
    "padding -1e9": dict(key_padding=padding(-1e9)),
    "padding of finfo.min": dict(key_padding=padding(LEAST)),
    "padding of finfo.min, half": dict(key_padding=padding(LEAST, whole=False)),
    "dense and padding -1e9": dict(dense=dense(-1e9), key_padding=padding(-1e9)),
    "padding -1e9 where a mask shows it": dict(
        key_padding=torch.zeros(B, N).index_fill(1, torch.arange(40), -1e9), mask=beyond(40)
    ),
    "weights -inf": dict(segment_weights=weights(SOME)),
    "weights far below": dict(segment_weights=weights(FAR)),
    "weights -inf, dense": dict(segment_weights=weights(SOME), dense=dense(-1e9)),
    "weights -inf, mask": dict(segment_weights=weights(SOME), mask=beyond(60)),
    "weights -1e9, mask hides the others": dict(
        segment_weights=weights({0: (-1e9, -1e9, 0.0)}), mask=beyond(55)
    ),
    "weights -inf, padding": dict(
        segment_weights=weights(SOME), key_padding=(torch.arange(N) > 60).expand(B, N)
    ),
}


def run(attend, dtype, terms, wide=None):
    """The output and the gradients of everything that can have one."""
    draw = torch.Generator().manual_seed(5)
    q, k, v, grad = (torch.randn(B, n, H, D, generator=draw).to(dtype) for n in (M, N, N, M))
    leaves = {name: x.to(wide or dtype).requires_grad_() for name, x in zip("qkv", (q, k, v))}
    rest = {}
    for name, tensor in terms.items():
        tensor = tensor.clone().to(wide) if wide and tensor.is_floating_point() else tensor.clone()
        (rest if name in ("mask", "key_padding") else leaves)[name] = tensor
    for name in ("dense", "segment_weights"):
        if name in leaves:
            leaves[name].requires_grad_()
    if "segment_weights" in leaves:
        rest["segment_lengths"] = LENGTHS
    out = attend(**leaves, **rest, scale=D**-0.5)
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return dict(zip(("out", *leaves), (out.detach(), *found)))


def plainly(**arguments):
    return attend_dense(AttentionInputs(**arguments))


@pytest.mark.parametrize(
    "dtype, name, splits",
    [
        *[(FULL, name, 0) for name in TERMS],
        *[
            (HALF, name, 0)
            for name in (
                "dense -1e+09",
                "padding of finfo.min",
                "weights -inf",
                "weights far below",
            )
        ],
        *[(FULL, name, 3) for name in ("dense -1e+09", "weights -inf", "weights far below")],
    ],
)
def test_rows_far_from_zero(monkeypatch, dtype, name, splits):
    if splits:
        monkeypatch.setattr(tiles, "INTERPRETED", tiles.Config(16, 16, 4, 1))
        in_parts(monkeypatch, splits)
    terms = TERMS[name]
    ours, plain = run(fused_attention, dtype, terms), run(plainly, dtype, terms)
    exact = run(plainly, dtype, terms, torch.float64)
    for part, wanted in exact.items():
        error, allowed = (ours[part] - wanted).norm(), 2 * (plain[part] - wanted).norm()
        assert ours[part].isfinite().all() and ours[part].dtype == plain[part].dtype, part
        floor = FLOOR[dtype] * max(wanted.norm(), wanted.numel() ** 0.5)
        assert error <= allowed + floor, (part, float(error), float(allowed))


def test_the_sum_of_two_terms_of_finfo_min_hides_nothing():
    """It overflows to -inf in plain PyTorch; the weights are those of the row that is masked
    once."""
    twice = run(fused_attention, FULL, dict(dense=dense(LEAST), key_padding=padding(LEAST)))
    exact = run(plainly, FULL, dict(dense=dense(LEAST), key_padding=padding(LEAST)), torch.float64)
    for part, wanted in exact.items():
        assert (twice[part] - wanted).norm() <= 1e-5 * wanted.norm(), part


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_stays_visible(value):
    """As in plain PyTorch: a bound on large numbers may not turn NaN or +inf into one."""
    bias = dense(0.0)
    bias[:, :, 2, 7] = value
    out = run(fused_attention, FULL, dict(dense=bias))["out"]
    assert out[:, 2].isnan().all() and out[:, [0, 1, 3]].isfinite().all()
