"""mmengine checkpoints under torch >= 2.6, whose torch.load reads weights only unless told
otherwise.

Not by turning that protection off: the few types that mmengine's own message hub stores are
declared safe, and the `getattr` that its buffers name their statistics by is answered for those
alone.
"""

from __future__ import annotations

import importlib
from typing import Any, Callable, Optional


def allow(module: Any) -> Optional[Callable[[], None]]:
    """Declare HistoryBuffer, and the NumPy array it holds, safe to unpickle; `module` defines
    it."""
    import numpy
    import torch

    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < (2, 6) or not hasattr(module, "HistoryBuffer"):
        return None
    buffer = module.HistoryBuffer

    def statistic(owner: Any, name: str) -> Any:
        if owner is not buffer or name.startswith("_"):
            raise TypeError(
                f"a checkpoint asks for {name!r} of {owner!r}: only statistics of HistoryBuffer "
                "are safe"
            )
        return getattr(owner, name)

    core = importlib.import_module(
        "numpy.core.multiarray" if numpy.__version__ < "2" else "numpy._core.multiarray"
    )
    kinds = [buffer, numpy.ndarray, numpy.dtype, core._reconstruct, core.scalar]
    kinds += [type(numpy.dtype(name)) for name in ("float64", "float32", "int64")]
    before = torch.serialization.get_safe_globals()
    added = [kind for kind in kinds if kind not in before] + [(statistic, "builtins.getattr")]
    torch.serialization.add_safe_globals(added)

    def undo() -> None:
        """Take away what was added here, and nothing that others have declared since."""
        kept = [entry for entry in torch.serialization.get_safe_globals() if entry not in added]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(kept)

    return undo
