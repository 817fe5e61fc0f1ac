"""The guarded backward: nothing changes while nothing fails, and what happens when it does."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flashbias_patch import flash_bias_attention, settings, telemetry
from flashbias_patch.attention import dispatch, random_state
from flashbias_patch.attention.inputs import AttentionInputs
from flashbias_patch.attention.recovery import backward, guard
from flashbias_patch.attention.reference_attention import attend as attend_dense
from flashbias_patch.attention.selfcheck import problem_of
from flashbias_patch.attention.signature import signature_of
from flashbias_patch.bias import DenseBias, LowRankBias
from tests.attention.recovery.fault_matrix import only
from tests.support import internals
from tests.support.builders import FEATURES, tensors
from tests.support.builders import call_of_zeros as call
from tests.support.fake_backends import FAULTS, Fault, Faulty
from tests.support.small_training import LAYERS, decoder_of, train

OOM = next(f for f in FAULTS if f.name == "OOM").act
pytestmark = pytest.mark.skipif(
    not internals.tells_hooks(),
    reason="only torch 2.8 and later tell which saved-tensor hooks are in force",
)


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    monkeypatch.setattr(guard, "LARGE", 0)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, owner, out):
        ctx.owner = owner
        return out.clone()

    @staticmethod
    def backward(ctx, grad_out):
        ctx.owner.passes += 1
        if ctx.owner.errors:
            raise ctx.owner.errors.pop(0)
        return None, grad_out


class Plain(Faulty):
    """Plain PyTorch, twice differentiable; its backward raises `errors`, one a pass."""

    def __init__(self, *errors, name="flash"):
        super().__init__(name)
        self.errors, self.passes, self.asked = list(errors), 0, 0

    @staticmethod
    def is_real(inputs):
        return inputs.q.shape[0] == 1

    def __call__(self, inputs):
        out = attend_dense(inputs)
        if not self.is_real(inputs):
            return out
        self.asked += 1
        return Fails.apply(self, out) if self.errors or self.passes else out


def gradients(out, leaves):
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return torch.autograd.grad(out, leaves, g)


def is_guarded(out):
    return type(out.grad_fn).__name__ == "_GuardedBackward"


# -- while nothing fails ---------------------------------------------------------------------------


def test_large_calls_alone_are_guarded(monkeypatch):
    q, k, v = tensors()
    for least, expected in ((6 * 10 * 2, True), (6 * 10 * 2 + 1, False)):
        monkeypatch.setattr(guard, "LARGE", least)
        assert is_guarded(flash_bias_attention(q, k, v, backend="sdpa")) is expected
    monkeypatch.setattr(guard, "LARGE", 0)
    with torch.no_grad():
        assert not flash_bias_attention(q, k, v, backend="sdpa").requires_grad
    assert not flash_bias_attention(
        *(t.detach() for t in (q, k, v)), backend="sdpa", dropout_p=0.1
    ).requires_grad
    only(monkeypatch, Faulty("triton"))
    assert not is_guarded(flash_bias_attention(q, k, v))  # it guards itself


@pytest.mark.parametrize("name", ("sdpa", "reference"))
@pytest.mark.parametrize("features", [(), *((f,) for f in FEATURES), FEATURES], ids=str)
def test_guarding_changes_no_bit(monkeypatch, name, features):
    inputs = problem_of(signature_of(call(features)), 3, 37, 63)
    leaves = [t for t in inputs.tensors() if t is not None and t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(guard, "LARGE", least)
        out = dispatch.attend(inputs, name)
        assert is_guarded(out) is (least == 0 or name == "sdpa" and "dense" in features)
        found.append([out, *gradients(out, leaves)])
    for ours, bare in zip(*found):
        assert torch.equal(ours, bare) and ours.stride() == bare.stride()


def test_dropout_is_the_bare_backends(monkeypatch):
    q, k, v = tensors()
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(guard, "LARGE", least)
        torch.manual_seed(4)
        out = flash_bias_attention(q, k, v, dropout_p=0.4, backend="sdpa")
        found.append([out, *gradients(out, (q, k, v)), torch.rand(2)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_without_torchs_private_entry_points(monkeypatch):
    q, k, v = tensors()
    expected = gradients(flash_bias_attention(q, k, v, backend="sdpa"), (q, k, v))
    internals.without_private_entry_points(monkeypatch)
    out = flash_bias_attention(q, k, v, backend="sdpa")
    assert is_guarded(out) and all(
        torch.equal(*pair) for pair in zip(gradients(out, (q, k, v)), expected)
    )


def test_operands_made_of_one_another(monkeypatch):
    (x, *_), found = tensors(M=10), []
    for least in (0, 1 << 40):
        monkeypatch.setattr(guard, "LARGE", least)
        found += [
            *gradients(flash_bias_attention(x, x, x), [x]),
            *gradients(flash_bias_attention(x, x * 2, x), [x]),
        ]
    torch.testing.assert_close(found[:2], found[2:])


def test_twice_differentiable_as_the_backend_is(monkeypatch):
    only(monkeypatch, Plain())
    q, k, v = tensors(M=2, N=3, D=2, dtype=torch.float64)
    a = torch.randn(1, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    b = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, a, b):
        return flash_bias_attention(q, k, v, LowRankBias(a, b))

    assert is_guarded(attend(q, k, v, a, b))
    assert torch.autograd.gradcheck(attend, (q, k, v, a, b))
    assert torch.autograd.gradgradcheck(attend, (q, k, v, a, b))
    assert torch.autograd.gradgradcheck(
        lambda q: attend(q, q[:, :2].sum(1, True) * k, v, a, b), (q,)
    )


def test_a_retained_graph_can_be_used_again():
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v, backend="sdpa")
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    call = out.grad_fn.call
    assert call.graph is not None
    assert all(torch.equal(x, y) for x, y in zip(first, torch.autograd.grad(out.sum(), (q, k, v))))
    assert call.graph is None
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), (q, k, v))


def test_some_gradients_of_many():
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v, backend="sdpa")
    (one,) = torch.autograd.grad(out.sum(), k, retain_graph=True)
    assert torch.equal(one, torch.autograd.grad(out.sum(), (q, k, v))[1])


def test_what_forward_kept_is_let_go_in_backward(monkeypatch):
    """Not when the loss goes out of scope, a step later."""
    kept = []

    class Keeping(Plain):
        def __call__(self, inputs):
            out = super().__call__(inputs)
            if self.is_real(inputs):
                kept.append(weakref.ref(out))
            return out

    only(monkeypatch, Keeping())
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v)
    loss = out.sum()
    gc.collect()
    assert kept[0]() is not None
    loss.backward()
    gc.collect()
    assert kept[0]() is None and loss.grad_fn is not None


def test_an_operand_changed_in_place_is_noticed():
    q, k, v = tensors()
    changed = k * 1
    out = flash_bias_attention(q, changed, v, backend="sdpa")
    changed.add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.sum().backward()
    assert not telemetry.fallbacks()


def test_the_output_may_be_changed_in_place():
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v, backend="reference")
    out.mul_(2)
    expected = flash_bias_attention(q, k, v, backend="reference") * 2
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)))
    )


def test_transforms_and_forward_mode_use_the_unguarded_backend(monkeypatch):
    only(monkeypatch, Plain())
    q, k, v = (t.detach() for t in tensors())
    found = torch.func.vmap(lambda q: flash_bias_attention(q, k, v))(torch.stack([q, 2 * q]))
    torch.testing.assert_close(found[1], flash_bias_attention(2 * q, k, v))
    grad = torch.func.grad(lambda q: flash_bias_attention(q, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(
        grad, torch.autograd.grad(flash_bias_attention(leaf, k, v).sum(), leaf)[0]
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
        assert forward_ad.unpack_dual(flash_bias_attention(dual, k, v)).tangent is not None


def test_hooks_of_the_user_see_the_unguarded_backend():
    q, k, v = tensors()
    with torch.autograd.graph.save_on_cpu():
        out = flash_bias_attention(q, k, v, backend="sdpa")
    assert not is_guarded(out)
    out = checkpoint(
        lambda *a: flash_bias_attention(*a, backend="sdpa"), q, k, v, use_reentrant=False
    )
    expected = flash_bias_attention(q, k, v, backend="sdpa")
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)))
    )


# -- when it fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bias",
    (
        None,
        DenseBias(torch.randn(6, 10)),
        LowRankBias(torch.ones(1, 6, 1, 1, requires_grad=True), torch.randn(1, 10, 1, 1)),
    ),
    ids=("none", "dense", "low rank"),
)
def test_gradients_are_right_and_the_next_forward_asks_another(monkeypatch, bias):
    q, k, v = tensors()
    wanted = [q, k, v] + ([bias.q_factor] if isinstance(bias, LowRankBias) else [])
    expected = gradients(flash_bias_attention(q, k, v, bias, backend="reference"), wanted)
    telemetry.reset()
    backend = Plain(RuntimeError("CUDA error: invalid configuration argument"))
    only(monkeypatch, backend)
    torch.testing.assert_close(gradients(flash_bias_attention(q, k, v, bias), wanted), expected)
    (told,) = telemetry.fallbacks()
    assert (
        told["reason"].startswith("backward: RuntimeError: CUDA error")
        and told["source"] == "flash"
    )
    flash_bias_attention(q, k, v, bias)
    assert backend.asked == 1


def test_out_of_memory_opens_no_breaker_and_takes_small_chunks(monkeypatch):
    q, k, v = tensors()
    expected = gradients(flash_bias_attention(q, k, v, backend="reference"), (q, k, v))
    chunked, sizes = backward.chunked_attention, []
    chunks_of = chunked.chunks_of
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1 << 40)
    monkeypatch.setattr(
        chunked, "chunks_of", lambda call, size: sizes.append(size) or chunks_of(call, size)
    )
    backend = Plain(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    only(monkeypatch, backend)
    torch.testing.assert_close(gradients(flash_bias_attention(q, k, v), (q, k, v)), expected)
    assert sizes == [backward.LEAST_BYTES]
    flash_bias_attention(q, k, v)
    assert backend.asked == 2 and [f["reason"] for f in telemetry.fallbacks()] == [
        backward.IN_CHUNKS
    ]


def test_out_of_memory_for_good_says_what_would_help(monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0")

    only(monkeypatch, Plain(torch.cuda.OutOfMemoryError("CUDA out of memory")))
    monkeypatch.setattr(backward.chunked_attention, "gradients", full)
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="requested: 96.00 MiB"):
        out.sum().backward()


@pytest.mark.parametrize(
    "error", (RuntimeError("no luck"), torch.cuda.OutOfMemoryError("CUDA out of memory")), ids=repr
)
def test_with_dropout_the_same_backend_runs_once_more(monkeypatch, error):
    q, k, v = tensors()
    found = []
    for errors in ((), (error,)):
        backend = Plain(*errors)
        only(monkeypatch, backend)
        torch.manual_seed(9)
        out = flash_bias_attention(q, k, v, dropout_p=0.5)
        torch.rand(1)  # what others draw in between
        found.append([out, *gradients(out, (q, k, v)), torch.rand(3)])
    assert backend.asked == 2 and backend.passes == 2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_with_dropout_failing_twice_is_an_error(monkeypatch):
    only(monkeypatch, Plain(RuntimeError("no luck"), RuntimeError("again")))
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v, dropout_p=0.5)
    with pytest.raises(backward.DropoutLostError, match="flash failed twice .*RuntimeError: again"):
        out.sum().backward()
    short = torch.cuda.OutOfMemoryError("CUDA out of memory")
    only(monkeypatch, Plain(short, short))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="to try: with_cp=True"):
        flash_bias_attention(q, k, v, dropout_p=0.5).sum().backward()


def test_once_more_is_away_from_autocast_as_the_forward(monkeypatch):
    seen = []

    class Noting(Plain):
        def __call__(self, inputs):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(inputs)

    only(monkeypatch, Noting(RuntimeError("no luck")))
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_bias_attention(q, k, v, dropout_p=0.5)
    out.sum().backward()
    assert seen[-2:] == [False, False]


@pytest.mark.parametrize(
    "error",
    (KeyboardInterrupt(), RuntimeError("CUDA error: an illegal memory access was encountered")),
    ids=repr,
)
def test_what_is_not_survived_is_raised_as_it_is(monkeypatch, error):
    only(monkeypatch, Plain(error))
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v)
    with pytest.raises(type(error), match="illegal" if isinstance(error, RuntimeError) else None):
        out.sum().backward()
    assert not telemetry.fallbacks()


def test_strict_raises(monkeypatch):
    monkeypatch.setenv("FLASHBIAS_STRICT", "1")
    settings.reload()
    only(monkeypatch, Plain(RuntimeError("no luck")))
    q, k, v = tensors()
    out = flash_bias_attention(q, k, v)
    with pytest.raises(dispatch.NoBackendError, match="FLASHBIAS_STRICT: flash failed"):
        out.sum().backward()


# -- in checkpoints --------------------------------------------------------------------------------


class Counting(Faulty):
    """The fault strikes in call number `at` of the real ones."""

    def __init__(self, name, fault=None, at=-1):
        super().__init__(name)
        self.bang, self.at, self.count = fault, at, 0

    def __call__(self, inputs):
        if self.is_real(inputs):
            self.count += 1
            if self.count - 1 == self.at:
                self.bang(None)
        return super().__call__(inputs)


def loss_and_gradients(module, with_cp, biased, attn_drop=0.0):
    decoder = decoder_of(module, with_cp=with_cp, attn_drop=attn_drop)
    g = torch.Generator().manual_seed(2)
    query = torch.randn(5, 1, 16, generator=g).requires_grad_()
    memory = torch.randn(9, 1, 16, generator=g)
    factor = torch.ones(1, 5, 1, 1, requires_grad=True)
    bias = LowRankBias(factor, torch.randn(1, 9, 1, 1, generator=g)) if biased else None
    torch.manual_seed(7)
    out = decoder(query=query, key=memory, value=memory, attn_masks=[None, bias])
    out.square().mean().backward()
    return [
        out.detach(),
        query.grad,
        *([factor.grad] if biased else []),
        *(p.grad for p in decoder.parameters()),
    ]


@pytest.mark.parametrize("name", ("triton", "sdpa"))
@pytest.mark.parametrize("biased", (False, True), ids=("reentrant", "hooked"))
def test_a_checkpoint_recomputes_once(patched, monkeypatch, name, biased):
    plain = loss_and_gradients(patched, False, biased)
    backend = Counting(name)
    only(monkeypatch, backend)
    torch.testing.assert_close(loss_and_gradients(patched, True, biased), plain)
    assert backend.count == 2 * 2 * LAYERS and not telemetry.fallbacks()


@pytest.mark.parametrize("fault", ("RuntimeError", "OOM"))
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("biased", (False, True), ids=("reentrant", "hooked"))
@pytest.mark.parametrize("name", ("triton", "flash"))
def test_failing_in_forward_or_in_recomputation(patched, monkeypatch, name, biased, at, fault):
    """Calls 0 to 3 are forward, the rest recomputation."""
    only(monkeypatch, Counting(name))
    expected = loss_and_gradients(patched, True, biased)
    only(monkeypatch, Counting(name, next(f for f in FAULTS if f.name == fault).act, at))
    torch.testing.assert_close(
        loss_and_gradients(patched, True, biased), expected, rtol=1e-4, atol=1e-6
    )
    assert telemetry.fallbacks()


@pytest.mark.parametrize("biased", (False, True), ids=("reentrant", "hooked"))
@pytest.mark.parametrize("fault", ("RuntimeError", "OOM"))
def test_failing_in_recomputation_with_dropout(patched, monkeypatch, biased, fault):
    bang = next(f for f in FAULTS if f.name == fault).act
    only(monkeypatch, Counting("flash"))
    expected = loss_and_gradients(patched, True, biased, attn_drop=0.4)
    for at in (4, 6):
        backend = Counting("flash", bang, at)
        only(monkeypatch, backend)
        torch.testing.assert_close(
            loss_and_gradients(patched, True, biased, attn_drop=0.4), expected, rtol=0, atol=0
        )
        assert backend.count == 9 and "recomputation with dropout" in str(telemetry.fallbacks())


@pytest.mark.parametrize("biased", (False, True), ids=("reentrant", "hooked"))
@pytest.mark.parametrize("layer", range(4))
def test_failing_in_backward(patched, monkeypatch, biased, layer):
    only(monkeypatch, Faulty("flash"))
    expected = loss_and_gradients(patched, True, biased)
    backend = Faulty("flash", Fault("boom", FAULTS[3].act), "backward", layer)
    only(monkeypatch, backend)
    backend.on_step(1)
    torch.testing.assert_close(
        loss_and_gradients(patched, True, biased), expected, rtol=1e-4, atol=1e-6
    )
    assert telemetry.fallbacks()


def test_training_with_dropout_and_checkpoints_is_unchanged(patched, monkeypatch):
    only(monkeypatch)
    found = []
    for least in (0, 1 << 40):
        monkeypatch.setattr(guard, "LARGE", least)
        found.append(train(patched, attn_drop=0.3))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1].values(), found[1][1].values()))


def test_the_operands_come_back_in_their_places():
    inputs = call(FEATURES)
    made = guard.Call(None, "x", None, inputs, inputs.tensors(), None)
    again = made.inputs(made.operands(inputs))
    assert all(a is b for a, b in zip(again.tensors(), inputs.tensors())) and isinstance(
        again, AttentionInputs
    )
    assert again.static() == inputs.static() == made.static


def test_the_random_state_of_a_call_on_the_cpu_is_the_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: pytest.fail("looked at CUDA"))
    state = random_state.now(torch.device("cpu"))
    drawn = torch.rand(3)
    assert state.cuda is state.device is None
    random_state.restore(state)
    assert torch.equal(torch.rand(3), drawn)
