"""The gradient of a bias tensor that reached attention as a description (bias/tensor/).

That gradient is dense, and training does not need it: the learned weights get theirs from the
kernel. So it is computed only inside a torch.autograd.grad for that tensor: the output of attention
passes through a node that does nothing else.
"""

from __future__ import annotations

from typing import Any, List, Optional

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
    handles = [handle for tensor, _ in bias._sources for handle in tensor.handle()]
    result: Tensor = _Observed.apply(
        inputs.static(), bias._sources, out, len(handles), *handles, *inputs.tensors()
    )
    return result


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
        rest = (None,) * (ctx.handles + len(ctx.saved_tensors))
        if grad is not None:
            for tensor, reading in ctx.sources:
                wanted = [one for one in (tensor, *tensor._ancestors()) if one._wanted is not None]
                if wanted:
                    _deliver(
                        ctx.static.with_tensors(ctx.saved_tensors), grad, tensor, reading, wanted
                    )
        return (None, None, grad, None, *rest)


def _deliver(
    inputs: AttentionInputs,
    grad: Tensor,
    tensor: BiasTensor,
    reading: str,
    wanted: List[BiasTensor],
) -> None:
    if inputs.dropout_p:
        raise RuntimeError(DROPOUT)
    B, M, H, _ = inputs.q.shape
    wide = torch.promote_types(torch.float32, grad.dtype)
    zeros = torch.zeros(B, H, M, inputs.k.shape[1], dtype=wide, device=grad.device)
    dense = zeros if inputs.dense is None else zeros + inputs.dense.detach()
    inputs = inputs._replace(
        q=inputs.q.detach().to(wide),
        k=inputs.k.detach().to(wide),
        v=inputs.v.detach().to(wide),
        dense=dense,
    )
    grad = grad.detach().to(wide)
    if internals.is_batch(grad):
        inputs = inputs._replace(dense=dense.requires_grad_())
        needs = [name == "dense" for name in TENSORS]
        gradient = differentiable.gradients(inputs, needs, grad)[TENSORS.index("dense")]
        assert gradient is not None
    else:
        chunks = chunked_attention.chunks_of(inputs)
        gradient = chunked_attention.gradients(inputs, grad, ["dense"], chunks)["dense"]
    gradient = layouts.as_read(gradient, reading)
    with no_functions():
        gradient = gradient.sum_to_size(tensor.shape)
    for one in wanted:
        assert one._wanted is not None
        one._wanted.append(tensor.gradient_for(one, gradient))
