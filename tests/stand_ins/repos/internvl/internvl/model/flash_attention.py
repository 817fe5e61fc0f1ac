"""InternVL's FlashAttention: packed qkv, nothing in common with CMT's but the name."""

import torch
from flash_attn.bert_padding import pad_input, unpad_input  # noqa: F401
from torch import nn


class FlashAttention(nn.Module):
    def forward(
        self,
        qkv,
        key_padding_mask=None,
        causal=False,
        cu_seqlens=None,
        max_s=None,
        need_weights=False,
    ):
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v), None


class FlashMHA(nn.Module):
    """A core of that name whose forward takes one packed input."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.Wqkv, self.out_proj = (
            nn.Linear(embed_dim, 3 * embed_dim),
            nn.Linear(embed_dim, embed_dim),
        )
        self.inner_attn = FlashAttention()

    def forward(self, x, key_padding_mask=None, need_weights=False):
        context, weights = self.inner_attn(self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)))
        return self.out_proj(context.flatten(-2)), weights
