"""Find classes and wrap their methods; install and uninstall.

A class is claimed (`claim`) from three places: wrapt post-import hooks on the modules of the
catalog, the registries of mmcv 1.x and mmengine, and `import_shim.Finder` for modules of a user's
repository that import flash_attn. wrapt calls a hook at the first import only; the Finder sees a
module that is reloaded, or purged from sys.modules and imported again. Modules that were imported
before install() are found in sys.modules.

Wrapped classes are recorded by weak references, so that they can be freed.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import wrapt

from .. import compat, environment, settings, summary, telemetry
from ..monitor import runner_hooks
from . import catalog, deferred_install, import_shim


class Claim(NamedTuple):
    """A wrapped attribute, by weak references to the class and to the wrapper that its attribute
    holds."""

    class_ref: Callable[[], Optional[type]]
    attribute: str
    wrapper_ref: Callable[[], Optional[Any]]
    seam: str

    @property
    def owner(self) -> Optional[type]:
        """The class; None once it is gone."""
        return self.class_ref()


_lock = threading.RLock()
_claims: List[Claim] = []
_refused: Dict[Tuple[str, str], str] = {}
_installed = False
_hooked = False
_checked = False


def installed() -> bool:
    return _installed


def install() -> None:
    """Patch the classes of imported modules, and those of later imports. Calling it again does
    nothing."""
    global _installed, _hooked
    with _lock:
        if _installed:
            return
        _installed = True
        if not _hooked:
            # wrapt cannot remove a hook, so the hooks check `_installed`.
            for module in _HOOKS:
                wrapt.register_post_import_hook(_on_import, module)
            wrapt.register_post_import_hook(_shield_from_dynamo, "torch._dynamo")
            _hooked = True
        else:
            for module in _HOOKS:
                if module in sys.modules:
                    _on_import(sys.modules[module])
        import_shim.Finder.enable(_on_import, _HOOKS)
        _check_environment()
        if settings.current().summary:
            summary.at_exit()
    if "torch" in sys.modules:
        for loaded in list(sys.modules.values()):
            _on_module(loaded)


def uninstall() -> None:
    """Put the original objects back. Classes that are imported later are not patched."""
    global _installed, _checked
    with _lock:
        _installed = _checked = False
        deferred_install.disarm()
        import_shim.Finder.disable()
        compat.uninstall()
        hooks = sys.modules.get("flashbias_patch.attention.recovery.checkpoint_hooks")
        if hooks is not None:
            hooks.unwatch()
        for claim in reversed(_claims):
            owner, wrapper = claim.owner, claim.wrapper_ref()
            if owner is None:
                continue
            if wrapper is None or vars(owner).get(claim.attribute) is not wrapper:
                telemetry.logger().warning(
                    "%s.%s was replaced by other code after patching: left as it is",
                    owner.__qualname__,
                    claim.attribute,
                )
            elif wrapper.__flashbias_original__ is None:
                delattr(owner, claim.attribute)
            else:
                setattr(owner, claim.attribute, wrapper.__flashbias_original__)
        _claims.clear()
        _refused.clear()


def _check_environment() -> None:
    """Log unknown classes, patches and options in FLASHBIAS_* variables.

    Loading a third party's targets may import torch, and this may run during the import of torch:
    then the check waits for the first patched module.
    """
    global _checked
    if not _checked and ("torch" in sys.modules or not environment.loads_third_parties()):
        _checked = True
        telemetry.environment(environment.problems())


def _on_import(module: Any) -> None:
    """Run the hooks of a module that was executed: one of _HOOKS, or one that `import_shim.Finder`
    found. Never raises."""
    if _installed:
        _check_environment()
    name = str(getattr(module, "__name__", None))
    for hook in _HOOKS.get(name, (_on_module,)) if _installed else ():
        try:
            hook(module)
        except Exception as error:  # an error here must not fail the user's import
            telemetry.once(
                ("import", name, str(error)),
                "error",
                "after the import of %s: %s: %s",
                name,
                type(error).__name__,
                error,
            )


def _on_module(module: Any) -> None:
    """Claim every target among the names of a module."""
    if not _installed:
        return
    names = catalog.targets()
    for value in list(getattr(module, "__dict__", {}).values()):
        # Not isinstance: some modules hold objects whose __class__ gives a deprecation warning.
        if (
            issubclass(type(value), type)
            and value.__name__ in names
            and not value.__module__.startswith("torch.")
        ):
            claim(value)


def _on_registry(module: Any) -> None:
    """Wrap a Registry class, so that each class it registers is claimed if it is a target."""
    registry = getattr(module, catalog.REGISTRIES[module.__name__], None)
    original = getattr(registry, "_register_module", None)
    if not _installed or original is None or _is_patched(original):
        return

    def register(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> Any:
        result = wrapped(*args, **kwargs)
        cls, *_ = args or (kwargs.get("module", kwargs.get("module_class")),)
        if _installed and inspect.isclass(cls) and catalog.target_of(cls) is not None:
            claim(cls)
            # The core that it calls is a global of the module that defines it.
            _on_module(sys.modules.get(cls.__module__))
        return result

    _wrap(registry, "_register_module", register, "registry")


# Module name -> what is called with it after each import.
_HOOKS: Dict[str, Tuple[Callable[[Any], None], ...]] = {
    **dict.fromkeys(catalog.MODULES, (_on_module,)),
    **dict.fromkeys(catalog.REGISTRIES, (_on_registry,)),
    **dict.fromkeys(compat.MODULES, (compat.on_module,)),
    **dict.fromkeys(runner_hooks.MODULES, (runner_hooks.register,)),
}


def claim(cls: type) -> bool:
    """Wrap the methods of `cls` with the seams of its target; return False if it does not fit.
    Never raises."""
    try:
        return _claim(cls)
    except Exception as error:
        _refused[cls.__module__, cls.__qualname__] = f"{type(error).__name__}: {error}"
        telemetry.once(
            ("claim", cls.__module__, cls.__qualname__, str(error)),
            "error",
            "%s.%s is left unpatched: %s: %s",
            cls.__module__,
            cls.__qualname__,
            type(error).__name__,
            error,
        )
        return False


def _claim(cls: type) -> bool:
    target = catalog.target_of(cls)
    if target is None:
        return False
    if settings.current().leaves_out(target.name):
        return False
    with _lock:
        target, why = catalog.fitting(cls, target)
        if why is not None:
            _refused[cls.__module__, cls.__qualname__] = why
            return False
        from ..attention.recovery import checkpoint_hooks
        from .seams import SEAMS  # imports torch, as the module of such a class has by now

        checkpoint_hooks.watch()
        for method, seam in (("forward", target.seam), *target.others):
            original = inspect.getattr_static(cls, method, None)
            if original is not None and not _is_patched(original):  # itself, or inherited
                _wrap(cls, method, SEAMS[seam](cls), seam)
        if target.seam == "outer":
            _wrap_inner_attention()
        _refused.pop((cls.__module__, cls.__qualname__), None)
    telemetry.once(
        ("patched", cls.__module__, cls.__qualname__),
        "info",
        "patched %s.%s",
        cls.__module__,
        cls.__qualname__,
    )
    _tell_missing()
    return True


def _tell_missing() -> None:
    """Log once the features that this torch lacks."""
    from .. import _torch_internals as internals

    if internals.MISSING:
        telemetry.once(
            ("torch lacks",),
            "info",
            "torch %s lacks %s",
            internals.VERSION,
            "; ".join(internals.missing()),
        )


def _wrap(owner: Any, attribute: str, wrapper: Callable[..., Any], seam: str) -> None:
    original = vars(owner).get(attribute)
    wrapped = _patched_function(inspect.getattr_static(owner, attribute), wrapper)
    wrapped.__flashbias_original__ = original  # None where the class only inherits it
    setattr(owner, attribute, wrapped)
    _claims[:] = [claim for claim in _claims if claim.owner is not None]
    _claims.append(Claim(weakref.ref(owner), attribute, weakref.ref(wrapped), seam))


def _wrap_inner_attention() -> None:
    """Wrap the forward of torch's own attention. The wrapper acts inside an outer forward only."""
    from torch import nn

    from .seams import inner_forward

    original = vars(nn.MultiheadAttention)["forward"]
    if _is_patched(original):
        return
    wrapper = inner_forward.wrap_forward(original)
    wrapper.__flashbias_seam__ = inner_forward
    wrapper.__flashbias_original__ = original
    nn.MultiheadAttention.forward = wrapper  # type: ignore[method-assign]
    _claims.append(
        Claim(weakref.ref(nn.MultiheadAttention), "forward", weakref.ref(wrapper), "inner")
    )


def _patched_function(original: Any, seam: Callable[..., Any]) -> Any:
    """Return a function that calls `seam` instead of the method `original`; under a strict
    torch.export it calls the original.

    It is not a wrapt.FunctionWrapper: torch.compile takes one for the function inside it and runs
    the original code.
    """

    from . import exporting  # imports torch, as whoever defines such a class

    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(seam, original, self, args, kwargs)

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _traced_call(seam, original, self, args, kwargs)

    if exporting.CAN_TELL:
        patched._torchdynamo_inline = traced  # type: ignore[attr-defined]  # read by torch.compile in its place
    patched.__flashbias_seam__ = seam  # type: ignore[attr-defined]
    return patched


def _is_patched(function: Any) -> bool:
    return hasattr(function, "__flashbias_seam__")


def _call_directly(
    seam: Callable[..., Any], original: Any, instance: Any, args: Any, kwargs: Any
) -> Any:
    # Bound here, where torch.compile does not look: it cannot trace __get__ before torch 2.7.
    return seam(original.__get__(instance, type(instance)), instance, args, kwargs)


# How every patched method calls its seam. It is replaced once, when torch._dynamo is imported: by
# the same function behind a graph break (`_shield_from_dynamo`). A global, because patched methods
# read it at each call without a function call, and torch.compile can read it.
_call: Callable[..., Any] = _call_directly


def _traced_call(
    seam: Callable[..., Any], original: Any, instance: Any, args: Any, kwargs: Any
) -> Any:
    """Call a patched method where torch.compile or torch.export(strict=True) traces it."""
    from . import exporting

    if exporting.is_exporting():
        return exporting.original_alone(original, instance, args, kwargs)
    return _call(seam, original, instance, args, kwargs)


def _shield_from_dynamo(dynamo: Any) -> None:
    """Make torch.compile break its graph at each patched call, and compile nothing inside."""
    global _call
    from .._torch_internals import outside_of_dynamo

    _call = outside_of_dynamo(dynamo, _call_directly)
    weights = sys.modules.get("flashbias_patch.attention.lazy_weights")
    if weights is not None:
        weights.shield_from_dynamo(dynamo)


def patched() -> List[Dict[str, str]]:
    """Return class, module and seam of each wrapped method."""
    with _lock:
        return [
            {"class": owner.__qualname__, "module": owner.__module__, "seam": c.seam}
            for c, owner in ((c, c.owner) for c in _claims)
            if c.seam not in ("registry", "inner") and owner is not None
        ]


def refused() -> List[Dict[str, str]]:
    """Return the classes that have a target's name and are left alone, with the reason."""
    with _lock:
        return [
            {"class": name, "module": module, "reason": why}
            for (module, name), why in _refused.items()
        ]
