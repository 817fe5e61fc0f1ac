"""The chunked reference against the tests' own attention in float64: output and every gradient, for
every part of a call, whole and in chunks of queries and keys."""

import math

import pytest
import torch

from flashbias_patch.attention import chunked_attention
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.attention.reference_attention import Dropout
from tests.support.reference import of_call

B, M, H, N, D, DV = 2, 13, 3, 41, 8, 5
LENGTHS = (11, 9, 21)
# Scores for each batch and head: all, chunks of queries and keys, single scores.
ROOMS = {"whole": M * N, "chunks": 45, "single scores": 1}
FEATURES = (
    "", "factors", "segments", "dense", "key bias", "mask", "padding", "float padding",
    "factors segments padding mask", "segments dense", "dense float padding",
    "factors segments dense mask padding",
)  # fmt: skip


def call_of(features, dtype):
    generator = torch.Generator().manual_seed(len(features))

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    made = dict(q=draw(B, M, H, D), k=draw(B, N, H, D), v=draw(B, N, H, DV), scale=-0.3)
    if "factors" in features:
        made.update(q_factor=draw(1, M, H, 3), k_factor=draw(B, N, 1, 3))
    if "segments" in features:
        weights = draw(B, M, 1, 3)
        weights[:, 2, :, 0] = weights[:, 3] = -math.inf
        made.update(segment_weights=weights, segment_lengths=LENGTHS)
    if "dense" in features:
        made["dense"] = draw(B, 1, M, N)
        made["dense"][:, :, 4] = -math.inf
        made["dense"][:, :, 5] = -200
        made["dense"][:, :, 6] = -1e9
    if "key bias" in features:
        made["dense"] = draw(1, H, 1, N)
    if "mask" in features:
        made["mask"] = torch.rand(B, 1, M, N, generator=generator) < 0.3
        made["mask"][:, :, 7] = True
    if "padding" in features:
        hidden = torch.arange(N).expand(B, N) >= torch.tensor([[N], [30]])
        made["key_padding"] = hidden
        if "float" in features:
            made["key_padding"] = draw(B, N).masked_fill(hidden, -math.inf)
    return AttentionInputs(**made)


def both(features, dtype, room, dropout_p, monkeypatch):
    """[(name, exact, computed)] of output and gradients."""
    inputs = call_of(features, dtype)
    monkeypatch.setitem(chunked_attention.CHUNK_BYTES, "cpu", 1 << 30)
    size = 8 if dtype is torch.float64 else 4
    chunks = chunked_attention.chunks_of(inputs, 2 * size * B * H * room)
    kept, dropout = torch.ones(B, H, M, N, dtype=torch.float64), None
    if dropout_p:
        kept = (torch.rand(B, H, M, N, generator=torch.Generator().manual_seed(1)) > 0.4).double()
        dropout = Dropout(lambda m, m1, n, n1: kept[:, :, m:m1, n:n1].to(dtype), 1 / 0.6)
        kept_scale = 1 / 0.6
    else:
        kept_scale = 1.0
    names = [
        name
        for name in (
            "q",
            "k",
            "v",
            "q_factor",
            "k_factor",
            "segment_weights",
            "dense",
            "key_padding",
        )
        if getattr(inputs, name) is not None and getattr(inputs, name).is_floating_point()
    ]
    leaves = [getattr(inputs, name).double().requires_grad_() for name in names]
    exact = of_call(inputs._replace(**dict(zip(names, leaves))), kept * kept_scale)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    exact_grads = torch.autograd.grad(exact, leaves, grad.double())
    state = chunked_attention.forward(inputs, chunks, dropout)
    found = chunked_attention.gradients(inputs, grad, names, chunks, dropout, state)
    out = state.out.view(B, H, M, DV).transpose(1, 2)
    return [("out", exact, out), *((n, e, found[n]) for n, e in zip(names, exact_grads))]


@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS)
@pytest.mark.parametrize("dropout_p", (0.0, 0.4))
@pytest.mark.parametrize("features", FEATURES)
def test_output_and_gradients(features, dropout_p, room, monkeypatch):
    # Near -1e9 scores in float64 keep digits that ones relative to it do not.
    for name, exact, found in both(features, torch.float64, room, dropout_p, monkeypatch):
        gap = (found - exact).abs().max() / exact.abs().max().clamp_min(1e-9)
        assert gap < (1e-5 if "dense" in features else 1e-11), name


@pytest.mark.parametrize("features", FEATURES[:4])
def test_single_precision(features, monkeypatch):
    if features == "dense":
        return  # scores near -1e9 are other numbers in float32
    for name, exact, found in both(features, torch.float32, 45, 0.0, monkeypatch):
        assert found.dtype is torch.float32
        assert (found - exact).abs().max() < 2e-5 * exact.abs().max(), name


def test_fully_masked_rows_are_zero(monkeypatch):
    features = "segments mask padding"
    for name, _, found in both(features, torch.float64, 45, 0.0, monkeypatch):
        rows = {"out": found, "q": found, "segment_weights": found}.get(name)
        if rows is not None:
            assert not rows[:, 3].any() and not rows[:, 7].any(), name


def test_padded_keys_need_not_be_finite():
    inputs = call_of("padding", torch.float32)
    expected = chunked_attention.forward(inputs, chunked_attention.chunks_of(inputs)).out
    inputs.k[1, 30:] = math.nan
    found = chunked_attention.forward(inputs, chunked_attention.chunks_of(inputs)).out
    assert torch.equal(found, expected)


def test_chunks_follow_the_free_memory_of_a_gpu(monkeypatch):
    """An eighth of it, within CHUNK_BYTES and LEAST_BYTES."""
    device, free = torch.device("cuda"), []
    monkeypatch.setattr(chunked_attention.internals, "stream_capturing", lambda: False)
    monkeypatch.setattr(chunked_attention.internals, "free_memory", lambda device: free[-1])
    most = chunked_attention.CHUNK_BYTES["cuda"]
    for free_bytes, expected in ((80 << 30, most), (800 << 20, 100 << 20), (1 << 20, 32 << 20)):
        free.append(free_bytes)
        assert chunked_attention.usual_bytes(device, most, 1 << 40) == expected
