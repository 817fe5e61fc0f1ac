"""StreamPETR and Far3D: attention in half through a wrapper, a decoder layer of its own with
temporal memory."""

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.registry import ATTENTION, TRANSFORMER_LAYER
from mmcv.cnn.bricks.transformer import FFN, build_attention
from mmcv.runner import auto_fp16
from mmcv.runner.base_module import BaseModule
from mmcv.utils import deprecated_api_warning
from torch import nn

from .attention import FlashMHA


@ATTENTION.register_module()
class PETRMultiheadFlashAttention(BaseModule):
    """Takes (M, B, E) though `batch_first` is True. `attn_drop` lands in FlashMHA's `bias`; masks
    are dropped."""

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
            embed_dims, num_heads, attn_drop, dtype=torch.float16, device="cuda", **kwargs
        )
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = nn.Identity() if not dropout_layer else build_dropout(dropout_layer)

    @deprecated_api_warning({"residual": "identity"}, cls_name="MultiheadAttention")
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
        key = query if key is None else key
        value = key if value is None else value
        identity = identity if identity is not None else query
        if query_pos is not None and key_pos is None and key.shape == query_pos.shape:
            key_pos = query_pos
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        if self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out = self.attn(q=query, k=key, v=value, key_padding_mask=None)[0]
        if self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout_layer(self.proj_drop(out)) + identity


class MultiheadAttentionWrapper(nn.MultiheadAttention):
    """Half in training, float32 in evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp16_enabled = True

    @auto_fp16(out_fp32=True)
    def forward_fp16(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def forward_fp32(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        return (
            self.forward_fp16(*args, **kwargs)
            if self.training
            else self.forward_fp32(*args, **kwargs)
        )


@ATTENTION.register_module()
class PETRMultiheadAttention(BaseModule):
    def __init__(
        self,
        embed_dims,
        num_heads,
        attn_drop=0.0,
        proj_drop=0.0,
        dropout_layer=dict(type="Dropout", drop_prob=0.0),
        init_cfg=None,
        batch_first=False,
        fp16=False,
        **kwargs,
    ):
        super().__init__(init_cfg)
        self.embed_dims, self.num_heads, self.batch_first = embed_dims, num_heads, batch_first
        kind = MultiheadAttentionWrapper if fp16 else nn.MultiheadAttention
        self.fp16_enabled = True
        self.attn = kind(embed_dims, num_heads, kwargs.pop("dropout", attn_drop), **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = nn.Identity() if not dropout_layer else build_dropout(dropout_layer)

    @deprecated_api_warning({"residual": "identity"}, cls_name="MultiheadAttention")
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
        key = query if key is None else key
        value = key if value is None else value
        identity = identity if identity is not None else query
        if query_pos is not None and key_pos is None and key.shape == query_pos.shape:
            key_pos = query_pos
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        if self.batch_first:
            query, key, value = (x.transpose(0, 1).contiguous() for x in (query, key, value))
        out = self.attn(
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            value=value,
            key=key,
            query=query,
        )[0]
        if self.batch_first:
            out = out.transpose(0, 1).contiguous()
        return self.dropout_layer(self.proj_drop(out)) + identity


@TRANSFORMER_LAYER.register_module()
class PETRTemporalDecoderLayer(BaseModule):
    """self attention over the queries and a memory of earlier frames, then cross attention, then a
    feed-forward."""

    def __init__(
        self, attn_cfgs, feedforward_channels=32, init_cfg=None, with_cp=True, batch_first=False
    ):
        super().__init__(init_cfg)
        self.attentions = nn.ModuleList()
        for name, cfg in zip(("self_attn", "cross_attn"), attn_cfgs):
            attention = build_attention({"batch_first": batch_first, **cfg})
            attention.operation_name = name
            self.attentions.append(attention)
        self.embed_dims = self.attentions[0].embed_dims
        self.ffns = nn.ModuleList([FFN(self.embed_dims, feedforward_channels)])
        self.norms = nn.ModuleList(nn.LayerNorm(self.embed_dims) for _ in range(3))
        self.use_checkpoint = with_cp

    def _forward(
        self,
        query,
        key=None,
        value=None,
        query_pos=None,
        key_pos=None,
        temp_memory=None,
        temp_pos=None,
        attn_masks=None,
        query_key_padding_mask=None,
        key_padding_mask=None,
    ):
        own, own_pos = query, query_pos
        if temp_memory is not None:
            own, own_pos = (
                torch.cat([query, temp_memory], dim=0),
                torch.cat([query_pos, temp_pos], dim=0),
            )
        self_mask, cross_mask = attn_masks or (None, None)
        query = self.attentions[0](
            query,
            own,
            own,
            None,
            query_pos=query_pos,
            key_pos=own_pos,
            attn_mask=self_mask,
            key_padding_mask=query_key_padding_mask,
        )
        query = self.norms[0](query)
        query = self.attentions[1](
            query,
            key,
            value,
            None,
            query_pos=query_pos,
            key_pos=key_pos,
            attn_mask=cross_mask,
            key_padding_mask=key_padding_mask,
        )
        query = self.norms[1](query)
        return self.norms[2](self.ffns[0](query))

    def forward(
        self,
        query,
        key=None,
        value=None,
        query_pos=None,
        key_pos=None,
        temp_memory=None,
        temp_pos=None,
        attn_masks=None,
        query_key_padding_mask=None,
        key_padding_mask=None,
        **kwargs,
    ):
        given = (
            query,
            key,
            value,
            query_pos,
            key_pos,
            temp_memory,
            temp_pos,
            attn_masks,
            query_key_padding_mask,
            key_padding_mask,
        )
        if self.use_checkpoint and self.training:
            return cp.checkpoint(self._forward, *given)
        return self._forward(*given)
