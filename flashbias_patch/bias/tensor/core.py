"""Define BiasTensor: a tensor that keeps the description of a bias.

Between the code that creates a bias and the attention, the bias is passed as a tensor: transposed,
expanded over heads, reshaped to (B*H, M, N), cast to half, added to a mask. A BiasTensor keeps its
description through these operations: an AttentionBias, and a layout that maps dimensions to axes.
Attention reads the description. Any other operation uses the dense tensor, which is computed once;
a log line names the place.

There are three layers. `__torch_function__`: operations that keep the description (registry.py);
all others run on the dense tensor. Autograd: a BiasTensor depends on the learned tensors of its
description (_Describe), for code that does not dispatch in Python, such as checkpointing.
`__torch_dispatch__`: operations from C++ or inside transforms run on the dense tensor.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from typing import Any, ContextManager, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from ..._torch_internals import tree_map
from ..base import AttentionBias
from . import layout as layouts
from . import terms
from .layout import Layout
from .learned_gradient import LearnedGradient

FORMS = ("mn", "bmn", "bhmn")
TRACING = ("FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode", "PythonKeyTracer")
run: Any = None  # registry.run, set by the package
_lock = threading.RLock()
graph_task = internals.current_graph_task
_interpreter = internals.current_transform
no_functions = internals.no_functions


class BiasTensor(Tensor):
    """A tensor that keeps the description of a bias; created by `described` and by operations."""

    _bias: Optional[AttentionBias]  # None: there is only the dense tensor
    _layout: Layout
    # function, arguments and keywords that computed it from another BiasTensor
    _replay: Optional[Tuple[Any, Any, Any]]
    _parents: Tuple[BiasTensor, ...]
    _children: List[Any]  # weak references
    _shares: bool  # it shares the memory of its parents, or may
    _dense: Optional[Tensor]
    _dense_version: Optional[int]  # of _dense when it was computed; views of it change it too
    _shared: bool  # its memory is in other hands, whose changes cannot be seen
    _observed: bool  # its own gradient is needed: all tensors computed from it are dense
    _used: bool  # attention has read the description
    # gradients of the tensor itself, while torch.autograd.grad runs for it
    _wanted: Optional[List[Tensor]]
    _handle: Optional[Tensor]

    def attention_bias(self, B: int, H: int, M: int, N: int) -> Optional[AttentionBias]:
        """Return the bias for attention of that size, or None if it must use `numbers()`.

        Raises:
            ValueError: the shape does not fit.
        """
        if self._bias is None or not self._described() or self._bias.shape[2:] != (M, N):
            return None
        reading = layouts.readable(self._layout, B, H, M, N)
        if reading is None:
            return None
        for tensor in (self, *self._ancestors()):
            tensor._used = True
        if torch.is_grad_enabled() and self._learned():
            copy = self._bias._copy()
            copy._sources = ((self, reading),)
            return copy
        return self._bias

    def numbers(self) -> Tensor:
        """Return the dense tensor, computed once; differentiable in the tensors of the
        description."""
        if _interpreter() is not None:  # a tensor of a transform must not outlive it
            return self._make() if self._dense is None else self._dense
        with _lock:
            if self._dense is None or (
                internals.is_inference(self._dense) and not torch.is_inference_mode_enabled()
            ):
                with torch.enable_grad(), no_functions(), _uncounted(), _without_modes():
                    dense = self._make()
                    if dense.requires_grad and not self._shares and dense._is_view():
                        # Changed in place, a view would lose its hooks.
                        dense = Values.apply(dense, dense.data)
                    if self._made_elsewhere():
                        dense, self._bias = _Numbers.apply(dense.detach(), self), None
                self._dense, self._dense_version = dense, internals.version(dense)
            return self._dense

    def _make(self) -> Tensor:
        outdated = not self._shares and any(parent._changed() for parent in self._parents)
        if self._replay is not None and (self._bias is None or not outdated):
            function, args, kwargs = tree_map(to_numbers, self._replay)
            made: Tensor = function(*args, **kwargs)
            return made
        return _dense_of(self._bias, self._layout, self.dtype)

    def _learned(self) -> List[Tensor]:
        return [] if self._bias is None else [t for t in self._bias.tensors() if t.requires_grad]

    def _described(self) -> bool:
        """Return True if the description holds and may be used."""
        return not (
            self._bias is None or self._must_be_dense() or self._changed() or self._made_elsewhere()
        )

    def _must_be_dense(self) -> bool:
        return self._observed or any(parent._must_be_dense() for parent in self._parents)

    def _changed(self) -> bool:
        """Return True if its memory was changed through a view, or may have been."""
        dense, version = self._dense, self._dense_version
        if self._shared:
            return True
        if dense is not None and version is not None and version != internals.version(dense):
            return True
        return self._shares and any(parent._changed() for parent in self._parents)

    def _made_elsewhere(self) -> bool:
        """Return True if another autograd.Function returned it: gradients must pass through that,
        and the description, which was read inside it, has none."""
        with no_functions():
            made_by = self.grad_fn
        return made_by is not None and getattr(made_by, "_forward_cls", None) is not _Describe

    def _ancestors(self) -> List[BiasTensor]:
        """Return the tensors that it was computed from, each once."""
        ancestors: List[BiasTensor] = []
        for parent in self._parents:
            for one in (parent, *parent._ancestors()):
                if all(one is not other for other in ancestors):
                    ancestors.append(one)
        return ancestors

    def _family(self) -> List[BiasTensor]:
        """Return all living tensors that may share its memory, itself included."""
        relatives: List[BiasTensor] = []
        queue = [self]
        while queue:
            tensor = queue.pop()
            if all(tensor is not other for other in relatives):
                relatives.append(tensor)
                queue += (tensor._parents if tensor._shares else ()) + tuple(
                    c for c in tensor._living() if c._shares
                )
        return relatives

    def _descend_from(self, parents: Tuple[BiasTensor, ...], shares: bool) -> None:
        self._parents, self._shares = parents, shares
        reference = weakref.ref(self)
        for parent in parents:
            alive = [each for each in parent._children if each() is not None]
            parent._children = [*alive, reference]

    def _living(self) -> List[BiasTensor]:
        return [
            child for child in (reference() for reference in self._children) if child is not None
        ]

    def _before_change(self) -> BiasTensor:
        """Return a copy with the old value, for tensors that were computed from it and share no
        memory."""
        old = _wrapper(self._bias, self._layout, self.dtype)
        old._replay, old._parents, old._shares = self._replay, self._parents, self._shares
        old._observed, old._used = self._observed, self._used

        def earlier(value: Any) -> Any:
            return old if value is self else value

        for child in self._living():
            if not child._shares:
                child._replay = tree_map(earlier, child._replay)
                child._parents = tuple(map(earlier, child._parents))
        self._children = []
        return old

    def gradient_for(self, ancestor: BiasTensor, grad: Tensor) -> Tensor:
        """Return the gradient of `ancestor` from a dense gradient of this tensor."""
        again = torch.is_grad_enabled()  # create_graph
        with torch.enable_grad(), no_functions():
            leaf = ancestor.numbers().detach().requires_grad_()
            value = self._made_of(ancestor, leaf)
            if value is leaf:
                return grad.to(leaf.dtype)
            (gradient,) = torch.autograd.grad(value, leaf, grad.to(value.dtype), create_graph=again)
        return gradient

    def _made_of(self, ancestor: BiasTensor, leaf: Tensor) -> Tensor:
        if self is ancestor:
            return leaf

        def again(value: Any) -> Any:
            return value._made_of(ancestor, leaf) if type(value) is BiasTensor else value

        if self._replay is None:
            return self.numbers().detach()
        function, args, kwargs = tree_map(again, self._replay)
        made: Tensor = function(*args, **kwargs)
        return made

    def handle(self) -> List[Tensor]:
        """Return leaves that mark uses of this tensor and of its ancestors in a graph."""
        roots = [tensor for tensor in (self, *self._ancestors()) if not tensor._parents]
        for root in roots:
            if root._handle is None:
                with torch.inference_mode(False):
                    root._handle = torch.zeros((), requires_grad=True)
        return [root._handle for root in roots if root._handle is not None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_to_plain_numbers, (args, kwargs or {}))
        return func(*args, **kwargs)


def described(
    bias: AttentionBias, form: str = "bmn", dtype: Optional[torch.dtype] = None
) -> Tensor:
    """Return `bias` as a BiasTensor; while torch traces a graph, as a dense tensor.

    form: "mn" (M, N), "bmn" (B, M, N) or "bhmn" (B, H, M, N). dtype: of the tensor, by default that
    of the first floating tensor of the bias; torch.bool for a sum of masks, True = masked out. The
    description keeps the precision of its own tensors in any case.

    Raises:
        ValueError: the form leaves out a dimension along which the bias changes, or is not one of
            the three.
    """
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    left_out = [axis for axis, size in zip("bhmn", bias.shape) if size != 1 and axis not in form]
    if left_out:
        raise ValueError(
            f"form: {form!r} leaves out {', '.join(left_out)} of a bias of shape {bias.shape}"
        )
    if not terms.is_known(bias):
        raise ValueError(f"bias: {bias!r} cannot be described as a tensor")
    sizes = dict(zip("bhmn", bias.shape))
    layout = tuple(layouts.dim_of(axis, sizes[axis]) for axis in form)
    if dtype is None:
        masks = all(isinstance(term, terms.MASKS) for term in bias._terms())
        floating = [t.dtype for t in bias.tensors() if t.is_floating_point()]
        dtype = torch.bool if masks else floating[0]
    return _dense_of(bias, layout, dtype) if traced() else new(bias, layout, dtype)


def new(
    bias: AttentionBias,
    layout: Layout,
    dtype: torch.dtype,
    replay: Optional[Tuple[Any, Any, Any]] = None,
    parents: Tuple[BiasTensor, ...] = (),
    is_view: bool = False,
) -> BiasTensor:
    if not torch.is_grad_enabled():
        bias = bias._map(_without_grad)
    learned = [tensor for tensor in bias.tensors() if tensor.requires_grad]
    if learned:
        result: BiasTensor = _Describe.apply(None, bias, layout, dtype, *learned)
    else:
        result = _wrapper(bias, layout, dtype)
    result._replay = replay
    result._descend_from(parents, is_view)
    return result


def dense_view(owner: BiasTensor, view: Tensor) -> BiasTensor:
    """Return `view`, of the memory of `owner`'s dense tensor, as a BiasTensor without description:
    its changes in place are changes of `owner`."""
    layout = tuple(layouts.dim_of(layouts.SAME, size) for size in view.shape)
    result = _wrapper(None, layout, view.dtype, view.device)
    result._dense, result._dense_version = view, internals.version(view)
    result._descend_from((owner,), True)
    if view.requires_grad:
        rebind(result, None, layout)
    return result


def is_leaf(tensor: BiasTensor) -> bool:
    """Return True for a leaf that has a gradient."""
    with no_functions():
        return tensor.is_leaf and tensor.requires_grad


def follows(tensor: BiasTensor) -> bool:
    """Return True if the dense tensor is what `connect_leaf` made."""
    made_by = None if tensor._dense is None else tensor._dense.grad_fn
    return getattr(made_by, "_forward_cls", None) is Values


def connect_leaf(tensor: BiasTensor) -> None:
    """Make the dense tensor of a leaf follow the leaf in the graph, to which all gradients go."""
    values = tensor.numbers().detach()
    # For code that saved the values nothing has changed.
    with torch.enable_grad(), no_functions(), (internals.same_version or _nothing)(values):
        tensor._dense = Values.apply(tensor, values)
    tensor._dense_version = internals.version(values)


def _wrapper(
    bias: Optional[AttentionBias],
    layout: Layout,
    dtype: torch.dtype,
    device: Optional[torch.device] = None,
) -> BiasTensor:
    if device is None:
        assert bias is not None
        device = bias.tensors()[0].device
    result = internals.wrapper_subclass(
        BiasTensor, layouts.shape_of(layout), dtype=dtype, device=device
    )
    result._bias, result._layout, result._replay, result._parents = bias, layout, None, ()
    result._children, result._dense, result._wanted, result._handle = [], None, None, None
    result._observed = result._used = result._shares = result._shared = False
    result._dense_version = None
    return result


def rebind(tensor: BiasTensor, bias: Optional[AttentionBias], layout: Layout) -> None:
    """Set the value of a tensor after a change in place: `bias`, or `_dense` if that is None."""
    tensor._bias, tensor._layout, tensor._dense_version = bias, layout, None
    if bias is not None:
        tensor._dense = None
    learned = (
        tensor._learned()
        if bias is not None
        else [t for t in (tensor._dense,) if t is not None and t.requires_grad]
    )
    if learned and torch.is_grad_enabled():
        _Describe.apply(tensor, bias, layout, tensor.dtype, *learned)


def _nothing(_: Tensor) -> ContextManager[Any]:
    return contextlib.nullcontext()


class _Describe(internals.Function):
    """Connect a BiasTensor in the graph to the learned tensors of its description.

    Gradients of the dense tensor reach them by this function. With `changed`, an existing
    BiasTensor is connected; if the description is None, to its dense tensor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        changed: Optional[BiasTensor],
        bias: Optional[AttentionBias],
        layout: Layout,
        dtype: torch.dtype,
        *learned: Tensor,
    ) -> BiasTensor:
        ctx.set_materialize_grads(False)
        ctx.description, ctx.places = None, [0]
        if bias is not None:
            ctx.description = bias._map(_without_grad), layout, dtype
            ctx.places = [
                index for index, tensor in enumerate(bias.tensors()) if tensor.requires_grad
            ]
        if changed is None:
            return _wrapper(bias, layout, dtype)
        ctx.mark_dirty(changed)
        return changed

    @staticmethod
    @internals.once_differentiable
    def backward(ctx: Any, grad: Optional[Tensor]) -> Any:
        gradients: List[Optional[Tensor]] = [None] * len(ctx.places)
        if type(grad) is LearnedGradient:
            gradients, grad = [grad._gradients[index] for index in ctx.places], grad._dense
        if grad is not None:
            through_dense = (
                [grad]
                if ctx.description is None
                else _through_numbers(ctx.description, ctx.places, grad)
            )
            gradients = [
                b if a is None else a if b is None else a + b
                for a, b in zip(gradients, through_dense)
            ]
        return (None, None, None, None, *gradients)


class Values(internals.Function):
    """Put `values` in the graph in the place of `tensor`, whose values they are."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, values: Tensor) -> Tensor:
        ctx.mark_dirty(values)  # not a view
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Numbers(internals.Function):
    """Connect the dense tensor of a BiasTensor to whatever returned that."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, tensor: BiasTensor) -> Tensor:
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad


def _through_numbers(
    description: Tuple[AttentionBias, Layout, torch.dtype], places: List[int], grad: Tensor
) -> Sequence[Optional[Tensor]]:
    """Return the gradients of the tensors at `places` from that of the dense tensor."""
    bias, layout, dtype = description
    leaves: List[Tensor] = []
    counted = itertools.count()

    def leaf(tensor: Tensor) -> Tensor:
        if next(counted) not in places:
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        dense = _dense_of(bias._map(leaf), layout, dtype)
        return torch.autograd.grad(dense, leaves, grad, allow_unused=True)


def _dense_of(bias: Optional[AttentionBias], layout: Layout, dtype: torch.dtype) -> Tensor:
    assert bias is not None
    dense = terms.boolean(bias) if dtype is torch.bool else bias.dense()
    return layouts.spread(layout, dense).to(dtype)


def _without_grad(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _uncounted() -> ContextManager[Any]:
    """Return a context in which a checkpoint does not count saved tensors.

    The dense tensor is computed only once, so a recomputation would save fewer tensors.
    """
    return internals.uncounted_saved_tensors()


def _without_modes() -> ContextManager[Any]:
    """Return a context without dispatch modes, whose tensors must not be kept."""
    return internals.without_modes() if internals.dispatch_modes() else contextlib.nullcontext()


def to_numbers(value: Any) -> Any:
    return value.numbers() if type(value) is BiasTensor else value


def _to_plain_numbers(value: Any) -> Any:
    return value.numbers().detach() if type(value) is BiasTensor else value


def traced() -> bool:
    """Return True while torch traces a graph, which cannot contain descriptions."""
    if internals.tracing_state() is not None:
        return True
    if not internals.dispatch_modes():
        return False
    return any(type(mode).__name__ in TRACING for mode in internals.dispatch_mode_stack())
