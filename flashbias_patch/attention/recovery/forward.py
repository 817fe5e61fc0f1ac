"""Recovery from a failed forward pass: the same backend again, small chunks, or the next one."""

from __future__ import annotations

from typing import NamedTuple, Optional

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
    """One backend's attempt at a call.

    state: the random state before it, if there is dropout.
    stage: the stage that failed.
    last: no other backend is left.
    """

    candidate: Backend
    name: str
    inputs: AttentionInputs
    signature: CallSignature
    state: Optional[random_state.State] = None
    stage: Stage = Stage.RUN
    last: bool = False


def run(
    candidate: Backend,
    name: str,
    inputs: AttentionInputs,
    signature: CallSignature,
    state: Optional[random_state.State],
    hooked: Optional[replay.Replay],
) -> Tensor:
    """A backend's output for a call that may want gradients, its backward guarded where
    guard.wanted says so.

    hooked: replay.hooked().
    """
    recovers = candidate.recovers
    if (hooked is not None or not recovers) and guard.wanted(candidate, inputs, hooked is not None):
        operands = inputs.tensors()
        call = guard.Call(candidate, name, signature, inputs, operands, state, hooked)
        return call.attend(operands)
    out = candidate.recovering(inputs, backward.of_fused) if recovers else candidate(inputs)
    if out.requires_grad and name not in differentiable.OWN and not inputs.dropout_p:
        return differentiable.attach(out, inputs)
    return out


def recover(error: Exception, attempt: Attempt) -> Optional[Tensor]:
    """Handle a failure: the last resort's output if memory ran out, None if the next backend must
    be tried.

    Raises the error itself if it is the caller's (blame.py), torch's own, or not survivable.
    """
    candidate, name, inputs, signature, state, stage, last = attempt
    if isinstance(error, selection.NoBackendError) or errors.control_flow(error):
        raise error
    if errors.sticky(error):
        telemetry.once("sticky", "error", errors.STICKY_ADVICE)
        raise error
    short = errors.out_of_memory(error)
    verdict = (
        Blame.BACKEND if short else blame.of(error, candidate, inputs, signature, candidate, stage)
    )
    if verdict is Blame.CALLER or verdict is Blame.CONTEXT and last:
        raise error
    random_state.restore(state)
    checkpointed = replay.current()
    if state is not None and checkpointed is not None and checkpointed.replays(name):
        return _same_again(error, attempt)
    if short:
        return _least_memory(error, name, inputs, signature)
    reason = errors.first_line(error)
    if verdict is Blame.CONTEXT:
        telemetry.fallback(
            name, signature.describe(), f"{reason} (this call only: {verdict.value})"
        )
    elif name == selection.LAST_RESORT:
        telemetry.fallback(name, signature.describe(), reason)
    else:
        breakers.open(signature, name, reason)
    selection.refuse_if_strict(inputs, signature, name, error)
    errors.forget_frames(error)
    return None


def _same_again(error: Exception, attempt: Attempt) -> Tensor:
    """Run the same backend once more: in a recomputation only the backend of the forward drops the
    same weights."""
    candidate, name, inputs, signature, state, _, _ = attempt
    backward.make_room(error, inputs)
    reason = f"recomputation with dropout, tried once more: {errors.first_line(error)}"
    telemetry.fallback(name, signature.describe(), reason)
    selection.refuse_if_strict(inputs, signature, name, error)
    try:
        return run(candidate, name, inputs, signature, state, replay.hooked())
    except Exception as again:
        if errors.control_flow(again):
            raise
        backward.raise_failed_twice(again, name, inputs)


def _least_memory(
    error: Exception, name: str, inputs: AttentionInputs, signature: CallSignature
) -> Tensor:
    """Run the backend that needs the least memory. No breaker opens: the next call is fast."""
    backward.make_room(error, inputs)
    if not settings.current().strict:
        reason = (
            "out of memory: the cache was emptied and the call computed in small chunks by "
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
