"""Launches that are kept: by class of call, and handed to the driver as Triton itself would."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")

from flashbias_patch.attention.kernels import cached_launch, tiles  # noqa: E402
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
    assert done.returncode == 0 and "settled 5" in done.stdout, done.stdout[-3000:]


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
