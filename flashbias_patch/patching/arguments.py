"""Any upstream signature -> one attention call: what the outer forward captures, and projections to (B, L, H, D)."""
from __future__ import annotations

import inspect
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import settings
from ..attention.inputs import as_bias
from ..attention.recovery import replay
from ..bias import AttentionBias, DenseBias
from . import ambient, factoring
from .catalog import WEIGHT_KEYWORDS

BIAS_KEYWORDS = ("attention_bias", "attn_bias")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Bias = Union[AttentionBias, Tensor]


class Captured(NamedTuple):
    """What an outer forward was given beside its prelude's business."""

    module: Any
    biases: Tuple[Bias, ...]
    attn_mask: Optional[Tensor]
    key_padding_mask: Optional[Tensor]

    def __bool__(self) -> bool:
        return bool(self.biases) or self.attn_mask is not None or self.key_padding_mask is not None


class Parameters:
    """Where a forward's parameters stand, so that a value is found whether positional or keyword."""

    def __init__(self, cls: type) -> None:
        signature = inspect.signature(inspect.unwrap(cls.forward))  # type: ignore[attr-defined]
        names = list(signature.parameters)[1:]
        self.position = {name: i for i, name in enumerate(names)}
        self.accepts = {name for name in BIAS_KEYWORDS if name in names}
        self.asks_weights = tuple(name for name in WEIGHT_KEYWORDS if name in names)

    def get(self, name: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = self.position.get(name, len(args))
        return args[index] if index < len(args) else None

    def without(
        self, names: Tuple[str, ...], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """The same call with those parameters None."""
        for name in names:
            index = self.position.get(name, len(args))
            if kwargs.get(name) is not None:
                kwargs = {**kwargs, name: None}
            elif index < len(args) and args[index] is not None:
                args = (*args[:index], None, *args[index + 1:])
        return args, kwargs


def take_bias_keywords(kwargs: Dict[str, Any], accepted: Any = ()) -> Tuple[Dict[str, Any], List[Bias]]:
    """Split `attention_bias=` / `attn_bias=` from the keywords, unless the forward has a parameter of that name."""
    if "attention_bias" not in kwargs and "attn_bias" not in kwargs:
        return kwargs, []
    found = [kwargs[name] for name in BIAS_KEYWORDS if name in kwargs and name not in accepted]
    rest = {key: value for key, value in kwargs.items() if key not in BIAS_KEYWORDS or key in accepted}
    for bias in found:
        if bias is not None and not isinstance(bias, (AttentionBias, Tensor)):
            raise TypeError(f"attention_bias must be an AttentionBias or a Tensor, got {type(bias).__name__}")
    return rest, [bias for bias in found if bias is not None]


def kind_of(module: Any, query: Any, key: Any) -> str:
    """"self" or "cross": what mmcv named the operation, else by whether the key is the query."""
    name = getattr(module, "operation_name", None)
    if name in ("self_attn", "cross_attn"):
        return name[:-5]
    return "self" if key is None or key is query else "cross"


def capture(
    module: Any, parameters: Parameters, args: Tuple[Any, ...], kwargs: Dict[str, Any], biases: List[Bias]
) -> Captured:
    """Everything that is added to, or masks, the scores of this call."""
    if not torch.is_grad_enabled():
        replay.current()  # a checkpoint around this call is to be known before anything is set for the call
    if ambient.active():
        query, key = parameters.get("query", args, kwargs), parameters.get("key", args, kwargs)
        biases = biases + ambient.biases_for(module, kind_of(module, query, key))
    attn_mask = parameters.get("attn_mask", args, kwargs)
    if isinstance(attn_mask, AttentionBias) or (isinstance(attn_mask, Tensor) and attn_mask.requires_grad):
        biases, attn_mask = [*biases, attn_mask], None  # a mask that is learned is a bias
    return Captured(module, tuple(biases), attn_mask, parameters.get("key_padding_mask", args, kwargs))


def project(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Optional[Tensor], num_heads: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """The packed in-projection (3E, E), with as few matrix products as the identities of q, k and v allow.

    Each result has two leading dimensions as its input and is a strided view (.., .., H, D) where it can be.
    """
    width = weight.shape[0] // 3
    if key is value:
        if query is key:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        else:
            q = F.linear(query, weight[:width], None if bias is None else bias[:width])
            k, v = F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
    else:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weight.chunk(3), biases))
    q, k, v = (x.unflatten(-1, (num_heads, width // num_heads)) for x in (q, k, v))
    return q, k, v


def compute_dtype(upstream: torch.dtype) -> torch.dtype:
    """FLASHBIAS_DTYPE, or what the patched class computes in."""
    return DTYPES.get(settings.current().dtype, upstream)


def total_bias(captured: Captured, B: int, H: int, M: int, N: int) -> Optional[AttentionBias]:
    """The sum of the captured biases, each checked against the call's shape."""
    total: Optional[AttentionBias] = None
    for bias in captured.biases:
        term = as_bias(bias, B, H, M, N)
        if isinstance(term, DenseBias) and factoring.enabled():
            term = factoring.low_rank(captured.module, bias, term)
        total = term if total is None else total + term
    return total
