"""Casts of q, k and v in one launch, interpreted, against PyTorch's, number for number."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")

from flashbias_patch import telemetry  # noqa: E402
from flashbias_patch.attention import casts, flash_bias_attention, fp16_gradients  # noqa: E402
from flashbias_patch.attention.kernels import casts as kernels  # noqa: E402
from flashbias_patch.attention.kernels import launcher_casts  # noqa: E402
from flashbias_patch.bias import LowRankBias, ModalityBias  # noqa: E402

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(casts, "DEVICE_TYPES", ("cpu", "cuda"))
    casts.reset()
    yield
    casts.reset()


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names = []
    original = launcher_casts.Launch.__call__

    def noted(self, *tensors, **options):
        names.append(self.kernel.fn.__name__)
        original(self, *tensors, **options)

    monkeypatch.setattr(launcher_casts.Launch, "__call__", noted)
    return names


def projected(M=13, N=37, B=2, H=3, D=16, Dv=16):
    """q, k and v as a packed projection of (L, B, E) tensors leaves them."""
    g = torch.Generator().manual_seed(M + N + D)
    q = torch.randn(M, B, H, D, generator=g).transpose(0, 1)
    packed = torch.randn(N, B, H * (D + Dv), generator=g)
    k, v = packed[..., : H * D].view(N, B, H, D), packed[..., H * D :].view(N, B, H, Dv)
    return q, k.transpose(0, 1), v.transpose(0, 1)


def copy_of(tensor):
    """A copy at an address of the same alignment, with the same strides."""
    room = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size())
    return room.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def representable(tensor, dtype):
    """A copy; for bfloat16, to which the interpreter does not round but cuts, without what is
    cut."""
    copy = copy_of(tensor)
    return copy.copy_(copy.to(dtype)) if dtype is torch.bfloat16 else copy


def batch_first(M=5, N=66, B=1, H=2, D=40):
    g = torch.Generator().manual_seed(M + N + D)
    q, k, v = (torch.randn(B, n, H * D * 3, generator=g).chunk(3, -1) for n in (M, N, N))
    return q[0].view(B, M, H, D), k[1].view(B, N, H, D), v[2].view(B, N, H, D)


def odd_address(L=9, H=2, D=8):
    return tuple(torch.randn(L * H * D + 1)[1:].view(1, L, H, D) for _ in range(3))


SHAPES = {
    "packed": projected(), "wider values": projected(Dv=24), "batch first": batch_first(),
    "one row": projected(M=1, N=1, B=1, H=1), "odd address": odd_address(),
    "more rows than a program": projected(M=70, N=131, D=8, Dv=8),
}  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("given", SHAPES.values(), ids=SHAPES)
def test_values_are_torchs(given, dtype, launched):
    q, k, v = (representable(t, dtype) for t in given)
    q[0, 0, 0, :5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 7e4, 1e-8]).to(dtype)
    narrow = casts.narrow((q, k, v), dtype)
    assert launched == ["cast_kernel"]
    for made, source in zip(narrow, (q, k, v)):
        assert made.dtype is dtype and made.is_contiguous()
        assert torch.equal(made.nan_to_num(1.5), source.to(dtype).nan_to_num(1.5))
    del launched[:]
    power = torch.full((1,), 2.0**-20)
    for scale in (None, power):
        with torch.no_grad():  # as in a backward pass
            wide = casts.widened(narrow, [torch.float32] * 3, scale)
        for made, source in zip(wide, narrow):
            wanted = source.float() if scale is None else source.float() * scale
            assert made.dtype is torch.float32
            assert torch.equal(made.nan_to_num(1.5), wanted.nan_to_num(1.5))
    assert launched == ["cast_kernel"] * 2


@pytest.mark.parametrize("size", (0.0, 1e-42, 1e-38, 1e-12, 1.0, 1e6, 3e38))
@pytest.mark.parametrize("given", SHAPES.values(), ids=SHAPES)
def test_gradients_are_divided_by_the_same_power(given, size, launched):
    for grad in given:
        grad = copy_of(grad).mul_(size)
        out, power = casts.divided(grad, fp16_gradients.power_for)
        wanted = fp16_gradients.power_for(grad)
        assert torch.equal(power, wanted) and power.shape == (1,)
        assert out.dtype is torch.float16 and torch.equal(out, (grad / wanted).half())
    assert launched == ["peaks_kernel", "divide_kernel"] * 3


@pytest.mark.parametrize("bad", (float("inf"), -float("inf"), float("nan")))
def test_what_is_not_finite_stays_so(bad):
    q, _, _ = projected()
    grad = q.clone()
    grad[1, 2, 0, 3] = bad
    out, power = casts.divided(grad, fp16_gradients.power_for)
    assert not out[1, 2, 0, 3].isfinite()
    assert torch.equal(power, fp16_gradients.power_for(grad)) and power.isfinite()


def test_more_blocks_than_programs(monkeypatch, launched):
    monkeypatch.setattr(launcher_casts, "MOST_PEAKS", 3)
    _, k, _ = projected(N=259)
    for place in (0, 100, 258):
        grad = k * 1e-3
        grad[1, place, 2, 15] = -5.0
        out, power = casts.divided(grad, fp16_gradients.power_for)
        assert power.item() == 1.0 and out[1, place, 2, 15].item() == -5.0
    assert launched


def biases(M, N):
    g = torch.Generator().manual_seed(3)
    factors = torch.randn(1, M, 1, 4, generator=g), torch.randn(1, N, 1, 4, generator=g)
    weights = torch.randn(2, M, 1, 2, generator=g)
    return {
        "none": ((), lambda parts: None),
        "factors": (factors, lambda parts: LowRankBias(*parts)),
        "segments": ((weights,), lambda parts: ModalityBias(parts[0], (N // 3, N - N // 3))),
        "dense": (
            (torch.randn(1, 1, M, N, generator=g),),
            lambda parts: parts[0].expand(2, 3, M, N),
        ),
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ("none", "factors", "segments", "dense"))
def test_a_call_is_what_it_is_with_torchs_casts(kind, dtype, launched, monkeypatch):
    q, k, v = (representable(t, dtype) for t in projected())
    parts, make = biases(q.shape[1], k.shape[1])[kind]
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(4)) * 1e-9

    def run():
        leaves = [t.detach().requires_grad_() for t in (q, k, v, *parts)]
        out = flash_bias_attention(*leaves[:3], make(leaves[3:]), dtype=dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    found = run()
    expected = ["cast_kernel", "cast_kernel"]
    if dtype is torch.float16:
        expected[1:1] = ["peaks_kernel", "divide_kernel"]
    assert launched == expected
    monkeypatch.setattr(casts, "DEVICE_TYPES", ())
    for a, b in zip(found, run()):
        assert a.dtype is torch.float32 and torch.equal(a, b)
    with torch.no_grad():
        monkeypatch.setattr(casts, "DEVICE_TYPES", ("cpu",))
        out = flash_bias_attention(q, k, v, make(parts), dtype=dtype)
    assert torch.equal(out, found[0]) and launched[-1] == "cast_kernel"


@pytest.mark.parametrize("dtype", HALVES)
def test_some_that_need_no_gradient(dtype):
    q, k, v = projected()
    for wanting in ((True, False, False), (False, True, True)):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((q, k, v), wanting)]
        out = flash_bias_attention(*leaves, dtype=dtype)
        grads = torch.autograd.grad(out.sum(), [t for t in leaves if t.requires_grad])
        assert all(g.dtype is torch.float32 for g in grads)


@pytest.mark.parametrize("dtype", HALVES)
def test_twice(dtype, launched):
    """Under create_graph torch casts, in operators that can be differentiated again."""
    q, k, v = (t.requires_grad_() for t in projected())
    out = flash_bias_attention(q, k, v, dtype=dtype)
    del launched[:]
    (once,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert not launched
    (twice,) = torch.autograd.grad(once.square().sum(), k)
    assert twice.dtype is torch.float32 and twice.isfinite().all() and twice.any()


def test_where_no_kernel_casts(launched):
    q, k, v = projected()
    for tensors in (
        (q.double(), k.double(), v.double()),
        (q[..., ::2], k, v),
        (q[:0], k[:0], v[:0]),
        (q,),
    ):
        made = casts.narrow(tensors, torch.float16)
        assert all(torch.equal(a, t.half()) for a, t in zip(made, tensors))
    rows = torch.vmap(lambda t: casts.in_dtype(t, t, t, torch.float16)[0])(q[None])
    assert torch.equal(rows[0], q.half())
    assert not launched


@pytest.mark.parametrize("dtype", HALVES)
def test_a_traced_graph_has_the_casts(dtype, launched):
    from torch.fx.experimental.proxy_tensor import make_fx

    given, others = projected(M=3, N=5), projected(M=3, N=5)
    others = [t * 2 for t in others]
    graph = make_fx(lambda *t: flash_bias_attention(*t, dtype=dtype))(*given)
    assert not launched
    assert torch.equal(graph(*others), flash_bias_attention(*others, dtype=dtype))


@pytest.mark.parametrize("grad", (False, True))
@pytest.mark.parametrize("dtype", HALVES)
def test_forward_mode_differentiation_goes_through(dtype, grad, launched):
    """no_grad does not switch it off, and a kernel knows of no tangents."""
    from torch.autograd import forward_ad

    q, k, v = projected(M=3, N=5)
    tangent = torch.ones_like(v)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        out = flash_bias_attention(q, k, forward_ad.make_dual(v, tangent), dtype=dtype)
        found = forward_ad.unpack_dual(out).tangent
    assert not launched and found.dtype is torch.float32
    assert torch.allclose(found, torch.ones_like(found), atol=1e-2)


@pytest.mark.parametrize("wrong", (False, True))
def test_a_kernel_that_fails_is_left_alone(wrong, launched, monkeypatch):
    """As is one whose numbers are not PyTorch's."""
    calls = []

    def fail(tensors, dtype, power=None):
        calls.append(dtype)
        if not wrong:
            raise RuntimeError("no compiler")
        return [torch.zeros(t.shape, dtype=dtype) for t in tensors]

    said = []
    monkeypatch.setattr(launcher_casts, "cast", fail)
    monkeypatch.setattr(telemetry, "once", lambda key, level, *words: said.append(words))
    q, k, v = projected()
    for _ in range(2):
        made = casts.narrow((q, k, v), torch.float16)
        assert all(torch.equal(a, b.half()) for a, b in zip(made, (q, k, v)))
    assert len(calls) == len(said) == 1


def test_what_the_caller_interrupts_and_memory_are_not_the_kernels(monkeypatch):
    q, k, v = projected()
    for error in (KeyboardInterrupt(), torch.cuda.OutOfMemoryError("CUDA out of memory")):

        def fail(*given, error=error):
            raise error

        monkeypatch.setattr(launcher_casts, "cast", fail)
        with pytest.raises(type(error)):
            casts.narrow((q, k, v), torch.float16)


def test_repeated_casts_give_as_many_tensors(monkeypatch):
    """As on a GPU, where a launch is kept once it is compiled: here it does nothing."""

    def compiled(self, tensors):
        self.run, self.rest = (lambda *given, **options: None), self.numbers

    monkeypatch.setattr(launcher_casts.Launch, "first", compiled)
    q, k, v = projected()
    power = torch.ones(1)
    for _ in range(3):
        for given in ((q,), (q, k), (q, k, v)):
            half = [t.half() for t in given]
            for made, dtype in (
                (launcher_casts.cast(given, torch.float16), torch.float16),
                (launcher_casts.cast(half, torch.float32), torch.float32),
                (launcher_casts.cast(half, torch.float32, power), torch.float32),
            ):
                assert type(made) is tuple
                assert [t.shape for t in made] == [t.shape for t in given]
                assert all(t.dtype is dtype and t.is_contiguous() for t in made)
        out, power = launcher_casts.divided(q, torch.float16)
        assert out.shape == q.shape and out.dtype is torch.float16 and power.shape == (1,)
        assert launcher_casts.cast((q[..., :3], q[:0]), torch.float16) is None


def test_kernels_import_nothing_but_triton():
    assert not hasattr(kernels, "torch")


def test_a_tensor_whose_memory_holds_its_negative(launched):
    """As that of x.conj().imag does."""
    q, k, v = (tensor.contiguous() for tensor in projected())
    found = casts.narrow((q, torch._neg_view(-k), v), torch.float16)
    assert torch.equal(found[1], k.to(torch.float16)) and not launched
    casts.narrow((q, k, v), torch.float16)
    assert launched
