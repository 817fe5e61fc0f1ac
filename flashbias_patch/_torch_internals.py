"""Private parts of torch that this package reads, and what stands in for each where a version lacks it.

Seen on torch 2.1 to 2.13, except where a line says otherwise.
"""
from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, List, Optional

import torch
from torch.autograd import forward_ad as _forward_ad

_C: Any = torch._C


def _none(*args: Any) -> None:
    return None


def _zero() -> int:
    return 0


is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", lambda: False)  # since torch 2.3
# The id of the backward pass that runs in this thread; -1: none does.
current_graph_task: Callable[[], int] = _C._current_graph_task_id
# Whether that pass will still come to a node of the graph, or has come to it; and to call a function when it ends.
will_execute: Callable[[Any], bool] = _C._will_engine_execute_node
queue_callback: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
# Whether that pass keeps its graph (torch 2.8 and later; without it: no).
keeps_graph: Callable[[], bool] = getattr(
    _C._autograd, "_get_current_graph_task_keep_graph", lambda: False
)
# The innermost transform of torch.func in force, or None.
current_transform: Callable[[], Any] = _C._functorch.peek_interpreter_stack
# Whether a tensor is a batch of gradients of torch.autograd.grad(..., is_grads_batched=True), which is no transform.
is_batch: Callable[[torch.Tensor], bool] = getattr(_C._functorch, "is_legacy_batchedtensor", lambda tensor: False)
# The tracer of torch.jit.trace, or None.
tracing_state: Callable[[], Any] = _C._get_tracing_state
deterministic: Callable[[], bool] = _C._get_deterministic_algorithms
# How many modes of torch.utils._python_dispatch, and of torch.overrides, are in force.
dispatch_modes: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", _zero)
function_modes: Callable[[], int] = getattr(_C, "_len_torch_function_stack", _zero)
# The (pack, unpack) of saved-tensor hooks in force, or None; called with True. Before torch 2.8 it cannot be told.
saved_tensor_hooks: Optional[Callable[[bool], Any]] = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
# Whether saved-tensor hooks are allowed (torch.autograd.graph.disable_saved_tensors_hooks).
saved_tensor_hooks_allowed: Callable[[], bool] = getattr(
    _C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True
)


def _any_autocast() -> bool:
    return torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled()


def _autocast_off() -> ContextManager[Any]:
    stack = contextlib.ExitStack()
    for kind in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


# Whether autocast is on for any device; and a context in which it is off for all. torch.autocast(enabled=False) is slower.
any_autocast: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", _any_autocast)
autocast_off: Callable[[], ContextManager[Any]] = getattr(_C, "_DisableAutocast", _autocast_off)


def transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is in force."""
    return current_transform() is not None or _forward_ad._current_level >= 0


def modes() -> List[Any]:
    """The dispatch and function modes that are in force."""
    from torch import overrides
    from torch.utils import _python_dispatch

    found: List[Any] = []
    for module, name in (
        (_python_dispatch, "_get_current_dispatch_mode_stack"), (overrides, "_get_current_function_mode_stack"),
    ):  # fmt: skip
        found += getattr(module, name, list)()
    return found


def outside_of_dynamo(dynamo: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, at which torch.compile breaks its graph, and inside which it compiles nothing.

    `dynamo.disable` does this with eight function calls around each call. They are needed only while dynamo is in force
    in this thread (seen on torch 2.13); where that cannot be told, always.
    """
    disabled: Callable[..., Any] = dynamo.disable(function)
    callback = getattr(getattr(getattr(_C, "_dynamo", None), "eval_frame", None), "get_eval_frame_callback", None)
    skip = getattr(getattr(dynamo, "decorators", None), "skip", None)
    if callback is None or skip is None:
        return disabled

    def shielded(*args: Any) -> Any:
        return function(*args) if callback() is None else disabled(*args)

    skip(shielded)
    return shielded
