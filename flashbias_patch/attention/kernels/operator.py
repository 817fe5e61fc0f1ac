"""`fused_attention`: the kernels as one differentiable operator, registered with torch.library where torch has it."""

from __future__ import annotations

import logging
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from . import launch
from .recompute import Call, plain_backward

log = logging.getLogger("flashbias_patch")
_told = False


def _recompute(call: Call, grad_out: Tensor, error: BaseException) -> Tuple[Any, ...]:
    global _told
    if not _told:
        _told = True
        log.warning(
            "the fused backward pass failed (%s); gradients are recomputed by plain PyTorch, slower", error
        )
    return plain_backward(call, grad_out)


# on_backward_failure(call, grad_out, error) -> the seven gradients; the dispatcher may set its own.
on_backward_failure: Callable[[Call, Tensor, BaseException], Tuple[Any, ...]] = _recompute


def _problem(
    q: Tensor, k: Tensor, v: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor], weights: Optional[Tensor],
    lengths: Sequence[int], dense: Optional[Tensor], mask: Optional[Tensor], padding: Optional[Tensor],
    dropout_p: float, scale: float, prepared: Sequence[Tensor] = (),
) -> launch.Problem:  # fmt: skip
    """The call as the kernels want it; `prepared` is what forward had to copy for that (empty: nothing)."""
    rank = 0 if q_factor is None else q_factor.shape[-1]
    if prepared:
        q, q_factor, k_factor = (  # type: ignore[assignment]
            new if new.numel() else old for new, old in zip(prepared, (q, q_factor, k_factor))
        )
    else:
        q, q_factor, k_factor = launch.prepare(q, q_factor, k_factor, scale)
    q, k, v = launch.unit_last(q), launch.unit_last(k), launch.unit_last(v)
    factors = [None if t is None else launch.unit_last(t) for t in (q_factor, k_factor, weights)]
    dense = None if dense is None else launch.unit_last(dense)
    mask, padding = launch.as_bytes(mask), launch.as_bytes(padding)
    return launch.Problem(q, k, v, *factors, tuple(lengths), dense, mask, padding, dropout_p, scale, rank)  # type: ignore


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor], weights: Optional[Tensor],
    lengths: Sequence[int], dense: Optional[Tensor], mask: Optional[Tensor], padding: Optional[Tensor],
    dropout_p: float, scale: float, training: bool = True,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, what it lost by rounding, lse, the dropout seed, and the copies made of q, q_factor, k_factor (each empty
    where there is none)."""
    problem = _problem(q, k, v, q_factor, k_factor, weights, lengths, dense, mask, padding, dropout_p, scale)
    if dropout_p > 0:
        seed = torch.randint(1 << 62, (1,), dtype=torch.int64, device=q.device)
    else:
        seed = torch.empty(0, dtype=torch.int64, device=q.device)
    out, low, lse = launch.forward(problem, seed, training)
    padded = q_factor is not None and launch.block_columns(problem.rank) != problem.rank
    return (
        out, low, lse, seed,
        problem.q if problem.scaled else q.new_empty(0),
        problem.q_factor if padded and problem.q_factor is not None else q.new_empty(0),
        problem.k_factor if padded and problem.k_factor is not None else q.new_empty(0),
    )  # fmt: skip


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor], weights: Optional[Tensor],
    lengths: Sequence[int], dense: Optional[Tensor], mask: Optional[Tensor], padding: Optional[Tensor],
    dropout_p: float, scale: float,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, M, H, D = q.shape
    copies = [q.new_empty(q.shape) if launch.scales_q(q_factor, scale) else q.new_empty(0)]
    for factor in (q_factor, k_factor):
        columns = 0 if factor is None else launch.block_columns(factor.shape[-1])
        if factor is not None and columns != factor.shape[-1]:
            copies.append(factor.new_empty(*factor.shape[:3], columns))
        else:
            copies.append(q.new_empty(0))
    seed = torch.empty(1 if dropout_p > 0 else 0, dtype=torch.int64, device=q.device)
    return (
        q.new_empty(B, M, H, D),
        q.new_empty(B, M, H, D) if q.dtype != torch.float32 and q.numel() and k.numel() else q.new_empty(0),
        q.new_empty(B * H, M, dtype=torch.float32),
        seed,
        copies[0],
        copies[1],
        copies[2],
    )


def _backward(
    grad_out: Tensor, out: Tensor, low: Tensor, lse: Tensor, seed: Tensor, new_q: Tensor, new_qf: Tensor, new_kf: Tensor,
    q: Tensor, k: Tensor, v: Tensor, q_factor: Optional[Tensor], k_factor: Optional[Tensor], weights: Optional[Tensor],
    lengths: Sequence[int], dense: Optional[Tensor], mask: Optional[Tensor], padding: Optional[Tensor],
    dropout_p: float, scale: float, needs: Sequence[bool],
) -> List[Tensor]:  # fmt: skip
    """The seven gradients, an empty tensor for each that is not needed."""
    inputs = (q, k, v, q_factor, k_factor, weights, tuple(lengths), dense, mask, padding, dropout_p, scale)
    tensors = (q, k, v, q_factor, k_factor, weights, dense)
    try:
        problem = _problem(*inputs, prepared=(new_q, new_qf, new_kf))
        dtypes = [None if t is None else t.dtype for t in tensors]
        grads = launch.backward(problem, launch.Needs(*needs), grad_out, out, low, lse, seed, dtypes)
    except Exception as error:
        grads = on_backward_failure(Call(*inputs, seed, tuple(needs)), grad_out, error)
    return [q.new_empty(0) if grad is None else grad.contiguous() for grad in grads]


def _backward_fake(grad_out: Tensor, out: Tensor, low: Tensor, lse: Tensor, seed: Tensor, new_q: Tensor, new_qf: Tensor,
                   new_kf: Tensor, *rest: Any) -> List[Tensor]:  # fmt: skip
    tensors = tuple(rest[:6]) + (rest[7],)
    return [
        t.new_empty(t.shape) if need and t is not None else grad_out.new_empty(0)
        for need, t in zip(rest[-1], tensors)
    ]


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_factor, Tensor? k_factor, Tensor? weights, int[] lengths, "
    "Tensor? dense, Tensor? mask, Tensor? padding, float dropout_p, float scale"
)


def _save(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:6], *inputs[7:10])
    ctx.constants = (inputs[6], inputs[10], inputs[11])


def _gradients(run: Callable[..., Any], ctx: Any, grad_out: Optional[Tensor]) -> Tuple[Any, ...]:
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 2, 3, 4, 5, 7)]
    if grad_out is None or not any(needs):
        return (None,) * 12
    saved = ctx.saved_tensors
    lengths, dropout_p, scale = ctx.constants
    made, given = saved[:7], saved[7:]
    grads = run(grad_out, *made, *given[:6], lengths, *given[6:], dropout_p, scale, needs)
    wanted = [grad if need else None for grad, need in zip(grads, needs)]
    return (*wanted[:6], None, wanted[6], None, None, None, None)


if hasattr(torch.library, "custom_op"):
    _names = ("flashbias_patch::fused_attention", "flashbias_patch::fused_attention_backward")
    _op = torch.library.custom_op(
        _names[0], _forward, mutates_args=(), schema="({}) -> ({})".format(_INPUTS, ", ".join(["Tensor"] * 7))
    )
    _op_backward = torch.library.custom_op(
        _names[1], _backward, mutates_args=(),
        schema="(Tensor grad_out, Tensor out, Tensor low, Tensor lse, Tensor seed, Tensor new_q, Tensor new_qf, "
               f"Tensor new_kf, {_INPUTS}, bool[] needs) -> Tensor[]",
    )  # fmt: skip
    _op.register_fake(_forward_fake)
    _op_backward.register_fake(_backward_fake)
    _op.register_autograd(lambda ctx, grad, *unused: _gradients(_op_backward, ctx, grad), setup_context=_save)
else:
    _op = None  # type: ignore[assignment]


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = _forward(*inputs, training=any(ctx.needs_input_grad))  # type: ignore[misc]
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Optional[Tensor], *unused: Any) -> Any:
        return _gradients(_backward, ctx, grad_out)


def _apply(*inputs: Any) -> Any:
    # Small problems wait for the processor: outside a compiled graph the registered operator's layers only cost.
    compiling = _op is not None and torch.compiler.is_compiling()
    return _op(*inputs) if compiling else _FusedAttention.apply(*inputs)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_factor: Optional[Tensor] = None,
    k_factor: Optional[Tensor] = None,
    segment_weights: Optional[Tensor] = None,
    segment_lengths: Optional[Sequence[int]] = None,
    dense: Optional[Tensor] = None,
    mask: Optional[Tensor] = None,
    key_padding: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    scale: Optional[float] = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v by the Triton kernels; differentiable in all but mask and key_padding.

    Shapes as AttentionInputs has them, all tensors on one device: q (B, M, H, D), k and v (B, N, H, D) in float16,
    bfloat16 or float32; q_factor (B|1, M, H|1, R), k_factor (B|1, N, H|1, R) in q's dtype, R <= 64;
    segment_weights (B|1, M, H|1, S) with segment_lengths summing to N; dense (B|1, H|1, M|1, N) floating;
    mask (B|1, H|1, M|1, N) bool, True hides; key_padding (B, N) bool (True hides) or floating (added).
    A row that sees no key gives zeros. Inputs are trusted: `flash_bias_attention` is the validating door.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    lengths = list(segment_lengths or ()) if segment_weights is not None else []
    return _apply(
        q, k, v, q_factor, k_factor, segment_weights, lengths, dense, mask, key_padding, dropout_p, scale
    )[0]
