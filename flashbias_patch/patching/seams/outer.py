"""The outer seam: a module in mmcv's shape around an attention.

Its forward stays the repository's own and receives all of its arguments; a route is open while it
runs, in which the core below it is computed here (inner_attention.py, core.py).
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, Optional, Tuple

from torch import Tensor, nn

from ... import telemetry
from ..._torch_internals import forward_gradients
from ...attention.recovery import replay
from ...bias import AttentionBias
from .. import call_adapter, context, route
from ..call_adapter import Bias
from ..route import Route
from .base import Args, Kwargs, Seam
from .core import CoreSeam
from .functional_attention import FunctionalAttention, mentions_functional
from .original_code import count_original, dense_mask

_NO_BIASES: Tuple[Bias, ...] = ()


def _map_route(opened: Route, function: Callable[[Tensor], Tensor]) -> Route:
    """For a recomputation: a route of its own, with `function` applied to the tensors that may need
    a gradient."""
    biases = tuple(context.map_bias(bias, function) for bias in opened.biases)
    mask = opened.attn_mask
    if isinstance(mask, Tensor) and mask.requires_grad:
        mask = function(mask)
    mapped = Route(opened.module, biases, mask, opened.key_padding_mask)
    mapped.functional = opened.functional
    return mapped


def _reopen(opened: Route) -> Any:
    """For the recomputation of a checkpoint inside an outer forward, around its inner attention."""
    return FunctionalAttention() if opened.functional else contextlib.nullcontext()


replay.carry(route.variable, _map_route, _reopen)


class OuterSeam(Seam):
    """forward(query, key=None, value=None, ..., attn_mask, key_padding_mask) around an inner
    attention."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.parameters = call_adapter.Parameters(cls)
        self.calls_functional: Dict[
            Optional[type], bool
        ] = {}  # by the class of the inner attention
        self.reached_once = False  # whether any call has reached its core
        self.mask_at, self.padding_at = self.parameters.positions("attn_mask", "key_padding_mask")

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        parameters, count, biases = self.parameters, len(args), _NO_BIASES
        # The same as parameters.get, without two function calls per attention call.
        mask = (
            kwargs["attn_mask"]
            if "attn_mask" in kwargs
            else args[self.mask_at]
            if self.mask_at < count
            else None
        )
        if "key_padding_mask" in kwargs:
            padding = kwargs["key_padding_mask"]
        else:
            padding = args[self.padding_at] if self.padding_at < count else None
        if (
            parameters.accepts
            or "attention_bias" in kwargs
            or "attn_bias" in kwargs
            or isinstance(mask, AttentionBias)
        ):
            args, kwargs, biases = call_adapter.take_biases(parameters, args, kwargs)
            mask = parameters.get("attn_mask", args, kwargs)
            if biases and getattr(module, "operation_name", None) == "self_attn":
                biases = _of_self_attention(biases, parameters.get("query", args, kwargs))
        opened = Route(module, biases, mask, padding)
        if not forward_gradients():
            # Find a checkpoint around this call before any variable is set for the call.
            replay.current()
        parent = route.current()
        if (
            parent is not None and parent.module is module
        ):  # a subclass' forward calling its parent's
            return _parents_forward(parent, opened, wrapped, args, kwargs)
        if context.history.opened and context.active():
            query, key = parameters.get("query", args, kwargs), parameters.get("key", args, kwargs)
            opened.biases = (
                *biases,
                *context.biases_for(module, call_adapter.kind_of(module, query, key)),
            )
        if opened.biases and not _holds_core(module):
            args, kwargs = self._biases_as_mask(opened, args, kwargs)
        below = module._modules
        core = type(below["attn"]) if "attn" in below else None
        known = self.calls_functional
        opened.functional = known[core] if core in known else self._calls_functional(module, core)
        token = route.enter(opened)
        try:
            if opened.functional:
                with FunctionalAttention():
                    out = wrapped(*args, **kwargs)
            else:
                out = wrapped(*args, **kwargs)
        finally:
            route.leave(token)
        if opened.reached:
            self.reached_once = True
        elif not self.reached_once:  # otherwise this call returned early
            opened.unsupported = "its forward did not call its nn.MultiheadAttention or FlashMHA"
            count_original(self.name, opened.unsupported)
        if opened.biases and (opened.reached or not self.reached_once):
            _check_used(self.name, opened)
        return out

    def _calls_functional(self, module: Any, core: Optional[type]) -> bool:
        """Return True if code other than nn.MultiheadAttention may call
        F.multi_head_attention_forward."""
        calls = mentions_functional({type(child) for child in module.modules()})
        self.calls_functional[core] = calls
        return calls

    def _biases_as_mask(self, opened: Route, args: Args, kwargs: Kwargs) -> Tuple[Args, Kwargs]:
        """Add the biases to attn_mask, for a forward that computes its attention itself."""
        query = self.parameters.get("query", args, kwargs)
        key = self.parameters.get("key", args, kwargs)
        B, M, N = _sizes(opened.module, query, query if key is None else key, opened.biases[0])
        H = opened.module.num_heads
        bias = opened.total_bias((), B, H, M, N)
        opened.unused()  # raises the error of one that does not fit
        opened.biases = ()
        assert bias is not None
        mask = dense_mask(bias, opened.attn_mask, B, H, M, N, query)
        return self.parameters.with_value("attn_mask", mask, args, kwargs)


def _of_self_attention(biases: Tuple[Bias, ...], query: Tensor) -> Tuple[Bias, ...]:
    """Drop the biases of other keys: decoders that know `attention_bias` pass it to every attention
    of a layer."""
    return tuple(bias for bias in biases if bias.shape[-1] in query.shape[:-1])


def _parents_forward(parent: Route, opened: Route, wrapped: Any, args: Any, kwargs: Any) -> Any:
    """Run a forward that is called by another forward of the same module: it has masks of its own,
    and adds its biases to those of the caller."""
    inherited = len(parent.biases)
    opened.biases = (*parent.biases, *opened.biases)
    token = route.enter(opened)
    try:
        out = wrapped(*args, **kwargs)
    finally:
        route.leave(token)
    parent.absorb(opened)
    if len(opened.biases) > inherited:
        _check_used(type(opened.module).__qualname__, opened, inherited)
    return out


def _check_used(name: str, opened: Route, first: int = 0) -> None:
    """Log the biases, from index `first` on, that no core added; raise the error of one that fits
    no core."""
    if opened.unused(first):
        why = opened.unsupported or "the attention that it called has no place for it"
        telemetry.unreached(f"{name}: attention_bias", why)


def _holds_core(module: nn.Module) -> bool:
    """Return True if an nn.MultiheadAttention or a patched FlashMHA is below an outer module."""
    return _is_core(module._modules.get("attn")) or any(
        _is_core(child) for child in module.modules()
    )


def _is_core(module: Any) -> bool:
    seam = getattr(getattr(type(module), "forward", None), "__flashbias_seam__", None)
    return isinstance(module, nn.MultiheadAttention) or isinstance(seam, CoreSeam)


def _sizes(module: Any, query: Tensor, key: Tensor, bias: Bias) -> Tuple[int, int, int]:
    """Return (B, M, N) of sequences (L, B, E), (B, L, E) or (L, E): of the layout that fits the
    bias, else of the module's `batch_first`."""
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    M, N = bias.shape[-2:]
    declared = int(bool(getattr(module, "batch_first", False)))
    fits = (
        axis
        for axis in (declared, 1 - declared)
        if key.shape[axis] == N and M in (1, query.shape[axis])
    )
    axis = next(fits, declared)
    return query.shape[1 - axis], query.shape[axis], key.shape[axis]
