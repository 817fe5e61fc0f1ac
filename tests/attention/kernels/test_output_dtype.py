"""Half-precision calls whose output is wanted in float32: the kernels write it at once."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")
from torch.utils.checkpoint import checkpoint  # noqa: E402

from flashbias_patch.attention import dispatch, flash_bias_attention  # noqa: E402
from flashbias_patch.attention.backends.triton_fused import TritonFused  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs, build_in  # noqa: E402
from flashbias_patch.attention.kernels import autograd, tiles  # noqa: E402
from flashbias_patch.attention.reference_attention import attend as attend_dense  # noqa: E402
from flashbias_patch.attention.signature import signature_of  # noqa: E402
from flashbias_patch.bias import LowRankBias  # noqa: E402
from tests.attention.kernels.test_operator import FEATURES, FULL, HALF, problem  # noqa: E402
from tests.support.capabilities import checkpoint_options  # noqa: E402
from tests.support.splits import in_parts  # noqa: E402

NAMES = [name for name, case in FEATURES.items() if not case.get("p")]


def inputs_of(name, dtype=HALF, **changes):
    tensors, rest, _ = problem(20, 70, dtype=dtype, **dict(FEATURES[name], **changes))
    del rest["dropout_p"]
    parts = dict(zip(("q", "k", "v", "q_factor", "k_factor", "segment_weights", "dense"), tensors))
    lengths = rest.pop("segment_lengths")
    rest["segment_lengths"] = None if lengths is None else tuple(lengths)
    weights = parts["segment_weights"]
    if weights is not None:
        parts["segment_weights"] = weights.float()
    return AttentionInputs(**parts, **rest, scale=0.25)


def attend(inputs):
    with torch.no_grad():
        return autograd.attend(inputs, None)


def exact(inputs):
    wide = [t if t is None or not t.is_floating_point() else t.double() for t in inputs.tensors()]
    return attend_dense(inputs.with_tensors(wide))


@pytest.mark.parametrize(
    "name, parts",
    [*[(name, 1) for name in NAMES], ("shared segments with factors", 3), ("added padding", 3)],
)
def test_it_is_the_half_output_before_rounding(name, parts, monkeypatch):
    if parts > 1:
        monkeypatch.setattr(tiles, "INTERPRETED", tiles.Config(16, 16, 4, 1))
        in_parts(monkeypatch, parts)
    inputs = inputs_of(name)
    half, wide, again = (
        attend(inputs._replace(out_dtype=dtype)) for dtype in (None, torch.float32, None)
    )
    assert half.dtype is HALF and wide.dtype is torch.float32
    assert torch.equal(wide.half(), half) and torch.equal(half, again)
    want = exact(inputs)
    assert (wide - want).norm() <= (half - want).norm()


@pytest.mark.parametrize("M, N", [(0, 5), (5, 0)])
def test_nothing_to_attend(M, N):
    q, k = torch.randn(2, M, 2, 16).half(), torch.randn(2, N, 2, 16).half()
    out = attend(AttentionInputs(q, k, k, out_dtype=torch.float32))
    assert out.dtype is torch.float32 and out.shape == q.shape and not out.any()


def test_a_call_that_wants_gradients_keeps_its_dtype():
    inputs = inputs_of("shared factors")
    leaves = inputs.tensors()
    leaves[0] = leaves[0].detach().requires_grad_()
    out = autograd.attend(inputs.with_tensors(leaves)._replace(out_dtype=FULL), None)
    assert out.dtype is HALF
    (grad,) = torch.autograd.grad(out.float().sum(), leaves[:1])
    assert grad.dtype is HALF and grad.any()


@pytest.mark.parametrize(
    "given, dtype, grad, dropout_p, wanted",
    [
        (FULL, HALF, False, 0.0, FULL),
        (FULL, torch.bfloat16, False, 0.0, FULL),
        (FULL, HALF, True, 0.0, None),
        (FULL, HALF, False, 0.1, None),
        (HALF, HALF, False, 0.0, None),
        (HALF, FULL, False, 0.0, None),
        (torch.float64, HALF, False, 0.0, None),
        (FULL, None, False, 0.0, None),
    ],
)
def test_when_the_output_is_wanted_in_float32(given, dtype, grad, dropout_p, wanted):
    q, k = torch.randn(1, 5, 2, 16).to(given), torch.randn(1, 7, 2, 16).to(given)
    with torch.set_grad_enabled(grad):
        inputs, _ = build_in(dtype, q, k, k, None, None, None, dropout_p, None)
    assert inputs.out_dtype is wanted and signature_of(inputs).output is wanted
    assert inputs.static().out_dtype is wanted
    words = signature_of(inputs).describe()
    assert ("to float32" in words) is (wanted is not None)


@pytest.fixture
def fused(monkeypatch):
    """The fused backend takes calls on the CPU; the calls that it gets."""
    calls = []
    attend = TritonFused.__call__

    def noted(self, inputs):
        calls.append(inputs)
        return attend(self, inputs)

    monkeypatch.setattr(TritonFused, "device_types", None)
    monkeypatch.setattr(TritonFused, "other_reasons", lambda self, inputs: [])
    monkeypatch.setattr(TritonFused, "__call__", noted)
    dispatch.reset()
    yield calls
    dispatch.reset()


def test_a_call_through_dispatch_is_checked_as_it_runs(fused):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, n, 2, 16, generator=g) for n in (9, 21, 21))
    bias = LowRankBias(*(torch.randn(1, n, 1, 4, generator=g) for n in (9, 21)))

    def run(*given):
        return flash_bias_attention(*given, bias, dtype=HALF, backend="triton")

    with torch.no_grad():
        first, second = run(q, k, v), run(q, k, v)
    checked, *_ = fused
    assert checked.out_dtype is FULL and checked.q.shape != q.shape  # the self-check's problem
    assert fused[-1].out_dtype is FULL and fused[-1].q.dtype is HALF
    assert torch.equal(first, second) and first.dtype is FULL
    assert not torch.equal(first, first.half().float())  # it was never rounded
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    trained = run(*leaves)
    assert torch.equal(trained, first.half().float())
    # In a checkpoint the forward, which has no gradients, gives what its recomputation gives.
    for reentrant in (True, False):
        out = checkpoint(run, *leaves, **checkpoint_options(reentrant))
        assert torch.equal(out, trained)
