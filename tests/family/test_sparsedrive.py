"""The flash classes of SparseDrive and DiffusionDrive, where flash-attn is not installed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import flashbias_patch
from flashbias_patch.bias import LowRankBias
from tests import stand_ins

from .test_family import load_patched

E, H, B, M, N = 16, 2, 2, 5, 9
ATTENTION = "projects.mmdet3d_plugin.models.attention"
# Names and shapes of a released checkpoint, under the name of its attention.
RELEASED = {
    "attn.in_proj_weight": (3 * E, E),
    "attn.in_proj_bias": (3 * E,),
    "attn.out_proj.weight": (E, E),
    "attn.out_proj.bias": (E,),
}


@pytest.fixture
def module():
    with stand_ins.repository("sparsedrive") as load:
        classes = load_patched(load, ATTENTION)
        torch.manual_seed(0)
        yield classes.MultiheadFlashAttention(E, H, attn_drop=0.1)
        flashbias_patch.uninstall()


def tensors(dtype=torch.float32):
    torch.manual_seed(1)
    sizes = dict(query=M, key=N, value=N, query_pos=M, key_pos=N)
    return {
        name: torch.randn(B, length, E, dtype=dtype, requires_grad=True)
        for name, length in sizes.items()
    }


def formula(module, query, key, value, query_pos, key_pos, keep=None, bias=None):
    core = module.attn
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (H, -1))
        for x, w, b in zip(
            (query + query_pos, key + key_pos, value),
            core.in_proj_weight.chunk(3),
            core.in_proj_bias.chunk(3),
        )
    )
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
    out = torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v).flatten(2)
    return query + core.out_proj(out)


def compare(module, given, expected, out):
    everything = [*given.values(), *module.parameters()]
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    for ours, theirs in zip(
        (out, *torch.autograd.grad((out * weights).sum(), everything)),
        (expected, *torch.autograd.grad((expected * weights).sum(), everything)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


def test_both_classes_are_patched(module):
    patched = {(item["class"], item["seam"]) for item in flashbias_patch.status()["patched"]}
    assert {("MultiheadFlashAttention", "outer"), ("FlashMHA", "core")} <= patched


@pytest.mark.parametrize("padded", [False, True])
def test_the_formula(module, padded):
    """Batch first; True in a padding mask keeps a key, as flash-attn has it."""
    keep = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.6
    keep[:, 0] = True
    keep = keep if padded else None
    given = tensors()
    out = module.eval()(**given, key_padding_mask=keep)
    compare(module, given, formula(module, **given, keep=keep), out)
    assert flashbias_patch.status()["calls"].get("original", 0) == 0


def test_a_learned_bias(module):
    given, scale = tensors(), torch.tensor(0.7, requires_grad=True)
    bias = LowRankBias(torch.randn(1, M, 1, 3), torch.randn(1, N, 1, 3))
    with flashbias_patch.attention_bias(bias * scale, kind="cross"):
        out = module.eval()(**given)
    dense = bias.dense() * scale
    expected = formula(module, **given, bias=dense)
    ours, theirs = (
        torch.autograd.grad(o.square().sum(), scale, retain_graph=True)[0] for o in (out, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    compare(module, given, expected, out)


def test_dropout_acts_in_training(module):
    given = tensors()
    torch.manual_seed(3)
    first, second = module.train()(**given), module(**given)
    assert not torch.equal(first, second)
    assert torch.equal(module.eval()(**given), module(**given))


def test_its_own_refusal_is_raised(module):
    given = tensors()
    with pytest.raises(AssertionError, match="no attn_mask"):
        module(**given, attn_mask=torch.zeros(M, N, dtype=torch.bool))


def test_released_weights_load(module):
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == RELEASED
    released = {name: torch.randn(shape) for name, shape in RELEASED.items()}
    module.load_state_dict(released, strict=True)
    assert all(torch.equal(value, released[name]) for name, value in module.state_dict().items())
