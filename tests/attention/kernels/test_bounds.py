"""Every address that a kernel reads or writes lies inside a tensor that its launch was handed, as
compute-sanitizer's memcheck would have it on a GPU: what Triton's interpreter touches is plain
memory."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.0")
from flashbias_patch.attention.kernels import cached_launch, launcher_backward
from flashbias_patch.attention.kernels.autograd import fused_attention
from tests.support import internals
from tests.support.scripts import load

HALF, BRAIN, FULL = "float16", "bfloat16", "float32"
# lengths, head dim, rank, dtype, which of segments, dense, mask, padding, added, dropout
CASES = [
    ((33, 70), 32, 8, HALF, ""),
    ((64, 64), 16, 0, HALF, ""),
    ((65, 40), 32, 10, BRAIN, "segments"),
    ((20, 65), 40, 13, HALF, "segments dense mask padding dropout"),
    ((21, 130), 64, 3, HALF, "segments added"),
    ((17, 33), 32, 2, FULL, "added dropout"),
    ((20, 61), 128, 33, HALF, "dense"),
    ((19, 23), 32, 0, HALF, "mask"),
    ((1, 300), 32, 8, HALF, "padding"),
]


@pytest.fixture
def watched(monkeypatch):
    """The number of addresses looked at so far, in a list; one outside what the running launch was
    handed fails."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    if not all(
        hasattr(builder, f"create_{name}") for name in ("masked_load", "masked_store", "atomic_rmw")
    ):
        pytest.skip("this Triton's interpreter reads and writes elsewhere")
    spans, seen = [], [0]
    launch = cached_launch.Launch.__call__

    def handed(self, *tensors, stream=None):
        spans[:] = sorted({span_of(tensor) for tensor in tensors})
        launch(self, *tensors, stream=stream)
        spans.clear()

    def looked_at(method, pointers, mask):
        original = getattr(builder, method)

        def checked(self, *arguments):
            where, visible = (
                arguments[pointers].data,
                np.broadcast_to(arguments[mask].data, arguments[pointers].data.shape),
            )
            addresses = where[visible.astype(bool)].astype(np.int64)
            if spans:
                starts, ends = np.array(spans).T
                place = np.searchsorted(starts, addresses, side="right") - 1
                inside = (place >= 0) & (addresses < ends[place])
                if not inside.all():
                    raise IndexError(
                        f"{method}: {(~inside).sum()} of {inside.size} addresses are outside "
                        "every tensor"
                    )
                seen[0] += addresses.size
            return original(self, *arguments)

        monkeypatch.setattr(builder, method, checked)

    monkeypatch.setattr(cached_launch.Launch, "__call__", handed)
    looked_at("create_masked_load", 0, 1)
    looked_at("create_masked_store", 0, 2)
    looked_at("create_atomic_rmw", 1, 3)
    return seen


def span_of(tensor):
    """First address and the one after the last."""
    if not tensor.numel():
        return tensor.data_ptr(), tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.mark.parametrize("lengths, D, R, dtype, features", CASES)
@pytest.mark.parametrize("separate", [True, False])
def test_inside_the_tensors(monkeypatch, watched, separate, lengths, D, R, dtype, features):
    if not separate:  # gradients of shared factors added up by the kernels
        monkeypatch.setattr(launcher_backward, "SEPARATE", 0)
    load("benchmarks/sanitizer.py").run(lengths, D, R, dtype, features, device="cpu")
    assert watched[0] > 6 * 2 * 2 * lengths[0] * D  # batch 2, 2 heads


@pytest.mark.parametrize(
    "name",
    [
        "half",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "everything",
                "grids below a patch",
                "mask on grids below a patch",
                "one query, mask",
                "many queries",
            )
        ],
    ],
)
def test_windows_inside_the_tensors(watched, name):
    internals.kept_window_tables().clear()
    cases = load("benchmarks/window_cases.py")
    case = cases.Case(**cases.CASES[name])
    case.fused()
    assert watched[0] > 6 * case.grad.numel()


def test_what_lies_outside_is_found(watched, monkeypatch):
    """The fixture itself: keys told to be longer than they are."""
    from flashbias_patch.attention.kernels.problem import Problem

    sizes = Problem.sizes.fget

    def one_more(self):
        B, M, N, H, D = sizes(self)
        return B, M, N + 1, H, D

    monkeypatch.setattr(Problem, "sizes", property(one_more))
    q, k = torch.randn(1, 5, 1, 16), torch.randn(1, 7, 1, 16)
    with pytest.raises(Exception, match="outside every tensor"):  # the interpreter wraps it
        fused_attention(q, k, k)
