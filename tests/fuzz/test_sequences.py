"""Sequences of calls, failures, transforms, threads and toggles: after each, an ordinary call is as
it was.

conftest resets all state around each test, so nothing that one call leaves for the next shows
elsewhere. Here nothing is reset between the steps of a sequence. After every step an ordinary call
must equal float64, within twice the error of plain PyTorch in the same precision, and use the first
backend of its order.

The first backend is a stand-in under the name "flash", so that failures can be injected into it.
FLASHBIAS_SEQUENCES=N runs N sequences in each test.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashbias_patch
from flashbias_patch import attention_bias, flash_bias_attention, telemetry
from flashbias_patch import settings as package_settings
from flashbias_patch.attention import dispatch, selection
from flashbias_patch.attention.backends.base import Backend
from flashbias_patch.attention.inputs import build
from flashbias_patch.attention.recovery import guard, replay
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.bias import DenseBias, LowRankBias, ModalityBias
from tests import stand_ins

PER_TEST = int(os.environ.get("FLASHBIAS_SEQUENCES", "0"))
STEPS = 12
B, M, N, H = 2, 3, 5, 2
ORDINARY, DOOMED = (
    8,
    4,
)  # head dims: of calls that never fail by themselves, and of those that are made to
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
FEATURES = ("none", "low rank", "modality", "dense", "mask", "padding")


class Mine(Exception):
    """An exception of the caller's code."""


class _Once(torch.autograd.Function):
    """attend_dense, which cannot be differentiated twice, as a fused kernel."""

    @staticmethod
    def forward(ctx, owner, static, *tensors):
        ctx.owner, ctx.static = owner, static
        ctx.save_for_backward(*tensors)
        owner.strike("forward", static.with_tensors(tensors))
        return attend_dense(static.with_tensors(tensors))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        tensors = [
            t.detach().requires_grad_(need) if t is not None and t.is_floating_point() else t
            for t, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2:])
        ]
        ctx.owner.strike("backward", ctx.static.with_tensors(tensors))
        asked = [t for t, need in zip(tensors, ctx.needs_input_grad[2:]) if need]
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            out = attend_dense(ctx.static.with_tensors(tensors))
            found = iter(torch.autograd.grad(out, asked, grad_out, allow_unused=True))
        return (None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:]))


class Flash(Backend):
    """Right, but for what is injected into calls of head dim DOOMED and of batch B."""

    name = "flash"

    def __init__(self):
        self.errors = {}  # phase -> (error, how often; -1: always)
        self.tried = 0

    def why_not(self, inputs):
        return ["dropout"] if inputs.dropout_p else []

    def __call__(self, inputs):
        return _Once.apply(self, inputs.static(), *inputs.tensors())

    def strike(self, phase, inputs):
        if inputs.q.shape[1] != M or inputs.q.shape[-1] != DOOMED:
            return
        self.tried += 1
        error, left = self.errors.get(phase, (None, 0))
        if left:
            self.errors[phase] = error, left - 1
            raise error


class PassingDispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class PassingFunction(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class FailingDispatch(TorchDispatchMode):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("aten.exp", "softmax", "attention")):
            raise self.error("in a mode")
        return func(*args, **(kwargs or {}))


def same(tensor):
    return tensor


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(same, same),
    "dispatch mode": PassingDispatch,
    "function mode": PassingFunction,
    "no grad": torch.no_grad,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(False),
}


class Problem:
    """One call in one dtype: operands, what float64 gives, and the error that plain PyTorch
    makes."""

    made = {}

    @classmethod
    def of(cls, feature, dtype, D):
        key = feature, dtype, D
        if key not in cls.made:
            with torch.enable_grad():
                cls.made[key] = cls(*key)
        return cls.made[key]

    def __init__(self, feature, dtype, D):
        g = torch.Generator().manual_seed(len(feature) * 100 + D)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.operands = draw(B, M, H, D), draw(B, N, H, D), draw(B, N, H, D)
        self.extra, self.masks = [], {}
        self.make_bias = lambda extra: None
        if feature == "low rank":
            self.extra, self.make_bias = (
                [draw(1, M, H, 2), draw(B, N, 1, 2)],
                lambda extra: LowRankBias(*extra),
            )
        elif feature == "modality":
            self.extra, self.make_bias = (
                [draw(B, M, 2)],
                lambda extra: ModalityBias(extra[0], (2, N - 2)),
            )
        elif feature == "dense":
            self.extra, self.make_bias = [draw(1, H, M, N)], lambda extra: DenseBias(extra[0])
        elif feature == "mask":
            self.masks["attn_mask"] = torch.rand(M, N, generator=g) < 0.3
        elif feature == "padding":
            self.masks["key_padding_mask"] = torch.arange(N) >= torch.tensor([[N], [N - 2]])
        self.grad = draw(B, M, H, D)
        self.exact = self.run(self.textbook, torch.float64)
        plain = self.run(self.textbook, dtype)
        # Twice what plain PyTorch errs by, and a rounding: in float64 the two cannot be told apart.
        rounding = torch.finfo(dtype).eps * (16 if dtype is torch.float64 else 2)
        self.bounds = [2 * self.error(a, e) + rounding for a, e in zip(plain, self.exact)]

    def textbook(self, q, k, v, bias):
        return attend_dense(build(q, k, v, bias, **self.masks))

    def ours(self, q, k, v, bias):
        return flash_bias_attention(q, k, v, bias, **self.masks)

    def leaves(self, dtype=None):
        return [
            t.detach().clone().to(dtype or t.dtype).requires_grad_()
            for t in (*self.operands, *self.extra)
        ]

    def run(self, attend, dtype=None, inside=None):
        """[output, gradients ...]; `inside` wraps the call."""
        leaves = self.leaves(dtype)

        def call(*leaves):
            return attend(*leaves[:3], self.make_bias(leaves[3:]))

        out = call(*leaves) if inside is None else inside(call, *leaves)
        out.backward(self.grad.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    @staticmethod
    def error(found, exact):
        return float((found.double() - exact).norm() / (exact.norm() + 1e-30))

    def check(self, found):
        for place, (ours, exact, bound) in enumerate(zip(found, self.exact, self.bounds)):
            error = self.error(ours, exact)
            assert error <= bound, (
                f"{'output' if not place else f'gradient {place}'} is off by {error}, bound {bound}"
            )


class Sequences(RuleBasedStateMachine):
    """`open_contexts` stay open over several steps."""

    cls = original = None  # the patched class and its forward before; set by the test

    def __init__(self):
        super().__init__()
        self.flash = dispatch.loaded["flash"]
        self.open_contexts = []
        self.environment = {}
        self.restore()

    # -- state -------------------------------------------------------------------------------------

    def restore(self):
        self.flash.errors.clear()
        for key, name, _ in dispatch.breakers.failures():
            del dispatch.breakers.verdicts(key)[name]
        self.environment.clear()
        package_settings.reload(self.environment)
        guard.LARGE = 1 << 25
        flashbias_patch.uninstall()

    def teardown(self):
        while self.open_contexts:
            self.open_contexts.pop()[1].__exit__(None, None, None)
        self.restore()

    def is_open(self, *kinds):
        return any(kind in kinds for kind, _ in self.open_contexts)

    @property
    def backend(self):
        return self.environment.get("FLASHBIAS_BACKEND", "flash")

    @property
    def strict(self):
        return "FLASHBIAS_STRICT" in self.environment

    def first(self, dtype=torch.float32):
        """The backend that an ordinary call of that dtype must use."""
        return "reference" if self.backend == "sdpa" and dtype is torch.bfloat16 else self.backend

    def injectable(self):
        return self.backend == "flash" and not self.strict

    # -- toggles -----------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(sorted(CONTEXTS)))
    def open_context(self, kind):
        if not self.is_open(kind):
            context = CONTEXTS[kind]()
            context.__enter__()
            self.open_contexts.append((kind, context))

    @precondition(lambda self: self.open_contexts)
    @rule()
    def close_context(self):
        self.open_contexts.pop()[1].__exit__(None, None, None)

    @rule(
        name=st.sampled_from(("flash", "sdpa", "reference")),
        strict=st.sampled_from((False, False, True)),
    )
    def set_environment(self, name, strict):
        self.environment.clear()
        if name != "flash":
            self.environment["FLASHBIAS_BACKEND"] = name
        if strict and name != "sdpa":  # which takes no bfloat16 here
            self.environment["FLASHBIAS_STRICT"] = "1"
        package_settings.reload(self.environment)

    @rule(on=st.booleans())
    def install(self, on):
        (flashbias_patch.install if on else flashbias_patch.uninstall)()

    @rule(always=st.booleans())
    def guarding(self, always):
        guard.LARGE = 0 if always else 1 << 25

    @rule(on=st.booleans())
    def deterministic_algorithms(self, on):
        torch.use_deterministic_algorithms(on)

    # -- calls -------------------------------------------------------------------------------------

    @rule(
        feature=st.sampled_from(FEATURES),
        dtype=st.sampled_from(sorted(DTYPES)),
        D=st.sampled_from((ORDINARY, DOOMED)),
    )
    def call(self, feature, dtype, D):
        self.flash.errors.clear()
        problem = Problem.of(feature, DTYPES[dtype], D)
        if self.strict and any(name == "flash" for _, name, _ in dispatch.breakers.failures()):
            return
        with torch.enable_grad():
            problem.check(problem.run(problem.ours))

    @rule(feature=st.sampled_from(FEATURES), reentrant=st.booleans())
    def checkpointed(self, feature, reentrant):
        problem = Problem.of(feature, torch.float32, ORDINARY)
        with torch.enable_grad():
            problem.check(problem.run(problem.ours, inside=lambda call, *leaves: checkpoint(
                call, *leaves, use_reentrant=reentrant)))  # fmt: skip

    @rule()
    def evaluation(self):
        problem = Problem.of("low rank", torch.float32, ORDINARY)
        with torch.inference_mode():
            out = problem.ours(*problem.operands, problem.make_bias(problem.extra))
        assert problem.error(out, problem.exact[0]) <= problem.bounds[0]

    @rule(p=st.sampled_from((0.2, 0.6)))
    def dropout(self, p):
        problem = Problem.of("none", torch.float32, ORDINARY)
        if self.strict:
            return
        found = []
        for _ in range(2):
            torch.manual_seed(7)
            with torch.enable_grad():
                found.append(
                    problem.run(lambda q, k, v, bias: flash_bias_attention(q, k, v, dropout_p=p))
                )
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found))

    @precondition(lambda self: flashbias_patch.status()["installed"])
    @rule(
        learned=st.booleans(),
        kind=st.sampled_from(("none", "reentrant", "hooks")),
        training=st.booleans(),
    )
    def patched_module(self, learned, kind, training):
        if self.strict:
            return
        torch.manual_seed(1)
        module = self.cls(16, 2).train(training)
        x, memory = torch.randn(M, B, 16), torch.randn(N, B, 16)
        bias = torch.randn(M, N, requires_grad=True)
        grad = torch.randn(M, B, 16)

        def run(forward, module, convert, through):
            inner, outer = convert(x).requires_grad_(), convert(memory).requires_grad_()
            bias.grad = None
            for parameter in module.parameters():
                parameter.grad = None

            def call(inner, outer):
                return forward(module, inner, outer, outer)

            with torch.enable_grad(), through():
                if kind == "none":
                    out = call(inner, outer)
                else:
                    out = checkpoint(call, inner, outer, use_reentrant=kind == "reentrant")
                out.backward(convert(grad).to(out.dtype))
            return [out.detach(), inner.grad, outer.grad, *([bias.grad] if learned else [])]

        def with_mask(module, inner, outer, value):
            return self.original(
                module, inner, outer, value, attn_mask=bias.to(inner.dtype) if learned else None
            )

        ambient = (lambda: attention_bias(bias, kind="all")) if learned else contextlib.nullcontext
        ours = run(self.cls.forward, module, torch.Tensor.clone, ambient)
        with torch.autocast("cpu", enabled=False):
            exact = run(
                with_mask,
                copy.deepcopy(module).double(),
                torch.Tensor.double,
                contextlib.nullcontext,
            )
        plain = run(with_mask, module, torch.Tensor.clone, contextlib.nullcontext)
        for one, other, right in zip(ours, plain, exact):
            assert Problem.error(one, right) <= 2 * Problem.error(other, right) + 2e-6

    # -- transforms --------------------------------------------------------------------------------

    @precondition(lambda self: not self.is_open("hooks"))
    @rule(
        name=st.sampled_from(("grad", "vmap", "jvp", "jacrev", "hessian")),
        feature=st.sampled_from(FEATURES),
    )
    def transform(self, name, feature):
        problem = Problem.of(feature, torch.float64, ORDINARY)
        q, k, v = (t[:1, :2] for t in problem.operands)
        ours, exact = ((lambda x, f=f: f(x, k, v, None)) for f in (flash_attend, dense_attend))
        with torch.enable_grad():
            one, other = (TRANSFORMS[name](f, q) for f in (ours, exact))
        torch.testing.assert_close(one, other)

    @precondition(lambda self: not self.is_open("hooks"))
    @rule(feature=st.sampled_from(FEATURES))
    def double_backward(self, feature):
        problem = Problem.of(feature, torch.float64, ORDINARY)
        found = []
        with torch.enable_grad():
            for attend in (problem.ours, problem.textbook):
                leaves = problem.leaves()
                out = attend(*leaves[:3], problem.make_bias(leaves[3:]))
                first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
                found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)

    @rule()
    def batch_of_gradients(self):
        problem = Problem.of("low rank", torch.float64, ORDINARY)
        if self.is_open("hooks", "dispatch mode") or guard.LARGE == 0 or self.backend == "flash":
            return  # the stand-in has no rule for batches
        grads = torch.stack([problem.grad, problem.grad * 2])
        found = []
        with torch.enable_grad():
            for attend in (problem.ours, problem.textbook):
                leaves = problem.leaves()
                out = attend(*leaves[:3], problem.make_bias(leaves[3:]))
                found.append(torch.autograd.grad(out, leaves, grads, is_grads_batched=True))
        for one, other in zip(*found):
            torch.testing.assert_close(one, other)

    # -- failures of the caller --------------------------------------------------------------------

    @rule(
        error=st.sampled_from((Mine, TimeoutError, AssertionError, KeyboardInterrupt)),
        grad=st.booleans(),
    )
    def mode_fails(self, error, grad):
        problem = Problem.of("dense", torch.float32, ORDINARY)
        with pytest.raises(error), torch.set_grad_enabled(grad), FailingDispatch(error):
            problem.ours(*problem.leaves()[:3], None)

    @rule()
    def hook_fails(self):
        problem = Problem.of("none", torch.float32, ORDINARY)

        def pack(tensor):
            raise Mine("disk full")

        with pytest.raises(Mine), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(
            pack, same
        ):
            problem.run(problem.ours)

    @rule()
    def gradient_hook_fails(self):
        problem = Problem.of("none", torch.float32, ORDINARY)

        def hook(grad):
            raise Mine("not finite")

        with torch.enable_grad(), pytest.raises(Mine):
            leaves = problem.leaves()
            leaves[1].register_hook(hook)
            problem.ours(*leaves, None).sum().backward()

    @rule()
    def inference_tensors(self):
        problem = Problem.of("none", torch.float32, ORDINARY)
        with torch.inference_mode():
            k = problem.operands[1].clone()
        with torch.enable_grad(), pytest.raises(RuntimeError, match="Inference tensors"):
            problem.ours(problem.leaves()[0], k, k, None)

    @rule()
    def a_mistake(self):
        q, k, v = Problem.of("none", torch.float32, ORDINARY).operands
        with pytest.raises(ValueError, match="k must have shape"):
            flash_bias_attention(q, k[:, :, :1], v)

    # -- failures of the backend -------------------------------------------------------------------

    @precondition(injectable)
    @rule(phase=st.sampled_from(("forward", "backward")), count=st.sampled_from((1, -1)),
          feature=st.sampled_from(FEATURES), memory=st.booleans())  # fmt: skip
    def backend_fails(self, phase, count, feature, memory):
        """It is out for that class of call, or, if memory ran out, for this call only; the result
        is right."""
        if phase == "backward" and (guard.LARGE or self.is_open("hooks")):
            return  # not guarded
        problem = Problem.of(feature, torch.float32, DOOMED)
        error = RuntimeError(
            "CUDA out of memory" if memory else "CUDA error: invalid configuration argument"
        )
        before = len(dispatch.breakers.failures())
        with torch.enable_grad():
            tried = self.flash.tried
            problem.check(problem.run(problem.ours))
            used = self.flash.tried > tried
            self.flash.errors[phase] = error, count
            problem.check(problem.run(problem.ours))
            self.flash.errors.clear()
            problem.check(problem.run(problem.ours))
        transient = count == 1 and self.is_open(
            "dispatch mode", "function mode"
        )  # then it may be the mode's doing
        assert len(dispatch.breakers.failures()) - before == (used and not memory and not transient)

    # -- threads -----------------------------------------------------------------------------------

    @rule(failing=st.booleans())
    def threads(self, failing):
        problem = Problem.of("low rank", torch.float32, ORDINARY)
        errors = []

        def work(fails):
            try:
                for _ in range(2):
                    if fails:
                        with contextlib.suppress(Mine), FailingDispatch(Mine):
                            problem.ours(*problem.leaves()[:3], None)
                    else:
                        problem.check(problem.run(problem.ours))
            except BaseException as error:
                errors.append(error)

        workers = [
            threading.Thread(target=work, args=(failing and place == 0,)) for place in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors, errors

    # -- what must hold after every step -----------------------------------------------------------

    @invariant()
    def ordinary_calls_are_as_they_were(self):
        problem = Problem.of("none", torch.float32, ORDINARY)
        counted, state = telemetry.calls.copy(), torch.get_rng_state()
        with torch.enable_grad():
            problem.check(problem.run(problem.ours))
        used = telemetry.calls - counted
        assert dict(used) == {self.first(): 1}, f"{dict(used)} where {self.first()} comes first"
        assert torch.equal(torch.get_rng_state(), state)
        assert all(f.signature.head_dim == DOOMED for f in dispatch.breakers.failures())
        assert (
            replay.recomputing() is False and torch._C._functorch.peek_interpreter_stack() is None
        )


def flash_attend(q, k, v, bias):
    return flash_bias_attention(q, k, v, bias)


def dense_attend(q, k, v, bias):
    return attend_dense(build(q, k, v, bias))


TRANSFORMS = {
    "grad": lambda f, q: torch.func.grad(lambda x: f(x).sin().sum())(q),
    "vmap": lambda f, q: torch.func.vmap(f)(torch.stack([q, 2 * q])),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q.cos(),))[1],
    "jacrev": lambda f, q: torch.func.jacrev(f)(q),
    "hessian": lambda f, q: torch.func.hessian(lambda x: f(x).sin().sum())(q),
}


@pytest.fixture(scope="module")
def attention_class():
    with stand_ins.repository("petr") as load:
        cls = load(f"{stand_ins.UTILS}.petr_transformer").PETRMultiheadAttention
        yield cls, cls.forward


@pytest.fixture
def prepared(attention_class, monkeypatch):
    places = {
        name: place for name, place in selection.MODULES.items() if name in ("sdpa", "reference")
    }
    monkeypatch.setattr(selection, "MODULES", {"flash": "none", **places})
    monkeypatch.setattr(guard, "LARGE", guard.LARGE)
    dispatch.reset()
    dispatch.loaded["flash"] = Flash()
    monkeypatch.setattr(Sequences, "cls", attention_class[0])
    monkeypatch.setattr(Sequences, "original", staticmethod(attention_class[1]))
    yield
    torch.use_deterministic_algorithms(False)


def run(number, sequences):
    class Seeded(Sequences):
        pass

    run_state_machine_as_test(seed(number)(Seeded), settings=settings(
        max_examples=PER_TEST or sequences, stateful_step_count=STEPS, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    ))  # fmt: skip


def test_sequences(prepared):
    run(0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 13))
def test_many_sequences(prepared, number):
    run(number, 100)
