"""Backward passes that begin at attention weights, and the gradients of these."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import BiasTensor
from .lazy_weights import BACKWARD, LazyWeights, computed_in


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
    kwargs.update(zip(("retain_graph", "create_graph", "only_inputs", "allow_unused"), args))
    outputs, grad_outputs = _roots(outputs), computed_in(grad_outputs)
    given = internals.listed(inputs)
    order = sorted(range(len(given)), key=lambda index: not isinstance(given[index], BiasTensor))
    if order and isinstance(given[order[0]], BiasTensor):
        # With a bias in front torch calls its function, and that comes back for the weights.
        found = torch.autograd.grad(outputs, [given[i] for i in order], grad_outputs, **kwargs)
        return tuple(found[order.index(index)] for index in range(len(given)))
    if not any(isinstance(each, LazyWeights) for each in given):
        return torch.autograd.grad(outputs, given, grad_outputs, **kwargs)
    places = [each.places() if isinstance(each, LazyWeights) else [each] for each in given]
    unused = (kwargs.pop("allow_unused", None), kwargs.pop("materialize_grads", False))
    flat = [tensor for place in places for tensor in place]
    # A place that is the object itself must not come back here.
    with internals.no_functions() if internals.gradient_edge is None else nullcontext():
        parts = iter(torch.autograd.grad(outputs, flat, grad_outputs, allow_unused=True, **kwargs))
    return tuple(
        internals.sum_of_gradients(tensor, [next(parts) for _ in place], *unused)
        for tensor, place in zip(given, places)
    )


BACKWARD[torch.autograd.grad] = _grad
BACKWARD[torch.autograd.backward] = _backward
BACKWARD[Tensor.backward] = _backward_of
