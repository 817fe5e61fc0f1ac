"""Plain PyTorch, chunked over queries: never holds (B, H, M, N), takes every call, on any
device."""

from __future__ import annotations

import functools
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ...bias import grids
from .. import differentiable
from ..inputs import TENSORS, AttentionInputs
from ..values import bounded, relative_weights
from .base import Backend

# Tensors of AttentionInputs that are cut along the queries, with the dimension of M; the rest is
# used whole.
QUERY_AXIS = {
    "q": 1,
    "q_factor": 1,
    "segment_weights": 1,
    "dense": 2,
    "mask": 2,
    "window_weights": 1,
    "window_centres": 1,
    "window_mask_centres": 1,
}
AXES = tuple(QUERY_AXIS.get(name) for name in TENSORS)
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


class Reference(Backend):
    name = "reference"

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        return self.attend(inputs, CHUNK_BYTES.get(inputs.q.device.type, 256 << 20))

    def attend(self, inputs: AttentionInputs, chunk_bytes: int) -> Tensor:
        """The same in chunks of queries whose float32 scores take `chunk_bytes` (at least one
        query)."""
        seed = None
        if inputs.dropout_p:
            # Drawn on the CPU whatever the device: reading a CUDA generator would synchronise.
            seed = int(torch.empty((), dtype=torch.int64).random_(1 << 31))
        rows = chunk_rows(inputs, chunk_bytes)
        return _Chunked.apply(inputs.static(), (seed, rows), *inputs.tensors())  # type: ignore[no-any-return]


backend = Reference()


def chunk_rows(inputs: AttentionInputs, chunk_bytes: int) -> int:
    """Queries per chunk, so that one chunk's float32 scores stay within `chunk_bytes`."""
    B, _, H, _ = inputs.q.shape
    return max(1, chunk_bytes // max(1, B * H * inputs.k.shape[1] * 4))


def cut(inputs: AttentionInputs, start: int, stop: int) -> AttentionInputs:
    """The same call for queries start..stop only."""
    M = inputs.q.shape[1]
    rows: List[Optional[Tensor]] = []
    for tensor, axis in zip(inputs.tensors(), AXES):
        if tensor is not None and axis is not None and not (tensor.shape[axis] == 1 and M != 1):
            tensor = tensor.narrow(axis, start, stop - start)
        rows.append(tensor)
    return inputs.with_tensors(rows)


def scores(inputs: AttentionInputs) -> Tensor:
    """q k^T * scale + every part of the bias, (B, H, M, N) in at least float32; -inf where masked
    out."""
    dtype = torch.promote_types(torch.float32, inputs.q.dtype)

    def heads_first(tensor: Optional[Tensor]) -> Tensor:
        assert tensor is not None
        return tensor.to(dtype).transpose(1, 2)

    s = heads_first(inputs.q) @ heads_first(inputs.k).transpose(-1, -2) * inputs.scale
    if inputs.q_factor is not None:
        s = s + heads_first(inputs.q_factor) @ heads_first(inputs.k_factor).transpose(-1, -2)
    if inputs.segment_weights is not None:
        weights = relative_weights(heads_first(inputs.segment_weights))
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


def attend_dense(inputs: AttentionInputs, generator: Optional[torch.Generator] = None) -> Tensor:
    """The whole call at once, scores materialised. A fully masked row gives zeros, and zero
    gradients."""
    s = scores(inputs)
    dead = (
        s.detach().amax(-1, keepdim=True) == float("-inf")
        if s.shape[-1]
        else s.new_zeros(()).bool()
    )
    p = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if inputs.dropout_p:
        keep = torch.rand(p.shape, device=p.device, generator=generator) >= inputs.dropout_p
        p = p * keep / (1.0 - inputs.dropout_p)
    return (p @ inputs.v.to(p.dtype).transpose(1, 2)).transpose(1, 2).to(inputs.q.dtype)


class _Chunked(torch.autograd.Function):
    """Forward chunk by chunk; backward recomputes each chunk's scores, with the same dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        static: AttentionInputs,
        drawn: Tuple[Optional[int], int],
        *tensors: Optional[Tensor],
    ) -> Tensor:
        inputs = static.with_tensors(tensors)
        seed, rows = ctx.drawn = (
            drawn  # dropout is drawn chunk by chunk: backward must cut as forward did
        )
        ctx.static = static
        ctx.save_for_backward(*tensors)
        out = inputs.q.new_empty(*inputs.q.shape[:3], inputs.v.shape[-1])
        for start, stop in _chunks(inputs, rows):
            out[:, start:stop] = attend_dense(
                cut(inputs, start, stop), _generator(inputs, seed, start)
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tuple[Optional[Tensor], ...]:
        inputs = ctx.static.with_tensors(ctx.saved_tensors)
        needs = ctx.needs_input_grad[2:]
        if differentiable.needed_in_backward(grad_out):
            again = functools.partial(attend_in_chunks, seed=ctx.drawn[0], rows=ctx.drawn[1])
            return (None, None, *differentiable.gradients(inputs, needs, grad_out, again))
        return (None, None, *gradients(inputs, grad_out, needs, *ctx.drawn))


def attend_in_chunks(inputs: AttentionInputs, seed: Optional[int], rows: int) -> Tensor:
    """What the backend computes, in differentiable operators, with the same dropout."""
    chunks = _chunks(inputs, rows) or [(0, 0)]
    return torch.cat(
        [
            attend_dense(cut(inputs, start, stop), _generator(inputs, seed, start))
            for start, stop in chunks
        ],
        1,
    )


def gradients(
    inputs: AttentionInputs,
    grad_out: Tensor,
    needed: Tuple[bool, ...],
    seed: Optional[int],
    rows: int,
) -> List[Optional[Tensor]]:
    """Gradients of the tensors named in TENSORS (None where not `needed`), in chunks of `rows`
    queries."""
    whole = inputs.tensors()
    wanted = [i for i, need in enumerate(needed) if need]
    totals: List[Optional[Tensor]] = [None] * len(whole)
    for start, stop in _chunks(inputs, rows):
        part: List[Any] = cut(inputs, start, stop).tensors()
        for i in wanted:
            part[i] = part[i].detach().requires_grad_()
        with torch.enable_grad(), internals.autocast_off():
            out = attend_dense(inputs.with_tensors(part), _generator(inputs, seed, start))
            found = torch.autograd.grad(
                out, [part[i] for i in wanted], grad_out[:, start:stop], allow_unused=True
            )
        for i, grad in zip(wanted, found):
            if grad is None:
                continue
            tensor, axis = whole[i], AXES[i]
            assert tensor is not None
            if (
                totals[i] is None
            ):  # made from the gradient: under vmap it has the gradient's own batch
                totals[i] = grad.new_zeros(
                    tensor.shape, dtype=torch.promote_types(torch.float32, tensor.dtype)
                )
            total = totals[i]
            assert total is not None
            if axis is not None and total.shape[axis] == inputs.q.shape[1]:
                total = total.narrow(axis, start, stop - start)
            total += grad
    for i in wanted:  # what no chunk reached
        total, like = totals[i], whole[i]
        assert like is not None
        totals[i] = torch.zeros_like(like) if total is None else total.to(like.dtype)
    return totals


def _chunks(inputs: AttentionInputs, rows: int) -> List[Tuple[int, int]]:
    M = inputs.q.shape[1]
    return [(start, min(start + rows, M)) for start in range(0, M, rows)]


def _generator(
    inputs: AttentionInputs, seed: Optional[int], start: int
) -> Optional[torch.Generator]:
    if seed is None:
        return None
    return torch.Generator(inputs.q.device).manual_seed(seed + start)
