"""Check the shapes and dtypes of the arguments of biases."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Optional, Sequence, Tuple, Union

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeGuard


def is_int(value: object) -> TypeGuard[int]:
    """True for an int, NumPy's included; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """True for an int or a float, NumPy's included; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def head_last(factor: Union[float, Tensor], trailing: int) -> Union[float, Tensor]:
    """Reshape (H,) to (H, 1, ...), with `trailing` dimensions after the heads; scalars stay.

    `trailing` is 1 for factors (..., H, R) and 2 for scores (..., H, M, N).
    """
    if isinstance(factor, Tensor) and factor.dim() == 1:
        return factor.reshape((-1,) + (1,) * trailing)
    return factor


def as_four(tensor: Tensor, num_heads: Optional[int], name: str = "tensor") -> Tensor:
    """View (M, N), (B, M, N), (B*H, M, N) or (B, H, M, N) as (B|1, H|1, M, N)."""
    if num_heads is not None and not (is_int(num_heads) and num_heads >= 1):
        raise ValueError(f"num_heads: expected a positive int or None, got {num_heads!r}")
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        if num_heads is None:
            return tensor[:, None]
        if tensor.shape[0] == 1:
            return tensor[None]
        if tensor.shape[0] % num_heads:
            raise ValueError(
                f"{name}: a 3-D tensor with num_heads={num_heads} is (B*H, M, N), but its first "
                "size "
                f"does not divide by {num_heads}: got {tuple(tensor.shape)}"
            )
        unflattened: Tensor = tensor.unflatten(0, (tensor.shape[0] // num_heads, num_heads))
        return unflattened
    if tensor.dim() == 4:
        if num_heads is not None and tensor.shape[1] not in (1, num_heads):
            raise ValueError(
                f"{name}: expected {num_heads} or 1 heads in dimension 1 of (B, H, M, N), "
                f"got {tuple(tensor.shape)}"
            )
        return tensor
    raise ValueError(
        f"{name}: expected (M, N), (B, M, N), (B*H, M, N) with num_heads, or (B, H, M, N), "
        f"got {tuple(tensor.shape)}"
    )


def collapse_expanded(tensor: Tensor) -> Tensor:
    """Replace expanded batch and head dimensions (stride 0) by dimensions of size 1.

    A tensor that requires grad is not changed, because each of its slices has its own gradient.
    """
    if tensor.requires_grad:
        return tensor
    for dim in (0, 1):
        if tensor.shape[dim] > 1 and tensor.stride(dim) == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def check_floating(name: str, value: object, hint: str = "") -> None:
    """Raise TypeError unless `value` is a floating tensor; `hint` is appended to the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a floating tensor, got {type(value).__name__}{hint}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {value.dtype}{hint}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name}: expected one device, got {tensor.device} and {other.device}"
        )


def check_lengths(
    name: str, lengths: Sequence[int], expected_sum: Optional[int] = None
) -> Tuple[int, ...]:
    """Return `lengths` as a tuple of ints >= 0, at least one, else raise TypeError or
    ValueError."""
    lengths = tuple(lengths)
    if not lengths:
        raise ValueError(f"{name}: expected at least one length, got none")
    for length in lengths:
        if not is_int(length):
            raise TypeError(f"{name}: expected ints, got {length!r} ({type(length).__name__})")
        if length < 0:
            raise ValueError(f"{name}: expected lengths >= 0, got {lengths}")
    if expected_sum is not None and sum(lengths) != expected_sum:
        raise ValueError(
            f"{name}: expected lengths that sum to the {expected_sum} keys, got {lengths} = "
            f"{sum(lengths)}"
        )
    return tuple(map(int, lengths))
