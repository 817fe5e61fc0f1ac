"""Read a call of any upstream signature: its arguments, its biases, and its projections.

A signature is read once per class (`Parameters`), not bound in each call: inspect.Signature.bind
makes dozens of Python calls.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import settings
from .._torch_internals import current_transform
from ..bias import AttentionBias

BIAS_KEYWORDS = ("attention_bias", "attn_bias")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Bias = Union[AttentionBias, Tensor]


class Parameters:
    """The parameters of a forward: the value of each is read from args or kwargs."""

    def __init__(self, cls: type) -> None:
        signature = inspect.signature(inspect.unwrap(cls.forward))  # type: ignore[attr-defined]
        names = list(signature.parameters)[1:]
        self.position = {name: i for i, name in enumerate(names)}
        self.accepts = {name for name in BIAS_KEYWORDS if name in names}
        self.may_hold_bias = tuple(name for name in ("attn_mask", *BIAS_KEYWORDS) if name in names)

        self.defaults = {
            name: parameter.default for name, parameter in signature.parameters.items()
        }

    def defaults_without(self, known: Tuple[str, ...]) -> Tuple[Tuple[str, Any], ...]:
        """(name, default) of the parameters other than the `known` ones, *args and **kwargs."""
        empty = inspect.Parameter.empty
        return tuple(
            (n, None if d is empty else d)
            for n, d in list(self.defaults.items())[1:]
            if n not in known
        )

    def positions(self, *names: str) -> Tuple[int, ...]:
        """Return the positions of parameters; sys.maxsize for one that the forward lacks."""
        return tuple(self.position.get(name, sys.maxsize) for name in names)

    def get(self, name: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = self.position.get(name, len(args))
        return args[index] if index < len(args) else None

    def without(
        self, name: str, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """Return args and kwargs with None for that parameter."""
        return self.with_value(name, None, args, kwargs)

    def with_value(
        self, name: str, value: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """Return args and kwargs with another value for that parameter."""
        index = self.position.get(name, len(args))
        if name not in kwargs and index < len(args):
            return (*args[:index], value, *args[index + 1 :]), kwargs
        return args, {**kwargs, name: value}


def take_biases(
    parameters: Parameters, args: Tuple[Any, ...], kwargs: Dict[str, Any]
) -> Tuple[Tuple[Any, ...], Dict[str, Any], Tuple[Bias, ...]]:
    """Take the biases that upstream code cannot read out of a call: (args, kwargs, biases).

    They are `attention_bias=` and `attn_bias=`, unless the forward has a parameter of that name,
    and AttentionBias objects passed as a mask or as such a parameter.
    """
    biases: Tuple[Bias, ...] = ()
    if "attention_bias" in kwargs or "attn_bias" in kwargs:
        kwargs, keyword_biases = take_bias_keywords(kwargs, parameters.accepts)
        biases = tuple(keyword_biases)
    for name in parameters.may_hold_bias:
        value = parameters.get(name, args, kwargs)
        if isinstance(value, AttentionBias):
            args, kwargs = parameters.without(name, args, kwargs)
            biases = (*biases, value)
    return args, kwargs, biases


def take_bias_keywords(
    kwargs: Dict[str, Any], accepted: Any = ()
) -> Tuple[Dict[str, Any], List[Bias]]:
    """Take `attention_bias=` and `attn_bias=` out of the keywords, except those in `accepted`: the
    forward has a parameter of that name. TypeError for a value that is no bias."""
    if "attention_bias" not in kwargs and "attn_bias" not in kwargs:
        return kwargs, []
    biases = [kwargs[name] for name in BIAS_KEYWORDS if name in kwargs and name not in accepted]
    rest = {
        key: value for key, value in kwargs.items() if key not in BIAS_KEYWORDS or key in accepted
    }
    for bias in biases:
        if bias is not None and not isinstance(bias, (AttentionBias, Tensor)):
            raise TypeError(
                f"attention_bias must be an AttentionBias or a Tensor, got {type(bias).__name__}"
            )
    return rest, [bias for bias in biases if bias is not None]


def kind_of(module: Any, query: Any, key: Any) -> str:
    """Return "self" or "cross": mmcv's `operation_name` if there is one, else "self" where the key
    is the query or has the same memory."""
    name: Optional[str] = getattr(module, "operation_name", None)
    if name in ("self_attn", "cross_attn"):
        return name[:-5]
    return "self" if key is None or key is query or _same_memory(query, key) else "cross"


def _same_memory(a: Any, b: Any) -> bool:
    if (
        not isinstance(a, Tensor)
        or not isinstance(b, Tensor)
        or a.is_meta
        or current_transform() is not None
    ):
        return False  # such tensors have no memory of their own
    return a.shape == b.shape and a.is_set_to(b)


def project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    num_heads: int,
    batch_first: bool = True,
) -> Tuple[Tensor, Tensor, Tensor]:
    """Apply the packed in-projection `weight` (3E, E), `bias` (3E,) or None: (B, L, H, D) each.

    query, key and value that are the same tensor share a matrix product.
    """
    width = weight.shape[0] // 3
    if key is value:
        if query is key:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
        else:
            q = F.linear(query, weight[:width], None if bias is None else bias[:width])
            k, v = F.linear(key, weight[width:], None if bias is None else bias[width:]).chunk(
                2, -1
            )
    else:
        wq, wk, wv = weight.chunk(3)
        bq, bk, bv = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = F.linear(query, wq, bq), F.linear(key, wk, bk), F.linear(value, wv, bv)
    heads = (num_heads, width // num_heads)
    leading, of_keys = query.shape[:2], key.shape[:2]
    if not batch_first and query.shape[1] == 1:  # in memory (L, 1, E) and (1, L, E) are the same
        batch_first, leading, of_keys = True, leading[::-1], of_keys[::-1]
    q, k, v = q.view(*leading, *heads), k.view(*of_keys, *heads), v.view(*of_keys, *heads)
    return (q, k, v) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))


def check_lengths(query: Tensor, key: Tensor, value: Tensor, batch_first: bool) -> None:
    """Raise ValueError unless key and value have one length, and query's batch size."""
    batch = 0 if batch_first else 1
    if key.shape[:2] != value.shape[:2] or key.shape[batch] != query.shape[batch]:
        axes = "(batch, length, channels)" if batch_first else "(length, batch, channels)"
        raise ValueError(
            "key and value must have one length and query's batch size: query "
            f"{tuple(query.shape)}, "
            f"key {tuple(key.shape)}, value {tuple(value.shape)}, as {axes}"
        )


def compute_dtype(upstream: torch.dtype) -> torch.dtype:
    """Return the dtype of FLASHBIAS_DTYPE; for "auto", `upstream`, which the patched class uses."""
    name = settings.current().dtype
    return upstream if name == "auto" else DTYPES[name]
