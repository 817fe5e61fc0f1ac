"""The reference attention as a backend: plain PyTorch in chunks of queries and keys. It never holds
(B, H, M, N) and computes every call, on any device."""

from __future__ import annotations

import functools
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from ..._torch_internals import Function, tracing_state
from .. import chunked_attention, differentiable, reference_attention
from ..chunked_attention import Chunks
from ..inputs import TENSORS, AttentionInputs
from ..reference_attention import Dropout
from .base import Backend


class Reference(Backend):
    name = "reference"
    traceable = True

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        return self.attend(inputs, None)

    def attend(self, inputs: AttentionInputs, chunk_bytes: Optional[int] = None) -> Tensor:
        """The same with scores of `chunk_bytes` at once (chunked_attention.chunks_of).

        torch.jit.trace records operators: of an autograd Function there are none.
        """
        if tracing_state() is not None:
            return differentiable.attend(inputs)
        seed = None
        if inputs.dropout_p:
            # Drawn on the CPU whatever the device: reading a CUDA generator would synchronise.
            seed = int(torch.empty((), dtype=torch.int64).random_(1 << 31))
        chunks = chunked_attention.chunks_of(inputs, chunk_bytes)
        out: Tensor = _Chunked.apply(inputs.static(), (seed, chunks), *inputs.tensors())
        return out


backend = Reference()


class _Chunked(Function):
    """Forward chunk by chunk; backward recomputes each chunk's weights, with the same dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        static: AttentionInputs,
        drawn: Tuple[Optional[int], Chunks],
        *tensors: Optional[Tensor],
    ) -> Tensor:
        inputs = static.with_tensors(tensors)
        ctx.static, ctx.drawn = static, drawn
        # Saved are the operands alone, as by every backend: a checkpoint's recomputation must save
        # as many tensors as its forward did, whichever backends compute them.
        ctx.save_for_backward(*tensors)
        seed, chunks = drawn
        ctx.state = chunked_attention.forward(inputs, chunks, _dropout(inputs, seed, chunks))
        B, M, H, _ = inputs.q.shape
        out = inputs.q.new_empty(B, M, H, inputs.v.shape[-1])
        return out.copy_(ctx.state.out.view(B, H, M, out.shape[-1]).transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tuple[Optional[Tensor], ...]:
        inputs = ctx.static.with_tensors(ctx.saved_tensors)
        _, _, *needs = ctx.needs_input_grad
        seed, chunks = ctx.drawn
        dropout = _dropout(inputs, seed, chunks)
        if differentiable.needed_in_backward(grad_out):
            again = functools.partial(reference_attention.attend, dropout=dropout)
            return (None, None, *differentiable.gradients(inputs, needs, grad_out, again))
        needed = [name for name, need in zip(TENSORS, needs) if need]
        found = chunked_attention.gradients(inputs, grad_out, needed, chunks, dropout, ctx.state)
        return (None, None, *map(found.get, TENSORS))


def _dropout(inputs: AttentionInputs, seed: Optional[int], chunks: Chunks) -> Optional[Dropout]:
    """Dropout from a generator that is seeded for each chunk."""
    if seed is None:
        return None
    p, device = inputs.dropout_p, inputs.q.device
    B, M, H, _ = inputs.q.shape
    N = inputs.k.shape[1]
    # Multiplied by scores: on the CPU a tensor of another dtype would be converted first.
    dtype = torch.bool if device.type == "cuda" else reference_attention.wide_dtype(inputs.q.dtype)
    runs = -(-N // chunks.keys)

    def kept(row: int, end_row: int, key: int, end_key: int) -> Tensor:
        found = []
        for m in range(row, end_row, chunks.rows):
            parts = []
            for n in range(key, end_key, chunks.keys):
                chunk = m // chunks.rows * runs + n // chunks.keys
                # Far from the seeds of other chunks of a call whose seed is near.
                chunk_seed = (seed + 0x9E3779B9 * (chunk + 1)) & 0x7FFFFFFF
                generator = torch.Generator(device).manual_seed(chunk_seed)
                size = B, H, min(chunks.rows, M - m), min(chunks.keys, N - n)
                part = torch.empty(size, dtype=dtype, device=device)
                parts.append(part.bernoulli_(1 - p, generator=generator))
            found.append(parts[0] if len(parts) == 1 else torch.cat(parts, -1))
        if not found:
            return torch.empty((B, H, M, N), dtype=dtype, device=device)
        return found[0] if len(found) == 1 else torch.cat(found, -2)

    return Dropout(kept, 1 / (1 - p) if p < 1 else 0.0)
