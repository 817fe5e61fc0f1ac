"""Textbook attention for tests. It imports nothing of the package, so that both cannot share an
error."""

from __future__ import annotations

import math
from typing import Optional

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
