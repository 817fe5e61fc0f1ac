"""The attention classes and the checkpointed decoder layer of MoME and MEFormer."""

import torch
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.registry import ATTENTION, TRANSFORMER_LAYER
from mmcv.cnn.bricks.transformer import BaseTransformerLayer
from mmcv.runner.base_module import BaseModule
from mmcv.utils import deprecated_api_warning
from torch import nn

from .attention import FlashMHA


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
        **kwargs,
    ):
        super().__init__(init_cfg)
        self.embed_dims, self.num_heads, self.batch_first = embed_dims, num_heads, batch_first
        self.attn = nn.MultiheadAttention(
            embed_dims, num_heads, kwargs.pop("dropout", attn_drop), **kwargs
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
        out = self.attn(
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            value=value,
            key=key,
            query=query,
        )[0]
        if self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout_layer(self.proj_drop(out)) + identity


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


@TRANSFORMER_LAYER.register_module()
class PETRTransformerDecoderLayer(BaseTransformerLayer):
    def __init__(self, attn_cfgs, operation_order=None, with_cp=True, **kwargs):
        super().__init__(attn_cfgs=attn_cfgs, operation_order=operation_order, **kwargs)
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
        )
        if self.use_checkpoint and self.training:
            return cp.checkpoint(self._forward, *given)
        return self._forward(*given)
