"""FlashMHA's later generation: what its one comparison with its own code must see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashbias_patch import telemetry
from flashbias_patch.patching import install

E, H, B, M, N = 16, 4, 2, 5, 7


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


class Projections(nn.Module):
    def __init__(self, temperature=1, shape=(1,)):
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout, self.calls = E, H, 0.0, 0
        self.temperature, self.shape = temperature, shape
        self.in_proj_weight = nn.Parameter(torch.randn(3 * E, E) * 0.3)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * E) * 0.1)
        self.out_proj = nn.Linear(E, E)

    def attend(self, sequences, bias, cosine=False):
        self.calls += 1
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (H, -1)).transpose(1, 2)
            for x, w, b in zip(sequences, weights, biases)
        )
        if cosine:
            q, k = 10 * F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = q @ k.transpose(-1, -2) / (1.0 if cosine else (E // H) ** 0.5)
        scores = scores / self.temperature / self.shape[0]
        if bias is not None:
            scores = scores + (bias[:, None] if bias.dim() == 3 else bias)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), None


def claimed(cosine=False):
    """A class of that name and signature, and its forward as it was."""

    def forward(self, query=None, key=None, value=None, q=None, k=None, v=None, attn_mask=None,
                key_padding_mask=None, attn_bias=None, **kwargs):  # fmt: skip
        pairs = ((query, q), (key, k), (value, v))
        return self.attend([a if a is not None else b for a, b in pairs], attn_bias, cosine)

    cls = type("FlashMHA", (Projections,), {"forward": forward})
    assert install.claim(cls)
    return cls, forward


def sequences():
    g = torch.Generator().manual_seed(1)
    query, key = (torch.randn(B, n, E, generator=g) for n in (M, N))
    return query, key, key


def computed(module):
    """The module's output, and how many of the package's calls made it; the comparison is done."""
    module(*sequences())
    telemetry.reset()
    out, _ = module(*sequences())
    return out, sum(count for name, count in telemetry.calls.items() if name != "original")


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-3])
@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("cosine", [False, True])
def test_an_output_projection_that_hides_what_is_computed(cosine, bias, scale):
    """Zero is a common first value: what is compared then is zero with zero."""
    torch.manual_seed(0)
    cls, original = claimed(cosine)
    module = cls()
    with torch.no_grad():
        module.out_proj.weight.mul_(scale)
        module.out_proj.bias.fill_(bias)
        computed(module)
        module.out_proj.weight.normal_()
        out, calls = computed(module)
        torch.testing.assert_close(out, original(module, *sequences())[0], rtol=1e-5, atol=1e-5)
    assert bool(calls) is not cosine


@pytest.mark.parametrize("options", [dict(temperature=4), dict(shape=(4,)), dict(shape=[4])])
@pytest.mark.parametrize("first", [True, False])
def test_modules_of_one_class_with_other_integers(options, first):
    torch.manual_seed(0)
    cls, original = claimed()
    usual, other = cls(), cls(**options)
    for module in (usual, other) if first else (other, usual):
        out, calls = computed(module)
        torch.testing.assert_close(out, original(module, *sequences())[0], rtol=1e-5, atol=1e-5)
        assert bool(calls) is (module is usual)


def test_a_count_of_calls_is_no_other_kind():
    cls, _ = claimed()
    module, compared = cls(), []
    attend = module.attend
    for _ in range(4):
        module(*sequences())
    module.attend = lambda *args: compared.append(1) or attend(*args)
    for _ in range(4):
        module(*sequences())
    assert not compared


class Wrapped(nn.Module):
    """As a quantised layer: `weight` is a method."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("wrap", [nn.Sequential, Wrapped])
def test_an_output_projection_without_a_weight(wrap):
    torch.manual_seed(0)
    cls, original = claimed()
    module = cls()
    module.out_proj = wrap(module.out_proj)
    out, calls = computed(module)
    torch.testing.assert_close(out, original(module, *sequences())[0])
    assert calls
