"""Names that import statements of a repository's modules get where the real ones are gone."""

from __future__ import annotations

import builtins
import types
from typing import Any, Callable, List, Optional


class Leftover(types.ModuleType):
    """A module imported by accident: every name is there, and says what it is if it is ever
    called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> None:
            raise ImportError(
                f"{self.__name__}.{name} is called, but {self.__name__} does not import here: "
                "install it"
            )

        return absent


def leftover(name: str, fromlist: Any, usual: Callable[[], Any]) -> Optional[Any]:
    """Names that nobody is expected to call, where the real module does not import."""
    try:
        usual()
    except ImportError:
        return Leftover(name if fromlist else name.partition(".")[0])
    return None


# Removed in NumPy 1.24, and the Python type that each was (np.long and np.unicode too).
ALIASES = {
    **{
        name: getattr(builtins, name)
        for name in ("int", "float", "complex", "object", "str", "bool")
    },
    "long": int,
    "unicode": str,
}


class NumPy(types.ModuleType):
    """NumPy as the importing module sees it: the removed aliases beside NumPy's own names.

    It holds nothing: what anybody sets on NumPy later is seen here, and what is set here is set on
    NumPy.
    """

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return NumPy
        import numpy

        if name in ALIASES and name not in vars(
            numpy
        ):  # not getattr: NumPy's own answer is a warning and an error
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


def numpy_with_aliases(name: str, fromlist: Any, usual: Callable[[], Any]) -> Optional[Any]:
    """NumPy with np.int and its like: Python's own types, as they were."""
    import numpy

    found = usual()
    if found is not numpy or all(alias in vars(numpy) for alias in ALIASES):
        return None
    return NumPy("numpy")


def linear_with_bias(name: str, fromlist: Any, usual: Callable[[], Any]) -> Optional[Any]:
    """torch.nn.modules.linear with `_LinearWithBias`, which is NonDynamicallyQuantizableLinear
    since torch 1.9."""
    if name != "torch.nn.modules.linear" or "_LinearWithBias" not in (fromlist or ()):
        return None
    linear = usual()
    if hasattr(linear, "_LinearWithBias"):
        return None
    module = types.ModuleType(name)
    module.__dict__.update(vars(linear), _LinearWithBias=linear.NonDynamicallyQuantizableLinear)
    return module
