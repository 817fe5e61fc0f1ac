"""Gradients of the learned biases inside checkpoints that run a backward pass of their own.

Such a checkpoint is a torch.autograd.Function, and a bias that its function finds in a context
variable is none of its arguments: nothing in the graph leads from its output to the bias. replay.py
gives leaves to the recomputation, and their gradients are added to the bias' own gradient.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals

LEARNED_ADVICE = (
    "checkpoint without reentrance (torch.utils.checkpoint.checkpoint(..., "
    "use_reentrant=False)), or pass the bias as "
    "a tensor argument of the checkpointed function and open attention_bias(...) inside it"
)


@contextlib.contextmanager
def advising() -> Any:
    """Add advice to torch's error about a graph that was freed."""
    try:
        yield
    except RuntimeError as error:
        if "a second time" not in str(error) or LEARNED_ADVICE in str(error):
            raise
        raise RuntimeError(
            f"{error}\nIf a learned attention bias is used in several checkpoints that run a "
            "backward pass of their own, "
            f"or outside them too: {LEARNED_ADVICE}"
        ) from error


class Leaves:
    """Gradients of carried tensors, from a recomputation that differentiates itself (a backward
    inside a backward).

    The recomputation sees leaves instead, so that it does not free the graph behind the tensors,
    which others need.
    """

    def __init__(self) -> None:
        self._leaves: Dict[int, Tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in self._leaves:
            self._leaves[id(tensor)] = tensor, tensor.detach().requires_grad_()
        _, leaf = self._leaves[id(tensor)]
        return leaf

    def deliver(self) -> None:
        pairs = [
            (tensor, leaf.grad) for tensor, leaf in self._leaves.values() if leaf.grad is not None
        ]
        if not pairs:
            return
        if not internals.is_checkpoint_valid():
            raise RuntimeError(
                "attention_bias: the gradient of a learned bias inside this checkpoint is only "
                "known to "
                f"loss.backward() without `inputs`, not to torch.autograd.grad; {LEARNED_ADVICE}"
            )
        if internals.will_execute is None:  # torch cannot tell which nodes the pass will visit
            _differentiate(*zip(*pairs))
            return
        gradients = PassGradients.of_this_pass()
        for tensor, gradient in pairs:
            gradients.add(tensor, gradient)


class PassGradients:
    """Gradients that the checkpoints of one backward pass computed for tensors that are none of
    their arguments.

    Each tensor gets the sum once: with the gradient that the pass itself computes for it, or else
    when the pass ends. DistributedDataParallel reduces a gradient when it first arrives, and does
    not notice later additions. Only where the pass differentiates part of the graph behind the
    tensor, but not the tensor, is each part added at once.
    """

    def __init__(self) -> None:
        self._sums: Dict[int, Tuple[Tensor, Tensor]] = {}
        self._hooks: List[Any] = []

    @staticmethod
    def of_this_pass() -> PassGradients:
        task = internals.current_graph_task()
        with _gradients_lock:
            gradients = _gradients.get(task)
            if gradients is None:
                gradients = _gradients[task] = PassGradients()
                internals.queue_callback(gradients.deliver)  # the pass keeps it, and so `gradients`
        return gradients

    def add(self, tensor: Tensor, gradient: Tensor) -> None:
        """Add a gradient, from any thread of the pass: each GPU has its own."""
        with _gradients_lock:
            if id(tensor) in self._sums:
                _, before = self._sums[id(tensor)]
                self._sums[id(tensor)] = tensor, before + gradient
                return
            if not self._at_once(tensor):
                self._sums[id(tensor)] = tensor, gradient
                return
        _differentiate(
            [tensor], [gradient]
        )  # now: the pass frees what the graph behind the tensor needs

    def _at_once(self, tensor: Tensor) -> bool:
        """True if each part is added at once; else the sum joins the gradient of the pass."""
        assert internals.will_execute is not None
        node = _node(tensor)
        if not internals.will_execute(node):
            return _shared_with_this_pass(node, internals.will_execute)
        hook = tensor.register_hook(functools.partial(self._join, tensor))
        others = tensor._backward_hooks or {}
        for key in [key for key in others if key != hook.id]:
            others[key] = others.pop(key)  # they come later, and see the sum
        self._hooks.append(hook)
        return False

    def _join(self, tensor: Tensor, own: Optional[Tensor]) -> Optional[Tensor]:
        """Add the sum to the gradient that the pass computed for `tensor`."""
        with _gradients_lock:
            _, total = self._sums.pop(id(tensor), (tensor, None))
        return total if own is None or total is None else own + total

    def deliver(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._sums:
            tensors, gradients = zip(*self._sums.values())
            self._sums.clear()
            _differentiate(tensors, gradients)


_gradients: weakref.WeakValueDictionary[int, PassGradients] = (
    weakref.WeakValueDictionary()
)  # by backward pass
_gradients_lock = threading.RLock()


def _node(tensor: Tensor) -> Any:
    """The node of the graph that the gradient of `tensor` goes to."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn
    with torch.enable_grad():
        (node, _), *_ = tensor.view_as(tensor).grad_fn.next_functions  # type: ignore[union-attr]
        return node


def _shared_with_this_pass(node: Any, will_execute: Callable[[Any], bool]) -> bool:
    """True if the backward pass that runs comes to any node behind `node` other than leaves."""
    seen, left = {node}, [node]
    while left:
        for behind, _ in left.pop().next_functions:
            if behind is None or behind in seen or not behind.next_functions:
                continue
            if will_execute(behind):
                return True
            seen.add(behind)
            left.append(behind)
    return False


def _differentiate(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    with advising():
        torch.autograd.backward(tensors, gradients, retain_graph=True)
