"""Hooks into torch's checkpoints: each of them gets a Replay (replay.py).

Saved-tensor hooks, which torch's non-reentrant checkpoint is made of, get theirs when they are
entered, and it is in force while they unpack. torch's reentrant checkpoint becomes non-reentrant
where a learned bias is in force, whose gradient it would lose.

Private handles of torch, seen on 2.6 to 2.14: `CheckpointFunction`, and those that
_torch_internals.py names.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.utils.checkpoint
from torch import Tensor

from ... import _torch_internals as internals
from ..._torch_internals import (
    RELEASE,
    CheckpointHooks,
    RecomputationHooks,
    saved_tensors_hooks,
    tree_map,
)
from ...bias import AttentionBias
from ...bias.tensor.core import to_numbers
from ..checkpointed_weights import for_checkpoint
from .replay import Replay, carried, hooked, innermost, mapped, note_uninstall, restored

_watching = False
_watch_lock = threading.Lock()
# Torch before 1.10 has no such hooks, and so no checkpoint without reentrance.
_enter: Any = getattr(saved_tensors_hooks, "__enter__", None)
_exit: Any = getattr(saved_tensors_hooks, "__exit__", None)
_checkpoint = torch.utils.checkpoint.checkpoint
_CheckpointFunction: Any = getattr(torch.utils.checkpoint, "CheckpointFunction", None)
_BEFORE = "_flashbias_before"


def _none(*args: Any) -> None:
    return None


def watch() -> None:
    """Attach a Replay to every checkpoint from now on."""
    global _watching
    if _watching:
        return
    with _watch_lock:
        _watching = True
        if saved_tensors_hooks is not None:
            saved_tensors_hooks.__enter__ = _enter_watched  # type: ignore[method-assign]
            saved_tensors_hooks.__exit__ = _exit_watched  # type: ignore[method-assign]
        if _CheckpointFunction is not None:
            _CheckpointFunction.apply = classmethod(_apply_checkpoint)


def unwatch() -> None:
    """Put torch's own methods back after an uninstall. Hooks that are in force keep their
    Replay."""
    global _watching
    with _watch_lock:
        note_uninstall()
        if not _watching:
            return
        _watching = False
        if getattr(saved_tensors_hooks, "__enter__", None) is _enter_watched:
            saved_tensors_hooks.__enter__ = _enter  # type: ignore[method-assign]
        if getattr(saved_tensors_hooks, "__exit__", None) is _exit_watched:
            saved_tensors_hooks.__exit__ = _exit  # type: ignore[method-assign]
        apply = vars(_CheckpointFunction or object).get("apply")
        if getattr(apply, "__func__", None) is _apply_checkpoint:
            del _CheckpointFunction.apply


@functools.wraps(_enter or _none)
def _enter_watched(self: Any) -> Any:
    unpack = self.unpack_hook
    # torch.compile puts hooks that are modules into its graphs. A recomputation's own hooks belong
    # to its Replay.
    if (
        internals.is_compiling()
        or isinstance(unpack, torch.nn.Module)
        or isinstance(self, RecomputationHooks)
    ):
        return _enter(self)
    checkpoints = isinstance(self, CheckpointHooks)
    if (
        RELEASE < (2, 1) and getattr(unpack, "__module__", "") == "torch.utils.checkpoint"
    ):  # functions of no class
        if unpack.__name__ == "inner_unpack":
            return _enter(self)
        checkpoints = True
    before = innermost.get()
    replay = Replay(before, checkpoints)
    self.unpack_hook = functools.partial(_unpack, replay, unpack)
    try:
        result = _enter(self)
    finally:
        self.unpack_hook = unpack
    self.__dict__.setdefault(_BEFORE, []).append(before)
    innermost.set(replay)
    return result


@functools.wraps(_exit or _none)
def _exit_watched(self: Any, *args: Any) -> Any:
    if not internals.is_compiling() and self.__dict__.get(_BEFORE):
        innermost.set(self.__dict__[_BEFORE].pop())
    return _exit(self, *args)


def _unpack(replay: Replay, unpack: Callable[[Any], Any], saved: Any) -> Any:
    if replay.hooked:  # other hooks may only have moved the saved tensors, and recompute nothing
        replay.check_patches()
    with restored(replay):
        return unpack(saved)


def _apply_checkpoint(cls: Any, function: Any, preserve_rng_state: Any, *args: Any) -> Any:
    """torch's reentrant checkpoint, or the other kind where a learned bias is in force.

    A reentrant checkpoint finds no tensors that need a gradient beyond its arguments. It stays
    reentrant inside a checkpoint of the other kind: nested, these pass one tensor that was two
    arguments as two tensors, and attention of key and value then saves other tensors than before.
    """
    if RELEASE < (1, 11):  # a described bias that torch saves there comes back as NaN
        args = tree_map(to_numbers, args)
    if (
        torch.is_grad_enabled()
        and hooked() is None
        and any(tensor.requires_grad for tensor in _tensors_in_force())
    ):
        if RELEASE < (1, 11):
            function = for_checkpoint(function)
            return _with_learned_arguments(cls, function, preserve_rng_state, args)
        return _checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )
    function = for_checkpoint(function)
    return super(_CheckpointFunction, cls).apply(function, preserve_rng_state, *args)


def _with_learned_arguments(
    cls: Any, function: Any, preserve_rng_state: Any, args: Tuple[Any, ...]
) -> Any:
    """torch's reentrant checkpoint with more arguments: the tensors that need a gradient and are in
    force, or in lists among its arguments. For torch before 1.11, which has no other kind of
    checkpoint."""
    values = tuple(item.read() for item in carried)
    learned: Dict[int, Tensor] = {}

    def note(tensor: Any) -> Any:
        if tensor.requires_grad:
            learned[id(tensor)] = tensor
        return tensor

    mapped(values, note)
    for argument in args:
        if not isinstance(argument, Tensor):
            tree_map(functools.partial(_each_tensor, note), argument)
    names, count = tuple(learned), len(args)

    def run(*arguments: Any) -> Any:
        own = arguments[:count]
        if not torch.is_grad_enabled():  # the forward
            return function(*own)
        leaves = dict(zip(names, arguments[count:]))

        def leaf(tensor: Any) -> Any:
            return leaves.get(id(tensor), tensor)

        swapped = [
            value
            if isinstance(value, Tensor)
            else tree_map(functools.partial(_each_tensor, leaf), value)
            for value in own
        ]
        before = [item.variable.get() for item in carried]
        for item, value in zip(carried, mapped(values, leaf)):
            item.variable.set(value)
        try:
            return function(*swapped)
        finally:
            for item, value in zip(carried, before):
                item.variable.set(value)

    return super(_CheckpointFunction, cls).apply(run, preserve_rng_state, *args, *learned.values())


def _each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`function` applied to a tensor, or to the tensors of a bias."""
    if isinstance(value, Tensor):
        return function(value)
    return value._map(function) if isinstance(value, AttentionBias) else value


def _tensors_in_force() -> List[Tensor]:
    """The tensors in the values of carried variables."""
    tensors: List[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    mapped((item.read() for item in carried), note)
    return tensors
