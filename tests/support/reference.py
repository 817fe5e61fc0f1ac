"""Textbook attention for tests. It imports nothing of the package, so that both cannot share an
error."""

from __future__ import annotations

import math
from typing import Any, Optional, Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
    scale: Optional[float] = None,
    dropout_keep: Optional[Tensor] = None,
    dtype: Optional[torch.dtype] = torch.float64,
) -> Tensor:
    """softmax(scale * q k^T + bias) v; differentiable by autograd.

    Args:
        q, k, v: (B, M, H, D), (B, N, H, D), (B, N, H, Dv).
        bias: dense, (M, N), (B, M, N), (B*H, M, N) or anything that broadcasts to (B, H, M, N).
        mask: like bias; boolean (True hides the key) or floating (added).
        key_padding_mask: (B, N), boolean (True hides the key) or floating (added).
        scale: factor of q k^T; 1/sqrt(D) by default.
        dropout_keep: (B, H, M, N), factors of the weights: 0 where dropped, 1 / (1 - p) elsewhere.
        dtype: dtype of the computation and of the result; None: q's.

    Returns:
        (B, M, H, Dv); zeros in a row whose keys are all hidden or at -inf.
    """
    p = weights(q, k, bias, mask, key_padding_mask, scale, dtype)
    p = p if dropout_keep is None else p * dropout_keep.to(p.dtype)
    return torch.einsum("bhmn,bnhd->bmhd", p, v.to(p.dtype))


def weights(
    q: Tensor,
    k: Tensor,
    bias: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
    scale: Optional[float] = None,
    dtype: Optional[torch.dtype] = torch.float64,
) -> Tensor:
    """The softmax, (B, H, M, N), of the arguments of `attention`."""
    dtype = q.dtype if dtype is None else dtype
    B, _, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    scores = torch.einsum("bmhd,bnhd->bhmn", q.to(dtype), k.to(dtype)) * scale
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    for term in (bias, mask, padding):
        if term is None:
            continue
        if term.ndim == 3:  # one per sample, or nn.MultiheadAttention's layout: batch x heads first
            term = term[:, None] if len(term) == B else term.reshape(B, H, *term.shape[1:])
        if term.dtype == torch.bool:
            scores = scores.masked_fill(term, -math.inf)
        else:
            scores = scores + term.to(dtype)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def product(q_factor: Tensor, k_factor: Tensor) -> Tensor:
    """The bias (B|1, H|1, M, N) of factors (B|1, M, H|1, R) and (B|1, N, H|1, R)."""
    return q_factor.transpose(1, 2) @ k_factor.transpose(1, 2).transpose(-1, -2)


def spread(segment_weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """The bias (B|1, H|1, M, N) of weights (B|1, M, H|1, S): each for `length` keys."""
    columns = [
        segment_weights[..., place, None].expand(*segment_weights.shape[:3], length)
        for place, length in enumerate(lengths)
    ]
    return torch.cat(columns, -1).transpose(1, 2)


def of_call(
    inputs: Any, dropout_keep: Optional[Tensor] = None, dtype: Optional[torch.dtype] = torch.float64
) -> Tensor:
    """`attention` of a named tuple with the fields of AttentionInputs, without windows."""
    terms = [] if inputs.dense is None else [inputs.dense]
    if inputs.q_factor is not None:
        terms.append(product(inputs.q_factor, inputs.k_factor))
    if inputs.segment_weights is not None:
        terms.append(spread(inputs.segment_weights, inputs.segment_lengths))
    bias = sum(terms[1:], terms[0]) if terms else None
    operands = inputs.q, inputs.k, inputs.v, bias, inputs.mask, inputs.key_padding, inputs.scale
    return attention(*operands, dropout_keep, dtype)
