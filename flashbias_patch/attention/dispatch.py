"""Which backend answers a call, why the others were passed over, and what happens when one fails.

Order matters: the first backend whose `why_not` is empty, and that is right on the self-check's problem,
takes the call. What a backend is out for is kept by class of call (call_class.py): a failure opens that
circuit breaker, so that no later step pays for it again, and the next backend answers from the same random
state.
"""
from __future__ import annotations

import contextvars
import importlib
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

import torch
from torch import Tensor

from .. import journal, settings
from . import faults, selfcheck
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
LEAST_BYTES = 32 << 20  # of scores at once, when memory has run out

_loaded: Dict[str, Any] = {}
# class -> backend -> TRUSTED, or the reason why it is out; a backend that is missing has not been tried.
_verdicts: Dict[Key, Dict[str, str]] = {}
# Breakers opened by a backward pass: they wait for the next forward, since what is recomputed until then must
# take the backend that its forward took.
_pending: List[Tuple[Key, str, str]] = []
_script: contextvars.ContextVar[Optional[Script]] = contextvars.ContextVar("flashbias_script", default=None)
_current_graph_task = torch._C._current_graph_task_id
is_compiling = getattr(torch.compiler, "is_compiling", lambda: False)  # since torch 2.3
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
    names: Iterable[str] = MODULES if read.backend == "auto" and pinned is None else candidates(pinned)
    script = _script.get()
    if script is None:
        return _answer(inputs, key_of(inputs), names)[0]
    # A checkpointed forward runs without grad, but who answers it must be able to answer the recomputation.
    return script.answer(inputs, key_of(inputs, grad=True), names)


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
                state = _random_state(inputs.q.device)
            out = candidate(inputs)
        except Exception as error:
            out = _after(error, name, inputs, key, verdicts, state)
            if out is None:
                continue
        else:
            journal.calls[name] += 1
        if names is not MODULES:
            _tell_pin(name, inputs, key)
        return out, name
    raise NoBackendError(_message(inputs, key, names))


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
    if name == LAST_RESORT:
        verdicts[name] = TRUSTED
        return True
    if name == "triton" and inputs.q.is_cuda:
        from .kernels import operator

        operator.on_backward_failure = on_backward_failure
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
    _restore_random_state(state)
    if faults.out_of_memory(error):
        return _least_memory(error, name, inputs, key)
    _open(key, name, faults.first_line(error))
    _refuse_if_strict(inputs, key, name, error)
    script = _script.get()
    if script is not None and script.recording:
        raise StartOver
    return None


def _refuse_if_strict(
    inputs: AttentionInputs, key: Key, name: str, error: Optional[BaseException] = None
) -> None:
    if settings.current().strict:
        raise NoBackendError(_message(inputs, key, MODULES, f"FLASHBIAS_STRICT: {name} failed. ")) from error


def _least_memory(error: Exception, name: str, inputs: AttentionInputs, key: Key) -> Tensor:
    """One more try, with the backend that needs the least. No breaker opens: the next call is fast again."""
    faults.forget_frames(error)
    if inputs.q.is_cuda:
        torch.cuda.empty_cache()
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
            if not faults.out_of_memory(again):
                raise
            error = again
    kind = MemoryError if isinstance(error, MemoryError) else torch.cuda.OutOfMemoryError
    raise kind(faults.memory_advice(error, inputs)) from error


def _in_small_chunks(inputs: AttentionInputs) -> Tensor:
    out = backend(LAST_RESORT).attend(inputs, LEAST_BYTES)
    journal.calls[LAST_RESORT] += 1
    return out


def on_backward_failure(call: Any, grad_out: Tensor, error: BaseException) -> Tuple[Any, ...]:
    """The fused operator's backward raised `error`: the gradients by plain PyTorch, and the breaker opens.

    `call` is kernels.recompute.Call, which knows what the forward's dropout drew. The breaker waits for the
    next forward: layers still to be recomputed in this pass take the backend that their forward took.
    """
    from .kernels import recompute

    if selfcheck.owns(call.q, call.k):
        raise error
    if not faults.survivable(error):
        if faults.sticky(error):
            journal.once("sticky", "error", faults.CULPRIT)
        raise error
    inputs = AttentionInputs(
        *call[:6], tuple(call.segment_lengths) or None, call.dense, call.mask, call.key_padding,
        call.dropout_p, call.scale,
    )  # type: ignore[call-arg]  # fmt: skip
    key, name = key_of(inputs, grad=True), "triton"
    usual = recompute.CHUNK_ELEMENTS
    if faults.out_of_memory(error):
        faults.forget_frames(error)
        if inputs.q.is_cuda:
            torch.cuda.empty_cache()
        recompute.CHUNK_ELEMENTS = min(usual, LEAST_BYTES // 4)
        reason = "out of memory in backward: gradients were computed in small chunks by plain PyTorch"
        journal.fallback(name, describe(key), reason)
    else:
        _open(key, name, f"backward: {faults.first_line(error)}")
    _refuse_if_strict(inputs, key, name, error)
    try:
        return recompute.plain_backward(call, grad_out)
    except Exception as again:
        if not faults.out_of_memory(again):
            raise
        raise torch.cuda.OutOfMemoryError(faults.memory_advice(again, inputs)) from again
    finally:
        recompute.CHUNK_ELEMENTS = usual


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
        self._names: List[str] = []
        self._short_of_memory: Set[int] = set()  # calls to be answered in small chunks
        self._next = 0
        self._token: Any = None
        self._random_state = _random_state()

    def __enter__(self) -> Script:
        self._next = 0
        self._token = _script.set(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _script.reset(self._token)
        self.recording = False

    def rewind(self) -> None:
        """As before the first time, random state included."""
        self.recording = True
        self._names.clear()
        _restore_random_state(self._random_state)

    def next_time_in_small_chunks(self) -> None:
        """Have the call that is being answered answered by the last resort from now on."""
        self._short_of_memory.add(self._next - 1)

    def answer(self, inputs: AttentionInputs, key: Key, names: Iterable[str]) -> Tensor:
        place, self._next = self._next, self._next + 1
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


RandomState = Tuple[Tensor, Optional[Tensor], Optional[torch.device]]


def _random_state(device: Optional[torch.device] = None) -> RandomState:
    """Of the CPU and of one CUDA device (default: the current one). Neither synchronises."""
    cpu = torch.get_rng_state()
    if not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return cpu, None, None
    device = device if device is not None and device.type == "cuda" else torch.device("cuda")
    return cpu, torch.cuda.get_rng_state(device), device


def _restore_random_state(state: Optional[RandomState]) -> None:
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None and state[2] is not None:
            torch.cuda.set_rng_state(state[1], state[2])


def reset() -> None:
    """Close every circuit breaker and forget loaded backends (tests)."""
    _verdicts.clear()
    _loaded.clear()
    _pending.clear()
    _told.clear()
