"""The reference attention without all scores in memory: forward, and gradients by hand.

Scores are computed for chunks of (rows, keys) in buffers that every chunk uses again. Forward is an
online softmax; it keeps a maximum and a sum per row, from which the gradients compute each chunk's
weights once more.

What can be is folded into the matrix products as further columns, since every pass over a chunk
costs as much time as a product:

    query columns   q * scale | q_factor | segment weights | 1                  | -maximum
    key columns     k         | k_factor | 0 or 1          | 0, HIDDEN if padded | 1

The maximum has three columns, whose sum is exact even where products are rounded to TF32 or
bfloat16. Gradients of all operands are columns of two products: of the scores' gradient with the
key columns, and with the query columns. Where numbers are added to the scores (a dense bias,
windows, a floating padding mask), which may be as large as the dtype allows, all but q, k and the
factors is added chunk by chunk instead, in the order of reference_attention.scores.

Passes over a chunk besides the products (r: its numbers are read, w: written; those in brackets
with dropout): forward maximum r, subtract rw, exp rw, (sum r, draw w, drop rw); gradients exp rw,
multiply rrw, (draw w, drop rw, drop and subtract rw). A mask costs rw in both; a dense bias rrw,
and a subtraction rw in the gradients.
"""

from __future__ import annotations

import math
from typing import Any, Collection, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import grids
from .reference_attention import Dropout, heads_first, wide_dtype
from .values import bounded, relative_weights

# Bytes of scores held at once (float32, both buffers of the gradients together), at most.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
LEAST_BYTES = 32 << 20  # the least that CUDA gets, and all of it after memory ran out
FEW_KEYS = 256  # all queries go into one chunk if it has room for that many keys
HIDDEN = -1e30  # a score of weight 0; finite, because it is multiplied by 0 for other keys
# Operands that are added to the scores of their own places, and have no columns.
_TERMS = frozenset(("dense", "key_padding", "window_weights"))
_FULLY_MASKED = -1e29  # a row with this maximum or less has hidden keys only


class Chunks(NamedTuple):
    """Sizes of a chunk of scores."""

    rows: int
    keys: int

    def tiles(self, M: int, N: int) -> Iterator[Tuple[slice, List[slice]]]:
        """(rows, [keys, ...]) of the chunks of (M, N) scores."""
        columns = [slice(n, min(n + self.keys, N)) for n in range(0, N, self.keys)]
        for m in range(0, M, self.rows):
            yield slice(m, min(m + self.rows, M)), columns


class State(NamedTuple):
    """The state that forward keeps for the gradients, in at least float32.

    out (B*H, M, Dv); top (B*H, M, 1): the largest score of each row; inverse (B*H, M, 1): 1 / the
    sum of exp(score - top), 0 for a fully masked row.
    """

    out: Tensor
    top: Tensor
    inverse: Tensor


def chunks_of(inputs: Any, chunk_bytes: Optional[int] = None) -> Chunks:
    """Chunks whose scores take `chunk_bytes` in both buffers of the gradients together, and at
    least one score per batch and head.

    `chunk_bytes` is at most CHUNK_BYTES, which is also what None means; on CUDA None means no more
    than an eighth of the free memory either.
    """
    B, M, H, _ = inputs.q.shape
    N = max(1, inputs.k.shape[1])
    size = 8 if inputs.q.dtype is torch.float64 else 4
    device = inputs.q.device
    most = CHUNK_BYTES.get(device.type, LEAST_BYTES)
    if chunk_bytes is None:
        chunk_bytes = usual_bytes(device, most, 2 * size * B * H * M * N)
    chunk_bytes = min(chunk_bytes, most)
    room = max(1, chunk_bytes // (2 * size * max(1, B * H)))
    scores = M * N
    if scores <= room:
        return Chunks(max(1, M), N)
    if inputs.windows is not None or inputs.window_mask is not None:
        return Chunks(max(1, room // N), N)  # windows are written out for whole rows
    rows = M if room // M >= FEW_KEYS else max(1, min(M, math.isqrt(room)))
    keys = _even(N, room // rows)
    return Chunks(_even(M, room // keys), keys)


def _even(length: int, most: int) -> int:
    """The size of equal chunks of a length, at most `most`; of many, a multiple of 32."""
    most = max(1, min(length, most if most < 64 else most // 32 * 32))
    size = math.ceil(length / math.ceil(length / most))
    return min(most, -(-size // 32) * 32)


def usual_bytes(device: torch.device, most: int, wanted: int) -> int:
    """The bytes that a chunk may take where a call wants `wanted`: `most`, and on a GPU at most an
    eighth of its free memory, but LEAST_BYTES at least."""
    if device.type != "cuda" or wanted <= LEAST_BYTES or internals.stream_capturing():
        return most
    return max(LEAST_BYTES, min(most, internals.free_memory(device) // 8))


class Columns:
    """The operands of the matrix products, and the scores of a chunk."""

    def __init__(self, inputs: Any, state: Optional[State] = None) -> None:
        self.inputs = inputs
        q, k, v = inputs.q, inputs.k, inputs.v
        self.B, self.M, self.H, self.D = q.shape
        self.N, self.v_dim = k.shape[1], v.shape[-1]
        self.dtype = dtype = wide_dtype(q.dtype)
        padding, weights = inputs.key_padding, inputs.segment_weights
        float_padding = padding is not None and padding.dtype is not torch.bool
        # Whether no numbers are added chunk by chunk: scores are then ordinary numbers or HIDDEN.
        self.folded = inputs.dense is None and inputs.windows is None and not float_padding
        self.rank = 0 if inputs.q_factor is None else inputs.q_factor.shape[-1]
        self.segments = 0 if weights is None else weights.shape[-1]
        self.parts = 1 if dtype is torch.float64 else 3
        at_segments = self.D + self.rank
        at_padding = at_segments + self.segments
        self.used = at_padding  # columns whose gradients are wanted
        at_top = at_padding + (self.folded and padding is not None)
        width = at_top + self.parts * self.folded
        width += -width % 4  # rows of 16 bytes
        self.top = slice(at_top, at_top + self.parts)

        self.q = q.new_zeros((self.B, self.H, self.M, width), dtype=dtype)
        self.k = q.new_zeros((self.B, self.H, self.N, width), dtype=dtype)
        self.q[..., : self.D] = q.transpose(1, 2)
        self.q[..., : self.D] *= inputs.scale
        self.k[..., : self.D] = k.transpose(1, 2)
        if self.rank:
            self.q[..., self.D : at_segments] = inputs.q_factor.transpose(1, 2)
            self.k[..., self.D : at_segments] = inputs.k_factor.transpose(1, 2)
        self.weights: Optional[Tensor] = None
        if weights is not None:
            self.weights = relative_weights(heads_first(weights, dtype))
            lo = 0
            for place, length in enumerate(inputs.segment_lengths):
                self.k[..., lo : lo + length, at_segments + place] = 1
                lo += length
            if self.folded:
                self.q[..., at_segments:at_padding] = self.weights.clamp(min=HIDDEN)
        if self.folded:
            if padding is not None:
                # Zero, so that padded keys that are not finite do not reach the scores.
                self.k.masked_fill_(padding[:, None, :, None], 0)
                self.q[..., at_padding] = 1
                self.k[..., at_padding] = HIDDEN * padding[:, None].to(dtype)
            self.k[..., self.top] = 1
        self.v = q.new_ones((self.B, self.H, self.N, self.v_dim + self.parts), dtype=dtype)
        self.v[..., : self.v_dim] = v.transpose(1, 2)
        self.q, self.k, self.v = (t.flatten(0, 1) for t in (self.q, self.k, self.v))
        self.state = state
        if state is not None and self.folded:
            self.q[..., self.top] = _split(-state.top, self.parts)

    def split_heads(self, tensor: Tensor) -> Tensor:
        """(B*H, L, x) -> (B, H, L, x)."""
        return tensor.view(self.B, self.H, *tensor.shape[1:])

    def buffers(self, chunks: Chunks, count: int) -> List[Tensor]:
        rows, keys = min(chunks.rows, self.M), min(chunks.keys, self.N)
        return [self.q.new_empty(self.B * self.H * rows * keys) for _ in range(count)]

    def view(self, buffer: Tensor, rows: slice, keys: slice) -> Tensor:
        """(B*H, rows, keys) numbers of a buffer."""
        shape = self.B * self.H, rows.stop - rows.start, keys.stop - keys.start
        return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

    def scores(self, rows: slice, keys: slice, buffer: Tensor) -> Tensor:
        """The scores of a chunk, (B*H, rows, keys) in `buffer`; with a state, less the row's
        largest."""
        s = self.view(buffer, rows, keys)
        torch.bmm(self.q[:, rows], self.k[:, keys].transpose(1, 2), out=s)
        four, inputs = self.split_heads(s), self.inputs
        if not self.folded:
            self._add_terms(four, rows, keys)
        if inputs.window_mask is not None:
            window_mask = inputs.window_mask._replace(centres=inputs.window_mask.centres[:, rows])
            four.masked_fill_(grids.hidden(window_mask), -math.inf)
        if inputs.mask is not None:
            four.masked_fill_(_part(inputs.mask, rows, keys), -math.inf)
        padding = inputs.key_padding
        if padding is not None and not self.folded:
            padding = padding[:, None, None, keys]
            if padding.dtype is torch.bool:
                four.masked_fill_(padding, -math.inf)
            else:
                padding = padding.to(self.dtype)
                four.add_(padding if inputs.dense is None else bounded(padding))
        if self.state is not None and not self.folded:
            s.sub_(self.state.top[:, rows])
        return s

    def _add_terms(self, s: Tensor, rows: slice, keys: slice) -> None:
        inputs, padding = self.inputs, self.inputs.key_padding
        if self.weights is not None:
            lo = 0
            for place, length in enumerate(inputs.segment_lengths):
                first, end = max(lo, keys.start) - keys.start, min(lo + length, keys.stop)
                if first < end - keys.start:
                    s[..., first : end - keys.start].add_(
                        self.weights[..., rows, place : place + 1]
                    )
                lo += length
        if inputs.dense is not None:
            dense = _part(inputs.dense, rows, keys).to(self.dtype)
            if padding is not None and padding.dtype is not torch.bool:
                dense = bounded(dense)  # finfo.min twice would be -inf
            s.add_(dense)
        if inputs.windows is not None:
            s.add_(grids.dense_bias(_windows(inputs.windows, rows)))


def _part(term: Tensor, rows: slice, keys: slice) -> Tensor:
    """The part of a (B|1, H|1, M|1, N) term that belongs to a chunk."""
    return term[:, :, rows if term.shape[2] > 1 else slice(None), keys]


def _windows(windows: grids.WindowParts, rows: slice) -> grids.WindowParts:
    return windows._replace(weights=windows.weights[:, rows], centres=windows.centres[:, rows])


def _split(x: Tensor, parts: int) -> Tensor:
    """(..., 1) -> (..., parts): numbers that sum to x, of at most eight significant bits each."""
    if parts == 1:
        return x
    found = []
    for _ in range(parts - 1):
        found.append(x.to(torch.bfloat16).to(x.dtype))
        x = x - found[-1]
    return torch.cat([*found, x], -1)


@torch.no_grad()
def forward(inputs: Any, chunks: Chunks, dropout: Optional[Dropout] = None) -> State:
    """The output of a call, and the state that its gradients need."""
    with internals.autocast_off():
        return _forward(Columns(inputs), chunks, dropout)


def _forward(columns: Columns, chunks: Chunks, dropout: Optional[Dropout]) -> State:
    BH, M, Dv = columns.B * columns.H, columns.M, columns.v_dim
    sums = columns.q.new_zeros((BH, M, Dv + columns.parts))  # of exp(score) v, and of exp(score)
    top = columns.q.new_full((BH, M, 1), -math.inf)
    total = columns.q.new_zeros((BH, M, 1))  # of exp(score), where dropout changes the sums
    (buffer,) = columns.buffers(chunks, 1)
    for rows, runs in chunks.tiles(M, columns.N):
        part, largest = sums[:, rows], top[:, rows]
        for keys in runs:
            s = columns.scores(rows, keys, buffer)
            new = torch.maximum(largest, s.amax(-1, keepdim=True))
            safe = new.masked_fill(new == -math.inf, 0)
            s.sub_(safe).exp_()
            if keys.start:
                shrink = (largest - safe).exp_()
                part.mul_(shrink)
                total[:, rows].mul_(shrink)
            if dropout is not None:
                total[:, rows] += s.sum(-1, keepdim=True)
                columns.split_heads(s).mul_(dropout.of(rows, keys))
            part.baddbmm_(s, columns.v[:, keys])
            largest.copy_(new)
    if dropout is None:
        total = sums[..., Dv : Dv + 1]
    fully_masked = top <= (_FULLY_MASKED if columns.folded else -math.inf)
    inverse = total.reciprocal().masked_fill(fully_masked, 0)
    out = (sums[..., :Dv] * inverse).masked_fill_(fully_masked, 0)
    if dropout is not None:
        out.mul_(dropout.scale)
    return State(out, top.masked_fill_(fully_masked, 0), inverse)


@torch.no_grad()
def gradients(
    inputs: Any,
    grad_out: Tensor,
    needed: Collection[str],
    chunks: Chunks,
    dropout: Optional[Dropout] = None,
    state: Optional[State] = None,
) -> Dict[str, Tensor]:
    """The gradients of the operands named in `needed`, each in its operand's shape and dtype.

    Names are those of the fields of AttentionInputs, and "window_weights". `grad_out` is
    (B, M, H, Dv); `state` is what forward returned with the same dropout and, if there is any, the
    same chunks; None: forward is computed first.
    """
    with internals.autocast_off():
        if state is None:
            state = _forward(Columns(inputs), chunks, dropout)
        return _Gradients(Columns(inputs, state), grad_out, needed, dropout).compute(chunks)


class _Gradients:
    def __init__(
        self,
        columns: Columns,
        grad_out: Tensor,
        needed: Collection[str],
        dropout: Optional[Dropout],
    ) -> None:
        self.columns, self.needed, self.dropout = columns, needed, dropout
        self.of_queries = not {"q", "q_factor", "segment_weights"}.isdisjoint(needed)
        self.of_keys = not {"k", "k_factor"}.isdisjoint(needed)
        self.of_values = "v" in needed
        self.of_scores = bool(set(needed) - {"v"})
        state = columns.state
        assert state is not None
        grad = heads_first(grad_out, columns.dtype).flatten(0, 1)
        out, v = state.out, columns.v[..., : columns.v_dim]
        if dropout is None and columns.N:
            # A vector that is added to all values does not change the scores' gradient: relative to
            # their mean, the difference below cancels less.
            mean = v.mean(1, keepdim=True)
            out = out - mean
            v.sub_(mean)
        delta = (grad * out).sum(-1, keepdim=True) * state.inverse
        if dropout is None:
            self.grad = torch.cat([grad * state.inverse, _split(-delta, columns.parts)], -1)
        else:  # delta is subtracted after dropout
            self.grad = grad * (state.inverse * dropout.scale)
        self.minus_delta = -delta
        self.term_names = _TERMS.intersection(needed)
        self.terms = {name: self._start(name) for name in self.term_names}

    def compute(self, chunks: Chunks) -> Dict[str, Tensor]:
        columns, dropout = self.columns, self.dropout
        BH, M, N, Dv = columns.B * columns.H, columns.M, columns.N, columns.v_dim
        zeros, products = columns.q.new_zeros, columns.D + columns.rank
        dq = zeros((BH, M, columns.used) if self.of_queries else 0)
        dk = zeros((BH, N, products) if self.of_keys else 0)
        dv = zeros((BH, N, Dv) if self.of_values else 0)
        q, k = columns.q[..., :products], columns.k[..., : columns.used]
        v = columns.v if dropout is None else columns.v[..., :Dv]
        one, other = columns.buffers(chunks, 2)
        for rows, runs in chunks.tiles(M, N):
            grad = self.grad[:, rows]
            for keys in runs:
                p = columns.scores(rows, keys, one).exp_()  # as a multiple of 1 / the row's sum
                second = columns.view(other, rows, keys)
                kept = None if dropout is None else dropout.of(rows, keys)
                if self.of_values:
                    dropped = p
                    if kept is not None:
                        dropped = second
                        four = columns.split_heads
                        torch.mul(four(p), kept, out=four(second))
                    dv[:, keys].baddbmm_(dropped.transpose(1, 2), grad[..., :Dv])
                if not self.of_scores:
                    continue
                ds = torch.bmm(grad, v[:, keys].transpose(1, 2), out=second)
                if kept is not None:
                    self._drop(ds, kept, rows)
                ds.mul_(p)
                if self.of_queries:
                    dq[:, rows].baddbmm_(ds, k[:, keys])
                if self.of_keys:
                    dk[:, keys].baddbmm_(ds.transpose(1, 2), q[:, rows])
                for name in self.terms:
                    self._add_to(name, columns.split_heads(ds), rows, keys)
        return self._named(dq, dk, dv)

    def _drop(self, ds: Tensor, kept: Tensor, rows: slice) -> None:
        """ds = ds * kept - delta, in place."""
        four, minus_delta = self.columns.split_heads(ds), self.minus_delta[:, rows]
        if kept.dtype is ds.dtype:
            torch.addcmul(self.columns.split_heads(minus_delta), four, kept, out=four)
        else:
            four.mul_(kept)
            ds.add_(minus_delta)

    def _start(self, name: str) -> Tensor:
        """Zeros for the gradient of a term."""
        term = self._term(name)
        dtype = term.dtype if self._alone(term) else self.columns.dtype
        return torch.zeros(term.shape, dtype=dtype, device=term.device)

    def _term(self, name: str) -> Tensor:
        inputs = self.columns.inputs
        found: Tensor = (
            inputs.windows.weights if name == "window_weights" else getattr(inputs, name)
        )
        return found

    def _alone(self, term: Tensor) -> bool:
        """True if each number of a term belongs to one score."""
        columns = self.columns
        return term.shape == (columns.B, columns.H, columns.M, columns.N)

    def _add_to(self, name: str, ds: Tensor, rows: slice, keys: slice) -> None:
        """Add a chunk (B, H, rows, keys) of the scores' gradient to that of a term."""
        total = self.terms[name]
        if name == "dense":
            part = _part(total, rows, keys)
            part.add_(ds.sum_to_size(part.shape))
        elif name == "key_padding":
            total[:, keys].add_(ds.sum((1, 2)))
        else:
            part, lo = total[:, rows], 0
            windows = _windows(self.columns.inputs.windows, rows)
            for place, profile in enumerate(grids.profiles(windows)):
                found = ds[..., lo : lo + profile.shape[-1]] * profile[:, None].to(ds.dtype)
                part[..., place].add_(found.sum(-1).transpose(1, 2).sum_to_size(part.shape[:3]))
                lo += profile.shape[-1]

    def _named(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Dict[str, Tensor]:
        columns = self.columns
        D, segments = columns.D, columns.D + columns.rank
        found = {
            "q": (dq, slice(0, D)),
            "k": (dk, slice(0, D)),
            "v": (dv, slice(None)),
            "q_factor": (dq, slice(D, segments)),
            "k_factor": (dk, slice(D, segments)),
            "segment_weights": (dq, slice(segments, columns.used)),
        }
        made = {}
        for name in self.needed:
            operand = self._term(name)
            if name in self.terms:
                grad = self.terms[name]
            else:
                whole, part = found[name]
                grad = columns.split_heads(whole)[..., part].transpose(1, 2)
                if name == "q":
                    grad = grad * columns.inputs.scale
                grad = grad.sum_to_size(operand.shape)
            made[name] = grad.to(operand.dtype)
        return made
