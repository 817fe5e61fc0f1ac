"""FLASHBIAS_RANK and FLASHBIAS_ENERGY: dense biases computed as low-rank ones, measured and
reported."""

from __future__ import annotations

import pytest
import torch

import flashbias_patch
from flashbias_patch.attention import dispatch

from .test_bias_ways import (
    WAYS,
    BiasModule,
    assert_same,
    decoder_of,
    gradients,
    inputs,
    reference,
    run_biased,
)


def setting(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"FLASHBIAS_{name.upper()}", str(value))
    flashbias_patch.settings.reload()


@pytest.fixture
def seen(monkeypatch):
    """(rank, whether dense) of every call that reaches the dispatcher."""
    calls, attend = [], dispatch.attend

    def watch(call, *rest):
        calls.append((call.rank, call.dense is not None))
        return attend(call, *rest)

    monkeypatch.setattr(dispatch, "attend", watch)
    return calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("with_cp", [False, True])
def test_low_rank_inside_and_the_gradient_of_the_dense_one(
    repository, monkeypatch, seen, way, with_cp
):
    """The map has rank 3: the projection's gradient is the exact one, through recomputation too."""
    truth = reference(repository, True)
    setting(monkeypatch, energy=0.999999)
    flashbias_patch.install()
    decoder = decoder_of(repository(), "PETRMultiheadAttention", with_cp)
    maker, tensors = BiasModule(), inputs(True)
    for _ in range(2):  # the second step starts warm
        maker.zero_grad()
        decoder.zero_grad()
        for t in tensors.values():
            t.grad = None
        out = run_biased(decoder, maker, tensors, way, structured=False)
        assert_same(gradients(decoder, maker, tensors, out), truth)
    assert {entry for entry in seen if entry[0]} == {(3, False)}
    (entry,) = flashbias_patch.status()["factorizations"]
    assert entry["rank"] == 3 and entry["relative_error"] < 1e-3 and entry["used_dense"] is None
    assert "rank 3, relative error" in str(flashbias_patch.status())


def test_above_the_error_the_dense_bias_is_used_and_logged(patched, monkeypatch, seen, caplog):
    setting(monkeypatch, rank=1)
    decoder, maker, tensors = (
        decoder_of(patched, "PETRMultiheadAttention", False),
        BiasModule(),
        inputs(False),
    )
    out = run_biased(decoder, maker, tensors, "ambient", structured=False)
    assert (0, True) in seen and not any(rank for rank, _ in seen)
    assert "max_error" in flashbias_patch.status()["factorizations"][0]["used_dense"]
    assert sum("dense bias is used" in r.message for r in caplog.records) == 1
    setting(monkeypatch, rank=1, max_error=1.0)
    seen.clear()
    assert not torch.allclose(run_biased(decoder, maker, tensors, "ambient", structured=False), out)
    assert (1, False) in seen


def test_by_default_a_dense_bias_is_exact(patched, seen):
    decoder, maker, tensors = (
        decoder_of(patched, "PETRMultiheadAttention", False),
        BiasModule(),
        inputs(False),
    )
    run_biased(decoder, maker, tensors, "ambient", structured=False)
    assert (0, True) in seen and not flashbias_patch.status()["factorizations"]


def test_under_inference_mode(monkeypatch):
    """Inference tensors have no version. What is factorised there leaves nothing that training
    would meet."""
    from flashbias_patch.bias import DenseBias
    from flashbias_patch.patching import auto_factorize

    monkeypatch.setenv("FLASHBIAS_RANK", "2")
    flashbias_patch.settings.reload()
    module, outside = torch.nn.Linear(1, 1), torch.randn(20, 2) @ torch.randn(2, 30)
    with torch.inference_mode():
        for tensor in (torch.randn(20, 2) @ torch.randn(2, 30), outside, outside):
            low = auto_factorize.low_rank(module, tensor, DenseBias(tensor))
            torch.testing.assert_close(low.dense()[0, 0], tensor, rtol=1e-4, atol=1e-4)
    inside = tensor  # made outside
    learned = outside.clone().requires_grad_()
    auto_factorize.low_rank(module, learned, DenseBias(learned)).dense().sum().backward()
    assert learned.grad is not None and inside is outside
    with torch.inference_mode():  # and after training
        auto_factorize.low_rank(module, learned, DenseBias(learned))
