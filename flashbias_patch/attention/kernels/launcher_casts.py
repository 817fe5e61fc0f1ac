"""Launches of the kernels in casts.py, kept for tensors of the same signature.

A cast by PyTorch is a launch for each tensor, and the power of two by which float16 gradients are
divided takes six more. Small calls wait for these.
"""

from __future__ import annotations

import itertools
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import casts, tiles
from . import problem as pb
from .cached_call import Draft, Plan, signed
from .cached_launch import Kept, Launch, stream_of
from .problem import block_columns, cdiv, strides

AT_ONCE = 3  # tensors of one launch
ROWS = 64  # rows of one program
MOST_PEAKS = 256  # programs that look for the largest element
HALF = (torch.float16, torch.bfloat16)
# (name of the power, names of the tensors, and of what is made of these)
POWER, GIVEN, MADE = "power", ("x0", "x1", "x2"), ("y0", "y1", "y2")
_plans = Kept()  # by the signature of the tensors; False: such tensors are not cast here


def cast(
    tensors: Sequence[Tensor], dtype: torch.dtype, power: Optional[Tensor] = None
) -> Optional[Tuple[Tensor, ...]]:
    """Tensors (B, L, H, D) of one GPU in `dtype`, contiguous; times `power` (1,) float32 if there
    is one. Between float32 and half precision. None if no kernel takes them: more than AT_ONCE, an
    empty one, or one whose last stride is not 1."""
    first = tensors[0]
    stream = stream_of(first)
    if stream is None:
        return None
    given = tensors if power is None else (power, *tensors)
    signature, addresses = signed(given)
    key = signature, dtype, tiles.generation
    plan: Any = _plans.steps.get(key)
    if plan:
        planned: Tuple[Tensor, ...] = plan(addresses, stream)[:-1]
        return planned
    if plan is None and not _fits(tensors, dtype):
        plan = _plans.keep(key, False)
    if plan is False:
        return None
    launch = _cast(tensors, power is not None)
    made = tuple([pb.empty(t.shape, dtype=dtype, device=t.device) for t in tensors])
    launch(*_thrice(tensors, made), first if power is None else power)
    if launch.run is not None:
        names = GIVEN[: len(tensors)]
        draft = Draft(names if power is None else (POWER, *names), given)
        draft.q = names[0]
        for name, tensor in zip(MADE, tensors):
            draft.make(name, tensor.shape, dtype)
        results = MADE[: len(tensors)]
        draft.launch(launch, *_thrice(names, results), POWER)
        # With a last result that is None: of one name alone a plan gives no tuple.
        _plans.keep(key, Plan(draft, (*results, "nothing")))
    return made


def divided(grad: Tensor, dtype: torch.dtype) -> Optional[Tuple[Tensor, Tensor]]:
    """(grad / power in `dtype`, contiguous; power (1,) float32), the power as
    fp16_gradients.power_for has it, of grad (B, L, H, D) float32. None as for `cast`."""
    stream = stream_of(grad)
    if stream is None:
        return None
    signature, addresses = signed((grad,))
    key = POWER, signature, dtype, tiles.generation
    plan: Any = _plans.steps.get(key)
    if plan:
        planned: Tuple[Tensor, Tensor] = plan(addresses, stream)
        return planned
    if plan is None and not _fits((grad,), dtype):
        plan = _plans.keep(key, False)
    if plan is False:
        return None
    programs, find, divide = _division(grad)
    power = pb.empty((1,), dtype=torch.float32, device=grad.device)
    peaks = torch.empty((programs,), dtype=torch.int32, device=grad.device)
    out = pb.empty(grad.shape, dtype=dtype, device=grad.device)
    find(grad, peaks)
    divide(grad, out, peaks, power)
    if find.run is not None and divide.run is not None:
        draft = Draft(("grad",), (grad,))
        draft.make("out", grad.shape, dtype)
        draft.make(POWER, (1,), torch.float32)
        draft.make("peaks", (programs,), torch.int32)
        draft.launch(find, "grad", "peaks")
        draft.launch(divide, "grad", "out", "peaks", POWER)
        _plans.keep(key, Plan(draft, ("out", POWER)))
    return out, power


def _fits(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    sources = HALF if dtype is torch.float32 else (torch.float32,)
    return len(tensors) <= AT_ONCE and all(
        t.dtype in sources and t.ndim == 4 and t.stride(3) == 1 and t.numel() > 0 for t in tensors
    )


def _thrice(sources: Sequence[Any], made: Sequence[Any]) -> List[Any]:
    """(source, made) one after the other, AT_ONCE times; the first fill up."""
    pairs = [*itertools.chain.from_iterable(zip(sources, made))]
    return pairs + pairs[:2] * (AT_ONCE - len(sources))


def _cast(tensors: Sequence[Tensor], scaled: bool) -> Launch:
    first, *_ = tensors
    numbers: List[int] = []
    constants: Dict[str, Any] = {"SCALED": scaled, "ROWS": ROWS}
    counts = []
    for index, tensor in enumerate([*tensors, *[first] * (AT_ONCE - len(tensors))]):
        rows = _rows(tensor) if index < len(tensors) else 0
        counts.append(cdiv(rows, ROWS))
        numbers += _layout(tensor, rows)
        D = tensor.shape[3]
        constants.update({f"D{index}": D, f"BLOCK{index}": block_columns(D)})
    first1, first2, programs = itertools.accumulate(counts)
    return Launch(casts.cast_kernel, programs, (*numbers, first1, first2), constants)


def _division(grad: Tensor) -> Tuple[int, Launch, Launch]:
    """(programs that look for the largest element, their launch, the launch that divides)."""
    D, rows = grad.shape[3], _rows(grad)
    blocks = cdiv(rows, ROWS)
    programs = min(blocks, MOST_PEAKS)
    layout = _layout(grad, rows)
    options: Dict[str, Any] = {"D": D, "BLOCK_D": block_columns(D), "ROWS": ROWS}
    find = Launch(casts.peaks_kernel, programs, (*layout, blocks, programs), options)
    options = {**options, "BLOCK_PEAKS": block_columns(programs)}
    return programs, find, Launch(casts.divide_kernel, blocks, (*layout, programs), options)


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] * tensor.shape[1] * tensor.shape[2]


def _layout(tensor: Tensor, rows: int) -> Tuple[int, ...]:
    return (*strides(tensor), tensor.shape[1], tensor.shape[2], rows)
