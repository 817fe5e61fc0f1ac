import copy

from torch import Tensor, nn

from mmcv.cnn.bricks.drop import build_dropout
from mmcv.cnn.bricks.registry import ATTENTION, FEEDFORWARD_NETWORK, TRANSFORMER_LAYER
from mmcv.runner.base_module import BaseModule, ModuleList
from mmcv.utils import deprecated_api_warning


def build_attention(cfg):
    return ATTENTION.build(cfg)


@ATTENTION.register_module()
class MultiheadAttention(BaseModule):
    def __init__(
        self,
        embed_dims,
        num_heads,
        attn_drop=0.0,
        proj_drop=0.0,
        dropout_layer=None,
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


@FEEDFORWARD_NETWORK.register_module()
class FFN(BaseModule):
    def __init__(self, embed_dims, feedforward_channels, init_cfg=None):
        super().__init__(init_cfg)
        self.layers = nn.Sequential(
            nn.Linear(embed_dims, feedforward_channels),
            nn.ReLU(),
            nn.Linear(feedforward_channels, embed_dims),
        )

    def forward(self, x, identity=None):
        return (x if identity is None else identity) + self.layers(x)


@TRANSFORMER_LAYER.register_module()
class BaseTransformerLayer(BaseModule):
    def __init__(
        self,
        attn_cfgs,
        feedforward_channels=32,
        operation_order=None,
        init_cfg=None,
        batch_first=False,
    ):
        super().__init__(init_cfg)
        self.operation_order, self.batch_first = operation_order, batch_first
        names = [name for name in operation_order if name in ("self_attn", "cross_attn")]
        self.num_attn = len(names)
        if isinstance(attn_cfgs, dict):
            attn_cfgs = [copy.deepcopy(attn_cfgs) for _ in names]
        self.attentions = ModuleList()
        for name, cfg in zip(names, attn_cfgs):
            attention = build_attention({"batch_first": batch_first, **cfg})
            attention.operation_name = name
            self.attentions.append(attention)
        self.embed_dims = self.attentions[0].embed_dims
        self.ffns = ModuleList(
            FFN(self.embed_dims, feedforward_channels) for n in operation_order if n == "ffn"
        )
        self.norms = ModuleList(
            nn.LayerNorm(self.embed_dims) for n in operation_order if n == "norm"
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
        if attn_masks is None or isinstance(attn_masks, Tensor):
            attn_masks = [attn_masks] * self.num_attn
        attentions, masks = iter(self.attentions), iter(attn_masks)
        ffns, norms = iter(self.ffns), iter(self.norms)
        for name in self.operation_order:
            if name == "self_attn":
                query = next(attentions)(
                    query,
                    query,
                    query,
                    None,
                    query_pos=query_pos,
                    key_pos=query_pos,
                    attn_mask=next(masks),
                    key_padding_mask=query_key_padding_mask,
                    **kwargs,
                )
            elif name == "cross_attn":
                query = next(attentions)(
                    query,
                    key,
                    value,
                    None,
                    query_pos=query_pos,
                    key_pos=key_pos,
                    attn_mask=next(masks),
                    key_padding_mask=key_padding_mask,
                    **kwargs,
                )
            elif name == "ffn":
                query = next(ffns)(query)
            else:
                query = next(norms)(query)
        return query
