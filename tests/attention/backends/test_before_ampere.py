"""GPUs before Ampere, by a pretended compute capability: which backends take a call, and why the
others do not."""

from __future__ import annotations

import pytest
import torch

from flashbias_patch.attention import dispatch, order
from flashbias_patch.attention.inputs import AttentionInputs
from tests.support import internals

fake = pytest.importorskip("torch._subclasses.fake_tensor")


@pytest.fixture(params=[(6, 1), (7, 0), (7, 5)])
def card(request, monkeypatch):
    """Tensors that are on a GPU of this capability, without numbers."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "12.1")
    internals.forget_capabilities()
    try:
        with fake.FakeTensorMode(allow_non_fake_inputs=True):
            try:
                torch.empty(0, device="cuda")
            except (RuntimeError, AssertionError) as error:
                pytest.skip(f"this torch wants a GPU for fake tensors too: {str(error)[:40]}")
            yield request.param
    finally:
        internals.forget_capabilities()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [0, 8])
def test_sdpa_computes_and_the_others_say_why_not(card, dtype, rank):
    q, k = (torch.empty(2, length, 8, 32, device="cuda", dtype=dtype) for length in (113, 203))
    factors = [
        torch.empty(1, length, 1, rank, device="cuda", dtype=dtype) if rank else None
        for length in (113, 203)
    ]
    reasons = dispatch.explain(AttentionInputs(q, k, k, *factors, scale=32**-0.5))
    assert [name for name, why in reasons.items() if not why] == ["sdpa", "reference"]
    assert any(
        "compute capability {}.{} is below 8.0".format(*card) in why for why in reasons["triton"]
    )
    said = " ".join(reasons["flash"])
    assert f"this GPU has {card[0]}.x" in said or "float16 and bfloat16 only" in said


def test_no_table_of_another_capability_is_used(card):
    q = torch.empty(2, 900, 8, 32, device="cuda", dtype=torch.float16)
    assert order.fastest(AttentionInputs(q, q, q, scale=32**-0.5), True) == ()
