"""Parts of torch that some versions lack, with a replacement for each.

Checked on torch 1.9, 1.13 and 2.1 to 2.13, unless a comment says otherwise. `MISSING` lists the
features that this torch lacks, for `flashbias doctor` and the log.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    MutableMapping,
    Optional,
    Tuple,
    Type,
    TypeVar,
)

import torch
import torch.utils.checkpoint
from torch.autograd import forward_ad as forward_ad

# Map and flatten nested dicts, lists and tuples. In every torch seen, so nothing replaces them.
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_map as tree_map

_Subclass = TypeVar("_Subclass", bound=torch.Tensor)
_Backward = TypeVar("_Backward", bound=Callable[..., Any])
if TYPE_CHECKING:  # both lack annotations in some versions

    class Function(torch.autograd.Function):
        """torch.autograd.Function."""

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any: ...

    def once_differentiable(backward: _Backward) -> _Backward: ...

else:
    Function = torch.autograd.Function
    once_differentiable = torch.autograd.function.once_differentiable

_C: Any = torch._C
VERSION = str(torch.__version__)
RELEASE: Tuple[int, int] = tuple(int(part) for part in torch.__version__.split(".")[:2])  # type: ignore[assignment]
# (feature, first version of torch with it, replacement without it); only features that users
# notice.
FEATURES = (
    (
        "scaled_dot_product_attention with a scale",
        (2, 1),
        "all attention is computed by plain matrix products, in chunks",
    ),
    ("the fused Triton kernels", (2, 1), "the same"),
    (
        "torch function modes",
        (1, 13),
        "code that imported multi_head_attention_forward by name is not patched",
    ),
    (
        "use_reentrant=False",
        (1, 11),
        "checkpoints are reentrant, and a learned bias is passed to them as an argument",
    ),
    ("tensor subclasses without storage", (1, 11), "C++ code that reads a described bias gets NaN"),
)
MISSING = tuple(feature for feature in FEATURES if feature[1] > RELEASE)


def _none(*args: Any) -> None:
    return None


def _zero() -> int:
    return 0


def _no(*args: Any) -> bool:
    return False


def _has_no_storage(tensor: torch.Tensor) -> bool:
    return not _C._has_storage(tensor)


def missing() -> List[str]:
    """Return one line per feature that this torch lacks and that users may notice."""
    return [
        f"{name} (since torch {major}.{minor}): {instead}"
        for name, (major, minor), instead in MISSING
    ]


is_compiling: Callable[[], bool] = getattr(
    getattr(torch, "compiler", None), "is_compiling", _no
)  # since torch 2.3


def _probed_graph_task() -> int:
    """Return 0 in a backward pass, else -1: a final callback can be queued only in such a pass.

    It replaces _current_graph_task_id, which torch before 2.1 lacks.
    """
    try:
        torch.autograd.Variable._execution_engine.queue_callback(_none)
    except RuntimeError:
        return -1
    return 0


# The id of the backward pass that runs in this thread; -1 if there is none.
current_graph_task: Callable[[], int] = getattr(_C, "_current_graph_task_id", _probed_graph_task)
# will_execute(node): True if that pass executes the node, now or later. None before torch 2.1,
# where a pass has no id either. queue_callback(function): call the function when the pass ends.
will_execute: Optional[Callable[[Any], bool]] = getattr(_C, "_will_engine_execute_node", None)
queue_callback: Callable[[Callable[[], None]], None] = (
    torch.autograd.Variable._execution_engine.queue_callback
)
# True if that pass keeps its graph (torch 2.8 and later; False before).
keeps_graph: Callable[[], bool] = getattr(_C._autograd, "_get_current_graph_task_keep_graph", _no)
_functorch: Any = getattr(_C, "_functorch", None)


def _active_transform() -> Any:
    return _functorch.are_transforms_active() or None


# True where forward-mode differentiation is allowed. It is off inside the forward of a
# torch.autograd.Function; no_grad does not switch it off. Before torch 1.11, which lacks it,
# no_grad is taken for such a forward.
forward_gradients: Callable[[], bool] = getattr(_C, "_is_fwd_grad_enabled", torch.is_grad_enabled)
# The engine's call below torch.autograd.backward and grad; None: use those, which is slower.
run_backward: Optional[Callable[..., Any]] = getattr(
    torch.autograd.Variable._execution_engine, "run_backward", None
)
# False in a backward pass with `inputs`, in which a reentrant checkpoint cannot deliver gradients.
# In every torch seen.
is_checkpoint_valid: Callable[[], bool] = torch.autograd._is_checkpoint_valid
# The classes of the saved-tensor hooks of a checkpoint without reentrance, and of its
# recomputation. Before torch 2.1 (): nothing is an instance.
CheckpointHooks: Any = getattr(torch.utils.checkpoint, "_checkpoint_hook", ())
RecomputationHooks: Any = getattr(torch.utils.checkpoint, "_recomputation_hook", ())
# The backward hooks of every module (register_module_full_backward_hook). In every torch seen;
# without it: none.
global_backward_hooks: Dict[int, Any] = getattr(
    torch.nn.modules.module, "_global_backward_hooks", {}
)
# Optimizer.__init__ calls it (before torch 2.0; None later): a place to see every new optimizer.
HOOK_FOR_PROFILE = "_hook_for_profile"
# The innermost active transform of torch.func (torch 1.13: functorch), or None.
current_transform: Callable[[], Any] = getattr(
    _functorch,
    "peek_interpreter_stack",
    _active_transform if hasattr(_functorch, "are_transforms_active") else _none,
)
# True for a batch of gradients of torch.autograd.grad(..., is_grads_batched=True), which is not a
# transform.
# Before torch 2.2 such a tensor is known by having no storage; before 1.11 there are none.
is_batch: Callable[[torch.Tensor], bool] = getattr(
    _functorch, "is_legacy_batchedtensor", _has_no_storage if hasattr(_C, "_has_storage") else _no
)
# The tracer of torch.jit.trace, or None.
tracing_state: Callable[[], Any] = _C._get_tracing_state
deterministic: Callable[[], bool] = _C._get_deterministic_algorithms
# The number of active modes of torch.utils._python_dispatch, and of torch.overrides.
dispatch_modes: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", _zero)
function_modes: Callable[[], int] = getattr(_C, "_len_torch_function_stack", _zero)
# A context in which __torch_function__ of subclasses is not called.
no_functions: Callable[[], ContextManager[Any]] = getattr(
    _C, "DisableTorchFunctionSubclass", _C.DisableTorchFunction
)
# A context in which __torch_function__ of modes is not called either.
all_functions_off: Callable[[], ContextManager[Any]] = _C.DisableTorchFunction
# The active saved-tensor hooks (pack, unpack), or None; called with True. Not available before
# torch 2.8.
saved_tensor_hooks: Optional[Callable[[bool], Any]] = getattr(
    _C._autograd, "_top_saved_tensors_default_hooks", None
)
# False inside torch.autograd.graph.disable_saved_tensors_hooks.
saved_tensor_hooks_allowed: Callable[[], bool] = getattr(
    _C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True
)


def _any_autocast() -> bool:
    return torch.is_autocast_enabled() or getattr(torch, "is_autocast_cpu_enabled", _no)()


def _autocast_of_gpu_alone(kind: str, enabled: bool = True) -> ContextManager[Any]:
    return torch.cuda.amp.autocast(enabled=enabled) if kind == "cuda" else contextlib.nullcontext()


# torch.autocast(kind, enabled=); before torch 1.10 the CPU has none.
autocast: Callable[..., ContextManager[Any]] = getattr(torch, "autocast", _autocast_of_gpu_alone)


def _autocast_off() -> ContextManager[Any]:
    stack = contextlib.ExitStack()
    for kind in ("cpu", "cuda"):
        stack.enter_context(autocast(kind, enabled=False))
    return stack


# any_autocast(): True if autocast is on for any device. autocast_off(): a context in which it is
# off for all devices, faster than torch.autocast(enabled=False).
any_autocast: Callable[[], bool] = getattr(_C, "_is_any_autocast_enabled", _any_autocast)
autocast_off: Callable[[], ContextManager[Any]] = getattr(_C, "_DisableAutocast", _autocast_off)


# forward_ad._current_level is -1 where no level of forward-mode differentiation is active. It is
# read in place where one function call more would count (attention/dispatch.py). In every torch
# seen.


def transformed() -> bool:
    """Return True if a transform of torch.func or a level of forward-mode differentiation is
    active."""
    return current_transform() is not None or forward_ad._current_level >= 0


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """A context without the transforms of torch.func in force, where torch can leave them."""
    functorch = sys.modules.get("torch._functorch.pyfunctorch")
    leave = getattr(functorch, "temporarily_pop_interpreter_stack", None)
    with contextlib.ExitStack() as stack:
        while leave is not None and current_transform() is not None:
            stack.enter_context(leave())
        yield


def modes() -> List[Any]:
    """Return the active dispatch and function modes."""
    from torch import overrides

    stack: List[Any] = []
    for module, name in (
        (_python_dispatch, "_get_current_dispatch_mode_stack"),
        (overrides, "_get_current_function_mode_stack"),
    ):
        stack += getattr(module, name, list)()
    return stack


def dispatch_mode_stack() -> List[Any]:
    """Return the active dispatch modes."""
    stack: List[Any] = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)()
    return stack


def constant_while_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function that torch.compile calls while it traces, and whose result it keeps.

    torch.compiler.assume_constant_result sets the same attribute, but imports all of torch._dynamo.
    Seen on torch 2.1 to 2.13; older versions do not read it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_dynamo(dynamo: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that torch.compile breaks its graph there and compiles nothing inside.

    `dynamo.disable` does this with eight function calls around each call. They are needed only
    while dynamo is active in this thread (checked on torch 2.13). If this torch cannot tell whether
    dynamo is active, they always run. Before torch 2.8 it cannot: each question takes a reference
    from the answer (None, or dynamo's callback), until Python frees it and the process crashes.
    """
    disabled: Callable[..., Any] = dynamo.disable(function)
    if RELEASE < (2, 8):
        return disabled
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
# The base classes of modes; None before torch 1.13, which lacks them or has another interface.
TorchDispatchMode: Any = (
    getattr(_python_dispatch, "TorchDispatchMode", None) if RELEASE >= (1, 13) else None
)
TorchFunctionMode: Any = (
    getattr(torch.overrides, "TorchFunctionMode", None) if RELEASE >= (1, 13) else None
)
# The class of hooks for tensors saved for the backward pass; None before torch 1.10.
try:
    from torch.autograd.graph import saved_tensors_hooks as saved_tensors_hooks
except ImportError:
    saved_tensors_hooks = None  # type: ignore[assignment, misc]


def apply_of(cls: Any) -> Callable[..., Any]:
    """apply of a torch.autograd.Function, without the Python that looks for transforms and binds
    default arguments. For calls outside transforms and compiled graphs."""
    found: Callable[..., Any] = getattr(super(torch.autograd.Function, cls), "apply", cls.apply)
    return found


# True if a Function may define setup_context and a forward without ctx (torch 2.0 and later).
SETUP_CONTEXT: bool = hasattr(torch.autograd.function, "_SingleLevelFunction")


def uncounted_saved_tensors() -> ContextManager[Any]:
    """Return a context whose saved tensors stay as they are, and are not counted by a checkpoint
    around it; a null context where torch has or allows no hooks."""
    if saved_tensors_hooks is None or not saved_tensor_hooks_allowed():
        return contextlib.nullcontext()
    return saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)


# The error of a failed CUDA allocation. Before torch 1.13 it is a RuntimeError with that message.
OutOfMemoryError: Any = getattr(torch.cuda, "OutOfMemoryError", None)
if OutOfMemoryError is None:
    OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {"__module__": "torch.cuda"})
# The index of the current CUDA device, and its current stream as an integer. None in a torch built
# without CUDA: settled launches are not used.
current_cuda_device: Optional[Callable[[], int]] = getattr(_C, "_cuda_getDevice", None)
current_cuda_stream: Optional[Callable[[int], int]] = getattr(_C, "_cuda_getCurrentRawStream", None)
# The version of the CUDA driver; None in a torch built without CUDA.
cuda_driver_version: Optional[Callable[[], int]] = getattr(_C, "_cuda_getDriverVersion", None)
# The norm of each tensor of a list, in few kernels. Seen on torch 1.13 and 2.1 to 2.13.
foreach_norm: Any = getattr(torch, "_foreach_norm", None)
# Keeps a GPU busy for a number of clock cycles. None: timings include the host's time.
cuda_sleep: Optional[Callable[[int], None]] = getattr(torch.cuda, "_sleep", None)
stream_capturing: Callable[[], bool] = getattr(torch.cuda, "is_current_stream_capturing", _no)


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that a new tensor can have, those that torch's allocator holds back
    included. Before torch 1.11 other processes' memory cannot be told."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    told = getattr(torch.cuda, "mem_get_info", None)
    if told is not None:
        return int(told(device)[0]) + held
    whole = torch.cuda.get_device_properties(device).total_memory
    return int(whole) - torch.cuda.memory_allocated(device)


def is_inference(tensor: torch.Tensor) -> bool:
    """Return True if a tensor was created in inference mode (torch 1.9 has no method for that)."""
    return version(tensor) is None


def version(tensor: torch.Tensor) -> Optional[int]:
    """Return the number of changes in place of a tensor and its views; None in inference mode,
    where torch does not count them."""
    try:
        return tensor._version
    except RuntimeError:
        return None


# A context in which changes in place of a tensor are not counted; None where torch has none.
same_version: Optional[Callable[[torch.Tensor], ContextManager[Any]]] = getattr(
    torch.autograd, "_unsafe_preserve_version_counter", None
)


# The place of a tensor in the graph, for torch.autograd.grad, which then calls no function of the
# tensor's class; None where torch has none (2.1; 2.6 has it).
gradient_edge: Optional[Callable[[torch.Tensor], Any]] = getattr(
    getattr(torch.autograd, "graph", None), "get_gradient_edge", None
)


def listed(inputs: Any) -> List[Any]:
    """Return the inputs of torch.autograd.grad as a list; a GradientEdge is a tuple."""
    return [inputs] if isinstance(inputs, torch.Tensor) or hasattr(inputs, "node") else [*inputs]


def sum_of_gradients(
    tensor: torch.Tensor,
    parts: Iterable[Optional[torch.Tensor]],
    allow_unused: Optional[bool],
    materialize_grads: bool,
) -> Optional[torch.Tensor]:
    """Return the gradient of `tensor`, which stands at several places of the graph, from those of
    the places, as torch.autograd.grad does with these keywords.

    Raises:
        RuntimeError: none was used, and that is not allowed; the text is torch.autograd.grad's.
    """
    found = [part for part in parts if part is not None]
    if found:
        return sum(found[1:], found[0])
    if materialize_grads:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if not allow_unused:
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. "
            "Set allow_unused=True if this is the desired behavior."
        )
    return None


def is_freed(tensor: torch.Tensor) -> bool:
    """Return True if the memory of a tensor was given back, as FSDP does with parameters."""
    try:
        storage = tensor.untyped_storage() if RELEASE >= (2, 0) else tensor.storage()
        return tensor.numel() > 0 and len(storage) == 0
    except (NotImplementedError, RuntimeError):  # it has no storage of its own
        return False


if hasattr(torch.Tensor, "is_inference"):
    is_inference = torch.Tensor.is_inference  # type: ignore[assignment]


def wrapper_subclass(
    cls: Type[_Subclass], shape: Tuple[int, ...], *, dtype: torch.dtype, device: torch.device
) -> _Subclass:
    """Return a tensor of the subclass `cls` without storage; __torch_function__ defines its values.

    Before torch 1.11 it has a storage of one entry, expanded to `shape`: NaN in floating dtypes,
    True or 1 in others.
    """
    entry = torch.full(
        (), float("nan") if dtype.is_floating_point else 1, dtype=dtype, device=device
    )
    return torch.Tensor._make_subclass(cls, entry.expand(shape))


if hasattr(torch.Tensor, "_make_wrapper_subclass"):
    wrapper_subclass = torch.Tensor._make_wrapper_subclass  # type: ignore[assignment]


def repeat_interleave(tensor: torch.Tensor, lengths: Any, output_size: int) -> torch.Tensor:
    """Repeat entries along the last dimension. Before torch 1.10 this synchronises with the GPU."""
    repeats = torch.tensor(lengths, device=tensor.device)
    if RELEASE < (1, 10):
        return tensor.repeat_interleave(repeats, -1)
    return tensor.repeat_interleave(repeats, -1, output_size=output_size)


def meshgrid(*axes: torch.Tensor) -> Tuple[torch.Tensor, ...]:
    """Return torch.meshgrid(..., indexing="ij"); torch before 1.10 has no other indexing."""
    options = {} if RELEASE < (1, 10) else {"indexing": "ij"}
    return tuple(torch.meshgrid(*axes, **options))


class _WeakIdKeyDictionary(MutableMapping):  # type: ignore[type-arg]
    """A replacement for torch.utils.weak.WeakIdKeyDictionary, which torch before 2.0 lacks."""

    def __init__(self) -> None:
        self._entries: Any = {}

    def __setitem__(self, key: Any, value: Any) -> None:
        number = id(key)
        self._entries[number] = weakref.ref(key, lambda _: self._entries.pop(number, None)), value

    def __getitem__(self, key: Any) -> Any:
        reference, value = self._entries[id(key)]
        if reference() is not key:
            raise KeyError(key)
        return value

    def __delitem__(self, key: Any) -> None:
        self[key]
        del self._entries[id(key)]

    def __iter__(self) -> Iterator[Any]:
        return iter(
            [
                key
                for key in (reference() for reference, _ in list(self._entries.values()))
                if key is not None
            ]
        )

    def __len__(self) -> int:
        return len(self._entries)


try:
    from torch.utils.weak import WeakIdKeyDictionary as WeakIdKeyDictionary
except ImportError:
    WeakIdKeyDictionary = _WeakIdKeyDictionary  # type: ignore[misc, assignment]
