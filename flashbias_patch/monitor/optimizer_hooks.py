"""Register hooks before and after every optimizer step.

torch 2.0 and later has such hooks. For older versions, the `step` of each optimizer class is
wrapped while a hook is registered. If a learning-rate scheduler has set a `step` on the optimizer
object, that one is wrapped.
"""

from __future__ import annotations

import functools
import gc
from typing import Any, Callable, Dict, List, Tuple

from torch.optim import optimizer as module

from .._torch_internals import HOOK_FOR_PROFILE

Hook = Callable[[Any, Tuple[Any, ...], Dict[str, Any]], None]
_hooks: Dict[int, Tuple[bool, Hook]] = {}  # number -> (True: before the step, hook)
_wrapped: List[Tuple[Any, Any, Any]] = []  # (class or object, its wrapped step, the original)
_running: List[int] = []  # ids of optimizers inside a step; it may call the step of a parent class
_for_profile: Any = getattr(module.Optimizer, HOOK_FOR_PROFILE, None)


def register(before: bool, hook: Hook) -> Any:
    """Call hook(optimizer, args, kwargs) before (or after) each step; return a handle with
    remove()."""
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
    for candidate in gc.get_objects():
        if issubclass(type(candidate), module.Optimizer):
            _wrap(candidate)
    if _for_profile is not None:
        setattr(module.Optimizer, HOOK_FOR_PROFILE, _watch_new)


def _watch_new(self: Any) -> Any:
    """Replace Optimizer._hook_for_profile, which every constructor calls, to wrap new classes
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
        step_args = args if isinstance(owner, type) else (owner, *args)
        _running.append(id(optimizer))
        try:
            _call(True, optimizer, step_args, kwargs)
            result = original(*args, **kwargs)
            _call(False, optimizer, step_args, kwargs)
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
        # If other code has wrapped it since, it stays; without hooks it does nothing.
        if vars(owner).get("step") is wrapper:
            owner.step = original
    if getattr(module.Optimizer, HOOK_FOR_PROFILE, None) is _watch_new:
        setattr(module.Optimizer, HOOK_FOR_PROFILE, _for_profile)
