"""Plans: the backend of a call whose signature and sizes it has computed before, so that nothing
needs to be checked again.

dispatch.py makes a plan when it has selected a backend and none has failed. A plan holds as long as
the settings, the loaded backends and the verdicts that led to it are the same.
"""

from __future__ import annotations

from typing import Any, Hashable, NamedTuple, Optional, Tuple

from .. import settings
from . import selection
from .backends.base import Backend
from .breaker import TRUSTED, breakers
from .inputs import AttentionInputs
from .selection import Candidates
from .signature import CallSignature

MAX_PLANS = 1024  # lengths that differ every time would fill memory


class Plan(NamedTuple):
    """The backend of a call, and the state in which it was selected.

    tried: (name, backend) of the candidates before it, and its own.
    position: its index in `candidates.names`.
    settings, verdicts: the objects that were current.
    """

    name: str
    backend: Backend
    tried: Tuple[Tuple[str, Backend], ...]
    candidates: Candidates
    position: int
    settings: Any
    verdicts: Any


def find(
    inputs: AttentionInputs, signature: CallSignature, pinned: Optional[str]
) -> Tuple[Hashable, Optional[Plan]]:
    """(key of the call's plan, the plan if there is one and it still holds).

    The key holds all that decides whether a backend takes the call.
    """
    factor, padding = inputs.q_factor, inputs.key_padding
    key = (
        signature, pinned, inputs.q.shape, inputs.k.shape,
        None if factor is None else factor.shape[-1],
        inputs.segment_lengths, padding is not None and padding.requires_grad,
    )  # fmt: skip
    plan: Optional[Plan] = breakers.plans.get(key)
    if (
        plan is None
        or plan.settings is not settings.current()
        or plan.verdicts is not breakers.by_signature
    ):
        return key, None
    loaded = selection.loaded
    for name, backend in plan.tried:
        if name not in loaded or loaded[name] is not backend:
            return key, None
    return key, plan


def keep(
    key: Hashable, inputs: AttentionInputs, signature: CallSignature, candidates: Candidates,
    name: str,
) -> None:  # fmt: skip
    """Make a plan of a call that the backend `name` has computed, if it always will."""
    padding = inputs.key_padding
    if (
        inputs.windows is not None
        or inputs.window_mask is not None
        or padding is not None
        and padding.requires_grad
    ):
        return  # whether a backend takes such a call depends on more than its key
    if candidates.chosen and name != candidates.names[0]:
        return  # selection.report_pinned says why, once per signature
    position, loaded = candidates.names.index(name), selection.loaded
    verdicts = breakers.by_signature
    if verdicts.get(signature, {}).get(name) is not TRUSTED:
        return
    names = candidates.names[: position + 1]
    if not all(each in loaded for each in names):
        return
    tried = tuple((each, loaded[each]) for each in names)
    if len(breakers.plans) >= MAX_PLANS:
        breakers.plans.clear()
    breakers.plans[key] = Plan(
        name, loaded[name], tried, candidates, position, settings.current(), verdicts
    )
