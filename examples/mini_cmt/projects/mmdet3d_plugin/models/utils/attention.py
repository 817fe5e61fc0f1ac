"""Multi-head attention through flash-attn 0.2.x: half precision, CUDA only, no mask.

Importing this module needs flash-attn.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401  (the usual three)
from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)


class FlashAttention(nn.Module):
    """softmax(q k^T * scale) v over packed keys and values."""

    def __init__(
        self,
        softmax_scale: Optional[float] = None,
        attention_dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout
        self.fp16_enabled = True

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool = False, key_padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, None]:
        """q (B, M, H, D), kv (B, N, 2, H, D), key_padding_mask (B, N) True = keep -> (B, M, H, D)
        float32."""
        if self.fp16_enabled:
            q, kv = q.half(), kv.half()
        assert q.dtype in HALF_DTYPES and kv.dtype in HALF_DTYPES, (q.dtype, kv.dtype)
        assert q.is_cuda and kv.is_cuda, "FlashAttention runs on CUDA only"
        assert q.shape[0] == kv.shape[0] and q.shape[-2:] == kv.shape[-2:], (q.shape, kv.shape)

        batch, num_queries, num_keys = q.shape[0], q.shape[1], kv.shape[1]
        query_ends = num_queries * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        if key_padding_mask is None:
            kv_rows, longest = kv.flatten(0, 1), num_keys
            key_ends = num_keys * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        else:
            heads = kv.shape[-2]
            kv_rows, _, key_ends, longest = unpad_input(kv.flatten(2), key_padding_mask)
            kv_rows = kv_rows.unflatten(1, (2, heads, -1))
        out = flash_attn_unpadded_kvpacked_func(
            q.flatten(0, 1),
            kv_rows,
            query_ends,
            key_ends,
            num_queries,
            longest,
            self.dropout_p if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=causal,
        )
        return out.unflatten(0, (batch, num_queries)).float(), None


class FlashMHA(nn.Module):
    """Projections around `FlashAttention`; batch first. Weights are packed as in
    nn.MultiheadAttention."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        assert batch_first, "FlashMHA is batch first"
        assert embed_dim % num_heads == 0, (
            f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}"
        )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.bias = bias
        self.in_proj_weight = nn.Parameter(
            torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype)
        )
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim, device=device, dtype=dtype))
        else:
            self.register_parameter("in_proj_bias", None)
        self.inner_attn = FlashAttention(
            attention_dropout=attention_dropout, device=device, dtype=dtype
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bool(bias), device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, None]:
        """q (B, M, E), k and v (B, N, E) -> ((B, M, E), None)."""
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))
            for x, weight, bias in zip((q, k, v), weights, biases)
        )
        context, _ = self.inner_attn(
            q, torch.stack((k, v), dim=2), causal=self.causal, key_padding_mask=key_padding_mask
        )
        return self.out_proj(context.flatten(2)), None
