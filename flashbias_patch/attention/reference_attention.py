"""The reference attention: every backend, kernel and test of this package must agree with it.

`attend` computes a whole call in differentiable operators, with all scores in memory.
`chunked_attention` computes the same without them. Both take `inputs`: an AttentionInputs, or
any named tuple with its fields (kernels/recompute.py has one). This module imports nothing of the
package above the biases, so that the kernels can use it.
"""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import grids
from .values import bounded, relative_weights

# Tensors of a call that are cut along the queries, with the dimension of M; the rest is used whole.
QUERY_AXIS = {
    "q": 1,
    "q_factor": 1,
    "segment_weights": 1,
    "dense": 2,
    "mask": 2,
    "windows": 1,
    "window_mask": 1,
}
# (first row, last row + 1, first key, last key + 1) -> (B, H, rows, keys): 0 where dropped
Kept = Callable[[int, int, int, int], Tensor]


class Dropout:
    """Dropout of attention weights that can be drawn again, part by part.

    kept(first_row, end_row, first_key, end_key): (B|1, H|1, rows, keys) bool or floating, 0 where a
    weight is dropped; the same at every call. scale: factor on the kept weights.
    """

    __slots__ = ("kept", "scale")

    def __init__(self, kept: Kept, scale: float) -> None:
        self.kept, self.scale = kept, scale

    def of(self, rows: slice, keys: slice) -> Tensor:
        """`kept` for these rows and keys."""
        return self.kept(rows.start, rows.stop, keys.start, keys.stop)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that scores are computed in: float64 for float64, else float32."""
    return torch.promote_types(torch.float32, dtype)


def heads_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L, H, D) -> (B, H, L, D) in `dtype`."""
    return tensor.to(dtype).transpose(1, 2)


def of_queries(inputs: Any, take: Callable[[Tensor, int], Tensor]) -> Any:
    """The same call for some of its queries: `take(tensor, dimension)` selects them from a
    tensor."""
    M = inputs.q.shape[1]
    changed = {}
    for name, axis in QUERY_AXIS.items():
        value = getattr(inputs, name)
        if value is None:
            continue
        if isinstance(value, Tensor):
            if value.shape[axis] != 1 or M == 1:  # else it is shared by all queries
                changed[name] = take(value, axis)
        else:
            parts = {"centres": take(value.centres, axis)}
            if name == "windows":
                parts["weights"] = take(value.weights, axis)
            changed[name] = value._replace(**parts)
    return inputs._replace(**changed)


def cut(inputs: Any, start: int, stop: int) -> Any:
    """The same call for queries start..stop - 1."""
    if start == 0 and stop == inputs.q.shape[1]:
        return inputs
    return of_queries(inputs, lambda tensor, axis: tensor.narrow(axis, start, stop - start))


def scores(inputs: Any) -> Tensor:
    """q k^T * scale + every part of the bias, (B, H, M, N) in at least float32; -inf where masked
    out."""
    dtype = wide_dtype(inputs.q.dtype)
    q, k = heads_first(inputs.q, dtype), heads_first(inputs.k, dtype)
    s: Tensor = q @ k.transpose(-1, -2) * inputs.scale
    if inputs.q_factor is not None:
        q_factor = heads_first(inputs.q_factor, dtype)
        s = s + q_factor @ heads_first(inputs.k_factor, dtype).transpose(-1, -2)
    if inputs.segment_weights is not None:
        weights = relative_weights(heads_first(inputs.segment_weights, dtype))
        s = s + internals.repeat_interleave(weights, inputs.segment_lengths, s.shape[-1])
    padding = None if inputs.key_padding is None else inputs.key_padding[:, None, None]
    if inputs.dense is not None:
        dense = inputs.dense.to(dtype)
        if padding is not None and padding.dtype is not torch.bool:  # finfo.min twice would be -inf
            dense, padding = bounded(dense), bounded(padding.to(dtype))
        s = s + dense
    if inputs.windows is not None:
        s = s + grids.dense_bias(inputs.windows).to(dtype)
    if inputs.window_mask is not None:
        s = s.masked_fill(grids.hidden(inputs.window_mask), float("-inf"))
    if inputs.mask is not None:
        s = s.masked_fill(inputs.mask, float("-inf"))
    if padding is not None:
        s = (
            s.masked_fill(padding, float("-inf"))
            if padding.dtype is torch.bool
            else s + padding.to(dtype)
        )
    return s


def normalized(s: Tensor) -> Tensor:
    """softmax of scores (..., N); a row that is -inf everywhere gives zeros, and zero gradients."""
    if not s.numel():
        return s
    fully_masked = s.detach().amax(-1, keepdim=True) == float("-inf")
    return torch.softmax(s.masked_fill(fully_masked, 0.0), -1).masked_fill(fully_masked, 0.0)


def weights(inputs: Any) -> Tensor:
    """The attention weights before dropout, (B, H, M, N) in at least float32."""
    return normalized(scores(inputs))


def attend(
    inputs: Any, dropout: Optional[Dropout] = None, generator: Optional[torch.Generator] = None
) -> Tensor:
    """The output of a call, (B, M, H, Dv) in q's dtype; differentiable any number of times.

    A fully masked row gives zeros, and zero gradients. Where inputs.dropout_p > 0 and no `dropout`
    is given, the weights to keep are drawn from `generator`, or else from torch's own.
    """
    p = weights(inputs)
    if dropout is not None:
        p = p * dropout.kept(0, p.shape[2], 0, p.shape[3]) * dropout.scale
    elif inputs.dropout_p:
        keep = torch.rand(p.shape, device=p.device, generator=generator) >= inputs.dropout_p
        p = p * keep / (1.0 - inputs.dropout_p)
    return (p @ heads_first(inputs.v, p.dtype)).transpose(1, 2).to(inputs.q.dtype)
