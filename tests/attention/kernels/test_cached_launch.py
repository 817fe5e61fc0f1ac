"""Launches that are kept: by class of call, and handed to the driver as Triton itself would."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", minversion="3.0")

from flashbias_patch.attention.kernels import cached_launch, direct_launch, tiles  # noqa: E402
from flashbias_patch.attention.kernels.autograd import fused_attention  # noqa: E402
from tests.support import internals  # noqa: E402

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cached_launches.py")


@pytest.mark.slow
def test_the_driver_gets_what_triton_would_hand_it():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0 and "settled 6" in done.stdout, done.stdout[-3000:]


def attend(**changes):
    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 7, 2, 16)
    return fused_attention(q, k, changes.pop("v", k), **changes)


def test_a_class_of_calls_is_settled_once():
    attend()
    kept = dict(internals.settled_forwards())
    attend()
    assert dict(internals.settled_forwards()) == kept and len(kept) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 0.3},
        {"dropout_p": 0.1},
        {"v": torch.randn(1, 2, 7, 16).transpose(1, 2)},
        {"v": torch.randn(1, 7, 2, 16).requires_grad_()},
        {"v": torch.randn(225)[1:].view(1, 7, 2, 16)},
        {"mask": torch.zeros(1, 1, 1, 7, dtype=torch.bool)},
        {"mask": torch.zeros(1, 1, 5, 7, dtype=torch.bool)},
    ],
    ids=["scale", "dropout", "strides", "gradient", "address", "mask", "mask's shape"],
)
def test_what_makes_another_class(changes):
    attend()
    (before,) = internals.settled_forwards()
    attend(**changes)
    assert set(internals.settled_forwards()) > {before}


def test_another_tile_shape_unsettles_everything(monkeypatch):
    attend()
    (step,) = internals.settled_forwards().values()
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Config(16, 16, 4, 1))
    attend()
    assert list(internals.settled_forwards().values()) == [step]
    tiles.generation += 1
    attend()
    (other,) = internals.settled_forwards().values()
    assert other is not step and other.attend.options["BLOCK_M"] == 16


class Stream:
    """Notes what happens on it."""

    def __init__(self, name, notes):
        self.name, self.notes, self.cuda_stream = name, notes, name

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("fails", [False, True])
def test_backwards_kernels_side_by_side(monkeypatch, fails):
    """Both after the fork, and joined again, whatever happens between."""
    notes = []
    q, k, factor = (
        torch.randn(1, 5, 2, 16, requires_grad=True),
        torch.randn(1, 7, 2, 16, requires_grad=True),
        None,
    )

    def gradients():
        return torch.autograd.grad(fused_attention(q, k, k, factor, factor).square().sum(), (q, k))

    want = gradients()
    _, steps, _ = next(iter(internals.settled_backwards().values()))
    for step, name in zip(steps, ("keys", "queries")):

        def noted(*tensors, stream=None, launch=step.launch, name=name):
            notes.append(f"{name} on {stream}")
            if fails and name == "keys":
                raise RuntimeError("no room")
            launch(*tensors)

        step.launch = noted
    internals.set_streams(monkeypatch, Stream("one", notes), Stream("other", notes))
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(), want)
    )  # rescued where a kernel fails
    assert notes == [
        "other waits for one",
        "queries on other",
        "keys on None",
        "one waits for other",
    ]


def test_the_queries_kernels_stream_goes_first(monkeypatch):
    """torch counts priorities downwards, the usual stream's is 0."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority=0: priority)
    assert internals.new_stream(torch.device("cuda")) < 0


def test_lengths_that_differ_every_time_do_not_pile_up():
    kept = cached_launch.Kept(room=3)
    for key in range(10):
        kept.keep(key, object())
        assert kept.find(key) is not None and len(kept.steps) <= 3


class Through:
    """A launcher of a kernel without scratch memory, as in Triton 3.0 to 3.2; `launch` notes."""

    launch_cooperative_grid, launch_pdl = False, True
    arg_annotations, kernel_signature = ["annotation"], b"signature"
    global_scratch_size = profile_scratch_size = 0
    gsan_enabled = False

    def __init__(self):
        self.launched = []

    def launch(self, *arguments):
        self.launched.append(arguments)

    def __call__(self, *arguments):
        self.launch(*arguments)


class Cooperative(Through):
    """As in Triton 3.3."""

    def __call__(self, x, y, z, stream, function, *rest):
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, None, *rest)


class Dependent(Through):
    """As in Triton 3.4."""

    def __call__(self, x, y, z, stream, function, *rest):
        grid = x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl
        self.launch(*grid, None, *rest)


class Profiled(Through):
    """As in Triton 3.5 and 3.6."""

    def __call__(self, x, y, z, stream, function, *rest):
        grid = x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl
        self.launch(*grid, None, None, *rest)


class Packed(Through):
    """As in Triton 3.7 to 3.9."""

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *own):
        grid = x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl
        hooks = metadata, launch_metadata, enter, leave
        self.launch(*grid, *hooks, None, None, self.arg_annotations, self.kernel_signature, own)


LAUNCHERS = {
    Through: direct_launch.TRITON_3_0,
    Cooperative: direct_launch.TRITON_3_3,
    Dependent: direct_launch.TRITON_3_4,
    Profiled: direct_launch.TRITON_3_5,
    Packed: direct_launch.TRITON_3_7,
}


def launched_at(launcher, monkeypatch):
    """A compiled launch of a kernel with one number, by this launcher; no hooks."""
    monkeypatch.setattr(cached_launch, "HOOKS", SimpleNamespace(**NO_HOOKS))
    compiled = SimpleNamespace(run=launcher, packed_metadata=(4, 1, 0), function=77)
    launch = cached_launch.Launch(None, 5, (0.5,), {})
    launch.run, launch.rest = None, (0.5, 64)
    launch.direct = direct_launch.direct(compiled)
    return launch


NO_HOOKS = {"launch_enter_hook": None, "launch_exit_hook": None}
# What a compiled kernel calls its launcher with: `launched_at`'s, at addresses 16 and 32.
CALLED = (5, 1, 1, 9, 77, (4, 1, 0), None, None, None, 16, 32, 0.5, 64)


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_the_c_function_gets_what_a_launcher_hands_it(kind, monkeypatch):
    order = LAUNCHERS[kind]
    monkeypatch.setitem(direct_launch.ORDERS, direct_launch.digest(kind.__call__), order)
    assert order in direct_launch.ORDERS.values()
    launcher = kind()
    launch = launched_at(launcher, monkeypatch)
    launcher(*CALLED)
    monkeypatch.setattr(kind, "__call__", forbidden)
    launch.at(9, [16, 32])
    through, direct = launcher.launched
    assert direct == through


def forbidden(*arguments):
    raise AssertionError("called")


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_an_unknown_launcher_is_called(kind, monkeypatch):
    """Its source is not one that is known, though it does the same."""
    launcher, called = kind(), []
    monkeypatch.setattr(kind, "__call__", lambda self, *arguments: called.append(arguments))
    launched_at(launcher, monkeypatch).at(9, [16, 32])
    assert called == [CALLED] and not launcher.launched


@pytest.mark.parametrize("needed", direct_launch.UNUSED)
def test_scratch_memory_is_the_launchers_to_allocate(needed, monkeypatch):
    known = direct_launch.digest(Packed.__call__)
    monkeypatch.setitem(direct_launch.ORDERS, known, direct_launch.TRITON_3_7)
    launcher = Packed()
    assert launched_at(launcher, monkeypatch).direct.function == launcher.launch
    setattr(launcher, needed, 1)
    assert launched_at(launcher, monkeypatch).direct.function is launcher


@pytest.mark.parametrize("hook", NO_HOOKS)
def test_a_hook_installed_later_is_called(hook, monkeypatch):
    known = direct_launch.digest(Packed.__call__)
    monkeypatch.setitem(direct_launch.ORDERS, known, direct_launch.TRITON_3_7)
    launcher, through_triton = Packed(), []
    launch = launched_at(launcher, monkeypatch)
    launch.run = lambda *arguments, stream: through_triton.append((stream, arguments))
    launch.at(9, [16, 32])
    assert len(launcher.launched) == 1 and not through_triton
    setattr(cached_launch.HOOKS, hook, print)
    launch.at(9, [16, 32])
    assert len(launcher.launched) == 1 and through_triton == [(9, (16, 32, 0.5, 64))]


def test_a_launch_with_tensors_is_direct_too(monkeypatch):
    """On the current stream of their GPU; through Triton where another GPU is the current one."""
    known = direct_launch.digest(Packed.__call__)
    monkeypatch.setitem(direct_launch.ORDERS, known, direct_launch.TRITON_3_7)
    launcher, through_triton, tensor = Packed(), [], torch.zeros(4)
    launch = launched_at(launcher, monkeypatch)
    launch.run = lambda *arguments, stream: through_triton.append((stream, arguments))
    given = tensor.data_ptr(), 0.5, 64
    monkeypatch.setattr(cached_launch, "stream_of", lambda tensor: 7)
    for passed in (None, 9):
        launch(tensor, stream=passed)
        _, _, _, stream, *_, own = launcher.launched.pop()
        assert (stream, own) == (passed or 7, given) and not through_triton
    monkeypatch.setattr(cached_launch, "stream_of", lambda tensor: None)
    launch(tensor)
    assert through_triton == [(None, given)] and not launcher.launched


def test_a_kernel_that_fails_to_launch_raises(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no room")

    known = direct_launch.digest(Packed.__call__)
    monkeypatch.setitem(direct_launch.ORDERS, known, direct_launch.TRITON_3_7)
    launcher = Packed()
    launcher.launch = fails
    with pytest.raises(RuntimeError, match="no room"):
        launched_at(launcher, monkeypatch).at(9, [16, 32])


def test_the_installed_tritons_launcher_is_known():
    from triton.backends.nvidia.driver import CudaLauncher

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version > (3, 9):
        pytest.skip("newer than the launchers that direct_launch.py knows")
    assert direct_launch.digest(CudaLauncher.__call__) in direct_launch.ORDERS
