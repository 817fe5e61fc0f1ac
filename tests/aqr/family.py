"""Transformers in the shape of the family's: constructor, forward signature, layouts and xavier
initialisation."""

from __future__ import annotations

import torch
import torch.utils.checkpoint as cp
from torch import nn

from tests.support.capabilities import REENTRANT

C, H, L = 16, 2, 2


class PETRMultiheadAttention(nn.Module):
    def __init__(self, operation_name):
        super().__init__()
        self.embed_dims, self.num_heads = C, H
        self.operation_name = operation_name
        self.attn = nn.MultiheadAttention(C, H)

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
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        return (
            identity
            + self.attn(
                query=query,
                key=key,
                value=value,
                attn_mask=attn_mask,
                key_padding_mask=key_padding_mask,
            )[0]
        )


class PETRTransformerDecoderLayer(nn.Module):
    def __init__(self, with_cp=False):
        super().__init__()
        self.use_checkpoint = with_cp
        self.attentions = nn.ModuleList(
            [PETRMultiheadAttention("self_attn"), PETRMultiheadAttention("cross_attn")]
        )
        self.norm = nn.LayerNorm(C)

    def _forward(self, query, key, value, query_pos, key_pos, attn_masks):
        query = self.attentions[0](query, query_pos=query_pos, attn_mask=attn_masks[0])
        query = self.attentions[1](
            query, key, value, query_pos=query_pos, key_pos=key_pos, attn_mask=attn_masks[1]
        )
        return self.norm(query)

    def forward(
        self, query, key=None, value=None, query_pos=None, key_pos=None, attn_masks=None, **kwargs
    ):
        given = (query, key, value, query_pos, key_pos, attn_masks or [None, None])
        if self.use_checkpoint and self.training:
            return cp.checkpoint(self._forward, *given, **REENTRANT)
        return self._forward(*given)


class Decoder(nn.Module):
    def __init__(self, num_layers=L, with_cp=False):
        super().__init__()
        self.layers = nn.ModuleList(PETRTransformerDecoderLayer(with_cp) for _ in range(num_layers))
        self.embed_dims = C

    def forward(self, query, **kwargs):
        outs = []
        for layer in self.layers:
            query = layer(query, **kwargs)
            outs.append(query)
        return torch.stack(outs)


class Base(nn.Module):
    def __init__(self, encoder=None, decoder=None, init_cfg=None, cross=False):
        super().__init__()
        self.decoder = Decoder(**(decoder or {}))
        self.embed_dims = self.decoder.embed_dims

    def init_weights(self):
        for module in self.modules():
            if hasattr(module, "weight") and module.weight is not None and module.weight.dim() > 1:
                nn.init.xavier_uniform_(module.weight)

    def decode(self, query_pos, memory, key_pos, attn_masks):
        out = self.decoder(
            query=torch.zeros_like(query_pos),
            key=memory,
            value=memory,
            key_pos=key_pos,
            query_pos=query_pos,
            attn_masks=[attn_masks, None],
        )
        return out.transpose(1, 2), memory


def _views(x, bs):
    return x.unflatten(0, (bs, -1)).permute(1, 3, 4, 0, 2).flatten(0, 2)


class CmtTransformer(Base):
    def forward(
        self, x, x_img, query_embed, bev_pos_embed, rv_pos_embed, attn_masks=None, reg_branch=None
    ):
        memory = x.flatten(2).permute(2, 0, 1)
        if x_img is not None:  # a fork that takes batches without images
            memory = torch.cat([memory, _views(x_img, x.shape[0])])
        return self.decode(
            query_embed.transpose(0, 1), memory, torch.zeros_like(memory), attn_masks
        )


class CmtLidarTransformer(Base):
    def forward(self, x, mask, query_embed, pos_embed, attn_masks=None, reg_branch=None):
        memory = x.flatten(2).permute(2, 0, 1)
        return self.decode(
            query_embed.transpose(0, 1), memory, torch.zeros_like(memory), attn_masks
        )


class CmtImageTransformer(Base):
    def forward(self, x_img, query_embed, rv_pos_embed, attn_masks=None, reg_branch=None, bs=2):
        memory = _views(x_img, bs)
        return self.decode(
            query_embed.transpose(0, 1), memory, torch.zeros_like(memory), attn_masks
        )


class PETRTransformer(Base):
    def forward(self, x, mask, query_embed, pos_embed, reg_branch=None):
        memory = x.permute(1, 3, 4, 0, 2).flatten(0, 2)
        query_pos = query_embed[:, None].repeat(1, x.shape[0], 1)
        return self.decode(query_pos, memory, torch.zeros_like(memory), None)


class PETRDNTransformer(Base):
    def forward(self, x, mask, query_embed, pos_embed, attn_masks=None, reg_branch=None):
        memory = x.permute(1, 3, 4, 0, 2).flatten(0, 2)
        return self.decode(
            query_embed.transpose(0, 1), memory, torch.zeros_like(memory), attn_masks
        )


class PETRTemporalTransformer(Base):
    def forward(
        self,
        memory,
        tgt,
        query_pos,
        pos_embed,
        attn_masks,
        temp_memory=None,
        temp_pos=None,
        mask=None,
        reg_branch=None,
    ):
        memory = memory.transpose(0, 1)
        return self.decode(query_pos.transpose(0, 1), memory, torch.zeros_like(memory), attn_masks)


class CmtHead(nn.Module):
    """query_embed, transformer, loss: what a CMT head calls in this order."""

    def __init__(self, transformer, pc_range=(-10.0, -10.0, -2.0, 10.0, 10.0, 2.0)):
        super().__init__()
        self.transformer = transformer
        self.pc_range = pc_range
        self.embed = nn.Linear(3, C)

    def query_embed(self, ref_points, img_metas):
        return self.embed(ref_points), torch.zeros(*ref_points.shape[:2], C)

    def forward(self, x, x_img, img_metas, reference):
        bev, rv = self.query_embed(reference, img_metas)
        return self.transformer(x, x_img, bev + rv, None, None)[0]

    def loss(self, outs):
        return {"loss_cls": outs.pow(2).mean()}


CLASSES = (
    PETRMultiheadAttention,
    PETRTransformerDecoderLayer,
    CmtTransformer,
    CmtLidarTransformer,
    CmtImageTransformer,
    PETRTransformer,
    PETRDNTransformer,
    PETRTemporalTransformer,
    CmtHead,
)

B, M, V = 2, 5, 3


def inputs(name, seed=0):
    """Keyword arguments of a transformer's forward, its camera segments and the lengths of all
    segments."""
    torch.manual_seed(seed)
    bev, views = torch.randn(B, C, 3, 4), torch.randn(B * V, C, 2, 3)
    query = torch.randn(B, M, C)
    return {
        "CmtTransformer": (
            dict(x=bev, x_img=views, query_embed=query, bev_pos_embed=None, rv_pos_embed=None),
            1,
            (12, 18),
        ),
        "CmtLidarTransformer": (
            dict(x=bev, mask=None, query_embed=query, pos_embed=None),
            0,
            (12,),
        ),
        "CmtImageTransformer": (
            dict(x_img=views, query_embed=query, rv_pos_embed=None),
            V,
            (6, 6, 6),
        ),
        "PETRTransformer": (
            dict(x=views.unflatten(0, (B, V)), mask=None, query_embed=query[0], pos_embed=None),
            V,
            (6, 6, 6),
        ),
        "PETRDNTransformer": (
            dict(x=views.unflatten(0, (B, V)), mask=None, query_embed=query, pos_embed=None),
            V,
            (6, 6, 6),
        ),
        "PETRTemporalTransformer": (
            dict(
                memory=torch.randn(B, 18, C),
                tgt=None,
                query_pos=query,
                pos_embed=None,
                attn_masks=None,
            ),
            V,
            (6, 6, 6),
        ),
    }[name]


def geometry(seed=0, focal=20.0):
    """reference (B, M, 3) and metas as a CMT head gets them: V cameras looking along the axes,
    which overlap where the focal length is below 15."""
    torch.manual_seed(seed)
    size = (20, 30)
    turns = (
        [[0, -1, 0], [0, 0, -1], [1, 0, 0]],
        [[0, 1, 0], [0, 0, -1], [-1, 0, 0]],
        [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    )
    intrinsics = torch.tensor([[focal, 0, size[1] / 2], [0, focal, size[0] / 2], [0, 0, 1.0]])
    matrices = []
    for turn in turns:
        matrix = torch.eye(4)
        matrix[:3, :3] = intrinsics @ torch.tensor(turn, dtype=torch.float32)
        matrices.append(matrix.numpy())
    metas = [{"lidar2img": matrices, "pad_shape": [(*size, 3)] * V} for _ in range(B)]
    return torch.rand(B, M, 3), metas
