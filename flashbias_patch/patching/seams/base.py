"""The base class of a seam: a callable that runs in the place of a method of a patched class."""

from __future__ import annotations

from typing import Any, Callable, Dict, Tuple

Args = Tuple[Any, ...]
Kwargs = Dict[str, Any]


class Seam:
    """One object per patched class and method. It is called instead of the method.

    Not an abc.ABC: isinstance would be a Python function call for one, and some calls need it.
    """

    def __init__(self, cls: type) -> None:
        self.name = cls.__qualname__

    def __call__(self, wrapped: Callable[..., Any], module: Any, args: Args, kwargs: Kwargs) -> Any:
        """Return what `wrapped(*args, **kwargs)` would return.

        wrapped: the original method, bound to `module`.
        """
        raise NotImplementedError
