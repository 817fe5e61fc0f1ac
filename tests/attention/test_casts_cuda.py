"""Casts to the compute dtype on a GPU: by the kernels the same numbers as by PyTorch, call after
call, and few launches."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from flashbias_patch.attention import casts, flash_bias_attention, fp16_gradients
from flashbias_patch.bias import LowRankBias, ModalityBias
from tests.attention.backends.test_sdpa_and_reference import dense_attention
from tests.support.capabilities import checkpoint_options

pytestmark = pytest.mark.gpu
HALVES = (torch.float16, torch.bfloat16)
FLOOR = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def projected(M, N, B=2, H=3, D=32, seed=0):
    """q, k and v as a packed projection of (L, B, E) tensors leaves them."""
    g = torch.Generator().manual_seed(seed + M + N)
    q = torch.randn(M, B, H, D, generator=g).cuda().transpose(0, 1)
    packed = torch.randn(N, B, 2 * H * D, generator=g).cuda()
    k, v = (half.view(N, B, H, D).transpose(0, 1) for half in packed.chunk(2, -1))
    return q, k, v


def kernels_of(call):
    """The names of the kernels that call() launches."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    on_gpu = torch.profiler._utils.DeviceType.CUDA
    events = prof.profiler.kineto_results.events()
    return [e.name() for e in events if e.device_type() == on_gpu and "Mem" not in e.name()]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("M, N, D", [(1, 1, 32), (33, 257, 32), (128, 512, 64), (900, 6001, 40)])
def test_the_numbers_are_pytorchs(M, N, D, dtype):
    for turn in range(3):  # the second and third time by a plan
        given = projected(M, N, D=D, seed=turn)
        narrow = casts.narrow(given, dtype)
        with torch.no_grad():
            power = torch.full((1,), 2.0**-11, device="cuda")
            wide = casts.widened(narrow, [torch.float32] * 3, power)
            again = casts.widened(narrow, [torch.float32] * 3, None)
        for source, half, scaled, back in zip(given, narrow, wide, again):
            assert torch.equal(half, source.to(dtype))
            assert torch.equal(scaled, half * power) and torch.equal(back, half.float())
        for size in (1e-38, 1e-9, 1.0, 1e30):
            grad = given[0] * size
            out, power = casts.divided(grad, fp16_gradients.power_for)
            wanted = fp16_gradients.power_for(grad)
            assert torch.equal(power, wanted) and torch.equal(out, (grad / wanted).half())


def biases(M, N, kind):
    g = torch.Generator().manual_seed(3)
    if kind == "factors":
        parts = [torch.randn(1, length, 1, 8, generator=g).cuda() for length in (M, N)]
        return parts, lambda p: LowRankBias(*p)
    if kind == "segments":
        parts = [torch.randn(2, M, 1, 2, generator=g).cuda()]
        return parts, lambda p: ModalityBias(p[0], (N // 3, N - N // 3))
    return [], lambda p: None


@pytest.mark.parametrize("size", (1e-9, 1.0))
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ("none", "factors", "segments"))
@pytest.mark.parametrize("backend", ("triton", "sdpa"))
def test_calls_with_the_kernels_and_without(backend, kind, dtype, size, monkeypatch):
    M, N = 37, 211
    tensors, grad = projected(M, N), projected(M, N, seed=9)[0] * size
    parts, make = biases(M, N, kind)

    def run():
        leaves = [t.detach().requires_grad_() for t in (*tensors, *parts)]
        out = flash_bias_attention(*leaves[:3], make(leaves[3:]), dtype=dtype, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    found = [run() for _ in range(3)]
    monkeypatch.setattr(casts, "DEVICE_TYPES", ())
    casts.reset()
    wanted = run()
    casts.reset()
    for results in found:
        for a, b in zip(results, wanted):
            assert a.dtype is torch.float32
            assert (a - b).norm() <= 1e-3 * b.norm()  # sums of several programs differ in order


@pytest.mark.parametrize("dtype", HALVES)
def test_without_gradients_the_output_is_not_rounded(dtype):
    q, k, v = projected(37, 211)
    exact = dense_attention(*(t.to(dtype).double() for t in (q, k, v)))
    for turn in range(3):
        with torch.no_grad():
            out = flash_bias_attention(q, k, v, dtype=dtype, backend="triton")
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        rounded = flash_bias_attention(*leaves, dtype=dtype, backend="triton").detach()
        assert out.dtype is torch.float32 and not torch.equal(out, out.to(dtype).float()), turn
        assert (out - rounded).norm() <= torch.finfo(dtype).eps * exact.norm()
        assert (out - exact).norm() <= 1.01 * (rounded - exact).norm()
        assert (rounded - exact).norm() <= FLOOR[dtype] * exact.norm()


def test_in_a_checkpoint():
    q, k, v = projected(37, 211)
    grad = projected(37, 211, seed=9)[0] * 1e-7

    def run(*given):
        return flash_bias_attention(*given, dtype=torch.float16, backend="triton")

    found = []
    for reentrant in (None, True, False):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = (
            run(*leaves)
            if reentrant is None
            else checkpoint(run, *leaves, **checkpoint_options(reentrant))
        )
        out.backward(grad)
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for other in found[1:]:
        assert all((a - b).norm() <= 1e-3 * a.norm() for a, b in zip(found[0], other))


@pytest.mark.parametrize("dtype", HALVES)
def test_in_a_cuda_graph(dtype):
    q, k, v = projected(37, 211)

    @torch.no_grad()
    def run():
        return flash_bias_attention(q, k, v, dtype=dtype, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for tensor in (q, k, v):
        tensor.mul_(0.5)
    graph.replay()
    assert torch.equal(out, run())


@pytest.mark.parametrize("dtype, forward, backward", [(HALVES[0], 3, 6), (HALVES[1], 3, 5)])
def test_few_kernels(dtype, forward, backward):
    """Forward: the cast, attention and the cast of its output (one fewer without gradients).
    Backward: in float16 two for the power and the cast, in bfloat16 one; three of attention; one
    for the gradients."""
    leaves = [t.requires_grad_() for t in projected(37, 211)]
    grad = projected(37, 211, seed=9)[0].contiguous()

    def run():
        return flash_bias_attention(*leaves, dtype=dtype, backend="triton")

    for _ in range(3):
        run().backward(grad, inputs=leaves)
        with torch.no_grad():
            run()
    for leaf in leaves:
        leaf.grad = None
    outs = []
    assert len(kernels_of(lambda: outs.append(run()))) == forward
    assert len(kernels_of(lambda: torch.autograd.grad(outs[0], leaves, grad))) == backward
    with torch.no_grad():
        names = kernels_of(run)
    assert len(names) == forward - 1, names
