"""FlashMHA of the later generation: no flash_attn, query/key/value or q/k/v, a dense bias for
SDPA's mask."""

import torch
import torch.nn.functional as F
from torch import nn


class FlashBiasAttention(nn.Module):
    def __init__(self, embed_dims, num_heads, dropout=0.0, bias=True, **kwargs):
        super().__init__()
        self.embed_dims, self.num_heads, self.head_dim = (
            embed_dims,
            num_heads,
            embed_dims // num_heads,
        )
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dims, embed_dims))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dims)) if bias else None
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        query=None,
        key=None,
        value=None,
        q=None,
        k=None,
        v=None,
        attn_mask=None,
        key_padding_mask=None,
        attn_bias=None,
        **kwargs,
    ):
        query, key, value = (b if a is None else a for a, b in ((query, q), (key, k), (value, v)))
        B, M, _ = query.shape
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        heads = [
            F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), self.in_proj_weight.chunk(3), biases)
        ]
        mask = self._mask(attn_mask, attn_bias, B, M, key.shape[1])
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(out.transpose(1, 2).reshape(B, M, self.embed_dims)), None

    def _mask(self, attn_mask, attn_bias, B, M, N):
        total = None
        for given in (attn_mask, attn_bias):
            if given is None:
                continue
            if given.dim() == 3 and given.shape[:2] == (M, B) and M != B:
                given = given.transpose(0, 1)
            if given.dim() == 3 and given.shape[0] == B * self.num_heads:
                given = given.reshape(B, self.num_heads, M, N)
            elif given.dim() == 3:
                given = given.unsqueeze(1)
            total = given if total is None else total + given
        return total


class FlashMHA(FlashBiasAttention):
    pass
