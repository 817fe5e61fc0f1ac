"""Plans of repeated calls: what they compute from addresses, and how many tensors they make.

The interpreter gets tensors again, of the dtypes of the first launch, at the plan's addresses.
"""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from flashbias_patch.attention.kernels import cached_call, cached_launch, tiles  # noqa: E402
from flashbias_patch.attention.kernels import problem as problem_module  # noqa: E402
from flashbias_patch.attention.kernels.autograd import fused_attention  # noqa: E402

B, M, N, H, D = 2, 17, 33, 1, 16


def at(address, dtype):
    size = dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    """Launches are kept as if they were compiled. The addresses of those by a plan."""
    launch, addresses = cached_launch.Launch.first, []

    def first(self, tensors):
        launch(self, tensors)
        dtypes = [tensor.dtype for tensor in tensors]

        def run(*given, stream):
            if stream is not None:
                addresses.append(given[: len(dtypes)])
            again = [at(*pair) for pair in zip(given, dtypes)]
            self.kernel[self.grid](*again, *self.numbers, **self.options)

        self.run = run

    monkeypatch.setattr(cached_launch.Launch, "first", first)
    monkeypatch.setattr(
        problem_module, "empty", lambda *size, **options: torch.full(*size, float("nan"), **options)
    )
    return addresses


@pytest.fixture
def splits(request, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Config(16, 16, 4, 1))
    monkeypatch.setattr(problem_module, "split_count", lambda *unused: request.param)
    return request.param


class Made(TorchDispatchMode):
    """Counts the tensors that are allocated: by torch.full in place of torch.empty, and zeros."""

    def __init__(self):
        super().__init__()
        self.full = self.zeros = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.full += function is torch.ops.aten.full.default
        self.zeros += function is torch.ops.aten.zeros.default
        return function(*args, **(kwargs or {}))


def operands(dtype, rank=0, segments=False, padding=False, shared=True, grad=True):
    torch.manual_seed(0)
    batch = 1 if shared else B
    found = {
        "q": torch.randn(B, M, H, D), "k": torch.randn(B, N, H, D), "v": torch.randn(B, N, H, D),
    }  # fmt: skip
    if rank:
        found["q_factor"] = torch.randn(batch, M, 1, rank)
        found["k_factor"] = torch.randn(batch, N, 1, rank)
    found = {name: tensor.to(dtype).requires_grad_(grad) for name, tensor in found.items()}
    if segments:
        found["segment_weights"] = torch.randn(B, M, 1, 2).requires_grad_(grad)
        found["segment_lengths"] = [14, N - 14]
    if padding:
        found["key_padding"] = torch.zeros(B, N, dtype=torch.bool)
        found["key_padding"][0, 7:11] = True
    return found


CASES = {
    "plain": {},
    "factors": dict(rank=5),
    "a factor for each sample": dict(rank=16, shared=False),
    "segments": dict(segments=True),
    "padding": dict(padding=True),
    "all": dict(rank=3, segments=True, padding=True),
}
DTYPES = torch.float16, torch.float32


@pytest.mark.parametrize(
    "splits, dtype, name",
    [
        pytest.param(
            splits, dtype, name,
            marks=() if (splits, dtype, name) == (3, torch.float16, "all") else pytest.mark.slow,
        )
        for place, name in enumerate(CASES)  # each with both numbers and both dtypes
        for splits, dtype in zip((1, 3), DTYPES[::-1] if place % 2 else DTYPES)
    ],
    indirect=["splits"],
)  # fmt: skip
def test_a_plan_computes_what_the_first_call_did(planned, splits, dtype, name):
    given = operands(dtype, **CASES[name])
    leaves = [t for t in given.values() if getattr(t, "requires_grad", False)]
    grad_out = torch.randn(B, M, H, D).to(dtype)

    def step():
        out = fused_attention(**given)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    first = step()
    assert not planned
    for found, expected in zip(step(), first):
        assert torch.equal(found, expected) and not found.isnan().any()
        # A view of a larger tensor would keep all of it alive.
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
    assert len(planned) >= 4
    given = operands(dtype, **CASES[name], grad=False)
    out, again = fused_attention(**given), fused_attention(**given)
    assert torch.equal(out, again) and torch.allclose(out, first[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 3], indirect=True)
@pytest.mark.parametrize(
    "call, most",  # without splits, with splits
    [
        # out; logsumexp, and with splits parts of both
        ("eval", (2, 2)),
        ("training", (2, 3)),
        # three gradients, and the rest
        ("backward", (4, 4)),
    ],
)
def test_tensors_that_no_result_is_are_one(planned, splits, call, most):
    given = operands(torch.float32, grad=call != "eval")
    leaves = list(given.values())

    def run():
        if call == "backward":
            out = fused_attention(**given)
            return lambda: torch.autograd.grad(out, leaves, torch.ones_like(out))
        return lambda: fused_attention(**given)

    run()()
    repeated = run()
    del planned[:]
    with Made() as made:
        repeated()
    assert planned and (made.full, made.zeros) == (most[splits > 1], 0)


def test_parts_of_scratch_memory():
    """Apart from one another, and each where a cache line begins."""
    q = torch.randn(1)
    draft = cached_call.Draft(("q",), [q])
    draft.make("out", (3,), torch.float16)
    for name, shape, dtype in (
        ("a", (3, 11), torch.float32), ("b", (), torch.float16), ("c", (0, 4), torch.float32),
        ("d", (128,), torch.uint8), ("e", (1,), torch.int32),
    ):  # fmt: skip
        draft.scratch(name, shape, dtype)
    assert [place for _, place in draft.parts.values()] == [0, 256, 384, 384, 512]
    scratch = draft.makes[cached_call.SCRATCH]()
    assert scratch.untyped_storage().nbytes() == 640 and len(draft.makes) == 2
