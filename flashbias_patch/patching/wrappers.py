"""The wrappers, one per seam.

`outer`: a module in mmcv's shape around an attention. Its forward stays the repository's own and
receives all of its arguments; a route is open while it runs, in which the core below it is computed
here (inner_attention.py, CoreSeam).
`core`: FlashMHA, which holds the projections itself.
`layer`: a decoder layer. It takes `attention_bias=` and keeps a bias alive through its checkpoint.
Those of transformers and heads are in transformers.py.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .. import settings, telemetry
from ..attention import dispatch, flash_bias_attention
from ..attention.recovery import replay
from ..bias import AttentionBias
from . import call_adapter, context, generators, route, transformers, unreachable
from .call_adapter import Bias
from .inner_attention import (
    FunctionalAttention,
    check_lengths,
    count_original,
    dense_mask,
    mentions_functional,
)
from .route import Route

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


class OuterSeam:
    """forward(query, key=None, value=None, ..., attn_mask, key_padding_mask) around an inner
    attention."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.parameters = call_adapter.Parameters(cls)
        self.calls_functional: Dict[
            Optional[type], bool
        ] = {}  # by the class of the inner attention
        self.reached_once = False  # whether any call has reached its core
        self.mask_at, self.padding_at = self.parameters.places("attn_mask", "key_padding_mask")

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        parameters, given, biases = self.parameters, len(args), _NO_BIASES
        # As parameters.get, which every call of every attention would call twice.
        mask = (
            kwargs["attn_mask"]
            if "attn_mask" in kwargs
            else args[self.mask_at]
            if self.mask_at < given
            else None
        )
        if "key_padding_mask" in kwargs:
            padding = kwargs["key_padding_mask"]
        else:
            padding = args[self.padding_at] if self.padding_at < given else None
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
        if not replay.forward_gradients():
            # a checkpoint around this call is to be known before anything is set for the call
            replay.current()
        parent = route.current()
        if (
            parent is not None and parent.module is module
        ):  # a subclass' forward calling its parent's
            return _parents_forward(parent, opened, wrapped, args, kwargs)
        if context.ever_opened and context.active():
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
        """Whether F.multi_head_attention_forward may be called by other code than
        nn.MultiheadAttention."""
        found = mentions_functional({type(child) for child in module.modules()})
        self.calls_functional[core] = found
        return found

    def _biases_as_mask(
        self, opened: Route, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """For a forward that computes its attention itself: the biases as its dense attn_mask."""
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
    """Without those of other keys: decoders that know `attention_bias` hand it to every attention
    of a layer."""
    return tuple(bias for bias in biases if bias.shape[-1] in query.shape[:-1])


def _parents_forward(parent: Route, opened: Route, wrapped: Any, args: Any, kwargs: Any) -> Any:
    """A forward called within another of the same module: it has masks of its own, and adds to the
    biases."""
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
    """Warn about biases, from the position `first` on, that no core added; raise the error of one
    that fits none."""
    if opened.unused(first):
        why = opened.unsupported or "the attention that it called has no place for it"
        telemetry.unreached(f"{name}: attention_bias", why)


def _holds_core(module: nn.Module) -> bool:
    """Whether some nn.MultiheadAttention or patched FlashMHA is below an outer module."""
    return _is_core(module._modules.get("attn")) or any(
        _is_core(child) for child in module.modules()
    )


def _is_core(module: Any) -> bool:
    seam = getattr(getattr(type(module), "forward", None), "__flashbias_seam__", None)
    return isinstance(module, nn.MultiheadAttention) or isinstance(seam, CoreSeam)


def _sizes(module: Any, query: Tensor, key: Tensor, bias: Bias) -> Tuple[int, int, int]:
    """(B, M, N) of sequences (L, B, E), (B, L, E) or (L, E): the layout that fits the bias, else as
    `batch_first` says."""
    if query.dim() == 2:
        return 1, query.shape[0], key.shape[0]
    M, N = bias.shape[-2:]
    said = int(bool(getattr(module, "batch_first", False)))
    fits = (
        axis for axis in (said, 1 - said) if key.shape[axis] == N and M in (1, query.shape[axis])
    )
    axis = next(fits, said)
    return query.shape[1 - axis], query.shape[axis], key.shape[axis]


# -- FlashMHA --------------------------------------------------------------------------------------

_CORE_PARAMETERS = ("q", "k", "v", "key_padding_mask", "attn_mask", *call_adapter.BIAS_KEYWORDS)


def new_route(
    module: Any, own: Tuple[Bias, ...], query: Any, key: Any
) -> Tuple[Route, Tuple[Bias, ...]]:
    """The route of a core that no patched outer forward is around, and `own` biases with the
    ambient ones."""
    if not replay.forward_gradients():
        replay.current()
    if context.ever_opened and context.active():
        own = (*own, *context.biases_for(module, call_adapter.kind_of(module, query, key)))
    elif unreachable.modules:
        unreachable.check(module)
    return Route(module, ()), own


def note_original(name: str, why: str, opened: Route, own: Tuple[Bias, ...]) -> None:
    """Record that the core `name` runs its original code, which does not see the biases of this
    call."""
    count_original(name, why)
    opened.unsupported = why
    if own:
        telemetry.unreached(f"{name}: attention_bias", why)


class CoreSeam:
    """FlashMHA.forward(q, k, v, key_padding_mask=None): batch first, packed in_proj_weight, returns
    (out, None)."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.parameters = call_adapter.Parameters(cls)
        self.options = self.parameters.defaults_without(_CORE_PARAMETERS)

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        parameters, own = self.parameters, _NO_BIASES
        if (
            len(args) > 4
            or "attn_mask" in kwargs
            or "attention_bias" in kwargs
            or "attn_bias" in kwargs
        ):
            args, kwargs, own = call_adapter.take_biases(parameters, args, kwargs)
        q, k, v = (parameters.get(name, args, kwargs) for name in ("q", "k", "v"))
        opened = route.current()
        if opened is None:
            opened, own = new_route(module, own, q, k)
        elif opened.biases:
            unreachable.remember(module)
        opened.reached = True
        why = _unsupported(module, q) or self._unknown_option(args, kwargs)
        if why is None:
            masks = self._masks(module, opened, args, kwargs)
            try:
                return self._attend(module, q, k, v, opened, own, *masks), None
            except dispatch.NoBackendError as error:
                if own or opened.biases or settings.current().strict:
                    raise
                why = str(error)
        note_original(self.name, why, opened, own)
        return wrapped(*args, **kwargs)

    def _unknown_option(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Optional[str]:
        for name, default in self.options:
            value = self.parameters.get(name, args, kwargs)
            if value is not None and value is not default:
                return f"{name}={value!r} is not supported"
        return None

    def _masks(
        self, module: Any, opened: Route, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """(attn_mask, key_padding_mask) in torch's convention: what the core is handed, else what
        the outer forward was.

        The flash class drops its masks. Boolean masks and key padding are dropped here too, unless
        FLASHBIAS_MASKS says otherwise; a floating mask is a bias, and is applied.
        """
        mask = self.parameters.get("attn_mask", args, kwargs)
        keep = self.parameters.get("key_padding_mask", args, kwargs)
        padding = (
            None if keep is None else ~keep.bool()
        )  # flash-attn's convention: True keeps a key
        outer_mask = opened.attn_mask if mask is None else None
        outer_padding = opened.key_padding_mask if padding is None else None
        if outer_mask is not None and outer_mask.is_floating_point():
            mask, outer_mask = outer_mask, None
            unreachable.remember(module)
        if outer_mask is None and outer_padding is None:
            return mask, padding
        if settings.current().masks == "upstream":
            telemetry.once(
                "flash masks",
                "info",
                "flash attention classes drop boolean attn_mask and key_padding_mask, as upstream; "
                "FLASHBIAS_MASKS=honour applies them",
            )
            return mask, padding
        unreachable.remember(module)
        return (mask if outer_mask is None else outer_mask), (
            padding if outer_padding is None else outer_padding
        )

    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, opened: Route, own: Tuple[Bias, ...],
        attn_mask: Optional[Tensor], key_padding_mask: Optional[Tensor],
    ) -> Tensor:  # fmt: skip
        check_lengths(q, k, v, batch_first=True)
        inner = getattr(module, "inner_attn", None)
        dropout_p = float(getattr(inner, "dropout_p", 0.0)) if module.training else 0.0
        heads = call_adapter.project(
            q, k, v, module.in_proj_weight, module.in_proj_bias, module.num_heads
        )
        B, M, H, D = heads[0].shape
        upstream = heads[0].dtype
        if heads[0].is_cuda and upstream == torch.float32:
            upstream = (
                torch.float16
            )  # as upstream; on the CPU, where it does not run, its input's precision
        if attn_mask is not None and attn_mask.is_floating_point():
            own, attn_mask = (*own, attn_mask), None
        bias = opened.total_bias(own, B, H, M, k.shape[1]) if own or opened.biases else None
        out = flash_bias_attention(
            *heads,
            bias,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            dtype=call_adapter.compute_dtype(upstream),
        )
        return module.out_proj(out.reshape(B, M, H * D).to(module.out_proj.weight.dtype))


def _unsupported(module: Any, q: Tensor) -> Optional[str]:
    missing = [
        n
        for n in ("in_proj_weight", "in_proj_bias", "num_heads", "out_proj")
        if not hasattr(module, n)
    ]
    if missing:
        return f"it has no {', '.join(missing)}"
    if getattr(module, "causal", False):
        return "causal is not supported"
    return None if q.dim() == 3 else f"input of {q.dim()} dimensions is not supported"


# -- decoder layers --------------------------------------------------------------------------------


class LayerSeam:
    """forward(query, ..., attn_masks=[self, cross], ...): `attention_bias=` goes to its cross
    attention."""

    def __init__(self, cls: type) -> None:
        self.parameters = call_adapter.Parameters(cls)

    def __call__(
        self,
        wrapped: Callable[..., Any],
        module: Any,
        args: Tuple[Any, ...],
        kwargs: Dict[str, Any],
    ) -> Any:
        kwargs, biases = call_adapter.take_bias_keywords(kwargs, self.parameters.accepts)
        learned = _learned(self.parameters.get("attn_masks", args, kwargs))
        if not biases and not learned:
            return wrapped(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for bias in biases:
                stack.enter_context(context.attention_bias(bias))
            if learned:
                stack.enter_context(context.learned(learned))
            return wrapped(*args, **kwargs)


def _learned(masks: Any) -> List[Tensor]:
    """The tensors that need a gradient in a list of masks, into which reentrant checkpointing would
    not look."""
    found: List[Tensor] = []
    for mask in masks if isinstance(masks, (list, tuple)) else (masks,):
        if isinstance(mask, Tensor):
            if mask.requires_grad:
                found.append(mask)
        elif isinstance(mask, AttentionBias):
            found += [tensor for tensor in mask.tensors() if tensor.requires_grad]
    return found


def _dual_core(cls: type) -> Any:
    from .dual_core import DualCoreSeam

    return DualCoreSeam(cls)


SEAMS: Dict[str, Callable[[type], Any]] = {
    "outer": OuterSeam,
    "core": CoreSeam,
    "dual core": _dual_core,
    "layer": LayerSeam,
    **transformers.SEAMS,
    **generators.SEAMS,
}
