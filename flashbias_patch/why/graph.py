"""Inspect the autograd graph between a loss and a parameter."""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

import torch
from torch import Tensor

from .._torch_internals import all_functions_off

MOST_HOOKED = 400  # nodes nearest to the parameter whose gradients are measured


class Node:
    """A node of the path: its distance from the parameter, and the sizes of its gradients.

    `entering` comes from the side of the loss, `leaving` goes towards the parameter. A size is
    (largest absolute value, sum of absolute values) as tensors, or None without a gradient.
    """

    def __init__(self, node: Any, distance: int, towards: Tuple[int, ...]) -> None:
        self.name, self.distance, self.towards = (
            node.name().replace("torch::autograd::", ""),
            distance,
            towards,
        )
        self.site: Optional[Dict[str, Any]] = None
        self.entering: Optional[Tuple[Tensor, Tensor]] = None
        self.leaving: Optional[Tuple[Tensor, Tensor]] = None
        self.dtype = ""
        self.called = False

    def hook(self, leaving: Any, entering: Any) -> None:
        with torch.no_grad(), all_functions_off():
            self.called = True
            self.entering = size_of(entering)
            towards = [leaving[index] for index in self.towards if index < len(leaving)]
            self.leaving = size_of(towards)
            gradients = [g for g in towards if isinstance(g, Tensor)]
            self.dtype = str(gradients[0].dtype)[6:] if gradients else ""

    def as_dict(self) -> Dict[str, Any]:
        return {
            "name": self.name,
            "distance": self.distance,
            "called": self.called,
            "dtype": self.dtype,
            "site": self.site,
            "entering": _floats(self.entering),
            "leaving": _floats(self.leaving),
        }


def size_of(gradients: Iterable[Any]) -> Optional[Tuple[Tensor, Tensor]]:
    """Return (largest absolute value, sum of absolute values), or None without a gradient."""
    magnitudes = [
        g.detach().abs()
        for g in gradients
        if isinstance(g, Tensor) and g.numel() and g.layout == torch.strided
    ]
    if not magnitudes:
        return None
    largest = torch.stack([g.amax().double() for g in magnitudes]).amax()
    return largest, torch.stack([g.double().sum() for g in magnitudes]).sum()


def _floats(size: Optional[Tuple[Tensor, Tensor]]) -> Optional[List[float]]:
    return None if size is None else [float(number) for number in size]


def roots_of(tensors: Any) -> List[Any]:
    """Return the grad_fn of each tensor that has one."""
    tensors = tensors if isinstance(tensors, (list, tuple)) else (tensors,)
    return [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]


def parents_of(roots: List[Any]) -> Dict[Any, List[Tuple[Any, int]]]:
    """Map every node below the roots to the nodes that use its result, and the input's index."""
    parents: Dict[Any, List[Tuple[Any, int]]] = {root: [] for root in roots}
    waiting = list(parents)
    while waiting:
        node = waiting.pop()
        for index, (child, _) in enumerate(node.next_functions):
            if child is None:
                continue
            if child not in parents:
                parents[child] = []
                waiting.append(child)
            parents[child].append((node, index))
    return parents


def path(parents: Dict[Any, List[Tuple[Any, int]]], parameter: Tensor) -> List[Tuple[Any, Node]]:
    """Return the nodes between `parameter` and the loss, nearest first; empty if there is no
    path."""
    leaf = next((node for node in parents if getattr(node, "variable", None) is parameter), None)
    if leaf is None:
        return []
    distances, order, towards = {leaf: 0}, [leaf], {leaf: ()}  # type: Dict[Any, int], List[Any], Dict[Any, Any]
    for node in order:
        for parent, index in parents[node]:
            towards[parent] = (*towards.get(parent, ()), index)
            if parent not in distances:
                distances[parent] = distances[node] + 1
                order.append(parent)
    return [
        (node, Node(node, distances[node], towards[node])) for node in order[1 : MOST_HOOKED + 1]
    ]


def depends(tensors: Iterable[Tensor], parameters: List[Tensor], most: int = 20000) -> bool:
    """Return True if the graph of any of `tensors` contains one of `parameters`."""
    visited: Set[Any] = set()
    waiting = roots_of(list(tensors))
    while waiting and len(visited) < most:
        node = waiting.pop()
        if node in visited:
            continue
        visited.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and any(variable is parameter for parameter in parameters):
            return True
        waiting += [child for child, _ in node.next_functions if child is not None]
    return False
