"""Supervision losses of forwards, until the head's loss takes each.

They are kept beside the modules, so that these pickle and deep-copy as ever.
"""

from __future__ import annotations

import weakref
from typing import Any, Iterator, List, Optional

from torch import Tensor

from ..._torch_internals import WeakIdKeyDictionary
from ...aqr.router import AdaptiveQueryRouter

MOST = 16  # forwards without a loss that are remembered
# router -> losses, oldest first; output of a head -> the loss of the forward that made it, or None
pending: weakref.WeakKeyDictionary[AdaptiveQueryRouter, List[Tensor]] = weakref.WeakKeyDictionary()
of_output: Any = WeakIdKeyDictionary()


def add(router: AdaptiveQueryRouter, loss: Tensor) -> None:
    losses = pending.setdefault(router, [])
    losses.append(loss)
    del losses[:-MOST]


def take(losses: List[Tensor], arguments: Any) -> Optional[Tensor]:
    """Remove and return the loss of the forward that made a tensor among `arguments`; the oldest
    if no such forward is known, None if that loss was taken before."""
    of_arguments = [of_output[tensor] for tensor in tensors_of(arguments) if tensor in of_output]
    wanted = of_arguments[0] if of_arguments else losses[0]
    index = next((i for i, loss in enumerate(losses) if loss is wanted), None)
    return None if index is None else losses.pop(index)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)
