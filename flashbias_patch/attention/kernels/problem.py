"""One attention call in the form that the kernels take: its tensors, their strides, and the
properties that decide its launches.

Additive terms, all optional: factors (second dot product into the same accumulator), segments (one
constant per row for each run of keys), a dense bias, a boolean mask, key padding (boolean, or
floating and added).
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor

from .recompute import dropout_shift
from .tiles import Config, Key

if TYPE_CHECKING:
    from .window_tables import Windows

LOG2E = 1.4426950408889634
is_given: Callable[[Any], bool] = functools.partial(operator.is_not, None)
# Whether memory holds the negative of a tensor, as that of x.conj().imag does.
is_negated: Callable[[Any], bool] = Tensor.is_neg
COLUMNS = 16  # common.COLUMNS
COPIED = 1 << 26  # bytes of a mask or dense bias up to which it is copied to align its rows
# The least scale for folding: a folded lse is divided by the scale, and must not leave float16's
# range before scores do.
FOLDED_SCALE = 2.0**-4
empty = torch.empty  # tests replace it by one that fills the memory


class Strides(NamedTuple):
    """The strides of a problem's tensors, in the order of the kernels' arguments."""

    q: Tuple[int, ...]  # over batch, length and heads, as of k to weights
    k: Tuple[int, ...]
    v: Tuple[int, ...]
    q_factor: Tuple[int, ...]
    k_factor: Tuple[int, ...]
    weights: Tuple[int, ...]
    dense: Tuple[int, ...]  # over batch, heads and queries, as of the mask
    mask: Tuple[int, ...]
    padding: Tuple[int, ...]  # over batch

    def numbers(self, without: Sequence[str] = ()) -> List[int]:
        """All of them one after the other, except those of the fields `without`."""
        groups = zip(self._fields, self)
        return [number for name, group in groups if name not in without for number in group]


class Arch(NamedTuple):
    """A GPU: its compute capability as 10 * major + minor, and its multiprocessors."""

    capability: int
    processors: int


class BlockTable(NamedTuple):
    """The blocks of keys of a call: see block_table."""

    blocks: Tensor
    ends: Tensor


class Problem(NamedTuple):
    """One attention call, its tensors ready for the kernels: last stride 1, factors padded, q
    scaled if need be."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_factor: Optional[Tensor]
    k_factor: Optional[Tensor]
    weights: Optional[Tensor]
    lengths: Tuple[int, ...]
    dense: Optional[Tensor]
    mask: Optional[Tensor]
    padding: Optional[Tensor]
    dropout_p: float
    scale: float
    rank: int
    windows: Optional[Windows] = None
    out_dtype: Optional[torch.dtype] = None  # the output's; None: q's

    @property
    def sizes(self) -> Tuple[int, int, int, int, int]:
        B, M, H, D = self.q.shape
        return B, M, self.k.shape[1], H, D

    @property
    def scaled(self) -> bool:
        return scales_q(self.q_factor, self.scale)

    @property
    def score_scale(self) -> float:
        return LOG2E if self.scaled else LOG2E * self.scale

    @property
    def folded(self) -> bool:
        """True if backward's row constants, lse and delta, go into the products with the factors:
        see rows_kernel.

        Not with dropout, which comes between dp and delta, nor where lse is two numbers.
        """
        moderate = self.scaled or self.scale >= FOLDED_SCALE
        half = self.q.dtype != torch.float32
        return half and not self.dropout_p and not self.apart and has_room(self.rank) and moderate

    @property
    def apart(self) -> bool:
        """True if a row's largest score and log2 of its sum are kept apart: see keeps_apart."""
        local = self.windows is not None and self.windows.masked
        return keeps_apart(self.weights, self.dense, self.mask, self.padding, local)

    @property
    def lse_shape(self) -> Tuple[int, ...]:
        B, M, _, H, _ = self.sizes
        return (B * H, M, 2) if self.apart else (B * H, M)

    @property
    def segments(self) -> int:
        return 0 if self.weights is None else len(self.lengths)

    @property
    def whole(self) -> bool:
        """True if a loop over keys must not be cut: dropout counts in sixteens from each segment's
        first key."""
        return self.weights is not None and self.dropout_p > 0

    @property
    def factors(self) -> Tuple[Tensor, Tensor, Tensor]:
        """q_factor, k_factor, weights for a kernel, with q for those that are not there."""
        q, q_factor, k_factor, weights = self.q, self.q_factor, self.k_factor, self.weights
        return (
            q if q_factor is None else q_factor, q if k_factor is None else k_factor,
            q if weights is None else weights
        )  # fmt: skip

    @property
    def pairs(self) -> Tuple[Tensor, Tensor, Tensor]:
        """dense, mask, padding, likewise."""
        q, dense, mask, padding = self.q, self.dense, self.mask, self.padding
        return (
            q if dense is None else dense,
            q if mask is None else mask,
            q if padding is None else padding,
        )

    def strides(self) -> Strides:
        """The strides of its tensors, zeros for those that are not there."""
        q, k, v, q_factor, k_factor, weights = (
            (0, 0, 0) if tensor is None else strides(tensor)
            for tensor in (self.q, self.k, self.v, self.q_factor, self.k_factor, self.weights)
        )
        padding = self.padding
        over_batch = 0 if padding is None or padding.shape[0] == 1 else padding.stride(0)
        dense, mask = pair_strides(self.dense), pair_strides(self.mask)
        return Strides(q, k, v, q_factor, k_factor, weights, dense, mask, (over_batch,))

    def features(self, config: Config) -> Dict[str, Any]:
        """The constants and options that the three attention kernels are compiled with."""
        D = self.q.shape[-1]
        return dict(
            D=D,
            BLOCK_D=block_columns(D),
            BLOCK_R=0 if self.q_factor is None else self.q_factor.shape[-1],
            SEGMENTS=self.segments,
            HAS_DENSE=self.dense is not None,
            HAS_MASK=self.mask is not None,
            PAD_KIND=pad_kind(self.padding),
            APART=self.apart,
            DROPOUT=self.dropout_p > 0,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
            **(dict(maxnreg=config.registers) if config.registers else {}),
        )

    def key(self, kernel: str) -> Key:
        """The properties that decide the tile shape of that kernel."""
        others = self.dense, self.mask, self.padding
        rank = 0 if self.q_factor is None else self.q_factor.shape[-1]
        if self.windows is not None:
            kernel = f"{'mask' if self.windows.masked else 'window'} {kernel}"
        return key_of(kernel, self.q, rank, self.weights is not None, others, self.dropout_p)


def key_of(
    kernel: str,
    q: Tensor,
    rank: int,
    segments: bool,
    others: Sequence[Optional[Tensor]],
    dropout_p: float,
) -> Key:
    """Problem.key of a call's operands. `others`: the dense bias, mask and padding; `rank`: 0
    without factors."""
    dense, mask, padding = others
    pairs = dense is not None or mask is not None
    plain = not dropout_p and not pairs and padding is None
    block_r = block_columns(rank) if rank else 0
    half, arch = q.dtype != torch.float32, arch_of(q).capability
    return Key(kernel, arch, half, block_columns(q.shape[-1]), block_r, plain, segments, pairs)


def scales_q(q_factor: Optional[Tensor], scale: float) -> bool:
    """True if q is multiplied by the scale first: with factors, whose product is not scaled, and
    for a scale that is not positive, because the kernels take the maximum before they scale."""
    return q_factor is not None or scale <= 0


def keeps_apart(
    weights: Optional[Tensor], dense: Optional[Tensor], mask: Optional[Tensor],
    padding: Optional[Tensor],
    window_mask: bool = False,
) -> bool:  # fmt: skip
    """True if a row's largest score and log2 of its sum must be kept apart. All keys of a row may
    be at -1e9 or finfo.min ("masked" without -inf), beside which log2 of the sum would be lost by
    rounding.

    Segment weights alone are relative to the largest of a row, which some key has unless masks hide
    them all. Weights of windows are bounded (window_common.LIMIT).
    """
    adds = padding is not None and padding.is_floating_point()
    masked = mask is not None or padding is not None or window_mask
    return dense is not None or adds or weights is not None and masked


def has_room(rank: int) -> bool:
    """True if lse and delta, three columns each, fit into a tile of factors of that rank."""
    return rank + 6 <= COLUMNS


def block_columns(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv takes a microsecond."""
    return -(-a // b)


def in_memory(value: Any) -> Any:
    """`value`; a tensor so that memory holds its own values, which is what kernels read."""
    return value.resolve_neg() if isinstance(value, Tensor) else value


def unit_last(tensor: Tensor) -> Tensor:
    return (
        tensor
        if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 and tensor.is_contiguous()
        else tensor.contiguous()
    )


@functools.lru_cache(maxsize=256)
def _arch(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    return Arch(properties.major * 10 + properties.minor, properties.multi_processor_count)


_INTERPRETER = Arch(0, 1)


def arch_of(tensor: Tensor) -> Arch:
    """The tensor's GPU; for the interpreter a capability of 0 and one processor."""
    return _arch(tensor.device.index) if tensor.is_cuda else _INTERPRETER


def on_device(tensor: Tensor) -> ContextManager[Any]:
    """A context in which the tensor's GPU is the current one, on which Triton launches. Costs
    nothing if it is already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.device)


_NOTHING = contextlib.nullcontext()


def strides(tensor: Tensor) -> Tuple[int, int, int]:
    """Strides of (B, L, H, .), 0 along a batch or head dimension of size 1, which is shared."""
    b, length, h, _ = tensor.stride()
    return (b if tensor.shape[0] > 1 else 0), length, (h if tensor.shape[2] > 1 else 0)


def vector(*tensors: Tensor) -> int:
    """8 if the tensors' heads begin at multiples of 8 elements, else 1: see common.multiples."""
    return 8 if all(tensor.stride(2) % 8 == 0 for tensor in tensors) else 1


def pair_strides(tensor: Optional[Tensor]) -> Tuple[int, int, int]:
    """Strides over batch, heads and queries of a (B|1, H|1, M|1, N) tensor."""
    if tensor is None:
        return 0, 0, 0
    return tuple(tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in range(3))  # type: ignore[return-value]  # three of them


def as_bytes(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Booleans as uint8 (no copy), other dtypes as they are, last stride 1."""
    if tensor is None:
        return None
    tensor = unit_last(tensor)
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def aligned_rows(tensor: Tensor) -> Tensor:
    """`tensor` (B|1, H|1, M|1, N); if its rows do not begin at multiples of 16 elements and it is
    not larger than COPIED, a copy whose rows do.

    Triton compiles for strides that are multiples of 16. With others it reads a row element by
    element, which took longer than all the rest of a call.
    """
    size = tensor.element_size()
    aligned = tensor.shape[2] == 1 or tensor.stride(2) % 16 == 0 and tensor.data_ptr() % 16 == 0
    *rows, columns = [
        1 if stride == 0 else length for length, stride in zip(tensor.shape, tensor.stride())
    ]
    if aligned or math.prod(rows) * columns * size > COPIED:
        return tensor
    length = tensor.shape[3]
    copy = tensor.new_empty(*rows, cdiv(length, 16) * 16)[..., :length]
    return copy.copy_(tensor[tuple(map(slice, rows))]).expand(tensor.shape)


@functools.lru_cache(maxsize=256)
def block_table(lengths: Tuple[int, ...], block: int, device: torch.device) -> BlockTable:
    """Blocks of keys (count, 4) int32: first key, end, segment, the offset of its keys in dropout
    (common.dropout_shift); and the segments' ends (S + 1,) int32."""
    rows: List[Tuple[int, int, int, int]] = []
    ends, offset = [0], 0
    for segment, length in enumerate(lengths):
        shift = dropout_shift(offset, segment)
        for start in range(offset, offset + length, block):
            rows.append((start, min(start + block, offset + length), segment, shift))
        offset += length
        ends.append(offset)
    with torch.inference_mode(False):
        make = functools.partial(torch.tensor, dtype=torch.int32)
        return BlockTable(make(rows).to(device), make(ends).to(device))


def pad_kind(padding: Optional[Tensor]) -> int:
    return 0 if padding is None else 1 if padding.dtype == torch.uint8 else 2


def split_count(programs: int, blocks: int, processors: int, config: Config, least: int = 4) -> int:
    """The number of parts into which to cut a loop over `blocks` so that `programs` such loops fill
    the GPU; each part has at least `least` blocks."""
    room = processors * (3 if config.warps <= 4 else 2)
    if processors == 1 or programs * 4 > room * 3:
        return 1
    return max(1, min(room // max(programs, 1), blocks // least, 64))
