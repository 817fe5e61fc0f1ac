"""Hooks before and after every optimizer's step: torch's own, and for torch before 2.0, which has
none, a stand-in.

The stand-in wraps the `step` of each optimizer class while a hook is registered. An optimizer whose
learning-rate scheduler has put a `step` on the object itself is wrapped there.
"""

from __future__ import annotations

import functools
import gc
from typing import Any, Callable, Dict, List, Tuple

from torch.optim import optimizer as module

from .._torch_internals import HOOK_FOR_PROFILE

Hook = Callable[[Any, Tuple[Any, ...], Dict[str, Any]], None]
_hooks: Dict[int, Tuple[bool, Hook]] = {}  # by number: whether before the step, and the hook
_wrapped: List[Tuple[Any, Any, Any]] = []  # (class or object, what is its step now, what was)
_running: List[int] = []  # ids of optimizers inside a step, which may call that of a parent class
_for_profile: Any = getattr(module.Optimizer, HOOK_FOR_PROFILE, None)


def register(before: bool, hook: Hook) -> Any:
    """Call hook(optimizer, args, kwargs) around each step from now on; returns an object whose
    remove() ends that."""
    name = "register_optimizer_step_pre_hook" if before else "register_optimizer_step_post_hook"
    own = getattr(module, name, None)
    return _Handle(before, hook) if own is None else own(hook)


class _Handle:
    def __init__(self, before: bool, hook: Hook) -> None:
        if not _hooks:
            _wrap_all()
        self.number = max(_hooks, default=0) + 1
        _hooks[self.number] = before, hook

    def remove(self) -> None:
        _hooks.pop(self.number, None)
        if not _hooks:
            _unwrap_all()


def _wrap_all() -> None:
    classes = [module.Optimizer]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        _wrap(cls)
    for found in gc.get_objects():
        if issubclass(type(found), module.Optimizer):
            _wrap(found)
    if _for_profile is not None:
        setattr(module.Optimizer, HOOK_FOR_PROFILE, _watch_new)


def _watch_new(self: Any) -> Any:
    """In place of what the constructor of every optimizer calls: classes that are new are wrapped
    too."""
    result = _for_profile(self)
    for cls in type(self).__mro__:
        _wrap(cls)
    return result


def _wrap(owner: Any) -> None:
    original = vars(owner).get("step")
    if (
        not callable(original)
        or hasattr(original, "__flashbias_step__")
        or owner is module.Optimizer
    ):
        return

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer = args[0] if isinstance(owner, type) else owner
        if id(optimizer) in _running:
            return original(*args, **kwargs)
        given = args if isinstance(owner, type) else (owner, *args)
        _running.append(id(optimizer))
        try:
            _call(True, optimizer, given, kwargs)
            result = original(*args, **kwargs)
            _call(False, optimizer, given, kwargs)
        finally:
            _running.remove(id(optimizer))
        return result

    step.__flashbias_step__ = True  # type: ignore[attr-defined]
    owner.step = step
    _wrapped.append((owner, step, original))


def _call(before: bool, optimizer: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
    for when, hook in tuple(_hooks.values()):
        if when is before:
            hook(optimizer, args, kwargs)


def _unwrap_all() -> None:
    while _wrapped:
        owner, wrapper, original = _wrapped.pop()
        if (
            vars(owner).get("step") is wrapper
        ):  # else somebody has wrapped it since, and it does nothing more
            owner.step = original
    if getattr(module.Optimizer, HOOK_FOR_PROFILE, None) is _watch_new:
        setattr(module.Optimizer, HOOK_FOR_PROFILE, _for_profile)
