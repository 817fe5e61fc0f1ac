"""Three ways a bias reaches a patched layer, with and without checkpointing: the gradients of a
dense reference.

The reference is the same repository unpatched, without checkpointing, in float64, given the dense
bias as the cross attention's mask.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import flashbias_patch
from flashbias_patch.bias import DenseBias, LowRankBias
from tests.support.capabilities import REENTRANT, needs_hooks

B, M, N, E, H, LAYERS = 2, 6, 9, 16, 2, 2
WAYS = ("keyword", "attn_masks", "ambient")


class BiasModule(nn.Module):
    """bias_scale times a fixed low-rank map: what a user learns."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.bias_scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("a", torch.randn(B, M, H, 3, generator=g))
        self.register_buffer("b", torch.randn(B, N, H, 3, generator=g))

    def low_rank(self):
        return LowRankBias(self.a * self.bias_scale, self.b)

    def dense(self):
        return torch.einsum("bmhr,bnhr->bhmn", self.a * self.bias_scale, self.b).flatten(0, 1)


def decoder_of(module, attention, with_cp, dropout=0.0):
    torch.manual_seed(0)
    layer = dict(
        type="PETRTransformerDecoderLayer",
        with_cp=with_cp,
        feedforward_channels=32,
        ffn_dropout=dropout,
        attn_cfgs=[
            dict(type="MultiheadAttention", embed_dims=E, num_heads=H, attn_drop=0.0),
            dict(type=attention, embed_dims=E, num_heads=H, attn_drop=0.0),
        ],
    )
    return module.PETRTransformerDecoder(
        transformerlayers=layer, num_layers=LAYERS, return_intermediate=True
    ).train()


def inputs(grads, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    made = {
        name: torch.randn(n, B, E, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grads)
        for name, n in dict(query=M, key=N, value=N, query_pos=M, key_pos=N).items()
    }
    return made


def gradients(decoder, bias_module, tensors, out):
    wanted = {
        **{f"input {k}": t for k, t in tensors.items() if t.requires_grad},
        **dict(decoder.named_parameters()),
        "bias_scale": bias_module.bias_scale,
    }
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(
        out.dtype
    )
    out.backward(g)
    return {"out": out.detach(), **{name: t.grad for name, t in wanted.items()}}


def run_biased(decoder, bias_module, tensors, way, structured):
    bias = bias_module.low_rank() if structured else bias_module.dense()
    if way == "keyword":
        return decoder(**tensors, attention_bias=bias)
    if way == "attn_masks":
        return decoder(**tensors, attn_masks=[None, bias])
    with flashbias_patch.attention_bias(bias, kind="cross"):
        return decoder(**tensors)


def assert_same(ours, truth, rtol=1e-3):
    for name, exact in truth.items():
        mine = ours[name]
        if exact is None or not exact.any():
            assert mine is None or mine.abs().max() < 1e-4, name
            continue
        assert mine is not None, f"{name} got no gradient"
        error = (mine.double() - exact.double()).norm() / exact.double().norm()
        assert error < rtol, f"{name}: relative error {error:.2g}"


def reference(repository, grads):
    """Unpatched, float64, no checkpoint, plain attention, dense mask."""
    flashbias_patch.uninstall()
    decoder = decoder_of(repository(), "PETRMultiheadAttention", with_cp=False).double()
    bias_module, tensors = BiasModule().double(), inputs(grads, torch.float64)
    out = decoder(**tensors, attn_masks=[None, bias_module.dense()])
    return gradients(decoder, bias_module, tensors, out)


@pytest.mark.parametrize("grads", [False, True], ids=["inputs without grad", "inputs with grad"])
@pytest.mark.parametrize(
    "way, with_cp, structured", list(itertools.product(WAYS, [False, True], [False, True]))
)
def test_bias_scale_gets_the_dense_gradient(repository, way, with_cp, structured, grads):
    truth = reference(repository, grads)
    flashbias_patch.install()
    decoder = decoder_of(repository(), "PETRMultiheadAttention", with_cp)
    bias_module, tensors = BiasModule(), inputs(grads)
    out = run_biased(decoder, bias_module, tensors, way, structured)
    assert_same(gradients(decoder, bias_module, tensors, out), truth)
    assert not flashbias_patch.status()["fallbacks"]


@pytest.mark.parametrize("way, with_cp", list(itertools.product(WAYS, [False, True])))
def test_the_flash_class_no_longer_drops_it(installed, repository, way, with_cp):
    """Against the same class with the bias added in float64 by its formula: see
    test_parity.flash_truth."""
    module = repository()
    results = []
    for structured in (True, False):
        decoder = decoder_of(module, "PETRMultiheadFlashAttention", with_cp)
        bias_module, tensors = BiasModule(), inputs(True)
        out = run_biased(decoder, bias_module, tensors, way, structured)
        results.append(gradients(decoder, bias_module, tensors, out))
    assert_same(results[0], {k: None if v is None else v.double() for k, v in results[1].items()})
    assert results[0]["bias_scale"].abs() > 1e-3


def test_unpatched_and_checkpointed_the_gradient_is_lost(repository):
    """The complaint this package began with; if torch or the family mends it, this test should
    go."""
    flashbias_patch.uninstall()
    decoder = decoder_of(repository(), "PETRMultiheadAttention", with_cp=True)
    bias_module, tensors = BiasModule(), inputs(False)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = decoder(**tensors, attn_masks=[None, bias_module.dense()])
        try:
            out.sum().backward()
        except RuntimeError:
            pass
    assert bias_module.bias_scale.grad is None


def test_without_a_bias_checkpointing_is_left_exactly_as_it_is(patched, monkeypatch):
    seen = []
    plain = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: seen.append(k) or plain(*a, **k)
    )
    decoder = decoder_of(patched, "PETRMultiheadAttention", with_cp=True)
    decoder(**inputs(True), attn_masks=[torch.zeros(M, M, dtype=torch.bool), None]).sum().backward()
    assert seen == [{}] * LAYERS
    assert torch.utils.checkpoint.checkpoint.__name__ == "<lambda>"


def test_what_a_block_wraps_is_put_back_after_an_error(patched):
    checkpoint, start, submit = (
        torch.utils.checkpoint.checkpoint,
        threading.Thread.start,
        ThreadPoolExecutor.submit,
    )
    with pytest.raises(ZeroDivisionError):
        with flashbias_patch.attention_bias(torch.zeros(M, N)):
            assert torch.utils.checkpoint.checkpoint is checkpoint
            assert threading.Thread.start is not start and ThreadPoolExecutor.submit is not submit
            raise ZeroDivisionError
    assert threading.Thread.start is start and ThreadPoolExecutor.submit is submit


@needs_hooks
def test_uninstall_puts_torchs_checkpoints_back(repository):
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.checkpoint import CheckpointFunction

    before = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__
    flashbias_patch.install()
    repository()
    assert saved_tensors_hooks.__enter__ is not before[0]
    flashbias_patch.uninstall()
    assert (saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__) == before
    assert "apply" not in vars(CheckpointFunction)


def test_names_bound_by_from_import_are_reached(installed):
    """`from torch.utils.checkpoint import checkpoint` in the module of a layer."""
    namespace = {"options": REENTRANT}
    exec(
        "import torch\nfrom torch import nn\nfrom torch.utils.checkpoint import checkpoint\n"
        "class PETRTransformerDecoderLayer(nn.Module):\n"
        "    def forward(self, query, attn_masks=None, **kwargs):\n"
        "        return checkpoint(self.inner, query, attn_masks, **options)\n"
        "    def inner(self, query, attn_masks):\n"
        "        return query * attn_masks[1]\n",
        namespace,
    )
    from flashbias_patch.patching import install

    plain = namespace["checkpoint"]
    layer = namespace["PETRTransformerDecoderLayer"]
    assert install.claim(layer)
    scale = torch.tensor(2.0, requires_grad=True)
    layer()(torch.ones(3), attn_masks=[None, scale]).sum().backward()
    assert scale.grad == 3 and namespace["checkpoint"] is plain


def test_kinds_and_layers(patched):
    decoder = decoder_of(patched, "PETRMultiheadAttention", with_cp=True)
    tensors = inputs(False)
    plain = decoder(**tensors)
    cross, self_bias = torch.randn(M, N), torch.randn(M, M)
    with flashbias_patch.attention_bias(cross, layers=[1]):
        second = decoder(**tensors)
    torch.testing.assert_close(second[0], plain[0])
    assert not torch.allclose(second[1], plain[1])
    with flashbias_patch.attention_bias(self_bias, kind="self"):
        assert not torch.allclose(decoder(**tensors)[0], plain[0])
    with flashbias_patch.attention_bias(cross), flashbias_patch.attention_bias(-cross):
        torch.testing.assert_close(decoder(**tensors), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(**tensors), plain)


def test_errors_name_the_shapes(patched):
    decoder = decoder_of(patched, "PETRMultiheadAttention", with_cp=False)
    with pytest.raises(ValueError, match=f"M={M}, N={N}"):
        with flashbias_patch.attention_bias(
            LowRankBias(torch.zeros(1, M + 1, 1, 2), torch.zeros(1, N, 1, 2))
        ):
            decoder(**inputs(False))
    with pytest.raises(ValueError, match="bias of shape"):
        decoder(**inputs(False), attention_bias=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="kind must be one of"):
        with flashbias_patch.attention_bias(torch.zeros(1, 1), kind="both"):
            pass
    with pytest.raises(TypeError, match="attention_bias must be"):
        patched.PETRMultiheadAttention(E, H)(torch.zeros(M, B, E), attention_bias=3)


def test_both_spellings_on_every_attention_class(patched):
    query, key, bias = torch.randn(M, B, E), torch.randn(N, B, E), torch.randn(B, H, M, N)
    for name in ("MultiheadAttention", "PETRMultiheadAttention", "PETRMultiheadFlashAttention"):
        module = getattr(patched, name)(E, H)
        expected = module(query, key, key, attn_mask=DenseBias(bias))
        for keyword in ("attention_bias", "attn_bias"):
            torch.testing.assert_close(module(query, key, key, **{keyword: bias}), expected)
        assert not torch.allclose(module(query, key, key), expected)
    core = patched.FlashMHA(E, H)
    q, k = query.transpose(0, 1), key.transpose(0, 1)
    assert not torch.allclose(core(q, k, k, attn_bias=bias)[0], core(q, k, k)[0])


@pytest.mark.parametrize("operation, kind", [("self_attn", "self"), ("cross_attn", "cross")])
def test_a_layers_own_name_decides_what_an_attention_is(patched, operation, kind):
    """mmcv's layers set operation_name; without one, equal memory means self attention."""
    module = patched.PETRMultiheadAttention(E, H)
    query, other = torch.randn(M, B, E), torch.randn(M, B, E)
    bias = torch.randn(M, M) * 3
    for key in (query, other):
        plain, wanted = module(query, key, key), module(query, key, key, attention_bias=bias)
        module.operation_name = operation
        for asked in ("self", "cross"):
            with flashbias_patch.attention_bias(bias, kind=asked):
                out = module(query, key, key)
            torch.testing.assert_close(out, wanted if asked == kind else plain)
        del module.operation_name


def test_bias_reaches_the_original_code_as_a_dense_mask(patched):
    """kdim is not supported here: the original runs, and the bias is not lost."""
    module = patched.PETRMultiheadAttention(E, H, kdim=8, vdim=8)
    query, key, bias = torch.randn(M, B, E), torch.randn(N, B, 8), torch.randn(B, H, M, N)
    ours = module(query, key, key, attention_bias=bias)
    flashbias_patch.uninstall()
    torch.testing.assert_close(ours, module(query, key, key, attn_mask=bias.flatten(0, 1)))


def test_twenty_steps_move_bias_scale_as_the_dense_reference(repository):
    def train(biased):
        # float64: Adam divides by the gradient's size, so that rounding of vanishing ones becomes a
        # whole step
        decoder = decoder_of(repository(), "PETRMultiheadAttention", with_cp=biased).double()
        bias_module, tensors = BiasModule().double(), inputs(False, torch.float64)
        optimizer = torch.optim.AdamW([*decoder.parameters(), *bias_module.parameters()], lr=1e-2)
        path = []
        for _ in range(20):
            optimizer.zero_grad()
            if biased:
                out = run_biased(decoder, bias_module, tensors, "ambient", True)
            else:
                out = decoder(**tensors, attn_masks=[None, bias_module.dense()])
            (out - 1).pow(2).mean().backward()
            optimizer.step()
            path.append(bias_module.bias_scale.item())
        return torch.tensor(path)

    flashbias_patch.uninstall()
    truth = train(False)
    flashbias_patch.install()
    ours = train(True)
    assert (truth - 0.5).abs().max() > 0.02, "the reference itself must move"
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-8)
