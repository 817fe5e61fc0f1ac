"""The gradient of a BiasTensor in a reentrant checkpoint, held as gradients of its description."""

from __future__ import annotations

from typing import Any, Optional, Tuple

from torch import Tensor

from ... import _torch_internals as internals


class LearnedGradient(Tensor):
    """The gradient of a BiasTensor as those of its description's tensors, on its way through a
    reentrant checkpoint.

    `_dense`: what came by way of dense numbers beside it. As numbers it is only that; nothing but
    autograd's own addition and _Describe meets one.
    """

    _gradients: Tuple[Optional[Tensor], ...]
    _dense: Optional[Tensor]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("add", "add_") and len(args) == 2:
            return _sum_of(*args)
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
    made = internals.wrapper_subclass(
        LearnedGradient, like.shape, dtype=like.dtype, device=like.device
    )
    made._gradients, made._dense = gradients, dense
    return made  # type: ignore[no-any-return]


def _sum_of(one: Tensor, other: Tensor) -> LearnedGradient:
    if type(one) is not LearnedGradient:
        one, other = other, one
    assert isinstance(one, LearnedGradient)
    if isinstance(other, LearnedGradient):
        gradients = tuple(
            b if a is None else a if b is None else a + b
            for a, b in zip(one._gradients, other._gradients)
        )
        parts = [dense for dense in (one._dense, other._dense) if dense is not None]
    else:
        gradients, parts = one._gradients, [other] if one._dense is None else [one._dense, other]
    return learned_gradient(one, gradients, sum(parts[1:], parts[0]) if parts else None)
