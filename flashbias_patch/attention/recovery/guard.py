"""Guarded calls: if the backward pass of a backend raises, the gradients are computed in another
way, and training continues.

An error in a backward pass can only be caught around a separate graph. So a guarded call runs its
backend on detached operands, keeps the small graph of that, and differentiates it inside its own
backward. That costs about 14 microseconds per call, forward and backward together, so it is done
only

- for calls of at least LARGE scores, which take much longer than that. They are also the ones that
  run out of memory; and
- inside a checkpoint that records saved tensors (Replay.hooked), whose recomputation must save as
  many tensors as its forward did, whichever backend computes it.

The fused operator is guarded in such checkpoints only: it recovers inside its own backward
(Backend.recovers).
"""

from __future__ import annotations

import contextlib
import functools
import operator
from itertools import compress
from typing import TYPE_CHECKING, Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ... import _torch_internals as internals
from .. import differentiable, random_state
from ..backends.base import Backend
from ..inputs import NO_TENSORS, TENSORS, AttentionInputs
from ..signature import CallSignature
from . import backward

if TYPE_CHECKING:
    from .replay import Replay

LARGE = 1 << 25  # scores, B * H * M * N, from which on a call is guarded
PLAIN = (Tensor, torch.nn.Parameter)
Graph = Tuple[
    Tensor, List[Tensor]
]  # the backend's output, and the detached operands that it was computed from
# None before torch 2.8, which cannot tell the saved-tensor hooks in force: large calls stay
# unguarded there.
_hooks_in_force = internals.saved_tensor_hooks
_keeps_graph = internals.keeps_graph
_tracing = internals.tracing_state
_INDICES = range(len(TENSORS))
_is_given: Callable[[Any], bool] = functools.partial(operator.is_not, None)


def wanted(backend: Backend, inputs: AttentionInputs, hooked: bool) -> bool:
    """True if this call, whose signature has gradients, is to be guarded. `hooked` (see Replay) is
    True for a backend that recovers by itself."""
    q = inputs.q
    if not hooked:
        B, M, H, _ = q.shape
        if B * M * H * inputs.k.shape[1] < LARGE:
            # On the CPU, sdpa with dropout or a gradient of the dense bias is made of matrix
            # products, which an autocast that is open in the backward pass would compute in half
            # precision.
            dense = inputs.dense
            if (
                q.is_cuda
                or backend.name != "sdpa"
                or not (inputs.dropout_p or dense is not None and dense.requires_grad)
            ):
                return False
        # The caller's hooks would get the graph's tensors besides ours, and offload or recompute
        # twice as much.
        if _hooks_in_force is None or _hooks_in_force(True) is not None:
            return False
    if type(q) not in PLAIN or not torch.is_grad_enabled() or _tracing() is not None:
        return False
    if q.is_cuda and internals.stream_capturing():
        return False
    return q.requires_grad or inputs.holds_grad


class Call:
    """One guarded call: the state that its backward needs, without the tensors.

    present: indices in TENSORS of the tensors that the call has. `operands`: all, in that order.
    state: the random state before the forward; None without dropout.
    replay, call_index: of a hooked checkpoint; None elsewhere.
    """

    __slots__ = (
        "backend", "name", "signature", "present", "static", "state", "replay", "call_index",
        "graph",
    )  # fmt: skip

    def __init__(
        self, backend: Backend, name: str, signature: CallSignature, inputs: AttentionInputs,
        operands: List[Optional[Tensor]], state: Optional[random_state.State],
        replay: Optional[Replay] = None,
    ) -> None:  # fmt: skip
        self.backend, self.name, self.signature, self.state = backend, name, signature, state
        self.present = tuple(compress(_INDICES, map(_is_given, operands)))
        self.static = inputs.with_tensors(NO_TENSORS)
        self.replay = replay
        self.call_index = None if replay is None else replay.call_index
        self.graph: Optional[Graph] = None

    def attend(self, operands: List[Optional[Tensor]]) -> Tensor:
        """The output of the call, whose backward is guarded."""
        replay = self.replay
        if replay is None:
            graph = self.graph = self.run(operands)
        else:
            # The checkpoint must not see what the graph saves. In the forward pass the graph is
            # not needed at all.
            pack: Callable[[Tensor], Any] = _forget if replay.recording else Tensor.detach
            with torch.autograd.graph.saved_tensors_hooks(pack, _same):
                graph = self.run(operands)
            if not replay.recording and self.call_index is not None:
                replay.graphs[self.call_index] = graph
        return _apply(self, graph, *filter(_is_given, operands))

    def operands(self, inputs: AttentionInputs) -> List[Any]:
        """The tensors of the call that are not None."""
        tensors = inputs.tensors()
        return [tensors[index] for index in self.present]

    def placed(self, tensors: Sequence[Tensor]) -> List[Any]:
        """The tensors of the call in the order of TENSORS."""
        values: List[Any] = [*NO_TENSORS]
        for index, tensor in zip(self.present, tensors):
            values[index] = tensor
        return values

    def inputs(self, tensors: Sequence[Tensor]) -> AttentionInputs:
        return self.static.with_tensors(self.placed(tensors))

    def run(self, operands: Sequence[Any]) -> Graph:
        """The backend on detached operands, which come in the order of TENSORS. Grad mode is on."""
        leaves = [*operands]
        for index in self.present:
            if leaves[index].requires_grad:
                leaf = leaves[index] = leaves[index].detach()
                leaf.requires_grad = True
        backend, inputs = self.backend, self.static.with_tensors(leaves)
        # As `compute`, one call less.
        out = self.compute(inputs) if backend.recovers else backend(inputs)
        return out, [*filter(_is_given, leaves)]

    def compute(self, inputs: AttentionInputs) -> Tensor:
        if self.backend.recovers:
            return self.backend.recovering(inputs, backward.of_fused)
        return self.backend(inputs)

    def gradients(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grad_out: Tensor
    ) -> Sequence[Optional[Tensor]]:
        keep = _keeps_graph()
        if self.replay is None or self.call_index is None:
            graph, self.graph = self.graph, self.graph if keep else None
        else:
            graph = self.replay.graphs.pop(self.call_index, None)
        try:
            if graph is None:  # a second pass, or the recomputation used another backend
                return self.once_more(tensors, needs, grad_out)
            return differentiate(graph, needs, grad_out, keep)
        except Exception as error:
            graph = self.graph = None  # its memory is needed
            return backward.of_guarded(self, self.inputs(tensors), needs, grad_out, error)

    def once_more(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grad_out: Tensor
    ) -> Sequence[Optional[Tensor]]:
        """Forward and backward of the same backend, from the random state of its forward."""
        with self.as_in_forward(), torch.enable_grad():
            graph = self.run(self.placed(tensors))
        return differentiate(graph, needs, grad_out)

    def differentiable_gradients(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grad_out: Tensor
    ) -> Sequence[Optional[Tensor]]:
        """Under create_graph, or for a batch of gradients: by plain PyTorch (differentiable.py).

        With dropout by the backend itself, because no other one drops the same weights.
        """
        if self.state is None:
            inputs, every = self.inputs(tensors), [False] * len(TENSORS)
            for index, need in zip(self.present, needs):
                every[index] = need
            gradients = differentiable.gradients(inputs, every, grad_out)
            return [gradients[index] for index in self.present]
        aliases = [
            t.view_as(t) for t in tensors
        ]  # an operand made of another one must not count for both
        with self.as_in_forward():
            with torch.enable_grad():
                out = self.compute(self.inputs(aliases))
        return differentiate((out, aliases), needs, grad_out, create_graph=torch.is_grad_enabled())

    @contextlib.contextmanager
    def as_in_forward(self) -> Any:
        """Context manager: the random state of the forward, and no autocast."""
        now = None if self.state is None else random_state.now(self.state.device)
        random_state.restore(self.state)
        try:
            with internals.autocast_off():
                yield
        finally:
            random_state.restore(now)


def differentiate(
    graph: Graph,
    needs: Sequence[bool],
    grad_out: Tensor,
    keep: bool = False,
    create_graph: bool = False,
) -> List[Optional[Tensor]]:
    out, leaves = graph
    wanted = tuple(compress(leaves, needs))
    with internals.autocast_off():
        found = _run_backward(
            (out,), (grad_out,), keep or create_graph, create_graph, wanted, True, False
        )
    gradients: List[Optional[Tensor]] = [None] * len(leaves)
    for index, gradient in zip(compress(_INDICES, needs), found):
        gradients[index] = gradient
    return gradients


def _by_grad(
    outs: Any, grads: Any, keep: bool, create: bool, wanted: Any, unused: bool, accumulate: bool
) -> Any:
    return torch.autograd.grad(outs, wanted, grads, keep, create, allow_unused=unused)


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, graph: Graph, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        out, _ = graph
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        tensors = (
            ctx.saved_tensors
        )  # in a checkpoint this recomputes, which leaves the graph with the script
        _, _, *needs = ctx.needs_input_grad
        if differentiable.needed_in_backward(grad_out):
            return (None, None, *ctx.call.differentiable_gradients(tensors, needs, grad_out))
        return (None, None, *ctx.call.gradients(tensors, needs, grad_out))


# Called without the Python that torch wraps them in, six microseconds that are not needed here:
# Function.apply looks for transforms, inside which differentiable.py computes, and autograd.grad
# checks a gradient that the pass around ours has checked.
_apply: Callable[..., Tensor] = internals.apply_of(_Guarded)
_run_backward: Callable[..., Any] = internals.run_backward or _by_grad


def _forget(tensor: Tensor) -> None:
    return None


def _same(saved: Any) -> Any:
    return saved
