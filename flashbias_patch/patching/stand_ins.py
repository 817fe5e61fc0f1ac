"""flash_attn names for modules that import them at module scope, computed by flash_bias_attention.

The names and conventions are those of flash-attn 0.2 and 2.x. A real flash-attn is never shadowed: a stand-in is used
only for a name that the installed one does not have (flash-attn-4 installs a `flash_attn` that holds none of them).
"""
from __future__ import annotations

import builtins
import types
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import journal
from ..attention import flash_bias_attention


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, dropout_p: float,
            softmax_scale: Optional[float], causal: bool) -> Tensor:
    """Packed sequences (total, H, D) with offsets (B + 1,), one attention a sequence."""
    if causal:
        raise NotImplementedError("causal=True is not supported by the flash_attn stand-in; install flash-attn")
    out = torch.empty_like(q)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for (q0, q1), (k0, k1) in zip(zip(starts_q, starts_q[1:]), zip(starts_k, starts_k[1:])):
        out[q0:q1] = flash_bias_attention(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1],
                                          dropout_p=dropout_p, scale=softmax_scale)[0]
    return out


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                           max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                           softmax_scale: Optional[float] = None, causal: bool = False, **_: Any) -> Tensor:
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                                    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
                                    softmax_scale: Optional[float] = None, causal: bool = False, **_: Any) -> Tensor:
    return _varlen(q, kv[:, 0], kv[:, 1], cu_seqlens_q, cu_seqlens_k, dropout_p, softmax_scale, causal)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: Optional[float] = None,
                    causal: bool = False, **_: Any) -> Tensor:
    if causal:
        raise NotImplementedError("causal=True is not supported by the flash_attn stand-in; install flash-attn")
    return flash_bias_attention(q, k, v, dropout_p=dropout_p, scale=softmax_scale)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: Optional[float] = None,
                             causal: bool = False, **_: Any) -> Tensor:
    return flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], dropout_p, softmax_scale, causal)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x (rows, ...) at `indices`."""
    return x[indices]


def unpad_input(hidden_states: Tensor, attention_mask: Tensor) -> Tuple[Tensor, Tensor, Tensor, int]:
    """(B, S, ...) and a mask (B, S), True = keep -> (kept rows, their flat indices, offsets (B + 1,), longest)."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, offsets, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: rows back in place, zeros elsewhere, (B, S, ...)."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return out.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


# module -> the names it offers
NAMES = {
    "flash_attn.flash_attn_interface": {
        "flash_attn_func": flash_attn_func,
        "flash_attn_kvpacked_func": flash_attn_kvpacked_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_varlen_kvpacked_func": flash_attn_varlen_kvpacked_func,
        "flash_attn_unpadded_func": flash_attn_varlen_func,
        "flash_attn_unpadded_kvpacked_func": flash_attn_varlen_kvpacked_func,
    },
    "flash_attn.bert_padding": {
        "unpad_input": unpad_input, "pad_input": pad_input, "index_first_axis": index_first_axis,
    },
}
NAMES["flash_attn"] = {**NAMES["flash_attn.flash_attn_interface"]}


class _StandIn(types.ModuleType):
    """A module object that is never put in sys.modules."""


def import_flash_attn(name: str, globals: Any, locals: Any, fromlist: Any) -> Any:
    """What `import name` or `from name import fromlist` gives: the real module where it has the names asked for."""
    real = None
    try:
        real = builtins.__import__(name, globals, locals, fromlist or (), 0)
        if all(item == "*" or hasattr(real, item) for item in fromlist or ()):
            return real
    except ImportError as error:
        if name not in NAMES:
            raise
        reason = str(error)
    else:
        missing = ", ".join(item for item in fromlist if not hasattr(real, item))
        reason = f"the installed flash_attn has no {missing}"
    journal.once(("flash_attn", reason), "info", "flash_attn stand-ins are used: %s", reason)
    return _module(name if fromlist else "flash_attn", real if fromlist else None)


def _module(name: str, real: Any) -> Any:
    module = _StandIn(name)
    module.__dict__.update(NAMES.get(name, {}))
    if real is not None:
        module.__dict__.update({key: value for key, value in vars(real).items() if not key.startswith("__")})
    if name == "flash_attn":
        for full in NAMES:
            if full != name:
                setattr(module, full.partition(".")[2], _module(full, None))
    return module
