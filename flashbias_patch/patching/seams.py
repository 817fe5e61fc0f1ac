"""The wrappers, one per seam.

`outer`: a module in mmcv's shape around an attention. Its forward stays the repository's own; biases and masks are
captured and a route is opened, in which the core below it is answered here.
`core`: FlashMHA, which holds the projections itself.
`layer`: a decoder layer. It takes `attention_bias=` and keeps a bias alive through its checkpoint.
Those of transformers and heads are in transformers.py.
"""
from __future__ import annotations

import contextlib
import contextvars
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import journal, settings
from ..attention import dispatch, flash_bias_attention
from ..attention.recovery import replay
from ..bias import AttentionBias
from . import ambient, arguments, transformers
from .arguments import Captured

_route: contextvars.ContextVar[Optional[Route]] = contextvars.ContextVar("flashbias_route", default=None)


class Route:
    """What one outer forward captured, until its core has taken it."""

    __slots__ = ("module", "captured", "taken")

    def __init__(self, module: Any, captured: Captured) -> None:
        self.module = module
        self.captured = captured
        self.taken = False

    def take(self) -> Captured:
        self.taken = True
        return self.captured


def _map_route(route: Route, function: Callable[[Tensor], Tensor]) -> Route:
    biases = tuple(ambient.map_bias(bias, function) for bias in route.captured.biases)
    return Route(route.module, route.captured._replace(biases=biases))


def _reopen(route: Route) -> Any:
    """For the recomputation of a checkpoint inside an outer forward, around its inner attention."""
    return InnerAttention(route) if isinstance(_inner(route.module), nn.MultiheadAttention) else contextlib.nullcontext()


replay.carry(_route, _map_route, _reopen)


class InnerAttention(TorchFunctionMode):
    """Inside an outer forward, torch's own multi-head attention is answered through FlashBias.

    A torch function mode is thread-local and open only during that forward: nothing in torch is replaced.
    """

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.multi_head_attention_forward:
            return multi_head_attention(self.route.take(), func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class OuterSeam:
    """forward(query, key=None, value=None, ..., attn_mask, key_padding_mask) around an inner attention."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.parameters = arguments.Parameters(cls)
        self.unreached: Optional[str] = None  # set once a forward turned out not to call what is replaced

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        parameters = self.parameters
        kwargs, keyword_biases = arguments.take_bias_keywords(kwargs, parameters.accepts)
        route = _route.get()
        if route is not None and route.module is module:  # a subclass' forward calling its parent's
            route.captured = route.captured._replace(biases=(*route.captured.biases, *keyword_biases))
            return wrapped(*args, **kwargs)
        captured = arguments.capture(module, parameters, args, kwargs, keyword_biases)
        inner = _inner(module)
        why = self.unreached or (
            "attention weights are asked for"
            if parameters.asks_weights and any(parameters.get(n, args, kwargs) for n in parameters.asks_weights)
            else "it holds no nn.MultiheadAttention or FlashMHA" if inner is None else None
        )
        if why is not None:
            return self._original(wrapped, module, args, kwargs, captured, why)
        route = Route(module, captured)
        masks_off = parameters.without(("attn_mask", "key_padding_mask"), args, kwargs)
        token = _route.set(route)
        try:
            if isinstance(inner, nn.MultiheadAttention):
                with InnerAttention(route):
                    out = wrapped(*masks_off[0], **masks_off[1])
            else:  # padding stays: a fork's flash class may hand it on, where the family's drops it
                mask_off = parameters.without(("attn_mask",), args, kwargs)
                out = wrapped(*mask_off[0], **mask_off[1])
        finally:
            _route.reset(token)
        if not route.taken:
            self.unreached = "its forward does not reach F.multi_head_attention_forward or FlashMHA"
            if captured:
                return self._original(wrapped, module, args, kwargs, captured, self.unreached)
        return out

    def _original(self, wrapped: Any, module: Any, args: Any, kwargs: Any, captured: Captured, why: str) -> Any:
        """The repository's own code, any bias given to it as a dense mask."""
        _count_original(self.name, why)
        if captured.biases:
            query = self.parameters.get("query", args, kwargs)
            key = self.parameters.get("key", args, kwargs)
            mask = _dense_mask(captured, query, query if key is None else key, module)
            args, kwargs = self.parameters.without(("attn_mask",), args, kwargs)
            kwargs = {**kwargs, "attn_mask": mask}
            index = self.parameters.position["attn_mask"]
            if len(args) > index:
                args = (*args[:index], kwargs.pop("attn_mask"), *args[index + 1:])
        return wrapped(*args, **kwargs)


def _inner(module: nn.Module) -> Optional[nn.Module]:
    """The attention that an outer module wraps: `attn` in the whole family, else the first child of the kind."""
    child = module._modules.get("attn")
    if child is not None and _is_attention(child):
        return child
    return next((child for child in module.children() if _is_attention(child)), None)


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or hasattr(module, "in_proj_weight")


def _count_original(name: str, why: str) -> None:
    journal.calls["original"] += 1
    journal.fallback(name, "call", f"the original code ran: {why}", level="info")


# -- torch's multi-head attention, inside a route --------------------------------------------------------------------


def multi_head_attention(captured: Captured, original: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """Answer a call of F.multi_head_attention_forward; tensors are (L, B, E)."""
    call = _MhaCall(*args, **kwargs)
    why = call.why_not()
    if why is None:
        try:
            return call.attend(captured), None
        except dispatch.NoBackendError as error:
            if settings.current().strict:
                raise
            why = str(error)
    _count_original("nn.MultiheadAttention", why)
    return call.run_original(captured, original, args, kwargs)


class _MhaCall:
    """One call's arguments under the names of F.multi_head_attention_forward's signature."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
        in_proj_weight: Optional[Tensor], in_proj_bias: Optional[Tensor], bias_k: Optional[Tensor],
        bias_v: Optional[Tensor], add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor,
        out_proj_bias: Optional[Tensor], training: bool = True, key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True, attn_mask: Optional[Tensor] = None, use_separate_proj_weight: bool = False,
        q_proj_weight: Optional[Tensor] = None, k_proj_weight: Optional[Tensor] = None,
        v_proj_weight: Optional[Tensor] = None, static_k: Optional[Tensor] = None, static_v: Optional[Tensor] = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> None:
        self.query, self.key, self.value, self.num_heads = query, key, value, num_heads
        self.in_proj_weight, self.in_proj_bias = in_proj_weight, in_proj_bias
        self.out_proj_weight, self.out_proj_bias = out_proj_weight, out_proj_bias
        self.dropout_p = dropout_p if training else 0.0
        self.key_padding_mask, self.attn_mask = key_padding_mask, attn_mask
        self.unsupported = (
            ("kdim or vdim differ from embed_dim", use_separate_proj_weight),
            ("bias_k or bias_v", bias_k is not None or bias_v is not None),
            ("add_zero_attn", add_zero_attn),
            ("static_k or static_v", static_k is not None or static_v is not None),
            ("is_causal", is_causal),
            ("unbatched input", query.dim() != 3),
            ("dropout of 1", self.dropout_p >= 1.0),
            ("nested tensors", query.is_nested),
        )

    def why_not(self) -> Optional[str]:
        for reason, present in self.unsupported:
            if present:
                return f"{reason} is not supported"
        return None

    def attend(self, captured: Captured) -> Tensor:
        M, B, E = self.query.shape
        _check_lengths(self.query, self.key, self.value)
        q, k, v = arguments.project(
            self.query, self.key, self.value, self.in_proj_weight, self.in_proj_bias, self.num_heads  # type: ignore
        )
        out = _attend(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), captured, self.dropout_p,
            arguments.compute_dtype(q.dtype), (self.attn_mask, self.key_padding_mask),
        )
        out = out.transpose(0, 1).reshape(M, B, E)
        return F.linear(out, self.out_proj_weight, self.out_proj_bias)

    def run_original(self, captured: Captured, original: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        mask, padding = captured.attn_mask, captured.key_padding_mask
        if captured.biases:
            mask = _mask_of(captured, self.query.shape[1], self.num_heads, self.query.shape[0], self.key.shape[0],
                            self.query)
        given = {"attn_mask": mask, "key_padding_mask": padding}
        return original(*args, **{**kwargs, **{k: v for k, v in given.items() if v is not None}})


def _attend(
    q: Tensor, k: Tensor, v: Tensor, captured: Captured, dropout_p: float, dtype: torch.dtype,
    own_masks: Tuple[Optional[Tensor], Optional[Tensor]] = (None, None),
) -> Tensor:
    """Heads-last attention with everything captured, computed in `dtype`, returned in q's."""
    B, M, H, _ = q.shape
    bias = arguments.total_bias(captured, B, H, M, k.shape[1]) if captured.biases else None
    attn_mask = captured.attn_mask if captured.attn_mask is not None else own_masks[0]
    padding = captured.key_padding_mask if captured.key_padding_mask is not None else own_masks[1]
    return flash_bias_attention(q, k, v, bias, attn_mask=attn_mask, key_padding_mask=padding, dropout_p=dropout_p,
                                dtype=dtype)  # fmt: skip


def _check_lengths(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[:2] != value.shape[:2] or key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key and value must have one length and query's batch size: query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}, value {tuple(value.shape)}, as (length, batch, channels)"
        )


# -- dense masks for the original code ---------------------------------------------------------------------------


def _dense_mask(captured: Captured, query: Tensor, key: Tensor, module: Any) -> Tensor:
    """For an outer module's own code: (B*H, M, N) from tensors that are (L, B, E), or (B, L, E) if batch_first."""
    first = bool(getattr(module, "batch_first", False))
    (M, B), N = query.shape[:2], key.shape[0]
    if first:
        (B, M), N = query.shape[:2], key.shape[1]
    return _mask_of(captured, B, module.num_heads, M, N, query)


def _mask_of(captured: Captured, B: int, H: int, M: int, N: int, like: Tensor) -> Tensor:
    from ..attention.inputs import mask_4d

    bias = arguments.total_bias(captured, B, H, M, N)
    assert bias is not None
    total = bias.dense().to(like.device, like.dtype)
    if captured.attn_mask is not None:
        kind, mask = mask_4d(captured.attn_mask, B, H, M, N)
        total = total.masked_fill(mask, float("-inf")) if kind == "bool" else total + mask
    return total.expand(B, H, M, N).reshape(B * H, M, N)


# -- FlashMHA ----------------------------------------------------------------------------------------------------


class CoreSeam:
    """FlashMHA.forward(q, k, v, key_padding_mask=None): batch first, packed in_proj_weight, returns (out, None)."""

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__
        self.parameters = arguments.Parameters(cls)

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        route = _route.get()
        plain_kwargs, keyword_biases = arguments.take_bias_keywords(kwargs, self.parameters.accepts)
        if route is None or route.taken:
            captured = arguments.capture(module, self.parameters, args, plain_kwargs, keyword_biases)
        else:
            captured = self._as_upstream(route.take())
        keep = self.parameters.get("key_padding_mask", args, plain_kwargs)
        if keep is not None:  # flash-attn's convention, the opposite of torch's: True keeps a key
            captured = captured._replace(key_padding_mask=~keep.bool())
        why = _flash_misfit(module)
        if why is None:
            q, k, v = (self.parameters.get(name, args, plain_kwargs) for name in ("q", "k", "v"))
            try:
                return self._attend(module, q, k, v, captured), None
            except dispatch.NoBackendError as error:
                if captured.biases or settings.current().strict:
                    raise
                why = str(error)
        _count_original(self.name, why)
        return wrapped(*args, **plain_kwargs)

    @staticmethod
    def _as_upstream(captured: Captured) -> Captured:
        """The flash class drops boolean masks and key padding; a floating attn_mask is a bias, and is applied."""
        mask, padding = captured.attn_mask, captured.key_padding_mask
        biases = captured.biases
        if mask is not None and mask.is_floating_point():
            biases, mask = (*biases, mask), None
        if settings.current().masks == "upstream" and (mask is not None or padding is not None):
            journal.once("flash masks", "info",
                         "flash attention classes drop boolean attn_mask and key_padding_mask, as upstream; "
                         "FLASHBIAS_MASKS=honour applies them")
            mask = padding = None
        return captured._replace(biases=biases, attn_mask=mask, key_padding_mask=padding)

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, captured: Captured) -> Tensor:
        _check_lengths(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
        inner = getattr(module, "inner_attn", None)
        dropout_p = float(getattr(inner, "dropout_p", 0.0)) if module.training else 0.0
        heads = arguments.project(q, k, v, module.in_proj_weight, module.in_proj_bias, module.num_heads)
        upstream = heads[0].dtype
        if heads[0].is_cuda and upstream == torch.float32:
            upstream = torch.float16  # as upstream; on the CPU, where it does not run, its input's precision
        out = _attend(*heads, captured, dropout_p, arguments.compute_dtype(upstream))
        return module.out_proj(out.reshape(*q.shape[:2], -1).to(module.out_proj.weight.dtype))


def _flash_misfit(module: Any) -> Optional[str]:
    missing = [n for n in ("in_proj_weight", "in_proj_bias", "num_heads", "out_proj") if not hasattr(module, n)]
    if missing:
        return f"it has no {', '.join(missing)}"
    return "causal is not supported" if getattr(module, "causal", False) else None


# -- decoder layers ----------------------------------------------------------------------------------------------


class LayerSeam:
    """forward(query, ..., attn_masks=[self, cross], ...): `attention_bias=` goes to its cross attention."""

    def __init__(self, cls: type) -> None:
        self.parameters = arguments.Parameters(cls)

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        kwargs, biases = arguments.take_bias_keywords(kwargs, self.parameters.accepts)
        learned = _learned(self.parameters.get("attn_masks", args, kwargs))
        if not biases and not learned:
            return wrapped(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            for bias in biases:
                stack.enter_context(ambient.attention_bias(bias))
            if learned:
                stack.enter_context(ambient.learned(learned))
            return wrapped(*args, **kwargs)


def _learned(masks: Any) -> List[Tensor]:
    """The tensors that need a gradient in a list of masks, into which reentrant checkpointing would not look."""
    found: List[Tensor] = []
    for mask in masks if isinstance(masks, (list, tuple)) else (masks,):
        if isinstance(mask, Tensor):
            if mask.requires_grad:
                found.append(mask)
        elif isinstance(mask, AttentionBias):
            found += [tensor for tensor in mask.tensors() if tensor.requires_grad]
    return found


SEAMS: Dict[str, Callable[[type], Any]] = {
    "outer": OuterSeam, "core": CoreSeam, "layer": LayerSeam, **transformers.SEAMS
}
