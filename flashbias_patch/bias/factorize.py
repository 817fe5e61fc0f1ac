"""From a dense bias to a low-rank one: exact SVD, randomized, warm-started; the error is always
measured."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._torch_internals import RELEASE
from .base import AttentionBias, DenseBias, LowRankBias, MaskBias, add_terms
from .factors import Factors, full_precision

METHODS = ("auto", "svd", "randomized")
DEFAULT_ENERGY = 0.9999
DEFAULT_MAX_ERROR = 2e-2
_OVERSAMPLE = (
    8  # columns beyond the rank wanted (Halko, Martinsson & Tropp 2011, section 4.2: 5 or 10)
)
_FIRST_RANK = 16  # where the search for a rank that keeps the energy begins
_WIDEST = 256  # beyond this rank attention with factors costs more than with the dense bias
_SMALL = 64  # a side so short that the exact SVD is as quick
_BLOCK = 1 << 24  # entries of the residual formed at a time


class FactorState(NamedTuple):
    """Where the last factorisation ended; pass it as `warm_start` to the next."""

    basis: Tensor  # (B|1, H|1, N, R): orthonormal, spans the rows
    calls: int  # so that each call draws fresh columns
    hopeless: bool  # no rank kept the energy last time: try once, do not search


class Factorization(NamedTuple):
    """What `factorize` found.

    bias: the bias to use, low rank (plus a MaskBias where entries were -inf), or the dense one as
    given where `used_dense`, and then `reason` says why. relative_error: the Frobenius norm of what
    the low-rank form leaves out over the norm of the finite entries, measured, of the worst batch
    entry or head. energy: the share of squared singular values kept, 1 - relative_error**2. Where
    the dense bias is used, relative_error, rank and energy are those of the low-rank form refused
    (0, 0, 1: none was tried). state: pass as `warm_start` next time, or None.
    """

    bias: AttentionBias
    relative_error: float
    rank: int
    energy: float
    used_dense: bool
    reason: str
    state: Optional[FactorState]


class _Svd(NamedTuple):
    """W ~ left * values @ right^T: left (B, H, M, K), right (B, H, N, K) orthonormal, values
    falling."""

    left: Tensor
    values: Tensor
    right: Tensor


def factorize(
    bias: Union[Tensor, AttentionBias],
    rank: Optional[int] = None,
    energy: Optional[float] = None,
    method: str = "auto",
    warm_start: Optional[FactorState] = None,
    max_error: Optional[float] = None,
    num_heads: Optional[int] = None,
    generator: Optional[torch.Generator] = None,
) -> Factorization:
    """A low-rank form of a dense bias, or the dense bias itself where no low-rank form is good
    enough.

    bias: a floating tensor (M, N), (B, M, N), (B*H, M, N) with `num_heads`, or (B, H, M, N), or an
    AttentionBias. Half is computed in float32. The low-rank terms of an AttentionBias are kept as
    they are, its dense term is factorised. -inf entries are split off into a MaskBias and count as
    0: masks that are blocks raise the rank.

    rank: this many columns. energy, in (0, 1]: the smallest rank that keeps this share of the
    squared singular values of every batch entry and head (0.9999 if neither is given), at most
    `rank` if both are. The relative Frobenius error is sqrt(1 - energy): energy 0.90 is an error of
    32 %. max_error: above it the dense bias is used. Default 2e-2, or sqrt(1 - energy) for an
    energy that implies more. method: "svd" (exact), "randomized" (subspace iteration: Halko,
    Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4), "auto" (svd for a side up to 64).
    warm_start: the `state` of the previous call on a bias that has moved a little since; then one
    pass of subspace iteration does, from its rows and a few fresh random columns. Not used by the
    svd, nor where it does not fit (other batch, heads or key count; M may differ).
    generator: for the random columns; without it a private one is seeded, and no global state
    moves.

    A bias repeated over batch or heads is factorised, and its factors are stored, once.

    Gradients. No derivative of an SVD is taken: with U, V the orthonormal factors, held constant,
    the bias is the projection P(W) = W V V^T + U U^T W - U U^T W V V^T of the dense W, and the
    gradient G with respect to it becomes P(G) with respect to W. For a W that is truly of the rank
    kept this is the exact gradient, for whatever W = A B^T is made of, A and B alike. Otherwise the
    part of G outside the rows and
    columns kept does not arrive: directions that the bias does not have yet are not learned through
    it. As an all-zero bias has none, it is used dense while it requires grad (`bias_scale` = 0
    would stay 0).

    Raises ValueError and TypeError for arguments out of range. NaN or +inf in the bias: used dense,
    with the reason, as an overflow is the loss scaler's to handle.
    """
    _check(rank, energy, method, max_error)
    terms = (bias if isinstance(bias, AttentionBias) else DenseBias(bias, num_heads))._terms()
    whole = add_terms(terms)
    given = _dense_term(whole)
    if given is None:
        return Factorization(whole, 0.0, whole.rank or 0, 1.0, False, "no dense term", warm_start)
    if not given.numel():
        return Factorization(whole, 0.0, 0, 1.0, True, "the bias is empty", None)
    if energy is None and rank is None:
        energy = DEFAULT_ENERGY
    if max_error is None:
        max_error = max(
            DEFAULT_MAX_ERROR, math.sqrt(1 - energy) * (1 + 1e-3) if energy is not None else 0.0
        )

    once = _without_repeats(given)
    has_mask = bool(once.detach().amin() == -math.inf)
    masked = torch.isneginf(once) if has_mask else None
    with torch.no_grad(), full_precision(once.device):
        matrix = once.detach().to(torch.promote_types(once.dtype, torch.float32))
        if masked is not None:
            matrix = matrix.masked_fill(masked, 0.0)
        problem = _Problem(matrix, _squares(matrix), rank, energy, method, generator)
        trouble = _unusable(problem.squares, given.requires_grad)
        if trouble:
            return Factorization(whole, 0.0, 0, 1.0, True, trouble, None)
        warm = warm_start if warm_start is not None and _fits(warm_start, matrix) else None
        svd, missed = _search(problem, warm)
        error = _residual(problem, svd)
        if error > max_error and warm is not None and not warm.hopeless:
            svd, missed = _search(problem, None)
            error = _residual(problem, svd)
    if error > max_error and not missed:
        missed = f"relative error {error:.3g} is above max_error {max_error:.3g}"
    kept = svd.values.shape[-1]
    calls = 0 if warm_start is None else warm_start.calls + 1
    state = FactorState(
        svd.right[..., : _FIRST_RANK if missed else kept].contiguous(), calls, bool(missed)
    )
    found = (error, kept, 1 - error * error)
    if missed:
        return Factorization(whole, *found, True, missed, state)
    low: AttentionBias = LowRankBias(
        *_Project.apply(given, masked, svd.left, svd.values, svd.right)
    )
    rest = tuple(term for term in terms if not isinstance(term, DenseBias))
    mask = () if masked is None else (MaskBias(masked),)
    return Factorization(add_terms((low,) + rest + mask), *found, False, "", state)


class _Problem(NamedTuple):
    matrix: Tensor  # (B|1, H|1, M, N), finite, float32 or float64
    squares: Tensor  # (B|1, H|1) float64: squared Frobenius norms
    rank: Optional[int]
    energy: Optional[float]
    method: str
    generator: Optional[torch.Generator]


class _Project(torch.autograd.Function):
    """given -> factors of its projection; backward projects the gradient likewise (see factorize).

    The factors are balanced, left * sqrt(values) and right * sqrt(values): as good for half
    precision as can be. Where the bias repeats they are stored once and expanded, so that each copy
    gets its own gradient: copies may be parameters that only happen to be equal now.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        masked: Optional[Tensor],
        left: Tensor,
        values: Tensor,
        right: Tensor,
    ) -> Factors:
        ctx.save_for_backward(masked, left, values, right)
        ctx.dtype = given.dtype
        root = values.sqrt().unsqueeze(-2)
        factors = [(side * root).permute(0, 2, 1, 3).contiguous() for side in (left, right)]
        if given.requires_grad:
            factors = [factor.expand(given.shape[0], -1, given.shape[1], -1) for factor in factors]
        return factors[0], factors[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        masked, left, values, right = ctx.saved_tensors
        inverse = torch.where(values > 0, values.rsqrt(), torch.zeros_like(values)).unsqueeze(-2)
        with full_precision(left.device):
            by_right = q_grad.to(left.dtype).permute(0, 2, 1, 3) * inverse  # G V
            by_left = k_grad.to(left.dtype).permute(0, 2, 1, 3) * inverse  # G^T U
            outside = by_right - left @ (left.transpose(-2, -1) @ by_right)  # (1 - U U^T) G V
            grad = outside @ right.transpose(-2, -1) + left @ by_left.transpose(-2, -1)
        if masked is not None:
            grad = grad.masked_fill(masked, 0.0)
        return grad.to(ctx.dtype), None, None, None, None


def _search(problem: _Problem, warm: Optional[FactorState]) -> Tuple[_Svd, str]:
    """The decomposition cut to the rank to keep, and what it fails to reach, if anything."""
    matrix = problem.matrix
    rows, columns = matrix.shape[-2:]
    short = min(rows, columns)
    widest = min(
        _WIDEST, max(1, rows * columns // (rows + columns))
    )  # factors no larger than the bias
    cap = widest if problem.rank is None else min(problem.rank, short)
    if problem.method == "svd" or (problem.method == "auto" and short <= _SMALL):
        # The CUDA default (Jacobi) leaves the factors orthonormal to some 1e-4 only, QR iteration
        # to 1e-6.
        driver = {"driver": "gesvd"} if matrix.is_cuda and RELEASE >= (1, 11) else {}
        left, values, right = torch.linalg.svd(matrix, full_matrices=False, **driver)
        return _cut(_Svd(left, values, right.transpose(-2, -1)), problem, cap)

    limit = min(short, cap + _OVERSAMPLE)
    fixed = problem.energy is None
    basis = (
        matrix.new_empty(matrix.shape[:2] + (columns, 0)) if warm is None else warm.basis.to(matrix)
    )
    start = cap if fixed else _FIRST_RANK if warm is None else basis.shape[-1]
    width, passes = min(limit, start + _OVERSAMPLE), 2 if warm is None else 1
    generator = problem.generator
    if generator is None:
        generator = torch.Generator(matrix.device).manual_seed(
            0 if warm is None else warm.calls + 1
        )
    while True:
        svd = _iterate(matrix, basis[..., :width], width, passes, generator)
        result, missed = _cut(svd, problem, cap)
        if not missed or width == limit or (warm is not None and warm.hopeless):
            return result, missed
        basis, passes, width = svd.right, 1, min(limit, 2 * width)


def _iterate(
    matrix: Tensor, basis: Tensor, width: int, passes: int, generator: torch.Generator
) -> _Svd:
    """Subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) from a basis and random
    columns."""
    shape = basis.shape[:-1] + (width - basis.shape[-1],)
    fresh = torch.randn(shape, generator=generator, device=matrix.device, dtype=matrix.dtype)
    fresh = fresh / math.sqrt(matrix.shape[-1])  # as long as the orthonormal ones
    right = torch.cat([basis, fresh], dim=-1)
    for step in range(passes):
        if step:
            right = torch.linalg.qr(right).Q
        left = torch.linalg.qr(matrix @ right).Q
        right = matrix.transpose(-2, -1) @ left
    # The SVD of the tall thin `right` through its Gram matrix, in float64, where squaring costs no
    # digits.
    gram = right.double().transpose(-2, -1) @ right.double()
    squares, turn = torch.linalg.eigh(gram.cpu())  # some 16 x 16: not worth a GPU solver's start
    squares = squares.flip(-1).clamp(min=0).to(matrix.device)
    turn = turn.flip(-1).to(matrix)
    values = squares.sqrt().to(matrix.dtype)
    noise = 32 * torch.finfo(matrix.dtype).eps * values[..., :1]
    values = torch.where(values > noise, values, torch.zeros_like(values))
    inverse = torch.where(values > 0, 1 / values, torch.zeros_like(values))
    return _Svd(left @ turn, values, (right @ turn) * inverse.unsqueeze(-2))


def _cut(svd: _Svd, problem: _Problem, cap: int) -> Tuple[_Svd, str]:
    """The columns to keep, at most `cap`, the same number for every batch entry and head."""
    kept, missed = min(cap, svd.values.shape[-1]), ""
    if problem.energy is not None:
        share = svd.values.double().square().cumsum(-1) / problem.squares.unsqueeze(-1)
        share = torch.where(problem.squares.unsqueeze(-1) > 0, share, torch.ones_like(share))
        tolerance = 4 * torch.finfo(problem.matrix.dtype).eps
        needed = int((share < problem.energy - tolerance).sum(-1).max()) + 1
        if needed > kept and problem.rank is None:
            missed = f"no rank up to {kept} keeps {problem.energy!r} of the squared singular values"
        kept = min(kept, needed)
    return _Svd(svd.left[..., :kept], svd.values[..., :kept], svd.right[..., :kept]), missed


def _squares(matrix: Tensor) -> Tensor:
    """Squared Frobenius norms (B|1, H|1): rows summed in the matrix's precision, the rest in
    float64."""
    return torch.linalg.vector_norm(matrix, dim=-1).double().square().sum(-1)


def _residual(problem: _Problem, svd: _Svd) -> float:
    """The relative Frobenius error, measured entry by entry, of the worst batch entry or head."""
    matrix = problem.matrix
    rows = max(1, _BLOCK // (matrix.shape[0] * matrix.shape[1] * matrix.shape[3]))
    left = svd.left * svd.values.unsqueeze(-2)
    missing = torch.zeros_like(problem.squares)
    for block, left_block in zip(matrix.split(rows, dim=2), left.split(rows, dim=2)):
        missing += _squares(block - left_block @ svd.right.transpose(-2, -1))
    share = torch.where(problem.squares > 0, missing / problem.squares, torch.zeros_like(missing))
    return math.sqrt(float(share.max()))


def _without_repeats(tensor: Tensor) -> Tensor:
    """One slice where all along batch or heads are equal; a glance at a few rows spares most
    comparisons."""
    glance = tensor[:, :, :: max(1, tensor.shape[2] // 4)]
    for dim in (1, 0):
        for view in (glance, tensor):
            slices = view.detach().unbind(dim)
            if not all(torch.equal(slices[0], other) for other in slices[1:]):
                break
        else:
            tensor, glance = tensor.narrow(dim, 0, 1), glance.narrow(dim, 0, 1)
    return tensor


def _unusable(squares: Tensor, requires_grad: bool) -> str:
    if not torch.isfinite(squares).all():
        return "the bias holds NaN or +inf"
    if requires_grad and (squares == 0).any():
        return (
            "the bias is all zero for a batch entry or head: no row or column for its "
            "gradient to follow"
        )
    return ""


def _dense_term(bias: AttentionBias) -> Optional[Tensor]:
    for term in bias._terms():
        if isinstance(term, DenseBias):
            return term.tensor
    return None


def _fits(state: FactorState, matrix: Tensor) -> bool:
    return state.basis.shape[:3] == (matrix.shape[0], matrix.shape[1], matrix.shape[3])


def _check(
    rank: Optional[int], energy: Optional[float], method: str, max_error: Optional[float]
) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank: expected an int >= 1 or None, got {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1] or None, got {energy!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max_error: expected a relative error >= 0 or None, got {max_error!r}")
