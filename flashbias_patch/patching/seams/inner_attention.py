"""torch's multi-head attention below an outer forward, computed through FlashBias.

inner_forward.py wraps nn.MultiheadAttention.forward, and functional_attention.py
F.multi_head_attention_forward; both compute their calls here.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import settings
from ..._torch_internals import RELEASE, global_backward_hooks, tracing_state
from ...attention import (
    dispatch,
    weights_gradients,  # noqa: F401  registers itself
)
from ...attention.api import attention_output
from ...attention.lazy_weights import LazyWeights
from ...attention.recovery import replay
from ...bias import AttentionBias
from .. import call_adapter, route, unreachable
from ..call_adapter import Bias, check_lengths
from ..exporting import is_exporting
from ..route import Route
from .original_code import count_original, dense_mask

_NO_BIASES: Tuple[Bias, ...] = ()
_NOTHING: Dict[str, Any] = {}
_LINEAR = (getattr(nn.modules.linear, "NonDynamicallyQuantizableLinear", nn.Linear), nn.Linear)
NAME = "nn.MultiheadAttention"
_NESTED = hasattr(Tensor, "is_nested")  # since torch 1.12
# torch's own output is (L, B, E) in memory, but for what its fast path computes: self attention in
# evaluation.
_FAST_PATH = RELEASE >= (1, 12)


# The output, and its attention weights or None.
AttentionResult = Tuple[Tensor, Optional[LazyWeights]]


class InnerCall(NamedTuple):
    """One call of torch's multi-head attention; sequences are (L, B, E), (B, L, E) if
    `batch_first`, or (L, E). `length_first`: the output (B, L, E) is (L, B, E) in memory."""

    query: Tensor
    key: Tensor
    value: Tensor
    batch_first: bool
    num_heads: int
    in_proj_weight: Tensor
    in_proj_bias: Optional[Tensor]
    out_proj_weight: Tensor
    out_proj_bias: Optional[Tensor]
    dropout_p: float
    attn_mask: Optional[Tensor]
    key_padding_mask: Optional[Tensor]
    need_weights: bool
    average_attn_weights: bool
    length_first: bool = False


def attend_module(
    open_route: Route,
    original: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Optional[Tensor],
    need_weights: bool,
    attn_mask: Optional[Tensor],
    average_attn_weights: bool,
    is_causal: bool,
) -> Any:
    """A call of nn.MultiheadAttention.forward inside an outer forward."""
    if open_route.biases and replay.out_of_reach():
        unreachable.remember(module)
    out_proj = module._modules["out_proj"]
    # Quicker than attributes of a module, where no other class computes these.
    own: Dict[str, Any] = module._parameters if type(module) is nn.MultiheadAttention else _NOTHING
    outs: Dict[str, Any] = out_proj._parameters if type(out_proj) in _LINEAR else _NOTHING
    # A parametrised parameter, or one of a replica of nn.DataParallel, is an attribute only.
    in_weight = own["in_proj_weight"] if "in_proj_weight" in own else module.in_proj_weight
    in_bias = own["in_proj_bias"] if "in_proj_bias" in own else module.in_proj_bias
    out_weight = outs["weight"] if "weight" in outs else out_proj.weight
    out_bias = outs["bias"] if "bias" in outs else out_proj.bias
    dropout_p = module.dropout if module.training else 0.0
    unsupported = None
    if not (
        module._qkv_same_embed_dim and module.bias_k is None and query.ndim == 3 and dropout_p < 1.0
    ) or (module.add_zero_attn or is_causal or _NESTED and query.is_nested):
        unsupported = why_unsupported(
            query,
            dropout_p,
            is_causal,
            not module._qkv_same_embed_dim,
            module.bias_k is not None,
            module.add_zero_attn,
        )
    call = {
        "query": query,
        "key": key,
        "value": value,
        "batch_first": module.batch_first,
        "num_heads": module.num_heads,
        "in_proj_weight": in_weight,
        "in_proj_bias": in_bias,
        "out_proj_weight": out_weight,
        "out_proj_bias": out_bias,
        "dropout_p": dropout_p,
        "attn_mask": attn_mask,
        "key_padding_mask": key_padding_mask,
        "need_weights": need_weights,
        "average_attn_weights": average_attn_weights,
    }
    if module.batch_first and not (
        _FAST_PATH and query is key is value and not (module.training or torch.is_grad_enabled())
    ):
        call["length_first"] = True
    result = attend(open_route, unsupported, call)
    if result is None:
        masks = masks_with_biases(open_route, InnerCall(**call))
        if masks is not None:
            attn_mask, key_padding_mask = masks.attn_mask, masks.key_padding_mask
            is_causal = False  # it only describes the mask of the call
        token = route.enter(None)  # the functional below it is not computed here either
        try:
            return original(
                module,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        finally:
            route.leave(token)
    output, weights = result
    if weights is not None and (
        module._backward_hooks
        or getattr(module, "_backward_pre_hooks", None)
        or global_backward_hooks
        or tracing_state() is not None
    ):
        # Code in C++ receives the outputs: the autograd function of torch's backward hooks, or the
        # tracer.
        return output, weights.computed()
    return result


def why_unsupported(
    query: Tensor, dropout_p: float, is_causal: bool, separate: bool, bias_kv: bool, zero_attn: bool
) -> Optional[str]:
    if separate:
        return "kdim or vdim other than embed_dim is not supported"
    if bias_kv:
        return "bias_k or bias_v is not supported"
    if zero_attn:
        return "add_zero_attn is not supported"
    if is_causal:
        return "is_causal is not supported"
    if dropout_p >= 1.0:
        return "dropout of 1 is not supported"
    if _NESTED and query.is_nested:
        return "nested tensors are not supported"
    return None if query.dim() in (2, 3) else f"input of {query.dim()} dimensions is not supported"


def attend(
    open_route: Route, unsupported: Optional[str], call: Dict[str, Any]
) -> Optional[AttentionResult]:
    """Compute a call; None where the original code must run.

    unsupported: why this call cannot be computed here, or None.
    call: the fields of an InnerCall. A dict costs one function call less than the record.
    """
    open_route.reached = True
    if tracing_state() is not None or is_exporting():
        return None
    if unsupported is None:
        try:
            return _compute(open_route, **call)
        except dispatch.NoBackendError as error:
            if settings.current().strict:
                raise
            unsupported = str(error)
    count_original(NAME, unsupported)
    return None


def _compute(
    open_route: Route,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch_first: bool,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Optional[Tensor],
    out_proj_weight: Tensor,
    out_proj_bias: Optional[Tensor],
    dropout_p: float,
    attn_mask: Optional[Tensor],
    key_padding_mask: Optional[Tensor],
    need_weights: bool,
    average_attn_weights: bool,
    length_first: bool = False,
) -> AttentionResult:
    batched = query.ndim == 3
    batch_first = batch_first or not batched
    if not batched:
        query, key, value, key_padding_mask = _batch_of_one(query, key, value, key_padding_mask)
    check_lengths(query, key, value, batch_first)
    q, k, v = call_adapter.project(
        query, key, value, in_proj_weight, in_proj_bias, num_heads, batch_first
    )
    own = _NO_BIASES
    if attn_mask is not None and route.is_bias(attn_mask):
        own, attn_mask = (attn_mask,), None
    bias = None
    if open_route.biases or own:
        B, M, H, _ = q.shape
        bias = open_route.total_bias(own, B, H, M, k.shape[1])
    out = attention_output(
        q,
        k,
        v,
        bias,
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        dropout_p=dropout_p,
        dtype=call_adapter.compute_dtype(q.dtype),
        fitted=True,
    )
    turned = len(q) != 1 and (length_first or not batch_first)
    if turned:
        # Contiguous, as in torch's own: then F.linear adds the bias within its product.
        out = out.transpose(0, 1).contiguous()
    out = out.flatten(2) if turned else out.reshape(query.shape)
    out = F.linear(out, out_proj_weight, out_proj_bias)
    if turned and batch_first:
        out = out.transpose(0, 1)
    weights = None
    if need_weights:
        weights = LazyWeights.of(
            q, k, bias, attn_mask, key_padding_mask, average_attn_weights, batched
        )
    return (out if batched else out[0]), weights


def _batch_of_one(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor, Optional[Tensor]]:
    """(L, E) -> (1, L, E). Arguments that are one tensor stay one tensor."""
    batched = {id(tensor): tensor.unsqueeze(0) for tensor in (query, key, value)}
    if key_padding_mask is not None and key_padding_mask.dim() == 1:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    return batched[id(query)], batched[id(key)], batched[id(value)], key_padding_mask


class Masks(NamedTuple):
    """The masks of a call of torch's own multi-head attention."""

    attn_mask: Tensor
    key_padding_mask: Optional[Tensor]


def masks_with_biases(open_route: Route, call: InnerCall) -> Optional[Masks]:
    """Return the masks with the biases added to attn_mask; None if there are no biases."""
    query, mask, padding = call.query, call.attn_mask, call.key_padding_mask
    own: Tuple[Bias, ...] = (mask,) if isinstance(mask, AttentionBias) else ()
    if not open_route.biases and not own:
        return None
    if query.dim() == 3:
        length, batch = (1, 0) if call.batch_first else (0, 1)
        B, M, N = query.shape[batch], query.shape[length], call.key.shape[length]
    else:
        B, M, N = 1, query.shape[0], call.key.shape[0]
    bias = open_route.total_bias(own, B, call.num_heads, M, N)
    if bias is None:
        return None
    if padding is not None and RELEASE < (2, 0):
        # It takes a floating mask beside a boolean padding, and no other pair.
        dense = dense_mask(bias, None if own else mask, B, call.num_heads, M, N, query)
        if not padding.is_floating_point():
            return Masks(dense, padding.bool())
        rows = padding.view(-1, 1, 1, N).expand(B, call.num_heads, 1, N).reshape(-1, 1, N)
        return Masks(dense + rows.to(dense.dtype), None)
    if padding is not None and not padding.is_floating_point():
        # torch requires both masks to be of one kind.
        padding = torch.zeros_like(padding, dtype=query.dtype).masked_fill(
            padding.bool(), float("-inf")
        )
    dense = dense_mask(bias, None if own else mask, B, call.num_heads, M, N, query)
    return Masks(dense, padding)
