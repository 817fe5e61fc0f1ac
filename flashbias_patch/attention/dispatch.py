"""Attention calls: the first backend that takes a call and is right on the self-check's problem
computes it.

Order and reasons: selection.py. What a backend is out for is kept by class of call (breaker.py): a
failure opens that circuit breaker, so that no later step pays for it again, and the next backend
answers from the same random state (recovery/).
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

from torch import Tensor
from torch.autograd import forward_ad

from .. import telemetry
from .._torch_internals import current_transform, is_compiling
from . import (
    autograd_exit,
    differentiable,
    kept_verdicts,
    plans,
    random_state,
    selection,
    selfcheck,
)
from .breaker import TRUSTED, State, Verdict, breakers
from .inputs import AttentionInputs
from .recovery import forward, replay
from .recovery.blame import Stage
from .selection import (
    LAST_RESORT,
    Candidates,
    NoBackendError,
    Unavailable,
    backend,
    explain,
    reasons_against,
)
from .signature import Key, key_of

__all__ = [
    "LAST_RESORT", "NoBackendError", "attend", "attend_traced", "backend", "breakers", "explain",
    "is_compiling", "reasons_against", "reset",
]  # fmt: skip

_loaded = selection._loaded


def attend(inputs: AttentionInputs, pinned: Optional[str] = None) -> Tensor:
    """Compute a call with the first backend that takes it.

    Raises NoBackendError when none does, or, under FLASHBIAS_STRICT, as soon as one fails;
    torch.cuda.OutOfMemoryError when memory does not even suffice for the last resort.
    """
    if current_transform() is not None or forward_ad._current_level >= 0:
        telemetry.calls[LAST_RESORT] += 1
        return differentiable.attend(inputs)
    if type(inputs.q) is not Tensor and _symbolic(inputs):
        return attend_traced(inputs, pinned)
    if breakers.pending:
        breakers.open_pending()
    checkpointed = replay.current()
    # A checkpointed forward runs without grad, but its backend must be able to run in the
    # recomputation too.
    key = key_of(inputs) if checkpointed is None else key_of(inputs, grad=True)
    if checkpointed is None:
        return _settled(inputs, key, pinned)[0]
    return _replayed(checkpointed, inputs, key, pinned)


def _symbolic(inputs: AttentionInputs) -> bool:
    """Whether sizes are symbols, as of fake tensors that stand for any batch: no class or plan can
    be kept by them."""
    return not all(
        type(size) is int
        for size in (*inputs.q.shape, *inputs.k.shape, inputs.v.shape[-1], inputs.rank)
    )


def _replayed(
    checkpointed: replay.Replay, inputs: AttentionInputs, key: Key, pinned: Optional[str]
) -> Tensor:
    """The call of a checkpointed function: recomputed by the backend that computed it in the
    forward."""
    name = checkpointed.begin_call()
    try:
        if name == replay.SMALL_CHUNKS:
            return forward.in_small_chunks(inputs)
        out, name = _settled(inputs, key, pinned, name, replay.hooked())
        return out
    finally:
        checkpointed.end_call(name)


def _settled(
    inputs: AttentionInputs, key: Key, pinned: Optional[str], replayed: str = "",
    hooked: Optional[replay.Replay] = None,
) -> Tuple[Tensor, str]:  # fmt: skip
    """(output, name of the backend that computed it): by the plan that an earlier call settled,
    else the long way.

    `replayed` names the backend that computed the call the first time.
    """
    place = plans.key_of(inputs, key, pinned)
    plan = plans.find(place)
    if plan is not None and (not replayed or replayed == plan.name):
        return _follow(plan, inputs, key, hooked)
    candidates = selection.candidates(inputs, key[6], pinned)
    if replayed:
        names = (replayed, *(other for other in candidates.names if other != replayed))
        return _take(inputs, key, candidates._replace(names=names), replayed)
    return _take(inputs, key, candidates, place=place)


def _follow(
    plan: plans.Plan, inputs: AttentionInputs, key: Key, hooked: Optional[replay.Replay]
) -> Tuple[Tensor, str]:
    """The backend of a plan, or those after it if it fails."""
    name, candidate, state = plan.name, plan.backend, None
    try:
        if inputs.dropout_p:
            state = random_state.now(inputs.q.device)
        out = (
            forward.run(candidate, name, inputs, key, state, hooked)
            if key[6]
            else candidate(inputs)
        )
    except Exception as error:
        names = plan.candidates.names
        attempt = forward.Attempt(candidate, name, inputs, key, state, Stage.RUN, name == names[-1])
        recovered = forward.recover(error, attempt)
        if recovered is None:
            return _take(inputs, key, plan.candidates, start=plan.place + 1, failure=error)
        return recovered, name
    telemetry.calls[name] += 1
    return out, name


def _take(
    inputs: AttentionInputs, key: Key, candidates: Candidates, replayed: str = "", start: int = 0,
    failure: Optional[Exception] = None, place: Any = None,
) -> Tuple[Tensor, str]:  # fmt: skip
    """(output, name of the backend that computed it). `replayed` is used whatever its verdict says.

    The candidates from `start` on, after `failure` of the one before. Where none fails, a plan is
    kept under `place`.
    """
    verdicts = breakers.by_class.get(key)
    if verdicts is None:
        verdicts = breakers.verdicts(key)
    for name in candidates.names[start:]:
        verdict = verdicts.get(name)
        if verdict is not None and verdict.state is State.OUT and name != replayed:
            if type(_loaded.get(name)) is not Unavailable:
                selection.refuse_if_strict(inputs, key, name)
            continue
        candidate = _loaded.get(name) or backend(name)
        state, stage = None, Stage.ASKED
        try:
            if candidate.why_not(inputs):
                if type(candidate) is Unavailable:
                    verdicts[name] = Verdict(State.OUT, candidate.reason)
                continue
            if verdict is None:
                stage = Stage.CHECKED
                if not _earns_trust(candidate, name, inputs, key, verdicts):
                    continue
            stage = Stage.RUN
            if inputs.dropout_p:
                state = random_state.now(inputs.q.device)
            hooked = replay.hooked() if key[6] else None
            out = (
                forward.run(candidate, name, inputs, key, state, hooked)
                if key[6]
                else candidate(inputs)
            )
        except Exception as error:
            out = forward.recover(error, forward.Attempt(
                candidate, name, inputs, key, state, stage, name == candidates.names[-1]
            ))  # fmt: skip
            if out is None:
                failure = error
                continue
        else:
            telemetry.calls[name] += 1
            if place is not None and failure is None:
                plans.settle(place, inputs, candidates, name)
        if candidates.chosen:
            selection.tell_pinned(name, inputs, key)
        return out, name
    selection.refuse(inputs, key, candidates.names, failure)


def _earns_trust(
    candidate: Any, name: str, inputs: AttentionInputs, key: Key, verdicts: Dict[str, Verdict]
) -> bool:
    """Self-check a backend before its first answer to a class; under FLASHBIAS_STRICT a failed one
    raises."""
    if inputs.q.is_cuda:
        autograd_exit.wait_for_autograd()
    if name == LAST_RESORT:
        verdicts[name] = TRUSTED
        return True
    if not selfcheck.possible(inputs):
        return (
            name != "upstream"
        )  # ours and torch's are assumed to be right, one known to go wrong is not
    kept = kept_verdicts.wanted(candidate, key, name)
    if kept and kept_verdicts.holds(key, name):
        verdicts[name] = TRUSTED
        return True
    evidence: Dict[str, Any] = {}
    if kept:
        found = selfcheck.check(candidate, key, inputs.rank, evidence)
    else:
        found = selfcheck.check(candidate, key, inputs.rank)
    if found:
        breakers.open(key, name, found)
        selection.refuse_if_strict(inputs, key, name)
        return False
    verdicts[name] = TRUSTED
    if kept:
        kept_verdicts.keep(key, name, evidence)
    return True


def attend_traced(inputs: AttentionInputs, pinned: Optional[str]) -> Tensor:
    """As attend, inside torch.compile: no self-check, breaker or fallback; what can be wrong
    unchecked is left out."""
    if _load_all():
        for name in selection.chosen(pinned).names:
            if name != "upstream" and not _loaded[name].why_not(inputs):
                candidate = _loaded[name]
                return getattr(candidate, "traced", candidate)(inputs)  # type: ignore[no-any-return]
    raise NoBackendError(
        "no backend takes this call under torch.compile; call it uncompiled to see why"
    )


def _load_all() -> bool:
    """Import every backend: what torch.compile cannot trace, and so runs while it traces."""
    for name in selection.MODULES:
        backend(name)
    return True


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo.
_load_all._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reset() -> None:
    """Close every circuit breaker and forget loaded backends (tests)."""
    breakers.close()
    selection.reset()
