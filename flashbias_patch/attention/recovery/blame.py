"""Blame: whether an error raised inside a backend's call is the backend's, or the caller's.

Code of the caller runs inside a backend's call: saved-tensor hooks, dispatch and function modes,
signal handlers, tensor subclasses. Its exceptions must reach the caller, and no breaker may open
for them. So where such code may have raised, the self-check and then the call itself are repeated
without it: if both pass, the error is not the backend's.
"""

from __future__ import annotations

import enum
import functools
import signal
import sys
from types import CodeType, FrameType, TracebackType
from typing import Any, Callable, Iterator, List, Optional, Set

import torch
from torch import Tensor

from ... import _torch_internals as internals
from .. import random_state, selfcheck
from ..backends.base import Backend
from ..inputs import AttentionInputs
from ..signature import CallSignature

PLAIN = (Tensor, torch.nn.Parameter)
# Top-level packages that backends consist of. Exceptions from other code count as the caller's
# until a repetition shows otherwise.
BACKENDS = {
    "flashbias_patch",
    "torch",
    "triton",
    "flash_attn",
    "flash_attn_interface",
    "flash_bias_triton",
    "cutlass",
    "quack",
}
# Modules that call backends.
CALLERS = (
    f"{__package__}.forward",
    f"{__package__}.guard",
    __package__.rsplit(".", 1)[0] + ".dispatch",
)
# Modules of torch whose functions run as the caller's hooks.
HOOKS = ("torch.utils.checkpoint", "torch.autograd.graph")
# the function of torch.autograd.graph that every backward pass goes through: no hook
ENGINE = "_engine_run_backward"


class Blame(enum.Enum):
    BACKEND = "the backend fails away from the caller's context too"
    CALLER = "the caller's own code raised"
    CONTEXT = "the backend fails only in the caller's modes or on tensors of the caller's kind"


class Stage(enum.Enum):
    """The stage of a call in which a backend failed."""

    WHY_NOT = "why_not"
    SELF_CHECK = "self-check"
    RUN = "the call"


def of(
    error: BaseException,
    candidate: Backend,
    inputs: AttentionInputs,
    signature: CallSignature,
    repeat: Callable[[AttentionInputs], Any],
    stage: Stage = Stage.RUN,
) -> Blame:
    """Decide whose error it is. `repeat` repeats the call on other inputs."""
    callbacks = _callbacks(inputs)
    callers = any(
        frame.f_code in callbacks or _foreign(frame.f_globals.get("__name__") or "", candidate)
        for frame in _frames(error.__traceback__)
    ) or any(tensor is not None and internals.is_inference(tensor) for tensor in inputs.tensors())
    if not callers and not _unusual(inputs):
        return Blame.BACKEND
    state = random_state.now(inputs.q.device)
    try:
        with selfcheck.undisturbed(inputs.q.device):
            plain = _plain(inputs)
            if stage is Stage.WHY_NOT:  # reasons against the call are no failure
                candidate.why_not(inputs if plain is None else plain)
            elif selfcheck.check(candidate, signature, inputs.rank):
                return Blame.BACKEND
            elif stage is Stage.RUN and plain is not None:
                repeat(plain)
    except Exception:
        return Blame.BACKEND
    finally:
        random_state.restore(state)
    return Blame.CALLER if callers else Blame.CONTEXT


def _frames(trace: Optional[TracebackType]) -> Iterator[FrameType]:
    """The frames that an exception passed, from the backend's call on.

    An exception object that was raised before still carries its frames of that time, behind the new
    ones: they do not count.
    """
    inside = False
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__") or ""
        ours = module in CALLERS
        if inside and ours:
            return
        inside = not ours
        if trace.tb_frame.f_code.co_name != ENGINE:
            yield trace.tb_frame
        trace = trace.tb_next


def _callbacks(inputs: AttentionInputs) -> Set[CodeType]:
    """The code of the caller's functions that torch or Python may call inside a backend's call."""
    callbacks: List[Any] = [signal.getsignal(number) for number in signal.valid_signals()]
    if internals.saved_tensor_hooks is not None:
        callbacks += internals.saved_tensor_hooks(True) or ()
    owners: List[Any] = [type(mode) for mode in internals.modes()]
    owners += [
        type(tensor)
        for tensor in inputs.tensors()
        if tensor is not None and type(tensor) not in PLAIN
    ]
    callbacks += [
        getattr(owner, name, None)
        for owner in owners
        for name in ("__torch_dispatch__", "__torch_function__")
    ]
    for function in tuple(callbacks):
        if isinstance(function, functools.partial):  # as checkpoint_hooks.py wraps hooks
            callbacks += [function.func, *function.args]
        elif not isinstance(function, type):
            callbacks.append(vars(type(function)).get("__call__"))  # an object that can be called
    codes = [getattr(function, "__code__", None) for function in callbacks]
    return {code for code in codes if isinstance(code, CodeType)}


def _foreign(module: str, candidate: Backend) -> bool:
    """True if a module is not part of a backend."""
    top = module.split(".")[0]
    if module in HOOKS:
        return True
    if top in BACKENDS or top in _standard_library() or not module:
        return False
    return all(module != cls.__module__ for cls in type(candidate).__mro__)


def _standard_library() -> Set[str]:
    names = getattr(sys, "stdlib_module_names", None)  # since Python 3.10
    return (
        set(sys.builtin_module_names) | {"contextlib", "functools", "importlib"}
        if names is None
        else names
    )


def _unusual(inputs: AttentionInputs) -> bool:
    """True if modes are in force, or an operand is not a plain tensor."""
    if internals.dispatch_modes() or internals.function_modes():
        return True
    return any(tensor is not None and type(tensor) not in PLAIN for tensor in inputs.tensors())


def _plain(inputs: AttentionInputs) -> Optional[AttentionInputs]:
    """The same call on detached operands; None where one is of a tensor subclass."""
    tensors = []
    for tensor in inputs.tensors():
        if tensor is not None:
            if type(tensor) not in PLAIN:
                return None
            needs = tensor.requires_grad
            tensor = tensor.clone() if internals.is_inference(tensor) else tensor.detach()
            tensor.requires_grad_(needs)
        tensors.append(tensor)
    return inputs.with_tensors(tensors)
