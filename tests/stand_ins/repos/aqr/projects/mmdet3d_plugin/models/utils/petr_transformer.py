"""Two generations of CMT's attention with a bias that the head's generator makes, and a decoder
that hands it on."""

import inspect

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks.registry import ATTENTION, TRANSFORMER_LAYER
from mmcv.cnn.bricks.transformer import BaseTransformerLayer
from mmcv.runner.base_module import BaseModule
from torch import nn

from .attention import FlashMHA
from .attention_bias_generator import AttentionBiasGenerator

# The keyword came with torch 1.11.
REENTRANT = (
    {"use_reentrant": True}
    if "use_reentrant" in inspect.signature(cp.checkpoint).parameters
    else {}
)


class _Outer(BaseModule):
    def __init__(self, embed_dims, num_heads, attn_drop=0.0, init_cfg=None, **kwargs):
        super().__init__(init_cfg)
        self.embed_dims, self.num_heads = embed_dims, num_heads
        self.attn = self.inner(embed_dims, num_heads, attn_drop)

    def inputs(self, query, key, value, identity, query_pos, key_pos):
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None and key_pos is None and key.shape == query_pos.shape:
            key_pos = query_pos
        return (
            query if query_pos is None else query + query_pos,
            key if key_pos is None else key + key_pos,
            value,
            identity,
        )


@ATTENTION.register_module()
class PETRMultiheadAttention(_Outer):
    """The first generation: the dense bias, over heads, is the float mask of
    nn.MultiheadAttention."""

    @staticmethod
    def inner(embed_dims, num_heads, dropout):
        return nn.MultiheadAttention(embed_dims, num_heads, dropout)

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
        attention_bias=None,
        **kwargs,
    ):
        query, key, value, identity = self.inputs(query, key, value, identity, query_pos, key_pos)
        if attention_bias is not None and key.shape[0] != query.shape[0]:
            bias = attention_bias.transpose(0, 1)
            B, M, N = bias.shape
            bias = (
                bias.unsqueeze(1)
                .expand(-1, self.num_heads, -1, -1)
                .reshape(B * self.num_heads, M, N)
            )
            bias = bias.to(query.dtype)
            attn_mask = bias if attn_mask is None else attn_mask + bias
        out = self.attn(
            query=query,
            key=key,
            value=value,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
        )[0]
        return out + identity


@ATTENTION.register_module()
class PETRMultiheadFlashAttention(_Outer):
    """The second: the bias goes on as it came, (M, B, N)."""

    @staticmethod
    def inner(embed_dims, num_heads, dropout):
        return FlashMHA(embed_dims, num_heads, dropout)

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
        attention_bias=None,
        **kwargs,
    ):
        query, key, value, identity = self.inputs(query, key, value, identity, query_pos, key_pos)
        bias = attention_bias if key.shape[0] != query.shape[0] else None
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        names = ("q", "k", "v") if kwargs.get("short_names") else ("query", "key", "value")
        out = self.attn(**dict(zip(names, (query, key, value))), attn_bias=bias)[0]
        return out.transpose(0, 1) + identity


@TRANSFORMER_LAYER.register_module()
class PETRTransformerDecoderLayer(BaseTransformerLayer):
    def __init__(self, attn_cfgs, with_cp=True, **kwargs):
        order = ("self_attn", "norm", "cross_attn", "norm", "ffn", "norm")
        super().__init__(attn_cfgs=attn_cfgs, operation_order=order, **kwargs)
        self.use_checkpoint = with_cp

    def _forward(
        self,
        query,
        key=None,
        value=None,
        query_pos=None,
        key_pos=None,
        attn_masks=None,
        query_key_padding_mask=None,
        key_padding_mask=None,
        attention_bias=None,
    ):
        return super().forward(
            query,
            key=key,
            value=value,
            query_pos=query_pos,
            key_pos=key_pos,
            attn_masks=attn_masks,
            query_key_padding_mask=query_key_padding_mask,
            key_padding_mask=key_padding_mask,
            attention_bias=attention_bias,
        )

    def forward(
        self,
        query,
        key=None,
        value=None,
        query_pos=None,
        key_pos=None,
        attn_masks=None,
        query_key_padding_mask=None,
        key_padding_mask=None,
        attention_bias=None,
        **kwargs,
    ):
        given = (
            query,
            key,
            value,
            query_pos,
            key_pos,
            attn_masks,
            query_key_padding_mask,
            key_padding_mask,
            attention_bias,
        )
        if self.use_checkpoint and self.training:
            return cp.checkpoint(self._forward, *given, **REENTRANT)
        return self._forward(*given)


class Head(nn.Module):
    """A router that scores queries, the generator, and a decoder of two layers."""

    def __init__(self, attention, with_cp, embed_dims=16, num_heads=2, layers=2, **generator):
        super().__init__()
        self.attention_bias_generator = AttentionBiasGenerator(**generator)
        self.router = nn.Linear(embed_dims, 2)
        own = dict(type="MultiheadAttention", embed_dims=embed_dims, num_heads=num_heads)
        cross = dict(type=attention, embed_dims=embed_dims, num_heads=num_heads)
        self.layers = nn.ModuleList(
            PETRTransformerDecoderLayer([own, cross], with_cp) for _ in range(layers)
        )

    def forward(
        self, query, memory, query_pos, memory_pos, bev_indices, camera_indices, self_mask=None
    ):
        """Sequences are (B, L, E); the decoder's are (L, B, E)."""
        weights = torch.tanh(self.router(query))
        bias = self.attention_bias_generator(
            lidar_weights=weights[..., 0],
            camera_weights=weights[..., 1],
            pts_bev_indices=bev_indices,
            pts_pers_indices=camera_indices,
        )
        bias = bias.transpose(0, 1)
        query, memory, query_pos, memory_pos = (
            x.transpose(0, 1) for x in (query, memory, query_pos, memory_pos)
        )
        for layer in self.layers:
            query = layer(
                query,
                memory,
                memory,
                query_pos=query_pos,
                key_pos=memory_pos,
                attn_masks=[self_mask, None],
                attention_bias=bias,
            )
        return query.transpose(0, 1)
