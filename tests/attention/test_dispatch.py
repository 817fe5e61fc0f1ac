"""What is caught, what is not, and what each leaves behind."""

from __future__ import annotations

import gc
import logging
import math
import traceback
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flashbias_patch
from flashbias_patch import flash_bias_attention, settings, telemetry
from flashbias_patch.attention import chunked_attention, dispatch, selection
from flashbias_patch.attention.backends import reference
from flashbias_patch.attention.backends.base import Backend
from flashbias_patch.attention.breaker import Phase
from flashbias_patch.attention.recovery import errors
from flashbias_patch.attention.signature import signature_of
from flashbias_patch.bias import DenseBias, LowRankBias
from tests.attention.recovery.fault_matrix import only
from tests.support.builders import tensors
from tests.support.capabilities import since
from tests.support.fake_backends import Fault, Faulty
from tests.support.small_training import LAYERS, decoder_of, train


class Raising(Faulty):
    """Right in the self-check; real calls draw a number and then raise."""

    def __init__(self, error, name="triton"):
        super().__init__(name)
        self.error, self.tried = error, 0

    def __call__(self, inputs):
        if self.is_real(inputs):
            self.tried += 1
            torch.rand(3)
            raise self.error
        return super().__call__(inputs)


def answer_of(**kwargs):
    q, k, v = tensors()
    return flash_bias_attention(q, k, v, **kwargs)


# -- memory ----------------------------------------------------------------------------------------

OOM = torch.cuda.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.53 GiB. GPU 0 has a total capacity"
)


def test_out_of_memory_is_retried_in_small_chunks_and_opens_no_breaker(monkeypatch):
    backend = Raising(OOM)
    only(monkeypatch, backend)
    monkeypatch.setitem(chunked_attention.CHUNK_BYTES, "cpu", 64 << 20)
    chunks = []
    attend = reference.backend.attend
    monkeypatch.setattr(
        reference.backend, "attend", lambda i, size: chunks.append(size) or attend(i, size)
    )
    out = answer_of()
    least = chunked_attention.LEAST_BYTES
    assert chunks == [least] and chunked_attention.CHUNK_BYTES["cuda"] > least
    torch.testing.assert_close(out, answer_of(backend="reference"))
    answer_of()
    assert backend.tried == 2  # asked again: never slower for ever after one OOM
    (told,) = telemetry.fallbacks()
    assert "out of memory" in told["reason"] and told["count"] == 2


def test_out_of_memory_for_good_says_what_would_help(monkeypatch):
    def full(inputs, size):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0")

    only(monkeypatch, Raising(OOM))
    monkeypatch.setattr(reference.backend, "attend", full)
    q, k, v = tensors()
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        flash_bias_attention(q, k, v, DenseBias(torch.zeros(6, 10)))
    text = str(caught.value)
    for part in (
        "requested: 96.00 MiB",
        "free:",
        "with_cp=True",
        "expandable_segments",
        "FLASHBIAS_RANK",
        "M=6",
    ):
        assert part in text
    assert not dispatch.breakers.failures()


def test_small_chunks_drop_in_backward_what_they_dropped_in_forward(monkeypatch):
    """Dropout is drawn chunk by chunk: the chunks must be forward's, not what a later call would
    cut."""
    q, k, v = tensors(M=64)
    inputs = dispatch.AttentionInputs(q, k, v, dropout_p=0.5, scale=0.3)
    out = reference.backend.attend(inputs, 5 * 2 * 10 * 4)
    (dv,) = torch.autograd.grad(out, v, out.detach())
    assert (dv * v).sum().item() == pytest.approx(out.square().sum().item(), rel=1e-4)


class Holding(Faulty):
    """Fails with an error that its own frame holds, as a launcher's may: only Python's collector
    ends that circle."""

    def __init__(self):
        super().__init__("triton")
        self.held = None

    def __call__(self, inputs):
        if not self.is_real(inputs):
            return super().__call__(inputs)
        scores = torch.zeros(1000)
        self.held = weakref.ref(scores)
        error = RuntimeError("launch failed")
        raise error


def test_a_failed_attempts_memory_is_free_at_once(monkeypatch):
    backend = Holding()
    only(monkeypatch, backend)
    monkeypatch.setattr(Faulty, "is_real", staticmethod(lambda inputs: inputs.q.shape[1] == 6))
    gc.disable()
    try:
        answer_of()
        assert backend.held is not None and backend.held() is None
    finally:
        gc.enable()


# -- what is not survived --------------------------------------------------------------------------


@pytest.mark.parametrize("sign", errors.STICKY)
def test_sticky_errors_are_raised_at_once(monkeypatch, caplog, sign):
    error = RuntimeError(f"CUDA error: an {sign} was encountered")
    only(monkeypatch, Raising(error))
    with pytest.raises(RuntimeError) as caught:
        answer_of()
    assert caught.value is error
    assert (
        traceback.extract_tb(caught.value.__traceback__)[-1].name == "__call__"
    )  # where it happened
    assert sum("CUDA_LAUNCH_BLOCKING=1" in r.message for r in caplog.records) == 1
    assert not telemetry.fallbacks() and not telemetry.calls


@pytest.mark.parametrize("kind", (KeyboardInterrupt, SystemExit))
def test_interrupts_are_never_caught(monkeypatch, kind):
    only(monkeypatch, Raising(kind()))
    with pytest.raises(kind):
        answer_of()
    assert not telemetry.fallbacks()


def test_mistakes_of_the_caller_are_raised_and_open_no_breaker(monkeypatch):
    only(monkeypatch, Faulty("triton"))
    q, k, v = tensors()
    for wrong, match in (
        (lambda: flash_bias_attention(q, k[:, :, :1], v), "k must have shape"),
        (lambda: flash_bias_attention(q, k, v, dropout_p=2), "dropout_p"),
        (lambda: flash_bias_attention(q, k, v, torch.zeros(3, 3)), "does not fit"),
        (lambda: flash_bias_attention(q, k.half(), v), "share a dtype"),
        (lambda: flash_bias_attention(q, k, v, backend="fast"), "must be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            wrong()
    assert not telemetry.fallbacks() and not dispatch.breakers.by_signature


def test_errors_of_the_users_own_hooks_come_through(monkeypatch):
    only(monkeypatch, Faulty("triton"))
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v)
    q.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    assert not telemetry.fallbacks()


def test_recomputation_that_stops_early_is_no_failure():
    """torch stops a recomputation with an exception, raised inside whatever saves the last
    tensor."""
    q, k, v = tensors()
    out = checkpoint(flash_bias_attention, q, k, v, use_reentrant=False)
    out.sum().backward()
    assert not telemetry.fallbacks()
    assert not dispatch.breakers.failures()


# -- breakers --------------------------------------------------------------------------------------


def test_a_breaker_is_for_one_class_of_call(monkeypatch):
    backend = Raising(RuntimeError("no luck"))
    only(monkeypatch, backend)
    answer_of()
    answer_of()
    assert backend.tried == 1
    q, k, v = tensors(D=16)
    flash_bias_attention(q, k, v)
    assert backend.tried == 2
    text = str(flashbias_patch.status())
    assert "triton, cpu float32 D8 grad: RuntimeError: no luck  (x1)" in text
    inputs = dispatch.AttentionInputs(*tensors(), scale=0.3)
    assert dispatch.explain(inputs)["triton"] == ["RuntimeError: no luck"]


def test_a_backend_that_does_not_import_for_any_reason(monkeypatch, caplog):
    def broken(name):
        raise OSError("libcudart.so.11.0: cannot open shared object file")

    monkeypatch.setattr(selection.importlib, "import_module", broken)
    dispatch.reset()
    assert "libcudart" in dispatch.backend("flash").why_not(None)[0]
    assert dispatch.backend("flash") is dispatch.backend("flash")
    assert sum("libcudart" in r.message for r in caplog.records) == 1


def test_dropout_is_as_if_the_first_backend_had_never_run(monkeypatch):
    only(monkeypatch)
    torch.manual_seed(5)
    alone = answer_of(dropout_p=0.5)
    only(monkeypatch, Raising(RuntimeError("after drawing")))
    torch.manual_seed(5)
    assert torch.equal(answer_of(dropout_p=0.5), alone)
    assert telemetry.fallbacks()


def test_training_with_dropout_is_as_if_the_first_backend_had_never_run(patched, monkeypatch):
    only(monkeypatch)
    alone = train(patched, attn_drop=0.3)
    only(monkeypatch, Raising(RuntimeError("after drawing")))
    fallen = train(patched, attn_drop=0.3)
    assert fallen[0] == alone[0]
    assert all(torch.equal(a, b) for a, b in zip(alone[1].values(), fallen[1].values()))


def test_strict_raises_with_the_chain_of_reasons_every_time(monkeypatch):
    only(monkeypatch, Raising(RuntimeError("no luck")))
    monkeypatch.setenv("FLASHBIAS_STRICT", "1")
    settings.reload()
    for _ in range(2):
        with pytest.raises(dispatch.NoBackendError) as caught:
            answer_of()
        assert "triton: RuntimeError: no luck" in str(caught.value) and "reference" in str(
            caught.value
        )


def test_strict_raises_where_a_self_check_fails(monkeypatch):
    only(monkeypatch, Faulty("triton", Fault("wrong", lambda out: out * 1.1, True)))
    monkeypatch.setenv("FLASHBIAS_STRICT", "1")
    settings.reload()
    with pytest.raises(dispatch.NoBackendError, match="self-check failed"):
        answer_of()


def test_an_unsupported_pinned_backend_is_logged_once_and_others_run(monkeypatch, caplog):
    monkeypatch.setenv("FLASHBIAS_BACKEND", "upstream")
    settings.reload()
    answer_of()
    answer_of()
    assert (
        sum(
            "FLASHBIAS_BACKEND=upstream cannot take it (CUDA only" in r.message
            for r in caplog.records
        )
        == 1
    )
    with pytest.raises(dispatch.NoBackendError, match="CUDA only"):
        answer_of(backend="upstream")  # an argument means that one and no other
    monkeypatch.setenv("FLASHBIAS_STRICT", "1")
    settings.reload()
    with pytest.raises(dispatch.NoBackendError, match="CUDA only"):
        answer_of()


def test_a_backend_named_by_the_call_is_no_fallback(monkeypatch, caplog):
    monkeypatch.setenv("FLASHBIAS_BACKEND", "upstream")
    settings.reload()
    with caplog.at_level(logging.WARNING):
        flash_bias_attention(*tensors(), backend="reference")
    assert not telemetry.fallbacks() and not caplog.records


# -- checkpoints -----------------------------------------------------------------------------------


class Recording(Faulty):
    """Notes the queries it answers, so that forward and recomputation can be told to be one
    call."""

    def __init__(self, name, *args, **kwargs):
        super().__init__(name, *args, **kwargs)
        self.seen = []

    def __call__(self, inputs):
        out = super().__call__(inputs)
        if self.is_real(inputs):
            self.seen.append(inputs.q.detach().clone())
        return out


def owners(backends):
    """For every distinct query: who answered it, in order."""
    found = []
    for backend in backends:
        for query in backend.seen:
            entry = next((e for e in found if torch.equal(e[0], query)), None)
            if entry is None:
                found.append((query, [backend.name]))
            else:
                entry[1].append(backend.name)
    return [names for _, names in found]


@pytest.mark.parametrize("biased", (False, True))
@pytest.mark.parametrize("passing, layer", (("forward", 2), ("backward", 0)))
def test_recomputation_takes_the_backend_of_its_forward(
    patched, monkeypatch, passing, layer, biased
):
    boom = Fault("boom", lambda result: (_ for _ in ()).throw(RuntimeError("boom")))
    first, second = Recording("triton", boom, passing, layer), Recording("flash")
    only(monkeypatch, first, second)
    decoder = decoder_of(patched, with_cp=True)
    first.on_step(1)
    query = torch.randn(5, 1, 16, requires_grad=True)
    bias = LowRankBias(torch.ones(1, 5, 1, 1, requires_grad=True), torch.ones(1, 9, 1, 1))
    kwargs = {"attn_masks": [None, bias]} if biased else {}
    out = decoder(query=query, key=torch.randn(9, 1, 16), value=torch.randn(9, 1, 16), **kwargs)
    out.sum().backward()
    answered = owners([first, second])
    assert len(answered) == 2 * LAYERS and all(
        len(names) == 2 and len(set(names)) == 1 for names in answered
    ), answered
    assert {"boom" in f["reason"] for f in telemetry.fallbacks()} == {True}
    first.seen.clear(), second.seen.clear()
    decoder(query=query, key=torch.randn(9, 1, 16), value=torch.randn(9, 1, 16), **kwargs)
    if (
        passing == "backward" and not biased
    ):  # the next forward knows (self and cross are one class here)
        assert not first.seen and len(second.seen) == 2 * LAYERS


# -- under torch's own machinery -------------------------------------------------------------------


def test_a_traced_call_is_not_checked_and_leaves_no_verdict(monkeypatch):
    upstream = Faulty("upstream")
    only(monkeypatch, upstream)
    q, k, v = tensors(grad=False)
    traced = torch.jit.trace(lambda q: flash_bias_attention(q, k, v), q, check_trace=False)
    assert not upstream.answered and not telemetry.fallbacks()  # known to fail: not checked again
    assert all("sdpa" not in found for found in dispatch.breakers.by_signature.values())
    torch.testing.assert_close(traced(q), flash_bias_attention(q, k, v, backend="sdpa"))


class Kernel(Backend):
    """Cannot be recorded, and its limits cannot be read from the sizes that a trace sees."""

    name = "triton"

    def other_reasons(self, inputs):
        return [] if inputs.q.shape[1].bit_length() else ["no queries"]

    def __call__(self, inputs):
        raise AssertionError("a kernel is recorded")


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_holds_no_kernel(monkeypatch, grad, pinned):
    only(monkeypatch, Kernel())
    if pinned:
        monkeypatch.setenv("FLASHBIAS_BACKEND", "triton")
        settings.reload()
    q, k, v = tensors(grad=grad)
    attend = flash_bias_attention
    traced = torch.jit.trace(lambda q, k, v: attend(q, k, v), (q, k, v), check_trace=False)
    assert len(telemetry.fallbacks()) == pinned  # which says why sdpa is recorded
    torch.testing.assert_close(traced(2 * q, k, v), attend(2 * q, k, v, backend="sdpa"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_computes_what_the_call_does(backend, dtype, grad):
    q, k, v = tensors(grad=grad)

    def attend(q, k, v):
        return flash_bias_attention(q, k, v, dtype=dtype, backend=backend)

    traced = torch.jit.trace(attend, (q, k, v), check_trace=False)
    q, k, v = (2 * t.detach() for t in (q, k, v))
    tolerance = 1e-5 if dtype is torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(traced(q, k, v), attend(q, k, v), atol=tolerance, rtol=tolerance)
    assert not telemetry.fallbacks()


@since(2, 3, "symbolic sizes as this test makes them")
@pytest.mark.parametrize("feature", ("none", "padding", "low rank"))
def test_sizes_may_be_symbols(feature):
    """Neither a class of call nor a plan can be kept by them; a settled call of the same class
    changes nothing."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def attend(q, k, v, padding, a, b):
        given = {"key_padding_mask": padding} if feature == "padding" else {}
        return flash_bias_attention(
            q, k, v, LowRankBias(a, b) if feature == "low rank" else None, **given
        )

    def operands(B, M, N):
        g = torch.Generator().manual_seed(0)
        hidden = torch.zeros(B, N).masked_fill(torch.arange(N) > N - 3, -math.inf)
        q, k, v = tensors(M, N, B=B, grad=False)
        return (
            q,
            k,
            v,
            hidden,
            torch.randn(B, M, 2, 3, generator=g),
            torch.randn(B, N, 2, 3, generator=g),
        )

    for _ in range(3):
        attend(*operands(2, 6, 10))
    before = (
        dict(dispatch.breakers.plans),
        {key: dict(found) for key, found in dispatch.breakers.by_signature.items()},
    )
    graph = make_fx(attend, tracing_mode="symbolic")(*operands(2, 6, 10))
    assert before == (dispatch.breakers.plans, dispatch.breakers.by_signature)
    for sizes in ((2, 6, 10), (3, 5, 7)):
        given = operands(*sizes)
        torch.testing.assert_close(graph(*given), attend(*given))


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    q, k, v = tensors()
    a, b = torch.randn(1, 6, 1, 4, requires_grad=True), torch.randn(1, 10, 2, 4)

    def attend(a):
        return flash_bias_attention(q, k, v, LowRankBias(a, b))

    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(a)
    torch.testing.assert_close(out, attend(a))
    assert torch.autograd.grad(out.sum(), a)[0].isfinite().all()


def test_a_hook_that_fails_leaves_the_class_unpatched(installed, repository, monkeypatch, caplog):
    from flashbias_patch.patching import seams

    def broken(cls):
        raise RuntimeError("in a hook")

    monkeypatch.setattr(seams, "SEAMS", dict.fromkeys(seams.SEAMS, broken))
    losses = train(repository())[0]
    assert any("is left unpatched: RuntimeError: in a hook" in r.message for r in caplog.records)
    assert not telemetry.calls and all(math.isfinite(x) for x in losses)


def test_every_backend_failing_ends_in_the_original_class(patched, monkeypatch, caplog):
    unbroken = train(patched)[0]
    telemetry.reset()
    only(monkeypatch, Raising(RuntimeError("first")))
    for name in ("sdpa", "reference"):
        dispatch.loaded[name] = Raising(RuntimeError(f"{name} too"), name)
    with caplog.at_level(logging.INFO, "flashbias_patch"):
        assert train(patched)[0] == pytest.approx(unbroken, rel=2e-5)
    assert telemetry.calls["original"] > 0 and set(telemetry.calls) == {"original"}
    assert any("reference too" in r.message for r in caplog.records)


def test_a_breaker_opened_in_a_backward_pass_waits_for_the_next_forward():
    inputs = dispatch.AttentionInputs(*tensors(), scale=0.3)
    signature, seen = signature_of(inputs), []

    def fail(grad):
        dispatch.breakers.open(signature, "triton", "planted", Phase.BACKWARD)
        seen.append(dispatch.breakers.reason(signature, "triton"))

    leaf = torch.ones(2, requires_grad=True)
    out = 2 * leaf
    out.register_hook(fail)
    out.sum().backward()
    assert len(seen) == 1 and not seen[0]
    dispatch.attend(inputs)
    assert dispatch.breakers.reason(signature, "triton") == "backward: planted"


def test_settings_that_change_between_calls_count(monkeypatch):
    q, k, v = tensors(grad=False)
    for _ in range(2):
        flash_bias_attention(q, k, v)
    monkeypatch.setenv("FLASHBIAS_BACKEND", "reference")
    settings.reload()
    telemetry.calls.clear()
    flash_bias_attention(q, k, v)
    assert dict(telemetry.calls) == {"reference": 1}
