"""The private names that tests need: state to reset, and steps that have no public way in.

A test that has to reach behind the public functions does so here, so that a renamed private name
is changed in one file. Imports are inside: under old versions of torch some modules are not there.
tools/check_private_names.py keeps these names out of the other tests.
"""

from __future__ import annotations

from typing import Any, Callable, Set


def tells_hooks() -> bool:
    """Whether torch tells which saved-tensor hooks are in force: since 2.8."""
    from flashbias_patch.attention.recovery import guard

    return guard._hooks_in_force is not None


def torch_modes() -> Any:
    """The modes of torch that are in force: whether a wrapper left one on has no public name."""
    from flashbias_patch import _torch_internals

    return _torch_internals.modes()


# -- bias: whether a tensor is still a description is not to be seen from its numbers


def description_of(tensor: Any) -> Any:
    """The bias that a BiasTensor describes; None once it has numbers only."""
    return tensor._bias


def children_of(tensor: Any) -> Any:
    """References to what was computed from a BiasTensor."""
    return tensor._children


def layout_of(tensor: Any) -> Any:
    """The order of a BiasTensor's axes, with which it can be made again from its description."""
    return tensor._layout


def dense_of(tensor: Any) -> Any:
    """The numbers that a BiasTensor has computed; None as long as nobody needed them."""
    return tensor._dense


def terms_of(bias: Any) -> Any:
    """The terms of a sum of biases: the sum is the same tensor whatever they are."""
    return bias._terms()


def with_weights(bias: Any, weights: Any) -> Any:
    """The same windows with other weights, which only such biases merge with."""
    return bias._weighted(weights)


# -- patching


def leave_generators_alone(monkeypatch: Any) -> None:
    """No attention bias generator is understood: its dense bias goes on as it is."""
    from flashbias_patch.patching.seams import bias_generator
    from flashbias_patch.patching.seams.window_description import Verdict

    monkeypatch.setattr(
        bias_generator.GeneratorSeam, "_verdict", lambda self, *args: Verdict(reason="off")
    )


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
    from flashbias_patch.attention import order, triton_support
    from flashbias_patch.attention.backends import flash_attention

    for function in (triton_support.capability, flash_attention._major, order._rows):
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


def passes_self_check(*arguments: Any) -> bool:
    """The step of a call before a backend's first use, without the rest of the call."""
    from flashbias_patch.attention import dispatch

    return dispatch._passes_self_check(*arguments)


def pending_gradients(one_pass: Any) -> Any:
    """id -> (tensor, sum) of a PassGradients: a thread must be let in between two additions."""
    return one_pass._sums


# -- kernels: what is kept between calls is to be reset, and is not in any result


def tuned_tiles() -> Any:
    """Key -> tile that was tuned; candidates() shows it among others only."""
    from flashbias_patch.attention.kernels import tiles

    return tiles._tuned


def working_tiles() -> Any:
    """Key -> first tile that fitted."""
    from flashbias_patch.attention.kernels import tiles

    return tiles._working


def forced_tiles() -> Any:
    """Key -> tile in force inside forced(): empty after it, whatever happened."""
    from flashbias_patch.attention.kernels import tiles

    return tiles._forced


def reread_tiles(monkeypatch: Any) -> None:
    """Have the tuned tiles read from disk again, as a new process would."""
    from flashbias_patch.attention.kernels import tiles

    monkeypatch.setattr(tiles, "_tuned", {})
    monkeypatch.setattr(tiles, "_loaded", False)


def forget_tiles(monkeypatch: Any) -> None:
    """Nothing tuned, nothing tried."""
    from flashbias_patch.attention.kernels import tiles

    reread_tiles(monkeypatch)
    monkeypatch.setattr(tiles, "_working", {})


def forget_tritons_key(monkeypatch: Any) -> None:
    """As in a process that has not needed Triton's key yet."""
    from flashbias_patch.attention.kernels import kept_key

    monkeypatch.setattr(kept_key, "_done", False)


def settled_forwards() -> Any:
    """Class of calls -> the launch that was settled for it: a second call must not add one."""
    from flashbias_patch.attention.kernels import launcher

    return launcher._forwards.steps


def settled_backwards() -> Any:
    """Class of calls -> the launches of its backward pass, to be replaced by ones that take
    notes."""
    from flashbias_patch.attention.kernels import launcher

    return launcher._backwards.steps


def set_streams(monkeypatch: Any, usual: Any, other: Any) -> None:
    """Run the two kernels of backward on these streams, as on a GPU."""
    from flashbias_patch.attention.kernels import cached_call, launcher

    monkeypatch.setattr(launcher, "_streams", lambda problem: (usual, other))
    monkeypatch.setattr(cached_call, "streams_of", lambda device: (usual, other))


def new_stream(device: Any) -> Any:
    """The second stream of backward, made anew: it is kept by device."""
    from flashbias_patch.attention.kernels import side_by_side

    return side_by_side._other_stream.__wrapped__(device)


def operator() -> Any:
    """The operator that torch.compile sees, for torch.library.opcheck."""
    from flashbias_patch.attention.kernels import autograd

    return autograd._op


def warn_anew(monkeypatch: Any) -> None:
    """Have the once-only warning about a failed backward kernel logged again."""
    from flashbias_patch.attention.kernels import autograd

    monkeypatch.setattr(autograd, "_told", False)


def kept_window_tables() -> Any:
    """Key -> tables of windows kept between calls."""
    from flashbias_patch.attention.kernels import window_tables

    return window_tables._kept


# -- why


def optimizer_link(entry: Any, facts: Any) -> Any:
    """The check of the link between a parameter and its optimizer, without the other links."""
    from flashbias_patch.why import links

    return links._optimizer(entry, facts)


# -- monitor


def step_hook_count() -> int:
    """How many step hooks of optimizers are registered where torch has none of its own."""
    from flashbias_patch.monitor import optimizer_hooks

    return len(optimizer_hooks._hooks)
