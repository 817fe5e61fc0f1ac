"""What reaches the GPU's driver when a call's launches are settled, against what Triton's own
launch hands over.

`python cached_launches.py` prints one line a case; needs Triton and PyTorch, no GPU: the driver is
a stand-in that notes its arguments, the kernels are compiled for Hopper. Every case runs twice,
forward and backward, with other tensors of the same signature; then with tensors at odd addresses,
which are another class.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)
os.environ["FLASHBIAS_PATCH"] = "0"
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), *[os.pardir] * 3))

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

launched = []
through_triton = []
direct = []  # names of kernels not launched through CudaLauncher.__call__
forked = []  # launches between the fork and the join of two streams
handed = []  # addresses of the tensors of every launch


def lies_at(address):
    """(bytes of the storage, bytes before the address, dtype) of the tensors alive in whose storage
    it lies."""
    sizes = set()
    for found in gc.get_objects():
        if type(found) is torch.Tensor and found.numel():
            size, begin = found.untyped_storage().nbytes(), found.untyped_storage().data_ptr()
            if begin <= address < begin + size:
                sizes.add((size, address - begin, str(found.dtype).replace("bool", "uint8")))
    return sorted(sizes)


class Address(list):
    """The tensors that an address lies in (`lies_at`), and its remainder by 16. Equal to a part of
    a plan's scratch memory that has room for as much."""

    def __init__(self, tensors, remainder):
        super().__init__([*tensors, remainder])
        self.tensors, self.remainder = tensors, remainder

    def __eq__(self, planned):
        if list.__eq__(self, planned):
            return True
        (needed, before, _), (size, at, dtype) = self.tensors[0], planned.tensors[0]
        return (
            dtype == "torch.float32" and before == self.remainder == planned.remainder == 0
            and at % 128 == 0 and needed <= size - at
        )  # fmt: skip


class Launcher:
    """Calls `launch` as this Triton's launcher does; `launch` is the C function's stand-in."""

    arg_annotations, kernel_signature = "annotations", b"signature"
    gsan_enabled = False

    def __init__(self, source, metadata):
        self.name = metadata.name if hasattr(metadata, "name") else metadata["name"]
        self.num_ctas = 1
        for name in ("global_scratch", "profile_scratch"):
            setattr(self, f"{name}_size", getattr(metadata, f"{name}_size", 0))
            setattr(self, f"{name}_align", getattr(metadata, f"{name}_align", 1))
        self.launch_cooperative_grid = getattr(metadata, "launch_cooperative_grid", False)
        self.launch_pdl = getattr(metadata, "launch_pdl", False)

    __call__ = CudaLauncher.__call__

    def launch(self, *arguments):
        if sys._getframe(1).f_code is not CudaLauncher.__call__.__code__:
            direct.append(self.name)
        packed = [isinstance(value, tuple) for value in arguments].index(True)
        # Before it grid, stream, function and more; after it launch metadata and the two hooks,
        # which are not there without a hook, and more.
        first, rest = [*arguments[: packed + 1]], [*arguments[packed + 4 :]]
        # The kernel's own arguments: one tuple since Triton 3.7.
        own = rest
        if isinstance(rest[-1], tuple):
            own = [*rest.pop()]
            first += rest
        tensors = handed.pop()
        for place, tensor in enumerate(tensors):
            address = own[place] if isinstance(own[place], int) else own[place].data_ptr()
            # By address alone where a plan hands it over (Launch.at).
            assert address == (tensor if isinstance(tensor, int) else tensor.data_ptr()), (
                self.name,
                place,
            )
            assert lies_at(address), (self.name, place)
            own[place] = Address(lies_at(address), address % 16)
        launched.append((self.name, first, [(type(value), value) for value in own]))


class Utils:
    RESULTS = 5 if "n_max_threads" in inspect.getsource(CompiledKernel) else 4

    def load_binary(self, name, kernel, shared, device):
        return (1, 2, 100, 0, 1024)[: self.RESULTS]

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Driver())
_run = JITFunction.run
JITFunction.run = lambda self, *args, **kwargs: (
    through_triton.append(self) or _run(self, *args, **kwargs)
)

import pytest  # noqa: E402

from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.kernels import (  # noqa: E402
    autograd,
    cached_launch,
    launcher_casts,
    problem,
)  # fmt: skip
from tests.support import internals  # noqa: E402

_launch = cached_launch.Launch.__call__
_launch_at = cached_launch.Launch.at


def _at(self, stream, addresses):
    if sys._getframe(1).f_code is not _launch.__code__:  # there the tensors were noted
        handed.append(addresses)
    _launch_at(self, stream, addresses)


cached_launch.Launch.at = _at
cached_launch.Launch.__call__ = lambda self, *tensors, **options: (
    handed.append(tensors) or _launch(self, *tensors, **options)
)
problem.arch_of = lambda tensor: problem.Arch(90, 132)


class Stream:
    """Notes in `launched` that it waits."""

    def __init__(self, handle):
        self.cuda_stream = handle

    def wait_stream(self, other):
        launched.append(("wait", [self.cuda_stream], [other.cuda_stream]))


def failed(call, grad, error):
    raise error


B, M, N, H, D = 2, 33, 200, 2, 32


def tensor(*shape, dtype=torch.float16, odd=False):
    made = torch.randn(shape).to(dtype)
    if odd:  # two bytes past a multiple of 16
        room = torch.empty(made.numel() + 1, dtype=dtype)
        made = room[1:].view(shape).copy_(made)
    return made.requires_grad_()


def attention(rank=0, segments=False, dense=False, padding=False, dropout_p=0.0, odd=False):
    """One forward and backward pass; what was launched."""
    del launched[:]
    leaves = [tensor(B, length, H, D, odd=odd) for length in (M, N, N)]
    factors = [tensor(1, length, 1, rank, odd=odd) for length in (M, N)] if rank else [None, None]
    weights = tensor(B, M, 1, 2, dtype=torch.float32) if segments else None
    bias = tensor(1, 1, M, N, dtype=torch.float32) if dense else None
    padded = torch.zeros(B, N, dtype=torch.bool) if padding else None
    out = autograd.fused_attention(
        *leaves, *factors, weights, [50, N - 50], bias, key_padding=padded, dropout_p=dropout_p,
        on_failure=failed,
    )  # fmt: skip
    wanted = [leaf for leaf in (*leaves, *factors, weights, bias) if leaf is not None]
    grads = torch.autograd.grad(out, wanted, torch.randn(out.shape).half())
    for leaf, grad in zip(wanted, grads):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
    if ("wait", [0], [OTHER]) in launched:
        order = [(name, first[3]) for name, first, _ in launched if name != "wait"]
        fork, join = (launched.index(("wait", [a], [b])) for a, b in ((OTHER, 0), (0, OTHER)))
        between = [(name, first[3]) for name, first, _ in launched[fork + 1 : join]]
        assert between == [("queries_kernel", OTHER), ("keys_kernel", 0)], order
        forked.extend(between)
        assert {stream for name, stream in order if name != "queries_kernel"} == {0}, order
    # Of the first pass, each kernel is finished before the next is begun, on one stream.
    return sorted([(n, f[:3] + f[4:], own) for n, f, own in launched if n != "wait"], key=repr)


def casting(odd=False):
    """Casts to float16, attention without gradients whose output is float32, casts back, and the
    division of a gradient; what was launched."""
    del launched[:]
    with torch.no_grad():
        wide = [tensor(B, n, H, D, dtype=torch.float32, odd=odd).detach() for n in (M, N, N)]
        narrow = launcher_casts.cast(wide, torch.float16)
        out = autograd.attend(AttentionInputs(*narrow, out_dtype=torch.float32), failed)
        back = launcher_casts.cast(narrow[:2], torch.float32, torch.ones(1))
        divided, power = launcher_casts.divided(wide[0], torch.float16)
    made = (*narrow, out, *back, divided, power)
    halves = [t.dtype is torch.float16 for t in made]
    assert halves == [True] * 3 + [False] * 3 + [True, False], halves
    return sorted(launched, key=repr)


OTHER = 7  # the handle of the second stream
CASES = {
    "casts": None,
    "two streams": {},
    "factors": dict(rank=8),
    "factors as they are": dict(rank=16),
    "segments": dict(segments=True),
    "dense bias, padding, dropout": dict(dense=True, padding=True, dropout_p=0.1),
}

if __name__ == "__main__":
    gc.freeze()  # what was imported holds none of the tensors that lies_at() looks for
    for name in sys.argv[1:] or CASES:
        patch = pytest.MonkeyPatch()
        if name == "two streams":
            internals.set_streams(patch, Stream(0), Stream(OTHER))
        given = CASES[name]
        run = casting if given is None else functools.partial(attention, **given)
        first = run()
        compiled = len(through_triton)
        assert not direct, name
        again = run()
        assert len(first) >= 4 and first == again, (name, first, again)
        assert bool(forked) == (name == "two streams"), name
        assert compiled and len(through_triton) == compiled, name
        assert sorted(direct) == [kernel for kernel, *_ in again], name
        odd = run(odd=True)
        assert odd != first and odd == run(odd=True), name
        assert first == run(), name
        patch.undo()
        del through_triton[:], direct[:], forked[:]
        print(
            f"{name}: {len(first)} launches, {sum(len(one[2]) for one in first)} arguments",
            flush=True,
        )
    gc.unfreeze()
    print("settled", len(sys.argv[1:] or CASES))
