"""Finding classes and wrapping them; install and uninstall.

Three ways lead to `claim`: wrapt post-import hooks on the modules of the catalog, the registries of mmcv 1.x and
mmengine, and `repository.Finder` for modules of a user's repository that import flash_attn. What was imported
before install() is found in sys.modules.
"""
from __future__ import annotations

import functools
import inspect
import sys
import threading
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import wrapt

from .. import compat, journal, settings
from ..monitor import hooks as monitor_hooks
from . import catalog, repository, trigger


class Claim(NamedTuple):
    """A wrapped attribute, and what it was: `original` is None where the class only inherited it."""

    owner: type
    attribute: str
    original: Optional[Any]
    wrapper: Any
    seam: str


_lock = threading.RLock()
_claims: List[Claim] = []
_refused: Dict[Tuple[str, str], str] = {}
_installed = False
_hooked = False


def installed() -> bool:
    return _installed


def install() -> None:
    """Patch what is imported already and all that will be. Calling it again does nothing."""
    global _installed, _hooked
    with _lock:
        if _installed:
            return
        _installed = True
        if not _hooked:  # wrapt has no way to take a hook back: the hooks ask `_installed` instead
            for module in catalog.MODULES:
                wrapt.register_post_import_hook(_on_module, module)
            for module in catalog.REGISTRIES:
                wrapt.register_post_import_hook(_on_registry, module)
            for module in compat.MODULES:
                wrapt.register_post_import_hook(_on_library, module)
            for module in monitor_hooks.MODULES:
                wrapt.register_post_import_hook(monitor_hooks.register, module)
            wrapt.register_post_import_hook(_shield_from_dynamo, "torch._dynamo")
            _hooked = True
        else:
            _each_loaded(catalog.REGISTRIES, _on_registry)
            _each_loaded(compat.MODULES, _on_library)
        repository.Finder.enable(_on_module)
    if "torch" in sys.modules:
        for loaded in list(sys.modules.values()):
            _on_module(loaded)


def uninstall() -> None:
    """Put the very same objects back. Classes imported later stay as they are."""
    global _installed
    with _lock:
        _installed = False
        trigger.disarm()
        repository.Finder.disable()
        compat.uninstall()
        for claim in reversed(_claims):
            if vars(claim.owner).get(claim.attribute) is not claim.wrapper:
                journal.logger().warning("%s.%s was replaced by someone else since: left as it is",
                                       claim.owner.__qualname__, claim.attribute)
            elif claim.original is None:
                delattr(claim.owner, claim.attribute)
            else:
                setattr(claim.owner, claim.attribute, claim.original)
        _claims.clear()
        _refused.clear()


def _each_loaded(names: Any, hook: Callable[[Any], None]) -> None:
    for name in names:
        if name in sys.modules:
            hook(sys.modules[name])


def _on_module(module: Any) -> None:
    """Claim every target among a module's own names."""
    if not _installed:
        return
    names = catalog.targets()
    for value in list(getattr(module, "__dict__", {}).values()):
        # not isinstance: some modules hold objects whose __class__ answers with a deprecation warning
        if issubclass(type(value), type) and value.__name__ in names and not value.__module__.startswith("torch."):
            claim(value)


def _on_library(module: Any) -> None:
    """A library that a compatibility patch waits for."""
    if _installed:
        compat.on_module(module)


def _on_registry(module: Any) -> None:
    """Watch a Registry class: whatever it registers is considered."""
    registry = getattr(module, catalog.REGISTRIES[module.__name__], None)
    original = getattr(registry, "_register_module", None)
    if not _installed or original is None or _is_patched(original):
        return

    def register(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        cls = args[0] if args else kwargs.get("module", kwargs.get("module_class"))
        if _installed and inspect.isclass(cls) and catalog.target_of(cls) is not None:
            claim(cls)
            # The core it calls lives in the globals of the module that defines it, under its own name.
            _on_module(sys.modules.get(cls.__module__))
        return result

    _wrap(registry, "_register_module", register, "registry")


def claim(cls: type) -> bool:
    """Wrap the methods of `cls` with the seams of its target, if it has the target's shape. Never raises."""
    try:
        return _claim(cls)
    except Exception as error:
        _refused[cls.__module__, cls.__qualname__] = f"{type(error).__name__}: {error}"
        journal.once(("claim", cls), "error", "%s.%s is left unpatched: %s: %s",
                     cls.__module__, cls.__qualname__, type(error).__name__, error)
        return False


def _claim(cls: type) -> bool:
    target = catalog.target_of(cls)
    if target is None:
        return False
    narrowed = settings.current().targets
    if narrowed and target.name not in narrowed:
        return False
    with _lock:
        why = catalog.misfit(cls, target)
        if why is not None:
            _refused[cls.__module__, cls.__qualname__] = why
            return False
        from . import seams  # imports torch, which whoever defines such a class has imported by now

        for method, seam in (("forward", target.seam), *target.others):
            found = inspect.getattr_static(cls, method, None)
            if found is not None and not _is_patched(found):
                _wrap(cls, method, seams.SEAMS[seam](cls), seam)  # not where it, or the one inherited, is wrapped
        _refused.pop((cls.__module__, cls.__qualname__), None)
    journal.once(("patched", cls), "info", "patched %s.%s", cls.__module__, cls.__qualname__)
    return True


def _wrap(owner: Any, attribute: str, wrapper: Callable[..., Any], seam: str) -> None:
    original = vars(owner).get(attribute)
    wrapped = _patched_function(inspect.getattr_static(owner, attribute), wrapper)
    setattr(owner, attribute, wrapped)
    _claims.append(Claim(owner, attribute, original, wrapped, seam))


def _patched_function(original: Any, seam: Callable[..., Any]) -> Any:
    """A function that hands a call of the method `original` to `seam`.

    Not a wrapt.FunctionWrapper: torch.compile takes that for the function it wraps and runs the original code.
    """

    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(seam, original, self, args, kwargs)

    patched.__flashbias_seam__ = seam  # type: ignore[attr-defined]
    return patched


def _is_patched(function: Any) -> bool:
    return hasattr(function, "__flashbias_seam__")


def _call(seam: Callable[..., Any], original: Any, instance: Any, args: Any, kwargs: Any) -> Any:
    # Bound here, where torch.compile does not look: it cannot trace __get__ before torch 2.7.
    return seam(original.__get__(instance, type(instance)), instance, args, kwargs)


def _shield_from_dynamo(dynamo: Any) -> None:
    """torch.compile breaks its graph at a patched call and leaves what is inside to run as it is."""
    global _call
    _call = dynamo.disable(_call)


def patched() -> List[Dict[str, str]]:
    """What is wrapped now: class, module and seam."""
    with _lock:
        return [
            {"class": c.owner.__qualname__, "module": c.owner.__module__, "seam": c.seam}
            for c in _claims
            if c.seam != "registry"
        ]


def refused() -> List[Dict[str, str]]:
    """Classes that bear a target's name and are left alone, with the reason."""
    with _lock:
        return [{"class": name, "module": module, "reason": why} for (module, name), why in _refused.items()]
