"""Casts between the caller's dtype and the compute dtype: one launch for q, k and v where this
package's kernels can be used (kernels/launcher_casts.py), PyTorch's casts elsewhere.

Both give the same numbers. The results of each kernel are compared with PyTorch's when a GPU first
uses it.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from .. import telemetry
from . import triton_support
from .recovery import errors

WIDE = torch.float32
DEVICE_TYPES: Tuple[str, ...] = ("cuda",)  # tests add "cpu", where Triton interprets the kernels
_HALF = (torch.float16, torch.bfloat16)
dispatch_modes = internals.dispatch_modes  # benchmarks that count operators replace it
# kernels.launcher_casts by device; None where it is not used.
_kernels: Dict[torch.device, Any] = {}
_checked: Set[Any] = set()  # the kinds of casts, with their devices, that were compared


def narrow(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of one device in `dtype`, outside compiled graphs; contiguous where a kernel casts
    them."""
    if len(tensors) > 1 and dtype in _HALF:  # one cast is one launch by PyTorch too
        made = _by_kernel(tensors, dtype, None)
        if made is not None:
            return made
    return [t.to(dtype) for t in tensors]


class _Narrow(torch.autograd.Function):
    """`narrow` of float32 tensors that all require a gradient."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return tuple(narrow(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        return (None, *widened(grads, (WIDE,) * len(grads), None))


_narrow: Callable[..., Tuple[Tensor, ...]] = internals.apply_of(_Narrow)


def in_dtype(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """q, k and v in `dtype`, differentiable."""
    if dtype in _HALF and q.dtype is WIDE and q.device.type in DEVICE_TYPES:
        if not torch.is_grad_enabled() or not (
            q.requires_grad or k.requires_grad or v.requires_grad
        ):
            if not internals.is_compiling():
                return narrow((q, k, v), dtype)
        elif (
            q.requires_grad
            and k.requires_grad
            and v.requires_grad
            and not (internals.is_compiling() or internals.transformed())
        ):
            return _narrow(dtype, q, k, v)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def widened(
    grads: Sequence[Optional[Tensor]], dtypes: Sequence[torch.dtype], power: Optional[Tensor]
) -> List[Optional[Tensor]]:
    """Each gradient in its dtype of `dtypes`, times `power` (1,) float32 if there is one; None
    stays None."""
    done: List[Optional[Tensor]] = [*grads]
    places: List[int] = []
    for place, (grad, dtype) in enumerate(zip(grads, dtypes)):
        if grad is None:
            continue
        if dtype is WIDE and grad.dtype in _HALF:
            places.append(place)
        else:
            done[place] = _plain(grad, dtype, power)
    if places:
        half: List[Any] = [grads[place] for place in places]
        alone = power is None and len(half) == 1
        # A pass that is to be differentiated again needs PyTorch's operators.
        again = torch.is_grad_enabled() or internals.is_batch(half[0])
        made = None if alone or again else _by_kernel(half, WIDE, power)
        if made is None:
            made = [_plain(grad, WIDE, power) for grad in half]
        for place, wide in zip(places, made):
            done[place] = wide
    return done


def divided(grad: Tensor, power_for: Callable[[Tensor], Tensor]) -> Tuple[Tensor, Tensor]:
    """(grad / power in float16, power): the power is power_for(grad), as fp16_gradients has it."""
    kernels = None if internals.is_batch(grad) else _usable((grad,))
    if kernels is not None:
        try:
            kind = "divided", grad.device
            if kind in _checked or _can_check(grad):
                made = kernels.divided(grad, torch.float16)
                if made is not None:
                    if kind not in _checked:
                        _check(kind, made, _divided(grad, power_for))
                    out, power = made
                    return out, power
        except Exception as error:
            _give_up(grad.device, error)
    return _divided(grad, power_for)


def _divided(grad: Tensor, power_for: Callable[[Tensor], Tensor]) -> Tuple[Tensor, Tensor]:
    power = power_for(grad)
    return (grad / power).to(torch.float16), power


def _plain(tensor: Tensor, dtype: torch.dtype, power: Optional[Tensor]) -> Tensor:
    # power: of shape (1,), which makes float16 * float32 a float32.
    return (tensor if power is None else tensor * power).to(dtype)


def _by_kernel(
    tensors: Sequence[Tensor], dtype: torch.dtype, power: Optional[Tensor]
) -> Optional[Sequence[Tensor]]:
    """_plain of several tensors; None where no kernel casts them."""
    kernels = _usable(tensors)
    if kernels is None:
        return None
    device = tensors[0].device
    try:
        kind = dtype, power is None, device
        if kind in _checked or _can_check(tensors[0]):
            made: Optional[Sequence[Tensor]] = kernels.cast(tensors, dtype, power)
            if made is not None and kind not in _checked:
                _check(kind, made, [_plain(t, dtype, power) for t in tensors])
            return made
    except Exception as error:
        _give_up(device, error)
    return None


def _usable(tensors: Sequence[Tensor]) -> Any:
    """kernels.launcher_casts if it can be used on the device of these tensors now, else None."""
    device = tensors[0].device
    kernels = _kernels[device] if device in _kernels else _load(device)
    if (
        kernels is None
        or internals.current_transform() is not None
        or internals.forward_ad._current_level >= 0
        or internals.tracing_state() is not None
        or dispatch_modes()
        or True in map(Tensor.is_neg, tensors)  # a kernel reads memory
    ):
        return None  # whoever follows PyTorch's operators would miss a kernel's cast
    for tensor in tensors:
        if type(tensor) is not Tensor:
            return None
    return kernels


def _load(device: torch.device) -> Any:
    """kernels.launcher_casts if it can be used on that device, else None."""
    _kernels[device] = None
    on_gpu = device.type == "cuda"
    if (
        device.type in DEVICE_TYPES
        and not triton_support.missing()
        and not (on_gpu and triton_support.reasons_of_device(device))
    ):
        try:
            from .kernels import launcher_casts

            _kernels[device] = launcher_casts
        except Exception as error:  # a broken installation raises anything
            _give_up(device, error)
    return _kernels[device]


def _can_check(tensor: Tensor) -> bool:
    """False while a CUDA graph is captured, when nothing can be compared."""
    return not (tensor.is_cuda and internals.stream_capturing())


def _check(kind: Any, made: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Raise ArithmeticError unless a kernel gave what PyTorch gives; done once for each `kind` of
    cast."""
    for a, b in zip(made, plain):
        same = a.shape == b.shape and a.dtype is b.dtype
        if not same or not ((a == b) | (a != a) & (b != b)).all():
            raise ArithmeticError(f"a kernel gives other numbers than PyTorch: {kind}")
    _checked.add(kind)


def _give_up(device: torch.device, error: Exception) -> None:
    """PyTorch casts on that device from now on. Raises an error that a kernel does not explain."""
    if not errors.survivable(error) or errors.out_of_memory(error):
        raise error
    _kernels[device] = None
    telemetry.once(
        ("casts", device), "warning",
        "casts of q, k and v in one launch are not used on %s (%s); PyTorch casts them one by one",
        device, errors.first_line(error),
    )  # fmt: skip


def reset() -> None:
    """Compare and load the kernels anew (tests)."""
    _kernels.clear()
    _checked.clear()
