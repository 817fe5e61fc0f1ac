"""One call of attention, validated and in normal form: the input of every backend."""

from __future__ import annotations

import math
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..bias import AttentionBias, BiasTensor, DenseBias, MaskBias, WindowMaskParts, WindowParts
from ..bias.precision import split_factors
from . import casts, fp16_gradients
from .signature import signature_of
from .values import bounded

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The tensors of AttentionInputs, in the order of its `tensors()`; the rest is static.
TENSORS = (
    "q",
    "k",
    "v",
    "q_factor",
    "k_factor",
    "segment_weights",
    "dense",
    "mask",
    "key_padding",
    "window_weights",
    "window_centres",
    "window_mask_centres",
)
DTYPES_IN_WORDS = "torch.float16, bfloat16, float32 or float64"
NO_TENSORS = (None,) * len(TENSORS)
_new: Any = tuple.__new__  # AttentionInputs(...) without the Python function around it


class AttentionInputs(NamedTuple):
    """softmax(q k^T * scale + bias) v, with the bias in several summed parts. Any strides.

    Shapes: q (B, M, H, D), k (B, N, H, D), v (B, N, H, Dv), one dtype and device; q_factor (B|1, M,
    H|1, R) and k_factor (B|1, N, H|1, R) in q's dtype; segment_weights (B|1, M, H|1, S) with
    segment_lengths summing to N: one constant per row and key segment; dense (B|1, H|1, M|1, N)
    floating, additive, may hold -inf; mask (B|1, H|1, M|1, N) bool, True = masked out; key_padding
    (B, N), bool with True = masked out, or floating and additive (may hold -inf);
    windows: a bias of local windows, with weights of at least float32, and window_mask: all but
    local windows is hidden (bias/grids.py; frames sum to N); out_dtype: the dtype that the caller
    casts the output to. A backend may give it at once, from its unrounded sums.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Optional[Tensor] = None
    k_factor: Optional[Tensor] = None
    segment_weights: Optional[Tensor] = None
    segment_lengths: Optional[Tuple[int, ...]] = None
    dense: Optional[Tensor] = None
    mask: Optional[Tensor] = None
    key_padding: Optional[Tensor] = None
    dropout_p: float = 0.0
    scale: float = 1.0
    windows: Optional[WindowParts] = None
    window_mask: Optional[WindowMaskParts] = None
    out_dtype: Optional[torch.dtype] = None

    @property
    def rank(self) -> int:
        return 0 if self.q_factor is None else self.q_factor.shape[-1]

    @property
    def needs_grad(self) -> bool:
        return torch.is_grad_enabled() and self.holds_grad

    @property
    def holds_grad(self) -> bool:
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors())

    def tensors(self) -> List[Optional[Tensor]]:
        """The tensors, in the order of TENSORS."""
        (
            q,
            k,
            v,
            q_factor,
            k_factor,
            weights,
            _,
            dense,
            mask,
            padding,
            _,
            _,
            windows,
            window_mask,
            _,
        ) = self
        return [
            q,
            k,
            v,
            q_factor,
            k_factor,
            weights,
            dense,
            mask,
            padding,
            None if windows is None else windows.weights,
            None if windows is None else windows.centres,
            None if window_mask is None else window_mask.centres,
        ]

    def with_tensors(self, tensors: Sequence[Any]) -> AttentionInputs:
        """The same call with other tensors, in the order of TENSORS."""
        (
            q,
            k,
            v,
            q_factor,
            k_factor,
            weights,
            dense,
            mask,
            padding,
            window_weights,
            centres,
            mask_centres,
        ) = tensors
        windows, window_mask = self.windows, self.window_mask
        if windows is not None:
            windows = windows._replace(weights=window_weights, centres=centres)
        if window_mask is not None:
            window_mask = window_mask._replace(centres=mask_centres)
        made: AttentionInputs = _new(
            AttentionInputs,
            (
                q,
                k,
                v,
                q_factor,
                k_factor,
                weights,
                self.segment_lengths,
                dense,
                mask,
                padding,
                self.dropout_p,
                self.scale,
                windows,
                window_mask,
                self.out_dtype,
            ),
        )
        return made

    def static(self) -> AttentionInputs:
        """The same call without its tensors."""
        return self.with_tensors(NO_TENSORS)

    def call_class(self) -> str:
        """The call signature in words: device, dtype, head dims, rank, features (signature.py)."""
        return signature_of(self).describe()


def build(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[AttentionBias | Tensor] = None,
    *,
    attn_mask: Optional[Tensor] = None,
    key_padding_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
) -> AttentionInputs:
    """Validate a public call and bring it to normal form. Raises ValueError/TypeError naming the
    argument."""
    bias, attn_mask = read_descriptions(q, k, bias, attn_mask)
    inputs, _ = build_in(None, q, k, v, bias, attn_mask, key_padding_mask, dropout_p, scale)
    return inputs


def build_in(
    dtype: Optional[torch.dtype],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Optional[AttentionBias | Tensor],
    attn_mask: Optional[Tensor],
    key_padding_mask: Optional[Tensor],
    dropout_p: float,
    scale: Optional[float],
    fitted: bool = False,
) -> Tuple[AttentionInputs, Optional[Tensor]]:
    """(inputs as by `build`, with q, k and v in `dtype`; the power that fp16_gradients.widened
    needs, or None). dtype None: q, k and v as they are. fitted: `bias` has passed as_bias."""
    B, M, H, D, N = _check_qkv(q, k, v)
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be a number in [0, 1), got {dropout_p!r}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be {DTYPES_IN_WORDS}, got {dtype!r}")
    q_factor = k_factor = weights = lengths = dense = mask = power = windows = window_mask = None
    out_dtype = None
    if bias is not None:
        described: AttentionBias = bias if fitted else as_bias(bias, B, H, M, N)  # type: ignore[assignment]
        q_factor, k_factor, segments, dense, mask, windows, window_mask = described.parts()
        if segments is not None:
            weights, lengths = _segments_for(*segments, q.device)
        if dense is not None:
            dense = dense.to(q.device)
        if windows is not None:
            windows = _windows_for(windows, q.device, M)
        if window_mask is not None:
            centres = _expanded(window_mask.centres, M).to(q.device)
            window_mask = window_mask._replace(centres=centres)
    if attn_mask is not None:
        kind, four = mask_4d(attn_mask, B, H, M, N)
        four = four.to(q.device)
        if kind == "bool":
            mask = four if mask is None else mask | four
        else:
            dense = four if dense is None else dense + four
    if dtype is not None and dtype is not q.dtype:
        # Where gradients are wanted, autograd casts the output. With dropout a forward without them
        # may be a checkpoint's, which is computed as its recomputation.
        if q.dtype is torch.float32 and not (torch.is_grad_enabled() or dropout_p):
            out_dtype = q.dtype
        if fp16_gradients.wanted(q.dtype, dtype):
            learned = None if windows is None else windows.weights
            (q, k, v), others, power = fp16_gradients.narrowed(
                (q, k, v), (q_factor, k_factor, weights, dense, learned)
            )
            q_factor, k_factor, weights, dense, learned = others
            if windows is not None and learned is not None:
                windows = windows._replace(weights=learned)
        else:
            q, k, v = casts.in_dtype(q, k, v, dtype)
    if q_factor is not None and k_factor is not None:
        q_factor, k_factor = _cast_factors(q_factor, k_factor, q)
    padding = key_padding_mask
    if padding is not None:
        padding = _key_padding(padding, B, N, q.device)
    if q.dtype is not torch.float64:
        if dense is not None and dense.dtype is torch.float64:
            dense = _in_float32(dense)
        if padding is not None and padding.dtype is torch.float64:
            padding = _in_float32(padding)
    scale = _scale(scale, D) if scale is not None or not D else D**-0.5
    return _new(
        AttentionInputs,
        (
            q,
            k,
            v,
            q_factor,
            k_factor,
            weights,
            lengths,
            dense,
            mask,
            padding,
            float(dropout_p),
            scale,
            windows,
            window_mask,
            out_dtype,
        ),
    ), power


def _in_float32(term: Tensor) -> Tensor:
    """A float64 term as float32, in which its finite numbers stay finite."""
    return bounded(term).float()


def _scale(scale: Any, D: int) -> float:
    """The scale as a finite float; TypeError or ValueError if it is not one."""
    if scale is None:
        return D**-0.5 if D else 1.0
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            "scale must be a number, got a tensor that requires grad, whose gradient would be "
            "lost: multiply q by it and pass scale=1.0"
        )
    if isinstance(scale, (bool, str, bytes)):
        raise TypeError(f"scale must be a number, got {scale!r}")
    try:
        number = float(scale)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}") from None
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite, got {number}")
    return number


def _segments_for(
    weights: Tensor, lengths: Tuple[int, ...], device: torch.device
) -> Tuple[Optional[Tensor], Optional[Tuple[int, ...]]]:
    """Weights of at least float32, of segments that have a key."""
    if 0 in lengths:  # a large weight of no key must not count as the row's largest
        present = [index for index, length in enumerate(lengths) if length]
        weights, lengths = weights[..., present], tuple(lengths[index] for index in present)
    if not lengths:
        return None, None
    return weights.to(device, torch.promote_types(torch.float32, weights.dtype)), lengths


def _windows_for(windows: WindowParts, device: torch.device, M: int) -> WindowParts:
    weights = _expanded(windows.weights, M)
    weights = weights.to(device, torch.promote_types(torch.float32, weights.dtype))
    return windows._replace(weights=weights, centres=_expanded(windows.centres, M).to(device))


def _expanded(tensor: Tensor, M: int) -> Tensor:
    """(B|1, M|1, ...) -> (B|1, M, ...)"""
    return tensor if tensor.shape[1] == M else tensor.expand(-1, M, -1, -1)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tuple[int, int, int, int, int]:
    """(B, M, H, D, N); raises if q, k and v do not fit. The first check is the fast path of valid
    operands."""
    try:
        (B, M, H, D), (_, N, _, _), (*leading, _) = q.shape, k.shape, v.shape
        fits = k.shape == (B, N, H, D) and leading == [B, N, H] and q.dtype is k.dtype is v.dtype
        if fits and q.device == k.device == v.device and q.dtype in DTYPES:
            return B, M, H, D, N
    except (AttributeError, ValueError):
        pass
    return _explain_qkv(q, k, v)


def _explain_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tuple[int, int, int, int, int]:
    for name, tensor, axes in (
        ("q", q, "(B, M, H, D)"),
        ("k", k, "(B, N, H, D)"),
        ("v", v, "(B, N, H, Dv)"),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor of shape {axes}, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have shape {axes}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"q, k and v must share a dtype: q is {q.dtype}, {name} is {tensor.dtype}"
            )
        if tensor.device != q.device:
            raise ValueError(
                f"q, k and v must be on one device: q is on {q.device}, {name} on {tensor.device}"
            )
    if q.dtype not in DTYPES:
        raise TypeError(f"q, k and v must be floating point ({DTYPES_IN_WORDS}), got {q.dtype}")
    B, M, H, D = q.shape
    N = k.shape[1]
    if tuple(k.shape) != (B, N, H, D):
        raise ValueError(
            f"k must have shape (B, N, H, D) = ({B}, N, {H}, {D}) to fit q, got {tuple(k.shape)}"
        )
    if tuple(v.shape[:3]) != (B, N, H):
        raise ValueError(
            f"v must have shape (B, N, H, Dv) = ({B}, {N}, {H}, Dv) to fit k, got {tuple(v.shape)}"
        )
    return B, M, H, D, N


def as_bias(
    bias: AttentionBias | Tensor, B: int, H: int, M: int, N: int, argument: str = "bias"
) -> AttentionBias:
    """`bias` as an AttentionBias that fits a call of that size; ValueError or TypeError if it is
    not one."""
    if type(bias) is BiasTensor:
        bias = bias.attention_bias(B, H, M, N) or bias.numbers()
    if isinstance(bias, Tensor):
        kind, four = mask_4d(bias, B, H, M, N, argument)
        return MaskBias(four) if kind == "bool" else DenseBias(four)
    if not isinstance(bias, AttentionBias):
        raise TypeError(f"bias must be an AttentionBias or a Tensor, got {type(bias).__name__}")
    batch, heads, rows, keys = bias.shape
    if (
        batch not in (1, B)
        or heads not in (1, H)
        or keys != N
        or rows != M
        and (rows != 1 or bias.rank is not None)
    ):
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} does not fit this attention: expected (B|1, H|1, "
            f"M, N) with B={B}, H={H}, M={M}, N={N}"
        )
    return bias


def read_descriptions(q: Tensor, k: Tensor, bias: Any, attn_mask: Any) -> Tuple[Any, Any]:
    """(bias, attn_mask) of a call; the description of a BiasTensor among them becomes, or joins,
    `bias`."""
    if type(bias) is not BiasTensor and type(attn_mask) is not BiasTensor:
        return bias, attn_mask
    B, M, H, _, N = _check_qkv(q, k, k)
    if type(attn_mask) is BiasTensor:
        description = as_bias(attn_mask, B, H, M, N, "attn_mask")
        attn_mask = None
        bias = description if bias is None else as_bias(bias, B, H, M, N) + description
    elif type(bias) is BiasTensor:
        bias = as_bias(bias, B, H, M, N)
    return bias, attn_mask


def _cast_factors(q_factor: Tensor, k_factor: Tensor, q: Tensor) -> Tuple[Tensor, Tensor]:
    """Factors in q's dtype. In half precision, float32 factors are split into more columns, so that
    no digit is lost."""
    q_factor, k_factor = q_factor.to(q.device), k_factor.to(q.device)
    if q.dtype in (torch.float16, torch.bfloat16):
        return split_factors(q_factor, k_factor, q.dtype)
    return q_factor.to(q.dtype), k_factor.to(q.dtype)


def mask_4d(
    mask: Tensor, B: int, H: int, M: int, N: int, argument: str = "attn_mask"
) -> Tuple[str, Tensor]:
    """('bool' | 'float', view of shape (B|1, H|1, M|1, N)) of a mask (M,N), (B,M,N), (B*H,M,N) or
    (B,H,M,N).

    Boolean and byte masks mean True = masked out, as in torch.nn.MultiheadAttention.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument} must be a Tensor, got {type(mask).__name__}")
    if mask.dtype == torch.uint8:
        mask = mask.bool()
    if mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(f"{argument} must be boolean, byte or floating point, got {mask.dtype}")
    four = mask
    if mask.dim() == 2:
        four = mask[None, None]
    elif mask.dim() == 3 and mask.shape[0] in (1, B):
        four = mask[:, None]
    elif mask.dim() == 3 and mask.shape[0] == B * H:
        four = mask.unflatten(0, (B, H))
    shape = tuple(four.shape)
    fits = (
        four.dim() == 4
        and all(s in (1, size) for s, size in zip(shape[:3], (B, H, M)))
        and shape[3] == N
    )
    if not fits:
        raise ValueError(
            f"{argument} of shape {tuple(mask.shape)} does not fit: expected (M,N)=({M},{N}), "
            f"(B,M,N)=({B},{M},{N}), "
            f"(B*H,M,N)=({B * H},{M},{N}) or (B,H,M,N)=({B},{H},{M},{N})"
        )
    return ("bool" if four.dtype is torch.bool else "float"), four


def _key_padding(mask: Tensor, B: int, N: int, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"key_padding_mask must be a Tensor, got {type(mask).__name__}")
    if mask.shape != (B, N):
        raise ValueError(
            f"key_padding_mask must have shape (B, N) = ({B}, {N}), got {tuple(mask.shape)}"
        )
    if mask.dtype == torch.uint8:
        mask = mask.bool()
    elif mask.dtype not in DTYPES and mask.dtype is not torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"key_padding_mask must be boolean, byte or floating point, got {mask.dtype}"
        )
    return mask if mask.device == device else mask.to(device)
