"""A bias as a tensor: what it survives as a description, equal to the dense tensor in values and
gradients."""

from __future__ import annotations

import copy
import io
import logging
import math
import operator
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpoints
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashbias_patch import flash_bias_attention
from flashbias_patch.attention import dispatch, inputs
from flashbias_patch.bias import (
    BiasTensor,
    DenseBias,
    Grid,
    LowRankBias,
    ModalityBias,
    WindowBias,
    WindowMask,
    described,
)
from flashbias_patch.bias.tensor import core as tensor
from tests.support import internals
from tests.support.capabilities import (
    REENTRANT,
    RELEASE,
    needs_autocast,
    needs_compile,
    needs_transforms,
    since,
)

B, M, H, N = 2, 5, 2, 12 + 12
FRAMES = (Grid(3, 4), Grid(2, 3, 2))
F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def centres(seed=0, batch=B, queries=M):
    g = generator(seed)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.randint(0, n, (batch, queries), generator=g)
                    for n in (f.views, f.rows, f.columns)
                ],
                -1,
            )
            for f in FRAMES
        ],
        2,
    )


class Made:
    """Weights and a scale, the bias of them, and the same dense."""

    def __init__(self, kind="window", batch=B, seed=0, dtype=F64):
        g = generator(seed)
        self.weights = torch.randn(batch, M, 2, generator=g, dtype=dtype).requires_grad_()
        self.scale = torch.tensor([1.5], dtype=dtype, requires_grad=True)
        self.mask = torch.rand(M, N, generator=g) < 0.2
        self.masks = torch.randn(B * H, M, N, generator=g, dtype=dtype)
        make = {
            "window": lambda: WindowBias(self.weights, centres(seed, batch), FRAMES, 3),
            "gauss": lambda: WindowBias(
                self.weights, centres(seed, batch), FRAMES, (3, 4), sigma=1.0
            ),
            "modality": lambda: ModalityBias(self.weights, (12, 12)),
            "low rank": lambda: LowRankBias(
                self.weights[:, :, None], torch.randn(1, N, 1, 2, generator=g, dtype=dtype)
            ),
            "dense": lambda: DenseBias(
                self.weights[..., :1] * torch.randn(1, 1, N, generator=g, dtype=dtype)
            ),
        }
        self.bias = make[kind]()
        self.tensor = described(self.bias)
        self.dense = self.bias.dense()[:, 0].clone()

    @property
    def leaves(self):
        return self.weights, self.scale


# What code does with a bias on its way, and whether windows stay a description.
STEPS = {
    "there and back": (lambda t, m: t.transpose(0, 1).contiguous().transpose(1, 0), True),
    "heads": (lambda t, m: t.unsqueeze(1).expand(-1, H, -1, -1).reshape(B * H, M, N), True),
    "heads by repeat": (lambda t, m: t[:, None].repeat(1, H, 1, 1).view(B * H, M, N), True),
    "heads by interleave": (lambda t, m: t.repeat_interleave(H, dim=0), True),
    "heads kept": (lambda t, m: torch.unsqueeze(t, 1).expand(B, H, M, N), True),
    "flatten": (lambda t, m: t.unsqueeze(1).expand(B, H, M, N).flatten(0, 1), True),
    "unflatten": (lambda t, m: t.repeat_interleave(H, 0).unflatten(0, (B, H)), True),
    "permute": (lambda t, m: t.permute(1, 0, 2).permute(1, 0, 2), True),
    "squeeze": (lambda t, m: t[:, None].squeeze(1), True),
    "scale": (lambda t, m: t * m.scale, True),
    "number": (lambda t, m: 0.5 * t / 3, True),
    "each query": (lambda t, m: t * m.weights[..., :1], True),
    "each head": (
        lambda t, m: t[:, None] * torch.arange(1.0, H + 1, dtype=F64)[:, None, None],
        True,
    ),
    "negative": (lambda t, m: -t, True),
    "clamp": (lambda t, m: torch.clamp(t, -0.5, 0.7), True),
    "clamp from below": (lambda t, m: t.clamp_min(-0.3), True),
    "clamp that moves zero": (lambda t, m: t.clamp(min=0.1), False),
    "mask": (lambda t, m: t.repeat_interleave(H, 0) + m.masks, True),
    "mask for all": (lambda t, m: t + m.masks[0], True),
    "mask first": (lambda t, m: m.masks[:1] + t, True),
    "hidden": (lambda t, m: t.masked_fill(m.mask, float("-inf")), True),
    "hidden and scaled": (lambda t, m: t.masked_fill(m.mask, float("-inf")) * 2.0, True),
    "hidden and turned": (
        lambda t, m: t.masked_fill(m.mask, float("-inf")).clamp(-9.0, 9.0),
        False,
    ),
    "filled": (lambda t, m: t.masked_fill(m.mask, -1.0), False),
    "batch": (lambda t, m: t[1:], True),
    "one of the batch": (lambda t, m: t[1], True),
    "queries": (lambda t, m: t[:, 1:4], True),
    "every other query": (lambda t, m: t[:, ::2], True),
    "listed queries": (lambda t, m: t[:, torch.tensor([3, 0, 3])], True),
    "chosen queries": (lambda t, m: t[:, torch.tensor([True, False, True, True, False])], True),
    "index_select": (lambda t, m: t.index_select(1, torch.tensor([4, 2])), True),
    "narrow": (lambda t, m: torch.narrow(t, 1, 1, 2), True),
    "keys": (lambda t, m: t[..., 3:], False),
    "denoising": (lambda t, m: torch.cat([torch.zeros(B, 3, N, dtype=F64), t], 1), True),
    "denoising after": (lambda t, m: torch.cat((t, t.new_zeros(B, 1, N)), dim=1), True),
    "denoising by pad": (lambda t, m: F.pad(t, (0, 0, 3, 1)), True),
    "cat with something": (lambda t, m: torch.cat([torch.ones(B, 3, N, dtype=F64), t], 1), False),
    "double": (lambda t, m: t.float().double(), True),
    "to": (lambda t, m: t.to(torch.float32).to("cpu").type(torch.float64), True),
    "sum": (lambda t, m: t + t, True),
    "difference": (lambda t, m: t - 0.5 * t, True),
    "offset": (lambda t, m: t + 1.0, False),
    "square": (lambda t, m: t * t, False),
    "sigmoid": (lambda t, m: t.sigmoid(), False),
    "clone": (lambda t, m: t.clone(), True),
    "negative by keyword": (lambda t, m: torch.neg(input=t), True),
    "clamp by keyword": (lambda t, m: torch.clamp(max=0.7, input=t, min=-0.5), True),
    "denoising by keyword": (
        lambda t, m: torch.cat(dim=1, tensors=[torch.zeros(B, 3, N, dtype=F64), t]),
        True,
    ),
    "hidden by keyword": (lambda t, m: torch.masked_fill(input=t, mask=m.mask, value=-1.0), False),
    "where by keyword": (
        lambda t, m: torch.where(condition=m.mask, input=t, other=torch.zeros((), dtype=F64)),
        None,
    ),
    "in place": (
        lambda t, m: t.clone().transpose(0, 1).clone().mul_(m.scale).transpose(0, 1),
        None,
    ),
}
EXACT = dict(rtol=1e-6, atol=1e-7)  # some steps go through float32


def numbers(value):
    return value.numbers() if type(value) is BiasTensor else value


@pytest.mark.parametrize("kind", ("window", "gauss", "modality", "low rank", "dense"))
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_the_dense_one(kind, step):
    made, (function, stays) = Made(kind), STEPS[step]
    found, exact = function(made.tensor, made), function(made.dense, made)
    if kind == "window" and stays is not None:
        assert (type(found) is BiasTensor and internals.description_of(found) is not None) is stays
    assert (
        found.shape == exact.shape
        and found.dtype == exact.dtype
        and found.requires_grad == exact.requires_grad
    )
    if (
        type(found) is BiasTensor and internals.description_of(found) is not None
    ):  # what it says it is, not only what it replays
        bias = internals.description_of(found)
        again = tensor.new(bias, internals.layout_of(found), found.dtype)
        torch.testing.assert_close(again.numbers(), exact, **EXACT)
    torch.testing.assert_close(numbers(found), exact, **EXACT)
    finite = exact.isfinite()
    ours = torch.autograd.grad(
        numbers(found)[finite].sum(), made.leaves, retain_graph=True, allow_unused=True
    )
    truth = torch.autograd.grad(exact[finite].sum(), made.leaves, allow_unused=True)
    for mine, true in zip(ours, truth):
        assert (mine is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(mine, true, **EXACT)


def attend(mask, queries=M, batch=B, seed=1, **more):
    g = generator(seed)
    q, k, v = (
        torch.randn(batch, length, H, 4, generator=g, dtype=F64) for length in (queries, N, N)
    )
    return flash_bias_attention(q, k, v, attn_mask=mask, backend="reference", **more)


CHAINS = {
    "as the repositories do": lambda t, m: (
        (t * m.scale.clamp(0.5, 5.0))
        .clamp(-5, 5)
        .transpose(0, 1)
        .transpose(0, 1)
        .unsqueeze(1)
        .expand(-1, H, -1, -1)
        .reshape(B * H, M, N)
        + m.masks
    ),
    "length first": lambda t, m: (m.scale * t).transpose(0, 1),
    "one for all": lambda t, m: t[0],
    "hidden": lambda t, m: t.masked_fill(m.mask[None], -math.inf).repeat_interleave(H, 0),
    "four": lambda t, m: t[:, None].expand(B, H, M, N),
    "heads in the wrong order": lambda t, m: t.repeat(H, 1, 1),
    "same for all": lambda t, m: t[:1],
}


@pytest.mark.parametrize("kind", ("window", "gauss", "modality"))
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("argument", ("attn_mask", "bias"))
def test_attention_reads_the_description(kind, chain, argument, caplog):
    caplog.set_level(logging.INFO)
    made = Made(kind)
    mask, exact = CHAINS[chain](made.tensor, made), CHAINS[chain](made.dense, made)
    if chain == "length first":
        exact = exact.transpose(0, 1)
    g = generator(1)
    q, k, v = (
        torch.randn(B, length, H, 4, generator=g, dtype=F64).requires_grad_()
        for length in (M, N, N)
    )
    out = flash_bias_attention(q, k, v, **{argument: mask}, backend="reference")
    truth = flash_bias_attention(q, k, v, exact, backend="reference")
    torch.testing.assert_close(out, truth)
    grad = torch.randn(out.shape, generator=g, dtype=F64)
    wanted = (q, k, v, *made.leaves)
    ours = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    for mine, true in zip(ours, torch.autograd.grad(truth, wanted, grad, allow_unused=True)):
        assert (mine is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(mine, true)
    # The wrong order of heads has no form that attention knows, clamped Gaussians none that windows
    # have.
    clamped = kind == "gauss" and chain == "as the repositories do"
    as_described = (
        type(mask) is BiasTensor and internals.dense_of(mask) is None and not caplog.records
    )
    assert as_described is (chain != "heads in the wrong order" and not clamped)


def test_windows_reach_the_kernels_as_windows():
    made = Made()
    q, k, v = (torch.randn(B, length, H, 4, dtype=F64) for length in (M, N, N))
    read = inputs.as_bias(CHAINS["as the repositories do"](made.tensor, made), B, H, M, N).parts()
    assert (
        read.windows is not None
        and read.windows.centres is made.bias.centres
        and read.dense.shape == (B, H, M, N)
    )
    mask = described(WindowMask(centres(), FRAMES, 3)).repeat_interleave(H, 0)
    assert mask.dtype is torch.bool and mask.shape == (B * H, M, N)
    given = inputs.build(q, k, v, attn_mask=mask)
    assert given.window_mask is not None and given.mask is None
    both = mask | torch.rand(M, N).gt(0.8)
    parts = inputs.as_bias(both, B, H, M, N, "attn_mask").parts()
    assert parts.window_mask is not None and parts.mask.shape == (1, 1, M, N)
    torch.testing.assert_close(attend(both), attend(both.numbers()))
    assert (~mask).dtype is torch.bool and torch.equal(~mask, ~mask.numbers())


def test_an_input_that_is_not_the_first_argument():
    made = Made()
    edges = torch.tensor([-0.5, 0.0, 0.5], dtype=F64)
    found = torch.searchsorted(sorted_sequence=edges, input=made.tensor)
    assert torch.equal(found, torch.searchsorted(edges, made.dense))


def test_a_wrong_size_is_an_error_as_ever():
    made = Made()
    with pytest.raises(ValueError, match="attn_mask of shape"):
        attend(made.tensor[:, 1:])
    with pytest.raises((RuntimeError, IndexError)):
        made.tensor.transpose(0, 7)
    with pytest.raises(IndexError):
        made.tensor[5]
    with pytest.raises(RuntimeError):
        made.tensor.reshape(7, -1)


# -- the tensor's own gradient ---------------------------------------------------------------------


def own_gradient(made, way, chain, use=attend):
    """The gradient of the bias tensor itself, of both ways."""
    found = []
    for start in (made.tensor, made.dense):
        bias = start * 1.0
        seen = []
        if way == "retain_grad":
            bias.retain_grad()
        elif way == "hook":
            bias.register_hook(seen.append)
        out = use(chain(bias, made)).pow(2).sum()
        if way == "autograd.grad":
            found.append(torch.autograd.grad(out, [bias, made.weights])[0])
        else:
            out.backward()
            found.append(bias.grad if way == "retain_grad" else seen[0])
    return found


@pytest.mark.parametrize("way", ("retain_grad", "hook", "autograd.grad"))
@pytest.mark.parametrize(
    "chain", ("as the repositories do", "one for all", "hidden", "four", "same for all")
)
def test_the_gradient_of_the_bias_itself_is_available(way, chain):
    mine, true = own_gradient(Made(), way, CHAINS[chain])
    assert type(mine) is torch.Tensor and mine.shape == (B, M, N)
    torch.testing.assert_close(mine, true)


def test_gradients_of_the_bias_of_several_uses_add_up():
    made = Made()

    def twice(mask):
        return attend(mask) + attend(mask * 2.0, seed=5) + mask.sum()

    mine, true = own_gradient(made, "autograd.grad", lambda t, m: t, twice)
    torch.testing.assert_close(mine, true)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(made.weights.sum(), made.tensor)
    assert torch.autograd.grad(made.weights.sum(), made.tensor, allow_unused=True) == (None,)


def test_a_hook_changes_the_gradient_of_the_weights():
    made = Made()
    bias = made.tensor * 1.0
    bias.register_hook(lambda grad: grad * 0)
    attend(bias).sum().backward()
    assert not made.weights.grad.any()


@since(1, 11, "subclasses that save_for_backward keeps")
@pytest.mark.parametrize("viewed", (False, True))
def test_a_hook_before_a_reentrant_checkpoint(viewed):
    made, k, seen = Made(), torch.randn(B, N, H, 4, generator=generator(3), dtype=F64), []
    found = []
    for start in (made.tensor * 1.0, made.dense * 1.0):
        given = start.transpose(0, 1) if viewed else start
        start.register_hook(lambda grad: seen.append(grad) or grad * 2)
        q = torch.randn(B, M, H, 4, generator=generator(2), dtype=F64, requires_grad=True)

        def layer(q, bias):
            bias = bias.transpose(0, 1) if viewed else bias
            return flash_bias_attention(q, k, k, attn_mask=bias, backend="reference")

        checkpoints.checkpoint(layer, q, given, **REENTRANT).pow(2).sum().backward()
        found.append([q.grad, made.weights.grad, seen.pop()])
        made.weights.grad = None
    torch.testing.assert_close(*found)


def test_one_query_repeated_for_several():
    bias = described(ModalityBias(torch.randn(B, 1, 2, dtype=F64), (12, 12)))
    q, k = torch.randn(B, M, H, 4, dtype=F64), torch.randn(B, N, H, 4, dtype=F64)
    ours, exact = (
        flash_bias_attention(q, k, k, attn_mask=each.expand(-1, M, -1))
        for each in (bias, bias.numbers())
    )
    torch.testing.assert_close(ours, exact)


def test_errors_of_sizes_and_dimensions_are_those_of_torch():
    made = Made()
    for shape in ((B + 1, 3, N), (B, 3, N - 1)):
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            torch.cat([torch.zeros(shape, dtype=F64), made.tensor], 1)
    with pytest.raises(IndexError, match="out of range"):
        made.tensor.flatten(1, 3)


def test_what_comes_too_late_says_so():
    made = Made()
    bias = made.tensor * 1.0
    attend(bias)
    with pytest.raises(RuntimeError, match="must come before attention reads it"):
        bias.register_hook(print)
    with pytest.raises(RuntimeError, match="dropout"):
        torch.autograd.grad(attend(bias, dropout_p=0.5).sum(), bias)


def test_a_leaf_of_somebodys_own():
    made = Made()
    mine, true = made.tensor.detach().requires_grad_(), made.dense.detach().requires_grad_()
    for leaf in (mine, true):
        assert leaf.is_leaf and leaf.requires_grad
        attend(leaf.transpose(0, 1).transpose(0, 1)).pow(2).sum().backward()
    torch.testing.assert_close(mine.grad, true.grad)
    assert made.weights.grad is None


# -- whatever else ---------------------------------------------------------------------------------


def test_numbers_are_made_once_and_logged_once(caplog):
    caplog.set_level(logging.INFO)
    made = Made()
    for _ in range(2):
        found = [made.tensor.mean(), made.tensor.std(), made.tensor.min()]
    exact = [made.dense.mean(), made.dense.std(), made.dense.min()]
    torch.testing.assert_close(found, exact)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all("test_tensor.py" in line for line in said) and "mean" in said[0]
    first = made.tensor.numbers()
    assert made.tensor.numbers() is first
    found[0].backward()
    torch.testing.assert_close(made.weights.grad, torch.autograd.grad(exact[0], made.weights)[0])


def test_looking_at_it_costs_no_numbers():
    t = Made().tensor
    assert (t.shape, t.dim(), t.size(0), t.numel(), t.dtype, t.device.type, t.ndim) == (
        (B, M, N), 3, B, B * M * N, F64, "cpu", 3)  # fmt: skip
    assert (
        t.requires_grad
        and not t.is_leaf
        and t.grad_fn is not None
        and t.is_floating_point()
        and len(t) == B
    )
    if RELEASE >= (1, 11):  # before, a single number stands for all
        assert t.is_contiguous() and t.stride() == (M * N, N, 1)
    assert not t.is_cuda and isinstance(t, torch.Tensor)
    assert "WindowBias" in repr(t) and "WindowBias" in f"{t}" and {t: 1}[t] == 1 and t.grad is None
    assert torch.is_tensor(t) and torch.is_floating_point(t) and internals.dense_of(t) is None


def test_changes_in_place():
    made = Made()
    for start in (made.tensor, made.dense):
        bias = start * 1.0
        bias *= made.scale
        bias.clamp_(-0.5, 0.5)
        bias.masked_fill_(made.mask, -math.inf)
        assert type(bias) is not BiasTensor or internals.dense_of(bias) is None
        out = attend(bias)
        grads = torch.autograd.grad(out.sum(), made.leaves)
        if start is made.tensor:
            first = out, *grads
    torch.testing.assert_close(first, (out, *grads))


def test_changes_in_place_show_where_the_numbers_are_shared():
    made = Made()
    found = []
    for start in (made.tensor, made.dense):
        bias = start * 1.0
        view, copied = bias.transpose(0, 1), bias * 2.0
        view[1] = 7.0
        bias += 1.0
        found.append(
            [
                bias * 1.0,
                view * 1.0,
                copied * 1.0,
                *torch.autograd.grad(bias.sum() + copied.sum(), made.weights),
            ]
        )
    for mine, true in zip(*found):
        torch.testing.assert_close(numbers(mine), true)


def test_without_grad_nothing_is_learned():
    made = Made()
    with torch.no_grad():
        t = made.tensor * 2.0
    assert not t.requires_grad and not attend(t).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(
            attend(made.tensor.half().double()), attend(made.dense), rtol=1e-3, atol=1e-3
        )
        made.tensor.mean()
    mine, true = (
        torch.autograd.grad(t.pow(2).sum(), made.weights) for t in (made.tensor, made.dense)
    )
    torch.testing.assert_close(mine, true)


@pytest.mark.parametrize(
    "reentrant", (True, pytest.param(False, marks=since(1, 11, "use_reentrant")))
)
@pytest.mark.parametrize("nested", (True, False))
@pytest.mark.parametrize("densely", (True, False))
def test_checkpoints(reentrant, nested, densely):
    if nested and reentrant:
        pytest.skip(
            "torch itself does not look into lists; patched layers checkpoint without reentrance "
            "there"
        )
    made, options = Made(), REENTRANT if reentrant else {"use_reentrant": False}
    g = generator(2)
    q = torch.randn(B, M, H, 4, generator=g, dtype=F64, requires_grad=True)
    k = torch.randn(B, N, H, 4, generator=g, dtype=F64)

    def layer(q, mask):
        mask = mask[0] if isinstance(mask, list) else mask
        if densely:
            mask = mask.sigmoid()
        return flash_bias_attention(
            q, k, k, attn_mask=mask.unsqueeze(1).expand(-1, H, -1, -1), backend="reference"
        )

    found = []
    for start, through in ((made.tensor, True), (made.dense, False)):
        bias = start * made.scale
        out = q
        for _ in range(2):
            given = [bias] if nested else bias
            out = (
                checkpoints.checkpoint(layer, out, given, **options)
                if through
                else layer(out, bias)
            )
        (out.pow(2).sum() + bias[0, 0].sum()).backward()
        found.append([t.grad for t in (q, *made.leaves)])
        for leaf in (q, *made.leaves):
            leaf.grad = None
    torch.testing.assert_close(*found)


@needs_autocast
def test_autocast():
    made = Made(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k = torch.randn(B, M, H, 4), torch.randn(B, N, H, 4)
        out = flash_bias_attention(q, k, k, attn_mask=(made.tensor * made.scale).transpose(0, 1))
        exact = flash_bias_attention(q, k, k, attn_mask=made.dense * made.scale)
    torch.testing.assert_close(out, exact)


def test_copying_and_saving():
    made = Made()
    module = torch.nn.Linear(2, 2)
    module.last = made.tensor.detach()
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin.last, made.dense.detach())
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(made.tensor)
    file = io.BytesIO()
    torch.save({"state": torch.nn.Linear(2, 2).state_dict(), "bias": made.tensor.detach()}, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file)["bias"], made.dense.detach())


@since(1, 11, "tensors without storage")
def test_code_that_does_not_dispatch_in_python():
    """As DataParallel's scatter and other C++ does: gradients arrive all the same."""
    made = Made()
    with tensor.no_functions():
        pieces = torch.chunk(made.tensor, 2)
        moved = made.tensor * 2.0
    exact = made.dense.chunk(2)
    torch.testing.assert_close(list(pieces), list(exact))
    ours = torch.autograd.grad(pieces[0].pow(2).sum() + moved.sum(), made.weights)
    torch.testing.assert_close(
        ours, torch.autograd.grad(exact[0].pow(2).sum() + 2 * made.dense.sum(), made.weights)
    )


@needs_transforms
def test_transforms():
    made = Made()
    found = torch.vmap(lambda t: t.sum(-1) * 2)(made.tensor)
    torch.testing.assert_close(found, made.dense.sum(-1) * 2)
    found = torch.func.grad(lambda t: t.pow(2).sum())(made.tensor.detach())
    torch.testing.assert_close(found, 2 * made.dense.detach())


class Twice(torch.nn.Module):
    def forward(self, t):
        return t.transpose(0, 1) * 2


class Describes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("centres", centres())

    def forward(self, weights):
        return described(WindowBias(weights, self.centres, FRAMES, 3)).transpose(0, 1) * 2


def test_traced_and_exported_code_is_dense():
    made = Made(dtype=torch.float32)
    bias, exact = made.tensor.detach(), made.dense.detach().transpose(0, 1) * 2
    other = Made(seed=1, dtype=torch.float32).dense.detach()
    traced = torch.jit.trace(Twice(), bias)
    torch.testing.assert_close(traced(other), other.transpose(0, 1) * 2)
    assert type(bias * 2) is BiasTensor
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (
        2,
        13,
    ):  # dynamo of 2.6 does not trace such objects
        exported = torch.export.export(Describes(), (made.weights.detach(),))
        torch.testing.assert_close(exported.module()(made.weights.detach()), exact)


@needs_compile
@pytest.mark.parametrize("grad", (True, False))
def test_compiled_code(grad):
    made = Made(dtype=torch.float32)
    bias = made.tensor if grad else made.tensor.detach()
    exact = made.dense if grad else made.dense.detach()
    compiled = torch.compile(lambda t: (t * 2).transpose(0, 1).sum(-1), backend="eager")
    found = compiled(bias)
    torch.testing.assert_close(found, (exact * 2).transpose(0, 1).sum(-1))
    if grad:
        ours = torch.autograd.grad(found.pow(2).sum(), made.weights)
        true = torch.autograd.grad((exact * 2).sum(-1).pow(2).sum(), made.weights)
        torch.testing.assert_close(ours, true)


def test_two_threads_use_one():
    made = Made()
    exact, found = attend(made.dense), []

    def work():
        for _ in range(20):
            t = made.tensor.transpose(0, 1).transpose(0, 1)
            found.append((attend(t), t.mean()))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    for out, mean in found:
        torch.testing.assert_close(out, exact)
        torch.testing.assert_close(mean, made.dense.mean())


def test_forms_and_what_does_not_fit():
    per_head = WindowBias(torch.randn(B, M, H, 2), centres(), FRAMES, 3)
    assert described(per_head, "bhmn").shape == (B, H, M, N)
    with pytest.raises(ValueError, match="form: 'bmn' leaves out h"):
        described(per_head)
    with pytest.raises(ValueError, match="form: expected one of"):
        described(per_head, "nm")
    shared = described(
        WindowBias(torch.randn(1, M, 2), centres(batch=1), FRAMES, 3), "mn", torch.float16
    )
    assert (
        shared.shape == (M, N)
        and shared.dtype is torch.float16
        and shared.numbers().dtype is torch.float16
    )


@pytest.mark.parametrize("operation", (operator.mul, operator.truediv))
@pytest.mark.parametrize("factor", (2.0, -2.0, 0.0))
def test_a_masked_bias_by_a_tensor(operation, factor):
    """A positive factor keeps the description; -inf times another is +inf or NaN, which only
    numbers can say."""
    made = Made()
    for scale in (
        torch.tensor(factor, dtype=made.dense.dtype),
        torch.nn.Parameter(torch.tensor([factor]).to(made.dense)),
    ):
        hidden, exact = (t.masked_fill(made.mask, -math.inf) for t in (made.tensor, made.dense))
        found = operation(hidden, scale)
        assert (type(found) is BiasTensor and internals.description_of(found) is not None) == (
            factor > 0
        )
        torch.testing.assert_close(numbers(found), operation(exact, scale), equal_nan=True)


steps = st.lists(
    st.sampled_from([name for name in STEPS if name not in ("in place",)]), min_size=1, max_size=5
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(("window", "gauss", "modality")), steps)
@example("window", ["batch", "batch", "queries", "listed queries"])  # an index of nothing
def test_any_chain_of_steps(kind, names):
    made = Made(kind)
    found, exact = made.tensor, made.dense
    for name in names:
        try:
            with torch.no_grad():
                truth = STEPS[name][0](exact.detach(), made)
        except (RuntimeError, IndexError):
            continue  # a step for another shape
        del truth
        found, exact = STEPS[name][0](found, made), STEPS[name][0](exact, made)
        assert found.shape == exact.shape and found.dtype == exact.dtype
        if type(found) is BiasTensor and internals.description_of(found) is not None:
            again = tensor.new(
                internals.description_of(found), internals.layout_of(found), found.dtype
            )
            torch.testing.assert_close(again.numbers(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(numbers(found), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


def teardown_module():
    dispatch.reset()
