"""A patched model is traced and exported as the unpatched one: the same graph, the same numbers in
onnxruntime."""

from __future__ import annotations

import io
import warnings
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import flashbias_patch
from flashbias_patch.bias import AlibiBias, Grid, LowRankBias, ModalityBias, WindowBias
from flashbias_patch.patching import context, unreachable
from flashbias_patch.patching.exporting import REFUSED, exporting

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
M, N, B, E, H = 7, 11, 2, 32, 4
NON_STRICT = hasattr(torch, "export") and hasattr(torch.compiler, "is_exporting")


class Detector(nn.Module):
    """Self and cross attention, a mask and key padding, as a decoder layer calls them."""

    def __init__(self, classes):
        super().__init__()
        self.self_attn = classes.PETRMultiheadAttention(embed_dims=E, num_heads=H, dropout=0.1)
        self.cross_attn = classes.PETRMultiheadAttention(embed_dims=E, num_heads=H, dropout=0.1)
        self.register_buffer("padding", torch.arange(N).expand(B, N) > 8)

    def forward(self, query, key):
        query = self.self_attn(query, query, query)
        return self.cross_attn(query, key, key, key_padding_mask=self.padding)


class Biased(nn.Module):
    def __init__(self, detector, make):
        super().__init__()
        self.detector, self.make = detector, make
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, query, key):
        with flashbias_patch.attention_bias(self.make() * self.scale, kind="cross"):
            return self.detector(query, key)


BIASES = {
    "low rank": lambda: LowRankBias(
        torch.linspace(-1, 1, M * 3).reshape(1, M, 1, 3),
        torch.ones(1, N, 1, 3) * torch.arange(N)[None, :, None, None] / N,
    ),
    "segments": lambda: ModalityBias(
        torch.linspace(-1, 1, M * 2).reshape(1, M, 1, 2), segments=(4, N - 4)
    ),
    "windows": lambda: WindowBias(
        torch.linspace(0, 2, M).reshape(1, M, 1),
        torch.arange(3 * M).reshape(1, M, 1, 3) % 4,
        [Grid(1, 1, N)],
        3,
    ),
    "alibi": lambda: AlibiBias(torch.linspace(0.1, 1, H), M, N),
}

QUICK = ("low rank", "windows")


def inputs():
    torch.manual_seed(1)
    return torch.randn(M, B, E), torch.randn(N, B, E)


def traced(model):
    module = torch.jit.trace(model, inputs(), check_trace=False)
    return Counter(node.kind() for node in module.inlined_graph.nodes()), module(*inputs())


def run_onnx(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    named = {given.name: tensor.numpy() for given, tensor in zip(session.get_inputs(), inputs())}
    ops = Counter(node.op_type for node in onnx.load_from_string(file).graph.node)
    return ops, torch.from_numpy(np.asarray(session.run(None, named)[0]))


def onnx_script(model):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs(), file, opset_version=17, **({"dynamo": False} if NON_STRICT else {})
        )
    return run_onnx(file.getvalue())


def onnx_dynamo(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, inputs(), dynamo=True, verbose=False)
    return run_onnx(program.model_proto.SerializeToString())


def export(model, strict=False):
    program = torch.export.export(model, inputs(), strict=strict)
    return Counter(
        str(n.target) for n in program.graph.nodes if n.op == "call_function"
    ), program.module()(*inputs())


def export_strict(model):
    return export(model, strict=True)


needs_export = pytest.mark.skipif(
    not NON_STRICT, reason="torch.export cannot be told from torch.compile before torch 2.7"
)
WAYS = [
    traced,
    onnx_script,
    pytest.param(export, marks=needs_export),
    pytest.param(export_strict, marks=needs_export),
    pytest.param(onnx_dynamo, marks=[needs_export, pytest.mark.slow]),
]


@pytest.fixture
def model(repository):
    torch.manual_seed(0)
    return Detector(repository()).eval()


@pytest.mark.parametrize("way", WAYS)
def test_as_unpatched(model, way):
    with torch.no_grad():
        unpatched, numbers = way(model)
        flashbias_patch.install()
        patched, again = way(model)
        expected = model(*inputs())
    assert (
        flashbias_patch.status()["patched"] and flashbias_patch.status()["calls"]
    )  # patched, and computes outside
    assert patched == unpatched
    torch.testing.assert_close(again, numbers, rtol=0, atol=0)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    assert not exporting() and not flashbias_patch.status()["fallbacks"]


@pytest.mark.parametrize(
    "kind",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BIASES],
)
@pytest.mark.parametrize("way", [traced, onnx_script, *WAYS[2:3], *WAYS[4:]])
def test_a_bias_is_exported_in_plain_operators(model, way, kind):
    flashbias_patch.install()
    biased = Biased(model, BIASES[kind]).eval()
    with torch.no_grad():
        ops, numbers = way(biased)
        expected, without = biased(*inputs()), model(*inputs())
    torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5)
    assert (expected - without).abs().max() > 1e-3
    assert not any("flashbias" in op.lower() for op in ops)


@needs_export
def test_a_strict_export_with_a_bias_is_an_error(model):
    flashbias_patch.install()
    with pytest.raises(Exception) as raised:
        export_strict(Biased(model, BIASES["low rank"]).eval())
    assert REFUSED in str(raised.value) or "attention_bias" in str(raised.value)


@needs_export
def test_a_strict_export_beside_a_block(model):
    """After a block, the model is exported as ever; inside one, which torch.compile cannot read,
    the bias is refused."""
    flashbias_patch.install()
    with flashbias_patch.attention_bias(BIASES["low rank"](), kind="cross"):
        with pytest.raises(Exception) as raised:
            export_strict(model)
        assert REFUSED in str(raised.value)
    with torch.no_grad():
        _, numbers = export_strict(model)
        torch.testing.assert_close(numbers, model(*inputs()), rtol=1e-5, atol=1e-5)


@needs_export
def test_a_strict_export_after_a_bias_out_of_reach(model, monkeypatch):
    """Modules remembered for another reason than an open block do not refuse an export."""
    module = nn.Linear(1, 1)
    monkeypatch.setattr(unreachable.record, "any", True)
    monkeypatch.setattr(unreachable.record, "modules", weakref.WeakSet([module]))
    monkeypatch.setattr(context.history, "opened", True)
    flashbias_patch.install()
    with torch.no_grad():
        export_strict(model)


def test_a_module_out_of_reach_that_is_gone_costs_later_calls_nothing(monkeypatch):
    module, other = nn.Linear(1, 1), nn.Linear(1, 1)
    monkeypatch.setattr(unreachable.record, "any", True)
    monkeypatch.setattr(unreachable.record, "modules", weakref.WeakSet([module]))
    unreachable.check(other)
    assert unreachable.record.any
    del module
    unreachable.check(other)
    assert not unreachable.record.any


@pytest.mark.parametrize("way", WAYS[:3])
def test_a_flash_class_is_exported_in_plain_operators(repository, way):
    """Its own code, flash-attn's kernels, no exporter takes."""
    flashbias_patch.install()
    torch.manual_seed(0)
    model = (
        repository().PETRMultiheadFlashAttention(embed_dims=E, num_heads=H, batch_first=True).eval()
    )
    with torch.no_grad():
        ops, numbers = way(Biased(Cross(model), BIASES["low rank"]).eval())
        expected = Biased(Cross(model), BIASES["low rank"]).eval()(*inputs())
    torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5)
    assert not any("flashbias" in op.lower() for op in ops)


class Cross(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, query, key):
        return self.attention(query, key, key)
