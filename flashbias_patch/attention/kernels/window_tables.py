"""The windows of a call in the form that the kernels take, and the tables made of their centres,
which are kept as long as the centres.

Queries are taken in an order in which neighbours have windows near each other: then the windows of
a block of queries touch few patches. Six layers and their backward passes share the tables of one
bias.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ...bias.grids import Grid, WindowMaskParts, WindowParts
from . import window_common as kernels
from . import window_patches
from .cached_launch import Kept, Launch, signature
from .problem import cdiv, unit_last
from .window_patches import MASK_SIDE, SIDE, FrameTables

try:
    from torch.multiprocessing.reductions import StorageWeakRef
except ImportError:  # nothing is kept
    StorageWeakRef = None  # type: ignore[assignment,misc]

ROOM = 8  # sets of tables that are kept
BLOCK = 128  # queries per program that makes tables
CHUNK = 64  # patches per program that makes tables
Key = Tuple[Any, ...]


class Windows(NamedTuple):
    """A bias (weights and centres), a mask (mask_centres), or both, on the same frames."""

    weights: Optional[Tensor]  # (B|1, M, H|1, S)
    centres: Optional[Tensor]  # (B|1, M, S, 3) int32
    mask_centres: Optional[Tensor]
    frames: Tuple[Grid, ...]
    sides: Tuple[int, ...]
    sigmas: Optional[Tuple[float, ...]]
    mask_sides: Tuple[int, ...]

    @property
    def mode(self) -> int:
        """0: no bias, 1: boxes, 2: Gaussians."""
        return 0 if self.weights is None else 1 if self.sigmas is None else 2

    @property
    def masked(self) -> bool:
        return self.mask_centres is not None

    @property
    def which(self) -> int:
        """Column of FRAMES (window_patches.tables) with the sides that decide which patches are
        touched."""
        return MASK_SIDE if self.masked else SIDE

    def signature(self) -> Tuple[Any, ...]:
        """The properties that launches depend on."""
        weights, centres, mask_centres, frames, sides, sigmas, mask_sides = self
        tensors = signature((weights, centres, mask_centres))
        return tensors, frames, sides, sigmas, mask_sides

    def frame_tables(self, lengths: Tuple[int, ...], device: torch.device) -> FrameTables:
        """The tables of its frames (window_patches.tables)."""
        return window_patches.tables(
            self.frames, self.sides, self.mask_sides, self.sigmas, lengths, device
        )

    @property
    def apiece(self) -> int:
        """1 where batch entries have tables of their own, else 0."""
        both = self.centres, self.mask_centres
        return int(any(centres is not None and centres.shape[0] > 1 for centres in both))


def make(
    weights: Optional[Tensor], centres: Optional[Tensor], mask_centres: Optional[Tensor],
    frames: Sequence[int],
    sides: Sequence[int] = (), sigmas: Sequence[float] = (), mask_sides: Sequence[int] = (),
) -> Windows:  # fmt: skip
    """Windows from the operator's arguments; torch leaves out the last of them if they are the
    schema's defaults. frames: rows, columns, views of each frame, one after the other."""
    grids = tuple(Grid(*frames[place : place + 3]) for place in range(0, len(frames), 3))
    none = (0,) * len(grids)
    return Windows(
        None if weights is None else unit_last(weights), _unit_ends(centres),
        _unit_ends(mask_centres), grids,
        tuple(sides) or none, tuple(sigmas) or None, tuple(mask_sides) or none,
    )  # fmt: skip


def arguments(
    windows: Optional[WindowParts], mask: Optional[WindowMaskParts]
) -> Tuple[
    Optional[Tensor], Optional[Tensor], Optional[Tensor], Tuple[int, ...], Tuple[int, ...],
    Tuple[float, ...],
    Tuple[int, ...],
]:  # fmt: skip
    """The operator's arguments."""
    frames = mask.frames if windows is None else windows.frames  # type: ignore[union-attr]
    numbers = tuple(
        number for frame in frames for number in (frame.rows, frame.columns, frame.views)
    )
    return (
        None if windows is None else windows.weights, None if windows is None else windows.centres,
        None if mask is None else mask.centres, numbers, () if windows is None else windows.sides,
        () if windows is None else windows.sigmas or (), () if mask is None else mask.sides,
    )  # fmt: skip


def parts(windows: Windows) -> Tuple[Optional[WindowParts], Optional[WindowMaskParts]]:
    """The bias and the mask as attention receives them."""
    weights, centres, mask_centres, frames, sides, sigmas, mask_sides = windows
    bias = mask = None
    if weights is not None and centres is not None:
        bias = WindowParts(weights, centres, frames, sides, sigmas)
    if mask_centres is not None:
        mask = WindowMaskParts(mask_centres, frames, mask_sides)
    return bias, mask


def _unit_ends(centres: Optional[Tensor]) -> Optional[Tensor]:
    if (
        centres is None
        or centres.stride(3) == 1
        and (centres.stride(2) == 3 or centres.shape[2] == 1)
    ):
        return centres
    return centres.contiguous()


class Lists(NamedTuple):
    """LIST, NUMBERS, COUNTS and FLAGS of lists_kernel: for each block of queries the patches that
    windows touch."""

    words: Tensor
    numbers: Tensor
    counts: Tensor
    flags: Tensor


class Tables:
    """The order of queries, the centres in it, and for each block size the patches that windows
    touch."""

    def __init__(self, windows: Windows, frames: Tensor, words: Tensor) -> None:
        first = windows.mask_centres if windows.masked else windows.centres
        assert first is not None
        self.M, self.S = first.shape[1:3]
        self.padded = cdiv(self.M, 256) * 256
        centres, mask_centres = windows.centres, windows.mask_centres
        self.batch = max(1, *[t.shape[0] for t in (centres, mask_centres) if t is not None])
        self.frames, self.words, self.compact = frames, words, windows.masked
        self.which = windows.which
        self.order = self._order(first)
        bias = None if centres is None else self._centres(centres, SIDE)
        mask = None if mask_centres is None else self._centres(mask_centres, MASK_SIDE)
        self.centres: Tensor = mask if bias is None else bias  # type: ignore[assignment]  # one of the two is a tensor
        self.mask_centres: Tensor = bias if mask is None else mask  # type: ignore[assignment]  # one of the two is a tensor
        self._lists: Dict[int, Lists] = {}
        self._blocks: Dict[int, Tuple[Tensor, Tensor]] = {}

    def _order(self, centres: Tensor) -> Tensor:
        """(batch, padded) int32, zeros from row M on."""
        own = centres.shape[0]
        codes = torch.empty((own, self.M), dtype=torch.int64, device=centres.device)
        options = dict(F=self.S, BLOCK=BLOCK)
        numbers = (self.M, *_strides(centres), self.which)
        _run(
            kernels.places_kernel,
            own * cdiv(self.M, BLOCK),
            numbers,
            options,
            centres,
            self.frames,
            codes,
        )
        order = torch.zeros((self.batch, self.padded), dtype=torch.int32, device=centres.device)
        order[:, : self.M] = torch.sort(codes, dim=1, stable=True).indices
        return order

    def _centres(self, centres: Tensor, which: int) -> Tensor:
        """(S, batch, padded, 2) float32: see centres_kernel."""
        placed = torch.empty(
            (self.S, self.batch, self.padded, 2), dtype=torch.float32, device=centres.device
        )
        numbers = (self.batch, self.M, self.padded, *_strides(centres), self.padded, which)
        programs = self.batch * self.padded // BLOCK
        options = dict(F=self.S, BLOCK=BLOCK)
        _run(
            kernels.centres_kernel,
            programs,
            numbers,
            options,
            centres,
            self.order,
            self.frames,
            placed,
        )
        return placed

    def lists(self, block: int) -> Lists:
        """The patches that windows touch, for blocks of that many queries."""
        found = self._lists.get(block)
        if found is None:
            count, device, P = cdiv(self.M, block), self.order.device, self.words.shape[0]
            # The kernels load ahead: two words, one row of flags.
            words = torch.zeros(self.batch * count * P + 4, dtype=torch.int64, device=device)
            numbers = torch.empty(
                self.batch * count * P if self.compact else 1, dtype=torch.int32, device=device
            )
            counts = torch.empty((self.batch, count, self.S), dtype=torch.int32, device=device)
            flags = torch.zeros((self.batch * count + 1, P), dtype=torch.uint8, device=device)
            _run(
                kernels.lists_kernel, self.batch * count * self.S, (self.batch, self.padded, count,
                P, self.which),
                dict(F=self.S, COMPACT=self.compact, BLOCK_M=block, CHUNK=CHUNK),
                self.mask_centres if self.compact else self.centres, self.frames, self.words,
                words, numbers, counts, flags,
            )  # fmt: skip
            found = self._lists[block] = Lists(words, numbers, counts, flags)
        return found

    def blocks(self, block: int) -> Tuple[Tensor, Tensor]:
        """BLOCKS and COUNTS of blocks_kernel, for blocks of that many queries."""
        found = self._blocks.get(block)
        if found is None:
            flags, P, count = self.lists(block).flags, self.words.shape[0], cdiv(self.M, block)
            ids = torch.zeros(self.batch * P * count + 1, dtype=torch.int32, device=flags.device)
            counts = torch.empty((self.batch, P), dtype=torch.int32, device=flags.device)
            programs = self.batch * cdiv(P, CHUNK)
            _run(kernels.blocks_kernel, programs, (P, count), dict(BLOCK=CHUNK), flags, ids, counts)
            found = self._blocks[block] = ids, counts
        return found


class KeptTables(NamedTuple):
    """Tables, and weak references to the memory of the centres that they were made of."""

    owners: Tuple[Any, ...]
    tables: Tables


_launches = Kept()
_kept: Dict[Key, KeptTables] = {}


def _run(
    kernel: Any, programs: int, numbers: Tuple[int, ...], options: Dict[str, int], *tensors: Tensor
) -> None:
    key = kernel.__name__, programs, numbers, tuple(options.values()), signature(tensors)
    launch = _launches.find(key) or _launches.keep(key, Launch(kernel, programs, numbers, options))
    launch(*tensors)


def _strides(centres: Tensor) -> Tuple[int, int]:
    return centres.stride(0) if centres.shape[0] > 1 else 0, centres.stride(1)


def tables_of(windows: Windows) -> Tables:
    """The tables of these windows: those of an earlier call, where the centres are the same numbers
    in the same place."""
    first = windows.mask_centres if windows.masked else windows.centres
    assert first is not None
    of_frames = windows.frame_tables((), first.device)
    places = _places(windows, first)
    if places is None:
        return Tables(windows, of_frames.frames, of_frames.words)
    key, owners = places
    found = _kept.get(key)
    if found is None or any(owner.expired() for owner in found.owners):
        for old, kept in list(_kept.items()):
            if any(owner.expired() for owner in kept.owners):
                _kept.pop(old, None)
        while len(_kept) >= ROOM:
            _kept.pop(next(iter(_kept)), None)
        tables = Tables(windows, of_frames.frames, of_frames.words)
        found = _kept[key] = KeptTables(owners, tables)
    return found.tables


def _places(windows: Windows, first: Tensor) -> Optional[Tuple[Key, Tuple[Any, ...]]]:
    """A key that identifies the centres, and weak references to their memory; None if their tables
    may not be kept."""
    stream = 0
    if first.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None  # a graph's tables are its own: they are made again with it
        stream = torch.cuda.current_stream(first.device).cuda_stream
    if StorageWeakRef is None:
        return None
    key: Key = (stream, windows.frames, windows.sides, windows.mask_sides)
    owners = []
    try:
        for centres in (windows.centres, windows.mask_centres):
            if centres is None:
                key += (None,)
                continue
            owner = StorageWeakRef(centres.untyped_storage())
            owners.append(owner)
            key += (
                owner.cdata,
                centres.storage_offset(),
                centres.shape,
                centres.stride(),
                centres._version,
            )
    except RuntimeError:  # made in inference mode: changes are not counted
        return None
    return key, tuple(owners)
