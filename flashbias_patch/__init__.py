"""FlashBias attention for unmodified CMT / PETR-family code. Importing this package installs the patches,
unless FLASHBIAS_PATCH is 0, false, off or no. Imports neither torch nor mmcv nor triton.
"""
from __future__ import annotations

import importlib
import sys
from typing import Any, List

from . import journal, settings

__version__ = "0.1.0"

# Public name -> where it lives. Loaded on first use (PEP 562), so that importing this package stays cheap.
_PUBLIC = {
    "install": ".patching.hooks",
    "uninstall": ".patching.hooks",
    "status": ".status",
    "attention_bias": ".patching.ambient",
    "flash_bias_attention": ".attention",
    "bias": ".bias",
    "aqr": ".aqr",
    "monitor": ".monitor",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name], __name__)
    value = module if _PUBLIC[name] == f".{name}" and name != "status" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted(__all__)


def _install_on_import() -> None:
    read = settings.current()
    journal.configure(read.log_level)
    for problem in read.problems:
        journal.once(problem, 40, problem)
    if not read.patch:
        return
    try:
        from .patching import hooks

        hooks.install()
    except Exception:  # the one boundary where nothing may reach the user's import
        journal.logger.exception("not installed: this process runs unpatched")
        sys.modules.pop(f"{__name__}.patching.hooks", None)


_install_on_import()
