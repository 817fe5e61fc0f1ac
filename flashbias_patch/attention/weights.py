"""Attention weights, computed."""

from __future__ import annotations

from typing import Optional, Sequence, Union

from torch import Tensor

from ..bias import AttentionBias
from . import observe, reference_attention
from .inputs import build


def attention_weights(
    q: Tensor,
    k: Tensor,
    bias: Optional[Union[AttentionBias, Tensor]] = None,
    *,
    attn_mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
    handles: Optional[Sequence[Tensor]] = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias), (B, H, M, N), in at least float32; arguments as
    flash_bias_attention's.

    A row whose keys are all masked is zero. handles: leaves that mark the use of bias tensors in
    the graph, instead of the tensors' own (observe.py).
    """
    inputs = build(q, k, k, bias, attn_mask=attn_mask, key_padding_mask=key_padding_mask)
    scores = reference_attention.scores(inputs)
    if isinstance(bias, AttentionBias) and bias._sources:
        scores = observe.observed_scores(scores, bias, handles)
    return reference_attention.normalized(scores)
