"""Biases that are low-rank by construction; only dense() creates a tensor of size M*N."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .base import AttentionBias, BiasParts, Shape
from .checks import check_device, check_floating, check_lengths, head_last, is_number
from .factors import Factors, Segments, scaled_visible


class ModalityBias(AttentionBias):
    """bias[b, h, m, j] = weights[b, m, h, s] for a key j of segment s: one weight per query and
    segment.

    weights (B|1, M, S), or (B|1, M, H|1, S), floating; segments the S lengths in key order (lidar
    BEV tokens, then the cameras), which sum to N. The rank is S: q_factor holds the weights,
    k_factor the indicators of the segments. This is an exact decomposition as in FlashBias (arXiv
    2505.12044).

    Raises:
        TypeError, ValueError: weights or segments do not fit; the message names the argument.
    """

    _fields = ("weights",)

    def __init__(self, weights: Tensor, segments: Sequence[int]) -> None:
        check_floating("weights", weights)
        self.lengths = check_lengths("segments", segments)
        if weights.dim() not in (3, 4) or weights.shape[-1] != len(self.lengths):
            raise ValueError(
                f"weights: expected (B|1, M, S) or (B|1, M, H|1, S) with S = {len(self.lengths)} "
                "segments, "
                f"got {tuple(weights.shape)}"
            )
        self.weights = weights if weights.dim() == 4 else weights.unsqueeze(2)

    @property
    def shape(self) -> Shape:
        batch, queries, heads, _ = self.weights.shape
        return batch, heads, queries, sum(self.lengths)

    @property
    def rank(self) -> int:
        return len(self.lengths)

    def factors(self) -> Factors:
        return self.weights, indicators(self.lengths, self.weights)

    def dense(self) -> Tensor:
        columns = self.weights.permute(0, 2, 1, 3).split(1, dim=-1)
        runs = [column.expand(-1, -1, -1, length) for column, length in zip(columns, self.lengths)]
        return torch.cat(runs, dim=-1)

    def segments(self) -> Segments:
        return self.weights, self.lengths

    def parts(self) -> BiasParts:
        return BiasParts(segments=self.segments())

    def _scaled(self, factor: Union[float, Tensor]) -> AttentionBias:
        return ModalityBias(scaled_visible(self.weights, head_last(factor, 1)), self.lengths)


class SquaredDistanceBias(AttentionBias):
    """bias[b, h, i, j] = -scale[h] * |query_xy[b, i] - key_xy[b, j]|^2.

    Expanded, -s|x - y|^2 = -s|x|^2 + 2s x.y - s|y|^2 has rank 4 in the plane (the spatial distance
    of FlashBias, arXiv 2505.12044). Coordinates are first centred on the keys. This
    does not change distances, but makes the cancelling terms small, which keeps precision in half
    precision: after `split_factors` the error of a score is at most 2**-20 (float16) or 2**-14
    (bfloat16) of s|x|^2 + s|y|^2.

    query_xy (B|1, M, 2), key_xy (B|1, N, 2), floating, in one unit (metres); half precision is
    cast to float32. scale: a float, a 0-d tensor or one number per head (H,), in 1/unit^2; learned
    if it requires grad.

    Per segment: with `segments`, the S lengths in key order, query_xy is (B|1, M, S, 2), the
    query's coordinates in each segment's own frame (the BEV grid, each camera's image), and key_xy
    holds each key's coordinates in its segment's frame. Rank 4S. `valid` (B|1, M, S) bool: False
    where the query does not appear in that segment; its bias to the keys there is 0 and its
    coordinates are not read, NaN included.
    If frames have different units, multiply the coordinates of each frame by the square root of
    its own scale.

    drop_query_term=True omits -s|x|^2, a constant per query, which softmax ignores: rank 3. Then
    factors() and dense() both return the bias without that constant: -s|y|^2 + 2s x.y in
    coordinates relative to the centre of the keys. It is an error with more than one segment or
    with `valid`, because the term then differs between keys.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    _fields = ("query_xy", "key_xy", "scale", "valid")

    def __init__(
        self,
        query_xy: Tensor,
        key_xy: Tensor,
        scale: Union[float, Tensor] = 1.0,
        segments: Optional[Sequence[int]] = None,
        valid: Optional[Tensor] = None,
        drop_query_term: bool = False,
    ) -> None:
        check_floating("query_xy", query_xy)
        check_floating("key_xy", key_xy)
        check_device("query_xy", query_xy, "key_xy", key_xy)
        if key_xy.dim() != 3 or key_xy.shape[-1] != 2:
            raise ValueError(f"key_xy: expected (B|1, N, 2), got {tuple(key_xy.shape)}")
        self.lengths = (
            (key_xy.shape[1],)
            if segments is None
            else check_lengths("segments", segments, key_xy.shape[1])
        )
        if query_xy.dim() == 3:
            query_xy = query_xy.unsqueeze(2)
        if query_xy.dim() != 4 or query_xy.shape[2:] != (len(self.lengths), 2):
            raise ValueError(
                f"query_xy: expected (B|1, M, 2), or (B|1, M, S, 2) with S = {len(self.lengths)} "
                "segments, "
                f"got {tuple(query_xy.shape)}"
            )
        if 1 not in (query_xy.shape[0], key_xy.shape[0]) and query_xy.shape[0] != key_xy.shape[0]:
            raise ValueError(
                "query_xy and key_xy: batch sizes must be equal or 1, "
                f"got {tuple(query_xy.shape)} and {tuple(key_xy.shape)}"
            )
        if valid is not None:
            _check_valid(valid, query_xy)
        if drop_query_term and (len(self.lengths) > 1 or valid is not None):
            raise ValueError(
                "drop_query_term: the per-query term differs between segments, and changes the "
                "softmax; use "
                "drop_query_term=False with several segments or with valid"
            )
        self.scale = _check_scale(scale)
        self.query_xy, self.key_xy, self.valid = query_xy, key_xy, valid
        self.drop_query_term = drop_query_term

    @property
    def shape(self) -> Shape:
        batch = max(self.query_xy.shape[0], self.key_xy.shape[0])
        heads = self.scale.numel() if isinstance(self.scale, Tensor) else 1
        return batch, heads, self.query_xy.shape[1], self.key_xy.shape[1]

    @property
    def rank(self) -> int:
        return (3 if self.drop_query_term else 4) * len(self.lengths)

    def factors(self) -> Factors:
        q_columns, k_columns = [], []
        scale = head_last(self.scale, 1)
        start = 0
        for index, length in enumerate(self.lengths):
            x, y, valid = self._frame(index, start, length)
            terms = [2 * scale * x.unsqueeze(2), -scale * torch.ones_like(x[..., :1]).unsqueeze(2)]
            partners = [y, (y * y).sum(-1, keepdim=True)]
            if not self.drop_query_term:
                terms.append(-scale * (x * x).sum(-1, keepdim=True).unsqueeze(2))
                partners.append(torch.ones_like(y[..., :1]))
            columns = torch.cat(terms, dim=-1)
            if valid is not None:
                columns = columns * valid[..., None, None]
            around = (0, 0, start, self.key_xy.shape[1] - start - length)
            q_columns.append(columns)
            k_columns.append(
                torch.nn.functional.pad(torch.cat(partners, dim=-1), around).unsqueeze(2)
            )
            start += length
        return torch.cat(q_columns, dim=-1), torch.cat(k_columns, dim=-1)

    def dense(self) -> Tensor:
        runs = []
        scale = head_last(self.scale, 2)
        start = 0
        for index, length in enumerate(self.lengths):
            x, y, valid = self._frame(index, start, length)
            squares = (x.unsqueeze(2) - y.unsqueeze(1)).pow(2).sum(-1)
            if self.drop_query_term:
                squares = squares - (x * x).sum(-1, keepdim=True)
            scores = -scale * squares.unsqueeze(1)
            runs.append(scores if valid is None else scores * valid[:, None, :, None])
            start += length
        return torch.cat(runs, dim=-1)

    def _frame(
        self, index: int, start: int, length: int
    ) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        """Return centred coordinates (B|1, M, 2) and (B|1, length, 2), and a factor (B|1, M): 0
        where not valid."""
        common = torch.promote_types(self.query_xy.dtype, self.key_xy.dtype)
        dtype = torch.promote_types(common, torch.float32)
        x, y = self.query_xy[:, :, index].to(dtype), self.key_xy.narrow(1, start, length).to(dtype)
        valid = None
        if self.valid is not None:
            visible = self.valid[..., index]
            x = torch.where(visible[..., None], x, torch.zeros_like(x[:1, :1]))
            valid = visible.to(dtype)
        if length:
            with torch.no_grad():
                centre = (y.amax(1, keepdim=True) + y.amin(1, keepdim=True)) / 2
            x, y = x - centre, y - centre
        return x, y, valid


class AlibiBias(AttentionBias):
    """bias[h, i, j] = slopes[h] * (j - (i + offset)): attention with linear biases (ALiBi, arXiv
    2108.12409).

    slopes (H,) floating tensor, positive to favour near keys in the past, as in the paper; learned
    if it requires grad. This is the linear, signed form of rank 2. Under a causal mask it equals
    -slope * distance of the paper; the symmetric form |i - j| is not low-rank. Query i has key
    position i + offset. offset defaults to N - M, which aligns the last query with the last key, as
    in flash-attn and in decoding with a cache; 0 aligns the first ones. ALiBi has no meaning for
    queries that are not positions, such as object queries over image keys.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    _fields = ("slopes",)

    def __init__(
        self, slopes: Tensor, queries: int, keys: int, offset: Optional[int] = None
    ) -> None:
        check_floating("slopes", slopes)
        if slopes.dim() != 1 or not slopes.numel():
            raise ValueError(
                f"slopes: expected one slope per head, shape (H,), got {tuple(slopes.shape)}"
            )
        self.queries, self.keys = check_lengths("queries and keys", (queries, keys))
        self.slopes = slopes
        self.offset = keys - queries if offset is None else offset

    @property
    def shape(self) -> Shape:
        return 1, self.slopes.shape[0], self.queries, self.keys

    @property
    def rank(self) -> int:
        return 2

    def _positions(self) -> Tuple[Tensor, Tensor, Tensor]:
        """Return slopes, and positions of queries and keys relative to the middle key, in float32
        or float64."""
        slopes = self.slopes.to(torch.promote_types(self.slopes.dtype, torch.float32))
        middle = (self.keys - 1) / 2
        i = torch.arange(self.queries, device=slopes.device).to(slopes.dtype) + (
            self.offset - middle
        )
        j = torch.arange(self.keys, device=slopes.device).to(slopes.dtype) - middle
        return slopes, i, j

    def factors(self) -> Factors:
        slopes, i, j = self._positions()
        at_query = torch.stack([-i, torch.ones_like(i)], dim=-1)[None, :, None]
        at_key = torch.stack([torch.ones_like(j), j], dim=-1)[None, :, None]
        return at_query * slopes[:, None], at_key

    def dense(self) -> Tensor:
        slopes, i, j = self._positions()
        return (slopes[:, None, None] * (j - i[:, None]))[None]


def indicators(lengths: Sequence[int], like: Tensor) -> Tensor:
    """Return (1, N, 1, S): 1 where key n is in segment s; dtype and device of `like`."""
    columns = like.new_zeros(sum(lengths), len(lengths))
    start = 0
    for segment, length in enumerate(lengths):
        columns[start : start + length, segment] = 1
        start += length
    return columns[None, :, None]


def _check_scale(scale: Union[float, Tensor]) -> Union[float, Tensor]:
    if isinstance(scale, Tensor):
        check_floating("scale", scale)
        if scale.dim() > 1:
            raise ValueError(
                f"scale: expected a float, a 0-d tensor or (H,), got {tuple(scale.shape)}"
            )
        return scale
    if not is_number(scale):
        raise TypeError(f"scale: expected a float or a floating tensor, got {type(scale).__name__}")
    return float(scale)


def _check_valid(valid: Tensor, query_xy: Tensor) -> None:
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = getattr(valid, "dtype", type(valid).__name__)
        raise TypeError(f"valid: expected a bool tensor, got {got}")
    batch, queries, segments, _ = query_xy.shape
    if (
        valid.dim() != 3
        or valid.shape[1:] != (queries, segments)
        or valid.shape[0] not in (1, batch)
    ):
        raise ValueError(
            f"valid: expected (B|1, M, S) = ({batch}|1, {queries}, {segments}), got "
            f"{tuple(valid.shape)}"
        )
