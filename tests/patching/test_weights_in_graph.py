"""Attention weights as a tensor in the graph: changed in place, hooked, differentiated twice, or
returned by a checkpoint, and then given to code that torch functions do not show."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.patching.test_attention_weights import calling, gradients_by_backward, keeping, kept
from tests.patching.test_inner_attention import M, N, outer, sequences
from tests.patching.test_weights_elsewhere import WAYS, Reversed, Squared
from tests.support.capabilities import REENTRANT, needs_compile, needs_transforms, since

from .test_parity import assert_equal

# Before, C++ code cannot ask for the values of a tensor that has none yet.
pytestmark = since(1, 11, "__torch_dispatch__")


@pytest.fixture(autouse=True)
def _installed(installed):
    pass


def compared(use, forward=None, leaves=()):
    """What `use` makes of the weights, and all gradients: patched as unpatched.

    use: the weights and the module's output -> a tensor.
    """
    cls, original = outer(forward or keeping(kept))
    torch.manual_seed(0)
    module, (query, key) = cls(), sequences()

    def run(call):
        out = call(query, key, key)
        used = use(module.kept, out)
        weight = torch.linspace(-1, 1, used.numel()).view(used.shape)
        total = (used * weight).sum() + out.square().mean()
        found = [used.detach().clone(), *gradients_by_backward(module, total, [query, key])]
        return [None if each is None else each.clone() for each in found]

    theirs = run(lambda *args: original(module, *args))
    ours = run(module)
    assert_equal(ours, theirs)


def changed(change, use):
    def way(w, out):
        change(w)
        return use(w)

    return way


def assigned(w):
    w[..., 1:3] = 0.25


def without_graph(w):
    with torch.no_grad():
        w.sum()


def scripted_in_place(w):
    torch.jit.script(_doubled)(w)


def _doubled(w):
    return w.mul_(2)


CHANGES = {
    "mul_": lambda w: w.mul_(3),
    "clamp_": lambda w: w.clamp_(max=0.2),
    "setitem": assigned,
    "detach_": lambda w: w.detach_(),
    "hook": lambda w: w.register_hook(lambda grad: 3 * grad),
    "read": lambda w: w.sum(),
    "read without graph": without_graph,
    "logged": lambda w: w.detach().numpy(),
    "logged, then changed": lambda w: (w.detach().numpy(), w.mul_(3)),
    "scripted": scripted_in_place,
    "two hooks": lambda w: (
        w.register_hook(lambda grad: 3 * grad),
        w.sum(),
        w.register_hook(lambda grad: grad - 1),
    ),
}
CHANGES["read, changed, hooked"] = lambda w: (
    without_graph(w),
    w.mul_(2),
    w.register_hook(lambda grad: 3 * grad),
)
CHANGES["given away, then hooked"] = lambda w: (
    Reversed.apply(w),
    w.register_hook(lambda grad: 3 * grad),
)
CHANGES["changed by way of float()"] = lambda w: w.float().mul_(2)
USES = {
    "torch": torch.square,
    "reversal": Reversed.apply,
    "function": Squared.apply,
    "reentrant checkpoint": lambda w: checkpoint(torch.square, w, **REENTRANT),
    "both": lambda w: Squared.apply(w) + w.exp(),
    "both, torch first": lambda w: w.exp() + Squared.apply(w),
}


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:None of the inputs"
)
@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("change", list(CHANGES))
def test_what_is_done_to_them_first_counts(change, use):
    compared(changed(CHANGES[change], USES[use]))


@calling
def returning(self, query, key, value, masks):
    out, self.kept = checkpoint(self.attn, query, key, value, **REENTRANT)
    return query + out


@calling
def nested(self, query, key, value, masks):
    def inner(query, key, value):
        return checkpoint(self.attn, query, key, value, **REENTRANT)

    out, self.kept = checkpoint(inner, query, key, value, **REENTRANT)
    return query + out


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:None of the inputs"
)
@pytest.mark.parametrize("forward", [returning, nested])
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=since(1, 11, "use_reentrant")) if way == "checkpoint" else way
        for way in WAYS
    ],
)
def test_those_that_a_reentrant_checkpoint_returns(way, forward):
    compared(lambda w, out: WAYS[way](w), forward)


@pytest.mark.parametrize("use", ["torch", "function"])
def test_those_of_a_checkpoint_with_a_learned_bias(use):
    """It is made non-reentrant."""
    cls, original = outer(checkpointed)
    module, (query, key) = cls(), sequences()
    bias = torch.randn(M, N).requires_grad_()

    def run(call):
        bias.grad = None
        out = call(query, key, key)
        total = USES[use](module.kept).square().sum() + out.square().mean()
        found = gradients_by_backward(module, total, [query, key])
        return [None if each is None else each.clone() for each in [*found, bias.grad]]

    module.mask = bias
    theirs = run(lambda *args: original(module, *args))
    module.mask = None
    assert_equal(run(lambda *args: module(*args, attention_bias=bias)), theirs)


@calling
def checkpointed(self, query, key, value, masks):
    def attention(query, key, value):
        return self.attn(query, key, value, attn_mask=self.mask)

    options = REENTRANT if self.mask is None else {"use_reentrant": False}
    out, self.kept = checkpoint(attention, query, key, value, **options)
    return query + out


@pytest.mark.parametrize("change", ["mul_", "hook", "read without graph"])
def test_those_of_a_reentrant_checkpoint_changed(change):
    compared(changed(CHANGES[change], USES["both"]), returning)


def test_a_second_backward_pass_through_a_reentrant_checkpoint():
    cls, original = outer(returning)
    module, (query, key) = cls(), sequences()

    def run(call):
        out = call(query, key, key)
        total = Squared.apply(module.kept).sum() + out.square().mean()
        query.grad = None
        total.backward(retain_graph=True)
        total.backward()
        return [query.grad.clone()]

    theirs = run(lambda *args: original(module, *args))
    assert_equal(run(module), theirs)


@pytest.mark.parametrize("reentrant", [pytest.param(False, marks=since(1, 11, "reentrant")), True])
def test_requires_grad_is_known_in_a_recomputation(reentrant):
    options = REENTRANT if reentrant else {"use_reentrant": False}

    @calling
    def forward(self, query, key, value, masks):
        def attention(query, key, value):
            out, weights = self.attn(query, key, value)
            if weights.requires_grad or not torch.is_grad_enabled():
                out = out + Squared.apply(weights).sum()
            return out

        self.kept = query
        return query + checkpoint(attention, query, key, value, **options)

    compared(lambda w, out: out, forward)


@pytest.mark.parametrize("use", ["torch", "function", "reversal", "both", "both, torch first"])
def test_gradients_of_the_weights_themselves(use):
    """GradCAM and its relatives: retain_grad, torch.autograd.grad, backward from the weights."""
    cls, original = outer(keeping(kept))
    module, (query, key) = cls(), sequences()

    def run(call):
        found = []
        call(query, key, key)
        module.kept.retain_grad()
        USES[use](module.kept).square().sum().backward()
        found.append(module.kept.grad)
        call(query, key, key)
        found += torch.autograd.grad(USES[use](module.kept).square().sum(), module.kept)
        call(query, key, key)
        found += torch.autograd.grad(module.kept, query, torch.ones(3, M, N))
        call(query, key, key)
        query.grad = None
        module.kept.backward(torch.linspace(-1, 1, 3 * M * N).view(3, M, N))
        found.append(query.grad)
        query.grad = None
        out = call(query, key, key)
        torch.autograd.backward([out, module.kept], [torch.ones_like(out), torch.ones(3, M, N)])
        found.append(query.grad)
        call(query, key, key)
        found += torch.autograd.grad(query.sum(), [module.kept, query], allow_unused=True)
        with pytest.raises(RuntimeError, match="not have been used in the graph"):
            torch.autograd.grad(query.sum(), module.kept)
        return [None if each is None else each.clone() for each in found]

    theirs = run(lambda *args: original(module, *args))
    assert_equal(run(module), theirs)


@pytest.mark.parametrize("use", ["reversal", "torch"])
def test_a_gradient_penalty(use):
    """Gradients of gradients: the reversal is linear, its second derivative is in the weights."""
    cls, original = outer(keeping(kept))
    module, (query, key) = cls(), sequences()

    def run(call):
        call(query, key, key)
        loss = (USES[use](module.kept) * torch.linspace(-1, 1, N)).sum()
        (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        return gradients_by_backward(module, gradient.square().sum() * 100, [query, key])

    theirs = run(lambda *args: original(module, *args))
    assert_equal(run(module), theirs)


@since(2, 0, "a forward mode for attention")
def test_forward_mode():
    from torch.autograd import forward_ad

    cls, original = outer(keeping(lambda self, out, weights: out))
    module, (query, key) = cls(), sequences()

    def run(call):
        with forward_ad.dual_level():
            return [forward_ad.unpack_dual(call(forward_ad.make_dual(query, query * 2), key, key))]

    theirs = run(lambda *args: original(module, *args))
    assert_equal(run(module)[0], theirs[0])


@needs_compile
@pytest.mark.parametrize("change", [None, "logged", "hook", "given away, then hooked", "mul_"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_a_compiled_function(backend, change):
    torch._dynamo.reset()

    def use(w):
        return (w * w).mean(0) + w[..., :2].sum()

    compiled = torch.compile(use, backend=backend)
    compared(changed(CHANGES[change] if change else (lambda w: None), compiled))
    compared(lambda w, out: compiled(w) + Squared.apply(w).sum())


@needs_compile
def test_calls_keep_the_references_of_dynamo():
    """torch 2.6 and 2.7 give away dynamo's callback, or None, each time they are asked for it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda w: (w * w).mean(0) + w[..., :2].sum(), backend="eager")
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    before = sys.getrefcount(None)  # from Python 3.12 on always the same
    for _ in range(1000):
        module(query, key, key)
    assert abs(sys.getrefcount(None) - before) < 500
    for _ in range(20):
        compiled(module.kept)


@pytest.mark.parametrize("change", [lambda w: w[0].mul_(2), lambda w: w[..., 0].zero_()])
def test_a_change_through_a_view_counts_or_is_an_error(change):
    """What a Function is given is known before its forward runs, and then it is too late."""
    compared(changed(change, torch.square))
    compared(changed(change, lambda w: Squared.apply(w.clone())))
    cls, _ = outer(keeping(kept))
    for use in ("function", "reversal", "reentrant checkpoint"):
        module, (query, key) = cls(), sequences()
        module(query, key, key)
        change(module.kept)
        with pytest.raises(RuntimeError, match=r"changed through a view, .* give it weights.clone"):
            USES[use](module.kept)


@needs_transforms
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("change", [None, "logged", "read"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_inside_a_transform(transform, change):
    def use(w):
        x = torch.linspace(-1, 1, w.numel()).view(w.shape)
        if transform == "vmap":
            return torch.func.vmap(lambda row: row * w[0])(x)
        if transform == "grad":
            return w.square() + torch.func.grad(lambda x: (x * w).square().sum())(x)
        return torch.func.jvp(lambda y: y.square() * w, (x,), (x,))[1]

    compared(changed(CHANGES[change] if change else (lambda w: None), use))


def test_the_gradient_that_was_kept_can_be_taken_back():
    cls, original = outer(keeping(kept))
    module, (query, key) = cls(), sequences()

    def run(call):
        call(query, key, key)
        w = module.kept
        w.retain_grad()
        Squared.apply(w).sum().backward(retain_graph=True)
        w.grad = None
        w.square().sum().backward()
        return [w.grad.clone()]

    theirs = run(lambda *args: original(module, *args))
    assert_equal(run(module), theirs)


@pytest.mark.parametrize("forward", [returning, nested])
def test_a_backward_pass_from_those_of_a_reentrant_checkpoint(forward):
    cls, original = outer(forward)
    module, (query, key) = cls(), sequences()

    def run(call):
        found = []
        for both in (False, True):
            query.grad = None
            out = call(query, key, key)
            gradient = torch.linspace(-1, 1, 3 * M * N).view(3, M, N)
            if both:
                torch.autograd.backward([out, module.kept], [torch.ones_like(out), gradient])
            else:
                module.kept.backward(gradient)
            found.append(query.grad.clone())
        return found

    theirs = run(lambda *args: original(module, *args))
    assert_equal(run(module), theirs)


def test_first_read_by_several_threads():
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            module(query, key, key)
            w = module.kept
            with ThreadPoolExecutor(4) as pool:
                values = list(pool.map(torch.square, [w] * 4))
            assert all(torch.equal(values[0], value) for value in values)
    finally:
        sys.setswitchinterval(before)


def test_methods_without_effect_return_the_weights():
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    module(query, key, key)
    w = module.kept
    assert w.float() is w and w.contiguous() is w and w.mul_(1) is w and w.requires_grad_() is w


def test_kept_weights_keep_nothing_else():
    """After the backward pass, weights that a module keeps do not hold what attention was given."""
    cls, _ = outer(keeping(kept))
    for use in (torch.square, lambda w: w.detach().sum()):
        module, (query, key) = cls(), sequences()
        query = query * 1
        reference = weakref.ref(query)
        out = module(query, key, key)
        (out.sum() + use(module.kept).sum()).backward()
        del out, query
        gc.collect()
        assert module.kept.shape and (use is not torch.square or reference() is None)


@since(2, 0, "resize_ of a storage")
def test_memory_that_was_freed_is_an_error():
    """FSDP frees parameters after a module's forward."""
    cls, _ = outer(keeping(kept))
    module, (query, key) = cls(), sequences()
    bias = torch.randn(M, N).requires_grad_()
    out = module(query, key, key, attention_bias=bias)
    size = bias.untyped_storage().size()
    bias.untyped_storage().resize_(0)
    assert module.kept.requires_grad and module.kept._base is None  # as FSDP asks of outputs
    with pytest.raises(RuntimeError, match="memory of attention_bias was freed"):
        module.kept.sum()
    bias.untyped_storage().resize_(size)
    out.sum().backward()
