"""float16 attention inside code of a wider dtype, without losing its gradients.

Gradients of a loss that nobody scales are often below 6e-5, where float16 loses digits, or below
6e-8, where it has none (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2).
So the gradient that arrives is divided by a power of two, which leaves its largest element between
4 and 8, before it becomes float16, and the gradients that leave are multiplied by it again once
they are wide: an attention's gradients are linear in the one that arrives. Larger would risk
infinities where many queries share a key, smaller the products with weights of 1/N that backward
rounds to float16 inside. Nothing waits for the GPU.

The power travels from `widened` to `narrowed` as the gradient of a tensor that does nothing else. A
graph that is to be differentiated again (create_graph) gets plain casts: what a second pass adds to
the gradients would not be divided by it.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from . import casts

POWER = torch.float32  # whatever torch's default dtype is
EXPONENT = 0x7F800000  # the bits of a float32's exponent: without the others it is a power of two
ONE = 1 << 23  # added to the bits, it doubles the number
LARGEST = 126.0  # exponents of powers between -126 and this are normal, and have an inverse


def wanted(source: torch.dtype, dtype: torch.dtype) -> bool:
    """True if gradients must be scaled for a cast from `source` to `dtype`. bfloat16 has float32's
    range."""
    return dtype is torch.float16 and source is not torch.float16


class _Narrowed(internals.Function):
    """`count` tensors in float16 and the others as they are, then the tensor whose gradient is the
    power."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> Any:
        narrow = [tensor.to(torch.float16) for tensor in tensors[:count]]
        same = [tensor.view_as(tensor) for tensor in tensors[count:]]
        return (
            *narrow,
            *same,
            torch.empty(1, dtype=POWER, device=tensors[0].device),
        )  # its gradient is read

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        _, *tensors = inputs
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        # power: of shape (1,), which makes float16 * float32 a float32; None in a second pass.
        *own, power = grads
        return (None, *(
            None if grad is None else (grad if power is None else grad * power).to(dtype)
            for grad, dtype in zip(own, ctx.dtypes)
        ))  # fmt: skip


class _Widened(internals.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, power: Tensor, dtype: torch.dtype) -> Tensor:
        return out.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:
        ctx.plain = False

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        ctx.plain |= torch.is_grad_enabled()
        if ctx.plain:
            return grad.to(torch.float16), torch.ones(1, dtype=POWER, device=grad.device), None
        power = power_for(grad)
        return (grad / power).to(torch.float16), power, None


def _with_context(cls: Any) -> Any:
    """A Function for torch before 2.0, whose forward takes ctx."""

    def forward(ctx: Any, *inputs: Any) -> Any:
        output = cls.forward(*inputs)
        cls.setup_context(ctx, inputs, output)
        return output

    return type(cls.__name__, (torch.autograd.Function,), {
        "forward": staticmethod(forward), "backward": staticmethod(cls.backward)
    })  # fmt: skip


if not internals.SETUP_CONTEXT:
    _Narrowed, _Widened = _with_context(_Narrowed), _with_context(_Widened)  # type: ignore[misc]


class _NarrowedInEager(torch.autograd.Function):
    """_Narrowed outside compiled graphs, by as few launches as there can be (casts.py)."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Any:
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        same = [tensor.view_as(tensor) for tensor in tensors[count:]]
        narrow = casts.narrow(tensors[:count], torch.float16)
        return (*narrow, *same, torch.empty(1, dtype=POWER, device=tensors[0].device))

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        *own, power = grads  # power: None in a second pass
        return (None, *casts.widened(own, ctx.dtypes, power))


class _WidenedInEager(torch.autograd.Function):
    """_Widened outside compiled graphs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, power: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.plain = False
        return out.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        if ctx.plain or torch.is_grad_enabled():
            narrow, power, _ = _Widened.backward(ctx, grad)
        else:
            batch = internals.is_batch(grad)
            narrow, power = casts.divided(grad, power_for_batch if batch else power_for)
        return narrow, power, None


_apply_narrowed, _apply_widened = map(internals.apply_of, (_NarrowedInEager, _WidenedInEager))


def power_for(grad: Tensor) -> Tensor:
    """(1,) float32: the power of two by which the largest element of `grad` divided is between 4
    and 8."""
    exponent = (_peak(grad).view(torch.int32) & EXPONENT) - 2 * ONE
    return exponent.clamp_min(ONE).view(torch.float32)


def power_for_batch(grad: Tensor) -> Tensor:
    """power_for of each gradient of a batch (is_grads_batched), whose bits cannot be read."""
    exponent = torch.nan_to_num(_peak(grad).log2().floor() - 2, nan=LARGEST, posinf=LARGEST)
    return torch.exp2(exponent.clamp_min(-LARGEST))


def _peak(grad: Tensor) -> Tensor:
    """(1,) float32: the largest magnitude in `grad`; of an empty one 4, whose power is 1."""
    if not grad.numel():
        return torch.full((1,), 4.0, dtype=POWER, device=grad.device)
    peak: Tensor = torch.linalg.vector_norm(grad, float("inf")).float().view(1)
    return peak


def _plain(tensors: Sequence[Any], dtype: torch.dtype) -> List[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


def narrowed(
    narrow: Sequence[Tensor], others: Sequence[Optional[Tensor]]
) -> Tuple[List[Tensor], List[Optional[Tensor]], Optional[Tensor]]:
    """(`narrow` in float16, `others` as they are, the power that `widened` needs). `others` are the
    remaining tensors that may have a gradient.

    Inside transforms of torch.func, plain casts: not every transform takes an autograd.Function.
    """
    traced = internals.is_compiling()
    if not torch.is_grad_enabled():
        cast = _plain if traced else casts.narrow
        return [*cast(narrow, torch.float16)], [*others], None
    tensors = [*narrow, *others]
    cut, count = len(narrow), 0
    indices: List[int] = []
    for index, tensor in enumerate(tensors):
        if tensor is not None and tensor.requires_grad:
            indices += (index,)
            count += index < cut
    power = None
    if indices and (traced or not internals.transformed()):
        wanting = [tensors[index] for index in indices]
        apply = _Narrowed.apply if traced else _apply_narrowed
        *made, power = apply(count, *wanting)
        for index, tensor in zip(indices, made):
            tensors[index] = tensor
    rest: List[Any] = tensors[:cut]
    if power is None or count < cut:  # those without a gradient are not cast yet
        cast = _plain if traced or power is not None else casts.narrow
        rest = [*cast(rest, torch.float16)]
    return rest, tensors[cut:], power


def widened(out: Tensor, dtype: torch.dtype, power: Optional[Tensor]) -> Tensor:
    if power is None:
        return out.to(dtype)
    apply = _Widened.apply if internals.is_compiling() else _apply_widened
    wide: Tensor = apply(out, power, dtype)
    return wide
