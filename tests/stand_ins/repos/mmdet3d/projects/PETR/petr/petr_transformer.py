"""projects/PETR of mmdet3d 1.1 and later: the same class, registered with mmengine."""

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import nn


@MODELS.register_module()
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
        self.dropout_layer = (
            nn.Dropout(dropout_layer["drop_prob"]) if dropout_layer else nn.Identity()
        )

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
