"""Forwards as the forks changed them: more parameters, weights handed back, groups, subclasses, no
registration."""

import torch
from mmcv.cnn.bricks.registry import ATTENTION
from mmcv.runner.base_module import BaseModule
from mmcv.utils import deprecated_api_warning
from torch import nn


class Prelude(BaseModule):
    def __init__(self, embed_dims, num_heads, attn_drop=0.0, batch_first=False, init_cfg=None):
        super().__init__(init_cfg)
        self.embed_dims, self.num_heads, self.batch_first = embed_dims, num_heads, batch_first
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, attn_drop)

    def ready(self, query, key, value, query_pos, key_pos):
        key = query if key is None else key
        value = key if value is None else value
        query, key = (
            x if pos is None else x + pos for x, pos in ((query, query_pos), (key, key_pos))
        )
        return tuple(x.transpose(0, 1) if self.batch_first else x for x in (query, key, value))

    def done(self, out):
        return out.transpose(0, 1) if self.batch_first else out


@ATTENTION.register_module(name="ReturnsWeights")
class PETRMultiheadAttention(Prelude):
    """`return_attn_weights`: who asks for the weights gets them."""

    @deprecated_api_warning({"residual": "identity"})
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
        return_attn_weights=False,
        **kwargs,
    ):
        identity = identity if identity is not None else query
        q, k, v = self.ready(query, key, value, query_pos, key_pos)
        out, attn_weights = self.attn(
            q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask
        )
        out = identity + self.done(out)
        return (out, attn_weights) if return_attn_weights else out


ReturnsWeights = PETRMultiheadAttention


@ATTENTION.register_module(name="AlwaysWeights")
class PETRMultiheadAttention(Prelude):  # noqa: F811  (two classes of one name: forks do)
    """Hands the weights back to every caller."""

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
        identity = identity if identity is not None else query
        q, k, v = self.ready(query, key, value, query_pos, key_pos)
        out, attn_weights = self.attn(
            q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask
        )
        return identity + self.done(out), attn_weights


AlwaysWeights = PETRMultiheadAttention


@ATTENTION.register_module(name="ReturnsFeature")
class PETRMultiheadAttention(Prelude):  # noqa: F811
    """`return_feat`: the attention's output without its identity."""

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
        return_feat=False,
        **kwargs,
    ):
        identity = identity if identity is not None else query
        q, k, v = self.ready(query, key, value, query_pos, key_pos)
        out = self.done(
            self.attn(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
        )
        return out if return_feat else identity + out


ReturnsFeature = PETRMultiheadAttention


@ATTENTION.register_module()
class PETRMultiheadAttentionV2(Prelude):
    """A second position for the keys, applied in the prelude."""

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
        cross_query_pe=None,
        on_the_image=None,
        **kwargs,
    ):
        identity = identity if identity is not None else query
        q, k, v = self.ready(query, key, value, query_pos, key_pos)
        q = q if cross_query_pe is None else q * cross_query_pe.sigmoid()
        return identity + self.done(
            self.attn(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
        )


@ATTENTION.register_module()
class GroupMultiheadAttention(Prelude):
    """Group DETR: in training the queries attend within their group, laid along the batch."""

    def __init__(self, embed_dims, num_heads, group=3, **kwargs):
        super().__init__(embed_dims, num_heads, **kwargs)
        self.group = group

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
        identity = identity if identity is not None else query
        q, k, v = self.ready(query, key, value, query_pos, key_pos)
        batch, own = q.shape[1], k is v or k.shape == q.shape
        if self.training and own:
            q, k, v = (torch.cat(x.split(len(x) // self.group), dim=1) for x in (q, k, v))
        out = self.attn(q, k, v, attn_mask=attn_mask, key_padding_mask=key_padding_mask)[0]
        if self.training and own:
            out = torch.cat(out.split(batch, dim=1), dim=0)
        return identity + self.done(out)


class Subclass(ReturnsFeature):
    """Inherits forward as it is."""


class NestedSubclass(ReturnsFeature):
    """Its forward changes the query and calls its parent's."""

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
        return 2 * super().forward(
            query * 0.5,
            key,
            value,
            identity,
            query_pos=query_pos,
            key_pos=key_pos,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            **kwargs,
        )


class OwnArithmetic(Prelude):
    """Computes its softmax itself: there is no core to answer for."""

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
        q, k, v = self.ready(query, key, value, query_pos, key_pos)
        scores = torch.einsum("mbe,nbe->bmn", q, k) * q.shape[-1] ** -0.5
        scores = scores if attn_mask is None else scores.masked_fill(attn_mask, float("-inf"))
        return query + self.done(torch.einsum("bmn,nbe->mbe", scores.softmax(-1), v))


OwnArithmetic.__name__ = "PETRMultiheadAttention"


class NotAModule:
    """A port to other hardware: the name, and nothing of a torch module."""

    def __call__(self, query, key=None, value=None, attn_mask=None, key_padding_mask=None):
        return query


NotAModule.__name__ = "PETRMultiheadAttention"


class PETRMultiheadFlashAttention(nn.Module):
    """Another order of parameters: not the family's."""

    def forward(self, tgt, memory, tgt_mask=None, memory_mask=None):
        return tgt
