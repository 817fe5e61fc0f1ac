"""Call signature: the properties of an attention call that decide whether a backend works.

Self-checks, verdicts and circuit breakers are kept per signature. It is a NamedTuple because every
call makes one and looks it up once: hashing a tuple takes C code alone, and a hash that is cached
in Python would cost more than it saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor

from .._torch_internals import deterministic

if TYPE_CHECKING:
    from .inputs import AttentionInputs

# Kernels that lose the tail of a tile are correct at whole tiles; 128 is the largest that is in
# use.
ALIGNMENT = 128
_new: Any = tuple.__new__  # a NamedTuple without the Python function around it; fields in order


class FactorSignature(NamedTuple):
    """The factors of a low-rank bias. `shared_...`: one for all samples, or one for all heads."""

    rank_bucket: int
    rank_is_bucket: bool
    shared_q_batch: bool
    shared_q_heads: bool
    shared_k_batch: bool
    shared_k_heads: bool


class SegmentSignature(NamedTuple):
    """The weights of a modality bias."""

    number: int
    dtype: torch.dtype
    shared_batch: bool
    shared_heads: bool


class DenseSignature(NamedTuple):
    """A dense bias."""

    dtype: torch.dtype
    requires_grad: bool
    shared_batch: bool
    shared_heads: bool
    shared_rows: bool


class MaskSignature(NamedTuple):
    """A boolean attention mask."""

    shared_batch: bool
    shared_heads: bool
    shared_rows: bool


class WindowSignature(NamedTuple):
    """A bias of local windows; `box`: the weight is constant inside a window, not Gaussian."""

    number: int
    box: bool
    dtype: torch.dtype
    shared_batch: bool
    shared_heads: bool
    shared_centres: bool


class WindowMaskSignature(NamedTuple):
    """A mask that hides all keys outside local windows."""

    number: int
    shared_centres: bool


class CallSignature(NamedTuple):
    """The signature of a call; None for an operand that it does not have.

    head_dim, value_head_dim: of q and k, and of v.
    aligned: both lengths are multiples of ALIGNMENT.
    grad: a gradient is wanted; implied by dropout (see `signature_of`).
    key_padding: the dtype of the key padding mask.
    output: the dtype that the output is cast to, if other than `dtype` (AttentionInputs.out_dtype).
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    aligned: bool
    dropout: bool
    grad: bool
    positive_scale: bool
    deterministic: bool
    factors: Optional[FactorSignature] = None
    segments: Optional[SegmentSignature] = None
    dense: Optional[DenseSignature] = None
    mask: Optional[MaskSignature] = None
    key_padding: Optional[torch.dtype] = None
    windows: Optional[WindowSignature] = None
    window_mask: Optional[WindowMaskSignature] = None
    output: Optional[torch.dtype] = None

    def describe(self) -> str:
        """The signature in words, for logs and status: `cuda float16 D32 R8 grad key_padding`."""
        factors, segments, dense = self.factors, self.segments, self.dense
        windows, window_mask = self.windows, self.window_mask
        words = [
            self.device.type, str(self.dtype)[6:], f"D{self.head_dim}",
            self.value_head_dim != self.head_dim and f"Dv{self.value_head_dim}",
            factors and f"R{factors.rank_bucket}",
            self.aligned and f"lengths of {ALIGNMENT}s",
            self.dropout and "dropout",
            self.grad and "grad",
            not self.positive_scale and "scale <= 0",
            self.deterministic and "deterministic",
            segments and f"segments{segments.number}",
            dense and ("dense with gradient" if dense.requires_grad else "dense"),
            self.mask and "mask",
            self.key_padding and "key_padding",
            windows and f"{'' if windows.box else 'gaussian '}windows{windows.number}",
            window_mask and f"window mask{window_mask.number}",
            self.output and f"to {str(self.output)[6:]}",
        ]  # fmt: skip
        return " ".join(word for word in words if word)


def signature_of(inputs: AttentionInputs, grad: Optional[bool] = None) -> CallSignature:
    """The signature of a call. `grad` says whether a gradient is wanted; None: as the operands and
    the grad mode say (grad mode is off in a backward pass).

    Dropout implies `grad`: it is training, and a checkpointed forward (without grad) must be
    computed by the backend that will recompute it (with grad), or its dropout would differ.
    """
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
        dropout_p,
        scale,
        windows,
        window_mask,
        output,
    ) = inputs
    _, M, _, D = q.shape
    _, N, _, Dv = v.shape
    factors = segments = added = hidden = local = local_mask = None
    if q_factor is not None and k_factor is not None:
        Bq, _, Hq, R = q_factor.shape
        Bk, _, Hk, _ = k_factor.shape
        bucket = rank_bucket(R)
        factors = _new(FactorSignature, (bucket, bucket == R, Bq == 1, Hq == 1, Bk == 1, Hk == 1))
    if weights is not None:
        Bw, _, Hw, S = weights.shape
        segments = _new(SegmentSignature, (S, weights.dtype, Bw == 1, Hw == 1))
    if dense is not None:
        Bd, Hd, Md, _ = dense.shape
        added = _new(DenseSignature, (dense.dtype, dense.requires_grad, Bd == 1, Hd == 1, Md == 1))
    if mask is not None:
        Bm, Hm, Mm, _ = mask.shape
        hidden = _new(MaskSignature, (Bm == 1, Hm == 1, Mm == 1))
    if windows is not None:
        Bw, _, Hw, S = windows.weights.shape
        dtype, box, Bc = windows.weights.dtype, windows.sigmas is None, windows.centres.shape[0]
        local = _new(WindowSignature, (S, box, dtype, Bw == 1, Hw == 1, Bc == 1))
    if window_mask is not None:
        Bc, _, S, _ = window_mask.centres.shape
        local_mask = _new(WindowMaskSignature, (S, Bc == 1))
    if grad is None:
        grad = (
            dropout_p > 0
            or torch.is_grad_enabled()
            and (
                q.requires_grad
                or k.requires_grad
                or v.requires_grad
                or _wants_grad(q_factor)
                or _wants_grad(k_factor)
                or _wants_grad(weights)
                or _wants_grad(dense)
                or (windows is not None and windows.weights.requires_grad)
            )
        )
    signature: CallSignature = _new(
        CallSignature,
        (
            q.device,
            q.dtype,
            D,
            Dv,
            not (M % ALIGNMENT or N % ALIGNMENT),
            dropout_p > 0,
            grad,
            scale > 0,
            deterministic(),
            factors,
            segments,
            added,
            hidden,
            None if padding is None else padding.dtype,
            local,
            local_mask,
            output,
        ),
    )
    return signature


def rank_bucket(rank: int) -> int:
    """The power of two that holds `rank`."""
    return 1 << (int(rank) - 1).bit_length() if rank else 0  # torch.jit.trace makes sizes tensors


def _wants_grad(tensor: Optional[Tensor]) -> bool:
    return tensor is not None and tensor.requires_grad
