"""torch's multi-head attention below an outer forward, computed through FlashBias.

`wrap_forward` wraps nn.MultiheadAttention.forward. Outside an outer forward the wrapper calls the
original at once, and TorchScript and torch.compile see the original (see its docstring).
"""

from __future__ import annotations

import functools
import types
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import settings
from ..._torch_internals import RELEASE, global_backward_hooks, tracing_state
from ...attention import dispatch, flash_bias_attention
from ...attention.weights import LazyWeights
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


def wrap_forward(original: Any) -> Any:
    """nn.MultiheadAttention.forward that computes through FlashBias inside an outer forward.

    TorchScript compiles the source of `__wrapped__`, and resolves names through the wrapper's
    globals: they are the original's. torch.compile traces `_torchdynamo_inline` in the wrapper's
    place and reads the wrapper's defaults: these are the original's too.
    """
    _route, _original, _attend = route.current, original, _attend_module
    _unreachable, _check = unreachable.modules, unreachable.check
    if RELEASE < (2, 0):
        return _wrap_earlier_forward(original)

    def forward(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: Any,
        attn_mask: Any,
        average_attn_weights: Any,
        is_causal: Any,
    ) -> Any:
        open_route = _route()
        if open_route is None:
            if _unreachable:
                _check(self)
            return _original(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        return _attend(
            open_route,
            _original,
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )

    return _in_place_of(original, forward)


def _in_place_of(original: Any, forward: Any) -> Any:
    wrapper = types.FunctionType(
        forward.__code__,
        original.__globals__,
        "forward",
        original.__defaults__,
        forward.__closure__,
    )
    functools.update_wrapper(wrapper, original)
    wrapper._torchdynamo_inline = original  # type: ignore[attr-defined]
    return wrapper


def _wrap_earlier_forward(original: Any) -> Any:
    """The same before torch 2.0, whose forward has no is_causal, or 1.11, where it has no
    average_attn_weights either."""
    averages = RELEASE >= (1, 11)
    _route, _original, _attend = route.current, original, _attend_module
    _unreachable, _check = unreachable.modules, unreachable.check

    def usual(*arguments: Any) -> Any:
        return original(*arguments[: 8 if averages else 7])

    def forward(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: Any,
        attn_mask: Any,
        average_attn_weights: Any,
    ) -> Any:
        open_route = _route()
        if open_route is None:
            if _unreachable:
                _check(self)
            return _original(
                self,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
            )
        return _attend(
            open_route,
            usual,
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            False,
        )

    def averaged(
        self: Any,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Any,
        need_weights: Any,
        attn_mask: Any,
    ) -> Any:
        open_route = _route()
        if open_route is None:
            if _unreachable:
                _check(self)
            return _original(self, query, key, value, key_padding_mask, need_weights, attn_mask)
        return _attend(
            open_route,
            usual,
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            True,
            False,
        )

    return _in_place_of(original, forward if averages else averaged)


class InnerCall(NamedTuple):
    """One call of torch's multi-head attention; sequences are (L, B, E), (B, L, E) if
    `batch_first`, or (L, E)."""

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


def _attend_module(
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
    if open_route.biases:
        unreachable.remember(module)
    out_proj = module._modules["out_proj"]
    # Quicker than attributes of a module, where no other class computes these.
    own: Dict[str, Any] = module._parameters if type(module) is nn.MultiheadAttention else _NOTHING
    outs: Dict[str, Any] = out_proj._parameters if type(out_proj) in _LINEAR else _NOTHING
    # A parametrised parameter, or one of a replica of nn.DataParallel, is an attribute only.
    weight = own["in_proj_weight"] if "in_proj_weight" in own else module.in_proj_weight
    offset = own["in_proj_bias"] if "in_proj_bias" in own else module.in_proj_bias
    out_weight = outs["weight"] if "weight" in outs else out_proj.weight
    out_offset = outs["bias"] if "bias" in outs else out_proj.bias
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
    arguments_ = (
        query,
        key,
        value,
        module.batch_first,
        module.num_heads,
        weight,
        offset,
        out_weight,
        out_offset,
        dropout_p,
        attn_mask,
        key_padding_mask,
        need_weights,
        average_attn_weights,
    )
    result = attend(open_route, unsupported, arguments_)
    if result is None:
        masks = masks_with_biases(open_route, InnerCall(*arguments_))
        if masks is not None:
            (attn_mask, key_padding_mask), is_causal = (
                masks,
                False,
            )  # is_causal only describes the mask given
        token = route.enter(None)  # the functional below it is not to be computed here either
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
    weights = result[1]
    if weights is not None and (
        module._backward_hooks
        or getattr(module, "_backward_pre_hooks", None)
        or global_backward_hooks
        or tracing_state() is not None
    ):
        # Code in C++ receives the outputs: the autograd function of torch's backward hooks, or the
        # tracer.
        return result[0], weights.computed()
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
    open_route: Route, unsupported: Optional[str], arguments_: Tuple[Any, ...]
) -> Optional[Tuple[Tensor, Optional[LazyWeights]]]:
    """(output, weights or None) of a call with the arguments of InnerCall; None where the original
    code must run."""
    open_route.reached = True
    if tracing_state() is not None or is_exporting():
        return None
    if unsupported is None:
        try:
            return _compute(open_route, *arguments_)
        except dispatch.NoBackendError as error:
            if settings.current().strict:
                raise
            unsupported = str(error)
    count_original(NAME, unsupported)
    return None


def _compute(
    open_route: Route,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch_first: bool,
    num_heads: int,
    weight: Tensor,
    offset: Optional[Tensor],
    out_weight: Tensor,
    out_offset: Optional[Tensor],
    dropout_p: float,
    attn_mask: Optional[Tensor],
    padding: Optional[Tensor],
    need_weights: bool,
    average: bool,
) -> Tuple[Tensor, Optional[LazyWeights]]:
    batched = query.ndim == 3
    batch_first = batch_first or not batched
    if not batched:
        query, key, value, padding = _batch_of_one(query, key, value, padding)
    check_lengths(query, key, value, batch_first)
    q, k, v = call_adapter.project(query, key, value, weight, offset, num_heads)
    if not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    own = _NO_BIASES
    if attn_mask is not None and route.is_bias(attn_mask):
        own, attn_mask = (attn_mask,), None
    bias = None
    if open_route.biases or own:
        B, M, H, _ = q.shape
        bias = open_route.total_bias(own, B, H, M, k.shape[1])
    out = flash_bias_attention(
        q,
        k,
        v,
        bias,
        attn_mask=attn_mask,
        key_padding_mask=padding,
        dropout_p=dropout_p,
        dtype=call_adapter.compute_dtype(q.dtype),
    )
    if not batch_first:
        out = out.transpose(0, 1)
    out = F.linear(out.reshape(query.shape), out_weight, out_offset)
    weights = None
    if need_weights:
        weights = LazyWeights.of(q, k, bias, attn_mask, padding, average, batched)
    return (out if batched else out[0]), weights


def _batch_of_one(
    query: Tensor, key: Tensor, value: Tensor, padding: Optional[Tensor]
) -> Tuple[Any, ...]:
    """(L, E) -> (1, L, E), keeping what is the same object the same object."""
    given = {id(t): t for t in (query, key, value)}
    made = {name: t.unsqueeze(0) for name, t in given.items()}
    if padding is not None and padding.dim() == 1:
        padding = padding.unsqueeze(0)
    return made[id(query)], made[id(key)], made[id(value)], padding


def masks_with_biases(
    open_route: Route, call: InnerCall
) -> Optional[Tuple[Tensor, Optional[Tensor]]]:
    """(attn_mask, key_padding_mask) with the biases added to the mask; None if there are none."""
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
    if padding is not None and RELEASE < (
        2,
        0,
    ):  # which takes a floating mask beside a boolean padding, and no other pair
        dense = dense_mask(bias, None if own else mask, B, call.num_heads, M, N, query)
        if not padding.is_floating_point():
            return dense, padding.bool()
        rows = padding.view(-1, 1, 1, N).expand(B, call.num_heads, 1, N).reshape(-1, 1, N)
        return dense + rows.to(dense.dtype), None
    if (
        padding is not None and not padding.is_floating_point()
    ):  # torch wants both masks of one kind
        padding = torch.zeros_like(padding, dtype=query.dtype).masked_fill(
            padding.bool(), float("-inf")
        )
    return dense_mask(bias, None if own else mask, B, call.num_heads, M, N, query), padding
