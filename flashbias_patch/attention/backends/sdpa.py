"""torch's scaled_dot_product_attention: low-rank factors by concatenation, masks and dense biases
as attn_mask.

Concatenation (FlashBias, arXiv 2505.12044, section 3.2): [q * scale, q_factor] . [k, k_factor] with
scale 1.
"""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _torch_internals as internals
from ..._torch_internals import RELEASE
from ...bias import grids
from .. import differentiable
from ..inputs import AttentionInputs
from ..selfcheck import possible
from ..values import (
    LEAST_WEIGHT,
    any_far,
    bounded,
    finite_in_exp2,
    relative_weights,
    rows_without_keys,
    shift_of,
)
from . import reference
from .base import Backend

OLD = RELEASE < (2, 1)
HALF = (torch.float16, torch.bfloat16)
# Keys of a masked call on CUDA: kernels of several torch versions crash beyond (pytorch #145040).
MOST_KEYS = 65535
# Returns None where numbers may be read. Subclasses and transforms are handled elsewhere.
_tracing_state = internals.tracing_state
FEW = 64  # rows of additive terms on the CPU whose maxima are read in Python
ALIGN = 8  # every fused SDPA kernel wants head dims in multiples of eight
# Most entries of a window bias or mask that is written out: 64 MiB in half precision.
WINDOW_ENTRIES = 1 << 25


class Sdpa(Backend):
    name = "sdpa"
    traceable = True
    compiled = True
    supports_empty = False

    def unavailable(self) -> List[str]:
        if not OLD:
            return []
        return [
            f"torch {torch.__version__} is older than 2.1, whose "
            "scaled_dot_product_attention takes a scale"
        ]

    def other_reasons(self, inputs: AttentionInputs) -> List[str]:
        reasons = []
        if inputs.q.device.type == "cpu" and inputs.q.dtype in HALF:
            reasons.append("half precision on the CPU is not supported by every torch")
        if inputs.q.is_cuda and inputs.k.shape[1] > MOST_KEYS and _is_masked(inputs):
            reasons.append(f"a mask over {inputs.k.shape[1]} keys on CUDA, at most {MOST_KEYS}")
        if inputs.windows is not None or inputs.window_mask is not None:
            entries = window_entries(inputs)
            if entries > WINDOW_ENTRIES:
                reasons.append(
                    f"windows written out are {entries} entries, more than {WINDOW_ENTRIES}"
                )
        return reasons

    def traced(self, inputs: AttentionInputs) -> Tensor:
        """The output, inside torch.compile: gradients are not differentiated again there."""
        return self(inputs, twice=False)

    def __call__(self, inputs: AttentionInputs, twice: bool = True) -> Tensor:
        original = inputs
        if inputs.windows is not None or inputs.window_mask is not None:
            inputs = windows_to_dense(inputs)
        dropout_p, attn_mask, masked_rows = inputs.dropout_p, None, None
        if not (
            inputs.dense is inputs.mask is inputs.key_padding is inputs.segment_weights is None
        ):
            masks = _masks(inputs)
            if masks is None:
                return reference.backend(original)
            attn_mask, masked_rows = masks
            if inputs.segment_weights is not None:
                inputs = segments_to_factors(inputs)
        q, k, v, scale = inputs.q, inputs.k, inputs.v, inputs.scale
        if inputs.q_factor is not None:
            q, k = concatenate(inputs)
            scale = 1.0
        kernel, pad_v = None, True
        if not q.is_cpu:
            if q.is_cuda:
                q, k, v = for_cuda(q, k, v, attn_mask)
            kernel, pad_v = _kernel(q, k, v, attn_mask, dropout_p)
        head_dim = v.shape[-1]
        if pad_v and q.shape[-1] > head_dim:
            v = F.pad(v, (0, q.shape[-1] - head_dim))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if kernel is None:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
            )
        else:
            with kernel:
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale
                )
        if twice and not dropout_p and out.requires_grad:
            differentiable.allow_again(out.grad_fn, q, k, v, attn_mask, scale)
        if masked_rows is not None:
            out = out.masked_fill(masked_rows, 0.0)
        if out.shape[-1] != head_dim:
            out = out[..., :head_dim]
        return out.transpose(1, 2)


backend = Sdpa()


def _masks(inputs: AttentionInputs) -> Optional[Tuple[Optional[Tensor], Optional[Tensor]]]:
    """(SDPA's attn_mask, fully masked rows); None where plain PyTorch must compute the call
    (values.py)."""
    additive, masked = merge_terms(inputs)
    if additive is None:
        return merge_masks(inputs, None, masked, None, False)
    q = inputs.q
    top = (additive.detach() if additive.requires_grad else additive).amax(-1, keepdim=True)
    batch, heads, rows, _ = top.shape
    if (
        top.is_cpu
        and type(top) is Tensor
        and inputs.segment_weights is None
        and batch * heads * rows <= FEW
        and _tracing_state() is None
    ):
        peaks = top.view(-1).tolist()
        if not any(peaks):
            # The largest term of every row is 0, as with a padding that hides some keys. A copy:
            # torch saves it for backward, and the caller may change its own mask before that.
            return additive.to(q.dtype, copy=True), None
    # Where `exact` is False, a kernel's running maximum is enough, if that is finite.
    exact = inputs.needs_grad or q.dtype in HALF or inputs.segment_weights is not None
    if exact and possible(inputs) and any_far(top):
        return None
    if top.is_cuda and not exact:
        additive = finite_in_exp2(additive, top)
    return merge_masks(inputs, additive, masked, top, exact)


def segments_to_factors(inputs: AttentionInputs) -> AttentionInputs:
    """Segment weights as one more block of low-rank columns: weight times the indicator of its
    segment.

    Relative to the row's largest, and at least LEAST_WEIGHT, because -inf times 0 is nan: the
    caller clears rows whose weights are all -inf (values.rows_without_keys).
    """
    if inputs.segment_weights is None:
        return inputs
    from ...bias.precision import split_factors

    weights = relative_weights(inputs.segment_weights).clamp_min(LEAST_WEIGHT)
    lengths = torch.tensor(inputs.segment_lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(
        weights.device, non_blocking=True
    )
    indicator = F.one_hot(segment, len(lengths)).to(weights.dtype)[None, :, None]
    if inputs.q.dtype in HALF:
        weights, indicator = split_factors(weights, indicator, inputs.q.dtype)
    else:
        weights, indicator = weights.to(inputs.q.dtype), indicator.to(inputs.q.dtype)
    if inputs.q_factor is not None:
        weights = _join(inputs.q_factor, weights)
        indicator = _join(inputs.k_factor, indicator)
    return inputs._replace(
        q_factor=weights, k_factor=indicator, segment_weights=None, segment_lengths=None
    )


def window_entries(inputs: AttentionInputs) -> int:
    """Entries of the larger of the window bias and the window mask, written out."""
    windows, window_mask = inputs.windows, inputs.window_mask
    rows = inputs.q.shape[1] * inputs.k.shape[1]
    largest = 0
    if windows is not None:
        batch, _, heads, _ = windows.weights.shape
        largest = max(batch, windows.centres.shape[0]) * heads * rows
    return largest if window_mask is None else max(largest, window_mask.centres.shape[0] * rows)


def windows_to_dense(inputs: AttentionInputs) -> AttentionInputs:
    """Windows joined to the dense bias, and to the mask."""
    if inputs.windows is not None:
        bias = grids.dense_bias(inputs.windows)
        inputs = inputs._replace(
            windows=None, dense=bias if inputs.dense is None else bias + inputs.dense
        )
    if inputs.window_mask is not None:
        mask = grids.hidden(inputs.window_mask)
        inputs = inputs._replace(
            window_mask=None, mask=mask if inputs.mask is None else mask | inputs.mask
        )
    return inputs


def _join(a: Optional[Tensor], b: Tensor) -> Tensor:
    """Concatenate along the rank, expanding batch and heads only as far as the other operand
    needs."""
    assert a is not None
    shape = [max(x, y) for x, y in zip(a.shape[:3], b.shape[:3])]
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], -1)


def concatenate(inputs: AttentionInputs) -> Tuple[Tensor, Tensor]:
    """([q * scale, q_factor, 0], [k, k_factor, 0]) with the head dim a multiple of ALIGN."""
    assert inputs.q_factor is not None and inputs.k_factor is not None
    pad = -(inputs.q.shape[-1] + inputs.rank) % ALIGN

    def join(x: Tensor, factor: Tensor) -> Tensor:
        joined = torch.cat([x, factor.expand(*x.shape[:3], -1)], -1)
        return F.pad(joined, (0, pad)) if pad else joined

    return join(inputs.q * inputs.scale, inputs.q_factor), join(inputs.k, inputs.k_factor)


def merge_terms(inputs: AttentionInputs) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """(sum of the additive terms, -inf where masked, or None; the masked pairs, if there is no such
    sum)."""
    additive, masked = inputs.dense, inputs.mask
    padding = inputs.key_padding
    if padding is not None:
        batch, length = padding.shape
        padding = padding.view(batch, 1, 1, length)
        if padding.dtype is torch.bool:
            masked = padding if masked is None else masked | padding
        else:
            additive = (
                padding if additive is None else bounded(_wide(additive)) + bounded(_wide(padding))
            )
    if additive is not None and masked is not None:
        additive, masked = additive.masked_fill(masked, float("-inf")), None
    return additive, masked


def _wide(term: Tensor) -> Tensor:
    return term.to(torch.promote_types(torch.float32, term.dtype))


def merge_masks(
    inputs: AttentionInputs,
    additive: Optional[Tensor],
    masked: Optional[Tensor],
    top: Optional[Tensor],
    shifted: bool,
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """(SDPA's attn_mask, rows whose keys are all masked). SDPA's masks mean True = take part.

    Such rows would be NaN: they are let through and zeroed afterwards, which also zeroes their
    gradients. `additive`, whose rows have the maxima `top`, is relative to these if `shifted`.
    """
    weights, fully_masked, visible = inputs.segment_weights, None, None
    if masked is not None:
        fully_masked = masked.all(-1, keepdim=True)
        visible = ~masked
        masked = visible | fully_masked
    elif additive is not None:
        assert top is not None
        fully_masked = top == float("-inf")
        if weights is not None:
            visible = additive.detach() > float("-inf")
        if shifted:
            additive = additive - shift_of(top)
        additive = additive.to(inputs.q.dtype).masked_fill(fully_masked, 0.0)
    if weights is not None:
        assert inputs.segment_lengths is not None
        fully_masked = rows_without_keys(weights, inputs.segment_lengths, visible)
    return (masked if additive is None else additive), fully_masked


def for_cuda(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor]
) -> Tuple[Tensor, Tensor, Tensor]:
    """q, k and v in a form that torch's CUDA kernels take."""
    # Expanded keys: wrong in the efficient kernel at N % 32 == 1 (pytorch #191937).
    k, v = (t.contiguous() if _is_expanded(t) else t for t in (k, v))
    mask_alone = (
        attn_mask is not None
        and attn_mask.requires_grad
        and not any(t.requires_grad for t in (q, k, v))
    )
    if mask_alone and torch.is_grad_enabled() and possible(AttentionInputs(q, k, v)):
        # Forward would not store the logsumexp that the mask's gradient is computed from (pytorch
        # #148476).
        q = q.detach().requires_grad_()
    return q, k, v


def _is_expanded(tensor: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride()))


def _is_masked(inputs: AttentionInputs) -> bool:
    terms = inputs.dense, inputs.mask, inputs.key_padding, inputs.windows, inputs.window_mask
    return any(term is not None for term in terms)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], dropout_p: float
) -> Tuple[Optional[ContextManager[Any]], bool]:
    """(context that picks the SDPA kernel, if any is needed; whether v must be padded to q's head
    dim).

    On CUDA in half precision cuDNN takes unequal head dims, flash does not (it would end in the
    math kernel, which holds the scores). The CPU's fused kernel wants equal ones, and is not
    selected here. cuDNN is not used for a single query, nor with gradients: at N % 128 == 64 they
    are NaN where a row's logsumexp is below -88.7 (pytorch #196678), and at 37 x 63 the
    self-check has seen wrong ones.
    """
    grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (q, k, v, attn_mask)
    )
    if q.is_cuda and (grad or q.shape[1] == 1):
        return _without_cudnn(), False
    if q.shape[-1] == v.shape[-1] or attn_mask is not None:
        return None, False
    if q.device.type == "cuda" and q.dtype in HALF and _cudnn_takes(q, k, v, dropout_p):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]), False
    return None, not (q.device.type == "cuda" and q.dtype not in HALF)


def _without_cudnn() -> ContextManager[Any]:
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # before torch 2.3, which has no cuDNN attention either
        return contextlib.nullcontext()
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> bool:
    probe = getattr(torch.backends.cuda, "can_use_cudnn_attention", None)
    if probe is None:  # before torch 2.5
        return False
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    try:
        params = torch.backends.cuda.SDPAParams(q, k, v, None, dropout_p, False, False)
    except TypeError:  # torch 2.5 has no enable_gqa argument
        params = torch.backends.cuda.SDPAParams(q, k, v, None, dropout_p, False)  # type: ignore[call-arg]
    takes: bool = probe(params)
    return takes
