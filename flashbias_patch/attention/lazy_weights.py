"""The attention weights that torch.nn.MultiheadAttention returns, computed when they are used."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import AttentionBias
from ..bias.tensor.core import Values
from . import observe
from . import weights as computing
from .recovery import replay

_HALF = (torch.float16, torch.bfloat16)
_make_wrapper_subclass = internals.wrapper_subclass
_without_torch_function = internals.no_functions
_forward_ad = internals.forward_ad
_lock = threading.RLock()  # a first read by several threads
_same_version = internals.same_version or (lambda _: contextlib.nullcontext())


class CallArguments:
    """The arguments of one attention call, from which its weights can be computed.

    `tensors`: q, k, then the masks and the tensors of the bias. `handles`: leaves that mark uses of
    bias tensors, see observe.py.
    """

    def __init__(
        self, q: Tensor, k: Tensor, bias: Optional[AttentionBias], attn_mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor], average: bool, batched: bool, grad: bool,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.bias, self.average, self.batched, self.grad = bias, average, batched, grad
        self.dtype = dtype
        self.hooks = _hooks_in_force()
        self.masked = attn_mask is not None, key_padding_mask is not None
        self.tensors: List[Tensor] = [q, k]
        self.handles: List[Tensor] = []
        self.versions: List[Tuple[str, Tensor, int]] = []  # of what may be changed in place
        if attn_mask is not None:
            self.add("attn_mask", attn_mask)
        if key_padding_mask is not None:
            self.add("key_padding_mask", key_padding_mask)
        if bias is not None:
            for tensor in bias.tensors():
                self.add("attention_bias", tensor)
            if bias._sources:
                self.handles = observe.handles_of(bias)

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors += (tensor,)
        try:
            self.versions += ((name, tensor, tensor._version),)
        except RuntimeError:  # of inference mode: torch does not count its changes
            pass

    def check(self) -> None:
        """Raise RuntimeError if an argument is not what it was."""
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"{name} was changed in place after the attention that used it, so its "
                    "weights cannot be computed "
                    "any more: read the weights earlier, or change a copy"
                )
            if internals.is_freed(tensor):
                raise RuntimeError(
                    f"the memory of {name} was freed after the attention that used it (as "
                    "FSDP does with parameters after a module's forward), so its weights cannot "
                    "be computed any more: read the weights inside that module"
                )

    def weights(
        self, tensors: Sequence[Tensor], handles: Optional[Sequence[Tensor]] = None
    ) -> Tensor:
        """The weights, from `tensors`, and `handles`, in place of the call's own."""
        self.check()
        given = iter(tensors)
        q, k = next(given), next(given)
        masks = [next(given) if present else None for present in self.masked]
        bias = self.bias
        if bias is not None and tensors is not self.tensors:
            bias = bias._map(lambda _: next(given))
        with _no_autocast(q.device.type):
            weights = computing.attention_weights(
                q, k, bias, attn_mask=masks[0], key_padding_mask=masks[1], handles=handles
            )
            if self.average:
                weights = weights.mean(1)
            return (weights if self.batched else weights[0]).to(self.dtype)

    def saving(self) -> ContextManager[Any]:
        """Return a context in which a checkpoint that began after the call counts no saved tensors.

        The weights are computed only once: its recomputation would save fewer.
        """
        if _hooks_in_force() == self.hooks:
            return contextlib.nullcontext()
        return internals.uncounted_saved_tensors()


def _hooks_in_force() -> Any:
    """A weak reference to the saved-tensor hooks in force, those of a checkpoint too."""
    hooks = replay.innermost.get()
    return None if hooks is None else weakref.ref(hooks)


def _no_autocast(device_type: str) -> Any:
    return (
        internals.autocast(device_type, enabled=False)
        if device_type in ("cpu", "cuda")
        else contextlib.nullcontext()
    )


class LazyWeights(Tensor):
    """Attention weights that are computed when something other than their shape is first used.

    Every torch function that receives them works on the computed tensor, `_result`, whose gradients
    reach q, k and the bias. Code that is not a torch function, such as an autograd.Function, uses
    the object, which is in the graph itself. `_Connect` puts it there. Where either changes in the
    graph (a change in place, a hook, another Function), the other follows: `_rebind`, `Values`.
    The weights are those before dropout.
    """

    _call: Optional[CallArguments]
    _result: Optional[Tensor]
    _node: Any  # the object's grad_fn which `_result` follows, or which follows it; None: _Connect
    _seen: Any  # the grad_fn of `_result` then: a view of it can change it
    _follows: bool  # `_result` must follow the object, as it has no graph of its own
    _output: Any  # of checkpointed_weights.py: notes that somebody used them

    @staticmethod
    def of(
        q: Tensor, k: Tensor, bias: Optional[AttentionBias], attn_mask: Optional[Tensor],
        key_padding_mask: Optional[Tensor], average: bool, batched: bool,
    ) -> LazyWeights:  # fmt: skip
        """The weights of one call, whose arguments are those of `attention_weights`.

        Args:
            average: over the heads, (B, M, N); else (B, H, M, N).
            batched: False leaves B, which is 1, out of the shape.
        """
        B, M, H, _ = q.shape
        N, dtype = k.shape[1], q.dtype
        if batched:
            shape: Tuple[int, ...] = (B, M, N) if average else (B, H, M, N)
        else:
            shape = (M, N) if average else (H, M, N)
        if q.is_cuda and dtype in _HALF and torch.is_autocast_enabled():
            dtype = torch.float32  # what torch's softmax returns under CUDA's autocast
        grad = torch.is_grad_enabled()
        call = CallArguments(q, k, bias, attn_mask, key_padding_mask, average, batched, grad, dtype)
        # A Function without jvp fails in forward-mode differentiation.
        if grad and internals.current_transform() is None and _forward_ad._current_level < 0:
            weights: LazyWeights = _connect(call, shape, *call.tensors, *call.handles)
        else:
            weights = _make_wrapper_subclass(LazyWeights, shape, dtype=dtype, device=q.device)
        weights._call, weights._result, weights._node, weights._seen = call, None, None, None
        weights._follows, weights._output = False, None
        return weights

    def computed(self) -> Tensor:
        """The weights as an ordinary tensor."""
        # Made outside a transform and read inside, what is kept must not be of the transform.
        if internals.current_transform() is not None and self.requires_grad:
            with internals.outside_transforms(), _lock:
                return self._in_step()
        with _lock:
            return self._in_step()

    def _in_step(self) -> Tensor:
        """`_result`, in step with the object."""
        if self._output is not None:
            self._output.used = True
        if self._result is None:
            self._compute()
        result = self._result
        assert result is not None
        if self._changed():
            if torch.is_grad_enabled():
                self._rebind()
            elif replay.inside_function():
                raise RuntimeError(
                    "attention weights were changed through a view, and then given to an "
                    "autograd.Function (or a reentrant checkpoint): their gradient would be that "
                    "of the weights before the change; give it weights.clone()"
                )
        elif torch.is_grad_enabled():
            node = self._own_node()
            if (
                node is not None
                and node is not self._node
                and (self._follows or not _is_connect(node))
            ):
                self._result = result = Values.apply(self, result.data)
                self._node, self._seen = node, result.grad_fn
        return result

    def _changed(self) -> bool:
        """True if a view of `_result` was changed with a graph."""
        result = self._result
        return result is not None and result.grad_fn is not self._seen

    def _compute(self) -> None:
        call = self._call
        assert call is not None
        # With a graph if the call's was made with one, whatever the reader's mode is; read without
        # gradients, the object's own place in the graph is enough.
        with_graph = call.grad and torch.is_grad_enabled() and not self._follows
        connected = self.requires_grad
        if call.grad and not connected:  # in a transform
            with_graph = True
        with torch.inference_mode(False), torch.set_grad_enabled(with_graph), call.saving():
            result = call.weights(call.tensors)
        self._follows = connected and not with_graph
        self._result, self._seen = result, result.grad_fn
        self._call = None
        if connected and with_graph and internals.same_version is not None:
            # It leaves the call, which can be freed. For code that saved it nothing has changed.
            with _without_torch_function(), internals.same_version(self):
                self.detach_()
                self._rebind()

    def _own_node(self) -> Any:
        with _without_torch_function():
            return self.grad_fn

    def _rebind(self) -> None:
        """The object follows `_result` in the graph."""
        result = self._result
        assert result is not None
        with _without_torch_function(), torch.enable_grad():
            if self.retains_grad and result.requires_grad:
                result.retain_grad()
            if result.requires_grad:
                _Follow.apply(self, result)
            else:
                self.detach_()
        self._node, self._seen, self._follows = self._own_node(), result.grad_fn, False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def _answers(self, func: Any) -> bool:
        """True if the object itself must answer, from its place in the graph."""
        if func in _HOOKS and (self._result is None or self._follows):
            with _without_torch_function():
                self._follows = self.requires_grad
            return self._follows
        return func in _GRAD and self._follows

    def places(self) -> List[Any]:
        """Where the gradients stand that together are those of the weights: tensors, and the
        object's own place in the graph."""
        result = self._result
        if result is None or self._follows or not result.requires_grad:
            return [self._place()]
        return [self._place(), result] if self.requires_grad and self._node is None else [result]

    def _place(self) -> Any:
        if not self.requires_grad:
            return self.computed()
        if internals.gradient_edge is None:
            return self
        with _without_torch_function():
            return internals.gradient_edge(self)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # C++ code, for which no torch function is called. Its graph is that of the object.
        return func(*computed_in(args, detach=True), **computed_in(kwargs or {}, detach=True))

    def __hash__(self) -> int:
        return id(self)


_NAMES = ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "_base")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _NAMES),
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    torch.is_floating_point,
}
_GRAD = {getattr(Tensor.grad, name) for name in ("__get__", "__set__", "__delete__")}
_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
# Functions that begin a backward pass, and what takes their place: filled by weights_gradients.py.
BACKWARD: Dict[Any, Callable[..., Any]] = {}
_DETACH = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


def _run_directly(func: Any, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
    """Call a torch function one of whose arguments is a LazyWeights."""
    weights = args[0] if args and isinstance(args[0], LazyWeights) else None
    if func in _METADATA or (weights is not None and weights._answers(func)):
        with _without_torch_function():
            return func(*args, **kwargs)
    if func in BACKWARD:
        return BACKWARD[func](*args, **kwargs)
    if func in _DETACH:
        with torch.no_grad():
            return func(*computed_in(args), **computed_in(kwargs))
    if weights is None or not _changes(func):
        returned = func(*computed_in(args), **computed_in(kwargs))
        # As torch's own methods that have nothing to do: float(), contiguous().
        return returned if weights is None or returned is not weights._result else weights
    result = weights.computed()
    before = result.requires_grad, result.grad_fn
    returned = func(*computed_in(args), **computed_in(kwargs))
    if func in _HOOKS:
        with _without_torch_function(), _same_version(weights):
            weights._rebind()
    elif before != (result.requires_grad, result.grad_fn):
        weights._rebind()
    return weights if returned is result else returned


_run = _run_directly


def shield_from_dynamo(dynamo: Any) -> None:
    """Make torch.compile break its graph where weights are used, and compile nothing inside."""
    global _run
    _run = internals.outside_of_dynamo(dynamo, _run_directly)


if "torch._dynamo" in sys.modules:
    shield_from_dynamo(sys.modules["torch._dynamo"])


def _changes(func: Any) -> bool:
    """True for functions that change a tensor, or its place in the graph."""
    name: str = getattr(func, "__name__", "")
    if name.startswith("__"):
        return (
            name in ("__set__", "__setitem__") or name.startswith("__i") and name not in _NO_CHANGE
        )
    return name.endswith("_") or func in _HOOKS


_NO_CHANGE = ("__invert__", "__index__", "__int__", "__iter__")


def computed_in(value: Any, detach: bool = False) -> Any:
    """`value` with every LazyWeights in it, or in its lists, tuples and dicts, computed.

    detach: without the graph of those that are in one themselves.
    """
    if isinstance(value, LazyWeights):
        if not detach:
            return value.computed()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not value.requires_grad):
            computed = value.computed()
        return computed.detach() if value.requires_grad else computed
    if type(value) in (list, tuple):
        return type(value)([computed_in(item, detach) for item in value])
    if type(value) is dict:
        return {key: computed_in(item, detach) for key, item in value.items()}
    return value


class _Connect(internals.Function):
    """Weights in the graph of q, k, the masks and the bias, for gradients of the object itself."""

    @staticmethod
    def forward(
        ctx: Any, call: CallArguments, shape: Tuple[int, ...], *tensors: Tensor
    ) -> LazyWeights:
        ctx.call = call
        ctx.materialize_grads = False
        weights: LazyWeights = _make_wrapper_subclass(
            LazyWeights, shape, dtype=call.dtype, device=tensors[0].device
        )
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Any:
        call, needed = ctx.call, ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needed))
        leaves = (None,) * len(call.handles)
        needed = needed[: len(call.tensors)]
        create_graph = torch.is_grad_enabled()
        # Not the call's own, whose hooks would see these gradients too; and q's graph can lead to
        # the same handles.
        handles = [torch.zeros_like(handle, requires_grad=True) for handle in call.handles]
        tensors = [t.view_as(t) if create_graph else t.detach() for t in call.tensors]
        if not create_graph:
            for tensor, need in zip(tensors, needed):
                tensor.requires_grad_(need)
        with torch.enable_grad():
            gradients = iter(
                torch.autograd.grad(
                    call.weights(tensors, handles),
                    [*(t for t, need in zip(tensors, needed) if need), *handles],
                    grad,
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )
        return (None, None, *(next(gradients) if need else None for need in needed), *leaves)


_connect = internals.apply_of(_Connect)


def _is_connect(node: Any) -> bool:
    return getattr(node, "_forward_cls", None) is _Connect


class _Follow(internals.Function):
    """The object follows the computed tensor in the graph."""

    @staticmethod
    def forward(ctx: Any, weights: LazyWeights, result: Tensor) -> LazyWeights:
        ctx.mark_dirty(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad
