"""The flash backend over flash-attn's three generations, which plain PyTorch stands in for."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from flashbias_patch.attention.backends import flash_attention as fa
from flashbias_patch.attention.backends.reference import backend as reference
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.bias.precision import split_factors

backend = fa.backend
NAMES = ("q", "k", "v", "q_factor", "k_factor", "segment_weights")


def call(
    B=2,
    M=7,
    N=29,
    H=3,
    D=32,
    Dv=None,
    R=5,
    shared=False,
    dtype=torch.float16,
    split=False,
    segments=(),
    size=1.0,
    seed=0,
    **rest,
) -> AttentionInputs:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return (torch.randn(shape, generator=g) * size).to(dtype)

    q, k, v = draw(B, M, H, D), draw(B, N, H, D), draw(B, N, H, Dv or D)
    factors = (None, None)
    if R:
        kind = torch.float32 if split else dtype
        lead = ((B, M, 1), (1, N, 1)) if shared else ((B, M, H), (B, N, H))
        factors = draw(*lead[0], R, dtype=kind), draw(*lead[1], R, dtype=kind)
        if split:
            factors = split_factors(*factors, dtype)
    weights = draw(B, M, H, len(segments), dtype=torch.float32) if segments else None
    rest.setdefault("scale", D**-0.5)
    return AttentionInputs(q, k, v, *factors, weights, segments or None, **rest)


def with_grad(inputs, convert=lambda t: t):
    fields = {name: getattr(inputs, name) for name in NAMES}
    leaves = {n: convert(t).detach().requires_grad_() for n, t in fields.items() if t is not None}
    return inputs._replace(**leaves), leaves


def evaluate(answer, inputs, convert=lambda t: t):
    inputs, leaves = with_grad(inputs, convert)
    out = answer(inputs)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), upstream))),
    }


def plainly(inputs):
    """Attention as written, every product rounded to the inputs' dtype: the yardstick of the
    accuracy standard."""
    q, k, v = (t.transpose(1, 2) for t in inputs[:3])
    scores = (q @ k.mT) * inputs.scale
    dead = None
    if inputs.q_factor is not None:
        scores = scores + inputs.q_factor.transpose(1, 2) @ inputs.k_factor.transpose(1, 2).mT
    if inputs.segment_weights is not None:
        lengths = torch.tensor(inputs.segment_lengths)
        scores = scores + inputs.segment_weights.transpose(1, 2).repeat_interleave(lengths, -1).to(
            scores.dtype
        )
    if inputs.key_padding is not None:
        padding = inputs.key_padding[:, None, None]
        if padding.dtype is torch.bool:
            padding = torch.zeros_like(padding, dtype=scores.dtype).masked_fill(
                padding, float("-inf")
            )
        dead = (padding == float("-inf")).all(-1, keepdim=True)
        scores = (scores + padding.to(scores.dtype)).masked_fill(dead, 0.0)
    out = scores.softmax(-1) @ v
    return (out if dead is None else out.masked_fill(dead, 0.0)).transpose(1, 2)


def check(inputs, factor=2.0):
    """The house's accuracy standard, output and every gradient."""
    got = evaluate(backend, inputs)
    plain = evaluate(plainly, inputs)
    exact = evaluate(reference, inputs, lambda t: t.double())
    for name, truth in exact.items():
        scale = truth.norm() + 1e-9
        error, allowed = ((x[name].double() - truth).norm() / scale for x in (got, plain))
        assert torch.isfinite(got[name]).all(), name
        assert error <= factor * allowed + 1e-5, (name, error, allowed)
    return got, exact


PADDINGS = {
    "none": lambda B, N: None,
    "bool": lambda B, N: torch.arange(N).expand(B, N) >= torch.arange(1, B + 1)[:, None] * 9,
    "zeros": lambda B, N: torch.zeros(B, N),
    "added": lambda B, N: torch.linspace(-4, 4, N).expand(B, N),
    "infinite": lambda B, N: torch.zeros(B, N).masked_fill(torch.arange(N) % 3 == 0, float("-inf")),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("generation", [4, 3, 2])
def test_every_generation_is_right(flash, generation, padding, dtype):
    flash.install(generation)
    shapes = [{"R": 2, "D": 20, "Dv": 12}, {"R": 13, "shared": True}]
    if generation == 4:
        shapes += [{"R": 5}, {"R": 0}, {"R": 3, "D": 16}]
    for options in shapes:
        inputs = call(dtype=dtype, key_padding=PADDINGS[padding](2, 29), **options)
        assert backend.why_not(inputs) == []
        check(inputs)
        assert flash.calls[-1][0] == generation


@pytest.mark.parametrize("options", [
    {"R": 2, "split": True}, {"R": 0, "segments": (10, 4, 15)}, {"R": 3, "segments": (28, 1)},
    {"R": 5, "scale": 1.0}, {"R": 5, "scale": -0.3}, {"R": 0, "scale": 0.0}, {"R": 5, "scale": 3.7},
    {"R": 5, "M": 1, "N": 1}, {"R": 33, "D": 8}, {"R": 7, "D": 64}, {"R": 0, "D": 17},
])  # fmt: skip
def test_shapes_scales_and_terms(flash, options):
    flash.install(4)
    inputs = call(**options)
    assert backend.why_not(inputs) == []
    check(inputs)


def test_triton_and_torch_columns_attend_alike(flash, written_by):
    flash.install(4)
    check(call(M=3, N=17, H=2, R=3, shared=True, key_padding=torch.arange(17).expand(2, 17) > 11))


@pytest.mark.parametrize("terms", [True, False])
def test_operands_whose_memory_holds_their_negative(flash, written_by, terms):
    """As that of x.conj().imag does."""
    flash.install(4)
    padding = torch.linspace(-4, 4, 17).expand(2, 17) if terms else None
    inputs = call(M=3, N=17, H=2, R=3 if terms else 0, key_padding=padding)
    tensors = [t if t is None else torch._neg_view(-t) for t in inputs.tensors()]
    assert torch.equal(backend(inputs.with_tensors(tensors)), backend(inputs))


@pytest.mark.parametrize(
    "infinite", [lambda d: d, lambda d: torch.zeros(d.shape).masked_fill(d, float("-inf"))]
)
def test_a_batch_row_without_keys_gives_zeros(flash, infinite):
    flash.install(4)
    dead = torch.zeros(2, 29, dtype=torch.bool)
    dead[1] = True
    got, _ = check(call(key_padding=infinite(dead)))
    assert not got["out"][1].any() and got["out"][0].any()
    assert not any(got[name][1].any() for name in ("q", "k", "v", "q_factor", "k_factor"))


def test_split_factors_keep_their_digits(flash):
    """Biases in the hundreds, where half precision alone would be wrong by tenths."""
    flash.install(4)
    for D in (32, 64):
        inputs = call(D=D, R=1, split=True)
        factors = (
            torch.full((1, 7, 1, 1), 1.0003),
            torch.linspace(-300, 300, 29)[None, :, None, None],
        )
        q_factor, k_factor = split_factors(*factors, torch.float16)
        out = backend(inputs._replace(q_factor=q_factor, k_factor=k_factor))
        doubles = [t.double() for t in (*inputs[:3], *factors)]
        exact = reference(AttentionInputs(*doubles, scale=inputs.scale))
        assert (out - exact).norm() / exact.norm() < 1e-3


def test_the_scale_costs_no_digits_where_columns_are_free(flash):
    """Rank 8 and its low parts fit beside head dim 32; at rank 9 they do not, and the scale is
    rounded into q."""
    flash.install(4)
    for rank, scale in ((8, 2**0.5), (9, 1.0)):
        backend(call(R=rank))
        assert flash.calls[-1][1:4] == (48, 32, pytest.approx(scale))
    large = call(R=8, M=64, N=64, size=2.0, seed=3)
    exact = reference(large._replace(**{n: getattr(large, n).double() for n in NAMES[:5]}))
    error = (backend(large) - exact).norm()
    rounded = large._replace(q=(large.q * large.scale), scale=1.0)
    assert error < 0.75 * (backend(rounded) - exact).norm()


def test_large_factors_do_not_overflow(flash):
    """Squared coordinates in half: dividing them by the scale 2**-2.5 would leave half's range."""
    flash.install(4)
    inputs = call(R=1)
    q_factor, k_factor = (
        torch.full((1, 7, 1, 1), 30000.0).half(),
        torch.full((1, 29, 1, 1), 1e-3).half(),
    )
    assert torch.isfinite(backend(inputs._replace(q_factor=q_factor, k_factor=k_factor))).all()


def test_nothing_is_copied_where_there_is_nothing_to_add(flash, monkeypatch):
    flash.install(4)
    monkeypatch.setattr(fa, "join", None)
    check(call(R=0))
    assert flash.calls[-1][1:4] == (32, 32, 32**-0.5)


@pytest.mark.parametrize("generation,installed", [(4, (2, 3, 4)), (3, (2, 3)), (2, (2,))])
def test_the_newest_generation_is_used(flash, generation, installed):
    flash.install(*installed)
    backend(call())
    assert flash.calls[-1][0] == generation


def test_dropout_goes_to_generation_2(flash):
    flash.install(4, 3, 2)
    inputs = call(dropout_p=0.25)
    backend(inputs)
    assert flash.calls[-1][0] == 2 and flash.calls[-1][4] == 0.25
    flash.install(4)
    sys.modules["flash_attn"].__dict__.pop("flash_attn_func")
    flash.forget()
    reasons = backend.why_not(inputs)
    assert any("FlashAttention-4: no support for dropout" in r for r in reasons)
    assert any("FlashAttention-2" in r and "fa4" in r for r in reasons)


def test_head_dims_that_a_backward_pass_on_hopper_cannot_take(flash):
    """4.0.0b36 does not compile q's 64 with v's 32; without gradients it does, as other
    architectures do."""
    flash.install(4)
    wide = call(R=24)
    backend(wide)
    assert flash.calls[-1][1:3] == (64, 32)
    check(wide)
    assert flash.calls[-1][1:3] == (64, 64)
    flash.on(10)
    check(wide)
    assert flash.calls[-1][1:3] == (64, 32)


def test_deterministic_mode_is_passed_on(flash):
    flash.install(4)
    backend(call())
    assert flash.calls[-1][5] is False
    torch.use_deterministic_algorithms(True)
    try:
        backend(call())
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash.calls[-1][5] is True


@pytest.mark.parametrize("options,words", [
    ({"dtype": torch.float32}, "float16 and bfloat16 only, got float32"),
    ({"dense": torch.zeros(1, 1, 7, 29)}, "dense bias"),
    ({"mask": torch.zeros(1, 1, 7, 29, dtype=torch.bool)}, "attention mask"),
    ({"N": 0, "R": 0}, "empty"),
    ({"M": 0, "R": 0}, "empty"),
    ({"key_padding": torch.zeros(2, 29, requires_grad=True)}, "a gradient of the key padding mask"),
    ({"D": 250, "R": 16}, "head dim 272"),
    ({"Dv": 272}, "head dim 272 of v, at most 256"),
])  # fmt: skip
def test_reasons(flash, options, words):
    flash.install(4, 3, 2)
    assert words in "; ".join(backend.why_not(call(**options)))


def test_reasons_of_the_machine(flash):
    flash.install(4)
    flash.on(None)
    assert "needs an NVIDIA GPU, got cpu" in backend.why_not(call())
    flash.on(8)
    assert any(
        "only for compute capability 9.x, 10.x, 11.x, this GPU has 8.x" in r
        for r in backend.why_not(call())
    )
    flash.on(10)
    assert any("head dim 144" in r and "128" in r for r in backend.why_not(call(D=128)))


def test_what_is_not_installed_says_how_to_install_it(flash):
    reasons = backend.why_not(call())
    assert len(reasons) == 3 and all("pip install flashbias-patch[fa4]" in r for r in reasons)


@pytest.mark.parametrize(
    "error,words",
    [
        (OSError("libcudart.so.11: cannot open"), "does not import: OSError: libcudart"),
        (
            ModuleNotFoundError("No module named 'cutlass'", name="cutlass"),
            "needs the missing module cutlass",
        ),
    ],
)
def test_an_installation_that_does_not_import_is_a_reason(flash, monkeypatch, error, words):
    def fail(name):
        raise error

    monkeypatch.setattr(fa.importlib, "import_module", fail)
    assert any(words in r for r in backend.why_not(call()))


def test_this_packages_own_stand_in_is_not_an_installation(flash, monkeypatch):
    from flashbias_patch.patching import flash_attn_shim

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_shim.flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert any("FlashAttention-2" in r and "not installed" in r for r in backend.why_not(call()))


def test_nothing_is_imported_for_a_call_it_could_not_take(flash, monkeypatch):
    monkeypatch.setattr(fa.importlib, "import_module", None)
    assert backend.why_not(call(dtype=torch.float32))
