"""Replacement modules for imports of a repository that fail with current packages."""

from __future__ import annotations

import builtins
import types
from typing import Any, Callable, List, Optional


class Leftover(types.ModuleType):
    """A stand-in for a module that is imported but not needed: it has every name.

    Calling one of its names raises ImportError.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> None:
            raise ImportError(
                f"{self.__name__}.{name} is called, but {self.__name__} does not import here: "
                "install it"
            )

        return absent


def leftover(name: str, fromlist: Any, import_normally: Callable[[], Any]) -> Optional[Any]:
    """Return a Leftover if the module cannot be imported, else None."""
    try:
        import_normally()
    except ImportError:
        return Leftover(name if fromlist else name.partition(".")[0])
    return None


# Aliases removed in NumPy 1.24 (np.long and np.unicode included) and their Python types.
ALIASES = {
    **{
        name: getattr(builtins, name)
        for name in ("int", "float", "complex", "object", "str", "bool")
    },
    "long": int,
    "unicode": str,
}


class NumPy(types.ModuleType):
    """A view of NumPy that also has the removed aliases.

    It has no state: reading and setting attributes goes to NumPy itself.
    """

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return NumPy
        import numpy

        if name in ALIASES and name not in vars(numpy):  # not getattr: NumPy would warn and raise
            return ALIASES[name]
        return getattr(numpy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        import numpy

        setattr(numpy, name, value)

    def __delattr__(self, name: str) -> None:
        import numpy

        delattr(numpy, name)

    def __dir__(self) -> List[str]:
        import numpy

        return dir(numpy)


def numpy_with_aliases(
    name: str, fromlist: Any, import_normally: Callable[[], Any]
) -> Optional[Any]:
    """Return NumPy with np.int and the other aliases of Python types, or None if it has them."""
    import numpy

    module = import_normally()
    if module is not numpy or all(alias in vars(numpy) for alias in ALIASES):
        return None
    return NumPy("numpy")


def linear_with_bias(name: str, fromlist: Any, import_normally: Callable[[], Any]) -> Optional[Any]:
    """Return torch.nn.modules.linear with `_LinearWithBias`, or None if that is not needed.

    The class is called NonDynamicallyQuantizableLinear since torch 1.9.
    """
    if name != "torch.nn.modules.linear" or "_LinearWithBias" not in (fromlist or ()):
        return None
    linear = import_normally()
    if hasattr(linear, "_LinearWithBias"):
        return None
    module = types.ModuleType(name)
    module.__dict__.update(vars(linear), _LinearWithBias=linear.NonDynamicallyQuantizableLinear)
    return module
