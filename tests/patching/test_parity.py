"""Patched equals unpatched: outputs and the gradients of every input and parameter, over the
argument space."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flashbias_patch
from tests.support.capabilities import RELEASE
from tests.support.reference import attention

H, E = 2, 16
MASKS = ("none", "bool (M,N)", "float (M,N)", "bool (B*H,M,N)", "float (B*H,M,N)")
PADDINGS = ("none", "bool", "float")


@st.composite
def calls(draw):
    return dict(
        B=draw(st.integers(1, 3)),
        M=draw(st.integers(1, 9)),
        N=draw(st.integers(1, 11)),
        batch_first=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        padding=draw(st.sampled_from(PADDINGS)),
        key=draw(st.sampled_from(("given", "default", "shared"))),
        positions=draw(st.booleans()),
        identity=draw(st.sampled_from(("default", "identity", "residual"))),
        positional=draw(st.booleans()),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def build(c):
    """The tensors of one call, as its (args, kwargs), and those that want a gradient."""
    g = torch.Generator().manual_seed(c["seed"])
    B, M = c["B"], c["M"]
    N = M if c["key"] == "default" else c["N"]

    def sequence(length):
        shape = (B, length, E) if c["batch_first"] else (length, B, E)
        return torch.randn(shape, generator=g).requires_grad_()

    query = sequence(M)
    key = None if c["key"] == "default" else sequence(N)
    value = key if c["key"] != "given" else sequence(N)
    positions = dict(query_pos=sequence(M), key_pos=sequence(N)) if c["positions"] else {}
    identity = {} if c["identity"] == "default" else {c["identity"]: sequence(M)}
    mask = None
    if c["mask"] != "none":
        shape = (M, N) if "(M,N)" in c["mask"] else (B * H, M, N)
        mask = torch.rand(shape, generator=g) < 0.4
        mask[..., 0] = False  # unpatched, a row with nothing to attend to is NaN
        if c["mask"].startswith("float"):
            mask = torch.randn(shape, generator=g).masked_fill(mask, float("-inf")).requires_grad_()
    padding = None
    if c["padding"] != "none":
        padding = torch.rand(B, N, generator=g) < 0.3
        padding[:, 0] = False
        if c["padding"] == "float" and (
            RELEASE >= (2, 0) or mask is None
        ):  # torch before takes no such pair
            padding = torch.zeros(B, N).masked_fill(padding, float("-inf"))
    masks = dict(attn_mask=mask, key_padding_mask=padding)
    given_names = dict(query=query, key=key, value=value, **identity, **positions, **masks)
    if c["positional"] and c["identity"] != "residual":
        args = (
            query,
            key,
            value,
            given_names.get("identity"),
            positions.get("query_pos"),
            positions.get("key_pos"),
            mask,
            padding,
        )
        kwargs = {}
    else:
        args, kwargs = (query,), {k: v for k, v in given_names.items() if k != "query"}
    tensors = [t for t in (*args, *kwargs.values()) if torch.is_tensor(t) and t.requires_grad]
    return args, kwargs, tensors


def run(module, args, kwargs, tensors):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = module(*args, **kwargs)
    torch.manual_seed(1)
    wanted = [*tensors, *module.parameters()]
    return [out, *torch.autograd.grad(out, wanted, torch.randn_like(out), allow_unused=True)]


def assert_equal(ours, theirs):
    for i, (mine, base) in enumerate(zip(ours, theirs)):
        if mine is None or base is None:
            assert mine is None or not mine.any(), i
            assert base is None or not base.any(), i
        else:
            torch.testing.assert_close(mine, base, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["MultiheadAttention", "PETRMultiheadAttention"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(c=calls())
def test_patched_equals_unpatched(repository, name, c):
    torch.manual_seed(c["seed"])
    module = getattr(repository(), name)(E, H, batch_first=c["batch_first"]).train(c["training"])
    args, kwargs, tensors = build(c)
    flashbias_patch.uninstall()
    theirs = run(module, args, kwargs, tensors)
    flashbias_patch.install()
    before = flashbias_patch.status()["calls"]
    ours = run(module, args, kwargs, tensors)
    counts = flashbias_patch.status()["calls"]
    assert sum(counts.values()) == sum(before.values()) + 1 and counts.get("original", 0) == 0
    assert_equal(ours, theirs)


def flash_truth(module, query, key, value, positions=(None, None), biases=()):
    """What PETRMultiheadFlashAttention means, in plain PyTorch; sequences first."""
    core = module.attn
    q = query if positions[0] is None else query + positions[0]
    k = key if positions[1] is None else key + positions[1]
    weights = core.in_proj_weight.chunk(3)
    offsets = (None,) * 3 if core.in_proj_bias is None else core.in_proj_bias.chunk(3)
    heads = [
        torch.nn.functional.linear(x, w, b).transpose(0, 1).unflatten(-1, (H, -1))
        for x, w, b in zip((q, k, value), weights, offsets)
    ]
    out = attention(*heads, *biases, dtype=None).flatten(2)
    return query + core.out_proj(out).transpose(0, 1)


@pytest.mark.parametrize(
    "attn_drop", [0.0, 0.1]
)  # the flash class takes it for its projections' bias
def test_flash_class_runs_on_the_cpu_as_its_formula(patched, attn_drop):
    module = patched.PETRMultiheadFlashAttention(E, H, attn_drop=attn_drop)
    assert (module.attn.in_proj_bias is None) == (attn_drop == 0.0)
    query, key, value, qp, kp = (torch.randn(n, 2, E, requires_grad=True) for n in (5, 7, 7, 5, 7))
    tensors = [query, key, value, qp, kp]
    theirs = flash_truth(module, query, key, value, (qp, kp))
    ours = module(query, key, value, query_pos=qp, key_pos=kp)
    grads = [
        torch.autograd.grad(out, [*tensors, *module.parameters()], torch.ones_like(out))
        for out in (ours, theirs)
    ]
    assert_equal([ours, *grads[0]], [theirs, *grads[1]])


def test_flash_class_drops_boolean_masks_as_upstream_by_default(patched, monkeypatch, caplog):
    caplog.set_level("INFO", "flashbias_patch")
    module = patched.PETRMultiheadFlashAttention(E, H)
    query, key = torch.randn(5, 2, E), torch.randn(7, 2, E)
    mask, padding = torch.rand(5, 7) < 0.5, torch.rand(2, 7) < 0.3
    plain = module(query, key, key)
    torch.testing.assert_close(
        module(query, key, key, attn_mask=mask, key_padding_mask=padding), plain
    )
    module(query, key, key, attn_mask=mask)
    assert sum("FLASHBIAS_MASKS" in r.message for r in caplog.records) == 1
    monkeypatch.setenv("FLASHBIAS_MASKS", "honour")
    flashbias_patch.settings.reload()
    honoured = module(query, key, key, attn_mask=mask, key_padding_mask=padding)
    masked = (mask | padding[:, None, None]).expand(2, H, 5, 7)
    torch.testing.assert_close(
        honoured, flash_truth(module, query, key, key, biases=(None, masked))
    )


@pytest.mark.parametrize("dtype, allowed", [("fp16", 3e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("size", (1.0, 1e-9))
def test_another_precision_keeps_the_callers_and_small_gradients(
    patched, monkeypatch, dtype, allowed, size
):
    module = patched.PETRMultiheadAttention(E, H).eval()
    query, key = (torch.randn(n, 2, E, requires_grad=True) for n in (5, 7))
    wanted = torch.autograd.grad(module(query, key, key), (query, key), torch.full((5, 2, E), size))
    monkeypatch.setenv("FLASHBIAS_DTYPE", dtype)
    flashbias_patch.settings.reload()
    out = module(query, key, key)
    assert out.dtype is torch.float32
    for found, exact in zip(
        torch.autograd.grad(out, (query, key), torch.full((5, 2, E), size)), wanted
    ):
        assert found.dtype is torch.float32
        assert 0 < (found - exact).norm() <= allowed * exact.norm()


def test_core_alone(patched):
    """FlashMHA is used without an outer class too: q, k, v batch first, positional or keyword."""
    core = patched.FlashMHA(E, H)
    q, kv = torch.randn(2, 5, E), torch.randn(2, 7, E)
    padding = torch.rand(2, 7) < 0.3
    out, weights = core(q, kv, kv)
    assert weights is None and out.shape == q.shape
    torch.testing.assert_close(core(q=q, k=kv, v=kv)[0], out)
    masked, _ = core(
        q, kv, kv, key_padding_mask=~padding
    )  # flash-attn's convention: True keeps a key
    heads = [
        torch.nn.functional.linear(x, w, b).unflatten(-1, (H, -1))
        for x, w, b in zip((q, kv, kv), core.in_proj_weight.chunk(3), core.in_proj_bias.chunk(3))
    ]
    expected = core.out_proj(attention(*heads, key_padding_mask=padding, dtype=None).flatten(2))
    torch.testing.assert_close(masked, expected)


def test_an_output_projection_without_a_weight(patched):
    """Wrapped, or quantised."""
    core = patched.FlashMHA(E, H)
    q, kv = torch.randn(2, 5, E), torch.randn(2, 7, E)
    out, _ = core(q, kv, kv)
    core.out_proj = torch.nn.Sequential(core.out_proj)
    assert torch.equal(core(q, kv, kv)[0], out)


@pytest.mark.parametrize(
    "arguments", [dict(kdim=8, vdim=8), dict(add_bias_kv=True), dict(add_zero_attn=True)]
)
def test_what_is_not_supported_runs_the_original_code(patched, arguments):
    module = patched.PETRMultiheadAttention(E, H, **arguments)
    width = arguments.get("kdim", E)
    query, key = torch.randn(5, 2, E), torch.randn(7, 2, width)
    ours = module(query, key, key)
    status = flashbias_patch.status()
    assert status["calls"] == {"original": 1}
    assert "not supported" in status["fallbacks"][0]["reason"]
    flashbias_patch.uninstall()
    torch.testing.assert_close(ours, module(query, key, key))


@pytest.mark.parametrize(
    "inner, name", [(True, "in_proj_weight"), (False, "weight"), (False, "bias")]
)
def test_a_class_that_computes_a_parameter_is_respected(patched, inner, name):
    """The class of a module may be replaced once it is built, as adapters do, with a property over
    the parameter."""
    module = patched.PETRMultiheadAttention(E, H).eval()
    query, key = torch.randn(5, 2, E), torch.randn(7, 2, E)
    torch.nn.init.normal_(module.attn.out_proj.bias)
    module(query, key, key)
    part = module.attn if inner else module.attn.out_proj
    part.__class__ = type(
        "Adapted", (type(part),), {name: property(lambda self: 2 * self._parameters[name])}
    )

    def run():
        out = module(query, key, key)
        return [out, *torch.autograd.grad(out.square().sum(), list(module.parameters()))]

    ours = run()
    flashbias_patch.uninstall()
    for found, expected in zip(ours, run()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_and_scaled(patched):
    module = patched.PETRMultiheadAttention(E, H, attn_drop=0.3).train()
    query, key = torch.randn(40, 2, E), torch.randn(50, 2, E)
    draws = torch.stack([module(query, key, key) for _ in range(200)])
    assert draws.std(0).mean() > 0
    torch.testing.assert_close(draws.mean(0), module.eval()(query, key, key), atol=0.05, rtol=0.2)
    torch.manual_seed(3)
    first = module.train()(query, key, key)
    torch.manual_seed(3)
    torch.testing.assert_close(module(query, key, key), first)


def test_mismatched_lengths_are_named_in_the_error(patched):
    module = patched.PETRMultiheadAttention(E, H)
    with pytest.raises(ValueError, match="key and value"):
        module(torch.randn(5, 2, E), torch.randn(7, 2, E), torch.randn(6, 2, E))
