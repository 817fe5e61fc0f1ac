"""Repeated fused calls on a GPU: launched by Triton's C function, by addresses, with the numbers of
the first call; in a CUDA graph, and with a launch hook installed afterwards."""

from __future__ import annotations

import sys

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton", minversion="3.0")

from flashbias_patch.attention.kernels import cached_launch, direct_launch  # noqa: E402
from flashbias_patch.attention.kernels.autograd import fused_attention  # noqa: E402

# Few queries beside many keys: the loop over keys is split. Lengths that are no multiples.
SHAPES = [(33, 6001), (900, 257)]


def operands(M, N, dtype, grad):
    torch.manual_seed(M + N)
    q, k, v = (torch.randn(1, length, 8, 32, device="cuda") for length in (M, N, N))
    factors = torch.randn(1, M, 1, 8, device="cuda"), torch.randn(1, N, 1, 8, device="cuda")
    padding = torch.zeros(1, N, dtype=torch.bool, device="cuda")
    padding[:, ::7] = True
    given = [t.to(dtype).requires_grad_(grad) for t in (q, k, v, *factors)]
    return given, {"key_padding": padding}


def python_calls(call):
    """The code of every Python function that call() enters."""
    entered = []

    def profile(frame, event, argument):
        if event == "call":
            entered.append(frame.f_code)

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("M, N", SHAPES)
def test_repeated_calls_have_the_numbers_of_the_first(M, N, dtype):
    given, others = operands(M, N, dtype, True)
    grad_out = torch.randn(1, M, 8, 32, device="cuda").to(dtype)

    def step():
        out = fused_attention(*given, **others)
        return [out.detach(), *torch.autograd.grad(out, given, grad_out)]

    first = step()
    plain = [t.detach() for t in given]
    out = fused_attention(*plain, **others)
    for _ in range(3):
        for found, expected in zip(step(), first):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(fused_attention(*plain, **others), out)


def test_repeated_calls_do_not_enter_tritons_launcher():
    from triton.backends.nvidia.driver import CudaLauncher

    if direct_launch.digest(CudaLauncher.__call__) not in direct_launch.ORDERS:
        pytest.skip("this Triton's launcher is not known")
    given, others = operands(33, 6001, torch.float16, False)

    def call():
        fused_attention(*given, **others)

    for _ in range(3):
        call()
    entered = python_calls(call)
    assert cached_launch.Launch.at.__code__ in entered
    assert CudaLauncher.__call__.__code__ not in entered


@pytest.mark.parametrize("M, N", SHAPES)
def test_in_a_cuda_graph(M, N):
    given, others = operands(M, N, torch.float16, False)
    for _ in range(3):
        fused_attention(*given, **others)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_attention(*given, **others)
    for _ in range(2):
        for tensor in given:
            tensor.normal_()
        graph.replay()
        assert torch.equal(out, fused_attention(*given, **others))


def test_a_launch_hook_installed_later_sees_every_launch():
    given, others = operands(33, 6001, torch.float16, False)
    for _ in range(3):
        out = fused_attention(*given, **others)
    seen, hooks = [], cached_launch.HOOKS
    before = hooks.launch_enter_hook

    def hook(metadata):
        seen.append(metadata)

    if hasattr(before, "add"):  # a chain of hooks
        before.add(hook)
    else:
        hooks.launch_enter_hook = hook
    try:
        assert torch.equal(fused_attention(*given, **others), out)
    finally:
        if hasattr(before, "add"):
            before.remove(hook)
        else:
            hooks.launch_enter_hook = before
    count = len(seen)
    assert count >= 3  # the copies of the factors, the attention, and the sum of its parts
    assert torch.equal(fused_attention(*given, **others), out) and len(seen) == count
