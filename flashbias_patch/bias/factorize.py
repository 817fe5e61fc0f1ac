"""Factorise a dense bias into a low-rank one by exact or randomised SVD, and measure the error."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .._torch_internals import RELEASE, Function, once_differentiable
from .base import AttentionBias, DenseBias, LowRankBias, MaskBias, add_terms
from .checks import is_int
from .factors import Factors, full_precision

METHODS = ("auto", "svd", "randomized")
DEFAULT_ENERGY = 0.9999
DEFAULT_MAX_ERROR = 2e-2
_OVERSAMPLE = (
    8  # columns beyond the requested rank (Halko, Martinsson & Tropp 2011, section 4.2: 5 or 10)
)
_FIRST_RANK = 16  # first rank of the search for one that keeps the energy
_WIDEST = 256  # above this rank, factors cost more in attention than the dense bias
_SMALL = 64  # up to this size of the shorter side the exact SVD is as fast
_BLOCK = 1 << 24  # entries of the residual computed at a time


class FactorState(NamedTuple):
    """The state of a factorisation; pass it as `warm_start` to the next one."""

    basis: Tensor  # (B|1, H|1, N, R), orthonormal; spans the rows
    calls: int  # number of calls, so that each call draws new columns
    hopeless: bool  # no rank kept the energy last time: try one rank, do not search


class Factorization(NamedTuple):
    """The result of `factorize`.

    Attributes:
        bias: the bias to use: low-rank (plus a MaskBias if entries were -inf), or the dense bias if
            `used_dense`.
        relative_error: the measured Frobenius norm of the difference, divided by the norm of the
            finite entries; of the batch entry and head where it is largest.
        rank: number of columns.
        energy: share of the squared singular values that is kept, 1 - relative_error**2.
        used_dense: True if the dense bias is used. Then relative_error, rank and energy are those
            of the rejected low-rank form (0, 0, 1 if none was tried).
        reason: why the dense bias is used, or "".
        state: to pass as `warm_start` next time, or None.
    """

    bias: AttentionBias
    relative_error: float
    rank: int
    energy: float
    used_dense: bool
    reason: str
    state: Optional[FactorState]


class _Svd(NamedTuple):
    """A decomposition W ~ left * values @ right^T.

    left (B, H, M, K) and right (B, H, N, K) are orthonormal; values are in descending order.
    """

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
    """Return a low-rank form of a dense bias, or the dense bias if no low-rank form is exact
    enough.

    bias: a floating tensor (M, N), (B, M, N), (B*H, M, N) with `num_heads`, or (B, H, M, N), or an
    AttentionBias. Half precision is computed in float32. The dense term of an AttentionBias is
    factorised, its other terms are kept. -inf entries become a MaskBias and count as 0, so masks in
    blocks raise the rank.

    rank: this many columns. energy, in (0, 1]: the smallest rank that keeps this share of the
    squared singular values of every batch entry and head (0.9999 if neither is given), at most
    `rank` if both are given. The relative Frobenius error is sqrt(1 - energy): energy 0.90 is an
    error of 32 %. max_error: the dense bias is used above this relative error. Default 2e-2, or
    sqrt(1 - energy) for an energy that implies more. method: "svd" (exact), "randomized" (subspace
    iteration: Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4), "auto" (svd if the
    shorter side is at most 64). warm_start: the `state` of the previous call on a bias that has
    changed little since; then one pass of subspace iteration, from its rows and a few new random
    columns, is enough. It is ignored by the exact SVD and if it does not fit (other batch, heads or
    number of keys; M may differ). generator: for the random columns; by default a private one with
    a fixed seed, so global random state is unchanged.

    A bias that repeats over batch or heads is factorised once, and its factors are stored once.

    Gradients. No derivative of an SVD is taken: with U, V the orthonormal factors, held constant,
    the bias is the projection P(W) = W V V^T + U U^T W - U U^T W V V^T of the dense W, and the
    gradient G with respect to it becomes P(G) with respect to W. If the rank of W is
    the rank kept, this is the exact gradient, also for the tensors that W was computed from.
    Otherwise the part of G outside the kept rows and columns is lost: the bias cannot learn
    directions that it does not have yet. An all-zero bias has no direction, so it is used densely
    while it requires grad (else `bias_scale` = 0 would stay 0).

    A bias with NaN or +inf is used densely, with that reason; the loss scaler handles overflows.

    Raises:
        TypeError, ValueError: an argument is out of range; the message names it.
    """
    _check(rank, energy, method, max_error)
    terms = (bias if isinstance(bias, AttentionBias) else DenseBias(bias, num_heads))._terms()
    whole = add_terms(terms)
    dense = _dense_term(whole)
    if dense is None:
        return Factorization(whole, 0.0, whole.rank or 0, 1.0, False, "no dense term", warm_start)
    if not dense.numel():
        return Factorization(whole, 0.0, 0, 1.0, True, "the bias is empty", None)
    if energy is None and rank is None:
        energy = DEFAULT_ENERGY
    if max_error is None:
        max_error = max(
            DEFAULT_MAX_ERROR, math.sqrt(1 - energy) * (1 + 1e-3) if energy is not None else 0.0
        )

    once = _without_repeats(dense)
    has_mask = bool(once.detach().amin() == -math.inf)
    masked = torch.isneginf(once) if has_mask else None
    with torch.no_grad(), full_precision(once.device):
        matrix = once.detach().to(torch.promote_types(once.dtype, torch.float32))
        if masked is not None:
            matrix = matrix.masked_fill(masked, 0.0)
        problem = _Problem(matrix, _squares(matrix), rank, energy, method, generator)
        problem_found = _unusable(problem.squares, dense.requires_grad)
        if problem_found:
            return Factorization(whole, 0.0, 0, 1.0, True, problem_found, None)
        warm = warm_start if warm_start is not None and _fits(warm_start, matrix) else None
        svd, missed = _search(problem, warm)
        error = _residual(problem, svd)
        if error > max_error and warm is not None and not warm.hopeless:
            svd, missed = _search(problem, None)
            error = _residual(problem, svd)
    if error > max_error and not missed:
        missed = f"relative error {error:.3g} is above max_error {max_error:.3g}"
    columns = svd.values.shape[-1]
    calls = 0 if warm_start is None else warm_start.calls + 1
    state = FactorState(
        svd.right[..., : _FIRST_RANK if missed else columns].contiguous(), calls, bool(missed)
    )
    measured = (error, columns, 1 - error * error)
    if missed:
        return Factorization(whole, *measured, True, missed, state)
    factors = _Project.apply(dense, masked, svd.left, svd.values, svd.right)
    low_rank: AttentionBias = LowRankBias(*factors)
    rest = tuple(term for term in terms if not isinstance(term, DenseBias))
    mask = () if masked is None else (MaskBias(masked),)
    return Factorization(add_terms((low_rank,) + rest + mask), *measured, False, "", state)


class _Problem(NamedTuple):
    matrix: Tensor  # (B|1, H|1, M, N), finite, float32 or float64
    squares: Tensor  # (B|1, H|1) float64: squared Frobenius norms
    rank: Optional[int]
    energy: Optional[float]
    method: str
    generator: Optional[torch.Generator]


class _Project(Function):
    """Compute the factors of the projection of a dense bias; backward projects the gradient.

    See factorize. The factors are balanced, left * sqrt(values) and right * sqrt(values), which
    suits half precision. If the bias repeats, they are stored once and expanded, so that each copy
    gets its own gradient: copies may be different parameters that are equal at the moment.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dense: Tensor,
        masked: Optional[Tensor],
        left: Tensor,
        values: Tensor,
        right: Tensor,
    ) -> Factors:
        ctx.save_for_backward(masked, left, values, right)
        ctx.dtype = dense.dtype
        root = values.sqrt().unsqueeze(-2)
        factors = [(side * root).permute(0, 2, 1, 3).contiguous() for side in (left, right)]
        if dense.requires_grad:
            factors = [factor.expand(dense.shape[0], -1, dense.shape[1], -1) for factor in factors]
        q_factor, k_factor = factors
        return q_factor, k_factor

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
    """Return the decomposition at the rank to keep, and a message if it misses the energy."""
    matrix = problem.matrix
    rows, columns = matrix.shape[-2:]
    short = min(rows, columns)
    widest = min(
        _WIDEST, max(1, rows * columns // (rows + columns))
    )  # factors no larger than the bias
    cap = widest if problem.rank is None else min(problem.rank, short)
    if problem.method == "svd" or (problem.method == "auto" and short <= _SMALL):
        # With the default driver on CUDA (Jacobi) the factors are orthonormal to about 1e-4, with
        # QR iteration to 1e-6.
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
    """Run subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) from a basis and
    random columns."""
    shape = basis.shape[:-1] + (width - basis.shape[-1],)
    fresh = torch.randn(shape, generator=generator, device=matrix.device, dtype=matrix.dtype)
    fresh = fresh / math.sqrt(matrix.shape[-1])  # of the length of the orthonormal columns
    right = torch.cat([basis, fresh], dim=-1)
    for step in range(passes):
        if step:
            right = torch.linalg.qr(right).Q
        left = torch.linalg.qr(matrix @ right).Q
        right = matrix.transpose(-2, -1) @ left
    # The SVD of the tall thin `right` by its Gram matrix, in float64, so that squaring does not
    # lose precision.
    gram = right.double().transpose(-2, -1) @ right.double()
    squares, turn = torch.linalg.eigh(gram.cpu())  # about 16 x 16: faster on the CPU
    squares = squares.flip(-1).clamp(min=0).to(matrix.device)
    turn = turn.flip(-1).to(matrix)
    values = squares.sqrt().to(matrix.dtype)
    noise = 32 * torch.finfo(matrix.dtype).eps * values[..., :1]
    values = torch.where(values > noise, values, torch.zeros_like(values))
    inverse = torch.where(values > 0, 1 / values, torch.zeros_like(values))
    return _Svd(left @ turn, values, (right @ turn) * inverse.unsqueeze(-2))


def _cut(svd: _Svd, problem: _Problem, cap: int) -> Tuple[_Svd, str]:
    """Cut to the columns to keep, at most `cap`, the same number for every batch entry and head."""
    columns, missed = min(cap, svd.values.shape[-1]), ""
    if problem.energy is not None:
        share = svd.values.double().square().cumsum(-1) / problem.squares.unsqueeze(-1)
        share = torch.where(problem.squares.unsqueeze(-1) > 0, share, torch.ones_like(share))
        tolerance = 4 * torch.finfo(problem.matrix.dtype).eps
        needed = int((share < problem.energy - tolerance).sum(-1).max()) + 1
        if needed > columns and problem.rank is None:
            missed = (
                f"no rank up to {columns} keeps {problem.energy!r} of the squared singular values"
            )
        columns = min(columns, needed)
    return _Svd(
        svd.left[..., :columns], svd.values[..., :columns], svd.right[..., :columns]
    ), missed


def _squares(matrix: Tensor) -> Tensor:
    """Return squared Frobenius norms (B|1, H|1); rows are summed in the precision of the matrix,
    the rest in float64."""
    row_norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return row_norms.double().square().sum(-1)


def _residual(problem: _Problem, svd: _Svd) -> float:
    """Return the measured relative Frobenius error of the worst batch entry and head."""
    matrix = problem.matrix
    rows = max(1, _BLOCK // (matrix.shape[0] * matrix.shape[1] * matrix.shape[3]))
    left = svd.left * svd.values.unsqueeze(-2)
    missing = torch.zeros_like(problem.squares)
    for block, left_block in zip(matrix.split(rows, dim=2), left.split(rows, dim=2)):
        missing += _squares(block - left_block @ svd.right.transpose(-2, -1))
    share = torch.where(problem.squares > 0, missing / problem.squares, torch.zeros_like(missing))
    return math.sqrt(float(share.max()))


def _without_repeats(tensor: Tensor) -> Tensor:
    """Return one slice if all slices along batch or heads are equal.

    A few rows are compared first, which usually shows a difference already.
    """
    sample = tensor[:, :, :: max(1, tensor.shape[2] // 4)]
    for dim in (1, 0):
        for view in (sample, tensor):
            slices = view.detach().unbind(dim)
            if not all(torch.equal(slices[0], other) for other in slices[1:]):
                break
        else:
            tensor, sample = tensor.narrow(dim, 0, 1), sample.narrow(dim, 0, 1)
    return tensor


def _unusable(squares: Tensor, requires_grad: bool) -> str:
    if not torch.isfinite(squares).all():
        return "the bias holds NaN or +inf"
    if requires_grad and (squares == 0).any():
        return (
            "the bias is all zero for a batch entry or head, so its low-rank form would get no "
            "gradient"
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
    if rank is not None and not (is_int(rank) and rank >= 1):
        raise ValueError(f"rank: expected an int >= 1 or None, got {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy: expected a share in (0, 1] or None, got {energy!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if max_error is not None and not max_error >= 0:
        raise ValueError(f"max_error: expected a relative error >= 0 or None, got {max_error!r}")
