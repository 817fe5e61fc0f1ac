"""The kernels, interpreted, against float64: error at most twice plain PyTorch's in the same
precision, plus 1e-5."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", minversion="3.0")
import triton.language as tl  # noqa: E402

from flashbias_patch.attention import fp16_gradients  # noqa: E402
from flashbias_patch.attention.inputs import AttentionInputs  # noqa: E402
from flashbias_patch.attention.kernels import autograd, launcher, launcher_backward, tiles  # noqa: E402
from flashbias_patch.attention.kernels import problem as problem_module  # noqa: E402
from flashbias_patch.attention.kernels.arguments import Arguments  # noqa: E402
from flashbias_patch.attention.kernels.autograd import fused_attention  # noqa: E402
from flashbias_patch.attention.kernels.recompute import Call, dropout_of, keep_mask, plain_backward  # noqa: E402
from flashbias_patch.attention.reference_attention import attend as attend_dense  # noqa: E402
from flashbias_patch.bias.grids import Grid, WindowMaskParts, WindowParts  # noqa: E402
from tests.support import internals  # noqa: E402
from tests.support.reference import of_call  # noqa: E402
from tests.support.splits import in_parts  # noqa: E402

NAMES = ("q", "k", "v", "q_factor", "k_factor", "weights", "dense")
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """Backward may not quietly fall back, and memory comes poisoned."""

    def fail(*unused):
        raise  # the error that is being handled

    def poisoned(*size, **options):
        return torch.full(*size, float("nan"), **options)

    monkeypatch.setattr(autograd, "plain_backward", fail)
    monkeypatch.setattr(problem_module, "empty", poisoned)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as uint16 and multiplies these numbers: tl.dot's operands are
    widened for it."""
    from triton.runtime import interpreter

    builder = getattr(interpreter, "InterpreterBuilder", None)
    original = getattr(builder, "create_dot", None)
    if original is None:
        pytest.skip(
            "this Triton's interpreter multiplies bfloat16's bit patterns, and its create_dot is "
            "elsewhere"
        )

    def widened(self, a, b, *rest):
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return original(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", widened)


def problem(
    M,
    N,
    D=16,
    R=0,
    dtype=FULL,
    B=2,
    H=2,
    S=0,
    dense=None,
    mask=None,
    padding=None,
    shared=False,
    p=0.0,
):
    """(the seven tensors, keyword arguments of what has no gradient, the output's gradient)"""
    generator = torch.Generator().manual_seed(M * 1000 + N + D + R)

    def random(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    Bf, Hf = (1, 1) if shared else (B, H)
    tensors = [random(B, M, H, D), random(B, N, H, D), random(B, N, H, D), None, None, None, None]
    if R:
        tensors[3], tensors[4] = random(Bf, M, Hf, R), random(Bf, N, H, R)
    lengths = [N // S] * (S - 1) + [N - N // S * (S - 1)] if S else None
    if S:
        tensors[5] = random(Bf, M, Hf, S)
    if dense:
        tensors[6] = random(*dense)
    rest = dict(segment_lengths=lengths, dropout_p=p)
    if mask:
        rest["mask"] = torch.rand(*mask, generator=generator) < 0.3
    if padding == "bool":
        rest["key_padding"] = torch.rand(B, N, generator=generator) < 0.2
        rest["key_padding"][:, : N // 2] = True
    elif padding == "float":
        rest["key_padding"] = random(B, N).masked_fill(
            torch.rand(B, N, generator=generator) < 0.2, -float("inf")
        )
    return tensors, rest, random(B, M, H, D)


def leaves_of(tensors, dtype):
    return [None if t is None else t.detach().clone().to(dtype).requires_grad_() for t in tensors]


def grads(out, leaves, grad):
    present = [leaf for leaf in leaves if leaf is not None]
    return [out.detach()] + list(torch.autograd.grad(out, present, grad.to(out.dtype)))


def plainly(tensors, rest, grad, dtype, seed):
    leaves = leaves_of(tensors, dtype)
    lengths = tuple(rest.get("segment_lengths") or ())
    q = leaves[0]
    call = Call(
        *leaves[:6],
        lengths,
        leaves[6],
        rest.get("mask"),
        rest.get("key_padding"),
        rest["dropout_p"],
        q.shape[-1] ** -0.5,
        seed,
        (True,) * 7,
    )
    kept = None
    if rest["dropout_p"] > 0:
        dropout = dropout_of(call)
        kept = (dropout.kept(0, q.shape[1], 0, leaves[1].shape[1]) * dropout.scale).to(dtype)
    return grads(of_call(call, kept, None), leaves, grad)


def fused(tensors, rest, grad, dtype):
    leaves = leaves_of(tensors, dtype)
    torch.manual_seed(3)
    arguments = dict(zip(("q_factor", "k_factor", "segment_weights", "dense"), leaves[3:]), **rest)
    return grads(fused_attention(*leaves[:3], **arguments), leaves, grad)


def check(tensors, rest, grad):
    dtype = tensors[0].dtype
    torch.manual_seed(3)
    seed = torch.randint(1 << 62, (1,), dtype=torch.int64)
    want = plainly(tensors, rest, grad, torch.float64, seed)
    plain = plainly(tensors, rest, grad, dtype, seed)
    got = fused(tensors, rest, grad, dtype)
    names = ["out"] + [name for name, tensor in zip(NAMES, tensors) if tensor is not None]
    for name, exact, low, ours in zip(names, want, plain, got):
        assert ours.shape == exact.shape and ours.dtype == dtype, name
        error, allowed = (ours - exact).norm(), 2 * (low - exact).norm()
        floor = 1e-5 * max(exact.norm(), exact.numel() ** 0.5)
        assert error <= allowed + floor, (name, float(error), float(allowed))
    return got


# Every length, rank, head dim and dtype appears; not every combination.
COVERING = [
    ((1, 1), 1, 16, FULL),
    ((1, 257), 3, 32, HALF),
    ((113, 203), 8, 32, HALF),
    ((128, 128), 13, 64, HALF),
    ((257, 1), 2, 40, FULL),
    ((33, 70), 33, 80, FULL),
    ((20, 65), 64, 128, HALF),
    ((40, 50), 16, 8, HALF),
    ((17, 130), 0, 40, HALF),
]
REST = [
    (lengths, rank, dim, dtype)
    for place, lengths in enumerate([(1, 1), (1, 257), (113, 203), (128, 128), (257, 1)])
    for shift, rank in enumerate([1, 2, 3, 8, 13, 16, 33, 64])
    for dim, dtype in [
        ([16, 32, 40, 64, 80, 128][(place + shift) % 6], [HALF, FULL][(place + shift // 2) % 2])
    ]
]


@pytest.mark.parametrize("lengths, rank, dim, dtype", COVERING)
def test_factors(lengths, rank, dim, dtype):
    check(*problem(*lengths, D=dim, R=rank, dtype=dtype, B=1, H=1))


@pytest.mark.parametrize(
    "name", ["shared factors", "shared segments with factors", "dense", "added padding"]
)
def test_bfloat16(bfloat16_products, name):
    check(*problem(20, 70, **dict(FEATURES[name], dtype=BRAIN)))


@pytest.mark.slow
@pytest.mark.parametrize("lengths, rank, dim, dtype", REST)
def test_factors_everywhere(lengths, rank, dim, dtype):
    check(*problem(*lengths, D=dim, R=rank, dtype=dtype, B=1))  # several samples: test_features


FEATURES = {
    "shared factors": dict(R=3, shared=True),
    "segments": dict(S=3),
    "shared segments with factors": dict(S=2, R=2, shared=True),
    "dense": dict(dense=(2, 2, 20, 70)),
    "dense shared over the batch": dict(dense=(1, 2, 20, 70)),
    "dense shared over heads": dict(dense=(2, 1, 20, 70)),
    "dense a row": dict(dense=(2, 1, 1, 70)),
    "mask": dict(mask=(2, 1, 20, 70), R=2),
    "mask a row": dict(mask=(1, 2, 1, 70)),
    "padding": dict(padding="bool", S=2),
    "added padding": dict(padding="float", R=1),
    "dropout": dict(p=0.3, R=2),
    "dropout over segments": dict(p=0.3, S=3, R=2),
    "everything": dict(
        R=3, S=2, dense=(1, 2, 20, 70), mask=(2, 1, 20, 70), padding="bool", p=0.2, shared=True
    ),
}


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name, dtype):
    check(*problem(20, 70, dtype=dtype, **FEATURES[name]))


@pytest.mark.parametrize("splits", [0, 3])
def test_a_shared_factors_gradient_added_to_by_every_head(monkeypatch, splits):
    """As it is on large problems, where parts of their own would take memory."""
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Config(16, 16, 4, 1))
    if splits:
        in_parts(monkeypatch, splits)
    monkeypatch.setattr(launcher_backward, "SEPARATE", 0)
    check(*problem(20, 70, **FEATURES["shared factors"]))


@pytest.mark.parametrize(
    "name, deterministic",
    [
        ("shared factors", True),
        ("segments", False),
        ("dropout", False),
        ("dropout over segments", False),
        pytest.param("dense shared over the batch", True, marks=pytest.mark.slow),
        pytest.param("padding", False, marks=pytest.mark.slow),
    ],
)
def test_split(monkeypatch, name, deterministic):
    """Cut over keys and over queries, results combined; in deterministic mode the same bits
    again."""
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Config(16, 16, 4, 1))
    in_parts(monkeypatch, 3)
    torch.use_deterministic_algorithms(deterministic)
    try:
        case = problem(20, 70, **FEATURES[name])
        first = check(*case)
        if deterministic:
            assert all(torch.equal(a, b) for a, b in zip(first, fused(*case, FULL)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_rows_without_keys_give_zeros():
    tensors, rest, grad = problem(20, 40, R=2, dense=(1, 1, 20, 40))
    rest["mask"] = torch.zeros(1, 1, 20, 40, dtype=torch.bool)
    rest["mask"][:, :, 3:9] = True
    tensors[6][:, :, 11] = -float("inf")
    results = dict(
        zip(("out",) + NAMES, list(_with_gaps(fused(tensors, rest, grad, FULL), tensors)))
    )
    for name, result in results.items():
        assert result is None or torch.isfinite(result).all(), name
    for row in (3, 8, 11):
        assert (results["out"][:, row] == 0).all() and (results["q"][:, row] == 0).all()
        assert (results["q_factor"][:, row] == 0).all()


def _with_gaps(results, tensors):
    results = iter(results)
    return [next(results)] + [None if tensor is None else next(results) for tensor in tensors]


@pytest.mark.parametrize("M, N, B", [(0, 5, 2), (5, 0, 2), (0, 0, 1), (3, 4, 0)])
def test_nothing_to_attend(M, N, B):
    tensors, rest, grad = problem(M, N, R=2, B=B)
    for result in fused(tensors, rest, grad, FULL):
        assert (result == 0).all()


def test_strided_views_are_not_copied(monkeypatch):
    """q, k and v as slices of one projection, heads first or last."""
    packed = torch.randn(2, 30, 3, 2, 16)
    heads_first = packed.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
    want = fused_attention(*[part.contiguous() for part in packed.unbind(2)])
    wide = torch.zeros(2, 30, 3, 2, 21)  # heads begin anywhere
    wide[..., :16] = packed
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda self: pytest.fail("copied"))
    found = []
    for layout in (packed, heads_first, wide[..., :16]):
        parts = [part.detach().requires_grad_() for part in layout.unbind(2)]
        out = fused_attention(*parts)
        assert torch.equal(out, want)
        found.append(torch.autograd.grad(out, parts, wide[:, :, 0, :, :16]))
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(others, found[0]))


def test_tensors_whose_memory_holds_their_negative():
    """As that of x.conj().imag does."""
    case = problem(20, 70, R=2, S=2, dense=(1, 2, 20, 70), padding="float")
    tensors, rest, grad = case
    leaves = [t.clone().requires_grad_() for t in tensors]

    def results(of):
        q, k, v, *terms = [of(leaf) for leaf in leaves]
        arguments = dict(zip(("q_factor", "k_factor", "segment_weights", "dense"), terms), **rest)
        arguments["key_padding"] = of(arguments["key_padding"])
        return grads(fused_attention(q, k, v, **arguments), leaves, of(grad))

    assert torch._neg_view(grad).is_neg() and not torch._neg_view(grad).resolve_neg().is_neg()
    found = results(lambda tensor: torch._neg_view(-tensor))
    assert all(torch.equal(a, b) for a, b in zip(found, results(lambda tensor: tensor)))


@pytest.mark.parametrize("name", ["weights", "centres", "mask centres"])
def test_windows_whose_memory_holds_their_negative(name):
    grid, rows = Grid(6, 8, 1), torch.arange(8)
    q, k, weights = torch.randn(1, 8, 2, 16), torch.randn(1, 48, 2, 16), torch.randn(1, 8, 2, 1)
    centres = torch.stack([rows * 0, rows % 5, rows % 4], -1).int().view(1, 8, 1, 3)

    def result(of):
        def changed(own, tensor):
            return of(tensor) if own == name else tensor

        return fused_attention(
            q, k, k,
            windows=WindowParts(
                changed("weights", weights), changed("centres", centres), (grid,), (3,), ()
            ),
            window_mask=WindowMaskParts(changed("mask centres", centres), (grid,), (5,)),
        )  # fmt: skip

    found = result(lambda tensor: torch._neg_view(-tensor))
    assert torch.equal(found, result(lambda tensor: tensor))


def test_rows_of_masks_begin_at_multiples_of_16(monkeypatch):
    mask, dense = (
        torch.rand(1, 2, 9, 21) < 0.5,
        torch.randn(1, 1, 9, 21).to(HALF).expand(3, 2, 9, 21),
    )
    for tensor in (mask.view(torch.uint8), dense, dense.float()):
        aligned = problem_module.aligned_rows(tensor)
        assert (
            torch.equal(aligned, tensor)
            and aligned.shape == tensor.shape
            and aligned.stride(2) == 32
        )
    assert problem_module.aligned_rows(dense).stride()[:2] == (0, 0)  # what is shared stays shared
    for tensor in (
        dense[..., :16].contiguous(),
        dense[:, :, :1],
        aligned,
        torch.zeros(1, 1, 4, 48),
    ):
        assert problem_module.aligned_rows(tensor) is tensor
    q, k = torch.zeros(3, 9, 2, 16).to(HALF), torch.zeros(3, 21, 2, 16).to(HALF)
    case = autograd.problem_of(
        Arguments(q, k, k, None, None, None, (), dense, mask, None, 0.0, 0.25)
    )
    assert case.mask.stride(2) == 32 and case.dense.stride(2) == 32
    apart = torch.zeros(1, 1, 4, 32, dtype=torch.uint8)[..., 1:]
    assert problem_module.aligned_rows(apart).data_ptr() % 16 == 0
    eights = torch.zeros(1, 1, 9, 24).to(HALF)  # 16 bytes, but Triton does not ask about those
    assert problem_module.aligned_rows(eights).stride(2) == 32
    monkeypatch.setattr(problem_module, "COPIED", dense[0, 0].numel() * 2 - 1)
    assert problem_module.aligned_rows(dense) is dense


def test_dropout_follows_the_generator_and_backward_uses_the_same_mask():
    """v = 1 makes a row's output its share of kept weights; dv recovers each kept weight."""
    M, N, p = 9, 40, 0.4
    q, k = torch.zeros(1, M, 1, 16), torch.zeros(1, N, 1, 16)
    v = torch.eye(N)[None, :, None, :].requires_grad_()  # head dim 40: out is the matrix of weights
    q, k = torch.zeros(1, M, 1, N), torch.zeros(1, N, 1, N)
    torch.manual_seed(7)
    out = fused_attention(q, k, v, dropout_p=p)
    torch.manual_seed(7)
    assert torch.equal(out, fused_attention(q, k, v, dropout_p=p))
    assert not torch.equal(out, fused_attention(q, k, v, dropout_p=p))
    kept = out[0, :, 0] > 0
    assert torch.allclose(out[0, :, 0], kept / (N * (1 - p)))
    assert abs(float(kept.float().mean()) - (1 - p)) < 0.1
    torch.manual_seed(7)
    seed = torch.randint(1 << 62, (1,), dtype=torch.int64)
    assert torch.equal(
        kept, keep_mask(seed, torch.tensor(0), torch.arange(M)[:, None], torch.arange(N), p)
    )
    row = torch.zeros_like(out)
    row[0, 4] = 1.0
    (dv,) = torch.autograd.grad(out, v, row)
    assert torch.allclose(dv[0, :, 0, 0], kept[4] / (N * (1 - p)))


def test_delta_does_not_see_the_output_rounded():
    """Its error would be common to all keys, and add up in gradients that are sums over keys. What
    remains is that of the weights, rounded before they meet v."""
    q, k, v, grad = (torch.randn(1, length, 2, 16).to(HALF) for length in (20, 300, 300, 20))
    case = autograd.problem_of(
        Arguments(q, k, v, None, None, None, (), None, None, None, 0.0, 0.25)
    )
    passed = launcher.Passed(grad, *launcher.forward(case, None, training=True), None)
    scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) * 0.25
    delta = (torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v.double()) * grad).sum(-1)[0].T
    rows = launcher.Rows(case, passed)(case, passed).double()
    seen = -(rows[2:, 3:6] @ rows[1, 3:6]).view(2, -1)[:, :20]
    rounded = (passed.out.double() * grad).sum(-1)[0].T
    assert (seen - delta).norm() < 0.8 * (rounded - delta).norm()


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("rank", [0, 8, 10])
def test_folded_rows_are_those_not_folded(monkeypatch, rank, dtype):
    """lse and delta in three halves each, whether they are tiny or large, beside the columns of
    q_factor."""
    M, H, D, S = 70, 2, 16, 2
    tensors, rest, grad = problem(M, 30, D, rank, dtype, B=1, S=S)
    q, k, v, qf, kf, weights = tensors[:6]
    case = autograd.problem_of(
        Arguments(q, k, v, qf, kf, weights, rest["segment_lengths"], None, None, None, 0.0, 0.25)
    )
    sizes = torch.logspace(-7, 4, M)[:, None]
    out = torch.ones(1, M, H, D) * sizes[None, :, :, None]
    lse = torch.randn(H, M) * sizes.flip(0).T
    lse[0, :3] = torch.tensor([float("inf"), 3e5, -3e5])
    passed = launcher.Passed(torch.ones(1, M, H, D).to(dtype), out, None, lse, None)
    folded = launcher.Rows(case, passed)(case, passed)
    assert folded.dtype == dtype and folded.isfinite().all()
    assert not case._replace(rank=11).folded  # its columns would leave room for five
    monkeypatch.setattr(problem_module.Problem, "folded", False)
    pairs = launcher.Rows(case, passed)(case, passed)
    by = folded[:2].double()
    tile = folded[2:].double().view(S, H, -1, 16)
    wanted = pairs.double().view(S, H, -1, 2)
    found = torch.stack(
        [-(tile[..., rank + 3 * place :][..., :3] @ by[place][by[place] > 0]) for place in (0, 1)],
        -1,
    )
    found[..., 0] *= case.score_scale
    assert (by > 0).sum(1).tolist() == [3, 3] and (by[0].argmax(), by[1].argmax()) == (
        rank,
        rank + 3,
    )
    hidden = wanted[..., 0] == float("inf")
    assert hidden[:, :, M:].all() and (found[..., 0][hidden] > 3.7e5).all()
    error = (found - wanted).abs()[~hidden]
    assert (error <= 2.0**-21 * wanted.abs()[~hidden] + 2.0**-40).all()
    if rank:
        assert torch.equal(tile[:, :, :M, :rank], qf.double().transpose(1, 2).expand(S, H, M, rank))
    assert not tile[..., rank + 6 :].any()


@pytest.mark.parametrize(
    "name", ["shared factors", "shared segments with factors", "dense", "added padding"]
)
def test_folding_leaves_gradients_as_they_are(monkeypatch, name):
    case = FEATURES[name]
    tensors, rest, grad = problem(20, 70, dtype=HALF, **case)
    folded = fused(tensors, rest, grad, HALF)
    monkeypatch.setattr(problem_module.Problem, "folded", False)
    for a, b in zip(folded, fused(tensors, rest, grad, HALF)):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-5


def test_scores_far_beyond_float16s_largest_number():
    """lse is 2e5 and more, of which a half has no number: the weights are 1 for the largest score,
    whose key gets all."""
    q, k, v = torch.zeros(1, 3, 1, 16), torch.randn(1, 9, 1, 16), torch.randn(1, 9, 1, 16)
    k[..., 0], q[..., 0] = torch.tensor([100.0] * 4 + [1000.0] + [10.0] * 4)[None, :, None], 900.0
    q, k, v = (x.to(HALF).requires_grad_() for x in (q, k, v))
    out = fused_attention(q, k, v, scale=0.25)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.equal(out, v[:, 4:5].expand_as(out)) and torch.equal(
        dv[0, :, 0, 0], 3.0 * (torch.arange(9) == 4)
    )
    assert not dq.any() and not dk.any()


def test_a_small_scale_is_not_folded():
    """Products of 3e6, of which lse would be too, before the scale of 1e-4."""
    q, k = torch.full((1, 3, 1, 16), 430.0), 430.0 + torch.randn(1, 9, 1, 16)
    leaves = [x.to(HALF).requires_grad_() for x in (q, k, torch.randn(1, 9, 1, 16))]
    out = fused_attention(*leaves, scale=1e-4)
    grad = 1000 * torch.randn_like(out)
    found = torch.autograd.grad(out, leaves[1:], grad)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    weights = (torch.einsum("bmhd,bnhd->bhmn", *exact[:2]) * 1e-4).softmax(-1)
    wanted = torch.autograd.grad(
        torch.einsum("bhmn,bnhd->bmhd", weights, exact[2]), exact[1:], grad.double()
    )
    for a, b in zip(found, wanted):
        assert (a - b).norm() <= 2e-3 * b.norm()


def test_small_gradients_survive_float16(small=1e-7):
    """Weights of 1/N times a small gradient are nothing in float16, which backward rounds them to:
    fp16_gradients.py scales."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randn(1, n, 1, 16, generator=generator).requires_grad_()  # noqa: E731
    q, k, v, grad = draw(16), draw(512), draw(512), draw(16).detach() * small
    exact = torch.autograd.grad(attend_dense(AttentionInputs(q, k, v, scale=0.25)), (q, k, v), grad)
    (nq, nk, nv), _, power = fp16_gradients.narrowed((q, k, v), ())
    found = torch.autograd.grad(
        fp16_gradients.widened(fused_attention(nq, nk, nv), FULL, power), (q, k, v), grad
    )
    lost = torch.autograd.grad(
        fused_attention(q.half(), k.half(), v.half()), (q, k, v), grad.half()
    )
    for a, b, c in zip(found, exact, lost):
        assert (a - b).norm() <= 2e-3 * b.norm() < 0.01 * (c - b).norm()


@pytest.mark.parametrize("wanted", ["q", "k_factor", "weights", "dense"])
def test_only_wanted_gradients(wanted):
    tensors, rest, grad = problem(20, 40, R=2, S=2, dense=(1, 1, 20, 40), B=1)
    every = dict(zip(("out",) + NAMES, fused(tensors, rest, grad, FULL)))
    leaf = tensors[NAMES.index(wanted)].requires_grad_()
    out = fused_attention(*tensors[:6], rest["segment_lengths"], tensors[6])
    assert torch.allclose(torch.autograd.grad(out, leaf, grad)[0], every[wanted], atol=1e-6)


def test_backward_falls_back_inside_itself(monkeypatch, caplog):
    """A kernel that fails in backward costs speed, not the run; what the user pressed is not
    swallowed."""
    tensors, rest, grad = problem(20, 40, R=3, S=2, mask=(1, 1, 20, 40), p=0.2, shared=True, B=1)
    want = fused(tensors, rest, grad, FULL)
    internals.warn_anew(monkeypatch)
    monkeypatch.setattr(autograd, "plain_backward", plain_backward)

    def broken(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(launcher, "backward", broken)
    with caplog.at_level("WARNING", logger="flashbias_patch"):
        got = [fused(tensors, rest, grad, FULL) for _ in range(2)][1]
    assert sum("no room" in record.getMessage() for record in caplog.records) == 1
    for a, b in zip(got, want):
        assert torch.allclose(a, b, atol=1e-5)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "backward", stopped)
    with pytest.raises(KeyboardInterrupt):
        fused(tensors, rest, grad, FULL)


def test_recomputed_gradients_in_chunks():
    tensors, rest, grad = problem(33, 20, R=3, S=2, dense=(2, 1, 33, 20), mask=(1, 1, 33, 20))
    leaves = leaves_of(tensors, FULL)
    call = Call(
        *leaves[:6],
        tuple(rest["segment_lengths"]),
        leaves[6],
        rest["mask"],
        None,
        0.0,
        0.25,
        torch.zeros(1),
        (True,) * 7,
    )
    whole = plain_backward(call, grad)
    for a, b in zip(whole[:7], plain_backward(call, grad, 1)):  # there are no windows
        assert torch.allclose(a, b, atol=1e-5)


def test_a_negative_scale():
    tensors, _, _ = problem(20, 40)
    q, k, v = tensors[:3]
    assert torch.allclose(
        fused_attention(q, k, v, scale=-0.3), fused_attention(-q, k, v, scale=0.3), atol=1e-6
    )


@pytest.mark.skipif(not hasattr(torch.library, "custom_op"), reason="torch < 2.4")
def test_compiles_into_one_graph():
    """Traced with fake tensors, forward and backward, shapes of every output as they really
    come."""
    tensors, rest, grad = problem(20, 40, R=3, S=2, dense=(1, 1, 20, 40), B=1)

    def model(*leaves):
        out = fused_attention(*leaves[:6], rest["segment_lengths"], leaves[6])
        return out * 2

    leaves = leaves_of(tensors, FULL)
    want = grads(model(*leaves), leaves, grad)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(compiled(*leaves), leaves, grad), want):
        assert torch.allclose(a, b, atol=1e-6)
    arguments = (
        *[t.detach() for t in leaves[:6]],
        rest["segment_lengths"],
        leaves[6].detach(),
        None,
        None,
        0.0,
        0.25,
    )
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(internals.operator(), arguments, test_utils=utilities)
    strided = [torch.randn(1, 2, length, 16).transpose(1, 2) for length in (20, 40, 40)]
    nothing = (None, None, None, [], None, None, None, 0.0)
    torch.library.opcheck(
        internals.operator(), (*strided, *nothing, -0.25), test_utils=utilities
    )  # q is copied, scaled
