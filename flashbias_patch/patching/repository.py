"""Modules of the user's repository that import flash_attn or need a compatibility patch.

They are executed with a scoped `__import__`: flash-attn 0.2.2 cannot be built any more and the family imports it at
module scope. Only import statements of those modules see the stand-ins: nothing is put in sys.modules, so
`importlib.util.find_spec("flash_attn")` elsewhere answers as if we weren't there.
"""
from __future__ import annotations

import builtins
import importlib.machinery
import os
import sys
from typing import Any, Callable, Optional, Sequence, Tuple

from .. import compat

_OWN = __name__.partition(".")[0]  # used from a checkout, this package's source shows every need
_STANDARD_LIBRARY = os.path.dirname(os.__file__)


class Finder:
    """A meta path finder that only answers for repository modules whose source shows a need."""

    _instance: Optional[Finder] = None

    def __init__(self, on_module: Callable[[Any], None]) -> None:
        self.on_module = on_module

    @classmethod
    def enable(cls, on_module: Callable[[Any], None]) -> None:
        cls.disable()
        cls._instance = cls(on_module)
        sys.meta_path.insert(0, cls._instance)  # type: ignore[arg-type]

    @classmethod
    def disable(cls) -> None:
        if cls._instance in sys.meta_path:
            sys.meta_path.remove(cls._instance)  # type: ignore[arg-type]
        cls._instance = None

    def find_spec(
        self, name: str, path: Optional[Sequence[str]] = None, target: Any = None
    ) -> Optional[importlib.machinery.ModuleSpec]:
        if name.partition(".")[0] == _OWN:
            return None
        where = list(path or ())
        if path is not None and (not where or _is_installed(where[0])):
            return None
        if path is None and "." not in name and name in sys.builtin_module_names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        loader = getattr(spec, "loader", None)
        if spec is None or type(loader) is not importlib.machinery.SourceFileLoader or _is_installed(loader.path):
            return None
        try:
            source = loader.get_data(loader.path)
        except OSError:
            return None
        patches = compat.needed_by(source)
        if not patches and b"flash_attn" not in source:
            return None
        spec.loader = _Loader(loader.name, loader.path, self.on_module, patches)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    """Executes the module with its own `__import__`, then offers it to be patched."""

    def __init__(
        self, name: str, path: str, on_module: Callable[[Any], None], patches: Tuple[compat.Patch, ...] = ()
    ) -> None:
        super().__init__(name, path)
        self._on_module = on_module
        self._patches = patches

    def exec_module(self, module: Any) -> None:
        # An import statement looks `__import__` up in its frame's builtins, which come from the module's globals.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._scoped_import}
        super().exec_module(module)
        for patch in self._patches:
            if patch.after:
                compat.after(patch, module)
        self._on_module(module)

    def _scoped_import(
        self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        """`__import__`, except that names which are not there come from stand-ins."""

        def usual() -> Any:
            return builtins.__import__(name, globals, locals, fromlist, level)

        top = name.partition(".")[0]
        if level == 0 and top == "flash_attn":
            from . import stand_ins

            return stand_ins.import_flash_attn(name, globals, locals, fromlist)
        patch = next((patch for patch in self._patches if top in patch.imports), None) if level == 0 else None
        return usual() if patch is None else compat.import_through(patch, self.name, name, fromlist, usual)


def _is_installed(path: str) -> bool:
    return path.startswith(_STANDARD_LIBRARY) or "site-packages" in path or "dist-packages" in path
