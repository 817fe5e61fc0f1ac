"""What is added to the attention scores, and the little algebra over it.

A bias is added to the *scaled* scores: softmax(q k^T * scale + bias). Shapes are (B, H, M, N) for
the bias and (B, M, H, R) / (B, N, H, R) for its factors, B batch, H heads, M queries, N keys, R
rank; a size of 1 in B or H means "the same for all", and stays so: nothing here expands a broadcast
dimension to save a line.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import grids
from .checks import as_four, check_device, check_floating, collapse_expanded, head_last
from .factors import (
    Factors,
    Segments,
    add_segments,
    concatenate,
    multiply_out,
    scaled_visible,
    total,
)

Shape = Tuple[int, int, int, int]


class BiasParts(NamedTuple):
    """What an attention backend consumes; the bias is the sum of the parts that are not None.

    q_factor (B|1, M, H|1, R) and k_factor (B|1, N, H|1, R) come together; segments is (weights
    (B|1, M, H|1, S), lengths); dense (B|1, H|1, M|1, N) is floating; mask (B|1, H|1, M|1, N) is
    bool, True = masked out; windows and window_mask: see grids.WindowParts and
    grids.WindowMaskParts.
    """

    q_factor: Optional[Tensor] = None
    k_factor: Optional[Tensor] = None
    segments: Optional[Segments] = None
    dense: Optional[Tensor] = None
    mask: Optional[Tensor] = None
    windows: Optional[grids.WindowParts] = None
    window_mask: Optional[grids.WindowMaskParts] = None


class AttentionBias:
    """A bias on attention scores; immutable, every operation returns a new one.

    Subclasses name the tensors they hold in `_fields` and define `shape`, and `factors()` or
    `parts()`.
    """

    _fields: Tuple[str, ...] = ()
    _sources: Tuple[
        Any, ...
    ] = ()  # the BiasTensors that it was read from, for gradients of the tensors themselves

    @property
    def shape(self) -> Shape:
        """(B|1, H|1, M, N); 1 = broadcast. M may be 1 for a broadcast row only in DenseBias and
        MaskBias."""
        raise NotImplementedError

    @property
    def rank(self) -> Optional[int]:
        """Columns of the factors, or None where there is no low-rank form."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """(q_factor (B|1, M, H|1, R), k_factor (B|1, N, H|1, R)): per batch and head, bias = q k^T.

        ValueError where `rank` is None.
        """
        raise ValueError(
            f"{type(self).__name__} has no low-rank form (rank is None): use dense() or parts(), "
            "or flashbias_patch.bias.factorize"
        )

    def dense(self) -> Tensor:
        """The bias as one tensor (B|1, H|1, M, N). Costs M*N memory: for tests and reference
        code."""
        q_factor, k_factor = self.factors()
        return multiply_out(q_factor, k_factor)

    def segments(self) -> Optional[Segments]:
        """(weights (B|1, M, H|1, S), lengths) where the bias is constant over runs of keys, else
        None."""
        return None

    def parts(self) -> BiasParts:
        """The cheapest exact form, for attention to consume."""
        q_factor, k_factor = self.factors()
        return BiasParts(q_factor=q_factor, k_factor=k_factor)

    def tensors(self) -> Tuple[Tensor, ...]:
        """The tensors held: where gradients arrive, and what moves with `to`."""
        held = (getattr(self, name) for name in self._fields)
        return tuple(value for value in held if isinstance(value, Tensor))

    def to(self, device: object = None, dtype: Optional[torch.dtype] = None) -> AttentionBias:
        """The same bias with its tensors on `device`, and the floating ones in `dtype`."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)  # type: ignore[call-overload]

        return self._map(move)

    def _map(self, function: Callable[[Tensor], Tensor]) -> AttentionBias:
        other = copy.copy(self)
        for name in self._fields:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(other, name, function(value))
        return other

    def _copy(self) -> AttentionBias:
        return copy.copy(self)

    def _terms(self) -> Tuple[AttentionBias, ...]:
        return (self,)

    def _merged(self, other: AttentionBias) -> Optional[AttentionBias]:
        """The sum of this and `other` as one bias of this kind, or None where there is none."""
        return None

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        """Times `factor`: a float, or a tensor that is 0-d or (H,)."""
        q_factor, k_factor = self.factors()
        return LowRankBias(q_factor * head_last(factor, 1), k_factor)

    def __add__(self, other: object) -> AttentionBias:
        if not isinstance(other, AttentionBias):
            return NotImplemented
        total = add_terms(self._terms() + other._terms())
        sources = self._sources + other._sources
        if sources:
            total = total._copy()
            total._sources = sources
        return total

    def __mul__(self, factor: object) -> AttentionBias:
        if isinstance(factor, bool) or not isinstance(factor, (int, float, Tensor)):
            return NotImplemented
        if isinstance(factor, Tensor):
            heads = self.shape[1]
            wanted = "H" if heads == 1 else heads
            if not factor.is_floating_point():
                raise TypeError(f"factor: expected a floating tensor, got {factor.dtype}")
            if factor.dim() > 1 or (
                factor.dim() == 1 and heads != 1 and factor.shape[0] not in (1, heads)
            ):
                raise ValueError(
                    f"factor: expected a scalar or one number a head, () or ({wanted},), "
                    f"to multiply a bias of shape (B, H, M, N) = {self.shape}; got "
                    f"{tuple(factor.shape)}"
                )
        return self._scaled(factor)

    __rmul__ = __mul__

    def __neg__(self) -> AttentionBias:
        return self * -1.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, rank={self.rank})"


class LowRankBias(AttentionBias):
    """bias[b, h, m, n] = sum_r q_factor[b, m, h, r] * k_factor[b, n, h, r]   (FlashBias, arXiv
    2505.12044).

    q_factor (B|1, M, H|1, R) and k_factor (B|1, N, H|1, R), floating, on one device. float32
    factors keep their digits when attention computes in half precision; half factors are used as
    they are.
    """

    _fields = ("q_factor", "k_factor")

    def __init__(self, q_factor: Tensor, k_factor: Tensor) -> None:
        for name, factor, rows in (("q_factor", q_factor, "M"), ("k_factor", k_factor, "N")):
            check_floating(name, factor)
            if factor.dim() != 4:
                raise ValueError(
                    f"{name}: expected shape (B|1, {rows}, H|1, R), got {tuple(factor.shape)}"
                )
        got = f"got {tuple(q_factor.shape)} and {tuple(k_factor.shape)}"
        if q_factor.shape[3] != k_factor.shape[3] or q_factor.shape[3] == 0:
            raise ValueError(
                f"q_factor and k_factor: expected the same number of columns R >= 1, {got}"
            )
        for dim, word in ((0, "batch"), (2, "heads")):
            sizes = (q_factor.shape[dim], k_factor.shape[dim])
            if sizes[0] != sizes[1] and 1 not in sizes:
                raise ValueError(
                    f"q_factor and k_factor: sizes of dimension {dim} ({word}) must be equal or "
                    f"1, {got}"
                )
        check_device("q_factor", q_factor, "k_factor", k_factor)
        self.q_factor = q_factor
        self.k_factor = k_factor

    @property
    def shape(self) -> Shape:
        batch, queries, heads, _ = self.q_factor.shape
        key_batch, keys, key_heads, _ = self.k_factor.shape
        return (
            key_batch if batch == 1 else batch,
            key_heads if heads == 1 else heads,
            queries,
            keys,
        )

    @property
    def rank(self) -> int:
        return self.q_factor.shape[3]

    def factors(self) -> Factors:
        return self.q_factor, self.k_factor


class DenseBias(AttentionBias):
    """A bias given entry by entry: (M, N), (B, M, N), (B*H, M, N) with `num_heads`, or (B|1, H|1,
    M|1, N).

    A 3-D tensor is (B*H, M, N), heads fastest, if `num_heads` is given (the layout of
    nn.MultiheadAttention's attn_mask), else (B, M, N). Entries may be -inf: masked out. A batch or
    head dimension that is only expanded (stride 0) is kept as broadcast, so `shape` may show a 1
    there.
    """

    _fields = ("tensor",)

    def __init__(self, tensor: Tensor, num_heads: Optional[int] = None) -> None:
        check_floating("tensor", tensor, "; a boolean mask goes into MaskBias or attn_mask")
        self.tensor = collapse_expanded(as_four(tensor, num_heads))

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)  # type: ignore[return-value]

    @property
    def rank(self) -> None:
        return None

    def dense(self) -> Tensor:
        return self.tensor

    def parts(self) -> BiasParts:
        return BiasParts(dense=self.tensor)

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return DenseBias(scaled_visible(self.tensor, head_last(factor, 2)))

    def split_mask(self) -> Tuple[DenseBias, MaskBias]:
        """The finite entries (0 where masked) and the -inf entries as a mask; no host
        synchronisation."""
        masked = torch.isneginf(self.tensor)
        return DenseBias(self.tensor.masked_fill(masked, 0.0)), MaskBias(masked)


class MaskBias(AttentionBias):
    """Pairs that must not attend: mask bool, True = masked out (-inf), in any shape DenseBias
    takes.

    Multiplying it changes nothing: a pair stays forbidden, and no 0 * inf reaches a gradient.
    """

    _fields = ("mask",)

    def __init__(self, mask: Tensor, num_heads: Optional[int] = None) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a bool tensor, True = masked out, got {got}")
        self.mask = collapse_expanded(as_four(mask, num_heads, "mask"))

    @property
    def shape(self) -> Shape:
        return tuple(self.mask.shape)  # type: ignore[return-value]

    @property
    def rank(self) -> None:
        return None

    def dense(self) -> Tensor:
        zeros = torch.zeros(self.mask.shape, device=self.mask.device)
        return zeros.masked_fill(self.mask, float("-inf"))

    def parts(self) -> BiasParts:
        return BiasParts(mask=self.mask)

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return self


class SumBias(AttentionBias):
    """The sum of biases that do not merge into one form: low rank, segments, dense and mask side by
    side."""

    def __init__(self, terms: Sequence[AttentionBias]) -> None:
        flat = [part for term in terms for part in term._terms()]
        if not flat:
            raise ValueError("terms: expected at least one AttentionBias, got none")
        self._shape = broadcast_shapes(flat)
        self.terms = tuple(flat)

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def rank(self) -> Optional[int]:
        ranks = [term.rank for term in self.terms]
        return None if any(rank is None for rank in ranks) else sum(ranks)  # type: ignore[arg-type]

    def factors(self) -> Factors:
        if self.rank is None:
            return super().factors()
        return concatenate([term.factors() for term in self.terms])

    def dense(self) -> Tensor:
        total = self.terms[0].dense()
        for term in self.terms[1:]:
            total = total + term.dense()
        return total

    def parts(self) -> BiasParts:
        low: List[Factors] = []
        segments, dense, mask, windows, window_mask = None, None, None, None, None
        for term in self.terms:
            part = term.parts()
            if part.q_factor is not None and part.k_factor is not None:
                low.append((part.q_factor, part.k_factor))
            if part.segments is not None:
                if segments is None:
                    segments = part.segments
                else:  # a backend takes one set of segments
                    segments = add_segments(segments, part.segments)
            more, hidden = part.dense, part.mask
            if (
                part.windows is not None
            ):  # a backend takes one of each: further ones go as what they are, entry by entry
                windows, rest = grids.added(windows, part.windows)
                more = more if rest is None else rest if more is None else more + rest
            if part.window_mask is not None:
                window_mask, rest = grids.both(window_mask, part.window_mask)
                hidden = hidden if rest is None else rest if hidden is None else hidden | rest
            if more is not None:
                dense = more if dense is None else dense + more
            if hidden is not None:
                mask = hidden if mask is None else mask | hidden
        q_factor, k_factor = concatenate(low) if low else (None, None)
        return BiasParts(q_factor, k_factor, segments, dense, mask, windows, window_mask)

    def tensors(self) -> Tuple[Tensor, ...]:
        return tuple(tensor for term in self.terms for tensor in term.tensors())

    def _map(self, function: Callable[[Tensor], Tensor]) -> AttentionBias:
        return SumBias([term._map(function) for term in self.terms])

    def _terms(self) -> Tuple[AttentionBias, ...]:
        return self.terms

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return SumBias([term._scaled(factor) for term in self.terms])


def add_terms(terms: Sequence[AttentionBias]) -> AttentionBias:
    """One bias from several: ranks concatenate, dense ones and masks merge, unlike kinds stay
    apart."""
    broadcast_shapes(terms)
    low = [term for term in terms if term.rank is not None and term.segments() is None]
    segmented = [term for term in terms if term.segments() is not None]
    dense = [term for term in terms if isinstance(term, DenseBias)]
    masks = [term for term in terms if isinstance(term, MaskBias)]
    known = {id(term) for term in (*low, *segmented, *dense, *masks)}
    others = [term for term in terms if id(term) not in known]
    merged: List[AttentionBias] = []
    if len(low) == 1:
        merged += low
    elif low:
        merged.append(LowRankBias(*concatenate([term.factors() for term in low])))
    merged += segmented
    if dense:
        merged.append(DenseBias(total([term.tensor for term in dense])))
    if masks:
        mask = masks[0].mask
        for term in masks[1:]:
            mask = mask | term.mask
        merged.append(MaskBias(mask))
    return _simplest(merged + _merge_alike(others))


def _merge_alike(terms: Sequence[AttentionBias]) -> List[AttentionBias]:
    merged: List[AttentionBias] = []
    for term in terms:
        for place, other in enumerate(merged):
            both = other._merged(term)
            if both is not None:
                merged[place] = both
                break
        else:
            merged.append(term)
    return merged


def _simplest(terms: Sequence[AttentionBias]) -> AttentionBias:
    return terms[0] if len(terms) == 1 else SumBias(terms)


def broadcast_shapes(biases: Sequence[AttentionBias]) -> Shape:
    """The common (B|1, H|1, M, N). ValueError names both shapes where they do not fit."""
    shape = biases[0].shape
    for bias in biases[1:]:
        sizes = []
        for mine, theirs, word in zip(shape, bias.shape, ("batch", "heads", "queries", "keys")):
            if mine != theirs and (word == "keys" or 1 not in (mine, theirs)):
                raise ValueError(
                    f"biases of shape (B, H, M, N) = {shape} and {bias.shape} cannot be added: "
                    f"{word} {mine} and {theirs}"
                )
            sizes.append(theirs if mine == 1 else mine)
        shape = tuple(sizes)  # type: ignore[assignment]
    return shape
