"""An nn.MultiheadAttention that is nobody's target behaves in a patched process as before."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import flashbias_patch
from tests.support import internals
from tests.support.capabilities import needs_compile


class Unrelated(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.fixture
def call(patched):
    """A patched process in which patched layers have run, and an unrelated module with its expected
    output."""
    patched.PETRMultiheadAttention(16, 2)(torch.randn(3, 2, 16))
    flashbias_patch.uninstall()
    module, x = Unrelated().eval(), torch.randn(2, 5, 16)
    expected = module(x)
    flashbias_patch.install()
    return module, x, expected


def test_torch_itself_is_untouched_but_for_a_forward_that_is_put_back(repository):
    before = vars(nn.MultiheadAttention)["forward"]
    assert not internals.is_patched(before)
    flashbias_patch.install()
    repository()
    assert inspect.unwrap(vars(nn.MultiheadAttention)["forward"]) is before
    assert inspect.signature(nn.MultiheadAttention.forward) == inspect.signature(before)
    flashbias_patch.uninstall()
    assert vars(nn.MultiheadAttention)["forward"] is before
    assert torch.nn.functional.multi_head_attention_forward.__module__ == "torch.nn.functional"
    assert torch.utils.checkpoint.checkpoint.__module__ == "torch.utils.checkpoint"
    assert not any(r["module"].startswith("torch.") for r in flashbias_patch.status()["refused"])


def test_called_and_deep_copied(call):
    module, x, expected = call
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    weights = module.attn(x, x, x)[1]
    assert weights.shape == (2, 5, 5)


def test_scripted(call):
    module, x, expected = call
    torch.testing.assert_close(torch.jit.script(module)(x), expected, rtol=1e-4, atol=1e-5)


@needs_compile
def test_exported(call):
    module, x, expected = call
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)


@needs_compile
def test_compiled_in_one_graph(call):
    module, x, expected = call
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@needs_compile
def test_a_patched_layer_compiles_to_the_right_result(patched):
    torch._dynamo.reset()
    module = patched.PETRMultiheadAttention(16, 2)
    query, key = torch.randn(5, 2, 16, requires_grad=True), torch.randn(7, 2, 16)
    expected = module(query, key, key)
    (expected_grad,) = torch.autograd.grad(expected.sum(), query)
    compiled = torch.compile(module, backend="aot_eager")
    flashbias_patch.telemetry.reset()
    out = compiled(query, key, key)
    assert sum(flashbias_patch.status()["calls"].values()) == 1, "the compiled module ran unpatched"
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), query)[0], expected_grad, rtol=1e-4, atol=1e-5
    )
