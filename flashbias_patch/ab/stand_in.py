"""flash_attn for the unpatched side, where none is installed: `flashbias ab --stand-in-for-a`.

flash-attn 0.2 and 1.x, which CMT and its family import at module scope, cannot be built for current
PyTorch: unpatched code then fails at import. With the option, and only in processes of A, an import
of flash_attn that finds nothing gets functions of the same names, computed by torch's
scaled_dot_product_attention.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any, Optional

MODULES = ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.bert_padding")
MISSING = (
    r"No module named '?flash_attn|cannot import name .* from "
    r"'?flash_attn|flash_attn\S*\.so: undefined symbol"
)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: it finds what no other does."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if name not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name == "flash_attn")

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        _add_missing(module)


def _add_missing(module: Any) -> None:
    """Names that the family imports and `module` lacks (flash-attn 2 renamed some)."""
    from ..patching.flash_attn_shim import NAMES

    for name, value in NAMES.get(module.__name__, {}).items():
        if not hasattr(module, name):
            setattr(module, name, value)


def offer() -> None:
    """Offer the stand-in in this process. Imports no torch before flash_attn is imported."""
    import wrapt

    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    for name in MODULES[1:]:
        wrapt.register_post_import_hook(_add_missing, name)
