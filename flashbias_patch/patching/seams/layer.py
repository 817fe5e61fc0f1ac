"""The layer seam: a decoder layer takes `attention_bias=` and passes a bias through its
checkpoint."""

from __future__ import annotations

import contextlib
from typing import Any, Callable, List

from torch import Tensor

from ...bias import AttentionBias
from .. import call_adapter, context
from .base import Args, Kwargs, Seam


class LayerSeam(Seam):
    """forward(query, ..., attn_masks=[self, cross], ...): `attention_bias=` goes to its cross
    attention."""

    def __init__(self, cls: type) -> None:
        super().__init__(cls)
        self.parameters = call_adapter.Parameters(cls)

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
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
