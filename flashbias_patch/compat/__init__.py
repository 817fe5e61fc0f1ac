"""What stops unmodified repositories on current software, beyond flash_attn: small patches, each
with a name.

Each patch says why it exists, does nothing where it is not needed, and is switched with
FLASHBIAS_COMPAT: `all`, `none` or names. `IN_REPOSITORY` patches reach only modules of the user's
repository whose source shows the need (see patching/import_shim.py); `ON_MODULE` patches act when a
library's module is imported. Nothing here imports torch or numpy before a module that needs the
patch does.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any, Callable, Dict, List, NamedTuple, Set, Tuple

from .. import settings, telemetry


class Patch(NamedTuple):
    name: str
    reason: str
    upstream: str  # where it is known: an issue, a release note, or the repositories that do it
    source: str = ""  # a regular expression: repository modules whose text holds it are reached
    imports: Tuple[
        str, ...
    ] = ()  # top-level modules whose import statements `provide` answers there
    # "module:function" of this package: (name, fromlist, the usual import) -> module, None: usual
    provide: str = ""
    # "module:function" of this package: called with the executed module; returns what undoes it
    after: str = ""
    module: str = ""  # a library's module: `after` is called with it instead


PATCHES: Tuple[Patch, ...] = (
    Patch(
        "turtle",
        "editors' accidental `from turtle import down`: never used, and needs tkinter",
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

# Values of FLASHBIAS_COMPAT that are no names of patches.
SWITCHES = ("all", *settings.TRUE, *settings.FALSE)

MODULES: Tuple[str, ...] = tuple(patch.module for patch in PATCHES if patch.module)

_MARK = "__flashbias_compat__"  # of a library's module: the patches it has seen

_undo: List[Callable[[], None]] = []
_applied: Dict[str, Set[str]] = {}
_compiled: Dict[str, Any] = {}


def enabled() -> Tuple[Patch, ...]:
    """The patches that FLASHBIAS_COMPAT leaves on; names that are unknown are reported by
    environment.problems."""
    wanted = tuple(name.lower() for name in settings.current().compat)
    if any(name in settings.FALSE for name in wanted):
        return ()
    everything = any(name in SWITCHES for name in wanted)
    return PATCHES if everything else tuple(patch for patch in PATCHES if patch.name in wanted)


def needed_by(source: bytes) -> Tuple[Patch, ...]:
    """The patches that a repository module with this text needs."""
    return tuple(
        patch for patch in enabled() if patch.source and _pattern(patch.source).search(source)
    )


def _pattern(text: str) -> Any:
    if text not in _compiled:
        _compiled[text] = re.compile(text.encode())
    return _compiled[text]


def import_through(
    patch: Patch, importing: str, name: str, fromlist: Any, usual: Callable[[], Any]
) -> Any:
    """What an import statement of `name` in the module `importing` gives; `usual` is the import as
    it would be."""
    module = _function(patch.provide)(name, fromlist, usual)
    if module is not None:
        record(patch.name, importing)
        return module
    return usual()


def after(patch: Patch, module: Any) -> None:
    """Let a patch see an executed module. Its failure never reaches the user's import."""
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
    """A library's module was imported (a post-import hook); called again for the same one it does
    nothing."""
    for patch in enabled():
        if patch.module == module.__name__ and patch.name not in vars(module).get(_MARK, ()):
            after(patch, module)
            setattr(module, _MARK, (*vars(module).get(_MARK, ()), patch.name))
            _undo.append(functools.partial(_unmark, module))


def _unmark(module: Any) -> None:
    vars(module).pop(_MARK, None)


def record(name: str, module: str) -> None:
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
    """{patch: the modules it acted on} in this process."""
    return {name: sorted(modules) for name, modules in sorted(_applied.items())}


def uninstall() -> None:
    """Put back what `after` patches changed."""
    while _undo:
        _undo.pop()()
    _applied.clear()


def _function(where: str) -> Callable[..., Any]:
    module, name = where.split(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def unmendable() -> List[Tuple[str, str]]:
    """What is wrong here that no patch can mend: (what, the cure). For `flashbias doctor`."""
    from . import machine

    return machine.unmendable()
