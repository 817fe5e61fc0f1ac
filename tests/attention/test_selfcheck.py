"""The self-check: what passes, what it catches, and that nobody notices it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from flashbias_patch.attention import dispatch, selfcheck, signature
from flashbias_patch.attention.breaker import TRUSTED
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.attention.reference_attention import scores
from tests.attention.recovery.fault_matrix import only
from tests.support.builders import FEATURES
from tests.support.builders import call_of_zeros as call
from tests.support.fake_backends import Fault, Faulty


def check(backend, inputs):
    return selfcheck.check(backend, signature.signature_of(inputs), inputs.rank)


class Twisted(Faulty):
    """Right, but for what `twist` does to the inputs of the computation."""

    def __init__(self, twist):
        super().__init__("triton")
        self.twist = twist

    def compute(self, inputs, seed=None):
        return super().compute(self.twist(inputs), seed)

    def __call__(self, inputs):
        return self.compute(inputs, int(torch.randint(1 << 31, ())) if inputs.dropout_p else None)


@pytest.mark.parametrize("name", ("sdpa", "reference"))
@pytest.mark.parametrize(
    "features", [(), *[(f,) for f in FEATURES], FEATURES, ("factors", "segments")], ids="+".join
)
@pytest.mark.parametrize("dropout_p", (0.0, 0.1))
def test_right_backends_pass(name, features, dropout_p):
    assert check(dispatch.backend(name), call(features, dropout_p=dropout_p)) is None


@pytest.mark.parametrize(
    "kwargs",
    (
        dict(dtype=torch.float64),
        dict(dtype=torch.float16),
        dict(dtype=torch.bfloat16),
        dict(Dv=5),
        dict(M=128, N=256),
        dict(grad=False),
        dict(scale=-1.0),
    ),
    ids=str,
)
def test_right_backends_pass_in_other_classes(kwargs):
    assert check(dispatch.backend("reference"), call(FEATURES, **kwargs)) is None
    if not dispatch.backend("sdpa").why_not(call(FEATURES, **kwargs)):
        assert check(dispatch.backend("sdpa"), call(FEATURES, **kwargs)) is None


def gradient_off(field):
    """Forward right, one gradient 10 % too large."""

    def twist(inputs):
        held = inputs.tensors()
        t = held[selfcheck.INDICES[field]]
        if not t.requires_grad:
            return inputs
        held[selfcheck.INDICES[field]] = (
            t * 1.1 - (t * 0.1).detach() if t.isfinite().all() else _finite_part(t)
        )
        return inputs.with_tensors(held)

    return twist


def _finite_part(t):
    finite = t.masked_fill(~t.isfinite(), 0.0)
    return torch.where(t.isfinite(), finite * 1.1 - (finite * 0.1).detach(), t)


@pytest.mark.parametrize("field", selfcheck.LEAVES)
def test_every_gradient_is_compared(field):
    found = check(Twisted(gradient_off(field)), call(("factors", "segments", "dense", "windows")))
    assert found and f"gradient of {field} is off by 0.1" in found and "37 x 63" in found


@pytest.mark.parametrize(
    "twist, where",
    (
        (lambda i: i._replace(q_factor=i.q_factor * 1.1), "output"),
        (lambda i: i._replace(scale=i.scale * 1.05), "output"),
        (lambda i: i._replace(mask=None), "output"),
        (lambda i: i._replace(windows=i.windows._replace(sides=(2, 2))), "output"),
        (lambda i: i._replace(windows=i.windows._replace(sigmas=None)), "output"),
        (
            lambda i: i._replace(
                window_mask=i.window_mask._replace(centres=i.window_mask.centres + 1)
            ),
            "output",
        ),
        (
            lambda i: i._replace(v=torch.cat([i.v[:, :-1], i.v[:, -1:] * float("nan")], 1)),
            "output is not finite",
        ),
    ),
)
def test_a_wrong_output_is_caught(twist, where):
    found = check(Twisted(twist), call(("factors", "mask", "windows", "window mask")))
    assert found.startswith(f"self-check failed: {where}")


class Forgetting(Faulty):
    """One float32 for a row's logsumexp, as flash-type kernels keep it: backward's weights are
    exp(score - lse)."""

    def compute(self, inputs, seed=None):
        s = scores(inputs)
        dead = s.detach().amax(-1, keepdim=True) == float("-inf")
        s = s.masked_fill(dead, 0.0)
        p = torch.exp(s - torch.logsumexp(s, -1, keepdim=True)).masked_fill(dead, 0.0)
        right = attend_dense(inputs).detach()
        out = (p @ inputs.v.to(p.dtype).transpose(1, 2)).transpose(1, 2)
        return right + out - out.detach()


@pytest.mark.parametrize(
    "features", [("dense",), ("padding",), ("dense", "padding", "mask")], ids="+".join
)
def test_a_logsumexp_without_digits_is_caught(features):
    assert check(Forgetting("triton"), call(())) is None
    found = check(Forgetting("triton"), call(features))
    assert found and "rows at the least finite number" in found


def test_infinite_segment_weights_are_caught():
    def multiplied(inputs):
        weights = inputs.segment_weights
        return inputs._replace(
            segment_weights=torch.where(weights == float("-inf"), weights * 0.0, weights)
        )

    found = check(Twisted(multiplied), call(("segments",)))
    assert found and "is not finite" in found and "least finite number" in found


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_one_segment_whose_gradient_is_zero_refuses_no_correct_backend(dtype):
    """Such a gradient is nothing but rounding, which differs with the order of a sum."""

    def in_another_order(inputs):
        return inputs._replace(q=inputs.q.flip(-1), k=inputs.k.flip(-1))

    inputs = call((), dtype=dtype)
    M, N = inputs.q.shape[1], inputs.k.shape[1]
    inputs = inputs._replace(
        segment_weights=torch.zeros(1, M, 1, 1, dtype=dtype, requires_grad=True),
        segment_lengths=(N,),
    )
    assert check(Twisted(in_another_order), inputs) is None


def test_a_gradient_that_is_wrong_by_itself_is_caught():
    """Of a library's kernels alone: where compiling costs seconds, each set of gradients would be
    compiled."""

    def alone(inputs):
        held = [name for name in ("q", "k", "v", "dense") if getattr(inputs, name).requires_grad]
        return gradient_off("dense")(inputs) if held == ["dense"] else inputs

    backend = Twisted(alone)
    assert check(backend, call(("dense",))) is None
    backend.compiled = True
    assert "gradient of dense alone is off by 0.1" in check(backend, call(("dense",)))


def test_a_library_is_checked_at_lengths_its_cuda_kernels_got_wrong():
    key = signature.signature_of(call(("dense",)))
    on_cuda = key._replace(device=torch.device("cuda"))
    problems = selfcheck.problems_of(on_cuda, True)
    assert any(problem.keys % 128 == 64 for problem in problems)
    assert any(problem.keys % 32 == 1 for problem in problems)
    assert any(problem.queries == 1 for problem in problems)
    assert len(selfcheck.problems_of(on_cuda, False)) == 3  # those would be compiled for
    for features in itertools.chain.from_iterable(
        itertools.combinations(FEATURES, n) for n in (1, 2)
    ):
        key = signature.signature_of(call(features))
        for M, N in selfcheck.LIBRARY:
            inputs = selfcheck.problem_of(key, 3, M, N, selfcheck.Terms.LOW)
            assert inputs.q.shape[1] == M and torch.isfinite(dispatch.backend("sdpa")(inputs)).all()


@pytest.mark.parametrize("lengths", selfcheck.LIBRARY)
def test_factors_reach_a_logsumexp_below_the_least_exponent(lengths):
    """exp() of a row's scores is zero in float32, as a bias of squared distances makes it."""
    key = signature.signature_of(call(("factors",)))
    inputs = selfcheck.problem_of(key, 3, *lengths, selfcheck.Terms.LOW)
    rows = scores(inputs)[:, :, -1]
    assert (rows.logsumexp(-1) < -100.0).all()


class Dropping(Faulty):
    """Right without dropout; with it, `keep` and `factor` of forward, and another seed in backward
    if `forgetful`."""

    def __init__(self, keep=0.7, factor=1 / 0.7, forgetful=False):
        super().__init__("triton")
        self.keep, self.factor, self.forgetful = keep, factor, forgetful

    def __call__(self, inputs):
        if not inputs.dropout_p:
            return self.compute(inputs)
        p = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", inputs.q, inputs.k) * inputs.scale, -1)
        kept = [torch.rand(p.shape) < self.keep for _ in range(2)]
        out = [torch.einsum("bhmn,bnhd->bmhd", p * k * self.factor, inputs.v) for k in kept]
        return out[0].detach() + out[1] - out[1].detach() if self.forgetful else out[0]


def test_dropout_is_checked_for_its_share_its_scale_and_its_backward():
    inputs = call((), dropout_p=0.1)
    assert check(Dropping(), inputs) is None
    assert "mean" in check(Dropping(factor=1.0), inputs)
    assert "wrong share" in check(Dropping(keep=1.0, factor=1.0), inputs)
    assert "what forward dropped" in check(Dropping(forgetful=True), inputs)


class OddIsWrong(Faulty):
    """As the published kernel on current Triton: right at whole tiles only."""

    def compute(self, inputs, seed=None):
        out = attend_dense(inputs)
        return out if inputs.k.shape[1] % 128 == 0 else out * 1.2


def test_lengths_that_are_whole_tiles_are_a_class_of_their_own(monkeypatch):
    backend = OddIsWrong("upstream")
    only(monkeypatch, backend)
    odd, whole = call(M=1490, N=2238), call(M=128, N=384)
    assert torch.equal(dispatch.attend(odd), torch.zeros_like(odd.q)) and not backend.answered
    (reason,) = dispatch.explain(odd)["upstream"]
    assert (
        "self-check failed: output is off by 0.2 where plain PyTorch is off by" in reason
        and "of 128" in reason
    )
    dispatch.attend(whole)
    assert dispatch.explain(whole)["upstream"] == []
    assert dispatch.breakers.verdicts(signature.signature_of(whole))["upstream"] is TRUSTED


def test_a_backend_is_checked_once_a_class(monkeypatch):
    checked = []
    real = selfcheck.check
    monkeypatch.setattr(
        selfcheck, "check", lambda b, *given: checked.append(b.name) or real(b, *given)
    )
    only(monkeypatch, Faulty("triton"))
    for _ in range(3):
        dispatch.attend(call())
    assert checked == ["triton"]
    dispatch.attend(call(("mask",)))
    dispatch.attend(call(R=4))
    dispatch.attend(call(R=4, grad=False))
    assert checked == ["triton"] * 4


def test_the_reference_is_not_checked(monkeypatch):
    monkeypatch.setattr(selfcheck, "check", None)
    dispatch.attend(call(), "reference")


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        Counting.calls += func is torch.softmax
        return func(*args, **(kwargs or {}))


def saved_elsewhere():
    def fail(tensor):
        raise AssertionError("the check's tensors reached the user's hook")

    return torch.autograd.graph.saved_tensors_hooks(fail, fail)


@pytest.mark.parametrize(
    "context",
    (
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        Counting,
        saved_elsewhere,
        lambda: torch.autograd.detect_anomaly(check_nan=True),
    ),
    ids=("no_grad", "inference_mode", "autocast", "function mode", "saved tensor hooks", "anomaly"),
)
def test_the_callers_context_does_not_matter(context):
    inputs, Counting.calls = call(FEATURES, dropout_p=0.1), 0
    key, sdpa = signature.signature_of(inputs), dispatch.backend("sdpa")
    with context():
        assert selfcheck.check(sdpa, key, inputs.rank) is None
        assert selfcheck.check(Twisted(gradient_off("k")), key, inputs.rank)
        slightly = Twisted(
            lambda i: i._replace(q=i.q * 1.002)
        )  # less than autocast would round off
        assert selfcheck.check(slightly, key, inputs.rank)
    assert Counting.calls == 0


def test_under_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        assert check(dispatch.backend("sdpa"), call(FEATURES)) is None
        assert "deterministic" in call().call_class()
    finally:
        torch.use_deterministic_algorithms(False)


def test_random_state_stays():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for dropout_p in (0.0, 0.2):
        check(dispatch.backend("sdpa"), call(dropout_p=dropout_p))
        check(dispatch.backend("reference"), call(dropout_p=dropout_p))
        assert torch.equal(torch.get_rng_state(), state)


def test_a_backend_that_rejects_the_problem_fails_the_check():
    class Shy(Faulty):
        def why_not(self, inputs):
            return ["lengths over 1000 only"] if inputs.q.shape[1] < 1000 else []

    assert "lengths over 1000 only" in check(Shy("triton"), call())


def test_exceptions_of_the_backend_come_through_and_are_a_reason(monkeypatch):
    def act(result):
        raise ValueError("no such tile")

    only(monkeypatch, Faulty("triton", Fault("x", act)))
    dispatch.attend(call())
    assert dispatch.explain(call())["triton"] == ["ValueError: no such tile"]


def test_classes_tell_apart_what_kernels_tell_apart():
    variants = [call(c) for n in range(3) for c in itertools.combinations(FEATURES, n)]
    variants += [
        call(D=8),
        call(dropout_p=0.1),
        call(grad=False),
        call(dtype=torch.float64),
        call(R=4),
        call(R=2),
        call(Dv=8),
        call(M=128, N=128),
        call(scale=-1.0),
    ]
    keys = {signature.signature_of(v) for v in variants}
    assert len(keys) == len(variants)
    assert (
        len({signature.signature_of(call(M=M, N=N)) for M, N in ((9, 14), (10, 14), (900, 1001))})
        == 1
    )
    assert call(D=8, R=5).call_class() == "cpu float32 D8 R8 grad"


@pytest.mark.parametrize("name", ("sdpa", "reference"))
def test_concurrent_checks_leave_the_default_generator_alone(name):
    import threading

    backend, start = dispatch.backend(name), threading.Barrier(5)
    calls = [
        call(features, dropout_p=0.2) for features in ((), ("mask",), ("dense",), ("padding",))
    ]
    drawn, found = [], []

    def work(inputs):
        start.wait()
        for _ in range(3):
            found.append(check(backend, inputs))

    threads = [threading.Thread(target=work, args=(inputs,)) for inputs in calls]
    for thread in threads:
        thread.start()
    torch.manual_seed(3)
    start.wait()
    while any(thread.is_alive() for thread in threads):
        drawn.append(torch.rand(()))
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert drawn and torch.equal(torch.stack(drawn), torch.stack([torch.rand(()) for _ in drawn]))
    assert torch.equal(torch.get_rng_state(), state)
    assert found == [None] * 12


def test_a_check_of_dropout_does_not_import_dynamo():
    """torch imports it to call a dispatch mode in which torch.compile compiles nothing; that takes
    longer than everything else in a first call."""
    script = (
        "import sys, torch\n"
        "from flashbias_patch import flash_bias_attention\n"
        "q = torch.randn(1, 8, 1, 8, requires_grad=True)\n"
        "flash_bias_attention(q, q, q, dropout_p=0.1).sum().backward()\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    environment = {**os.environ, "FLASHBIAS_BACKEND": "sdpa", "FLASHBIAS_PATCH": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stdout) == (0, "False\n")
