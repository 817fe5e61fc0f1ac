"""The gradient of a bias tensor that reached attention as a description (bias/tensor/).

That gradient is dense, and training does not need it: the learned weights get theirs from the
kernel. So it is computed only inside a torch.autograd.grad for that tensor: the output of attention
passes through a node that does nothing else.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor

from .. import _torch_internals as internals
from ..bias import AttentionBias
from ..bias.tensor import layout as layouts
from ..bias.tensor.core import BiasTensor, no_functions
from . import chunked_attention, differentiable
from .inputs import TENSORS, AttentionInputs

DROPOUT = (
    "the gradient of an attention bias itself is unavailable after attention with dropout: call "
    "retain_grad() on the bias "
    "before attention reads it"
)


def observed(out: Tensor, inputs: AttentionInputs, bias: AttentionBias) -> Tensor:
    """`out`, with a node that computes the gradient of the bias tensors behind `bias`."""
    if not (torch.is_grad_enabled() and out.requires_grad) or internals.transformed():
        return out
    handles = handles_of(bias)
    result: Tensor = _Observed.apply(
        inputs.static(), bias._sources, out, len(handles), *handles, *inputs.tensors()
    )
    return result


def observed_scores(
    scores: Tensor, bias: AttentionBias, handles: Optional[Sequence[Tensor]] = None
) -> Tensor:
    """`scores`, (B, H, M, N), with a node that passes their gradient to the bias tensors behind
    `bias`. It is run on the way to `handles`, by default those of the tensors."""
    if not torch.is_grad_enabled() or internals.transformed():
        return scores
    handles = handles_of(bias) if handles is None else handles
    result: Tensor = _ObservedScores.apply(bias._sources, scores, *handles)
    return result


def handles_of(bias: AttentionBias) -> List[Tensor]:
    """Leaves that mark uses of the bias tensors behind `bias` in a graph."""
    return [handle for tensor, _ in bias._sources for handle in tensor.handle()]


class _Observed(internals.Function):
    @staticmethod
    def forward(
        ctx: Any, static: AttentionInputs, sources: Any, out: Tensor, handles: int, *tensors: Any
    ) -> Tensor:
        ctx.static, ctx.sources, ctx.handles = static, sources, handles
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[handles:])
        return out.clone()  # a view made here could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Any:
        saved = ctx.saved_tensors  # a checkpoint gives them once
        if grad is not None:
            for tensor, reading in ctx.sources:
                if _wanted(tensor):
                    gradient = _gradient_of_scores(ctx.static.with_tensors(saved), grad)
                    _deliver(gradient, tensor, reading)
        return (None, None, grad, None, *(None,) * (ctx.handles + len(saved)))


class _ObservedScores(internals.Function):
    @staticmethod
    def forward(ctx: Any, sources: Any, scores: Tensor, *handles: Tensor) -> Tensor:
        ctx.sources, ctx.handles = sources, len(handles)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(scores)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Optional[Tensor]) -> Any:
        if grad is not None:
            for tensor, reading in ctx.sources:
                if _wanted(tensor):
                    _deliver(grad, tensor, reading)
        return (None, grad, *(None,) * ctx.handles)


def _wanted(tensor: BiasTensor) -> List[BiasTensor]:
    """That tensor and those it was computed from, if somebody asked for their gradient."""
    return [one for one in (tensor, *tensor._ancestors()) if one._wanted is not None]


def _gradient_of_scores(inputs: AttentionInputs, grad: Tensor) -> Tensor:
    """(B, H, M, N), from the gradient of the output."""
    if inputs.dropout_p:
        raise RuntimeError(DROPOUT)
    B, M, H, _ = inputs.q.shape
    wide = torch.promote_types(torch.float32, grad.dtype)
    zeros = torch.zeros(B, H, M, inputs.k.shape[1], dtype=wide, device=grad.device)
    again = torch.is_grad_enabled()  # create_graph

    def kept(tensor: Tensor) -> Tensor:
        return tensor if again else tensor.detach()

    dense = zeros if inputs.dense is None else zeros + kept(inputs.dense)
    q, k, v = (kept(tensor).to(wide) for tensor in (inputs.q, inputs.k, inputs.v))
    inputs, grad = inputs._replace(q=q, k=k, v=v, dense=dense), kept(grad).to(wide)
    if again or internals.is_batch(grad):
        dense.requires_grad_()
        needs = [name == "dense" for name in TENSORS]
        gradient = differentiable.gradients(inputs, needs, grad)[TENSORS.index("dense")]
        assert gradient is not None
    else:
        chunks = chunked_attention.chunks_of(inputs)
        gradient = chunked_attention.gradients(inputs, grad, ["dense"], chunks)["dense"]
    return gradient


def _deliver(gradient: Tensor, tensor: BiasTensor, reading: str) -> None:
    """Add what the gradient of the scores, (B, H, M, N), gives to the gradients asked for."""
    gradient = layouts.as_read(gradient, reading)
    with no_functions():
        gradient = gradient.sum_to_size(tensor.shape)
    for one in _wanted(tensor):
        assert one._wanted is not None
        one._wanted.append(tensor.gradient_for(one, gradient))
