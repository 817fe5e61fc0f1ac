"""The private names that tests need: state to reset, and steps that have no public way in.

A test that has to reach behind the public functions does so here, so that a renamed private name
is changed in one file. Imports are inside: under old versions of torch some modules are not there.
The kernels' tests have their own, in attention/kernels/conftest.py.
"""

from __future__ import annotations

from typing import Any, Callable, Set


def tells_hooks() -> bool:
    """Whether torch tells which saved-tensor hooks are in force: since 2.8."""
    from flashbias_patch.attention.recovery import guard

    return guard._hooks_in_force is not None


# -- patching


def is_patched(function: Any) -> bool:
    """Whether a function is a wrapper of this package."""
    from flashbias_patch.patching import install

    return install._is_patched(function)


def patched_owners() -> Set[Any]:
    """The classes that have a wrapper."""
    from flashbias_patch.patching import install

    return {claim.owner for claim in install._claims}


def watch_registry(module: Any) -> None:
    """What install() does after the import of a module with a registry."""
    from flashbias_patch.patching import install

    install._on_registry(module)


def on_import_of(name: str, hook: Callable[[Any], None], monkeypatch: Any) -> None:
    """Have `hook` called with the module `name` after each import of it."""
    from flashbias_patch.patching import import_shim, install

    monkeypatch.setitem(install._HOOKS, name, (hook,))
    import_shim.Finder.enable(install._on_import, install._HOOKS)


def forget_third_parties(monkeypatch: Any) -> None:
    """Read the entry points of installed packages anew."""
    from flashbias_patch.patching import catalog

    monkeypatch.setattr(catalog, "_third_party", None)


# -- attention


def forget_order() -> None:
    """Look the measured order of backends up anew."""
    from flashbias_patch.attention import order

    order._rows.cache_clear()


def forget_capabilities() -> None:
    """Ask the GPU for its compute capability anew."""
    from flashbias_patch.attention import order
    from flashbias_patch.attention.backends import flash_attention, triton_fused

    for function in (triton_fused._capability, flash_attention._major, order._rows):
        function.cache_clear()


def in_measured_order(fastest: Any, names: Any) -> Any:
    """The candidates `names`, those in `fastest` first."""
    from flashbias_patch.attention import selection

    return selection._measured(fastest, names)


def load_upstream() -> Any:
    """The backend of FlashBias' own function, which it has looked for anew."""
    from flashbias_patch.attention.backends import upstream_flashbias

    upstream_flashbias.backend._load()
    return upstream_flashbias.backend


def without_private_entry_points(monkeypatch: Any) -> None:
    """The guarded backward pass by torch's public functions, as where the private ones are gone."""
    from flashbias_patch.attention.recovery import guard

    monkeypatch.setattr(guard, "_apply", guard._Guarded.apply)
    monkeypatch.setattr(guard, "_run_backward", guard._by_grad)


# -- monitor


def step_hook_count() -> int:
    """How many step hooks of optimizers are registered where torch has none of its own."""
    from flashbias_patch.monitor import optimizer_hooks

    return len(optimizer_hooks._hooks)
