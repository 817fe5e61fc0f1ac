"""flash_attn names for modules that import them at module scope, computed by flash_bias_attention.

The names and conventions are those of flash-attn 0.2 and 2.x. A real flash-attn is never shadowed:
a stand-in is used only for a name that the installed one does not have (flash-attn-4 installs a
`flash_attn` that holds none of them). An option is computed or refused by a NotImplementedError
that names it; one that flash-attn does not have is a TypeError.
"""

from __future__ import annotations

import types
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import telemetry
from ..attention import flash_bias_attention

# the first flash-attn with all the options that are computed here: windows (2.3) and ALiBi (2.4)
VERSION = "2.4.0"
NO_WINDOW = (-1, -1)


def _refuse(**options: Any) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise NotImplementedError(
            f"{', '.join(given)}: not supported by the flash_attn stand-in of flashbias_patch; "
            "install flash-attn"
        )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    scale: Optional[float],
    causal: bool,
    window_size: Tuple[int, int],
    slopes: Optional[Tensor],
) -> Tensor:
    """(B, M, H, D) attention. Positions are aligned at the last query and key, as in flash-attn 2.1
    and later.

    A key is visible from `left` positions before the query to `right` after it; -1 is no limit.
    slopes (H,) or (B, H) add -slope * distance. k and v may have fewer heads, of which q's number
    is a multiple.
    """
    heads = q.shape[2]
    if k.shape[2] != heads and k.shape[2] and heads % k.shape[2] == 0:
        k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    left, right = window_size
    right = 0 if causal else right
    mask = bias = None
    if left >= 0 or right >= 0 or slopes is not None:
        M, N = q.shape[1], k.shape[1]
        offset = torch.arange(N, device=q.device) - (
            torch.arange(M, device=q.device)[:, None] + (N - M)
        )
        if left >= 0 or right >= 0:
            mask = torch.zeros_like(offset, dtype=torch.bool)
            mask |= offset < -left if left >= 0 else False
            mask |= offset > right if right >= 0 else False
        if slopes is not None:
            bias = -slopes.float()[..., None, None] * offset.abs()  # (H, M, N) or (B, H, M, N)
            bias = bias if bias.dim() == 4 else bias[None].expand(q.shape[0], -1, -1, -1)
    return flash_bias_attention(q, k, v, bias, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """flash-attn 2.x: q (B, M, H, D), k and v (B, N, H, D) -> (B, M, H, D)."""
    _refuse(softcap=softcap, deterministic=deterministic, return_attn_probs=return_attn_probs)
    return _attend(q, k, v, dropout_p, softmax_scale, causal, window_size, alibi_slopes)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """flash_attn_func with kv (B, N, 2, H, D)."""
    return flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], *args, **kwargs)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    slopes: Optional[Tensor],
    attend: Callable[..., Tensor],
) -> Tensor:
    """Packed sequences (total, H, D) with offsets (B + 1,): one attention per sequence."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for i, ((q0, q1), (k0, k1)) in enumerate(
        zip(zip(starts_q, starts_q[1:]), zip(starts_k, starts_k[1:]))
    ):
        own = slopes[i] if slopes is not None and slopes.dim() == 2 else slopes
        out[q0:q1] = attend(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], own)[0]
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    window_size: Tuple[int, int] = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Optional[Tensor] = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Optional[Tensor] = None,
) -> Tensor:
    """flash-attn 2.x: q (total_q, H, D), k and v (total_k, H, D), offsets (B + 1,) -> (total_q, H,
    D)."""
    _refuse(
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        block_table=block_table is not None,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Optional[Tensor]) -> Tensor:
        return _attend(q, k, v, dropout_p, softmax_scale, causal, window_size, slopes)

    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, attend)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """flash_attn_varlen_func with kv (total_k, 2, H, D)."""
    return flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], *args, **kwargs)


def flash_attn_unpadded_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: Optional[float] = None,
    causal: bool = False,
    return_attn_probs: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """flash-attn 0.2 and 1.x, whose causal mask is aligned at the first query and key."""
    if causal and not torch.equal(cu_seqlens_q.cpu(), cu_seqlens_k.cpu()):
        _refuse(**{"causal=True with queries and keys of different lengths": True})
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        return_attn_probs=return_attn_probs,
        deterministic=deterministic,
    )


def flash_attn_unpadded_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """flash_attn_unpadded_func with kv (total_k, 2, H, D)."""
    return flash_attn_unpadded_func(q, kv[:, 0], kv[:, 1], *args, **kwargs)


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """Rows of x (rows, ...) at `indices`."""
    return x[indices]


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor
) -> Tuple[Tensor, Tensor, Tensor, int]:
    """(B, S, ...) and a mask (B, S), True = keep -> (kept rows, their flat indices, offsets (B +
    1,), longest)."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, offsets, int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of unpad_input: rows back in place, zeros elsewhere, (B, S, ...)."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    padded: Tensor = out.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
    return padded


# module -> the names it offers
NAMES: Dict[str, Dict[str, Any]] = {
    "flash_attn.flash_attn_interface": {
        "flash_attn_func": flash_attn_func,
        "flash_attn_kvpacked_func": flash_attn_kvpacked_func,
        "flash_attn_varlen_func": flash_attn_varlen_func,
        "flash_attn_varlen_kvpacked_func": flash_attn_varlen_kvpacked_func,
        "flash_attn_unpadded_func": flash_attn_unpadded_func,
        "flash_attn_unpadded_kvpacked_func": flash_attn_unpadded_kvpacked_func,
    },
    "flash_attn.bert_padding": {
        "unpad_input": unpad_input,
        "pad_input": pad_input,
        "index_first_axis": index_first_axis,
    },
}
NAMES["flash_attn"] = {"__version__": VERSION, **NAMES["flash_attn.flash_attn_interface"]}


class StandIn(types.ModuleType):
    """A module object that is never put in sys.modules: the names of `real`, if there is one, then
    the stand-ins."""

    def __init__(self, name: str, real: Any = None) -> None:
        super().__init__(name)
        self.__dict__.update(NAMES.get(name, {}))
        if real is not None:
            self.__dict__.update(
                {key: value for key, value in vars(real).items() if not key.startswith("__")}
            )
        if name == "flash_attn":
            for full in NAMES:
                part = full.partition(".")[2]
                if part and part not in self.__dict__:
                    self.__dict__[part] = StandIn(full)


def import_flash_attn(name: str, fromlist: Tuple[str, ...], usual: Callable[[], Any]) -> Any:
    """The module that `import name` or `from name import fromlist` gives: the real one where it has
    the names asked for.

    usual: the import as it would be without this package. ImportError where there is no stand-in
    for `name` either.
    """
    real = None
    try:
        real = usual()
        if (
            not fromlist
            and hasattr(real, "__version__")
            or fromlist
            and all(hasattr(real, n) for n in fromlist)
        ):
            return real
    except ImportError as error:
        if name not in NAMES:
            raise
        reason = str(error)
    else:
        missing = ", ".join(n for n in fromlist or ("__version__",) if not hasattr(real, n))
        reason = f"the installed flash_attn has no {missing}"
    telemetry.once(("flash_attn", reason), "info", "flash_attn stand-ins are used: %s", reason)
    return StandIn(name if fromlist else "flash_attn", real)
