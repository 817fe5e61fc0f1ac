"""The public function: flash_bias_attention."""

from __future__ import annotations

from typing import Any, Optional, Union

import torch
from torch import Tensor

from .._torch_internals import any_autocast, autocast_off
from ..bias import AttentionBias, BiasTensor
from . import dispatch, fp16_gradients, observe
from .dispatch import is_compiling
from .inputs import build_in, read_descriptions


def flash_bias_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[Union[AttentionBias, Tensor]] = None,
    *,
    attn_mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    backend: Optional[str] = None,
    dtype: Optional[torch.dtype] = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v, with a low-rank or dense bias, differentiable in q, k, v and
    the bias.

    Args:
        q, k, v: (B, M, H, D), (B, N, H, D), (B, N, H, Dv); float16, bfloat16, float32 or float64;
            any strides.
        bias: an AttentionBias, or a dense Tensor (M,N), (B,M,N), (B*H,M,N) or (B,H,M,N), added to
            the *scaled* scores (FlashBias, arXiv 2505.12044, eq. 3).
        attn_mask: boolean or byte (True = masked out, as in torch.nn.MultiheadAttention) or
            floating (additive); (M,N), (B,M,N), (B*H,M,N) or (B,H,M,N).
        key_padding_mask: (B, N), boolean (True = masked out) or floating (additive).
        dropout_p: probability of dropping an attention weight, in [0, 1).
        scale: factor on q k^T; default 1/sqrt(D).
        backend: "triton", "flash", "upstream", "sdpa" or "reference"; default: the fastest that
            takes the call.
        dtype: compute dtype, whatever autocast is open; default: q's. In float16 under a wider q,
            gradients are scaled on their way through, so that small ones are not lost
            (fp16_gradients.py).

    Returns:
        (B, M, H, Dv) in q's dtype. A row whose keys are all masked is zero.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        flashbias_patch.attention.dispatch.NoBackendError: no backend takes the call; lists why.
    """
    return attention_output(
        q, k, v, bias, attn_mask, key_padding_mask, dropout_p, scale, backend, dtype
    )


def attention_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any = None,
    attn_mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
    backend: Optional[str] = None,
    dtype: Optional[torch.dtype] = None,
    fitted: bool = False,
) -> Tensor:
    """flash_bias_attention. fitted: `bias` is None or an AttentionBias that as_bias gave for a call
    of this size."""
    given = q, k, v, bias, attn_mask, key_padding_mask, dropout_p, scale, backend, dtype, fitted
    if is_compiling():
        with torch.autocast(q.device.type, enabled=False):
            return _attend(*given, traced=True)
    if any_autocast():  # it would change the precision inside backends
        with autocast_off():
            return _attend(*given)
    return _attend(*given)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    attn_mask: Optional[Tensor],
    key_padding_mask: Optional[Tensor],
    dropout_p: float,
    scale: Optional[float],
    backend: Optional[str],
    dtype: Optional[torch.dtype],
    fitted: bool,
    traced: bool = False,
) -> Tensor:
    """flash_bias_attention outside autocast."""
    if traced:
        inputs, power = build_in(
            dtype, q, k, v, bias, attn_mask, key_padding_mask, dropout_p, scale
        )
        out = dispatch.attend_traced(inputs, backend)
    else:
        if type(bias) is BiasTensor or type(attn_mask) is BiasTensor:
            bias, attn_mask = read_descriptions(q, k, bias, attn_mask)
            fitted = True
        inputs, power = build_in(
            dtype, q, k, v, bias, attn_mask, key_padding_mask, dropout_p, scale, fitted
        )
        out = dispatch.attend(inputs, backend)
    out = out if out.dtype is q.dtype else fp16_gradients.widened(out, q.dtype, power)
    if bias is not None and isinstance(bias, AttentionBias) and bias._sources:
        out = observe.observed(out, inputs, bias)
    return out
