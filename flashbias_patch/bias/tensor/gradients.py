"""Handlers for gradients of a BiasTensor: requires_grad, grad, hooks and torch.autograd.grad."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ..._torch_internals import tree_map
from .core import (
    BiasTensor,
    connect_leaf,
    graph_task,
    is_leaf,
    no_functions,
    rebind,
    to_numbers,
    traced,
)
from .learned_gradient import learned_gradient, sum_of
from .notices import log_dense
from .registry import handles, name_of, structured


@handles("requires_grad_", "set requires_grad")
def _requires_grad(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    value = next(iter((*rest, *kwargs.values())), True)
    with no_functions():
        same = bool(value) == tensor.requires_grad
        func(*args, **kwargs)
    returned = tensor if name_of(func) == "requires_grad_" else None
    if same or traced():
        return returned
    # A leaf of the user: the gradient must be that of the tensor itself.
    if not structured(tensor) or value and graph_task() == -1:
        if value:
            connect_leaf(tensor)
        else:
            tensor._dense = tensor.numbers().detach()
        tensor._bias = None
    # A leaf of a checkpoint, which passes the gradient to the tensor that this one was detached
    # from.
    else:
        assert tensor._bias is not None
        tensor._bias = tensor._bias._map(_leaf_of if value else Tensor.detach)
        tensor._dense = None
    tensor._parents, tensor._replay = (), None
    return returned


def _leaf_of(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


@handles("get grad")
def _grad(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *_ = args
    if not _leads(tensor):
        dense = tensor._observed or tensor._bias is None
        return tensor._dense.grad if dense and tensor._dense is not None else None
    with no_functions():
        native = func(*args, **kwargs)
        if not tensor.is_leaf:
            return native
    parts = () if tensor._bias is None else tuple(leaf.grad for leaf in tensor._bias.tensors())
    if all(part is None for part in parts) and (native is not None or tensor._bias is None):
        return native
    learned = learned_gradient(tensor, parts, None)
    return learned if native is None else sum_of(learned, native)


@handles("set grad")
def _set_grad(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    if not _leads(tensor) and tensor._dense is not None:
        return func(tensor._dense, *rest, **kwargs)
    with no_functions():
        return func(*args, **kwargs)


def _leads(tensor: BiasTensor) -> bool:
    """True if its dense tensor follows it in the graph: gradients and hooks are its own."""
    return is_leaf(tensor) or tensor._made_elsewhere()


@handles("retain_grad", "register_hook", "register_post_accumulate_grad_hook")
def _observe(func: Any, args: Any, kwargs: Any) -> Any:
    tensor, *rest = args
    if structured(tensor):
        if tensor._used:
            raise RuntimeError(
                f"{name_of(func)} on an attention bias must come before attention reads it: its "
                "own gradient is not "
                "computed otherwise"
            )
        log_dense(name_of(func), tensor)
        tensor._observed = True
        if is_leaf(tensor):
            connect_leaf(tensor)
        # Code that does not dispatch in Python, such as a checkpoint, passes the gradient to the
        # tensor itself, or to one computed from it: from there it must reach the dense one.
        queue = [tensor]
        for each in queue:
            queue += each._living()
            if each.requires_grad and not each.is_leaf:
                each.numbers()
                rebind(each, None, each._layout)
    if _leads(tensor):
        with no_functions():
            return func(*args, **kwargs)
    return func(tensor.numbers(), *rest, **kwargs)


@handles("grad")
def _autograd_grad(func: Any, args: Any, kwargs: Any) -> Any:
    """Run torch.autograd.grad with respect to BiasTensors.

    Attention adds its gradients to `_wanted` (attention/observe.py).
    """
    if func is not torch.autograd.grad:
        return NotImplemented
    names = (
        "outputs",
        "inputs",
        "grad_outputs",
        "retain_graph",
        "create_graph",
        "only_inputs",
        "allow_unused",
    )
    arguments = dict(zip(names, args), **kwargs)
    if arguments.pop("is_grads_batched", False):
        return _one_by_one(arguments)
    outputs, inputs = tree_map(to_numbers, arguments.pop("outputs")), arguments.pop("inputs")
    requested = internals.listed(inputs)
    unused = (arguments.pop("allow_unused", None), arguments.pop("materialize_grads", False))
    internal: List[Tensor] = []
    spans: List[Tuple[int, int]] = []
    for tensor in requested:
        leaves = [tensor]
        if type(tensor) is BiasTensor:
            leaves = tensor.handle() + (
                [tensor._dense] if tensor._dense is not None and tensor._dense.requires_grad else []
            )
            tensor._wanted = []
        spans.append((len(internal), len(internal) + len(leaves)))
        internal += leaves
    try:
        gradients = func(outputs, internal, allow_unused=True, **arguments)
        results = []
        for tensor, (start, stop) in zip(requested, spans):
            parts = list(gradients[start:stop])
            if type(tensor) is BiasTensor:
                dense = [part for part in parts if part is not None and part.dim()]
                parts = [*(tensor._wanted or ()), *dense]
            results.append(internals.sum_of_gradients(tensor, parts, *unused))
    finally:
        for tensor in requested:
            if type(tensor) is BiasTensor:
                tensor._wanted = None
    return tuple(results)


def _one_by_one(arguments: Dict[str, Any]) -> Tuple[Optional[Tensor], ...]:
    """torch.autograd.grad for a batch of gradients: what vmap computes does not leave it."""
    grads = internals.listed(arguments.pop("grad_outputs"))
    last = arguments.pop("retain_graph", None)
    count = next(len(grad) for grad in grads if grad is not None)
    found = []
    for index in range(count):
        each = [None if grad is None else grad[index] for grad in grads]
        retain = True if index + 1 < count else last
        found.append(torch.autograd.grad(grad_outputs=each, retain_graph=retain, **arguments))
    return tuple(
        None if any(part is None for part in parts) else torch.stack(parts) for parts in zip(*found)
    )
