"""Attention in plain differentiable operators, where fused kernels cannot be differentiated as
asked.

That is inside transforms of torch.func (grad, vmap, jvp, jacrev, hessian, ...), under forward-mode
differentiation, in a backward pass that is itself to be differentiated (create_graph=True), and in
one over a batch of gradients (is_grads_batched). The scores are materialised, as
torch.nn.MultiheadAttention does.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .. import _torch_internals as internals
from . import reference_attention
from .inputs import TENSORS, AttentionInputs

Attend = Callable[[AttentionInputs], Tensor]

OWN = ("triton", "sdpa", "reference")  # backends that do so themselves
_transform = internals.current_transform
_tracing = internals.tracing_state
_hooks = internals.saved_tensor_hooks
_fused_nodes: Dict[
    type, bool
] = {}  # whether an autograd node of that kind is one of SDPA's fused kernels


def needed_in_backward(grad_out: Tensor) -> bool:
    """True if a backward pass with that gradient must be computed here."""
    return torch.is_grad_enabled() or _transform() is not None or internals.is_batch(grad_out)


def attend(inputs: AttentionInputs) -> Tensor:
    """The output of a call, (B, M, H, Dv)."""
    return reference_attention.attend(inputs)


def gradients(
    inputs: AttentionInputs, needs: Sequence[bool], grad_out: Tensor, compute: Attend = attend
) -> List[Optional[Tensor]]:
    """Gradients of the tensors of a call, in the order of TENSORS, None where `needs` says so.

    They are differentiable if grad mode is on, as it is under create_graph. `compute` repeats the
    forward.
    """
    again = torch.is_grad_enabled()
    aliases: List[Optional[Tensor]] = []
    with torch.enable_grad(), internals.autocast_off():
        for tensor, need in zip(inputs.tensors(), needs):
            # An operand that was made of another one must not count for both.
            aliases.append(tensor.view_as(tensor) if need and tensor is not None else tensor)
        out = compute(inputs.with_tensors(aliases))
        wanted = [alias for alias, need in zip(aliases, needs) if need and alias is not None]
        found = iter(
            torch.autograd.grad(out, wanted, grad_out, create_graph=again, allow_unused=True)
        )
    return [
        next(found) if need and alias is not None else None for alias, need in zip(aliases, needs)
    ]


def allow_again(
    node: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], scale: float
) -> None:
    """Let the gradients of torch's scaled_dot_product_attention be differentiated again; `node`
    made its output.

    Its fused kernels have no second derivative. Their operands, (B, H, L, D), are alive as long as
    the node has them saved: a weak reference holds no memory. Under saved-tensor hooks, as of a
    checkpoint, the node has something else saved: there it stays as torch has it.
    """
    kind = type(node)
    if kind not in _fused_nodes:
        _fused_nodes[kind] = kind.__name__.startswith("ScaledDotProduct")
    if not _fused_nodes[kind] or _tracing() is not None:
        return
    if _hooks is None or _hooks(True) is None:
        reference = weakref.ref
        # torch saves a copy of the mask.
        node.register_hook(
            functools.partial(
                _gradients_again, reference(q), reference(k), reference(v), [attn_mask], scale
            )
        )


def _gradients_again(
    q: Any,
    k: Any,
    v: Any,
    kept: List[Optional[Tensor]],
    scale: float,
    found: Tuple[Optional[Tensor], ...],
    grads: Tuple[Optional[Tensor], ...],
) -> Optional[Tuple[Optional[Tensor], ...]]:
    """In place of the gradients `found`, those that can be differentiated. None, which keeps
    `found`, without create_graph."""
    if not torch.is_grad_enabled():
        if not internals.keeps_graph():
            kept.clear()
        return None
    operands, (grad_out, *_) = [_alive(reference) for reference in (q, k, v)], grads
    if grad_out is None or not kept or any(operand is None for operand in operands):
        return None
    operands += kept
    wanted = [gradient is not None for gradient in found] + [False] * (len(operands) - len(found))
    _, _, _, mask_wanted, *_ = wanted
    if mask_wanted:
        _, _, _, mask_gradient, *_ = found
        (attn_mask,) = kept
        if mask_gradient.shape != attn_mask.shape:  # type: ignore[union-attr]
            return None  # it was widened in between
    aliases: List[Any] = [
        t.view_as(t) if t is not None and need else t for t, need in zip(operands, wanted)
    ]
    with internals.autocast_off():
        query, key, value, mask = aliases
        out = _plain(query, key, value, mask, scale)
        asked = [alias for alias, need in zip(aliases, wanted) if need]
        again = iter(
            torch.autograd.grad(out, asked, grad_out, create_graph=True, allow_unused=True)
        )
    return tuple(next(again) if need else None for need in wanted[: len(found)])


def _alive(reference: Any) -> Optional[Tensor]:
    tensor: Optional[Tensor] = reference()
    if tensor is not None:
        getattr(tensor, "_fix_weakref", lambda: None)()  # torch.utils.weak.TensorWeakRef
    return tensor


def _plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Optional[Tensor], scale: float) -> Tensor:
    """scaled_dot_product_attention in differentiable operators, (B, H, L, D)."""
    masked = attn_mask is not None and attn_mask.dtype is torch.bool
    inputs = AttentionInputs(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale,
        dense=None if masked else attn_mask, mask=~attn_mask if masked else None,  # type: ignore[operator]
    )  # fmt: skip
    return reference_attention.attend(inputs).transpose(1, 2)


def attach(out: Tensor, inputs: AttentionInputs) -> Tensor:
    """`out` of a backend, without dropout, such that its gradients can be differentiated again.

    An ordinary backward pass goes through the backend's own graph. Only one under create_graph is
    computed here.
    """
    if _tracing() is not None or type(out) is not Tensor:
        return out
    if _hooks is not None:
        hooks = _hooks(True)
        # The user's hooks would get the operands a second time; save_on_cpu would copy them.
        if hooks is not None:
            pack, _ = hooks
            if getattr(pack, "__module__", "") != "torch.utils.checkpoint":
                return out
    (
        q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, _, scale,
        windows, window_mask, _,
    ) = inputs  # fmt: skip
    if windows is None and window_mask is None:
        return _apply(
            out,
            (lengths, scale),
            q,
            k,
            v,
            q_factor,
            k_factor,
            weights,
            dense,
            mask,
            padding,
            None,
            None,
            None,
        )
    return _apply(out, inputs.static(), *inputs.tensors())


class _Attached(torch.autograd.Function):
    """The identity in `out`, which remembers what `out` was computed from."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, static: Any, *tensors: Optional[Tensor]) -> Tensor:
        ctx.static = static
        ctx.save_for_backward(*tensors)
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Tuple[Optional[Tensor], ...]:
        if not needed_in_backward(grad_out):
            return (grad_out, *_NOTHING)
        static = ctx.static
        if not isinstance(static, AttentionInputs):
            lengths, scale = static
            static = AttentionInputs(None, None, None, segment_lengths=lengths, scale=scale)  # type: ignore[arg-type]
        inputs = static.with_tensors(ctx.saved_tensors)
        _, _, *needs = ctx.needs_input_grad
        return (None, None, *gradients(inputs, needs, grad_out))


_NOTHING = (None,) * (1 + len(TENSORS))
# Inside transforms nothing is attached.
_apply: Callable[..., Tensor] = internals.apply_of(_Attached)
