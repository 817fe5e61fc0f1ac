"""After a backend failed in a forward pass: the same again, small chunks, or the next backend."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

from torch import Tensor

from ... import settings, telemetry
from .. import chunked_attention, differentiable, random_state, selection
from ..backends import reference
from ..backends.base import Backend
from ..breaker import breakers
from ..inputs import AttentionInputs
from ..signature import CallSignature
from . import backward, blame, errors, guard, replay
from .blame import Blame, Stage


class Attempt(NamedTuple):
    """One backend's try at a call."""

    candidate: Backend
    name: str
    inputs: AttentionInputs
    signature: CallSignature
    state: Any = None  # the random state before the backend ran, if there is dropout
    stage: Stage = Stage.RUN  # what it failed in
    last: bool = False  # no other backend is to try


def run(
    candidate: Backend,
    name: str,
    inputs: AttentionInputs,
    signature: CallSignature,
    state: Any,
    hooked: Optional[replay.Replay],
) -> Tensor:
    """A backend's output for a call that may want gradients, its backward guarded where that is
    worth it (guard.py).

    hooked: replay.hooked().
    """
    if guard.wanted(candidate, inputs, hooked is not None):
        return guard.Call(candidate, name, signature, inputs, state, hooked).attend(inputs)
    if candidate.recovers:
        out = candidate.recovering(inputs, backward.of_fused)
    else:
        out = candidate(inputs)
    if out.requires_grad and name not in differentiable.OWN and not inputs.dropout_p:
        return differentiable.attach(out, inputs)
    return out


def recover(error: Exception, attempt: Attempt) -> Optional[Tensor]:
    """After a failure: the last resort's output if memory ran out, None if the next backend is to
    try.

    Raises the error itself where it is the caller's (blame.py), torch's own or not survived.
    """
    candidate, name, inputs, signature, state, stage, last = attempt
    if isinstance(error, selection.NoBackendError) or errors.steering(error):
        raise error
    if errors.sticky(error):
        telemetry.once("sticky", "error", errors.CULPRIT)
        raise error
    short = errors.out_of_memory(error)
    found = (
        Blame.BACKEND if short else blame.of(error, candidate, inputs, signature, candidate, stage)
    )
    if found is Blame.CALLER or found is Blame.CONTEXT and last:
        raise error
    random_state.restore(state)
    checkpointed = replay.current()
    if state is not None and checkpointed is not None and checkpointed.replays(name):
        return _same_again(error, attempt)
    if short:
        return _least_memory(error, name, inputs, signature)
    reason = errors.first_line(error)
    if found is Blame.CONTEXT:
        telemetry.fallback(name, signature.describe(), f"{reason} (this call only: {found.value})")
    elif name == selection.LAST_RESORT:
        telemetry.fallback(name, signature.describe(), reason)
    else:
        breakers.open(signature, name, reason)
    selection.refuse_if_strict(inputs, signature, name, error)
    errors.forget_frames(error)
    return None


def _same_again(error: Exception, attempt: Attempt) -> Tensor:
    """A recomputation with dropout failed. Only the backend of the forward drops the same: it tries
    once more."""
    candidate, name, inputs, signature, state, _, _ = attempt
    backward.make_room(error, inputs)
    reason = f"recomputation with dropout, tried once more: {errors.first_line(error)}"
    telemetry.fallback(name, signature.describe(), reason)
    selection.refuse_if_strict(inputs, signature, name, error)
    try:
        return run(candidate, name, inputs, signature, state, replay.hooked())
    except Exception as again:
        if errors.steering(again):
            raise
        backward.raise_failed_twice(again, name, inputs)


def _least_memory(
    error: Exception, name: str, inputs: AttentionInputs, signature: CallSignature
) -> Tensor:
    """One more try, with the backend that needs the least. No breaker opens: the next call is fast
    again."""
    backward.make_room(error, inputs)
    if not settings.current().strict:
        reason = (
            "out of memory: the cache was emptied and the call answered in small chunks by "
            "the reference"
        )
        telemetry.fallback(name, signature.describe(), reason)
        checkpointed = replay.current()
        if checkpointed is not None:
            checkpointed.note_small_chunks()
        try:
            return in_small_chunks(inputs)
        except Exception as again:
            error = again
    backward.raise_with_advice(error, inputs)


def in_small_chunks(inputs: AttentionInputs) -> Tensor:
    """The last resort's output, with the least memory."""
    out = reference.backend.attend(inputs, chunked_attention.LEAST_BYTES)
    telemetry.calls[selection.LAST_RESORT] += 1
    return out
