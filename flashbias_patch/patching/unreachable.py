"""Biases that a recomputation cannot find again: an error there, not a gradient without them.

Inside a torch.autograd.Function that does not hand its ctx to forward(), nothing can be attached to
the graph (see attention/recovery/replay.py). The modules that were given a bias in such a place are
remembered.
"""

from __future__ import annotations

import weakref
from typing import Any, List

from .._torch_internals import current_graph_task
from ..attention.recovery import replay

_CURE = (
    "the torch.autograd.Function around it does not hand its ctx to forward() (setup_context), "
    "or is not written in "
    "Python. Open attention_bias(...) inside the checkpointed function, or use "
    "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
)
# The set of these modules, once there is one. Until then an empty list, which costs nothing to look
# at.
modules: List[weakref.WeakSet[Any]] = []


def remember(module: Any) -> None:
    """`module` is given a bias here: note it where a recomputation would be without."""
    if replay.out_of_reach():
        if not modules:
            modules.append(weakref.WeakSet())
        modules[0].add(module)


def check(module: Any) -> None:
    """RuntimeError if `module`, which has no bias here, is being recomputed and had one that cannot
    be found again."""
    if modules and module in modules[0] and current_graph_task() != -1 and not replay.repeating():
        raise RuntimeError(
            f"attention_bias: {type(module).__name__} is recomputed in a backward pass without "
            "the bias that its "
            f"forward had: {_CURE}"
        )


def refuse(module: Any) -> None:
    """RuntimeError, in the forward pass, where a recomputation could not even be told to be one."""
    if replay.out_of_reach():
        raise RuntimeError(
            f"attention_bias: a recomputation of {type(module).__name__} would be without it: "
            f"{_CURE}"
        )
