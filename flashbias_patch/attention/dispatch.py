"""Which backend answers a call, why the others were passed over, and what happens when one fails.

Order matters: the first backend whose `why_not` is empty, and that is right on the self-check's problem,
takes the call. What a backend is out for is kept by class of call (call_class.py): a failure opens that
circuit breaker, so that no later step pays for it again, and the next backend answers from the same random
state.
"""
from __future__ import annotations

import contextvars
import functools
import importlib
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

import torch
from torch import Tensor

from .. import journal, settings
from . import ending, faults, guard, order, random_state, selfcheck
from .call_class import Key, describe, key_of
from .inputs import AttentionInputs

# name -> module of backends/, in order of preference.
MODULES = {
    "triton": "triton_fused",
    "flash": "flash_attention",
    "upstream": "upstream_flashbias",
    "sdpa": "sdpa",
    "reference": "reference",
}
TRUSTED = ""
LAST_RESORT = "reference"  # plain PyTorch: trusted by definition, takes every call, needs the least memory

_loaded: Dict[str, Any] = {}
# class -> backend -> TRUSTED, or the reason why it is out; a backend that is missing has not been tried.
_verdicts: Dict[Key, Dict[str, str]] = {}
# Breakers opened by a backward pass: they wait for the next forward, since what is recomputed until then must
# take the backend that its forward took.
_pending: List[Tuple[Key, str, str]] = []
_script: contextvars.ContextVar[Optional[Script]] = contextvars.ContextVar("flashbias_script", default=None)
_current_graph_task = torch._C._current_graph_task_id
is_compiling = selfcheck.is_compiling
_told: Set[Key] = set()


class NoBackendError(RuntimeError):
    """No backend takes a call; the message lists every backend with its reasons."""


class StartOver(BaseException):
    """A backend failed inside a checkpointed forward, where what it saved before failing cannot be taken back.

    Whoever opened the Script runs the function again. No Exception, so that no layer's own handler sees it.
    """


class Unavailable:
    """Stands for a backend whose module does not import here."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def why_not(self, inputs: AttentionInputs) -> List[str]:
        return [self.reason]

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        raise RuntimeError(self.reason)


def backend(name: str) -> Any:
    """The backend object of that name; importing it for the first time may load triton."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(f"{__package__}.backends.{MODULES[name]}").backend
        except Exception as error:  # a broken installation raises anything, not ImportError alone
            if not faults.survivable(error):
                raise
            _loaded[name] = Unavailable(name, f"does not import here: {faults.first_line(error)}")
            if not isinstance(error, ModuleNotFoundError):
                journal.once(("import", name), "warning", "%s %s", name, _loaded[name].reason)
    return _loaded[name]


def candidates(pinned: Optional[str] = None) -> List[str]:
    """Backend names in the order they are asked.

    An argument pins one; FLASHBIAS_BACKEND puts one first, and under FLASHBIAS_STRICT leaves it alone.
    """
    chosen = pinned or settings.current().backend
    if chosen == "auto":
        return list(MODULES)
    if chosen not in MODULES:
        raise ValueError(f"backend must be one of auto, {', '.join(MODULES)}, got {chosen!r}")
    if pinned or settings.current().strict:
        return [chosen]
    return [chosen, *(name for name in MODULES if name != chosen)]


def reasons_against(inputs: AttentionInputs, name: str, key: Optional[Key] = None) -> List[str]:
    """Why that backend would not take the call; empty if it would (as far as is known without running it)."""
    out = _verdicts.get(key_of(inputs) if key is None else key, {}).get(name)
    return [out] if out else backend(name).why_not(inputs)


def explain(inputs: AttentionInputs) -> Dict[str, List[str]]:
    """{backend: reasons against it} for one call, without running anything."""
    return {name: reasons_against(inputs, name) for name in MODULES}


def attend(inputs: AttentionInputs, pinned: Optional[str] = None) -> Tensor:
    """Answer a call with the first backend that takes it.

    Raises NoBackendError when none does, or, under FLASHBIAS_STRICT, as soon as one fails;
    torch.cuda.OutOfMemoryError when memory does not even suffice for the last resort.
    """
    if is_compiling():
        return _traced(inputs, pinned)
    if _pending and _current_graph_task() == -1:
        _open_pending()
    read = settings.current()
    script = _script.get()
    # A checkpointed forward runs without grad, but who answers it must be able to answer the recomputation.
    key = key_of(inputs) if script is None else key_of(inputs, grad=True)
    names: Iterable[str] = MODULES
    if read.backend != "auto" or pinned is not None:
        names = candidates(pinned)
    elif inputs.q.is_cuda:
        names = _measured(order.fastest(inputs, key[6]), tuple(MODULES))
    return _answer(inputs, key, names)[0] if script is None else script.answer(inputs, key, names)


@functools.lru_cache(maxsize=64)
def _measured(fastest: Tuple[str, ...], names: Tuple[str, ...]) -> Tuple[str, ...]:
    """`names`, those in `fastest` in its order and before the others."""
    first = tuple(name for name in fastest if name in names)
    return first + tuple(name for name in names if name not in first)


def _answer(
    inputs: AttentionInputs, key: Key, names: Iterable[str], replayed: str = ""
) -> Tuple[Tensor, str]:
    """(output, name of the backend that gave it). `replayed` answers whatever its verdict says."""
    verdicts = _verdicts.get(key)
    if verdicts is None:
        verdicts = _verdicts[key] = {}
    for name in names:
        verdict = verdicts.get(name)
        if verdict and name != replayed:
            if type(_loaded.get(name)) is not Unavailable:
                _refuse_if_strict(inputs, key, name)
            continue
        candidate = _loaded.get(name) or backend(name)
        state = None
        try:
            if candidate.why_not(inputs):
                if type(candidate) is Unavailable:
                    verdicts[name] = candidate.reason
                continue
            if verdict is None and not _earns_trust(candidate, name, inputs, key, verdicts):
                continue
            if inputs.dropout_p:
                state = random_state.now(inputs.q.device)
            out = _ask(candidate, name, inputs, key, state) if key[6] else candidate(inputs)
        except Exception as error:
            out = _after(error, name, inputs, key, verdicts, state)
            if out is None:
                continue
        else:
            journal.calls[name] += 1
        if type(names) is list:  # somebody chose (candidates)
            _tell_pin(name, inputs, key)
        return out, name
    raise NoBackendError(_message(inputs, key, names))


def _ask(candidate: Any, name: str, inputs: AttentionInputs, key: Key, state: Any) -> Tensor:
    """A backend's answer to a call that may want gradients, its backward guarded where that is worth it (guard.py)."""
    script = _script.get()
    if script is not None and not script.hooked:
        script = None
    if not guard.wanted(name, inputs, script is not None):
        return candidate(inputs)
    return guard.Call(candidate, name, key, inputs, state, _rescue, script).answer(inputs)


def _rescue(*args: Any) -> Any:
    from . import rescue

    return rescue.of_guarded(*args)


def _tell_pin(name: str, inputs: AttentionInputs, key: Key) -> None:
    """One line where FLASHBIAS_BACKEND asks for a backend and another one answers."""
    pinned = settings.current().backend
    if pinned not in ("auto", name) and key not in _told:
        _told.add(key)
        why = "; ".join(reasons_against(inputs, pinned, key))
        reason = f"FLASHBIAS_BACKEND={pinned} cannot take it ({why}); {name} answers"
        journal.fallback(pinned, describe(key), reason)


def _earns_trust(
    candidate: Any, name: str, inputs: AttentionInputs, key: Key, verdicts: Dict[str, str]
) -> bool:
    """Self-check a backend before its first answer to a class; under FLASHBIAS_STRICT a failed one raises."""
    if inputs.q.is_cuda:
        ending.wait_for_autograd()
    if name == LAST_RESORT:
        verdicts[name] = TRUSTED
        return True
    if name == "triton" and inputs.q.is_cuda:
        from . import rescue
        from .kernels import operator

        operator.on_backward_failure = rescue.on_backward_failure
    if not selfcheck.possible(inputs):
        return name != "upstream"  # ours and torch's are assumed to be right, one known to go wrong is not
    found = selfcheck.check(candidate, key, inputs.rank)
    if found:
        _open(key, name, found)
        _refuse_if_strict(inputs, key, name)
        return False
    verdicts[name] = TRUSTED
    return True


def _after(
    error: Exception, name: str, inputs: AttentionInputs, key: Key, verdicts: Dict[str, str], state: Any
) -> Optional[Tensor]:
    """After a failure: the last resort's answer if memory ran out, None if the next is to try, or raises."""
    if isinstance(error, NoBackendError) or faults.steering(error):
        raise
    if faults.sticky(error):
        journal.once("sticky", "error", faults.CULPRIT)
        raise
    random_state.restore(state)
    script = _script.get()
    if state is not None and script is not None and script.replays(name):
        return _same_again(error, name, inputs, key, state)
    if faults.out_of_memory(error):
        return _least_memory(error, name, inputs, key)
    _open(key, name, faults.first_line(error))
    _refuse_if_strict(inputs, key, name, error)
    faults.forget_frames(error)
    if script is not None and script.recording:
        raise StartOver
    return None


def _same_again(error: Exception, name: str, inputs: AttentionInputs, key: Key, state: Any) -> Tensor:
    """A recomputation with dropout failed. Only the backend of the forward drops the same: it tries once more."""
    from . import rescue

    rescue.make_room(error, inputs)
    reason = f"recomputation with dropout, tried once more: {faults.first_line(error)}"
    journal.fallback(name, describe(key), reason)
    _refuse_if_strict(inputs, key, name, error)
    try:
        return _ask(_loaded[name], name, inputs, key, state)
    except Exception as again:
        if faults.steering(again):
            raise
        rescue.raise_failed_twice(again, name, inputs)


def _refuse_if_strict(
    inputs: AttentionInputs, key: Key, name: str, error: Optional[BaseException] = None
) -> None:
    if settings.current().strict:
        raise NoBackendError(_message(inputs, key, MODULES, f"FLASHBIAS_STRICT: {name} failed. ")) from error


def _least_memory(error: Exception, name: str, inputs: AttentionInputs, key: Key) -> Tensor:
    """One more try, with the backend that needs the least. No breaker opens: the next call is fast again."""
    from . import rescue

    rescue.make_room(error, inputs)
    if not settings.current().strict:
        reason = "out of memory: the cache was emptied and the call answered in small chunks by the reference"
        journal.fallback(name, describe(key), reason)
        script = _script.get()
        if script is not None and script.recording:
            script.next_time_in_small_chunks()
            raise StartOver
        try:
            return _in_small_chunks(inputs)
        except Exception as again:
            error = again
    rescue.raise_with_advice(error, inputs)


def _in_small_chunks(inputs: AttentionInputs) -> Tensor:
    from .rescue import LEAST_BYTES

    out = backend(LAST_RESORT).attend(inputs, LEAST_BYTES)
    journal.calls[LAST_RESORT] += 1
    return out


# -- breakers ----------------------------------------------------------------------------------------------


def _open(key: Key, name: str, reason: str) -> None:
    journal.fallback(name, describe(key), reason)
    if _current_graph_task() == -1 or not reason.startswith("backward"):
        _verdicts.setdefault(key, {})[name] = reason
    else:
        _pending.append((key, name, reason))


def _open_pending() -> None:
    while _pending:
        key, name, reason = _pending.pop()
        _verdicts.setdefault(key, {})[name] = reason


class Script:
    """Which backend answered each attention of a checkpointed function, so that recomputing asks the same.

    `with script:` records the first time and replays every later time, whatever breakers have opened since. The
    first time it may raise StartOver: `rewind()`, and do it again.
    """

    def __init__(self) -> None:
        self.recording = True
        # Whether what is saved for backward goes through the checkpoint's hooks: then forward and recomputation must
        # save alike. A reentrant checkpoint runs its forward without grad.
        self.hooked = False
        self.place = -1  # of the call that is being answered
        self.graphs: Dict[int, Any] = {}  # of guarded calls, from the recomputation to their backward
        self._names: List[str] = []
        self._short_of_memory: Set[int] = set()  # calls to be answered in small chunks
        self._token: Any = None
        self._random_state = random_state.now()

    def __enter__(self) -> Script:
        self.place = -1
        if self.recording:
            self.hooked = torch.is_grad_enabled()
        self._token = _script.set(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _script.reset(self._token)
        self.recording = False

    def rewind(self) -> None:
        """As before the first time, random state included."""
        self.recording = True
        self._names.clear()
        random_state.restore(self._random_state)

    def next_time_in_small_chunks(self) -> None:
        """Have the call that is being answered answered by the last resort from now on."""
        self._short_of_memory.add(self.place)

    def replays(self, name: str) -> bool:
        """Whether the call being answered was answered by that backend in the forward."""
        return not self.recording and self.place < len(self._names) and self._names[self.place] == name

    def answer(self, inputs: AttentionInputs, key: Key, names: Iterable[str]) -> Tensor:
        place = self.place = self.place + 1
        if place in self._short_of_memory:
            self._names.append(LAST_RESORT)
            return _in_small_chunks(inputs)
        if not self.recording and place < len(self._names):
            name = self._names[place]
            return _answer(inputs, key, [name, *(n for n in names if n != name)] if name else names, name)[0]
        self._names.append("")  # stays, where no backend answers and the original code runs
        out, self._names[-1] = _answer(inputs, key, names)
        return out


# -- the rest ----------------------------------------------------------------------------------------------


def _traced(inputs: AttentionInputs, pinned: Optional[str]) -> Tensor:
    """Inside torch.compile: no self-check, breaker or fallback; what can be wrong unchecked is left out."""
    if _load_all():
        for name in candidates(pinned):
            if name != "upstream" and not _loaded[name].why_not(inputs):
                return _loaded[name](inputs)
    raise NoBackendError("no backend takes this call under torch.compile; call it uncompiled to see why")


def _load_all() -> bool:
    """Import every backend: what torch.compile cannot trace, and so runs while it traces."""
    for name in MODULES:
        backend(name)
    return True


# What torch.compiler.assume_constant_result does, which would import all of torch._dynamo.
_load_all._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _message(inputs: AttentionInputs, key: Key, names: Iterable[str], prefix: str = "") -> str:
    lines = [f"{prefix}no attention backend takes this call ({describe(key)}):"]
    for name in names:
        lines.append(f"{name}: {'; '.join(reasons_against(inputs, name, key)) or 'not asked'}")
    return "\n  ".join(lines)


def reset() -> None:
    """Close every circuit breaker and forget loaded backends (tests)."""
    _verdicts.clear()
    _loaded.clear()
    _pending.clear()
    _told.clear()
