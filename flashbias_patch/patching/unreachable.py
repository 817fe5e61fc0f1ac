"""Biases that a recomputation cannot find: it raises an error instead of computing without them.

Inside a torch.autograd.Function that does not hand its ctx to forward(), nothing can be attached to
the graph (see attention/recovery/replay.py). Modules that were given a bias there are recorded.
"""

from __future__ import annotations

import weakref
from typing import Any

from .._torch_internals import current_graph_task
from ..attention.recovery import replay

_CURE = (
    "the torch.autograd.Function around it does not hand its ctx to forward() (setup_context), "
    "or is not written in "
    "Python. Open attention_bias(...) inside the checkpointed function, or use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)


class Record:
    """The modules that were given a bias where no recomputation can find it.

    Attributes:
        any: True while there may be such a module. Every call looks at it, and it costs no function
            call.
        modules: these modules; it does not keep them alive.
    """

    __slots__ = ("any", "modules")

    def __init__(self) -> None:
        self.any = False
        self.modules: weakref.WeakSet[Any] = weakref.WeakSet()


record = Record()


def remember(module: Any) -> None:
    """Record `module`, which is given a bias here, if a recomputation could not find that bias."""
    if replay.out_of_reach():
        record.any = True
        record.modules.add(module)


def check(module: Any) -> None:
    """Raise RuntimeError if `module`, which has no bias here, is recomputed, and its forward had a
    bias that the recomputation cannot find."""
    if record.any and not record.modules:  # they are gone
        record.any = False
    if (
        record.any
        and module in record.modules
        and current_graph_task() != -1
        and not replay.repeating()
    ):
        raise RuntimeError(
            f"attention_bias: {type(module).__name__} is recomputed in a backward pass without "
            "the bias that its "
            f"forward had: {_CURE}"
        )


def refuse(module: Any) -> None:
    """Raise RuntimeError in the forward pass, where a recomputation could not be recognised."""
    if replay.out_of_reach():
        raise RuntimeError(
            f"attention_bias: a recomputation of {type(module).__name__} would be without it: "
            f"{_CURE}"
        )
