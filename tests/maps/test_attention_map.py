"""attention_map(...): the rows of chosen queries against the whole matrix in float64; outputs and
gradients untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashbias_patch
from flashbias_patch.bias import LowRankBias, ModalityBias
from tests.support import reference
from tests.support.capabilities import since

M, N, B, E, H = 13, 17, 2, 32, 4
QUERIES = [3, 0, -1]


class Layer(nn.Module):
    def __init__(self, classes, cross="PETRMultiheadAttention", dropout=0.0):
        super().__init__()
        self.self_attn = classes.PETRMultiheadAttention(embed_dims=E, num_heads=H, dropout=dropout)
        self.cross = getattr(classes, cross)(embed_dims=E, num_heads=H, dropout=dropout)

    def forward(self, query, key, **options):
        return self.cross(self.self_attn(query, query, query), key, key, **options)


def inputs(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.randn(M, B, E, dtype=dtype), torch.randn(N, B, E, dtype=dtype)


def expected(attention, query, key, bias=None, hidden=None):
    """(B, H, M, N) in float64 from the projections of nn.MultiheadAttention or FlashMHA."""
    core = attention.attn
    weight = core.in_proj_weight.detach().double()
    offset = (
        torch.zeros(3 * E) if core.in_proj_bias is None else core.in_proj_bias.detach().double()
    )
    q = query.double() @ weight[:E].T + offset[:E]
    k = key.double() @ weight[E : 2 * E].T + offset[E : 2 * E]
    q, k = (x.reshape(-1, B, H, E // H).transpose(0, 1) for x in (q, k))
    return reference.weights(q, k, bias, hidden)


@pytest.fixture
def layer(patched):
    torch.manual_seed(0)
    return Layer(patched).eval()


def biases(kind):
    generator = torch.Generator().manual_seed(5)
    if kind == "low rank":
        return LowRankBias(
            torch.randn(B, M, 1, 3, generator=generator),
            torch.randn(1, N, H, 3, generator=generator),
        )
    if kind == "segments":
        return ModalityBias(torch.randn(B, M, 1, 2, generator=generator), segments=(5, N - 5))
    return torch.randn(B, H, M, N, generator=generator)


@pytest.mark.parametrize("kind", [None, "low rank", "segments", "dense"])
@pytest.mark.parametrize("cross", ["PETRMultiheadAttention", "PETRMultiheadFlashAttention"])
def test_rows_equal_float64(patched, kind, cross):
    torch.manual_seed(0)
    layer = Layer(patched, cross).eval()
    query, key = inputs()
    padding = torch.arange(N).expand(B, N) > 14 if cross == "PETRMultiheadAttention" else None
    bias = None if kind is None else biases(kind)
    options = {"key_padding_mask": padding, **({} if bias is None else {"attention_bias": bias})}
    with torch.no_grad(), flashbias_patch.attention_map(layer, QUERIES) as maps:
        layer(query, key, **options)
    assert [(one.name.split(".")[0], one.kind, one.call) for one in maps] == [
        ("self_attn", "self", 0),
        ("cross", "cross", 0),
    ]
    assert maps[1].queries == (3, 0, M - 1) and maps[1].heads == (0, 1, 2, 3)
    assert maps[1].weights.shape == (B, H, 3, N)
    with torch.no_grad():
        between = layer.self_attn(query, query, query)
    dense = None if bias is None else bias if isinstance(bias, torch.Tensor) else bias.dense()
    wanted = expected(
        layer.cross, between, key, dense, None if padding is None else padding[:, None, None]
    )
    torch.testing.assert_close(
        maps[1].weights.double(), wanted[:, :, QUERIES], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(maps[1].weights.sum(-1), torch.ones(B, H, 3))


def test_heads_a_single_layer_and_several_calls(layer):
    query, key = inputs()
    with torch.no_grad(), flashbias_patch.attention_map(
        layer.cross, torch.tensor([2]), heads=[1, -1]
    ) as maps:
        layer(query, key)
        layer(query, key)
    assert [one.call for one in maps] == [0, 1] and {one.name for one in maps} == {""}
    assert maps[0].heads == (1, 3) and maps[0].weights.shape == (B, 2, 1, N)


def test_a_training_step_is_unchanged(patched):
    torch.manual_seed(0)
    layer = Layer(patched).train()
    other = copy.deepcopy(layer)
    query, key = inputs()
    layer(query, key).square().sum().backward()
    with flashbias_patch.attention_map(other, QUERIES) as maps:
        for use_reentrant in (False, True):
            checkpoint(
                other, query.requires_grad_(), key, use_reentrant=use_reentrant
            ).square().sum().backward()
    assert len(maps) == 4  # nothing of the recomputations
    for one, two in zip(layer.parameters(), other.parameters()):
        torch.testing.assert_close(2 * one.grad, two.grad, rtol=1e-5, atol=1e-5)
    assert not any(one.weights.requires_grad for one in maps)


def test_nothing_of_size_m_by_n_is_made(patched, monkeypatch):
    """With a thousand queries, the recorded scores are those of two."""
    from flashbias_patch.attention import reference_attention

    torch.manual_seed(0)
    layer, sizes, scores = Layer(patched).eval(), [], reference_attention.scores
    monkeypatch.setattr(
        reference_attention,
        "scores",
        lambda call: sizes.append(tuple(scores(call).shape)) or scores(call),
    )
    query = torch.randn(1000, B, E)
    bias = LowRankBias(torch.randn(1, 1000, 1, 4), torch.randn(1, N, 1, 4))
    with torch.no_grad(), flashbias_patch.attention_map(layer.cross, [5, 900]) as maps:
        layer.cross(query, inputs()[1], inputs()[1], attention_bias=bias)
    assert (
        len(maps) == 1
        and (B, H, 2, N) in sizes
        and all(shape[2] == 2 for shape in sizes if shape[1] == H)
    )


def test_nothing_is_left_behind(layer):
    from flashbias_patch.patching.seams import core, inner_attention

    original = inner_attention.attention_output
    with pytest.raises(RuntimeError, match="mine"), flashbias_patch.attention_map(layer, [0]):
        with flashbias_patch.attention_map(layer, [1]) as inner:
            layer(*inputs())
        assert inner_attention.attention_output is not original and len(inner) == 2
        raise RuntimeError("mine")
    assert inner_attention.attention_output is original and core.attention_output is original
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


@since(2, 0, "hooks with keyword arguments")
def test_kinds_where_there_are_as_many_keys_as_queries(layer):
    """By what the attention gets, not by lengths."""
    query, other = torch.randn(M, B, E), torch.randn(M, B, E)
    for given, kind in ((other, "cross"), (query, "self"), (query.view(M, B, E), "self")):
        for call in ({"key": given, "value": given}, {"query": query, "key": given}):
            args = () if "query" in call else (query,)
            with torch.no_grad(), flashbias_patch.attention_map(layer.cross, [0]) as maps:
                layer.cross(*args, **call)
            assert [one.kind for one in maps] == [kind]


def test_integers_of_numpy_are_integers(layer):
    numpy = pytest.importorskip("numpy")
    query, key = inputs()
    for queries in (numpy.array([1, 2]), [numpy.int64(1), torch.tensor(2)], torch.tensor([1, 2])):
        with torch.no_grad(), flashbias_patch.attention_map(layer.cross, queries) as maps:
            layer.cross(query, key)
        assert maps[0].queries == (1, 2)
    for wrong in (torch.tensor(1), [True], torch.tensor([True]), [1.0], "1", None):
        with pytest.raises(TypeError, match="queries must be a sequence of integers"):
            flashbias_patch.attention_map(layer, wrong).__enter__()


def test_mistakes_are_named(layer):
    with pytest.raises(ValueError, match="no attention in Linear is patched"):
        flashbias_patch.attention_map(nn.Linear(2, 2), [0]).__enter__()
    with pytest.raises(TypeError, match="queries must be a sequence of integers"):
        flashbias_patch.attention_map(layer, 3).__enter__()
    with pytest.raises(TypeError, match="module must be an nn.Module"):
        flashbias_patch.attention_map(layer.forward, [0]).__enter__()
    with pytest.raises(
        IndexError, match="queries: 13 is out of range"
    ), flashbias_patch.attention_map(layer, [M]):
        layer(*inputs())


def test_paint(layer):
    pytest.importorskip("matplotlib")
    row = torch.rand(4 * 3 + 6 * 2 * 5).softmax(0)
    images = [torch.rand(20, 50, 3).numpy() for _ in range(6)]
    figure = flashbias_patch.maps.paint(
        row, bev=(4, 3), cameras=(6, 2, 5), images=images, title="query 3"
    )
    assert len(figure.axes) == 7
    shares = [float(axes.get_title().split(": ")[1].split()[0]) for axes in figure.axes]
    assert sum(shares) == pytest.approx(100, abs=4)
    figure.canvas.draw()
    with pytest.raises(ValueError, match="row must have shape"):
        flashbias_patch.maps.paint(row[1:], bev=(4, 3), cameras=(6, 2, 5))
    with pytest.raises(ValueError, match="images must hold one entry"):
        flashbias_patch.maps.paint(row, bev=(4, 3), cameras=(6, 2, 5), images=images[1:])
