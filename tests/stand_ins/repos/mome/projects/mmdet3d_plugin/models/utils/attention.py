"""FlashMHA as the family has it: half inside, CUDA only; importing it needs flash_attn 0.2.x."""

import torch
from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401
from flash_attn.flash_attn_interface import flash_attn_unpadded_kvpacked_func
from mmcv.runner import auto_fp16
from torch import nn


class FlashAttention(nn.Module):
    def __init__(self, softmax_scale=None, attention_dropout=0.0):
        super().__init__()
        self.softmax_scale, self.dropout_p, self.fp16_enabled = (
            softmax_scale,
            attention_dropout,
            True,
        )

    @auto_fp16(apply_to=("q", "kv"), out_fp32=True)
    def forward(self, q, kv, causal=False, key_padding_mask=None):
        assert q.dtype == kv.dtype == torch.float16 and q.is_cuda
        (B, M), N = q.shape[:2], kv.shape[1]
        starts_q, starts_k = (
            torch.arange(B + 1, dtype=torch.int32, device=q.device) * length for length in (M, N)
        )
        out = flash_attn_unpadded_kvpacked_func(
            q.flatten(0, 1),
            kv.flatten(0, 1),
            starts_q,
            starts_k,
            M,
            N,
            self.dropout_p,
            softmax_scale=self.softmax_scale,
            causal=causal,
        )
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
        **kwargs,
    ):
        assert batch_first
        super().__init__()
        self.embed_dim, self.num_heads, self.causal, self.bias = embed_dim, num_heads, causal, bias
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        else:
            self.register_parameter("in_proj_bias", None)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bool(bias))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, q, k, v, key_padding_mask=None):
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (self.num_heads, -1))
            for x, w, b in zip((q, k, v), self.in_proj_weight.chunk(3), biases)
        )
        context, weights = self.inner_attn(
            q, torch.stack([k, v], dim=2), key_padding_mask=key_padding_mask
        )
        return self.out_proj(context.flatten(-2)), weights
