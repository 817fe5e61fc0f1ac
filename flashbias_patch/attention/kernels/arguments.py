"""The records of one fused call: the operator's arguments and what its forward pass makes."""

from __future__ import annotations

from typing import NamedTuple, Optional, Sequence

from torch import Tensor


class Arguments(NamedTuple):
    """The arguments of the fused operator, in the order of its schema.

    The arguments from `window_weights` on are those of windows (window_tables.arguments); a call
    without windows has the defaults. One value for each argument, such as whether it needs a
    gradient, is held by this record too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Optional[Tensor]
    k_factor: Optional[Tensor]
    weights: Optional[Tensor]
    lengths: Sequence[int]
    dense: Optional[Tensor]
    mask: Optional[Tensor]
    padding: Optional[Tensor]
    dropout_p: float
    scale: float
    window_weights: Optional[Tensor] = None
    window_centres: Optional[Tensor] = None
    mask_centres: Optional[Tensor] = None
    frames: Sequence[int] = ()
    sides: Sequence[int] = ()
    sigmas: Sequence[float] = ()
    mask_sides: Sequence[int] = ()


NO_WINDOWS = (None, None, None, (), (), (), ())  # the arguments of windows, for a call without


class ForwardResult(NamedTuple):
    """The results of a forward pass: the output, and the values that the backward pass needs.

    Shapes: out and low (B, M, H, D) in q's dtype; lse (problem.lse_shape) float32; seed (1,) int64.
    The copies replace q, q_factor and k_factor in the kernels. None for what was not made; the
    registered operator has empty tensors instead.
    """

    out: Tensor
    low: Optional[Tensor]  # what `out` lost by rounding
    lse: Tensor  # logsumexp
    seed: Optional[Tensor]  # of dropout
    scaled_q: Optional[Tensor]
    padded_q_factor: Optional[Tensor]
    padded_k_factor: Optional[Tensor]
