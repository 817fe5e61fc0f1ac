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
_pending: weakref.WeakKeyDictionary[AdaptiveQueryRouter, List[Tensor]] = weakref.WeakKeyDictionary()
_of_output: Any = WeakIdKeyDictionary()


def add(router: AdaptiveQueryRouter, loss: Tensor) -> None:
    losses = _pending.setdefault(router, [])
    losses.append(loss)
    del losses[:-MOST]


def _take(pending: List[Tensor], given: Any) -> Optional[Tensor]:
    """The loss of the forward that made a tensor of `given`; where no forward is known to have, the
    oldest. Once each."""
    made = [_of_output[tensor] for tensor in _tensors(given) if tensor in _of_output]
    wanted = made[0] if made else pending[0]
    index = next((i for i, loss in enumerate(pending) if loss is wanted), None)
    return None if index is None else pending.pop(index)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
