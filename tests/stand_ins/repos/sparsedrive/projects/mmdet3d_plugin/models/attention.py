"""SparseDrive and DiffusionDrive: a flash class that is really batch first, applies key padding
and refuses a mask. The import of either generation of flash-attn is tried."""

import torch
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.registry import ATTENTION
from mmcv.runner import auto_fp16
from mmcv.runner.base_module import BaseModule
from torch import nn

try:
    from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func as varlen_func
except Exception:
    from flash_attn.flash_attn_interface import flash_attn_varlen_kvpacked_func as varlen_func
from flash_attn.bert_padding import unpad_input


class FlashAttention(nn.Module):
    def __init__(self, attention_dropout=0.0):
        super().__init__()
        self.dropout_p, self.fp16_enabled = attention_dropout, True

    @auto_fp16(apply_to=("q", "kv"), out_fp32=True)
    def forward(self, q, kv, causal=False, key_padding_mask=None):
        assert q.dtype == kv.dtype == torch.float16 and q.is_cuda
        (B, M), N = q.shape[:2], kv.shape[1]
        starts_q, starts_k = (
            torch.arange(B + 1, dtype=torch.int32, device=q.device) * length for length in (M, N)
        )
        kv, longest = kv.flatten(0, 1), N
        if key_padding_mask is not None:
            kv, _, starts_k, longest = unpad_input(kv.unflatten(0, (B, N)), key_padding_mask)
        p = self.dropout_p if self.training else 0.0
        out = varlen_func(q.flatten(0, 1), kv, starts_q, starts_k, M, longest, p, causal=causal)
        return out.unflatten(0, (B, M)), None


class FlashMHA(nn.Module):
    def __init__(
        self,
        embed_dim,
        num_heads,
        bias=True,
        batch_first=True,
        attention_dropout=0.0,
        causal=False,
        device=None,
        dtype=None,
    ):
        assert batch_first
        super().__init__()
        self.embed_dim, self.num_heads, self.causal, self.bias = embed_dim, num_heads, causal, bias
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim)) if bias else None
        self.inner_attn = FlashAttention(attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, q, k, v, key_padding_mask=None):
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1))
            for x, w, b in zip((q, k, v), self.in_proj_weight.chunk(3), biases)
        )
        kv = torch.stack([k, v], dim=2)
        context, weights = self.inner_attn(
            q, kv, key_padding_mask=key_padding_mask, causal=self.causal
        )
        return self.out_proj(context.flatten(-2)), weights


@ATTENTION.register_module()
class MultiheadFlashAttention(BaseModule):
    def __init__(
        self,
        embed_dims,
        num_heads,
        attn_drop=0.0,
        proj_drop=0.0,
        dropout_layer=dict(type="Dropout", drop_prob=0.0),
        init_cfg=None,
        batch_first=True,
        **kwargs,
    ):
        super().__init__(init_cfg)
        attn_drop = kwargs.pop("dropout", attn_drop)
        self.embed_dims, self.num_heads, self.batch_first = embed_dims, num_heads, True
        self.attn = FlashMHA(
            embed_dims,
            num_heads,
            attention_dropout=attn_drop,
            dtype=torch.float16,
            device="cuda",
            **kwargs,
        )
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = build_dropout(dropout_layer) if dropout_layer else nn.Identity()

    def forward(
        self,
        query,
        key=None,
        value=None,
        identity=None,
        query_pos=None,
        key_pos=None,
        attn_mask=None,
        key_padding_mask=None,
        **kwargs,
    ):
        assert attn_mask is None, "no attn_mask in this class"
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None and key_pos is None and query_pos.shape == key.shape:
            key_pos = query_pos
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        out = self.attn(q=query, k=key, v=value, key_padding_mask=key_padding_mask)[0]
        return identity + self.dropout_layer(self.proj_drop(out))
