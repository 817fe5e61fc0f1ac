"""The attention classes, decoder and transformer of a PETR-style detector; sequences first, (M, B,
E)."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.utils.checkpoint as cp
from torch import Tensor

from ...registry import ATTENTION, TRANSFORMER, TRANSFORMER_LAYER, TRANSFORMER_LAYER_SEQUENCE

try:
    from .attention import FlashMHA

    _flash_missing: Optional[ImportError] = None
except ImportError as error:  # flash-attn is optional: only PETRMultiheadFlashAttention needs it
    FlashMHA = None
    _flash_missing = error


def renamed_arguments(**renames: str) -> Callable:
    """Accept keyword arguments under their former names, with a warning:
    ``renamed_arguments(old="new")``."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for old, new in renames.items():
                if old in kwargs:
                    warnings.warn(
                        f"{function.__qualname__}: {old!r} is now called {new!r}", stacklevel=2
                    )
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


class _AttentionModule(nn.Module):
    """The common parts of the attention classes: defaults of the arguments, positions, identity and
    dropout."""

    def __init__(
        self, embed_dims: int, num_heads: int, proj_drop: float, drop_prob: float, batch_first: bool
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.proj_drop = nn.Dropout(proj_drop)
        self.dropout_layer = nn.Dropout(drop_prob)

    def _inputs(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        query_pos: Optional[Tensor],
        key_pos: Optional[Tensor],
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Return the core's arguments: defaults and positions added, transposed if batch_first."""
        key = query if key is None else key
        value = key if value is None else value
        if query_pos is not None and key_pos is None and key.shape == query_pos.shape:
            key_pos = query_pos
        query = query if query_pos is None else query + query_pos
        key = key if key_pos is None else key + key_pos
        if self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        return query, key, value

    def _output(self, out: Tensor, identity: Tensor) -> Tensor:
        if self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout_layer(self.proj_drop(out)) + identity


def _drop_rates(
    attn_drop: float, dropout_layer: Optional[Dict[str, Any]], kwargs: Dict[str, Any]
) -> Tuple[float, float]:
    """(attention dropout, output dropout); the older single `dropout` sets both."""
    drop_prob = (dropout_layer or {}).get("drop_prob", 0.0)
    if "dropout" in kwargs:
        attn_drop = drop_prob = kwargs.pop("dropout")
    return attn_drop, drop_prob


@ATTENTION.register_module()
class MultiheadAttention(_AttentionModule):
    """Self attention: nn.MultiheadAttention with positions, identity and dropout."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dropout_layer: Optional[Dict[str, Any]] = None,
        batch_first: bool = False,
        **kwargs: Any,
    ) -> None:
        attn_drop, drop_prob = _drop_rates(attn_drop, dropout_layer, kwargs)
        super().__init__(embed_dims, num_heads, proj_drop, drop_prob, batch_first)
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, dropout=attn_drop, **kwargs)

    @renamed_arguments(residual="identity")
    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        identity: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_pos: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        """query (M, B, E), key and value (N, B, E), attn_mask (M, N) or (B*H, M, N) -> (M, B, E).

        batch_first: (B, M, E) and (B, N, E) outside, sequences first inside.
        """
        identity = identity if identity is not None else query
        query, key, value = self._inputs(query, key, value, query_pos, key_pos)
        out = self.attn(
            query=query,
            key=key,
            value=value,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
        )[0]
        return self._output(out, identity)


@ATTENTION.register_module()
class PETRMultiheadAttention(_AttentionModule):
    """Cross attention in plain PyTorch; the weights (B, H, M, N) exist in memory."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dropout_layer: Optional[Dict[str, Any]] = None,
        batch_first: bool = False,
        **kwargs: Any,
    ) -> None:
        attn_drop, drop_prob = _drop_rates(attn_drop, dropout_layer, kwargs)
        super().__init__(embed_dims, num_heads, proj_drop, drop_prob, batch_first)
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, dropout=attn_drop, **kwargs)

    @renamed_arguments(residual="identity")
    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        identity: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_pos: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        """query (M, B, E), key and value (N, B, E), attn_mask (M, N) or (B*H, M, N) -> (M, B,
        E)."""
        identity = identity if identity is not None else query
        query, key, value = self._inputs(query, key, value, query_pos, key_pos)
        out = self.attn(
            query=query,
            key=key,
            value=value,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
        )[0]
        return self._output(out, identity)


@ATTENTION.register_module()
class PETRMultiheadFlashAttention(_AttentionModule):
    """Cross attention through flash-attn. Attention masks and key padding are not supported and
    ignored."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dropout_layer: Optional[Dict[str, Any]] = None,
        batch_first: bool = True,
        **kwargs: Any,
    ) -> None:
        if FlashMHA is None:
            raise ImportError(
                "PETRMultiheadFlashAttention needs flash-attn 0.2.x "
                "(flash_attn_unpadded_kvpacked_func), "
                f"which could not be imported: {_flash_missing}. Install it, or use "
                "PETRMultiheadAttention."
            ) from _flash_missing
        attn_drop, drop_prob = _drop_rates(attn_drop, dropout_layer, kwargs)
        super().__init__(embed_dims, num_heads, proj_drop, drop_prob, batch_first)
        # FlashMHA's third parameter is `bias`. The slip is as old as the published checkpoints:
        # keep it.
        self.attn = FlashMHA(embed_dims, num_heads, attn_drop, **kwargs)

    @renamed_arguments(residual="identity")
    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        identity: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_pos: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        """query (M, B, E), key and value (N, B, E) -> (M, B, E), although batch_first: FlashMHA
        is."""
        identity = identity if identity is not None else query
        query, key, value = self._inputs(query, key, value, query_pos, key_pos)
        out = self.attn(q=query, k=key, v=value, key_padding_mask=None)[0]
        return self._output(out, identity)


class FFN(nn.Module):
    """Two linear layers and the identity."""

    def __init__(self, embed_dims: int, feedforward_channels: int, ffn_drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(embed_dims, feedforward_channels),
            nn.ReLU(inplace=True),
            nn.Dropout(ffn_drop),
            nn.Linear(feedforward_channels, embed_dims),
            nn.Dropout(ffn_drop),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


OPERATION_ORDER = ("self_attn", "norm", "cross_attn", "norm", "ffn", "norm")


class BaseTransformerLayer(nn.Module):
    """Attentions, norms and a feed-forward network in the order of `operation_order`."""

    def __init__(
        self,
        attn_cfgs: Sequence[Dict[str, Any]],
        feedforward_channels: int,
        ffn_dropout: float = 0.0,
        operation_order: Sequence[str] = OPERATION_ORDER,
    ) -> None:
        super().__init__()
        self.operation_order = tuple(operation_order)
        names = [name for name in self.operation_order if name.endswith("_attn")]
        if len(names) != len(attn_cfgs):
            raise ValueError(
                f"operation_order has {len(names)} attentions, attn_cfgs {len(attn_cfgs)}"
            )
        self.attentions = nn.ModuleList()
        for name, cfg in zip(names, attn_cfgs):
            attention = ATTENTION.build(cfg)
            attention.operation_name = name
            self.attentions.append(attention)
        self.embed_dims = self.attentions[0].embed_dims
        self.ffns = nn.ModuleList(
            FFN(self.embed_dims, feedforward_channels, ffn_dropout)
            for name in self.operation_order
            if name == "ffn"
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(self.embed_dims) for name in self.operation_order if name == "norm"
        )

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_pos: Optional[Tensor] = None,
        attn_masks: Optional[List[Optional[Tensor]]] = None,
        query_key_padding_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        """`attn_masks[i]` goes to the i-th attention; a single tensor goes to all of them."""
        if attn_masks is None or isinstance(attn_masks, Tensor):
            attn_masks = [attn_masks] * len(self.attentions)
        if len(attn_masks) != len(self.attentions):
            raise ValueError(f"{len(attn_masks)} attn_masks for {len(self.attentions)} attentions")
        attentions, masks = iter(self.attentions), iter(attn_masks)
        norms, ffns = iter(self.norms), iter(self.ffns)
        for name in self.operation_order:
            if name == "self_attn":
                query = next(attentions)(
                    query,
                    query,
                    query,
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
                    query_pos=query_pos,
                    key_pos=key_pos,
                    attn_mask=next(masks),
                    key_padding_mask=key_padding_mask,
                    **kwargs,
                )
            else:
                query = next(norms if name == "norm" else ffns)(query)
        return query


@TRANSFORMER_LAYER.register_module()
class PETRTransformerDecoderLayer(BaseTransformerLayer):
    """A layer that can trade time for memory: with_cp=True recomputes it in the backward pass."""

    def __init__(self, *args: Any, with_cp: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_checkpoint = with_cp

    def _forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_pos: Optional[Tensor] = None,
        attn_masks: Optional[List[Optional[Tensor]]] = None,
        query_key_padding_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
    ) -> Tensor:
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
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        query_pos: Optional[Tensor] = None,
        key_pos: Optional[Tensor] = None,
        attn_masks: Optional[List[Optional[Tensor]]] = None,
        query_key_padding_mask: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        """query (M, B, E), key and value (N, B, E), attn_masks [self, cross], key_padding_mask (B,
        N)."""
        arguments = (
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
            return cp.checkpoint(self._forward, *arguments)
        return self._forward(*arguments)


@TRANSFORMER_LAYER_SEQUENCE.register_module()
class PETRTransformerDecoder(nn.Module):
    """Layers one after the other; return_intermediate: the normed output of each, stacked."""

    def __init__(
        self, transformerlayers: Dict[str, Any], num_layers: int, return_intermediate: bool = False
    ) -> None:
        super().__init__()
        self.return_intermediate = return_intermediate
        self.layers = nn.ModuleList(
            TRANSFORMER_LAYER.build(copy.deepcopy(transformerlayers)) for _ in range(num_layers)
        )
        self.embed_dims = self.layers[0].embed_dims
        self.post_norm = nn.LayerNorm(self.embed_dims)

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query (M, B, E) -> (layers, M, B, E); (1, M, B, E) without return_intermediate."""
        outputs = []
        for layer in self.layers:
            query = layer(query, *args, **kwargs)
            outputs.append(query)
        return self.post_norm(torch.stack(outputs if self.return_intermediate else outputs[-1:]))


@TRANSFORMER.register_module()
class CmtTransformer(nn.Module):
    """Object queries attend to the BEV tokens and to those of all cameras at once."""

    def __init__(self, decoder: Dict[str, Any]) -> None:
        super().__init__()
        self.decoder = TRANSFORMER_LAYER_SEQUENCE.build(decoder)
        self.embed_dims = self.decoder.embed_dims
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        # What a query holds before it has looked. Not zeros: their norm has a gradient of 300 times
        # the rest.
        self.content = nn.Parameter(torch.randn(self.embed_dims))

    def forward(
        self,
        x: Tensor,
        x_img: Tensor,
        query_embed: Tensor,
        bev_pos_embed: Tensor,
        rv_pos_embed: Tensor,
        attn_masks: Optional[Tensor] = None,
        reg_branch: Optional[nn.Module] = None,
    ) -> Tuple[Tensor, Tensor]:
        """Keys are the BEV tokens, then the cameras view by view, each row by row.

        x (B, C, h, w) lidar BEV features, x_img (B*V, C, h', w') camera features, query_embed (B,
        M, C), bev_pos_embed (h*w, C), rv_pos_embed (B*V, h', w', C), attn_masks boolean (M, M),
        True = blocked: the mask of the self attention. Returns the outputs of the layers (layers,
        B, M, C) and the keys (N, B, C).
        """
        batch = x.shape[0]
        bev_memory = x.flatten(2).permute(2, 0, 1)
        rv_memory = x_img.unflatten(0, (batch, -1)).permute(1, 3, 4, 0, 2).flatten(0, 2)
        memory = torch.cat([bev_memory, rv_memory])
        bev_pos = bev_pos_embed[:, None].expand(-1, batch, -1)
        rv_pos = rv_pos_embed.unflatten(0, (batch, -1)).permute(1, 2, 3, 0, 4).flatten(0, 2)
        key_pos = torch.cat([bev_pos, rv_pos])

        query_pos = query_embed.transpose(0, 1)
        no_padding = memory.new_zeros(batch, memory.shape[0])  # float, added to the scores
        out = self.decoder(
            query=self.content.expand_as(query_pos),
            key=memory,
            value=memory,
            query_pos=query_pos,
            key_pos=key_pos,
            key_padding_mask=no_padding,
            attn_masks=[attn_masks, None],
            reg_branch=reg_branch,
        )
        return out.transpose(1, 2), memory
