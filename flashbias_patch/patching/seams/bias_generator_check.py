"""The check of an AttentionBiasGenerator: its own forward, compared with windows.

A synthetic call of few queries runs through the module's own forward and through the description,
with several scales. Values and gradients are compared. Half of the floating indices have fractions:
a module that rounds them is described so, one that does anything else keeps its dense bias.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .window_description import ATTRIBUTES, NAMES, SCALE, SIZES, WHOLE, Recipe, Verdict, bias_of

QUERIES = 24  # of the synthetic call
LEAST_PERIOD = 50  # calls; a smaller number in its code is not the period of its debug prints
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def judge(wrapped: Callable[..., Any], module: Any, tensors: List[Tensor]) -> Verdict:
    """Compare `wrapped`, the forward of `module`, with windows; `tensors` are those of a call."""
    missing = [name for name in (*ATTRIBUTES, SCALE) if not hasattr(module, name)]
    if missing:
        return Verdict(reason=f"it has no {', '.join(missing)}")
    if not all(type(getattr(module, n)) is int and getattr(module, n) > 0 for n in SIZES):
        return Verdict(reason=f"expected positive ints as {', '.join(SIZES)}")
    synthetic = _synthetic(module, tensors)
    if any(
        tensor.shape[2:] != like.shape[2:] or tensor.dim() != like.dim()
        for tensor, like in zip(tensors, synthetic)
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        return Verdict(reason=f"its arguments have the shapes {shapes}")
    counter = None
    dtype: Optional[torch.dtype] = None
    # Scale clamped or not, fractions -> the first difference from such windows.
    differences: Dict[Tuple[bool, str], Optional[str]] = {
        (clamped, whole): None for whole in WHOLE for clamped in (True, False)
    }
    for value in _scales(module):
        with _with_scale(module, value) as scale, _state_kept(module) as changes:
            lidar_weights, camera_weights, *centres = synthetic
            leaves = [t.detach().requires_grad_() for t in (lidar_weights, camera_weights)]
            out = wrapped(**dict(zip(NAMES, (*leaves, *centres))))
            learned = [t for t in (*leaves, scale) if isinstance(t, Tensor) and t.requires_grad]
            grad = (
                torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
            )
            theirs = _run(out, learned, grad)
            dtype = out.dtype
            for (clamped, whole), difference in differences.items():
                if difference is None:
                    dense = bias_of(module, clamped, whole, *leaves, *centres).dense()[:, 0]
                    if dense.shape != out.shape:
                        return Verdict(reason=f"its bias has the shape {tuple(out.shape)}")
                    ours = _run(dense.to(dtype), learned, grad)
                    differences[clamped, whole] = _difference(ours, theirs, dtype)
        if changes.others:
            return Verdict(reason=f"it changes {', '.join(changes.others)}")
        counter = changes.counter
    fitting = [ways for ways, difference in differences.items() if difference is None]
    if not fitting:
        return Verdict(reason=next(iter(differences.values())))
    clamps, whole = fitting[0]
    assert dtype is not None
    periods = () if counter is None else _periods(module)
    if counter is not None and not periods:
        return Verdict(reason=f"it counts its calls in {counter}")
    return Verdict(Recipe(dtype, whole, clamps, counter, periods))


def _run(out: Tensor, learned: List[Tensor], grad: Tensor) -> List[Optional[Tensor]]:
    """Return the output and its gradients with respect to `learned`."""
    if not learned:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, learned, grad, allow_unused=True)]


def _difference(
    ours: List[Optional[Tensor]], theirs: List[Optional[Tensor]], dtype: torch.dtype
) -> Optional[str]:
    """Say how values (the first of each list) or gradients (the others) differ by more than the
    rounding of their dtypes; None if they do not."""
    for index, pair in enumerate(zip(ours, theirs)):
        tensors = [tensor for tensor in pair if tensor is not None]
        if not tensors:
            continue
        bound = max(TOLERANCE.get(each, 1e-5) for each in (dtype, *(t.dtype for t in tensors)))
        our, their = (
            torch.zeros((), device=tensors[0].device) if t is None else t.double() for t in pair
        )
        gap, size = float((our - their).abs().amax()), float(their.abs().amax())
        is_gradient = index > 0
        if not gap <= bound * (size + 1e-3) * (10 if is_gradient else 1):
            name = "gradients" if is_gradient else "values"
            return (
                f"its {name} are not those of windows (they differ by {gap:.2g} where the "
                f"largest is {size:.2g})"
            )
    return None


def _synthetic(module: Any, tensors: List[Tensor]) -> List[Tensor]:
    """Return the arguments of a call of few queries: cells all over the grids, edges included, and
    weights from -1 to 1."""
    *weights_like, bev_like, camera_like = tensors
    B, device = max(1, bev_like.shape[0]), bev_like.device
    draw = torch.Generator().manual_seed(0)

    def indices(size: int) -> Tensor:
        drawn = torch.randint(0, size, (B, QUERIES), generator=draw)
        drawn[:, 0], drawn[:, 1] = 0, size - 1
        return drawn.to(device)

    weights = [
        torch.empty(B, QUERIES).uniform_(-1, 1, generator=draw).to(t.device, t.dtype)
        for t in weights_like
    ]
    views_rows_columns = module.num_views, module.pers_h, module.pers_w
    camera = torch.stack([indices(size) for size in views_rows_columns], -1)
    bev = indices(module.bev_h) * module.bev_w + indices(module.bev_w)
    cells = torch.tensor(module.bev_h * module.bev_w, device=device)
    sizes = torch.tensor(views_rows_columns, device=device)
    return [*weights, _with_fractions(bev, cells, bev_like.dtype),
            _with_fractions(camera, sizes, camera_like.dtype)]  # fmt: skip


def _with_fractions(cells: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cells in that dtype; if it is floating, half of them lie a quarter or three of a
    cell further, without reaching a cell beyond the grid."""
    found = cells.to(dtype)
    if dtype.is_floating_point:
        found[:, 4::4] += 0.25
        found[:, 5::4] += torch.where(cells + 1 < sizes, 0.75, 0.25)[:, 5::4].to(dtype)
    return found


def _scales(module: Any) -> List[Optional[float]]:
    """Return the scales to try: its own (None), and if it is a tensor also some beyond both
    clamps."""
    if not isinstance(getattr(module, SCALE), Tensor):
        return [None]
    low, high = float(module.min_scale), float(module.max_scale)
    return [None, (low + high) / 2, low / 2, high * 1.5]


@contextlib.contextmanager
def _with_scale(module: Any, value: Optional[float]) -> Iterator[Any]:
    """Replace the module's scale, if it is a tensor, by one of that value (None: its own) in the
    block; yields what the module holds."""
    scale = getattr(module, SCALE)
    if not isinstance(scale, Tensor):
        yield scale
        return
    store = next(
        d for d in (module._parameters, module._buffers, module.__dict__) if d.get(SCALE) is scale
    )
    replacement: Tensor = scale.detach().clone() if value is None else torch.full_like(scale, value)
    if store is module._parameters:
        replacement = nn.Parameter(replacement, scale.requires_grad)
    store[SCALE] = replacement
    try:
        yield replacement
    finally:
        store[SCALE] = scale


class _Changes:
    """Changes that a forward makes to its module.

    Attributes:
        counter: the one attribute that grew by 1, if any: it counts the calls.
        others: names of all other attributes and buffers that changed.
    """

    def __init__(self) -> None:
        self.counter: Optional[str] = None
        self.others: Tuple[str, ...] = ()


@contextlib.contextmanager
def _state_kept(module: Any) -> Iterator[_Changes]:
    """Find the changes that a forward makes to its module in the block, and undo them."""
    own, of_class, changes = dict(module.__dict__), dict(vars(type(module))), _Changes()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    changed: List[str] = []
    try:
        yield changes
    finally:
        changed += [
            name
            for name, value in vars(type(module)).items()
            if value is not of_class.get(name, changes)
        ]
        for name, value in list(module.__dict__.items()):
            if name not in own:
                changed.append(name)
                del module.__dict__[name]
            elif value is not own[name]:
                counts = type(value) is int and type(own[name]) is int and value == own[name] + 1
                if counts and changes.counter in (None, name):
                    changes.counter = name
                else:
                    changed.append(name)
                module.__dict__[name] = own[name]
        for name, (buffer, original) in buffers.items():
            if not torch.equal(buffer, original):
                changed.append(name)
                buffer.copy_(original)
        changes.others = tuple(changed)


def _periods(module: Any) -> Tuple[int, ...]:
    """Return the numbers of calls after which the module may print: constants of its code, and
    attributes whose names mention an interval."""
    numbers: List[int] = []
    for base in type(module).__mro__:
        if base.__module__.startswith("torch."):
            break
        for value in vars(base).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            numbers += [
                constant for constant in getattr(code, "co_consts", ()) if type(constant) is int
            ]
    numbers += [
        value
        for name, value in module.__dict__.items()
        if type(value) is int
        and any(word in name for word in ("interval", "freq", "every", "period"))
    ]
    return tuple(sorted({number for number in numbers if number >= LEAST_PERIOD}))
