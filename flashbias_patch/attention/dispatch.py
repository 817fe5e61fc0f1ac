"""Dispatch of attention calls: the first backend that takes a call, and has passed the self-check
for its signature, computes it.

Order and reasons: selection.py. A failure opens a circuit breaker (breaker.py) for the call
signature, so that no later step tries that backend again, and the next backend computes the call
from the same random state (recovery/).
"""

from __future__ import annotations

import functools
from typing import Any, Dict, Hashable, Optional, Tuple

from torch import Tensor

from .. import telemetry
from .._torch_internals import constant_while_traced, current_transform, forward_ad, is_compiling
from . import (
    autograd_exit,
    differentiable,
    first_compilation,
    kept_verdicts,
    plans,
    random_state,
    selection,
    selfcheck,
)
from .backends.base import Backend, Unavailable
from .breaker import TRUSTED, State, Verdict, breakers
from .inputs import AttentionInputs
from .recovery import forward, replay
from .recovery.blame import Stage
from .selection import (
    LAST_RESORT,
    Candidates,
    NoBackendError,
    backend,
    explain,
    loaded,
    reasons_against,
)
from .signature import CallSignature, signature_of

__all__ = [
    "LAST_RESORT", "NoBackendError", "attend", "attend_traced", "backend", "breakers", "explain",
    "is_compiling", "loaded", "reasons_against", "reset",
]  # fmt: skip


def attend(inputs: AttentionInputs, pinned: Optional[str] = None) -> Tensor:
    """Compute a call with the first backend that takes it.

    Raises NoBackendError when none does, or, under FLASHBIAS_STRICT, as soon as one fails;
    torch.cuda.OutOfMemoryError when memory does not even suffice for the last resort.
    """
    if current_transform() is not None or forward_ad._current_level >= 0:
        telemetry.calls[LAST_RESORT] += 1
        return differentiable.attend(inputs)
    if type(inputs.q) is not Tensor and _has_symbolic_sizes(inputs):
        return attend_traced(inputs, pinned)
    if breakers.pending:
        breakers.open_pending()
    checkpointed = replay.current()
    if checkpointed is not None:
        return _attend_checkpointed(checkpointed, inputs, pinned)
    signature = signature_of(inputs)
    plan_key, plan = plans.find(inputs, signature, pinned)
    if plan is not None:
        output, _ = _follow(plan, inputs, signature, None)
    else:
        candidates = selection.candidates(inputs, signature.grad, pinned)
        output, _ = _first_working(inputs, signature, candidates, plan_key=plan_key)
    return output


def _has_symbolic_sizes(inputs: AttentionInputs) -> bool:
    """True if sizes are symbols, as those of fake tensors are: no plan can be kept under them."""
    return not all(
        type(size) is int
        for size in (*inputs.q.shape, *inputs.k.shape, inputs.v.shape[-1], inputs.rank)
    )


def _attend_checkpointed(
    checkpointed: replay.Replay, inputs: AttentionInputs, pinned: Optional[str]
) -> Tensor:
    """The call of a checkpointed function. Its recomputation uses the backend of its forward."""
    # A checkpointed forward runs without grad, but its backend must be able to run in the
    # recomputation too, and give the same output.
    if inputs.out_dtype is not None:
        inputs = inputs._replace(out_dtype=None)
    signature = signature_of(inputs, grad=True)
    record = checkpointed.begin_call()
    try:
        if record is not None and record.small_chunks:
            return forward.in_small_chunks(inputs)
        replayed = None if record is None else record.backend
        plan_key, plan = plans.find(inputs, signature, pinned)
        if plan is not None and replayed in (None, plan.name):
            output, name = _follow(plan, inputs, signature, replay.hooked())
        else:
            candidates = selection.candidates(inputs, signature.grad, pinned)
            if replayed is None:
                output, name = _first_working(inputs, signature, candidates, plan_key=plan_key)
            else:
                others = (other for other in candidates.names if other != replayed)
                candidates = candidates._replace(names=(replayed, *others))
                output, name = _first_working(inputs, signature, candidates, replayed=replayed)
        record = replay.CallRecord(name)
        return output
    finally:
        checkpointed.end_call(record)


def _follow(
    plan: plans.Plan, inputs: AttentionInputs, signature: CallSignature,
    hooked: Optional[replay.Replay],
) -> Tuple[Tensor, str]:  # fmt: skip
    """(output, name of its backend): the plan's, or if that fails, one of the candidates after
    it."""
    name, candidate, state = plan.name, plan.backend, None
    try:
        if inputs.dropout_p:
            state = random_state.now(inputs.q.device)
        output = (
            forward.run(candidate, name, inputs, signature, state, hooked)
            if signature.grad
            else candidate(inputs)
        )
    except Exception as error:
        last = name == plan.candidates.names[-1]
        attempt = forward.Attempt(candidate, name, inputs, signature, state, Stage.RUN, last)
        recovered = forward.recover(error, attempt)
        if recovered is None:
            start = plan.position + 1
            return _first_working(inputs, signature, plan.candidates, start=start, failure=error)
        return recovered, name
    telemetry.calls[name] += 1
    return output, name


def _first_working(
    inputs: AttentionInputs, signature: CallSignature, candidates: Candidates,
    replayed: Optional[str] = None, start: int = 0, failure: Optional[Exception] = None,
    plan_key: Optional[Hashable] = None,
) -> Tuple[Tensor, str]:  # fmt: skip
    """(output, name of its backend): the first candidate that takes the call and works.

    replayed: the backend of a checkpoint's forward, which is used whatever its verdict.
    start: index of the first candidate to try, after `failure` of the one before.
    plan_key: where to keep a plan if no candidate fails.
    """
    verdicts = breakers.by_signature.get(signature)
    if verdicts is None:
        verdicts = breakers.verdicts(signature)
    for name in candidates.names[start:]:
        verdict = verdicts.get(name)
        if verdict is not None and verdict.state is State.OUT and name != replayed:
            if not isinstance(loaded.get(name), Unavailable):
                selection.refuse_if_strict(inputs, signature, name)
            continue
        candidate = loaded.get(name) or backend(name)
        state, stage = None, Stage.WHY_NOT
        try:
            if candidate.why_not(inputs):
                if isinstance(candidate, Unavailable):
                    verdicts[name] = Verdict(State.OUT, candidate.reason)
                continue
            if verdict is None:
                stage = Stage.SELF_CHECK
                if not _passes_self_check(candidate, name, inputs, signature, verdicts):
                    continue
            stage = Stage.RUN
            if inputs.dropout_p:
                state = random_state.now(inputs.q.device)
            hooked = replay.hooked() if signature.grad else None
            output = (
                forward.run(candidate, name, inputs, signature, state, hooked)
                if signature.grad
                else candidate(inputs)
            )
        except Exception as error:
            last = name == candidates.names[-1]
            attempt = forward.Attempt(candidate, name, inputs, signature, state, stage, last)
            recovered = forward.recover(error, attempt)
            if recovered is None:
                failure = error
                continue
            output = recovered
        else:
            telemetry.calls[name] += 1
            if plan_key is not None and failure is None:
                plans.keep(plan_key, inputs, signature, candidates, name)
        if candidates.chosen and name != candidates.names[0]:
            selection.report_pinned(name, inputs, signature)
        return output, name
    selection.refuse(inputs, signature, candidates.names, failure)


def _passes_self_check(
    candidate: Backend, name: str, inputs: AttentionInputs, signature: CallSignature,
    verdicts: Dict[str, Verdict],
) -> bool:  # fmt: skip
    """Self-check a backend before its first call of a signature. Under FLASHBIAS_STRICT a failed
    check raises."""
    if inputs.q.is_cuda:
        autograd_exit.wait_for_autograd()
    if name == LAST_RESORT:
        verdicts[name] = TRUSTED
        return True
    if not selfcheck.possible(inputs):
        return not candidate.needs_self_check
    kept = kept_verdicts.wanted(candidate, signature, name)
    if kept and kept_verdicts.holds(signature, name):
        verdicts[name] = TRUSTED
        return True
    evidence: Dict[str, Any] = {}
    compile_kernels = functools.partial(
        first_compilation.compile_kernels, candidate, signature, inputs
    )
    reason = selfcheck.check(candidate, signature, inputs.rank, evidence, compile_kernels)
    if reason:
        breakers.open(signature, name, reason)
        selection.refuse_if_strict(inputs, signature, name)
        return False
    verdicts[name] = TRUSTED
    if kept:
        kept_verdicts.keep(signature, name, evidence)
    return True


def attend_traced(inputs: AttentionInputs, pinned: Optional[str]) -> Tensor:
    """As attend, inside torch.compile: without self-check, breaker or fallback."""
    if _load_all():
        for name in selection.chosen(pinned).names:
            candidate = loaded[name]
            if not candidate.needs_self_check and not candidate.why_not(inputs):
                return candidate.traced(inputs)
    raise NoBackendError(
        "no backend takes this call under torch.compile; call it uncompiled to see why"
    )


@constant_while_traced
def _load_all() -> bool:
    """Import every backend. torch.compile cannot trace that, so it runs while tracing."""
    for name in selection.MODULES:
        backend(name)
    return True


def reset() -> None:
    """Close every circuit breaker and forget loaded backends (tests)."""
    breakers.close()
    selection.reset()
