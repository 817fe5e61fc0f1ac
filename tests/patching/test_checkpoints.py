"""A bias under every make of checkpoint, at every place: output and all gradients as without checkpointing (float64)."""
from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import flashbias_patch
from flashbias_patch.bias import LowRankBias

from .checkpoints import KINDS, OWN_BACKWARD, checkpointed, reentrant

E, H, M, N, B = 8, 2, 5, 7, 2
PLACES = ("layer", "module", "inner", "decoder", "decoder and layer")
WAYS = ("scope", "keyword", "masks")
pytestmark = pytest.mark.filterwarnings("ignore")


class PETRMultiheadAttention(nn.Module):
    def __init__(self, operation_name, dropout):
        super().__init__()
        self.embed_dims, self.num_heads, self.operation_name = E, H, operation_name
        self.attn = nn.MultiheadAttention(E, H, dropout)
        self.checkpoint = lambda function, *args: function(*args)

    def forward(self, query, key=None, value=None, identity=None, query_pos=None, key_pos=None, attn_mask=None,
                key_padding_mask=None, **kwargs):
        key = query if key is None else key
        value = key if value is None else value

        def inner(q, k, v):
            return self.attn(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]

        return query + self.checkpoint(inner, query, key, value)


class PETRTransformerDecoderLayer(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.attentions = nn.ModuleList([
            PETRMultiheadAttention("self_attn", dropout), PETRMultiheadAttention("cross_attn", dropout),
        ])
        self.norm = nn.LayerNorm(E)

    def forward(self, query, key=None, value=None, query_pos=None, key_pos=None, attn_masks=None, **kwargs):
        masks = attn_masks or [None, None]
        query = self.attentions[0](query, attn_mask=masks[0], **kwargs)
        return self.norm(self.attentions[1](query, key, value, attn_mask=masks[1]))


class Decoder(nn.Module):
    def __init__(self, dropout=0.0, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(PETRTransformerDecoderLayer(dropout) for _ in range(layers))

    def forward(self, query, key, value, **kwargs):
        for layer in self.layers:
            query = layer(query, key, value, **kwargs)
        return query


@pytest.fixture
def patched(installed):
    from flashbias_patch.patching import hooks as patching

    for cls in (PETRMultiheadAttention, PETRTransformerDecoderLayer):
        assert patching.claim(cls)


def decoder_of(place=None, kind=None, dropout=0.0):
    torch.manual_seed(0)
    decoder = Decoder(dropout).double().train()
    if kind is None:
        return decoder
    for layer in decoder.layers:
        for index, attention in enumerate(layer.attentions):
            if place == "module":
                layer.attentions[index] = checkpointed(attention, kind)
            if place == "inner":  # a wrapper class around the inner attention would hide what it is
                attention.checkpoint = reentrant if "wrapper" in kind else KINDS[kind]
    if place in ("layer", "decoder and layer"):
        for index, layer in enumerate(decoder.layers):
            decoder.layers[index] = checkpointed(layer, kind)
    return checkpointed(decoder, kind) if place.startswith("decoder") else decoder


class Inputs:
    """Query, memory, and a bias: fixed, learned as a leaf, or computed from a scale that all layers share."""

    def __init__(self, learned=None, seed=3):
        g = torch.Generator().manual_seed(seed)
        self.query = torch.randn(M, B, E, generator=g, dtype=torch.float64).requires_grad_()
        self.memory = torch.randn(N, B, E, generator=g, dtype=torch.float64).requires_grad_()
        self.a = torch.randn(1, M, 1, 2, generator=g, dtype=torch.float64).mul_(2).requires_grad_(learned == "leaf")
        self.b = torch.randn(1, N, 1, 2, generator=g, dtype=torch.float64)
        self.scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=learned == "shared")
        self.learned = learned

    def bias(self, dense=False):
        a = torch.sin(self.scale) * self.a if self.learned == "shared" else self.a
        if dense:
            return a[0, :, 0] @ self.b[0, :, 0].T
        return LowRankBias(a, self.b)

    def leaves(self):
        return {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor) and t.requires_grad}


def run(decoder, inputs, way):
    torch.manual_seed(11)
    given = inputs.query, inputs.memory, inputs.memory
    if way == "keyword":
        return decoder(*given, attention_bias=inputs.bias())
    if way == "masks":
        return decoder(*given, attn_masks=[None, inputs.bias(dense=True)])
    with flashbias_patch.attention_bias(inputs.bias()):
        return decoder(*given)


def gradients(decoder, inputs, out=None):
    if out is not None:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        (out * weight).sum().backward()
    names = {n.replace("_checkpoint_wrapped_module.", "").replace("module.", ""): p for n, p in decoder.named_parameters()}
    return {**{n: p.grad for n, p in names.items()}, **{n: t.grad for n, t in inputs.leaves().items()}}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        if exact is None or found[name] is None:
            assert found[name] is exact, name
        else:
            torch.testing.assert_close(found[name], exact, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def may_refuse(kind, place, way, learned):
    """torch's own limit: such a checkpoint differentiates itself, and frees the graph of what it finds in a closure."""
    inside = way == "masks" or (way == "keyword" and place in ("layer", "decoder", "decoder and layer"))
    return learned is not None and kind in OWN_BACKWARD and inside


CASES = [
    (kind, place, way, learned, dropout)
    for kind, place, way, learned in itertools.product(KINDS, PLACES, WAYS, (None, "leaf", "shared"))
    for dropout in ((0.0, 0.3) if way == "scope" else (0.0,))
]


@pytest.mark.parametrize("kind, place, way, learned, dropout", CASES)
def test_as_without_a_checkpoint(patched, kind, place, way, learned, dropout):
    expected_inputs, inputs = Inputs(learned), Inputs(learned)
    plain = decoder_of(dropout=dropout)
    expected_out = run(plain, expected_inputs, way)
    expected = gradients(plain, expected_inputs, expected_out)
    decoder = decoder_of(place, kind, dropout)
    out = run(decoder, inputs, way)
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-9)
    try:
        found = gradients(decoder, inputs, out)
    except RuntimeError as error:
        assert may_refuse(kind, place, way, learned), error
        assert "use_reentrant=False" in str(error)
        return
    assert_equal(found, expected)
