"""The gradient of a BiasTensor in a reentrant checkpoint, held as gradients of its description."""

from __future__ import annotations

from typing import Any, Optional, Tuple

from torch import Tensor

from ... import _torch_internals as internals


class LearnedGradient(Tensor):
    """The gradient of a BiasTensor, as gradients of the tensors of its description.

    A reentrant checkpoint passes it on. `_dense` is the part of the gradient that came through the
    dense tensor. Only the addition of autograd and core._Describe use such a gradient.
    """

    _gradients: Tuple[Optional[Tensor], ...]
    _dense: Optional[Tensor]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("add", "add_") and len(args) == 2:
            return sum_of(*args)
        if name in ("detach", "clone", "alias", "view_as"):
            return args[0]
        raise NotImplementedError(
            "the gradient of an attention bias inside a reentrant checkpoint is not a tensor "
            f"for {func}: call "
            "retain_grad() on the bias before attention reads it"
        )


def learned_gradient(
    like: Tensor, gradients: Tuple[Optional[Tensor], ...], dense: Optional[Tensor]
) -> LearnedGradient:
    gradient = internals.wrapper_subclass(
        LearnedGradient, like.shape, dtype=like.dtype, device=like.device
    )
    gradient._gradients, gradient._dense = gradients, dense
    return gradient


def sum_of(first: Tensor, second: Tensor) -> LearnedGradient:
    if type(first) is not LearnedGradient:
        first, second = second, first
    assert isinstance(first, LearnedGradient)
    if isinstance(second, LearnedGradient):
        gradients = tuple(
            b if a is None else a if b is None else a + b
            for a, b in zip(first._gradients, second._gradients)
        )
        parts = [dense for dense in (first._dense, second._dense) if dense is not None]
    else:
        gradients, parts = (
            first._gradients,
            [second] if first._dense is None else [first._dense, second],
        )
    return learned_gradient(first, gradients, sum(parts[1:], parts[0]) if parts else None)
