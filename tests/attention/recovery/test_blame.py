"""Errors of the caller's own code arrive as themselves, and nothing is remembered; a backend's own
are survived."""

from __future__ import annotations

import functools
import signal
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashbias_patch import flash_bias_attention, telemetry
from flashbias_patch.attention import dispatch
from flashbias_patch.attention.recovery import guard
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.bias import DenseBias, LowRankBias
from tests import stand_ins
from tests.attention.recovery.fault_matrix import only
from tests.support import builders
from tests.support.fake_backends import Faulty
from tests.support.internals import tells_hooks

BACKENDS = ("sdpa", "reference")
NEEDS_HOOKS = pytest.mark.skipif(
    not tells_hooks(), reason="before torch 2.8 such calls are not guarded"
)

tensors = functools.partial(builders.tensors, M=5, N=7)


class Mine(Exception):
    pass


def call(backend=None, **kwargs):
    return flash_bias_attention(*tensors(), backend=backend, **kwargs)


class FailingDispatch(TorchDispatchMode):
    """Fails in the first operator whose name contains `word`."""

    def __init__(self, word, error=Mine):
        super().__init__()
        self.word, self.error = word, error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.word in str(func):
            raise self.error("budget exceeded")
        return func(*args, **(kwargs or {}))


class FailingFunction(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("scaled_dot_product_attention", "exp_", "baddbmm"):
            raise Mine("not this one")
        return func(*args, **(kwargs or {}))


def pack_fails(backend):
    def pack(tensor):
        raise Mine("disk full")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        call(backend)


def unpack_fails(backend):
    def unpack(saved):
        raise Mine("disk gone")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
        out = call(backend)
    out.sum().backward()


def dispatch_mode_fails(backend):
    with FailingDispatch("attention" if backend == "sdpa" else "aten.exp"):
        call(backend)


def dispatch_mode_fails_in_backward(backend):
    out = call(backend)
    with FailingDispatch("backward" if backend == "sdpa" else "aten.exp"):
        out.sum().backward()


def function_mode_fails(backend):
    with FailingFunction():
        call(backend)


def tensor_hook_fails(backend):
    q, k, v = tensors()

    def hook(grad):
        raise Mine("nan")

    q.register_hook(hook)
    flash_bias_attention(q, k, v, backend=backend).sum().backward()


class Kind(torch.Tensor):
    """A tensor of the caller's own, whose operators fail."""

    @staticmethod
    def __new__(cls, like):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if "detach" in str(func) or "view" in str(func) or "transpose" in str(func):
            return Kind(
                torch.empty(func(*[a.as_meta() if isinstance(a, Kind) else a for a in args]).shape)
            )
        raise Mine("no such operator")

    def as_meta(self):
        return torch.empty(self.shape, device="meta")


def subclass_fails(backend):
    q, k, v = tensors(grad=False)
    flash_bias_attention(Kind(q), Kind(k), Kind(v), backend=backend)


def alarm(work, error=Mine):
    """work(), interrupted by a signal handler that raises `error`."""

    def handler(*args):
        raise error()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        for _ in range(100000):
            work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def alarm_in_forward(backend):
    q, k, v = tensors(M=300, N=300)
    flash_bias_attention(q, k, v, backend=backend)
    alarm(lambda: flash_bias_attention(q, k, v, backend=backend))


def alarm_in_backward(backend):
    out = flash_bias_attention(*tensors(M=300, N=300), backend=backend)
    alarm(lambda: torch.autograd.backward(out, torch.ones_like(out), retain_graph=True))


CASES = (
    pack_fails,
    unpack_fails,
    dispatch_mode_fails,
    dispatch_mode_fails_in_backward,
    function_mode_fails,
    tensor_hook_fails,
    subclass_fails,
    alarm_in_forward,
    alarm_in_backward,
)


def untouched(backend):
    """No breaker is open, nothing was told, and an ordinary call uses the backend that it used
    before."""
    assert not dispatch.breakers.failures() and not telemetry.fallbacks()
    telemetry.calls.clear()
    out = call(backend)
    out.sum().backward()
    expected = call("reference")
    torch.testing.assert_close(out, expected)
    assert telemetry.calls[backend or "sdpa"] >= 1 and set(telemetry.calls) <= {
        backend or "sdpa",
        "reference",
    }
    assert dispatch.explain(dispatch.AttentionInputs(*tensors(), scale=1.0))["sdpa"] == []


@pytest.mark.parametrize(
    "guarded", (False, pytest.param(True, marks=NEEDS_HOOKS)), ids=("bare", "guarded")
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_callers_error_arrives_as_it_is(monkeypatch, backend, case, guarded):
    monkeypatch.setattr(guard, "LARGE", 0 if guarded else 1 << 60)
    for first in (True, False):  # before the self-check, and after it
        if not first:
            call(backend)
        with pytest.raises(Mine):
            case(backend)
        untouched(backend)
        if first:
            dispatch.reset()


@pytest.mark.parametrize(
    "error", (KeyboardInterrupt, SystemExit, TimeoutError, AssertionError), ids=lambda e: e.__name__
)
def test_whatever_a_signal_handler_raises(error):
    q, k, v = tensors(M=300, N=300)
    flash_bias_attention(q, k, v)
    with pytest.raises(error):
        alarm(lambda: flash_bias_attention(q, k, v), error)
    untouched(None)


class Asked(Faulty):
    """Refuses every call; a handler of the caller's interrupts it while it is asked."""

    def __init__(self):
        super().__init__("triton")
        self.interrupt = None

    def why_not(self, inputs):
        if self.interrupt is not None:
            interrupt, self.interrupt = self.interrupt, None
            interrupt()
        return ["not on this device"]


@pytest.mark.parametrize("first", (True, False))
def test_an_error_in_why_not(monkeypatch, first):
    backend = Asked()
    only(monkeypatch, backend)
    if not first:
        call()
        dispatch.breakers.plans.clear()  # a settled call asks nothing

    def handler(*args):
        raise Mine()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        backend.interrupt = lambda: signal.raise_signal(signal.SIGALRM)
        with pytest.raises(Mine):
            call()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not dispatch.breakers.failures() and not telemetry.fallbacks()
    call()
    assert telemetry.calls["sdpa"] >= 1


def test_inference_tensors_in_training():
    q, _, _ = tensors()
    with torch.inference_mode():
        _, k, v = tensors(grad=False)
    flash_bias_attention(*tensors())
    for backend in (None, *BACKENDS):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            flash_bias_attention(q, k, v, backend=backend)
        assert not dispatch.breakers.failures()
    flash_bias_attention(q, k.clone(), v.clone())
    assert telemetry.calls["sdpa"] == 2


def test_hooks_that_are_forbidden_do_not_fail_the_self_check():
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        call()
    untouched(None)


class PassingFunction(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context", (lambda: FailingDispatch("nothing"), PassingFunction), ids=("dispatch", "function")
)
def test_a_backend_that_fails_by_itself_is_out_under_a_mode_too(monkeypatch, context):
    backend = Persistent()
    only(monkeypatch, backend)
    with context():
        found = call()
    torch.testing.assert_close(found, call("reference"))
    (told,) = telemetry.fallbacks()
    assert told["source"] == "triton" and told["reason"] == "RuntimeError: no such kernel"
    assert [(name, reason) for _, name, reason in dispatch.breakers.failures()] == [
        ("triton", told["reason"])
    ]


class Persistent(Faulty):
    """Right in the self-check; every real call fails."""

    def __init__(self, name="triton"):
        super().__init__(name)
        self.tried = 0

    @staticmethod
    def is_real(inputs):
        return inputs.q.shape[0] == 1

    def __call__(self, inputs):
        if self.is_real(inputs):
            self.tried += 1
            raise RuntimeError("no such kernel")
        return attend_dense(inputs)


class OnlyUnderModes(Persistent):
    """Fails where a dispatch mode is in force, as C++ code does that looks at a tensor's memory."""

    def __call__(self, inputs):
        if self.is_real(inputs) and torch._C._len_torch_dispatch_stack():
            raise RuntimeError("no data pointer")
        return attend_dense(inputs)


def test_a_failure_only_in_the_callers_context_counts_for_that_call_only(monkeypatch):
    only(monkeypatch, OnlyUnderModes())
    with FailingDispatch("nothing"):
        found = call()
    torch.testing.assert_close(found, call("reference"))
    assert (
        "this call only" in telemetry.fallbacks()[0]["reason"] and not dispatch.breakers.failures()
    )
    telemetry.calls.clear()
    call()
    assert dict(telemetry.calls) == {"triton": 1}


def test_the_last_backend_fails_in_the_callers_context_with_its_own_error(monkeypatch):
    only(monkeypatch, OnlyUnderModes())
    with FailingDispatch("nothing"), pytest.raises(RuntimeError, match="^no data pointer$"):
        call("triton")
    assert not dispatch.breakers.failures() and not telemetry.fallbacks()


def test_the_last_resort_is_never_out(monkeypatch):
    only(monkeypatch)
    broken = Persistent("reference")
    dispatch.loaded["reference"] = broken
    dispatch.loaded["sdpa"] = Persistent("sdpa")
    for tried in (1, 2, 3):
        with pytest.raises(
            dispatch.NoBackendError, match="sdpa: RuntimeError: no such kernel"
        ) as caught:
            call()
        assert broken.tried == tried and str(caught.value.__cause__) == "no such kernel"
    assert [name for _, name, _ in dispatch.breakers.failures()] == ["sdpa"]


def test_a_patched_class_hands_the_callers_error_on(installed):
    with stand_ins.repository("petr") as load:
        module = load(f"{stand_ins.UTILS}.petr_transformer").PETRMultiheadAttention(16, 2)
        x, memory = torch.randn(5, 1, 16, requires_grad=True), torch.randn(7, 1, 16)
        module(x, memory, memory)
        with pytest.raises(Mine), FailingDispatch("attention"):
            module(x, memory, memory)
        telemetry.calls.clear()
        module(x, memory, memory)
    assert dict(telemetry.calls) == {"sdpa": 1} and not dispatch.breakers.failures()


def test_errors_in_threads_stay_in_their_threads():
    """One thread fails in its own hooks, another trains."""
    call()
    raised, failed = [], []

    def failing():
        for _ in range(20):
            try:
                pack_fails(None)
            except Mine:
                raised.append(True)

    def training():
        expected = attend_dense(dispatch.AttentionInputs(*tensors(), scale=8**-0.5))
        for _ in range(20):
            out = call()
            out.sum().backward()
            if not torch.allclose(out, expected, atol=1e-5):
                failed.append(out)

    threads = [threading.Thread(target=work) for work in (failing, training, failing)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 40 and not failed
    untouched(None)


BIASES = {
    "dense": DenseBias(torch.zeros(1, 1, 5, 7)),
    "low rank": LowRankBias(torch.ones(1, 5, 1, 1), torch.ones(1, 7, 1, 1)),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_with_a_bias(bias):
    call(bias=bias)
    with pytest.raises(Mine), FailingDispatch("attention"):
        call(bias=bias)
    assert not dispatch.breakers.failures() and not telemetry.fallbacks()
