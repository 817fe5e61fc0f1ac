"""Other backends' backward passes, guarded: one that raises is answered by another way, and training goes on.

An error in a backward pass can only be caught around a graph of one's own. So a guarded call runs its backend on
detached operands, keeps the small graph that this leaves, and differentiates it inside its own backward. That costs
some 25 microseconds a call, forward and backward together, so it is done only

- for calls of at least LARGE scores, whose own time dwarfs that. They are also the ones that run out of memory; and
- inside a checkpoint that records saved tensors (Script.hooked), whose recomputation must save as many tensors as
  its forward did, whichever backend answers it.

The fused operator needs none of this elsewhere: it rescues inside its own backward (kernels/operator.py).
"""
from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import random_state
from .inputs import AttentionInputs

LARGE = 1 << 25  # scores, B * H * M * N, from which on a call is guarded
OWN_RESCUE = ("triton",)  # backends that guard themselves
PLACES = (0, 1, 2, 3, 4, 5, 7, 8, 9)  # of the tensors in AttentionInputs, in the order of reference.TENSORS
PLAIN = (Tensor, torch.nn.Parameter)
Graph = Tuple[Tensor, List[Tensor]]  # the backend's output, and the detached operands that it was computed from
# The saved-tensor hooks in force, which older torch (before 2.8) does not tell: there, large calls stay unguarded.
_hooks_in_force: Optional[Callable[[bool], Any]] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: False
)


def wanted(name: str, inputs: AttentionInputs, hooked: bool) -> bool:
    """Whether this call, of a class that wants gradients, is to be guarded. `hooked`: see Script."""
    q = inputs.q
    if not hooked:
        B, M, H, _ = q.shape
        if name in OWN_RESCUE or B * M * H * inputs.k.shape[1] < LARGE:
            return False
        # Someone's hooks would see the graph's tensors beside ours: twice the offloading or recomputing.
        if _hooks_in_force is None or _hooks_in_force(True) is not None:
            return False
    if type(q) not in PLAIN or not torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs)


class Call:
    """One guarded call: what its backward needs to know, without the tensors.

    `state` is the random state before the forward (None without dropout); `rescue` answers a backward that failed:
    rescue(call, inputs, needs, grad_out, error) -> gradients. `script` and `place` are of a hooked checkpoint.
    """

    __slots__ = ("backend", "name", "key", "places", "constants", "state", "autocast", "rescue", "script", "place",
                 "graph")  # fmt: skip

    def __init__(self, backend: Any, name: str, key: Any, inputs: AttentionInputs, state: Any, rescue: Any,
                 script: Any = None) -> None:  # fmt: skip
        self.backend, self.name, self.key, self.state, self.rescue = backend, name, key, state, rescue
        self.places = [place for place in PLACES if inputs[place] is not None]
        self.constants = inputs[6], inputs[10], inputs[11]
        self.autocast = _autocast(inputs.q.device.type)
        self.script, self.place = script, None if script is None else script.place
        self.graph: Optional[Graph] = None

    def answer(self, inputs: AttentionInputs) -> Tensor:
        return _Guarded.apply(self, *[inputs[place] for place in self.places])  # type: ignore[no-any-return]

    def inputs(self, tensors: Sequence[Tensor]) -> AttentionInputs:
        values: List[Any] = [None] * 12
        values[6], values[10], values[11] = self.constants
        for place, tensor in zip(self.places, tensors):
            values[place] = tensor
        return AttentionInputs(*values)

    def run(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> Graph:
        """The backend on detached operands."""
        leaves = [t.detach().requires_grad_(need) if t.requires_grad else t for t, need in zip(tensors, needs)]
        with torch.enable_grad():
            return self.backend(self.inputs(leaves)), leaves

    def forward(self, tensors: Sequence[Tensor], needs: Sequence[bool]) -> Tensor:
        script = self.script
        if script is None:
            self.graph = self.run(tensors, needs)
            return self.graph[0].detach()
        # What the graph saves is none of the checkpoint's business. The first time it is not needed at all.
        pack: Callable[[Tensor], Any] = _forget if script.recording else Tensor.detach
        with torch.autograd.graph.saved_tensors_hooks(pack, _same):
            graph = self.run(tensors, needs)
        if not script.recording:
            script.graphs[self.place] = graph
        return graph[0].detach()

    def gradients(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grad_out: Tensor
    ) -> Sequence[Optional[Tensor]]:
        keep = _keeps_graph()
        graph = self.graph if self.script is None else self.script.graphs.pop(self.place, None)
        self.graph = graph if keep and self.script is None else None
        try:
            if graph is None:  # a second pass, or a recomputation that another way had to answer
                return self.once_more(tensors, needs, grad_out)
            return differentiate(graph, needs, grad_out, keep)
        except Exception as error:
            graph = self.graph = None  # its memory is needed
            return self.rescue(self, self.inputs(tensors), needs, grad_out, error)

    def once_more(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grad_out: Tensor
    ) -> Sequence[Optional[Tensor]]:
        """Forward and backward of the same backend, from the random state of the first time."""
        with self.as_then():
            graph = self.run(tensors, needs)
        return differentiate(graph, needs, grad_out)

    def differentiable_gradients(
        self, tensors: Sequence[Tensor], needs: Sequence[bool], grad_out: Tensor
    ) -> Sequence[Optional[Tensor]]:
        """Under create_graph: unguarded, and as differentiable as the backend is."""
        aliases = [t.view_as(t) for t in tensors]  # an operand made of another one must not count for both
        with self.as_then():
            out = self.backend(self.inputs(aliases))
        return differentiate((out, aliases), needs, grad_out, create_graph=True)

    @contextlib.contextmanager
    def as_then(self) -> Any:
        """Autocast and random state as they were at the forward; put back afterwards."""
        now = None if self.state is None else random_state.now(self.state[2])
        random_state.restore(self.state)
        try:
            with self.autocast():
                yield
        finally:
            random_state.restore(now)


def differentiate(
    graph: Graph, needs: Sequence[bool], grad_out: Tensor, keep: bool = False, create_graph: bool = False
) -> List[Optional[Tensor]]:
    out, leaves = graph
    asked = [leaf for leaf, need in zip(leaves, needs) if need]
    found = iter(torch.autograd.grad(out, asked, grad_out, keep or create_graph, create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


class _Guarded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        return call.forward(tensors, ctx.needs_input_grad[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        tensors = ctx.saved_tensors  # in a checkpoint this recomputes, which leaves the graph with the script
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return (None, *ctx.call.differentiable_gradients(tensors, needs, grad_out))
        return (None, *ctx.call.gradients(tensors, needs, grad_out))


def _forget(tensor: Tensor) -> None:
    return None


def _same(saved: Any) -> Any:
    return saved


def _autocast(device: str) -> Callable[[], ContextManager[Any]]:
    """What brings back the autocast that is in force now."""
    if device not in ("cpu", "cuda"):
        return contextlib.nullcontext
    if hasattr(torch, "get_autocast_dtype"):  # since torch 2.4
        if not torch.is_autocast_enabled(device):
            return contextlib.nullcontext
        dtype = torch.get_autocast_dtype(device)
    elif device == "cuda" and torch.is_autocast_enabled():
        dtype = torch.get_autocast_gpu_dtype()
    elif device == "cpu" and torch.is_autocast_cpu_enabled():
        dtype = torch.get_autocast_cpu_dtype()
    else:
        return contextlib.nullcontext
    return lambda: torch.autocast(device, dtype=dtype)
