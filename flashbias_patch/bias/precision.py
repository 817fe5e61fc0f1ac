"""Represent float32 factors in half precision by splitting them into high and low parts."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors import Factors

_HALF = (torch.float16, torch.bfloat16)
LARGEST_HALF = 65504.0


def split_factors(q_factor: Tensor, k_factor: Tensor, dtype: torch.dtype) -> Factors:
    """Return factors in `dtype` with the same product, if that is accumulated in float32.

    q_factor (B|1, M, H|1, R), k_factor (B|1, N, H|1, R), floating. For float16 and bfloat16 a
    factor f not yet in `dtype` becomes f_high + f_low, both in `dtype`, and the product is

        q k  ~  q_high k_high + q_high k_low + q_low k_high

    which has 3R columns (2R if one factor is in `dtype` already, R if both are). The omitted
    product and the rounding of the low parts are at most 3 * 2**-22 (float16) or 3 * 2**-16
    (bfloat16) of |q k| per column. For float16, columns are first balanced by powers of two, so
    that no factor overflows or becomes subnormal if the product does not. For float32 and float64
    the factors are cast and R stays.

    Differentiable through the high parts. The low parts are constants, because the derivative of a
    rounding error is zero almost everywhere.
    """
    if dtype not in _HALF or (q_factor.dtype == dtype and k_factor.dtype == dtype):
        return q_factor.to(dtype), k_factor.to(dtype)
    split_q, split_k = q_factor.dtype != dtype, k_factor.dtype != dtype
    if dtype == torch.float16:
        q_factor, k_factor = _balanced(q_factor, k_factor)
        # Products beyond 65504 ** 2 are clamped there: finite, and far beyond all other scores.
        q_factor, k_factor = (
            factor.clamp(-LARGEST_HALF, LARGEST_HALF) for factor in (q_factor, k_factor)
        )
    q_high, k_high = q_factor.to(dtype), k_factor.to(dtype)
    q_columns, k_columns = [q_high], [k_high]
    if split_k:
        q_columns.append(q_high)
        k_columns.append(_low_part(k_factor, k_high))
    if split_q:
        q_columns.append(_low_part(q_factor, q_high))
        k_columns.append(k_high)
    return torch.cat(q_columns, dim=-1), torch.cat(k_columns, dim=-1)


def _low_part(factor: Tensor, high: Tensor) -> Tensor:
    with torch.no_grad():
        return (factor - high.to(factor.dtype)).to(high.dtype)


def _balanced(q_factor: Tensor, k_factor: Tensor) -> Factors:
    """Scale columns by 2**-e and 2**e to similar magnitudes; the product does not change.

    If one column is zero (a learned scale that starts at 0), the other is scaled to 1. In half
    precision it could be inf, and 0 * inf is NaN.
    """
    if not q_factor.numel() or not k_factor.numel():
        return q_factor, k_factor
    with torch.no_grad():
        q_size, k_size = (
            torch.log2(factor.abs().amax(dim=(0, 1, 2)).float()) for factor in (q_factor, k_factor)
        )
        exponent = (q_size - k_size) / 2
        exponent = torch.where(
            q_size == float("-inf"), -k_size, torch.where(k_size == float("-inf"), q_size, exponent)
        )
        exponent = torch.where(
            exponent.isfinite(), exponent.round().clamp(-126, 126), torch.zeros_like(exponent)
        )
        ones = torch.ones_like(exponent)
        shrink, grow = torch.ldexp(ones, -exponent), torch.ldexp(ones, exponent)
    return q_factor * shrink, k_factor * grow
