"""The C function that a launcher of Triton calls, for launches without the Python before it.

A compiled kernel's launcher is an object. Since Triton 3.3 calling it allocates the scratch memory
of the kernel and of a profiler first, in up to five Python calls. For a kernel without such memory
the rest is one call of a C function, `launcher.launch`, with constant arguments besides the
stream and the kernel's own.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

# The arguments of a compiled kernel: its packed metadata; what launch hooks get, and the two hooks.
METADATA, HOOKS = "metadata", ("no hook",) * 3
SCRATCH = "no scratch"
# Attributes of a launcher: each that is there must be zero or False.
UNUSED = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")


class Order(NamedTuple):
    """The arguments of a C function after the grid, the stream and the kernel's handle."""

    names: Tuple[str, ...]  # those above, and attributes of the launcher
    packed: bool = False  # the kernel's own arguments come as one tuple

    def own(self, launcher: Any, metadata: Any) -> Tuple[Any, ...]:
        values = {METADATA: metadata, HOOKS[0]: None, SCRATCH: None}
        return tuple(
            [values[name] if name in values else getattr(launcher, name) for name in self.names]
        )


_GRID, _PDL = "launch_cooperative_grid", "launch_pdl"
TRITON_3_0 = Order((METADATA, *HOOKS))
TRITON_3_3 = Order((_GRID, SCRATCH, METADATA, *HOOKS))
TRITON_3_4 = Order((_GRID, _PDL, SCRATCH, METADATA, *HOOKS))
TRITON_3_5 = Order((_GRID, _PDL, SCRATCH, SCRATCH, METADATA, *HOOKS))
TRITON_3_7 = Order(
    (
        _GRID, _PDL, METADATA, *HOOKS, SCRATCH, SCRATCH, "arg_annotations", "kernel_signature",
    ),
    packed=True,
)  # fmt: skip

# By the digest of the source of the launcher's __call__: exactly these do nothing else.
ORDERS: Dict[Optional[str], Order] = {
    "5800964e530597f0": TRITON_3_0,  # 3.0 to 3.2
    "00aa939e38d1f376": TRITON_3_3,
    "2c1b56ed0255562e": TRITON_3_4,
    "0ff2b3219ec9f506": TRITON_3_5,  # 3.5 and 3.6
    "7689f191428df69b": TRITON_3_7,
    "07cb65bca80ed204": TRITON_3_7,  # 3.8, with gsan
    "b3d689acc085368a": TRITON_3_7,  # 3.9, with gsan
}


@functools.lru_cache(maxsize=None)
def digest(function: Any) -> Optional[str]:
    """Of the function's source without white space; None without a source."""
    try:
        source = "".join(inspect.getsource(function).split())
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:16]


class Direct(NamedTuple):
    """function(*grid, stream, *own, *arguments) launches a kernel; (..., arguments) if packed."""

    function: Callable[..., Any]
    own: Tuple[Any, ...]
    packed: bool


def direct(compiled: Any) -> Direct:
    """The launch of this compiled kernel without hooks; through its launcher if that one is not
    known, or the kernel needs scratch memory."""
    launcher, metadata = compiled.run, compiled.packed_metadata
    order = ORDERS.get(digest(type(launcher).__call__))
    if order is None or any(getattr(launcher, name, 0) for name in UNUSED):
        return Direct(launcher, (compiled.function, *TRITON_3_0.own(launcher, metadata)), False)
    own = compiled.function, *order.own(launcher, metadata)
    return Direct(launcher.launch, own, order.packed)
