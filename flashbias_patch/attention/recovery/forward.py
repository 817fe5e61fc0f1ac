"""After a backend failed in a forward pass: the same again, small chunks, or the next backend."""
from __future__ import annotations

from typing import Any, Optional

from torch import Tensor

from ... import journal, settings
from .. import random_state, selection
from ..backends import reference
from ..breaker import breakers
from ..call_class import Key, describe
from ..inputs import AttentionInputs
from . import backward, errors, guard, replay


def run(candidate: Any, name: str, inputs: AttentionInputs, key: Key, state: Any) -> Tensor:
    """A backend's output for a call that may want gradients, its backward guarded where that is worth it (guard.py)."""
    hooked = replay.hooked()
    if not guard.wanted(name, inputs, hooked is not None):
        return candidate(inputs)  # type: ignore[no-any-return]
    return guard.Call(candidate, name, key, inputs, state, hooked).answer(inputs)


def recover(
    error: Exception, candidate: Any, name: str, inputs: AttentionInputs, key: Key, state: Any
) -> Optional[Tensor]:
    """After a failure: the last resort's output if memory ran out, None if the next is to try. Raises what is not
    survived; `state` is the random state before the backend ran, if there is dropout."""
    if isinstance(error, selection.NoBackendError) or errors.steering(error):
        raise error
    if errors.sticky(error):
        journal.once("sticky", "error", errors.CULPRIT)
        raise error
    random_state.restore(state)
    checkpointed = replay.current()
    if state is not None and checkpointed is not None and checkpointed.replays(name):
        return _same_again(error, candidate, name, inputs, key, state)
    if errors.out_of_memory(error):
        return _least_memory(error, name, inputs, key)
    breakers.open(key, name, errors.first_line(error))
    selection.refuse_if_strict(inputs, key, name, error)
    errors.forget_frames(error)
    return None


def _same_again(
    error: Exception, candidate: Any, name: str, inputs: AttentionInputs, key: Key, state: Any
) -> Tensor:
    """A recomputation with dropout failed. Only the backend of the forward drops the same: it tries once more."""
    backward.make_room(error, inputs)
    reason = f"recomputation with dropout, tried once more: {errors.first_line(error)}"
    journal.fallback(name, describe(key), reason)
    selection.refuse_if_strict(inputs, key, name, error)
    try:
        return run(candidate, name, inputs, key, state)
    except Exception as again:
        if errors.steering(again):
            raise
        backward.raise_failed_twice(again, name, inputs)


def _least_memory(error: Exception, name: str, inputs: AttentionInputs, key: Key) -> Tensor:
    """One more try, with the backend that needs the least. No breaker opens: the next call is fast again."""
    backward.make_room(error, inputs)
    if not settings.current().strict:
        reason = "out of memory: the cache was emptied and the call answered in small chunks by the reference"
        journal.fallback(name, describe(key), reason)
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
    out = reference.backend.attend(inputs, backward.LEAST_BYTES)
    journal.calls[selection.LAST_RESORT] += 1
    return out
