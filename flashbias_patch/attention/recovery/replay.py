"""Replays: a checkpointed function finds in the backward pass what it found in the forward pass.

A checkpoint runs its function twice: in the forward pass, and again in the backward pass, when
every `with` block around it has been left, perhaps in another thread. A `Replay` holds what the
function found the first time: the values of the context variables named by `carry`, and the backend
of each attention call. It is attached to the graph, so that it does not matter who wrote the
checkpoint, or by which name it was called:

- A torch.autograd.Function (torch's reentrant checkpoint, fairscale's, DeepSpeed's, Megatron's):
  the Replay is kept by the `ctx` of the Function inside whose forward an attention runs, and is in
  force during its backward.
- Saved-tensor hooks (torch's non-reentrant checkpoint and copies of it): the Replay is in force
  while tensors are unpacked (checkpoint_hooks.py).

Private handles of torch, seen on 2.6 to 2.14: `forward_gradients`, the engine's call of
`ctx.apply`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import weakref
from types import CodeType
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ..._torch_internals import forward_gradients
from . import learned


class Carried(NamedTuple):
    """A context variable whose value a recomputation needs.

    mapped(value, function): the value with `function` applied to its tensors.
    reopen(value): a context manager that restores what belongs to a value beside the variable.
    read(): the value to keep.
    """

    variable: contextvars.ContextVar[Any]
    mapped: Callable[[Any, Callable[[Tensor], Tensor]], Any]
    reopen: Optional[Callable[[Any], Any]]
    read: Callable[[], Any]


PLAIN = (Tensor, torch.nn.Parameter)
carried: List[Carried] = []
_uninstalls = 0
innermost: contextvars.ContextVar[Optional[Replay]] = contextvars.ContextVar(
    "flashbias_replay", default=None
)


def carry(
    variable: contextvars.ContextVar[Any], mapped: Callable[[Any, Callable[[Tensor], Tensor]], Any],
    reopen: Optional[Callable[[Any], Any]] = None, read: Optional[Callable[[], Any]] = None,
) -> None:  # fmt: skip
    """Restore `variable` in every recomputation, as its forward found it. Its default must be None
    or empty."""
    carried.append(Carried(variable, mapped, reopen, variable.get if read is None else read))


class CallRecord(NamedTuple):
    """The way an attention call was computed: by a backend, or by the last resort in small
    chunks."""

    backend: Optional[str]
    small_chunks: bool = False


SMALL_CHUNKS = CallRecord(None, small_chunks=True)


class Progress(NamedTuple):
    """The progress of a run of a checkpointed function: see the attributes of Replay."""

    outer: Optional[Replay]
    recording: bool
    call_index: int
    next_choice: int


class Replay:
    """One checkpointed function: what it found when it began, and what was chosen while it ran.

    The first run records; every later one (`restored`) gets the same backends and the same `once`
    values, whatever breakers have opened since. `outer` is the Replay of the function around it: it
    records too, and where it is being repeated itself, it decides.
    """

    def __init__(self, outer: Optional[Replay], hooked: bool = False) -> None:
        self.outer = outer
        self.values = tuple([item.read() for item in carried])
        # Whether what is saved for backward goes through the hooks of torch's checkpoint: then
        # forward and recomputation must save alike.
        self.hooked = hooked
        self.recording = True
        self.call_index = -1  # of the current attention call
        # Graphs of guarded calls by call index, from the recomputation to their backward.
        self.graphs: Dict[int, Any] = {}
        self.biased = False  # whether a patched class added a bias in it
        self._uninstalls = _uninstalls
        self._versions = _versions(self.values)
        self._calls: List[Optional[CallRecord]] = []  # None: the call failed
        self._small_chunks = False
        self._choices: List[Any] = []
        self._next_choice = 0

    def begin_again(self) -> Progress:
        """Start a recomputation. `resume` gets the result when it is over: the first run may not
        be, where hooks stay open over several forward and backward passes."""
        progress = Progress(self.outer, self.recording, self.call_index, self._next_choice)
        self.resume(Progress(None, False, -1, 0))
        return progress

    def resume(self, progress: Progress) -> None:
        self.outer, self.recording, self.call_index, self._next_choice = progress

    def begin_call(self) -> Optional[CallRecord]:
        """Start an attention call. Returns how it was computed the first time, None if it was
        not."""
        self.call_index += 1
        if self.call_index < len(self._calls):
            return self._calls[self.call_index]
        return None if self.outer is None else self.outer.begin_call()

    def end_call(self, record: Optional[CallRecord]) -> None:
        """End an attention call. `record`: how it was computed, None if it failed."""
        if self._small_chunks:
            self._small_chunks, record = False, SMALL_CHUNKS
        if self.call_index >= len(self._calls):
            self._calls.append(record)
            if self.outer is not None:
                self.outer.end_call(record)

    def note_small_chunks(self) -> None:
        """Memory ran out: the current call is computed in small chunks, now and in every
        recomputation."""
        self._small_chunks = True

    def replays(self, backend: str) -> bool:
        """True if that backend computed the current call the first time."""
        if self.call_index < len(self._calls):
            record = self._calls[self.call_index]
            return record is not None and record.backend == backend
        return self.outer is not None and self.outer.replays(backend)

    def once(self, choose: Callable[[], Any]) -> Any:
        """choose() in the first run, and its result in every later one."""
        if self._next_choice >= len(self._choices):
            self._choices.append(choose() if self.outer is None else self.outer.once(choose))
        self._next_choice += 1
        return self._choices[self._next_choice - 1]

    def note_bias(self) -> None:
        """A patched class adds a bias: without the patches, a recomputation would be without it."""
        self.biased = True
        if not self.recording:
            self._check_unchanged()
        if self.outer is not None:
            self.outer.note_bias()

    def _check_unchanged(self) -> None:
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    "attention_bias: a bias was changed in place after a checkpoint's forward "
                    "pass, so that its "
                    "recomputation would add another one (a tensor of shape "
                    f"{tuple(tensor.shape)} is at version "
                    f"{tensor._version}, expected version {version}); change a copy of it"
                )

    def check_patches(self) -> None:
        if self.biased and self._uninstalls != _uninstalls:
            raise RuntimeError(
                "attention_bias: flashbias_patch was uninstalled after a checkpoint's forward "
                "pass, so that its "
                "recomputation would be without the bias; call uninstall() after the backward pass"
            )

    def repeats(self) -> bool:
        """True if this run is a recomputation."""
        return not self.recording or (self.outer is not None and self.outer.repeats())


def note_uninstall() -> None:
    """The patches were removed: a recomputation that needs them must fail."""
    global _uninstalls
    _uninstalls += 1


def once(choose: Callable[[], Any]) -> Any:
    """choose(), or in a recomputation its result of the first run."""
    replay = current()
    return choose() if replay is None else replay.once(choose)


def recomputing() -> bool:
    """True if this code runs in a recomputation, in a backward pass."""
    replay = current()
    return replay is not None and replay.repeats()


def hooked() -> Optional[Replay]:
    """The current Replay if torch's non-reentrant checkpoint records what is saved for backward."""
    replay = innermost.get()
    return replay if replay is not None and replay.hooked else None


def mapped(values: Iterable[Any], function: Callable[[Tensor], Tensor]) -> Tuple[Any, ...]:
    """Values of the carried variables, with `function` applied to their tensors."""
    return tuple(
        [item.mapped(value, function) if value else value for item, value in zip(carried, values)]
    )


def _versions(values: Iterable[Any]) -> List[Tuple[Tensor, int]]:
    """Every tensor in carried values, with its version, which torch increments at each change in
    place."""
    versions: List[Tuple[Tensor, int]] = []

    def note(tensor: Tensor) -> Tensor:
        if type(tensor) in PLAIN and not internals.is_inference(tensor):
            versions.append((tensor, tensor._version))
        return tensor

    mapped(values, note)
    return versions


class restored:
    """Context manager: puts the carried values and the recorded choices of a Replay in force."""

    __slots__ = ("replay", "values", "_before", "_stack", "_progress")

    def __init__(self, replay: Replay, values: Optional[Tuple[Any, ...]] = None) -> None:
        self.replay = replay
        self.values = replay.values if values is None else values

    def __enter__(self) -> None:
        self._before = [item.variable.get() for item in carried]
        self._before.append(innermost.get())
        self._stack: Optional[contextlib.ExitStack] = None
        self._progress = self.replay.begin_again()
        innermost.set(self.replay)
        for item, value in zip(carried, self.values):
            item.variable.set(value)
            if value and item.reopen is not None:
                if self._stack is None:
                    self._stack = contextlib.ExitStack()
                self._stack.enter_context(item.reopen(value))

    def __exit__(self, *error: object) -> None:
        if self._stack is not None:
            self._stack.close()
        self.replay.resume(self._progress)
        innermost.set(self._before.pop())
        for item, value in zip(carried, self._before):
            item.variable.set(value)


_Context: Any = torch.autograd.function.BackwardCFunction
# Function.apply has a frame on the stack while it is written in Python, as it is before torch 2.14.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
_ATTRIBUTE = "_flashbias_replay"
_forwards: Dict[CodeType, bool] = {}


def in_function() -> bool:
    """True if this code runs inside the forward of a torch.autograd.Function. no_grad alone does
    not count."""
    return not forward_gradients() and not torch.is_inference_mode_enabled()


def current() -> Optional[Replay]:
    """The Replay of the innermost checkpointed function that is running, or None.

    Call it before any carried variable changes: inside the forward of a Function, the first call
    records the values.
    """
    # in_function(), without the call
    if not forward_gradients() and not torch.is_inference_mode_enabled():
        replay = _of_functions()
        if replay is not None:
            return replay
    return innermost.get()


def out_of_reach() -> bool:
    """True if this code runs inside a Function that does not pass its ctx to forward(): the
    recomputation in its backward would find nothing of what is in force now."""
    if not in_function():
        return False
    contexts, complete = _contexts()
    return not complete or not contexts


def repeating() -> bool:
    """True if the values that a forward found are in force again, for a recomputation."""
    replay = innermost.get()
    return replay is not None and replay.repeats()


def _of_functions() -> Optional[Replay]:
    replay = innermost.get()
    contexts, _ = _contexts()
    for context in reversed(contexts):
        parent, replay = replay, context.__dict__.get(_ATTRIBUTE)
        if replay is None:
            replay = Replay(parent)
            context.__dict__[_ATTRIBUTE] = replay
            # The engine calls ctx.apply. A weak reference: ctx must not keep itself, and all that
            # it saves, alive.
            context.apply = functools.partial(_backward, weakref.ref(context))
    return replay


def inside_function() -> bool:
    """True inside the forward of a torch.autograd.Function."""
    return bool(_contexts()[0])


def _contexts() -> Tuple[List[Any], bool]:
    """(the `ctx` of each Function whose forward is on the stack, the innermost first; whether every
    such Function has one)."""
    contexts: List[Any] = []
    complete = True
    inner, frame = None, sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _backward.__code__:  # frames further out belong to the forward of another pass
            break
        if _APPLY is not None:
            forward = inner if code is _APPLY else None
        else:
            forward = frame if _is_forward(code) else None
        if forward is not None:
            context = _context_in(forward)
            complete = complete and context is not None
            if context is not None and context not in contexts:
                contexts.append(context)
        inner, frame = frame, frame.f_back  # type: ignore[assignment]
    return contexts, complete


def _is_forward(code: CodeType) -> bool:
    """True if that is code of some Function's forward. Reading the locals of other frames would
    keep these alive."""
    known = _forwards.get(code)
    if known is None:
        codes, classes = set(), [torch.autograd.Function]
        while classes:
            cls = classes.pop()
            classes += cls.__subclasses__()
            function = cls.forward
            while function is not None:
                codes.add(getattr(function, "__code__", None))
                function = getattr(function, "__wrapped__", None)  # type: ignore[assignment]
        known = _forwards[code] = code in codes
    return known


def _context_in(frame: Any) -> Optional[Any]:
    """`ctx`, the first argument of a Function's forward, or of its decorator; None if it has none
    (setup_context)."""
    for value in frame.f_locals.values():
        if type(value) is tuple and value:
            value, *_ = value
        if isinstance(value, _Context):
            return value
    return None


def _backward(reference: Any, *grads: Any) -> Any:
    """The backward of a Function whose forward contained an attention."""
    context = reference()
    replay = context.__dict__[_ATTRIBUTE]
    replay.check_patches()
    values, leaves = replay.values, None
    if not torch.is_grad_enabled():
        leaves = learned.Leaves()
        values = mapped(values, leaves.of)
    with learned.advising(), restored(replay, values):
        result = type(context).apply(context, *grads)
    if leaves is not None:
        leaves.deliver()
    return result
