"""Compatibility patches: small named fixes for unmodified repositories on current software.

Each patch states its reason, does nothing where it is not needed, and is selected by
FLASHBIAS_COMPAT: `all`, `none` or names. Patches with `source` are applied only to modules of the
user's repository whose source matches (see patching/import_shim.py). Patches with `module` are
applied when that module of a library is imported. Nothing here imports torch or numpy before a
module that needs the patch does.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Set, Tuple

from .. import settings, telemetry

if TYPE_CHECKING:
    from .machine import Issue


class Patch(NamedTuple):
    """A compatibility patch."""

    name: str
    reason: str
    upstream: str  # reference: an issue, a release note, or the repositories that need it
    source: str = ""  # a regular expression; applied to repository modules whose text matches
    imports: Tuple[str, ...] = ()  # top-level modules whose import statements call `provide` there
    # "module:function" of this package: (name, fromlist, import_normally) -> module or None
    provide: str = ""
    # "module:function" of this package: called with the executed module; returns an undo function
    after: str = ""
    module: str = ""  # a module of a library; `after` is called with it


PATCHES: Tuple[Patch, ...] = (
    Patch(
        "turtle",
        "`from turtle import down`, inserted by an editor: never used, but needs tkinter",
        "cmt_head.py of junjie18/CMT and its forks",
        r"(?:from|import)\s+(?:turtle|tkinter)\b",
        imports=("turtle", "tkinter"),
        provide="imports:leftover",
    ),
    Patch(
        "ipython",
        "leftover `from IPython import embed` at module scope: a debugger that is not installed",
        "group_sampler.py of exiawsh/StreamPETR, megvii-research/Far3D and 16 other checkouts",
        r"(?:from|import)\s+IPython\b",
        imports=("IPython",),
        provide="imports:leftover",
    ),
    Patch(
        "numpy_aliases",
        "np.int, np.float, np.object and other aliases of Python's own types, removed in NumPy "
        "1.24",
        "https://numpy.org/doc/stable/release/1.24.0-notes.html#expired-deprecations",
        r"\b(?:np|numpy)\.(?:int|float|complex|object|str|bool|long|unicode)\b(?!_)",
        imports=("numpy",),
        provide="imports:numpy_with_aliases",
    ),
    Patch(
        "linear_with_bias",
        "torch.nn.modules.linear._LinearWithBias, renamed in torch 1.9",
        "https://github.com/pytorch/pytorch/pull/58041",
        r"\b_LinearWithBias\b",
        imports=("torch",),
        provide="imports:linear_with_bias",
    ),
    Patch(
        "dn_index",
        "the denoising loss indexes a CPU tensor with CUDA indices, which torch allowed before "
        "1.13",
        "https://github.com/pytorch/pytorch/issues/90194",
        r"\bdef (?:_dn_loss_single_task|prepare_for_loss)\b",
        after="denoising:wrap",
    ),
    Patch(
        "mmengine_checkpoint",
        "torch 2.6 loads weights only by default; mmengine's checkpoints hold its HistoryBuffer",
        "https://github.com/open-mmlab/mmengine/issues/1655",
        after="checkpoints:allow",
        module="mmengine.logging.history_buffer",
    ),
)

# Values of FLASHBIAS_COMPAT that are not names of patches.
SWITCHES = ("all", *settings.TRUE, *settings.FALSE)

MODULES: Tuple[str, ...] = tuple(patch.module for patch in PATCHES if patch.module)

_MARK = (
    "__flashbias_compat__"  # attribute of a library's module: names of the patches applied to it
)

_undo: List[Callable[[], None]] = []
_applied: Dict[str, Set[str]] = {}
_compiled: Dict[str, Any] = {}


def enabled() -> Tuple[Patch, ...]:
    """Return the patches enabled by FLASHBIAS_COMPAT; environment.problems reports unknown
    names."""
    selected = tuple(name.lower() for name in settings.current().compat)
    if any(name in settings.FALSE for name in selected):
        return ()
    everything = any(name in SWITCHES for name in selected)
    return PATCHES if everything else tuple(patch for patch in PATCHES if patch.name in selected)


def needed_by(source: bytes) -> Tuple[Patch, ...]:
    """Return the enabled patches that a repository module with this source text needs."""
    return tuple(
        patch for patch in enabled() if patch.source and _pattern(patch.source).search(source)
    )


def _pattern(text: str) -> Any:
    if text not in _compiled:
        _compiled[text] = re.compile(text.encode())
    return _compiled[text]


def import_through(
    patch: Patch, importing: str, name: str, fromlist: Any, import_normally: Callable[[], Any]
) -> Any:
    """Import `name` for the module `importing` through a patch.

    import_normally: performs the import without the patch.
    """
    module = _function(patch.provide)(name, fromlist, import_normally)
    if module is not None:
        record(patch.name, importing)
        return module
    return import_normally()


def after(patch: Patch, module: Any) -> None:
    """Apply a patch to an executed module. A failure is logged and never reaches the user's
    import."""
    try:
        undo = _function(patch.after)(module)
    except Exception as error:
        telemetry.once(
            ("compat", patch.name, module.__name__),
            "error",
            "compatibility patch %s failed on %s: %s: %s",
            patch.name,
            module.__name__,
            type(error).__name__,
            error,
        )
        return
    if undo is not None:
        _undo.append(undo)
        record(patch.name, module.__name__)


def on_module(module: Any) -> None:
    """Apply the patches for a library's module after its import (a post-import hook).

    A second call for the same module does nothing.
    """
    for patch in enabled():
        if patch.module == module.__name__ and patch.name not in vars(module).get(_MARK, ()):
            after(patch, module)
            setattr(module, _MARK, (*vars(module).get(_MARK, ()), patch.name))
            _undo.append(functools.partial(_unmark, module))


def _unmark(module: Any) -> None:
    vars(module).pop(_MARK, None)


def record(name: str, module: str) -> None:
    """Record and log that the patch `name` was applied to `module`."""
    _applied.setdefault(name, set()).add(module)
    patch = next(patch for patch in PATCHES if patch.name == name)
    telemetry.once(
        ("compat", name, module),
        "info",
        "compatibility patch %s for %s: %s",
        name,
        module,
        patch.reason,
    )


def applied() -> Dict[str, List[str]]:
    """Return {patch: modules it was applied to} for this process."""
    return {name: sorted(modules) for name, modules in sorted(_applied.items())}


def uninstall() -> None:
    """Undo the changes of `after` patches."""
    while _undo:
        _undo.pop()()
    _applied.clear()


def _function(path: str) -> Callable[..., Any]:
    module, name = path.split(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return function


def known_issues() -> List[Issue]:
    """Return the problems of this machine that no patch can fix, for `flashbias doctor`."""
    from . import machine

    return machine.known_issues()
