"""The core seam: FlashMHA, which holds the projections itself."""

from __future__ import annotations

from typing import Any, Callable, Optional, Tuple

import torch
from torch import Tensor

from ... import settings, telemetry
from ..._torch_internals import forward_gradients
from ...attention import dispatch
from ...attention.api import attention_output
from ...attention.recovery import replay
from .. import call_adapter, context, route, unreachable
from ..call_adapter import Bias, check_lengths
from ..route import Route
from .base import Args, Kwargs, Seam
from .original_code import note_original

_NO_BIASES: Tuple[Bias, ...] = ()


_CORE_PARAMETERS = ("q", "k", "v", "key_padding_mask", "attn_mask", *call_adapter.BIAS_KEYWORDS)


def new_route(
    module: Any, own: Tuple[Bias, ...], query: Any, key: Any
) -> Tuple[Route, Tuple[Bias, ...]]:
    """Return a route for a core that no patched outer forward calls, and `own` together with the
    biases of open attention_bias(...) blocks."""
    if not forward_gradients():
        replay.current()
    if context.history.opened and context.active():
        own = (*own, *context.biases_for(module, call_adapter.kind_of(module, query, key)))
    elif unreachable.record.any:
        unreachable.check(module)
    return Route(module, ()), own


class CoreSeam(Seam):
    """FlashMHA.forward(q, k, v, key_padding_mask=None): batch first, packed in_proj_weight, returns
    (out, None)."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.parameters = call_adapter.Parameters(cls)
        self.options = self.parameters.defaults_without(_CORE_PARAMETERS)

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
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
        why = why_unsupported(module, q) or self._unknown_option(args, kwargs)
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

    def _unknown_option(self, args: Args, kwargs: Kwargs) -> Optional[str]:
        for name, default in self.options:
            value = self.parameters.get(name, args, kwargs)
            if value is not None and value is not default:
                return f"{name}={value!r} is not supported"
        return None

    def _masks(
        self, module: Any, opened: Route, args: Args, kwargs: Kwargs
    ) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Return (attn_mask, key_padding_mask) in torch's convention: of the core's call, else of
        the outer forward.

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
        queries, _, _ = heads
        B, M, H, D = queries.shape
        upstream = queries.dtype
        if queries.is_cuda and upstream == torch.float32:
            upstream = (
                torch.float16
            )  # as upstream; on the CPU, where it does not run, its input's precision
        if attn_mask is not None and attn_mask.is_floating_point():
            own, attn_mask = (*own, attn_mask), None
        bias = opened.total_bias(own, B, H, M, k.shape[1]) if own or opened.biases else None
        out = attention_output(
            *heads,
            bias,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            dtype=call_adapter.compute_dtype(upstream),
            fitted=True,
        )
        flat = out.reshape(B, M, H * D)
        weight = getattr(module.out_proj, "weight", None)  # a method, if the layer is quantised
        projected: Tensor = module.out_proj(
            flat.to(weight.dtype) if isinstance(weight, Tensor) else flat
        )
        return projected


def why_unsupported(module: Any, q: Tensor) -> Optional[str]:
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
