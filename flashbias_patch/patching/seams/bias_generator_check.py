"""The check of an AttentionBiasGenerator: values and gradients of its own forward, compared."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, Callable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .window_description import ATTRIBUTES, NAMES, SCALE, Recipe, Verdict, bias_of

QUERIES = 24  # of the synthetic call
LEAST_PERIOD = 50  # of calls, from which on a number in its code may be that of its debug prints
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def judge(wrapped: Callable[..., Any], module: Any, tensors: List[Tensor]) -> Verdict:
    missing = [name for name in (*ATTRIBUTES, SCALE) if not hasattr(module, name)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if not all(type(getattr(module, n)) is int and getattr(module, n) > 0 for n in ATTRIBUTES[:6]):
        return f"expected positive ints as {', '.join(ATTRIBUTES[:6])}"
    given = _synthetic(module, tensors)
    if any(
        tensor.shape[2:] != like.shape[2:] or tensor.dim() != like.dim()
        for tensor, like in zip(tensors, given)
    ):
        return (
            "its arguments have the shapes "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)}"
        )
    counter = None
    dtype: Optional[torch.dtype] = None
    wrong = {True: "", False: ""}
    for value in _scales(module):
        with _with_scale(module, value) as scale, _state_kept(module) as changes:
            leaves = [tensor.detach().requires_grad_() for tensor in given[:2]]
            out = wrapped(**dict(zip(NAMES, (*leaves, *given[2:]))))
            learned = [t for t in (*leaves, scale) if isinstance(t, Tensor) and t.requires_grad]
            grad = (
                torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
            )
            theirs = _run(out, learned, grad)
            dtype = out.dtype
            for clamped in (True, False):
                if not wrong[clamped]:
                    bias = bias_of(module, clamped, *leaves, *given[2:])
                    if bias.dense()[:, 0].shape != out.shape:
                        return f"its bias has the shape {tuple(out.shape)}"
                    ours = _run(bias.dense()[:, 0].to(dtype), learned, grad)
                    wrong[clamped] = _difference(ours, theirs, dtype)
        if changes.others:
            return f"it changes {', '.join(changes.others)}"
        counter = changes.counter
    if wrong[True] and wrong[False]:
        return wrong[True]
    assert dtype is not None
    periods = () if counter is None else _periods(module)
    if counter is not None and not periods:
        return f"it counts its calls in {counter}"
    return Recipe(dtype, not wrong[True], counter, periods)


def _run(out: Tensor, learned: List[Tensor], grad: Tensor) -> List[Optional[Tensor]]:
    if not learned:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, learned, grad, allow_unused=True)]


def _difference(
    ours: List[Optional[Tensor]], theirs: List[Optional[Tensor]], dtype: torch.dtype
) -> str:
    """How values and gradients differ by more than the roundings of their dtypes; "" if they do
    not."""
    for place, (mine, true) in enumerate(zip(ours, theirs)):
        if mine is None and true is None:
            continue
        given = [tensor for tensor in (mine, true) if tensor is not None]
        bound = max(
            TOLERANCE.get(each, 1e-5) for each in (dtype, *(tensor.dtype for tensor in given))
        )
        wide = [
            torch.zeros((), device=given[0].device) if t is None else t.double()
            for t in (mine, true)
        ]
        gap, size = float((wide[0] - wide[1]).abs().amax()), float(wide[1].abs().amax())
        if not gap <= bound * (size + 1e-3) * (10 if place else 1):
            name = "gradients" if place else "values"
            return (
                f"its {name} are not those of windows (they differ by {gap:.2g} where the "
                f"largest is {size:.2g})"
            )
    return ""


def _synthetic(module: Any, tensors: List[Tensor]) -> List[Tensor]:
    """A call of few queries: places all over the grids, their edges among them, weights from -1 to
    1."""
    B, device = tensors[0].shape[0], tensors[0].device
    draw = torch.Generator().manual_seed(0)

    def places(size: int) -> Tensor:
        drawn = torch.randint(0, size, (B, QUERIES), generator=draw)
        drawn[:, 0], drawn[:, 1] = 0, size - 1
        return drawn.to(device)

    weights = [
        torch.empty(B, QUERIES).uniform_(-1, 1, generator=draw).to(t.device, t.dtype)
        for t in tensors[:2]
    ]
    camera = torch.stack(
        [places(module.num_views), places(module.pers_h), places(module.pers_w)], -1
    )
    bev = places(module.bev_h) * module.bev_w + places(module.bev_w)
    return [*weights, bev.to(tensors[2].dtype), camera.to(tensors[3].dtype)]


def _scales(module: Any) -> List[Optional[float]]:
    """Scales to try: its own (None), and where it is a tensor some beyond both clamps."""
    if not isinstance(getattr(module, SCALE), Tensor):
        return [None]
    low, high = float(module.min_scale), float(module.max_scale)
    return [None, (low + high) / 2, low / 2, high * 1.5]


@contextlib.contextmanager
def _with_scale(module: Any, value: Optional[float]) -> Iterator[Any]:
    """The module's scale, or a stand-in of that value for it, which is what is in its place
    meanwhile."""
    scale = getattr(module, SCALE)
    if not isinstance(scale, Tensor):
        yield scale
        return
    store = next(
        d for d in (module._parameters, module._buffers, module.__dict__) if d.get(SCALE) is scale
    )
    stand_in: Tensor = scale.detach().clone() if value is None else torch.full_like(scale, value)
    if store is module._parameters:
        stand_in = nn.Parameter(stand_in, scale.requires_grad)
    store[SCALE] = stand_in
    try:
        yield stand_in
    finally:
        store[SCALE] = scale


class _Changes:
    counter: Optional[str] = None
    others: Tuple[str, ...] = ()


@contextlib.contextmanager
def _state_kept(module: Any) -> Iterator[_Changes]:
    """What a forward changes in its module is found, and put back."""
    before, found = (dict(module.__dict__), dict(vars(type(module)))), _Changes()
    buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    changed: List[str] = []
    try:
        yield found
    finally:
        own, of_class = before
        changed += [
            name
            for name, value in vars(type(module)).items()
            if value is not of_class.get(name, found)
        ]
        for name, value in list(module.__dict__.items()):
            if name not in own:
                changed.append(name)
                del module.__dict__[name]
            elif value is not own[name]:
                counts = type(value) is int and type(own[name]) is int and value == own[name] + 1
                if counts and found.counter in (None, name):
                    found.counter = name
                else:
                    changed.append(name)
                module.__dict__[name] = own[name]
        for name, (buffer, kept) in buffers.items():
            if not torch.equal(buffer, kept):
                changed.append(name)
                buffer.copy_(kept)
        found.others = tuple(changed)


def _periods(module: Any) -> Tuple[int, ...]:
    """Numbers of calls after which the module may print: those in its code and in its attributes of
    such a name."""
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
