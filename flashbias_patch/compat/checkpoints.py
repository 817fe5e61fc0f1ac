"""Allow checkpoints of mmengine under torch >= 2.6, whose torch.load reads only weights by default.

The protection stays on. Only the few types that the message hub of mmengine stores are declared
safe, and `getattr`, by which its buffers refer to their statistics, is replaced by a function that
allows only these statistics.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, Optional


def allow(module: Any) -> Optional[Callable[[], None]]:
    """Declare HistoryBuffer of `module`, and NumPy arrays, safe to unpickle.

    Returns a function that undoes this, or None if nothing is needed.
    """
    import numpy
    import torch

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < (2, 6) or not hasattr(module, "HistoryBuffer"):
        return None
    buffer = module.HistoryBuffer

    def statistic(owner: Any, name: str) -> Any:
        if owner is not buffer or name.startswith("_"):
            raise TypeError(
                f"a checkpoint needs {name!r} of {owner!r}: only statistics of HistoryBuffer "
                "are allowed"
            )
        return getattr(owner, name)

    core = importlib.import_module(
        "numpy.core.multiarray" if numpy.__version__ < "2" else "numpy._core.multiarray"
    )
    types = [buffer, numpy.ndarray, numpy.dtype, core._reconstruct, core.scalar]
    types += [type(numpy.dtype(name)) for name in ("float64", "float32", "int64")]
    before = torch.serialization.get_safe_globals()
    added = [kind for kind in types if kind not in before] + [(statistic, "builtins.getattr")]
    torch.serialization.add_safe_globals(added)

    def undo() -> None:
        """Remove the types added here; keep types that others have added since."""
        others = [entry for entry in torch.serialization.get_safe_globals() if entry not in added]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)

    return undo
