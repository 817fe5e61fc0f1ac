"""Parts of torch that not every version has, and what stands in for each where a version lacks it.

Seen on torch 1.9, 1.13 and 2.1 to 2.13, except where a line says otherwise. `MISSING` names the
features that this torch lacks, for `flashbias doctor` and the log.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Callable, ContextManager, Iterator, List, MutableMapping, Optional, Tuple

import torch
from torch.autograd import forward_ad as _forward_ad

_C: Any = torch._C
VERSION = str(torch.__version__)
RELEASE: Tuple[int, int] = tuple(int(part) for part in torch.__version__.split(".")[:2])  # type: ignore[assignment]
# (feature, the torch that has it, what is done without it) of what users notice.
FEATURES = (
    (
        "scaled_dot_product_attention with a scale",
        (2, 1),
        "plain matrix products, in chunks, compute every attention",
    ),
    ("the fused Triton kernels", (2, 1), "the same"),
    (
        "torch function modes",
        (1, 13),
        "code that imported multi_head_attention_forward by name is left as it is",
    ),
    (
        "use_reentrant=False",
        (1, 11),
        "checkpoints are reentrant, and a learned bias becomes one of their arguments",
    ),
    (
        "tensor subclasses without storage",
        (1, 11),
        "C++ code that reads a described bias meets NaN",
    ),
)
MISSING = tuple(feature for feature in FEATURES if feature[1] > RELEASE)


def _none(*args: Any) -> None:
    return None


def _zero() -> int:
    return 0


def _no(*args: Any) -> bool:
    return False


def missing() -> List[str]:
    """What this torch lacks that users may notice, a line each."""
    return [
        f"{name} (since torch {major}.{minor}): {instead}"
        for name, (major, minor), instead in MISSING
    ]


is_compiling: Callable[[], bool] = getattr(
    getattr(torch, "compiler", None), "is_compiling", _no
)  # since torch 2.3


def _probed_graph_task() -> int:
    """The same before torch 2.1: 0 in a backward pass, else -1. Only in a pass can a final callback
    be queued."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(_none)
    except RuntimeError:
        return -1
    return 0


# The id of the backward pass that runs in this thread; -1: none does.
current_graph_task: Callable[[], int] = getattr(_C, "_current_graph_task_id", _probed_graph_task)
# Whether that pass will still come to a node of the graph, or has come to it; and to call a
# function when it ends. None before torch 2.1, where a pass has no id either.
will_execute: Optional[Callable[[Any], bool]] = getattr(_C, "_will_engine_execute_node", None)
queue_callback: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)
# Whether that pass keeps its graph (torch 2.8 and later; without it: no).
keeps_graph: Callable[[], bool] = getattr(_C._autograd, "_get_current_graph_task_keep_graph", _no)
_functorch: Any = getattr(_C, "_functorch", None)


def _active_transform() -> Any:
    return _functorch.are_transforms_active() or None


# The innermost transform of torch.func (torch 1.13: functorch) in force, or None.
current_transform: Callable[[], Any] = getattr(
    _functorch,
    "peek_interpreter_stack",
    _active_transform if hasattr(_functorch, "are_transforms_active") else _none,
)
# Whether a tensor is a batch of gradients of torch.autograd.grad(..., is_grads_batched=True), which
# is no transform.
is_batch: Callable[[torch.Tensor], bool] = getattr(_functorch, "is_legacy_batchedtensor", _no)
# The tracer of torch.jit.trace, or None.
tracing_state: Callable[[], Any] = _C._get_tracing_state
deterministic: Callable[[], bool] = _C._get_deterministic_algorithms
# How many modes of torch.utils._python_dispatch, and of torch.overrides, are in force.
dispatch_modes: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", _zero)
function_modes: Callable[[], int] = getattr(_C, "_len_torch_function_stack", _zero)
# A context in which __torch_function__ of subclasses is not called.
no_functions: Callable[[], ContextManager[Any]] = getattr(
    _C, "DisableTorchFunctionSubclass", _C.DisableTorchFunction
)
# One in which no mode's is called either.
all_functions_off: Callable[[], ContextManager[Any]] = _C.DisableTorchFunction
# The (pack, unpack) of saved-tensor hooks in force, or None; called with True. Before torch 2.8 it
# cannot be told.
saved_tensor_hooks: Optional[Callable[[bool], Any]] = getattr(
    _C._autograd, "_top_saved_tensors_default_hooks", None
)
# Whether saved-tensor hooks are allowed (torch.autograd.graph.disable_saved_tensors_hooks).
saved_tensor_hooks_allowed: Callable[[], bool] = getattr(
    _C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True
)


def _any_autocast() -> bool:
    return torch.is_autocast_enabled() or getattr(torch, "is_autocast_cpu_enabled", _no)()


def _autocast_of_gpu_alone(kind: str, enabled: bool = True) -> ContextManager[Any]:
    return torch.cuda.amp.autocast(enabled=enabled) if kind == "cuda" else contextlib.nullcontext()  # type: ignore


# torch.autocast(kind, enabled=): before torch 1.10 there is none for the CPU.
autocast: Callable[..., ContextManager[Any]] = getattr(torch, "autocast", _autocast_of_gpu_alone)


def _autocast_off() -> ContextManager[Any]:
    stack = contextlib.ExitStack()
    for kind in ("cpu", "cuda"):
        stack.enter_context(autocast(kind, enabled=False))
    return stack


# Whether autocast is on for any device; and a context in which it is off for all.
# torch.autocast(enabled=False) is slower.
any_autocast: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", _any_autocast)
autocast_off: Callable[[], ContextManager[Any]] = getattr(_C, "_DisableAutocast", _autocast_off)


def transformed() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is in
    force."""
    return current_transform() is not None or _forward_ad._current_level >= 0


def modes() -> List[Any]:
    """The dispatch and function modes that are in force."""
    from torch import overrides

    found: List[Any] = []
    for module, name in (
        (_python_dispatch, "_get_current_dispatch_mode_stack"),
        (overrides, "_get_current_function_mode_stack"),
    ):
        found += getattr(module, name, list)()
    return found


def outside_of_dynamo(dynamo: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, at which torch.compile breaks its graph, and inside which it compiles nothing.

    `dynamo.disable` does this with eight function calls around each call. They are needed only
    while dynamo is in force in this thread (seen on torch 2.13); where that cannot be told, always.
    """
    disabled: Callable[..., Any] = dynamo.disable(function)
    callback = getattr(
        getattr(getattr(_C, "_dynamo", None), "eval_frame", None), "get_eval_frame_callback", None
    )
    skip = getattr(getattr(dynamo, "decorators", None), "skip", None)
    if callback is None or skip is None:
        return disabled

    def shielded(*args: Any) -> Any:
        return function(*args) if callback() is None else disabled(*args)

    skip(shielded)
    return shielded


try:
    from torch.utils import _python_dispatch
except ImportError:  # before torch 1.11
    _python_dispatch = None  # type: ignore[assignment]


@contextlib.contextmanager
def _popped_modes() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        while dispatch_modes():
            stack.enter_context(_python_dispatch._pop_mode_temporarily())
        yield


# A context without the dispatch modes in force.
without_modes: Callable[[], ContextManager[Any]] = getattr(
    _python_dispatch, "_disable_current_modes",
    _popped_modes if hasattr(_python_dispatch, "_pop_mode_temporarily") else contextlib.nullcontext,
)  # fmt: skip
# The base classes of modes, None before torch 1.13 (and for dispatch modes, where their form was
# another one).
TorchDispatchMode: Any = (
    getattr(_python_dispatch, "TorchDispatchMode", None) if RELEASE >= (1, 13) else None
)
TorchFunctionMode: Any = (
    getattr(torch.overrides, "TorchFunctionMode", None) if RELEASE >= (1, 13) else None
)
# The class of the hooks for tensors saved for backward, None before torch 1.10.
try:
    from torch.autograd.graph import saved_tensors_hooks
except ImportError:
    saved_tensors_hooks = None  # type: ignore[assignment, misc]
# A Function whose forward has no ctx (setup_context): torch 2.0 and later.
SETUP_CONTEXT: bool = hasattr(torch.autograd.function, "_SingleLevelFunction")


def own_saved_tensors(
    pack: Callable[[Any], Any], unpack: Callable[[Any], Any]
) -> ContextManager[Any]:
    """saved_tensors_hooks(pack, unpack), or nothing where there are none or they are forbidden."""
    if saved_tensors_hooks is None or not saved_tensor_hooks_allowed():
        return contextlib.nullcontext()
    return saved_tensors_hooks(pack, unpack)


# The error of a CUDA allocation that fails: a RuntimeError with that message before torch 1.13.
OutOfMemoryError: Any = getattr(torch.cuda, "OutOfMemoryError", None)
if OutOfMemoryError is None:
    OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch.cuda"})
stream_capturing: Callable[[], bool] = getattr(torch.cuda, "is_current_stream_capturing", _no)


def is_inference(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made in inference mode (torch 1.9 has no method for that)."""
    try:
        tensor._version  # noqa: B018
    except RuntimeError:
        return True
    return False


if hasattr(torch.Tensor, "is_inference"):
    is_inference = torch.Tensor.is_inference  # type: ignore[assignment]


def wrapper_subclass(
    cls: Any, shape: Tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Any:
    """A tensor of a subclass that has no numbers of its own, to be given meaning by
    __torch_function__.

    Before torch 1.11 a single number stands for all of them: NaN (True, or the least integer, in
    other dtypes).
    """
    make = getattr(torch.Tensor, "_make_wrapper_subclass", None)
    if make is not None:
        return make(cls, shape, dtype=dtype, device=device)
    one = torch.full((), float("nan") if dtype.is_floating_point else 1, dtype=dtype, device=device)
    return torch.Tensor._make_subclass(cls, one.expand(shape))


def repeat_interleave(tensor: torch.Tensor, lengths: Any, output_size: int) -> torch.Tensor:
    """Along the last dimension. Before torch 1.10 a GPU is waited for."""
    repeats = torch.tensor(lengths, device=tensor.device)
    if RELEASE < (1, 10):
        return tensor.repeat_interleave(repeats, -1)
    return tensor.repeat_interleave(repeats, -1, output_size=output_size)


def meshgrid(*axes: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """torch.meshgrid(..., indexing="ij"), which is what torch before 1.10 does without being
    told."""
    options = {} if RELEASE < (1, 10) else {"indexing": "ij"}
    return tuple(torch.meshgrid(*axes, **options))  # type: ignore[arg-type]


class _WeakIdKeyDictionary(MutableMapping):  # type: ignore[type-arg]
    """torch.utils.weak.WeakIdKeyDictionary, as far as it is used here: torch 2.0 and later have
    it."""

    def __init__(self) -> None:
        self._found: Any = {}

    def __setitem__(self, key: Any, value: Any) -> None:
        number = id(key)
        self._found[number] = weakref.ref(key, lambda _: self._found.pop(number, None)), value

    def __getitem__(self, key: Any) -> Any:
        reference, value = self._found[id(key)]
        if reference() is not key:
            raise KeyError(key)
        return value

    def __delitem__(self, key: Any) -> None:
        self[key]
        del self._found[id(key)]

    def __iter__(self) -> Iterator[Any]:
        return iter(
            [
                key
                for key in (reference() for reference, _ in list(self._found.values()))
                if key is not None
            ]
        )

    def __len__(self) -> int:
        return len(self._found)


try:
    from torch.utils.weak import WeakIdKeyDictionary
except ImportError:
    WeakIdKeyDictionary = _WeakIdKeyDictionary  # type: ignore[misc, assignment]
