"""Backward passes that begin at attention weights, and the gradients of these."""

from __future__ import annotations

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from .lazy_weights import BACKWARD, LazyWeights, computed_in

_without_torch_function = internals.no_functions


class _Root(internals.Function):
    """A tensor of zeros in the place that the object has in the graph."""

    @staticmethod
    def forward(ctx: Any, weights: LazyWeights) -> Tensor:
        zero = torch.zeros((), dtype=weights.dtype, device=weights.device)
        return zero.expand(weights.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad


def _roots(value: Any) -> Any:
    """`value`, where a backward pass begins, with a tensor of the same place in the graph for every
    LazyWeights."""
    if isinstance(value, LazyWeights):
        if value._output is not None:
            value._output.used = True
        with torch.enable_grad():
            return _Root.apply(value) if value.requires_grad else value.computed()
    return type(value)(map(_roots, value)) if isinstance(value, (list, tuple)) else value


def _backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
    torch.autograd.backward(_roots(tensors), *computed_in(args), **computed_in(kwargs))


def _backward_of(weights: Any, *args: Any, **kwargs: Any) -> None:
    _roots(weights).backward(*computed_in(args), **computed_in(kwargs))


def _grad(
    outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any
) -> Tuple[Optional[Tensor], ...]:
    """torch.autograd.grad, for inputs whose gradient may be at two places of the graph."""
    outputs, grad_outputs = _roots(outputs), computed_in(grad_outputs)
    given = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not any(isinstance(each, LazyWeights) for each in given):
        return torch.autograd.grad(outputs, given, grad_outputs, *args, **kwargs)
    places = [each.places() if isinstance(each, LazyWeights) else [each] for each in given]
    names = ("retain_graph", "create_graph", "only_inputs", "allow_unused")
    kwargs.update(zip(names, args))
    unused_allowed = kwargs.pop("allow_unused", None) or kwargs.get("materialize_grads", False)
    flat = [tensor for place in places for tensor in place]
    with _without_torch_function():
        found = iter(torch.autograd.grad(outputs, flat, grad_outputs, allow_unused=True, **kwargs))
    gradients: List[Optional[Tensor]] = []
    for place in places:
        parts = [part for part in (next(found) for _ in place) if part is not None]
        if not parts and not unused_allowed:
            raise RuntimeError(
                "One of the differentiated Tensors appears to not have been used in the graph. "
                "Set allow_unused=True if this is the desired behavior."
            )
        gradients.append(sum(parts[1:], parts[0]) if parts else None)
    return tuple(gradients)


BACKWARD[torch.autograd.grad] = _grad
BACKWARD[torch.autograd.backward] = _backward
BACKWARD[Tensor.backward] = _backward_of
