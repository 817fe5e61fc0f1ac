"""Define the biases that are added to attention scores, and their sums and products.

A bias is added to the *scaled* scores: softmax(q k^T * scale + bias). The bias has shape
(B, H, M, N), its factors (B, M, H, R) and (B, N, H, R): B batch, H heads, M queries, N keys, R
rank. A size of 1 in B or H means that the bias is the same for all samples or heads. Such a
dimension is never expanded here.
"""

from __future__ import annotations

import copy
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import grids
from .checks import as_four, check_device, check_floating, collapse_expanded, head_last, is_number
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
    """The input of an attention backend: the bias is the sum of the parts that are not None.

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

    Subclasses list the names of their tensors in `_fields` and define `shape`, and `factors()` or
    `parts()`.
    """

    _fields: Tuple[str, ...] = ()
    # the BiasTensors that it was read from, for gradients with respect to these tensors
    _sources: Tuple[Any, ...] = ()

    @property
    def shape(self) -> Shape:
        """Shape (B|1, H|1, M, N); 1 = broadcast. M may be 1 (the same for all queries) only in
        DenseBias and MaskBias."""
        raise NotImplementedError

    @property
    def rank(self) -> Optional[int]:
        """Number of columns of the factors, or None if there is no low-rank form."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """Return q_factor (B|1, M, H|1, R) and k_factor (B|1, N, H|1, R).

        Per batch entry and head, bias = q_factor k_factor^T.

        Raises:
            ValueError: `rank` is None.
        """
        raise ValueError(
            f"{type(self).__name__} has no low-rank form (rank is None): use dense() or parts(), "
            "or flashbias_patch.bias.factorize"
        )

    def dense(self) -> Tensor:
        """Return the bias as one tensor (B|1, H|1, M, N), for tests and reference code."""
        q_factor, k_factor = self.factors()
        return multiply_out(q_factor, k_factor)

    def segments(self) -> Optional[Segments]:
        """Return (weights (B|1, M, H|1, S), lengths) if the bias is constant in each of S segments
        of keys, else None."""
        return None

    def parts(self) -> BiasParts:
        """Return the cheapest exact form, for an attention backend."""
        q_factor, k_factor = self.factors()
        return BiasParts(q_factor=q_factor, k_factor=k_factor)

    def tensors(self) -> Tuple[Tensor, ...]:
        """Return the tensors of the bias, which get gradients and are moved by `to`."""
        held = (getattr(self, name) for name in self._fields)
        return tuple(value for value in held if isinstance(value, Tensor))

    def to(self, device: object = None, dtype: Optional[torch.dtype] = None) -> AttentionBias:
        """Return the same bias with its tensors on `device`, and floating tensors in `dtype`.

        Raises:
            TypeError: `dtype` is not floating.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating dtype, got {dtype}")

        def move(tensor: Tensor) -> Tensor:
            own = dtype if tensor.is_floating_point() else None
            moved: Tensor = tensor.to(device=device, dtype=own)  # type: ignore[call-overload]
            return moved

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
        """Return the sum with `other` as one bias of this class, or None if there is none."""
        return None

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        """Return the bias times `factor`: a float, or a tensor, 0-d or (H,)."""
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
        if is_number(factor):
            return self._scaled(float(factor))
        if not isinstance(factor, Tensor):
            return NotImplemented
        heads = self.shape[1]
        expected_heads = "H" if heads == 1 else heads
        if not factor.is_floating_point():
            raise TypeError(f"factor: expected a floating tensor, got {factor.dtype}")
        if factor.dim() > 1 or (
            factor.dim() == 1 and heads != 1 and factor.shape[0] not in (1, heads)
        ):
            raise ValueError(
                f"factor: expected a scalar or one number per head, () or ({expected_heads},), "
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
    factors keep their precision when attention computes in half precision (see split_factors);
    factors in half precision are used unchanged.

    Raises:
        TypeError: a factor is not a floating tensor.
        ValueError: shapes or devices do not fit each other.
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
        for dim, dimension in ((0, "batch"), (2, "heads")):
            q_size, k_size = q_factor.shape[dim], k_factor.shape[dim]
            if q_size != k_size and 1 not in (q_size, k_size):
                raise ValueError(
                    f"q_factor and k_factor: sizes of dimension {dim} ({dimension}) must be "
                    f"equal or 1, {got}"
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

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        scaled = LowRankBias.__new__(LowRankBias)  # its factors fit each other, as these do
        scaled.q_factor = self.q_factor * head_last(factor, 1)
        scaled.k_factor = self.k_factor
        return scaled


class DenseBias(AttentionBias):
    """A bias with one number per query and key, in a floating tensor.

    Its shape is (M, N), (B, M, N), (B*H, M, N) with `num_heads`, or (B|1, H|1, M|1, N). A 3-D
    tensor is (B*H, M, N), heads fastest, if `num_heads` is given (the layout of
    nn.MultiheadAttention's attn_mask), else (B, M, N). Entries may be -inf: masked out. A batch or
    head dimension that is expanded (stride 0) becomes a broadcast dimension of size 1.

    Raises:
        TypeError: the tensor is not floating.
        ValueError: the shape is none of these.
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
        """Return the finite entries (0 where masked), and the -inf entries as a mask.

        There is no synchronisation with the device.
        """
        masked = torch.isneginf(self.tensor)
        return DenseBias(self.tensor.masked_fill(masked, 0.0)), MaskBias(masked)


class MaskBias(AttentionBias):
    """A boolean mask, True = masked out (-inf), in any shape that DenseBias accepts.

    Multiplication does not change it: masked pairs stay masked, and gradients never contain 0 *
    inf.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shape does not fit.
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
    """The sum of biases of several kinds: low rank, segments, dense, windows and masks."""

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
        factor_pairs: List[Factors] = []
        segments, dense, mask, windows, window_mask = None, None, None, None, None
        for term in self.terms:
            part = term.parts()
            if part.q_factor is not None and part.k_factor is not None:
                factor_pairs.append((part.q_factor, part.k_factor))
            if part.segments is not None:
                if segments is None:
                    segments = part.segments
                else:  # a backend takes one set of segments
                    segments = add_segments(segments, part.segments)
            dense_part, mask_part = part.dense, part.mask
            # A backend takes one set of windows and one window mask: others are added densely.
            if part.windows is not None:
                windows, rest = grids.added(windows, part.windows)
                if rest is not None:
                    dense_part = rest if dense_part is None else dense_part + rest
            if part.window_mask is not None:
                window_mask, rest = grids.both(window_mask, part.window_mask)
                if rest is not None:
                    mask_part = rest if mask_part is None else mask_part | rest
            if dense_part is not None:
                dense = dense_part if dense is None else dense + dense_part
            if mask_part is not None:
                mask = mask_part if mask is None else mask | mask_part
        q_factor, k_factor = concatenate(factor_pairs) if factor_pairs else (None, None)
        return BiasParts(q_factor, k_factor, segments, dense, mask, windows, window_mask)

    def tensors(self) -> Tuple[Tensor, ...]:
        return tuple(tensor for term in self.terms for tensor in term.tensors())

    def _map(self, function: Callable[[Tensor], Tensor]) -> AttentionBias:
        other = SumBias([term._map(function) for term in self.terms])
        other._sources = self._sources
        return other

    def _terms(self) -> Tuple[AttentionBias, ...]:
        return self.terms

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return SumBias([term._scaled(factor) for term in self.terms])


def add_terms(terms: Sequence[AttentionBias]) -> AttentionBias:
    """Add biases: factors are concatenated, dense biases and masks are merged; the rest is a
    SumBias.

    Raises:
        ValueError: the shapes do not broadcast.
    """
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
        for index, other in enumerate(merged):
            merged_term = other._merged(term)
            if merged_term is not None:
                merged[index] = merged_term
                break
        else:
            merged.append(term)
    return merged


def _simplest(terms: Sequence[AttentionBias]) -> AttentionBias:
    return terms[0] if len(terms) == 1 else SumBias(terms)


def broadcast_shapes(biases: Sequence[AttentionBias]) -> Shape:
    """Return the common shape (B|1, H|1, M, N); ValueError names two shapes that do not fit."""
    shape = biases[0].shape
    for bias in biases[1:]:
        sizes = []
        for size, other_size, dimension in zip(
            shape, bias.shape, ("batch", "heads", "queries", "keys")
        ):
            if size != other_size and (dimension == "keys" or 1 not in (size, other_size)):
                raise ValueError(
                    f"biases of shape (B, H, M, N) = {shape} and {bias.shape} cannot be added: "
                    f"{dimension} {size} and {other_size}"
                )
            sizes.append(other_size if size == 1 else size)
        shape = tuple(sizes)  # type: ignore[assignment]
    return shape
