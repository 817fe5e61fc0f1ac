"""The forward that replaces nn.MultiheadAttention.forward.

Outside an outer forward it calls the original at once. TorchScript and torch.compile see the
original.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from ..._torch_internals import RELEASE
from .. import route, unreachable
from .inner_attention import attend_module


def wrap_forward(original: Any) -> Any:
    """nn.MultiheadAttention.forward that computes through FlashBias inside an outer forward.

    TorchScript compiles the source of `__wrapped__`, and resolves names through the wrapper's
    globals: they are the original's. torch.compile traces `_torchdynamo_inline` in the wrapper's
    place and reads the wrapper's defaults: these are the original's too.
    """
    _route, _original, _attend = route.current, original, attend_module
    _unreachable, _check = unreachable.record, unreachable.check
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
            if _unreachable.any:
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
    _route, _original, _attend = route.current, original, attend_module
    _unreachable, _check = unreachable.record, unreachable.check

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
            if _unreachable.any:
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
            if _unreachable.any:
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
