"""Names that import statements of a repository's modules get where the real ones are gone."""
from __future__ import annotations

import builtins
import types
from typing import Any, Callable, Optional


class Leftover(types.ModuleType):
    """A module imported by accident: every name is there, and says what it is if it is ever called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> None:
            raise ImportError(f"{self.__name__}.{name} is called, but {self.__name__} does not import here: install it")

        return absent


def leftover(name: str, fromlist: Any, usual: Callable[[], Any]) -> Optional[Any]:
    """Names that nobody is expected to call, where the real module does not import."""
    try:
        usual()
    except ImportError:
        return Leftover(name if fromlist else name.partition(".")[0])
    return None


class NumPy(types.ModuleType):
    """NumPy's names and the removed aliases. Only the importing module sees it."""

    def __getattr__(self, name: str) -> Any:
        import numpy

        return getattr(numpy, name)


def numpy_with_aliases(name: str, fromlist: Any, usual: Callable[[], Any]) -> Optional[Any]:
    """NumPy with np.int and its like: Python's own types, as they were (np.long and np.unicode too)."""
    import numpy

    found = usual()
    names = {alias: getattr(builtins, alias) for alias in ("int", "float", "complex", "object", "str", "bool")}
    names.update(long=int, unicode=str)
    missing = {alias: kind for alias, kind in names.items() if alias not in vars(numpy)}
    if found is not numpy or not missing:
        return None
    module = NumPy("numpy")
    module.__dict__.update({key: value for key, value in vars(numpy).items() if key != "__getattr__"})
    module.__dict__.update(missing)
    return module


def linear_with_bias(name: str, fromlist: Any, usual: Callable[[], Any]) -> Optional[Any]:
    """torch.nn.modules.linear with `_LinearWithBias`, which is NonDynamicallyQuantizableLinear since torch 1.9."""
    if name != "torch.nn.modules.linear" or "_LinearWithBias" not in (fromlist or ()):
        return None
    linear = usual()
    if hasattr(linear, "_LinearWithBias"):
        return None
    module = types.ModuleType(name)
    module.__dict__.update(vars(linear), _LinearWithBias=linear.NonDynamicallyQuantizableLinear)
    return module
