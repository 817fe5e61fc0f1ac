"""Settled plans: which backend computes a call whose class and sizes it has computed before, with
nothing to ask again.

A plan is made when a call has gone the long way (dispatch.py) and no backend failed on it. It holds
as long as the settings, the loaded backends and the verdicts that led to it are the same.
"""

from __future__ import annotations

from typing import Any, Dict, NamedTuple, Optional, Tuple

from .. import settings
from . import selection
from .breaker import TRUSTED, breakers
from .inputs import AttentionInputs
from .selection import Candidates
from .signature import Key

ROOM = 1024  # plans: lengths that differ every time would fill memory


class Plan(NamedTuple):
    """The backend of a call, and what led to it.

    asked: (name, backend) of those that are asked before it, and its own.
    place: of its name among `candidates`.
    settings, verdicts: the objects that were current.
    """

    name: str
    backend: Any
    asked: Tuple[Tuple[str, Any], ...]
    candidates: Candidates
    place: int
    settings: Any
    verdicts: Any


def key_of(inputs: AttentionInputs, key: Key, pinned: Optional[str]) -> Any:
    """All that a backend's taking a call depends on; `key` is the call's class."""
    factor, padding = inputs.q_factor, inputs.key_padding
    return (
        key, pinned, inputs.q.shape, inputs.k.shape, None if factor is None else factor.shape[-1],
        inputs.segment_lengths, padding is not None and padding.requires_grad,
    )  # fmt: skip


def find(place: Any) -> Optional[Plan]:
    """The plan of that key, if there is one and it still holds."""
    plan: Optional[Plan] = breakers.plans.get(place)
    if (
        plan is None
        or plan.settings is not settings.current()
        or plan.verdicts is not breakers.by_class
    ):
        return None
    loaded = selection._loaded
    for name, backend in plan.asked:
        if name not in loaded or loaded[name] is not backend:
            return None
    return plan


def settle(place: Any, inputs: AttentionInputs, candidates: Candidates, name: str) -> None:
    """Make a plan of a call that the backend `name` has computed, if that is always so."""
    key, padding = place[0], inputs.key_padding
    if (
        inputs.windows is not None
        or inputs.window_mask is not None
        or padding is not None
        and padding.requires_grad
    ):
        return  # what such a call is taken by depends on more than its key
    if candidates.chosen and name != candidates.names[0]:
        return  # each class of call says once why (selection.tell_pinned)
    index, loaded, verdicts = candidates.names.index(name), selection._loaded, breakers.by_class
    asked = tuple((each, loaded.get(each)) for each in candidates.names[: index + 1])
    if verdicts.get(key, {}).get(name) is not TRUSTED or any(
        backend is None for _, backend in asked
    ):
        return
    plans: Dict[Any, Plan] = breakers.plans
    if len(plans) >= ROOM:
        plans.clear()
    plans[place] = Plan(name, loaded[name], asked, candidates, index, settings.current(), verdicts)
