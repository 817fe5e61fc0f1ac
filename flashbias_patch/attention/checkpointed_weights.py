"""Attention weights among the outputs of torch's reentrant checkpoint."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterator, List

import torch

from .lazy_weights import LazyWeights


class _Output:
    """Weights among the outputs of a reentrant checkpoint: whether anybody used them."""

    used = False


def for_checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a reentrant checkpoint: a recomputation returns None for attention weights
    that nobody used.

    The checkpoint would differentiate them all, with gradients of zeros.
    """
    outputs: List[_Output] = []

    def noted(value: Any) -> Any:
        if isinstance(value, LazyWeights):
            value._output = value._output or _Output()
            outputs.append(value._output)
        return value

    def used(found: Iterator[_Output], value: Any) -> Any:
        if not isinstance(value, LazyWeights):
            return value
        output = next(found, None)
        if output is not None and not output.used:
            return None
        if value._output is not None:  # of a checkpoint inside this one
            value._output.used = True
        return value

    def run(*args: Any) -> Any:
        result = function(*args)
        each = partial(used, iter(outputs)) if torch.is_grad_enabled() else noted
        return tuple(map(each, result)) if type(result) is tuple else each(result)

    return run
