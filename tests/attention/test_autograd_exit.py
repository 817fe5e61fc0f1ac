"""What a process waits for before it ends; benchmarks/exits.py sees that it helps, which takes a
GPU."""

from types import SimpleNamespace

import pytest

from flashbias_patch.attention import autograd_exit, dispatch
from tests.support import internals


@pytest.fixture
def registered(monkeypatch):
    found = []
    monkeypatch.setattr(autograd_exit.atexit, "register", found.append)
    autograd_exit.wait_for_autograd.cache_clear()
    yield found
    autograd_exit.wait_for_autograd.cache_clear()


def test_the_first_call_on_a_gpu_and_no_other_has_the_process_wait(registered):
    for cuda, count in ((False, 0), (True, 1), (True, 1)):
        inputs = SimpleNamespace(q=SimpleNamespace(is_cuda=cuda))
        assert internals.passes_self_check(None, dispatch.LAST_RESORT, inputs, None, {})
        assert len(registered) == count


def test_it_waits_where_cuda_was_used(registered, monkeypatch):
    slept = []
    monkeypatch.setattr(autograd_exit.time, "sleep", slept.append)
    autograd_exit.wait_for_autograd()
    for used in (False, True):
        monkeypatch.setattr(autograd_exit.torch.cuda, "is_initialized", lambda used=used: used)
        registered[0]()
    assert slept == [autograd_exit.PATIENCE]
