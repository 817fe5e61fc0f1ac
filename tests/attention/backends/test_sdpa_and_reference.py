"""sdpa and reference against float64: error at most twice plain PyTorch's own in the same precision
(plus 1e-5)."""

import itertools

import pytest
import torch

from flashbias_patch.attention import flash_bias_attention
from flashbias_patch.bias import DenseBias, LowRankBias, ModalityBias
from tests.support.capabilities import FASTEST

BACKENDS = ("sdpa", "reference")[FASTEST != "sdpa" :]

LENGTHS = [(1, 1), (1, 257), (113, 203), (128, 128), (257, 1)]


def dense_attention(q, k, v, bias=None, masked=None, scale=None):
    """Textbook attention in its inputs' precision; (B, L, H, D)."""
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias
    if masked is not None:
        s = s.masked_fill(masked, float("-inf"))
    dead = s.detach().amax(-1, keepdim=True) == float("-inf")
    p = torch.softmax(s.masked_fill(dead, 0), -1).masked_fill(dead, 0)
    return torch.einsum("bhmn,bnhd->bmhd", p, v)


def make(M, N, B=2, H=3, D=16, R=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = dict(q=(B, M, H, D), k=(B, N, H, D), v=(B, N, H, D), a=(1, M, H, R), b=(B, N, 1, R))
    return {
        name: torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
        for name, s in shapes.items()
    }


def leaves(tensors, dtype):
    return {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}


def run(function, tensors, grad_out):
    out = function(tensors)
    grads = torch.autograd.grad(
        out, list(tensors.values()), grad_out.to(out.dtype), allow_unused=True
    )
    return [out.detach(), *grads]


def assert_as_good_as_pytorch(function, plain, tensors):
    """Compare outputs and gradients of every tensor with float64, and with plain PyTorch's
    error."""
    dtype = tensors["q"].dtype
    # Gradients sum over M or N terms that may cancel to nothing (N = 1): allow that sum's rounding.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    floor = 1e-5 + 8 * eps * max(tensors["q"].shape[1], tensors["k"].shape[1]) ** 0.5
    truth_in = leaves(tensors, torch.float64)
    grad_out = torch.randn(
        plain(truth_in).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    truth = run(plain, truth_in, grad_out)
    ours = run(function, leaves(tensors, dtype), grad_out)
    theirs = run(plain, leaves(tensors, dtype), grad_out)
    for name, exact, mine, base in zip(["out", *tensors], truth, ours, theirs):
        if exact is None:
            assert mine is None or not mine.any(), name
            continue
        assert mine is not None, name
        assert mine.dtype == dtype
        error = (mine.double() - exact).abs().max() if exact.numel() else 0
        bound = 2 * (base.double() - exact).abs().max() + floor if exact.numel() else 1
        assert error <= bound, f"{name}: {error:.3g} > {bound:.3g}"


def dense_of(t):
    a, b = t["a"], t["b"]
    B, H = max(a.shape[0], b.shape[0]), max(a.shape[2], b.shape[2])
    return torch.einsum("bmhr,bnhr->bhmn", a.expand(B, -1, H, -1), b.expand(B, -1, H, -1))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_bias(backend, lengths, dtype):
    tensors = make(*lengths, dtype=dtype)
    assert_as_good_as_pytorch(
        lambda t: flash_bias_attention(
            t["q"], t["k"], t["v"], LowRankBias(t["a"], t["b"]), backend=backend
        ),
        lambda t: dense_attention(t["q"], t["k"], t["v"], dense_of(t)),
        tensors,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_on_the_reference(dtype):
    try:
        torch.einsum("bmhd,bnhd->bhmn", *torch.ones(2, 2, 3, 4, 5, dtype=dtype)).softmax(-1)
    except RuntimeError as error:
        pytest.skip(f"plain PyTorch, to compare with: {error}")
    tensors = make(37, 41, dtype=dtype)
    assert_as_good_as_pytorch(
        lambda t: flash_bias_attention(
            t["q"], t["k"], t["v"], LowRankBias(t["a"], t["b"]), backend="reference"
        ),
        lambda t: dense_attention(t["q"], t["k"], t["v"], dense_of(t)),
        tensors,
    )


MASKS = ["(M,N)", "(B,M,N)", "(B*H,M,N)", "(B,H,M,N)"]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("shape, kind", list(itertools.product(MASKS, ["bool", "byte", "float"])))
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_masks(backend, shape, kind, padding):
    B, H, M, N = 2, 3, 19, 23
    g = torch.Generator().manual_seed(2)
    size = {
        "(M,N)": (M, N),
        "(B,M,N)": (B, M, N),
        "(B*H,M,N)": (B * H, M, N),
        "(B,H,M,N)": (B, H, M, N),
    }[shape]
    masked = torch.rand(size, generator=g) < 0.4
    masked[..., 3, :] = True  # a row with nothing to attend to
    four = {
        "(M,N)": lambda m: m,
        "(B,M,N)": lambda m: m[:, None],
        "(B*H,M,N)": lambda m: m.view(B, H, M, N),
        "(B,H,M,N)": lambda m: m,
    }[shape](masked)
    additive = torch.randn(four.shape, generator=g).masked_fill(four, float("-inf"))
    mask = {"bool": masked, "byte": masked.byte(), "float": additive.view(size)}[kind]
    keys = torch.rand(B, N, generator=g) < 0.3
    key_bias = torch.randn(B, N, generator=g)
    given = {None: None, "bool": keys, "float": key_bias}[padding]

    def plain(t):
        bias = torch.zeros(B, H, M, N, dtype=t["q"].dtype)
        if kind == "float":
            bias = bias + additive.to(bias.dtype)
        if padding == "float":
            bias = bias + key_bias[:, None, None].to(bias.dtype)
        out_masked = four if padding != "bool" else four | keys[:, None, None]
        return dense_attention(
            t["q"], t["k"], t["v"], bias + dense_of(t), out_masked.expand(B, H, M, N)
        )

    tensors = make(M, N)
    assert_as_good_as_pytorch(
        lambda t: flash_bias_attention(
            t["q"],
            t["k"],
            t["v"],
            LowRankBias(t["a"], t["b"]),
            attn_mask=mask,
            key_padding_mask=given,
            backend=backend,
        ),
        plain,
        tensors,
    )
    t = leaves(tensors, torch.float32)
    out = flash_bias_attention(
        t["q"], t["k"], t["v"], attn_mask=mask, key_padding_mask=given, backend=backend
    )
    assert not out[:, 3].detach().any(), "a fully masked row must be zero"


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradient_of_a_dense_bias(backend):
    B, H, M, N = 2, 3, 17, 29
    for size in [(M, N), (B, 1, M, N), (1, H, M, N), (B, H, M, N), (B, 1, 1, N)]:
        tensors = {
            **make(M, N),
            "dense": torch.randn(size, generator=torch.Generator().manual_seed(3)),
        }
        del tensors["a"], tensors["b"]
        assert_as_good_as_pytorch(
            lambda t: flash_bias_attention(
                t["q"], t["k"], t["v"], DenseBias(t["dense"]), backend=backend
            ),
            lambda t: dense_attention(t["q"], t["k"], t["v"], t["dense"]),
            tensors,
        )


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_segments(backend):
    lengths = (5, 0, 11, 7)
    tensors = {
        **make(13, sum(lengths)),
        "w": torch.randn(2, 13, 4, generator=torch.Generator().manual_seed(4)),
    }

    def plain(t):
        spread = t["w"].repeat_interleave(torch.tensor(lengths), -1)[:, None]
        return dense_attention(t["q"], t["k"], t["v"], spread + dense_of(t))

    assert_as_good_as_pytorch(
        lambda t: flash_bias_attention(
            t["q"],
            t["k"],
            t["v"],
            ModalityBias(t["w"], lengths) + LowRankBias(t["a"], t["b"]),
            backend=backend,
        ),
        plain,
        tensors,
    )


@pytest.mark.parametrize("rows", (1, 5, 23))
@pytest.mark.parametrize("bias", ("low rank", "dense", "segments"))
def test_reference_holds_one_chunk_only(rows, bias, monkeypatch):
    """Two buffers of scores, however long queries and keys are; the results are the same."""
    from flashbias_patch.attention import chunked_attention

    room = rows * 7
    monkeypatch.setitem(chunked_attention.CHUNK_BYTES, "cpu", 2 * 2 * 3 * room * 4)
    buffers, largest = chunked_attention.Columns.buffers, []

    def counted(columns, chunks, count):
        made = buffers(columns, chunks, count)
        largest.append(sum(buffer.numel() for buffer in made))
        return made

    monkeypatch.setattr(chunked_attention.Columns, "buffers", counted)
    tensors = {
        **make(23, 31),
        "w": torch.randn(2, 23, 1, 3, generator=torch.Generator().manual_seed(4)),
    }

    def biases(t):
        low_rank = LowRankBias(t["a"], t["b"])
        if bias == "dense":
            return low_rank + DenseBias(
                t["q"].transpose(1, 2).cumsum(-1) @ t["k"].permute(0, 2, 3, 1)
            )
        return low_rank + ModalityBias(t["w"], [9, 2, 20]) if bias == "segments" else low_rank

    assert_as_good_as_pytorch(
        lambda t: flash_bias_attention(t["q"], t["k"], t["v"], biases(t), backend="reference"),
        lambda t: dense_attention(t["q"], t["k"], t["v"], biases(t).dense()),
        tensors,
    )
    assert 0 < max(largest) <= 2 * 2 * 3 * room


@pytest.mark.parametrize("backend", ["reference"])
def test_dropout_is_the_same_in_backward(backend):
    """With v = identity the output is the dropped weights: the gradient must vanish where they were
    dropped."""
    N = 16
    q, k = torch.randn(1, 9, 1, N), torch.randn(1, N, 1, N)
    v = torch.eye(N).view(1, N, 1, N).clone().requires_grad_()
    torch.manual_seed(5)
    out = flash_bias_attention(q, k, v, dropout_p=0.5, backend=backend)
    dropped = out[0, :, 0] == 0
    assert 0.3 < dropped.float().mean() < 0.7
    (grad,) = torch.autograd.grad(out, v, torch.ones_like(out))
    weights = dense_attention(q, k, torch.eye(N).view(1, N, 1, N))[0, :, 0] * 2
    torch.testing.assert_close(grad[0, :, 0, 0], (weights * ~dropped).sum(0))
    torch.manual_seed(5)
    torch.testing.assert_close(flash_bias_attention(q, k, v, dropout_p=0.5, backend=backend), out)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_empty(lengths):
    t = leaves(make(*lengths), torch.float32)
    out = flash_bias_attention(t["q"], t["k"], t["v"], LowRankBias(t["a"], t["b"]))
    assert out.shape == t["q"].shape and not out.detach().any()
    out.sum().backward()


def test_unequal_value_dimension():
    t = make(11, 13)
    v = torch.randn(2, 13, 3, 5)
    for backend in BACKENDS:
        out = flash_bias_attention(t["q"], t["k"], v, LowRankBias(t["a"], t["b"]), backend=backend)
        torch.testing.assert_close(
            out, dense_attention(t["q"], t["k"], v, dense_of(t)), rtol=1e-4, atol=1e-5
        )
